#!/bin/sh
# A CD-ROM drive on the IDE controller: Linux's sr drives it by DMA, a file system on the disc mounts
# with the right contents, and the guest can eject the disc and take it back in. (The disc has ext4, as
# the lab has nothing that makes ISO 9660; a drive does not care.)
. "$(dirname "$0")/lib.sh"

mkdir files
head -c 300000 /dev/urandom >files/one
head -c 5000 /dev/urandom >files/two
truncate -s 16M disc.iso
mkfs.ext4 -q -b 4096 -d files disc.iso
guest full "$here/21-cdrom.guest.sh" --cpus 2 --stats --cdrom disc.iso
healthy
expect 'size: 32768'
expect 'dma_mode: XFER_UDMA_2'
(cd files && sha256sum one two) | while read -r sum file; do
    grep -q "^sum: $sum  $file" console.log || fail "$file differs"
done
expect 'disc: out'
sum=$(head -c 131072 disc.iso | sha256sum)
expect "head: ${sum%% *}"
