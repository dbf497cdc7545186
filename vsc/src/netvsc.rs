//! The client of a synthetic NIC.
//!
//! ```text
//!   Queue::connect          NVSP and RNDIS, on the NIC's first channel: version, buffers, address
//!     ├─ Queue::set_filter  frames come from now on
//!     ├─ Queue::subchannel  one more queue for each sub-channel that was offered
//!     └─ Queue::halt        the buffers are the caller's again
//! ```
//!
//! The caller owns two buffers that are shared with the host for as long as the NIC is in use: the
//! host leaves frames in one, cut into slots, and the client in the other, cut into sections. Their
//! GPADLs, like the channel itself, are made by [`vmbus::client`]. `DEPTH` is how many packets a
//! [`Queue`] may have on their way, each in a section of its own; a packet has several frames, if they
//! are short and the host takes so many.
//!
//! A turn is: [send](Queue::send) some, [publish](Queue::publish) once, [poll](Queue::poll) for what
//! has come. Nothing here waits or allocates. A frame is copied once each way: into its section, and
//! out of its slot by the closure that is shown it; [`Queue::send_pages`] spares the first.
//!
//! ```
//! # use vsc::{Doorbell, SharedBuffer};
//! # use vsc::netvsc::{Event, Fault, Offload, Queue, SendError};
//! # use vmbus::mapped::RingMemory;
//! /// Sends back what comes until the link goes down, with the addresses exchanged.
//! fn echo<M: RingMemory, D: Doorbell, B: SharedBuffer>(
//!     queue: &mut Queue<M, D, B, 64>,
//!     mut sleep: impl FnMut(),
//! ) -> Result<(), Fault> {
//!     let mut frames: Vec<Vec<u8>> = Vec::new();
//!     while queue.is_link_up() {
//!         let packets = queue.poll(|event| {
//!             if let Event::Received(frame) = event {
//!                 let mut bytes = vec![0; frame.len()];
//!                 frame.read(0, &mut bytes);
//!                 let (to, from) = bytes[..12].split_at_mut(6);
//!                 to.swap_with_slice(from);
//!                 frames.push(bytes);
//!             }
//!         })?;
//!         while let Some(frame) = frames.pop() {
//!             match queue.send(&frame, &Offload::default()) {
//!                 Err(SendError::Full) => {
//!                     frames.push(frame);
//!                     break;
//!                 }
//!                 Err(SendError::Fault(fault)) => return Err(fault),
//!                 _ => {}
//!             }
//!         }
//!         queue.publish();
//!         if packets == 0 {
//!             if queue.rest() {
//!                 sleep();
//!             }
//!             queue.wake();
//!         }
//!     }
//!     Ok(())
//! }
//! ```

mod control;
mod fault;
mod frame;
mod handshake;
mod sends;
mod settings;

use vmbus::mapped::RingMemory;
use vmbus::nvsp::{
    Capabilities, MESSAGE_SIZE, Message, MessageKind, Outgoing, RECEIVE_BUFFER, RevokeBuffer,
    RndisPacketComplete, SEND_BUFFER, Status, SubchannelComplete, SubchannelRequest, Version,
};
use vmbus::packet::{Packet, PacketFlags, PacketKind, ring_size};
use vmbus::protocol::GpadlId;
use vmbus::ring::RingError;
use vmbus::rndis::{self, ChecksumOffload, LargeSendOffload, Oid, PacketFilter, Request};

use crate::{Channel, Counters, Doorbell, Pages, SharedBuffer};
use control::{Control, MAX_ANSWER};
pub use fault::{Fault, RequestError, SendError};
pub use frame::Frame;
use frame::Slot;
pub use sends::Offload;
use sends::{Limits, Sends};

/// Addresses and type: what every frame begins with.
pub const ETHERNET_HEADER: usize = 14;
/// A VLAN tag in a frame.
const VLAN_TAG: usize = 4;

/// Room for the longest packet: one that names 250 slots.
const LONGEST_PACKET: usize = 2048;

/// Announcements that are taken where none is due.
const MAX_ANNOUNCEMENTS: usize = 256;

/// Packets that one poll takes: a host that never stops does not keep us there.
const MOST_PACKETS: usize = 256;

