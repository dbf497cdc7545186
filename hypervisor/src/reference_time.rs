//! Reference time: what the partition's clock says, in units of 100 ns since it was made (TLFS
//! chapter 12, "Timers").
//!
//! A guest reads it from its own time stamp counter by the reference TSC page, or asks us by
//! HV_X64_MSR_TIME_REF_COUNT. Both are the same function of the same counter, so they never
//! disagree: the processors' counters are the host's, without offset or scale.
//!
//! Where the host does not trust its counter, the page says so (sequence 0), and the register
//! answers from the host's monotonic clock.

#![allow(unsafe_code)] // rdtsc

use std::time::{Duration, Instant};

use zerocopy::{FromZeros, Immutable, IntoBytes};

/// Units of reference time in a second.
const UNITS_PER_SECOND: u64 = 10_000_000;

/// `HV_REFERENCE_TSC_PAGE` (TLFS 12.7): time = (TSC * scale) / 2^64 + offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromZeros, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct ReferenceTscPage {
    /// 0: the page tells nothing, read the register. It never changes here.
    sequence: u32,
    reserved: u32,
    scale: u64,
    offset: i64,
}

const _: () = assert!(size_of::<ReferenceTscPage>() == 24);

/// A partition's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ReferenceClock {
    /// A function of the time stamp counter.
    Tsc(TscClock),
    /// The host's monotonic clock, since then.
    Monotonic(Instant),
}

/// The function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TscClock {
    scale: u64,
    offset: i64,
}

impl TscClock {
    /// The clock that says 0 when the counter says `zero`. `None` for a counter that is not faster
    /// than the clock.
    pub(crate) fn new(khz: u64, zero: u64) -> Option<Self> {
        let per_millisecond = UNITS_PER_SECOND / 1000;
        let scale = (u128::from(per_millisecond) << 64).checked_div(khz.into())?;
        let scale = u64::try_from(scale).ok()?;
        Some(Self { scale, offset: scaled(zero, scale).wrapping_neg() as i64 })
    }

    /// Reference time when the counter says `tsc`.
    pub(crate) fn at(self, tsc: u64) -> u64 {
        scaled(tsc, self.scale).wrapping_add(self.offset as u64)
    }
}

fn scaled(tsc: u64, scale: u64) -> u64 {
    ((u128::from(tsc) * u128::from(scale)) >> 64) as u64
}

impl ReferenceClock {
    /// A clock that starts now, of a time stamp counter that counts `khz` and can be trusted, or
    /// of none.
    pub(crate) fn start(khz: Option<u64>) -> Self {
        khz.and_then(|khz| TscClock::new(khz, host_tsc()))
            .map_or_else(|| Self::Monotonic(Instant::now()), Self::Tsc)
    }

    /// Reference time now.
    pub(crate) fn now(&self) -> u64 {
        match self {
            Self::Tsc(clock) => clock.at(host_tsc()),
            Self::Monotonic(start) => units(start.elapsed()),
        }
    }

    /// How long it is until reference time is `deadline`; zero if it has passed.
    pub(crate) fn until(&self, deadline: u64) -> Duration {
        Duration::from_nanos(deadline.saturating_sub(self.now()).saturating_mul(100))
    }

    /// What the guest's page is to say.
    pub(crate) fn page(&self) -> ReferenceTscPage {
        match self {
            Self::Tsc(TscClock { scale, offset }) => {
                ReferenceTscPage { sequence: 1, reserved: 0, scale: *scale, offset: *offset }
            }
            Self::Monotonic(_) => ReferenceTscPage::new_zeroed(),
        }
    }
}

fn units(duration: Duration) -> u64 {
    (duration.as_nanos() / 100) as u64
}

fn host_tsc() -> u64 {
    // SAFETY: every processor that KVM runs on has the instruction, and Linux lets everybody use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_page_is_the_register(khz in 10_001_u64..10_000_000, zero: u64, later in 0_u64..1 << 60) {
            let clock = TscClock::new(khz, zero).unwrap();
            let tsc = zero.wrapping_add(later);
            let ReferenceTscPage { sequence, scale, offset, .. } = ReferenceClock::Tsc(clock).page();
            prop_assert_ne!(sequence, 0);
            // As a guest computes it.
            let read = ((u128::from(tsc) * u128::from(scale)) >> 64) as u64;
            prop_assert_eq!(read.wrapping_add(offset as u64), clock.at(tsc));
        }

        #[test]
        fn time_goes_at_its_speed_and_never_back(
            khz in 10_001_u64..10_000_000, zero in 0_u64..1 << 62, a in 0_u64..1 << 58, b in 0_u64..1 << 58,
        ) {
            let clock = TscClock::new(khz, zero).unwrap();
            prop_assert_eq!(clock.at(zero), 0);
            let (early, late) = (a.min(b), a.max(b));
            prop_assert!(clock.at(zero + early) <= clock.at(zero + late));
            // The scale's rounding loses less than one unit in 2^64 / TSC; the rest is rounding.
            let exact = u128::from(late) * 10_000 / u128::from(khz);
            let error = exact.abs_diff(clock.at(zero + late).into());
            prop_assert!(error <= 2 , "off by {error}");
        }
    }

    #[test]
    fn a_counter_slower_than_the_clock_is_refused() {
        assert_eq!(TscClock::new(0, 0), None);
        assert_eq!(TscClock::new(10_000, 0), None);
    }

    #[test]
    fn clocks_start_at_zero_and_go_on() {
        for khz in [None, Some(2_000_000)] {
            let clock = ReferenceClock::start(khz);
            let first = clock.now();
            assert!(first < UNITS_PER_SECOND, "{first}");
            std::thread::sleep(Duration::from_millis(2));
            assert!(clock.now() > first);
            assert_eq!(clock.until(0), Duration::ZERO);
            assert!(clock.until(u64::MAX) > Duration::from_secs(1 << 20));
            assert_eq!(clock.page().sequence == 0, khz.is_none());
        }
    }
}
