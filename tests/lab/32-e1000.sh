#!/bin/sh
# An emulated NIC, driven by an unmodified kernel: on a tap, fit for DHCP, TCP and UDP both ways, VLANs,
# large MTUs, and its driver's going and coming while frames come in; on a switch beside another one and a
# synthetic one; the link follows the tap, and a tap that is taken away takes it down, and nothing else.
# FILE_MIB is the size of the file that is fetched.
. "$(dirname "$0")/lib.sh"

host_end 52:54:00:00:00:01 "${FILE_MIB:-64}" >&2 &
guest full "$here/$name.guest.sh" --stats \
    --nic attach=e1000,backend=tap:lab0,mac=52:54:00:00:00:01,mtu=9000 \
    --nic attach=e1000,backend=switch:lan,mac=52:54:00:00:00:02 \
    --nic attach=e1000,backend=switch:lan,mac=52:54:00:00:00:03 \
    --nic backend=switch:lan,mac=52:54:00:00:00:04
healthy
expect "^file: $(cat file.sum)"
grep '^stats: nic' partita.log
grep -q '^stats: nic0.0: .* malformed 0, .* lost 0,' partita.log || fail 'frames made no sense'