/// Bytes of the ring that an answer to the host takes.
const ANSWER: u32 = ring_size(MESSAGE_SIZE) as u32;
/// Bytes of the ring that sends leave to answers. One would do; more make for longer turns.
const ANSWERS: u32 = 16 * ANSWER;

/// Id of the packet that asks for sub-channels.
const SUBCHANNELS_ID: u64 = handshake::FIRST_ID - 1;
/// Id of packets that want no answer.
const NO_ID: u64 = handshake::FIRST_ID - 2;

/// A buffer, and the list by which the host knows its pages.
#[derive(Clone, Copy, Debug)]
pub struct Shared<B> {
    /// The list, which the host has accepted.
    pub gpadl: GpadlId,
    /// The memory.
    pub memory: B,
}

/// What a NIC is taken into use with.
#[derive(Clone, Copy, Debug)]
pub struct Setup<B> {
    /// Where frames come: some hundred slots of the MTU and 128 bytes, more with sub-channels.
    pub receive: Shared<B>,
    /// Where frames go from: `DEPTH` sections for each channel. Hyper-V and Partita make them 6144
    /// bytes long.
    pub send: Shared<B>,
    /// The longest packet behind an Ethernet header, in bytes.
    pub mtu: u16,
    /// What is taken besides plain frames; coalesced ones are not.
    pub capabilities: Capabilities,
    /// How many sub-channels are wanted.
    pub subchannels: u16,
}

/// What was agreed on with the host.
#[derive(Clone, Copy, Debug)]
pub struct Agreement {
    /// The protocol's version.
    pub version: Version,
    /// The NIC's address.
    pub address: [u8; 6],
    /// The largest MTU that the network has, in bytes.
    pub max_mtu: u16,
    /// The MTU that was asked for.
    pub mtu: u16,
    /// The speed of the link in units of 100 bit/s.
    pub speed: u32,
    /// Frames that one packet may have.
    pub max_frames: u32,
    /// Into how many slots the host has cut the receive buffer.
    pub slots: u32,
    /// Which checksums the host fills in, or checks.
    pub checksums: ChecksumOffload,
    /// Which frames the host cuts into segments.
    pub large_send: LargeSendOffload,
    /// How many sub-channels are being offered: as many as were wanted, if granted.
    pub subchannels: u16,
    limits: Limits,
    sections: u32,
    section_size: u32,
}

/// Something that has come.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a, B> {
    /// A frame. Its slot is given back when the closure has returned.
    Received(Frame<'a, B>),
    /// A frame that was sent from pages has left, or not; the pages are the caller's again.
    Sent {
        /// The caller's name for it.
        tag: u32,
        /// Whether it has left.
        well: bool,
    },
    /// The cable was plugged in (true) or pulled out.
    Link(bool),
}

/// What has passed through a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounters {
    /// Frames that the host has taken.
    pub sent: u64,
    /// Frames that came.
    pub received: u64,
    /// Packets that the host refused, with their frames.
    pub refused: u64,
}

/// A channel of a NIC, with `DEPTH` packets on their way at most.
#[derive(Debug)]
pub struct Queue<M, D, B, const DEPTH: usize> {
    channel: Channel<M, D>,
    receive: B,
    sends: Sends<B, DEPTH>,
    control: Control,
    version: Version,
    subchannels: Subchannels,
    frames: FrameCounters,
    dead: bool,
    buffer: [u8; LONGEST_PACKET],
}

/// The answer about sub-channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subchannels {
    NotAsked,
    Asked,
    Granted(u16),
}

