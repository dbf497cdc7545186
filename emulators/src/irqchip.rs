//! The PC's interrupt controllers, for a partition that has only local APICs from its hypervisor: a
//! pair of PICs and an I/O APIC.
//!
//! - [`pic`], [`ioapic`]: the registers, each a state machine without I/O.
//!
//! Lines 0 to 15 lead to both, as they do in a PC whose firmware tells of no overrides: a guest masks
//! them in the one that it does not use. A line moves, a register is accessed or an interrupt ends
//! under the lock of the chip concerned, and what comes of it goes to the processors before the next.

mod fuzz;
mod ioapic;
mod pic;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::interrupts::{InterruptController, InterruptMessage, LocalApics};
use hypervisor::{Bus, BusError, Device, layout};

pub(crate) use fuzz::fuzz;
use ioapic::IoApic;
use pic::Pics;

/// Both kinds of controllers.
pub struct InterruptChips {
    pics: Mutex<Pics>,
    ioapic: Mutex<IoApic>,
    apics: Arc<dyn LocalApics>,
    messages: AtomicU64,
    acknowledged: AtomicU64,
}

impl InterruptChips {
    /// Controllers that interrupt the processors behind `apics`.
    pub fn new(apics: Arc<dyn LocalApics>) -> Self {
        Self {
            pics: Mutex::new(Pics::new()),
            ioapic: Mutex::new(IoApic::new()),
            apics,
            messages: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
        }
    }

    /// Puts their registers where every PC has them.
    pub fn add_to(self: &Arc<Self>, ports: &mut Bus, mmio: &mut Bus) -> Result<(), BusError> {
        for (chip, port) in pic::PORTS.into_iter().enumerate() {
            let device = PicPorts { chips: Arc::clone(self), chip };
            ports.add("PIC", port.into(), 2, Arc::new(device))?;
        }
        ports.add("ELCR", pic::ELCR.into(), 2, Arc::new(ElcrPorts(Arc::clone(self))))?;
        let device = IoApicRegisters(Arc::clone(self));
        mmio.add("I/O APIC", layout::IOAPIC.0, ioapic::SIZE, Arc::new(device))
    }

    /// How many messages the I/O APIC has sent, and how many interrupts of the PICs the first
    /// processor has taken.
    pub fn counts(&self) -> (u64, u64) {
        (self.messages.load(Ordering::Relaxed), self.acknowledged.load(Ordering::Relaxed))
    }

    /// Lets `access` move the PICs, and shows the processor their output as it is then.
    fn pics<T>(&self, access: impl FnOnce(&mut Pics) -> T) -> T {
        let mut pics = lock(&self.pics);
        let value = access(&mut pics);
        self.apics.set_intr(pics.output());
        value
    }

    /// Takes a line to each level in turn.
    fn move_line(&self, gsi: u32, levels: &[bool]) {
        if let Ok(irq @ 0..16) = u8::try_from(gsi) {
            self.pics(|pics| levels.iter().for_each(|high| pics.set_line(irq, *high)));
        }
        let mut ioapic = lock(&self.ioapic);
        for high in levels {
            ioapic.set_line(gsi, *high, &mut |message| self.send(message));
        }
    }

    fn send(&self, message: InterruptMessage) -> bool {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.apics.send(message)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl InterruptController for InterruptChips {
    fn set_line(&self, gsi: u32, high: bool) {
        self.move_line(gsi, &[high]);
    }

    fn pulse(&self, gsi: u32) {
        self.move_line(gsi, &[true, false]);
    }

    fn acknowledge(&self) -> u8 {
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        self.pics(Pics::acknowledge)
    }

    fn end_of_interrupt(&self, vector: u8) {
        lock(&self.ioapic).end_of_interrupt(vector, &mut |message| self.send(message));
    }
}

/// The two ports of one PIC.
struct PicPorts {
    chips: Arc<InterruptChips>,
    chip: usize,
}

impl Device for PicPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.chips.pics(|pics| pics.read(self.chip, offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            self.chips.pics(|pics| pics.write(self.chip, offset, *byte));
        }
    }
}

/// The edge/level registers of both.
struct ElcrPorts(Arc<InterruptChips>);

impl Device for ElcrPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (chip, byte) in (offset as usize..).zip(data) {
            *byte = self.0.pics(|pics| pics.elcr(chip));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (chip, byte) in (offset as usize..).zip(data) {
            self.0.pics(|pics| pics.set_elcr(chip, *byte));
        }
    }
}

/// The I/O APIC's page. It answers aligned accesses of 4 bytes, and no others.
struct IoApicRegisters(Arc<InterruptChips>);

impl Device for IoApicRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = lock(&self.0.ioapic).read(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        tracing::trace!("I/O APIC: {:#x} at {offset:#x}", u32::from_le_bytes(data));
        let chips = &*self.0;
        let mut send = |message| chips.send(message);
        let mut ioapic = lock(&chips.ioapic);
        if ioapic.write(offset, u32::from_le_bytes(data), &mut send) {
            // Before one of them is sent, so that none ends unheard.
            chips.apics.set_level_messages(&ioapic.level_messages().collect::<Vec<_>>());
        }
        ioapic.refresh(&mut send);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Apics(AtomicU64);

    impl LocalApics for Apics {
        fn send(&self, _: InterruptMessage) -> bool {
            self.0.fetch_add(1, Ordering::Relaxed);
            true
        }

        fn set_level_messages(&self, _: &[InterruptMessage]) {}

        fn set_intr(&self, _: bool) {}
    }

    #[test]
    fn pulses_of_several_threads_are_edges_each() {
        const EACH: u64 = 2000;
        let apics = Arc::new(Apics::default());
        let chips = Arc::new(InterruptChips::new(Arc::clone(&apics) as _));
        let mut mmio = Bus::mmio();
        chips.add_to(&mut Bus::ports(), &mut mmio).unwrap();
        mmio.write(layout::IOAPIC.0, &0x18_u32.to_le_bytes());
        mmio.write(layout::IOAPIC.0 + 0x10, &0x34_u32.to_le_bytes()); // pin 4, not masked
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..EACH).for_each(|_| chips.pulse(4)));
            }
        });
        assert_eq!(apics.0.load(Ordering::Relaxed), 2 * EACH);
        assert_eq!(chips.counts(), (2 * EACH, 0));
    }
}
