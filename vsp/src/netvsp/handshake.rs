//! How a NIC's first channel is taken into use, as a plain state machine: NVSP messages in, answers
//! and steps out.
//!
//! The guest proposes versions until one is spoken, may tell its MTU and what it can do, and shares
//! two buffers: one in which the host leaves frames, cut into slots, and one in which the guest
//! does, cut into sections. Then it may ask for sub-channels. What comes out of order is refused,
//! or ignored where the protocol has no answer.

use backends::net::{MAX_FRAME, longest_frame};
use vmbus::nvsp::{
    Capabilities, Init, InitComplete, Message, MessageKind, NdisConfig, Outgoing,
    ReceiveBufferComplete, RevokeBuffer, SendBufferComplete, ShareBuffer, Status,
    SubchannelComplete, SubchannelRequest, Version,
};
use vmbus::protocol::GpadlId;

/// The MTU of a guest that has not told any, in bytes.
const DEFAULT_MTU: u16 = 1500;
/// The smallest MTU: that of IPv4 (RFC 791).
const MIN_MTU: u16 = 68;
/// Addresses and type.
const ETHERNET_HEADER: u32 = 14;

/// Bytes in front of a frame in its slot: an RNDIS header with all information there can be.
pub(super) const SLOT_HEADER: u32 = 96;

/// In how many slots the longest coalesced frame may lie: as few as leave each channel so many slots.
const COALESCED_PARTS: [u32; 5] = [1, 2, 4, 8, 16];
const FEWEST_LARGE_SLOTS: u32 = 128;

/// Bytes in a section of the send buffer. Linux packs several small frames into one.
const SECTION_SIZE: u32 = 6144;

/// The most slots; they have 16-bit numbers.
const MAX_SLOTS: u32 = u16::MAX as u32;

/// What a NIC grants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grants {
    /// Sub-channels that may be asked for.
    pub subchannels: u16,
    /// The largest MTU.
    pub max_mtu: u16,
}

/// The receive buffer: where it is, and how it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReceiveLayout {
    /// Its pages.
    pub gpadl: GpadlId,
    /// What the guest calls it.
    pub id: u16,
    /// Bytes in a slot.
    pub slot_size: u32,
    /// Slots.
    pub slots: u16,
}

/// The send buffer: where it is, and how it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SendLayout {
    /// Its pages.
    pub gpadl: GpadlId,
    /// Bytes in a section.
    pub section_size: u32,
    /// Sections.
    pub sections: u32,
}

/// What the worker is to do, apart from answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    None,
    /// Frames may come into this buffer.
    ReceiveBuffer(ReceiveLayout),
    /// Frames may be sent from this buffer.
    SendBuffer(SendLayout),
    /// The receive buffer is the guest's again.
    RevokeReceive,
    /// The send buffer is the guest's again.
    RevokeSend,
    /// Offer so many sub-channels.
    Subchannels(u16),
}

/// What a message led to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    /// Goes back to the guest, if it asked for a completion.
    pub answer: Option<Outgoing>,
    /// What to do.
    pub step: Step,
}

impl Reply {
    const NOTHING: Self = Self { answer: None, step: Step::None };

    fn answer(message: Outgoing) -> Self {
        Self { answer: Some(message), step: Step::None }
    }
}

/// One NIC's handshake.
#[derive(Debug)]
pub(super) struct Handshake {
    grants: Grants,
    version: Option<Version>,
    mtu: u16,
    capabilities: Capabilities,
    receive: Option<ReceiveLayout>,
    send: Option<SendLayout>,
    /// One receive buffer and one send buffer have been shared; there is no second one.
    shared: [bool; 2],
    /// Sub-channels that were granted.
    subchannels: Option<u16>,
}

impl Handshake {
    pub(super) fn new(grants: Grants) -> Self {
        Self {
            grants,
            version: None,
            mtu: DEFAULT_MTU.min(grants.max_mtu),
            capabilities: Capabilities::default(),
            receive: None,
            send: None,
            shared: [false; 2],
            subchannels: None,
        }
    }

