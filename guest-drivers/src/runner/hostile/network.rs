//! NICs on the bus, driven wrongly: handshakes out of order, buffers that are taken away again, settings
//! and frames that make no sense, on all channels of a NIC.

use vmbus::nvsp::{MessageKind, RECEIVE_BUFFER, RndisPacket, SEND_BUFFER, Version};
use vmbus::rndis;

use super::arena::{Arena, Bytes, DATA, write};
use super::channel::{Channel, ranges};
use super::chaos::Chaos;
use super::wire::{Kind, Offer, Wire};
use crate::memory::PAGE;
use crate::platform::Platform;

const IN_BAND: u16 = 6;
const GPA_DIRECT: u16 = 9;
const COMPLETION: u16 = 11;

/// Objects of a NIC: those that can be set, and a few others.
const OBJECTS: [u32; 14] = [
    0x0001_0101,
    0x0001_010d,
    0x0001_010e,
    0x0001_010f,
    0x0001_0113,
    0x0001_0203,
    0x0001_0204,
    0x0001_021b,
    0x0002_0216,
    0x0101_0102,
    0x0101_0103,
    0xfc01_020b,
    0xfc01_020c,
    0xfc01_020d,
];

/// Where the buffers of a NIC lie among the data: each has a quarter of it.
const RECEIVE_PAGE: usize = DATA / 2;
const SEND_PAGE: usize = DATA / 4;
const BUFFER_PAGES: usize = DATA / 4;

/// What was shared.
#[derive(Clone, Copy, Default)]
struct Buffers {
    receive: Option<u32>,
    send: Option<u32>,
}

/// Opens the NIC's channel, and does what comes to mind with it.
pub(super) fn visit<'w, P: Platform>(
    wire: &mut Wire<'w, P>,
    chaos: &mut Chaos,
    arena: &Arena<'w>,
    offer: Offer,
    depth: usize,
) {
    let Some(mut channel) = Channel::open(wire, chaos, arena, offer, depth) else { return };
    let mut buffers = Buffers::default();
    if offer.subchannel == 0 {
        shake_hands(&mut channel, wire, chaos, arena, &mut buffers);
    }
    for _ in 0..chaos.below(8) {
        for _ in 0..chaos.below(32) {
            match chaos.below(20) {
                0 => message(&mut channel, chaos),
                1..4 => control(&mut channel, chaos, arena),
                4 => {
                    let (transaction, status) = (chaos.odd(), [1, 0, 0, 0]);
                    complete(&mut channel, chaos, transaction, status);
                }
                _ => frames(&mut channel, chaos, arena),
            }
        }
        channel.publish(wire, chaos);
        for _ in 0..chaos.below(4) {
            wire.linger(chaos.below(100_000));
            answer(&mut channel, chaos);
            channel.publish(wire, chaos);
        }
        // While the first channel is open, its sub-channels may be.
        if depth == 0
            && chaos.percent(40)
            && let Some(other) = wire.subchannel(chaos, Kind::Nic)
        {
            visit(wire, chaos, arena, other, depth + 1);
        }
        if chaos.percent(8) {
            channel.spoil(wire, chaos);
        }
        if chaos.percent(5) {
            take_away(&mut channel, wire, chaos, &mut buffers);
        }
    }
    if chaos.percent(50) {
        take_away(&mut channel, wire, chaos, &mut buffers);
    }
    channel.leave(wire, chaos);
    for gpadl in [buffers.receive, buffers.send].into_iter().flatten() {
        if chaos.percent(80) {
            wire.tear_down(offer.relid, gpadl);
        }
    }
}