impl<M: RingMemory, D: Doorbell, B: SharedBuffer, const DEPTH: usize> Queue<M, D, B, DEPTH> {
    /// Takes a NIC's first channel, just opened, into use. Sub-channels are being offered when this
    /// returns, as many as the [`Agreement`] says; frames come after [`Queue::set_filter`].
    ///
    /// `wait` is called when there is nothing to do but wait for an interrupt, which has been asked
    /// for; it may as well return at once. If it returns false, that is the end.
    pub fn connect(
        mut channel: Channel<M, D>,
        setup: Setup<B>,
        mut wait: impl FnMut() -> bool,
    ) -> Result<(Self, Agreement), Fault> {
        let taken = Capabilities::IEEE_8021Q | Capabilities::TEAMING;
        let capabilities = Capabilities(setup.capabilities.0 & taken);
        let setup = Setup { capabilities, ..setup };
        let shared = handshake::shake(&mut channel, &setup, &mut wait)?;
        let limits = Limits {
            frame: usize::from(setup.mtu) + ETHERNET_HEADER + 2 * VLAN_TAG,
            frames: 1,
            bytes: shared.section_size as usize,
            alignment: 1,
        };
        let sends = Sends::new(
            setup.send.memory,
            0,
            shared.sections,
            shared.section_size,
            shared.version,
            limits,
        );
        let mut queue = Self::new(channel, setup.receive.memory, sends, shared.version);
        let limits = queue.initialize(limits, &mut wait)?;
        queue.sends.set_limits(limits);

        let mut address = [0; 6];
        queue.object(Oid::PermanentAddress, &mut address, &mut wait)?;
        let max_mtu = queue.number(Oid::MaximumFrameSize, &mut wait)?;
        let speed = queue.number(Oid::LinkSpeed, &mut wait)?;
        let disconnected = queue.number(Oid::MediaConnectStatus, &mut wait)?;
        queue.control.set_link(disconnected == 0);
        let (checksums, large_send) = queue.offloads(&mut wait)?;
        let channels = u16::try_from(shared.sections / DEPTH as u32).unwrap_or(u16::MAX);
        let mut subchannels = setup.subchannels.min(channels.saturating_sub(1));
        if subchannels > 0 && shared.version >= Version::V5 {
            subchannels = queue.ask_for_subchannels(subchannels, &mut wait)?;
        } else {
            subchannels = 0;
        }
        let agreement = Agreement {
            version: shared.version,
            address,
            max_mtu: u16::try_from(max_mtu).unwrap_or(u16::MAX),
            mtu: setup.mtu,
            speed,
            max_frames: limits.frames,
            slots: shared.slots,
            checksums,
            large_send,
            subchannels,
            limits,
            sections: shared.sections,
            section_size: shared.section_size,
        };
        Ok((queue, agreement))
    }

    /// Takes sub-channel `number`, from 1 on, just opened, into use. The buffers are those of the
    /// first channel.
    ///
    /// A send buffer that has no sections left for it is a fault of the caller's, told as
    /// [`Fault::Limits`].
    pub fn subchannel(
        channel: Channel<M, D>,
        agreement: &Agreement,
        number: u16,
        receive: B,
        send: B,
    ) -> Result<Self, Fault> {
        let Agreement { version, sections, section_size, limits, .. } = *agreement;
        let first = u32::from(number) * DEPTH as u32;
        let left = sections.checked_sub(first).filter(|left| *left > 0).ok_or(Fault::Limits)?;
        let sends = Sends::new(send, first, left, section_size, version, limits);
        Ok(Self::new(channel, receive, sends, version))
    }

    fn new(channel: Channel<M, D>, receive: B, sends: Sends<B, DEPTH>, version: Version) -> Self {
        Self {
            channel,
            receive,
            sends,
            control: Control::new(),
            version,
            subchannels: Subchannels::NotAsked,
            frames: FrameCounters::default(),
            dead: false,
            buffer: [0; LONGEST_PACKET],
        }
    }

    fn ask_for_subchannels(
        &mut self,
        count: u16,
        wait: &mut impl FnMut() -> bool,
    ) -> Result<u16, Fault> {
        let request =
            SubchannelRequest { operation: SubchannelRequest::ALLOCATE, count: count.into() };
        let message = Outgoing::new(MessageKind::SubChannel, &request);
        let bytes = message.bytes(self.version);
        let flags = PacketFlags::COMPLETION_REQUESTED;
        self.channel.send(PacketKind::InBand, flags, SUBCHANNELS_ID, &[], bytes)?;
        self.subchannels = Subchannels::Asked;
        loop {
            self.publish();
            self.poll(|_| {})?;
            if let Subchannels::Granted(granted) = self.subchannels {
                self.publish();
                return Ok(granted.min(count));
            }
            self.pause(wait)?;
        }
    }

    /// Copies a frame into the send buffer; the host learns of it by [`Queue::publish`].
    #[inline]
    pub fn send(&mut self, frame: &[u8], offload: &Offload) -> Result<(), SendError> {
        if self.dead {
            return Err(Fault::Dead.into());
        }
        let sent = self.sends.put(&mut self.channel, frame, offload);
        self.dead |= matches!(sent, Err(SendError::Fault(_)));
        sent
    }