    /// The version agreed on; before that, the one whose messages are the shortest.
    pub(super) fn version(&self) -> Version {
        self.version.unwrap_or(Version::V1)
    }

    /// The guest's MTU.
    pub(super) fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The longest frame that the guest sends in one piece, VLAN tags included.
    pub(super) fn max_frame(&self) -> u32 {
        longest_frame(self.mtu) as u32
    }

    /// What the guest can do.
    pub(super) fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Sub-channels that the guest was granted, once it has asked.
    pub(super) fn subchannels(&self) -> Option<u16> {
        self.subchannels
    }

    /// Whether RNDIS messages can go both ways.
    pub(super) fn is_ready(&self) -> bool {
        self.receive.is_some()
    }

    /// Takes any message but the two that carry RNDIS. `pages` tells how many pages a GPADL of
    /// this channel has, if there is one.
    pub(super) fn take(
        &mut self,
        message: &Message<'_>,
        pages: impl Fn(GpadlId) -> Option<usize>,
    ) -> Reply {
        match message.kind {
            MessageKind::Init => Reply::answer(self.init(message)),
            MessageKind::SendNdisVersion => Reply::NOTHING,
            MessageKind::SendNdisConfig => {
                if let Some(config) = message.body::<NdisConfig>()
                    && self.version() >= Version::V2
                    && !self.shared[0]
                {
                    let mtu = config.max_frame.saturating_sub(ETHERNET_HEADER);
                    let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
                    self.mtu = mtu.clamp(MIN_MTU, self.grants.max_mtu.max(MIN_MTU));
                    self.capabilities = config.capabilities;
                }
                Reply::NOTHING
            }
            MessageKind::SendReceiveBuffer => self.receive_buffer(message, pages),
            MessageKind::SendSendBuffer => self.send_buffer(message, pages),
            MessageKind::RevokeReceiveBuffer => {
                let id = message.body::<RevokeBuffer>().map(|body| body.id);
                match self.receive {
                    Some(layout) if id == Some(layout.id) => {
                        self.receive = None;
                        Reply { answer: None, step: Step::RevokeReceive }
                    }
                    _ => Reply::NOTHING,
                }
            }
            MessageKind::RevokeSendBuffer => match self.send.take() {
                Some(_) => Reply { answer: None, step: Step::RevokeSend },
                None => Reply::NOTHING,
            },
            MessageKind::SubChannel => self.grant_subchannels(message),
            _ => Reply::NOTHING,
        }
    }

    fn init(&mut self, message: &Message<'_>) -> Outgoing {
        let asked = message.body::<Init>();
        let spoken = asked
            .map(|init| init.max)
            .filter(|version| self.version.is_none() && Version::ALL.contains(version));
        let status = match spoken {
            Some(_) => Status::Success,
            None => Status::ProtocolUnsupported,
        };
        self.version = self.version.or(spoken);
        let negotiated = if spoken == Some(Version::V1) { Version::V1.0 } else { u32::MAX };
        // What Hyper-V says; guests do not look at it.
        let body = InitComplete { negotiated, max_mdl_chain: 34, status };
        Outgoing::new(MessageKind::InitComplete, &body)
    }

    fn receive_buffer(
        &mut self,
        message: &Message<'_>,
        pages: impl Fn(GpadlId) -> Option<usize>,
    ) -> Reply {
        let layout = message.body::<ShareBuffer>().and_then(|buffer| {
            if self.version.is_none() || self.shared[0] {
                return None;
            }
            let bytes = buffer_bytes(pages(buffer.gpadl)?)?;
            let slot_size = self.slot_size(bytes);
            let slots = (bytes / slot_size).min(MAX_SLOTS) as u16;
            (slots > 0).then_some(ReceiveLayout {
                gpadl: buffer.gpadl,
                id: buffer.id,
                slot_size,
                slots,
            })
        });
        let (slot_size, slots) =
            layout.map_or((0, 0), |layout| (layout.slot_size, u32::from(layout.slots)));
        let body = ReceiveBufferComplete {
            status: if layout.is_some() { Status::Success } else { Status::Failure },
            sections: u32::from(layout.is_some()),
            offset: 0,
            slot_size,
            slots,
            end: slot_size * slots,
        };
        let answer = Some(Outgoing::new(MessageKind::SendReceiveBufferComplete, &body));
        let step = layout.map_or(Step::None, Step::ReceiveBuffer);
        self.shared[0] |= layout.is_some();
        self.receive = self.receive.or(layout);
        Reply { answer, step }
    }

