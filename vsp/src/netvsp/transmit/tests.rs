use backends::net::checksum::{fold, sum, word};
use backends::net::offload::Segmentation;
use hypervisor::{Gpa, GuestMemory};
use proptest::prelude::*;
use vmbus::packet::Segment;
use zerocopy::IntoBytes;

use super::*;

const LIMITS: Limits = Limits { max_frame: 1522, takes: Offloads::ALL };

/// Where tests put a packet.
const AT: u64 = 0x1000;

fn info(kind: PacketInfoKind, value: u32) -> Vec<u8> {
    let front = PacketInfo { size: 16, kind, value_offset: 12 };
    [front.as_bytes(), &value.to_le_bytes()].concat()
}

/// A message as Linux sends it.
fn message(infos: &[Vec<u8>], frame: &[u8]) -> Vec<u8> {
    let infos = infos.concat();
    let body = PacketBody {
        data_offset: 36 + infos.len() as u32,
        data_len: frame.len() as u32,
        info_offset: 36,
        info_len: infos.len() as u32,
        ..PacketBody::default()
    };
    let header = Header { kind: MessageKind::Packet, len: (44 + infos.len() + frame.len()) as u32 };
    [header.as_bytes(), body.as_bytes(), &infos, frame].concat()
}

/// A frame and its bytes.
type Got = (Outbound, Vec<u8>);

/// All frames of a packet that lies at `AT` in stretches of the given lengths, as they would go
/// out, and why it ended.
fn frames(packet: &[u8], pieces: &[usize]) -> (Vec<Got>, Result<(), Malformed>) {
    frames_to(&LIMITS, packet, pieces)
}

fn frames_to(
    limits: &Limits,
    packet: &[u8],
    pieces: &[usize],
) -> (Vec<Got>, Result<(), Malformed>) {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let mut segments = Vec::new();
    let (mut left, mut gpa) = (packet, AT);
    for piece in pieces.iter().copied().chain([usize::MAX]) {
        let (now, later) = left.split_at(piece.min(left.len()));
        memory.write(Gpa(gpa), now).unwrap_or_else(|_| assert!(now.is_empty()));
        segments.push(Segment { gpa, len: now.len() as u32 });
        gpa += now.len() as u64 + 64;
        left = later;
    }
    let mut reader = Reader::new(&memory, &segments);
    let (mut front, mut buffers, mut out) = (Front::new(), Vec::new(), Vec::new());
    loop {
        match next_frame(&mut reader, limits, &mut front, &mut buffers) {
            Ok(Some(frame)) => out.push((frame, bytes(&memory, &front, &buffers))),
            Ok(None) => return (out, Ok(())),
            Err(why) => return (out, Err(why)),
        }
    }
}

/// What buffers hold: their addresses are of the front or of guest memory.
fn bytes(memory: &GuestMemory, front: &Front, buffers: &[Buffer]) -> Vec<u8> {
    let base = memory.regions().next().unwrap().host as usize;
    let mut bytes = Vec::new();
    for buffer in buffers {
        let address = buffer.address() as usize;
        if address == front.0.as_ptr() as usize {
            bytes.extend(&front.0[..buffer.len()]);
        } else {
            let mut piece = vec![0; buffer.len()];
            memory.read(Gpa((address - base) as u64), &mut piece).unwrap();
            bytes.extend(piece);
        }
    }
    bytes
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(7) ^ seed).collect()
}

#[test]
fn several_frames_in_one_packet() {
    let sent = [frame(60, 1), frame(1514, 2), frame(14, 3)];
    let packet: Vec<u8> = sent
        .iter()
        .flat_map(|frame| {
            let mut message = message(&[], frame);
            // Padded as guests do, which the length includes.
            message.resize(message.len().next_multiple_of(8), 0xEE);
            let len = message.len() as u32;
            message[4..8].copy_from_slice(&len.to_le_bytes());
            message
        })
        .collect();
    for pieces in [&[][..], &[3], &[44, 60], &[100, 1, 1, 900, 2, 500]] {
        let (got, end) = frames(&packet, pieces);
        assert_eq!(end, Ok(()));
        let got: Vec<Vec<u8>> = got.into_iter().map(|(_, bytes)| bytes).collect();
        assert_eq!(got, sent, "{pieces:?}");
    }
}

