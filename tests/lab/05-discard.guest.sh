set -e
# Disks are found in any order: by their size in sectors.
for disk in /sys/block/sd*; do
    case $(cat "$disk/size") in
    131072) big=/dev/${disk##*/} ;;
    65536) full=/dev/${disk##*/} ;;
    esac
done
dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\0' 'x' | dd of=$big bs=1M oflag=direct iflag=fullblock 2>/dev/null
blkdiscard -o $((16 << 20)) -l $((48 << 20)) $big && echo discarded
[ "$(dd if=$big bs=1M skip=16 iflag=direct 2>/dev/null | tr -d '\0' | wc -c)" = 0 ] && echo 'zeroes where it was discarded'
[ "$(dd if=$big bs=1M count=16 iflag=direct 2>/dev/null | tr -d x | wc -c)" = 0 ] && echo 'the rest stayed'
if dd if=/dev/zero bs=1M count=16 2>/dev/null | tr '\0' 'y' | dd of=$full bs=1M oflag=direct iflag=fullblock; then
    echo 'full: the write was silently lost'
    exit 1
fi
echo 'full: the write failed'
blkdiscard $full
echo again | dd of=$full conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
[ "$(head -c 5 $full)" = again ] && echo 'full: and works again'
