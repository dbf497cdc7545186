//! Client against server: netvsc on one side of a real ring, the NIC's worker on the other, and
//! behind it a cable that leads back, or a switch with a second such pair. No VM is involved.

mod common;

use std::sync::Arc;

use backends::net::loopback::Loopback;
use backends::net::switch::{PortOptions, Switch, SwitchOptions};
use common::PATIENCE;
use common::nic::{NicRig, PAGES, SECTIONS, frame};
use hypervisor::Gpa;
use vmbus::nvsp::{Capabilities, Version};
use vmbus::rndis::{
    ChecksumOffload, LargeSend, Oid, PacketFilter, ReceiveChecksum, Status, TransmitChecksum,
    VlanTag,
};
use vsc::netvsc::{Event, Offload, RequestError, SendError};
use vsc::{PageList, words};

const ME: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const YOU: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const ALL: [u8; 6] = [0xff; 6];
const PLAIN: Offload = Offload { checksum: None, large_send: None, vlan: None };

fn looped() -> (NicRig, Loopback) {
    let cable = Loopback::new();
    let mut rig = NicRig::new(ME, Arc::new(cable.clone()));
    rig.up();
    (rig, cable)
}

/// Two NICs on a switch that know of each other.
fn switched(change: impl Fn(&mut vsc::netvsc::Setup<common::nic::Part>)) -> [NicRig; 2] {
    let switch = Switch::new(SwitchOptions::new("test"));
    let mut rigs = [ME, YOU].map(|address| {
        let port = switch.port(PortOptions::default()).expect("a port");
        NicRig::with(address, Arc::new(port), 1, &change)
    });
    rigs.iter_mut().for_each(NicRig::up);
    let hello = frame(ALL, YOU, 60, 0);
    rigs[1].queues[0].send(&hello, &PLAIN).unwrap();
    rigs[1].wait(0);
    assert_eq!(rigs[0].frames(0, 1), [hello]);
    rigs
}

#[test]
fn what_is_agreed_on() {
    let (rig, _) = looped();
    let agreement = rig.agreement;
    assert_eq!(agreement.version, Version::V6_1);
    assert_eq!((agreement.address, agreement.max_mtu), (ME, 9000));
    assert_eq!((agreement.speed, agreement.max_frames), (100_000_000, 8));
    let tcp = ChecksumOffload::TCP;
    assert_eq!(agreement.checksums.ipv4_transmit & tcp, tcp);
    assert!(agreement.large_send.ipv6_max > 60_000);
    assert!(rig.queues[0].is_link_up());
    rig.stop();
}

#[test]
fn what_is_sent_comes_back() {
    let (mut rig, _) = looped();
    for (seed, len) in (0..).zip([14, 15, 60, 61, 64, 1500, 1514, 1518, 1522]) {
        for to in [ME, ALL] {
            let sent = frame(to, YOU, len, seed);
            rig.queues[0].send(&sent, &PLAIN).unwrap();
            assert_eq!(rig.frames(0, 1), [sent]);
        }
    }
    // To nobody here.
    rig.queues[0].send(&frame(YOU, ME, 60, 0), &PLAIN).unwrap();
    rig.queues[0].send(&frame(ME, YOU, 60, 1), &PLAIN).unwrap();
    assert_eq!(rig.frames(0, 1), [frame(ME, YOU, 60, 1)]);
    while rig.queues[0].in_flight() > 0 {
        assert!(rig.wait(0).is_empty());
    }
    let counters = rig.queues[0].frame_counters();
    assert_eq!((counters.sent, counters.received, counters.refused), (20, 19, 0));
    rig.stop();
}

#[test]
fn short_frames_share_a_packet() {
    let (mut rig, _) = looped();
    let before = rig.queues[0].counters().packets_out;
    let sent: Vec<_> = (0..20).map(|n| frame(ME, YOU, 64 + n, n as u64)).collect();
    for frame in &sent {
        rig.queues[0].send(frame, &PLAIN).unwrap();
    }
    rig.queues[0].publish();
    // Eight frames are the most that the NIC takes at once.
    assert_eq!(rig.queues[0].counters().packets_out - before, 3);
    assert_eq!(rig.frames(0, 20), sent);
    // Long ones, as far as there is room in a section.
    let sent: Vec<_> = (0..6).map(|n| frame(ME, YOU, 1514, n)).collect();
    let before = rig.queues[0].counters().packets_out;
    for frame in &sent {
        rig.queues[0].send(frame, &PLAIN).unwrap();
    }
    rig.queues[0].publish();
    assert_eq!(rig.queues[0].counters().packets_out - before, 2);
    assert_eq!(rig.frames(0, 6), sent);
    rig.stop();
}

