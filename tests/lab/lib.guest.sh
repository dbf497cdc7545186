# Comes before the script of every guest: words that several of them use.

# filled DISK COUNT: makes a file system on DISK with COUNT files in it, and shows the checksum of each
# as it is on the disk, not in the page cache.
filled() {
    mkfs.ext4 -q -F "$1"
    mkdir -p /mnt
    mount -t ext4 "$1" /mnt
    for i in $(seq "$2"); do
        head -c $((i * 77777)) /dev/urandom >"/mnt/$i"
    done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    (cd /mnt && sha256sum [0-9]* | sed 's/^/sum: /')
    umount /mnt
}
