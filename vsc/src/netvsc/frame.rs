//! What has come into the receive buffer: a frame, or a control message.
//!
//! A slot's front is copied out once, checked, and then believed. The frame itself stays where it is
//! until the caller copies it; whatever is there by then, it lies in the buffer.

use vmbus::packet::TransferRange;
use vmbus::rndis::{
    HEADER_SIZE, Header, MessageKind, PacketBody, PacketId, PacketInfo, PacketInfoKind,
    ReceiveChecksum, VlanTag,
};
use zerocopy::FromBytes;

use super::{ETHERNET_HEADER, Fault};
use crate::SharedBuffer;

/// A frame's message up to the per-packet information.
const FIXED: usize = HEADER_SIZE + size_of::<PacketBody>();

/// The most bytes of per-packet information; hosts send less than a hundred.
const MAX_INFO: usize = 256;

/// A frame that has come. It lies in the receive buffer until the closure that is shown it returns.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a, B> {
    buffer: &'a B,
    at: usize,
    len: usize,
    /// Which of its checksums the host knows to be right.
    pub checksum: ReceiveChecksum,
    /// Its VLAN tag, if it is not in the frame.
    pub vlan: Option<VlanTag>,
    /// The hash by which it came to this channel.
    pub hash: Option<u32>,
}

impl<B: SharedBuffer> Frame<'_, B> {
    /// Its bytes, at least an Ethernet header's.
    #[expect(clippy::len_without_is_empty, reason = "none is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies its bytes from `from` on out; false if they are not all there. A hostile host may
    /// change them meanwhile: what was read twice may differ.
    #[inline]
    pub fn read(&self, from: usize, to: &mut [u8]) -> bool {
        let end = from.checked_add(to.len());
        end.is_some_and(|end| end <= self.len) && self.buffer.read(self.at + from, to)
    }
}

/// What a slot has.
pub(super) enum Slot<'a, B> {
    Frame(Frame<'a, B>),
    /// Any other message, `len` bytes long.
    Control {
        at: usize,
        len: usize,
    },
}

/// Looks at what a packet says there is in the receive buffer.
#[inline]
pub(super) fn look<B: SharedBuffer>(
    buffer: &B,
    range: TransferRange,
) -> Result<Slot<'_, B>, Fault> {
    let outside = Fault::Range { offset: range.offset, len: range.len };
    let (at, len) = (range.offset as usize, range.len as usize);
    at.checked_add(len).filter(|end| *end <= buffer.size()).ok_or(outside)?;

    let mut fixed = [0; FIXED];
    let front = fixed.get_mut(..len.min(FIXED)).ok_or(outside)?;
    if !buffer.read(at, front) {
        return Err(outside);
    }
    let (header, body) = fixed.split_at(HEADER_SIZE);
    let header = Header::read_from_bytes(header).map_err(|_| Fault::Lengths)?;
    let message = header.len as usize;
    if message > len || message < HEADER_SIZE {
        return Err(Fault::Lengths);
    }
    if header.kind != MessageKind::Packet {
        return Ok(Slot::Control { at, len: message });
    }
    let room = message.checked_sub(HEADER_SIZE).filter(|_| message >= FIXED);
    let room = room.ok_or(Fault::Lengths)?;
    let body = PacketBody::read_from_bytes(body).map_err(|_| Fault::Lengths)?;
    // Offsets count from the end of the header, and nothing lies in the fixed part.
    let place = |offset: u32, len: u32| {
        let (offset, len) = (offset as usize, len as usize);
        let end = offset.checked_add(len).filter(|end| *end <= room);
        let fits = end.is_some() && offset >= size_of::<PacketBody>();
        fits.then_some((at + HEADER_SIZE + offset, len)).ok_or(Fault::Lengths)
    };
    let (data_at, data_len) = place(body.data_offset, body.data_len)?;
    if data_len < ETHERNET_HEADER {
        return Err(Fault::Lengths);
    }
    let mut frame = Frame {
        buffer,
        at: data_at,
        len: data_len,
        checksum: ReceiveChecksum::default(),
        vlan: None,
        hash: None,
    };
    if body.info_len > 0 {
        let (info_at, info_len) = place(body.info_offset, body.info_len)?;
        let mut bytes = [0; MAX_INFO];
        let bytes = bytes.get_mut(..info_len).ok_or(Fault::Lengths)?;
        if !buffer.read(info_at, bytes) {
            return Err(outside);
        }
        read_info(bytes, &mut frame)?;
    }
    Ok(Slot::Frame(frame))
}

fn read_info<B>(mut left: &[u8], frame: &mut Frame<'_, B>) -> Result<(), Fault> {
    while !left.is_empty() {
        let (piece, _) = PacketInfo::read_from_prefix(left).map_err(|_| Fault::Lengths)?;
        let (size, value_at) = (piece.size as usize, piece.value_offset as usize);
        // An entry is at least as long as its front, so this ends.
        if size < size_of::<PacketInfo>() || value_at < size_of::<PacketInfo>() {
            return Err(Fault::Lengths);
        }
        let (entry, rest) = left.split_at_checked(size).ok_or(Fault::Lengths)?;
        left = rest;
        let value = || {
            let bytes = entry.get(value_at..).and_then(<[u8]>::first_chunk::<4>);
            bytes.map(|bytes| u32::from_le_bytes(*bytes)).ok_or(Fault::Lengths)
        };
        match piece.kind {
            PacketInfoKind::Checksum => frame.checksum = ReceiveChecksum(value()?),
            PacketInfoKind::Vlan => frame.vlan = Some(VlanTag(value()?)),
            PacketInfoKind::HashValue => frame.hash = Some(value()?),
            PacketInfoKind::PacketId => {
                let id: PacketId = zerocopy::transmute!(value()?);
                let whole = PacketId::FIRST | PacketId::LAST;
                if id.flags & PacketId::PART != 0 && id.flags & whole != whole {
                    return Err(Fault::Coalesced);
                }
            }
            // What is not known says nothing that one has to know.
            _ => {}
        }
    }
    Ok(())
}
