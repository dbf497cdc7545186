//! A tap between a queue of ours and the host's own network, in a network namespace of its own.
//!
//! These tests make devices. Where that is not allowed they say so and pass.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use backends::net::offload::{Checksum, Segmentation, Segments};
use backends::net::tap::{OpenError, Tap, TapOptions};
use backends::net::{
    Completion, Completions, Dropped, Frame, Network, Offload, Offloads, Queue, QueueConfig,
};
use backends::uring::{Tag, Uring};

/// Runs a test in a thread with a network of its own.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: this thread alone gets another network; it shares nothing that depends on it.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0
            || Tap::open("probe", TapOptions::default()).is_err()
        {
            eprintln!("skipped: no right to make network devices");
            return;
        }
        test();
    });
    thread.join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A worker with one queue, and buffers that it offers and looks into.
struct Worker {
    uring: Uring,
    queue: Box<dyn Queue>,
    done: Completions,
    buffers: Vec<Vec<u8>>,
}

impl Worker {
    const SIZE: usize = 66 << 10;

    fn new(tap: &Tap, index: u16, buffers: usize) -> Self {
        let mut uring = Uring::new(64).unwrap();
        let config = QueueConfig { index, tag: Tag(1), sends: 8, receives: 64 };
        let queue = tap.queue(config, &mut uring).unwrap();
        let buffers = (0..buffers).map(|_| vec![0; Self::SIZE]).collect();
        let mut worker = Self { uring, queue, done: Completions::with_capacity(128), buffers };
        (0..worker.buffers.len()).for_each(|id| worker.offer(id, Self::SIZE));
        worker
    }

    /// In two pieces, to see that they are filled in order.
    fn offer(&mut self, id: usize, len: usize) {
        let (head, body) = self.buffers[id][..len].split_at_mut(14);
        let pieces = [head.into(), body.into()];
        // SAFETY: the buffers live as long as the queue, and are looked into when they are back.
        unsafe { self.queue.offer(id as u32, &pieces, &mut self.uring, &mut self.done) };
    }

    fn send(&mut self, bytes: &mut [u8], offload: Offload) -> Result<(), Dropped> {
        let len = bytes.len() as u32;
        let (head, body) = bytes.split_at_mut(20);
        let pieces = [head.into(), body.into()];
        let frame = Frame { id: 77, len, buffers: &pieces, offload };
        // SAFETY: the frame is not given up before its completion is there.
        unsafe { self.queue.send(frame, &mut self.uring, &mut self.done) };
        loop {
            match self.next().expect("a completion") {
                Completion::Sent { id: 77, result } => return result,
                Completion::Received { id, .. } => self.offer(id as usize, Self::SIZE),
                other => panic!("{other:?}"),
            }
        }
    }

    /// What happens next, within some seconds.
    fn next(&mut self) -> Option<Completion> {
        for round in 0..50 {
            self.queue.turn(&mut self.uring, &mut self.done);
            if round > 0 && self.queue.prepare_to_sleep() {
                self.uring.submit_and_wait_timeout(1, Duration::from_millis(100)).unwrap();
            } else {
                self.uring.submit().unwrap();
            }
            while let Some(cqe) = self.uring.next() {
                self.queue.complete(&cqe, &mut self.uring, &mut self.done);
            }
            if let Some(completion) = self.done.pop() {
                return Some(completion);
            }
        }
        None
    }

