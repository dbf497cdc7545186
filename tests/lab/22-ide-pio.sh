#!/bin/sh
# Without DMA, Linux reads and writes our IDE disk by PIO in multiple-sector blocks, the data is the same
# on all sides, and strings take few exits though KVM makes one of every unit that goes out.
. "$(dirname "$0")/lib.sh"

truncate -s 16M disk.img
KERNEL_OPTIONS=libata.dma=0 guest full "$here/22-ide-pio.guest.sh" --cpus 2 --stats \
    --disk path=disk.img,attach=ide
healthy
refute 'exception Emask'
expect 'pio_mode: XFER_PIO_4'
refute 'dma_mode: XFER_[UM]'
sum=$(sed -n 's/^written: //p' console.log)
[ "$sum" ] || fail 'nothing was written'
expect "read: $sum"
[ "$(dd if=disk.img bs=64k skip=3 2>/dev/null | head -c 200000 | sha256sum)" = "$sum" ] ||
    fail 'the image has something else'
writes=$(sed -n 's/.*vp[01] exits to user space.* \([0-9]*\) port writes.*/\1/p' partita.log | awk '{ sum += $1 } END { print sum }')
[ "$writes" -lt 20000 ] || fail "$writes exits by port writes for 100000 words"
