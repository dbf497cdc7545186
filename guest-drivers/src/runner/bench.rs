//! `bench`: how fast, and what it took.

use super::RunError;
use super::flow::Flow;
use super::parts::Seat;
use super::random::Random;
use crate::block::Operation;
use crate::json::Object;
use crate::platform::Platform;
use crate::work::{Bench, Direction, Pattern};

/// What a processor has measured, or several together.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    depth: u32,
    /// Of the one that took longest.
    nanoseconds: u64,
    ios: u64,
    signals: u64,
    interrupts: u64,
    spun: u64,
    halts: u64,
}

impl Bench {
    /// Measures, and says what came out.
    pub(super) fn run<P: Platform>(&self, seat: Seat<'_, '_, P>) -> Result<Object, RunError> {
        let driver = seat.disk.identity().driver;
        let parts = seat.share(self.vps, |seat| self.measure(seat))?;
        let all = parts.into_iter().flatten().fold(Figures::default(), Figures::and);

        let bytes = all.ios.saturating_mul(self.bs.into());
        let per_second = |count: u64| {
            (u128::from(count) * 1_000_000_000 / u128::from(all.nanoseconds.max(1))) as u64
        };
        Ok(Object::default()
            .string("result", "bench")
            .number("disk", self.disk)
            .string("driver", driver)
            .string("pattern", self.pattern.name())
            .string("rw", self.direction.name())
            .number("bs", self.bs)
            .number("depth", all.depth)
            .number("vps", self.vps)
            .number("nanoseconds", all.nanoseconds)
            .number("ios", all.ios)
            .number("iops", per_second(all.ios))
            .number("bytes_per_second", per_second(bytes))
            .number("signals", all.signals)
            .number("interrupts", all.interrupts)
            .number("spun", all.spun)
            .number("halts", all.halts))
    }

    /// One processor's part: in sequence, each begins at a place of its own.
    fn measure<P: Platform>(&self, seat: Seat<'_, '_, P>) -> Result<Figures, RunError> {
        let (platform, part) = (seat.platform, seat.part);
        let (before, signals) = (platform.counters(), seat.disk.counters().signals);
        let mut flow = Flow::new(seat, self.bs, self.depth, self.spin)?;
        let places = flow.places()?;
        let depth = flow.depth().into();
        let operation = match self.direction {
            Direction::Read => Operation::Read,
            Direction::Write => Operation::Write,
        };
        let mut random = Random::new(places.wrapping_add((part.index as u64) << 32));
        let (mut place, mut none_yet) = (places / part.of as u64 * part.index as u64, true);
        let started = platform.now();
        let until = started.saturating_add(self.time);
        let next = |now: u64| {
            place = match self.pattern {
                Pattern::Sequential => (place + 1) % places,
                Pattern::Random => random.below(places),
            };
            // At least one, however late it is.
            let wanted = now < until || none_yet;
            none_yet = false;
            wanted.then_some(place)
        };
        let ios = flow.run(operation, next, |_, _| (), |_, _| Ok(()))?;
        let nanoseconds = platform.now().saturating_sub(started).max(1);
        let (after, spun) = (platform.counters(), flow.spun());
        Ok(Figures {
            depth,
            nanoseconds,
            ios,
            signals: flow.counters().signals - signals,
            interrupts: after.interrupts - before.interrupts,
            spun,
            halts: after.halts - before.halts,
        })
    }
}

impl Figures {
    /// Both processors' together.
    fn and(self, other: Self) -> Self {
        Self {
            depth: self.depth + other.depth,
            nanoseconds: self.nanoseconds.max(other.nanoseconds),
            ios: self.ios + other.ios,
            signals: self.signals + other.signals,
            interrupts: self.interrupts + other.interrupts,
            spun: self.spun + other.spun,
            halts: self.halts + other.halts,
        }
    }
}
