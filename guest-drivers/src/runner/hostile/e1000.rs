//! Emulated NICs, driven wrongly: registers in any order, rings of any size, and descriptors that make no
//! sense.
//!
//! A ring to receive into must lie where every descriptor names memory that a device may overwrite. So base
//! addresses are chosen with care, and everything else without.

use core::sync::atomic::Ordering;

use super::Silence;
use super::arena::Arena;
use super::chaos::Chaos;
use super::wire::Wire;
use crate::memory::PAGE;
use crate::pci::{self, Function};
use crate::platform::Platform;

const NICS: usize = 4;
/// Bytes of registers.
const REGISTERS: u32 = 0x2_0000;

mod register {
    pub(super) const CTRL: u32 = 0x0000;
    pub(super) const ICR: u32 = 0x00c0;
    pub(super) const IMC: u32 = 0x00d8;
    pub(super) const RCTL: u32 = 0x0100;
    pub(super) const TCTL: u32 = 0x0400;
    pub(super) const RECEIVE: u32 = 0x2800;
    pub(super) const TRANSMIT: u32 = 0x3800;
    // Behind the start of each ring's registers.
    pub(super) const HIGH: u32 = 0x04;
    pub(super) const LENGTH: u32 = 0x08;
    pub(super) const HEAD: u32 = 0x10;
    pub(super) const TAIL: u32 = 0x18;
}

const RST: u32 = 1 << 26;

/// Registers that say where memory is, for the NIC and by other offsets for those before it.
const BASES: [u32; 4] = [0x2800, 0x2804, 0x3800, 0x3804];

/// Registers that mean something: control and status, EEPROM, PHY, interrupts, flow control, rings,
/// filters.
const OTHERS: [u32; 44] = [
    0x0000, 0x0004, 0x0008, 0x0010, 0x0014, 0x0018, 0x0020, 0x0028, 0x002c, 0x0030, 0x0038, 0x00c0,
    0x00c4, 0x00c8, 0x00d0, 0x00d8, 0x0100, 0x0170, 0x0178, 0x0400, 0x0410, 0x0e00, 0x1000, 0x2160,
    0x2808, 0x2810, 0x2818, 0x2820, 0x282c, 0x3808, 0x3810, 0x3818, 0x3820, 0x382c, 0x3830, 0x4000,
    0x40fc, 0x5000, 0x5200, 0x5400, 0x5404, 0x5600, 0x5800, 0x5820,
];

/// How long a NIC may take to come out of its reset.
const PATIENCE: u64 = 30_000_000_000;

/// The NICs that there are, found once.
#[derive(Clone, Copy)]
pub(super) struct Nics([Option<(Function, u32)>; NICS]);

/// Those of the machine.
pub(super) fn find<P: Platform>(platform: &P) -> Nics {
    let mut nics = Nics([None; NICS]);
    for (function, place) in pci::find(platform, 0x8086, 0x100e).zip(&mut nics.0) {
        function.enable(platform);
        if let Some(irq) = function.isa_interrupt(platform) {
            platform.listen(irq);
        }
        *place = function.memory_base(platform, 0).map(|base| (function, base));
    }
    nics
}