    /// Sends a frame that lies in pages of the caller's. They are the host's until the
    /// [`Event::Sent`] with this `tag`.
    #[inline]
    pub fn send_pages(
        &mut self,
        tag: u32,
        frame: Pages<'_>,
        offload: &Offload,
    ) -> Result<(), SendError> {
        if self.dead {
            return Err(Fault::Dead.into());
        }
        let sent = self.sends.put_pages(&mut self.channel, tag, frame, offload);
        self.dead |= matches!(sent, Err(SendError::Fault(_)));
        sent
    }

    /// Shows the host what was sent, gives it back the slots of what was polled, and signals it, once,
    /// if it may be asleep.
    #[inline]
    pub fn publish(&mut self) {
        if !self.dead
            && let Err(SendError::Fault(_)) = self.sends.flush(&mut self.channel)
        {
            self.dead = true;
        }
        self.channel.publish();
    }

    /// Shows each thing that has come to `event`, and returns how many packets were taken. A fault ends
    /// the use of the queue; what was shown before it counts.
    #[inline]
    pub fn poll(&mut self, mut event: impl FnMut(Event<'_, B>)) -> Result<usize, Fault> {
        if self.dead {
            return Err(Fault::Dead);
        }
        let mut count = 0;
        while count < MOST_PACKETS {
            match self.take(&mut event) {
                Ok(true) => count += 1,
                Ok(false) => break,
                Err(fault) => {
                    self.dead = true;
                    return Err(fault);
                }
            }
        }
        Ok(count)
    }

    /// Takes a packet, if there is one.
    #[inline]
    fn take(&mut self, event: &mut impl FnMut(Event<'_, B>)) -> Result<bool, Fault> {
        // Nothing is taken that could not be answered.
        if !self.channel.has_room(ANSWER)? {
            return Ok(false);
        }
        let Self { channel, receive, sends, control, frames, subchannels, buffer, .. } = self;
        let Some(packet) = channel.receive(buffer)? else { return Ok(false) };
        match packet.kind {
            PacketKind::TransferPages => {
                deliver(&packet, receive, control, frames, event)?;
                let id = packet.transaction_id;
                if packet.flags.completion_requested() {
                    let body = RndisPacketComplete { status: Status::Success };
                    let message = Outgoing::new(MessageKind::SendRndisPacketComplete, &body);
                    let bytes = message.bytes(self.version);
                    self.channel.send(PacketKind::Completion, PacketFlags::NONE, id, &[], bytes)?;
                }
            }
            PacketKind::Completion if packet.transaction_id == SUBCHANNELS_ID => {
                if *subchannels != Subchannels::Asked {
                    return Err(Fault::AnsweredTwice(packet.transaction_id));
                }
                let short = Fault::Short(packet.payload.len());
                let message = Message::parse(packet.payload).ok_or(short)?;
                let answer: SubchannelComplete = match message.kind {
                    MessageKind::SubChannel => message.body().ok_or(short)?,
                    kind => return Err(Fault::Message(kind.0)),
                };
                // It does without, if they are refused.
                let granted = if answer.status == Status::Success { answer.count } else { 0 };
                *subchannels = Subchannels::Granted(u16::try_from(granted).unwrap_or(u16::MAX));
            }
            PacketKind::Completion => {
                let ended = sends.end(packet.transaction_id, packet.payload)?;
                if ended.well {
                    frames.sent += u64::from(ended.frames);
                } else if ended.control {
                    // Its answer will never come.
                    return Err(Fault::Message(MessageKind::SendRndisPacketComplete.0));
                } else {
                    frames.refused += 1;
                }
                if let Some(tag) = ended.tag {
                    event(Event::Sent { tag, well: ended.well });
                }
            }
            // Announcements: of a virtual function, or on which channels to send, which is advice.
            PacketKind::InBand => {}
            kind => return Err(Fault::PacketKind(kind.0)),
        }
        Ok(true)
    }

    /// Publishes, and asks for an interrupt when there is something. Returns whether the caller may
    /// sleep; if not, there is something to poll already.
    #[must_use = "what is there already brings no interrupt"]
    pub fn rest(&mut self) -> bool {
        self.publish();
        // With no room for answers, what has come cannot be taken, and wakes nobody.
        let stuck = matches!(self.channel.has_room(ANSWER), Ok(false));
        let wanted = match stuck {
            true => ANSWER,
            // The room that the open packet has not got, if it is room that it waits for.
            false if self.sends.is_open() => Sends::<B, DEPTH>::packet_size(),
            false => 0,
        };
        if wanted > 0 && !matches!(self.channel.want_room(wanted), Ok(false)) {
            return false;
        }
        self.channel.rest() || stuck
    }

    /// Asks not to be interrupted: the caller polls.
    pub fn wake(&mut self) {
        self.channel.wake();
    }

    /// Whether there may be something to poll: one atomic load.
    #[inline]
    pub fn has_data(&self) -> bool {
        self.channel.has_data()
    }

    /// Whether [`Queue::send`] would find a section for a new packet.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.sends.has_room()
    }

    /// Packets on their way.
    pub fn in_flight(&self) -> usize {
        self.sends.in_flight()
    }

    /// Whether the link is up, as far as was heard. Only the first channel hears of it.
    pub fn is_link_up(&self) -> bool {
        self.control.is_link_up()
    }

    /// What has passed through the channel.
    pub fn counters(&self) -> Counters {
        self.channel.counters()
    }

    /// The frames among it.
    pub fn frame_counters(&self) -> FrameCounters {
        self.frames
    }

    /// Lets the caller wait until there is something to poll.
    fn pause(&mut self, wait: &mut impl FnMut() -> bool) -> Result<(), Fault> {
        if self.rest() && !wait() {
            self.dead = true;
            return Err(Fault::TimedOut);
        }
        self.wake();
        Ok(())
    }

    /// Takes the NIC out of use, on its first channel: no frame comes any more, all that were sent have
    /// ended, and both buffers are taken back. Then the channel is to be closed, and after that the
    /// GPADLs can be torn down.
    pub fn halt(
        mut self,
        mut event: impl FnMut(Event<'_, B>),
        mut wait: impl FnMut() -> bool,
    ) -> Result<(), Fault> {
        match self.set_filter(PacketFilter(0), &mut event, &mut wait) {
            // It halts in any case.
            Ok(()) | Err(RequestError::Refused(_) | RequestError::Length(_)) => {}
            Err(RequestError::Fault(fault)) => return Err(fault),
        }
        let question = self.control.ask(rndis::MessageKind::Halt, |id| Request { id }, &[]);
        self.tell(&question.ok_or(Fault::Limits)?, &mut event, &mut wait)?;
        while self.sends.in_flight() > 0 {
            self.pause(&mut wait)?;
            self.poll(&mut event)?;
        }
        for (kind, id) in [
            (MessageKind::RevokeReceiveBuffer, RECEIVE_BUFFER),
            (MessageKind::RevokeSendBuffer, SEND_BUFFER),
        ] {
            let message = Outgoing::new(kind, &RevokeBuffer { id });
            let bytes = message.bytes(self.version);
            self.channel.send(PacketKind::InBand, PacketFlags::NONE, NO_ID, &[], bytes)?;
        }
        self.publish();
        Ok(())
    }
}

/// Shows what a packet names in the receive buffer.
#[inline]
fn deliver<B: SharedBuffer>(
    packet: &Packet<'_>,
    receive: &B,
    control: &mut Control,
    frames: &mut FrameCounters,
    event: &mut impl FnMut(Event<'_, B>),
) -> Result<(), Fault> {
    let short = Fault::Short(packet.payload.len());
    let message = Message::parse(packet.payload).ok_or(short)?;
    if message.kind != MessageKind::SendRndisPacket {
        return Err(Fault::Message(message.kind.0));
    }
    let pages = packet.transfer_pages().map_err(RingError::from)?;
    if pages.buffer != RECEIVE_BUFFER {
        return Err(Fault::Buffer(pages.buffer));
    }
    for range in pages.ranges() {
        match frame::look(receive, range)? {
            Slot::Frame(frame) => {
                frames.received += 1;
                event(Event::Received(frame));
            }
            Slot::Control { at, len } => {
                let mut bytes = [0; MAX_ANSWER];
                let bytes = bytes.get_mut(..len).ok_or(Fault::Lengths)?;
                if !receive.read(at, bytes) {
                    return Err(Fault::Lengths);
                }
                if let Some(up) = control.take(bytes)? {
                    event(Event::Link(up));
                }
            }
        }
    }
    Ok(())
}
