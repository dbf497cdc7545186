//! `verify`: what is written is what is read.
//!
//! Each eight bytes of the pattern are a mixture of the seed and of their place on the disk, so
//! that a block that went elsewhere is found as surely as one that was damaged.

use core::sync::atomic::Ordering;

use super::RunError;
use super::flow::Flow;
use super::random::mixed;
use crate::block::{BlockDriver, Operation};
use crate::json::Object;
use crate::memory::Pages;
use crate::platform::Platform;
use crate::work::Verify;

/// How long to look for an answer before sleeping.
const SPIN: u64 = 100_000;

impl Verify {
    /// Writes, reads back, compares, and says so.
    pub(super) fn run<P: Platform>(
        &self,
        platform: &P,
        disk: &mut dyn BlockDriver,
        memory: Pages<'_>,
    ) -> Result<Object, RunError> {
        let mut flow = Flow::new(platform, disk, memory, self.bs, self.depth, SPIN)?;
        let places = flow.places()?.min(self.bytes.div_ceil(self.bs.into()));
        let words = u64::from(self.bs / 8);
        let pattern = |place: u64| {
            let first = place.wrapping_mul(words).wrapping_add(self.seed);
            (0..words).map(move |word| mixed(first.wrapping_add(word)))
        };

        let started = platform.now();
        let mut places_left = 0..places;
        flow.run(
            Operation::Write,
            |_| places_left.next(),
            |data, place| {
                for (word, value) in data.words().iter().zip(pattern(place)) {
                    word.store(value, Ordering::Relaxed);
                }
            },
            |_, _| Ok(()),
        )?;
        flow.flush()?;
        let written = platform.now();

        let mut checksum = 0_u64;
        let mut places_left = 0..places;
        flow.run(
            Operation::Read,
            |_| places_left.next(),
            // What is not read shall not look right from before.
            |data, _| {
                for word in data.words().iter().step_by(64) {
                    word.store(0, Ordering::Relaxed);
                }
            },
            |data, place| {
                for ((index, word), value) in (0..).zip(data.words()).zip(pattern(place)) {
                    let read = word.load(Ordering::Relaxed);
                    if read != value {
                        let byte = place.wrapping_mul(self.bs.into()).wrapping_add(index * 8);
                        return Err(RunError::Differs { byte, read, written: value });
                    }
                    // Blocks come back in any order.
                    checksum = checksum.wrapping_add(read.rotate_left(index as u32));
                }
                Ok(())
            },
        )?;
        let read = platform.now();
        Ok(Object::default()
            .string("result", "verify")
            .number("disk", self.disk)
            .number("bytes", places.saturating_mul(self.bs.into()))
            .number("bs", self.bs)
            .number("depth", flow.depth())
            .string("checksum", format_args!("{checksum:016x}"))
            .number("write_nanoseconds", written.saturating_sub(started))
            .number("read_nanoseconds", read.saturating_sub(written)))
    }
}
