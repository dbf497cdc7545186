//! The frames of one channel: packets in, frames to the network's queue and back, answers and
//! deliveries to the guest.
//!
//! A packet is in private memory when it comes here, and all it names is checked before it is used.
//! What is under way each way is kept in [`Sends`] and [`Receives`]; here the two meet their queue, the
//! ring, and what the first channel does besides.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use backends::net::{Completion, Completions, Network, Offloads, Queue, QueueConfig};
use backends::uring::{Cqe, Tag, Uring};
use hypervisor::GuestMemory;
use tracing::{debug, warn};
use vmbus::nvsp::{
    Capabilities, ChannelType, Message, MessageKind, Outgoing, RndisPacket, RndisPacketComplete,
    SEND_TABLE_ENTRIES, SendIndirectionTable, Status, Version,
};
use vmbus::packet::{
    Packet, PacketFlags, PacketKind, TransferRange, ring_size, write_transfer_pages,
};
use vmbus::protocol::GpadlId;
use vmbus_server::Channel;
use vmbus_server::channel::Gpadl;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::control::{Control, MAX_MESSAGE};
use super::crossing::Crossing;
use super::handshake::{Handshake, Step};
use super::objects::COALESCING;
use super::pages::Shared;
use super::receives::{MAX_PARTS, RECEIVES, Receives};
use super::sends::{Ended, SENDS, Sends};
use super::session::{Loan, NicCounters, Receive, Send, Session, statistics};
use super::worker::Fault;

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
    /// The guest has been told which channels to send on.
    pub has_sent_table: bool,
}

