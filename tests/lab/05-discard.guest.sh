set -e
dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\0' 'x' | dd of=/dev/sda bs=1M oflag=direct iflag=fullblock 2>/dev/null
blkdiscard -o $((16 << 20)) -l $((48 << 20)) /dev/sda && echo discarded
[ "$(dd if=/dev/sda bs=1M skip=16 iflag=direct 2>/dev/null | tr -d '\0' | wc -c)" = 0 ] && echo 'zeroes where it was discarded'
[ "$(dd if=/dev/sda bs=1M count=16 iflag=direct 2>/dev/null | tr -d x | wc -c)" = 0 ] && echo 'the rest stayed'
if dd if=/dev/zero bs=1M count=16 2>/dev/null | tr '\0' 'y' | dd of=/dev/sdb bs=1M oflag=direct iflag=fullblock; then
    echo 'full: the write was silently lost'
    exit 1
fi
echo 'full: the write failed'
blkdiscard /dev/sdb
echo again | dd of=/dev/sdb conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
[ "$(head -c 5 /dev/sdb)" = again ] && echo 'full: and works again'
