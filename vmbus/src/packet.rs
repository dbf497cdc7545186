//! The packets in a ring: a 16-byte descriptor, headers that depend on the packet's type, and the
//! payload, which belongs to whoever opened the channel.
//!
//! [`Packet`] looks at a *private* copy of the bytes (see [`Incoming::read`]), so what has been
//! checked stays true. Layouts: `struct vmpacket_descriptor` and its kin in Linux's
//! include/linux/hyperv.h.
//!
//! [`Incoming::read`]: crate::ring::Incoming::read

use open_enum::open_enum;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in a guest page.
const PAGE: u64 = 4096;

/// What headers a packet has (`enum vmbus_packet_type`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u16)]
pub enum PacketKind {
    /// Payload alone.
    InBand = 6,
    /// Names ranges of a buffer that the other side has mapped before ([`Packet::transfer_pages`]).
    TransferPages = 7,
    /// Names guest pages ([`Packet::gpa_ranges`]).
    GpaDirect = 9,
    /// Answers the packet with the same transaction id.
    Completion = 11,
}

/// The flags of a packet.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct PacketFlags(pub u16);

impl PacketFlags {
    /// None set.
    pub const NONE: Self = Self(0);
    /// The sender wants a completion (`VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED`).
    pub const COMPLETION_REQUESTED: Self = Self(1);

    /// Whether the sender wants a completion.
    pub fn completion_requested(self) -> bool {
        self.0 & Self::COMPLETION_REQUESTED.0 != 0
    }
}

/// What every packet begins with (`struct vmpacket_descriptor`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    /// What headers follow.
    pub kind: PacketKind,
    /// Where the payload starts, from the descriptor's start, in units of 8 bytes.
    pub offset8: u16,
    /// The whole packet, descriptor included and trailer not, in units of 8 bytes.
    pub len8: u16,
    /// Flags.
    pub flags: PacketFlags,
    /// Chosen by the sender; its completion repeats it.
    pub transaction_id: u64,
}

/// Bytes in a [`Descriptor`].
pub const DESCRIPTOR_SIZE: usize = size_of::<Descriptor>();
/// Bytes that follow each packet in a ring: the offset at which it began, in the upper half.
pub const TRAILER_SIZE: usize = 8;

const _: () = assert!(DESCRIPTOR_SIZE == 16);

/// Bytes in the ring for a packet with `len` bytes of headers and payload: descriptor, padding to
/// a multiple of 8 and trailer included.
pub const fn ring_size(len: usize) -> usize {
    DESCRIPTOR_SIZE + len.next_multiple_of(8) + TRAILER_SIZE
}

/// Why a packet makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PacketError {
    /// The descriptor's lengths contradict each other.
    #[error("a packet of {len8} words has its payload at word {offset8}")]
    Descriptor {
        /// [`Descriptor::offset8`]
        offset8: u16,
        /// [`Descriptor::len8`]
        len8: u16,
    },
    /// The packet ends after what the ring holds.
    #[error("a packet of {len} bytes where the ring holds {available}")]
    PastWriteIndex {
        /// The packet's bytes in the ring.
        len: u32,
        /// What lies between the indices.
        available: u32,
    },
    /// The receiver's buffer is smaller than the packet.
    #[error("a packet of {len} bytes is longer than any this channel takes")]
    TooLong {
        /// Bytes of headers and payload.
        len: usize,
    },
    /// Another packet type was expected.
    #[error("packet type {0} has no page ranges")]
    Kind(u16),
    /// The headers end before the ranges they announce.
    #[error("the page ranges reach past the packet's headers")]
    Ranges,
}

/// One packet, in private memory. Its lengths are checked.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'b> {
    /// What headers it has.
    pub kind: PacketKind,
    /// Its flags.
    pub flags: PacketFlags,
    /// The sender's number for it.
    pub transaction_id: u64,
    headers: &'b [u8],
    /// What it carries: at most 7 bytes longer than what was sent, as lengths are in words.
    pub payload: &'b [u8],
}

impl<'b> Packet<'b> {
    /// The packet with this descriptor, whose headers and payload are `body`.
    pub fn new(descriptor: Descriptor, body: &'b [u8]) -> Result<Self, PacketError> {
        let Descriptor { kind, offset8, len8, flags, transaction_id } = descriptor;
        let split = usize::from(offset8).checked_sub(DESCRIPTOR_SIZE / 8).map(|words| words * 8);
        let (headers, payload) = split
            .and_then(|at| body.split_at_checked(at))
            .ok_or(PacketError::Descriptor { offset8, len8 })?;
        Ok(Self { kind, flags, transaction_id, headers, payload })
    }

