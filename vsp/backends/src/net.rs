//! What a network is to a NIC.
//!
//! ```text
//!   Network    what is on the other end of the cable (Link); shared by a NIC's workers
//!    └─ queue() ─> Queue    one worker's path to it: takes frames, never blocks, never shared
//!                    ├─ send(Frame)       frames out of the guest          ─┐
//!                    ├─ offer(buffers)    room for frames that may come    ─┤
//!                    ├─ turn()            the end of a batch               ─┼─> Completions
//!                    └─ complete(Cqe)     what the kernel has done         ─┘
//! ```
//!
//! This is [`crate::block`]'s sibling, with one difference: frames come unasked. So a NIC offers
//! empty buffers, usually guest memory, and each is filled by some later frame. A NIC that offers
//! none receives nothing; what comes meanwhile waits in the network, which drops it when it has no
//! more room. A send that cannot go at once ends later, so that a NIC with all its sends under way
//! takes no more from its guest. Between the network and the buffers a frame is copied by the host
//! kernel alone, or once on each side of the [`switch`].
//!
//! A worker's turn with a queue:
//!
//! 1. [`Queue::send`] for every frame it has, [`Queue::offer`] for every buffer that is free,
//! 2. [`Queue::turn`] once, then one enter of its ring for all of it,
//! 3. [`Queue::complete`] for each of the ring's completions that carries the queue's [`Tag`],
//! 4. take what is in the [`Completions`],
//! 5. and if there was nothing to do: [`Queue::prepare_to_sleep`], and sleep in the ring if the
//!    queue agrees.
//!
//! A frame is an Ethernet frame from its destination address on, without its check sequence; a
//! VLAN tag is in its place behind the addresses. What a NIC or a network leaves to the other, a
//! checksum or the division into segments, is said in the frame's [`Offload`].
//!
//! `unsafe` appears here only in contracts, those of [`Queue::send`] and [`Queue::offer`].
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::str::FromStr;

pub use crate::block::Buffer;
use crate::uring::{Cqe, Tag, Uring};

pub mod capture;
pub mod checksum;
pub mod fuzzing;
pub mod large;
pub mod loopback;
pub mod offload;
mod patch;
mod pieces;
pub mod segments;
pub mod stream;
pub mod switch;
pub mod tap;
pub mod uplink;
pub mod user;

pub use offload::{Offload, Offloads};

/// Addresses and type: what every frame begins with, in bytes.
pub const ETHERNET_HEADER: usize = 14;

/// The longest frame, in bytes: an IP packet of the greatest length behind an Ethernet header with
/// a VLAN tag. Only frames yet to be divided into segments are longer than the MTU.
pub const MAX_FRAME: usize = ETHERNET_HEADER + 4 + 65535;

/// The most buffers a frame or an offer may consist of.
pub const MAX_BUFFERS: usize = 64;

/// What is on the other end of a NIC's cable. It is shared; the work is done by queues.
pub trait Network: Send + Sync {
    /// What it is at this moment.
    fn link(&self) -> Link;

    /// Says what the NIC takes from now on in frames it receives: of [`Link::gives`], what it can
    /// pass on to its guest. Nothing at first. Frames already on their way may still use what
    /// was allowed before.
    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Whether a flow comes by the queue that last sent for it. If not, which queue it comes by is not
    /// what a guest has chosen.
    fn follows_senders(&self) -> bool {
        false
    }

    /// A path to the network for the calling worker, which owns `uring`. Dropping the queue closes
    /// it, after which it can be opened again.
    ///
    /// The frames of one flow arrive in order, and all at one of the queues that are open.
    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>>;
}

/// What a queue is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Which of the network's queues, below [`Link::queues`]. Each is open once at a time.
    pub index: u16,
    /// What the queue's operations carry; no other queue's of this worker.
    pub tag: Tag,
    /// Frames that can be under way at a time.
    pub sends: u16,
    /// Buffers that can be offered at a time.
    pub receives: u16,
}

