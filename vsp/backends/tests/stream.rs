//! Networks behind a stream socket, and passt behind one where it is installed.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use backends::net::stream::Stream;
use backends::net::user::{Forward, Protocol, StartError, User};
use backends::net::{
    Completion, Completions, Dropped, Frame, Network, Offload, Queue, QueueConfig,
};
use backends::uring::{Tag, Uring};

/// A worker with the network's one queue.
struct Nic {
    uring: Uring,
    queue: Box<dyn Queue>,
    done: Completions,
    buffers: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
    sent: Vec<Result<(), Dropped>>,
    /// What is still to be sent; the index is the frame's number.
    frames: Vec<Vec<u8>>,
    down: bool,
}

impl Nic {
    fn new(network: &dyn Network, buffers: usize, size: usize) -> Self {
        let mut uring = Uring::new(16).unwrap();
        let config = QueueConfig { index: 0, tag: Tag(1), sends: 100, receives: 64 };
        let queue = network.queue(config, &mut uring).unwrap();
        let mut nic = Self {
            uring,
            queue,
            done: Completions::with_capacity(256),
            buffers: vec![vec![0; size]; buffers],
            received: Vec::new(),
            sent: Vec::new(),
            frames: Vec::new(),
            down: false,
        };
        (0..buffers).for_each(|id| nic.offer(id));
        nic
    }

    fn offer(&mut self, id: usize) {
        let (first, second) = self.buffers[id].split_at_mut(10);
        let pieces = [first.into(), second.into()];
        // SAFETY: the buffers live as long as the queue, and are looked into when they are back.
        unsafe { self.queue.offer(id as u32, &pieces, &mut self.uring, &mut self.done) };
    }

    fn send(&mut self, bytes: &[u8]) {
        self.frames.push(bytes.to_vec());
        let id = self.frames.len() - 1;
        let len = bytes.len();
        let (first, second) = self.frames[id].split_at_mut(len / 2);
        let pieces = [first.into(), second.into()];
        let frame =
            Frame { id: id as u32, len: len as u32, buffers: &pieces, offload: Offload::NONE };
        // SAFETY: the frames are kept until the end.
        unsafe { self.queue.send(frame, &mut self.uring, &mut self.done) };
    }

    fn turn(&mut self) {
        self.queue.turn(&mut self.uring, &mut self.done);
        self.uring.submit_and_wait_timeout(1, Duration::from_millis(20)).unwrap();
        while let Some(cqe) = self.uring.next() {
            self.queue.complete(&cqe, &mut self.uring, &mut self.done);
        }
        while let Some(completion) = self.done.pop() {
            match completion {
                Completion::Received { id, len, .. } => {
                    self.received.push(self.buffers[id as usize][..len as usize].to_vec());
                    self.offer(id as usize);
                }
                Completion::Sent { result, .. } => self.sent.push(result),
                Completion::Link(up) => self.down = !up,
                Completion::Returned { .. } => {}
            }
        }
    }

    /// Turns until it is so.
    fn until(&mut self, mut is_so: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_so(self) {
            assert!(Instant::now() < deadline, "it did not happen");
            self.turn();
        }
    }

    fn close(&mut self) {
        self.queue.recall(&mut self.uring, &mut self.done);
        self.until(|nic| nic.queue.in_flight() == 0);
    }
}

fn stream() -> (Stream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (Stream::new(ours, "test", 1500).unwrap(), theirs)
}

fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

fn numbered(number: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; 60 + number * 37 % 9000];
    frame[14..18].copy_from_slice(&(number as u32).to_be_bytes());
    frame
}

