//! The network protocol: what the packets of a NIC's channel carry, at both ends.
//!
//! A payload is one [`Message`]: a number that says what it is, and a body of at most 36 bytes.
//! Frames and the NIC's settings travel inside of it as [`crate::rndis`] messages, which lie in
//! guest memory: in the pages of a GPA-direct packet, in a section of the send buffer, or in the
//! receive buffer. Layouts and numbers: `struct nvsp_message` and its kin in Linux's
//! drivers/net/hyperv/hyperv_net.h.

use open_enum::open_enum;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Guid;
use crate::protocol::GpadlId;

/// The class of a synthetic NIC.
pub const NETWORK_CLASS: Guid = Guid::new("f8615163-df3e-46c5-913f-f2d2f965ed0e");

/// What a [`Message`] asks or says (`NVSP_MSG*_TYPE_*`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum MessageKind {
    /// Proposes a [`Version`], in an [`Init`].
    Init = 1,
    /// Answers it, in an [`InitComplete`].
    InitComplete = 2,
    /// The guest's NDIS version, in a [`NdisVersion`].
    SendNdisVersion = 100,
    /// Shares the receive buffer, in a [`ShareBuffer`].
    SendReceiveBuffer = 101,
    /// Says how it is cut into slots, in a [`ReceiveBufferComplete`].
    SendReceiveBufferComplete = 102,
    /// Takes the receive buffer back, in a [`RevokeBuffer`].
    RevokeReceiveBuffer = 103,
    /// Shares the send buffer, in a [`ShareBuffer`].
    SendSendBuffer = 104,
    /// Says how it is cut into sections, in a [`SendBufferComplete`].
    SendSendBufferComplete = 105,
    /// Takes the send buffer back, in a [`RevokeBuffer`].
    RevokeSendBuffer = 106,
    /// RNDIS messages, placed as a [`RndisPacket`] says; either way.
    SendRndisPacket = 107,
    /// They have been taken, in a [`RndisPacketComplete`]; either way.
    SendRndisPacketComplete = 108,
    /// MTU and capabilities of the guest, in a [`NdisConfig`]; from version 2 on.
    SendNdisConfig = 125,
    /// Asks for sub-channels, in a [`SubchannelRequest`], and answers, in a
    /// [`SubchannelComplete`]; from version 5 on.
    SubChannel = 133,
    /// Which channel the guest shall send on, in a [`SendIndirectionTable`]; from version 5 on.
    SendIndirectionTable = 134,
}

/// How a request went (`NVSP_STAT_*`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum Status {
    /// Nothing is said.
    None = 0,
    /// Well.
    Success = 1,
    /// Not.
    Failure = 2,
    /// The RNDIS messages make no sense.
    InvalidRndisPacket = 5,
    /// Not now.
    Busy = 6,
    /// Another version, please.
    ProtocolUnsupported = 7,
}

/// A version of the protocol: the major in the upper half.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Version(pub u32);

impl Version {
    /// Windows Server 2008.
    pub const V1: Self = Self(2);
    /// Windows Server 2008 R2: [`NdisConfig`].
    pub const V2: Self = Self(0x3_0002);
    /// Windows Server 2012.
    pub const V4: Self = Self(0x4_0000);
    /// Windows Server 2012 R2: sub-channels.
    pub const V5: Self = Self(0x5_0000);
    /// Windows 10.
    pub const V6: Self = Self(0x6_0000);
    /// Windows 10, Server 2019: longer messages.
    pub const V6_1: Self = Self(0x6_0001);
    /// All that there are, oldest first.
    pub const ALL: [Self; 6] = [Self::V1, Self::V2, Self::V4, Self::V5, Self::V6, Self::V6_1];

    /// Bytes in a message of this version; what is not used is zero.
    pub const fn message_size(self) -> usize {
        if self.0 >= Self::V6_1.0 { MESSAGE_SIZE } else { MESSAGE_SIZE_V1 }
    }
}

/// Bytes in a message from version 6.1 on.
pub const MESSAGE_SIZE: usize = 40;
/// Bytes in a message before that.
pub const MESSAGE_SIZE_V1: usize = 28;

/// A message that was received.
#[derive(Clone, Copy, Debug)]
pub struct Message<'b> {
    /// What it asks or says.
    pub kind: MessageKind,
    body: &'b [u8],
}

impl<'b> Message<'b> {
    /// The message in a packet's payload; `None` if it is too short to have a kind.
    pub fn parse(payload: &'b [u8]) -> Option<Self> {
        let (kind, body) = MessageKind::read_from_prefix(payload).ok()?;
        Some(Self { kind, body })
    }

    /// Its body as a `T`; `None` if it is shorter than that.
    pub fn body<T: FromBytes>(&self) -> Option<T> {
        T::read_from_prefix(self.body).ok().map(|(body, _)| body)
    }
}

/// A message to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Outgoing {
    /// What it asks or says.
    pub kind: MessageKind,
    body: [u8; MESSAGE_SIZE - 4],
}

const _: () = assert!(size_of::<Outgoing>() == MESSAGE_SIZE);

impl Outgoing {
    /// With this `body`; what does not fit is cut off.
    pub fn new<T: IntoBytes + Immutable>(kind: MessageKind, body: &T) -> Self {
        const { assert!(size_of::<T>() <= MESSAGE_SIZE - 4) };
        let mut message = Self { kind, body: [0; _] };
        for (to, from) in message.body.iter_mut().zip(body.as_bytes()) {
            *to = *from;
        }
        message
    }

    /// As long as messages of `version` are.
    pub fn bytes(&self, version: Version) -> &[u8] {
        self.as_bytes().get(..version.message_size()).unwrap_or_default()
    }
}

