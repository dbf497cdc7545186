set -e
mkdir -p /run /var/run
for number in 1 2 3; do
    ip netns add n$number
    for _ in $(seq 300); do
        device=$(grep -l "52:54:00:00:00:0$number" /sys/class/net/*/address 2>/dev/null) && break
        sleep 0.1
    done
    device=$(basename "$(dirname "$device")")
    ip link set "$device" netns n$number
    ip netns exec n$number ip link set "$device" name nic
    ip netns exec n$number ip link set nic up
    ip netns exec n$number ip addr add 10.0.0.$number/24 dev nic
done

ip netns exec n1 ping -c 3 -i 0.2 -W 5 10.0.0.2
! ip netns exec n3 ping -c 2 -i 0.2 -W 1 10.0.0.1
ip netns exec n2 ethtool -k nic | grep -E '^(tcp-segmentation|large-receive)-offload: '

# 4 MiB from one to the other.
dd if=/dev/urandom of=/tmp/sent bs=64k count=64 2>/dev/null
# Neither end of the connection may find its input at an end before the other has all.
mkfifo /tmp/hold
exec 3<>/tmp/hold
ip netns exec n2 nc -l -p 9 </tmp/hold >/tmp/came &
listener=$!
listening 9 ip netns exec n2
ip netns exec n1 nc 10.0.0.2 9 </tmp/sent
wait $listener
cmp /tmp/sent /tmp/came

for number in 1 2; do
    ip netns exec n$number ip link set nic mtu 9000
    ip netns exec n$number ip link set nic up
done
in_time ip netns exec n1 ping -c 1 -W 2 -s 8900 10.0.0.2

ip netns exec n2 iperf3 -s -1 -D
listening 5201 ip netns exec n2
ip netns exec n1 iperf3 -c 10.0.0.2 -t 1 -i 0 | grep -E 'sender|receiver'
