//! The worker of one channel: a thread that sleeps in its own io_uring, in which the guest's
//! doorbell and the network complete alike.
//!
//! Its turn: take what packets there are, offer slots to the network, enter the kernel once for
//! all of it, put answers and received frames into the ring, publish once, interrupt at most once.
//! While it is awake the guest's signals are masked.
//!
//! Before it sleeps it keeps [`Vigil`] if there is something to come. There are two, since the guest's
//! completion of a delivery is near even if the next frame is not: without the first, each frame
//! that came alone would cost the guest a signal, right where it has just received it.
//!
//! That frames have left is news without hurry: the guest wants their memory back, and nothing else.
//! As long as more of them are expected, such answers wait for each other, a few at a time.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use backends::uring::{self, Tag, Token, Uring};
use thiserror::Error;
use vmbus::ring::{PushError, RingError};
use vmbus_server::Channel;
use vmm_sys_util::eventfd::EventFd;

use super::engine::{ANSWER, DELIVERY, Engine};
use crate::precedence::Precedence;
use crate::vigil::{Vigil, system_call_cost};

/// Room for the longest packet that makes sense: some frames, a page each time they cross one.
const LONGEST_PACKET: usize = 16 * 1024;

/// Operations between two enters.
const ENTRIES: u32 = 512;

/// Packets of a turn. The network shall have them before more are looked for.
const BATCH: u32 = 64;

/// So many bytes of frames are a batch that is not to be taken apart.
const BATCH_BYTES: u64 = 16 * 1024;

/// The most answers that wait for each other, and the most bytes of frames that they are about: who
/// sends much at a time may wait for its memory.
const HELD_ANSWERS: u32 = 16;
const HELD_BYTES: u64 = 16 * 1024;

/// How much longer than for a packet one waits for a completion: until then the guest has to take an
/// interrupt, and the frame its way through the guest's network.
const OWED_PATIENCE: u32 = 4;

/// The doorbell among the worker's own operations.
const DOORBELL: Token = Token::new(Tag::WORKER, 0);

/// What other channels wake it with.
const BELL: Token = Token::new(Tag::WORKER, 1);

