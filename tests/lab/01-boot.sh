#!/bin/sh
# kernels: cloud full new
# Debian's own kernels boot to the script with 1 and 2 VPs and find a Hyper-V host with VMBus
# 5.3 and a synthetic disk; power-off ends the program with 0.
. "$(dirname "$0")/lib.sh"

truncate -s 64M disk.img
for cpus in 1 2; do
    guest "$KERNEL" "$here/01-boot.guest.sh" --cpus $cpus --memory 512M --disk path=disk.img,id=first-light
    expect "cpus: $cpus"
    expect 'Hypervisor detected: Microsoft Hyper-V'
    expect 'Vmbus version:5.3'
    expect 'storvsc'
    expect 'disk: sda 131072'
    expect 'serial: first-light'
    healthy
    echo "ok: $KERNEL kernel, $cpus VPs"
done
