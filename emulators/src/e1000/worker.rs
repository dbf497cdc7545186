//! The worker: a thread with an io_uring of its own, in which the guest's doorbell and the network
//! complete alike. It moves frames while the processors move registers.
//!
//! Its turn: look at the registers, take frames to send, hand on those that have come, tell the
//! registers, enter the kernel once for all of it. Whoever takes a ring away asks it to leave the guest's
//! memory alone ([`Registers::halts`]) and waits for the answer: that comes at the end of a turn that knew
//! of it, and, if frames were to be dropped, when the network has none any more.
//!
//! [`Registers::halts`]: super::registers::Registers::halts

use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use backends::net::{Completion, Completions, Network, Queue, QueueConfig};
use backends::uring::{Doorbell, Tag, Token, Uring};
use hypervisor::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::bits::cause;
use super::filter::Settings;
use super::inside::{Ends, Inside};
use super::receive::{self, Receive};
use super::registers::Ring;
use super::transmit::{self, DESCRIPTORS, Limits, Transmit, Way};
use super::{Shared, lock};

const DOORBELL: Token = Token::new(Tag::WORKER, 0);
/// The queue's operations in the worker's ring.
const QUEUE: Tag = Tag(1);
/// Operations between two enters.
const ENTRIES: u32 = 512;

/// Fields are dropped in order: the io_uring and the queue before what their buffers point to.
pub(super) struct Worker {
    uring: Uring,
    queue: Box<dyn Queue>,
    inside: Option<Inside>,
    transmit: Transmit,
    receive: Receive,
    memory: GuestMemory,
    shared: Arc<Shared>,
    doorbell: Doorbell<Arc<EventFd>>,
    done: Completions,
    limits: Limits,
    settings: Settings,
    settings_epoch: u32,
    /// What the registers have been seen to change.
    changes: u32,
    /// Frames are sent no more until the network has none any more.
    dropping: bool,
    /// Frames up to this tail go inside.
    looped: Option<u32>,
    /// How many of the io_uring's system calls are counted.
    enters: u64,
}

impl Worker {
    /// Made in the thread that will run it, as an io_uring belongs to its thread.
    pub(super) fn new(
        shared: Arc<Shared>,
        memory: GuestMemory,
        network: &dyn Network,
        mtu: u16,
    ) -> io::Result<Self> {
        let mut uring = Uring::new(ENTRIES)?;
        let doorbell = Doorbell::new(Arc::clone(&shared.doorbell), DOORBELL);
        doorbell.arm(&mut uring)?;
        let (sends, receives) = (transmit::FRAMES, receive::BUFFERS);
        let link = network.link();
        // Segments are cut and checksums made here, while frames are copied.
        network.set_receive_offloads(link.gives)?;
        let config = QueueConfig { index: 0, tag: QUEUE, sends, receives };
        let queue = network.queue(config, &mut uring)?;
        let settings = lock(&shared.registers).settings().clone();
        let limits =
            Limits { mtu, takes: link.takes, tags: settings.tags, tag_type: settings.tag_type };
        Ok(Self {
            uring,
            queue,
            inside: None,
            transmit: Transmit::new(),
            receive: Receive::new(),
            memory,
            shared,
            doorbell,
            done: Completions::with_capacity(usize::from(sends) + usize::from(receives) + 1),
            limits,
            settings,
            // Not that of the registers, so that the first turn takes them.
            settings_epoch: u32::MAX,
            changes: 0,
            dropping: false,
            looped: None,
            enters: 0,
        })
    }

