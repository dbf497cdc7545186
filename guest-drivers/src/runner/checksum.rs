//! `checksum`: what is on the disk, in a number.

use core::sync::atomic::Ordering;

use super::RunError;
use super::flow::Flow;
use crate::block::{BlockDriver, Operation};
use crate::json::Object;
use crate::memory::Pages;
use crate::platform::Platform;
use crate::work::Checksum;

/// How long to look for an answer before sleeping.
const SPIN: u64 = 100_000;

/// What eight bytes, the `index`th of their request, add to a sum. Requests end in any order, so
/// the sum has to be the same in any; and as their lengths are multiples of 64 such words, it is
/// the same for all lengths.
#[inline]
pub(super) fn summand(index: u64, word: u64) -> u64 {
    word.rotate_left(index as u32)
}

impl Checksum {
    /// Reads, adds, and says what came out.
    pub(super) fn run<'w, P: Platform>(
        &self,
        platform: &P,
        disk: &mut dyn BlockDriver<'w>,
        memory: Pages<'w>,
    ) -> Result<Object, RunError> {
        let driver = disk.identity().driver;
        let mut flow = Flow::new(platform, disk, memory, self.bs, self.depth, SPIN)?;
        let places = flow.places()?.min(self.bytes.div_ceil(self.bs.into()));
        let words = self.bs as usize / 8;

        let mut sum = 0_u64;
        let started = platform.now();
        let mut places_left = 0..places;
        flow.run(
            Operation::Read,
            |_| places_left.next(),
            |_, _| (),
            |data, _| {
                for (index, word) in (0..).zip(data.words().iter().take(words)) {
                    sum = sum.wrapping_add(summand(index, word.load(Ordering::Relaxed)));
                }
                Ok(())
            },
        )?;
        let read = platform.now();
        Ok(Object::default()
            .string("result", "checksum")
            .number("disk", self.disk)
            .string("driver", driver)
            .number("bytes", places.saturating_mul(self.bs.into()))
            .number("bs", self.bs)
            .number("depth", flow.depth())
            .string("checksum", format_args!("{sum:016x}"))
            .number("read_nanoseconds", read.saturating_sub(started)))
    }
}
