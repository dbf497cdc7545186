#!/bin/sh
# What the guest discards is a hole in the host's file, reads as zeroes, and the rest stays; a
# host's disk that is full is told to the guest, which goes on when there is room again.
. "$(dirname "$0")/lib.sh"

truncate -s 64M disk.img
mkdir small
mount -t tmpfs -o size=8M none small
truncate -s 32M small/full.img
guest cloud "$here/05-discard.guest.sh" --disk path=disk.img --disk path=small/full.img
expect 'discarded'
expect 'zeroes where it was discarded'
expect 'the rest stayed'
expect 'full: the write failed'
expect 'full: and works again'
refute 'Call Trace'
used=$(($(stat -c %b disk.img) / 2048))
umount small
# 64 MiB were written, 48 discarded.
[ "$used" -le 18 ] || fail "$used MiB are still in use"
[ "$used" -ge 15 ] || fail "only $used MiB are in use"
