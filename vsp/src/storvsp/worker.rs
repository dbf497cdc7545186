//! The worker of one channel: a thread that sleeps in its own io_uring, in which the guest's
//! doorbell and the disks complete alike.
//!
//! Its turn: take what packets there are, enter the kernel once for all of them, or for every two
//! where that costs little, answer what has ended, publish once, interrupt at most once. While it
//! is awake the guest's signals are masked; before it sleeps it spins for a moment if the next
//! packet is near.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backends::uring::{self, Tag, Token, Uring};
use thiserror::Error;
use vmbus::packet::{self, PacketFlags, PacketKind};
use vmbus::ring::{PushError, RingError};
use vmbus::vstor::VstorPacket;
use vmbus_server::Channel;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::Luns;
use super::engine::Engine;
use super::handshake::Grants;
use super::pacing::Pacer;
use crate::vigil::system_call_cost;

/// Room for the longest packet that makes sense: the pages of the longest transfer, each in a
/// range of its own, and a request.
const LONGEST_PACKET: usize = 16 * 1024;

/// From so many bytes on, a batch is handed over as it is.
const BATCH_VOLUME: u64 = 64 << 10;

/// So many operations go to the kernel at once where system calls are cheap. A file system takes
/// about 3 us for each; from the third on, it has the device wait for the batch's last.
const HASTY_BATCH: usize = 2;

/// As much as a file system takes for an operation. Where two system calls cost more, a batch is
/// handed over whole.
const OPERATION_COST: Duration = Duration::from_micros(3);

/// Bytes of the outgoing ring that one answer takes.
const ANSWER: u32 = packet::ring_size(size_of::<VstorPacket>()) as u32;

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
    /// The host's io_uring failed.
    #[error("io_uring failed")]
    Host(#[from] io::Error),
}

/// What belongs to one channel. Fields are dropped in order: the io_uring first, so that nothing
/// reaches guest memory any more when the channel goes.
pub(super) struct Worker {
    uring: Uring,
    engine: Engine,
    channel: Channel,
    doorbell: uring::Doorbell<Arc<EventFd>>,
    pacer: Pacer,
    /// Operations that are handed over as soon as there are so many.
    batch: usize,
    /// Whether there are processors to spare for spinning.
    may_spin: bool,
    /// Whether there was room for another packet when the last one was taken.
    can_take: bool,
    started: Instant,
    /// How many of the io_uring's system calls the channel's counters know of.
    enters: u64,
    buffer: Box<[u8]>,
}

impl Worker {
    /// Made in the thread that will run it, as an io_uring belongs to its thread.
    pub(super) fn new(
        channel: Channel,
        luns: &Arc<Luns>,
        grants: Grants,
        may_spin: bool,
    ) -> io::Result<Self> {
        let mut uring = Uring::new(u32::from(Engine::DEPTH))?;
        let primary = channel.subchannel == 0;
        let engine = Engine::new(channel.memory.clone(), luns, grants, primary, &mut uring)?;
        let doorbell = uring::Doorbell::new(Arc::clone(&channel.doorbell), DOORBELL);
        doorbell.arm(&mut uring)?;
        let system_calls = system_call_cost()?;
        let cheap = system_calls < OPERATION_COST;
        Ok(Self {
            uring,
            engine,
            doorbell,
            pacer: Pacer::new(system_calls),
            batch: if cheap { HASTY_BATCH } else { usize::MAX },
            may_spin,
            can_take: true,
            started: Instant::now(),
            enters: 0,
            buffer: vec![0; LONGEST_PACKET].into_boxed_slice(),
            channel,
        })
    }

    /// Asks the guest not to signal.
    pub(super) fn stay_awake(&mut self) {
        self.channel.mask();
    }

    /// One turn for a caller who lends its thread: takes what packets there are, waits for no company,
    /// answers what has ended. If it `may_sleep` and has nothing to answer, it sleeps until a disk is
    /// done, should one be busy. Returns whether there was anything to do.
    pub(super) fn turn(&mut self, may_sleep: bool) -> Result<bool, Fault> {
        let gathered = self.gather(false)?;
        self.engine.settle(&mut self.uring);
        let under_way = self.engine.in_flight();
        let more = self.can_take && self.channel.incoming.has_data();
        if may_sleep && !more && under_way > 0 && self.engine.owed() == under_way {
            self.uring.submit_and_wait(1)?;
        } else {
            self.uring.submit()?;
        }
        Ok(self.answer()? + gathered > 0)
    }

