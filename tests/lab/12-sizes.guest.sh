set -e
# named SERIAL: the disk with it.
disk() {
    for vpd in /sys/block/sd*/device/vpd_pg80; do
        if tr -d '\0' <"$vpd" | grep -q "$1"; then
            vpd=${vpd#/sys/block/}
            echo "${vpd%%/*}"
        fi
    done
}
sized=$(disk sized) thick=$(disk thick) large=$(disk large)
size=/sys/block/$sized/size
# until_size N COMMAND: does it until the disk has so many sectors.
until_size() {
    wanted=$1
    shift
    for _ in $(seq 300); do
        [ "$(cat "$size")" = "$wanted" ] && return
        "$@" || true
        sleep 0.1
    done
    echo "the disk has $(cat "$size") sectors"
    return 1
}
rescan() { echo 1 >"/sys/block/$sized/device/rescan"; }
look() { dd if="/dev/$sized" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; }
at() { dd if="/dev/$sized" of=/dev/null bs=1M count=1 skip="$1" iflag=direct 2>/dev/null; }

echo 'ready: rescan'
until_size 196608 rescan
echo "rescan: $(cat "$size")"
at 95
# No rescan of ours: storvsc asks for the size when a command, which it then sends again, ends with UNIT
# ATTENTION 2A/09, and at nothing else.
echo 'ready: told'
until_size 262144 look
echo "told: $(cat "$size")"
at 127
# The end comes nearer, and a read is the first to learn of it.
echo 'ready: shrink'
for _ in $(seq 300); do
    at 100 || break
    sleep 0.1
done
! at 100 && echo 'shrunk: the end is an error'
until_size 65536 look
echo "shrunk: $(cat "$size")"
at 31
echo 'shrunk: the rest is there'

queue=/sys/block/$large/queue
echo "large: $(cat "$queue/logical_block_size") $(cat "$queue/physical_block_size"), partitions $(ls -d "/sys/block/$large/$large"[0-9] | wc -l)"
dd if=/dev/urandom of="/dev/${large}1" bs=4k count=64 oflag=direct 2>/dev/null
mkfs.ext4 -q -F "/dev/${large}2"

echo "thick: nothing to discard, $(cat "/sys/block/$thick/queue/discard_max_bytes")"
mkfs.ext4 -q -F "/dev/$thick"
sync
