//! Work on a frame that its sender has left to somebody else: checksums, and the division of one
//! long frame into segments.
//!
//! It is said the way virtio-net says it (virtio 1.2, 5.1.6.2), which is also what the kernel's
//! taps speak: where a checksum starts and where it goes, and what the frame is to be cut into.

use std::fmt;
use std::ops::{BitAnd, BitOr};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::ETHERNET_HEADER;

/// Kinds of work that can be left to somebody, as a set.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Offloads(u8);

impl Offloads {
    /// Frames are as they should be on a wire.
    pub const NONE: Self = Self(0);
    /// A checksum that is yet to be computed, TCP's or UDP's, over IPv4 or IPv6. All that follow
    /// need it too.
    pub const CHECKSUM: Self = Self(1);
    /// TCP over IPv4 in frames longer than the MTU.
    pub const TSO4: Self = Self(2);
    /// TCP over IPv6 in frames longer than the MTU.
    pub const TSO6: Self = Self(4);
    /// The same of TCP whose headers say ECN (the first segment alone keeps CWR).
    pub const TSO_ECN: Self = Self(8);
    /// UDP in frames longer than the MTU, cut into datagrams.
    pub const USO: Self = Self(16);
    /// All of them.
    pub const ALL: Self = Self(31);

    /// Whether it has all that `other` has.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// A number to keep it in, such as an atomic.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The other way; bits that mean nothing are dropped.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & Self::ALL.0)
    }
}

impl BitOr for Offloads {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Offloads {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::CHECKSUM, "checksum"),
            (Self::TSO4, "tso4"),
            (Self::TSO6, "tso6"),
            (Self::TSO_ECN, "tso-ecn"),
            (Self::USO, "uso"),
        ];
        let names = names.iter().filter(|(bit, _)| self.contains(*bit)).map(|(_, name)| name);
        f.debug_set().entries(names).finish()
    }
}

/// What state a frame's TCP or UDP checksum is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Checksum {
    /// In the frame, whether right or wrong: nothing is known of it.
    #[default]
    Unknown,
    /// In the frame, and somebody has found it right.
    Valid,
    /// Not there yet. In its place is the sum of the pseudo-header, not complemented; whoever
    /// finishes it sums from `start` to the end of the frame, the checksum's own place included,
    /// and puts the complement there. What carries this has not been on a wire, and may be taken
    /// for right as it is.
    Partial {
        /// Of the first byte summed: where the TCP or UDP header begins, from the frame's start.
        start: u16,
        /// Of the checksum, from `start`: 16 in TCP, 6 in UDP.
        offset: u16,
    },
}

/// What a frame is to be cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Segmentation {
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
    /// UDP datagrams, over either.
    Udp,
}

/// How a frame is to be cut into shorter ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segments {
    /// Into what.
    pub kind: Segmentation,
    /// TCP with ECN: CWR, if set, belongs to the first segment alone.
    pub ecn: bool,
    /// Payload of each segment but the last, in bytes: the MSS. Never 0.
    pub size: u16,
    /// All headers together, Ethernet's to TCP's or UDP's, in bytes. A hint, which may be wrong or
    /// 0: whoever cuts the frame reads its headers.
    pub header_len: u16,
}

/// What is left to do to a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Offload {
    /// Its TCP or UDP checksum.
    pub checksum: Checksum,
    /// How it is to be cut, if it is; the checksum is then [`Checksum::Partial`].
    pub segments: Option<Segments>,
}

impl Offload {
    /// Nothing.
    pub const NONE: Self = Self { checksum: Checksum::Unknown, segments: None };

    /// What somebody who is handed the frame has to be able to do.
    pub fn needs(&self) -> Offloads {
        let checksum = match self.checksum {
            Checksum::Partial { .. } => Offloads::CHECKSUM,
            _ => Offloads::NONE,
        };
        let segments = self.segments.map_or(Offloads::NONE, |segments| {
            let ecn = if segments.ecn { Offloads::TSO_ECN } else { Offloads::NONE };
            match segments.kind {
                Segmentation::Tcp4 => Offloads::TSO4 | ecn,
                Segmentation::Tcp6 => Offloads::TSO6 | ecn,
                Segmentation::Udp => Offloads::USO,
            }
        });
        checksum | segments
    }

    /// Whether it makes sense for a frame of `len` bytes: the checksum is within it, and what is
    /// to be cut has one.
    pub fn fits(&self, len: usize) -> bool {
        let partial = match self.checksum {
            Checksum::Partial { start, offset } => {
                let (start, offset) = (usize::from(start), usize::from(offset));
                if start < ETHERNET_HEADER || start + offset + 2 > len {
                    return false;
                }
                true
            }
            _ => false,
        };
        self.segments.is_none_or(|segments| partial && segments.size > 0)
    }

    /// The same of the frame when `bytes` more are in its Ethernet header, such as a VLAN tag's.
    #[must_use]
    pub fn shifted(mut self, bytes: u16) -> Self {
        if let Checksum::Partial { start, .. } = &mut self.checksum {
            *start = start.saturating_add(bytes);
        }
        if let Some(segments) = &mut self.segments {
            segments.header_len = segments.header_len.saturating_add(bytes);
        }
        self
    }
}

/// The header in front of a frame on a tap with `IFF_VNET_HDR`: `struct virtio_net_hdr` of
/// `linux/virtio_net.h`, in the byte order of the host.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct VirtioNetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Headers in bytes, a hint.
    pub hdr_len: u16,
    /// Payload of each segment in bytes.
    pub gso_size: u16,
    /// See [`Checksum::Partial`].
    pub csum_start: u16,
    /// See [`Checksum::Partial`].
    pub csum_offset: u16,
}

