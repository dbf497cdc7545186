//! A NIC's settings: which there are, and their values where those are structures.

use open_enum::open_enum;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Names an object that can be queried or set (`OID_*`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum Oid {
    /// All objects that can be queried or set.
    SupportedList = 0x0001_0101,
    /// 0: ready.
    HardwareStatus = 0x0001_0102,
    /// 0: Ethernet.
    MediaSupported = 0x0001_0103,
    /// 0: Ethernet.
    MediaInUse = 0x0001_0104,
    /// Bytes of a frame that can be looked at before the rest.
    MaximumLookahead = 0x0001_0105,
    /// The MTU.
    MaximumFrameSize = 0x0001_0106,
    /// In units of 100 bits per second.
    LinkSpeed = 0x0001_0107,
    /// Bytes.
    TransmitBufferSpace = 0x0001_0108,
    /// Bytes.
    ReceiveBufferSpace = 0x0001_0109,
    /// Bytes.
    TransmitBlockSize = 0x0001_010A,
    /// Bytes.
    ReceiveBlockSize = 0x0001_010B,
    /// An IEEE number.
    VendorId = 0x0001_010C,
    /// Text, ended by a zero.
    VendorDescription = 0x0001_010D,
    /// A [`PacketFilter`].
    CurrentPacketFilter = 0x0001_010E,
    /// Bytes.
    CurrentLookahead = 0x0001_010F,
    /// Of the NDIS interface.
    DriverVersion = 0x0001_0110,
    /// The longest frame.
    MaximumTotalSize = 0x0001_0111,
    /// `NDIS_MAC_OPTION_*`
    MacOptions = 0x0001_0113,
    /// 0 up, 1 down.
    MediaConnectStatus = 0x0001_0114,
    /// The most frames in a packet.
    MaximumSendPackets = 0x0001_0115,
    /// Of the NIC.
    VendorDriverVersion = 0x0001_0116,
    /// [`ReceiveScaleCapabilities`]
    ReceiveScaleCapabilities = 0x0001_0203,
    /// [`ReceiveScaleParameters`]
    ReceiveScaleParameters = 0x0001_0204,
    /// [`ConfigParameter`]
    RndisConfigParameter = 0x0001_021B,
    /// Frames sent.
    TransmitOk = 0x0002_0101,
    /// Frames received.
    ReceiveOk = 0x0002_0102,
    /// Frames that could not be sent.
    TransmitError = 0x0002_0103,
    /// Frames that came damaged.
    ReceiveError = 0x0002_0104,
    /// Frames for which there was no room.
    ReceiveNoBuffer = 0x0002_0105,
    /// Text in UTF-16.
    FriendlyName = 0x0002_0216,
    /// The MAC address it was made with.
    PermanentAddress = 0x0101_0101,
    /// The MAC address it has.
    CurrentAddress = 0x0101_0102,
    /// Six bytes each.
    MulticastList = 0x0101_0103,
    /// How many there can be.
    MaximumListSize = 0x0101_0104,
    /// [`Offload`]
    OffloadCurrentConfig = 0xFC01_020B,
    /// [`OffloadParameters`]
    OffloadParameters = 0xFC01_020C,
    /// [`Offload`]
    OffloadHardwareCapabilities = 0xFC01_020D,
}

/// Which frames a guest wants (`NDIS_PACKET_TYPE_*`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct PacketFilter(pub u32);

impl PacketFilter {
    /// To its MAC address.
    pub const DIRECTED: u32 = 0x01;
    /// To groups on its list.
    pub const MULTICAST: u32 = 0x02;
    /// To any group.
    pub const ALL_MULTICAST: u32 = 0x04;
    /// To everybody.
    pub const BROADCAST: u32 = 0x08;
    /// All.
    pub const PROMISCUOUS: u32 = 0x20;

    /// Whether a frame to `destination` is wanted by a NIC with this `address`. Groups are not
    /// told apart.
    pub fn takes(self, destination: [u8; 6], address: [u8; 6]) -> bool {
        let wanted = match destination {
            [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF] => Self::BROADCAST,
            [first, ..] if first & 1 != 0 => Self::MULTICAST | Self::ALL_MULTICAST,
            _ if destination == address => Self::DIRECTED,
            _ => 0,
        };
        self.0 & (wanted | Self::PROMISCUOUS) != 0
    }
}

/// What an NDIS structure begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ObjectHeader {
    /// `NDIS_OBJECT_TYPE_*`
    pub kind: u8,
    /// Which version of the structure.
    pub revision: u8,
    /// Its bytes, this header included.
    pub size: u16,
}

const _: () = assert!(size_of::<ObjectHeader>() == 4);

