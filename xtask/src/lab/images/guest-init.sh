#!/bin/sh
# Init of a guest: says when it was reached, loads drivers for what is there, runs /script, powers off.

export PATH=/usr/bin:/bin HOME=/root TERM=dumb

mount -t proc proc /proc
read -r uptime _ </proc/uptime
echo "guest: init at $uptime s"
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /root /run /mnt
mount -t tmpfs tmp /tmp
mount -t devpts pts /dev/pts
ln -s /proc/self/fd /dev/fd

# Loads the drivers for the devices of these buses. busybox's modprobe starts in a third of the time of kmod's.
coldplug() {
    for bus; do
        cat /sys/bus/"$bus"/devices/*/modalias 2>/dev/null
    done | sort -u | xargs busybox modprobe -abq
}

coldplug acpi pci
if [ -d /sys/bus/vmbus ]; then
    # The host's offers may still be on their way: take the drivers in any case.
    busybox modprobe -aq hv_storvsc sd_mod hv_netvsc hv_utils hyperv_keyboard hv_balloon
fi
if [ -d /sys/bus/virtio ]; then
    coldplug virtio
fi
if [ -d /sys/bus/scsi ]; then
    busybox modprobe -aq sd_mod sr_mod
fi
read -r uptime _ </proc/uptime
echo "guest: drivers at $uptime s"

status=0
if [ -e /script ]; then
    sh /script </dev/null
    status=$?
fi
echo "guest: exit $status"
poweroff -f