/// The handshake: mostly the right steps in their order.
fn shake_hands<'w, P: Platform>(
    channel: &mut Channel<'w>,
    wire: &mut Wire<'w, P>,
    chaos: &mut Chaos,
    arena: &Arena<'w>,
    buffers: &mut Buffers,
) {
    let [oldest, others @ ..] = Version::ALL;
    let version = if chaos.percent(60) { Version::V6_1 } else { chaos.of(oldest, &others) };
    let version = chaos.or_odd_32(version.0, 3);
    let relid = channel.offer.relid;
    for step in 0..8 {
        if chaos.percent(3) {
            message(channel, chaos);
        }
        if chaos.percent(3) {
            continue;
        }
        let mut body = Bytes::new();
        match step {
            0 => body.u32(MessageKind::Init.0).u32(version).u32(version),
            1 => body
                .u32(MessageKind::SendNdisConfig.0)
                .u32(chaos.or_odd_32(1514, 20))
                .u32(0)
                .u64(chaos.or_odd(0x85, 20)),
            2 => body.u32(MessageKind::SendNdisVersion.0).u32(6).u32(30),
            3 | 4 => {
                let (page, id, kind) = if step == 3 {
                    (RECEIVE_PAGE, RECEIVE_BUFFER, MessageKind::SendReceiveBuffer)
                } else {
                    (SEND_PAGE, SEND_BUFFER, MessageKind::SendSendBuffer)
                };
                let gpadl = chaos.any_32() | 1;
                let count = 1 + chaos.count(BUFFER_PAGES);
                let first = arena.data.first() + page as u64;
                let step = if chaos.percent(10) { 0 } else { 1 };
                let numbers = (0..count as u64).map(|number| first + number * step);
                wire.list(chaos, relid, gpadl, numbers, count);
                let place =
                    if id == SEND_BUFFER { &mut buffers.send } else { &mut buffers.receive };
                *place = Some(gpadl);
                body.u32(kind.0)
                    .u32(chaos.or_odd_32(gpadl, 3))
                    .u16(chaos.or_odd(id.into(), 3) as u16)
            }
            5 => {
                initialize(channel, chaos, arena);
                continue;
            }
            6 => {
                // Promiscuous, mostly.
                let filter = chaos.or_odd_32(0x2f, 20);
                set(channel, chaos, arena, 0x0001_010e, &filter.to_le_bytes());
                continue;
            }
            _ => body.u32(MessageKind::SubChannel.0).u32(1).u32(chaos.below(4) as u32),
        };
        let repeats = if chaos.percent(3) { chaos.below(100) } else { 1 };
        for _ in 0..repeats {
            channel.push(chaos, IN_BAND, 0, padded(&mut body));
        }
        channel.publish(wire, chaos);
        if chaos.percent(30) {
            wire.linger(50_000);
        }
    }
    wire.linger(300_000);
    answer(channel, chaos);
    channel.publish(wire, chaos);
}

/// As long as messages of the newest version are.
fn padded(body: &mut Bytes) -> &[u8] {
    body.push(&[0; 40]).get().get(..40).unwrap_or_default()
}

/// A message that nobody expects.
fn message(channel: &mut Channel<'_>, chaos: &mut Chaos) {
    let kinds = [1, 2, 100, 101, 102, 103, 104, 106, 107, 108, 125, 133, 134];
    let kind = chaos.of(105, &kinds);
    let mut body = Bytes::new();
    body.u32(chaos.or_odd_32(kind, 10));
    for _ in 0..9 {
        let odd = chaos.odd_32();
        body.u32(chaos.of(0, &[1, odd, RECEIVE_BUFFER.into(), u32::MAX]));
    }
    let len = if chaos.percent(20) { chaos.count(44) } else { 40 };
    let kind = chaos.or_odd(IN_BAND.into(), 10) as u16;
    channel.push(chaos, kind, 0, body.get().get(..len).unwrap_or_default());
}

/// Takes buffers back, in one of many orders, with whatever is under way.
fn take_away<'w, P: Platform>(
    channel: &mut Channel<'w>,
    wire: &mut Wire<'w, P>,
    chaos: &mut Chaos,
    buffers: &mut Buffers,
) {
    let relid = channel.offer.relid;
    let Buffers { receive, send } = *buffers;
    let both = [
        (MessageKind::RevokeReceiveBuffer, RECEIVE_BUFFER, receive),
        (MessageKind::RevokeSendBuffer, SEND_BUFFER, send),
    ];
    for (kind, id, gpadl) in both {
        if chaos.percent(70) {
            let mut body = Bytes::new();
            body.u32(kind.0).u16(id);
            channel.push(chaos, IN_BAND, 0, padded(&mut body));
            channel.publish(wire, chaos);
        }
        if let Some(gpadl) = gpadl.filter(|_| chaos.percent(70)) {
            wire.tear_down(relid, gpadl);
            if chaos.percent(50) {
                wire.await_teardown();
            }
        }
    }
}

/// Completes what has come, mostly once.
fn answer(channel: &mut Channel<'_>, chaos: &mut Chaos) {
    const TRANSFER_PAGES: u16 = 7;
    let mut transactions = [0; 64];
    let mut count = 0;
    channel.read(|kind, transaction| {
        if kind == TRANSFER_PAGES
            && let Some(place) = transactions.get_mut(count)
        {
            *place = transaction;
            count += 1;
        }
    });
    for transaction in transactions.into_iter().take(count) {
        let times = chaos.of(1, &[1, 1, 1, 1, 1, 1, 1, 0, 2]);
        for _ in 0..times {
            complete(channel, chaos, transaction, [1, 0, 0, 0]);
        }
    }
}