    /// Serves the channel until it is to be closed and everything under way has ended.
    pub(super) fn run(&mut self) -> Result<(), Fault> {
        self.stay_awake();
        loop {
            let stopping = self.channel.stop_requested();
            if stopping {
                self.engine.stop();
            }
            let gathered = if stopping { 0 } else { self.gather(true)? };
            self.uring.submit()?;
            let answered = self.answer()?;
            if stopping && self.engine.in_flight() == 0 {
                return Ok(());
            }
            if gathered == 0 && answered == 0 && !self.spin() {
                self.sleep(stopping)?;
            }
        }
    }

    /// Takes packets from the ring, if it `may_wait` for company then where that pays. Returns how
    /// many.
    ///
    /// Large requests go on at once and few at a time: the kernel may well move their data within
    /// the system call that hands them over, and the guest should have the first while it does so
    /// for the next.
    fn gather(&mut self, may_wait: bool) -> Result<u32, Fault> {
        let mut gathered = 0;
        let mut volume = 0;
        self.engine.take_volume();
        loop {
            let mut room = self.room()?;
            let mut taken = 0;
            while room > 0
                && volume < BATCH_VOLUME
                && let Some(packet) = self.channel.receive(&mut self.buffer)?
            {
                let subchannels = self.engine.take(&packet, &mut self.uring);
                if subchannels > 0 {
                    self.channel.offer_subchannels(subchannels);
                }
                room -= 1;
                taken += 1;
                volume += self.engine.take_volume();
                if self.uring.collected() >= self.batch {
                    self.uring.submit()?;
                }
            }
            gathered += taken;
            if taken > 0 && may_wait {
                self.pacer.arrived(self.started.elapsed(), taken);
            }
            self.can_take = room > 0;
            if room == 0 || volume >= BATCH_VOLUME || !may_wait {
                break;
            }
            let Some(until) = self.pacer.hold_until(gathered) else { break };
            if !self.wait_for_packet(until) {
                break;
            }
        }
        if gathered > 0 && may_wait {
            self.pacer.handed_on(gathered);
        }
        Ok(gathered)
    }

    /// How many packets can be taken such that each can be answered.
    fn room(&mut self) -> Result<u32, RingError> {
        let answers = self.channel.outgoing.free()? / ANSWER;
        let owed = u32::try_from(self.engine.owed()).unwrap_or(u32::MAX);
        Ok(answers.saturating_sub(owed).min(self.engine.free_slots()))
    }

    /// Spins until a packet is there (true) or it is `until`.
    fn wait_for_packet(&mut self, until: Duration) -> bool {
        while self.started.elapsed() < until {
            if self.channel.incoming.has_data() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Sends an answer for everything that has ended. Returns how many.
    fn answer(&mut self) -> Result<u32, Fault> {
        while let Some(cqe) = self.uring.next() {
            if cqe.token == DOORBELL {
                self.doorbell.heard(&cqe, &mut self.uring)?;
                self.channel.counters.signals.add(1);
            } else {
                self.engine.complete(&cqe, &mut self.uring);
            }
        }
        let mut answered = 0;
        self.engine.settle(&mut self.uring);
        for (transaction_id, packet) in self.engine.answers() {
            self.channel.outgoing.push(
                PacketKind::Completion,
                PacketFlags::NONE,
                transaction_id,
                &[packet.as_bytes()],
            )?;
            answered += 1;
        }
        let enters = self.uring.counters().enters;
        self.channel.counters.enters.add(enters - self.enters);
        self.enters = enters;
        if answered > 0 {
            self.channel.counters.packets_out.add(u64::from(answered));
            self.channel.publish();
        }
        Ok(answered)
    }

    /// Looks for work a little longer, if some is expected soon. Returns whether there is any.
    fn spin(&mut self) -> bool {
        let Some(until) = self.pacer.spin_until().filter(|_| self.may_spin) else { return false };
        while self.started.elapsed() < until {
            if (self.can_take && self.channel.incoming.has_data()) || self.uring.is_ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Sleeps until the guest signals, a disk is done, or the channel is to be closed.
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
        if !stopping && self.engine.free_slots() > 0 {
            if self.room()? > 0 {
                if !self.channel.unmask() {
                    self.channel.mask();
                    return Ok(());
                }
            } else {
                // The guest has to take its answers first.
                let wanted = ANSWER.saturating_mul(self.engine.owed() as u32 + 1);
                if self.channel.outgoing.set_pending_send(wanted)? {
                    self.channel.outgoing.set_pending_send(0)?;
                    return Ok(());
                }
                wants_room = true;
            }
        }
        // Otherwise only a disk can bring the worker on.
        self.uring.submit_and_wait(1)?;
        if wants_room {
            // Who is awake looks by itself, and each signal costs the guest a hypercall.
            self.channel.outgoing.set_pending_send(0)?;
        }
        self.channel.mask();
        self.pacer.slept();
        Ok(())
    }
}
