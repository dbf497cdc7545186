//! Disks, driven wrongly: commands at random to all units of a controller, on all its channels.

use vmbus::vstor::Operation;

use super::arena::{Arena, Bytes};
use super::channel::{Channel, ranges};
use super::chaos::Chaos;
use super::wire::{Kind, Offer, Wire};
use crate::platform::Platform;

const IN_BAND: u16 = 6;
const GPA_DIRECT: u16 = 9;

/// Commands that targets know, with bytes of their CDBs.
const COMMANDS: [(u8, u8); 26] = [
    (0x00, 6),
    (0x03, 6),
    (0x08, 6),
    (0x0a, 6),
    (0x12, 6),
    (0x1a, 6),
    (0x1b, 6),
    (0x25, 10),
    (0x28, 10),
    (0x2a, 10),
    (0x2f, 10),
    (0x35, 10),
    (0x41, 10),
    (0x42, 10),
    (0x5a, 10),
    (0x88, 16),
    (0x8a, 16),
    (0x8f, 16),
    (0x91, 16),
    (0x93, 16),
    (0x9e, 16),
    (0xa0, 12),
    (0xa3, 12),
    (0xa8, 12),
    (0xaa, 12),
    (0xaf, 12),
];

/// Blocks that most commands are about: not all of a disk, so that they meet.
const BLOCKS: u64 = 2048;

/// Opens the controller's channel, and does what comes to mind with it.
pub(super) fn visit<'w, P: Platform>(
    wire: &mut Wire<'w, P>,
    chaos: &mut Chaos,
    arena: &Arena<'w>,
    offer: Offer,
    depth: usize,
) {
    let Some(mut channel) = Channel::open(wire, chaos, arena, offer, depth) else { return };
    if offer.subchannel == 0 {
        shake_hands(&mut channel, wire, chaos);
    }
    for _ in 0..chaos.below(6) {
        for _ in 0..chaos.below(64) {
            if chaos.percent(95) {
                command(&mut channel, chaos, arena);
            } else {
                packet(&mut channel, chaos);
            }
        }
        channel.publish(wire, chaos);
        channel.linger(wire, chaos);
        // While the first channel is open, its sub-channels may be.
        if depth == 0
            && chaos.percent(30)
            && let Some(other) = wire.subchannel(chaos, Kind::Disks)
        {
            visit(wire, chaos, arena, other, depth + 1);
        }
        if chaos.percent(10) {
            channel.spoil(wire, chaos);
        }
        if chaos.percent(3) {
            wire.tear_down(offer.relid, channel.gpadl);
        }
    }
    channel.leave(wire, chaos);
}

/// The handshake: mostly the right steps in their order.
fn shake_hands<'w, P: Platform>(
    channel: &mut Channel<'w>,
    wire: &mut Wire<'w, P>,
    chaos: &mut Chaos,
) {
    let steps = [
        (Operation::BeginInitialization, 0),
        (Operation::QueryProtocolVersion, 0x0602),
        (Operation::QueryProperties, 0),
        (Operation::EndInitialization, 0),
        (Operation::CreateSubChannels, chaos.below(4)),
    ];
    for (operation, argument) in steps {
        if chaos.percent(4) {
            packet(channel, chaos);
        }
        if chaos.percent(3) {
            continue;
        }
        let repeats = if chaos.percent(4) { chaos.below(200) } else { 1 };
        for _ in 0..repeats {
            let mut body = Bytes::new();
            body.u32(operation.0).u32(1).u32(0).u64(argument).litter(chaos, 6);
            channel.push(chaos, IN_BAND, 0, padded(&body));
        }
    }
    channel.publish(wire, chaos);
    // The sub-channels are offered meanwhile.
    wire.linger(300_000);
    channel.drain();
}

/// As long as a packet of the protocol has to be.
fn padded(body: &Bytes) -> &[u8] {
    body.get().get(..64).unwrap_or(body.get())
}

/// Something that is no command.
fn packet(channel: &mut Channel<'_>, chaos: &mut Chaos) {
    let mut body = Bytes::new();
    let operation = chaos.below(16) as u32;
    body.u32(chaos.or_odd_32(operation, 20)).u32(chaos.below(2) as u32).u32(0).litter(chaos, 7);
    let len = if chaos.percent(10) { chaos.count(68) } else { 64 };
    let kind = chaos.or_odd(IN_BAND.into(), 10) as u16;
    channel.push(chaos, kind, 0, body.get().get(..len).unwrap_or_default());
}

/// A command to one of the units.
fn command(channel: &mut Channel<'_>, chaos: &mut Chaos, arena: &Arena<'_>) {
    let [first, others @ ..] = COMMANDS;
    let (code, cdb_len) = chaos.of(first, &others);
    let code = chaos.or_odd(code.into(), 5) as u8;
    let block = chaos.below(BLOCKS);
    let block = chaos.or_odd(block, 10);
    let blocks = 1 + chaos.below(64) as u32;
    let blocks = chaos.or_odd_32(blocks, 10);
    let cdb = cdb(chaos, code, block, blocks);

    let right = blocks.wrapping_mul(512).min(256 << 10);
    let len = if chaos.percent(80) { right } else { chaos.below(1 << 18) as u32 };
    let direction = chaos.below(3);
    let mut request = Bytes::new();
    request.u16(chaos.or_odd(52, 3) as u16).u16(0).push(&[0, 0, 0]);
    let unit = if chaos.percent(70) { 0 } else { chaos.below(4) };
    request.push(&[chaos.or_odd(unit, 5) as u8]);
    request.push(&[chaos.or_odd(cdb_len.into(), 5) as u8, 20, direction as u8, 0]);
    request.u32(chaos.or_odd_32(len, 5)).push(&cdb).u32(0);
    request.litter(chaos, 3);

    let mut body = ranges(chaos, arena, len);
    let headers = body.get().len();
    let kind = if direction == 2 && chaos.percent(80) { IN_BAND } else { GPA_DIRECT };
    let headers = if kind == IN_BAND {
        body = Bytes::new();
        0
    } else {
        headers
    };
    body.u32(Operation::ExecuteSrb.0).u32(1).u32(0);
    body.push(request.get().get(..52).unwrap_or(request.get()));
    channel.push(chaos, kind, headers, body.get());
}

/// A CDB of this command: the fields are where they would be.
fn cdb(chaos: &mut Chaos, code: u8, block: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    let flags = if chaos.percent(80) { 0 } else { chaos.any() as u8 };
    let [b0, b1, b2, b3, b4, b5, b6, b7] = block.to_be_bytes();
    let [c0, c1, c2, c3] = blocks.to_be_bytes();
    match code >> 5 {
        0 => cdb = [code, b5 & 0x1f, b6, b7, c3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        1 | 2 => cdb = [code, flags, b4, b5, b6, b7, 0, c2, c3, 0, 0, 0, 0, 0, 0, 0],
        4 => cdb = [code, flags, b0, b1, b2, b3, b4, b5, b6, b7, c0, c1, c2, c3, 0, 0],
        5 => cdb = [code, flags, b4, b5, b6, b7, c0, c1, c2, c3, 0, 0, 0, 0, 0, 0],
        _ => {
            for byte in &mut cdb {
                *byte = chaos.any() as u8;
            }
        }
    }
    // Vital pages, service actions, mode pages: one more byte that counts.
    if chaos.percent(15) {
        let at = 1 + chaos.count(12);
        if let Some(byte) = cdb.get_mut(at) {
            *byte = chaos.or_odd(0, 80) as u8;
        }
    }
    cdb
}
