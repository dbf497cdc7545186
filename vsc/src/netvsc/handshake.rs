//! How a NIC's first channel is taken into use, up to where RNDIS messages can go both ways: agree on
//! a version, tell the MTU and what we can do, share both buffers.

use vmbus::mapped::RingMemory;
use vmbus::nvsp::{
    Init, InitComplete, Message, MessageKind, NdisConfig, NdisVersion, Outgoing, RECEIVE_BUFFER,
    ReceiveBufferComplete, SEND_BUFFER, SendBufferComplete, ShareBuffer, Status, Version,
};
use vmbus::packet::{PacketFlags, PacketKind};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{ETHERNET_HEADER, Fault, MAX_ANNOUNCEMENTS, Setup};
use crate::{Channel, Doorbell, SharedBuffer};

/// Ids of NVSP's own packets count from here; no packet with frames has one that is near.
pub(super) const FIRST_ID: u64 = u64::MAX - 0xff;

/// Room for the longest packet of the handshake; announcements are longer than answers.
const LONGEST_PACKET: usize = 512;

/// The smallest section that is of use: one for any control message.
const MIN_SECTION: u32 = 1024;

/// What was agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared {
    pub version: Version,
    pub slots: u32,
    pub section_size: u32,
    pub sections: u32,
}

/// A handshake under way.
struct Handshake<'c, M, D, W> {
    channel: &'c mut Channel<M, D>,
    version: Version,
    id: u64,
    wait: W,
}

/// Shakes hands on a channel that was just opened.
pub(super) fn shake<M: RingMemory, D: Doorbell, B: SharedBuffer>(
    channel: &mut Channel<M, D>,
    setup: &Setup<B>,
    wait: impl FnMut() -> bool,
) -> Result<Shared, Fault> {
    // Before a version is agreed on, messages are as short as the oldest has them.
    let mut handshake = Handshake { channel, version: Version::V1, id: FIRST_ID, wait };
    let version = handshake.agree()?;
    handshake.version = version;
    if version >= Version::V2 {
        let config = NdisConfig {
            max_frame: u32::from(setup.mtu) + ETHERNET_HEADER as u32,
            reserved: 0,
            capabilities: setup.capabilities,
        };
        handshake.tell(MessageKind::SendNdisConfig, &config)?;
    }
    let minor = if version >= Version::V5 { 30 } else { 1 };
    handshake.tell(MessageKind::SendNdisVersion, &NdisVersion { major: 6, minor })?;
    let slots = handshake.share_receive(setup)?;
    let (section_size, sections) = handshake.share_send(setup)?;
    Ok(Shared { version, slots, section_size, sections })
}

impl<M: RingMemory, D: Doorbell, W: FnMut() -> bool> Handshake<'_, M, D, W> {
    /// The newest version that the host speaks.
    fn agree(&mut self) -> Result<Version, Fault> {
        let mut refused = Status::None;
        for version in Version::ALL.into_iter().rev() {
            let init = Init { min: version, max: version };
            let answer: InitComplete =
                self.ask(MessageKind::Init, &init, MessageKind::InitComplete)?;
            if answer.status == Status::Success {
                return Ok(version);
            }
            refused = answer.status;
        }
        Err(Fault::NoCommonVersion(refused.0))
    }

    fn share_receive<B: SharedBuffer>(&mut self, setup: &Setup<B>) -> Result<u32, Fault> {
        let share = ShareBuffer { gpadl: setup.receive.gpadl, id: RECEIVE_BUFFER, reserved: 0 };
        let kind = MessageKind::SendReceiveBuffer;
        let answer: ReceiveBufferComplete =
            self.ask(kind, &share, MessageKind::SendReceiveBufferComplete)?;
        accepted(kind, answer.status)?;
        // Where slots are does not matter to us, as packets say where to look; that they fit does.
        let size = setup.receive.memory.size() as u64;
        let all = u64::from(answer.slot_size) * u64::from(answer.slots);
        if answer.sections != 1 || all == 0 || all > size {
            return Err(Fault::Limits);
        }
        Ok(answer.slots)
    }

    fn share_send<B: SharedBuffer>(&mut self, setup: &Setup<B>) -> Result<(u32, u32), Fault> {
        let share = ShareBuffer { gpadl: setup.send.gpadl, id: SEND_BUFFER, reserved: 0 };
        let kind = MessageKind::SendSendBuffer;
        let answer: SendBufferComplete =
            self.ask(kind, &share, MessageKind::SendSendBufferComplete)?;
        accepted(kind, answer.status)?;
        let size = u32::try_from(setup.send.memory.size()).unwrap_or(u32::MAX);
        if answer.section_size < MIN_SECTION || answer.section_size > size {
            return Err(Fault::Limits);
        }
        Ok((answer.section_size, size / answer.section_size))
    }

    fn send<T: IntoBytes + Immutable>(
        &mut self,
        kind: MessageKind,
        body: &T,
        flags: PacketFlags,
    ) -> Result<u64, Fault> {
        self.id += 1;
        let message = Outgoing::new(kind, body);
        let bytes = message.bytes(self.version);
        self.channel.send(PacketKind::InBand, flags, self.id, &[], bytes)?;
        self.channel.publish();
        Ok(self.id)
    }

    /// Says something to which there is no answer.
    fn tell<T: IntoBytes + Immutable>(&mut self, kind: MessageKind, body: &T) -> Result<(), Fault> {
        self.send(kind, body, PacketFlags::NONE).map(drop)
    }

    /// Says something and waits for the answer.
    fn ask<T: IntoBytes + Immutable, A: FromBytes>(
        &mut self,
        kind: MessageKind,
        body: &T,
        answer: MessageKind,
    ) -> Result<A, Fault> {
        let id = self.send(kind, body, PacketFlags::COMPLETION_REQUESTED)?;
        let mut announcements = 0;
        loop {
            let mut buffer = [0; LONGEST_PACKET];
            match self.channel.receive(&mut buffer)? {
                Some(packet) if packet.kind == PacketKind::Completion => {
                    if packet.transaction_id != id {
                        return Err(Fault::UnknownAnswer(packet.transaction_id));
                    }
                    let short = Fault::Short(packet.payload.len());
                    let message = Message::parse(packet.payload).ok_or(short)?;
                    if message.kind != answer {
                        return Err(Fault::Message(message.kind.0));
                    }
                    return message.body().ok_or(short);
                }
                Some(packet) if packet.kind == PacketKind::InBand => {
                    announcements += 1;
                    if announcements > MAX_ANNOUNCEMENTS {
                        return Err(Fault::Flood);
                    }
                }
                Some(packet) => return Err(Fault::PacketKind(packet.kind.0)),
                None => {
                    if self.channel.rest() && !(self.wait)() {
                        return Err(Fault::TimedOut);
                    }
                    self.channel.wake();
                }
            }
        }
    }
}

fn accepted(asked: MessageKind, status: Status) -> Result<(), Fault> {
    match status {
        Status::Success => Ok(()),
        status => Err(Fault::Refused { message: asked.0, status: status.0 }),
    }
}
