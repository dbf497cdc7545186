//! storvsc against storvsp: the guest's client in the caller's thread, the controller's worker in one
//! of its own or in the same.

use std::hint::spin_loop;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::block::Disk as Backend;
use hypervisor::{Gpa, Gpn, GuestMemory};
use rustix::thread::CpuSet;
use vmbus_server::testing::{GuestEnd, channel_in};
use vmbus_server::{Device, DoubleMapped};
use vsc::storvsc::{Command, Disk, PageList, Pages, Queue, Scratch, words};
use vsc::{Channel, Counters};
use vsp::storvsp::{ControllerBuilder, InlineWorker};

use crate::{pin, thread_time};

/// The most requests in flight.
pub const DEPTH: usize = 64;
/// The longest request.
pub const MAX_BLOCK: u32 = 128 << 10;

/// Pages of a ring, one direction, as Linux's storvsc has.
const RING_PAGES: u64 = 32;
/// Where the data buffers begin.
const DATA: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

type Bell = Box<dyn FnMut() + Send>;

/// Which blocks are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, from the start to the end and again.
    Sequential,
    /// Any.
    Random,
}

/// What the client does while nothing has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Looks again.
    Spin,
    /// Sleeps until the worker interrupts, or in its stead, if they share a thread.
    Sleep,
}

/// A stretch of reads.
#[derive(Clone, Copy, Debug)]
pub struct Reads {
    /// Bytes of each, at most [`MAX_BLOCK`] and a multiple of the disk's blocks.
    pub block: u32,
    /// In flight at a time, at most [`DEPTH`].
    pub depth: u16,
    /// Which.
    pub order: Order,
    /// While nothing has ended.
    pub waiting: Waiting,
    /// Whether all in flight have to end before the next are sent, all together.
    pub batches: bool,
}

/// What a stretch of reads came to.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// How many.
    pub reads: u64,
    /// In which time.
    pub time: Duration,
    /// Of which the calling thread ran so long.
    pub cpu: Duration,
    /// Times the client rang the worker's doorbell.
    pub signals: u64,
    /// Times the worker interrupted the client.
    pub interrupts: u64,
}

impl Sample {
    /// Reads a second.
    pub fn rate(&self) -> f64 {
        self.reads as f64 / self.time.as_secs_f64()
    }

    /// Nanoseconds that the calling thread ran for each read: the cost where it does all the work,
    /// however busy the machine.
    pub fn cpu_nanoseconds(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.reads.max(1) as f64
    }

    /// Nanoseconds for each read.
    pub fn nanoseconds(&self) -> f64 {
        self.time.as_nanos() as f64 / self.reads.max(1) as f64
    }
}

/// A controller with one disk, and a guest with one channel to it.
pub struct Rig {
    /// The worker, if it has no thread of its own.
    worker: Option<InlineWorker>,
    queue: Queue<DoubleMapped, Bell, DEPTH>,
    end: GuestEnd,
    disk: Disk,
    memory: GuestMemory,
    /// The next block, or the state of the generator.
    position: u64,
}

/// The page of `memory` into which small answers come.
struct ScratchPage<'a> {
    memory: &'a GuestMemory,
    list: PageList<{ words(1) }>,
}

impl Scratch for ScratchPage<'_> {
    fn pages(&mut self, len: u32) -> Option<Pages<'_>> {
        self.list.resize(len).then(|| self.list.pages())
    }

    fn read(&self, bytes: &mut [u8]) {
        self.memory.read(Gpa(DATA), bytes).expect("the rig's memory is that large");
    }
}

impl Rig {
    /// Attaches `backend` and opens a channel. Given `cpus`, the worker has the second of them for
    /// its own and the calling thread, from now on, the first.
    pub fn new(backend: Arc<dyn Backend>, cpus: Option<&CpuSet>) -> anyhow::Result<Self> {
        Self::with_worker(backend, false, cpus)
    }