#[test]
fn a_tag_is_put_in_its_place() {
    let sent = frame(100, 9);
    let tag = info(PacketInfoKind::Vlan, 0x123 << 4 | 5);
    let checksum = info(PacketInfoKind::Checksum, 1 | 4 | 34 << 16);
    let (got, end) = frames(&message(&[checksum, tag], &sent), &[]);
    assert_eq!(end, Ok(()));
    let (outbound, bytes) = &got[0];
    assert_eq!((outbound.len, bytes.len()), (104, 104));
    assert_eq!(bytes[..12], sent[..12]);
    assert_eq!(bytes[12..16], [0x81, 0, 0xA1, 0x23]);
    assert_eq!(bytes[16..], sent[12..]);
    assert_eq!(outbound.offload.checksum, Checksum::Partial { start: 38, offset: 16 });
}

#[test]
fn checksums_are_left_where_they_are_asked_for() {
    let sent = frame(100, 9);
    let ask = |value| {
        let (got, end) =
            frames(&message(&[info(PacketInfoKind::Checksum, value)], &sent), &[50, 20]);
        end.map(|()| got[0].0.offload.checksum)
    };
    assert_eq!(ask(2 | 8 | 54 << 16), Ok(Checksum::Partial { start: 54, offset: 6 }));
    // Neither TCP nor UDP: the IP header alone, which is the guest's.
    assert_eq!(ask(1), Ok(Checksum::Unknown));
    assert_eq!(ask(1 | 4 | 84 << 16), Err(Malformed::Offload));
    // Where it begins is not said, and cannot be seen.
    assert_eq!(ask(1 | 4), Err(Malformed::Offload));
}

/// A packet of TCP or UDP over IPv4 or IPv6, as a guest leaves it to its NIC: with a sum of the
/// pseudo-header, and without a checksum of IPv4's header.
fn small(v4: bool, tcp: bool, tags: usize, payload: usize) -> (Vec<u8>, usize, usize) {
    let protocol = if tcp { 6 } else { 17 };
    let len = (if tcp { 20 } else { 8 } + payload) as u16;
    let mut frame = vec![2; 12];
    (0..tags).for_each(|_| frame.extend([0x81, 0, 0, 7]));
    let ip = frame.len() + 2;
    let addresses = if v4 {
        frame.extend([8, 0, 0x46, 0]);
        frame.extend((len + 24).to_be_bytes());
        frame.extend([
            0, 1, 0x40, 0, 64, protocol, 0xab, 0xcd, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 0,
        ]);
        ip + 12..ip + 20
    } else {
        frame.extend([0x86, 0xDD, 0x60, 0, 0, 0]);
        frame.extend((len + 8).to_be_bytes());
        frame.extend([60, 64]);
        frame.extend([0xfd; 32]);
        frame.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
        ip + 8..ip + 40
    };
    let transport = frame.len();
    let seed = fold(sum(&frame[addresses]) + word(protocol.into()) + word(len));
    frame.resize(transport + usize::from(len) - payload, 0);
    let place = transport + if tcp { 16 } else { 6 };
    frame[place..place + 2].copy_from_slice(&seed.to_be_bytes());
    frame.extend((0..payload).map(|at| (at * 7 + at / 256) as u8));
    (frame, ip, transport)
}

/// Many systems leave the offset 0 (FreeBSD's hn(4) and what was made of it): the NIC looks for it.
#[test]
fn headers_are_found_where_the_offset_is_not_said() {
    for (v4, tcp) in [(true, true), (true, false), (false, true), (false, false)] {
        for tags in 0..=2 {
            let (sent, _, transport) = small(v4, tcp, tags, 100);
            let bits = if v4 { 1 } else { 2 } | if tcp { 4 } else { 8 };
            let (got, end) =
                frames(&message(&[info(PacketInfoKind::Checksum, bits)], &sent), &[61, 3]);
            assert_eq!(end, Ok(()));
            let partial =
                Checksum::Partial { start: transport as u16, offset: if tcp { 16 } else { 6 } };
            assert_eq!((got[0].0.offload.checksum, &got[0].1), (partial, &sent));
            // Not of what it is not.
            let wrong = info(PacketInfoKind::Checksum, bits ^ 12);
            assert_eq!(frames(&message(&[wrong], &sent), &[]).1, Err(Malformed::Offload));
        }
    }
}

