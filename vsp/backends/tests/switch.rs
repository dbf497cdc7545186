//! The virtual switch, from the NICs' side.
#![allow(unsafe_code)]

use std::time::Duration;

use backends::net::offload::{Checksum, Segmentation, Segments};
use backends::net::switch::vlan::{PortVlan, VlanSet};
use backends::net::switch::{Port, PortOptions, Switch, SwitchOptions};
use backends::net::{
    Completion, Completions, Counters, Dropped, Frame, MacAddr, Network, Offload, Offloads, Queue,
    QueueConfig,
};
use backends::uring::{Tag, Uring};
use proptest::prelude::*;

/// A NIC with one queue: what it receives, and a buffer for each frame to come.
struct Nic {
    uring: Uring,
    queue: Box<dyn Queue>,
    done: Completions,
    buffers: Vec<Vec<u8>>,
    received: Vec<(Vec<u8>, Offload)>,
    links: Vec<bool>,
}

impl Nic {
    fn new(port: &Port, buffers: usize) -> Self {
        Self::with(port, 0, buffers, 10_000)
    }

    fn with(port: &Port, index: u16, buffers: usize, size: usize) -> Self {
        let mut uring = Uring::new(8).unwrap();
        let config = QueueConfig { index, tag: Tag(3), sends: 64, receives: 512 };
        let queue = port.queue(config, &mut uring).unwrap();
        let mut nic = Self {
            uring,
            queue,
            done: Completions::with_capacity(1024),
            buffers: vec![vec![0; size]; buffers],
            received: Vec::new(),
            links: Vec::new(),
        };
        (0..buffers).for_each(|id| nic.offer(id));
        nic
    }

    fn offer(&mut self, id: usize) {
        let (first, second) = self.buffers[id].split_at_mut(13);
        let pieces = [first.into(), second.into()];
        // SAFETY: the buffers live as long as the queue, and are looked into when they are back.
        unsafe { self.queue.offer(id as u32, &pieces, &mut self.uring, &mut self.done) };
    }

    fn send(&mut self, bytes: &[u8], offload: Offload) -> Result<(), Dropped> {
        let mut bytes = bytes.to_vec();
        let len = bytes.len() as u32;
        let (first, second) = bytes.split_at_mut(len as usize / 3);
        let pieces = [first.into(), second.into()];
        let frame = Frame { id: 5, len, buffers: &pieces, offload };
        // SAFETY: a switch is done with a frame when the call returns, as its completion tells.
        unsafe { self.queue.send(frame, &mut self.uring, &mut self.done) };
        let mut result = None;
        while let Some(completion) = self.done.pop() {
            match completion {
                Completion::Sent { id: 5, result: sent } => result = Some(sent),
                other => panic!("{other:?}"),
            }
        }
        self.turn();
        result.expect("the frame has ended")
    }

    /// A turn of a worker; frames go to `received` and their buffers back to the switch.
    fn turn(&mut self) {
        self.uring.submit().unwrap();
        while let Some(cqe) = self.uring.next() {
            self.queue.complete(&cqe, &mut self.uring, &mut self.done);
        }
        self.queue.turn(&mut self.uring, &mut self.done);
        while let Some(completion) = self.done.pop() {
            match completion {
                Completion::Received { id, len, offload } => {
                    let frame = self.buffers[id as usize][..len as usize].to_vec();
                    self.received.push((frame, offload));
                    self.offer(id as usize);
                }
                Completion::Link(up) => self.links.push(up),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self) {
        if self.received.is_empty() && self.queue.prepare_to_sleep() {
            self.uring.submit_and_wait_timeout(1, Duration::from_secs(10)).unwrap();
        }
    }

    /// What has come since the last time.
    fn take(&mut self) -> Vec<Vec<u8>> {
        self.turn();
        self.turn();
        self.received.drain(..).map(|(frame, _)| frame).collect()
    }
}

fn switch() -> Switch {
    Switch::new(SwitchOptions::new("test"))
}

const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xa]);
const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xb]);
const C: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xc]);

