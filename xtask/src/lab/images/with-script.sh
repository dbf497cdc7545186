#!/bin/sh
# with-script SCRIPT OUT [KERNEL]: makes OUT a copy of /lab/initrd whose guest runs SCRIPT. For one KERNEL alone, such
# as cloud, it is smaller and the guest boots sooner. /lab/parts tells where in /lab/initrd is what.
usage='usage: with-script SCRIPT OUT [KERNEL]'
[ $# = 2 ] || [ $# = 3 ] || { echo "$usage" >&2; exit 2; }
[ -r "$1" ] || { echo "with-script: cannot read $1" >&2; exit 1; }
if [ $# = 3 ]; then
    grep -q "^$3 " /lab/parts && [ "$3" != programs ] || { echo "with-script: no kernel $3 in /lab" >&2; exit 1; }
    grep -e '^programs ' -e "^$3 " /lab/parts | while read -r _ offset length; do
        dd if=/lab/initrd bs=1M iflag=skip_bytes,count_bytes skip="$offset" count="$length" 2>/dev/null || exit 1
    done >"$2" || exit 1
else
    cp /lab/initrd "$2" || exit 1
fi
script-layer "$1" >>"$2"
