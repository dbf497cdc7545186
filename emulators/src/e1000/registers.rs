//! The registers, as a state machine without I/O: processors move it, and the worker does what it
//! asks for and tells it what has come of it.

use backends::net::MacAddr;

use super::bits::{cause, ctrl, rctl, reg, status, tctl};
use super::descriptors;
use super::eeprom::Eeprom;
use super::filter::Settings;
use super::interrupts::Interrupts;
use super::phy::Phy;
use super::statistics::Statistics;

/// Registers that are kept and mean nothing here, with what they are after a reset and the bits that
/// can be written: flow control, timing and thresholds of a wire, LEDs, power management.
const KEPT: [(u32, u32, u32); 19] = [
    (reg::CTRL_EXT, 0, u32::MAX),
    (reg::FCAL, 0x00c2_8001, u32::MAX),
    (reg::FCAH, 0x0100, 0xffff),
    (reg::FCT, 0x8808, 0xffff),
    (reg::FCTTV, 0, 0xffff),
    (reg::TXCW, 0, 0xc000_ffff),
    (reg::TIPG, 0, 0x3fff_ffff),
    (reg::AIT, 0, 0xffff),
    (reg::LEDCTL, 0x0706_8302, u32::MAX),
    (reg::PBA, 0x0010_0030, u32::MAX),
    (reg::FCRTL, 0, 0x8000_fff8),
    (reg::FCRTH, 0, 0xfff8),
    (reg::RXDCTL, 0x0101_0000, u32::MAX),
    (reg::TXDMAC, 1, u32::MAX),
    (reg::TXDCTL, 0, u32::MAX),
    (reg::TSPMT, 0x0100_0400, u32::MAX),
    (reg::WUC, 0, u32::MAX),
    (reg::WUFC, 0, u32::MAX),
    (reg::MANC, 0, u32::MAX),
];

/// Writable bits of RDBAL and TDBAL, and of RDLEN and TDLEN.
const BASE_MASK: u32 = !0xf;
const LENGTH_MASK: u32 = 0xf_ff80;

/// A ring of descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ring {
    /// Where it is in the guest's memory.
    pub base: u64,
    /// Descriptors.
    pub count: u32,
    /// The first that is the NIC's, and the first that is the guest's again.
    pub head: u32,
    pub tail: u32,
    /// Another one, or one begun anew, has another number.
    pub epoch: u32,
}

impl Ring {
    /// How many descriptors are the NIC's from `head` on: none if the ring makes no sense.
    pub(super) fn available(&self, head: u32) -> u32 {
        let Self { count, tail, .. } = *self;
        if head >= count || tail >= count {
            return 0;
        }
        if tail >= head { tail - head } else { count - head + tail }
    }

    /// The descriptor after number `index`.
    pub(super) fn next(&self, index: u32) -> u32 {
        if index + 1 >= self.count { 0 } else { index + 1 }
    }

    /// Where descriptor `index` is.
    pub(super) fn address(&self, index: u32) -> u64 {
        self.base.wrapping_add(u64::from(index) * descriptors::SIZE)
    }

    fn read(&self, register: RingRegister) -> u32 {
        match register {
            RingRegister::BaseLow => self.base as u32,
            RingRegister::BaseHigh => (self.base >> 32) as u32,
            RingRegister::Length => self.count * descriptors::SIZE as u32,
            RingRegister::Head => self.head,
            RingRegister::Tail => self.tail,
        }
    }

    fn write(&mut self, register: RingRegister, value: u32) {
        match register {
            RingRegister::BaseLow => {
                self.base = self.base & !0xffff_ffff | u64::from(value & BASE_MASK);
            }
            RingRegister::BaseHigh => self.base = self.base & 0xffff_ffff | u64::from(value) << 32,
            RingRegister::Length => self.count = (value & LENGTH_MASK) / descriptors::SIZE as u32,
            RingRegister::Head => self.head = value & 0xffff,
            RingRegister::Tail => {
                self.tail = value & 0xffff;
                return;
            }
        }
        self.begin();
    }