fn frame(to: MacAddr, from: MacAddr, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &[0x88, 0xb5], payload].concat()
}

fn tagged(tci: u16, to: MacAddr, from: MacAddr, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &[0x81, 0], &tci.to_be_bytes(), &[0x88, 0xb5], payload].concat()
}

fn plain(nic: &mut Nic, bytes: &[u8]) {
    nic.send(bytes, Offload::NONE).unwrap();
}

#[test]
fn an_address_is_learnt_and_moves() {
    let switch = switch();
    let ports: Vec<_> = (0..3).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    let [mut a, mut b, mut c] = [0, 1, 2].map(|number| Nic::new(&ports[number], 4));
    let question = frame(B, A, b"where is B?");
    plain(&mut a, &question);
    assert_eq!((b.take(), c.take(), a.take()), (vec![question.clone()], vec![question], vec![]));
    let answer = frame(A, B, &[7; 2500]);
    plain(&mut b, &answer);
    assert_eq!((a.take(), c.take()), (vec![answer], vec![]));
    let direct = frame(B, A, b"thanks");
    plain(&mut a, &direct);
    assert_eq!((b.take(), c.take()), (vec![direct.clone()], vec![]));
    // B has moved to the third port; a frame to a station on the sender's own port goes nowhere.
    plain(&mut c, &frame(MacAddr::BROADCAST, B, b"here now"));
    assert_eq!((a.take().len(), b.take().len()), (1, 1));
    plain(&mut a, &direct);
    assert_eq!((b.take(), c.take()), (vec![], vec![direct]));
    plain(&mut c, &frame(B, C, b"to my neighbour"));
    assert_eq!((a.take(), b.take()), (vec![], vec![]));
    // Where it was is forgotten with the port.
    drop((ports, c));
    let statistics = a.queue.counters();
    assert_eq!((statistics.sent, statistics.received), (3, 2));
}

#[test]
fn what_a_switch_does_not_forward() {
    let switch = switch();
    let ports: Vec<_> = (0..2).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    let [mut a, mut b] = [0, 1].map(|number| Nic::new(&ports[number], 4));
    let refused = |nic: &mut Nic, bytes: &[u8]| nic.send(bytes, Offload::NONE).unwrap_err();
    let pause = MacAddr([1, 0x80, 0xc2, 0, 0, 1]);
    assert_eq!(refused(&mut a, &frame(pause, A, b"pause")), Dropped::Refused);
    assert_eq!(refused(&mut a, &frame(B, MacAddr::BROADCAST, b"from all")), Dropped::Refused);
    assert_eq!(refused(&mut a, &frame(B, A, &[0; 9001])), Dropped::Refused);
    assert_eq!(refused(&mut a, &tagged(0xfff, B, A, b"reserved")), Dropped::Refused);
    let cut_off = &tagged(5, B, A, b"")[..16];
    assert_eq!(refused(&mut a, cut_off), Dropped::Malformed);
    assert_eq!(refused(&mut a, &[0; 13]), Dropped::Malformed);
    assert_eq!(b.take(), Vec::<Vec<u8>>::new());
    let longest = frame(B, A, &[1; 9000]);
    plain(&mut a, &longest);
    assert_eq!(b.take(), vec![longest]);
    let Counters { sent, send_drops, .. } = ports[0].statistics();
    assert_eq!((sent, send_drops), (1, 6));
    let all = ports.iter().map(|port| (port.number(), port.statistics())).collect::<Vec<_>>();
    assert_eq!((switch.statistics(), all[1].1.received), (all, 1));
}