    /// Bytes in a slot of a buffer of so many bytes. It takes a frame of this MTU, and more than that if
    /// the guest takes coalesced frames and the buffer has room: each part of a frame costs both sides
    /// as much as a frame.
    fn slot_size(&self, bytes: u32) -> u32 {
        let small = slot_size(self.mtu);
        if !self.capabilities.has(Capabilities::RSC) {
            return small;
        }
        let channels = u32::from(self.grants.subchannels) + 1;
        let large = COALESCED_PARTS
            .map(|parts| SLOT_HEADER + (MAX_FRAME as u32).div_ceil(parts))
            .map(|size| size.next_multiple_of(64))
            .into_iter()
            .find(|size| bytes / size / channels >= FEWEST_LARGE_SLOTS);
        large.map_or(small, |large| large.max(small))
    }

    fn send_buffer(
        &mut self,
        message: &Message<'_>,
        pages: impl Fn(GpadlId) -> Option<usize>,
    ) -> Reply {
        let layout = message.body::<ShareBuffer>().and_then(|buffer| {
            if self.version.is_none() || self.shared[1] {
                return None;
            }
            let sections = buffer_bytes(pages(buffer.gpadl)?)? / SECTION_SIZE;
            (sections > 0).then_some(SendLayout {
                gpadl: buffer.gpadl,
                section_size: SECTION_SIZE,
                sections,
            })
        });
        let body = SendBufferComplete {
            status: if layout.is_some() { Status::Success } else { Status::Failure },
            section_size: layout.map_or(0, |layout| layout.section_size),
        };
        let answer = Some(Outgoing::new(MessageKind::SendSendBufferComplete, &body));
        let step = layout.map_or(Step::None, Step::SendBuffer);
        self.shared[1] |= layout.is_some();
        self.send = self.send.or(layout);
        Reply { answer, step }
    }

    fn grant_subchannels(&mut self, message: &Message<'_>) -> Reply {
        let count = message.body::<SubchannelRequest>().and_then(|request| {
            let count = u16::try_from(request.count).unwrap_or(u16::MAX);
            (self.version() >= Version::V5
                && self.is_ready()
                && self.subchannels.is_none()
                && request.operation == SubchannelRequest::ALLOCATE)
                .then_some(count.min(self.grants.subchannels))
        });
        self.subchannels = self.subchannels.or(count);
        let body = SubchannelComplete {
            status: if count.is_some() { Status::Success } else { Status::Failure },
            count: count.unwrap_or(0).into(),
        };
        let answer = Some(Outgoing::new(MessageKind::SubChannel, &body));
        let step = match count {
            Some(count) if count > 0 => Step::Subchannels(count),
            _ => Step::None,
        };
        Reply { answer, step }
    }
}

/// Bytes in a GPADL of so many pages; none if there are too many to count.
fn buffer_bytes(pages: usize) -> Option<u32> {
    u32::try_from(pages).ok()?.checked_mul(4096)
}

/// Bytes in a slot that takes a frame of this MTU. Two slots make a page for the usual one, so that
/// none of them crosses from one page into another.
fn slot_size(mtu: u16) -> u32 {
    (SLOT_HEADER + longest_frame(mtu) as u32).next_multiple_of(1024).max(2048)
}

#[cfg(test)]
mod tests {
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::*;

    const GRANTS: Grants = Grants { subchannels: 3, max_mtu: 9000 };

