dmesg | grep -e 'Hypervisor detected' -e 'Vmbus version' -e storvsc -e 'sd '
echo "cpus: $(grep -c ^processor /proc/cpuinfo)"
echo "clocksource: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "disk: sda $(cat /sys/block/sda/size)"
sg_vpd -p sn /dev/sda | sed -n 's/^ *Unit serial number: */serial: /p'
sg_inq /dev/sda