#[test]
fn a_frame_longer_than_the_buffer_is_dropped() {
    let switch = switch();
    let ports: Vec<_> = (0..2).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    let mut a = Nic::new(&ports[0], 0);
    let mut b = Nic::with(&ports[1], 0, 2, 100);
    plain(&mut a, &frame(B, A, &[1; 87]));
    plain(&mut a, &frame(B, A, &[2; 86]));
    assert_eq!(b.take(), vec![frame(B, A, &[2; 86])]);
    assert_eq!(ports[1].statistics().receive_drops, 1);
}

#[test]
fn vlans_are_apart() {
    let switch = switch();
    let port = |vlan| switch.port(PortOptions { vlan, isolated: false }).unwrap();
    let ten = [port(PortVlan::Access(10)), port(PortVlan::Access(10))];
    let twenty = port(PortVlan::Access(20));
    let allowed: VlanSet = [10].into_iter().collect();
    let trunk = port(PortVlan::Trunk { native: Some(20), allowed });
    let mut a = Nic::new(&ten[0], 4);
    let mut b = Nic::new(&ten[1], 4);
    let mut c = Nic::new(&twenty, 4);
    let mut t = Nic::new(&trunk, 4);
    plain(&mut a, &frame(MacAddr::BROADCAST, A, b"ten"));
    assert_eq!(b.take(), vec![frame(MacAddr::BROADCAST, A, b"ten")]);
    assert_eq!(c.take(), Vec::<Vec<u8>>::new());
    assert_eq!(t.take(), vec![tagged(10, MacAddr::BROADCAST, A, b"ten")]);
    // Priority stays with the frame; the native VLAN has no tag.
    plain(&mut a, &tagged(0xa000, MacAddr::BROADCAST, A, b"urgent"));
    assert_eq!(t.take(), vec![tagged(0xa00a, MacAddr::BROADCAST, A, b"urgent")]);
    assert_eq!(b.take(), vec![frame(MacAddr::BROADCAST, A, b"urgent")]);
    plain(&mut t, &frame(MacAddr::BROADCAST, C, b"native"));
    assert_eq!((a.take().len(), b.take().len()), (0, 0));
    assert_eq!(c.take(), vec![frame(MacAddr::BROADCAST, C, b"native")]);
    // An address of one VLAN is none of another.
    plain(&mut t, &tagged(10, A, C, b"down"));
    assert_eq!(a.take(), vec![frame(A, C, b"down")]);
    assert_eq!((b.take().len(), c.take().len()), (0, 0));
    for tci in [11, 10] {
        let wrong = if tci == 11 { &mut t } else { &mut a };
        let refused = wrong.send(&tagged(tci, B, A, b"no"), Offload::NONE);
        assert_eq!(refused, Err(Dropped::Refused));
    }
}

#[test]
fn isolated_ports_reach_the_others_alone() {
    let switch = switch();
    let isolated = PortOptions { isolated: true, ..PortOptions::default() };
    let ports = [
        switch.port(isolated.clone()).unwrap(),
        switch.port(isolated).unwrap(),
        switch.port(PortOptions::default()).unwrap(),
    ];
    let [mut a, mut b, mut c] = [0, 1, 2].map(|number| Nic::new(&ports[number], 4));
    plain(&mut a, &frame(MacAddr::BROADCAST, A, b"hello"));
    plain(&mut b, &frame(A, B, b"psst"));
    assert_eq!((a.take().len(), b.take().len(), c.take().len()), (0, 0, 1));
    plain(&mut c, &frame(MacAddr::BROADCAST, C, b"news"));
    assert_eq!((a.take().len(), b.take().len()), (1, 1));
}

/// A UDP datagram over IPv4 in an Ethernet frame, its checksum yet to be finished.
fn datagram(payload: usize, tag: bool) -> (Vec<u8>, Offload) {
    let mut frame = [&B.0[..], &A.0].concat();
    if tag {
        frame.extend([0x81, 0, 0, 9]);
    }
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(((payload + 28) as u16).to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 7, 0, 7]);
    let start = frame.len() as u16 - 4;
    frame.extend(((payload + 8) as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..payload).map(|at| at as u8));
    (frame, Offload { checksum: Checksum::Partial { start, offset: 6 }, segments: None })
}