/// [`ObjectHeader::kind`] of [`ReceiveScaleCapabilities`].
pub const OBJECT_RSS_CAPABILITIES: u8 = 0x88;
/// [`ObjectHeader::kind`] of [`ReceiveScaleParameters`].
pub const OBJECT_RSS_PARAMETERS: u8 = 0x89;
/// [`ObjectHeader::kind`] of [`Offload`].
pub const OBJECT_OFFLOAD: u8 = 0xA7;

/// How frames can be spread over queues (`NDIS_RECEIVE_SCALE_CAPABILITIES`, revision 2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReceiveScaleCapabilities {
    /// [`OBJECT_RSS_CAPABILITIES`], of [`ReceiveScaleCapabilities::SIZE`] bytes.
    pub header: ObjectHeader,
    /// `NDIS_RSS_CAPS_*`, and the hash function.
    pub flags: u32,
    /// Interrupts.
    pub interrupts: u32,
    /// Queues.
    pub queues: u32,
    /// Entries in the indirection table.
    pub entries: u16,
    /// Not in the structure.
    pub padding: u16,
}

const _: () = assert!(size_of::<ReceiveScaleCapabilities>() == 20);

impl ReceiveScaleCapabilities {
    /// Its bytes, without the padding.
    pub const SIZE: u16 = 18;
    /// Toeplitz' hash, over the addresses of IPv4 and IPv6 and the ports of TCP.
    pub const TOEPLITZ_TCP: u32 = 0x0000_0301;
}

/// How frames are to be spread over queues (`NDIS_RECEIVE_SCALE_PARAMETERS`, revision 2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReceiveScaleParameters {
    /// [`OBJECT_RSS_PARAMETERS`]
    pub header: ObjectHeader,
    /// The `ReceiveScaleParameters::*` flags.
    pub flags: u16,
    /// Unused.
    pub base_cpu: u16,
    /// Which hash.
    pub hash: u32,
    /// Bytes in the indirection table.
    pub table_size: u16,
    /// 0
    pub padding0: u16,
    /// Where it begins, from here.
    pub table_offset: u32,
    /// Bytes in the key.
    pub key_size: u16,
    /// 0
    pub padding1: u16,
    /// Where it begins, from here.
    pub key_offset: u32,
    /// Unused: masks of processors.
    pub masks: [u32; 3],
}

const _: () = assert!(size_of::<ReceiveScaleParameters>() == 40);

impl ReceiveScaleParameters {
    /// The hash is to stay.
    pub const HASH_UNCHANGED: u16 = 0x0002;
    /// The table is to stay.
    pub const TABLE_UNCHANGED: u16 = 0x0004;
    /// The key is to stay.
    pub const KEY_UNCHANGED: u16 = 0x0008;
    /// All frames to the first queue.
    pub const DISABLE: u16 = 0x0010;
}

/// Entries in an indirection table (`ITAB_NUM`), four bytes each.
pub const INDIRECTION_ENTRIES: usize = 128;
/// Bytes in a hash key.
pub const HASH_KEY: usize = 40;

/// What work can be left to the NIC (`NDIS_OFFLOAD`, up to revision 3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Offload {
    /// [`OBJECT_OFFLOAD`]
    pub header: ObjectHeader,
    /// Checksums.
    pub checksum: ChecksumOffload,
    /// None.
    pub large_send_v1: [u32; 4],
    /// None.
    pub ipsec_v1: [u32; 7],
    /// Cutting into segments.
    pub large_send_v2: LargeSendOffload,
    /// 0
    pub flags: u32,
    /// None.
    pub ipsec_v2: [u32; 8],
    /// Whether IPv4 segments are put together.
    pub coalescing_ipv4: u8,
    /// Whether IPv6 segments are put together.
    pub coalescing_ipv6: u8,
    /// 0
    pub padding: u16,
    /// None.
    pub encapsulated: [u32; 2],
}

const _: () = assert!(size_of::<Offload>() == 156);

impl Offload {
    /// Bytes of revision 1, which ends before `ipsec_v2`.
    pub const SIZE_1: usize = 112;
    /// Bytes of revision 2, which ends before the coalescing.
    pub const SIZE_2: usize = 144;
    /// Bytes of revision 3.
    pub const SIZE_3: usize = 156;
    /// Ethernet frames (`NDIS_ENCAPSULATION_IEEE_802_3`).
    pub const ETHERNET: u32 = 2;
}

/// Which checksums can be left to the NIC, two bits each.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChecksumOffload {
    /// [`Offload::ETHERNET`]
    pub ipv4_transmit_encapsulation: u32,
    /// The `ChecksumOffload::*` bits.
    pub ipv4_transmit: u32,
    /// [`Offload::ETHERNET`]
    pub ipv4_receive_encapsulation: u32,
    /// The `ChecksumOffload::*` bits.
    pub ipv4_receive: u32,
    /// [`Offload::ETHERNET`]
    pub ipv6_transmit_encapsulation: u32,
    /// The `ChecksumOffload::*` bits.
    pub ipv6_transmit: u32,
    /// [`Offload::ETHERNET`]
    pub ipv6_receive_encapsulation: u32,
    /// The `ChecksumOffload::*` bits.
    pub ipv6_receive: u32,
}

