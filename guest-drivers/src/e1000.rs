//! The Intel 82540EM, Linux' `e1000`, which is found on the PCI bus.
//!
//! Frames lie in buffers of the driver's, and *descriptors* in two rings say where: the driver
//! fills a ring up to its *tail*, a register, and the NIC works behind it and marks what it has
//! done. So the driver learns from memory alone what has come and what has gone. Each access to a
//! register is an intercept, and there are only three in use once the NIC runs: the tail of each
//! ring, written once for many frames, and the cause of interrupts, read before a sleep.
//!
//! Interrupts are masked only while nobody waits for frames at all. Else the NIC's line rises with the
//! first frame after the cause was read, and stays high, which costs nothing, while the driver polls.
//!
//! - [`bits`]: the numbers.

mod bits;

use core::cell::Cell;
use core::hint::spin_loop;
use core::sync::atomic::Ordering;

use thiserror::Error;
use vsc::SharedBuffer;

use crate::memory::{PAGE, Pages};
use crate::net::{HEADER, Identity, MTU, MacAddress, NicCounters, NicDriver, NicError};
use crate::pci::{self, Function};
use crate::platform::Platform;
use bits::{cause, ctrl, eerd, rctl, receive, register, tctl, transmit};

/// The number of an 82540EM, and its base address register with the registers.
const NUMBER: (u16, u16) = (0x8086, 0x100e);
const REGISTERS_BAR: u8 = 0;

/// Descriptors of a ring: both rings have a page together.
const RING: u16 = 128;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// Bytes of a frame's buffer.
const BUFFER: usize = 2048;
/// Pages of a ring's buffers.
const BUFFER_PAGES: usize = RING as usize * BUFFER / PAGE;

const _: () = assert!(2 * RING as usize * DESCRIPTOR == PAGE);
/// A ring's length is a multiple of eight descriptors.
const _: () = assert!(RING.is_multiple_of(8));

/// Receive descriptors that are given back together.
const RETURNED: u16 = 32;

/// How long the NIC may take for anything, in nanoseconds.
const PATIENCE: u64 = 5_000_000_000;

/// The NIC does not behave as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum E1000Fault {
    /// Its registers are nowhere, or where nothing answers.
    #[error("the e1000's registers do not answer")]
    Absent,
    /// It does not come out of its reset.
    #[error("the e1000 does not end its reset")]
    Reset,
    /// The EEPROM does not answer.
    #[error("the e1000's EEPROM does not answer")]
    Eeprom,
    /// An address that no station has.
    #[error("the e1000 has the address {0}, which is no station's")]
    Address(MacAddress),
    /// A frame that does not fit its buffer, or is none.
    #[error("the e1000 claims to have received a frame of {0} bytes")]
    Length(usize),
    /// A frame in several buffers, which none is long enough to need.
    #[error("the e1000 has cut a frame into pieces")]
    Pieces,
    /// There was a fault before.
    #[error("the e1000 has been given up")]
    Dead,
}

/// A NIC that runs.
pub struct E1000<'w, P> {
    registers: Registers<'w, P>,
    identity: Identity,
    transmit: Ring<'w>,
    receive: Ring<'w>,
    /// Frames taken and not given to the NIC.
    unpublished: bool,
    /// Receive descriptors that are free, and that the NIC does not know of yet.
    unreturned: u16,
    /// Whether frames interrupt.
    listens: bool,
    /// There may be a cause that keeps the line high.
    cause_unread: bool,
    damaged: u64,
    dead: bool,
    /// The frame that is looked at: the NIC cannot change it any more.
    frame: [u8; BUFFER],
}

/// All 82540EMs on the bus.
pub fn find<'p, P: Platform>(platform: &'p P) -> impl Iterator<Item = Function> + use<'p, P> {
    let (vendor, device) = NUMBER;
    pci::find(platform, vendor, device)
}

impl<'w, P: Platform> E1000<'w, P> {
    /// Takes a NIC into use. Its rings and buffers come from `memory`.
    pub fn start(
        platform: &'w P,
        function: Function,
        memory: &mut Pages<'w>,
    ) -> Result<Self, NicError> {
        function.enable(platform);
        let base = function.memory_base(platform, REGISTERS_BAR).ok_or(E1000Fault::Absent)?;
        let registers = Registers { platform, base, accesses: Cell::new(0) };
        registers.reset()?;
        let mac = registers.address()?;

        let page = memory.take(1).ok_or(NicError::Memory)?;
        let mut ring = |half| {
            let buffers = memory.take(BUFFER_PAGES).ok_or(NicError::Memory)?;
            Ok::<_, NicError>(Ring { descriptors: page, half, buffers, next: 0, used: 0 })
        };
        let mut nic = Self {
            registers,
            identity: Identity { driver: "e1000", mac, mtu: MTU },
            transmit: ring(0)?,
            receive: ring(1)?,
            unpublished: false,
            unreturned: 0,
            listens: false,
            cause_unread: true,
            damaged: 0,
            dead: false,
            frame: [0; BUFFER],
        };
        nic.switch_on();
        if let Some(irq) = function.isa_interrupt(platform) {
            platform.listen(irq);
        }
        nic.wait_for_link();
        Ok(nic)
    }

