//! The client of a synthetic SCSI controller.
//!
//! ```text
//!   Queue::connect          the handshake, on the controller's first channel
//!     ├─ Disk::identify     is there a disk, how large, which
//!     └─ Queue::subchannel  one more queue for each sub-channel that was offered
//! ```
//!
//! A [`Queue`] has `DEPTH` slots. The caller decides which slot a request takes, and so has its
//! own table of what each is for; the queue knows which are in flight. Data lies in [`PageList`]s
//! that the caller puts together once. A turn is: submit some, [publish](Queue::publish) once,
//! [poll](Queue::poll) for what has ended. Nothing here waits, allocates or copies data.
//!
//! ```
//! # use vsc::{Doorbell, storvsc::{Command, Fault, PageList, Queue, SubmitError, words}};
//! # use vmbus::mapped::RingMemory;
//! /// Reads `pages.len()` pages, one block of 4 KiB each, with two requests in flight.
//! fn read<M: RingMemory, D: Doorbell>(
//!     queue: &mut Queue<M, D, 2>,
//!     pages: &[u64],
//!     mut sleep: impl FnMut(),
//! ) -> Result<(), SubmitError> {
//!     let mut left = (0..).zip(pages);
//!     let (mut free, mut done) = (0b11u8, 0);
//!     while done < pages.len() {
//!         while free != 0 && let Some((block, page)) = left.next() {
//!             let slot = free.trailing_zeros() as u16;
//!             let data = PageList::<{ words(1) }>::new(4096, 0, [*page]).expect("one page");
//!             queue.submit(slot, &Command::read(0, block * 8, 8), Some(data.pages()))?;
//!             free &= !(1 << slot);
//!         }
//!         queue.publish();
//!         let ended = queue.poll(|completion| {
//!             assert_eq!(completion.outcome, Ok(4096));
//!             free |= 1 << completion.slot;
//!             done += 1;
//!         })?;
//!         if ended == 0 {
//!             if queue.rest() {
//!                 sleep();
//!             }
//!             queue.wake();
//!         }
//!     }
//!     Ok(())
//! }
//! ```

mod command;
mod disk;
mod handshake;

use thiserror::Error;
use vmbus::mapped::RingMemory;
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::ring::{PushError, RingError};
use vmbus::vstor::{Operation, ScsiRequest, VstorPacket};
use zerocopy::{FromBytes, IntoBytes};

use crate::table::Table;
use crate::{Channel, Counters, Doorbell};
pub use command::{Command, Failure, Sense};
pub use disk::{Disk, IdentifyError, Scratch};
pub use handshake::Agreement;
use handshake::Handshake;

pub use crate::pages::{PageList, Pages, words};

/// Room for the longest packet that a controller sends; a longer one is a fault.
const LONGEST_PACKET: usize = 256;

/// Announcements that are taken in one poll.
const MAX_ANNOUNCEMENTS: usize = 256;

/// The controller does not keep to the protocol, or the ring is broken: the queue is dead.
///
/// What was in flight may still reach memory until the channel is closed and its GPADL torn down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    /// The ring from the controller is broken.
    #[error("the ring from the controller is broken")]
    Ring(#[from] RingError),
    /// The ring to the controller is broken, or has no room for the handshake.
    #[error("the ring to the controller is broken")]
    Push(#[from] PushError),
    /// Neither a completion nor an announcement.
    #[error("the controller sent a packet of type {0}")]
    PacketKind(u16),
    /// A completion that is not whole.
    #[error("the controller sent a packet with a payload of {0} bytes")]
    Short(usize),
    /// A packet that says something else than it should.
    #[error("the controller sent operation {0} out of turn")]
    Operation(u32),
    /// A completion of nothing.
    #[error("the controller answered {0:#x}, which was not asked")]
    UnknownAnswer(u64),
    /// A completion of what has ended.
    #[error("the controller answered {0:#x} twice")]
    AnsweredTwice(u64),
    /// More bytes than were asked for.
    #[error("the controller claims to have transferred {claimed} bytes of {asked}")]
    TooMuch {
        /// By the answer.
        claimed: u32,
        /// By the request.
        asked: u32,
    },
    /// The controller goes on and on about nothing.
    #[error("the controller sent more packets than there can be")]
    Flood,
    /// A step of the handshake failed.
    #[error("the controller refused operation {operation} of the handshake with {status:#x}")]
    Refused {
        /// [`Operation`]
        operation: u32,
        /// [`vmbus::vstor::NtStatus`]
        status: u32,
    },
    /// All versions were refused.
    #[error("the controller speaks no version that we do; it refused the last with {0:#x}")]
    NoCommonVersion(u32),
    /// A limit that cannot be.
    #[error("the controller takes transfers of up to {0} bytes, which is no number of pages")]
    MaxTransfer(u32),
    /// The caller was tired of waiting.
    #[error("the controller does not answer")]
    TimedOut,
    /// There was a fault before.
    #[error("the channel has been given up")]
    Dead,
}

/// Why a request was not put into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// The slot is in flight, or does not exist.
    #[error("slot {0} is in flight or does not exist")]
    Slot(u16),
    /// The ring is full: publish, and poll for what has ended.
    #[error("the ring is full")]
    Full,
    /// The controller does not take that much in one request.
    #[error("{len} bytes are more than the {max} of one request")]
    TooLong {
        /// The transfer.
        len: u32,
        /// [`Agreement::max_transfer`]
        max: u32,
    },
    /// A command with data and no pages, or the other way round.
    #[error("a command has pages if and only if it has data")]
    Pages,
    /// The queue is dead.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its slot, which is free again.
    pub slot: u16,
    /// The bytes transferred, which may be fewer than asked for.
    pub outcome: Result<u32, Failure>,
}