#[test]
fn offloads_pass_and_are_done_for_those_who_take_none() {
    let switch = switch();
    let ports: Vec<_> = (0..3).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    ports[1].set_receive_offloads(Offloads::ALL).unwrap();
    let mut a = Nic::new(&ports[0], 0);
    let mut b = Nic::with(&ports[1], 0, 4, 70_000);
    let mut c = Nic::new(&ports[2], 2);
    for tag in [false, true] {
        let (bytes, mut offload) = datagram(20_000, tag);
        let segments = Segments { kind: Segmentation::Udp, ecn: false, size: 1472, header_len: 0 };
        offload.segments = Some(segments);
        a.send(&bytes, offload).unwrap();
        b.turn();
        assert_eq!(b.received.drain(..).collect::<Vec<_>>(), [(bytes, offload)]);
        // Two buffers at a time.
        let headers = if tag { 46 } else { 42 };
        let (mut payload, mut count) = (Vec::new(), 0);
        for _ in 0..7 {
            c.turn();
            for (bytes, offload) in c.received.drain(..) {
                assert_eq!(offload, Offload::NONE);
                assert_eq!(bytes[12..14], if tag { [0x81, 0] } else { [8, 0] });
                assert_ne!(bytes[headers - 2..headers], [0, 0]);
                payload.extend_from_slice(&bytes[headers..]);
                count += 1;
            }
        }
        assert_eq!(count, 14);
        assert_eq!(payload.len(), 20_000);
        assert!(payload.iter().enumerate().all(|(at, byte)| *byte == at as u8));
    }
    let (bytes, mut offload) = datagram(100, false);
    offload.checksum = Checksum::Partial { start: 34, offset: 200 };
    assert_eq!(a.send(&bytes, offload), Err(Dropped::Malformed));
}

/// The offload's places move with the tag that a port puts in or takes off.
#[test]
fn tags_move_the_places_in_an_offload() {
    let switch = switch();
    let access = PortOptions { vlan: PortVlan::Access(9), isolated: false };
    let ports = [switch.port(access).unwrap(), switch.port(PortOptions::default()).unwrap()];
    ports.iter().for_each(|port| port.set_receive_offloads(Offloads::ALL).unwrap());
    let [mut a, mut b] = [0, 1].map(|number| Nic::new(&ports[number], 2));
    let (without, with) = (datagram(64, false), datagram(64, true));
    a.send(&without.0, without.1).unwrap();
    b.turn();
    assert_eq!(b.received.pop(), Some(with.clone()));
    b.send(&with.0, with.1).unwrap();
    a.turn();
    assert_eq!(a.received.pop(), Some(without));
}

#[test]
fn one_that_does_not_receive_holds_up_nobody() {
    let switch = switch();
    let ports: Vec<_> = (0..3).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    let mut a = Nic::new(&ports[0], 0);
    let mut deaf = Nic::new(&ports[1], 0);
    let mut c = Nic::new(&ports[2], 8);
    deaf.send(&frame(A, B, b"I am B"), Offload::NONE).unwrap();
    c.turn();
    c.send(&frame(A, C, b"I am C"), Offload::NONE).unwrap();
    c.received.clear();
    let (mut sent, mut dropped) = (0, 0);
    for round in 0..2000u32 {
        match a.send(&frame(B, A, &round.to_be_bytes()), Offload::NONE) {
            Ok(()) => sent += 1,
            Err(Dropped::NoRoom) => dropped += 1,
            other => panic!("{other:?}"),
        }
        plain(&mut a, &frame(C, A, &round.to_be_bytes()));
        assert_eq!(c.take(), vec![frame(C, A, &round.to_be_bytes())]);
    }
    // C's own frame took one place, as nobody knew A then.
    assert_eq!((sent, dropped), (511, 1489));
    assert_eq!(ports[1].statistics().receive_drops, 1489);
    assert_eq!(ports[0].statistics().send_drops, 1489);
    // What waited is in order, and then there is room again.
    deaf.buffers = vec![vec![0; 64]; 600];
    (0..600).for_each(|id| deaf.offer(id));
    deaf.done = Completions::with_capacity(2000);
    let got = deaf.take();
    assert_eq!(got.len(), 512);
    let numbers =
        got.iter().skip(1).map(|frame| u32::from_be_bytes(frame[14..].try_into().unwrap()));
    assert!(numbers.eq(0..511));
}

