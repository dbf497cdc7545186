# One of two machines. What it is stands in the kernel's command line: `machine=1`, which asks, or
# `machine=2`, which answers until it is told to end. The first has a second NIC, which leads to the host.
set -e
number=$(sed 's/.*machine=\([0-9]\).*/\1/' /proc/cmdline)
# nic ADDRESS-ENDS-IN NETWORK
nic() {
    for _ in $(seq 300); do
        device=$(grep -l "52:54:00:00:00:$1" /sys/class/net/*/address 2>/dev/null) && break
        sleep 0.1
    done
    device=$(basename "$(dirname "$device")")
    ip link set "$device" up
    ip addr add "10.0.$2.$number/24" dev "$device"
}

nic "0$number" 0
if [ "$number" = 2 ]; then
    mkdir /tmp/www
    head -c 4194304 /dev/urandom >/tmp/www/file
    sha256sum </tmp/www/file >/tmp/www/sum
    iperf3 -s -D
    httpd -h /tmp/www
    # The connection may not find this input at an end before the word has come.
    mkfifo /tmp/hold
    exec 3<>/tmp/hold
    nc -l -p 9 </tmp/hold | grep -q 'the end'
    exit
fi

lan=$device
nic 11 1
for other in 10.0.0.2 10.0.1.2; do
    until ping -c 1 -W 1 $other >/dev/null; do sleep 0.2; done
    until wget -q -O /tmp/sum http://$other/sum 2>/dev/null; do sleep 0.5; done
    [ "$(wget -q -O - http://$other/file | sha256sum)" = "$(cat /tmp/sum)" ] && echo "$other: the same"
    for way in '' -R '-u -b 5M' '-u -b 5M -R'; do
        # shellcheck disable=SC2086
        iperf3 -c $other -t 1 -i 0 $way | grep receiver | sed "s/^/$other: iperf3 $way: /"
    done
done
ip link set "$lan" mtu 9000
ip link set "$lan" up
# The other has an MTU of 1500, which does not keep its NIC from taking longer frames.
in_time ping -c 1 -W 2 -s 8000 10.0.0.2
echo 'the end' | nc 10.0.0.2 9
