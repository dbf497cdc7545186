//! Work that processors share. Each does its part on a channel of the disk of its own, with memory of
//! its own; they have nothing to say to one another before all have ended.

use super::RunError;
use crate::block::BlockDriver;
use crate::boot::MAX_VPS;
use crate::memory::Pages;
use crate::platform::Platform;

/// Which part of the work: number `index`, from 0, of `of`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) index: usize,
    pub(super) of: usize,
}

/// What a processor has for its part of the work.
pub(super) struct Seat<'s, 'w, P> {
    pub(super) part: Part,
    /// The world as it sees it.
    pub(super) platform: &'s P,
    /// The disk, by the channel that is its own.
    pub(super) disk: &'s mut dyn BlockDriver<'w>,
    /// Memory for requests.
    pub(super) memory: Pages<'w>,
}

/// What came of each part, in order.
pub(super) type Results<R> = [Option<R>; MAX_VPS];

impl<'s, 'w, P: Platform> Seat<'s, 'w, P> {
    /// For all of the work.
    pub(super) fn new(
        platform: &'s P,
        disk: &'s mut dyn BlockDriver<'w>,
        memory: Pages<'w>,
    ) -> Self {
        Self { part: Part { index: 0, of: 1 }, platform, disk, memory }
    }

    /// Has `work` done in so many parts, the first of them by this processor.
    pub(super) fn share<R: Send>(
        self,
        parts: u16,
        work: impl for<'m> Fn(Seat<'_, 'm, P>) -> Result<R, RunError> + Sync,
    ) -> Result<Results<R>, RunError> {
        let Self { platform, disk, mut memory, .. } = self;
        let of = usize::from(parts.max(1));
        let sides = disk.sides();
        let missing = RunError::Processors { asked: parts, found: 1 + sides.count() };
        let mut results = [const { None }; MAX_VPS];
        let Some((first, others)) = results.get_mut(..of).and_then(<[_]>::split_first_mut) else {
            return Err(missing);
        };
        if others.len() > sides.count() {
            return Err(missing);
        }
        let pages = memory.count() / of;
        let no_memory = RunError::Memory { needed: of, available: memory.count() };
        let own = memory.take(pages).ok_or(no_memory)?;
        *first = Some(platform.together(
            others,
            |index, platform| {
                let before = pages.saturating_mul(index.saturating_sub(1));
                let (_, rest) = memory.split(before).ok_or(no_memory)?;
                let (memory, _) = rest.split(pages).ok_or(no_memory)?;
                sides.with_disk(index, platform, |disk| {
                    work(Seat { part: Part { index, of }, platform, disk, memory })
                })?
            },
            || work(Seat { part: Part { index: 0, of }, platform, disk, memory: own }),
        ));
        let mut done = [const { None }; MAX_VPS];
        for (to, result) in done.iter_mut().zip(results).take(of) {
            *to = Some(result.ok_or(missing)??);
        }
        Ok(done)
    }
}