    /// The same with the worker in the calling thread: it takes its turns between the client's, and
    /// nobody sleeps or signals.
    pub fn inline(backend: Arc<dyn Backend>) -> anyhow::Result<Self> {
        Self::with_worker(backend, true, None)
    }

    fn with_worker(
        backend: Arc<dyn Backend>,
        inline: bool,
        cpus: Option<&CpuSet>,
    ) -> anyhow::Result<Self> {
        let memory = GuestMemory::new(DATA + u64::from(MAX_BLOCK) * DEPTH as u64)?;
        let (root, mut end) = channel_in(&memory, Gpn(0), RING_PAGES, 0);
        let mut builder = ControllerBuilder::new(0);
        builder.attach(Some(0), backend)?;
        let mut controller = builder.build(1);
        let mut worker = None;
        if inline {
            worker = Some(controller.open_inline(root).context("the worker did not start")?);
        } else {
            // A thread runs where the one that starts it may. The controller is there already: it
            // has counted the processors.
            if let Some(cpus) = cpus {
                pin(cpus, Some(1));
            }
            controller.open(root).context("the worker did not start")?;
            if let Some(cpus) = cpus {
                pin(cpus, Some(0));
            }
        }

        // The rings go to the client; those of a channel that nobody uses take their place.
        let (_, spare) = channel_in(&memory, Gpn(2 * RING_PAGES), 2, 0);
        let incoming = mem::replace(&mut end.incoming, spare.incoming);
        let outgoing = mem::replace(&mut end.outgoing, spare.outgoing);
        let doorbell = Arc::clone(&end.doorbell);
        // Fails only when the counter is full, and then the worker is awake.
        let ring: Bell = Box::new(move || drop(doorbell.write(1)));
        let mut wait = || match &mut worker {
            Some(worker) => worker.turn(false).is_ok(),
            None => end.wait_interrupt(PATIENCE),
        };
        let channel = Channel::new(incoming, outgoing, ring);
        let (mut queue, _) = Queue::connect(channel, 0, &mut wait)?;
        let list = PageList::new(4096, 0, [DATA / 4096]).context("a page")?;
        let mut scratch = ScratchPage { memory: &memory, list };
        let disk = Disk::identify(&mut queue, 0, &mut scratch, &mut wait)?;
        let disk = disk.context("the controller has no disk at LUN 0")?;
        Ok(Self { worker, queue, end, disk, memory, position: 0x9e37_79b9_7f4a_7c15 })
    }