    fn send<T: IntoBytes + Immutable>(
        handshake: &mut Handshake,
        kind: MessageKind,
        body: &T,
    ) -> Reply {
        let message = Outgoing::new(kind, body);
        let message = Message::parse(message.as_bytes()).unwrap();
        // GPADL n has n pages.
        handshake.take(&message, |gpadl| (gpadl.0 > 0).then_some(gpadl.0 as usize))
    }

    fn body<T: FromBytes>(reply: &Reply, kind: MessageKind) -> T {
        let answer = reply.answer.unwrap();
        assert_eq!(answer.kind, kind);
        Message::parse(answer.as_bytes()).unwrap().body().unwrap()
    }

    fn init(handshake: &mut Handshake, version: u32) -> Status {
        let init = Init { min: Version(version), max: Version(version) };
        let reply = send(handshake, MessageKind::Init, &init);
        body::<InitComplete>(&reply, MessageKind::InitComplete).status
    }

    fn share(handshake: &mut Handshake, kind: MessageKind, pages: u32) -> Reply {
        send(handshake, kind, &ShareBuffer { gpadl: GpadlId(pages), id: 0xCAFE, reserved: 0 })
    }

    #[test]
    fn linux_order() {
        let mut shake = Handshake::new(GRANTS);
        assert_eq!(init(&mut shake, 0x6_0002), Status::ProtocolUnsupported);
        assert_eq!(init(&mut shake, 0x6_0001), Status::Success);
        let capabilities = Capabilities(Capabilities::RSC | Capabilities::IEEE_8021Q);
        let config = NdisConfig { max_frame: 1514, reserved: 0, capabilities };
        assert!(send(&mut shake, MessageKind::SendNdisConfig, &config).answer.is_none());
        assert_eq!((shake.mtu(), shake.capabilities()), (1500, capabilities));
        assert!(!shake.is_ready());

        let reply = share(&mut shake, MessageKind::SendReceiveBuffer, 4096);
        let complete: ReceiveBufferComplete = body(&reply, MessageKind::SendReceiveBufferComplete);
        assert_eq!((complete.status, complete.sections), (Status::Success, 1));
        let end = 16512 * 1016;
        assert_eq!((complete.slot_size, complete.slots, complete.end), (16512, 1016, end));
        assert!(matches!(reply.step, Step::ReceiveBuffer(layout) if layout.slots == 1016));
        assert!(shake.is_ready());

        let reply = share(&mut shake, MessageKind::SendSendBuffer, 255);
        let complete: SendBufferComplete = body(&reply, MessageKind::SendSendBufferComplete);
        assert_eq!((complete.status, complete.section_size), (Status::Success, 6144));
        assert!(matches!(reply.step, Step::SendBuffer(layout) if layout.sections == 170));

        let ask = SubchannelRequest { operation: 1, count: 7 };
        let reply = send(&mut shake, MessageKind::SubChannel, &ask);
        let complete: SubchannelComplete = body(&reply, MessageKind::SubChannel);
        assert_eq!((complete.status, complete.count), (Status::Success, 3));
        assert_eq!(reply.step, Step::Subchannels(3));
        // Once.
        let reply = send(&mut shake, MessageKind::SubChannel, &ask);
        let complete: SubchannelComplete = body(&reply, MessageKind::SubChannel);
        assert_eq!((complete.status, complete.count), (Status::Failure, 0));

        let reply = send(&mut shake, MessageKind::RevokeReceiveBuffer, &RevokeBuffer { id: 1 });
        assert_eq!(reply.step, Step::None);
        let reply =
            send(&mut shake, MessageKind::RevokeReceiveBuffer, &RevokeBuffer { id: 0xCAFE });
        assert_eq!(reply.step, Step::RevokeReceive);
        assert!(!shake.is_ready());
        let reply = send(&mut shake, MessageKind::RevokeSendBuffer, &RevokeBuffer { id: 0 });
        assert_eq!(reply.step, Step::RevokeSend);
        // What was taken back is not shared again before the channel is opened again.
        assert_eq!(share(&mut shake, MessageKind::SendReceiveBuffer, 4096).step, Step::None);
        assert_eq!(share(&mut shake, MessageKind::SendSendBuffer, 255).step, Step::None);
    }