#[test]
fn a_flow_stays_on_its_queue() {
    let switch = switch();
    let ports: Vec<_> = (0..2).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    let mut a = Nic::new(&ports[0], 0);
    let mut queues: Vec<_> = (0..4).map(|index| Nic::with(&ports[1], index, 64, 200)).collect();
    let twice = ports[1].queue(
        QueueConfig { index: 0, tag: Tag(1), sends: 1, receives: 1 },
        &mut Uring::new(2).unwrap(),
    );
    assert_eq!(twice.err().map(|error| error.kind()), Some(std::io::ErrorKind::ResourceBusy));
    for _ in 0..2 {
        for port in 0..64u8 {
            let (mut bytes, _) = datagram(4, false);
            bytes[35] = port;
            plain(&mut a, &bytes);
        }
    }
    let mut used = 0;
    for queue in &mut queues {
        let mut ports: Vec<_> = queue.take().iter().map(|frame| frame[35]).collect();
        used += usize::from(!ports.is_empty());
        ports.sort_unstable();
        assert!(ports.chunks(2).all(|pair| pair[0] == pair[1]), "{ports:?}");
    }
    assert!(used >= 3, "{used} queues used");
    // Those of a queue that is closed come to the others.
    queues.truncate(1);
    for port in 0..64u8 {
        let (mut bytes, _) = datagram(4, false);
        bytes[35] = port;
        plain(&mut a, &bytes);
    }
    assert_eq!(queues[0].take().len(), 64);
    assert_eq!(ports[1].statistics().received, 192);
}

#[test]
fn a_pulled_cable_is_noticed() {
    let switch = switch();
    let ports: Vec<_> = (0..2).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    let [mut a, mut b] = [0, 1].map(|number| Nic::new(&ports[number], 4));
    plain(&mut b, &frame(A, B, b"I am B"));
    a.turn();
    a.received.clear();
    assert!(a.queue.prepare_to_sleep());
    ports[0].plug(false);
    a.uring.submit_and_wait(1).unwrap();
    a.turn();
    assert_eq!((&a.links[..], ports[0].link().up), (&[false][..], false));
    assert_eq!(a.send(&frame(B, A, b"x"), Offload::NONE), Err(Dropped::LinkDown));
    plain(&mut b, &frame(A, B, b"lost"));
    ports[0].plug(true);
    assert_eq!(a.take(), Vec::<Vec<u8>>::new());
    assert_eq!(a.links, [false, true]);
    plain(&mut b, &frame(A, B, b"found"));
    assert_eq!(a.take(), vec![frame(A, B, b"found")]);
}

#[test]
fn a_switch_has_so_many_ports() {
    let switch = switch();
    let mut ports: Vec<_> = (0..64).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    assert_eq!(ports[63].number(), 63);
    let error = switch.port(PortOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "switch test has no more than 64 ports");
    ports.remove(17);
    assert_eq!(switch.port(PortOptions::default()).unwrap().number(), 17);
}

