set -e
for bs in 4k 64k 1M; do
    size=24M
    [ $bs = 4k ] && size=4M
    fio --name=v --filename=/dev/sda --ioengine=libaio --direct=1 --iodepth=32 --rw=randrw \
        --bs=$bs --size=$size --verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=terse \
        >/tmp/fio.out || { cat /tmp/fio.out; exit 1; }
    echo "verified: $bs"
done
# Sizes in one mix that are no multiples of each other.
fio --name=v --filename=/dev/sda --ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite \
    --bsrange=512-128k --bs_unaligned=0 --blockalign=512 --size=16M --verify=crc32c --verify_fatal=1 \
    --do_verify=1 --output-format=terse >/tmp/fio.out || { cat /tmp/fio.out; exit 1; }
echo 'verified: mixed'
