//! Accesses to the interrupt controllers, as a fuzzer makes them up.

use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::interrupts::{InterruptController, InterruptMessage, LocalApics};
use hypervisor::{Bus, layout};

use super::{InterruptChips, ioapic, pic};

/// What the processors have been told.
#[derive(Default)]
struct Told {
    intr: bool,
    level: Vec<InterruptMessage>,
}

#[derive(Default)]
struct Apics(Mutex<Told>);

impl Apics {
    fn lock(&self) -> std::sync::MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn intr(&self) -> bool {
        self.lock().intr
    }
}

impl LocalApics for Apics {
    fn send(&self, message: InterruptMessage) -> bool {
        const LEVEL: u32 = 1 << 15;
        // KVM has to know it before, or nobody hears of its end.
        assert!(message.data & LEVEL == 0 || self.lock().level.contains(&message));
        message.address & 1 << 12 == 0
    }

    fn set_level_messages(&self, messages: &[InterruptMessage]) {
        assert!(messages.len() <= ioapic::PINS as usize);
        self.lock().level = messages.to_vec();
    }

    fn set_intr(&self, high: bool) {
        self.lock().intr = high;
    }
}

/// Steps of six bytes: what to do, where, and four bytes to write.
pub(crate) fn fuzz(data: &[u8]) {
    const PORTS: [u16; 3] = [pic::PORTS[0], pic::PORTS[1], pic::ELCR];
    const SELECT: u64 = layout::IOAPIC.0;
    const WINDOW: u64 = SELECT + 0x10;

    let apics = Arc::new(Apics::default());
    let chips = Arc::new(InterruptChips::new(Arc::clone(&apics) as _));
    let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
    chips.add_to(&mut ports, &mut mmio).expect("the buses are empty");
    for step in data.as_chunks::<6>().0 {
        let [what, place, value @ ..] = *step;
        let port = PORTS.into_iter().cycle().nth((place >> 1).into()).unwrap_or(0);
        let port = u64::from(port | u16::from(place & 1));
        match what & 7 {
            0 => ports.read(port, &mut [0xff]),
            1 => ports.write(port, &value[..1]),
            2 => {
                mmio.write(SELECT, &[place, 0, 0, 0]);
                mmio.write(WINDOW, &value);
            }
            3 => mmio.read(SELECT + u64::from(place & 0x70), &mut [0xff; 4]),
            4 => mmio.write(SELECT + u64::from(place), &value),
            5 => chips.end_of_interrupt(place),
            6 if apics.intr() => drop(chips.acknowledge()),
            _ => chips.set_line(place.into(), value[0] & 1 != 0),
        }
    }
    let shown = apics.intr();
    assert_eq!(shown, chips.pics(|pics| pics.output()));
    // Whatever was done, initialized again they work.
    for port in [0x20, 0xa0] {
        ports.write(port, &[0x11]);
        for value in [0x30_u8, 4, 1, 0] {
            ports.write(port + 1, &[value]);
        }
    }
    ports.write(pic::ELCR.into(), &[0]);
    chips.set_line(1, false);
    chips.set_line(1, true);
    assert!(apics.intr());
    assert!((0x30..=0x31).contains(&chips.acknowledge()));
}