/// Two workers that sleep between frames: none is lost, and none sleeps through one.
#[test]
fn sleepers_are_woken() {
    const ROUNDS: u32 = 3000;
    let switch = switch();
    let ports: Vec<_> = (0..2).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    std::thread::scope(|scope| {
        let (port, other) = (&ports[0], &ports[1]);
        let (ready, go) = std::sync::mpsc::channel();
        scope.spawn(move || {
            let mut nic = Nic::new(other, 8);
            ready.send(()).unwrap();
            let mut seen = 0;
            while seen < ROUNDS {
                for frame in nic.take() {
                    assert_eq!(frame[14..18], seen.to_be_bytes());
                    plain(&mut nic, &[&A.0[..], &B.0, &[0x88, 0xb5], &frame[14..]].concat());
                    seen += 1;
                }
                if seen < ROUNDS {
                    nic.sleep();
                }
            }
        });
        go.recv().unwrap();
        let mut nic = Nic::new(port, 8);
        let mut next = 0u32;
        while next < ROUNDS {
            plain(&mut nic, &frame(B, A, &next.to_be_bytes()));
            let mut answers = Vec::new();
            while answers.is_empty() {
                nic.sleep();
                answers = nic.take();
            }
            assert_eq!(answers, vec![frame(A, B, &next.to_be_bytes())]);
            next += 1;
        }
        assert_eq!(nic.queue.counters().received, u64::from(ROUNDS));
    });
}

proptest! {
    /// Whatever a NIC sends ends once, and what comes out of it fits where it goes.
    #[test]
    fn any_frame_ends(
        frames in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..300), 0u8..3, any::<bool>()), 1..20,
        ),
        start in 0u16..80,
        offset in 0u16..40,
        size in 0u16..200,
        kind in 0usize..5,
    ) {
        let switch = switch();
        let port = |vlan| switch.port(PortOptions { vlan, isolated: false }).unwrap();
        let ports = [port(PortVlan::default()), port(PortVlan::Access(1)), port(PortVlan::default())];
        ports[2].set_receive_offloads(Offloads::ALL).unwrap();
        let mut a = Nic::new(&ports[0], 0);
        let mut b = Nic::with(&ports[1], 0, 300, 120);
        let mut c = Nic::with(&ports[2], 0, 300, 400);
        let kinds = [Segmentation::Tcp4, Segmentation::Tcp6, Segmentation::Udp];
        let segments = kinds.get(kind).map(|kind| Segments { kind: *kind, ecn: false, size, header_len: 9 });
        let checksum = if kind < 4 { Checksum::Partial { start, offset } } else { Checksum::Unknown };
        let offload = Offload { checksum, segments };
        let mut sent = 0;
        for (mut bytes, ethernet, tag) in frames {
            if let Some(kind) = bytes.get_mut(12..14) {
                kind.copy_from_slice(&[[8, 0], [0x86, 0xdd], [0x81, 0]][usize::from(ethernet)]);
            }
            if let (Some(source), true) = (bytes.get_mut(6), tag) {
                *source &= !1;
            }
            sent += u64::from(a.send(&bytes, offload).is_ok());
            b.turn();
            c.turn();
            prop_assert!(b.received.drain(..).all(|(frame, _)| frame.len() <= 120));
            for (frame, offload) in c.received.drain(..) {
                prop_assert!(offload.fits(frame.len()));
            }
        }
        prop_assert_eq!(a.queue.counters().sent, sent);
        prop_assert_eq!(c.queue.counters().received, sent - c.queue.counters().receive_drops);
    }
}

/// A worker whose guest broke its ring drops what it has, its io_uring first.
#[test]
fn a_worker_that_gives_up_leaves_its_port_to_the_next() {
    let switch = switch();
    let ports: Vec<_> = (0..2).map(|_| switch.port(PortOptions::default()).unwrap()).collect();
    let mut a = Nic::new(&ports[0], 4);
    for round in 0..20 {
        let mut b = Nic::new(&ports[1], 4);
        b.send(&frame(A, B, b"I am B"), Offload::NONE).unwrap();
        assert_eq!(a.take().len(), 1, "round {round}");
        a.send(&frame(B, A, b"not taken"), Offload::NONE).unwrap();
        drop(b);
    }
}
