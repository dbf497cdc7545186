//! What is on its way to the host: RNDIS messages in sections of the send buffer.
//!
//! Each packet takes a section, its slot, until the host completes it. Frames are copied there, one
//! behind the other, for as long as they fit and the host takes so many in one packet; or a frame
//! stays in pages of its own, and only its header lies in the section.

use vmbus::mapped::RingMemory;
use vmbus::nvsp::{
    ChannelType, Message, MessageKind as NvspKind, Outgoing, RndisPacket, RndisPacketComplete,
    Status, Version,
};
use vmbus::packet::{PacketFlags, PacketKind, ring_size};
use vmbus::ring::PushError;
use vmbus::rndis::{
    HEADER_SIZE, Header, LargeSend, MessageKind, PacketBody, PacketInfo, PacketInfoKind,
    TransmitChecksum, VlanTag,
};
use zerocopy::IntoBytes;

use super::{ANSWERS, ETHERNET_HEADER, Fault, SendError};
use crate::table::Table;
use crate::{Channel, Doorbell, Pages, SharedBuffer};

/// What the host is to do to a frame, and what else is said beside it. [`Default`] is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Fill in checksums.
    pub checksum: Option<TransmitChecksum>,
    /// Cut it into segments.
    pub large_send: Option<LargeSend>,
    /// Put in a VLAN tag.
    pub vlan: Option<VlanTag>,
}

/// Bytes of one piece of per-packet information.
const INFO: usize = size_of::<PacketInfo>() + 4;

/// Bytes before a frame, with all information there can be; frames begin at whole words.
const MAX_FRONT: usize = (HEADER_SIZE + size_of::<PacketBody>() + 3 * INFO).next_multiple_of(WORD);
const WORD: usize = 8;

/// What the host takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// The longest frame that is not to be cut, a tag included.
    pub frame: usize,
    /// Frames in one packet.
    pub frames: u32,
    /// Bytes of one packet.
    pub bytes: usize,
    /// Messages in a packet begin at multiples of this, a power of two.
    pub alignment: usize,
}

/// A packet on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// So many frames, all in the section.
    Frames(u32),
    /// A frame in pages of the caller's, and the caller's name for it.
    Pages(u32),
    /// A control message.
    Control,
}

/// A packet that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// The caller's name for it, if the frame was in pages.
    pub tag: Option<u32>,
    /// Frames that it had.
    pub frames: u32,
    pub well: bool,
    pub control: bool,
}

/// A packet that more frames can be put into.
#[derive(Clone, Copy, Debug)]
struct Open {
    slot: u16,
    /// Bytes of its section in use.
    used: usize,
    frames: u32,
}

#[derive(Debug)]
pub(super) struct Sends<B, const DEPTH: usize> {
    buffer: B,
    /// The section that is slot 0.
    first: u32,
    section_size: usize,
    version: Version,
    limits: Limits,
    table: Table<Load, DEPTH>,
    /// The first `free_count` are the slots that are free.
    free: [u16; DEPTH],
    free_count: usize,
    open: Option<Open>,
}

/// What lies before a frame.
struct Front {
    bytes: [u8; MAX_FRONT],
    len: usize,
}