    /// What the next news of the link say.
    fn link(&mut self) -> bool {
        loop {
            match self.next().expect("news of the link") {
                Completion::Link(up) => return up,
                Completion::Received { id, .. } => self.offer(id as usize, Self::SIZE),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next frame that carries UDP to `port`; others, such as the kernel's own greetings, are
    /// let go.
    fn udp(&mut self, port: u16) -> (Vec<u8>, Offload) {
        loop {
            match self.next().expect("a frame") {
                Completion::Received { id, len, offload } => {
                    let frame = self.buffers[id as usize][..len as usize].to_vec();
                    self.offer(id as usize, Self::SIZE);
                    if frame[12..14] == [8, 0]
                        && frame[23] == 17
                        && frame[36..38] == port.to_be_bytes()
                    {
                        return (frame, offload);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A tap `name` with an address, and a neighbour there that exists in the kernel's table alone.
fn tap(name: &str, options: TapOptions) -> Tap {
    let tap = Tap::open(name, options).unwrap();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap_or_default();
    ip(&format!("addr add 10.9.0.1/24 dev {name}"));
    ip(&format!("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev {name} nud permanent"));
    tap
}

/// A UDP datagram from the neighbour, as it would be on a wire but for its checksum.
fn datagram(tap: &str, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = mac_of(tap).0.to_vec();
    frame.extend([2, 0, 0, 0, 0, 2, 8, 0]);
    let total = (28 + payload.len()) as u16;
    let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];
    header[2..4].copy_from_slice(&total.to_be_bytes());
    let sum: u32 =
        header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    header[10..12].copy_from_slice(&(!((sum >> 16) as u16 + sum as u16)).to_be_bytes());
    frame.extend(header);
    frame.extend(4000u16.to_be_bytes());
    frame.extend(to.to_be_bytes());
    frame.extend((total - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// Asked of the namespace; the mounted sysfs may be another's.
fn mac_of(tap: &str) -> backends::net::MacAddr {
    let output = Command::new("ip").args(["-o", "link", "show", tap]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).unwrap().parse().unwrap()
}

#[test]
fn frames_go_both_ways() {
    in_namespace(|| {
        let tap = tap("t0", TapOptions { mtu: Some(9000), ..TapOptions::default() });
        assert_eq!((tap.link().mtu, tap.link().queues, tap.link().up), (9000, 1, true));
        let mut worker = Worker::new(&tap, 0, 4);
        let socket = UdpSocket::bind("10.9.0.1:5000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        for round in 0..40u8 {
            socket.send_to(&[round; 900], "10.9.0.2:4000").unwrap();
            let (frame, offload) = worker.udp(4000);
            assert_eq!(offload, Offload::NONE);
            assert_eq!(frame[42..], [round; 900]);

            worker.send(&mut datagram("t0", 5000, &[round; 500]), Offload::NONE).unwrap();
            let mut bytes = [0; 1000];
            assert_eq!(socket.recv(&mut bytes).unwrap(), 500);
            assert_eq!(bytes[..500], [round; 500]);
        }
        // A burst, longer than there are buffers.
        for round in 0..100u8 {
            socket.send_to(&[round; 100], "10.9.0.2:4001").unwrap();
        }
        for round in 0..100u8 {
            assert_eq!(worker.udp(4001).0[42], round);
        }
        let counters = worker.queue.counters();
        assert_eq!((counters.sent, counters.send_drops), (40, 0));
        assert!(counters.received >= 140);
    });
}

#[test]
fn offloads_pass_both_ways() {
    in_namespace(|| {
        let tap = tap("t0", TapOptions::default());
        tap.set_receive_offloads(Offloads::CHECKSUM).unwrap();
        let mut worker = Worker::new(&tap, 0, 4);
        let socket = UdpSocket::bind("10.9.0.1:5000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(b"unsummed", "10.9.0.2:4000").unwrap();
        let (_, offload) = worker.udp(4000);
        assert_eq!(offload.checksum, Checksum::Partial { start: 34, offset: 6 });

        // A wrong checksum does not get through; one that is yet to be computed does.
        let mut frame = datagram("t0", 5000, b"wrong");
        frame[40..42].copy_from_slice(&[1, 1]);
        worker.send(&mut frame, Offload::NONE).unwrap();
        let partial =
            Offload { checksum: Checksum::Partial { start: 34, offset: 6 }, segments: None };
        worker.send(&mut datagram("t0", 5000, b"right"), partial).unwrap();
        let mut bytes = [0; 100];
        assert_eq!(socket.recv(&mut bytes).unwrap(), 5);
        assert_eq!(&bytes[..5], b"right");

        if tap.link().takes.contains(Offloads::USO) {
            let segments =
                Some(Segments { kind: Segmentation::Udp, ecn: false, size: 1000, header_len: 42 });
            worker
                .send(&mut datagram("t0", 5000, &[9; 4500]), Offload { segments, ..partial })
                .unwrap();
            let mut bytes = [0; 2000];
            let lengths: Vec<_> = (0..5).map(|_| socket.recv(&mut bytes).unwrap()).collect();
            assert_eq!(lengths, [1000, 1000, 1000, 1000, 500]);
        }
        let nonsense =
            Offload { checksum: Checksum::Partial { start: 34, offset: 600 }, segments: None };
        let refused = worker.send(&mut datagram("t0", 5000, b"odd"), nonsense);
        assert_eq!(refused, Err(Dropped::Malformed));
    });
}

#[test]
fn long_frames_are_dropped_and_buffers_come_back() {
    in_namespace(|| {
        let tap = tap("t0", TapOptions::default());
        let mut worker = Worker::new(&tap, 0, 1);
        let socket = UdpSocket::bind("10.9.0.1:5000").unwrap();
        socket.send_to(b"first", "10.9.0.2:4000").unwrap();
        worker.udp(4000);
        worker.queue.recall(&mut worker.uring, &mut worker.done);
        while worker.queue.in_flight() > 0 {
            assert_eq!(worker.next(), Some(Completion::Returned { id: 0 }));
        }
        worker.done = Completions::default();
        worker.offer(0, 200);
        socket.send_to(&[1; 159], "10.9.0.2:4000").unwrap();
        socket.send_to(&[2; 158], "10.9.0.2:4000").unwrap();
        let (frame, _) = worker.udp(4000);
        assert_eq!((frame.len(), frame[42]), (200, 2));
        assert_eq!(worker.queue.counters().receive_drops, 1);
    });
}

#[test]
fn queues_share_the_flows_and_one_that_is_closed_gets_none() {
    in_namespace(|| {
        let tap = tap("t0", TapOptions { queues: 2, mtu: None });
        let mut first = Worker::new(&tap, 0, 32);
        let error = tap
            .queue(QueueConfig { index: 0, tag: Tag(9), sends: 1, receives: 1 }, &mut first.uring)
            .err();
        assert_eq!(error.map(|error| error.kind()), Some(io::ErrorKind::ResourceBusy));
        let sockets: Vec<_> = (0..32).map(|_| UdpSocket::bind("10.9.0.1:0").unwrap()).collect();
        let ports = |worker: &mut Worker, count: usize| {
            (0..count).map(|_| worker.udp(4000).0[34..36].to_vec()).collect::<Vec<_>>()
        };
        let send = |bytes: &[u8], to: &str| {
            for socket in &sockets {
                socket.send_to(bytes, to).unwrap();
            }
        };
        // Only the first queue is open: all flows are its.
        send(b"x", "10.9.0.2:4000");
        assert_eq!(ports(&mut first, 32).len(), 32);
        let second = Worker::new(&tap, 1, 32);
        send(b"x", "10.9.0.2:4000");
        drop(second);
        send(b"last", "10.9.0.2:4001");
        for _ in 0..32 {
            first.udp(4001);
        }
        assert!(
            (32..64).contains(&(first.queue.counters().received - 32)),
            "{:?}",
            first.queue.counters()
        );
    });
}

#[test]
fn a_tap_that_is_deleted_takes_the_link_down() {
    in_namespace(|| {
        let tap = tap("t0", TapOptions::default());
        let mut worker = Worker::new(&tap, 0, 4);
        worker.send(&mut datagram("t0", 5000, b"there"), Offload::NONE).unwrap();
        let mut frame = datagram("t0", 5000, b"gone");
        ip("link del t0");
        assert!(!worker.link());
        assert_eq!(worker.send(&mut frame, Offload::NONE), Err(Dropped::LinkDown));
        assert!(!tap.link().up);
    });
}

#[test]
fn the_link_follows_the_tap() {
    in_namespace(|| {
        let tap = tap("t0", TapOptions { queues: 2, mtu: None });
        let mut first = Worker::new(&tap, 0, 4);
        let mut second = Worker::new(&tap, 1, 4);
        for up in [false, true, false, true] {
            ip(if up { "link set t0 up" } else { "link set t0 down" });
            assert_eq!([first.link(), second.link()], [up; 2]);
            assert_eq!(tap.link().up, up);
            let sent = first.send(&mut datagram("t0", 5000, b"is it up?"), Offload::NONE);
            assert_eq!(sent, if up { Ok(()) } else { Err(Dropped::LinkDown) });
        }
        // Other devices' news are no news, and frames come as before.
        ip("link set lo up");
        drop(second);
        ip("neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev t0 nud permanent");
        let socket = UdpSocket::bind("10.9.0.1:5000").unwrap();
        socket.send_to(b"again", "10.9.0.2:4000").unwrap();
        assert_eq!(first.udp(4000).0[42..], *b"again");
    });
}

#[test]
fn a_tap_that_is_down_has_no_link_at_first() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap");
        let tap = Tap::open("t0", TapOptions::default()).unwrap();
        assert!(!tap.link().up);
        let mut worker = Worker::new(&tap, 0, 4);
        ip("link set t0 up");
        assert!(worker.link());
    });
}

#[test]
fn a_tap_is_made_joined_and_removed() {
    in_namespace(|| {
        let exists = |name: &str| {
            Command::new("ip").args(["link", "show", name]).output().unwrap().status.success()
        };
        let tap = Tap::open("t1", TapOptions::default()).unwrap();
        assert!(exists("t1"));
        let error = Tap::open("t1", TapOptions::default()).unwrap_err();
        assert!(matches!(error, OpenError::Busy { .. }), "{error}");
        drop(tap);
        assert!(!exists("t1"));

        ip("tuntap add dev t2 mode tap");
        ip("tuntap add dev t3 mode tap multi_queue");
        drop(Tap::open("t2", TapOptions::default()).unwrap());
        drop(Tap::open("t3", TapOptions::default()).unwrap());
        drop(Tap::open("t3", TapOptions { queues: 2, mtu: None }).unwrap());
        assert!(exists("t2") && exists("t3"));
        for (name, queues) in [("t2", 2), ("lo", 1)] {
            let error = Tap::open(name, TapOptions { queues, mtu: None }).unwrap_err();
            assert!(matches!(error, OpenError::Unfit { .. }), "{name}: {error:?}");
        }
    });
}

/// A worker whose guest broke its ring drops what it has, its io_uring first, with buffers lent and
/// frames under way.
#[test]
fn a_worker_that_gives_up_leaves_its_tap_to_the_next() {
    in_namespace(|| {
        let tap = Tap::open("up0", TapOptions { queues: 2, ..TapOptions::default() }).unwrap();
        for round in 0..20 {
            let mut bytes = [2; 60];
            let pieces = [bytes.as_mut_slice().into()];
            let frame = Frame { id: 1, len: 60, buffers: &pieces, offload: Offload::NONE };
            let mut workers = [Worker::new(&tap, 0, 8), Worker::new(&tap, 1, 8)];
            for worker in &mut workers {
                worker.queue.turn(&mut worker.uring, &mut worker.done);
                // SAFETY: the bytes outlive the worker.
                unsafe { worker.queue.send(frame, &mut worker.uring, &mut worker.done) };
                if round % 2 == 0 {
                    worker.uring.submit().unwrap();
                }
                assert!(worker.queue.in_flight() > 0);
            }
        }
        let mut worker = Worker::new(&tap, 0, 8);
        assert_eq!(worker.send(&mut [2; 60], Offload::NONE), Ok(()));
    });
}