/// A channel of a controller, with `DEPTH` requests in flight at most.
#[derive(Debug)]
pub struct Queue<M, D, const DEPTH: usize> {
    channel: Channel<M, D>,
    /// The bytes that each request is to transfer.
    table: Table<u32, DEPTH>,
    max_transfer: u32,
    dead: bool,
    disks_changed: bool,
    buffer: [u8; LONGEST_PACKET],
}

impl<M: RingMemory, D: Doorbell, const DEPTH: usize> Queue<M, D, DEPTH> {
    /// Takes a controller's first channel, just opened, into use and asks for `subchannels` of
    /// them. They are being offered when this returns, as many as the [`Agreement`] says.
    ///
    /// `wait` is called when there is nothing to do but wait for an interrupt, which has been asked
    /// for; it may as well return at once. If it returns false, that is the end.
    pub fn connect(
        mut channel: Channel<M, D>,
        subchannels: u16,
        mut wait: impl FnMut() -> bool,
    ) -> Result<(Self, Agreement), Fault> {
        let mut handshake = Handshake::begin(&mut channel, subchannels)?;
        loop {
            if let Some(agreement) = handshake.poll(&mut channel)? {
                return Ok((Self::new(channel, agreement.max_transfer), agreement));
            }
            if channel.rest() && !wait() {
                return Err(Fault::TimedOut);
            }
            channel.wake();
        }
    }

    /// Takes a sub-channel, just opened, into use.
    pub fn subchannel(channel: Channel<M, D>, agreement: &Agreement) -> Self {
        Self::new(channel, agreement.max_transfer)
    }

    fn new(channel: Channel<M, D>, max_transfer: u32) -> Self {
        Self {
            channel,
            table: Table::new(),
            max_transfer,
            dead: false,
            disks_changed: false,
            buffer: [0; LONGEST_PACKET],
        }
    }

    /// Puts a request into the ring; the controller learns of it by [`Queue::publish`].
    ///
    /// The memory that `data` names is the controller's until the slot's [`Completion`].
    #[inline]
    pub fn submit(
        &mut self,
        slot: u16,
        command: &Command,
        data: Option<Pages<'_>>,
    ) -> Result<(), SubmitError> {
        if self.dead {
            return Err(Fault::Dead.into());
        }
        let id = self.table.next_id(slot).ok_or(SubmitError::Slot(slot))?;
        if data.is_some() != command.has_data() {
            return Err(SubmitError::Pages);
        }
        let len = data.map_or(0, |pages| pages.len);
        if len > self.max_transfer {
            return Err(SubmitError::TooLong { len, max: self.max_transfer });
        }
        let packet = VstorPacket::request(Operation::ExecuteSrb, command.request(len).as_bytes());
        let (kind, headers) = match data {
            Some(pages) => (PacketKind::GpaDirect, pages.header),
            None => (PacketKind::InBand, [].as_slice()),
        };
        let flags = PacketFlags::COMPLETION_REQUESTED;
        match self.channel.send(kind, flags, id, headers, packet.as_bytes()) {
            Ok(()) => {}
            Err(PushError::Full) => return Err(SubmitError::Full),
            Err(error) => {
                self.dead = true;
                return Err(Fault::Push(error).into());
            }
        }
        self.table.begin(slot, len);
        Ok(())
    }

