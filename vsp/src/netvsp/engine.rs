//! The frames of one channel: packets in, frames out to the network's queue and back, answers and
//! deliveries to the guest.
//!
//! A packet is in private memory when it comes here, and all it names is checked before it is used.
//! Frames go straight between the guest's pages and the network. All tables are made when the
//! channel is opened, so that a frame allocates nothing.
//!
//! `unsafe` is the promise to the network that its buffers stay: they lie in guest memory, which
//! the engine keeps mapped for longer than its queue and its worker's io_uring live, or in the
//! engine's own table of fronts, which is dropped after both.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use backends::net::{
    Buffer, Completion, Completions, Frame, MAX_BUFFERS, MAX_FRAME, Network, Offload, Offloads,
    Queue, QueueConfig,
};
use backends::uring::{Cqe, Tag, Uring};
use hypervisor::GuestMemory;
use tracing::{debug, warn};
use vmbus::nvsp::{
    Capabilities, ChannelType, Message, MessageKind, Outgoing, RndisPacket, RndisPacketComplete,
    Status,
};
use vmbus::packet::{
    GpaRanges, Packet, PacketFlags, PacketKind, Segment, TransferRange, ring_size,
    write_transfer_pages,
};
use vmbus::protocol::GpadlId;
use vmbus_server::Channel;

use super::control::{COALESCING, Control, MAX_MESSAGE};
use super::handshake::{Handshake, SLOT_HEADER, Step};
use super::pages::{Reader, Shared};
use super::receive::{self, PEEK, Part};
use super::session::{NicCounters, Receive, Send, Session, statistics};
use super::slots::{Slot, Slots};
use super::transmit::{Front, Limits, next_frame};
use super::worker::Fault;

/// Frames that can be under way to the network.
const SENDS: u16 = 256;
/// Frames for which slots lie with the network.
const RECEIVES: u16 = 256;
/// The most slots for one frame: a coalesced one of the greatest length, with the smallest slots.
const MAX_PARTS: usize = MAX_FRAME.div_ceil(2048 - SLOT_HEADER as usize);
/// The most frames in one packet of the guest, as it is told when it begins.
pub(super) const MAX_FRAMES: usize = 8;
/// Slots that are kept for answers to control messages.
const CONTROL_SLOTS: usize = 4;
/// Answers to control messages that wait for a slot.
const MAX_ANSWERS: usize = 16;
/// Slots in one packet to the guest. More save little, and the guest gives none of the slots back
/// before it has seen the last.
const MAX_RANGES: usize = 64;
const _: () = assert!(MAX_RANGES >= MAX_PARTS);
/// Bytes of the outgoing ring that one answer takes.
pub(super) const ANSWER: u32 = ring_size(vmbus::nvsp::MESSAGE_SIZE) as u32;
/// Bytes of the outgoing ring that the longest delivery takes.
pub(super) const DELIVERY: u32 = ring_size(8 + 8 * MAX_RANGES + vmbus::nvsp::MESSAGE_SIZE) as u32;

/// The queue's operations in the worker's ring.
const QUEUE: Tag = Tag(1);

/// What the first channel does besides.
pub(super) struct Primary {
    pub handshake: Handshake,
    pub control: Control,
    /// Answers and indications that are still to be put into slots.
    pub pending: VecDeque<Vec<u8>>,
}

/// A packet of the guest that is under way.
#[derive(Clone, Copy, Debug)]
struct Sending {
    /// Whom to answer: nobody, if the guest asked for no completion.
    id: Option<u64>,
    status: Status,
    /// Its frames that have not ended.
    frames: u32,
}

/// A frame under way.
#[derive(Clone, Copy, Debug)]
struct Outgone {
    packet: u16,
    len: u32,
}

/// A slot with a frame in it, or a part of one.
#[derive(Clone, Copy, Debug)]
struct Filled {
    slot: Slot,
    /// How much of the slot is to be told of.
    len: u32,
    /// Whether the frame ends in it.
    last: bool,
}

