//! The messages that set channels up and take them down, as they lie in the 240-byte payload of a
//! SynIC message. Guest to root they go by *post message*, root to guest into the message slot of
//! SINT 2.
//!
//! Layouts and numbers: `enum vmbus_channel_message_type` and what follows it in Linux's
//! include/linux/hyperv.h.

use core::fmt;

use open_enum::open_enum;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Guid;

/// The SynIC message type of every VMBus message.
pub const MESSAGE_TYPE: u32 = 1;
/// Bytes in the longest message.
pub const MAX_MESSAGE: usize = 240;
/// Where a guest posts its messages below version 5.0.
pub const MESSAGE_CONNECTION: u32 = 1;
/// Where a guest posts INITIATE_CONTACT of version 5.0 and later.
pub const MESSAGE_CONNECTION_4: u32 = 4;

/// What a message is (`enum vmbus_channel_message_type`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum MessageKind {
    /// Root to guest: [`OfferChannel`].
    OfferChannel = 1,
    /// Root to guest: [`ChannelMessage`], the offer is withdrawn.
    RescindOffer = 2,
    /// Guest to root: tell me all offers.
    RequestOffers = 3,
    /// Root to guest: these were all.
    AllOffersDelivered = 4,
    /// Guest to root: [`OpenChannel`].
    OpenChannel = 5,
    /// Root to guest: [`OpenResult`].
    OpenResult = 6,
    /// Guest to root: [`ChannelMessage`]. Has no answer.
    CloseChannel = 7,
    /// Guest to root: [`GpadlHeader`] and page numbers.
    GpadlHeader = 8,
    /// Guest to root: [`GpadlBody`] and more page numbers.
    GpadlBody = 9,
    /// Root to guest: [`GpadlCreated`].
    GpadlCreated = 10,
    /// Guest to root: [`GpadlTeardown`].
    GpadlTeardown = 11,
    /// Root to guest: [`GpadlTorndown`].
    GpadlTorndown = 12,
    /// Guest to root: [`ChannelMessage`], a rescinded channel is forgotten.
    RelidReleased = 13,
    /// Guest to root: [`InitiateContact`].
    InitiateContact = 14,
    /// Root to guest: [`VersionResponse`].
    VersionResponse = 15,
    /// Guest to root: forget me.
    Unload = 16,
    /// Root to guest: forgotten.
    UnloadResponse = 17,
    /// Guest to root: [`ModifyChannel`].
    ModifyChannel = 22,
    /// Guest to root: connect a hv_sock to the host.
    TlConnectRequest = 21,
    /// Root to guest: [`ModifyChannelResponse`].
    ModifyChannelResponse = 24,
}

/// What every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// What the message is.
    pub kind: MessageKind,
    /// Zero.
    pub padding: u32,
}

impl Header {
    /// The header of a message.
    pub const fn new(kind: MessageKind) -> Self {
        Self { kind, padding: 0 }
    }
}

/// A channel's number, 1 to 2047; also the number of its event flag.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Relid(pub u32);

impl Relid {
    /// The largest that Linux takes: it must be a valid event flag.
    pub const MAX: Self = Self(2047);
}

/// The number a guest gave to a list of its pages.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct GpadlId(pub u32);

macro_rules! plain_debug {
    ($($id:ident $format:literal)*) => {$(
        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
        impl fmt::Debug for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($id), "(", $format, ")"), self.0)
            }
        }
    )*};
}
plain_debug!(Relid "{}" GpadlId "{:#x}");

