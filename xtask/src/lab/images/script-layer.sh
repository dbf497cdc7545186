#!/bin/sh
# script-layer SCRIPT: writes an archive that holds SCRIPT as /script, to go behind an initramfs.
[ $# = 1 ] || { echo 'usage: script-layer SCRIPT >>INITRD' >&2; exit 2; }
folder=$(mktemp -d)
cp "$1" "$folder/script" || exit 1
cd "$folder" && echo script | cpio -o -H newc 2>/dev/null
rm -r "$folder"
