//! The I/O APIC: 24 pins, each with an entry in the redirection table that says which message its
//! interrupt is (Intel 290566, "82093AA"; the end-of-interrupt register is that of later chipsets).
//!
//! A message of delivery mode ExtINT, by which a PIC could sit behind a pin, goes nowhere: the PICs
//! have a wire of their own.

use hypervisor::interrupts::InterruptMessage;

/// How many pins there are.
pub(super) const PINS: u32 = 24;
/// Bytes of its registers' range.
pub(super) const SIZE: u64 = 0x1000;

// Offsets in the range.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;

// What is selected.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;

/// The version with an end-of-interrupt register.
const VERSION_VALUE: u32 = 0x20;

/// Bits of an entry.
mod entry {
    pub(super) const VECTOR: u64 = 0xff;
    pub(super) const DELIVERY: u64 = 7 << 8;
    pub(super) const LOGICAL: u64 = 1 << 11;
    pub(super) const ACTIVE_LOW: u64 = 1 << 13;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
    pub(super) const DESTINATION_SHIFT: u32 = 56;
    pub(super) const WRITABLE: u64 =
        VECTOR | DELIVERY | LOGICAL | ACTIVE_LOW | LEVEL | MASKED | 0xff << DESTINATION_SHIFT;
}

/// Who takes the messages, and says whether one was taken up.
pub(super) type Send<'a> = &'a mut dyn FnMut(InterruptMessage) -> bool;

/// An I/O APIC.
#[derive(Clone, Debug)]
pub(super) struct IoApic {
    select: u8,
    id: u8,
    /// The pins as they are.
    lines: u32,
    table: [u64; PINS as usize],
}

impl IoApic {
    pub(super) fn new() -> Self {
        Self { select: 0, id: 0, lines: 0, table: [entry::MASKED; PINS as usize] }
    }

    /// Pin `pin` goes up or down.
    pub(super) fn set_line(&mut self, pin: u32, high: bool, send: Send<'_>) {
        let Some(entry) = self.table.get(pin as usize) else { return };
        let bit = 1 << pin;
        let (was, level) = (self.is_active(pin), entry & entry::LEVEL != 0);
        self.lines = self.lines & !bit | if high { bit } else { 0 };
        if self.is_active(pin) && (level || !was) {
            self.deliver(pin, send);
        }
    }

    /// A local APIC has ended an interrupt with `vector`.
    pub(super) fn end_of_interrupt(&mut self, vector: u8, send: Send<'_>) {
        for pin in 0..PINS {
            let Some(entry) = self.table.get_mut(pin as usize) else { continue };
            if *entry & entry::LEVEL != 0 && *entry & entry::VECTOR == u64::from(vector) {
                *entry &= !entry::REMOTE_IRR;
                self.deliver_level(pin, send);
            }
        }
    }

    /// A read of 4 bytes at `offset`.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match (offset, self.select) {
            (SELECT, select) => select.into(),
            (WINDOW, ID | ARBITRATION) => u32::from(self.id) << 24,
            (WINDOW, VERSION) => VERSION_VALUE | (PINS - 1) << 16,
            (WINDOW, select) => match self.selected_entry(select) {
                Some((pin, high)) => {
                    let entry = self.table.get(pin as usize).copied().unwrap_or_default();
                    (if high { entry >> 32 } else { entry }) as u32
                }
                None => 0,
            },
            _ => 0,
        }
    }

    /// A write of 4 bytes at `offset`. Returns whether [`Self::level_messages`] may have changed:
    /// who depends on them has to know before the next call to [`Self::refresh`].
    pub(super) fn write(&mut self, offset: u64, value: u32, send: Send<'_>) -> bool {
        match (offset, self.select) {
            (SELECT, _) => self.select = value as u8,
            (WINDOW, ID) => self.id = (value >> 24) as u8 & 0xf,
            (WINDOW, select) => {
                if let Some((pin, high)) = self.selected_entry(select) {
                    return self.set_entry(pin, high, value);
                }
            }
            (END_OF_INTERRUPT, _) => self.end_of_interrupt(value as u8, send),
            _ => {}
        }
        false
    }

    /// Sends what the selected entry has been written for: a level-triggered interrupt that was
    /// waiting for it. To be called after each write.
    pub(super) fn refresh(&mut self, send: Send<'_>) {
        if let Some((pin, _)) = self.selected_entry(self.select) {
            self.deliver_level(pin, send);
        }
    }

    /// The messages of all level-triggered pins, masked or not, so that a mask changes nothing.
    pub(super) fn level_messages(&self) -> impl Iterator<Item = InterruptMessage> {
        self.table.iter().filter(|entry| *entry & entry::LEVEL != 0).map(|entry| message(*entry))
    }

    /// The pin, and whether it is the upper half of its entry.
    fn selected_entry(&self, select: u8) -> Option<(u32, bool)> {
        let at = u32::from(select.checked_sub(TABLE)?);
        (at / 2 < PINS).then_some((at / 2, at & 1 == 1))
    }

    fn set_entry(&mut self, pin: u32, high: bool, value: u32) -> bool {
        let Some(entry) = self.table.get_mut(pin as usize) else { return false };
        let old = *entry;
        let (value, kept) = if high {
            (u64::from(value) << 32, 0xffff_ffff)
        } else {
            (u64::from(value), 0xffff_ffff << 32)
        };
        *entry = (old & (kept | !entry::WRITABLE)) | (value & entry::WRITABLE);
        if *entry & entry::LEVEL == 0 {
            // Guests of chips without an end-of-interrupt register end one in this way.
            *entry &= !entry::REMOTE_IRR;
        }
        (old | *entry) & entry::LEVEL != 0
            && (old ^ *entry) & !(entry::MASKED | entry::ACTIVE_LOW | entry::REMOTE_IRR) != 0
    }

    fn is_active(&self, pin: u32) -> bool {
        let low = self.table.get(pin as usize).is_some_and(|entry| entry & entry::ACTIVE_LOW != 0);
        (self.lines >> pin & 1 != 0) != low
    }

    fn deliver_level(&mut self, pin: u32, send: Send<'_>) {
        let level = self.table.get(pin as usize).is_some_and(|entry| entry & entry::LEVEL != 0);
        if level && self.is_active(pin) {
            self.deliver(pin, send);
        }
    }

    /// Sends the pin's message, unless it is masked, or has been taken up and not ended.
    fn deliver(&mut self, pin: u32, send: Send<'_>) {
        let Some(entry) = self.table.get_mut(pin as usize) else { return };
        if *entry & (entry::MASKED | entry::REMOTE_IRR) != 0 {
            return;
        }
        if send(message(*entry)) && *entry & entry::LEVEL != 0 {
            *entry |= entry::REMOTE_IRR;
        }
    }
}

