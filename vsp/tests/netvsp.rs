//! Client against server: a NIC's worker on one side of a real, double-mapped ring, a guest's
//! netvsc, written out here, on the other, and a cable that leads back into the NIC. No VM is
//! involved.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backends::net::MacAddr;
use backends::net::loopback::Loopback;
use hypervisor::{Gpa, Gpn};
use vmbus::nvsp::{
    Capabilities, ChannelType, Init, InitComplete, Message, MessageKind, NdisConfig, Outgoing,
    ReceiveBufferComplete, RevokeBuffer, RndisPacket, RndisPacketComplete, SendBufferComplete,
    SendIndirectionTable, ShareBuffer, Status, SubchannelComplete, SubchannelRequest, Version,
};
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::protocol::GpadlId;
use vmbus::rndis::{
    self, HEADER_SIZE, Header, Initialize, ObjectRequest, Oid, PacketBody, PacketInfo,
    PacketInfoKind, QueryComplete, RequestComplete,
};
use vmbus::rndis::{HASH_KEY, INDIRECTION_ENTRIES, ObjectHeader, ReceiveScaleParameters};
use vmbus_server::Device;
use vmbus_server::testing::{GuestEnd, STORVSC_RING_PAGES, channel_in, pair};
use vsp::netvsp::{Nic, NicConfig, NicCounters};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const PATIENCE: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
const ME: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// Where the buffers are in guest memory, and where packets of their own.
const RECEIVE: u64 = 4 * MIB;
const RECEIVE_PAGES: u64 = 256;
const SEND: u64 = 8 * MIB;
const SEND_PAGES: u64 = 32;
const SCRATCH: u64 = MIB;

/// A guest with one open channel.
struct Guest {
    nic: Nic,
    end: GuestEnd,
    next_id: u64,
    cable: Loopback,
    counters: Arc<[NicCounters]>,
    slot_size: u32,
    /// What has come and nobody has looked at: completions, and frames with what is said of them.
    completions: VecDeque<(u64, Vec<u8>)>,
    control: VecDeque<Vec<u8>>,
    frames: VecDeque<Received>,
    told: VecDeque<Vec<u8>>,
    /// Deliveries that are not completed before the test says so.
    hold: bool,
    held: Vec<u64>,
}

#[derive(Debug, PartialEq, Eq)]
struct Received {
    frame: Vec<u8>,
    infos: Vec<(PacketInfoKind, u32)>,
}

impl Guest {
    /// Opens a NIC's channel, shakes hands as Linux does, and brings the interface up.
    fn new() -> Self {
        let mut guest = Self::unshaken();
        guest.shake_hands(Version::V6_1, Capabilities::IEEE_8021Q | Capabilities::RSC);
        guest.initialize();
        guest.set(Oid::CurrentPacketFilter, &0xDu32.to_le_bytes());
        guest
    }

