//! `bench`: how fast, and what it took.

use super::RunError;
use super::flow::Flow;
use super::random::Random;
use crate::block::{BlockDriver, Operation};
use crate::json::Object;
use crate::memory::Pages;
use crate::platform::Platform;
use crate::work::{Bench, Direction, Pattern};

impl Bench {
    /// Measures, and says what came out.
    pub(super) fn run<P: Platform>(
        &self,
        platform: &P,
        disk: &mut dyn BlockDriver,
        memory: Pages<'_>,
    ) -> Result<Object, RunError> {
        let (before, signals) = (platform.counters(), disk.counters().signals);
        let mut flow = Flow::new(platform, disk, memory, self.bs, self.depth, self.spin)?;
        let places = flow.places()?;
        let depth = flow.depth();
        let operation = match self.direction {
            Direction::Read => Operation::Read,
            Direction::Write => Operation::Write,
        };
        let mut random = Random::new(places);
        let (mut place, mut none_yet) = (0, true);
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
        let bytes = ios.saturating_mul(self.bs.into());
        let per_second =
            |count: u64| (u128::from(count) * 1_000_000_000 / u128::from(nanoseconds)) as u64;
        Ok(Object::default()
            .string("result", "bench")
            .number("disk", self.disk)
            .string("pattern", self.pattern.name())
            .string("rw", self.direction.name())
            .number("bs", self.bs)
            .number("depth", depth)
            .number("nanoseconds", nanoseconds)
            .number("ios", ios)
            .number("iops", per_second(ios))
            .number("bytes_per_second", per_second(bytes))
            .number("signals", disk.counters().signals - signals)
            .number("interrupts", after.interrupts - before.interrupts)
            .number("spun", spun)
            .number("halts", after.halts - before.halts))
    }
}