    /// Shows the controller what was submitted, gives it back the room of what was polled, and
    /// signals it, once, if it may be asleep.
    #[inline]
    pub fn publish(&mut self) {
        self.channel.publish();
    }

    /// Hands each request that has ended to `ended`, and returns how many there were. A fault ends
    /// the use of the queue; those before it count.
    #[inline]
    pub fn poll(&mut self, mut ended: impl FnMut(Completion)) -> Result<usize, Fault> {
        if self.dead {
            return Err(Fault::Dead);
        }
        let (mut count, mut announcements) = (0, 0);
        loop {
            let taken = self.take();
            match taken {
                Ok(Taken::Completion(completion)) => {
                    ended(completion);
                    count += 1;
                }
                Ok(Taken::Nothing) => return Ok(count),
                // A controller may say so for each of its disks; one that never ends keeps us here.
                Ok(Taken::DisksChanged) if announcements < MAX_ANNOUNCEMENTS => {
                    self.disks_changed = true;
                    announcements += 1;
                }
                Ok(Taken::DisksChanged) | Err(_) => {
                    self.dead = true;
                    return Err(taken.err().unwrap_or(Fault::Flood));
                }
            }
        }
    }

    #[inline]
    fn take(&mut self) -> Result<Taken, Fault> {
        let Some(packet) = self.channel.receive(&mut self.buffer)? else {
            return Ok(Taken::Nothing);
        };
        let short = Fault::Short(packet.payload.len());
        let (answer, _) = VstorPacket::ref_from_prefix(packet.payload).map_err(|_| short)?;
        match packet.kind {
            PacketKind::Completion => {}
            PacketKind::InBand => {
                return match answer.operation {
                    Operation::EnumerateBus | Operation::RemoveDevice => Ok(Taken::DisksChanged),
                    operation => Err(Fault::Operation(operation.0)),
                };
            }
            kind => return Err(Fault::PacketKind(kind.0)),
        }
        if answer.operation != Operation::CompleteIo {
            return Err(Fault::Operation(answer.operation.0));
        }
        let request: ScsiRequest = answer.body().ok_or(short)?;
        let (slot, asked) =
            self.table.end(packet.transaction_id, Fault::UnknownAnswer, Fault::AnsweredTwice)?;
        let outcome = command::outcome(answer, &request);
        match outcome {
            Ok(claimed) if claimed > asked => Err(Fault::TooMuch { claimed, asked }),
            outcome => Ok(Taken::Completion(Completion { slot, outcome })),
        }
    }

    /// Runs one request to its end, while no other is in flight; `wait` as of [`Queue::connect`].
    pub fn run(
        &mut self,
        command: &Command,
        data: Option<Pages<'_>>,
        mut wait: impl FnMut() -> bool,
    ) -> Result<Result<u32, Failure>, SubmitError> {
        if self.table.in_flight() > 0 {
            return Err(SubmitError::Slot(0));
        }
        self.submit(0, command, data)?;
        let mut outcome = None;
        loop {
            self.publish();
            self.poll(|completion| outcome = Some(completion.outcome))?;
            if let Some(outcome) = outcome {
                self.publish();
                return Ok(outcome);
            }
            if self.rest() && !wait() {
                self.dead = true;
                return Err(Fault::TimedOut.into());
            }
            self.wake();
        }
    }

    /// Publishes, and asks for an interrupt when there is something. Returns whether the caller may
    /// sleep; if not, there is something to poll already.
    #[must_use = "what is there already brings no interrupt"]
    pub fn rest(&mut self) -> bool {
        self.channel.rest()
    }

    /// Asks not to be interrupted: the caller polls.
    pub fn wake(&mut self) {
        self.channel.wake();
    }

    /// Whether there may be something to poll: one atomic load.
    #[inline]
    pub fn has_data(&self) -> bool {
        self.channel.has_data()
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.table.in_flight()
    }

    /// Whether disks were attached or detached since this was last asked: look again.
    pub fn disks_changed(&mut self) -> bool {
        core::mem::take(&mut self.disks_changed)
    }

    /// What has passed through the channel.
    pub fn counters(&self) -> Counters {
        self.channel.counters()
    }
}

/// What a packet was.
enum Taken {
    Nothing,
    Completion(Completion),
    DisksChanged,
}
