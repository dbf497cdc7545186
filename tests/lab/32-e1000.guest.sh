set -e
mac=52:54:00:00:00:01
up
ethtool -i "$nic" | grep '^driver: e1000$'
ethtool -k "$nic" | grep '^tcp-segmentation-offload: on'
ethtool "$nic" | grep 'Speed: 1000Mb/s'
ethtool -K "$nic" rx on
answered
leased
fetched
tcp
tcp -R
udp
udp -R
# Not one checksum that came was wrong, and some were looked at.
ethtool -S "$nic" | grep 'rx_csum_offload_errors: 0$'
ethtool -S "$nic" | grep 'rx_csum_offload_good: [1-9]'
ethtool -S "$nic" | grep -E 'tx_tcp_seg_good: [1-9]|rx_missed_errors|rx_long_length'
grep "$nic" /proc/interrupts

# The NIC puts tags into frames and takes them out.
tagged
# It lies in several buffers.
jumbo

# Beside another of its kind and a synthetic NIC on one switch, each in a network of its own. What one
# leaves undone of long frames is done for the other.
mkdir -p /run /var/run
for number in 2 3 4; do
    ip netns add n$number
    device=$(named 52:54:00:00:00:0$number)
    ip link set "$device" netns n$number
    ip netns exec n$number ip link set "$device" name nic
    ip netns exec n$number ip link set nic up
    ip netns exec n$number ip addr add 10.0.1.$number/24 dev nic
done
ip netns exec n2 ethtool -i nic | grep '^driver: e1000$'
ip netns exec n3 ethtool -i nic | grep '^driver: e1000$'
ip netns exec n4 ethtool -i nic | grep '^driver: hv_netvsc$'
dd if=/dev/urandom of=/tmp/sent bs=64k count=64 2>/dev/null
# Neither end of the connection may find its input at an end before the other has all.
mkfifo /tmp/hold
exec 3<>/tmp/hold
for way in '2 3' '2 4' '4 3'; do
    ip netns exec "n${way#* }" ping -c 3 -i 0.2 -W 5 "10.0.1.${way% *}"
    ip netns exec "n${way% *}" nc -l -p 9 </tmp/hold >/tmp/came &
    listener=$!
    listening 9 ip netns exec "n${way% *}"
    ip netns exec "n${way#* }" nc "10.0.1.${way% *}" 9 </tmp/sent
    wait $listener
    cmp /tmp/sent /tmp/came
done
for number in 2 3 4; do
    ip netns del n$number
done

reloaded e1000
followed