const _: () = assert!(size_of::<ChecksumOffload>() == 32);

impl ChecksumOffload {
    /// With options in IPv4's header, or extension headers of IPv6.
    pub const IP_OPTIONS: u32 = 0x001;
    /// With options in TCP's header.
    pub const TCP_OPTIONS: u32 = 0x004;
    /// TCP's.
    pub const TCP: u32 = 0x010;
    /// UDP's.
    pub const UDP: u32 = 0x040;
    /// IPv4's header.
    pub const IP_HEADER: u32 = 0x100;
}

/// Which packets can be cut into segments by the NIC (`NDIS_TCP_LARGE_SEND_OFFLOAD_V2`).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LargeSendOffload {
    /// [`Offload::ETHERNET`]
    pub ipv4_encapsulation: u32,
    /// The largest, in bytes.
    pub ipv4_max: u32,
    /// The fewest segments.
    pub ipv4_min_segments: u32,
    /// [`Offload::ETHERNET`]
    pub ipv6_encapsulation: u32,
    /// The largest, in bytes.
    pub ipv6_max: u32,
    /// The fewest segments.
    pub ipv6_min_segments: u32,
    /// [`ChecksumOffload::IP_OPTIONS`] and [`ChecksumOffload::TCP_OPTIONS`].
    pub ipv6_options: u32,
}

const _: () = assert!(size_of::<LargeSendOffload>() == 28);

/// What work is left to the NIC (`NDIS_OFFLOAD_PARAMETERS`); later revisions are longer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OffloadParameters {
    /// Its revision and length.
    pub header: ObjectHeader,
    /// IPv4's header.
    pub ipv4_checksum: ChecksumSetting,
    /// TCP over IPv4.
    pub tcp4_checksum: ChecksumSetting,
    /// UDP over IPv4.
    pub udp4_checksum: ChecksumSetting,
    /// TCP over IPv6.
    pub tcp6_checksum: ChecksumSetting,
    /// UDP over IPv6.
    pub udp6_checksum: ChecksumSetting,
    /// Not here.
    pub large_send_v1: u8,
    /// Not here.
    pub ipsec_v1: u8,
    /// 1 off, 2 on.
    pub large_send_ipv4: u8,
    /// 1 off, 2 on.
    pub large_send_ipv6: u8,
    /// Not here.
    pub connections: [u8; 2],
    /// 0
    pub padding: u8,
    /// 0
    pub flags: u32,
}

const _: () = assert!(size_of::<OffloadParameters>() == 20);

impl OffloadParameters {
    /// From revision 3 on: where the two bytes for the coalescing of IPv4 and IPv6 are; 1 off, 2
    /// on.
    pub const COALESCING_OFFSET: usize = 22;
}

/// What is left to the NIC of a checksum.
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u8)]
pub enum ChecksumSetting {
    /// What was before.
    NoChange = 0,
    /// Nothing.
    Off = 1,
    /// Of frames sent.
    Transmit = 2,
    /// Of frames received.
    Receive = 3,
    /// Of both.
    Both = 4,
}

/// Value of [`Oid::RndisConfigParameter`]: a name and a value, both UTF-16.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigParameter {
    /// Where the name begins, from here.
    pub name_offset: u32,
    /// Its bytes.
    pub name_len: u32,
    /// 0 a number, 2 text.
    pub kind: u32,
    /// Where the value begins, from here.
    pub value_offset: u32,
    /// Its bytes.
    pub value_len: u32,
}

const _: () = assert!(size_of::<ConfigParameter>() == 20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_take_what_they_name() {
        let me = [2, 0, 0, 0, 0, 1];
        let all = [0xFF; 6];
        let group = [1, 0, 0x5E, 0, 0, 1];
        let other = [2, 0, 0, 0, 0, 2];
        let takes =
            |filter: u32| [me, all, group, other].map(|to| PacketFilter(filter).takes(to, me));
        assert_eq!(takes(0), [false; 4]);
        assert_eq!(takes(PacketFilter::DIRECTED), [true, false, false, false]);
        assert_eq!(takes(PacketFilter::BROADCAST), [false, true, false, false]);
        assert_eq!(takes(PacketFilter::MULTICAST), [false, false, true, false]);
        assert_eq!(takes(0xD), [true, true, true, false]);
        assert_eq!(takes(PacketFilter::PROMISCUOUS), [true; 4]);
    }
}
