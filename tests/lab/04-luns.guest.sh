set -e
found=
for disk in /sys/block/sd*; do
    dev=/dev/${disk##*/}
    at=$(basename "$(readlink "$disk/device")") # host:channel:target:lun
    id=$(sg_vpd -p sn "$dev" | sed -n 's/^ *Unit serial number: *//p')
    found="$found ${at%%:*}:${at##*:}:$id"
    if [ "$(cat "$disk/ro")" = 0 ]; then
        echo "written to $id" | dd of="$dev" conv=notrunc,fsync 2>/dev/null
    elif ! sg_write_same --num=1 --lba=0 "$dev" 2>/dev/null; then
        echo "$id: read-only, and the write was refused"
    fi
done
echo "disks: $(ls -d /sys/block/sd* | wc -l)"
echo "found: $(echo $found | tr ' ' '\n' | sort | tr '\n' ' ' | sed 's/ $//')"