/// One channel's frames. Fields are dropped in order: the queue before what its buffers point to.
pub(super) struct Engine {
    queue: Option<Box<dyn Queue>>,
    fronts: Box<[Front]>,
    memory: GuestMemory,
    network: Arc<dyn Network>,
    session: Arc<Session>,
    counters: Arc<[NicCounters]>,
    subchannel: u16,
    channels: u16,
    primary: Option<Primary>,
    takes: Offloads,
    /// No more slots are offered.
    closing: bool,
    slots: Slots,
    /// Slots that lie with the network, a frame's together.
    offers: Box<[Vec<Slot>]>,
    free_offers: Vec<u16>,
    /// Whether offers take coalesced frames.
    coalescing: bool,
    frames: Box<[Outgone]>,
    free_frames: Vec<u16>,
    packets: Box<[Sending]>,
    free_packets: Vec<u16>,
    done: Completions,
    answers: Vec<(u64, Outgoing)>,
    /// Frames in their slots.
    received: VecDeque<Filled>,
    buffers: Vec<Buffer>,
    segments: Vec<Segment>,
}

impl Engine {
    /// For the thread that owns the ring. A `primary` is the first channel's.
    pub(super) fn new(
        channel: &Channel,
        network: Arc<dyn Network>,
        session: Arc<Session>,
        counters: Arc<[NicCounters]>,
        primary: Option<Primary>,
    ) -> Self {
        let depth = usize::from(SENDS);
        let idle = Sending { id: None, status: Status::None, frames: 0 };
        Self {
            queue: None,
            fronts: (0..depth).map(|_| Front::new()).collect(),
            memory: channel.memory.clone(),
            takes: network.link().takes,
            network,
            session,
            channels: u16::try_from(counters.len()).unwrap_or(u16::MAX),
            counters,
            subchannel: channel.subchannel,
            primary,
            closing: false,
            slots: Slots::new(0, 0),
            offers: (0..RECEIVES).map(|_| Vec::with_capacity(MAX_PARTS)).collect(),
            free_offers: (0..RECEIVES).rev().collect(),
            coalescing: false,
            frames: vec![Outgone { packet: 0, len: 0 }; depth].into(),
            free_frames: (0..SENDS).rev().collect(),
            packets: vec![idle; depth].into(),
            free_packets: (0..SENDS).rev().collect(),
            done: Completions::with_capacity(depth + usize::from(RECEIVES) + 1),
            answers: Vec::with_capacity(depth),
            received: VecDeque::with_capacity(usize::from(RECEIVES) * 2),
            buffers: Vec::with_capacity(1024),
            segments: Vec::with_capacity(1024),
        }
    }

    /// Opens the network's queue and takes this channel's part of the receive buffer.
    pub(super) fn open_queue(&mut self, uring: &mut Uring) -> io::Result<()> {
        let Some(receive) = self.session.receive.get() else {
            return Err(io::Error::other("a sub-channel without a receive buffer"));
        };
        let count = receive.layout.slots / self.channels.max(1);
        self.slots = Slots::new(count * self.subchannel, count);
        let config =
            QueueConfig { index: self.subchannel, tag: QUEUE, sends: SENDS, receives: RECEIVES };
        self.queue = Some(self.network.queue(config, uring)?);
        Ok(())
    }

    fn counters(&self) -> Option<&NicCounters> {
        self.counters.get(usize::from(self.subchannel))
    }

    fn count(&self, counter: impl Fn(&NicCounters)) {
        if let Some(counters) = self.counters() {
            counter(counters);
        }
    }

    /// Packets that can be taken now, as far as the tables go.
    pub(super) fn room(&self) -> u32 {
        let packets = self.free_packets.len().min(self.free_frames.len() / MAX_FRAMES);
        u32::try_from(packets).unwrap_or(u32::MAX)
    }

    /// Answers that are still to be given, now or when frames have been sent.
    pub(super) fn owed(&self) -> u32 {
        let owed = self.answers.len() + self.packets.len() - self.free_packets.len();
        u32::try_from(owed).unwrap_or(u32::MAX)
    }

    /// Whether something waits for room in the outgoing ring.
    pub(super) fn has_deliveries(&self) -> bool {
        let control = self.primary.as_ref().is_some_and(|primary| !primary.pending.is_empty());
        !self.received.is_empty() || (control && self.slots.free() > 0)
    }