    /// What the disk says of itself.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The guest's memory, to look at what was read: slot `n`'s data is at its `n`th 128 KiB after
    /// the first MiB.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Reads for `time`, or `most` reads if that comes first.
    pub fn read(&mut self, reads: &Reads, time: Duration, most: u64) -> anyhow::Result<Sample> {
        let Reads { block, depth, order, waiting, batches } = *reads;
        ensure!((1..=DEPTH).contains(&usize::from(depth)), "a depth is from 1 to {DEPTH}");
        ensure!(block <= MAX_BLOCK, "a block is at most {MAX_BLOCK} bytes");
        ensure!(
            block > 0 && block.is_multiple_of(self.disk.block_size),
            "{block} is no multiple of the disk's blocks of {} bytes",
            self.disk.block_size
        );
        let blocks = block / self.disk.block_size;
        let places = self.disk.blocks / u64::from(blocks);
        ensure!(places > 0, "the disk is smaller than a block");
        // Page lists for the whole run, one for each slot.
        let lists: Vec<PageList<{ words(32) }>> = (0..u64::from(depth))
            .map(|slot| {
                let page = (DATA + slot * u64::from(MAX_BLOCK)) / 4096;
                let pages = page..page + u64::from(block.div_ceil(4096));
                PageList::new(block, 0, pages).context("pages for a block")
            })
            .collect::<anyhow::Result<_>>()?;

        let position = &mut self.position;
        let mut next = || {
            let place = match order {
                Order::Sequential => *position % places,
                Order::Random => {
                    // The upper bits of a product with a fraction: no division.
                    let random = xorshift(*position);
                    ((u128::from(random) * u128::from(places)) >> 64) as u64
                }
            };
            *position = match order {
                Order::Sequential => place + 1,
                Order::Random => xorshift(*position),
            };
            Command::read(0, place * u64::from(blocks), blocks)
        };

        let (queue, end) = (&mut self.queue, &mut self.end);
        let (before, interrupts) = (queue.counters(), end.interrupt.count());
        queue.wake();
        let mut free: Vec<u16> = (0..depth).rev().collect();
        let (mut sent, mut done, mut failed) = (0u64, 0u64, None);
        let mut turns = 0u32;
        let (started, cpu) = (Instant::now(), thread_time());
        let mut over = false;
        loop {
            if !batches || free.len() == usize::from(depth) {
                while sent < most
                    && !over
                    && let Some(slot) = free.pop()
                {
                    let list = &lists[usize::from(slot)];
                    queue.submit(slot, &next(), Some(list.pages()))?;
                    sent += 1;
                }
            }
            queue.publish();
            if sent == done {
                break;
            }
            if let Some(worker) = &mut self.worker {
                worker.turn(waiting == Waiting::Sleep)?;
            }
            let ended = queue.poll(|completion| {
                if completion.outcome != Ok(block) {
                    failed = Some(completion.outcome);
                }
                free.push(completion.slot);
            })?;
            done += ended as u64;
            if ended == 0 {
                match waiting {
                    Waiting::Spin => spin_loop(),
                    Waiting::Sleep if self.worker.is_some() => {}
                    Waiting::Sleep => {
                        if queue.rest() {
                            ensure!(end.wait_interrupt(PATIENCE), "the worker does not answer");
                        }
                        queue.wake();
                    }
                }
            }
            // The clock is not free; a long turn is rare enough.
            turns = turns.wrapping_add(1);
            if waiting == Waiting::Sleep || turns.is_multiple_of(64) {
                over |= started.elapsed() >= time;
            }
        }
        let (time, cpu) = (started.elapsed(), thread_time().saturating_sub(cpu));
        if let Some(outcome) = failed {
            let bytes = outcome.context("a read failed")?;
            ensure!(bytes == block, "a read of {block} bytes got {bytes}");
        }
        let Counters { signals, .. } = queue.counters();
        Ok(Sample {
            reads: done,
            time,
            cpu,
            signals: signals - before.signals,
            interrupts: end.interrupt.count() - interrupts,
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.worker = None;
        self.end.request_stop();
        self.end.wait_closed(PATIENCE);
    }
}

fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
}

#[cfg(test)]
mod tests {
    use super::*;
    use backends::ram::RamDisk;

    #[test]
    fn reads_are_made_and_counted() {
        let disk = || Arc::new(RamDisk::new(1 << 20).unwrap());
        let mut rig = Rig::new(disk(), None).unwrap();
        let mut inline = Rig::inline(disk()).unwrap();
        for (order, waiting, batches, depth, block) in [
            (Order::Sequential, Waiting::Sleep, false, 1, 512),
            (Order::Random, Waiting::Sleep, false, 32, 4096),
            (Order::Random, Waiting::Spin, true, 16, 4096),
            (Order::Sequential, Waiting::Spin, false, 4, MAX_BLOCK),
        ] {
            let reads = Reads { block, depth, order, waiting, batches };
            let sample = rig.read(&reads, Duration::from_secs(20), 100).unwrap();
            assert_eq!(sample.reads, 100);
            let reads = Reads { waiting: Waiting::Spin, ..reads };
            let sample = inline.read(&reads, Duration::from_secs(20), 100).unwrap();
            assert_eq!((sample.reads, sample.signals, sample.interrupts), (100, 0, 0));
            assert!(sample.rate() > 0.0);
        }
        let reads = Reads {
            block: 1000,
            depth: 1,
            order: Order::Random,
            waiting: Waiting::Sleep,
            batches: false,
        };
        assert!(rig.read(&reads, Duration::ZERO, 1).is_err());
    }
}
