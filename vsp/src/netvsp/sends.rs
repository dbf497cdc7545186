//! Packets of the guest and their frames, under way to the network.
//!
//! Frames go to the network straight from the guest's pages. All tables are made when the channel is
//! opened, so that a frame allocates nothing.
//!
//! `unsafe` is the promise to the network that its buffers stay: they lie in guest memory, or in the
//! table of fronts, and the [`Engine`](super::engine::Engine) keeps both for longer than its queue and
//! its worker's io_uring.
#![allow(unsafe_code)]

use backends::net::{Buffer, Completions, Frame, Offloads, Queue};
use backends::uring::Uring;
use hypervisor::GuestMemory;
use vmbus::nvsp::{RndisPacket, Status};
use vmbus::packet::{GpaRanges, Packet, PacketKind, Segment};

use super::pages::Reader;
use super::session::Send;
use super::transmit::{Front, Limits, Malformed, next_frame};

/// Frames that can be under way to the network.
pub(super) const SENDS: u16 = 256;
/// The most frames in one packet of the guest, as it is told when it begins.
pub(super) const MAX_FRAMES: usize = 8;

/// A packet that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// Whom to answer: nobody, if the guest asked for no completion.
    pub id: Option<u64>,
    pub status: Status,
}

/// A packet that is under way.
#[derive(Clone, Copy, Debug)]
struct Sending {
    end: Ended,
    /// Its frames that have not ended.
    frames: u32,
}

/// A frame under way.
#[derive(Clone, Copy, Debug)]
struct Outgone {
    packet: u16,
    len: u32,
}

/// What one channel's guest sends.
pub(super) struct Sends {
    memory: GuestMemory,
    takes: Offloads,
    fronts: Box<[Front]>,
    frames: Box<[Outgone]>,
    free_frames: Vec<u16>,
    /// Of all frames under way.
    bytes: u64,
    packets: Box<[Sending]>,
    free_packets: Vec<u16>,
    buffers: Vec<Buffer>,
    /// Where the bytes of the packet are that was last looked up.
    segments: Vec<Segment>,
}

impl Sends {
    /// To a network that takes frames with so much left to do.
    pub(super) fn new(memory: GuestMemory, takes: Offloads) -> Self {
        let depth = usize::from(SENDS);
        let idle = Sending { end: Ended { id: None, status: Status::None }, frames: 0 };
        Self {
            memory,
            takes,
            fronts: (0..depth).map(|_| Front::new()).collect(),
            frames: vec![Outgone { packet: 0, len: 0 }; depth].into(),
            free_frames: (0..SENDS).rev().collect(),
            bytes: 0,
            packets: vec![idle; depth].into(),
            free_packets: (0..SENDS).rev().collect(),
            buffers: Vec::with_capacity(1024),
            segments: Vec::with_capacity(1024),
        }
    }

    /// Packets that can be taken now.
    pub(super) fn room(&self) -> usize {
        self.free_packets.len().min(self.free_frames.len() / MAX_FRAMES)
    }

    /// Packets under way.
    pub(super) fn under_way(&self) -> usize {
        self.packets.len() - self.free_packets.len()
    }

    /// Bytes of frames under way.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Finds the bytes of a packet's RNDIS messages, in the send buffer and in pages of its own. False
    /// if there is something wrong with that.
    pub(super) fn look_up(
        &mut self,
        packet: &Packet<'_>,
        rndis: &RndisPacket,
        send: Option<&Send>,
    ) -> bool {
        self.segments.clear();
        if rndis.section != RndisPacket::NO_SECTION {
            let Some(Send { memory, layout }) = send else { return false };
            if rndis.section >= layout.sections || rndis.section_len > layout.section_size {
                return false;
            }
            let offset = rndis.section * layout.section_size;
            self.segments.extend(memory.segments(offset, rndis.section_len));
        }
        let ranges = match packet.kind {
            PacketKind::GpaDirect => packet.gpa_ranges(),
            _ => Ok(GpaRanges::EMPTY),
        };
        let Ok(ranges) = ranges else { return false };
        for segment in ranges.flat_map(|range| range.segments()) {
            append(&mut self.segments, segment);
        }
        true
    }

