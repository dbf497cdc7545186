//! Remote NDIS: frames and a NIC's settings as messages, at both ends.
//!
//! A message is a [`Header`], and a body that depends on its kind. A frame is a
//! [`MessageKind::Packet`] with per-packet information ([`PacketInfo`]) between its fixed part and
//! the frame; settings are objects with an [`Oid`] that are queried and set. Offsets in a body
//! count from the body's first byte. Numbers: Microsoft's "Remote NDIS Specification" (MS-RNDIS),
//! the NDIS documentation for the objects, and Linux's include/linux/rndis.h and
//! drivers/net/hyperv/hyperv_net.h.
//!
//! Here are the messages. What one says of a frame is in `rndis/packets.rs`, and what settings there
//! are in `rndis/objects.rs`.

mod objects;
mod packets;

use open_enum::open_enum;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use objects::*;
pub use packets::*;

/// What a message is (`RNDIS_MSG_*`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum MessageKind {
    /// A frame, in a [`PacketBody`].
    Packet = 1,
    /// [`Initialize`]
    Initialize = 2,
    /// A [`Request`]; no answer is due.
    Halt = 3,
    /// [`ObjectRequest`]
    Query = 4,
    /// [`ObjectRequest`]
    Set = 5,
    /// Four reserved bytes.
    Reset = 6,
    /// [`Indicate`]; from the NIC.
    Indicate = 7,
    /// A [`Request`].
    KeepAlive = 8,
    /// [`InitializeComplete`]
    InitializeComplete = 0x8000_0002,
    /// [`QueryComplete`]
    QueryComplete = 0x8000_0004,
    /// [`RequestComplete`]
    SetComplete = 0x8000_0005,
    /// [`ResetComplete`]
    ResetComplete = 0x8000_0006,
    /// [`RequestComplete`]
    KeepAliveComplete = 0x8000_0008,
}

/// How a request went, or what is indicated (`NDIS_STATUS_*`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum Status {
    /// Well.
    Success = 0,
    /// Indicated: the link is up.
    MediaConnect = 0x4001_000B,
    /// Indicated: the link is down.
    MediaDisconnect = 0x4001_000C,
    /// Indicated: the link's speed is another, a `u32` in units of 100 bits per second.
    LinkSpeedChange = 0x4001_0013,
    /// Not.
    Failure = 0xC000_0001,
    /// The object does not exist or cannot do that.
    NotSupported = 0xC000_00BB,
    /// Its value has the wrong length.
    InvalidLength = 0xC001_0014,
    /// Its value makes no sense.
    InvalidData = 0xC001_0015,
}

/// What every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// What it is.
    pub kind: MessageKind,
    /// Bytes, this header and padding included.
    pub len: u32,
}

/// Bytes in a [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();
const _: () = assert!(HEADER_SIZE == 8);

/// Body of [`MessageKind::Halt`] and [`MessageKind::KeepAlive`], and the front of every other
/// request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// Comes back in the answer.
    pub id: u32,
}

const _: () = assert!(size_of::<Request>() == 4);

/// Body of [`MessageKind::Initialize`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Initialize {
    /// Comes back in the answer.
    pub id: u32,
    /// 1
    pub major: u32,
    /// 0
    pub minor: u32,
    /// The longest message the guest takes.
    pub max_transfer: u32,
}

const _: () = assert!(size_of::<Initialize>() == 16);

/// Body of [`MessageKind::InitializeComplete`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitializeComplete {
    /// The request's.
    pub id: u32,
    /// A [`Status`].
    pub status: u32,
    /// 1
    pub major: u32,
    /// 0
    pub minor: u32,
    /// 1: connectionless.
    pub device_flags: u32,
    /// 0: Ethernet.
    pub medium: u32,
    /// The most frames in a packet of the guest.
    pub max_packets: u32,
    /// The longest packet, in bytes.
    pub max_transfer: u32,
    /// Messages in a packet begin at multiples of two to the power of this.
    pub alignment: u32,
    /// 0
    pub families: [u32; 2],
}

const _: () = assert!(size_of::<InitializeComplete>() == 44);

/// Body of [`MessageKind::Query`] and [`MessageKind::Set`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ObjectRequest {
    /// Comes back in the answer.
    pub id: u32,
    /// Which object.
    pub oid: Oid,
    /// Bytes of value.
    pub len: u32,
    /// Where it begins.
    pub offset: u32,
    /// 0
    pub vc_handle: u32,
}

const _: () = assert!(size_of::<ObjectRequest>() == 20);

/// Body of [`MessageKind::QueryComplete`]; the value follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QueryComplete {
    /// The request's.
    pub id: u32,
    /// How it went.
    pub status: Status,
    /// Bytes of value.
    pub len: u32,
    /// Where it begins; 0 if there is none.
    pub offset: u32,
}

const _: () = assert!(size_of::<QueryComplete>() == 16);

/// Body of [`MessageKind::SetComplete`] and [`MessageKind::KeepAliveComplete`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RequestComplete {
    /// The request's.
    pub id: u32,
    /// How it went.
    pub status: Status,
}

const _: () = assert!(size_of::<RequestComplete>() == 8);

/// Body of [`MessageKind::ResetComplete`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ResetComplete {
    /// How it went.
    pub status: Status,
    /// Whether the guest has to set filter and addresses again.
    pub addressing_reset: u32,
}

const _: () = assert!(size_of::<ResetComplete>() == 8);

/// Body of [`MessageKind::Indicate`]; a value may follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Indicate {
    /// What is indicated.
    pub status: Status,
    /// Bytes of value.
    pub len: u32,
    /// Where it begins.
    pub offset: u32,
}

const _: () = assert!(size_of::<Indicate>() == 12);