    fn unshaken() -> Self {
        let (channel, end) = pair(16 * MIB);
        let cable = Loopback::new();
        let config = NicConfig {
            number: 0,
            address: MacAddr(ME),
            max_mtu: 9000,
            channels: 2,
            name: "lan".into(),
        };
        let mut nic = Nic::new(config, Arc::new(cable.clone()));
        let counters = nic.counters();
        nic.open(channel).unwrap();
        let pages = |from: u64, count: u64| (from / 4096..from / 4096 + count).map(Gpn).collect();
        end.share(GpadlId(1), pages(RECEIVE, RECEIVE_PAGES));
        end.share(GpadlId(2), pages(SEND, SEND_PAGES));
        Self {
            nic,
            end,
            next_id: 1,
            cable,
            counters,
            slot_size: 0,
            completions: VecDeque::new(),
            control: VecDeque::new(),
            frames: VecDeque::new(),
            told: VecDeque::new(),
            hold: false,
            held: Vec::new(),
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Sends a message that wants an answer, and waits for it.
    fn ask<T: IntoBytes + Immutable, A: FromBytes>(&mut self, kind: MessageKind, body: &T) -> A {
        let id = self.id();
        let message = Outgoing::new(kind, body);
        let flags = PacketFlags::COMPLETION_REQUESTED;
        self.end.send(PacketKind::InBand, flags, id, message.as_bytes());
        let answer = self.completion(id);
        Message::parse(&answer).unwrap().body().unwrap()
    }

    fn tell<T: IntoBytes + Immutable>(&mut self, kind: MessageKind, body: &T) {
        let message = Outgoing::new(kind, body);
        self.end.send(PacketKind::InBand, PacketFlags::NONE, u64::MAX - 2, message.as_bytes());
    }

    fn shake_hands(&mut self, version: Version, capabilities: u64) {
        let init = Init { min: version, max: version };
        let answer: InitComplete = self.ask(MessageKind::Init, &init);
        assert_eq!(answer.status, Status::Success);
        let capabilities = Capabilities(capabilities);
        let config = NdisConfig { max_frame: 1514, reserved: 0, capabilities };
        self.tell(MessageKind::SendNdisConfig, &config);
        let share = ShareBuffer { gpadl: GpadlId(1), id: 0xCAFE, reserved: 0 };
        let answer: ReceiveBufferComplete = self.ask(MessageKind::SendReceiveBuffer, &share);
        assert_eq!((answer.status, answer.sections), (Status::Success, 1));
        assert!(u64::from(answer.slot_size * answer.slots) <= RECEIVE_PAGES * 4096);
        self.slot_size = answer.slot_size;
        let share = ShareBuffer { gpadl: GpadlId(2), id: 0, reserved: 0 };
        let answer: SendBufferComplete = self.ask(MessageKind::SendSendBuffer, &share);
        assert_eq!((answer.status, answer.section_size), (Status::Success, 6144));
    }

    /// Sends a control message by pages of its own. Its packet is completed first.
    fn control(&mut self, message: &[u8]) {
        self.put(SCRATCH, message);
        let id = self.id();
        let body = RndisPacket {
            channel: ChannelType::Control,
            section: RndisPacket::NO_SECTION,
            section_len: 0,
        };
        let packet = Outgoing::new(MessageKind::SendRndisPacket, &body);
        let ranges = [(message.len() as u32, 0, [SCRATCH / 4096].as_slice())];
        self.end.send_gpa_direct(id, &ranges, packet.as_bytes());
        self.succeeds(id);
    }

    fn answer(&mut self) -> Vec<u8> {
        self.until(|guest| guest.control.pop_front())
    }

    fn initialize(&mut self) {
        let request = Initialize { id: 1, major: 1, minor: 0, max_transfer: 0x4000 };
        self.control(&message(rndis::MessageKind::Initialize, &request, &[]));
        let answer = self.answer();
        assert_eq!(answer[..16], [2, 0, 0, 0x80, 52, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    fn query(&mut self, oid: Oid) -> Vec<u8> {
        let request = ObjectRequest { id: 5, oid, len: 0, offset: 20, vc_handle: 0 };
        self.control(&message(rndis::MessageKind::Query, &request, &[]));
        let answer = self.answer();
        let (complete, value) = QueryComplete::read_from_prefix(&answer[HEADER_SIZE..]).unwrap();
        assert_eq!((complete.id, complete.status), (5, rndis::Status::Success));
        assert_eq!(complete.len as usize, value.len());
        value.to_vec()
    }

    fn set(&mut self, oid: Oid, value: &[u8]) {
        let len = value.len() as u32;
        let request = ObjectRequest { id: 6, oid, len, offset: 20, vc_handle: 0 };
        self.control(&message(rndis::MessageKind::Set, &request, value));
        let answer = self.answer();
        let complete = RequestComplete::read_from_bytes(&answer[HEADER_SIZE..]).unwrap();
        assert_eq!((complete.id, complete.status), (6, rndis::Status::Success));
    }

    /// Sends RNDIS messages that lie in a section of the send buffer, if it is said which, and then
    /// in pages of their own.
    fn send(&mut self, section: Option<(u32, &[u8])>, pieces: &[&[u8]]) -> u64 {
        let id = self.id();
        let (index, len) = section.map_or((RndisPacket::NO_SECTION, 0), |(index, bytes)| {
            self.put(SEND + u64::from(index) * 6144, bytes);
            (index, bytes.len() as u32)
        });
        let body = RndisPacket { channel: ChannelType::Data, section: index, section_len: len };
        let packet = Outgoing::new(MessageKind::SendRndisPacket, &body);
        if pieces.is_empty() {
            let flags = PacketFlags::COMPLETION_REQUESTED;
            self.end.send(PacketKind::InBand, flags, id, packet.as_bytes());
            return id;
        }
        // Each piece in a page of its own, somewhere in it, and the pages not in order; those of the
        // packets before stay as they are for a while.
        let mut pages = Vec::new();
        for (n, piece) in pieces.iter().enumerate() {
            let page = SCRATCH / 4096 + 16 * (2 + id % 8) - n as u64;
            let offset = n as u64 * 40;
            self.put(page * 4096 + offset, piece);
            pages.push((piece.len() as u32, offset as u32, [page]));
        }
        let ranges: Vec<(u32, u32, &[u64])> =
            pages.iter().map(|(len, offset, page)| (*len, *offset, page.as_slice())).collect();
        self.end.send_gpa_direct(id, &ranges, packet.as_bytes());
        id
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.end.memory.write(Gpa(at), bytes).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.end.memory.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    /// Looks at what has come, as the interrupt of a netvsc does.
    fn poll(&mut self) -> bool {
        let mut buffer = [0; 8192];
        let Some(packet) = self.end.wait(&mut buffer, PATIENCE / 100) else { return false };
        if packet.kind == PacketKind::Completion {
            self.completions.push_back((packet.transaction_id, packet.payload.to_vec()));
            return true;
        }
        let id = packet.transaction_id;
        if packet.kind == PacketKind::InBand {
            self.told.push_back(packet.payload.to_vec());
            return true;
        }
        let pages = packet.transfer_pages().unwrap();
        assert_eq!(pages.buffer, 0xCAFE);
        let named = Message::parse(packet.payload).unwrap();
        assert_eq!(named.kind, MessageKind::SendRndisPacket);
        let kind = named.body::<RndisPacket>().unwrap().channel;
        let ranges: Vec<_> = pages.ranges().collect();
        let mut parts: Option<Received> = None;
        for range in ranges {
            assert_eq!(range.offset % self.slot_size, 0);
            assert!(range.len <= self.slot_size);
            let bytes = self.get(RECEIVE + u64::from(range.offset), range.len as usize);
            if kind == ChannelType::Control {
                self.control.push_back(bytes);
            } else {
                let mut part = received(&bytes);
                let id = part.infos.iter().position(|(kind, _)| *kind == PacketInfoKind::PacketId);
                let flags = id.map_or(7, |index| part.infos.remove(index).1 >> 8 & 7);
                match &mut parts {
                    None => {
                        assert_eq!(flags & 3, 3);
                        parts = Some(part);
                    }
                    Some(parts) => {
                        assert_eq!((flags & 3, part.infos.len()), (1, 0));
                        parts.frame.extend(part.frame);
                    }
                }
                if flags & 4 != 0 {
                    self.frames.extend(parts.take());
                }
            }
        }
        // A frame is never divided between packets.
        assert_eq!(parts, None);
        if self.hold {
            self.held.push(id);
        } else {
            self.complete(id);
        }
        true
    }

    fn complete(&mut self, id: u64) {
        complete(&mut self.end, id);
    }

    fn until<T>(&mut self, mut what: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = what(self) {
                return found;
            }
            assert!(self.poll() || start.elapsed() < PATIENCE, "nothing came");
        }
    }

    fn completion(&mut self, id: u64) -> Vec<u8> {
        self.until(|guest| {
            let index = guest.completions.iter().position(|(got, _)| *got == id)?;
            Some(guest.completions.remove(index)?.1)
        })
    }

    fn status(&mut self, id: u64) -> Status {
        let answer = self.completion(id);
        let message = Message::parse(&answer).unwrap();
        assert_eq!(message.kind, MessageKind::SendRndisPacketComplete);
        message.body::<RndisPacketComplete>().unwrap().status
    }

    fn succeeds(&mut self, id: u64) {
        assert_eq!(self.status(id), Status::Success);
    }

    fn frame(&mut self) -> Received {
        self.until(|guest| guest.frames.pop_front())
    }

    /// The NIC still works: a frame goes out and comes back.
    fn works(&mut self) {
        let sent = frame(ME, 200, 0x77);
        let id = self.send(None, &[&data(&[], &sent)]);
        assert_eq!(self.frame().frame, sent);
        self.succeeds(id);
    }
}

/// Completes a delivery.
fn complete(end: &mut GuestEnd, id: u64) {
    let body = RndisPacketComplete { status: Status::Success };
    let message = Outgoing::new(MessageKind::SendRndisPacketComplete, &body);
    end.send(PacketKind::Completion, PacketFlags::NONE, id, message.as_bytes());
}

/// Reads a slot as Linux does.
fn received(bytes: &[u8]) -> Received {
    let (header, rest) = Header::read_from_prefix(bytes).unwrap();
    assert_eq!((header.kind, header.len as usize), (rndis::MessageKind::Packet, bytes.len()));
    let (body, _) = PacketBody::read_from_prefix(rest).unwrap();
    let mut infos = Vec::new();
    let mut left = &rest[body.info_offset as usize..][..body.info_len as usize];
    while !left.is_empty() {
        let (info, _) = PacketInfo::read_from_prefix(left).unwrap();
        let value = u32::read_from_prefix(&left[info.value_offset as usize..]).unwrap().0;
        infos.push((info.kind, value));
        left = &left[info.size as usize..];
    }
    let frame = rest[body.data_offset as usize..][..body.data_len as usize].to_vec();
    Received { frame, infos }
}

fn message<T: IntoBytes + Immutable>(kind: rndis::MessageKind, body: &T, rest: &[u8]) -> Vec<u8> {
    let len = (HEADER_SIZE + size_of::<T>() + rest.len()) as u32;
    [Header { kind, len }.as_bytes(), body.as_bytes(), rest].concat()
}

fn data(infos: &[(PacketInfoKind, u32)], frame: &[u8]) -> Vec<u8> {
    let infos: Vec<u8> = infos
        .iter()
        .flat_map(|&(kind, value)| {
            let info = PacketInfo { size: 16, kind, value_offset: 12 };
            [info.as_bytes(), &value.to_le_bytes()].concat()
        })
        .collect();
    let body = PacketBody {
        data_offset: 36 + infos.len() as u32,
        data_len: frame.len() as u32,
        info_offset: 36,
        info_len: infos.len() as u32,
        ..PacketBody::default()
    };
    message(rndis::MessageKind::Packet, &body, &[infos.as_slice(), frame].concat())
}

fn frame(to: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(13) ^ seed).collect();
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&[0x88, 0xB5]);
    frame
}

#[test]
fn what_is_sent_comes_back_by_every_way() {
    let mut guest = Guest::new();
    let sent = [frame(ME, 60, 1), frame(ME, 1514, 2), frame([0xFF; 6], 777, 3)];
    let whole = data(&[], &sent[1]);
    let (front, back) = whole.split_at(44);
    // In pages, in a section, and the headers in a section and the frame in pages.
    let ids = [
        guest.send(None, &[&data(&[], &sent[0])]),
        guest.send(Some((3, front)), &[&back[..700], &back[700..]]),
        guest.send(Some((20, &data(&[], &sent[2]))), &[]),
    ];
    for sent in sent {
        assert_eq!(guest.frame(), Received { frame: sent, infos: vec![] });
    }
    for id in ids {
        guest.succeeds(id);
    }
    assert_eq!(guest.counters[0].sent.get(), 3);
    assert_eq!(guest.counters[0].received_bytes.get(), 60 + 1514 + 777);
}

#[test]
fn several_frames_in_one_packet_are_answered_once() {
    let mut guest = Guest::new();
    let sent: Vec<Vec<u8>> = (0..8).map(|n| frame(ME, 64 + n * 8, n as u8)).collect();
    let packet: Vec<u8> = sent.iter().flat_map(|frame| data(&[], frame)).collect();
    for _ in 0..50 {
        let id = guest.send(Some((1, &packet)), &[]);
        for sent in &sent {
            assert_eq!(&guest.frame().frame, sent);
        }
        guest.succeeds(id);
    }
    // Fewer packets than frames took them to the guest.
    assert!(guest.counters[0].deliveries.get() < 50 * 8);
    let mut packet = packet;
    packet.extend(data(&[], &sent[0]));
    let id = guest.send(Some((1, &packet)), &[]);
    assert_eq!(guest.status(id), Status::InvalidRndisPacket);
}

#[test]
fn tags_and_checksums_go_beside_the_frame() {
    let mut guest = Guest::new();
    let mut sent = frame(ME, 100, 1);
    sent[12..14].copy_from_slice(&[8, 0]);
    sent[14] = 0x45;
    sent[23] = 17;
    let tag = (PacketInfoKind::Vlan, 0x064 << 4 | 3);
    let checksum = (PacketInfoKind::Checksum, 1 | 8 | 34 << 16);
    // The network would leave checksums to us only if it may: the cable drops such a frame.
    let id = guest.send(None, &[&data(&[checksum, tag], &sent)]);
    guest.succeeds(id);
    let id = guest.send(None, &[&data(&[tag], &sent)]);
    guest.succeeds(id);
    assert_eq!(guest.frame(), Received { frame: sent, infos: vec![tag] });
}

/// A TCP segment over IPv4, as Linux prepares it to be cut.
fn large(payload: usize) -> Vec<u8> {
    let mut bytes = frame(ME, 14 + 20 + 20 + payload, 0x33);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..34]
        .copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[34 + 12..34 + 14].copy_from_slice(&[0x50, 0x10]);
    bytes
}

#[test]
fn coalesced_frames_come_in_several_slots() {
    let mut guest = Guest::new();
    let lso = (PacketInfoKind::LargeSend, 1460 | 34 << 20 | 1 << 30);
    let sent = large(40_000);
    let packet = data(&[lso], &sent);
    let pieces: Vec<&[u8]> = packet.chunks(3000).collect();
    // Nobody may send us such a frame: the cable drops it.
    let id = guest.send(None, &pieces);
    guest.succeeds(id);
    guest.works();

    let mut parameters = [0; 28];
    parameters[..4].copy_from_slice(&[0x80, 3, 28, 0]);
    parameters[22..24].fill(2);
    guest.set(Oid::OffloadParameters, &parameters);
    guest.works();
    for _ in 0..40 {
        let id = guest.send(None, &pieces);
        let got = guest.frame();
        guest.succeeds(id);
        assert_eq!(got.frame.len(), sent.len());
        assert!(got.frame[54..] == sent[54..]);
        // TCP's checksum is right.
        assert_eq!(got.infos, [(PacketInfoKind::Checksum, 1 << 3)]);
        guest.works();
    }
    parameters[22..24].fill(1);
    guest.set(Oid::OffloadParameters, &parameters);
    guest.works();
    assert_eq!(guest.counters[0].received.get(), 83);
}

#[test]
fn guests_that_take_no_coalesced_frames_are_offered_none() {
    for (capabilities, offered) in [(Capabilities::RSC, [1, 1]), (0, [0, 0])] {
        let mut guest = Guest::unshaken();
        guest.shake_hands(Version::V6_1, capabilities);
        guest.initialize();
        let value = guest.query(Oid::OffloadHardwareCapabilities);
        assert_eq!((value.len(), &value[144..146]), (156, offered.as_slice()));
    }
}

#[test]
fn settings_are_asked_and_set() {
    let mut guest = Guest::new();
    assert_eq!(guest.query(Oid::PermanentAddress), ME);
    assert_eq!(guest.query(Oid::MaximumFrameSize), 9000u32.to_le_bytes());
    assert_eq!(guest.query(Oid::MediaConnectStatus), [0; 4]);
    guest.works();
    assert_eq!(guest.query(Oid::TransmitOk), 1u32.to_le_bytes());
    assert_eq!(guest.query(Oid::ReceiveOk), 1u32.to_le_bytes());
}

#[test]
fn frames_that_nobody_asked_for_are_dropped() {
    let mut guest = Guest::new();
    let id = guest.send(None, &[&data(&[], &frame([2, 0, 0, 0, 0, 0x55], 80, 0))]);
    guest.succeeds(id);
    guest.works();
    assert_eq!(guest.counters[0].unwanted.get(), 1);
    guest.set(Oid::CurrentPacketFilter, &0u32.to_le_bytes());
    let id = guest.send(None, &[&data(&[], &frame(ME, 80, 0))]);
    guest.succeeds(id);
    guest.set(Oid::CurrentPacketFilter, &0x20u32.to_le_bytes());
    let other = frame([2, 0, 0, 0, 0, 0x55], 80, 0);
    guest.send(None, &[&data(&[], &other)]);
    assert_eq!(guest.frame().frame, other);
}

#[test]
fn slots_that_the_guest_keeps_are_not_used_again() {
    let mut guest = Guest::new();
    guest.hold = true;
    // 512 slots in two parts; some are kept for control messages.
    let mut sent = 0u32;
    let mut frames = 0;
    while guest.counters[0].received.get() < 252 {
        let mut bytes = frame(ME, 100, 0);
        bytes[14..18].copy_from_slice(&sent.to_le_bytes());
        guest.send(None, &[&data(&[], &bytes)]);
        sent += 1;
        guest.poll();
        frames += guest.frames.len();
        guest.frames.clear();
        assert!(sent < 100_000);
    }
    // More come when slots do, and the control path has its own.
    assert_eq!(guest.query(Oid::PermanentAddress), ME);
    for _ in 0..20 {
        guest.send(None, &[&data(&[], &frame(ME, 100, 9))]);
        sent += 1;
    }
    guest.hold = false;
    for id in std::mem::take(&mut guest.held) {
        guest.complete(id);
        // What was given back cannot be given back again.
        guest.complete(id);
    }
    let missing = sent as usize - frames;
    for _ in 0..missing {
        guest.frame();
    }
    guest.works();
    assert!(guest.counters[0].not_sent.get() > 0);
}

#[test]
fn the_link_is_told_of() {
    let mut guest = Guest::new();
    guest.cable.plug(false);
    // The cable wakes nobody; a packet does.
    let id = guest.send(None, &[&data(&[], &frame(ME, 80, 0))]);
    guest.succeeds(id);
    let down = guest.answer();
    assert_eq!(down[8..12], 0x4001_000Cu32.to_le_bytes());
    assert_eq!(guest.query(Oid::MediaConnectStatus), [1, 0, 0, 0]);
    assert_eq!(guest.counters[0].send_drops.get(), 1);
    guest.cable.plug(true);
    guest.query(Oid::LinkSpeed);
    let up = guest.answer();
    assert_eq!(up[8..12], 0x4001_000Bu32.to_le_bytes());
    guest.works();
}

#[test]
fn sub_channels_are_offered_as_granted() {
    let mut guest = Guest::new();
    let ask = SubchannelRequest { operation: SubchannelRequest::ALLOCATE, count: 7 };
    let answer: SubchannelComplete = guest.ask(MessageKind::SubChannel, &ask);
    assert_eq!((answer.status, answer.count), (Status::Success, 1));
    for _ in 0..1000 {
        if guest.end.subchannels_requested() == Some(1) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no sub-channels were offered");
}

/// The rings of a guest's second channel.
const SECOND_RINGS: Gpn = Gpn(2 * MIB / 4096);

/// Asks for sub-channels, and opens the one that there is.
fn open_second(guest: &mut Guest) -> GuestEnd {
    let ask = SubchannelRequest { operation: SubchannelRequest::ALLOCATE, count: 1 };
    let answer: SubchannelComplete = guest.ask(MessageKind::SubChannel, &ask);
    assert_eq!((answer.status, answer.count), (Status::Success, 1));
    reopen_second(guest)
}

fn reopen_second(guest: &mut Guest) -> GuestEnd {
    let (channel, end) = channel_in(&guest.end.memory, SECOND_RINGS, STORVSC_RING_PAGES, 1);
    guest.nic.open(channel).unwrap();
    end
}

/// Has all values of the hash go to the channel that `entry` names.
fn spread(guest: &mut Guest, entry: impl Fn(usize) -> u8) {
    let parameters = ReceiveScaleParameters {
        header: ObjectHeader { kind: 0x89, revision: 2, size: 40 },
        flags: 0,
        base_cpu: 0,
        hash: 0x1701,
        table_size: 4 * INDIRECTION_ENTRIES as u16,
        padding0: 0,
        table_offset: 40,
        key_size: HASH_KEY as u16,
        padding1: 0,
        key_offset: 40 + 4 * INDIRECTION_ENTRIES as u32,
        masks: [0; 3],
    };
    let table = (0..INDIRECTION_ENTRIES).flat_map(|index| u32::from(entry(index)).to_le_bytes());
    let key = (0..HASH_KEY as u8).map(|n| n.wrapping_mul(73) ^ 0x5A);
    let value: Vec<u8> = parameters.as_bytes().iter().copied().chain(table).chain(key).collect();
    guest.set(Oid::ReceiveScaleParameters, &value);
}

/// A TCP segment from port `port`.
fn segment(port: u16) -> Vec<u8> {
    let mut bytes = large(100);
    bytes[34..36].copy_from_slice(&port.to_be_bytes());
    bytes
}

#[test]
fn frames_come_on_the_channel_that_the_table_names() {
    let mut guest = Guest::new();
    let second = open_second(&mut guest);
    // Each channel's completions go back by it.
    let mut both = Both::new(guest, second);
    // Which channels to send on: each in turn.
    let told = both.first.until(|guest| guest.told.pop_front());
    let (message, table) = told.split_at(40);
    let message = Message::parse(message).unwrap();
    assert_eq!(message.kind, MessageKind::SendIndirectionTable);
    let body = message.body::<SendIndirectionTable>().unwrap();
    assert_eq!((body.count, body.offset), (16, 40));
    assert_eq!(table, [[0, 0, 0, 0], [1, 0, 0, 0]].concat().repeat(8));
    // The cable brings all back by the channel that sent: even shares are not given by themselves.
    spread(&mut both.first, |index| (index % 2) as u8);
    let by_hash = both.pass(0..64);
    assert!(by_hash.iter().any(|second| *second) && !by_hash.iter().all(|second| *second));
    assert_eq!(both.pass(0..64), by_hash);
    // The other way round, live.
    spread(&mut both.first, |index| 1 - (index % 2) as u8);
    let opposite: Vec<bool> = by_hash.iter().map(|second| !second).collect();
    assert_eq!(both.pass(0..64), opposite);
    // All to one, more than there are slots, so that they must come home; and what is no IP, too.
    spread(&mut both.first, |_| 1);
    for _ in 0..20 {
        assert_eq!(both.pass(0..64), [true; 64]);
    }
    both.first.works();
    assert!(both.first.counters[0].crossed.get() >= 20 * 64);
    assert_eq!(both.first.counters[0].astray.get() + both.first.counters[0].overrun.get(), 0);
}

#[test]
fn frames_for_a_channel_that_closes_come_on_the_first() {
    let mut guest = Guest::new();
    let second = open_second(&mut guest);
    spread(&mut guest, |_| 1);
    let mut both = Both::new(guest, second);
    for round in 1..4 {
        assert_eq!(both.pass(0..32), [true; 32]);
        // It closes with frames that it has not completed.
        both.hold = true;
        assert_eq!(both.pass(0..32), [true; 32]);
        both.second.request_stop();
        assert!(both.second.wait_closed(PATIENCE));
        assert_eq!(both.pass(0..32), [false; 32]);
        assert_eq!(both.first.counters[0].astray.get(), 32 * round);
        both.second = reopen_second(&mut both.first);
        both.hold = false;
    }
}

/// A guest with two channels open.
struct Both {
    first: Guest,
    second: GuestEnd,
    /// The second channel completes nothing.
    hold: bool,
}

impl Both {
    fn new(first: Guest, second: GuestEnd) -> Self {
        Self { first, second, hold: false }
    }

    /// Sends a segment from each port on the first channel. Returns whether each came on the second.
    fn pass(&mut self, ports: std::ops::Range<u16>) -> Vec<bool> {
        ports
            .map(|port| {
                let sent = segment(port);
                let id = self.first.send(None, &[&data(&[], &sent)]);
                self.first.succeeds(id);
                let start = Instant::now();
                loop {
                    assert!(start.elapsed() < PATIENCE, "nothing came");
                    let mut buffer = [0; 8192];
                    let packet = self.second.receive(&mut buffer);
                    let packet = packet.map(|packet| {
                        let pages = packet.transfer_pages().unwrap();
                        let ranges: Vec<_> = pages.ranges().collect();
                        assert_eq!(ranges.len(), 1);
                        (packet.transaction_id, ranges[0])
                    });
                    if let Some((id, range)) = packet {
                        let at = RECEIVE + u64::from(range.offset);
                        let bytes = self.first.get(at, range.len as usize);
                        assert!(received(&bytes).frame == sent);
                        if !self.hold {
                            complete(&mut self.second, id);
                        }
                        self.second.publish();
                        break true;
                    }
                    if let Some(got) = self.first.frames.pop_front() {
                        assert!(got.frame == sent);
                        break false;
                    }
                    if self.first.end.incoming.has_data() {
                        self.first.poll();
                    }
                    std::thread::yield_now();
                }
            })
            .collect()
    }
}

#[test]
fn old_guests_get_short_messages() {
    for version in Version::ALL {
        let mut guest = Guest::unshaken();
        guest.shake_hands(version, 0);
        let id = guest.id();
        let ask = SubchannelRequest { operation: 9, count: 7 };
        let message = Outgoing::new(MessageKind::SubChannel, &ask);
        let flags = PacketFlags::COMPLETION_REQUESTED;
        guest.end.send(PacketKind::InBand, flags, id, message.as_bytes());
        // In whole words.
        assert_eq!(guest.completion(id).len(), version.message_size().next_multiple_of(8));
        guest.initialize();
        guest.set(Oid::CurrentPacketFilter, &0xDu32.to_le_bytes());
        guest.works();
    }
}

#[test]
fn malformed_packets_cost_themselves() {
    let mut guest = Guest::new();
    let good = data(&[], &frame(ME, 100, 0));
    // A section that does not exist, one that is too long, a page that is not memory.
    for (section, len) in [(21, 100), (u32::MAX - 1, 0), (0, 6145)] {
        let body = RndisPacket { channel: ChannelType::Data, section, section_len: len };
        let packet = Outgoing::new(MessageKind::SendRndisPacket, &body);
        let id = guest.id();
        let flags = PacketFlags::COMPLETION_REQUESTED;
        guest.end.send(PacketKind::InBand, flags, id, packet.as_bytes());
        assert_eq!(guest.status(id), Status::InvalidRndisPacket);
    }
    let body = RndisPacket {
        channel: ChannelType::Data,
        section: RndisPacket::NO_SECTION,
        section_len: 0,
    };
    let packet = Outgoing::new(MessageKind::SendRndisPacket, &body);
    let id = guest.id();
    guest.end.send_gpa_direct(id, &[(200, 0, &[1 << 40])], packet.as_bytes());
    assert_eq!(guest.status(id), Status::InvalidRndisPacket);
    // Lengths that are not there, in pages and in a section.
    for at in [4, 8, 12, 32] {
        let mut wild = good.clone();
        wild[at..at + 4].copy_from_slice(&0xFFFF_FF00u32.to_le_bytes());
        let id = guest.send(None, &[&wild]);
        assert_eq!(guest.status(id), Status::InvalidRndisPacket, "{at}");
        let id = guest.send(Some((0, &wild)), &[]);
        assert_eq!(guest.status(id), Status::InvalidRndisPacket, "{at}");
    }
    // Less than a message.
    let id = guest.id();
    guest.end.send(PacketKind::InBand, PacketFlags::COMPLETION_REQUESTED, id, &[1, 0, 0]);
    guest.completion(id);
    for id in [0, 1, u64::MAX] {
        guest.complete(id);
    }
    guest.works();
    assert_eq!(guest.counters[0].not_sent.get(), 3);
    assert_eq!(guest.counters[0].malformed.get(), 12);
}

#[test]
fn revoking_the_buffers_ends_deliveries() {
    let mut guest = Guest::new();
    guest.works();
    guest.tell(MessageKind::RevokeReceiveBuffer, &RevokeBuffer { id: 0xCAFE });
    guest.tell(MessageKind::RevokeSendBuffer, &RevokeBuffer { id: 0 });
    guest.send(None, &[&data(&[], &frame(ME, 100, 0))]);
    let share = ShareBuffer { gpadl: GpadlId(1), id: 0xCAFE, reserved: 0 };
    let answer: ReceiveBufferComplete = guest.ask(MessageKind::SendReceiveBuffer, &share);
    assert_eq!(answer.status, Status::Failure);
    assert!(guest.frames.is_empty());
    guest.end.request_stop();
    assert!(guest.end.wait_closed(PATIENCE));
}

/// Buffers that the guest tears down, with or without a word before, are let go of by all channels, also
/// by those that sleep, and not touched any more.
#[test]
fn buffers_that_are_torn_down_are_not_touched_any_more() {
    for revoked in [true, false] {
        let mut guest = Guest::new();
        let second = open_second(&mut guest);
        spread(&mut guest, |index| (index % 2) as u8);
        let mut both = Both::new(guest, second);
        both.pass(0..64);
        // The last of them may not be completed yet, which keeps nobody.
        if revoked {
            let guest = &mut both.first;
            guest.tell(MessageKind::RevokeReceiveBuffer, &RevokeBuffer { id: 0xCAFE });
            guest.tell(MessageKind::RevokeSendBuffer, &RevokeBuffer { id: 0 });
        }
        for id in [1, 2].map(GpadlId) {
            if both.first.end.tear_down(id) {
                assert!(both.first.end.wait_unused(id, PATIENCE));
            }
        }
        let guest = &mut both.first;
        let len = (RECEIVE_PAGES * 4096) as usize;
        guest.put(RECEIVE, &vec![0x5A; len]);
        // They stay in the cable, for which there is no room at its other end.
        for port in 0..64 {
            guest.send(None, &[&data(&[], &segment(port))]);
        }
        // Nor is anything sent from there.
        let id = guest.send(Some((3, &data(&[], &segment(1)))), &[]);
        assert_eq!(guest.status(id), Status::InvalidRndisPacket);
        assert!(guest.get(RECEIVE, len).iter().all(|byte| *byte == 0x5A));
        assert!(guest.frames.is_empty());
    }
}

#[test]
fn stopping_ends_the_worker_and_its_frames() {
    let mut guest = Guest::new();
    for n in 0..50 {
        guest.send(None, &[&data(&[], &frame(ME, 100, n))]);
    }
    guest.end.request_stop();
    assert!(guest.end.wait_closed(PATIENCE));
}

#[test]
fn a_broken_ring_costs_the_channel() {
    let mut guest = Guest::new();
    // The write index, in the first ring's first page, outside of the ring.
    let ring = 16 * MIB - 64 * 4096;
    guest.put(ring, &0xffff_fff8u32.to_le_bytes());
    guest.end.doorbell.write(1).unwrap();
    assert!(guest.end.wait_closed(PATIENCE));
}
