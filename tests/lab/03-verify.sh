#!/bin/sh
# kernels: cloud new
# Random mixes of reads and writes at depth 32 read back what they wrote (crc32c), with one
# channel and with a sub-channel for each VP, through the page cache and around it.
. "$(dirname "$0")/lib.sh"

truncate -s 128M disk.img
for run in '1 on' '2 off'; do
    set -- $run
    direct=
    # On a file system that cannot do O_DIRECT, on would be refused.
    [ "$2" = on ] || direct=,direct=off
    guest "$KERNEL" "$here/03-verify.guest.sh" --cpus "$1" --disk "path=disk.img$direct"
    expect 'verified: 4k'
    expect 'verified: 64k'
    expect 'verified: 1M'
    healthy
done