/// A version of the protocol, major in the upper half.
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
    /// Windows 8.
    pub const V2_4: Self = Self::new(2, 4);
    /// Windows 8.1.
    pub const V3_0: Self = Self::new(3, 0);
    /// Windows 10: channels can be moved to another VP.
    pub const V4_0: Self = Self::new(4, 0);
    /// Windows 10 RS3.
    pub const V4_1: Self = Self::new(4, 1);
    /// Windows 10 RS4: messages go to the connection that the version response names.
    pub const V5_0: Self = Self::new(5, 0);
    /// Windows 10 RS5.
    pub const V5_1: Self = Self::new(5, 1);
    /// Windows Server 2019.
    pub const V5_2: Self = Self::new(5, 2);
    /// Windows Server 2022: moving a channel is answered.
    pub const V5_3: Self = Self::new(5, 3);

    /// All that this crate speaks, the newest first: the order in which a guest tries.
    pub const ALL: [Self; 8] = [
        Self::V5_3,
        Self::V5_2,
        Self::V5_1,
        Self::V5_0,
        Self::V4_1,
        Self::V4_0,
        Self::V3_0,
        Self::V2_4,
    ];

    /// A version by its parts.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self((major as u32) << 16 | minor as u32)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// Bytes of user data in an offer and in an open message.
pub const USER_DATA: usize = 120;

/// Root to guest: there is a channel (`struct vmbus_channel_offer_channel`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OfferChannel {
    /// [`MessageKind::OfferChannel`]
    pub header: Header,
    /// What kind of device it leads to.
    pub class: Guid,
    /// Which of its kind.
    pub instance: Guid,
    /// Zero.
    pub reserved: [u8; 16],
    /// `VMBUS_CHANNEL_*`
    pub flags: u16,
    /// How much MMIO space the device wants.
    pub mmio_megabytes: u16,
    /// For the device's driver.
    pub user_data: [u8; USER_DATA],
    /// 0 for a device's first channel.
    pub subchannel: u16,
    /// Zero.
    pub reserved2: u16,
    /// The channel's number.
    pub relid: Relid,
    /// The trigger in the monitor pages, if allocated.
    pub monitor_id: u8,
    /// Bit 0: signal by the monitor pages instead of a hypercall.
    pub monitor_allocated: u8,
    /// Bit 0: the channel has an event flag of its own.
    pub dedicated_interrupt: u16,
    /// What the guest signals.
    pub connection: u32,
}

/// The messages that carry nothing but a channel's number.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChannelMessage {
    /// RescindOffer, CloseChannel or RelidReleased.
    pub header: Header,
    /// The channel.
    pub relid: Relid,
}

/// Guest to root: open a channel (`struct vmbus_channel_open_channel`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenChannel {
    /// [`MessageKind::OpenChannel`]
    pub header: Header,
    /// The channel.
    pub relid: Relid,
    /// The answer repeats it.
    pub open_id: u32,
    /// The pages of both rings.
    pub ring: GpadlId,
    /// The VP to interrupt.
    pub target_vp: u32,
    /// The page at which the ring from root to guest begins.
    pub downstream_page: u32,
    /// For the service provider.
    pub user_data: [u8; USER_DATA],
}

/// Status in an answer: it went well.
pub const STATUS_SUCCESS: u32 = 0;
/// Status in an answer: it did not (`STATUS_UNSUCCESSFUL`). Any value but 0 means the same to
/// Linux.
pub const STATUS_UNSUCCESSFUL: u32 = 0xC000_0001;

/// Root to guest: how opening went (`struct vmbus_channel_open_result`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenResult {
    /// [`MessageKind::OpenResult`]
    pub header: Header,
    /// The channel.
    pub relid: Relid,
    /// As in the request.
    pub open_id: u32,
    /// [`STATUS_SUCCESS`] or a failure.
    pub status: u32,
}

/// `struct gpa_range` without its page numbers.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpaRange {
    /// Bytes.
    pub len: u32,
    /// Where in the first page they start.
    pub offset: u32,
}

/// Guest to root: here are pages (`struct vmbus_channel_gpadl_header`, up to its page numbers).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlHeader {
    /// [`MessageKind::GpadlHeader`]
    pub header: Header,
    /// The channel they are for.
    pub relid: Relid,
    /// The number the guest gives them.
    pub gpadl: GpadlId,
    /// Bytes of all ranges, each with its [`GpaRange`] and page numbers.
    pub range_bytes: u16,
    /// How many ranges; Linux sends one.
    pub range_count: u16,
    /// The first range, whose page numbers follow, here and in [`GpadlBody`] messages.
    pub range: GpaRange,
}

