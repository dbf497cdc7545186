//! Switches of several machines joined at a socket, and what else may be at its other end.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backends::net::capture::Capture;
use backends::net::offload::{Checksum, Segmentation, Segments};
use backends::net::switch::{Port, PortOptions, Switch, SwitchOptions};
use backends::net::uplink::Uplink;
use backends::net::{
    Completion, Completions, Frame, MacAddr, Network, Offload, Offloads, Queue, QueueConfig,
};
use backends::uring::{Tag, Uring};

const PATIENCE: Duration = Duration::from_secs(20);

/// What machines send to each other until they have met.
const GREETING: &str = "are you there?";

/// A machine with one NIC on its switch.
struct Machine {
    uring: Uring,
    queue: Box<dyn Queue>,
    done: Completions,
    buffers: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
    address: MacAddr,
    _port: Port,
    switch: Switch,
    uplink: Option<Uplink>,
}

impl Machine {
    fn new(number: u8) -> Self {
        let mut uring = Uring::new(8).unwrap();
        let switch = Switch::new(SwitchOptions::new("test"));
        let port = switch.port(PortOptions::default()).unwrap();
        let config = QueueConfig { index: 0, tag: Tag(3), sends: 64, receives: 512 };
        let queue = port.queue(config, &mut uring).unwrap();
        let mut machine = Self {
            uring,
            queue,
            done: Completions::with_capacity(1024),
            buffers: vec![vec![0; 10_000]; 64],
            received: Vec::new(),
            address: MacAddr([2, 0, 0, 0, 0, number]),
            _port: port,
            switch,
            uplink: None,
        };
        (0..64).for_each(|id| machine.offer(id));
        machine
    }

    fn at(number: u8, path: &Path) -> Self {
        let mut machine = Self::new(number);
        machine.uplink = Some(Uplink::to_socket(&machine.switch, path, None).unwrap());
        machine
    }

    fn offer(&mut self, id: usize) {
        let buffers = [self.buffers[id].as_mut_slice().into()];
        // SAFETY: the buffers live as long as the queue, and are looked into when they are back.
        unsafe { self.queue.offer(id as u32, &buffers, &mut self.uring, &mut self.done) };
    }

    fn send(&mut self, frame: &[u8], offload: Offload) {
        let mut bytes = frame.to_vec();
        let len = bytes.len() as u32;
        let frame = Frame { id: 0, len, buffers: &[bytes.as_mut_slice().into()], offload };
        // SAFETY: a switch is done with a frame when the call returns.
        unsafe { self.queue.send(frame, &mut self.uring, &mut self.done) };
        self.turn();
    }

    /// A frame to this one, of somebody who is no machine.
    fn hello(&self) -> Vec<u8> {
        [&self.address.0[..], &[2, 0, 0, 0, 9, 9], &[0x88, 0xb5], b"hello", &[0; 60]].concat()
    }

    /// A frame to another machine.
    fn frame(&self, to: &Self, text: &str) -> Vec<u8> {
        [&to.address.0[..], &self.address.0, &[0x88, 0xb5], text.as_bytes(), &[0; 60]].concat()
    }

    fn turn(&mut self) {
        self.uring.submit().unwrap();
        while let Some(cqe) = self.uring.next() {
            self.queue.complete(&cqe, &mut self.uring, &mut self.done);
        }
        self.queue.turn(&mut self.uring, &mut self.done);
        while let Some(completion) = self.done.pop() {
            if let Completion::Received { id, len, .. } = completion {
                self.received.push(self.buffers[id as usize][..len as usize].to_vec());
                self.offer(id as usize);
            }
        }
    }