    /// The guest pages that a [`PacketKind::GpaDirect`] packet names. All of them are checked to
    /// lie in the packet before any is handed out; whether memory is there is another matter.
    pub fn gpa_ranges(&self) -> Result<GpaRanges<'b>, PacketError> {
        if self.kind != PacketKind::GpaDirect {
            return Err(PacketError::Kind(self.kind.0));
        }
        let (header, bytes) =
            RangeHeader::read_from_prefix(self.headers).map_err(|_| PacketError::Ranges)?;
        let ranges = GpaRanges { left: header.count, bytes };
        let mut probe = ranges;
        while probe.left > 0 {
            probe.parse_next().ok_or(PacketError::Ranges)?;
        }
        Ok(ranges)
    }

    /// The ranges of the shared buffer that a [`PacketKind::TransferPages`] packet names.
    pub fn transfer_pages(&self) -> Result<TransferPages<'b>, PacketError> {
        if self.kind != PacketKind::TransferPages {
            return Err(PacketError::Kind(self.kind.0));
        }
        let (header, rest) =
            TransferHeader::read_from_prefix(self.headers).map_err(|_| PacketError::Ranges)?;
        let ranges = usize::try_from(header.range_count)
            .ok()
            .and_then(|count| count.checked_mul(size_of::<TransferRange>()))
            .and_then(|len| rest.get(..len))
            .ok_or(PacketError::Ranges)?;
        Ok(TransferPages { buffer: header.buffer, ranges })
    }
}

/// Before the ranges of a GPA-direct packet.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RangeHeader {
    reserved: u32,
    count: u32,
}

/// `struct gpa_range`, without its page numbers.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RangeStart {
    len: u32,
    offset: u32,
}

/// How many page numbers follow a range of `len` bytes that starts at byte `offset`.
const fn page_count(len: u32, offset: u32) -> u64 {
    (len as u64 + offset as u64).div_ceil(PAGE)
}

/// The ranges of a GPA-direct packet, in order; all are known to lie in the packet.
#[derive(Clone, Copy, Debug)]
pub struct GpaRanges<'b> {
    left: u32,
    bytes: &'b [u8],
}

impl<'b> GpaRanges<'b> {
    /// No ranges.
    pub const EMPTY: Self = Self { left: 0, bytes: &[] };

    fn parse_next(&mut self) -> Option<GpaRange<'b>> {
        let (start, rest) = RangeStart::read_from_prefix(self.bytes).ok()?;
        let bytes = usize::try_from(page_count(start.len, start.offset)).ok()?.checked_mul(8)?;
        let (pages, rest) = rest.split_at_checked(bytes)?;
        self.bytes = rest;
        self.left = self.left.checked_sub(1)?;
        // A start beyond the first page only skips pages.
        let skipped = usize::try_from(u64::from(start.offset) / PAGE).ok()?.checked_mul(8)?;
        Some(GpaRange {
            len: start.len,
            offset: start.offset % PAGE as u32,
            pages: pages.get(skipped..).unwrap_or_default(),
        })
    }
}

impl<'b> Iterator for GpaRanges<'b> {
    type Item = GpaRange<'b>;

    fn next(&mut self) -> Option<GpaRange<'b>> {
        if self.left == 0 { None } else { self.parse_next() }
    }
}

/// Bytes that follow each other in the sender's view, in guest pages that need not.
#[derive(Clone, Copy, Debug)]
pub struct GpaRange<'b> {
    /// How many bytes.
    pub len: u32,
    /// Where in the first page they start, below 4096.
    pub offset: u32,
    pages: &'b [u8],
}

impl<'b> GpaRange<'b> {
    /// The guest page numbers, `ceil((offset + len) / 4096)` of them.
    pub fn pfns(&self) -> impl ExactSizeIterator<Item = u64> + use<'b> {
        self.pages.chunks_exact(8).map(page_number)
    }

    /// The same bytes as stretches of guest physical memory, neighbouring pages merged.
    pub fn segments(&self) -> Segments<'b> {
        Segments { left: self.len, offset: self.offset, pages: self.pages }
    }
}

