//! Requests of one size, so many in flight at a time.

use core::hint::spin_loop;
use core::iter::StepBy;
use core::ops::Range;

use vsc::storvsc::Fault;

use super::RunError;
use super::parts::{Part, Seat};
use crate::block::{BlockCounters, BlockError, Completion, Operation, Request};
use crate::memory::{PAGE, Pages};
use crate::platform::Platform;

/// How long the disk may take for any answer, in nanoseconds.
const PATIENCE: u64 = 60_000_000_000;

/// Requests, and the seat from which they are made; its memory has one buffer for each.
pub(super) struct Flow<'s, 'w, P> {
    seat: Seat<'s, 'w, P>,
    bs: u32,
    depth: u16,
    /// How long to look for an answer before sleeping, in nanoseconds.
    spin: u64,
    /// For each slot, the place of its request.
    places: [u64; 64],
    /// The slots that have no request, as bits.
    free: u64,
    /// How often an answer came while it was waited for without sleep.
    spun: u64,
}

impl<'s, 'w, P: Platform> Flow<'s, 'w, P> {
    /// Requests of `bs` bytes, `depth` of them at a time or as many as the driver takes.
    pub(super) fn new(
        seat: Seat<'s, 'w, P>,
        bs: u32,
        depth: u16,
        spin: u64,
    ) -> Result<Self, RunError> {
        let Seat { disk, memory, .. } = &seat;
        let identity = *disk.identity();
        if !bs.is_multiple_of(identity.block_size) || bs > identity.max_transfer {
            let (block_size, max_transfer) = (identity.block_size, identity.max_transfer);
            return Err(RunError::BlockSize { bs, block_size, max_transfer });
        }
        let depth = depth.clamp(1, identity.max_depth.clamp(1, 64));
        let (needed, available) = (pages_of(bs) * usize::from(depth), memory.count());
        let (memory, _) = memory.split(needed).ok_or(RunError::Memory { needed, available })?;
        let free = u64::MAX >> (64 - u32::from(depth));
        let spin = if disk.looks_cost() { 0 } else { spin };
        let seat = Seat { memory, ..seat };
        Ok(Self { seat, bs, depth, spin, places: [0; 64], free, spun: 0 })
    }

    /// How many places of a request's size the disk has.
    pub(super) fn places(&self) -> Result<u64, RunError> {
        let bytes = self.seat.disk.identity().bytes();
        let places = bytes / u64::from(self.bs);
        if places == 0 { Err(RunError::Small(bytes)) } else { Ok(places) }
    }

    /// Those of the first `places` that are this processor's: each so-manyth.
    pub(super) fn own(&self, places: u64) -> StepBy<Range<u64>> {
        let Part { index, of } = self.seat.part;
        (index as u64..places).step_by(of)
    }

    /// What the driver has counted.
    pub(super) fn counters(&self) -> BlockCounters {
        self.seat.disk.counters()
    }

    /// Requests in flight at a time.
    pub(super) fn depth(&self) -> u16 {
        self.depth
    }

    /// How often an answer came while it was waited for without sleep.
    pub(super) fn spun(&self) -> u64 {
        self.spun
    }

    /// Makes requests at the places that `next` gives, told the time, until it gives none, and
    /// waits for them. Before each `prepare` has its memory, and after each `ended`. Returns how
    /// many there were.
    pub(super) fn run(
        &mut self,
        operation: Operation,
        mut next: impl FnMut(u64) -> Option<u64>,
        mut prepare: impl FnMut(Pages<'w>, u64),
        mut ended: impl FnMut(Pages<'w>, u64) -> Result<(), RunError>,
    ) -> Result<u64, RunError> {
        let blocks = self.bs / self.seat.disk.identity().block_size;
        let block_of = |place: u64| place.saturating_mul(blocks.into());
        let name = if operation == Operation::Write { "write" } else { "read" };
        let all = self.free;
        let (mut more, mut count) = (true, 0);
        let mut active = self.seat.platform.now();
        let mut answered = active;
        let mut spinning = false;
        loop {
            let now = self.seat.platform.now();
            while more && self.free != 0 {
                let Some(place) = next(now) else {
                    more = false;
                    break;
                };
                let slot = self.free.trailing_zeros() as u16;
                let data = self.buffer(slot)?;
                prepare(data, place);
                let block = block_of(place);
                let request = Request { slot, operation, block, blocks, data: Some(data) };
                self.seat.disk.submit(&request)?;
                self.free &= !(1 << slot);
                if let Some(of_slot) = self.places.get_mut(usize::from(slot)) {
                    *of_slot = place;
                }
            }
            self.seat.disk.publish();
            if self.free == all {
                return Ok(count);
            }

            let mut done = 0_u64;
            let mut failed = None;
            let (free, bs) = (self.free, self.bs);
            let taken = self.seat.disk.poll(&mut |Completion { slot, outcome }| {
                let place = self.places.get(usize::from(slot)).copied().unwrap_or(0);
                let block = block_of(place);
                let error = match outcome {
                    _ if slot >= self.depth || (free | done) & 1 << slot != 0 => RunError::Unasked,
                    Ok(bytes) if bytes != bs => {
                        RunError::Short { operation: name, block, bytes, asked: bs }
                    }
                    Ok(_) => {
                        done |= 1 << slot;
                        return;
                    }
                    Err(failure) => RunError::Failed { operation: name, block, failure },
                };
                failed.get_or_insert(error);
            })?;
            if let Some(error) = failed {
                return Err(error);
            }
            self.free |= done;
            count += u64::from(done.count_ones());
            while done != 0 {
                let slot = done.trailing_zeros();
                done &= done - 1;
                let place = self.places.get(slot as usize).copied().unwrap_or(0);
                ended(self.buffer(slot as u16)?, place)?;
            }
            if taken > 0 {
                (active, answered) = (now, now);
                self.spun += u64::from(core::mem::take(&mut spinning));
            } else if now.saturating_sub(answered) > PATIENCE {
                return Err(BlockError::from(Fault::TimedOut).into());
            } else if now.saturating_sub(active) < self.spin {
                spin_loop();
                spinning = true;
            } else {
                spinning = false;
                self.seat.disk.sleep();
                active = self.seat.platform.now();
            }
        }
    }

    /// Makes what was written permanent.
    pub(super) fn flush(&mut self) -> Result<(), RunError> {
        let operation = Operation::Flush;
        self.seat.disk.submit(&Request { slot: 0, operation, block: 0, blocks: 0, data: None })?;
        self.seat.disk.publish();
        let mut outcome = None;
        let until = self.seat.platform.now().saturating_add(PATIENCE);
        while outcome.is_none() {
            if self.seat.platform.now() > until {
                return Err(BlockError::from(Fault::TimedOut).into());
            }
            if self.seat.disk.poll(&mut |completion| outcome = Some(completion.outcome))? == 0 {
                self.seat.disk.sleep();
            }
        }
        match outcome {
            Some(Err(failure)) => Err(RunError::Failed { operation: "flush", block: 0, failure }),
            _ => Ok(()),
        }
    }

    /// The memory of the request in `slot`.
    fn buffer(&self, slot: u16) -> Result<Pages<'w>, RunError> {
        let (needed, available) = (pages_of(self.bs), self.seat.memory.count());
        self.seat
            .memory
            .split(needed * usize::from(slot))
            .and_then(|(_, rest)| rest.split(needed))
            .map(|(buffer, _)| buffer)
            .ok_or(RunError::Memory { needed, available })
    }
}

fn pages_of(bytes: u32) -> usize {
    (bytes as usize).div_ceil(PAGE)
}
