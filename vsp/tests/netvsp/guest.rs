//! A guest, written out: it speaks NVSP and RNDIS over a ring as Linux's netvsc does, and can say what
//! no client would.
//!
//! A [`Guest`] has one channel, [`Both`] a second one too. The form of what comes is checked on the
//! way; what is in it, tests look at.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backends::net::loopback::Loopback;
use backends::net::{MacAddr, Network};
use hypervisor::{Gpa, Gpn};
use vmbus::nvsp::{
    Capabilities, ChannelType, Init, InitComplete, Message, MessageKind, NdisConfig, Outgoing,
    ReceiveBufferComplete, RndisPacket, RndisPacketComplete, SendBufferComplete, ShareBuffer,
    Status, SubchannelComplete, SubchannelRequest, Version,
};
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::protocol::GpadlId;
use vmbus::rndis::{
    self, HASH_KEY, HEADER_SIZE, Header, INDIRECTION_ENTRIES, Initialize, ObjectHeader,
    ObjectRequest, Oid, PacketBody, PacketInfo, PacketInfoKind, QueryComplete,
    ReceiveScaleParameters, RequestComplete,
};
use vmbus_server::Device;
use vmbus_server::testing::{GuestEnd, STORVSC_RING_PAGES, channel_in, pair};
use vsp::netvsp::{Nic, NicConfig, NicCounters};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const PATIENCE: Duration = Duration::from_secs(10);
pub const MIB: u64 = 1 << 20;
pub const ME: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// Where the buffers are in guest memory, and where packets of their own.
pub const RECEIVE: u64 = 4 * MIB;
pub const RECEIVE_PAGES: u64 = 256;
pub const SEND: u64 = 8 * MIB;
const SEND_PAGES: u64 = 32;
const SCRATCH: u64 = MIB;

/// A guest with one open channel.
pub struct Guest {
    nic: Nic,
    pub end: GuestEnd,
    next_id: u64,
    pub cable: Loopback,
    pub counters: Arc<[NicCounters]>,
    slot_size: u32,
    /// What has come and nobody has looked at: completions, and frames with what is said of them.
    completions: VecDeque<(u64, Vec<u8>)>,
    control: VecDeque<Vec<u8>>,
    pub frames: VecDeque<Received>,
    pub told: VecDeque<Vec<u8>>,
    /// Deliveries that are not completed before the test says so.
    pub hold: bool,
    pub held: Vec<u64>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Received {
    pub frame: Vec<u8>,
    pub infos: Vec<(PacketInfoKind, u32)>,
}

impl Guest {
    /// Opens a NIC's channel, shakes hands as Linux does, and brings the interface up.
    pub fn new() -> Self {
        Self::unshaken().up()
    }

    /// As [`Self::new`], with a NIC that is plugged into this.
    pub fn plugged_into(network: Arc<dyn Network>) -> Self {
        Self::unshaken_on(network).up()
    }

    fn up(self) -> Self {
        let mut guest = self;
        guest.shake_hands(Version::V6_1, Capabilities::IEEE_8021Q | Capabilities::RSC);
        guest.initialize();
        guest.set(Oid::CurrentPacketFilter, &0xDu32.to_le_bytes());
        guest
    }

    pub fn unshaken() -> Self {
        let cable = Loopback::new();
        Self::on(cable.clone(), Arc::new(cable))
    }

    /// As [`Self::unshaken`], with a NIC that is plugged into this.
    pub fn unshaken_on(network: Arc<dyn Network>) -> Self {
        Self::on(Loopback::new(), network)
    }

