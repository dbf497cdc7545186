//! The worker of one channel: a thread that sleeps in its own io_uring, in which the guest's
//! doorbell and the network complete alike.
//!
//! Its turn: take what packets there are, offer slots to the network, enter the kernel once for
//! all of it, put answers and received frames into the ring, publish once, interrupt at most once.
//! While it is awake the guest's signals are masked.

use std::io;
use std::sync::Arc;

use backends::uring::{self, Tag, Token, Uring};
use thiserror::Error;
use vmbus::ring::{PushError, RingError};
use vmbus_server::Channel;
use vmm_sys_util::eventfd::EventFd;

use super::engine::{ANSWER, DELIVERY, Engine};

/// Room for the longest packet that makes sense: some frames, a page each time they cross one.
const LONGEST_PACKET: usize = 16 * 1024;

/// Operations between two enters.
const ENTRIES: u32 = 512;

/// Packets of a turn. The network shall have them before more are looked for.
const BATCH: u32 = 64;

/// The doorbell among the worker's own operations.
const DOORBELL: Token = Token::new(Tag::WORKER, 0);

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
    /// How many of the io_uring's system calls the channel's counters know of.
    enters: u64,
    buffer: Box<[u8]>,
}

impl Worker {
    /// Made in the thread that will run it, as an io_uring belongs to its thread.
    pub(super) fn new(channel: Channel, mut engine: Engine) -> io::Result<Self> {
        let mut uring = Uring::new(ENTRIES)?;
        let doorbell = uring::Doorbell::new(Arc::clone(&channel.doorbell), DOORBELL);
        doorbell.arm(&mut uring)?;
        if channel.subchannel > 0 {
            engine.open_queue(&mut uring)?;
        }
        let buffer = vec![0; LONGEST_PACKET].into_boxed_slice();
        Ok(Self { uring, engine, channel, doorbell, enters: 0, buffer })
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
            self.engine.turn(&mut self.uring);
            self.uring.submit()?;
            let settled = self.settle()?;
            if stopping && self.engine.in_flight() == 0 {
                return Ok(());
            }
            let pushed = self.deliver()?;
            if gathered == 0 && settled == 0 && pushed == 0 {
                self.sleep(stopping)?;
            }
        }
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
        let pushed = self.engine.deliver(&mut self.channel)?;
        if pushed > 0 {
            self.channel.counters.packets_out.add(u64::from(pushed));
            self.channel.publish();
        }
        Ok(pushed)
    }

    /// Sleeps until the guest signals, the network has something, or the channel is to be closed.
    fn sleep(&mut self, stopping: bool) -> Result<(), Fault> {
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
        }
        self.channel.mask();
        if wants_room {
            self.channel.outgoing.set_pending_send(0)?;
        }
        Ok(())
    }
}