fn page_number(bytes: &[u8]) -> u64 {
    u64::read_from_bytes(bytes).unwrap_or(u64::MAX)
}

/// A stretch of guest physical memory that a packet names. It may not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first byte's guest physical address.
    pub gpa: u64,
    /// Bytes, at least one.
    pub len: u32,
}

/// See [`GpaRange::segments`].
#[derive(Clone, Debug)]
pub struct Segments<'b> {
    left: u32,
    offset: u32,
    pages: &'b [u8],
}

impl Iterator for Segments<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        if self.left == 0 {
            return None;
        }
        let (first, mut rest) = self.pages.split_at_checked(8)?;
        let first = page_number(first);
        // Addresses that overflow become the highest one, where no memory is.
        let gpa = first.saturating_mul(PAGE).saturating_add(u64::from(self.offset));
        let mut len = (PAGE as u32 - self.offset).min(self.left);
        let mut next = first.checked_add(1);
        while len < self.left
            && let Some((page, after)) = rest.split_at_checked(8)
            && next == Some(page_number(page))
        {
            len += (PAGE as u32).min(self.left - len);
            next = next.and_then(|page| page.checked_add(1));
            rest = after;
        }
        self.left -= len;
        self.offset = 0;
        self.pages = rest;
        Some(Segment { gpa, len })
    }
}

/// Before the ranges of a transfer-pages packet (`struct vmtransfer_page_packet_header`).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct TransferHeader {
    buffer: u16,
    sender_owns_set: u8,
    reserved: u8,
    range_count: u32,
}

/// One range of a transfer-pages packet (`struct vmtransfer_page_range`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TransferRange {
    /// Bytes.
    pub len: u32,
    /// Where in the shared buffer they start.
    pub offset: u32,
}

/// What a transfer-pages packet names.
#[derive(Clone, Copy, Debug)]
pub struct TransferPages<'b> {
    /// The id under which the buffer was shared.
    pub buffer: u16,
    ranges: &'b [u8],
}

impl<'b> TransferPages<'b> {
    /// The ranges; they may reach past the buffer.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = TransferRange> + use<'b> {
        self.ranges.chunks_exact(size_of::<TransferRange>()).map(|bytes| {
            TransferRange::read_from_bytes(bytes).unwrap_or(TransferRange { len: 0, offset: 0 })
        })
    }
}

/// Writes the headers of a GPA-direct packet for ranges `(len, offset, page numbers)` to the front
/// of `buffer` and returns them, as [`Outgoing::push_with_headers`] takes them. `None` if the
/// buffer is too small or a range has not exactly the pages it needs.
///
/// [`Outgoing::push_with_headers`]: crate::ring::Outgoing::push_with_headers
pub fn write_gpa_ranges<'b>(
    buffer: &'b mut [u8],
    ranges: &[(u32, u32, &[u64])],
) -> Option<&'b [u8]> {
    let mut at = 0usize;
    let mut put = |bytes: &[u8]| -> Option<usize> {
        let end = at.checked_add(bytes.len())?;
        buffer.get_mut(at..end)?.copy_from_slice(bytes);
        at = end;
        Some(end)
    };
    let mut end =
        put(RangeHeader { reserved: 0, count: u32::try_from(ranges.len()).ok()? }.as_bytes())?;
    for &(len, offset, pages) in ranges {
        if page_count(len, offset) != pages.len() as u64 {
            return None;
        }
        put(RangeStart { len, offset }.as_bytes())?;
        end = put(pages.as_bytes())?;
    }
    buffer.get(..end)
}

/// Writes the headers of a transfer-pages packet to the front of `buffer` and returns them.
/// `None` if the buffer is too small.
pub fn write_transfer_pages<'b>(
    buffer: &'b mut [u8],
    shared_buffer: u16,
    ranges: &[TransferRange],
) -> Option<&'b [u8]> {
    let header = TransferHeader {
        buffer: shared_buffer,
        sender_owns_set: 0,
        reserved: 0,
        range_count: u32::try_from(ranges.len()).ok()?,
    };
    let end = size_of::<TransferHeader>().checked_add(size_of_val(ranges))?;
    let (front, rest) = buffer.get_mut(..end)?.split_at_mut_checked(size_of::<TransferHeader>())?;
    front.copy_from_slice(header.as_bytes());
    rest.copy_from_slice(ranges.as_bytes());
    buffer.get(..end)
}
