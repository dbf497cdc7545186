#!/bin/sh
# A CD-ROM drive on the IDE controller: Linux's sr drives it by DMA, an ISO 9660 disc mounts with the right
# contents, and the guest can eject the disc and take it back in.
. "$(dirname "$0")/lib.sh"

mkdir files
head -c 300000 /dev/urandom >files/one
head -c 5000 /dev/urandom >files/two
xorriso -as mkisofs -quiet -R -V PARTITA -o disc.iso files
guest full "$here/21-cdrom.guest.sh" --cpus 2 --stats --cdrom disc.iso
healthy
expect "size: $(($(stat -c %s disc.iso) / 512))"
expect 'label: PARTITA'
expect 'dma_mode: XFER_UDMA_2'
(cd files && sha256sum one two) | while read -r sum file; do
    grep -q "^sum: $sum  $file" console.log || fail "$file differs"
done
expect 'disc: out'
sum=$(head -c 131072 disc.iso | sha256sum)
expect "head: ${sum%% *}"
