#!/bin/sh
# iperf3 and ping between Debian and the lab over a tap: hv_netvsc under Partita, virtio-net under QEMU
# with and without vhost-net, and an emulated e1000 under either. All guests are up together, idle but for
# the one whose turn it is, and each kind of traffic has each of them in turn, ROUNDS times for
# SECONDS_EACH: an emulated L1 has fast minutes and slow ones. Counts are for each packet of the MTU's size.
# VMMS='e1000 qemu_e1000' has only those; UNPINNED=1 leaves it to the scheduler what runs where. Run with
#   cargo xtask lab --peers --all-cores --file benches/lab:/lab/benches -- sh /lab/benches/network.sh
. "$(dirname "$0")/lib.sh"
rounds=${ROUNDS:-5}
seconds=${SECONDS_EACH:-1}
vmms=${VMMS:-partita virtio vhost e1000 qemu_e1000}
# What the host's end of a job is started with.
beside='taskset -c 1'
[ -z "${UNPINNED:-}" ] || beside=
with-script "$here/network.guest.sh" initrd
modprobe vhost_net

# Debian's kernel for clouds has no driver for an e1000.
ours() {
    exec partita run --stats --kernel "/lab/$1/vmlinuz" --initrd initrd --memory 640M --cpus 1 \
        --cmdline "$cmdline" --nic "backend=tap:$tap,queues=1$2"
}
qemu() {
    exec qemu-system-x86_64 -M q35 -enable-kvm -cpu host -m 640 -smp 1 -nodefaults -display none -no-reboot \
        -name guest,debug-threads=on -kernel "/lab/$1/vmlinuz" -initrd initrd -append "$cmdline" -serial stdio \
        -netdev "tap,id=n,ifname=$tap,script=no,downscript=no,vhost=$2" \
        -device "$3,netdev=n,romfile="
}
partita_run() { ours cloud ''; }
e1000_run() { ours full ,attach=e1000; }
virtio_run() { qemu cloud off virtio-net-pci; }
vhost_run() { qemu cloud on virtio-net-pci; }
qemu_e1000_run() { qemu full off e1000; }

# start VMM SUBNET: boots a guest on a tap of its own, and waits for its network.
start() {
    tap=lab$2
    ip tuntap add dev "$tap" mode tap vnet_hdr
    ip addr add "10.0.$2.1/24" dev "$tap"
    ip link set "$tap" up
    cmdline="console=ttyS0 panic=-1 quiet nic-address=10.0.$2.2"
    "$1_run" </dev/null >"$1.console" 2>"$1.log" &
    eval "pid_$1=$! guest_$1=10.0.$2.2"
    for _ in $(seq 60); do
        ping -c 1 -W 1 "10.0.$2.2" >/dev/null 2>&1 && return
    done
    cat "$1.console" "$1.log" >&2
    echo "$1: its guest does not answer a ping" >&2
    exit 1
}

# pin VMM: its guest's processor gets L1's first core, and all that serves it the second, beside iperf3. Which
# of the three share a core is otherwise the scheduler's, and differs from boot to boot.
pin() {
    eval "pid=\$pid_$1"
    for task in "/proc/$pid/task"/* $(grep -lx "vhost-$pid" /proc/[0-9]*/comm); do
        core=1
        case $task in
        */comm) task=${task%/comm} ;;
        *) case $(cat "$task/comm") in vp0 | 'CPU 0/KVM') core=0 ;; esac ;;
        esac
        [ -n "${UNPINNED:-}" ] || taskset -c -p "$core" "${task##*/}" >/dev/null
        [ "$core" = 1 ] || eval "vp_$1=$task"
    done
}

# of VMM NAME: a counter of KVM for this guest.
of() {
    eval "pid=\$pid_$1"
    cat "/sys/kernel/debug/kvm/$pid"-*/"$2"
}

# Has a partita print its counters to its log: what lies between two looks is one job's.
look() {
    eval "pid=\$pid_$1"
    case $1 in partita | e1000) kill -USR1 "$pid" ;; esac
}

# job VMM NAME BYTES [iperf3 option]...: prints what the receiver got, in Mbit/s and in packets of BYTES of
# payload, be they one by one or together on their way.
job() {
    vmm=$1 name=$2 bytes=$3
    shift 3
    eval "address=\$guest_$vmm"
    look "$vmm"
    exits=$(of "$vmm" exits) interrupts=$(of "$vmm" irq_injections)
    case $name in
    ping)
        result=$($beside ping -q -c 100 -i 0.01 "$address" | sed -n 's,.*= [0-9.]*/\([0-9.]*\)/.*,\1,p')
        result="ms=$result packets=200"
        ;;
    *)
        # One that does not end counts as nothing.
        result=$(timeout $((seconds + 20)) $beside iperf3 -c "$address" -i 0 -f m -t "$seconds" "$@" |
            sed -n 's,.* \([0-9.]*\) Mbits/sec.*receiver.*,\1,p' | tail -1)
        result=$(awk -v rate="${result:-0}" -v bytes="$bytes" -v seconds="$seconds" \
            'BEGIN { printf "mbits=%s packets=%d", rate, rate * 125000 * seconds / bytes }')
        ;;
    esac
    # One that has restarted is not what was set up.
    eval "vp=\$vp_$vmm"
    if [ ! -e "$vp" ]; then
        cat "$vmm.console" "$vmm.log" >&2
        echo "$vmm: its guest went down in $name" >&2
        exit 1
    fi
    exits=$(($(of "$vmm" exits) - exits)) interrupts=$(($(of "$vmm" irq_injections) - interrupts))
    look "$vmm"
    echo "$vmm $name $result exits=$exits" | tee -a results "$vmm.jobs"
    echo "$vmm interrupts: $name $interrupts" >>results
}

subnet=0
for vmm in $vmms; do
    subnet=$((subnet + 1))
    start "$vmm" "$subnet"
    pin "$vmm"
done
for _ in $(seq "$rounds"); do
    for vmm in $vmms; do job "$vmm" tcp-out 1448 -R; done
    for vmm in $vmms; do job "$vmm" tcp-in 1448; done
    for vmm in $vmms; do job "$vmm" udp-out 1400 -u -b 0 -l 1400 -R; done
    for vmm in $vmms; do job "$vmm" udp-in 1400 -u -b 0 -l 1400; done
    for vmm in $vmms; do job "$vmm" ping 84; done
done
for vmm in $vmms; do
    eval "kill -9 \$pid_$vmm && wait \$pid_$vmm" || true
    per_io "$vmm" "$vmm.jobs" >>results
done
# shellcheck disable=SC2086
medians $vmms
