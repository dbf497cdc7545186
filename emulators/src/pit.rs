//! The 8254 timer and port 0x61 (Intel 231164, "8254"; port 0x61 is the 82371AB's): counter 0 is a
//! PC's oldest clock tick, counter 2 is what calibrations measure other clocks with.
//!
//! [`Registers`] is a state machine in ticks of its clock. It counts only in thought: a counter knows
//! when it was loaded, and what it shows follows from what time it is. A new count is loaded at once
//! in all modes, where the chip finishes the period first.

mod counter;

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use hypervisor::{Device, InterruptLine};

use crate::alarm::{Alarm, Timed};
use counter::Counter;

/// Ticks of its clock in a second: a third of NTSC's colour carrier.
const HZ: u64 = 1_193_182;

/// The shortest time between two interrupts, also if the guest asks for less: it would keep a thread
/// of the host busy.
const SHORTEST: Duration = Duration::from_micros(100);

/// Port 0x61: counter 2 counts.
const GATE: u8 = 1 << 0;
/// Port 0x61: its output is heard.
const SPEAKER: u8 = 1 << 1;

/// The timer, for a partition that has none from its hypervisor.
pub struct Pit(Arc<Shared>);

struct Shared {
    registers: Mutex<Registers>,
    line: Arc<dyn InterruptLine>,
    started: Instant,
    alarm: Alarm,
}

impl Pit {
    /// The first of its four ports.
    pub const PORT: u16 = 0x40;
    /// How many there are.
    pub const PORTS: u16 = 4;
    /// The port with counter 2's gate and output.
    pub const GATE_PORT: u16 = 0x61;
    /// Counter 0's interrupt line.
    pub const IRQ: u8 = 0;

    /// A timer that interrupts by `line`.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self(Arc::new_cyclic(|shared: &Weak<Shared>| Shared {
            registers: Mutex::new(Registers::new()),
            line,
            started: Instant::now(),
            alarm: Alarm::new("pit", Weak::clone(shared) as _),
        }))
    }

    /// The device at [`Self::PORT`].
    pub fn counters(&self) -> Arc<dyn Device> {
        Arc::new(CounterPorts(Arc::clone(&self.0)))
    }

    /// The device at [`Self::GATE_PORT`].
    pub fn gate(&self) -> Arc<dyn Device> {
        Arc::new(GatePort(Arc::clone(&self.0)))
    }
}

impl Shared {
    /// Lets `access` have the registers at this moment, and passes on what comes of it.
    fn access<T>(&self, access: impl FnOnce(&mut Registers, u64) -> T) -> T {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = self.started.elapsed();
        let now = ticks(elapsed);
        let risen = registers.advance(now);
        let value = access(&mut registers, now);
        // What is over already can wait as well for the shortest time.
        let next = registers.next_edge().map(|tick| time(tick).max(elapsed + SHORTEST));
        if risen || registers.was_changed() {
            self.alarm.set(next.and_then(|next| self.started.checked_add(next)));
        }
        drop(registers);
        if risen {
            self.line.pulse();
        }
        value
    }
}

impl Timed for Shared {
    fn expire(&self) {
        self.access(|registers, _| registers.changed = true);
    }
}

fn ticks(time: Duration) -> u64 {
    (time.as_nanos() * u128::from(HZ) / 1_000_000_000) as u64
}

/// The first moment at which so many ticks are over.
fn time(ticks: u64) -> Duration {
    let nanoseconds = (u128::from(ticks) * 1_000_000_000).div_ceil(HZ.into());
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

struct CounterPorts(Arc<Shared>);

impl Device for CounterPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.0.access(|registers, now| registers.read(offset, now));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            self.0.access(|registers, now| registers.write(offset, *byte, now));
        }
    }
}

struct GatePort(Arc<Shared>);

impl Device for GatePort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0.access(|registers, now| registers.read_gate(now)));
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let Some(value) = data.first() {
            self.0.access(|registers, now| registers.write_gate(*value, now));
        }
    }
}

/// The chip, in ticks since it was made.
#[derive(Clone, Debug)]
struct Registers {
    counters: [Counter; 3],
    speaker: bool,
    /// Up to when counter 0's output has been looked at.
    seen: u64,
    /// Counter 0 may have another next edge.
    changed: bool,
}

impl Registers {
    fn new() -> Self {
        let [mut a, mut b, c] = [const { Counter::new() }; 3];
        // The gates of 0 and 1 are wired up.
        a.set_gate(true, 0);
        b.set_gate(true, 0);
        Self { counters: [a, b, c], speaker: false, seen: 0, changed: false }
    }

    /// It is `now`. Whether counter 0's output has risen since the last time.
    fn advance(&mut self, now: u64) -> bool {
        let risen = self.next_edge().is_some_and(|edge| edge <= now);
        self.seen = self.seen.max(now);
        risen
    }

    /// When counter 0's output rises next.
    fn next_edge(&self) -> Option<u64> {
        self.counters[0].next_edge(self.seen)
    }

    /// Whether counter 0 may have another next edge than when this was asked before.
    fn was_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// A read of port 0x40 + `offset`.
    fn read(&mut self, offset: u64, now: u64) -> u8 {
        // The control word cannot be read.
        self.counters.get_mut(offset as usize).map_or(0xff, |counter| counter.read(now))
    }

    /// A write there.
    fn write(&mut self, offset: u64, value: u8, now: u64) {
        const READ_BACK: u8 = 3;
        self.changed |= offset == 0 || offset == 3;
        if let Some(counter) = self.counters.get_mut(offset as usize) {
            counter.write(value, now);
            return;
        }
        if value >> 6 != READ_BACK {
            if let Some(counter) = self.counters.get_mut(usize::from(value >> 6)) {
                counter.control(value, now);
            }
            return;
        }
        for (n, counter) in self.counters.iter_mut().enumerate() {
            if value & 2 << n != 0 {
                counter.read_back(value & 1 << 5 == 0, value & 1 << 4 == 0, now);
            }
        }
    }

    /// A read of port 0x61.
    fn read_gate(&self, now: u64) -> u8 {
        // Memory refresh, which guests have used as a clock: it toggles every 15 us.
        const REFRESH_TICKS: u64 = 18;
        let counter = &self.counters[2];
        let bit = |set, bit| if set { bit } else { 0 };
        bit(counter.gate(), GATE)
            | bit(self.speaker, SPEAKER)
            | bit((now / REFRESH_TICKS) & 1 != 0, 1 << 4)
            | bit(counter.output(now), 1 << 5)
    }

    fn write_gate(&mut self, value: u8, now: u64) {
        self.counters[2].set_gate(value & GATE != 0, now);
        self.speaker = value & SPEAKER != 0;
    }
}

/// For fuzzers: steps of four bytes, which are what and where, a value, and a time to wait.
pub(crate) fn fuzz(data: &[u8]) {
    let mut registers = Registers::new();
    let mut now = 0;
    for step in data.as_chunks::<4>().0 {
        let [what, value, low, high] = *step;
        now += u64::from(u16::from_le_bytes([low, high])) << (what >> 5);
        registers.advance(now);
        match what & 15 {
            port @ 0..4 => drop(registers.read(port.into(), now)),
            4 => drop(registers.read_gate(now)),
            5 => registers.write_gate(value, now),
            port => registers.write(u64::from(port & 3), value, now),
        }
        if let Some(edge) = registers.next_edge() {
            assert!(edge > now && registers.counters[0].output(edge));
            assert!(registers.clone().advance(edge) && !registers.clone().advance(edge - 1));
        }
    }
}

#[cfg(test)]
mod tests;
