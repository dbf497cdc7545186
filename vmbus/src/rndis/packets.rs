//! Frames as RNDIS messages: the fixed part, and what is said beside the frame.

use open_enum::open_enum;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Body of [`MessageKind::Packet`](super::MessageKind::Packet).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PacketBody {
    /// Where the frame begins.
    pub data_offset: u32,
    /// Bytes of it.
    pub data_len: u32,
    /// Unused.
    pub out_of_band_offset: u32,
    /// 0
    pub out_of_band_len: u32,
    /// 0
    pub out_of_band_count: u32,
    /// Where [`PacketInfo`] begins.
    pub info_offset: u32,
    /// Bytes of all of it.
    pub info_len: u32,
    /// 0
    pub vc_handle: u32,
    /// 0
    pub reserved: u32,
}

const _: () = assert!(size_of::<PacketBody>() == 36);

/// Before each piece of per-packet information.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PacketInfo {
    /// Bytes, this and the value included.
    pub size: u32,
    /// What the value is.
    pub kind: PacketInfoKind,
    /// Where the value begins, from here.
    pub value_offset: u32,
}

const _: () = assert!(size_of::<PacketInfo>() == 12);

/// What a piece of per-packet information is; the uppermost bit means that its number is of
/// RNDIS's own, not of NDIS (`enum ndis_per_pkt_info_type`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum PacketInfoKind {
    /// [`TransmitChecksum`] or [`ReceiveChecksum`]
    Checksum = 0,
    /// [`LargeSend`]
    LargeSend = 2,
    /// [`VlanTag`]
    Vlan = 6,
    /// The frame's hash, a `u32`.
    HashValue = 9,
    /// [`PacketId`]
    PacketId = 0x8000_0001,
}

/// Which checksums are still to be filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct TransmitChecksum(pub u32);

impl TransmitChecksum {
    /// An IPv4 packet.
    pub const IPV4: u32 = 1 << 0;
    /// An IPv6 packet.
    pub const IPV6: u32 = 1 << 1;
    /// Its TCP checksum.
    pub const TCP: u32 = 1 << 2;
    /// Its UDP checksum.
    pub const UDP: u32 = 1 << 3;
    /// Its IPv4 header's checksum.
    pub const IP_HEADER: u32 = 1 << 4;

    /// These `bits` of a packet whose TCP or UDP header begins at byte `transport_offset` of the
    /// frame, below 1024.
    pub const fn new(bits: u32, transport_offset: u16) -> Self {
        Self(bits & 0x1F | (transport_offset as u32 & 0x3FF) << 16)
    }

    /// Whether this is asked for.
    pub const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// Where the TCP or UDP header begins, from the frame's first byte.
    pub const fn transport_offset(self) -> u16 {
        (self.0 >> 16) as u16 & 0x3FF
    }
}

/// Which checksums are known to be right or wrong.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct ReceiveChecksum(pub u32);

impl ReceiveChecksum {
    /// TCP's is right.
    pub const TCP_SUCCEEDED: u32 = 1 << 3;
    /// UDP's is right.
    pub const UDP_SUCCEEDED: u32 = 1 << 4;
    /// The IPv4 header's is right.
    pub const IP_SUCCEEDED: u32 = 1 << 5;
}

/// That a frame is to be cut into segments, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct LargeSend(pub u32);

impl LargeSend {
    /// Of version 2: into segments of at most `segment_size` bytes of TCP payload, below 2^20. The
    /// TCP header begins at byte `transport_offset` of the frame, below 1024.
    pub const fn v2(is_ipv6: bool, segment_size: u32, transport_offset: u16) -> Self {
        let offset = (transport_offset as u32 & 0x3FF) << 20;
        Self(segment_size & 0xF_FFFF | offset | 1 << 30 | (is_ipv6 as u32) << 31)
    }

    /// Whether it is of version 2; version 1 has another layout.
    pub const fn is_v2(self) -> bool {
        self.0 & 1 << 30 != 0
    }

    /// Whether it is an IPv6 packet; else an IPv4 one.
    pub const fn is_ipv6(self) -> bool {
        self.0 & 1 << 31 != 0
    }

    /// The most bytes of TCP payload in a segment.
    pub const fn segment_size(self) -> u32 {
        self.0 & 0xF_FFFF
    }

    /// Where the TCP header begins, from the frame's first byte.
    pub const fn transport_offset(self) -> u16 {
        (self.0 >> 20) as u16 & 0x3FF
    }
}

/// A VLAN tag that is not in the frame: priority in bits 0 to 2, bit 3 drop eligible, VLAN in bits
/// 4 to 15. On the wire it is the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct VlanTag(pub u32);

impl VlanTag {
    /// As in the frame (IEEE 802.1Q's TCI).
    pub const fn tci(self) -> u16 {
        let (priority, eligible, id) = (self.0 & 7, self.0 >> 3 & 1, self.0 >> 4 & 0xFFF);
        (priority << 13 | eligible << 12 | id) as u16
    }

    /// From a frame's TCI.
    pub const fn from_tci(tci: u16) -> Self {
        let tci = tci as u32;
        Self(tci >> 13 | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4)
    }
}

/// Which part of a coalesced frame a slot has (`struct rndis_pktinfo_id`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PacketId {
    /// 1
    pub version: u8,
    /// The `PacketId::*` flags.
    pub flags: u8,
    /// The same for all parts.
    pub id: u16,
}

const _: () = assert!(size_of::<PacketId>() == 4);

impl PacketId {
    /// A part of a frame in several slots.
    pub const PART: u8 = 1 << 0;
    /// The first of them.
    pub const FIRST: u8 = 1 << 1;
    /// The last of them.
    pub const LAST: u8 = 1 << 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_turned_round_and_back() {
        // Priority 5, drop eligible, VLAN 0x123.
        let tag = VlanTag(0x123 << 4 | 1 << 3 | 5);
        assert_eq!(tag.tci(), 0xB123);
        for tci in [0, 1, 0xB123, 0xFFFF, 0x1000, 0xE000] {
            assert_eq!(VlanTag::from_tci(tci).tci(), tci);
        }
    }

    #[test]
    fn fields_lie_where_ndis_has_them() {
        let offload = LargeSend(1448 | 34 << 20 | 1 << 30);
        assert!(offload.is_v2() && !offload.is_ipv6());
        assert_eq!((offload.segment_size(), offload.transport_offset()), (1448, 34));
        let checksum = TransmitChecksum(TransmitChecksum::IPV6 | TransmitChecksum::UDP | 54 << 16);
        assert!(checksum.has(TransmitChecksum::UDP) && !checksum.has(TransmitChecksum::TCP));
        assert_eq!(checksum.transport_offset(), 54);
        assert_eq!(LargeSend::v2(false, 1448, 34), offload);
        let bits = TransmitChecksum::IPV6 | TransmitChecksum::UDP;
        assert_eq!(TransmitChecksum::new(bits, 54), checksum);
    }
}
