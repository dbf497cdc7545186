# The guest's half of storage.sh and ide.sh: the fio jobs that stand in $jobs on the first disk, one line of
# figures for each.
disk=/dev/sda
[ -b /dev/vda ] && disk=/dev/vda
seconds=${SECONDS_PER_JOB:-5}
echo "guest: disk $disk, init at $(cut -d' ' -f1 /proc/uptime) s, clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo none >/sys/block/${disk#/dev/}/queue/scheduler 2>/dev/null
job() {
    # These lines tell the host when to look at its counters. The last says nothing more, since each
    # byte costs exits.
    echo "job: $1"
    result=$(fio --name="$1" --filename=$disk --ioengine=libaio --direct=1 --rw=$2 --bs=$3 --iodepth=$4 \
        --time_based --runtime=$seconds --randrepeat=1 --output-format=terse --terse-version=3 |
        awk -F';' -v name="$1" '{ printf "result: %s iops=%s kib_per_s=%s ios=%d\n", name, $8, $7, $8 * $9 / 1000 }')
    echo done
    echo "$result"
}
irqs() { awk '/HYP:/ { n = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i; h = n } /virtio.*req|virtio.*input|virtio|ata_piix/ { for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) v += $i } END { print h + v }' /proc/interrupts; }
echo "$jobs" | while read -r name how; do
    before=$(irqs)
    # shellcheck disable=SC2086
    job "$name" $how
    echo "interrupts: $name $(($(irqs) - before))"
done
