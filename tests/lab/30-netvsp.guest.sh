set -e
nic=/sys/class/net/eth0
up() {
    for _ in $(seq 100); do
        [ -d $nic ] && break
        sleep 0.1
    done
    ip link set eth0 up
    ip addr replace 10.0.0.2/24 dev eth0
}
# udp [iperf3 option]...: most of the datagrams arrive.
udp() {
    iperf3 -c 10.0.0.1 -u -b 5M -l 1400 -t 1 -i 0 "$@" | tee /tmp/udp | grep -E 'sender|receiver'
    sed -n 's,.* \([0-9]*\)/\([0-9]*\) (.*receiver.*,\1 \2,p' /tmp/udp | {
        read -r lost all
        [ "$all" -gt 100 ] && [ $((lost * 2)) -lt "$all" ]
    }
}

up
ethtool -i eth0 | grep '^driver: hv_netvsc'
ethtool -k eth0 | grep -E '^(tcp-segmentation|large-receive)-offload: on'
ethtool -l eth0 | grep '^Combined:' | sed 's/[[:space:]]\+/ /' | sort | uniq -c | grep "2 Combined: $(nproc)"
[ "$(cat $nic/address)" = 52:54:00:12:34:56 ]
[ "$(cat $nic/carrier)" = 1 ]
ping -c 3 -i 0.2 -W 5 10.0.0.1
ls -d $nic/queues/tx-1

printf '#!/bin/sh\necho "dhcp: $1 $ip $router"\n' >/tmp/leased
chmod +x /tmp/leased
udhcpc -i eth0 -n -q -t 20 -T 1 -s /tmp/leased 2>/dev/null | grep '^dhcp: bound 10.0.0.100 10.0.0.1$'

wget -q -O - http://10.0.0.1/file | sha256sum
iperf3 -c 10.0.0.1 -P 2 -t 1 -i 0 | grep -E 'SUM.*(sender|receiver)'
received=$(cat $nic/statistics/rx_packets)
iperf3 -c 10.0.0.1 -P 2 -t 1 -i 0 -R | grep -E 'SUM.*(sender|receiver)'
echo "reverse: $(($(cat $nic/statistics/rx_packets) - received)) frames, $(cat $nic/statistics/rx_bytes) bytes"
udp
udp -R
ethtool -S eth0 | grep -E 'tx_busy|tx_no_memory|x_queue_.*_packets'

# The NIC puts tags into frames and takes them out.
ethtool -k eth0 | grep -E '^[rt]x-vlan-offload: on'
ip link add link eth0 name eth0.7 type vlan id 7
ip link set eth0.7 up
ip addr add 10.0.7.2/24 dev eth0.7
ping -c 3 -i 0.2 -W 5 10.0.7.1
ip link del eth0.7

# A packet of 8000 bytes is one frame.
ip link set eth0 mtu 9000
up
ping -c 1 -W 5 10.0.0.1 >/dev/null
sent=$(cat $nic/statistics/tx_packets)
ping -c 5 -i 0.2 -s 8000 10.0.0.1
[ $(($(cat $nic/statistics/tx_packets) - sent)) -lt 15 ]

echo 'reload: begin'
for _ in $(seq 10); do
    rmmod hv_netvsc
    modprobe hv_netvsc
    up
done
ping -c 3 -i 0.2 -W 5 10.0.0.1
echo 'reload: done'

# carrier 0|1: the link follows the tap.
carrier() {
    for _ in $(seq 100); do
        [ "$(cat $nic/carrier)" = "$1" ] && return
        sleep 0.1
    done
    return 1
}
echo 'tap: down'
carrier 0
echo 'tap: up'
carrier 1
ping -c 3 -i 0.2 -W 5 10.0.0.1
echo 'tap: gone'
carrier 0
