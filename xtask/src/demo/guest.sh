# What the demo's guest does with its disk.
set -e
say() { printf '\n== %s\n' "$*"; }

say "Debian's own kernel, unchanged, finds itself on a Hyper-V host"
uname -srv
dmesg | sed 's/^\[[^]]*\] //' | grep -e 'Hypervisor detected' -e 'Vmbus version' -e 'hv_storvsc' -e '\[sda\]'
echo "$(grep -c ^processor /proc/cpuinfo) processors, clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"

say "The disk, by hv_storvsc"
wait-for /dev/sda
sg_inq /dev/sda | grep -i -e identification -e revision
lsblk -o NAME,SIZE,TYPE,DISC-GRAN /dev/sda

say "A file system on it"
mkfs.ext4 -q -F /dev/sda
mount -t ext4 /dev/sda /mnt
cp -r /usr/bin /mnt/programs
sync
df -h /mnt
before=$(cat /mnt/programs/* | md5sum)

say "Written, forgotten and read again from the disk"
umount /mnt
mount -t ext4 /dev/sda /mnt
after=$(cat /mnt/programs/* | md5sum)
echo "before: $before"
echo "after:  $after"
[ "$before" = "$after" ]

say "Random reads and writes, 32 at a time, each block checked by its CRC"
fio --name=check --filename=/mnt/check --size=16M --rw=randrw --bs=4k --ioengine=libaio --direct=1 \
    --iodepth=32 --verify=crc32c --output-format=normal | grep -e IOPS -e 'err='
umount /mnt

say "Done; the guest powers off"