    /// Waits for a frame that is no greeting: some of those are still on their way when the first has come.
    fn receive(&mut self) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.turn();
            self.forget_greetings();
            if !self.received.is_empty() {
                return self.received.remove(0);
            }
            assert!(Instant::now() < deadline, "no frame came");
            if self.queue.prepare_to_sleep() {
                self.uring.submit_and_wait_timeout(1, Duration::from_millis(50)).unwrap();
            }
        }
    }

    fn forget_greetings(&mut self) {
        self.received.retain(|frame| !frame[14..].starts_with(GREETING.as_bytes()));
    }

    /// Sends until the other has it: until then, they may not have met.
    fn reach(&mut self, other: &mut Self) {
        let deadline = Instant::now() + PATIENCE;
        let frame = self.frame(other, GREETING);
        loop {
            self.send(&frame, Offload::NONE);
            std::thread::sleep(Duration::from_millis(20));
            other.turn();
            let came = other.received.contains(&frame);
            other.received.clear();
            if came {
                return;
            }
            assert!(Instant::now() < deadline, "the other was not reached");
        }
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("lan.sock")
    }
}

fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

fn read_frame(socket: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    socket.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    socket.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn an_uplink_that_goes_at_once_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lan");
    let switch = Switch::new(SwitchOptions::new("test"));
    // Its thread may not even have begun.
    for _ in 0..200 {
        drop(Uplink::to_socket(&switch, &path, None).unwrap());
        assert!(!path.exists());
    }
}

#[test]
fn machines_meet_at_a_socket_and_the_first_forwards() {
    let folder = Folder::new();
    let [mut a, mut b, mut c] = [1, 2, 3].map(|number| Machine::at(number, &folder.socket()));
    a.reach(&mut b);
    b.reach(&mut a);
    c.reach(&mut a);
    b.reach(&mut c);
    c.reach(&mut b);
    // Two that know each other do not trouble a third.
    for number in 0..200 {
        let frame = b.frame(&c, &number.to_string());
        b.send(&frame, Offload::NONE);
        assert_eq!(c.receive(), frame);
    }
    a.turn();
    a.forget_greetings();
    assert!(a.received.is_empty());
    drop(a);
    // The others meet without the first.
    b.reach(&mut c);
    c.reach(&mut b);
    drop((b, c));
    assert!(!folder.socket().exists());
}

/// One file has what passes between the first machine and all others.
#[test]
fn what_passes_an_uplink_is_written_down() {
    let folder = Folder::new();
    let path = folder.0.path().join("lan.pcapng");
    let capture = Capture::create(&path, "lan").unwrap();
    let [mut a, mut b, mut c] = [1, 2, 3].map(Machine::new);
    a.uplink = Some(Uplink::to_socket(&a.switch, &folder.socket(), Some(&capture)).unwrap());
    drop(capture);
    for machine in [&mut b, &mut c] {
        machine.uplink = Some(Uplink::to_socket(&machine.switch, &folder.socket(), None).unwrap());
        machine.reach(&mut a);
        a.reach(machine);
    }
    // What stays on the first machine's switch does not pass.
    let sent = [a.frame(&b, "to b"), c.frame(&a, "from c"), a.frame(&a, "to nobody else")];
    a.send(&sent[0], Offload::NONE);
    assert_eq!(b.receive(), sent[0]);
    c.send(&sent[1], Offload::NONE);
    assert_eq!(a.receive(), sent[1]);
    a.send(&sent[2], Offload::NONE);
    drop((a, b, c));
    let written = std::fs::read(&path).unwrap();
    let passed =
        sent.map(|frame| written.windows(frame.len()).filter(|bytes| *bytes == frame).count());
    assert_eq!(passed, [1, 1, 0]);
}

#[test]
fn bursts_arrive_whole_and_in_order() {
    let folder = Folder::new();
    let [mut a, mut b] = [1, 2].map(|number| Machine::at(number, &folder.socket()));
    a.reach(&mut b);
    b.reach(&mut a);
    for burst in 0..20 {
        // No more than an inbox holds.
        let frames: Vec<_> = (0..400)
            .map(|number| {
                let mut frame = a.frame(&b, &format!("{burst} {number}"));
                frame.resize(60 + number * 7 % 1440, number as u8);
                frame
            })
            .collect();
        frames.iter().for_each(|frame| a.send(frame, Offload::NONE));
        for frame in frames {
            assert_eq!(b.receive(), frame);
        }
    }
}

