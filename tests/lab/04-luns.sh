#!/bin/sh
# Two controllers with three LUNs: each image is found where it was put, once, and takes its own
# writes; a read-only disk refuses them and its image stays as it was.
. "$(dirname "$0")/lib.sh"

for i in 1 2 3; do truncate -s "${i}0M" "$i.img"; done
echo 'only to be read' | dd of=3.img conv=notrunc 2>/dev/null
before=$(sha256sum <3.img)
guest cloud "$here/04-luns.guest.sh" --cpus 2 --disk path=1.img,id=one --disk path=2.img,lun=5,id=two \
    --disk path=3.img,controller=1,readonly=on,id=three
expect 'found: 0:0:one 0:5:two 1:0:three'
expect 'three: read-only, and the write was refused'
expect 'disks: 3'
refute 'Call Trace'
for i in 1 2; do
    [ "$(head -c 10 $i.img)" = "written to" ] || fail "$i.img was not written"
done
[ "$(sha256sum <3.img)" = "$before" ] || fail 'the read-only image changed'
