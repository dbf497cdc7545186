#!/bin/sh
# Init of L1: brings up KVM, runs /lab/command, hands back its output, its status and /lab/out, powers off.
# The host's ends of the virtio ports named below are in lab.rs.

export PATH=/lab/bin:/usr/bin:/bin HOME=/root TERM=dumb

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /root /run /tmp /lab/files /lab/out
mount -t tmpfs -o size=75% shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs -o size=75%,mode=1777 tmp /tmp
mount -t tmpfs -o size=75% out /lab/out
mount -t debugfs debug /sys/kernel/debug
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr

# KVM takes a second to load, as long as all the rest. busybox's modprobe starts faster than kmod's.
# A firmware that writes CR8 beside a fast periodic timer of its local APIC would bring the emulator down.
{
    busybox modprobe kvm min_timer_period_us=100000
    busybox modprobe kvm_amd nested=0
} &
kvm=$!
busybox modprobe -a virtio_pci virtio_console tun af_packet
ip link set lo up
hostname lab

# Ports and their names turn up a moment after the driver.
for name in output status result; do
    until port=$(grep -lx "$name" /sys/class/virtio-ports/*/name 2>/dev/null); do sleep 0.01; done
    port=${port%/name}
    until [ -e "/dev/${port##*/}" ]; do sleep 0.01; done
    ln -s "/dev/${port##*/}" "/run/$name"
done
wait $kvm
exec 4>/run/status
read -r uptime _ </proc/uptime
echo "up $uptime" >&4

# A script for every guest that boots /lab/initrd as it is.
if [ -e /lab/script ]; then
    script-layer /lab/script >>/lab/initrd
fi

# The command writes to a FIFO, not to the port, so that it can open /dev/stdout again. dd's plain writes return
# when the host has the data; nothing is lost at power-off.
mkfifo /run/fifo
{
    dd if=/run/fifo of=/run/output bs=32k 2>/dev/null
    : >/run/drained
} &
cd /lab
: >/run/began
sh /lab/command </dev/null >/run/fifo 2>&1 4>&-
status=$?
# What the command left running may hold the FIFO open: it has had its time.
waited=0
until [ -e /run/drained ] || [ $waited = 20 ]; do
    sleep 0.05
    waited=$((waited + 1))
done

# What came by --file goes back if it was changed.
while read -r given; do
    if [ -n "$(find "$given" -type f -newer /run/began)" ]; then
        cp -R "$given" /lab/out/
    fi
done </lab/given
if [ -n "$(ls -A /lab/out)" ]; then
    tar -C /lab/out -c . | dd of=/run/result bs=32k 2>/dev/null
fi
echo "exit $status" >&4
poweroff -f