    /// Copies all bytes of the packet that was looked up, if they fit.
    pub(super) fn read<'b>(&self, bytes: &'b mut [u8]) -> Option<&'b [u8]> {
        let mut reader = Reader::new(&self.memory, &self.segments);
        let bytes = bytes.get_mut(..usize::try_from(reader.left()).ok()?)?;
        reader.read(bytes)?;
        Some(bytes)
    }

    /// Hands the frames of the packet that was looked up to the network, up to the first that makes no
    /// sense. Returns the packet's end, if it had no other, and what was wrong.
    pub(super) fn send(
        &mut self,
        id: Option<u64>,
        max_frame: u32,
        queue: &mut dyn Queue,
        uring: &mut Uring,
        done: &mut Completions,
    ) -> (Option<Ended>, Option<Malformed>) {
        // The worker takes no packet without room for it and its frames.
        let Some(index) = self.free_packets.pop() else {
            return (Some(Ended { id, status: Status::Busy }), None);
        };
        let limits = Limits { max_frame, takes: self.takes };
        let mut reader = Reader::new(&self.memory, &self.segments);
        let mut frames = 0;
        let mut malformed = None;
        loop {
            let slot = self.free_frames.last().copied().filter(|_| frames < MAX_FRAMES as u32);
            let Some(slot) = slot else {
                malformed = (reader.left() > 0).then_some(Malformed::Count);
                break;
            };
            let Some(front) = self.fronts.get_mut(usize::from(slot)) else { break };
            let frame = match next_frame(&mut reader, &limits, front, &mut self.buffers) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    malformed = Some(error);
                    break;
                }
            };
            self.free_frames.pop();
            frames += 1;
            self.bytes += u64::from(frame.len);
            if let Some(place) = self.frames.get_mut(usize::from(slot)) {
                *place = Outgone { packet: index, len: frame.len };
            }
            let frame = Frame {
                id: slot.into(),
                len: frame.len,
                buffers: &self.buffers,
                offload: frame.offload,
            };
            // SAFETY: the buffers lie in guest memory, which `self.memory` keeps mapped until
            // after queue and ring are gone, or in the slot's front, which is not used again
            // before the frame has ended; a guest may write to its memory at any time.
            unsafe { queue.send(frame, uring, done) };
        }
        let status = if malformed.is_some() { Status::InvalidRndisPacket } else { Status::Success };
        let end = Ended { id, status };
        if let Some(place) = self.packets.get_mut(usize::from(index)) {
            *place = Sending { end, frames };
        }
        if frames == 0 {
            self.free_packets.push(index);
        }
        ((frames == 0).then_some(end), malformed)
    }

    /// A frame has ended. Returns its length, and its packet's end if it was the last; `None` if there
    /// is no such frame.
    pub(super) fn sent(&mut self, id: u32) -> Option<(u32, Option<Ended>)> {
        let slot = u16::try_from(id).ok()?;
        let Outgone { packet: index, len } = *self.frames.get(usize::from(slot))?;
        self.free_frames.push(slot);
        self.bytes = self.bytes.saturating_sub(len.into());
        let packet = self.packets.get_mut(usize::from(index))?;
        packet.frames = packet.frames.saturating_sub(1);
        let end = (packet.frames == 0).then_some(packet.end);
        if end.is_some() {
            self.free_packets.push(index);
        }
        Some((len, end))
    }
}

/// Adds a stretch, to the one before if it goes on where that ends: Linux names each page by a range of
/// its own, though most of a large frame's are neighbours, and each piece costs on its way to the network.
fn append(segments: &mut Vec<Segment>, next: Segment) {
    if let Some(last) = segments.last_mut()
        && last.gpa.checked_add(last.len.into()) == Some(next.gpa)
        && let Some(len) = last.len.checked_add(next.len)
    {
        last.len = len;
    } else {
        segments.push(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_stretch() {
        let segment = |gpa, len| Segment { gpa, len };
        let mut segments = Vec::new();
        for (gpa, len) in [
            (0x1F80, 0x80),
            (0x2000, 0x1000),
            (0x3000, 0x10),
            // In front of it, and a gap.
            (0x1000, 0x1000),
            (0x2001, 1),
            // Neither length nor address goes round.
            (0x10_0000, u32::MAX),
            (0x10_0000 + u64::from(u32::MAX), 1),
            (u64::MAX, 1),
            (0, 1),
        ] {
            append(&mut segments, segment(gpa, len));
        }
        let expected = [
            segment(0x1F80, 0x1090),
            segment(0x1000, 0x1000),
            segment(0x2001, 1),
            segment(0x10_0000, u32::MAX),
            segment(0x10_0000 + u64::from(u32::MAX), 1),
            segment(u64::MAX, 1),
            segment(0, 1),
        ];
        assert_eq!(segments, expected);
    }
}
