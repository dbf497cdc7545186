#!/bin/sh
# One disk image on a tmpfs, read by the same guest under Partita and under QEMU with virtio-blk and
# an iothread, in turn, in one run of the lab. Only the ratios mean anything: under software
# emulation every exit is dear. Run with
#   cargo xtask lab --peers --all-cores --file benches/lab:/lab/benches -- sh /lab/benches/storage.sh
set -eu
here=$(cd "$(dirname "$0")" && pwd)
rounds=${ROUNDS:-2}
# Each is a run of its own: `partita` as it is, `user` with the Hyper-V interface from user space,
# `qemu`.
vmms=${VMMS:-partita qemu}
work=/tmp/storage
mkdir -p $work /lab/out
cd $work
dd if=/dev/urandom of=disk.img bs=1M count=64 2>/dev/null
with-script "$here/storage.guest.sh" initrd

# What KVM counts is the sum over the guests that live, so it is read while they do.
kvm() { cat /sys/kernel/debug/kvm/$1; }
# L1's uptime, which busybox's date cannot tell as finely.
milliseconds() {
    read -r uptime _ </proc/uptime
    echo "${uptime%.*}${uptime#*.}0"
}

# Prints what happened on the host's side: the time from the start of the VMM to the guest's init, in
# seconds; exits of the VP in each job; and the page faults that KVM took for the guest's memory
# until the last of them.
watch_console() {
    name=
    while read -r line; do
        line=$(printf '%s' "$line" | tr -d '\r')
        case $line in
        'job: '*) name=${line#job: } exits=$(kvm exits) ;;
        'result: '*)
            echo "$1 ${line#result: } exits=$(($(kvm exits) - exits))"
            faults=$(kvm pf_taken)
            ;;
        'guest: init at '*)
            took=$(($(milliseconds) - began))
            echo "$1 exec-to-init ms=$took faults=$(kvm pf_taken) ($line)"
            ;;
        'interrupts: '* | 'guest: '*) echo "$1 $line" ;;
        esac
    done
    echo "$1 memory faults=${faults:-?}"
}

partita_run() {
    partita run "$@" --stats --kernel /lab/cloud/vmlinuz --initrd initrd --memory 768M --cpus 1 \
        --cmdline 'console=ttyS0 panic=-1 quiet' --disk path=disk.img </dev/null 2>partita.log
}
user_run() { partita_run --synic user; }
qemu_run() {
    qemu-system-x86_64 -enable-kvm -cpu host -m 768 -smp 1 -nodefaults -display none -no-reboot \
        -kernel /lab/cloud/vmlinuz -initrd initrd -append 'console=ttyS0 panic=-1 quiet' -serial stdio \
        -object iothread,id=io0 -drive file=disk.img,format=raw,if=none,id=d0 \
        -device virtio-blk-pci,drive=d0,iothread=io0 </dev/null
}

for round in $(seq "$rounds"); do
    for vmm in $vmms; do
        began=$(milliseconds)
        ${vmm}_run | watch_console "$vmm" | tee -a results
        [ $vmm = qemu ] || sed "s/^/partita: /" partita.log
    done
done
echo
# The median of each, since emulated processors stand still now and then, and the first's ratio to
# the second.
set -- $vmms
awk -v first="$1" -v second="${2:-$1}" '
    function note(what, field,    pair) {
        split(field, pair, "=")
        values[what " " $1] = values[what " " $1] " " pair[2]
        if (!(what in seen)) { seen[what] = 1; order[++count] = what }
    }
    $2 == "exec-to-init" { note("exec to init, ms", $3) }
    $2 == "memory" { note("memory faults", $3) }
    $2 ~ /^(randread|read)-/ { note($2 ", I/O/s", $3) }
    function median(list,    n, i, j, v, swap) {
        n = split(list, v, " ")
        for (i = 1; i <= n; i++)
            for (j = i + 1; j <= n; j++)
                if (v[j] + 0 < v[i] + 0) { swap = v[i]; v[i] = v[j]; v[j] = swap }
        return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
    }
    END { for (i = 1; i <= count; i++) {
        what = order[i]
        p = median(values[what " " first])
        q = median(values[what " " second])
        printf "%-24s %s %8.0f   %s %8.0f   ratio %.2f\n", what, first, p, second, q, q ? p / q : 0
    } }' results | tee /lab/out/storage.txt