#[test]
fn many_frames_leave_in_order_though_the_socket_fills() {
    let (network, mut peer) = stream();
    let reader = std::thread::spawn(move || {
        for number in 0..1000 {
            let mut len = [0; 4];
            peer.read_exact(&mut len).unwrap();
            let mut frame = vec![0; u32::from_be_bytes(len) as usize];
            peer.read_exact(&mut frame).unwrap();
            assert_eq!(frame, numbered(number));
            if number % 100 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        peer
    });
    let mut nic = Nic::new(&network, 0, 16);
    for number in 0..1000 {
        nic.until(|nic| nic.queue.in_flight() < 100);
        nic.send(&numbered(number));
    }
    nic.until(|nic| nic.queue.in_flight() == 0);
    assert!(nic.sent.iter().all(Result::is_ok));
    assert_eq!((nic.sent.len(), nic.queue.counters().sent), (1000, 1000));
    drop(reader.join().unwrap());
}

#[test]
fn frames_come_however_they_are_cut() {
    let (network, mut peer) = stream();
    let writer = std::thread::spawn(move || {
        let all: Vec<u8> = (0..300).flat_map(|number| framed(&numbered(number))).collect();
        let mut rest = &all[..];
        let mut len = 1;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(len.min(rest.len()));
            peer.write_all(now).unwrap();
            (rest, len) = (later, len * 7 % 9973);
        }
        peer
    });
    let mut nic = Nic::new(&network, 3, 10_000);
    nic.until(|nic| nic.received.len() == 300);
    assert!(nic.received.iter().enumerate().all(|(number, frame)| *frame == numbered(number)));
    drop(writer.join().unwrap());
    nic.until(|nic| nic.down);
    nic.send(&numbered(1));
    nic.until(|nic| nic.sent == [Err(Dropped::LinkDown)]);
}

#[test]
fn a_queue_can_be_closed_within_a_frame_and_opened_again() {
    let (network, mut peer) = stream();
    let mut nic = Nic::new(&network, 2, 2000);
    let (first, second) = (framed(&numbered(1)), framed(&numbered(2)));
    peer.write_all(&[&first[..], &second[..50]].concat()).unwrap();
    nic.until(|nic| nic.received.len() == 1);
    let mut uring = Uring::new(2).unwrap();
    let config = QueueConfig { index: 0, tag: Tag(2), sends: 1, receives: 1 };
    assert!(network.queue(config, &mut uring).is_err());
    nic.close();
    drop(nic);
    let mut nic = Nic::new(&network, 2, 2000);
    peer.write_all(&second[50..]).unwrap();
    nic.until(|nic| nic.received.len() == 1);
    assert_eq!(nic.received, [numbered(2)]);
    nic.send(&numbered(3));
    nic.until(|nic| nic.sent.len() == 1);
    let mut bytes = vec![0; numbered(3).len() + 4];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, framed(&numbered(3)));
}

#[test]
fn what_is_no_frame() {
    let (network, mut peer) = stream();
    let mut nic = Nic::new(&network, 2, 100);
    // Too short, too long for the buffer, right, and then a length that no frame has.
    let frames = [&framed(&[1; 5])[..], &framed(&[2; 101]), &framed(&[3; 100])].concat();
    peer.write_all(&frames).unwrap();
    nic.until(|nic| nic.received.len() == 1);
    assert_eq!(nic.received, [[3; 100]]);
    assert_eq!(nic.queue.counters().receive_drops, 2);
    peer.write_all(&[0, 9, 0, 0]).unwrap();
    nic.until(|nic| nic.down);
    assert!(!network.link().up);
}

