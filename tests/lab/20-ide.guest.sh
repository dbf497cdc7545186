set -e
wait-for /dev/sda
wait-for /dev/sdb
# Linux looks at both channels at once, so either may have become sda.
on_channel() {
    for disk in /sys/block/sd*; do
        case $(readlink -f "$disk") in */ata$1/*) echo "/dev/${disk##*/}" ;; esac
    done
}
first=$(on_channel 1) second=$(on_channel 2)
echo "disks: $first $second"
dmesg | grep -i 'ata_piix\|ata[0-9.]*:' | sed 's/^/log: /'
for link in 1 2; do
    echo "dma_mode: link$link $(cat /sys/class/ata_device/dev$link.0/dma_mode)"
done
hdparm -I "$first"
smartctl -i -H "$first"
smartctl -x "$first"
echo "smartctl: $?"
# Every port of a function lies in a window of the bus.
dmesg | grep 'root bus resource' | sed 's/^/window: /'
dmesg | grep -i "can't claim" | sed 's/^/unclaimed: /'
filled "$first" 8
for bs in 4k 128k; do
    fio --name=v --filename="$second" --ioengine=libaio --direct=1 --iodepth=4 --rw=randrw --bs=$bs \
        --size=4M --verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=terse \
        >/tmp/fio.out || { cat /tmp/fio.out; exit 1; }
    echo "verified: $bs"
done
