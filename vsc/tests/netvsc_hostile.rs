//! netvsc against a host that lies: it says which lie it was and is dead from then on.

mod common;

use common::nic::{NicQueue, Part, frame, setup};
use common::{Bell, client_channel, raw_channel};
use hypervisor::{Gpa, GuestMemory};
use vmbus::nvsp::{
    ChannelType, Init, InitComplete, Message, MessageKind, Outgoing, RECEIVE_BUFFER,
    ReceiveBufferComplete, RndisPacket, RndisPacketComplete, SendBufferComplete, Status,
    SubchannelComplete, Version,
};
use vmbus::packet::{PacketFlags, PacketKind, TransferRange, write_transfer_pages};
use vmbus::ring::{PushError, RingError};
use vmbus::rndis::{
    self, HEADER_SIZE, Header, InitializeComplete, ObjectRequest, Oid, PacketBody, PacketId,
    PacketInfo, PacketInfoKind, QueryComplete, RequestComplete,
};
use vmbus_server::{Channel as RootChannel, DoubleMapped};
use vsc::netvsc::{Agreement, Event, Fault, Offload, SendError};
use vsc::{Channel, SharedBuffer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const ME: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// What the client said, and what the host is about to answer.
struct Turn {
    kind: MessageKind,
    /// The RNDIS message, if it is one.
    rndis: Vec<u8>,
    /// The NVSP message that answers, if one does.
    answer: Option<Outgoing>,
    /// The RNDIS message that does.
    reply: Option<Vec<u8>>,
}

/// The host's end, which says what the test wants.
struct Liar {
    channel: RootChannel,
    receive: Part,
    send: Part,
}

fn rndis<T: IntoBytes + Immutable>(kind: rndis::MessageKind, body: &T, rest: &[u8]) -> Vec<u8> {
    let len = (HEADER_SIZE + size_of::<T>() + rest.len()) as u32;
    [Header { kind, len }.as_bytes(), body.as_bytes(), rest].concat()
}

impl Liar {
    fn say(&mut self, kind: PacketKind, id: u64, headers: &[u8], payload: &[u8]) {
        let flags = match kind {
            PacketKind::TransferPages => PacketFlags::COMPLETION_REQUESTED,
            _ => PacketFlags::NONE,
        };
        match self.channel.outgoing.push_with_headers(kind, flags, id, headers, &[payload]) {
            Ok(()) | Err(PushError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        self.channel.publish();
    }

    fn answer(&mut self, id: u64, message: &Outgoing) {
        self.say(PacketKind::Completion, id, &[], message.as_bytes());
    }

    fn complete(&mut self, id: u64) {
        let body = RndisPacketComplete { status: Status::Success };
        self.answer(id, &Outgoing::new(MessageKind::SendRndisPacketComplete, &body));
    }

    /// Names ranges of the receive buffer.
    fn name(&mut self, buffer: u16, ranges: &[(u32, u32)], channel: ChannelType) {
        let ranges: Vec<_> =
            ranges.iter().map(|&(offset, len)| TransferRange { len, offset }).collect();
        let mut headers = [0; 2048];
        let headers = write_transfer_pages(&mut headers, buffer, &ranges).unwrap();
        let body = RndisPacket { channel, section: RndisPacket::NO_SECTION, section_len: 0 };
        let message = Outgoing::new(MessageKind::SendRndisPacket, &body);
        self.say(PacketKind::TransferPages, 7, headers, message.as_bytes());
    }

    /// Leaves bytes in the receive buffer and names them.
    fn deliver(&mut self, bytes: &[u8]) {
        assert!(self.receive.write(4096, bytes));
        self.name(RECEIVE_BUFFER, &[(4096, bytes.len() as u32)], ChannelType::Data);
    }

    /// Hears what the client says. Returns the packets' ids, kinds and payloads.
    fn hear(&mut self) -> Option<(u64, PacketKind, Vec<u8>)> {
        let mut buffer = [0; 4096];
        let packet = self.channel.receive(&mut buffer).expect("a sound ring")?;
        let heard = (packet.transaction_id, packet.kind, packet.payload.to_vec());
        let _ = self.channel.incoming.publish();
        Some(heard)
    }

    /// Answers as a host does, but for what `twist` makes of it.
    fn shake(&mut self, twist: &mut dyn FnMut(&mut Turn)) {
        while let Some((id, kind, payload)) = self.hear() {
            if kind == PacketKind::Completion {
                continue;
            }
            let message = Message::parse(&payload).unwrap();
            let mut turn =
                Turn { kind: message.kind, rndis: Vec::new(), answer: None, reply: None };
            turn.answer = match message.kind {
                MessageKind::Init => {
                    let body =
                        InitComplete { negotiated: 0, max_mdl_chain: 34, status: Status::Success };
                    Some(Outgoing::new(MessageKind::InitComplete, &body))
                }
                MessageKind::SendReceiveBuffer => {
                    let body = ReceiveBufferComplete {
                        status: Status::Success,
                        sections: 1,
                        offset: 0,
                        slot_size: 2048,
                        slots: 1024,
                        end: 2048 * 1024,
                    };
                    Some(Outgoing::new(MessageKind::SendReceiveBufferComplete, &body))
                }
                MessageKind::SendSendBuffer => {
                    let body = SendBufferComplete { status: Status::Success, section_size: 6144 };
                    Some(Outgoing::new(MessageKind::SendSendBufferComplete, &body))
                }
                MessageKind::SubChannel => {
                    let body = SubchannelComplete { status: Status::Success, count: 1 };
                    Some(Outgoing::new(MessageKind::SubChannel, &body))
                }
                MessageKind::SendRndisPacket => {
                    let body: RndisPacket = message.body().unwrap();
                    turn.rndis = vec![0; body.section_len as usize];
                    assert!(self.send.read(body.section as usize * 6144, &mut turn.rndis));
                    turn.reply = reply(&turn.rndis);
                    let body = RndisPacketComplete { status: Status::Success };
                    Some(Outgoing::new(MessageKind::SendRndisPacketComplete, &body))
                }
                _ => None,
            };
            twist(&mut turn);
            if let Some(answer) = turn.answer {
                self.answer(id, &answer);
            }
            if let Some(reply) = turn.reply {
                assert!(self.receive.write(0, &reply));
                self.name(RECEIVE_BUFFER, &[(0, reply.len() as u32)], ChannelType::Control);
            }
        }
    }
}

/// An honest answer to a control message.
fn reply(message: &[u8]) -> Option<Vec<u8>> {
    let (header, body) = Header::read_from_prefix(message).unwrap();
    match header.kind {
        rndis::MessageKind::Initialize => {
            let id = u32::read_from_prefix(body).unwrap().0;
            let complete = InitializeComplete {
                id,
                max_packets: 8,
                max_transfer: 0x40000,
                alignment: 3,
                ..InitializeComplete::default()
            };
            Some(rndis(rndis::MessageKind::InitializeComplete, &complete, &[]))
        }
        rndis::MessageKind::Query => {
            let request = ObjectRequest::read_from_prefix(body).unwrap().0;
            let value = match request.oid {
                Oid::PermanentAddress => ME.to_vec(),
                Oid::OffloadHardwareCapabilities => vec![0; 156],
                _ => vec![0; 4],
            };
            Some(queried(request.id, 16, value.len() as u32, &value))
        }
        rndis::MessageKind::Set => {
            let id = u32::read_from_prefix(body).unwrap().0;
            let complete = RequestComplete { id, status: rndis::Status::Success };
            Some(rndis(rndis::MessageKind::SetComplete, &complete, &[]))
        }
        _ => None,
    }
}

fn queried(id: u32, offset: u32, len: u32, value: &[u8]) -> Vec<u8> {
    let complete = QueryComplete { id, status: rndis::Status::Success, len, offset };
    rndis(rndis::MessageKind::QueryComplete, &complete, value)
}

fn pair(channels: u16) -> (Liar, Channel<DoubleMapped, Bell>, GuestMemory) {
    let memory = GuestMemory::new(32 << 20).expect("guest memory");
    let (root, end) = raw_channel(&memory, 0);
    let (channel, _) = client_channel(&memory, end);
    let setup = setup(&memory, 1500, channels);
    let liar = Liar { channel: root, receive: setup.receive.memory, send: setup.send.memory };
    (liar, channel, memory)
}

/// A handshake whose answers are twisted.
fn connect(
    channels: u16,
    mut twist: impl FnMut(&mut Turn),
) -> Result<(NicQueue, Agreement, Liar), Fault> {
    let (mut liar, channel, memory) = pair(channels);
    let mut turns = 0;
    let (queue, agreement) = NicQueue::connect(channel, setup(&memory, 1500, channels), || {
        liar.shake(&mut twist);
        turns += 1;
        turns < 50
    })?;
    Ok((queue, agreement, liar))
}

fn connected() -> (NicQueue, Liar) {
    let (queue, _, mut liar) = connect(1, |_| {}).expect("an honest handshake");
    // The last answer was completed.
    assert!(liar.hear().is_some_and(|(id, kind, _)| (id, kind) == (7, PacketKind::Completion)));
    (queue, liar)
}

/// With a frame on its way, and the id under which to complete it.
fn sending() -> (NicQueue, Liar, u64) {
    let (mut queue, mut liar) = connected();
    queue.send(&frame(ME, ME, 100, 0), &Offload::default()).unwrap();
    queue.publish();
    let (id, ..) = liar.hear().expect("a packet");
    (queue, liar, id)
}

/// That the queue is dead, and by what.
#[track_caller]
fn dies(mut queue: NicQueue, fault: Fault) {
    assert_eq!(queue.poll(|_| {}), Err(fault));
    assert_eq!(queue.poll(|_| {}), Err(Fault::Dead));
    let sent = queue.send(&[0; 60], &Offload::default());
    assert_eq!(sent, Err(SendError::Fault(Fault::Dead)));
    queue.publish();
    let _ = queue.rest();
    queue.wake();
}

#[test]
fn older_versions_are_taken() {
    for spoken in Version::ALL {
        let mut asked = Vec::new();
        let (_, agreement, _) = connect(2, |turn| {
            if turn.kind == MessageKind::Init {
                asked.push(());
                let newest = Version::ALL[Version::ALL.len() - asked.len()];
                if newest > spoken {
                    let status = Status::ProtocolUnsupported;
                    let body = InitComplete { negotiated: 0, max_mdl_chain: 34, status };
                    turn.answer = Some(Outgoing::new(MessageKind::InitComplete, &body));
                }
            }
            assert!(turn.kind != MessageKind::SendNdisConfig || spoken > Version::V1);
        })
        .unwrap();
        assert_eq!(agreement.version, spoken);
        let newer = Version::ALL.iter().filter(|version| **version > spoken).count();
        assert_eq!(asked.len(), newer + 1);
        assert_eq!(agreement.subchannels, u16::from(spoken >= Version::V5));
    }
}

#[test]
fn one_version_is_named_at_a_time() {
    let (mut liar, channel, memory) = pair(1);
    let mut named = None;
    let refused = NicQueue::connect(channel, setup(&memory, 1500, 1), || {
        let Some((.., payload)) = liar.hear() else { return false };
        let message = Message::parse(&payload).unwrap();
        named = message.body::<Init>();
        false
    });
    assert_eq!(refused.err(), Some(Fault::TimedOut));
    let named = named.unwrap();
    assert_eq!((named.min, named.max), (Version::V6_1, Version::V6_1));
}

#[test]
fn handshakes_that_fail() {
    let twisted = |kind: MessageKind, answer: Option<Outgoing>| {
        connect(1, |turn| {
            if turn.kind == kind {
                turn.answer = answer;
            }
        })
        .err()
        .unwrap()
    };
    let no = InitComplete { negotiated: 0, max_mdl_chain: 0, status: Status::Failure };
    let no = Outgoing::new(MessageKind::InitComplete, &no);
    assert_eq!(twisted(MessageKind::Init, Some(no)), Fault::NoCommonVersion(2));
    assert_eq!(twisted(MessageKind::SendReceiveBuffer, Some(no)), Fault::Message(2));
    assert_eq!(twisted(MessageKind::SendSendBuffer, None), Fault::TimedOut);

    let whole = ReceiveBufferComplete {
        status: Status::Success,
        sections: 1,
        offset: 0,
        slot_size: 2048,
        slots: 16,
        end: 16 * 2048,
    };
    for (body, fault) in [
        (
            ReceiveBufferComplete { status: Status::Failure, ..whole },
            Fault::Refused { message: 101, status: 2 },
        ),
        (ReceiveBufferComplete { sections: 2, ..whole }, Fault::Limits),
        (ReceiveBufferComplete { slots: 0, ..whole }, Fault::Limits),
        (ReceiveBufferComplete { slots: 1025, ..whole }, Fault::Limits),
        (ReceiveBufferComplete { slots: u32::MAX, ..whole }, Fault::Limits),
        (ReceiveBufferComplete { slot_size: 0, ..whole }, Fault::Limits),
    ] {
        let answer = Outgoing::new(MessageKind::SendReceiveBufferComplete, &body);
        assert_eq!(twisted(MessageKind::SendReceiveBuffer, Some(answer)), fault);
    }
    for (section_size, fault) in
        [(0, Fault::Limits), (1023, Fault::Limits), (1 << 30, Fault::Limits)]
    {
        let body = SendBufferComplete { status: Status::Success, section_size };
        let answer = Outgoing::new(MessageKind::SendSendBufferComplete, &body);
        assert_eq!(twisted(MessageKind::SendSendBuffer, Some(answer)), fault);
    }
    // A control message that is not taken has no answer.
    let body = RndisPacketComplete { status: Status::InvalidRndisPacket };
    let answer = Outgoing::new(MessageKind::SendRndisPacketComplete, &body);
    assert_eq!(twisted(MessageKind::SendRndisPacket, Some(answer)), Fault::Message(108));
}

#[test]
fn answers_that_lie() {
    let twisted = |oid: Oid, reply: &dyn Fn(u32) -> Option<Vec<u8>>| {
        connect(1, |turn| {
            let Ok((request, _)) =
                ObjectRequest::read_from_prefix(turn.rndis.get(8..).unwrap_or(&[]))
            else {
                return;
            };
            if turn.rndis[0] == 4 && request.oid == oid {
                turn.reply = reply(request.id);
            }
        })
        .map(|(_, agreement, _)| agreement.max_mtu)
    };
    let frame_size = Oid::MaximumFrameSize;
    let value = [0xdc, 5, 0, 0];
    let fault = |reply: &dyn Fn(u32) -> Vec<u8>| twisted(frame_size, &|id| Some(reply(id)));
    assert_eq!(fault(&|id| queried(id, 16, 4, &value)), Ok(1500));
    assert_eq!(fault(&|id| queried(id, 16, 5, &value)), Err(Fault::Lengths));
    assert_eq!(fault(&|id| queried(id, u32::MAX, 4, &value)), Err(Fault::Lengths));
    assert_eq!(fault(&|id| queried(id, 16, 0, &[])), Err(Fault::Lengths));
    assert_eq!(fault(&|id| queried(id, 16, 2000, &[0; 2000])), Err(Fault::Lengths));
    assert_eq!(fault(&|id| queried(id + 1, 16, 4, &value)), Err(Fault::Rndis(0x8000_0004)));
    assert_eq!(twisted(frame_size, &|_| None), Err(Fault::TimedOut));
    let no = |id| {
        let status = rndis::Status::NotSupported;
        let complete = QueryComplete { id, status, len: 0, offset: 0 };
        Some(rndis(rndis::MessageKind::QueryComplete, &complete, &[]))
    };
    let refused = Fault::Object { oid: 0x0001_0106, status: 0xC000_00BB };
    assert_eq!(twisted(frame_size, &no), Err(refused));
    // Offloads can be done without.
    assert_eq!(twisted(Oid::OffloadHardwareCapabilities, &no), Ok(0));

    let limits = |max_packets, max_transfer, alignment| {
        connect(1, |turn| {
            if turn.rndis.first() == Some(&2) {
                let complete = InitializeComplete {
                    id: 1,
                    max_packets,
                    max_transfer,
                    alignment,
                    ..InitializeComplete::default()
                };
                let kind = rndis::MessageKind::InitializeComplete;
                turn.reply = Some(rndis(kind, &complete, &[]));
            }
        })
        .map(|(_, agreement, _)| agreement.max_frames)
    };
    assert_eq!(limits(1, 4096, 0), Ok(1));
    for (packets, transfer, alignment) in [(0, 4096, 0), (1, 2047, 0), (1, 4096, 13), (1, 4096, 64)]
    {
        assert_eq!(limits(packets, transfer, alignment), Err(Fault::Limits));
    }
}

#[test]
fn no_more_sub_channels_than_were_wanted_and_none_if_refused() {
    let granted = |status, count| {
        let (_, agreement, _) = connect(3, |turn| {
            if turn.kind == MessageKind::SubChannel {
                let body = SubchannelComplete { status, count };
                turn.answer = Some(Outgoing::new(MessageKind::SubChannel, &body));
            }
        })
        .unwrap();
        agreement.subchannels
    };
    assert_eq!(granted(Status::Success, 1), 1);
    assert_eq!(granted(Status::Success, u32::MAX), 2);
    assert_eq!(granted(Status::Failure, 2), 0);
}

#[test]
fn packets_are_completed_once() {
    let (mut queue, mut liar, id) = sending();
    liar.complete(id);
    assert_eq!(queue.poll(|_| {}), Ok(1));
    assert_eq!((queue.frame_counters().sent, queue.in_flight()), (1, 0));
    liar.complete(id);
    dies(queue, Fault::AnsweredTwice(id));

    for wrong in [0, 1, u64::MAX, 1 << 63] {
        let (queue, mut liar, id) = sending();
        liar.complete(id ^ wrong);
        if wrong == 0 {
            continue;
        }
        dies(queue, Fault::UnknownAnswer(id ^ wrong));
    }
    let (queue, mut liar, id) = sending();
    liar.say(PacketKind::Completion, id, &[], &[1, 0, 0]);
    // Payloads come in whole words.
    dies(queue, Fault::Message(1));
    let (queue, mut liar, id) = sending();
    liar.say(PacketKind::Completion, id, &[], &[]);
    dies(queue, Fault::Short(0));
    let (queue, mut liar, _) = sending();
    liar.say(PacketKind(3), 0, &[], &[]);
    dies(queue, Fault::PacketKind(3));
}

#[test]
fn sub_channels_are_granted_once() {
    let body = SubchannelComplete { status: Status::Success, count: 1 };
    let message = Outgoing::new(MessageKind::SubChannel, &body);
    let (queue, mut liar) = connected();
    let id = u64::MAX - 0x100;
    liar.answer(id, &message);
    dies(queue, Fault::AnsweredTwice(id));
}

/// A frame's message, and the places in it where lengths and offsets are.
fn data(infos: &[(PacketInfoKind, u32)]) -> Vec<u8> {
    let infos: Vec<u8> = infos
        .iter()
        .flat_map(|&(kind, value)| {
            let info = PacketInfo { size: 16, kind, value_offset: 12 };
            [info.as_bytes(), &value.to_le_bytes()].concat()
        })
        .collect();
    let frame = frame(ME, ME, 100, 1);
    let body = PacketBody {
        data_offset: 36 + infos.len() as u32,
        data_len: frame.len() as u32,
        info_offset: 36,
        info_len: infos.len() as u32,
        ..PacketBody::default()
    };
    rndis(rndis::MessageKind::Packet, &body, &[infos.as_slice(), &frame].concat())
}

#[test]
fn frames_are_taken_as_they_lie() {
    let (mut queue, mut liar) = connected();
    let unknown = (PacketInfoKind(77), 0);
    liar.deliver(&data(&[
        (PacketInfoKind::Checksum, 8),
        unknown,
        (PacketInfoKind::HashValue, 0x1234),
        (PacketInfoKind::Vlan, 0x50),
    ]));
    let mut seen = 0;
    let polled = queue.poll(|event| {
        let Event::Received(received) = event else { panic!("a frame") };
        let mut bytes = [0; 100];
        assert!(received.read(0, &mut bytes));
        assert!(bytes[..] == frame(ME, ME, 100, 1));
        assert!(!received.read(1, &mut bytes) && !received.read(usize::MAX, &mut bytes));
        assert_eq!((received.checksum.0, received.hash), (8, Some(0x1234)));
        assert_eq!(received.vlan.map(|tag| tag.0), Some(0x50));
        seen += 1;
    });
    assert_eq!((polled, seen), (Ok(1), 1));
    queue.publish();
    // It is completed, once.
    let (id, kind, payload) = liar.hear().unwrap();
    assert_eq!((id, kind, payload[0]), (7, PacketKind::Completion, 108));
    assert_eq!(liar.hear(), None);
}

#[test]
fn ranges_outside_of_the_buffer() {
    let size = 2 << 20;
    for (offset, len) in
        [(size, 1), (size - 40, 100), (u32::MAX, 100), (u32::MAX, u32::MAX), (0, u32::MAX)]
    {
        let (queue, mut liar) = connected();
        liar.name(RECEIVE_BUFFER, &[(offset, len)], ChannelType::Data);
        dies(queue, Fault::Range { offset, len });
    }
    let (queue, mut liar) = connected();
    liar.name(0, &[(0, 100)], ChannelType::Data);
    dies(queue, Fault::Buffer(0));
    // More ranges than a packet has room for in our hands.
    let (queue, mut liar) = connected();
    liar.name(RECEIVE_BUFFER, &[(0, 0); 254], ChannelType::Data);
    let fault = queue_fault(queue);
    assert!(matches!(fault, Fault::Ring(RingError::Packet(_))), "{fault}");
    // More than it has.
    let (queue, mut liar) = connected();
    let body = RndisPacket { channel: ChannelType::Data, section: u32::MAX, section_len: 0 };
    let message = Outgoing::new(MessageKind::SendRndisPacket, &body);
    let headers = [0xfe, 0xca, 0, 0, 200, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    liar.say(PacketKind::TransferPages, 1, &headers, message.as_bytes());
    let fault = queue_fault(queue);
    assert!(matches!(fault, Fault::Ring(RingError::Packet(_))), "{fault}");
}

fn queue_fault(mut queue: NicQueue) -> Fault {
    queue.poll(|_| {}).unwrap_err()
}

#[test]
fn lengths_that_contradict_each_other() {
    let good = data(&[(PacketInfoKind::Checksum, 0)]);
    // Length, data offset, data length, information offset and length, entry size, value offset.
    for at in [4, 8, 12, 28, 32, 44, 52] {
        for wild in [0xffff_ff00u32, 0x7fff_ffff, 5000, 3] {
            let (mut queue, mut liar) = connected();
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&wild.to_le_bytes());
            liar.deliver(&bytes);
            let polled = queue.poll(|_| panic!("{at} {wild:#x}"));
            assert_eq!(polled, Err(Fault::Lengths), "{at} {wild:#x}");
        }
    }
    for len in 0..44 {
        let (queue, mut liar) = connected();
        liar.deliver(&good[..len]);
        dies(queue, Fault::Lengths);
    }
    let (queue, mut liar) = connected();
    liar.deliver(&data(&[(PacketInfoKind::Checksum, 0); 17]));
    dies(queue, Fault::Lengths);
}

#[test]
fn what_was_not_asked_for() {
    let part = |flags: u8| {
        let id = PacketId { version: 1, flags, id: 1 };
        (PacketInfoKind::PacketId, zerocopy::transmute!(id))
    };
    for (flags, coalesced) in [(1 | 2, true), (1, true), (1 | 4, true), (7, false), (0, false)] {
        let (mut queue, mut liar) = connected();
        liar.deliver(&data(&[part(flags)]));
        let expected = if coalesced { Err(Fault::Coalesced) } else { Ok(1) };
        assert_eq!(queue.poll(|_| {}), expected);
    }
    let (queue, mut liar) = connected();
    let complete = RequestComplete { id: 3, status: rndis::Status::Success };
    liar.deliver(&rndis(rndis::MessageKind::SetComplete, &complete, &[]));
    dies(queue, Fault::Rndis(0x8000_0005));
    let (queue, mut liar) = connected();
    liar.deliver(&rndis(rndis::MessageKind::Indicate, &[0u8; 3], &[]));
    dies(queue, Fault::Lengths);
}

#[test]
fn a_flood_does_not_keep_us() {
    let (mut queue, mut liar) = connected();
    for _ in 0..300 {
        liar.say(PacketKind::InBand, 0, &[], &[134, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(queue.poll(|_| {}), Ok(256));
    assert!(!queue.rest());
    assert_eq!(queue.poll(|_| {}), Ok(44));
    assert!(queue.rest());

    let mut flood = 0;
    let (mut liar, channel, memory) = pair(1);
    let flooded = NicQueue::connect(channel, setup(&memory, 1500, 1), || {
        liar.say(PacketKind::InBand, 0, &[], &[134, 0, 0, 0, 0, 0, 0, 0]);
        flood += 1;
        flood < 10_000
    });
    assert_eq!((flooded.err(), flood), (Some(Fault::Flood), 257));
}

#[test]
fn a_host_that_takes_no_answers_gets_no_more_of_them() {
    let (mut queue, mut liar) = connected();
    let bytes = data(&[]);
    let mut received = 0;
    // Until there is no room for the next answer.
    for _ in 0..3000 {
        liar.deliver(&bytes);
        queue.poll(|_| received += 1).unwrap();
        queue.publish();
    }
    // 31 pages of ring, 64 bytes for each.
    assert!((1900..1984).contains(&received), "{received}");
    assert_eq!(queue.send(&[0; 60], &Offload::default()), Ok(()));
    // There is something, but it cannot be answered: sleep until there is room.
    assert!(queue.rest());
    queue.wake();
    assert!(liar.hear().is_some());
    let before = received;
    queue.poll(|_| received += 1).unwrap();
    assert_eq!(received, before + 1);
}

#[test]
fn a_broken_ring_is_the_end() {
    let (queue, mut liar) = connected();
    liar.deliver(&data(&[]));
    // The write index of the ring to the client, in the first page of the second half.
    let ring = (32 << 20) - 32 * 4096;
    liar.receive.memory.write(Gpa(ring), &0xffff_fff8u32.to_le_bytes()).unwrap();
    let fault = queue_fault(queue);
    assert!(matches!(fault, Fault::Ring(RingError::Index { .. })), "{fault}");
}