/// Body of [`MessageKind::Init`]: a range of versions, of which guests name one.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Init {
    /// The lowest.
    pub min: Version,
    /// The highest.
    pub max: Version,
}

const _: () = assert!(size_of::<Init>() == 8);

/// Body of [`MessageKind::InitComplete`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitComplete {
    /// [`Version::V1`] for that one, all ones for later ones: the status says whether it is spoken.
    pub negotiated: u32,
    /// How many pieces a packet may have.
    pub max_mdl_chain: u32,
    /// Whether the version is spoken.
    pub status: Status,
}

const _: () = assert!(size_of::<InitComplete>() == 12);

/// Body of [`MessageKind::SendNdisVersion`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NdisVersion {
    /// 6
    pub major: u32,
    /// 1 or 30
    pub minor: u32,
}

const _: () = assert!(size_of::<NdisVersion>() == 8);

/// Body of [`MessageKind::SendNdisConfig`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NdisConfig {
    /// The longest frame without a VLAN tag: the MTU and an Ethernet header.
    pub max_frame: u32,
    /// Zero.
    pub reserved: u32,
    /// What the guest can do.
    pub capabilities: Capabilities,
}

const _: () = assert!(size_of::<NdisConfig>() == 16);

/// What a guest can do (`struct nvsp_2_vsc_capability`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Takes a virtual function.
    pub const SRIOV: u64 = 1 << 2;
    /// Takes VLAN tags beside the frame.
    pub const IEEE_8021Q: u64 = 1 << 3;
    /// Takes changes of the link's speed.
    pub const TEAMING: u64 = 1 << 5;
    /// Takes a coalesced frame in several slots.
    pub const RSC: u64 = 1 << 7;

    /// Whether it can do this one.
    pub const fn has(self, capability: u64) -> bool {
        self.0 & capability != 0
    }
}

/// Body of [`MessageKind::SendReceiveBuffer`] and [`MessageKind::SendSendBuffer`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ShareBuffer {
    /// Its pages.
    pub gpadl: GpadlId,
    /// What it is called from now on: [`RECEIVE_BUFFER`] or [`SEND_BUFFER`].
    pub id: u16,
    /// Unused.
    pub reserved: u16,
}

const _: () = assert!(size_of::<ShareBuffer>() == 8);

/// What guests call their receive buffer.
pub const RECEIVE_BUFFER: u16 = 0xCAFE;
/// What guests call their send buffer.
pub const SEND_BUFFER: u16 = 0;

/// Body of [`MessageKind::SendReceiveBufferComplete`], for one kind of slots; no host has more.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReceiveBufferComplete {
    /// Whether the buffer was taken.
    pub status: Status,
    /// 1
    pub sections: u32,
    /// Where the slots begin, in bytes.
    pub offset: u32,
    /// Bytes in a slot.
    pub slot_size: u32,
    /// Slots.
    pub slots: u32,
    /// Where they end.
    pub end: u32,
}

const _: () = assert!(size_of::<ReceiveBufferComplete>() == 24);

/// Body of [`MessageKind::SendSendBufferComplete`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SendBufferComplete {
    /// Whether the buffer was taken.
    pub status: Status,
    /// Bytes in a section.
    pub section_size: u32,
}

const _: () = assert!(size_of::<SendBufferComplete>() == 8);

/// Body of [`MessageKind::RevokeReceiveBuffer`] and [`MessageKind::RevokeSendBuffer`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RevokeBuffer {
    /// What it is called.
    pub id: u16,
}

const _: () = assert!(size_of::<RevokeBuffer>() == 2);

/// What kind of RNDIS messages a packet has.
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum ChannelType {
    /// Frames.
    Data = 0,
    /// Anything else.
    Control = 1,
}

/// Body of [`MessageKind::SendRndisPacket`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RndisPacket {
    /// What kind of messages.
    pub channel: ChannelType,
    /// The section of the send buffer where they begin, or [`RndisPacket::NO_SECTION`].
    pub section: u32,
    /// Bytes of it in use; what lies in the packet's own pages follows them.
    pub section_len: u32,
}

const _: () = assert!(size_of::<RndisPacket>() == 12);

impl RndisPacket {
    /// All lies in the packet's own pages.
    pub const NO_SECTION: u32 = u32::MAX;
}

/// Body of [`MessageKind::SendRndisPacketComplete`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RndisPacketComplete {
    /// How it went.
    pub status: Status,
}

const _: () = assert!(size_of::<RndisPacketComplete>() == 4);

/// Body of [`MessageKind::SubChannel`] from the guest.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SubchannelRequest {
    /// [`SubchannelRequest::ALLOCATE`]
    pub operation: u32,
    /// How many.
    pub count: u32,
}

const _: () = assert!(size_of::<SubchannelRequest>() == 8);

impl SubchannelRequest {
    /// Offer sub-channels (`NVSP_SUBCHANNEL_ALLOCATE`).
    pub const ALLOCATE: u32 = 1;
}

/// Body of [`MessageKind::SubChannel`] to the guest.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SubchannelComplete {
    /// How it went.
    pub status: Status,
    /// How many are offered.
    pub count: u32,
}

const _: () = assert!(size_of::<SubchannelComplete>() == 8);

/// Body of [`MessageKind::SendIndirectionTable`]; the table follows the message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SendIndirectionTable {
    /// [`SEND_TABLE_ENTRIES`]
    pub count: u32,
    /// Where the table begins, from the message's first byte.
    pub offset: u32,
}

const _: () = assert!(size_of::<SendIndirectionTable>() == 8);

/// Entries in the table of channels to send on (`VRSS_SEND_TAB_SIZE`).
pub const SEND_TABLE_ENTRIES: usize = 16;
