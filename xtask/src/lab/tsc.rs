//! The rate of the host's time stamp counter, which is also L1's: TCG hands it through.
//!
//! L1 would find it out against an emulated timer. Where other work delays the emulation just then, L1's time runs
//! several times too fast or too slow, and its guests' with it: they report lockups, and a timeout comes early.

#![allow(unsafe_code)] // RDTSC

use std::thread;
use std::time::{Duration, Instant};

/// How long to look at it. The reading of two clocks is off by a microsecond or so.
const LOOK: Duration = Duration::from_millis(50);

/// How often the reading may be torn apart by other work before the best one has to do.
const TRIES: usize = 8;

/// The counter's rate in kHz.
pub(super) fn khz() -> u64 {
    let (began, first) = both();
    thread::sleep(LOOK);
    let (ended, last) = both();
    let nanoseconds = (ended - began).as_nanos().max(1);
    u64::try_from(u128::from(last.wrapping_sub(first)) * 1_000_000 / nanoseconds).unwrap_or(0)
}

/// Both clocks at the same time: of several readings, the one that took least.
fn both() -> (Instant, u64) {
    let reading = || {
        let before = Instant::now();
        // SAFETY: reads a counter that every x86-64 processor has.
        let counter = unsafe { core::arch::x86_64::_rdtsc() };
        (before.elapsed(), (before, counter))
    };
    let best = (0..TRIES).map(|_| reading()).min_by_key(|(took, _)| *took);
    best.map_or_else(|| reading().1, |(_, both)| both)
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_looks_agree() {
        let (first, second) = (super::khz(), super::khz());
        assert!(first > 100_000, "{first} kHz");
        assert!(first.abs_diff(second) < first / 50, "{first} and {second} kHz");
    }
}
