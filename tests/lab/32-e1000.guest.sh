set -e
# find NUMBER: waits for the NIC whose address ends with it, and says its name.
find() {
    for _ in $(seq 100); do
        device=$(grep -l "52:54:00:00:00:0$1" /sys/class/net/*/address 2>/dev/null) && break
        sleep 0.1
    done
    basename "$(dirname "$device")"
}
up() {
    nic=$(find 1)
    ip link set "$nic" up
    ip addr replace 10.0.0.2/24 dev "$nic"
    for _ in $(seq 100); do
        [ "$(cat "/sys/class/net/$nic/carrier")" = 1 ] && break
        sleep 0.1
    done
    [ "$(cat "/sys/class/net/$nic/carrier")" = 1 ]
}

up
ethtool -i "$nic" | grep '^driver: e1000$'
ethtool -k "$nic" | grep '^tcp-segmentation-offload: on'
ethtool "$nic" | grep 'Speed: 1000Mb/s'
ethtool -K "$nic" rx on
ping -c 3 -i 0.2 -W 5 10.0.0.1
wget -q -O - http://10.0.0.1/file | sha256sum
iperf3 -c 10.0.0.1 -t 1 -i 0 | grep -E 'sender|receiver'
iperf3 -c 10.0.0.1 -t 1 -i 0 -R | grep -E 'sender|receiver'
iperf3 -c 10.0.0.1 -u -b 5M -l 1400 -t 1 -i 0 | grep -E 'sender|receiver'
# Not one checksum that came was wrong, and some were looked at.
ethtool -S "$nic" | grep 'rx_csum_offload_errors: 0$'
ethtool -S "$nic" | grep 'rx_csum_offload_good: [1-9]'
ethtool -S "$nic" | grep -E 'tx_tcp_seg_good: [1-9]|rx_missed_errors|rx_long_length'
grep "$nic" /proc/interrupts

# The NIC puts tags into frames and takes them out.
ip link add link "$nic" name tagged type vlan id 7
ip link set tagged up
ip addr add 10.0.7.2/24 dev tagged
ping -c 3 -i 0.2 -W 5 10.0.7.1
ip link del tagged

# A packet of 8000 bytes is one frame, and lies in several buffers.
ip link set "$nic" mtu 9000
up
ping -c 1 -W 5 10.0.0.1 >/dev/null
sent=$(cat "/sys/class/net/$nic/statistics/tx_packets")
ping -c 5 -i 0.2 -s 8000 -W 5 10.0.0.1
[ $(($(cat "/sys/class/net/$nic/statistics/tx_packets") - sent)) -lt 15 ]

# Beside a synthetic NIC on one switch, each in a network of its own. What one leaves undone of long
# frames is done for the other.
mkdir -p /run /var/run
for number in 2 3; do
    ip netns add n$number
    device=$(find $number)
    ip link set "$device" netns n$number
    ip netns exec n$number ip link set "$device" name nic
    ip netns exec n$number ip link set nic up
    ip netns exec n$number ip addr add 10.0.1.$number/24 dev nic
done
ip netns exec n2 ethtool -i nic | grep '^driver: e1000$'
ip netns exec n3 ethtool -i nic | grep '^driver: hv_netvsc$'
ip netns exec n2 ping -c 3 -i 0.2 -W 5 10.0.1.3
dd if=/dev/urandom of=/tmp/sent bs=64k count=64 2>/dev/null
# Neither end of the connection may find its input at an end before the other has all.
mkfifo /tmp/hold
exec 3<>/tmp/hold
for way in '2 3' '3 2'; do
    ip netns exec "n${way% *}" nc -l -p 9 </tmp/hold >/tmp/came &
    listener=$!
    sleep 0.5
    ip netns exec "n${way#* }" nc "10.0.1.${way% *}" 9 </tmp/sent
    wait $listener
    cmp /tmp/sent /tmp/came
done
for number in 2 3; do
    ip netns del n$number
done

echo 'reload: begin'
for _ in $(seq 10); do
    rmmod e1000
    modprobe e1000
    up
done
ping -c 3 -i 0.2 -W 5 10.0.0.1
echo 'reload: done'

# carrier VALUE: waits until the link is so.
carrier() {
    for _ in $(seq 100); do
        [ "$(cat "/sys/class/net/$nic/carrier")" = "$1" ] && break
        sleep 0.1
    done
    [ "$(cat "/sys/class/net/$nic/carrier")" = "$1" ]
}
echo 'cable: out'
carrier 0
echo 'cable: in'
carrier 1
ping -c 3 -i 0.2 -W 5 10.0.0.1
echo 'cable: ready'
carrier 0
