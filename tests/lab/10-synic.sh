#!/bin/sh
# Served by the kernel or from user space, the Hyper-V interface is the same to Debian: VMBus 5.3,
# the reference TSC page as its clock, interrupts on both VPs, a disk that keeps what is written.
# No signal of its comes to user space in either way.
. "$(dirname "$0")/lib.sh"

truncate -s 64M disk.img
for synic in kernel user; do
    guest cloud "$here/10-synic.guest.sh" --cpus 2 --synic $synic --stats --disk path=disk.img
    expect 'Hypervisor detected: Microsoft Hyper-V'
    expect 'Vmbus version:5.3'
    expect 'clock: hyperv_clocksource_tsc_page'
    expect 'interrupted: 2 processors'
    expect 'verified'
    healthy
    ! grep 'unbound signals' partita.log || fail 'a signal came to user space'
    served=$(grep -c 'synthetic registers' partita.log) || true
    case $synic in
    kernel) [ "$served" = 0 ] || fail 'registers came to user space' ;;
    user) [ "$served" = 2 ] || fail 'registers did not come to user space' ;;
    esac
    echo "ok: $synic"
done