/// Drives one of the NICs.
pub(super) fn visit<P: Platform>(
    wire: &mut Wire<'_, P>,
    chaos: &mut Chaos,
    arena: &Arena<'_>,
    nics: &Nics,
) {
    let found = || nics.0.iter().flatten();
    let Some((function, base)) = found().nth(chaos.count(found().count())).copied() else { return };
    let nic = Nic { base };
    nic.place_rings(wire, chaos, arena);
    if chaos.percent(80) {
        nic.switch_on(wire, chaos);
    }
    for _ in 0..chaos.below(16) {
        match chaos.below(12) {
            0..6 => nic.transmit(wire, chaos, arena),
            6 | 7 => nic.receive(wire, chaos, arena),
            8 => nic.place_rings(wire, chaos, arena),
            9 => {
                // With what is under way.
                match chaos.below(4) {
                    0 => nic.write(wire, register::TCTL, chaos.any_32() & !2),
                    1 => nic.write(wire, register::RCTL, chaos.any_32() & !2),
                    2 => {
                        nic.reset(wire);
                        nic.place_rings(wire, chaos, arena);
                    }
                    _ => nic.switch_on(wire, chaos),
                }
            }
            10 => {
                // The right to memory comes and goes.
                let command = function.read(wire.platform, 4);
                function.write(wire.platform, 4, chaos.any_32() & 0xffff);
                nic.transmit(wire, chaos, arena);
                function.write(wire.platform, 4, command & 0xffff | 7);
                wire.counts.accesses += 6;
            }
            _ => nic.any(wire, chaos),
        }
        if chaos.percent(30) {
            wire.linger(chaos.below(50_000));
            nic.read(wire, register::ICR);
        }
    }
}

/// Resets all NICs, as whoever comes next would.
pub(super) fn rest<P: Platform>(wire: &mut Wire<'_, P>, nics: &Nics) -> Result<(), Silence> {
    for (_, base) in nics.0.iter().flatten() {
        let nic = Nic { base: *base };
        nic.reset(wire);
        let until = wire.platform.now().saturating_add(PATIENCE);
        while nic.read(wire, register::CTRL) & RST != 0 {
            if wire.platform.now() > until {
                return Err(Silence::E1000);
            }
        }
    }
    Ok(())
}

struct Nic {
    base: u32,
}

impl Nic {
    fn write<P: Platform>(&self, wire: &mut Wire<'_, P>, register: u32, value: u32) {
        wire.counts.accesses += 1;
        wire.platform.store_32(self.base.wrapping_add(register), value);
    }

    fn read<P: Platform>(&self, wire: &mut Wire<'_, P>, register: u32) -> u32 {
        wire.counts.accesses += 1;
        wire.platform.load_32(self.base.wrapping_add(register))
    }

    fn reset<P: Platform>(&self, wire: &mut Wire<'_, P>) {
        self.write(wire, register::IMC, u32::MAX);
        self.write(wire, register::CTRL, RST);
        self.write(wire, register::IMC, u32::MAX);
    }

    /// Says where the rings are, how long, and what of them is whose: after a reset they are at address 0.
    fn place_rings<P: Platform>(
        &self,
        wire: &mut Wire<'_, P>,
        chaos: &mut Chaos,
        arena: &Arena<'_>,
    ) {
        let places = [
            (register::RECEIVE, arena.receive_descriptors()),
            (register::TRANSMIT, arena.transmit_descriptors()),
        ];
        for (ring, pages) in places {
            // The longest ring has a mebibyte. Those to receive into end where what was prepared does;
            // what lies behind those to transmit is nobody's.
            let room = if ring == register::RECEIVE { 64 } else { pages.count() };
            let start = pages.first() * PAGE as u64 + chaos.below((room * PAGE) as u64);
            let nowhere = chaos.percent(2);
            let low = if nowhere { 0xf000_0000 } else { start as u32 };
            let high =
                if chaos.percent(1) { chaos.any_32() | 1 << 31 } else { (start >> 32) as u32 };
            self.write(wire, ring + register::HIGH, high);
            self.write(wire, ring, low);
            let len = chaos.of(1024, &[128, 4096, 4096, 0xf_ff80, 0]);
            self.write(wire, ring + register::LENGTH, chaos.or_odd_32(len, 5));
            self.write(wire, ring + register::HEAD, chaos.or_odd_32(0, 5));
            let tail = chaos.below(64) as u32;
            self.write(wire, ring + register::TAIL, chaos.or_odd_32(tail, 5));
        }
    }

