#!/bin/sh
# With the interrupt controllers and the timer in user space, Linux runs by the I/O APIC with two VPs,
# and with one by the PICs alone, where the PIT is its only tick. Disks on both buses work, the clock's
# alarm interrupts, and the SCI does, which is level-triggered.
. "$(dirname "$0")/lib.sh"

truncate -s 16M ide.img scsi.img
boot() {
    : >console.log
    # Presses the power button when the guest is ready to count it.
    (
        for n in $(seq 600); do
            if grep -q 'button: now' console.log; then
                kill -TERM "$(pidof partita)"
                break
            fi
            sleep 0.2
        done
    ) &
    guest full "$here/24-irqchip.guest.sh" --irqchip user --stats "$@" \
        --disk path=ide.img,attach=ide --disk path=scsi.img
    wait
    healthy
    refute 'lost interrupt'
    expect 'disks: the same'
    expect 'alarm: interrupted'
    expect 'rtc: 2001-02-28'
    expect 'button: 1'
    grep -q 'stats: interrupt controllers: in user space' partita.log || fail 'no statistics'
}

boot --cpus 2
expect 'irq: .*IO-APIC *14-edge *ata_piix'
expect 'irq: .*IO-APIC *9-fasteoi *acpi'
expect 'irq: HYP: *[1-9]'
grep -q ' 0 messages of the I/O APIC' partita.log && fail 'the I/O APIC was idle'
grep -q ' interrupts ended' partita.log || fail 'no level-triggered interrupt was ended'

KERNEL_OPTIONS='noapic nolapic_timer lapic=notscdeadline'
boot --synic user
expect 'irq: .*XT-PIC *ata_piix'
expect 'irq: .*XT-PIC *timer'
expect 'clockevent: pit'
grep -q ' 0 interrupts of the PICs' partita.log && fail 'the PICs were idle'
exit 0