/// Why a worker gave its channel up.
#[derive(Debug, Error)]
pub(super) enum Fault {
    /// The guest has broken the ring.
    #[error("the guest broke its ring")]
    Ring(#[from] RingError),
    /// The guest took back room that the ring had.
    #[error("the guest broke the ring to it")]
    Push(#[from] PushError),
    /// The host's io_uring or network failed.
    #[error("the host failed")]
    Host(#[from] io::Error),
}

/// What belongs to one channel. Fields are dropped in order: the io_uring first, so that nothing
/// reaches guest memory any more when the channel goes.
pub(super) struct Worker {
    uring: Uring,
    engine: Engine,
    channel: Channel,
    doorbell: uring::Doorbell<Arc<EventFd>>,
    bell: Option<uring::Doorbell<Arc<EventFd>>>,
    /// For what the guest owes: completions of deliveries.
    owed: Vigil,
    /// For what anybody may send.
    unasked: Vigil,
    /// Whether there are processors to spare for staying awake.
    may_spin: bool,
    /// For batches on their way to the network.
    precedence: Precedence,
    started: Instant,
    /// When there was last something to do, since `started`.
    last: Duration,
    /// Whether the guest then owed completions.
    waits_for_owed: bool,
    /// Since when answers have been held.
    held_since: Option<Duration>,
    /// How many of the io_uring's system calls the channel's counters know of.
    enters: u64,
    buffer: Box<[u8]>,
}

impl Worker {
    /// Made in the thread that will run it, as an io_uring belongs to its thread.
    pub(super) fn new(channel: Channel, mut engine: Engine, may_spin: bool) -> io::Result<Self> {
        let mut uring = Uring::new(ENTRIES)?;
        let doorbell = uring::Doorbell::new(Arc::clone(&channel.doorbell), DOORBELL);
        doorbell.arm(&mut uring)?;
        let bell = engine.bell().map(|event| uring::Doorbell::new(event, BELL));
        bell.iter().try_for_each(|bell| bell.arm(&mut uring))?;
        if channel.subchannel > 0 {
            engine.open_queue(&mut uring)?;
        }
        let unit = system_call_cost()?;
        Ok(Self {
            uring,
            engine,
            channel,
            doorbell,
            bell,
            owed: Vigil::new(unit * OWED_PATIENCE),
            unasked: Vigil::new(unit),
            may_spin,
            precedence: Precedence::new(),
            started: Instant::now(),
            last: Duration::ZERO,
            waits_for_owed: false,
            held_since: None,
            enters: 0,
            buffer: vec![0; LONGEST_PACKET].into_boxed_slice(),
        })
    }

    /// Serves the channel until it is to be closed and the network has given all buffers back.
    pub(super) fn run(&mut self) -> Result<(), Fault> {
        self.channel.mask();
        let mut recalled = false;
        loop {
            let stopping = self.channel.stop_requested();
            if stopping && !recalled {
                self.engine.recall(&mut self.uring);
                recalled = true;
            }
            let gathered = if stopping { 0 } else { self.gather()? };
            let arrived = self.engine.turn(&mut self.uring);
            // What does not enter the kernel wakes nobody there.
            let is_batch = self.uring.collected() > 0 && self.engine.bytes_sending() >= BATCH_BYTES;
            let ahead = if is_batch { self.precedence.take() } else { None };
            self.uring.submit()?;
            let settled = self.settle()? + arrived;
            if stopping && self.engine.in_flight() == 0 {
                return Ok(());
            }
            if gathered + settled > 0 {
                let gap = self.started.elapsed().saturating_sub(self.last);
                self.vigil().arrived(gap);
            }
            let pushed = if self.holds_answers() { 0 } else { self.deliver()? };
            drop(ahead);
            if gathered + settled + pushed > 0 {
                self.last = self.started.elapsed();
                self.waits_for_owed = self.engine.is_owed_completions();
            } else if !self.spin()? {
                if self.held_since.is_some() {
                    self.deliver()?;
                }
                self.sleep(stopping)?;
            }
        }
    }

    /// For what there was to wait when there was last something to do.
    fn vigil(&mut self) -> &mut Vigil {
        if self.waits_for_owed { &mut self.owed } else { &mut self.unasked }
    }

    /// Whether the answers that there are, if there is nothing else, shall wait for others.
    fn holds_answers(&mut self) -> bool {
        let (count, bytes) = self.engine.answers();
        let few = count > 0 && count < HELD_ANSWERS && bytes < HELD_BYTES;
        if !few || !self.may_spin || self.engine.has_deliveries() || self.vigil().wait().is_none() {
            return false;
        }
        let now = self.started.elapsed();
        let since = *self.held_since.get_or_insert(now);
        now.saturating_sub(since) < self.unasked.patience()
    }

    /// Looks for work a little longer, if some is expected soon. Returns whether there is any.
    fn spin(&mut self) -> Result<bool, Fault> {
        let Some(wait) = self.vigil().wait().filter(|_| self.may_spin) else { return Ok(false) };
        let until = self.last + wait;
        let can_take = self.room()? > 0;
        while self.started.elapsed() < until {
            if (can_take && self.channel.incoming.has_data())
                || self.uring.is_ready()
                || self.engine.is_ready()
            {
                return Ok(true);
            }
            // Whoever else can run here has something to do, and may be the one that is waited for.
            thread::yield_now();
        }
        Ok(false)
    }

    /// Keeps the guest's signals masked for good: somebody sees to it that there are turns.
    pub(super) fn stay_awake(&mut self) {
        self.channel.mask();
    }

    /// One turn, without sleeping at its end. Returns whether there was anything to do.
    pub(super) fn turn(&mut self) -> Result<bool, Fault> {
        let gathered = self.gather()?;
        let arrived = self.engine.turn(&mut self.uring);
        self.uring.submit()?;
        let settled = self.settle()? + arrived;
        let pushed = self.deliver()?;
        if gathered + settled + pushed > 0 {
            return Ok(true);
        }
        // Room that was read is given back before there is a pause at the latest.
        if self.channel.incoming.publish() {
            self.channel.signal();
        }
        Ok(false)
    }

    /// Takes packets from the ring. Returns how many.
    fn gather(&mut self) -> Result<u32, Fault> {
        let most = self.room()?.min(BATCH);
        let mut taken = 0;
        while taken < most
            && self.engine.room() > 0
            && let Some(packet) = self.channel.receive(&mut self.buffer)?
        {
            self.engine.take(&packet, &self.channel, &mut self.uring)?;
            taken += 1;
        }
        Ok(taken)
    }

    /// How many packets can be taken such that each can be answered.
    fn room(&mut self) -> Result<u32, RingError> {
        let answers = self.channel.outgoing.free()? / ANSWER;
        Ok(answers.saturating_sub(self.engine.owed()).min(self.engine.room()))
    }

    /// Takes what the kernel and the network have done. Returns how much.
    fn settle(&mut self) -> Result<u32, Fault> {
        while let Some(cqe) = self.uring.next() {
            if cqe.token == DOORBELL {
                self.doorbell.heard(&cqe, &mut self.uring)?;
                self.channel.counters.signals.add(1);
            } else if cqe.token == BELL {
                if let Some(bell) = &self.bell {
                    bell.heard(&cqe, &mut self.uring)?;
                }
            } else {
                self.engine.complete(&cqe, &mut self.uring);
            }
        }
        let enters = self.uring.counters().enters;
        self.channel.counters.enters.add(enters - self.enters);
        self.enters = enters;
        Ok(self.engine.settle())
    }

    /// Sends the guest what there is for it. Returns how many packets.
    fn deliver(&mut self) -> Result<u32, Fault> {
        self.held_since = None;
        let pushed = self.engine.deliver(&mut self.channel)?;
        if pushed > 0 {
            self.channel.counters.packets_out.add(u64::from(pushed));
            self.channel.publish();
        }
        Ok(pushed)
    }

    /// Sleeps until the guest signals, the network has something, or the channel is to be closed.
    fn sleep(&mut self, stopping: bool) -> Result<(), Fault> {
        // The doorbell that told of the stop may have been heard in this turn.
        if stopping != self.channel.stop_requested() {
            return Ok(());
        }
        // Room that was read is given back before sleeping at the latest.
        if self.channel.incoming.publish() {
            self.channel.signal();
        }
        let mut wants_room = false;
        if !stopping {
            let can_take = self.room()? > 0;
            if can_take && !self.channel.unmask() {
                self.channel.mask();
                return Ok(());
            }
            // Unless it is the network that has to move first, the guest has to: what waits needs
            // room in the ring to it.
            if self.engine.has_deliveries() || (!can_take && self.engine.room() > 0) {
                wants_room = true;
                let owed = self.engine.owed().saturating_add(1);
                let wanted = ANSWER.saturating_mul(owed).saturating_add(DELIVERY);
                if self.channel.outgoing.set_pending_send(wanted)? {
                    self.channel.outgoing.set_pending_send(0)?;
                    self.channel.mask();
                    return Ok(());
                }
            }
        }
        if self.engine.prepare_to_sleep() {
            self.uring.submit_and_wait(1)?;
            self.vigil().slept();
        }
        self.channel.mask();
        if wants_room {
            self.channel.outgoing.set_pending_send(0)?;
        }
        Ok(())
    }
}