#[test]
fn no_more_is_taken_than_there_are_sections_and_then_it_goes_on() {
    let (mut rig, _) = looped();
    let (queue, mut sent) = (&mut rig.queues[0], 0);
    // Each alone in its packet, and so many that none is completed before all are seen.
    let long = |n| frame(ME, YOU, 1514, n);
    let full = loop {
        match queue.send(&long(sent), &PLAIN) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full, SendError::Full);
    // Three in each section, and none was shown the host but those whose section was full.
    assert_eq!(sent, 3 * SECTIONS as u64);
    let got = rig.frames(0, sent as usize);
    assert!((0..sent).zip(&got).all(|(n, got)| *got == long(n)));
    while rig.queues[0].in_flight() > 0 {
        rig.wait(0);
    }
    assert!(rig.queues[0].has_room());
    rig.queues[0].send(&long(7), &PLAIN).unwrap();
    assert_eq!(rig.frames(0, 1), [long(7)]);
    rig.stop();
}

#[test]
fn frames_go_from_pages_too() {
    let cable = Arc::new(Loopback::new());
    let mut rig = NicRig::with(ME, cable, 1, |setup| setup.mtu = 9000);
    rig.up();
    // Begins in mid-page, in pages that are not in order.
    let sent = frame(ME, YOU, 9014, 3);
    let pages = [PAGES / 4096 + 9, PAGES / 4096 + 4, PAGES / 4096 + 6];
    let list = PageList::<{ words(3) }>::new(9014, 100, pages).unwrap();
    rig.memory.write(Gpa(pages[0] * 4096 + 100), &sent[..3996]).unwrap();
    rig.memory.write(Gpa(pages[1] * 4096), &sent[3996..8092]).unwrap();
    rig.memory.write(Gpa(pages[2] * 4096), &sent[8092..]).unwrap();
    let small = frame(ME, YOU, 60, 1);
    for tag in 0..50 {
        rig.queues[0].send(&small, &PLAIN).unwrap();
        rig.queues[0].send_pages(tag, list.pages(), &PLAIN).unwrap();
        let (mut ended, mut frames) = (None, Vec::new());
        while ended.is_none() || frames.len() < 2 {
            rig.wait_for(0, |event| match event {
                Event::Sent { tag, well } => ended = Some((tag, well)),
                Event::Received(frame) => {
                    let mut bytes = vec![0; frame.len()];
                    assert!(frame.read(0, &mut bytes));
                    assert!(!frame.read(1, &mut bytes));
                    frames.push(bytes);
                }
                Event::Link(_) => panic!("nobody touched the cable"),
            });
        }
        assert_eq!(ended, Some((tag, true)));
        // In order.
        assert!(frames == [small.clone(), sent.clone()]);
    }
    // A section has no room for it.
    let refused = rig.queues[0].send(&sent, &PLAIN);
    assert!(matches!(refused, Err(SendError::TooLong { len: 9014, .. })), "{refused:?}");
    rig.stop();
}

#[test]
fn frames_that_cannot_be_are_not_sent() {
    let (mut rig, _) = looped();
    let queue = &mut rig.queues[0];
    assert_eq!(queue.send(&[0; 13], &PLAIN), Err(SendError::Short));
    assert_eq!(queue.send(&[0; 1523], &PLAIN), Err(SendError::TooLong { len: 1523, max: 1522 }));
    queue.publish();
    assert_eq!(queue.in_flight(), 0);
    // What the host alone can tell costs the packet.
    let nonsense = TransmitChecksum::new(TransmitChecksum::IPV4 | TransmitChecksum::TCP, 1000);
    let offload = Offload { checksum: Some(nonsense), ..PLAIN };
    queue.send(&frame(ME, YOU, 60, 0), &offload).unwrap();
    rig.wait(0);
    assert_eq!(rig.queues[0].frame_counters().refused, 1);
    rig.queues[0].send(&frame(ME, YOU, 60, 0), &PLAIN).unwrap();
    rig.frames(0, 1);
    rig.stop();
}

/// A UDP packet over IPv4, its checksum left out but for the pseudo-header's sum; and with it.
fn udp(len: usize) -> (Vec<u8>, u16) {
    let mut bytes = frame(YOU, ME, 42 + len, 5);
    let (total, udp) = ((28 + len) as u16, (8 + len) as u16);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..34]
        .copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[16..18].copy_from_slice(&total.to_be_bytes());
    bytes[38..40].copy_from_slice(&udp.to_be_bytes());
    let sum = |bytes: &[u8]| {
        let sum = bytes.chunks(2).fold(0u64, |sum, pair| {
            sum + u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))
        });
        let folded = (sum & 0xffff) + (sum >> 16);
        ((folded & 0xffff) + (folded >> 16)) as u16
    };
    let header = !sum(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&header.to_be_bytes());
    let pseudo = sum(&[&bytes[26..34], &[0, 17], &udp.to_be_bytes()[..]].concat());
    bytes[40..42].copy_from_slice(&pseudo.to_be_bytes());
    let checksum = !sum(&bytes[34..]);
    (bytes, checksum)
}