/// One channel's frames. Fields are dropped in order: the queue before what its buffers point to.
pub(super) struct Engine {
    queue: Option<Box<dyn Queue>>,
    sends: Sends,
    receives: Receives,
    /// Holds the guest's memory for as long as the two above.
    _memory: GuestMemory,
    network: Arc<dyn Network>,
    session: Arc<Session>,
    counters: Arc<[NicCounters]>,
    subchannel: u16,
    primary: Option<Primary>,
    /// No more slots are offered.
    closing: bool,
    /// This channel's parts in the guest's buffers.
    receive_pages: Option<Gpadl>,
    send_pages: Option<Gpadl>,
    done: Completions,
    answers: Vec<(u64, Outgoing)>,
    /// Bytes of frames that they are about.
    answered: u64,
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
        let subchannel = channel.subchannel;
        let kept = if primary.is_some() { CONTROL_SLOTS } else { 0 };
        let (own_session, own_network) = (Arc::clone(&session), Arc::clone(&network));
        Self {
            queue: None,
            sends: Sends::new(channel.memory.clone(), network.link().takes),
            receives: Receives::new(own_session, own_network, subchannel, kept),
            _memory: channel.memory.clone(),
            network,
            session,
            counters,
            subchannel,
            primary,
            closing: false,
            receive_pages: None,
            send_pages: None,
            done: Completions::with_capacity(usize::from(SENDS) + usize::from(RECEIVES) + 1),
            answers: Vec::with_capacity(SENDS.into()),
            answered: 0,
        }
    }

    /// Opens the network's queue and takes this channel's part of the receive buffer.
    pub(super) fn open_queue(&mut self, uring: &mut Uring) -> io::Result<()> {
        if self.session.receive.get().is_none() {
            return Err(io::Error::other("a sub-channel without a receive buffer"));
        }
        let config =
            QueueConfig { index: self.subchannel, tag: QUEUE, sends: SENDS, receives: RECEIVES };
        self.receive_pages = self.session.receive_loan.join();
        self.send_pages = self.session.send_loan.join();
        self.queue = Some(self.network.queue(config, uring)?);
        self.receives.open();
        Ok(())
    }

    /// What others wake this channel's worker with.
    pub(super) fn bell(&self) -> Option<Arc<EventFd>> {
        self.session.bell(self.subchannel).map(|bell| Arc::clone(&bell.event))
    }

    fn count(&self, counter: impl Fn(&NicCounters)) {
        if let Some(counters) = self.counters.get(usize::from(self.subchannel)) {
            counter(counters);
        }
    }

    /// Packets that can be taken now, as far as the tables go.
    pub(super) fn room(&self) -> u32 {
        u32::try_from(self.sends.room()).unwrap_or(u32::MAX)
    }

    /// Bytes of frames that are under way to the network.
    pub(super) fn bytes_sending(&self) -> u64 {
        self.sends.bytes()
    }

    /// Answers that are still to be given, now or when frames have been sent.
    pub(super) fn owed(&self) -> u32 {
        let owed = self.answers.len() + self.sends.under_way();
        u32::try_from(owed).unwrap_or(u32::MAX)
    }

    /// Answers that are ready, and the bytes of the frames that they are about.
    pub(super) fn answers(&self) -> (u32, u64) {
        (u32::try_from(self.answers.len()).unwrap_or(u32::MAX), self.answered)
    }

    /// Whether the guest has still to complete something that was delivered.
    pub(super) fn is_owed_completions(&self) -> bool {
        self.receives.slots.with_guest() > 0
    }

    /// Whether there is something to do that the ring does not tell of.
    pub(super) fn is_ready(&self) -> bool {
        self.receives.has_news() || self.queue.as_ref().is_some_and(|queue| queue.is_ready())
    }

    /// Whether something waits for room in the outgoing ring.
    pub(super) fn has_deliveries(&self) -> bool {
        let control = self.primary.as_ref().is_some_and(|primary| !primary.pending.is_empty());
        self.receives.is_waiting() || (control && self.receives.slots.free() > 0)
    }

    /// Frames and buffers that lie with the network.
    pub(super) fn in_flight(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.in_flight())
    }

    /// See [`Queue::prepare_to_sleep`]; other channels are asked too.
    pub(super) fn prepare_to_sleep(&mut self) -> bool {
        let Self { session, closing, receive_pages, send_pages, .. } = self;
        let (no_slots, no_frames) = (self.receives.is_idle(), self.sends.under_way() == 0);
        let has_more = || {
            (session.receive_loan.is_over() && (!*closing || (receive_pages.is_some() && no_slots)))
                || (session.send_loan.is_over() && send_pages.is_some() && no_frames)
        };
        self.receives.prepare_to_sleep(has_more)
            && self.queue.as_mut().is_none_or(|queue| queue.prepare_to_sleep())
    }

    /// Lets go of buffers that the guest wants back, as soon as the network has done so.
    fn let_go(&mut self) {
        if self.session.receive_loan.is_over() && self.receives.is_idle() {
            self.receive_pages = None;
        }
        if self.session.send_loan.is_over() && self.sends.under_way() == 0 {
            self.send_pages = None;
        }
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
            if self.receives.complete(packet.transaction_id).is_err() {
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
        if rndis.is_some_and(|rndis| rndis.section != RndisPacket::NO_SECTION) {
            self.join_send_buffer();
        }
        let usable = self.send_pages.is_some() && !self.session.send_loan.is_over();
        let send = self.session.send.get().filter(|_| usable);
        let Some(rndis) = rndis.filter(|rndis| self.sends.look_up(packet, rndis, send)) else {
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

    /// Takes this channel's part in the send buffer, which may have been shared after the channel was
    /// opened. Without it the guest could have the buffer back while frames leave from there.
    fn join_send_buffer(&mut self) {
        if self.send_pages.is_none() && !self.session.send_loan.is_over() {
            self.send_pages = self.session.send_loan.join();
        }
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
        let gpadl = |id: GpadlId| channel.gpadl(id);
        let reply =
            primary.handshake.take(message, |id| gpadl(id).map(|pages| pages.pages().len()));
        let shared = |id: GpadlId, loan: &Loan| {
            // It was there a moment ago; if the guest wants it back already, it has no pages.
            let pages = gpadl(id).map(|gpadl| {
                let pages = Arc::clone(gpadl.pages());
                loan.begin(gpadl);
                pages
            });
            Shared::new(channel.memory.clone(), pages.unwrap_or_default())
        };
        match reply.step {
            Step::None => {}
            Step::ReceiveBuffer(layout) => {
                let channels = u16::try_from(self.counters.len()).unwrap_or(u16::MAX);
                let receive = Receive {
                    memory: shared(layout.gpadl, &self.session.receive_loan),
                    layout,
                    version: primary.handshake.version(),
                    capabilities: primary.handshake.capabilities(),
                    max_frame: primary.handshake.max_frame(),
                    crossing: Crossing::new(layout.slots, channels),
                };
                if !receive.capabilities.has(Capabilities::RSC) {
                    primary.control.forbid_coalescing();
                }
                // The handshake shares it once.
                let _ = self.session.receive.set(receive);
                self.open_queue(uring)?;
                // From now on the queue tells of changes; what there was before is seen here.
                self.link_is(self.network.link().up);
            }
            Step::SendBuffer(layout) => {
                let memory = shared(layout.gpadl, &self.session.send_loan);
                let _ = self.session.send.set(Send { memory, layout });
                self.join_send_buffer();
            }
            Step::RevokeReceive => self.session.revoke_receive(),
            Step::RevokeSend => self.session.revoke_send(),
            Step::Subchannels(count) => channel.offer_subchannels(count),
        }
        self.answer(id, reply.answer.unwrap_or_else(|| completed(Status::Success)));
        Ok(())
    }

    /// Hands the frames of the packet that was looked up to the network.
    fn send(&mut self, id: Option<u64>, uring: &mut Uring) {
        let (Some(queue), Some(receive)) = (&mut self.queue, self.session.receive.get()) else {
            return;
        };
        let (end, malformed) =
            self.sends.send(id, receive.max_frame, queue.as_mut(), uring, &mut self.done);
        if let Some(why) = malformed {
            self.count(|counters| counters.malformed.add(1));
            crate::limited!(debug!("netvsp: a packet was dropped: {why}"));
        }
        self.ended(end);
    }

    fn ended(&mut self, end: Option<Ended>) {
        if let Some(Ended { id, status }) = end {
            self.answer(id, completed(status));
        }
    }

    /// Takes a control message.
    fn control(&mut self, id: Option<u64>) {
        let Some(primary) = &mut self.primary else {
            return self.answer(id, completed(Status::Failure));
        };
        let mut bytes = [0; MAX_MESSAGE];
        let message = self.sends.read(&mut bytes);
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

    /// Takes what other channels have left, offers slots to the network, and ends its batch. Returns
    /// how many frames others have left.
    pub(super) fn turn(&mut self, uring: &mut Uring) -> u32 {
        if let Some(bell) = self.session.bell(self.subchannel) {
            bell.wake.awake();
        }
        if self.receive_pages.as_ref().is_some_and(Gpadl::is_wanted) {
            self.session.revoke_receive();
        }
        if self.send_pages.as_ref().is_some_and(Gpadl::is_wanted) {
            self.session.revoke_send();
        }
        let Some(queue) = &mut self.queue else { return 0 };
        if self.session.receive_loan.is_over() && !self.closing {
            self.closing = true;
            queue.recall(uring, &mut self.done);
        }
        let arrivals = self.receives.arrivals();
        if self.receives.changes_size() {
            // What lies with the network is of the wrong size.
            queue.recall(uring, &mut self.done);
        }
        if !self.closing && self.receive_pages.is_some() {
            self.receives.offer(queue.as_mut(), uring, &mut self.done);
        }
        queue.turn(uring, &mut self.done);
        arrivals
    }

    /// Takes a completion of the worker's ring.
    pub(super) fn complete(&mut self, cqe: &Cqe, uring: &mut Uring) {
        if let Some(queue) = &mut self.queue {
            queue.complete(cqe, uring, &mut self.done);
        }
    }

    /// Turns what has happened on the network into answers and deliveries, here or on other channels.
    /// Returns how much.
    pub(super) fn settle(&mut self) -> u32 {
        let mut count = 0;
        while let Some(completion) = self.done.pop() {
            count += 1;
            match completion {
                Completion::Sent { id, result } => self.sent(id, result.is_ok()),
                Completion::Received { id, len, offload } => {
                    let fate = self.receives.receive(id, len, &offload);
                    self.count(|counters| counters.count_received(fate, len));
                }
                Completion::Returned { id } => self.receives.take_back(id, 0),
                Completion::Link(up) => self.link_is(up),
            }
        }
        self.receives.wake_others();
        self.let_go();
        count
    }

    /// Tells the guest if it does not know that the link is so.
    fn link_is(&mut self, up: bool) {
        let Some(primary) = &mut self.primary else { return };
        if let Some(indication) = primary.control.set_link(up) {
            self.reply(indication);
        }
    }

    fn sent(&mut self, id: u32, well: bool) {
        let Some((len, end)) = self.sends.sent(id) else { return };
        self.answered += u64::from(len);
        self.count(|counters| {
            if well {
                counters.sent.add(1);
                counters.sent_bytes.add(len.into());
            } else {
                counters.send_drops.add(1);
            }
        });
        self.ended(end);
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
        self.answered = 0;
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
        if self.session.receive_loan.is_over() {
            self.receives.drop_waiting();
            return Ok(pushed);
        }
        let size = receive.layout.slot_size;
        let reserved = self.owed().saturating_mul(ANSWER).saturating_add(DELIVERY);
        if channel.outgoing.free()? >= reserved
            && let Some(primary) = &mut self.primary
            && primary.owes_table(&receive.crossing)
        {
            primary.has_sent_table = true;
            let (message, table) = send_table(receive.crossing.open_channels());
            let payload = [message.as_bytes(), table.as_bytes()];
            channel.outgoing.push(PacketKind::InBand, PacketFlags::NONE, 0, &payload)?;
            pushed += 1;
        }
        let mut ranges = [TransferRange { len: 0, offset: 0 }; MAX_RANGES];
        let mut headers = [0; 8 + 8 * MAX_RANGES];
        while channel.outgoing.free()? >= reserved {
            let slots = &mut self.receives.slots;
            let control = match &mut self.primary {
                Some(primary) if !primary.pending.is_empty() => {
                    slots.take().zip(primary.pending.pop_front())
                }
                _ => None,
            };
            let (handed_over, kind) = if let Some((slot, message)) = control {
                let offset = u32::from(slot) * size;
                if message.len() > size as usize || !receive.memory.write(offset, &message) {
                    slots.give_back(slot);
                    continue;
                }
                ranges[0] = TransferRange { len: message.len() as u32, offset };
                (slots.hand_over([slot]).map(|id| (id, 1)), ChannelType::Control)
            } else {
                (self.receives.hand_over(size, &mut ranges), ChannelType::Data)
            };
            let Some((id, count)) = handed_over else { break };
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
            self.count(|counters| counters.deliveries.add(1));
        }
        Ok(pushed)
    }
}

impl Drop for Engine {
    /// By now the worker's ring is gone, and with it all that the network would do with the slots.
    fn drop(&mut self) {
        self.receives.close();
    }
}

impl Primary {
    /// Whether the guest is to be told which channels to send on: once it has opened all that it was
    /// granted, for it would send on others too.
    fn owes_table(&self, crossing: &Crossing) -> bool {
        let granted = self.handshake.subchannels().filter(|granted| *granted > 0);
        !self.has_sent_table
            && self.handshake.version() >= Version::V5
            && granted.is_some_and(|granted| crossing.open_channels() > granted.into())
    }
}

/// That RNDIS messages have been taken.
fn completed(status: Status) -> Outgoing {
    Outgoing::new(MessageKind::SendRndisPacketComplete, &RndisPacketComplete { status })
}

/// Which of so many channels to send on: each in turn. The table follows the message, which is as long
/// as the longest, since Linux looks there for hosts that speak less than version 6.1.
fn send_table(channels: usize) -> (Outgoing, [u32; SEND_TABLE_ENTRIES]) {
    let (count, offset) = (SEND_TABLE_ENTRIES as u32, size_of::<Outgoing>() as u32);
    let message =
        Outgoing::new(MessageKind::SendIndirectionTable, &SendIndirectionTable { count, offset });
    (message, std::array::from_fn(|entry| (entry % channels.max(1)) as u32))
}