/// One worker's path to a network.
pub trait Queue {
    /// Takes a frame out of the guest. It goes with the worker's next turn, or has ended already if
    /// its [`Completion::Sent`] is in `done` on return. Every frame ends exactly once, also one
    /// that is refused: too long, in too many buffers, more than [`QueueConfig::sends`] at a time.
    /// Frames sent by one queue leave in order.
    ///
    /// # Safety
    /// Every buffer must be memory that may be read until the frame's completion is in `done`, or
    /// both `uring` and the queue have been dropped. Others may write there meanwhile, as guests do:
    /// what is then sent is undefined, nothing else is.
    ///
    /// `uring` must be the one the queue was made with.
    unsafe fn send(&mut self, frame: Frame<'_>, uring: &mut Uring, done: &mut Completions);

    /// Lends the network a buffer for a frame that may come, in pieces: the first bytes of a frame
    /// go to the first of them. It comes back exactly once, as [`Completion::Received`] or
    /// [`Completion::Returned`]; at once if it is one more than [`QueueConfig::receives`] or in too
    /// many pieces. They are filled in an order of the network's choice, and some perhaps never. A
    /// frame that is longer than the buffer whose turn it is, is dropped.
    ///
    /// # Safety
    /// As [`Queue::send`], of memory that may be written.
    unsafe fn offer(
        &mut self,
        id: u32,
        buffers: &[Buffer],
        uring: &mut Uring,
        done: &mut Completions,
    );

    /// Ends a batch: hands on what was sent and fetches what has come, as far as that needs no
    /// kernel; the rest goes with the ring's next enter.
    fn turn(&mut self, uring: &mut Uring, done: &mut Completions);

    /// Takes a completion of the worker's ring that carries this queue's tag.
    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions);

    /// Whether [`Self::turn`] would find something that the ring does not tell of, by a look at
    /// shared memory: for polling.
    fn is_ready(&self) -> bool {
        false
    }

    /// To be asked before the worker sleeps in its ring: from now on whatever comes wakes it there.
    /// Returns false if something has come already, and it should take another turn.
    fn prepare_to_sleep(&mut self) -> bool {
        true
    }

    /// Asks for the buffers that were offered: they come back, filled or not, now or with the
    /// ring's next completions. Buffers offered afterwards are used as ever.
    fn recall(&mut self, uring: &mut Uring, done: &mut Completions);

    /// Frames and offered buffers taken and not ended. A worker that stops recalls its buffers and
    /// waits until it is 0.
    fn in_flight(&self) -> usize;

    /// What this queue has done so far.
    fn counters(&self) -> Counters;
}

/// A frame to send.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The caller's own number; it comes back in the completion.
    pub id: u32,
    /// How long the frame is, in bytes.
    pub len: u32,
    /// The frame's bytes, in order: at least `len` together, of which the first `len` are used. The
    /// array itself is not needed after the call.
    pub buffers: &'a [Buffer],
    /// What is left to do to it: no more than [`Link::takes`].
    pub offload: Offload,
}

impl Frame<'_> {
    /// Whether it can be sent at all. Every queue asks this first.
    pub fn check(&self) -> Result<(), Dropped> {
        let len = self.len as usize;
        let sum = |sum: usize, buffer: &Buffer| sum.checked_add(buffer.len());
        let room = self.buffers.iter().try_fold(0, sum);
        let fits = (ETHERNET_HEADER..=MAX_FRAME).contains(&len)
            && self.buffers.len() <= MAX_BUFFERS
            && room.is_some_and(|room| room >= len);
        if fits && self.offload.fits(len) { Ok(()) } else { Err(Dropped::Malformed) }
    }
}

/// What has happened on a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// A frame has left, or not. Its buffers are the caller's again.
    Sent {
        /// The frame's own number.
        id: u32,
        /// Why it was dropped, if it was.
        result: Result<(), Dropped>,
    },
    /// A frame has come.
    Received {
        /// Of the buffer it is in, which is the caller's again.
        id: u32,
        /// Its length in bytes.
        len: u32,
        /// What is left to do to it: nothing that [`Network::set_receive_offloads`] has not allowed.
        offload: Offload,
    },
    /// A buffer is the caller's again, and empty.
    Returned {
        /// Of the buffer.
        id: u32,
    },
    /// The cable was plugged in (true) or pulled out; the rest of [`Link`] may have changed too.
    /// Every queue that is open hears of it, and should not be the only one to do so.
    Link(bool),
}

/// What has happened, in order, until the worker takes it. It holds as many as can be under way, so
/// that it never allocates.
#[derive(Debug, Default)]
pub struct Completions(VecDeque<Completion>);

impl Completions {
    /// Room for `capacity` before it has to grow.
    pub fn with_capacity(capacity: usize) -> Self {
        Self(VecDeque::with_capacity(capacity))
    }

    /// Adds one.
    pub fn push(&mut self, completion: Completion) {
        self.0.push_back(completion);
    }

