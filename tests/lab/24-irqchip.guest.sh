set -e
wait-for /dev/sda
wait-for /dev/sdb
for disk in /sys/block/sd*; do
    case $(readlink -f "$disk") in
    */ata*) ide=/dev/${disk##*/} ;;
    *) scsi=/dev/${disk##*/} ;;
    esac
done
head -c 300000 /dev/urandom >/tmp/data
sum=$(sha256sum </tmp/data)
for disk in "$ide" "$scsi"; do
    dd if=/tmp/data of="$disk" bs=64k seek=3 conv=fsync,notrunc 2>/dev/null
done
echo 3 >/proc/sys/vm/drop_caches
for disk in "$ide" "$scsi"; do
    [ "$(dd if="$disk" bs=64k skip=3 2>/dev/null | head -c 300000 | sha256sum)" = "$sum" ]
done
echo 'disks: the same'

# The clock interrupts when its alarm comes, and can be set.
rtc=/sys/class/rtc/rtc0
count() {
    awk -v irq="$1:" '$1 == irq { for (n = 2; $n ~ /^[0-9]+$/; n++) sum += $n } END { print sum + 0 }' /proc/interrupts
}
before=$(count 8)
echo +1 >$rtc/wakealarm
for _ in $(seq 300); do
    [ "$(count 8)" = "$before" ] || break
    sleep 0.1
done
[ "$(count 8)" -gt "$before" ] && echo 'alarm: interrupted'
date -u -s '2001-02-28 12:00:00' >/dev/null
hwclock -w -u
echo "rtc: $(cat $rtc/date)"

# The SCI is level-triggered: the guest has to end it where it came from.
echo 'button: now'
for n in $(seq 300); do
    [ "$(count 9)" = 0 ] || break
    sleep 0.1
done
echo "button: $(count 9)"
echo "clockevent: $(cat /sys/devices/system/clockevents/clockevent0/current_device)"
sed 's/^/irq: /' /proc/interrupts