#[test]
fn what_is_left_to_the_host_is_done() {
    let mut rigs = switched(|setup| setup.capabilities = Capabilities(Capabilities::IEEE_8021Q));
    let (mut packet, checksum) = udp(333);
    let left = TransmitChecksum::new(TransmitChecksum::IPV4 | TransmitChecksum::UDP, 34);
    let tag = VlanTag(0x123 << 4 | 5);
    for vlan in [None, Some(tag)] {
        let offload = Offload { checksum: Some(left), vlan, large_send: None };
        rigs[0].queues[0].send(&packet, &offload).unwrap();
        rigs[0].wait(0);
        if vlan.is_some() {
            // A port that is in one VLAN has no tags.
            continue;
        }
        let mut got = rigs[1].frames(0, 1).remove(0);
        assert_eq!(got[40..42], checksum.to_be_bytes());
        got[40..42].copy_from_slice(&packet[40..42]);
        assert!(got == packet);
    }
    // By a cable that leads back the tag comes beside the frame.
    let cable = Arc::new(Loopback::new());
    let beside = Capabilities(Capabilities::IEEE_8021Q);
    let mut rig = NicRig::with(ME, cable, 1, |setup| setup.capabilities = beside);
    rig.up();
    packet[..6].copy_from_slice(&ME);
    rig.queues[0].send(&packet, &Offload { vlan: Some(tag), ..PLAIN }).unwrap();
    let mut seen = None;
    while seen.is_none() {
        rig.wait_for(0, |event| {
            if let Event::Received(frame) = event {
                assert_eq!((frame.len(), frame.checksum), (packet.len(), ReceiveChecksum(0)));
                seen = frame.vlan;
            }
        });
    }
    assert_eq!(seen, Some(tag));
    rig.stop();
    rigs.into_iter().for_each(NicRig::stop);
}

#[test]
fn long_segments_are_cut() {
    let mut rigs = switched(|_| {});
    let mut packet = frame(YOU, ME, 54 + 5000, 8);
    packet[12..14].copy_from_slice(&[8, 0]);
    packet[14..34]
        .copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet[46..48].copy_from_slice(&[0x50, 0x10]);
    let offload = Offload { large_send: Some(LargeSend::v2(false, 1460, 34)), ..PLAIN };
    rigs[0].queues[0].send(&packet, &offload).unwrap();
    rigs[0].queues[0].publish();
    let got = rigs[1].frames(0, 4);
    let lens: Vec<usize> = got.iter().map(Vec::len).collect();
    assert_eq!(lens, [1514, 1514, 1514, 54 + 620]);
    let payload: Vec<u8> = got.iter().flat_map(|frame| frame[54..].to_vec()).collect();
    assert!(payload == packet[54..]);
    rigs.into_iter().for_each(NicRig::stop);
}

#[test]
fn every_byte_arrives_both_ways_at_once() {
    const FRAMES: u64 = 20_000;
    /// Frames that may be on their way: no more than the switch keeps for one.
    const WINDOW: u64 = 200;
    let rigs = switched(|_| {});
    let received = [const { std::sync::atomic::AtomicU64::new(0) }; 2];
    let ordering = std::sync::atomic::Ordering::AcqRel;
    std::thread::scope(|scope| {
        for (side, mut rig) in rigs.into_iter().enumerate() {
            let received = &received;
            scope.spawn(move || {
                let ends = [ME, YOU];
                let (me, you) = (ends[side], ends[1 - side]);
                let len = |n: u64| 60 + (n * 7919 % 1455) as usize;
                let rig_frames = |rig: &mut NicRig| {
                    let (queue, end) = (&mut rig.queues[0], &mut rig.ends[0]);
                    let (mut sent, mut got) = (0u64, 0u64);
                    let mut bytes = vec![0; 2048];
                    while sent < FRAMES || got < FRAMES || queue.in_flight() > 0 {
                        let theirs = received[1 - side].load(std::sync::atomic::Ordering::Acquire);
                        while sent < FRAMES && sent < theirs + WINDOW {
                            let seed = sent << 1 | side as u64;
                            match queue.send(&frame(you, me, len(sent), seed), &PLAIN) {
                                Ok(()) => sent += 1,
                                Err(SendError::Full) => break,
                                Err(error) => panic!("{error}"),
                            }
                        }
                        queue.publish();
                        let before = got;
                        let taken = queue
                            .poll(|event| {
                                if let Event::Received(arrived) = event {
                                    let bytes = &mut bytes[..arrived.len()];
                                    assert!(arrived.read(0, bytes));
                                    let seed = got << 1 | (1 - side) as u64;
                                    assert!(bytes == frame(me, you, len(got), seed), "frame {got}");
                                    got += 1;
                                }
                            })
                            .expect("a sound host");
                        received[side].fetch_add(got - before, ordering);
                        if taken == 0 {
                            // The peer's window opens without an interrupt.
                            if queue.rest() {
                                end.wait_interrupt(PATIENCE / 10_000);
                            }
                            queue.wake();
                        }
                    }
                    queue.publish();
                };
                rig_frames(&mut rig);
                rig.stop();
            });
        }
    });
}

