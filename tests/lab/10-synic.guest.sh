set -e
dmesg | grep -e 'Hypervisor detected' -e 'Vmbus version'
echo "clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
# One job on each processor, so that each channel is used.
for cpu in 0 1; do
    taskset -c $cpu fio --name=v$cpu --filename=/dev/sda --offset=$((cpu * 16))M --ioengine=libaio \
        --direct=1 --iodepth=8 --rw=randwrite --bs=4k --size=2M --verify=crc32c --verify_fatal=1 \
        --do_verify=1 --output-format=terse >/tmp/fio.$cpu || { cat /tmp/fio.$cpu; exit 1; }
done
echo verified
# Linux counts the VMBus's interrupts for each processor.
awk '/^ *HYP:/ { n = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i > 0
     print "interrupted: " n " processors" }' /proc/interrupts
