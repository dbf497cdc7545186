#!/bin/sh
# attach=ide+scsi: Debian's ata_piix leaves the disk alone and storvsc drives it. Told otherwise
# (prefer_ms_hyperv=0) ATA drives it, and the path by the VMBus reads the same disk and may not write;
# a SCSI disk is beside it. Either way what the guest writes is on the image. A guest without any disk
# boots too.
. "$(dirname "$0")/lib.sh"

ide_scsi() {
    truncate -s 64M disk.img
    guest full "$here/23-attach.guest.sh" --cpus 2 --stats \
        --disk path=disk.img,attach=ide+scsi,channel=1,device=0 "$@"
    healthy
    expect 'dmi: Microsoft Corporation / Virtual Machine'
    whole disk.img 4
}

ide_scsi
expect 'disks: 1, ata none, storvsc /dev/sda'

rm disk.img
truncate -s 16M other.img
KERNEL_OPTIONS='ata_piix.prefer_ms_hyperv=0' ide_scsi --disk path=other.img,attach=scsi
expect 'disks: 3, ata /dev/sd., storvsc /dev/sd.'
expect 'scsi: 32768'
expect 'both paths: the same'
expect 'refused: .*[Ww]rite protected'
expect 'unchanged'
grep -q 'disk.img: the guest writes to it by IDE, so its writes by the VMBus are refused' partita.log ||
    fail 'the refusal is not told'

echo 'echo "disks: $(ls /sys/block | grep -c "^[sv]")"; ls /sys/bus/pci/devices | wc -l | sed "s/^/pci: /"' >none.sh
guest full "$work/none.sh" --stats
healthy
expect 'disks: 0'
expect 'pci: 0'
