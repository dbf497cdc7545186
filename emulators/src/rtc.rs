//! The real-time clock and its CMOS memory (Motorola MC146818A). It starts with the host's time in
//! UTC; a guest may set it, which lasts until the machine is reset. It interrupts at each second, at
//! an alarm, and periodically.

mod calendar;
mod registers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hypervisor::{Device, InterruptLine};

use crate::alarm::{Alarm, Timed};
use registers::{Nanos, Registers};

/// The shortest time between two interrupts: the fastest period is about that.
const SHORTEST: Duration = Duration::from_micros(100);

/// The clock behind ports 0x70 (index) and 0x71 (data).
pub struct Rtc(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    line: Arc<dyn InterruptLine>,
    /// What time it was, and when that was.
    since_1970: Duration,
    started: Instant,
    alarm: Alarm,
}

struct State {
    index: u8,
    registers: Registers,
    /// Whether the line is up.
    high: bool,
}

impl Rtc {
    /// The index port; the data port is the next one.
    pub const PORT: u16 = 0x70;
    /// How many ports it takes.
    pub const PORTS: u16 = 2;
    /// Its interrupt line.
    pub const IRQ: u8 = 8;
    /// Which register holds the century; the FADT says so.
    pub const CENTURY: u8 = registers::CENTURY;

    /// A clock that interrupts by `line`.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let registers = Registers::new(nanos(since_1970));
        Self(Arc::new_cyclic(|shared: &Weak<Shared>| Shared {
            state: Mutex::new(State { index: 0, registers, high: false }),
            line,
            since_1970,
            started: Instant::now(),
            alarm: Alarm::new("rtc", Weak::clone(shared) as _),
        }))
    }
}

fn nanos(duration: Duration) -> Nanos {
    Nanos::try_from(duration.as_nanos()).unwrap_or(Nanos::MAX)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `access` have the registers at this moment, and passes on what comes of it.
    fn access<T>(&self, access: impl FnOnce(&mut State, Nanos) -> T) -> T {
        let mut state = self.lock();
        let elapsed = self.started.elapsed();
        let start = nanos(self.since_1970);
        let now = start + nanos(elapsed);
        state.registers.advance(now);
        let value = access(&mut state, now);
        let next = state.registers.next_interrupt().map(|at| {
            let after = u64::try_from(at - start).unwrap_or(u64::MAX);
            Duration::from_nanos(after).max(elapsed + SHORTEST)
        });
        self.alarm.set(next.and_then(|next| self.started.checked_add(next)));
        let high = state.registers.output();
        // Under the lock, so that the line ends as the last access has left it.
        if high != std::mem::replace(&mut state.high, high) {
            self.line.set_level(high);
        }
        value
    }
}

impl Timed for Shared {
    fn expire(&self) {
        self.access(|_, _| {});
    }
}

impl Device for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = match offset {
                1 => self.0.access(|state, now| state.registers.read(state.index, now)),
                _ => 0xff, // the index cannot be read back
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            match offset {
                // The high bit masks NMIs and is no part of the index.
                0 => self.0.lock().index = byte & 0x7f,
                _ => self.0.access(|state, now| state.registers.write(state.index, *byte, now)),
            }
        }
    }
}

/// For fuzzers: steps of four bytes, which are register, value, and a time to wait.
pub(crate) fn fuzz(data: &[u8]) {
    const START: Nanos = 1_735_689_599_000_000_000;
    let mut registers = Registers::new(START);
    let mut now = START;
    for step in data.as_chunks::<4>().0 {
        let [index, value, low, high] = *step;
        now += Nanos::from(u16::from_le_bytes([low, high])) << 18;
        registers.advance(now);
        if index & 0x80 == 0 {
            registers.write(index, value, now);
        } else {
            registers.read(index & 0x7f, now);
        }
        if let Some(next) = registers.next_interrupt() {
            assert!(next > now);
            let mut later = registers.clone();
            later.advance(next - 1);
            assert!(!later.output());
            later.advance(next);
            assert!(later.output());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Line(Mutex<Sender<bool>>);

    impl InterruptLine for Line {
        fn pulse(&self) {}

        fn set_level(&self, high: bool) {
            let _ = self.0.lock().unwrap().send(high);
        }
    }

    #[test]
    fn the_data_port_shows_what_the_index_port_names() {
        let (sender, _) = channel();
        let clock = Rtc::new(Arc::new(Line(Mutex::new(sender))));
        let mut data = [0];
        clock.write(0, &[0x8d]); // with the NMI mask
        clock.read(1, &mut data);
        assert_eq!(data, [0x80]);
        clock.read(0, &mut data);
        assert_eq!(data, [0xff]);
    }

    #[test]
    fn the_line_goes_up_and_down() {
        let (sender, levels) = channel();
        let clock = Rtc::new(Arc::new(Line(Mutex::new(sender))));
        clock.write(0, &[0x0b]);
        clock.write(1, &[0x42]); // periodic, 1024 a second
        let mut data = [0];
        clock.write(0, &[0x0c]);
        for _ in 0..3 {
            assert!(levels.recv().unwrap());
            clock.read(1, &mut data);
            assert_eq!(data[0] & 0xc0, 0xc0);
            assert!(!levels.recv().unwrap());
        }
        drop(clock);
        while levels.recv().is_ok() {}
    }
}