fn complete(channel: &mut Channel<'_>, chaos: &mut Chaos, transaction: u64, status: [u8; 4]) {
    let mut body = Bytes::new();
    body.u32(MessageKind::SendRndisPacketComplete.0).push(&status);
    channel.push_as(chaos, COMPLETION, 0, padded(&mut body), transaction);
}

/// Puts an RNDIS message where the packet says that it is, and sends the packet.
fn send(
    channel: &mut Channel<'_>,
    chaos: &mut Chaos,
    arena: &Arena<'_>,
    kind: u32,
    message: &[u8],
) {
    let len = message.len() as u32;
    let mut body = Bytes::new();
    if chaos.percent(50) && kind == 0 {
        // In the send buffer.
        const SECTION: u64 = 6144;
        let section = chaos.below(64);
        write(arena.data.words(), SEND_PAGE * PAGE + (section * SECTION) as usize, message);
        body.u32(MessageKind::SendRndisPacket.0).u32(chaos.or_odd_32(kind, 2));
        body.u32(chaos.or_odd_32(section as u32, 5)).u32(chaos.or_odd_32(len, 5));
        channel.push(chaos, IN_BAND, 0, padded(&mut body));
        return;
    }
    let headers = ranges(chaos, arena, len);
    // Wherever the first page is said to be, if it is in the arena.
    let place = headers.get().get(16..24).and_then(|bytes| bytes.try_into().ok());
    let page = place.map_or(0, u64::from_le_bytes).wrapping_sub(arena.data.first());
    let offset = headers.get().get(12..16).and_then(|bytes| bytes.try_into().ok());
    let offset = offset.map_or(0, u32::from_le_bytes);
    if page < DATA as u64 {
        write(arena.data.words(), page as usize * PAGE + (offset & 0xff8) as usize, message);
    }
    let count = headers.get().len();
    let mut whole = headers;
    whole.u32(MessageKind::SendRndisPacket.0).u32(chaos.or_odd_32(kind, 2));
    whole.u32(chaos.or_odd_32(RndisPacket::NO_SECTION, 3)).u32(chaos.or_odd_32(0, 3));
    whole.push(&[0; 24]);
    channel.push(chaos, GPA_DIRECT, count, whole.get());
}

fn initialize(channel: &mut Channel<'_>, chaos: &mut Chaos, arena: &Arena<'_>) {
    let mut message = Bytes::new();
    message.u32(rndis::MessageKind::Initialize.0).u32(chaos.or_odd_32(24, 5)).u32(1).u32(1).u32(0);
    message.u32(chaos.or_odd_32(0x4000, 10));
    send(channel, chaos, arena, 1, message.get());
}

fn set(channel: &mut Channel<'_>, chaos: &mut Chaos, arena: &Arena<'_>, oid: u32, value: &[u8]) {
    let len = value.len() as u32;
    let mut message = Bytes::new();
    message.u32(rndis::MessageKind::Set.0).u32(chaos.or_odd_32(28 + len, 3)).u32(7).u32(oid);
    message.u32(chaos.or_odd_32(len, 3)).u32(chaos.or_odd_32(20, 3)).u32(0).push(value);
    send(channel, chaos, arena, 1, message.get());
}