    /// Serves the NIC until it is to stop and the network has given all buffers back.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let _serving = Serving::begin(&self.shared);
        let mut recalled = false;
        loop {
            let stopping = self.shared.stop.load(Ordering::Acquire);
            let mut progress = 0;
            if !stopping {
                progress += self.turn();
            } else if !recalled {
                recalled = true;
                self.queue.recall(&mut self.uring, &mut self.done);
                self.queue.drop_frames(&mut self.uring, &mut self.done);
            }
            progress += self.exchange()?;
            if stopping && self.queue.in_flight() == 0 {
                return Ok(());
            }
            // The doorbell that told of the stop may have been heard in this turn.
            if progress == 0 && stopping == self.shared.stop.load(Ordering::Acquire) {
                self.sleep(stopping)?;
            }
        }
    }

    /// All that [`Self::run`] does between two looks at whether to stop or to sleep. Returns how much
    /// was done.
    pub(super) fn step(&mut self) -> io::Result<u32> {
        Ok(self.turn() + self.exchange()?)
    }

    /// Ends a batch, and takes what has come of it and of earlier ones.
    fn exchange(&mut self) -> io::Result<u32> {
        self.queue.turn(&mut self.uring, &mut self.done);
        self.uring.submit()?;
        self.hear()?;
        Ok(settle(&mut self.done, &mut self.transmit, &mut self.receive, &self.shared))
    }

    /// Moves frames between the guest's rings and the network. Returns how much was done.
    fn turn(&mut self) -> u32 {
        let shared = Arc::clone(&self.shared);
        let mut registers = lock(&shared.registers);
        self.changes = registers.changes;
        if self.settings_epoch != registers.settings_epoch {
            self.settings_epoch = registers.settings_epoch;
            self.settings.clone_from(registers.settings());
            self.limits.tags = self.settings.tags;
            self.limits.tag_type = self.settings.tag_type;
        }
        let master = shared.decode.is_bus_master();
        let (sends, receives) = (registers.transmits() && master, registers.receives() && master);
        let (out, into) = (registers.transmit, registers.receive);
        let (halts, drops) = (registers.halts(), mem::take(&mut registers.drop_frames));
        let loops = registers.loops();
        let looped = registers.looped.take();
        drop(registers);

        let mut progress = 0;
        if self.transmit.follow(&out) {
            self.looped = None;
        }
        self.looped = looped.or(self.looped);
        if drops {
            self.transmit.halt();
            self.dropping = true;
            self.queue.drop_frames(&mut self.uring, &mut self.done);
            progress += settle(&mut self.done, &mut self.transmit, &mut self.receive, &shared);
        }
        self.dropping &= self.transmit.under_way() > 0;
        let mut head = self.transmit.write_back(&out, &self.memory);
        self.receive.follow(&into);
        if sends && !self.dropping {
            if let Some(tail) = self.looped {
                let taken =
                    self.loop_back(&Ring { tail, ..out }, receives.then_some(&into), &mut head);
                // There may be more than goes into one turn.
                self.looped = self.looped.filter(|_| taken > 0);
                progress += taken.max(1);
            } else if loops {
                progress += self.loop_back(&out, receives.then_some(&into), &mut head);
            } else {
                let mut way =
                    Way { queue: &mut *self.queue, uring: &mut self.uring, done: &mut self.done };
                let (limits, memory) = (&self.limits, &self.memory);
                progress += self.transmit.run(&out, DESCRIPTORS, limits, memory, &mut way);
                // What has left at once, as on a switch.
                progress += settle(&mut self.done, &mut self.transmit, &mut self.receive, &shared);
                head = self.transmit.write_back(&out, &self.memory).or(head);
            }
        }
        self.receive.listen(loops);
        if receives {
            progress += self.receive.run(&into, &self.settings, &self.memory);
        } else {
            self.receive.discard();
        }
        let mut way = Way { queue: &mut *self.queue, uring: &mut self.uring, done: &mut self.done };
        self.receive.offer(&mut way);

        self.tell(out.epoch, head, into.epoch, into.tail, halts);
        progress
    }

    /// Sends what is in the ring to the NIC itself. Returns how much was done.
    fn loop_back(&mut self, out: &Ring, into: Option<&Ring>, head: &mut Option<u32>) -> u32 {
        let Self { uring, inside, transmit, receive, memory, limits, settings, .. } = self;
        if inside.is_none() {
            // It needs nothing that could be missing.
            *inside = Inside::new(uring).ok();
        }
        let Some(inside) = inside else { return 0 };
        receive.listen(true);
        let mut ends = Ends { transmit, out, limits, receive, into, settings, memory };
        let (taken, moved) = inside.run(&mut ends, uring);
        *head = moved.or(*head);
        taken
    }

    /// Tells the registers what has been done, and those who wait that the guest's memory has been left
    /// alone as it was asked for the `halts`th time.
    fn tell(
        &mut self,
        sent_epoch: u32,
        sent_head: Option<u32>,
        into_epoch: u32,
        into_tail: u32,
        halts: u32,
    ) {
        let received_head = self.receive.head();
        let (sent, received) = (&mut self.transmit.tally, &mut self.receive.tally);
        let counters = &self.shared.counters;
        let mut registers = lock(&self.shared.registers);
        let registers = &mut *registers;
        let now = self.shared.now();
        if registers.transmit.epoch == sent_epoch
            && let Some(head) = sent_head
        {
            registers.transmit.head = head;
            if sent.report_now || sent.report_later {
                registers.interrupts.sent(!sent.report_now, now);
            }
            if registers.transmit.head == registers.transmit.tail {
                registers.interrupts.add(cause::TXQE);
            }
        }
        if registers.receive.epoch == into_epoch {
            registers.receive.head = received_head;
            if !received.frames.is_empty() || received.lost > 0 {
                registers.interrupts.received(now);
            }
            if received.few_left {
                registers.interrupts.add(cause::RXDMT0);
            }
        }
        // Descriptors that have come meanwhile are a reason not to sleep.
        registers.starved = received.starved;
        if received.starved && registers.receive.tail != into_tail {
            registers.changes = registers.changes.wrapping_add(1);
        }
        for (len, to) in sent.frames.drain(..) {
            registers.statistics.sent(len, to);
            counters.sent_bytes.add(len.into());
            counters.sent.add(1);
        }
        (0..sent.cut).for_each(|_| registers.statistics.cut());
        counters.malformed.add(sent.malformed.into());
        for (len, to) in received.frames.drain(..) {
            registers.statistics.received(len, to);
            counters.received_bytes.add(len.into());
            counters.received.add(1);
        }
        (0..received.lost).for_each(|_| registers.statistics.lost());
        (0..received.too_long).for_each(|_| registers.statistics.too_long());
        if received.starved {
            registers.statistics.waits();
        }
        counters.lost.add(received.lost.into());
        counters.unwanted.add(u64::from(received.unwanted) + u64::from(received.too_long));
        sent.clear();
        received.clear();
        if !self.dropping && registers.halted != halts {
            registers.halted = halts;
            self.shared.quiet.notify_all();
        }
        self.shared.show(registers, now);
    }

    /// Takes what the kernel has done.
    fn hear(&mut self) -> io::Result<()> {
        while let Some(cqe) = self.uring.next() {
            if cqe.token == DOORBELL {
                self.doorbell.heard(&cqe, &mut self.uring)?;
                self.shared.counters.signals.add(1);
            } else {
                self.queue.complete(&cqe, &mut self.uring, &mut self.done);
            }
        }
        let enters = self.uring.counters().enters;
        self.shared.counters.enters.add(enters - self.enters);
        self.enters = enters;
        Ok(())
    }

    /// Sleeps until something has happened, or an interrupt is due.
    fn sleep(&mut self, stopping: bool) -> io::Result<()> {
        let now = self.shared.now();
        let deadline = {
            let mut registers = lock(&self.shared.registers);
            registers.interrupts.tick(now);
            self.shared.show(&mut registers, now);
            let deadline = registers.interrupts.deadline();
            if !stopping && !registers.sleep(self.changes, deadline.unwrap_or(u64::MAX)) {
                return Ok(());
            }
            deadline
        };
        if self.queue.prepare_to_sleep() {
            match deadline {
                Some(deadline) if !stopping => {
                    let timeout = Duration::from_nanos(deadline.saturating_sub(now).max(1));
                    self.uring.submit_and_wait_timeout(1, timeout)?;
                }
                _ => self.uring.submit_and_wait(1)?,
            }
        }
        lock(&self.shared.registers).awake();
        Ok(())
    }
}

/// For as long as it lives, accesses may wait for the worker.
struct Serving(Arc<Shared>);

impl Serving {
    fn begin(shared: &Arc<Shared>) -> Self {
        lock(&shared.registers).served = true;
        Self(Arc::clone(shared))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        lock(&self.0.registers).served = false;
        self.0.quiet.notify_all();
    }
}

/// Takes what has happened on the network. Returns how much that was.
fn settle(
    done: &mut Completions,
    transmit: &mut Transmit,
    receive: &mut Receive,
    shared: &Shared,
) -> u32 {
    let mut count = 0;
    while let Some(completion) = done.pop() {
        count += 1;
        match completion {
            Completion::Sent { id, result } => {
                transmit.sent(id);
                if result.is_err() {
                    shared.counters.send_drops.add(1);
                }
            }
            Completion::Received { id, len, offload } => receive.arrived(id, len, offload),
            Completion::Returned { id } => receive.returned(id),
            Completion::Link(up) => {
                let mut registers = lock(&shared.registers);
                registers.plug(up);
                shared.show(&mut registers, shared.now());
            }
        }
    }
    count
}