#[test]
fn what_a_guest_left_to_its_nic_is_done_on_the_way() {
    let folder = Folder::new();
    let [mut a, mut b] = [1, 2].map(|number| Machine::at(number, &folder.socket()));
    a.reach(&mut b);
    // TCP over IPv4 with 5000 bytes of payload, to be cut at 1000.
    let payload: Vec<u8> = (0..5000u32).map(|at| at as u8).collect();
    let mut ip = [0; 20];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&5040u16.to_be_bytes());
    (ip[8], ip[9]) = (64, 6);
    let mut tcp = [0; 20];
    tcp[12] = 0x50;
    let header = [&b.address.0[..], &a.address.0, &[8, 0]].concat();
    let frame = [&header[..], &ip, &tcp, &payload].concat();
    let offload = Offload {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        segments: Some(Segments {
            kind: Segmentation::Tcp4,
            ecn: false,
            size: 1000,
            header_len: 54,
        }),
    };
    assert_eq!(offload.needs(), Offloads::CHECKSUM | Offloads::TSO4);
    a.send(&frame, offload);
    let mut came = Vec::new();
    for number in 0..5u32 {
        let segment = b.receive();
        assert_eq!(segment.len(), 1054);
        assert_eq!(segment[38..42], (number * 1000).to_be_bytes());
        assert_ne!(segment[50..52], [0, 0], "it has a checksum");
        came.extend_from_slice(&segment[54..]);
    }
    assert_eq!(came, payload);
}

#[test]
fn a_peer_that_breaks_the_protocol_goes_and_the_others_stay() {
    let folder = Folder::new();
    let [mut a, mut b] = [1, 2].map(|number| Machine::at(number, &folder.socket()));
    a.reach(&mut b);
    let mut bad = UnixStream::connect(folder.socket()).unwrap();
    bad.set_read_timeout(Some(PATIENCE)).unwrap();
    // One good frame, one too short to be any, one that no NIC takes, and one of no length.
    let good = a.hello();
    bad.write_all(&framed(&good)).unwrap();
    assert_eq!(a.receive(), good);
    bad.write_all(&framed(b"short")).unwrap();
    bad.write_all(&framed(&[7; 30_000])).unwrap();
    bad.write_all(&framed(&good)).unwrap();
    assert_eq!(a.receive(), good);
    bad.write_all(&[0; 4]).unwrap();
    assert!(matches!(bad.read(&mut [0]), Ok(0)));
    a.reach(&mut b);
    b.reach(&mut a);
}

#[test]
fn a_program_that_listens_gets_frames_and_may_come_back() {
    let folder = Folder::new();
    let listener = UnixListener::bind(folder.socket()).unwrap();
    let mut machine = Machine::at(1, &folder.socket());
    for _ in 0..2 {
        let (mut peer, _) = listener.accept().unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        // The uplink is plugged in when what the peer sends arrives.
        let hello = machine.hello();
        peer.write_all(&framed(&hello)).unwrap();
        assert_eq!(machine.receive(), hello);
        let frame = [&[0xff; 6][..], &machine.address.0, &[0x88, 0xb5], &[5; 100]].concat();
        machine.send(&frame, Offload::NONE);
        assert_eq!(read_frame(&mut peer), frame);
    }
}

#[test]
fn a_peer_that_reads_nothing_does_not_keep_a_machine_from_ending() {
    let folder = Folder::new();
    let mut machine = Machine::at(1, &folder.socket());
    let mut peer = UnixStream::connect(folder.socket()).unwrap();
    let hello = machine.hello();
    peer.write_all(&framed(&hello)).unwrap();
    assert_eq!(machine.receive(), hello);
    let frame = [&[0xff; 6][..], &machine.address.0, &[0x88, 0xb5], &[5; 1400]].concat();
    for _ in 0..3000 {
        machine.send(&frame, Offload::NONE);
    }
    std::thread::sleep(Duration::from_millis(100));
    drop(machine);
    assert!(!folder.socket().exists());
}