/// A control message: one of the right kinds, with contents that are often none.
fn control(channel: &mut Channel<'_>, chaos: &mut Chaos, arena: &Arena<'_>) {
    let [first, others @ ..] = OBJECTS;
    let oid = chaos.of(first, &others);
    let oid = chaos.or_odd_32(oid, 5);
    if chaos.percent(60) {
        let mut value = Bytes::new();
        match oid {
            0x0001_0204 => {
                // Receive-side scaling: header, table, key.
                value
                    .u16(0x8901)
                    .u16(chaos.or_odd(0x14, 10) as u16)
                    .u16(chaos.or_odd(0, 30) as u16);
                value.u16(chaos.or_odd(0, 20) as u16).u32(chaos.or_odd_32(0x100 | 1, 30));
                value.u16(chaos.or_odd(512, 10) as u16).u16(0).u32(chaos.or_odd_32(40, 10));
                value
                    .u16(chaos.or_odd(40, 10) as u16)
                    .u16(0)
                    .u32(chaos.or_odd_32(552, 10))
                    .u64(0)
                    .u32(0);
                for _ in 0..128 {
                    let entry = chaos.below(4) as u32;
                    value.u32(chaos.or_odd_32(entry, 1));
                }
                value.litter(chaos, 5);
            }
            _ => {
                let words = chaos.count(24);
                for _ in 0..words {
                    value.u32(chaos.odd_32());
                }
            }
        }
        value.spoil(chaos, 10);
        return set(channel, chaos, arena, oid, value.get());
    }
    let kind = chaos.of(4, &[2, 3, 4, 5, 6, 7, 8, 0x8000_0002, 0x8000_0004]);
    let mut message = Bytes::new();
    message.u32(chaos.or_odd_32(kind, 5)).u32(chaos.or_odd_32(28, 10)).u32(9).u32(oid);
    let litter = chaos.count(20);
    message.u32(chaos.or_odd_32(0, 20)).u32(chaos.or_odd_32(20, 20)).u32(0).litter(chaos, litter);
    send(channel, chaos, arena, 1, message.get());
}

/// A packet with frames in it.
fn frames(channel: &mut Channel<'_>, chaos: &mut Chaos, arena: &Arena<'_>) {
    let mut message = Bytes::new();
    for _ in 0..chaos.of(1, &[1, 1, 1, 2, 8]) {
        let mut frame = Bytes::new();
        frame_of(chaos, &mut frame);
        let mut info = Bytes::new();
        for _ in 0..chaos.of(0, &[0, 0, 1, 2, 5]) {
            let kind = chaos.of(0, &[2, 4, 6, 9, 0x8000_0001]);
            let value = match kind {
                // Checksums, and segments to be cut.
                0 => chaos.of(0x5 | 34 << 16, &[0x9 | 34 << 16, 0x15 | 34 << 16, 0x6 | 54 << 16]),
                2 => chaos.of(1448 | 34 << 20 | 1 << 30, &[1 | 34 << 20 | 1 << 30, 9000 | 7 << 29]),
                _ => chaos.any_32(),
            };
            info.u32(chaos.or_odd_32(16, 3)).u32(chaos.or_odd_32(kind, 3));
            info.u32(chaos.or_odd_32(12, 3)).u32(chaos.or_odd_32(value, 10));
        }
        let (info_len, len) = (info.get().len() as u32, frame.get().len() as u32);
        message.u32(chaos.or_odd_32(1, 1)).u32(chaos.or_odd_32(44 + info_len + len, 2));
        message.u32(chaos.or_odd_32(36 + info_len, 2)).u32(chaos.or_odd_32(len, 2));
        message.u32(0).u32(0).u32(0);
        message.u32(chaos.or_odd_32(if info_len > 0 { 36 } else { 0 }, 2));
        message.u32(chaos.or_odd_32(info_len, 2)).u32(0).u32(0);
        message.push(info.get()).push(frame.get());
    }
    send(channel, chaos, arena, 0, message.get());
}

/// A frame, to and from anybody; mostly with TCP or UDP in it.
pub(super) fn frame_of(chaos: &mut Chaos, frame: &mut Bytes) {
    for place in 0..2 {
        let number = chaos.below(4) as u8;
        let station = [2, 0, 0, 0, chaos.below(2) as u8, number];
        let any = chaos.any().to_le_bytes();
        let [a, b, c, d, e, f, ..] = any;
        let group = if place == 0 { [0xff; 6] } else { station };
        let address = chaos.of(station, &[station, group, [a, b, c, d, e, f]]);
        frame.push(&address);
    }
    let payload = match chaos.below(10) {
        0 => chaos.count(8),
        1..6 => chaos.count(128),
        6..9 => chaos.count(1460),
        _ => chaos.count(3000),
    };
    if chaos.percent(10) {
        frame.push(&[0x81, 0]).push(&(chaos.any() as u16).to_be_bytes());
    }
    if chaos.percent(70) {
        let protocol = chaos.of(6, &[17]);
        let len = (40 + payload) as u16;
        frame.push(&[0x08, 0, 0x45, 0]).push(&len.to_be_bytes());
        frame.push(&[0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.push(&[
            0x13, 0x88, 0x13, 0x89, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
        ]);
    } else {
        frame.push(&(chaos.any() as u16).to_be_bytes());
    }
    let words = payload / 8;
    frame.litter(chaos, words).push(&[7; 8][..payload % 8]);
    frame.spoil(chaos, 15);
}
