#!/bin/sh
# One disk image on a tmpfs, read by the same guest under Partita and under QEMU with virtio-blk and
# an iothread, in turn, in one run of the lab. Only the ratios mean anything: under software
# emulation every exit is dear. Run with
#   cargo xtask lab --peers --file benches/lab:/lab/benches -- sh /lab/benches/storage.sh
# ROUNDS=3 repeats it all, SECONDS_PER_JOB is in the guest's half.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
rounds=${ROUNDS:-2}
work=/tmp/storage
rm -rf $work
mkdir -p $work /lab/out
cd $work
dd if=/dev/urandom of=disk.img bs=1M count=64 2>/dev/null
with-script "$here/storage.guest.sh" initrd

kvm() { cat "/sys/kernel/debug/kvm/$1"; }

# All counters there are, as "name value" pairs on one line: KVM's, which are sums over all guests
# and gone with them, and Partita's own, which it prints on SIGUSR1.
counters() {
    for name in exits io_exits halt_exits hypercalls irq_injections pf_fixed; do
        printf '%s %s ' $name "$(kvm $name)"
    done
    if [ "$1" = partita ]; then
        : >partita.log
        kill -USR1 "$(pidof partita)"
        while ! grep -q resident partita.log; do sleep 0.05; done
        sed -n 's/^stats: channel [^:]*: //p' partita.log | tr -d ',' | tr '\n' ' '
        awk '/exits to user space/ { for (i = 1; i < NF; i++) if ($(i + 1) ~ /^exits/) n += $i } END { printf "user_exits %d", n }' partita.log
    fi
    echo
}

# "name before", "name after" lines and a job's I/Os per second to counts per I/O.
per_io() {
    awk -v ios="$3" 'NR == FNR { for (i = 1; i < NF; i += 2) before[$i] = $(i + 1); next }
        { for (i = 1; i < NF; i += 2) printf "  %s %.2f", $i, ($(i + 1) - before[$i]) / ios; print "" }' "$1" "$2"
}

watch_console() {
    while read -r line; do
        line=$(printf '%s' "$line" | tr -d '\r')
        case $line in
        'job: '*) counters "$1" >before ;;
        'result: '*)
            counters "$1" >after
            echo "$1 ${line#result: }"
            echo "$1 per I/O:$(per_io before after "${line##*ios=}")"
            ;;
        'guest: '*) echo "$1 $line" ;;
        esac
    done
}

# The time from exec to init counts the firmware, if there is one.
started() { cut -d' ' -f1 /proc/uptime >start; }

partita_run() {
    partita run --kernel /lab/cloud/vmlinuz --initrd initrd --memory 768M --cpus 1 \
        --cmdline 'console=ttyS0 panic=-1 quiet' --disk path=disk.img </dev/null 2>>partita.log
}
qemu_run() {
    qemu-system-x86_64 -enable-kvm -cpu host -m 768 -smp 1 -nodefaults -display none -no-reboot \
        -kernel /lab/cloud/vmlinuz -initrd initrd -append 'console=ttyS0 panic=-1 quiet' -serial stdio \
        -object iothread,id=io0 -drive file=disk.img,format=raw,if=none,id=d0 \
        -device virtio-blk-pci,drive=d0,iothread=io0 </dev/null
}
boot_time() {
    awk -v vmm="$1" '{ print }
        /guest: init/ && !done { done = 1; getline now <"/proc/uptime"; getline start <"start"; split(now, n, " ");
            printf "%s exec to init: %.2f s\n", vmm, n[1] - start; fflush() }
        { fflush() }'
}

for round in $(seq "$rounds"); do
    for vmm in partita qemu; do
        started
        ${vmm}_run | boot_time $vmm | tee console.$vmm | watch_console "$vmm" | tee -a results
        grep 'exec to init' console.$vmm | tee -a results
    done
done
echo
awk '$2 ~ /^(randread|read)-/ { split($3, i, "="); sum[$2 " " $1] += i[2]; n[$2 " " $1]++ }
     / exec to init/ { boot[$1] += $5; boots[$1]++ }
     END { for (job in sum) if (job ~ / partita$/) { name = job; sub(/ .*/, "", name);
               p = sum[job] / n[job]; q = sum[name " qemu"] / n[name " qemu"];
               printf "%-18s partita %8.0f I/O/s   qemu virtio-blk %8.0f I/O/s   ratio %.2f\n", name, p, q, p / q }
           printf "exec to init       partita %8.2f s       qemu with SeaBIOS %6.2f s\n",
               boot["partita"] / boots["partita"], boot["qemu"] / boots["qemu"] }' results | sort | tee /lab/out/storage.txt
cp results /lab/out/storage-results.txt
