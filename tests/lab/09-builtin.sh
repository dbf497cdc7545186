#!/bin/sh
# The built-in guest, by a KVM that has Hyper-V support: it works on two disks by the kernel's
# interface and by ours, with two processors too, NICs of both kinds exchange frames, a write that must
# fail is told, and the demo is whole, without KVM too, where a kernel is refused in one line.
. "$(dirname "$0")/lib.sh"

truncate -s 32M first.img
truncate -s 16M second.img
truncate -s 8M third.img
for synic in kernel user; do
    partita run --synic $synic --memory 64M \
        --builtin 'identify; verify disk=1 bytes=8M; bench depth=8 time=200ms' \
        --disk path=first.img --disk path=second.img,controller=1,lun=3 </dev/null | tee console.log
    expect '"event":"connected","bus":"vmbus","version":"5.3","offers":2'
    expect '"disk":1,"driver":"storvsc","controller":1,"lun":3,'
    expect '"result":"verify","disk":1,"driver":"storvsc","bytes":8388608,'
    expect '"result":"bench","disk":0,'
    refute '"error"'
    partita run --synic $synic --memory 64M --cpus 2 \
        --builtin 'verify bytes=8M; verify bytes=8M vps=2; bench vps=2 depth=8 time=200ms' \
        --disk path=first.img </dev/null | tee console.log
    expect '"disks":1,"channels":2'
    [ "$(grep -o '"checksum":"[0-9a-f]*"' console.log | uniq | wc -l)" = 1 ] || fail 'other checksums'
    expect '"result":"bench","disk":0,.*"depth":16,"vps":2,'
    refute '"error"'
    # By IDE, whose interrupts come through the I/O APIC.
    partita run --synic $synic --memory 64M --disk path=third.img,attach=ide,device=1 \
        --builtin 'verify bytes=4M; checksum bytes=1M transfer=pio; verify bytes=64k transfer=pio' \
        </dev/null | tee console.log
    expect '"result":"verify","disk":0,"driver":"ide-dma","bytes":4194304,'
    expect '"result":"checksum","disk":0,"driver":"ide-pio","bytes":1048576,'
    expect '"result":"verify","disk":0,"driver":"ide-pio","bytes":65536,'
    refute '"error"'
    # NICs: those of e1000 have registers in memory, and interrupt through the I/O APIC as well.
    partita run --synic $synic --memory 64M --nic backend=switch:a --nic backend=switch:a \
        --nic attach=e1000,backend=switch:a --nic attach=e1000,backend=switch:a --builtin '
            exchange nic=0 peer=1 frames=500; exchange nic=2 peer=3 frames=500;
            exchange nic=2 peer=3 depth=1 spin=0us frames=20; exchange nic=3 peer=0 frames=100' \
        </dev/null | tee console.log
    good='"lost":0,"duplicates":0,"reordered":0,"damaged":0,"foreign":0,'
    expect "\"nic\":0,\"peer\":1,\"driver\":\"netvsc\",.*\"frames\":1000,$good"
    expect "\"nic\":2,\"peer\":3,\"driver\":\"e1000\",.*\"frames\":1000,$good"
    expect "\"depth\":1,.*\"frames\":40,$good"
    expect "\"driver\":\"e1000\",\"peer_driver\":\"netvsc\",.*\"frames\":200,$good"
    refute '"error"'
done

rc=0
partita run --memory 64M --builtin verify --disk path=first.img,readonly=on </dev/null >console.log ||
    rc=$?
[ "$rc" = 1 ] || fail "partita exited with $rc"
expect '"error":"the write of block .* failed: the unit refused the command with sense 7/27/00"'

partita demo | tee console.log
expect 'KVM with its own Hyper-V support'
expect 'all equal'
expect 'read by storvsc, IDE DMA, IDE PIO: checksum [0-9a-f]* each time'
expect 'frames have arrived, every byte of each compared; none lost'
expect 'the guest switched itself off'

# The same guest as a process, by itself where /dev/kvm is gone.
mv /dev/kvm /dev/kvm.away
partita demo | tee console.log
rc=0
partita run --kernel /lab/cloud/vmlinuz --disk path=first.img --serial file:made 2>refused || rc=$?
mv /dev/kvm.away /dev/kvm
[ "$rc" = 1 ] || fail "without KVM, partita run exited with $rc"
[ "$(wc -l <refused)" = 1 ] && grep -q 'there is no /dev/kvm' refused || fail "$(cat refused)"
[ ! -e made ] || fail 'without KVM, a file was made all the same'
expect 'a hosted partition'
expect 'there is no /dev/kvm'
expect '4 KiB at random, hosted'
expect 'the guest switched itself off'