/// Guest to root: more page numbers (`struct vmbus_channel_gpadl_body`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlBody {
    /// [`MessageKind::GpadlBody`]
    pub header: Header,
    /// Linux leaves it 0; the order of arrival counts.
    pub message_number: u32,
    /// As in the header message.
    pub gpadl: GpadlId,
}

/// Root to guest: the pages are known (`struct vmbus_channel_gpadl_created`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlCreated {
    /// [`MessageKind::GpadlCreated`]
    pub header: Header,
    /// As in the request.
    pub relid: Relid,
    /// As in the request.
    pub gpadl: GpadlId,
    /// [`STATUS_SUCCESS`] or a failure.
    pub status: u32,
}

/// Guest to root: I want the pages back (`struct vmbus_channel_gpadl_teardown`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlTeardown {
    /// [`MessageKind::GpadlTeardown`]
    pub header: Header,
    /// The channel they were for.
    pub relid: Relid,
    /// The list.
    pub gpadl: GpadlId,
}

/// Root to guest: they are yours (`struct vmbus_channel_gpadl_torndown`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlTorndown {
    /// [`MessageKind::GpadlTorndown`]
    pub header: Header,
    /// The list.
    pub gpadl: GpadlId,
}

/// Guest to root: let us talk (`struct vmbus_channel_initiate_contact`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitiateContact {
    /// [`MessageKind::InitiateContact`]
    pub header: Header,
    /// The version the guest would speak.
    pub version: Version,
    /// The VP that messages shall go to.
    pub target_vp: u32,
    /// From 5.0 on the SINT in the lowest byte and the VTL in the next; before, the address of a
    /// page that is not used any more.
    pub interrupt: u64,
    /// The addresses of the two monitor pages, which we have no use for.
    pub monitor_pages: [u64; 2],
}

/// Root to guest: the answer to [`InitiateContact`] (`struct vmbus_channel_version_response`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VersionResponse {
    /// [`MessageKind::VersionResponse`]
    pub header: Header,
    /// 1 if that version is spoken.
    pub supported: u8,
    /// 0 if the connection stands.
    pub state: u8,
    /// Zero.
    pub padding: u16,
    /// From 5.0 on, where the guest posts all further messages.
    pub connection: u32,
}

/// Guest to root: interrupt another VP (`struct vmbus_channel_modifychannel`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ModifyChannel {
    /// [`MessageKind::ModifyChannel`]
    pub header: Header,
    /// The channel.
    pub relid: Relid,
    /// The VP.
    pub target_vp: u32,
}

/// Root to guest: from now on, that VP is interrupted
/// (`struct vmbus_channel_modifychannel_response`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ModifyChannelResponse {
    /// [`MessageKind::ModifyChannelResponse`]
    pub header: Header,
    /// The channel.
    pub relid: Relid,
    /// [`STATUS_SUCCESS`] or a failure.
    pub status: u32,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Header>() == 8);
    assert!(size_of::<OfferChannel>() == 196);
    assert!(offset_of!(OfferChannel, flags) == 56);
    assert!(offset_of!(OfferChannel, subchannel) == 180);
    assert!(offset_of!(OfferChannel, relid) == 184);
    assert!(offset_of!(OfferChannel, connection) == 192);
    assert!(size_of::<ChannelMessage>() == 12);
    assert!(size_of::<OpenChannel>() == 148);
    assert!(size_of::<OpenResult>() == 20);
    assert!(size_of::<GpadlHeader>() == 28);
    assert!(size_of::<GpadlBody>() == 16);
    assert!(size_of::<GpadlCreated>() == 20);
    assert!(size_of::<GpadlTeardown>() == 16);
    assert!(size_of::<GpadlTorndown>() == 12);
    assert!(size_of::<InitiateContact>() == 40);
    assert!(size_of::<VersionResponse>() == 16);
    assert!(size_of::<ModifyChannel>() == 16);
    assert!(size_of::<ModifyChannelResponse>() == 16);
};
