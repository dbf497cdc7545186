set -e
mkfs.ext4 -q -F /dev/sda
mkdir -p /mnt
mount -t ext4 /dev/sda /mnt
mkdir /mnt/d
for i in $(seq 20); do
    head -c $((i * 77777)) /dev/urandom >/mnt/d/$i
done
dd if=/dev/urandom of=/mnt/big bs=1M count=48 conv=fsync 2>/dev/null
(cd /mnt && sha256sum d/* big | sed 's/^/sum: /')
# What is on the disk, not in the page cache.
sync
echo 3 >/proc/sys/vm/drop_caches
(cd /mnt && sha256sum d/* big) | md5sum
umount /mnt
