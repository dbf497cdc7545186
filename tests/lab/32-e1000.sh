#!/bin/sh
# An emulated NIC, driven by an unmodified kernel: on a tap, fit for TCP and UDP both ways, VLANs,
# large MTUs, and its driver's going and coming while frames come in; on a switch beside a synthetic
# one; the link follows the tap, and a tap that is taken away takes it down, and nothing else.
. "$(dirname "$0")/lib.sh"

# The host's end. Frames find their way while the guest cannot answer for its address.
{
    dd if=/dev/urandom of=file bs=1M count=20 2>/dev/null
    sha256sum <file >file.sum
    until ip addr add 10.0.0.1/24 dev lab0 2>/dev/null; do sleep 0.1; done
    ip neigh replace 10.0.0.2 lladdr 52:54:00:00:00:01 dev lab0 nud permanent
    modprobe 8021q
    ip link add link lab0 name lab0.7 type vlan id 7
    ip link set lab0.7 up
    ip addr add 10.0.7.1/24 dev lab0.7
    iperf3 -s >/dev/null 2>&1 &
    busybox httpd -h "$work"
    until grep -qs '^reload: begin' console.log; do sleep 0.2; done
    ping -q -i 0.005 -s 1400 10.0.0.2 >ping.log 2>&1 &
    pings=$!
    until grep -qs '^cable: out' console.log; do sleep 0.2; done
    kill $pings
    ip link set lab0 down
    until grep -qs '^cable: in' console.log; do sleep 0.2; done
    ip link set lab0 up
    until grep -qs '^cable: ready' console.log; do sleep 0.2; done
    ip link del lab0
} >&2 &

guest full "$here/32-e1000.guest.sh" --stats \
    --nic attach=e1000,backend=tap:lab0,mac=52:54:00:00:00:01,mtu=9000 \
    --nic attach=e1000,backend=switch:lan,mac=52:54:00:00:00:02 \
    --nic backend=switch:lan,mac=52:54:00:00:00:03
healthy
grep -q "$(cut -d' ' -f1 file.sum)" console.log || fail 'the file came over changed'
grep '^stats: nic' partita.log
grep -q '^stats: nic0.0: .* malformed 0, .* lost 0,' partita.log || fail 'frames made no sense'
