#!/bin/sh
# A synthetic NIC on a tap that partita makes: found by an unmodified kernel with a channel for each
# processor, fit for DHCP, TCP and UDP both ways, VLANs, large MTUs and its driver's going and coming
# while frames come in; a tap that is set down takes the link with it until it is up again, and one that
# is taken away takes the link down, and nothing else. FILE_MIB is the size of the file that is fetched.
. "$(dirname "$0")/lib.sh"

# The host's end. Frames find their way while the guest cannot answer for its address.
{
    dd if=/dev/urandom of=file bs=1M count="${FILE_MIB:-20}" 2>/dev/null
    sha256sum <file >file.sum
    until ip addr add 10.0.0.1/24 dev lab0 2>/dev/null; do sleep 0.1; done
    ip neigh replace 10.0.0.2 lladdr 52:54:00:12:34:56 dev lab0 nud permanent
    modprobe 8021q
    ip link add link lab0 name lab0.7 type vlan id 7
    ip link set lab0.7 up
    ip addr add 10.0.7.1/24 dev lab0.7
    iperf3 -s >/dev/null 2>&1 &
    busybox httpd -h "$work"
    touch leases
    cat >udhcpd.conf <<END
start 10.0.0.100
end 10.0.0.109
interface lab0
lease_file $work/leases
pidfile $work/udhcpd.pid
option subnet 255.255.255.0
option router 10.0.0.1
END
    busybox udhcpd -f -a 100 udhcpd.conf &
    until grep -qs '^reload: begin' console.log; do sleep 0.2; done
    ping -q -i 0.005 -s 1400 10.0.0.2 >ping.log 2>&1 &
    pings=$!
    until grep -qs '^tap: down' console.log; do sleep 0.2; done
    kill $pings
    ip link set lab0 down
    until grep -qs '^tap: up' console.log; do sleep 0.2; done
    ip link set lab0 up
    until grep -qs '^tap: gone' console.log; do sleep 0.2; done
    ip link del lab0
} >&2 &

guest cloud "$here/30-netvsp.guest.sh" --cpus 2 --stats \
    --nic backend=tap:lab0,mac=52:54:00:12:34:56,mtu=9000
healthy
grep -q "$(cut -d' ' -f1 file.sum)" console.log || fail 'the file came over changed'
grep '^stats: nic0' partita.log
# Both channels sent, and segments came together.
for channel in 0 1; do
    grep "^stats: nic0.$channel: sent [1-9]" partita.log || fail "channel $channel sent nothing"
done
! ip link show lab0 2>/dev/null || fail 'the tap is still there'
