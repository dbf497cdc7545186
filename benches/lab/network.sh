#!/bin/sh
# iperf3 and ping between Debian and the lab over a tap: hv_netvsc under Partita, virtio-net under QEMU
# with and without vhost-net, and an emulated e1000 under either, in turn, in one run of the lab, with
# exits and interrupts for each packet of the MTU's size, and Partita's signals. SECONDS_EACH is how long
# a job takes; VMMS='e1000 qemu_e1000' has the emulated ones alone, one beside the other. Run with
#   cargo xtask lab --peers --all-cores --file benches/lab:/lab/benches -- sh /lab/benches/network.sh
. "$(dirname "$0")/lib.sh"
{ echo "seconds=${SECONDS_EACH:-3}" && cat "$here/network.guest.sh"; } >guest.sh
with-script guest.sh initrd
modprobe vhost_net
ip tuntap add dev lab0 mode tap vnet_hdr
ip addr add 10.0.0.1/24 dev lab0
ip link set lab0 up
iperf3 -s >/dev/null 2>&1 &
server=$!
trap 'kill $server' EXIT

# Debian's kernel for clouds has no driver for an e1000.
ours() {
    partita run --stats --kernel "/lab/$1/vmlinuz" --initrd initrd --memory 768M --cpus 1 \
        --cmdline 'console=ttyS0 panic=-1 quiet' --nic "backend=tap:lab0,queues=1$2" </dev/null \
        2>"$vmm.log"
}
qemu() {
    qemu-system-x86_64 -M q35 -enable-kvm -cpu host -m 768 -smp 1 -nodefaults -display none -no-reboot \
        -kernel "/lab/$1/vmlinuz" -initrd initrd -append 'console=ttyS0 panic=-1 quiet' -serial stdio \
        -netdev "tap,id=n,ifname=lab0,script=no,downscript=no,vhost=$2" \
        -device "$3,netdev=n,romfile=" </dev/null
}
partita_run() { ours cloud ''; }
e1000_run() { ours full ,attach=e1000; }
virtio_run() { qemu cloud off virtio-net-pci; }
vhost_run() { qemu cloud on virtio-net-pci; }
qemu_e1000_run() { qemu full off e1000; }

# shellcheck disable=SC2086
compare ${VMMS:-partita virtio vhost e1000 qemu_e1000}
