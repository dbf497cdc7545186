#!/bin/sh
# A VLAN in a provider's VLAN (QinQ) at the usual MTU, on a synthetic and on an emulated NIC: packets of full size pass, and
# nothing is longer than 1522 bytes. The emulated one passes its driver's own tests, of which its network
# hears nothing.
. "$(dirname "$0")/lib.sh"

# The host's end of a tap: 10.0.NUMBER.1 in VLAN 8 of service VLAN 7.
host_vlans() {
    until ip link set "$1" up 2>/dev/null; do sleep 0.1; done
    modprobe 8021q
    ip link add link "$1" name "$1.7" type vlan proto 802.1ad id 7
    ip link add link "$1.7" name "$1.7.8" type vlan id 8
    ip link set "$1.7" up
    ip link set "$1.7.8" up
    ip addr add "10.0.$2.1/24" dev "$1.7.8"
}

(host_vlans lab0 1 && host_vlans lab1 2) >&2 &
guest full "$here/$name.guest.sh" --stats \
    --nic backend=tap:lab0,mac=52:54:00:00:00:01 \
    --nic attach=e1000,backend=tap:lab1,mac=52:54:00:00:00:02,pcap="$work/e1000.pcapng"
healthy
grep '^stats: nic1.0: .* malformed 0, .* lost 0,' partita.log || fail 'frames made no sense'
# The test's frames come from the address that they go to, which is everybody's.
tcpdump -Z root -r e1000.pcapng -n 'vlan' 2>/dev/null | grep -q . || fail 'the capture has no frames'
! tcpdump -Z root -r e1000.pcapng -n -e 2>/dev/null | grep 'ff:ff:ff:ff:ff:ff > ff:ff:ff:ff:ff:ff' ||
    fail 'a test frame left'
