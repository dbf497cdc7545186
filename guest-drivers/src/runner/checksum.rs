//! `checksum`: what is on the disk, in a number.

use core::sync::atomic::Ordering;

use super::RunError;
use super::flow::Flow;
use super::parts::Seat;
use crate::block::Operation;
use crate::json::Object;
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

/// What a processor has found, or several together.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    depth: u32,
    places: u64,
    sum: u64,
    /// Of the one that took longest.
    nanoseconds: u64,
}

impl Checksum {
    /// Reads, adds, and says what came out.
    pub(super) fn run<P: Platform>(&self, seat: Seat<'_, '_, P>) -> Result<Object, RunError> {
        let driver = seat.disk.identity().driver;
        let parts = seat.share(self.vps, |seat| self.add(seat))?;
        let all = parts.into_iter().flatten().fold(Figures::default(), Figures::and);
        Ok(Object::default()
            .string("result", "checksum")
            .number("disk", self.disk)
            .string("driver", driver)
            .number("bytes", all.places.saturating_mul(self.bs.into()))
            .number("bs", self.bs)
            .number("depth", all.depth)
            .number("vps", self.vps)
            .string("checksum", format_args!("{:016x}", all.sum))
            .number("read_nanoseconds", all.nanoseconds))
    }

    /// One processor's part.
    fn add<P: Platform>(&self, seat: Seat<'_, '_, P>) -> Result<Figures, RunError> {
        let platform = seat.platform;
        let mut flow = Flow::new(seat, self.bs, self.depth, SPIN)?;
        let places = flow.places()?.min(self.bytes.div_ceil(self.bs.into()));
        let words = self.bs as usize / 8;

        let mut sum = 0_u64;
        let started = platform.now();
        let mut places_left = flow.own(places);
        let places = flow.run(
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
        let nanoseconds = platform.now().saturating_sub(started);
        Ok(Figures { depth: flow.depth().into(), places, sum, nanoseconds })
    }
}

impl Figures {
    /// Both processors' together.
    fn and(self, other: Self) -> Self {
        Self {
            depth: self.depth + other.depth,
            places: self.places + other.places,
            sum: self.sum.wrapping_add(other.sum),
            nanoseconds: self.nanoseconds.max(other.nanoseconds),
        }
    }
}
