//! A NIC that every system knows: an Intel 82540EM ("e1000").
//!
//! - [`registers`]: the registers, as a state machine without I/O, with [`eeprom`], [`phy`],
//!   [`interrupts`] and [`statistics`] apart.
//! - [`descriptors`]: what lies in the guest's rings.
//! - [`transmit`], [`receive`]: frames out of the rings and into them; [`filter`] says which ones the
//!   guest wants, [`checksum`] whether they are whole.
//! - [`worker`]: the thread that moves them; [`inside`] is its network when the NIC is its own peer.
//! - [`bits`]: the numbers.
//!
//! A processor's access locks the registers, moves them, and rings the worker's doorbell if there is
//! something to do and the worker is asleep. It waits for the worker only where a driver may take
//! its rings and its frames away afterwards: when it switches sending or receiving off, resets the NIC,
//! or takes its right to access memory from it. Frames that wait for the network are dropped then.
//!
//! The interrupt line follows causes and mask as the guest's moderation lets it rise. Each interrupt
//! costs a guest some four exits to ask for its cause and to mask it, so the moderation is served
//! exactly.

mod bits;
mod checksum;
mod descriptors;
mod eeprom;
mod filter;
mod fuzz;
mod inside;
mod interrupts;
mod phy;
mod receive;
mod registers;
mod statistics;
mod transmit;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use backends::net::{MacAddr, Network};
use hypervisor::{Device, GuestMemory, InterruptLine};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::pci::Decode;
pub(crate) use fuzz::fuzz;
use registers::{Effect, Registers};
use worker::Worker;

/// The longest MTU that this NIC can be given: frames have up to 16384 bytes, with their check
/// sequence.
pub const MAX_MTU: u16 = 16384 - 14 - 4;

/// What a NIC is to be.
#[derive(Clone)]
pub struct E1000Config {
    /// Its address.
    pub address: MacAddr,
    /// The longest packet that it sends in one piece, in bytes.
    pub mtu: u16,
    /// What it is plugged into.
    pub network: Arc<dyn Network>,
}