const _: () = assert!(size_of::<VirtioNetHeader>() == 10);

impl From<Offload> for VirtioNetHeader {
    fn from(offload: Offload) -> Self {
        let mut header = Self { gso_type: VIRTIO_NET_HDR_GSO_NONE as u8, ..Self::default() };
        match offload.checksum {
            Checksum::Unknown => {}
            Checksum::Valid => header.flags = VIRTIO_NET_HDR_F_DATA_VALID as u8,
            Checksum::Partial { start, offset } => {
                header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
                header.csum_start = start;
                header.csum_offset = offset;
            }
        }
        if let Some(segments) = offload.segments {
            let kind = match segments.kind {
                Segmentation::Tcp4 => VIRTIO_NET_HDR_GSO_TCPV4,
                Segmentation::Tcp6 => VIRTIO_NET_HDR_GSO_TCPV6,
                Segmentation::Udp => VIRTIO_NET_HDR_GSO_UDP_L4,
            };
            let ecn = if segments.ecn { VIRTIO_NET_HDR_GSO_ECN } else { 0 };
            header.gso_type = (kind | ecn) as u8;
            header.gso_size = segments.size;
            header.hdr_len = segments.header_len;
        }
        header
    }
}

/// A header that says something this room has no word for, such as fragmented UDP (UFO).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the frame asks for an offload that is not known")]
pub struct UnknownOffload;

impl TryFrom<VirtioNetHeader> for Offload {
    type Error = UnknownOffload;

    fn try_from(header: VirtioNetHeader) -> Result<Self, UnknownOffload> {
        let flag = |flag: u32| u32::from(header.flags) & flag != 0;
        let checksum = if flag(VIRTIO_NET_HDR_F_NEEDS_CSUM) {
            Checksum::Partial { start: header.csum_start, offset: header.csum_offset }
        } else if flag(VIRTIO_NET_HDR_F_DATA_VALID) {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        let kind = match u32::from(header.gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => return Ok(Self { checksum, segments: None }),
            VIRTIO_NET_HDR_GSO_TCPV4 => Segmentation::Tcp4,
            VIRTIO_NET_HDR_GSO_TCPV6 => Segmentation::Tcp6,
            VIRTIO_NET_HDR_GSO_UDP_L4 => Segmentation::Udp,
            _ => return Err(UnknownOffload),
        };
        let segments = Segments {
            kind,
            ecn: u32::from(header.gso_type) & VIRTIO_NET_HDR_GSO_ECN != 0,
            size: header.gso_size,
            header_len: header.hdr_len,
        };
        Ok(Self { checksum, segments: Some(segments) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever a header says, it is either unknown or comes back as it was.
        #[test]
        fn headers_keep_their_meaning(
            flags in 0u8..3, gso_type: u8, hdr_len: u16, gso_size: u16, csum_start: u16, csum_offset: u16,
        ) {
            let header =
                VirtioNetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset };
            if let Ok(offload) = Offload::try_from(header) {
                let back = VirtioNetHeader::from(offload);
                prop_assert_eq!(Offload::try_from(back), Ok(offload));
                prop_assert_eq!(back.flags, header.flags);
                if offload.segments.is_some() {
                    prop_assert_eq!(back.gso_type, header.gso_type);
                    prop_assert_eq!(back.gso_size, header.gso_size);
                }
            } else {
                prop_assert!(!matches!(gso_type & 0x7f, 0 | 1 | 4 | 5));
            }
        }
    }

    #[test]
    fn an_offload_must_fit_its_frame() {
        let partial = |start, offset| Offload {
            checksum: Checksum::Partial { start, offset },
            segments: None,
        };
        assert!(partial(34, 16).fits(52));
        assert!(!partial(34, 16).fits(51));
        assert!(!partial(13, 16).fits(60));
        assert!(!partial(u16::MAX, u16::MAX).fits(60));
        let cut =
            |size| Some(Segments { kind: Segmentation::Tcp4, ecn: false, size, header_len: 0 });
        assert!(!Offload { segments: cut(1448), ..Offload::NONE }.fits(9000));
        assert!(Offload { segments: cut(1448), ..partial(34, 16) }.fits(9000));
        assert!(!Offload { segments: cut(0), ..partial(34, 16) }.fits(9000));
    }

    #[test]
    fn a_tag_shifts_what_is_behind_it() {
        let cut = |start, header_len| Offload {
            checksum: Checksum::Partial { start, offset: 16 },
            segments: Some(Segments { kind: Segmentation::Tcp4, ecn: false, size: 9, header_len }),
        };
        assert_eq!(cut(34, 54).shifted(4), cut(38, 58));
        assert_eq!(Offload::NONE.shifted(4), Offload::NONE);
    }

    #[test]
    fn needs_are_named() {
        let offload = Offload {
            checksum: Checksum::Partial { start: 34, offset: 16 },
            segments: Some(Segments {
                kind: Segmentation::Tcp6,
                ecn: true,
                size: 1440,
                header_len: 0,
            }),
        };
        let needs = Offloads::CHECKSUM | Offloads::TSO6 | Offloads::TSO_ECN;
        assert_eq!(offload.needs(), needs);
        assert!(Offloads::ALL.contains(needs));
        assert!(!needs.contains(Offloads::TSO4));
        assert_eq!(format!("{needs:?}"), r#"{"checksum", "tso6", "tso-ecn"}"#);
        assert_eq!(Offloads::from_bits(0xff), Offloads::ALL);
    }
}