    fn switch_on<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos) {
        // Enabled, promiscuous, and the rest at will: sizes of buffers, loopback, VLANs, long frames.
        let receive = 0x1a | chaos.any_32() & chaos.any_32() & !0xc0;
        let loopback = if chaos.percent(5) { 0xc0 } else { 0 };
        self.write(wire, register::RCTL, receive | loopback);
        self.write(wire, register::TCTL, 2 | chaos.any_32() & chaos.any_32());
        self.write(wire, register::CTRL, 0x40 | chaos.any_32() & chaos.any_32() & !RST);
    }

    /// Fills transmit descriptors, of all kinds, and has the NIC look at them.
    fn transmit<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos, arena: &Arena<'_>) {
        let low = self.read(wire, register::TRANSMIT);
        let tail = self.read(wire, register::TRANSMIT + register::TAIL);
        let ring = arena.transmit_descriptors();
        let first = (u64::from(low)).wrapping_sub(ring.first() * PAGE as u64) / 8;
        let count = chaos.below(32) as u32;
        for number in 0..count {
            let at = first.wrapping_add(u64::from(tail.wrapping_add(number)) * 2);
            let Some([address, rest]) =
                usize::try_from(at).ok().and_then(|at| ring.words().get(at..at.checked_add(2)?))
            else {
                continue;
            };
            let len = chaos.of(60, &[1514, 64, 9000, 0, 0xf_ffff]);
            let len = chaos.or_odd(len, 10) & 0xf_ffff;
            let ends = u64::from(chaos.percent(70)) << 24;
            let command = (chaos.any() & chaos.any() & 0x5e) << 24 | ends | 1 << 27;
            let word = match chaos.below(8) {
                // A context: where headers are, and what is to be cut.
                0 => {
                    let any =
                        [14, 24, 33, 0, 34, 50, 0, 0].map(|byte| chaos.or_odd(byte, 10) as u8);
                    address.store(u64::from_le_bytes(any), Ordering::Relaxed);
                    let header = chaos.or_odd(54, 10) & 0xff;
                    let segment = chaos.or_odd(1460, 10) & 0xffff;
                    len | chaos.below(16) << 24 | 0x2 << 28 | header << 40 | segment << 48
                }
                // Data of such a packet.
                1..4 => len | 1 << 20 | 0x20 << 24 | command | chaos.below(4) << 40,
                // As the first of these NICs had them.
                4..7 => len & 0xffff | (chaos.any() & 0xff) << 16 | command,
                _ => chaos.any(),
            };
            if word >> 20 & 0xf != 0 || word & 0x20 << 24 == 0 {
                address.store(arena.address(chaos), Ordering::Relaxed);
            }
            rest.store(word, Ordering::Relaxed);
        }
        let tail = tail.wrapping_add(count) % 64;
        self.write(wire, register::TRANSMIT + register::TAIL, chaos.or_odd_32(tail, 3));
    }

    /// Gives buffers to the NIC.
    fn receive<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos, arena: &Arena<'_>) {
        let ring = arena.receive_descriptors();
        let start = chaos.count(ring.words().len() / 2) * 2;
        let words = ring.words().get(start..).unwrap_or_default();
        for words in words.chunks_exact(2).take(chaos.count(64)) {
            if let [address, rest] = words {
                address.store(arena.address(chaos), Ordering::Relaxed);
                rest.store(chaos.of(0, &[0, 0, 1 << 32]), Ordering::Relaxed);
            }
        }
        let tail = chaos.below(256) as u32;
        self.write(wire, register::RECEIVE + register::TAIL, chaos.or_odd_32(tail, 5));
    }

    /// Accesses to registers in any order.
    fn any<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos) {
        for _ in 0..chaos.below(16) {
            let [first, others @ ..] = OTHERS;
            let known = chaos.of(first, &others);
            let register = if chaos.percent(90) { known } else { chaos.any_32() % REGISTERS };
            if chaos.percent(30) {
                self.read(wire, register);
                continue;
            }
            let value = chaos.odd_32();
            let resets = register & !7 == register::CTRL && value & RST != 0;
            // A reset moves the rings to address 0, where the next enabling would find no descriptors.
            if !BASES.contains(&(register & !3)) && !resets {
                self.write(wire, register & !3, value);
            }
        }
    }
}
