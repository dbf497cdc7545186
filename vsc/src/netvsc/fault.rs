//! What can go wrong.

use thiserror::Error;
use vmbus::ring::{PushError, RingError};
use vmbus::rndis;

/// The host does not keep to the protocol, or the ring is broken: the queue is dead.
///
/// What was on its way may still be read, and the receive buffer written, until the channel is closed
/// and the GPADLs torn down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    /// The ring from the host is broken.
    #[error("the ring from the host is broken")]
    Ring(#[from] RingError),
    /// The ring to the host is broken, or has no room for the handshake.
    #[error("the ring to the host is broken")]
    Push(#[from] PushError),
    /// A packet of a type that is not for us.
    #[error("the host sent a packet of type {0}")]
    PacketKind(u16),
    /// A packet whose payload is not whole.
    #[error("the host sent a packet with a payload of {0} bytes")]
    Short(usize),
    /// An NVSP message that is not due.
    #[error("the host sent message {0} out of turn")]
    Message(u32),
    /// An RNDIS message that is not due.
    #[error("the host sent RNDIS message {0:#x} out of turn")]
    Rndis(u32),
    /// A completion of nothing.
    #[error("the host answered {0:#x}, which was not asked")]
    UnknownAnswer(u64),
    /// A completion of what has ended.
    #[error("the host answered {0:#x} twice")]
    AnsweredTwice(u64),
    /// It has never been told of the buffer that it names.
    #[error("the host names buffer {0:#x}, which was not shared")]
    Buffer(u16),
    /// What it names is not in the receive buffer.
    #[error("the host names {len} bytes at {offset:#x}, outside of the receive buffer")]
    Range {
        /// Where they begin.
        offset: u32,
        /// How many.
        len: u32,
    },
    /// The lengths in an RNDIS message contradict each other, or it.
    #[error("the host sent an RNDIS message whose lengths make no sense")]
    Lengths,
    /// A frame in several slots.
    #[error("the host sent a part of a coalesced frame, which was not asked for")]
    Coalesced,
    /// The host goes on and on about nothing.
    #[error("the host sent more packets than there can be")]
    Flood,
    /// A step of the handshake failed.
    #[error("the host refused message {message} of the handshake with status {status}")]
    Refused {
        /// [`vmbus::nvsp::MessageKind`]
        message: u32,
        /// [`vmbus::nvsp::Status`]
        status: u32,
    },
    /// A setting without which it cannot be used.
    #[error("the host refused object {oid:#x} with {status:#x}")]
    Object {
        /// [`rndis::Oid`]
        oid: u32,
        /// [`rndis::Status`]
        status: u32,
    },
    /// All versions were refused.
    #[error("the host speaks no version that we do; it refused the last with {0}")]
    NoCommonVersion(u32),
    /// A size or a count that cannot be.
    #[error("the host sets limits that cannot be kept")]
    Limits,
    /// The caller was tired of waiting.
    #[error("the host does not answer")]
    TimedOut,
    /// There was a fault before.
    #[error("the channel has been given up")]
    Dead,
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SendError {
    /// All sections are in use, or the ring is full: publish, and poll for what has ended.
    #[error("too much is under way")]
    Full,
    /// It is longer than the NIC takes, or than a section has room for. The latter can be sent from
    /// pages.
    #[error("a frame of {len} bytes where {max} can be sent")]
    TooLong {
        /// Of the frame.
        len: usize,
        /// The most.
        max: usize,
    },
    /// It is shorter than an Ethernet header.
    #[error("a frame is shorter than an Ethernet header")]
    Short,
    /// The queue is dead.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Why a setting was not read or not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// The NIC refuses.
    #[error("the NIC refused with {0:?}")]
    Refused(rndis::Status),
    /// The value is longer than any question, or the place for it too short.
    #[error("a value of {0} bytes does not fit")]
    Length(usize),
    /// The queue is dead.
    #[error(transparent)]
    Fault(#[from] Fault),
}
