# The guest's half of storage.sh: three fio jobs on the first disk, one line of figures for each.
disk=/dev/sda
[ -b /dev/vda ] && disk=/dev/vda
seconds=${SECONDS_PER_JOB:-5}
echo "guest: disk $disk, init at $(cut -d' ' -f1 /proc/uptime) s, clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo none >/sys/block/${disk#/dev/}/queue/scheduler 2>/dev/null
job() {
    # "job NAME" lines tell the host when to look at its counters.
    echo "job: $1"
    fio --name="$1" --filename=$disk --ioengine=libaio --direct=1 --rw=$2 --bs=$3 --iodepth=$4 \
        --time_based --runtime=$seconds --randrepeat=1 --output-format=terse --terse-version=3 |
        awk -F';' -v name="$1" '{ printf "result: %s iops=%s kib_per_s=%s\n", name, $8, $7 }'
    grep -e 'Hyper-V callback' -e virtio -e HYP /proc/interrupts >/dev/null 2>&1
}
irqs() { awk '/HYP:/ { n = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i; h = n } /virtio.*req|virtio.*input|virtio/ { for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) v += $i } END { print h + v }' /proc/interrupts; }
for spec in 'randread-4k-qd1 randread 4k 1' 'randread-4k-qd32 randread 4k 32' 'read-128k-qd8 read 128k 8'; do
    before=$(irqs)
    job $spec
    echo "interrupts: ${spec%% *} $(($(irqs) - before))"
done
