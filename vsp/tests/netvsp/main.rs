//! Client against server: a NIC's worker on one side of a real, double-mapped ring, a guest's
//! netvsc ([`guest`]) on the other, and a cable that leads back into the NIC. No VM is involved.

mod busy;
mod guest;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backends::net::loopback::Loopback;
use backends::net::stream::Stream;
use vmbus::nvsp::{
    Capabilities, ChannelType, Init, InitComplete, Message, MessageKind, Outgoing,
    ReceiveBufferComplete, RevokeBuffer, RndisPacket, SendIndirectionTable, ShareBuffer, Status,
    SubchannelComplete, SubchannelRequest, Version,
};
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::protocol::GpadlId;
use vmbus::rndis::{Oid, PacketInfoKind};
use zerocopy::IntoBytes;

use busy::Busy;
use guest::{
    Both, Guest, ME, MIB, PATIENCE, RECEIVE, RECEIVE_PAGES, Received, SEND, data, frame, large,
    open_second, reopen_second, segment, spread,
};

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
    let deadline = Instant::now() + PATIENCE;
    while guest.end.subchannels_requested() != Some(1) {
        assert!(Instant::now() < deadline, "no sub-channels were offered");
        std::thread::sleep(Duration::from_millis(1));
    }
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

/// A sub-channel that was opened before there was a send buffer sends from it. The guest does not have
/// that back before the last frame has left.
#[test]
fn a_send_buffer_is_not_given_back_while_a_channel_sends_from_it() {
    let mut guest = Guest::unshaken_on(Arc::new(Busy(Loopback::new())));
    guest.share_receive_buffer(Version::V6_1, Capabilities::IEEE_8021Q);
    let mut second = open_second(&mut guest);
    guest.share_send_buffer();
    // Nothing is received any more, so that frames stay under way.
    if guest.end.tear_down(GpadlId(1)) {
        assert!(guest.end.wait_unused(GpadlId(1), PATIENCE));
    }
    let flags = PacketFlags::COMPLETION_REQUESTED;
    let bytes = data(&[], &frame(ME, 100, 0));
    guest.put(SEND, &bytes);
    let len = bytes.len() as u32;
    let body = RndisPacket { channel: ChannelType::Data, section: 0, section_len: len };
    let packet = Outgoing::new(MessageKind::SendRndisPacket, &body);
    second.send(PacketKind::InBand, flags, 1, packet.as_bytes());
    // It makes no sense, and is answered when the one before has been taken.
    second.send(PacketKind::InBand, flags, 2, &[0; 40]);
    let mut buffer = [0; 8192];
    assert_eq!(second.wait(&mut buffer, PATIENCE).map(|packet| packet.transaction_id), Some(2));
    assert!(guest.end.tear_down(GpadlId(2)));
    // By then the first channel has let go.
    for _ in 0..2 {
        let init = Init { min: Version::V6_1, max: Version::V6_1 };
        guest.ask::<_, InitComplete>(MessageKind::Init, &init);
    }
    assert!(!guest.end.wait_unused(GpadlId(2), Duration::ZERO), "a frame is under way");
    // Nothing more is sent from there.
    second.send(PacketKind::InBand, flags, 3, packet.as_bytes());
    assert_eq!(second.wait(&mut buffer, PATIENCE).map(|packet| packet.transaction_id), Some(3));
    second.request_stop();
    assert!(guest.end.wait_unused(GpadlId(2), PATIENCE));
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

/// Also in the very turn in which the worker has heard another ring of its doorbell.
#[test]
fn a_stop_is_heard_whenever_it_comes() {
    for pause in 0..400 {
        let mut guest = Guest::new();
        guest.send(None, &[&data(&[], &frame(ME, 100, 0))]);
        (0..pause * 10).for_each(|_| std::hint::spin_loop());
        guest.end.request_stop();
        assert!(guest.end.wait_closed(PATIENCE), "after a pause of {pause}");
    }
}

/// Breaks the first channel's ring, and waits until its worker has given up.
fn break_ring(guest: &mut Guest) {
    // The write index, in the first ring's first page, outside of the ring.
    let ring = 16 * MIB - 64 * 4096;
    guest.put(ring, &0xffff_fff8u32.to_le_bytes());
    guest.end.doorbell.write(1).unwrap();
    assert!(guest.end.wait_closed(PATIENCE));
}

#[test]
fn a_broken_ring_costs_the_channel() {
    break_ring(&mut Guest::new());
}

/// As passt is: one socket for as long as the machine lives, whatever its guests do.
#[test]
fn a_broken_ring_leaves_the_network_to_the_next_worker() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let stream = Arc::new(Stream::new(ours, "test", 1500).unwrap());
    let framed = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat();
    for round in 0..5 {
        let mut guest = Guest::plugged_into(Arc::clone(&stream) as _);
        let sent = frame(ME, 300, round);
        theirs.write_all(&framed(&sent)).unwrap();
        assert!(guest.frame().frame == sent, "round {round}");
        let id = guest.send(None, &[&data(&[], &sent)]);
        guest.succeeds(id);
        let mut bytes = vec![0; 304];
        theirs.read_exact(&mut bytes).unwrap();
        assert!(bytes == framed(&sent), "round {round}");
        break_ring(&mut guest);
    }
}
