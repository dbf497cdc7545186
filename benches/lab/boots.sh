#!/bin/sh
# boots.sh KERNEL COUNT: boots a guest with two VPs and a console full of messages so often, and says of each boot
# whether it was good, panicked, said nothing for 90 s (hang) or failed otherwise. Run by stability.sh in L1.
kernel=$1 count=$2
work=/tmp/boots
mkdir -p $work /lab/out
cd $work || exit 1
truncate -s 64M disk.img
echo 'sha256sum /dev/sda >/dev/null && echo "cpus: $(grep -c ^processor /proc/cpuinfo)"' >script
with-script script initrd "$kernel"
for boot in $(seq "$count"); do
    read -r began _ </proc/uptime
    partita run --kernel "/lab/$kernel/vmlinuz" --initrd initrd --cpus 2 --memory 512M \
        --cmdline 'console=ttyS0 panic=-1 loglevel=8' --disk path=disk.img </dev/null >console 2>&1 &
    run=$!
    # A slow boot on a busy machine still says something now and then.
    size=0 silent=0 hung=
    while [ -e "/proc/$run/exe" ]; do
        sleep 1
        silent=$((silent + 1))
        now=$(stat -c %s console)
        [ "$now" = "$size" ] || silent=0
        size=$now
        if [ $silent = 90 ]; then
            hung=yes
            kill -KILL $run
        fi
    done
    wait $run
    status=$?
    read -r ended _ </proc/uptime
    if grep -q -e 'Kernel panic' -e 'BUG:' -e 'Oops' -e 'Call Trace' -e 'general protection' console; then
        what=panic
    elif [ $hung ]; then
        what=hang
    elif [ $status = 0 ] && grep -q '^cpus: 2' console && grep -q '^guest: exit 0' console; then
        what=good
    else
        what=other
    fi
    [ $what = good ] || cp console "/lab/out/console.$boot"
    echo "boot: $what status=$status seconds=$((${ended%.*} - ${began%.*}))"
done