    /// Adds that a frame is in the buffer that was offered as `id`, if there was one.
    fn received(&mut self, id: Option<u32>, len: u32, offload: Offload) {
        self.0.extend(id.map(|id| Completion::Received { id, len, offload }));
    }

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<Completion> {
        self.0.pop_front()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Why a frame was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Dropped {
    /// Its lengths or its [`Offload`] make no sense.
    #[error("the frame is malformed")]
    Malformed,
    /// There are too many frames under way.
    #[error("too many frames are under way")]
    Busy,
    /// The cable is pulled out, or what was at its other end is gone.
    #[error("the link is down")]
    LinkDown,
    /// The network would not have it, for instance for its VLAN.
    #[error("the network refused the frame")]
    Refused,
    /// Nobody had room for it.
    #[error("the network has no room for the frame")]
    NoRoom,
    /// The host failed.
    #[error("the host failed to send (errno {0})")]
    Host(i32),
}

/// What a queue has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that have left.
    pub sent: u64,
    /// Bytes of them.
    pub sent_bytes: u64,
    /// Frames that were to leave and did not.
    pub send_drops: u64,
    /// Frames that have come.
    pub received: u64,
    /// Bytes of them.
    pub received_bytes: u64,
    /// Frames that came and were too long for the buffer there was, or made no sense.
    pub receive_drops: u64,
}

impl Counters {
    /// Counts a frame of `len` bytes that was to leave.
    pub fn count_send(&mut self, len: u32, result: Result<(), Dropped>) {
        if result.is_ok() {
            self.sent += 1;
            self.sent_bytes += u64::from(len);
        } else {
            self.send_drops += 1;
        }
    }

    /// Adds what another queue has done.
    pub fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.sent_bytes += other.sent_bytes;
        self.send_drops += other.send_drops;
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.receive_drops += other.receive_drops;
    }

    /// Counts a frame of `len` bytes that has come.
    pub fn count_receive(&mut self, len: u32) {
        self.received += 1;
        self.received_bytes += u64::from(len);
    }
}

/// What a network is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Names it for people: `tap:lab0`.
    pub name: String,
    /// Whether the cable is plugged in.
    pub up: bool,
    /// The longest packet behind an Ethernet header, in bytes.
    pub mtu: u16,
    /// In Mbit/s. Nothing is paced to it; a guest may show it.
    pub speed: u32,
    /// An address for the NIC, if the network has an opinion.
    pub mac: Option<MacAddr>,
    /// How many queues can be open at a time, at least 1.
    pub queues: u16,
    /// What a NIC may leave to the network in frames it sends.
    pub takes: Offloads,
    /// What the network would leave to a NIC that allows it.
    pub gives: Offloads,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Everybody's.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it means several receivers: a multicast address or [`Self::BROADCAST`].
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether a NIC can have it as its own.
    pub fn is_station(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Not an Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an Ethernet address is six hexadecimal bytes such as 52:54:00:12:34:56")]
pub struct ParseMacAddrError;

impl FromStr for MacAddr {
    type Err = ParseMacAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| {
                part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit())
            });
            let part = part.ok_or(ParseMacAddrError)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| ParseMacAddrError)?;
        }
        if parts.next().is_some() {
            return Err(ParseMacAddrError);
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let mac = MacAddr([0x52, 0x54, 0, 0x12, 0xab, 0xff]);
        assert_eq!(mac.to_string(), "52:54:00:12:ab:ff");
        assert_eq!("52:54:00:12:ab:ff".parse(), Ok(mac));
        assert_eq!("52-54-00-12-AB-FF".parse(), Ok(mac));
        for bad in
            ["", "52:54:00:12:ab", "52:54:00:12:ab:ff:00", "52:54:0:12:ab:ff", "+2:54:00:12:ab:ff"]
        {
            assert_eq!(bad.parse::<MacAddr>(), Err(ParseMacAddrError), "{bad}");
        }
        assert!(mac.is_station());
        assert!(MacAddr::BROADCAST.is_multicast());
        assert!(!MacAddr([0; 6]).is_station());
    }

    #[test]
    fn frames_are_checked() {
        let room = [Buffer::new(std::ptr::null_mut(), 40), Buffer::new(std::ptr::null_mut(), 60)];
        let frame = |len, buffers| Frame { id: 0, len, buffers, offload: Offload::NONE };
        assert_eq!(frame(100, &room[..]).check(), Ok(()));
        assert_eq!(frame(14, &room[..]).check(), Ok(()));
        assert_eq!(frame(13, &room[..]).check(), Err(Dropped::Malformed));
        assert_eq!(frame(101, &room[..]).check(), Err(Dropped::Malformed));
        let many = [Buffer::new(std::ptr::null_mut(), 60); MAX_BUFFERS + 1];
        assert_eq!(frame(100, &many[..]).check(), Err(Dropped::Malformed));
        assert_eq!(frame(100, &many[1..]).check(), Ok(()));
        let long = [Buffer::new(std::ptr::null_mut(), usize::MAX); 2];
        assert_eq!(frame(100, &long[..]).check(), Err(Dropped::Malformed));
        let long = [Buffer::new(std::ptr::null_mut(), MAX_FRAME + 1)];
        assert_eq!(frame(MAX_FRAME as u32, &long[..]).check(), Ok(()));
        assert_eq!(frame(MAX_FRAME as u32 + 1, &long[..]).check(), Err(Dropped::Malformed));
    }
}
