set -e
for i in $(seq 10); do
    dd if=/dev/urandom of=/tmp/piece bs=64k count=8 2>/dev/null
    dd if=/tmp/piece of=/dev/sda bs=64k seek=$((i * 8)) oflag=direct 2>/dev/null
    # Reads that are still under way when the module is asked to go.
    dd if=/dev/sda of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null &
    n=0
    until rmmod hv_storvsc 2>/dev/null; do
        n=$((n + 1))
        [ $n -lt 300 ] || { echo 'hv_storvsc does not go'; exit 1; }
        sleep 0.1
    done
    wait
    [ ! -e /sys/block/sda ]
    modprobe hv_storvsc
    n=0
    until [ -b /dev/sda ] && [ "$(cat /sys/block/sda/size)" = 131072 ]; do
        n=$((n + 1))
        [ $n -lt 300 ] || { echo 'the disk does not come back'; exit 1; }
        sleep 0.1
    done
    dd if=/dev/sda bs=64k skip=$((i * 8)) count=8 iflag=direct 2>/dev/null | cmp - /tmp/piece
done
echo "reloaded: $i"
