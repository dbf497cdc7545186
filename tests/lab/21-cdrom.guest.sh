set -e
modprobe -q sr_mod 2>/dev/null || true
wait-for /dev/sr0
cat /sys/class/block/sr0/size | sed 's/^/size: /'
cat /sys/class/ata_device/dev2.0/dma_mode | sed 's/^/dma_mode: /'
echo "label: $(dd if=/dev/sr0 bs=1 skip=32808 count=32 2>/dev/null)"
mkdir -p /mnt
mount -t iso9660 -o ro /dev/sr0 /mnt
(cd /mnt && sha256sum * 2>/dev/null | sed 's/^/sum: /')
# The drive holds on to a disc that is mounted, and lets go of it after that.
umount /mnt
sg_start --readonly --eject /dev/sr0 || true
dd if=/dev/sr0 of=/dev/null bs=2048 count=1 2>/dev/null && echo 'still there' || echo 'disc: out'
sg_start --readonly --load /dev/sr0
dd if=/dev/sr0 bs=2048 count=64 2>/dev/null | sha256sum | sed 's/^/head: /'
