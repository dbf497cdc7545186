set -e
wait-for /dev/sda
wait-for /dev/sdb
for disk in /sys/block/sd*; do
    case $(readlink -f "$disk") in
    */ata*) ide=/dev/${disk##*/} ;;
    *) scsi=/dev/${disk##*/} ;;
    esac
done
head -c 1000000 /dev/urandom >/tmp/data
sum=$(sha256sum </tmp/data)
for disk in "$ide" "$scsi"; do
    dd if=/tmp/data of="$disk" bs=64k seek=3 conv=fsync,notrunc 2>/dev/null
done
echo 3 >/proc/sys/vm/drop_caches
[ "$(dd if="$ide" bs=64k skip=3 2>/dev/null | head -c 1000000 | sha256sum)" = "$sum" ] && echo 'ide: same'
[ "$(dd if="$scsi" bs=64k skip=3 2>/dev/null | head -c 1000000 | sha256sum)" = "$sum" ] && echo 'scsi: same'
# Half a second of sleeps wakes by whatever clock there is.
for i in 1 2 3 4 5; do sleep 0.1; done
echo "clockevent: $(cat /sys/devices/system/clockevents/clockevent0/current_device)"
sed 's/^/irq: /' /proc/interrupts
