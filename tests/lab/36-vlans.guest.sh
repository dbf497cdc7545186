set -e
modprobe 8021q
for number in 1 2; do
    mac=52:54:00:00:00:0$number
    nic=$(named $mac)
    ip link set "$nic" up
    carrier 1
    ip link add link "$nic" name outer type vlan proto 802.1ad id 7
    ip link add link outer name inner type vlan id 8
    ip link set outer up
    ip link set inner up
    ip addr add 10.0.$number.2/24 dev inner
    [ "$(cat /sys/class/net/$nic/mtu) $(cat /sys/class/net/inner/mtu)" = '1500 1500' ]
    for size in 56 1400 1468 1472; do
        ping -c 3 -i 0.2 -W 5 -s $size 10.0.$number.1
    done
    echo "vlans: $(ethtool -i "$nic" | sed -n 's/^driver: //p') passes 1472"
    [ $number = 2 ] || ip link del outer
done

# The NIC of the last round. The driver gives 64 frames two ticks to be looked at, which is too little for a
# processor that somebody else has for as long: its error 14 is no verdict.
ethtool -t "$nic" online
tested() {
    ethtool -t "$nic" offline >/tmp/tested && rc=0 || rc=$?
    cat /tmp/tested
    [ $rc = 0 ] || ! grep -q 'Loopback test.*[[:space:]]14$' /tmp/tested || return 1
    return 0
}
for _ in 1 2 3 4 5 6; do
    ! tested || break
done
grep 'The test result is PASS' /tmp/tested
carrier 1
for _ in $(seq 20); do
    ! ping -c 1 -W 1 -s 1472 10.0.2.1 || break
done
ping -c 3 -i 0.2 -W 5 -s 1472 10.0.2.1