    /// What the worker knows of the ring is true no more.
    fn begin(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// As after a reset.
    fn reset(&mut self) {
        *self = Self { epoch: self.epoch, ..Self::default() };
        self.begin();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RingRegister {
    BaseLow,
    BaseHigh,
    Length,
    Head,
    Tail,
}

impl RingRegister {
    /// The register at `offset` from RDBAL or TDBAL, which lie in the same order.
    fn at(offset: u32) -> Option<Self> {
        Some(match reg::RDBAL + offset {
            reg::RDBAL => Self::BaseLow,
            reg::RDBAH => Self::BaseHigh,
            reg::RDLEN => Self::Length,
            reg::RDH => Self::Head,
            reg::RDT => Self::Tail,
            _ => return None,
        })
    }
}

/// What an access asks of those around the registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// The worker has something to do, and may be asleep.
    pub wake: bool,
    /// The guest may use what was a ring's or a frame's as it likes from now on: the worker must be
    /// seen to be done with it ([`Registers::is_quiet`]).
    pub wait: bool,
}

impl Effect {
    /// What both ask. Only the first of two changes finds the worker asleep, so neither may be forgotten.
    fn and(self, other: Self) -> Self {
        Self { wake: self.wake | other.wake, wait: self.wait | other.wait }
    }
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    address: MacAddr,
    control: u32,
    eeprom: Eeprom,
    phy: Phy,
    pub interrupts: Interrupts,
    pub statistics: Statistics,
    kept: [u32; KEPT.len()],
    settings: Settings,
    /// Another number, other settings.
    pub settings_epoch: u32,
    pub receive: Ring,
    pub transmit: Ring,
    transmit_control: u32,
    /// Whether the cable is plugged in.
    cable: bool,
    /// What the worker has to look at; it compares the number with the one it has seen.
    pub changes: u32,
    /// Whether the worker is asleep or about to be, and until when at the latest.
    sleeping: Option<u64>,
    /// Whether frames wait for receive descriptors.
    pub starved: bool,
    /// How often the worker was asked to leave the guest's memory alone, and up to which time it has.
    halts: u32,
    pub halted: u32,
    /// Frames that wait for the network are to be dropped.
    pub drop_frames: bool,
    /// Whether there is a worker to wait for.
    pub served: bool,
    /// Frames up to this tail were sent while the NIC was its own peer, and are to stay inside.
    pub looped: Option<u32>,
}

impl Registers {
    /// Those of a NIC with this address, at a cable that is plugged in or not.
    pub(super) fn new(address: MacAddr, cable: bool) -> Self {
        let mut registers = Self {
            address,
            control: 0,
            eeprom: Eeprom::new(address),
            phy: Phy::new(),
            interrupts: Interrupts::default(),
            statistics: Statistics::new(),
            kept: [0; _],
            settings: Settings::new(address),
            settings_epoch: 0,
            receive: Ring::default(),
            transmit: Ring::default(),
            transmit_control: 0,
            cable,
            changes: 0,
            sleeping: None,
            starved: false,
            halts: 0,
            halted: 0,
            drop_frames: false,
            served: false,
            looped: None,
        };
        registers.reset();
        registers
    }

    fn reset(&mut self) {
        self.control = ctrl::FULL_DUPLEX | ctrl::SET_LINK_UP | ctrl::SPEED_1000;
        self.interrupts = Interrupts::default();
        self.statistics = Statistics::new();
        self.kept = KEPT.map(|(_, value, _)| value);
        self.settings = Settings::new(self.address);
        self.settings_epoch = self.settings_epoch.wrapping_add(1);
        self.receive.reset();
        self.transmit.reset();
        self.transmit_control = 0;
        self.looped = None;
        self.changes = self.changes.wrapping_add(1);
    }

    /// What the guest has set for frames that come.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether frames are received.
    pub(super) fn receives(&self) -> bool {
        self.settings.control & rctl::EN != 0
    }

    /// Whether frames are sent.
    pub(super) fn transmits(&self) -> bool {
        self.transmit_control & tctl::EN != 0
    }

    /// Whether the NIC is its own peer: what it sends comes back, and the network hears nothing.
    pub(super) fn loops(&self) -> bool {
        self.settings.control & rctl::LBM != 0 || self.phy.loops()
    }

    /// How often the worker was asked to leave the guest's memory alone.
    pub(super) fn halts(&self) -> u32 {
        self.halts
    }

    /// Whether the worker has done so the `halts`th time. Without a worker nobody touches it.
    pub(super) fn is_quiet(&self, halts: u32) -> bool {
        !self.served || self.halted.wrapping_sub(halts) as i32 >= 0
    }

    /// Whether the NIC may access memory has changed. If it may, the worker looks at what it has not
    /// been able to do; if not, the memory is somebody else's.
    pub(super) fn set_master(&mut self, master: bool) -> Effect {
        if master { Effect { wake: self.change(), wait: false } } else { self.halt_all() }
    }

    /// The worker is to leave the rings as they were alone.
    fn halt(&mut self) -> Effect {
        self.halts = self.halts.wrapping_add(1);
        Effect { wake: self.change(), wait: true }
    }

    /// And the frames that wait for the network.
    fn halt_all(&mut self) -> Effect {
        self.drop_frames = true;
        self.halt()
    }

    /// After an access to what makes the NIC its own peer. Frames that were sent while it was are not
    /// to leave, whenever the worker comes to them.
    fn follow_loop(&mut self, looped: bool) -> Effect {
        if !looped || self.loops() {
            return Effect::default();
        }
        self.looped = Some(self.transmit.tail);
        self.halt()
    }

    /// The cable is plugged in or pulled out.
    pub(super) fn plug(&mut self, cable: bool) {
        if self.cable != cable {
            self.cable = cable;
            self.interrupts.add(cause::LSC);
        }
    }

    /// The worker goes to sleep until `deadline` at the latest, unless something has changed since it
    /// saw `changes`. Returns whether it may.
    pub(super) fn sleep(&mut self, changes: u32, deadline: u64) -> bool {
        let may = self.changes == changes;
        self.sleeping = may.then_some(deadline);
        may
    }

    /// The worker is awake.
    pub(super) fn awake(&mut self) {
        self.sleeping = None;
    }

    /// The worker has something to do. Returns whether it has to be woken for that.
    fn change(&mut self) -> bool {
        self.changes = self.changes.wrapping_add(1);
        self.sleeping.take().is_some()
    }

    /// Whether the worker sleeps for longer than until the line is to rise, and so has to be woken to
    /// see to that.
    pub(super) fn oversleeps(&mut self) -> bool {
        let late = match (self.sleeping, self.interrupts.deadline()) {
            (Some(until), Some(deadline)) => until > deadline,
            _ => false,
        };
        late && self.change()
    }

    /// A read of the register at `offset`, a multiple of 4.
    pub(super) fn read(&mut self, offset: u32, now: u64) -> u32 {
        if (reg::RDBAL..=reg::RDT).contains(&offset) {
            let register = RingRegister::at(offset - reg::RDBAL);
            return register.map_or(0, |register| self.receive.read(register));
        }
        if (reg::TDBAL..=reg::TDT).contains(&offset) {
            let register = RingRegister::at(offset - reg::TDBAL);
            return register.map_or(0, |register| self.transmit.read(register));
        }
        let table = |table: &[u32], first: u32| {
            table.get(((offset - first) / 4) as usize).copied().unwrap_or_default()
        };
        match offset {
            reg::CTRL | reg::CTRL_DUP => self.control,
            reg::STATUS => self.status(),
            reg::EECD => self.eeprom.read_wires(),
            reg::EERD => self.eeprom.read_register(),
            reg::MDIC => self.phy.read_register(),
            reg::VET => self.settings.tag_type.into(),
            reg::ICR => {
                self.interrupts.tick(now);
                self.interrupts.take_causes()
            }
            reg::ITR => self.interrupts.pause().into(),
            reg::IMS => self.interrupts.mask(),
            reg::RCTL => self.settings.control,
            reg::TCTL => self.transmit_control,
            reg::RDTR | reg::RADV | reg::TIDV | reg::TADV => {
                let [rdtr, radv, tidv, tadv] = self.interrupts.delays();
                u32::from(match offset {
                    reg::RDTR => rdtr,
                    reg::RADV => radv,
                    reg::TIDV => tidv,
                    _ => tadv,
                })
            }
            reg::STATISTICS..=reg::STATISTICS_LAST => {
                self.statistics.read(offset - reg::STATISTICS)
            }
            reg::RXCSUM => self.settings.checksums,
            reg::MTA..=reg::MTA_LAST => table(&self.settings.multicast, reg::MTA),
            reg::RA..=reg::RA_LAST => table(&self.settings.addresses, reg::RA),
            reg::VFTA..=reg::VFTA_LAST => table(&self.settings.vlans, reg::VFTA),
            _ => self.kept_at(offset).map_or(0, |(place, _)| *place),
        }
    }

    /// One of [`KEPT`], and its bits that can be written.
    fn kept_at(&mut self, offset: u32) -> Option<(&mut u32, u32)> {
        let at = KEPT.iter().position(|(kept, ..)| *kept == offset)?;
        let (_, _, mask) = *KEPT.get(at)?;
        Some((self.kept.get_mut(at)?, mask))
    }

    fn status(&self) -> u32 {
        let up =
            if self.cable && self.control & ctrl::SET_LINK_UP != 0 { status::LINK_UP } else { 0 };
        status::FULL_DUPLEX | status::SPEED_1000 | status::DETECTED_1000 | up
    }

    /// A write to the register at `offset`, a multiple of 4.
    pub(super) fn write(&mut self, offset: u32, value: u32, now: u64) -> Effect {
        if (reg::RDBAL..=reg::RDT).contains(&offset) {
            return self.write_receive_ring(offset - reg::RDBAL, value);
        }
        if (reg::TDBAL..=reg::TDT).contains(&offset) {
            return self.write_transmit_ring(offset - reg::TDBAL, value);
        }
        let mut effect = Effect::default();
        match offset {
            reg::CTRL | reg::CTRL_DUP => return self.write_control(value),
            reg::EECD => self.eeprom.write_wires(value),
            reg::EERD => self.eeprom.write_register(value),
            reg::MDIC => {
                let looped = self.loops();
                let accessed = self.phy.write_register(value, self.cable);
                if accessed.interrupt {
                    self.interrupts.add(cause::MDAC);
                }
                if accessed.agreed {
                    self.interrupts.add(cause::LSC);
                }
                effect = self.follow_loop(looped);
            }
            reg::ICR => self.interrupts.clear_causes(value),
            reg::ICS => self.interrupts.add(value),
            reg::ITR => self.interrupts.set_pause(value as u16),
            reg::IMS => {
                self.interrupts.tick(now);
                self.interrupts.allow(value);
            }
            reg::IMC => self.interrupts.forbid(value),
            reg::RDTR | reg::RADV | reg::TIDV | reg::TADV => self.write_delay(offset, value),
            reg::RCTL => {
                let (was, looped) = (self.receives(), self.loops());
                self.set(|settings| settings.control = value);
                effect = self.follow_loop(looped);
                match (was, self.receives()) {
                    (true, false) => effect = effect.and(self.halt()),
                    (false, true) => effect.wake |= self.change(),
                    _ => {}
                }
            }
            reg::TCTL => {
                let was = self.transmits();
                self.transmit_control = value;
                match (was, self.transmits()) {
                    (true, false) => effect = self.halt_all(),
                    (false, true) => effect.wake = self.change(),
                    _ => {}
                }
            }
            reg::VET => self.set(|settings| settings.tag_type = value as u16),
            reg::RXCSUM => self.set(|settings| settings.checksums = value),
            reg::MTA..=reg::MTA_LAST => {
                self.set(|settings| put(&mut settings.multicast, offset - reg::MTA, value));
            }
            reg::RA..=reg::RA_LAST => {
                // Of the upper half there are an address, what it is compared with, and whether it counts.
                let mask = if (offset - reg::RA) & 4 == 0 { u32::MAX } else { 0x8003_ffff };
                self.set(|settings| put(&mut settings.addresses, offset - reg::RA, value & mask));
            }
            reg::VFTA..=reg::VFTA_LAST => {
                self.set(|settings| put(&mut settings.vlans, offset - reg::VFTA, value));
            }
            _ => {
                if let Some((place, mask)) = self.kept_at(offset) {
                    *place = value & mask;
                }
            }
        }
        effect
    }

    fn set(&mut self, set: impl FnOnce(&mut Settings)) {
        set(&mut self.settings);
        self.settings_epoch = self.settings_epoch.wrapping_add(1);
    }

    fn write_control(&mut self, value: u32) -> Effect {
        if value & ctrl::RST != 0 {
            self.reset();
            return self.halt_all();
        }
        let looped = self.loops();
        if value & ctrl::PHY_RST != 0 {
            self.phy.reset();
            self.interrupts.add(cause::LSC);
        }
        let was = self.status() & status::LINK_UP;
        self.control = value & !ctrl::PHY_RST;
        if self.status() & status::LINK_UP != was {
            self.interrupts.add(cause::LSC);
        }
        let tags = value & ctrl::VME != 0;
        if self.settings.tags != tags {
            self.set(|settings| settings.tags = tags);
        }
        self.follow_loop(looped)
    }

    fn write_delay(&mut self, offset: u32, value: u32) {
        /// RDTR: what is held back is due.
        const FLUSH: u32 = 1 << 31;
        let [mut rdtr, mut radv, mut tidv, mut tadv] = self.interrupts.delays();
        let place = match offset {
            reg::RDTR => &mut rdtr,
            reg::RADV => &mut radv,
            reg::TIDV => &mut tidv,
            _ => &mut tadv,
        };
        *place = value as u16;
        self.interrupts.set_delays([rdtr, radv, tidv, tadv]);
        if offset == reg::RDTR && value & FLUSH != 0 {
            self.interrupts.flush_receive();
        }
    }

    fn write_receive_ring(&mut self, offset: u32, value: u32) -> Effect {
        let Some(register) = RingRegister::at(offset) else { return Effect::default() };
        self.receive.write(register, value);
        if register != RingRegister::Tail && self.receives() {
            return self.halt();
        }
        // Whoever waits for descriptors is the only one to care.
        Effect { wait: false, wake: self.starved && self.receives() && self.change() }
    }

    fn write_transmit_ring(&mut self, offset: u32, value: u32) -> Effect {
        let Some(register) = RingRegister::at(offset) else { return Effect::default() };
        self.transmit.write(register, value);
        if register != RingRegister::Tail {
            self.looped = None;
            if self.transmits() {
                return self.halt_all();
            }
        }
        Effect { wait: false, wake: self.transmits() && self.change() }
    }
}

fn put(table: &mut [u32], offset: u32, value: u32) {
    if let Some(place) = table.get_mut(offset as usize / 4) {
        *place = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An access may end several things at once. If the worker slept, it has to be woken, or the access
    /// would wait for whatever happens to wake it.
    #[test]
    fn whoever_waits_for_a_worker_that_sleeps_has_it_woken() {
        let control = rctl::EN | rctl::LBM;
        for (first, then) in [(control, 0), (control, rctl::EN), (rctl::EN, 0)] {
            let mut registers = Registers::new(MacAddr([2, 0, 0, 0, 0, 1]), true);
            registers.write(reg::RCTL, first, 0);
            let changes = registers.changes;
            assert!(registers.sleep(changes, u64::MAX));
            let effect = registers.write(reg::RCTL, then, 0);
            assert_eq!(effect, Effect { wake: true, wait: true }, "{first:#x}, then {then:#x}");
        }
    }
}