    /// Frames and buffers that lie with the network.
    pub(super) fn in_flight(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.in_flight())
    }

    /// See [`Queue::prepare_to_sleep`].
    pub(super) fn prepare_to_sleep(&mut self) -> bool {
        self.queue.as_mut().is_none_or(|queue| queue.prepare_to_sleep())
    }

    /// Asks the network for its buffers, and offers no more.
    pub(super) fn recall(&mut self, uring: &mut Uring) {
        self.closing = true;
        if let Some(queue) = &mut self.queue {
            queue.recall(uring, &mut self.done);
        }
    }

    /// Takes a packet from the guest.
    pub(super) fn take(
        &mut self,
        packet: &Packet<'_>,
        channel: &Channel,
        uring: &mut Uring,
    ) -> Result<(), Fault> {
        if packet.kind == PacketKind::Completion {
            if self.slots.complete(packet.transaction_id).is_err() {
                self.count(|counters| counters.not_sent.add(1));
                crate::limited!(debug!("netvsp: a completion of nothing"));
            }
            return Ok(());
        }
        let id = packet.flags.completion_requested().then_some(packet.transaction_id);
        let message = match packet.kind {
            PacketKind::InBand | PacketKind::GpaDirect => Message::parse(packet.payload),
            _ => None,
        };
        let Some(message) = message else {
            self.count(|counters| counters.malformed.add(1));
            self.answer(id, completed(Status::Failure));
            return Ok(());
        };
        if message.kind != MessageKind::SendRndisPacket {
            return self.negotiate(id, &message, channel, uring);
        }
        let rndis = message.body::<RndisPacket>();
        let Some(rndis) = rndis.filter(|rndis| self.look_up(packet, rndis)) else {
            self.count(|counters| counters.malformed.add(1));
            self.answer(id, completed(Status::InvalidRndisPacket));
            return Ok(());
        };
        match rndis.channel {
            ChannelType::Data if self.queue.is_some() => self.send(id, uring),
            ChannelType::Control => self.control(id),
            _ => self.answer(id, completed(Status::Failure)),
        }
        Ok(())
    }

    fn answer(&mut self, id: Option<u64>, message: Outgoing) {
        self.answers.extend(id.map(|id| (id, message)));
    }

    /// Takes a message of the handshake.
    fn negotiate(
        &mut self,
        id: Option<u64>,
        message: &Message<'_>,
        channel: &Channel,
        uring: &mut Uring,
    ) -> Result<(), Fault> {
        let Some(primary) = &mut self.primary else {
            self.answer(id, completed(Status::Failure));
            return Ok(());
        };
        let pages = |gpadl: GpadlId| channel.gpadl(gpadl).map(|pages| pages.len());
        let reply = primary.handshake.take(message, pages);
        let shared = |gpadl: GpadlId| {
            let pages = channel.gpadl(gpadl).unwrap_or_default();
            Shared::new(channel.memory.clone(), pages)
        };
        match reply.step {
            Step::None => {}
            Step::ReceiveBuffer(layout) => {
                let receive = Receive {
                    memory: shared(layout.gpadl),
                    layout,
                    version: primary.handshake.version(),
                    capabilities: primary.handshake.capabilities(),
                    max_frame: primary.handshake.max_frame(),
                };
                if !receive.capabilities.has(Capabilities::RSC) {
                    primary.control.forbid_coalescing();
                }
                // The handshake shares it once.
                let _ = self.session.receive.set(receive);
                self.open_queue(uring)?;
            }
            Step::SendBuffer(layout) => {
                let _ = self.session.send.set(Send { memory: shared(layout.gpadl), layout });
            }
            // Each worker takes its slots back with its next turn.
            Step::RevokeReceive => self.session.revoke(),
            // What still lies there has been taken before.
            Step::RevokeSend => {}
            Step::Subchannels(count) => channel.offer_subchannels(count),
        }
        self.answer(id, reply.answer.unwrap_or_else(|| completed(Status::Success)));
        Ok(())
    }

    /// Finds the bytes of a packet's RNDIS messages and leaves where they are in `self.segments`.
    /// False if there is something wrong with that.
    fn look_up(&mut self, packet: &Packet<'_>, rndis: &RndisPacket) -> bool {
        self.segments.clear();
        if rndis.section != RndisPacket::NO_SECTION {
            let Some(send) = self.session.send.get() else { return false };
            let Send { memory, layout } = send;
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
        self.segments.extend(ranges.flat_map(|range| range.segments()));
        true
    }

    /// Hands the frames of a packet to the network.
    fn send(&mut self, id: Option<u64>, uring: &mut Uring) {
        let (Some(queue), Some(receive)) = (&mut self.queue, self.session.receive.get()) else {
            return;
        };
        let Some(index) = self.free_packets.pop() else { return };
        let limits = Limits { max_frame: receive.max_frame, takes: self.takes };
        let mut reader = Reader::new(&self.memory, &self.segments);
        let mut packet = Sending { id, status: Status::Success, frames: 0 };
        let mut malformed = None;
        loop {
            // The worker takes no packet without room for its frames.
            let slot =
                self.free_frames.last().copied().filter(|_| packet.frames < MAX_FRAMES as u32);
            let Some(slot) = slot else {
                if reader.left() > 0 {
                    malformed = Some("a packet has too many frames".to_owned());
                }
                break;
            };
            let Some(front) = self.fronts.get_mut(usize::from(slot)) else { break };
            let frame = match next_frame(&mut reader, &limits, front, &mut self.buffers) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    malformed = Some(error.to_string());
                    break;
                }
            };
            self.free_frames.pop();
            packet.frames += 1;
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
            unsafe { queue.send(frame, uring, &mut self.done) };
        }
        if let Some(why) = malformed {
            packet.status = Status::InvalidRndisPacket;
            if let Some(counters) = self.counters.get(usize::from(self.subchannel)) {
                counters.malformed.add(1);
            }
            crate::limited!(debug!("netvsp: a packet was dropped: {why}"));
        }
        if let Some(place) = self.packets.get_mut(usize::from(index)) {
            *place = packet;
        }
        if packet.frames == 0 {
            self.free_packets.push(index);
            self.answer(id, completed(packet.status));
        }
    }

    /// Takes a control message.
    fn control(&mut self, id: Option<u64>) {
        let Some(primary) = &mut self.primary else {
            return self.answer(id, completed(Status::Failure));
        };
        let mut bytes = [0; MAX_MESSAGE];
        let mut reader = Reader::new(&self.memory, &self.segments);
        let len = usize::try_from(reader.left()).unwrap_or(usize::MAX);
        let message = bytes.get_mut(..len).and_then(|bytes| {
            reader.read(bytes)?;
            Some(&*bytes)
        });
        let Some(message) = message.filter(|_| primary.handshake.is_ready()) else {
            self.count(|counters| counters.malformed.add(1));
            return self.answer(id, completed(Status::InvalidRndisPacket));
        };
        primary.control.set_statistics(statistics(&self.counters));
        let coalescing = primary.control.settings().coalescing;
        let reply = primary.control.take(message);
        let settings = primary.control.settings();
        self.session.set(settings);
        if settings.coalescing != coalescing {
            // The network may then leave checksums to us as well, which a guest that passes frames
            // on could not make good; but such a guest does not take coalesced ones.
            let gives = if settings.coalescing { COALESCING } else { Offloads::NONE };
            if let Err(error) = self.network.set_receive_offloads(gives) {
                warn!("netvsp: the network cannot coalesce: {error}");
            }
        }
        self.answer(id, completed(Status::Success));
        if let Some(reply) = reply {
            self.reply(reply);
        }
    }

    /// Has a control message sent, when there is a slot for it.
    fn reply(&mut self, message: Vec<u8>) {
        let Some(primary) = &mut self.primary else { return };
        if primary.pending.len() < MAX_ANSWERS {
            primary.pending.push_back(message);
        } else {
            self.count(|counters| counters.answers_lost.add(1));
        }
    }

    /// Offers slots to the network, and ends its batch.
    pub(super) fn turn(&mut self, uring: &mut Uring) {
        let (Some(queue), Some(receive)) = (&mut self.queue, self.session.receive.get()) else {
            return;
        };
        if self.session.is_revoked() && !self.closing {
            self.closing = true;
            queue.recall(uring, &mut self.done);
        }
        if self.coalescing != self.session.is_coalescing() {
            // What lies with the network is of the wrong size.
            self.coalescing = !self.coalescing;
            queue.recall(uring, &mut self.done);
        }
        let size = receive.layout.slot_size;
        let room = size - SLOT_HEADER;
        // A frame lies in no more pieces than the network takes.
        let parts = if self.coalescing {
            (MAX_FRAME as u32).div_ceil(room).min(MAX_PARTS as u32) as usize
        } else {
            1
        };
        let kept = if self.primary.is_some() { CONTROL_SLOTS } else { 0 };
        while !self.closing
            && self.slots.free() >= parts + kept
            && let Some(index) = self.free_offers.last().copied()
            && let Some(offer) = self.offers.get_mut(usize::from(index))
        {
            offer.clear();
            offer.extend((0..parts).map_while(|_| self.slots.take()));
            self.buffers.clear();
            for slot in &*offer {
                let offset = u32::from(*slot) * size + SLOT_HEADER;
                // That this is memory was looked at when the buffer was shared.
                receive.memory.buffers(offset, room, &mut self.buffers);
            }
            self.buffers.truncate(MAX_BUFFERS);
            self.free_offers.pop();
            // SAFETY: the buffers lie in guest memory, which `self.memory` keeps mapped until
            // after queue and ring are gone.
            unsafe { queue.offer(index.into(), &self.buffers, uring, &mut self.done) };
        }
        queue.turn(uring, &mut self.done);
    }

    /// Takes a completion of the worker's ring.
    pub(super) fn complete(&mut self, cqe: &Cqe, uring: &mut Uring) {
        if let Some(queue) = &mut self.queue {
            queue.complete(cqe, uring, &mut self.done);
        }
    }

    /// Turns what has happened on the network into answers and deliveries. Returns how much.
    pub(super) fn settle(&mut self) -> u32 {
        let mut count = 0;
        while let Some(completion) = self.done.pop() {
            count += 1;
            match completion {
                Completion::Sent { id, result } => self.sent(id, result.is_ok()),
                Completion::Received { id, len, offload } => self.receive(id, len, &offload),
                Completion::Returned { id } => {
                    self.take_back(id, 0);
                }
                Completion::Link(up) => {
                    let indication =
                        self.primary.as_mut().and_then(|primary| primary.control.set_link(up));
                    if let Some(indication) = indication {
                        self.reply(indication);
                    }
                }
            }
        }
        count
    }

    fn sent(&mut self, id: u32, well: bool) {
        let Ok(slot) = u16::try_from(id) else { return };
        let Some(Outgone { packet: index, len }) = self.frames.get(usize::from(slot)).copied()
        else {
            return;
        };
        self.free_frames.push(slot);
        if let Some(counters) = self.counters() {
            if well {
                counters.sent.add(1);
                counters.sent_bytes.add(len.into());
            } else {
                counters.send_drops.add(1);
            }
        }
        let Some(packet) = self.packets.get_mut(usize::from(index)) else { return };
        packet.frames = packet.frames.saturating_sub(1);
        if packet.frames == 0 {
            let Sending { id, status, .. } = *packet;
            self.free_packets.push(index);
            self.answer(id, completed(status));
        }
    }

    /// An offer has ended, its first `used` slots with a frame in them: gives the others back.
    fn take_back(&mut self, id: u32, used: usize) {
        let Ok(index) = u16::try_from(id) else { return };
        let Some(offer) = self.offers.get_mut(usize::from(index)) else { return };
        for slot in offer.drain(used.min(offer.len())..) {
            self.slots.give_back(slot);
        }
        self.free_offers.push(index);
    }

    /// Prepares a frame that has come for the guest.
    fn receive(&mut self, id: u32, len: u32, offload: &Offload) {
        let used = self.prepare(id, len, offload);
        self.take_back(id, used.unwrap_or(0));
        let Some(_) = used else {
            return self.count(|counters| counters.unwanted.add(1));
        };
        self.count(|counters| {
            counters.received.add(1);
            counters.received_bytes.add(len.into());
        });
    }

    /// Writes the headers of a frame's slots. Returns how many slots it has; `None` if the guest
    /// does not want it.
    fn prepare(&mut self, id: u32, len: u32, offload: &Offload) -> Option<usize> {
        let Receive { memory, layout, capabilities, .. } = self.session.receive.get()?;
        let offer = self.offers.get(usize::try_from(id).ok()?)?;
        let room = layout.slot_size - SLOT_HEADER;
        let parts = len.div_ceil(room) as usize;
        let slots = offer.get(..parts)?;
        let (first, later) = slots.split_first()?;
        let offset = u32::from(*first) * layout.slot_size;
        let mut peek = [0; PEEK];
        if self.session.is_revoked() || !memory.read(offset + SLOT_HEADER, &mut peek) {
            return None;
        }
        let wishes = self.session.wishes(*capabilities);
        let part = if later.is_empty() { Part::Whole } else { Part::First };
        let inbound = receive::prepare(&peek, len.min(room), part, offload, &wishes)?;
        memory.write(offset, inbound.front());
        let last = later.is_empty();
        self.received.push_back(Filled { slot: *first, len: inbound.len, last });
        let mut left = len.saturating_sub(room);
        for slot in later {
            let last = left <= room;
            // Neither can fail: what is left is as long as there are slots for it.
            let Some(inbound) = receive::prepare_later(left.min(room), last) else { continue };
            memory.write(u32::from(*slot) * layout.slot_size, inbound.front());
            self.received.push_back(Filled { slot: *slot, len: inbound.len, last });
            left = left.saturating_sub(room);
        }
        Some(parts)
    }

    /// Puts answers and deliveries into the outgoing ring, as far as there is room. Returns how
    /// many packets.
    pub(super) fn deliver(&mut self, channel: &mut Channel) -> Result<u32, Fault> {
        let mut pushed = 0;
        let version = match (&self.primary, self.session.receive.get()) {
            (Some(primary), _) => primary.handshake.version(),
            (None, Some(receive)) => receive.version,
            (None, None) => return Ok(0),
        };
        // There is room for every answer: packets are not taken without.
        for (id, message) in self.answers.drain(..) {
            channel.outgoing.push(
                PacketKind::Completion,
                PacketFlags::NONE,
                id,
                &[message.bytes(version)],
            )?;
            pushed += 1;
        }
        let Some(receive) = self.session.receive.get() else { return Ok(pushed) };
        if self.session.is_revoked() {
            for filled in self.received.drain(..) {
                self.slots.give_back(filled.slot);
            }
            return Ok(pushed);
        }
        let size = receive.layout.slot_size;
        let reserved = self.owed().saturating_mul(ANSWER).saturating_add(DELIVERY);
        let mut ranges = [TransferRange { len: 0, offset: 0 }; MAX_RANGES];
        let mut headers = [0; 8 + 8 * MAX_RANGES];
        while channel.outgoing.free()? >= reserved {
            let control = match &mut self.primary {
                Some(primary) if !primary.pending.is_empty() => {
                    self.slots.take().zip(primary.pending.pop_front())
                }
                _ => None,
            };
            let (id, count, kind) = if let Some((slot, message)) = control {
                let offset = u32::from(slot) * size;
                if message.len() > size as usize || !receive.memory.write(offset, &message) {
                    self.slots.give_back(slot);
                    continue;
                }
                ranges[0] = TransferRange { len: message.len() as u32, offset };
                (self.slots.hand_over([slot]), 1, ChannelType::Control)
            } else {
                // As many frames as there is room for, and none in part.
                let mut count = 0;
                for (index, (range, filled)) in ranges.iter_mut().zip(&self.received).enumerate() {
                    *range =
                        TransferRange { len: filled.len, offset: u32::from(filled.slot) * size };
                    if filled.last {
                        count = index + 1;
                    }
                }
                let batch = self.received.drain(..count).map(|filled| filled.slot);
                (self.slots.hand_over(batch), count, ChannelType::Data)
            };
            let Some(id) = id else { break };
            let named = ranges.get(..count).unwrap_or_default();
            let Some(headers) = write_transfer_pages(&mut headers, receive.layout.id, named) else {
                break;
            };
            let body =
                RndisPacket { channel: kind, section: RndisPacket::NO_SECTION, section_len: 0 };
            let message = Outgoing::new(MessageKind::SendRndisPacket, &body);
            channel.outgoing.push_with_headers(
                PacketKind::TransferPages,
                PacketFlags::COMPLETION_REQUESTED,
                id,
                headers,
                &[message.bytes(version)],
            )?;
            pushed += 1;
            if let Some(counters) = self.counters.get(usize::from(self.subchannel)) {
                counters.deliveries.add(1);
            }
        }
        Ok(pushed)
    }
}

/// That RNDIS messages have been taken.
fn completed(status: Status) -> Outgoing {
    Outgoing::new(MessageKind::SendRndisPacketComplete, &RndisPacketComplete { status })
}
