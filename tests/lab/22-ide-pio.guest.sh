set -e
wait-for /dev/sda
echo "dma_mode: $(cat /sys/class/ata_device/dev1.0/dma_mode) pio_mode: $(cat /sys/class/ata_device/dev1.0/pio_mode)"
head -c 200000 /dev/urandom >/tmp/data
dd if=/tmp/data of=/dev/sda bs=64k seek=3 conv=fsync,notrunc 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
echo "written: $(sha256sum </tmp/data)"
echo "read: $(dd if=/dev/sda bs=64k skip=3 2>/dev/null | head -c 200000 | sha256sum)"