#[test]
fn large_sends_are_cut_where_the_offset_is_not_said() {
    let sent = large4(5000);
    for (tags, shift) in [(0, 0), (1, 4), (2, 8)] {
        let mut sent = sent.clone();
        (0..tags).for_each(|_| drop(sent.splice(12..12, [0x88, 0xa8, 0, 7])));
        let large = info(PacketInfoKind::LargeSend, 1448 | 1 << 30);
        let (got, end) = frames(&message(&[large], &sent), &[]);
        assert_eq!(end, Ok(()));
        let partial = Checksum::Partial { start: 34 + shift, offset: 16 };
        assert_eq!(got[0].0.offload.checksum, partial);
        assert!(got[0].0.offload.segments.is_some());
    }
}

/// Alone, beside TCP's, and with a tag that is put in; and not in IPv6, which has none.
#[test]
fn a_checksum_of_the_ip_header_is_made() {
    for (bits, tag) in [(1 | 16, false), (1 | 4 | 16, false), (1 | 4 | 16, true)] {
        for offset in [0, 38] {
            let (sent, ip, transport) = small(true, true, 0, 100);
            let mut infos = vec![info(PacketInfoKind::Checksum, bits | offset << 16)];
            infos.extend(tag.then(|| info(PacketInfoKind::Vlan, 7 << 4)));
            let (got, end) = frames(&message(&infos, &sent), &[50]);
            assert_eq!(end, Ok(()));
            let (outbound, mut bytes) = got[0].clone();
            if tag {
                assert_eq!(bytes.drain(12..16).collect::<Vec<u8>>(), [0x81, 0, 0, 7]);
            }
            assert_eq!(fold(sum(&bytes[ip..transport])), 0xffff);
            let asked = bits & 4 != 0;
            let shift = if tag { 4 } else { 0 };
            let partial = Checksum::Partial { start: transport as u16 + shift, offset: 16 };
            let expected = if asked { partial } else { Checksum::Unknown };
            assert_eq!(outbound.offload.checksum, expected);
            let mut sent = sent;
            sent[ip + 10..ip + 12].copy_from_slice(&bytes[ip + 10..ip + 12]);
            assert_eq!(bytes, sent);
        }
    }
    let (sent, ..) = small(false, true, 0, 100);
    let (got, end) = frames(&message(&[info(PacketInfoKind::Checksum, 2 | 4 | 16)], &sent), &[]);
    assert_eq!((end, &got[0].1), (Ok(()), &sent));
}

/// A packet of full size in a VLAN in a VLAN, whether a tag is in the frame or beside it.
#[test]
fn two_tags_fit_in_front_of_a_packet_of_full_size() {
    let tag = |number: u32| info(PacketInfoKind::Vlan, number << 4);
    let refused = (Vec::new(), Err(Malformed::Length));
    for (infos, in_frame) in [(vec![], 8), (vec![tag(7)], 4)] {
        let (got, end) = frames(&message(&infos, &frame(1514 + in_frame, 1)), &[]);
        assert_eq!((end, got[0].0.len), (Ok(()), 1522));
        assert_eq!(frames(&message(&infos, &frame(1515 + in_frame, 1)), &[]), refused);
    }
}