#[test]
fn each_channel_has_its_frames() {
    let cable = Arc::new(Loopback::new());
    let mut rig = NicRig::with(ME, cable, 3, |_| {});
    rig.up();
    for n in 0..300 {
        let sent: Vec<_> = (0..3).map(|channel| frame(ME, YOU, 100, n * 3 + channel)).collect();
        for (queue, frame) in rig.queues.iter_mut().zip(&sent) {
            queue.send(frame, &PLAIN).unwrap();
            queue.publish();
        }
        // The cable leads back to the same channel.
        for (channel, sent) in sent.iter().enumerate() {
            assert_eq!(rig.frames(channel, 1).as_slice(), std::slice::from_ref(sent));
        }
    }
    let counters = rig.nic.counters();
    assert_eq!(counters.iter().map(|c| c.sent.get()).collect::<Vec<_>>(), [300; 3]);
    rig.stop();
}

#[test]
fn the_link_is_heard_of() {
    let (mut rig, cable) = looped();
    for up in [false, true] {
        cable.plug(up);
        // The cable wakes nobody; a packet does.
        rig.queues[0].send(&frame(ALL, ME, 60, 0), &PLAIN).unwrap();
        let mut heard = None;
        while heard.is_none() {
            rig.wait_for(0, |event| {
                if let Event::Link(up) = event {
                    heard = Some(up);
                }
            });
        }
        assert_eq!((heard, rig.queues[0].is_link_up()), (Some(up), up));
    }
    rig.stop();
}

#[test]
fn settings_are_asked_and_set() {
    let (mut rig, _) = looped();
    rig.queues[0].send(&frame(ME, YOU, 60, 0), &PLAIN).unwrap();
    rig.frames(0, 1);
    let (queue, end) = (&mut rig.queues[0], &mut rig.ends[0]);
    let mut wait = || end.wait_interrupt(PATIENCE);
    let mut value = [0; 64];
    assert_eq!(queue.query(Oid::ReceiveOk, &mut value, |_| {}, &mut wait), Ok(4));
    assert_eq!(value[..4], 1u32.to_le_bytes());
    let unknown = queue.query(Oid(0x1234), &mut value, |_| {}, &mut wait);
    assert_eq!(unknown, Err(RequestError::Refused(Status::NotSupported)));
    let short = queue.query(Oid::SupportedList, &mut value, |_| {}, &mut wait);
    assert_eq!(short, Err(RequestError::Length(144)));
    let long = queue.set(Oid::CurrentPacketFilter, &[0; 700], |_| {}, &mut wait);
    assert_eq!(long, Err(RequestError::Length(700)));
    let bad = queue.set(Oid::CurrentPacketFilter, &[0], |_| {}, &mut wait);
    assert_eq!(bad, Err(RequestError::Refused(Status::InvalidLength)));
    // Nothing more comes.
    queue.set_filter(PacketFilter(0), |_| {}, &mut wait).unwrap();
    queue.send(&frame(ME, YOU, 60, 0), &PLAIN).unwrap();
    while rig.queues[0].in_flight() > 0 || rig.queues[0].has_data() {
        assert!(rig.wait(0).is_empty());
    }
    rig.stop();
}

#[test]
fn halting_ends_all_that_is_on_its_way() {
    let (mut rig, _) = looped();
    for n in 0..50 {
        rig.queues[0].send(&frame(ME, YOU, 1514, n), &PLAIN).unwrap();
    }
    let (queue, mut end) = (rig.queues.remove(0), rig.ends.remove(0));
    let mut seen = 0;
    let count = |event: Event<'_, _>| seen += u32::from(matches!(event, Event::Received(_)));
    // It ends when all packets are completed; what comes back is not wanted any more.
    queue.halt(count, || end.wait_interrupt(PATIENCE)).unwrap();
    assert!(seen <= 50);
    end.request_stop();
    assert!(end.wait_closed(PATIENCE));
}
