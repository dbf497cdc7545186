#!/bin/sh
# A disk that grows is found by a rescan, and told of by UNIT ATTENTION 2A/09 when partita is told; one that
# shrinks ends with errors at its end, and hangs nobody. A device with blocks of 4 KiB is one for the guest,
# with its partitions, past the page cache. A preallocated image stays so without discard.
. "$(dirname "$0")/lib.sh"

truncate -s 64M disk.img
fallocate -l 48M thick.img
before=$(stat -c %b thick.img)
modprobe sd_mod
modprobe scsi_debug sector_size=4096 dev_size_mb=16 num_parts=2
until large=$(grep -l '^32768$' /sys/block/sd*/size); do sleep 0.2; done
large=/dev/$(basename "${large%/size}")
{
    until_shown 'ready: rescan'
    truncate -s 96M disk.img
    until_shown 'ready: told'
    truncate -s 128M disk.img
    kill -USR2 "$(pidof partita)"
    until_shown 'ready: shrink'
    truncate -s 32M disk.img
} &
guest cloud "$here/12-sizes.guest.sh" --disk path=disk.img,id=sized \
    --disk path=thick.img,discard=off,id=thick --disk "path=$large,direct=on,id=large"
expect 'rescan: 196608'
expect 'told: 262144'
expect 'shrunk: 65536'
expect 'shrunk: the end is an error'
expect 'shrunk: the rest is there'
expect 'large: 4096 4096, partitions 2'
expect 'thick: nothing to discard, 0'
refute 'Call Trace'
[ "$(stat -c %b thick.img)" -ge "$before" ] || fail "of $before sectors $(stat -c %b thick.img) are left"
e2fsck -fn thick.img || fail 'e2fsck of thick.img'
grep -q 'it had 67108864 bytes, and has 100663296 now' partita.log || fail 'partita does not tell'

# An IDE disk has sectors of 512 bytes.
rc=0
partita run --kernel /lab/cloud/vmlinuz --disk "path=$large,attach=ide" 2>refused || rc=$?
[ "$rc" = 1 ] || fail "an IDE disk with blocks of 4096 bytes: partita exited with $rc"
grep -q 'this one has blocks of 4096; say attach=scsi, or block-size=512' refused || fail "$(cat refused)"
[ "$(wc -l <refused)" = 1 ] || fail "$(cat refused)"