/// A TCP segment over IPv4 as Linux prepares it for large send.
fn large4(payload: usize) -> Vec<u8> {
    let mut frame = frame(14 + 20 + 32 + payload, 5);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[
        0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    frame[34 + 12] = 0x80;
    frame[34 + 13] = 0x10;
    // The sum over addresses and protocol, without the length.
    let seed = fold(sum(&[10, 0, 0, 1, 10, 0, 0, 2]) + word(6));
    frame[34 + 16..34 + 18].copy_from_slice(&seed.to_be_bytes());
    frame
}

#[test]
fn headers_of_large_sends_are_completed() {
    let sent = large4(5000);
    let large = info(PacketInfoKind::LargeSend, 1448 | 34 << 20 | 1 << 30);
    let tag = info(PacketInfoKind::Vlan, 7 << 4);
    for (infos, shift) in [(vec![large.clone()], 0), (vec![large, tag], 4)] {
        let (got, end) = frames(&message(&infos, &sent), &[60, 30, 4000]);
        assert_eq!(end, Ok(()));
        let (outbound, bytes) = &got[0];
        let ip = 14 + shift;
        let tcp = ip + 20;
        assert_eq!(bytes.len(), sent.len() + shift);
        assert_eq!(bytes[ip + 2..ip + 4], (20 + 32 + 5000u16).to_be_bytes());
        // A header with its checksum adds up to all ones.
        assert_eq!(fold(sum(&bytes[ip..tcp])), 0xFFFF);
        let seed = fold(sum(&[10, 0, 0, 1, 10, 0, 0, 2]) + word(6 + 5032));
        assert_eq!(bytes[tcp + 16..tcp + 18], seed.to_be_bytes());
        assert_eq!(bytes[tcp + 18..], sent[34 + 18..]);
        let segments = outbound.offload.segments.unwrap();
        assert_eq!((segments.kind, segments.size), (Segmentation::Tcp4, 1448));
        assert_eq!(usize::from(segments.header_len), tcp + 32);
        let partial = Checksum::Partial { start: tcp as u16, offset: 16 };
        assert_eq!(outbound.offload.checksum, partial);
    }
}

#[test]
fn large_sends_over_ipv6() {
    let mut sent = frame(14 + 40 + 20 + 3000, 1);
    sent[12..14].copy_from_slice(&[0x86, 0xDD]);
    sent[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 6, 64]);
    sent[54 + 12..54 + 14].copy_from_slice(&[0x50, 0x90]);
    let large = info(PacketInfoKind::LargeSend, 1440 | 54 << 20 | 3 << 30);
    let (got, end) = frames(&message(&[large], &sent), &[]);
    assert_eq!(end, Ok(()));
    let (outbound, bytes) = &got[0];
    assert_eq!(bytes[18..20], 3020u16.to_be_bytes());
    let segments = outbound.offload.segments.unwrap();
    assert_eq!((segments.kind, segments.ecn), (Segmentation::Tcp6, true));
    assert_eq!(bytes[54 + 18..], sent[54 + 18..]);
}

#[test]
fn a_large_send_of_one_segment_is_not_cut() {
    let large = info(PacketInfoKind::LargeSend, 1448 | 34 << 20 | 1 << 30);
    let (got, end) = frames(&message(&[large], &large4(1448)), &[]);
    assert_eq!((end, got[0].0.offload.segments), (Ok(()), None));
}

#[test]
fn large_sends_that_make_no_sense() {
    let refused = |value, change: &dyn Fn(&mut Vec<u8>)| {
        let mut sent = large4(5000);
        change(&mut sent);
        let packet = message(&[info(PacketInfoKind::LargeSend, value)], &sent);
        assert_eq!(frames(&packet, &[]).1, Err(Malformed::Offload), "{value:#x}");
    };
    let good = 1448 | 34 << 20 | 1 << 30;
    let none = |_: &mut Vec<u8>| {};
    // Version 1, no segment size, IPv6, TCP elsewhere.
    refused(good & !(1 << 30), &none);
    refused(good & !0xF_FFFF, &none);
    refused(good | 1 << 31, &none);
    refused(1448 | 38 << 20 | 1 << 30, &none);
    refused(1448 | 1023 << 20 | 1 << 30, &none);
    // A header length of TCP's below 20, of IP's; more than IP can have.
    refused(good, &|sent| sent[34 + 12] = 0x40);
    refused(good, &|sent| sent[14] = 0x41);
    refused(good, &|sent| sent.resize(14 + 65536, 0));
    refused(good, &|sent| sent.truncate(50));
}

