//! `verify`: what is written is what is read.
//!
//! Each eight bytes of the pattern are a mixture of the seed and of their place on the disk, so
//! that a block that went elsewhere is found as surely as one that was damaged.

use core::sync::atomic::Ordering;

use super::RunError;
use super::checksum::summand;
use super::flow::Flow;
use super::parts::Seat;
use super::random::mixed;
use crate::block::Operation;
use crate::json::Object;
use crate::platform::Platform;
use crate::work::Verify;

/// How long to look for an answer before sleeping.
const SPIN: u64 = 100_000;

/// What a processor has found, or several together.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    depth: u32,
    places: u64,
    checksum: u64,
    /// Of those that took longest.
    write_nanoseconds: u64,
    read_nanoseconds: u64,
}

impl Verify {
    /// Writes, reads back, compares, and says so.
    pub(super) fn run<P: Platform>(&self, seat: Seat<'_, '_, P>) -> Result<Object, RunError> {
        let driver = seat.disk.identity().driver;
        let parts = seat.share(self.vps, |seat| self.verify(seat))?;
        let all = parts.into_iter().flatten().fold(Figures::default(), Figures::and);
        Ok(Object::default()
            .string("result", "verify")
            .number("disk", self.disk)
            .string("driver", driver)
            .number("bytes", all.places.saturating_mul(self.bs.into()))
            .number("bs", self.bs)
            .number("depth", all.depth)
            .number("vps", self.vps)
            .string("checksum", format_args!("{:016x}", all.checksum))
            .number("write_nanoseconds", all.write_nanoseconds)
            .number("read_nanoseconds", all.read_nanoseconds))
    }

    /// One processor's part: of so many places, each so-manyth.
    fn verify<P: Platform>(&self, seat: Seat<'_, '_, P>) -> Result<Figures, RunError> {
        let platform = seat.platform;
        let mut flow = Flow::new(seat, self.bs, self.depth, SPIN)?;
        let places = flow.places()?.min(self.bytes.div_ceil(self.bs.into()));
        let words = u64::from(self.bs / 8);
        let pattern = |place: u64| {
            let first = place.wrapping_mul(words).wrapping_add(self.seed);
            (0..words).map(move |word| mixed(first.wrapping_add(word)))
        };

        let started = platform.now();
        let mut places_left = flow.own(places);
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
        let mut places_left = flow.own(places);
        let done = flow.run(
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
                    checksum = checksum.wrapping_add(summand(index, read));
                }
                Ok(())
            },
        )?;
        let read = platform.now();
        Ok(Figures {
            depth: flow.depth().into(),
            places: done,
            checksum,
            write_nanoseconds: written.saturating_sub(started),
            read_nanoseconds: read.saturating_sub(written),
        })
    }
}

impl Figures {
    /// Both processors' together.
    fn and(self, other: Self) -> Self {
        Self {
            depth: self.depth + other.depth,
            places: self.places + other.places,
            checksum: self.checksum.wrapping_add(other.checksum),
            write_nanoseconds: self.write_nanoseconds.max(other.write_nanoseconds),
            read_nanoseconds: self.read_nanoseconds.max(other.read_nanoseconds),
        }
    }
}