/// The message of an entry (SDM volume 3, 11.11): its fields are at the same places, or nearly so.
fn message(entry: u64) -> InterruptMessage {
    const LOCAL_APICS: u32 = 0xfee0_0000;
    const LOGICAL: u32 = 1 << 2;
    /// "Redirection hint": one of several, for the delivery mode *lowest priority*.
    const ONE_OF_SEVERAL: u32 = 1 << 3;
    const LOWEST_PRIORITY: u64 = 1 << 8;
    const ASSERT: u32 = 1 << 14;

    let destination = (entry >> entry::DESTINATION_SHIFT) as u32;
    let logical = if entry & entry::LOGICAL != 0 { LOGICAL } else { 0 };
    let hint = if entry & entry::DELIVERY == LOWEST_PRIORITY { ONE_OF_SEVERAL } else { 0 };
    InterruptMessage {
        address: LOCAL_APICS | destination << 12 | hint | logical,
        data: (entry & (entry::VECTOR | entry::DELIVERY | entry::LEVEL)) as u32 | ASSERT,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Rig {
        apic: IoApic,
        sent: Vec<InterruptMessage>,
        taken: bool,
    }

    impl Rig {
        fn new() -> Self {
            Self { apic: IoApic::new(), sent: Vec::new(), taken: true }
        }

        fn write(&mut self, register: u8, value: u32) -> bool {
            let (sent, taken) = (&mut self.sent, self.taken);
            let mut send = |message| {
                sent.push(message);
                taken
            };
            self.apic.write(SELECT, register.into(), &mut send);
            let changed = self.apic.write(WINDOW, value, &mut send);
            self.apic.refresh(&mut send);
            changed
        }

        fn read(&mut self, register: u8) -> u32 {
            self.apic.write(SELECT, register.into(), &mut |_| false);
            self.apic.read(WINDOW)
        }

        fn line(&mut self, pin: u32, high: bool) -> usize {
            let before = self.sent.len();
            let (sent, taken) = (&mut self.sent, self.taken);
            self.apic.set_line(pin, high, &mut |message| {
                sent.push(message);
                taken
            });
            self.sent.len() - before
        }

        fn end(&mut self, vector: u8) -> usize {
            let before = self.sent.len();
            let sent = &mut self.sent;
            self.apic.end_of_interrupt(vector, &mut |message| {
                sent.push(message);
                true
            });
            self.sent.len() - before
        }
    }

    const LEVEL: u32 = 1 << 15;
    const MASKED: u32 = 1 << 16;

    #[test]
    fn it_says_what_it_is() {
        let mut rig = Rig::new();
        assert_eq!(rig.read(VERSION), 0x0017_0020);
        rig.write(ID, 0xff00_0000);
        assert_eq!((rig.read(ID), rig.read(ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
        for pin in 0..24 {
            assert_eq!(rig.read(0x10 + 2 * pin), MASKED);
            assert_eq!(rig.read(0x11 + 2 * pin), 0);
        }
        assert_eq!(rig.read(0x40), 0);
        assert_eq!(rig.read(0xff), 0);
    }

    #[test]
    fn an_edge_is_one_message() {
        let mut rig = Rig::new();
        rig.write(0x11 + 2 * 4, 3 << 24);
        assert!(!rig.write(0x10 + 2 * 4, 0x0834), "no level");
        assert_eq!(rig.line(4, true), 1);
        assert_eq!(rig.line(4, true), 0);
        assert_eq!(rig.line(4, false), 0);
        assert_eq!(rig.line(4, true), 1);
        let message = InterruptMessage { address: 0xfee0_3004, data: 0x4034 };
        assert_eq!(rig.sent, [message; 2]);
        // Edges on a masked pin are lost.
        rig.line(4, false);
        rig.write(0x10 + 2 * 4, 0x34 | MASKED);
        assert_eq!(rig.line(4, true), 0);
        rig.write(0x10 + 2 * 4, 0x34);
        assert_eq!(rig.sent.len(), 2);
        assert_eq!(rig.line(24, true) + rig.line(u32::MAX, true), 0);
    }

    #[test]
    fn a_level_is_sent_again_when_it_was_ended() {
        let mut rig = Rig::new();
        assert!(rig.write(0x10 + 2 * 9, 0x139 | LEVEL | MASKED));
        let message = InterruptMessage { address: 0xfee0_0008, data: 0xc139 };
        assert_eq!(rig.apic.level_messages().collect::<Vec<_>>(), [message]);
        assert_eq!(rig.line(9, true), 0);
        assert!(!rig.write(0x10 + 2 * 9, 0x139 | LEVEL), "a mask changes no message");
        assert_eq!(rig.sent, [message], "it had waited");
        assert_eq!(rig.read(0x10 + 2 * 9), 0x4139 | LEVEL, "remote IRR");
        assert_eq!(rig.line(9, false) + rig.line(9, true), 0, "not ended yet");
        assert_eq!(rig.end(0x38), 0);
        assert_eq!(rig.end(0x39), 1);
        rig.line(9, false);
        assert_eq!(rig.end(0x39), 0);
        assert_eq!(rig.read(0x10 + 2 * 9), 0x139 | LEVEL);
        // Nobody takes it: it is tried again with the next occasion.
        rig.taken = false;
        assert_eq!(rig.line(9, true) + rig.line(9, true), 2);
        rig.taken = true;
        assert_eq!(rig.line(9, true) + rig.line(9, true), 1);
        // Ended as on old chips, by a moment as an edge.
        rig.line(9, false);
        rig.write(0x10 + 2 * 9, 0x139 | MASKED);
        assert_eq!(rig.read(0x10 + 2 * 9), 0x139 | MASKED);
    }

    #[test]
    fn pins_may_be_active_low() {
        let mut rig = Rig::new();
        rig.line(10, true);
        rig.write(0x10 + 2 * 10, 0x50 | LEVEL | 1 << 13);
        assert!(rig.sent.is_empty());
        assert_eq!(rig.line(10, false), 1);
    }

    #[test]
    fn ends_can_be_written() {
        let mut rig = Rig::new();
        rig.write(0x10 + 2 * 9, 0x39 | LEVEL);
        rig.line(9, true);
        assert!(!rig.apic.write(END_OF_INTERRUPT, 0x39, &mut |_| false));
        assert_eq!(rig.read(0x10 + 2 * 9), 0x39 | LEVEL);
    }

    proptest! {
        /// Read-only bits stay, no level interrupt is sent twice without an end between, and a
        /// change of level messages is never kept back.
        #[test]
        fn levels_wait_for_their_end(
            steps in proptest::collection::vec((0..4_u8, 0x10..0x40_u8, any::<u32>()), 0..200)
        ) {
            let mut rig = Rig::new();
            for (what, register, value) in steps {
                let pin = u32::from(register - 0x10) / 2;
                let before: Vec<_> = rig.apic.level_messages().collect();
                let remote = rig.apic.table[pin as usize] & entry::REMOTE_IRR != 0;
                let sent = rig.sent.len();
                match what {
                    0 => {
                        let changed = rig.write(register, value);
                        let after: Vec<_> = rig.apic.level_messages().collect();
                        prop_assert!(changed || before == after);
                    }
                    1 | 2 => {
                        let count = rig.line(pin, what == 1);
                        prop_assert!(count <= usize::from(!remote));
                    }
                    _ => {
                        rig.end(value as u8);
                    }
                }
                for entry in rig.apic.table {
                    prop_assert_eq!(entry & !(entry::WRITABLE | entry::REMOTE_IRR), 0);
                    prop_assert!(entry & entry::REMOTE_IRR == 0 || entry & entry::LEVEL != 0);
                }
                prop_assert!(rig.sent.len() - sent <= PINS as usize);
            }
        }
    }
}