#[test]
fn wild_messages_end_the_packet() {
    let good = message(&[info(PacketInfoKind::Vlan, 0)], &frame(100, 0));
    let ends = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut second = good.clone();
        change(&mut second);
        let packet = [good.clone(), second].concat();
        let (got, end) = frames(&packet, &[70]);
        assert_eq!(got.len(), 1);
        end.unwrap_err()
    };
    let put = |at: usize, value: u32| {
        move |bytes: &mut Vec<u8>| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes())
    };
    assert_eq!(ends(&put(0, 2)), Malformed::Kind);
    for len in [0, 8, 43, 161, u32::MAX] {
        assert_eq!(ends(&put(4, len)), Malformed::Short, "{len}");
    }
    for offset in [0, 8, 35] {
        // The frame would begin in the fixed part.
        assert_eq!(ends(&put(8, offset)), Malformed::Overlap, "{offset}");
    }
    assert_eq!(ends(&put(8, 40)), Malformed::Overlap);
    assert_eq!(ends(&put(8, u32::MAX)), Malformed::Short);
    assert_eq!(ends(&put(12, 101)), Malformed::Short);
    assert_eq!(ends(&put(12, 13)), Malformed::Length);
    assert_eq!(ends(&put(28, 0)), Malformed::Overlap);
    assert_eq!(ends(&put(28, 60)), Malformed::Overlap);
    assert_eq!(ends(&put(28, u32::MAX)), Malformed::Short);
    assert_eq!(ends(&put(32, 15)), Malformed::Info);
    // The entry: its size, and where its value is.
    for size in [0, 4, 11, 17, u32::MAX] {
        assert_eq!(ends(&put(44, size)), Malformed::Info, "{size}");
    }
    for offset in [0, 8, 13, u32::MAX] {
        assert_eq!(ends(&put(52, offset)), Malformed::Info, "{offset}");
    }
    assert_eq!(ends(&|bytes| bytes.truncate(20)), Malformed::Short);
    let long = message(&[], &frame(1523, 0));
    assert_eq!(frames(&long, &[]).1, Err(Malformed::Length));
    let pieces = [1; 140];
    assert_eq!(frames(&message(&[], &frame(100, 0)), &pieces).1, Err(Malformed::Pieces));
}

#[test]
fn what_the_network_does_not_take_is_not_left_to_it() {
    let limits = Limits { takes: Offloads::NONE, ..LIMITS };
    let large = info(PacketInfoKind::LargeSend, 1448 | 34 << 20 | 1 << 30);
    assert_eq!(
        frames_to(&limits, &message(&[large], &large4(5000)), &[]).1,
        Err(Malformed::Offload)
    );
    // Checksums are made, as some guests ask for them whatever they were told that there is.
    for (v4, tcp, payload) in
        [(true, true, 1300), (true, false, 1), (false, true, 0), (false, false, 777)]
    {
        for (offset, tag) in [(false, false), (true, false), (false, true)] {
            let (sent, ip, transport) = small(v4, tcp, 0, payload);
            let bits = if v4 { 1 | 16 } else { 2 } | if tcp { 4 } else { 8 };
            let said = if offset { (transport as u32) << 16 } else { 0 };
            let mut infos = vec![info(PacketInfoKind::Checksum, bits | said)];
            infos.extend(tag.then(|| info(PacketInfoKind::Vlan, 7 << 4)));
            let (got, end) = frames_to(&limits, &message(&infos, &sent), &[70, 33, 1]);
            assert_eq!(end, Ok(()));
            let (outbound, mut bytes) = got[0].clone();
            assert_eq!(outbound.offload, Offload::NONE);
            if tag {
                bytes.drain(12..16);
            }
            assert!(!v4 || fold(sum(&bytes[ip..transport])) == 0xffff);
            let addresses = if v4 { ip + 12..ip + 20 } else { ip + 8..ip + 40 };
            let len = (bytes.len() - transport) as u16;
            let pseudo = sum(&bytes[addresses]) + word(if tcp { 6 } else { 17 }) + word(len);
            assert_eq!(fold(pseudo + sum(&bytes[transport..])), 0xffff);
        }
    }
}

proptest! {
    /// However a packet lies in memory, its frame is the one that was put there.
    #[test]
    fn a_frame_survives_any_division(
        len in 14usize..1500,
        pieces in proptest::collection::vec(1usize..400, 0..20),
        tag in proptest::option::of(0u32..0x10000),
    ) {
        let sent = frame(len, 3);
        let infos: Vec<_> = tag.map(|tag| info(PacketInfoKind::Vlan, tag)).into_iter().collect();
        let (got, end) = frames(&message(&infos, &sent), &pieces);
        prop_assert_eq!(end, Ok(()));
        let (outbound, mut bytes) = got.into_iter().next().unwrap();
        prop_assert_eq!(outbound.len as usize, bytes.len());
        if let Some(tag) = tag {
            let removed: Vec<u8> = bytes.drain(12..16).collect();
            prop_assert_eq!(&removed[2..], VlanTag(tag).tci().to_be_bytes());
        }
        prop_assert_eq!(bytes, sent);
    }
}
