#!/bin/sh
# One disk image on a tmpfs, read by Debian's ata_piix under Partita and under QEMU's pc machine, in turn,
# in one run of the lab, with exits for each I/O. Run with
#   cargo xtask lab --peers --all-cores --file benches/lab:/lab/benches -- sh /lab/benches/ide.sh
. "$(dirname "$0")/lib.sh"
dd if=/dev/urandom of=disk.img bs=1M count=64 2>/dev/null
jobs 'randread-4k-qd1 randread 4k 1
read-128k-qd1 read 128k 1'

partita_run() {
    partita run --stats --kernel /lab/full/vmlinuz --initrd initrd --memory 768M --cpus 1 \
        --cmdline 'console=ttyS0 panic=-1 quiet' --disk path=disk.img,attach=ide </dev/null 2>"$vmm.log"
}
qemu_run() {
    qemu-system-x86_64 -M pc -enable-kvm -cpu host -m 768 -smp 1 -nodefaults -display none -no-reboot \
        -kernel /lab/full/vmlinuz -initrd initrd -append 'console=ttyS0 panic=-1 quiet' -serial stdio \
        -drive if=ide,file=disk.img,format=raw </dev/null
}

# shellcheck disable=SC2086
compare ${VMMS:-partita qemu}
