#!/bin/sh
# Debian's own ata_piix drives our IDE disks by Ultra DMA: what it writes is on the image, hdparm and
# smartctl read a sane disk, and random reads and writes verify. No disk hangs on the VMBus.
. "$(dirname "$0")/lib.sh"

truncate -s 64M disk.img other.img
guest full "$here/20-ide.guest.sh" --cpus 2 --stats --disk path=disk.img,attach=ide,id=S-123 \
    --disk path=other.img,attach=ide,channel=1,device=0
healthy
refute 'exception Emask'
refute 'failed command'
expect 'window: .*\[io  0xc000-0xffff window\]'
refute 'window: .*\[io  0x0000-'
refute 'unclaimed: '
expect 'dma_mode: .*link1.*XFER_UDMA_2'
expect 'dma_mode: .*link2.*XFER_UDMA_2'
expect 'Serial Number: *S-123'
expect 'SMART overall-health self-assessment test result: PASSED'
expect 'smartctl: 0'
refute 'missing sense data'
expect 'verified: 4k'
expect 'verified: 128k'
whole disk.img 8
