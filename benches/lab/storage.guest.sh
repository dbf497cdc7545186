# The guest's half of storage.sh: three fio jobs on the first disk. "job:" and "result:" lines tell
# the host when to look at its counters.
disk=/dev/sda
[ -b /dev/vda ] && disk=/dev/vda
wait-for $disk
seconds=${SECONDS_PER_JOB:-5}
echo "guest: disk $disk, clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo none >/sys/block/${disk#/dev/}/queue/scheduler 2>/dev/null
for spec in 'randread-4k-qd1 randread 4k 1' 'randread-4k-qd32 randread 4k 32' 'read-128k-qd8 read 128k 8'; do
    set -- $spec
    # Once without counting: the program is then in memory.
    fio --name=warm --filename=$disk --ioengine=libaio --direct=1 --rw=$2 --bs=$3 --iodepth=$4 \
        --time_based --runtime=1 --output-format=terse >/dev/null
    echo "job: $1"
    fio --name="$1" --filename=$disk --ioengine=libaio --direct=1 --rw=$2 --bs=$3 --iodepth=$4 \
        --time_based --runtime=$seconds --randrepeat=1 --output-format=terse --terse-version=3 |
        awk -F';' -v name="$1" '{ printf "result: %s iops=%s kib_per_s=%s ios=%d\n", name, $8, $7, $6 / ($7 * 1024 / $8 / 1024) }'
done
