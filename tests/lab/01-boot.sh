#!/bin/sh
# Debian's own kernels boot to the script with 1 and 2 VPs and find a Hyper-V host with VMBus
# 5.3 and a synthetic disk; power-off ends the program with 0.
. "$(dirname "$0")/lib.sh"

truncate -s 64M disk.img
for run in 'cloud 1' 'cloud 2' 'full 1' 'full 2'; do
    set -- $run
    guest "$1" "$here/01-boot.guest.sh" --cpus "$2" --memory 512M --disk path=disk.img,id=first-light
    expect "cpus: $2"
    expect 'Hypervisor detected: Microsoft Hyper-V'
    expect 'Vmbus version:5.3'
    expect 'storvsc'
    expect 'disk: sda 131072'
    expect 'serial: first-light'
    healthy
    echo "ok: $1 kernel, $2 VPs"
done
