#!/bin/sh
# One disk image on a tmpfs, read by the same guest under Partita and under QEMU with virtio-blk and
# an iothread, in turn, in one run of the lab. Only the ratios mean anything: under software
# emulation every exit is dear. Run with
#   cargo xtask lab --peers --all-cores --file benches/lab:/lab/benches -- sh /lab/benches/storage.sh
. "$(dirname "$0")/lib.sh"
# Each is a run of its own: `partita` as it is, `user` with the Hyper-V interface from user space,
# `qemu`.
vmms=${VMMS:-partita qemu}
dd if=/dev/urandom of=disk.img bs=1M count=64 2>/dev/null
jobs 'randread-4k-qd1 randread 4k 1
randread-4k-qd32 randread 4k 32
read-128k-qd8 read 128k 8'

partita_run() {
    partita run "$@" --stats --kernel /lab/cloud/vmlinuz --initrd initrd --memory 768M --cpus 1 \
        --cmdline 'console=ttyS0 panic=-1 quiet' --disk path=disk.img </dev/null 2>"$vmm.log"
}
user_run() { partita_run --synic user; }
qemu_run() {
    qemu-system-x86_64 -enable-kvm -cpu host -m 768 -smp 1 -nodefaults -display none -no-reboot \
        -kernel /lab/cloud/vmlinuz -initrd initrd -append 'console=ttyS0 panic=-1 quiet' -serial stdio \
        -object iothread,id=io0 -drive file=disk.img,format=raw,if=none,id=d0 \
        -device virtio-blk-pci,drive=d0,iothread=io0 </dev/null
}

# shellcheck disable=SC2086
compare $vmms
