#!/bin/sh
# kernels: cloud new
# A synthetic NIC on a tap that partita makes: found by an unmodified kernel with a channel for each
# processor, fit for DHCP, TCP and UDP both ways, VLANs, large MTUs and its driver's going and coming
# while frames come in; a tap that is set down takes the link with it until it is up again, and one that
# is taken away takes the link down, and nothing else. FILE_MIB is the size of the file that is fetched.
. "$(dirname "$0")/lib.sh"

host_end 52:54:00:12:34:56 "${FILE_MIB:-64}" >&2 &
guest "$KERNEL" "$here/$name.guest.sh" --cpus 2 --stats \
    --nic backend=tap:lab0,mac=52:54:00:12:34:56,mtu=9000
healthy
expect "^file: $(cat file.sum)"
grep '^stats: nic0' partita.log
# Both channels sent, and segments came together.
for channel in 0 1; do
    grep "^stats: nic0.$channel: sent [1-9]" partita.log || fail "channel $channel sent nothing"
done
! ip link show lab0 2>/dev/null || fail 'the tap is still there'