/// What the processors and the worker share.
struct Shared {
    registers: Mutex<Registers>,
    /// The worker has left the guest's memory alone, as it was asked to; goes with `registers`.
    quiet: Condvar,
    doorbell: Arc<EventFd>,
    line: Arc<dyn InterruptLine>,
    /// What the line is; moves under the lock of the registers.
    high: AtomicBool,
    decode: Arc<Decode>,
    stop: AtomicBool,
    started: Instant,
    counters: Counters,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(
        config: &E1000Config,
        decode: Arc<Decode>,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<Self> {
        let registers = Registers::new(config.address, config.network.link().up);
        Ok(Self {
            registers: Mutex::new(registers),
            quiet: Condvar::new(),
            doorbell: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            line,
            high: AtomicBool::new(false),
            decode,
            stop: AtomicBool::new(false),
            started: Instant::now(),
            counters: Counters::default(),
        })
    }

    /// Nanoseconds since the NIC was made.
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Brings the line to where the registers want it.
    fn show(&self, registers: &mut Registers, now: u64) {
        let high = registers.interrupts.level(now);
        if self.high.swap(high, Ordering::Relaxed) != high {
            self.counters.interrupts.add(high.into());
            self.line.set_level(high);
        }
    }

    fn ring(&self) {
        // It fails only when the counter is full, and then the worker is on its way.
        let _ = self.doorbell.write(1);
    }

    fn read(&self, offset: u32) -> u32 {
        let now = self.now();
        let mut registers = lock(&self.registers);
        let value = registers.read(offset, now);
        self.finish(registers, Effect::default(), now);
        tracing::trace!("e1000: {offset:#x} reads {value:#x}");
        value
    }

    fn write(&self, offset: u32, value: u32) {
        tracing::trace!("e1000: {offset:#x} is written {value:#x}");
        let now = self.now();
        let mut registers = lock(&self.registers);
        let effect = registers.write(offset, value, now);
        self.finish(registers, effect, now);
    }

    /// Whether the NIC may access memory has changed.
    fn set_master(&self, master: bool) {
        let now = self.now();
        let mut registers = lock(&self.registers);
        let effect = registers.set_master(master);
        self.finish(registers, effect, now);
    }

    /// Passes on what has come of an access.
    fn finish(&self, mut registers: MutexGuard<'_, Registers>, effect: Effect, now: u64) {
        self.show(&mut registers, now);
        let wake = effect.wake | registers.oversleeps();
        let halts = registers.halts();
        drop(registers);
        if wake {
            self.ring();
        }
        if effect.wait {
            let registers = lock(&self.registers);
            let waited = self.quiet.wait_while(registers, |registers| !registers.is_quiet(halts));
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// An 82540EM. Dropped, it stops when what is under way has ended.
pub struct E1000 {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

impl E1000 {
    /// A NIC in a guest's memory, which interrupts by `line`; `decode` is its function's, which says
    /// whether it may access memory. `number` tells it from others.
    pub fn new(
        number: u8,
        config: &E1000Config,
        memory: &GuestMemory,
        decode: Arc<Decode>,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(config, decode, line)?);
        let nic = Arc::downgrade(&shared);
        shared.decode.on_bus_master(move |master| {
            nic.upgrade().into_iter().for_each(|nic| nic.set_master(master));
        });
        let (theirs, memory) = (Arc::clone(&shared), memory.clone());
        let (network, mtu) = (Arc::clone(&config.network), config.mtu);
        let (ready, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(format!("e1000-{number}"));
        let worker = thread.spawn(move || {
            let mut worker = match Worker::new(theirs, memory, &*network, mtu) {
                Ok(worker) => worker,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(()));
            if let Err(error) = worker.run() {
                tracing::error!(nic = number, %error, "an e1000 is lost: io_uring failed");
            }
        })?;
        let nic = Self { shared, worker: Some(worker) };
        started.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok(nic)
    }

    /// Its registers in memory, [`crate::pci::nic::MEMORY`] bytes.
    pub fn memory(&self) -> Arc<dyn Device> {
        Arc::new(MemoryRange(Arc::clone(&self.shared)))
    }

    /// Its registers by ports, [`crate::pci::nic::PORTS`] of them.
    pub fn ports(&self) -> Arc<dyn Device> {
        Arc::new(PortRange { shared: Arc::clone(&self.shared), address: AtomicU64::new(0) })
    }

    /// What passes through it.
    pub fn counters(&self) -> E1000Counters {
        E1000Counters(Arc::clone(&self.shared))
    }
}

impl Drop for E1000 {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.ring();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// The registers in memory. Accesses of four bytes, and of eight as two; a part of a register can be
/// read.
struct MemoryRange(Arc<Shared>);

impl Device for MemoryRange {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let offset = offset as u32;
        if data.len() >= 4 {
            let (registers, _) = data.as_chunks_mut::<4>();
            for (at, register) in (offset & !3..).step_by(4).zip(registers) {
                *register = self.0.read(at).to_le_bytes();
            }
        } else {
            let bytes = self.0.read(offset & !3).to_le_bytes();
            for (to, from) in data.iter_mut().zip(bytes.iter().skip(offset as usize & 3)) {
                *to = *from;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (registers, _) = data.as_chunks::<4>();
        for (at, register) in (offset as u32 & !3..).step_by(4).zip(registers) {
            self.0.write(at, u32::from_le_bytes(*register));
        }
    }
}

/// The registers by two ports of four bytes: one names a register, the other is it.
struct PortRange {
    shared: Arc<Shared>,
    /// IOADDR.
    address: AtomicU64,
}

impl PortRange {
    const ADDRESS: u64 = 0;
    const DATA: u64 = 4;

    fn register(&self) -> Option<u32> {
        let address = self.address.load(Ordering::Relaxed) as u32;
        (address < crate::pci::nic::MEMORY).then_some(address & !3)
    }
}

impl Device for PortRange {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        match offset {
            Self::ADDRESS => {
                *data = (self.address.load(Ordering::Relaxed) as u32).to_le_bytes();
            }
            Self::DATA => {
                if let Some(register) = self.register() {
                    *data = self.shared.read(register).to_le_bytes();
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match offset {
            Self::ADDRESS => self.address.store(value.into(), Ordering::Relaxed),
            Self::DATA => {
                if let Some(register) = self.register() {
                    self.shared.write(register, value);
                }
            }
            _ => {}
        }
    }
}

/// A number that one thread at a time adds to.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, more: u64) {
        if more > 0 {
            self.0.fetch_add(more, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    sent: Counter,
    sent_bytes: Counter,
    send_drops: Counter,
    malformed: Counter,
    received: Counter,
    received_bytes: Counter,
    unwanted: Counter,
    lost: Counter,
    signals: Counter,
    enters: Counter,
    interrupts: Counter,
}

/// What an [`E1000`] counts, readable while it works and after.
#[derive(Clone)]
pub struct E1000Counters(Arc<Shared>);

impl E1000Counters {
    /// Each with its name.
    pub fn all(&self) -> [(&'static str, u64); 11] {
        let counters = &self.0.counters;
        [
            ("sent", &counters.sent),
            ("sent bytes", &counters.sent_bytes),
            ("send drops", &counters.send_drops),
            ("malformed", &counters.malformed),
            ("received", &counters.received),
            ("received bytes", &counters.received_bytes),
            ("unwanted", &counters.unwanted),
            ("lost", &counters.lost),
            ("signals", &counters.signals),
            ("enters", &counters.enters),
            ("interrupts", &counters.interrupts),
        ]
        .map(|(name, counter)| (name, counter.0.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
#[path = "e1000/tests.rs"]
mod tests;
