//! Descriptors, 16 bytes each: buffers in the guest's memory, and what is to be done or was done with
//! them (Intel 317453, 3.2.3 and 3.3.3 to 3.3.7).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bits::txd;

/// Bytes of a descriptor.
pub(super) const SIZE: u64 = 16;
/// Where a transmit descriptor of any kind has its status byte.
pub(super) const STATUS: u64 = 12;
/// Where a receive descriptor has all that the NIC writes.
pub(super) const WRITTEN: u64 = 8;

/// What the NIC writes into a receive descriptor, in one piece.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub(super) struct Received {
    /// Bytes in this buffer.
    pub length: u16,
    /// The packet checksum, which this NIC leaves at 0.
    pub checksum: u16,
    pub status: u8,
    pub errors: u8,
    /// The tag control information of the VLAN tag that was taken off.
    pub special: u16,
}

const _: () = assert!(size_of::<Received>() as u64 == SIZE - WRITTEN);

/// A transmit descriptor whose kind is not known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Raw {
    pub low: u64,
    /// 20 bits of length, 4 of kind, and the command byte; a legacy descriptor has other fields below
    /// the command.
    pub lower: u32,
    pub upper: u32,
}

const _: () = assert!(size_of::<Raw>() as u64 == SIZE);

/// The kinds of transmit descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Legacy(Legacy),
    Context(Context),
    Data(Data),
    /// A kind that this NIC does not know.
    Unknown,
}

impl Raw {
    /// The command byte.
    pub(super) fn command(self) -> u8 {
        (self.lower >> 24) as u8
    }

    /// Reads it as what it says it is.
    pub(super) fn kind(self) -> Kind {
        let bytes = self.as_bytes();
        if self.command() & txd::DEXT == 0 {
            return Legacy::read_from_bytes(bytes).map_or(Kind::Unknown, Kind::Legacy);
        }
        match (self.lower >> 20) as u8 & 0xf {
            txd::DTYP_CONTEXT => {
                Context::read_from_bytes(bytes).map_or(Kind::Unknown, Kind::Context)
            }
            txd::DTYP_DATA => Data::read_from_bytes(bytes).map_or(Kind::Unknown, Kind::Data),
            _ => Kind::Unknown,
        }
    }
}

/// A buffer, as the first of these NICs had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Legacy {
    pub address: u64,
    pub length: u16,
    /// Where the checksum goes, if there is to be one.
    pub checksum_offset: u8,
    pub command: u8,
    pub status: u8,
    /// Where the checksum begins.
    pub checksum_start: u8,
    /// Tag control information.
    pub special: u16,
}

const _: () = assert!(size_of::<Legacy>() as u64 == SIZE);

/// What data descriptors that follow have done to their packets.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub(super) struct Context {
    /// The IP header: its start, its checksum's place, its last byte.
    pub ip_start: u8,
    pub ip_offset: u8,
    pub ip_end: u16,
    /// The same for TCP or UDP, where an end of 0 is the packet's.
    pub transport_start: u8,
    pub transport_offset: u8,
    pub transport_end: u16,
    /// 20 bits of payload length, the kind, and TUCMD.
    pub command: u32,
    pub status: u8,
    /// Bytes of all headers, for packets that are cut.
    pub header_len: u8,
    /// Payload of each segment.
    pub segment_size: u16,
}

const _: () = assert!(size_of::<Context>() as u64 == SIZE);

impl Context {
    /// The bits of TUCMD.
    pub(super) fn tucmd(&self) -> u8 {
        (self.command >> 24) as u8
    }
}

/// A buffer of a packet that the last context is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Data {
    pub address: u64,
    /// 20 bits of length, the kind, and the command byte.
    pub lower: u32,
    pub status: u8,
    /// What is to be done: counts in a packet's first descriptor.
    pub options: u8,
    /// Tag control information.
    pub special: u16,
}

const _: () = assert!(size_of::<Data>() as u64 == SIZE);

impl Data {
    /// Bytes of the buffer.
    pub(super) fn length(&self) -> u32 {
        self.lower & 0xf_ffff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let raw = |lower| Raw { low: 0x1000, lower, upper: 0x0007_0301 };
        let Kind::Legacy(legacy) = raw(0x0b12_0040).kind() else { panic!("no legacy descriptor") };
        assert_eq!((legacy.address, legacy.length, legacy.checksum_offset), (0x1000, 0x40, 0x12));
        assert_eq!((legacy.command, legacy.checksum_start, legacy.special), (0x0b, 3, 7));
        let Kind::Data(data) = raw(0x2b1a_bcde).kind() else { panic!("no data descriptor") };
        assert_eq!((data.length(), data.options, data.special), (0xa_bcde, 3, 7));
        let Kind::Context(context) = raw(0x2700_1000).kind() else { panic!("no context") };
        assert_eq!((context.tucmd() & 3, context.header_len, context.segment_size), (3, 3, 7));
        assert_eq!(raw(0x2020_0000).kind(), Kind::Unknown);
    }
}
