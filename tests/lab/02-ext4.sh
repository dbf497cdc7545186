#!/bin/sh
# kernels: cloud new
# A file system made, filled and unmounted in the guest is whole on the host's side: e2fsck finds
# nothing, and every file has the checksum that it had in the guest.
. "$(dirname "$0")/lib.sh"

truncate -s 256M disk.img
guest "$KERNEL" "$here/02-ext4.guest.sh" --cpus 2 --disk path=disk.img
healthy
whole disk.img 21
