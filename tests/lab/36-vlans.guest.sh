set -e
modprobe 8021q
for number in 1 2; do
    mac=52:54:00:00:00:0$number
    nic=$(named $mac)
    ip link set "$nic" up
    carrier 1
    ip link add link "$nic" name outer type vlan id 7
    ip link add link outer name inner type vlan id 8
    ip link set outer up
    ip link set inner up
    ip addr add 10.0.$number.2/24 dev inner
    [ "$(cat /sys/class/net/$nic/mtu) $(cat /sys/class/net/inner/mtu)" = '1500 1500' ]
    for size in 56 1400 1468 1472; do
        ping -c 3 -i 0.2 -W 5 -M do -s $size 10.0.$number.1
    done
    echo "vlans: $(ethtool -i "$nic" | sed -n 's/^driver: //p') passes 1472"
    [ $number = 2 ] || ip link del outer
done

# The NIC of the last round.
ethtool -t "$nic" online
for _ in 1 2; do
    ethtool -t "$nic" offline
    carrier 1
    for _ in $(seq 20); do
        ! ping -c 1 -W 1 -s 1472 10.0.2.1 || break
    done
    ping -c 3 -i 0.2 -W 5 -s 1472 10.0.2.1
done
