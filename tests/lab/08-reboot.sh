#!/bin/sh
# A guest that reboots comes up again in the same run, with its disk as it left it. If a reset is to be the
# end, a kernel that panics, for want of a root here, ends the run with a status of its own.
. "$(dirname "$0")/lib.sh"

truncate -s 16M disk.img
guest cloud "$here/08-reboot.guest.sh" --disk path=disk.img
expect 'boot: 1'
expect 'boot: 2'
expect 'boot: 3'
healthy

rc=0
partita run --kernel /lab/cloud/vmlinuz --cmdline 'console=ttyS0 panic=-1 loglevel=5' --on-reset exit \
    2>partita.log </dev/null >console.log || rc=$?
[ "$rc" = 2 ] || fail "a panic ended the run with $rc"
expect 'Kernel panic - not syncing: VFS: Unable to mount root fs'
grep -q 'the guest has reset itself; --on-reset exit ends the run' partita.log || fail 'it was not told'