impl Front {
    /// Before a frame of `len` bytes, in a message whose length is made a multiple of `alignment`.
    #[inline]
    fn new(offload: &Offload, len: usize, alignment: usize) -> Option<Self> {
        let infos = [
            offload.checksum.map(|checksum| (PacketInfoKind::Checksum, checksum.0)),
            offload.large_send.map(|large| (PacketInfoKind::LargeSend, large.0)),
            offload.vlan.map(|tag| (PacketInfoKind::Vlan, tag.0)),
        ];
        let mut bytes = [0; MAX_FRONT];
        let mut at = HEADER_SIZE + size_of::<PacketBody>();
        for (kind, value) in infos.into_iter().flatten() {
            let value_offset = size_of::<PacketInfo>() as u32;
            let piece = PacketInfo { size: INFO as u32, kind, value_offset };
            let (front, rest) =
                bytes.get_mut(at..at + INFO)?.split_at_mut_checked(size_of::<PacketInfo>())?;
            front.copy_from_slice(piece.as_bytes());
            rest.copy_from_slice(&value.to_le_bytes());
            at += INFO;
        }
        let info_len = at - HEADER_SIZE - size_of::<PacketBody>();
        let data = at.next_multiple_of(WORD);
        let whole = data.checked_add(len)?.checked_next_multiple_of(alignment)?;
        let header = Header { kind: MessageKind::Packet, len: u32::try_from(whole).ok()? };
        let body = PacketBody {
            data_offset: (data - HEADER_SIZE) as u32,
            data_len: u32::try_from(len).ok()?,
            info_offset: if info_len > 0 { size_of::<PacketBody>() as u32 } else { 0 },
            info_len: info_len as u32,
            ..PacketBody::default()
        };
        let (front, rest) = bytes.split_at_mut_checked(HEADER_SIZE)?;
        front.copy_from_slice(header.as_bytes());
        rest.get_mut(..size_of::<PacketBody>())?.copy_from_slice(body.as_bytes());
        Some(Self { bytes, len: data })
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl<B: SharedBuffer, const DEPTH: usize> Sends<B, DEPTH> {
    /// With up to `DEPTH` of the `sections` from `first` on, each of `section_size` bytes. All of
    /// them lie in `buffer`.
    pub(super) fn new(
        buffer: B,
        first: u32,
        sections: u32,
        section_size: u32,
        version: Version,
        limits: Limits,
    ) -> Self {
        let free_count = DEPTH.min(sections as usize);
        let last = free_count.saturating_sub(1);
        Self {
            buffer,
            first,
            section_size: section_size as usize,
            version,
            limits,
            table: Table::new(),
            // Taken from the end.
            free: core::array::from_fn(|index| last.saturating_sub(index) as u16),
            free_count,
            open: None,
        }
    }

    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Packets on their way.
    pub(super) fn in_flight(&self) -> usize {
        self.table.in_flight()
    }

    /// Whether there are frames that no packet has taken yet.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether a packet can be begun.
    pub(super) fn has_room(&self) -> bool {
        self.free_count > 0
    }

    /// Bytes of the ring to the host that there have to be for a packet of frames.
    pub(super) fn packet_size() -> u32 {
        ring_size(vmbus::nvsp::MESSAGE_SIZE) as u32 + ANSWERS
    }

    fn take_slot(&mut self) -> Option<u16> {
        let index = self.free_count.checked_sub(1)?;
        let slot = *self.free.get(index)?;
        self.free_count = index;
        Some(slot)
    }

    fn give_back(&mut self, slot: u16) {
        if let Some(place) = self.free.get_mut(self.free_count) {
            *place = slot;
            self.free_count += 1;
        }
    }

    /// Where a slot's section begins in the buffer.
    fn start(&self, slot: u16) -> usize {
        (self.first as usize + usize::from(slot)) * self.section_size
    }

    fn check(&self, len: usize, offload: &Offload) -> Result<(), SendError> {
        let max = match offload.large_send {
            Some(_) => self.limits.bytes,
            None => self.limits.frame,
        };
        match len {
            ..ETHERNET_HEADER => Err(SendError::Short),
            _ if len > max => Err(SendError::TooLong { len, max }),
            _ => Ok(()),
        }
    }

    /// Copies a frame into the packet that is open, or into the next.
    #[inline]
    pub(super) fn put<M: RingMemory, D: Doorbell>(
        &mut self,
        channel: &mut Channel<M, D>,
        frame: &[u8],
        offload: &Offload,
    ) -> Result<(), SendError> {
        let len = frame.len();
        self.check(len, offload)?;
        let room = self.section_size.min(self.limits.bytes);
        let alignment = self.limits.alignment.max(WORD);
        let most = room.saturating_sub(MAX_FRONT + alignment);
        let too_long = SendError::TooLong { len, max: most };
        let front = Front::new(offload, len, alignment).ok_or(too_long)?;
        let whole = (front.len + len).next_multiple_of(alignment);
        if len > most || whole > room {
            return Err(too_long);
        }
        if let Some(open) = self.open
            && (open.frames >= self.limits.frames || open.used + whole > room)
        {
            self.flush(channel)?;
        }
        let open = match self.open {
            Some(open) => open,
            None => Open { slot: self.take_slot().ok_or(SendError::Full)?, used: 0, frames: 0 },
        };
        let at = self.start(open.slot) + open.used;
        let written =
            self.buffer.write(at, front.bytes()) && self.buffer.write(at + front.len, frame);
        if !written {
            // Sections lie in the buffer: it was looked at when the buffer was shared.
            if open.frames == 0 {
                self.give_back(open.slot);
            }
            return Err(too_long);
        }
        self.open = Some(Open { used: open.used + whole, frames: open.frames + 1, ..open });
        Ok(())
    }

    /// Puts the open packet into the ring.
    pub(super) fn flush<M: RingMemory, D: Doorbell>(
        &mut self,
        channel: &mut Channel<M, D>,
    ) -> Result<(), SendError> {
        let Some(open) = self.open else { return Ok(()) };
        let load = Load::Frames(open.frames);
        self.push(channel, open.slot, open.used, &[], ChannelType::Data, load)?;
        self.open = None;
        Ok(())
    }

    /// Sends a frame that lies in pages of the caller's.
    pub(super) fn put_pages<M: RingMemory, D: Doorbell>(
        &mut self,
        channel: &mut Channel<M, D>,
        tag: u32,
        frame: Pages<'_>,
        offload: &Offload,
    ) -> Result<(), SendError> {
        let len = frame.len as usize;
        self.check(len, offload)?;
        let too_long = SendError::TooLong { len, max: self.limits.bytes };
        let front = Front::new(offload, len, 1).ok_or(too_long)?;
        if front.len + len > self.limits.bytes {
            return Err(too_long);
        }
        // Frames leave in order.
        self.flush(channel)?;
        let slot = self.take_slot().ok_or(SendError::Full)?;
        let sent = if self.buffer.write(self.start(slot), front.bytes()) {
            let load = Load::Pages(tag);
            self.push(channel, slot, front.len, frame.header, ChannelType::Data, load)
        } else {
            Err(too_long)
        };
        if sent.is_err() {
            self.give_back(slot);
        }
        sent
    }

    /// Sends a control message.
    pub(super) fn put_control<M: RingMemory, D: Doorbell>(
        &mut self,
        channel: &mut Channel<M, D>,
        message: &[u8],
    ) -> Result<(), SendError> {
        let too_long = SendError::TooLong { len: message.len(), max: self.section_size };
        if message.len() > self.section_size {
            return Err(too_long);
        }
        self.flush(channel)?;
        let slot = self.take_slot().ok_or(SendError::Full)?;
        let sent = if self.buffer.write(self.start(slot), message) {
            self.push(channel, slot, message.len(), &[], ChannelType::Control, Load::Control)
        } else {
            Err(too_long)
        };
        if sent.is_err() {
            self.give_back(slot);
        }
        sent
    }

    fn push<M: RingMemory, D: Doorbell>(
        &mut self,
        channel: &mut Channel<M, D>,
        slot: u16,
        section_len: usize,
        headers: &[u8],
        kind: ChannelType,
        load: Load,
    ) -> Result<(), SendError> {
        let id = self.table.next_id(slot).ok_or(SendError::Full)?;
        let section = self.first + u32::from(slot);
        let body = RndisPacket { channel: kind, section, section_len: section_len as u32 };
        let message = Outgoing::new(NvspKind::SendRndisPacket, &body);
        let message = message.bytes(self.version);
        // What comes has to be answered, however much is sent.
        let size = ring_size(headers.len() + message.len()) as u32;
        if !channel.has_room(size.saturating_add(ANSWERS)).map_err(Fault::from)? {
            return Err(SendError::Full);
        }
        let packet_kind =
            if headers.is_empty() { PacketKind::InBand } else { PacketKind::GpaDirect };
        let flags = PacketFlags::COMPLETION_REQUESTED;
        match channel.send(packet_kind, flags, id, headers, message) {
            Ok(()) => {}
            Err(PushError::Full) => return Err(SendError::Full),
            Err(error) => return Err(Fault::from(error).into()),
        }
        self.table.begin(slot, load);
        Ok(())
    }

    /// The host has completed a packet.
    #[inline]
    pub(super) fn end(&mut self, id: u64, payload: &[u8]) -> Result<Ended, Fault> {
        let message = Message::parse(payload).ok_or(Fault::Short(payload.len()))?;
        if message.kind != NvspKind::SendRndisPacketComplete {
            return Err(Fault::Message(message.kind.0));
        }
        let body: RndisPacketComplete = message.body().ok_or(Fault::Short(payload.len()))?;
        let (slot, load) = self.table.end(id, Fault::UnknownAnswer, Fault::AnsweredTwice)?;
        self.give_back(slot);
        let well = body.status == Status::Success;
        let ended = Ended { tag: None, frames: 0, well, control: false };
        Ok(match load {
            Load::Frames(frames) => Ended { frames, ..ended },
            Load::Pages(tag) => Ended { tag: Some(tag), frames: 1, ..ended },
            Load::Control => Ended { control: true, ..ended },
        })
    }
}