/// A DHCP discovery from the guest, as RFC 2131 has it.
fn discovery() -> Vec<u8> {
    let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let mut bootp = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0, 0x80, 0];
    bootp.extend([0; 16]);
    bootp.extend(mac);
    bootp.extend([0; 202]);
    bootp.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((28 + bootp.len() as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let words = frame[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let sum = !((sum >> 16) + (sum & 0xffff)) as u16;
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([0, 68, 0, 67]);
    frame.extend((8 + bootp.len() as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(bootp);
    frame
}

/// passt offers an address, and leads a connection to the host's port to the guest.
#[test]
fn passt_serves_a_guest() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = "127.0.0.1".parse().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, address, host: port, guest: 8080 };
    let user = match User::start(1500, &[forward]) {
        Ok(user) => user,
        Err(error @ StartError::Missing) => return eprintln!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    let mut nic = Nic::new(&user, 8, 2000);
    nic.send(&discovery());
    let is_udp = |frame: &[u8], port: u16| {
        frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == port.to_be_bytes()
    };
    nic.until(|nic| nic.received.iter().any(|frame| is_udp(frame, 68)));
    let offer = nic.received.iter().find(|frame| is_udp(frame, 68)).unwrap();
    // A reply to this transaction, with an address for us.
    assert_eq!((offer[42], &offer[46..50]), (2, &[1, 2, 3, 4][..]));
    assert_ne!(offer[58..62], [0; 4]);

    let connecting = std::thread::spawn(move || {
        TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(5))
    });
    let is_tcp = |frame: &Vec<u8>| {
        frame.len() > 38
            && frame[12..14] == [8, 0]
            && frame[23] == 6
            && frame[36..38] == 8080u16.to_be_bytes()
    };
    nic.until(|nic| nic.received.iter().any(is_tcp));
    let pid = user.pid();
    nic.close();
    drop((nic, user));
    assert!(!std::path::Path::new(&format!("/proc/{pid}/fd")).exists());
    drop(connecting.join());
}

/// A port that is taken is said in one line.
#[test]
fn passt_says_why_it_ends() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = taken.local_addr().unwrap().port();
    let address = "127.0.0.1".parse().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, address, host, guest: 80 };
    match User::start(1500, &[forward]) {
        Err(StartError::Missing) => eprintln!("skipped: passt is not installed"),
        Err(StartError::Ended { said }) => assert!(said.contains(&host.to_string()), "{said}"),
        other => panic!("{other:?}"),
    }
}

/// A worker whose guest broke its ring drops what it has, its io_uring first. What had come and was
/// not passed on, and what was under way, are the next worker's.
#[test]
fn a_worker_that_gives_up_leaves_the_stream_to_the_next() {
    let (network, mut peer) = stream();
    let mut nic = Nic::new(&network, 4, 2000);
    peer.write_all(&framed(&numbered(1))).unwrap();
    nic.until(|nic| nic.received.len() == 1);
    // The kernel waits for more by itself, and gets some that the worker does not hear of.
    nic.turn();
    let late = framed(&numbered(2));
    peer.write_all(&late[..70]).unwrap();
    drop(nic);
    assert!(network.link().up);
    peer.write_all(&late[70..]).unwrap();
    peer.write_all(&framed(&numbered(3))).unwrap();
    let mut nic = Nic::new(&network, 4, 2000);
    nic.until(|nic| nic.received.len() == 2);
    assert_eq!(nic.received, [numbered(2), numbered(3)]);
    nic.send(&numbered(4));
    nic.until(|nic| nic.sent == [Ok(())]);
    let mut bytes = framed(&numbered(4));
    let expected = bytes.clone();
    bytes.fill(0);
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, expected);
}

/// As often as guests break rings: a frame of which the other side has a part gets its rest, out of
/// what the worker left behind, and the next worker's frames follow it.
#[test]
fn a_frame_that_was_begun_is_ended_by_the_next_worker() {
    let (network, mut peer) = stream();
    let long = |number: u8| vec![number; 60_000];
    for number in 0..3 {
        let mut nic = Nic::new(&network, 1, 2000);
        // More than the socket holds, so that some of it stays in the queue.
        (0..20).for_each(|_| nic.send(&long(number)));
        nic.turn();
        nic.turn();
        assert!(nic.queue.in_flight() > 1);
        drop(nic);
    }
    assert!(network.link().up);
    let mut nic = Nic::new(&network, 1, 2000);
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        while seen.last() != Some(&9) {
            let mut len = [0; 4];
            peer.read_exact(&mut len).unwrap();
            let mut frame = vec![0; u32::from_be_bytes(len) as usize];
            peer.read_exact(&mut frame).unwrap();
            assert_eq!((frame.len(), frame.iter().all(|byte| *byte == frame[0])), (60_000, true));
            seen.push(frame[0]);
        }
        seen
    });
    nic.send(&long(9));
    nic.until(|nic| nic.sent == [Ok(())]);
    let seen = reader.join().unwrap();
    assert!(seen.len() > 1 && seen.is_sorted(), "{seen:?}");
}