    /// Tells the NIC its address and its rings, and lets it run.
    fn switch_on(&mut self) {
        let Self { registers, transmit, receive, .. } = self;
        let [a, b, c, d, e, f] = self.identity.mac.0;
        registers.write(register::RAL0, u32::from_le_bytes([a, b, c, d]));
        registers.write(register::RAH0, bits::RAH_AV | u32::from(u16::from_le_bytes([e, f])));
        for slot in 0..RING {
            transmit.set(slot, 0);
            receive.set(slot, 0);
        }
        for (ring, [low, high, len, head, tail], filled) in [
            (
                transmit,
                [register::TDBAL, register::TDBAH, register::TDLEN, register::TDH, register::TDT],
                0,
            ),
            // The NIC's ring is full when it has all but one.
            (
                receive,
                [register::RDBAL, register::RDBAH, register::RDLEN, register::RDH, register::RDT],
                RING - 1,
            ),
        ] {
            let start = ring.start();
            registers.write(low, start as u32);
            registers.write(high, (start >> 32) as u32);
            registers.write(len, u32::from(RING) * DESCRIPTOR as u32);
            registers.write(head, 0);
            registers.write(tail, filled.into());
        }
        registers.write(register::TIPG, bits::TIPG_COPPER);
        registers.write(register::TCTL, tctl::EN | tctl::PSP | tctl::COLLISIONS);
        registers.write(register::RCTL, rctl::EN | rctl::BAM | rctl::SECRC);
        registers.write(register::CTRL, ctrl::FD | ctrl::ASDE | ctrl::SLU);
    }

    /// Gives the link time to come up. A cable that leads nowhere is no fault.
    fn wait_for_link(&mut self) {
        let platform = self.registers.platform;
        let until = platform.now().saturating_add(PATIENCE / 5);
        while !self.has_link() && platform.now() < until {
            spin_loop();
        }
    }

    /// Takes the next frame out of its buffer; `None` if none has come, and `Some(None)` if it is
    /// damaged.
    fn take(&mut self) -> Result<Option<Option<usize>>, E1000Fault> {
        let slot = self.receive.next;
        let descriptor = self.receive.get(slot);
        if descriptor & receive::DD == 0 {
            return Ok(None);
        }
        let len = usize::from(descriptor as u16);
        let frame = if descriptor & receive::ERRORS != 0 {
            None
        } else if descriptor & receive::EOP == 0 {
            return Err(E1000Fault::Pieces);
        } else {
            let room = self.frame.get_mut(..len).filter(|room| room.len() >= HEADER);
            let room = room.ok_or(E1000Fault::Length(len))?;
            let at = BUFFER * usize::from(slot);
            if !self.receive.buffers.words().read(at, room) {
                return Err(E1000Fault::Length(len));
            }
            Some(len)
        };
        self.receive.set(slot, 0);
        self.receive.next = (slot + 1) % RING;
        self.unreturned += 1;
        Ok(Some(frame))
    }

    /// Gives the buffers back that are free, if there are at least so many.
    fn give_back(&mut self, at_least: u16) {
        if self.unreturned >= at_least.max(1) {
            self.unreturned = 0;
            // Up to the one before the next, which is the one that the NIC cannot have.
            let tail = (self.receive.next + RING - 1) % RING;
            self.registers.write(register::RDT, tail.into());
        }
    }

    fn check(&self) -> Result<(), E1000Fault> {
        if self.dead { Err(E1000Fault::Dead) } else { Ok(()) }
    }
}

impl<P: Platform> NicDriver for E1000<'_, P> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn has_link(&mut self) -> bool {
        self.registers.read(register::STATUS) & bits::STATUS_LU != 0
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, NicError> {
        self.check()?;
        if !(HEADER..=self.identity.longest_frame()).contains(&frame.len()) {
            return Err(NicError::Frame(frame.len()));
        }
        let ring = &mut self.transmit;
        if ring.used == RING - 1 {
            ring.reclaim();
            if ring.used == RING - 1 {
                return Ok(false);
            }
        }
        let slot = ring.next;
        let at = BUFFER * usize::from(slot);
        if !ring.buffers.words().write(at, frame) {
            return Err(NicError::Frame(frame.len()));
        }
        let orders = transmit::EOP | transmit::IFCS | transmit::RS;
        ring.set(slot, frame.len() as u64 | orders);
        ring.next = (slot + 1) % RING;
        ring.used += 1;
        self.unpublished = true;
        Ok(true)
    }

    fn publish(&mut self) -> Result<(), NicError> {
        self.check()?;
        if core::mem::take(&mut self.unpublished) {
            self.registers.write(register::TDT, self.transmit.next.into());
        }
        self.give_back(RETURNED);
        Ok(())
    }

    fn poll(&mut self, received: &mut dyn FnMut(&[u8])) -> Result<usize, NicError> {
        self.check()?;
        let mut count = 0;
        // As many as a ring has: a NIC that never ends is polled again.
        for _ in 0..RING {
            let taken = self.take().inspect_err(|_| self.dead = true)?;
            let Some(frame) = taken else { break };
            self.cause_unread = true;
            match frame.and_then(|len| self.frame.get(..len)) {
                Some(frame) => received(frame),
                None => self.damaged += 1,
            }
            count += 1;
        }
        Ok(count)
    }

    fn is_ready(&self) -> bool {
        !self.dead && self.receive.get(self.receive.next) & receive::DD != 0
    }

    fn rest(&mut self) -> Result<(), NicError> {
        self.publish()?;
        if !core::mem::replace(&mut self.listens, true) {
            self.registers.write(register::IMS, cause::RXT0 | cause::RXO | cause::RXDMT0);
        }
        if core::mem::take(&mut self.cause_unread) {
            self.registers.read(register::ICR);
        }
        Ok(())
    }

    fn wake(&mut self) {
        // Whatever ended the sleep, it may have been this NIC.
        self.cause_unread = true;
    }

    fn quiet(&mut self) {
        if core::mem::take(&mut self.listens) {
            self.registers.write(register::IMC, u32::MAX);
            self.cause_unread = true;
        }
    }

    fn counters(&self) -> NicCounters {
        let accesses = self.registers.accesses.get();
        NicCounters { signals: 0, accesses, damaged: self.damaged }
    }
}