    #[test]
    fn every_version_is_spoken_and_none_twice() {
        for version in Version::ALL {
            let mut shake = Handshake::new(GRANTS);
            assert_eq!(init(&mut shake, version.0), Status::Success);
            assert_eq!(shake.version(), version);
            assert_eq!(init(&mut shake, version.0), Status::ProtocolUnsupported);
            assert_eq!(shake.version(), version);
        }
    }

    #[test]
    fn steps_out_of_order_are_refused() {
        let mut shake = Handshake::new(GRANTS);
        for kind in [MessageKind::SendReceiveBuffer, MessageKind::SendSendBuffer] {
            let reply = share(&mut shake, kind, 100);
            assert_eq!(reply.step, Step::None);
        }
        let ask = SubchannelRequest { operation: 1, count: 1 };
        assert_eq!(send(&mut shake, MessageKind::SubChannel, &ask).step, Step::None);
        init(&mut shake, Version::V4.0);
        // A GPADL that does not exist, and one smaller than a section.
        assert_eq!(share(&mut shake, MessageKind::SendReceiveBuffer, 0).step, Step::None);
        assert_eq!(share(&mut shake, MessageKind::SendSendBuffer, 1).step, Step::None);
        share(&mut shake, MessageKind::SendReceiveBuffer, 1);
        assert!(shake.is_ready());
        // Sub-channels are of version 5, and a buffer cannot be replaced.
        assert_eq!(send(&mut shake, MessageKind::SubChannel, &ask).step, Step::None);
        assert_eq!(share(&mut shake, MessageKind::SendReceiveBuffer, 4).step, Step::None);
    }

    /// A guest that takes coalesced frames has them in a few large slots, if that leaves each of its
    /// channels enough.
    #[test]
    fn slots_for_coalesced_frames_are_large() {
        let slot_size = |subchannels, pages, mtu: u32| {
            let mut shake = Handshake::new(Grants { subchannels, max_mtu: 9000 });
            init(&mut shake, Version::V6_1.0);
            let capabilities = Capabilities(Capabilities::RSC);
            let config = NdisConfig { max_frame: mtu + ETHERNET_HEADER, reserved: 0, capabilities };
            send(&mut shake, MessageKind::SendNdisConfig, &config);
            let reply = share(&mut shake, MessageKind::SendReceiveBuffer, pages);
            let Step::ReceiveBuffer(layout) = reply.step else { panic!("{reply:?}") };
            layout.slot_size
        };
        assert_eq!(slot_size(0, 4096, 1500), 65664);
        assert_eq!(slot_size(1, 4096, 1500), 32896);
        assert_eq!(slot_size(3, 4096, 1500), 16512);
        assert_eq!(slot_size(6, 4096, 1500), 16512);
        assert_eq!(slot_size(7, 4096, 1500), 8320);
        assert_eq!(slot_size(15, 4096, 1500), 4224);
        assert_eq!(slot_size(63, 4096, 1500), 2048);
        assert_eq!(slot_size(0, 256, 1500), 4224);
        assert_eq!(slot_size(15, 4096, 9000), 9216);
    }

    #[test]
    fn slots_grow_with_the_mtu() {
        for (max_frame, mtu, slot) in
            [(0, 68, 2048), (1514, 1500, 2048), (9014, 9000, 9216), (u32::MAX, 9000, 9216)]
        {
            let mut shake = Handshake::new(GRANTS);
            init(&mut shake, Version::V6.0);
            let capabilities = Capabilities(0);
            let config = NdisConfig { max_frame, reserved: 0, capabilities };
            send(&mut shake, MessageKind::SendNdisConfig, &config);
            assert_eq!(shake.mtu(), mtu);
            let reply = share(&mut shake, MessageKind::SendReceiveBuffer, 4096);
            let Step::ReceiveBuffer(layout) = reply.step else { panic!("{reply:?}") };
            assert_eq!(layout.slot_size, slot);
        }
    }
}