    fn on(cable: Loopback, network: Arc<dyn Network>) -> Self {
        let (channel, end) = pair(16 * MIB);
        let config = NicConfig {
            number: 0,
            address: MacAddr(ME),
            max_mtu: 9000,
            channels: 2,
            name: "lan".into(),
        };
        let mut nic = Nic::new(config, network);
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

    pub fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Sends a message that wants an answer, and waits for it.
    pub fn ask<T: IntoBytes + Immutable, A: FromBytes>(
        &mut self,
        kind: MessageKind,
        body: &T,
    ) -> A {
        let id = self.id();
        let message = Outgoing::new(kind, body);
        let flags = PacketFlags::COMPLETION_REQUESTED;
        self.end.send(PacketKind::InBand, flags, id, message.as_bytes());
        let answer = self.completion(id);
        Message::parse(&answer).unwrap().body().unwrap()
    }

    pub fn tell<T: IntoBytes + Immutable>(&mut self, kind: MessageKind, body: &T) {
        let message = Outgoing::new(kind, body);
        self.end.send(PacketKind::InBand, PacketFlags::NONE, u64::MAX - 2, message.as_bytes());
    }

    pub fn shake_hands(&mut self, version: Version, capabilities: u64) {
        self.share_receive_buffer(version, capabilities);
        self.share_send_buffer();
    }

    /// The handshake up to the receive buffer.
    pub fn share_receive_buffer(&mut self, version: Version, capabilities: u64) {
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
    }

    pub fn share_send_buffer(&mut self) {
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

    pub fn answer(&mut self) -> Vec<u8> {
        self.until(|guest| guest.control.pop_front())
    }

    pub fn initialize(&mut self) {
        let request = Initialize { id: 1, major: 1, minor: 0, max_transfer: 0x4000 };
        self.control(&message(rndis::MessageKind::Initialize, &request, &[]));
        let answer = self.answer();
        assert_eq!(answer[..16], [2, 0, 0, 0x80, 52, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    pub fn query(&mut self, oid: Oid) -> Vec<u8> {
        let request = ObjectRequest { id: 5, oid, len: 0, offset: 20, vc_handle: 0 };
        self.control(&message(rndis::MessageKind::Query, &request, &[]));
        let answer = self.answer();
        let (complete, value) = QueryComplete::read_from_prefix(&answer[HEADER_SIZE..]).unwrap();
        assert_eq!((complete.id, complete.status), (5, rndis::Status::Success));
        assert_eq!(complete.len as usize, value.len());
        value.to_vec()
    }

    pub fn set(&mut self, oid: Oid, value: &[u8]) {
        let len = value.len() as u32;
        let request = ObjectRequest { id: 6, oid, len, offset: 20, vc_handle: 0 };
        self.control(&message(rndis::MessageKind::Set, &request, value));
        let answer = self.answer();
        let complete = RequestComplete::read_from_bytes(&answer[HEADER_SIZE..]).unwrap();
        assert_eq!((complete.id, complete.status), (6, rndis::Status::Success));
    }

    /// Sends RNDIS messages that lie in a section of the send buffer, if it is said which, and then
    /// in pages of their own.
    pub fn send(&mut self, section: Option<(u32, &[u8])>, pieces: &[&[u8]]) -> u64 {
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

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.end.memory.write(Gpa(at), bytes).unwrap();
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.end.memory.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    /// Looks at what has come, as the interrupt of a netvsc does.
    pub fn poll(&mut self) -> bool {
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

    pub fn complete(&mut self, id: u64) {
        complete(&mut self.end, id);
    }

    pub fn until<T>(&mut self, mut what: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = what(self) {
                return found;
            }
            assert!(self.poll() || start.elapsed() < PATIENCE, "nothing came");
        }
    }

    pub fn completion(&mut self, id: u64) -> Vec<u8> {
        self.until(|guest| {
            let index = guest.completions.iter().position(|(got, _)| *got == id)?;
            Some(guest.completions.remove(index)?.1)
        })
    }

    pub fn status(&mut self, id: u64) -> Status {
        let answer = self.completion(id);
        let message = Message::parse(&answer).unwrap();
        assert_eq!(message.kind, MessageKind::SendRndisPacketComplete);
        message.body::<RndisPacketComplete>().unwrap().status
    }

    pub fn succeeds(&mut self, id: u64) {
        assert_eq!(self.status(id), Status::Success);
    }

    pub fn frame(&mut self) -> Received {
        self.until(|guest| guest.frames.pop_front())
    }

    /// The NIC still works: a frame goes out and comes back.
    pub fn works(&mut self) {
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

pub fn data(infos: &[(PacketInfoKind, u32)], frame: &[u8]) -> Vec<u8> {
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

pub fn frame(to: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(13) ^ seed).collect();
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&[0x88, 0xB5]);
    frame
}

/// A TCP segment over IPv4, as Linux prepares it to be cut.
pub fn large(payload: usize) -> Vec<u8> {
    let mut bytes = frame(ME, 14 + 20 + 20 + payload, 0x33);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..34]
        .copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[34 + 12..34 + 14].copy_from_slice(&[0x50, 0x10]);
    bytes
}

/// A TCP segment from port `port`.
pub fn segment(port: u16) -> Vec<u8> {
    let mut bytes = large(100);
    bytes[34..36].copy_from_slice(&port.to_be_bytes());
    bytes
}

/// The rings of a guest's second channel.
const SECOND_RINGS: Gpn = Gpn(2 * MIB / 4096);

/// Asks for sub-channels, and opens the one that there is.
pub fn open_second(guest: &mut Guest) -> GuestEnd {
    let ask = SubchannelRequest { operation: SubchannelRequest::ALLOCATE, count: 1 };
    let answer: SubchannelComplete = guest.ask(MessageKind::SubChannel, &ask);
    assert_eq!((answer.status, answer.count), (Status::Success, 1));
    reopen_second(guest)
}

pub fn reopen_second(guest: &mut Guest) -> GuestEnd {
    let (channel, end) = channel_in(&guest.end.memory, SECOND_RINGS, STORVSC_RING_PAGES, 1);
    guest.nic.open(channel).unwrap();
    end
}

/// Has all values of the hash go to the channel that `entry` names.
pub fn spread(guest: &mut Guest, entry: impl Fn(usize) -> u8) {
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

/// A guest with two channels open.
pub struct Both {
    pub first: Guest,
    pub second: GuestEnd,
    /// The second channel completes nothing.
    pub hold: bool,
}

impl Both {
    pub fn new(first: Guest, second: GuestEnd) -> Self {
        Self { first, second, hold: false }
    }

    /// Sends a segment from each port on the first channel. Returns whether each came on the second.
    pub fn pass(&mut self, ports: std::ops::Range<u16>) -> Vec<bool> {
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