/// The registers, each access to which is counted.
struct Registers<'w, P> {
    platform: &'w P,
    base: u32,
    accesses: Cell<u64>,
}

impl<P: Platform> Registers<'_, P> {
    fn count(&self) {
        self.accesses.set(self.accesses.get() + 1);
    }

    fn read(&self, register: u32) -> u32 {
        self.count();
        self.platform.load_32(self.base.wrapping_add(register))
    }

    fn write(&self, register: u32, value: u32) {
        self.count();
        self.platform.store_32(self.base.wrapping_add(register), value);
    }

    /// Looks at a register until `done`, what is found in it, is something.
    fn wait<T>(&self, register: u32, done: impl Fn(u32) -> Option<T>) -> Option<T> {
        let until = self.platform.now().saturating_add(PATIENCE);
        loop {
            if let Some(found) = done(self.read(register)) {
                return Some(found);
            }
            if self.platform.now() > until {
                return None;
            }
            spin_loop();
        }
    }

    /// As it was when it was switched on, and silent.
    fn reset(&self) -> Result<(), E1000Fault> {
        if self.read(register::STATUS) == u32::MAX {
            return Err(E1000Fault::Absent);
        }
        self.write(register::IMC, u32::MAX);
        self.write(register::CTRL, ctrl::RST);
        let ended = |value| (value & ctrl::RST == 0).then_some(());
        self.wait(register::CTRL, ended).ok_or(E1000Fault::Reset)?;
        self.write(register::IMC, u32::MAX);
        Ok(())
    }

    /// The station's address, which is the first three words of the EEPROM.
    fn address(&self) -> Result<MacAddress, E1000Fault> {
        let mut address = [0; 6];
        for (word, bytes) in (0..).zip(address.as_chunks_mut().0) {
            self.write(register::EERD, word << 8 | eerd::START);
            let value = |value| (value & eerd::DONE != 0).then_some((value >> 16) as u16);
            *bytes = self.wait(register::EERD, value).ok_or(E1000Fault::Eeprom)?.to_le_bytes();
        }
        let address = MacAddress(address);
        if address.is_station() { Ok(address) } else { Err(E1000Fault::Address(address)) }
    }
}

/// A ring of descriptors, and a buffer for each.
struct Ring<'w> {
    /// The page that both rings share.
    descriptors: Pages<'w>,
    /// Which half of it.
    half: u16,
    buffers: Pages<'w>,
    /// The next descriptor to be used.
    next: u16,
    /// How many before it the NIC still has; for frames that are sent.
    used: u16,
}

impl Ring<'_> {
    /// Where the ring is.
    fn start(&self) -> u64 {
        self.descriptors.first() * PAGE as u64 + u64::from(self.half * RING) * DESCRIPTOR as u64
    }

    /// The second half of a descriptor.
    fn get(&self, slot: u16) -> u64 {
        let word = self.descriptors.words().get(self.word(slot) + 1);
        // What the NIC did before it wrote this is seen after it.
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Fills a descriptor anew: its buffer's address, and the second half.
    fn set(&self, slot: u16, half: u64) {
        let address = self.buffers.first() * PAGE as u64 + (BUFFER * usize::from(slot)) as u64;
        let at = self.word(slot);
        if let Some([first, second]) = self.descriptors.words().get(at..at + 2) {
            first.store(address, Ordering::Relaxed);
            second.store(half, Ordering::Release);
        }
    }

    fn word(&self, slot: u16) -> usize {
        usize::from(self.half * RING + slot) * DESCRIPTOR / 8
    }

    /// Takes back what the NIC is done with.
    fn reclaim(&mut self) {
        while self.used > 0 {
            let oldest = (self.next + RING - self.used) % RING;
            if self.get(oldest) & transmit::DD == 0 {
                break;
            }
            self.used -= 1;
        }
    }
}
