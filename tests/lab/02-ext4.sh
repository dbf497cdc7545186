#!/bin/sh
# A file system made, filled and unmounted in the guest is whole on the host's side: e2fsck finds
# nothing, and every file has the checksum that it had in the guest.
. "$(dirname "$0")/lib.sh"

truncate -s 256M disk.img
guest cloud "$here/02-ext4.guest.sh" --cpus 2 --disk path=disk.img
healthy
e2fsck -fn disk.img || fail 'e2fsck'
sed -n 's/^sum: //p' console.log >sums
[ "$(wc -l <sums)" = 21 ] || fail "$(wc -l <sums) checksums instead of 21"
while read -r sum file; do
    debugfs -R "cat $file" disk.img 2>/dev/null | sha256sum | grep -q "^$sum" || fail "$file differs"
done <sums
