//! A driver's hands on a NIC with its worker, on a switch with another one.

use std::sync::Condvar;
use std::sync::atomic::AtomicU32;

use backends::net::checksum;
use backends::net::offload::Offloads;
use backends::net::switch::{Port, PortOptions, Switch, SwitchOptions};
use backends::net::{Link, Queue, QueueConfig};
use backends::uring::Uring;
use hypervisor::Gpa;
use zerocopy::{FromBytes, IntoBytes};

use super::bits::{cause, ctrl, rctl, reg, rxcsum, rxd, status, tctl, txd};
use super::checksum::Checksums;
use super::descriptors::{Context, Data, Received};
use super::*;
use crate::pci::COMMAND_BUS_MASTER;

const COUNT: u32 = 64;
const TRANSMIT: u32 = 0x1000;
const RECEIVE: u32 = 0x2000;
const BUFFERS: u32 = 0x1_0000;
const FRAMES: u32 = 0x8_0000;

/// A line that remembers how often it rose.
#[derive(Default)]
struct Line {
    high: Mutex<bool>,
    changed: Condvar,
    rises: AtomicU32,
}

impl InterruptLine for Line {
    fn pulse(&self) {
        unreachable!("PCI's interrupts are levels");
    }

    fn set_level(&self, high: bool) {
        *self.high.lock().unwrap() = high;
        self.rises.fetch_add(high.into(), Ordering::Relaxed);
        self.changed.notify_all();
    }
}

impl Line {
    fn wait(&self) {
        drop(self.changed.wait_while(self.high.lock().unwrap(), |high| !*high).unwrap());
    }
}

/// A NIC and its driver.
struct Driver {
    memory: GuestMemory,
    line: Arc<Line>,
    decode: Arc<Decode>,
    registers: Arc<dyn Device>,
    ports: Arc<dyn Device>,
    nic: E1000,
    /// The next frame's place and descriptor, and the next descriptor to come back.
    place: u32,
    tail: u32,
    clean: u32,
    control: u32,
}

fn address(number: u8) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, 0, number])
}

impl Driver {
    fn new(number: u8, network: Arc<dyn Network>) -> Self {
        Self::with_mtu(number, network, 9000)
    }

    fn with_mtu(number: u8, network: Arc<dyn Network>, mtu: u16) -> Self {
        let memory = GuestMemory::new(2 << 20).unwrap();
        let config = E1000Config { address: address(number), mtu, network };
        let line = Arc::new(Line::default());
        let decode = Arc::new(Decode::fixed(COMMAND_BUS_MASTER));
        let nic = E1000::new(number, &config, &memory, decode.clone(), line.clone()).unwrap();
        let (registers, ports) = (nic.memory(), nic.ports());
        let mut driver = Self {
            memory,
            line,
            decode,
            registers,
            ports,
            nic,
            place: FRAMES,
            tail: 0,
            clean: 0,
            control: rctl::EN | rctl::BAM | rctl::SECRC,
        };
        driver.begin();
        driver
    }

    fn write(&self, offset: u32, value: u32) {
        self.registers.write(offset.into(), &value.to_le_bytes());
    }

    fn read(&self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.registers.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn begin(&mut self) {
        for (base, ring) in [(reg::TDBAL, TRANSMIT), (reg::RDBAL, RECEIVE)] {
            self.write(base, ring);
            self.write(base + 8, COUNT * 16);
        }
        for index in 0..COUNT {
            self.lend(index);
        }
        self.write(reg::RXCSUM, rxcsum::IPOFL | rxcsum::TUOFL);
        self.write(reg::TDH, 0);
        self.write(reg::TDT, 0);
        self.write(reg::RDT, COUNT - 1);
        self.write(reg::RCTL, self.control);
        self.write(reg::TCTL, tctl::EN);
        (self.tail, self.clean) = (0, 0);
    }

    /// Makes a receive descriptor the NIC's again.
    fn lend(&self, index: u32) {
        let at = u64::from(RECEIVE + index * 16);
        self.memory.write_obj(Gpa(at), &u64::from(BUFFERS + index * 2048)).unwrap();
        self.memory.write_obj(Gpa(at + 8), &0_u64).unwrap();
    }

    fn descriptor(&mut self, descriptor: &[u8]) {
        self.memory.write(Gpa(u64::from(TRANSMIT + self.tail * 16)), descriptor).unwrap();
        self.tail = (self.tail + 1) % COUNT;
    }

    /// Puts a frame into memory and into the ring, in descriptors of `piece` bytes.
    fn queue(&mut self, frame: &[u8], piece: usize, command: u8, options: u8, special: u16) {
        let pieces = frame.len().div_ceil(piece);
        for (index, bytes) in frame.chunks(piece).enumerate() {
            self.memory.write(Gpa(self.place.into()), bytes).unwrap();
            let end = if index + 1 == pieces { txd::EOP | txd::RS } else { 0 };
            let lower = bytes.len() as u32
                | u32::from(txd::DTYP_DATA) << 20
                | u32::from(command | end | txd::DEXT) << 24;
            let address = self.place.into();
            self.descriptor(Data { address, lower, status: 0, options, special }.as_bytes());
            // A gap, so that pieces are pieces.
            self.place += bytes.len() as u32 + 64;
        }
    }

    /// Lets the NIC send, and waits until it has.
    fn send(&mut self) {
        let last = (self.tail + COUNT - 1) % COUNT;
        self.write(reg::TDT, self.tail);
        self.wait(|driver| driver.done(TRANSMIT, last));
        self.place = FRAMES;
    }

    fn done(&self, ring: u32, index: u32) -> bool {
        let at = Gpa(u64::from(ring + index * 16) + 12);
        self.memory.read_obj::<u8>(at).unwrap() & 1 != 0
    }

    /// Waits for something; interrupts are no part of it.
    fn wait(&self, until: impl Fn(&Self) -> bool) {
        while !until(self) {
            std::thread::yield_now();
        }
    }

    /// Waits for a frame, and gives its descriptors back.
    fn receive(&mut self) -> (Vec<u8>, Received) {
        let mut frame = Vec::new();
        loop {
            let index = self.clean;
            self.wait(|driver| driver.done(RECEIVE, index));
            let at = u64::from(RECEIVE + index * 16);
            let mut written = [0; 8];
            self.memory.read(Gpa(at + 8), &mut written).unwrap();
            let written = Received::read_from_bytes(&written).unwrap();
            let mut bytes = vec![0; written.length.into()];
            self.memory.read(Gpa(u64::from(BUFFERS + index * 2048)), &mut bytes).unwrap();
            frame.extend(bytes);
            self.lend(index);
            self.write(reg::RDT, index);
            self.clean = (index + 1) % COUNT;
            if written.status & rxd::EOP != 0 {
                return (frame, written);
            }
        }
    }

    fn counter(&self, name: &str) -> u64 {
        let all = self.nic.counters().all();
        all.into_iter().find(|(known, _)| *known == name).unwrap().1
    }
}

/// A switch with two NICs.
fn pair() -> (Driver, Driver, Arc<Port>) {
    let switch = Switch::new(SwitchOptions::new("lan"));
    let port = Arc::new(switch.port(PortOptions::default()).unwrap());
    let other = switch.port(PortOptions::default()).unwrap();
    (Driver::new(1, Arc::clone(&port) as _), Driver::new(2, Arc::new(other)), port)
}

/// A network that leaves all work to the NIC.
struct Plain(Port);

impl Network for Plain {
    fn link(&self) -> Link {
        Link { takes: Offloads::NONE, gives: Offloads::NONE, ..self.0.link() }
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.0.set_receive_offloads(offloads)
    }

    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        self.0.queue(config, uring)
    }
}

fn frame(to: u8, from: u8, len: usize) -> Vec<u8> {
    let mut frame = [address(to).0, address(from).0].concat();
    frame.extend([0x88, 0xb5]);
    frame.extend((frame.len()..len).map(|at| (at * 7 + at / 256) as u8));
    frame
}

/// A packet of TCP or UDP with `payload` bytes as a driver leaves it to the NIC: the sum of the
/// pseudo-header in the checksum's place, and no lengths if it is to be cut.
fn packet(v4: bool, tcp: bool, payload: usize, cut: bool) -> (Vec<u8>, Context) {
    let mut frame = [address(2).0, address(1).0].concat();
    let header = if tcp { 20 } else { 8 };
    let len = (header + payload) as u16;
    let said = if cut { 0 } else { len };
    let protocol = if tcp { 6 } else { 17 };
    if v4 {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((if cut { 0 } else { said + 20 }).to_be_bytes());
        frame.extend([0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(said.to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend([0xfd; 16]);
        frame.extend([0xfe; 16]);
    }
    let transport = frame.len();
    let addresses = if v4 { &frame[26..34] } else { &frame[22..54] };
    let pseudo = checksum::sum(addresses) + checksum::word(protocol.into()) + checksum::word(said);
    let seed = checksum::fold(pseudo).to_be_bytes();
    frame.extend([0x30, 0x39, 0, 80]);
    if tcp {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0]);
        frame.extend(seed);
        frame.extend([0, 0]);
    } else {
        frame.extend(said.to_be_bytes());
        frame.extend(seed);
    }
    let headers = frame.len();
    frame.extend((0..payload).map(|at| (at * 7 + at / 256) as u8));
    let bits = |bit, set| if set { bit } else { 0 };
    let tucmd =
        bits(txd::TUCMD_TCP, tcp) | bits(txd::TUCMD_IP, v4) | bits(txd::TSE, cut) | txd::DEXT;
    let context = Context {
        ip_start: 14,
        ip_offset: 24,
        ip_end: transport as u16 - 1,
        transport_start: transport as u8,
        transport_offset: transport as u8 + if tcp { 16 } else { 6 },
        transport_end: 0,
        command: u32::from(tucmd) << 24 | payload as u32,
        status: 0,
        header_len: if cut { headers as u8 } else { 0 },
        segment_size: if cut { 1400 } else { 0 },
    };
    (frame, context)
}

#[test]
fn a_driver_finds_what_it_looks_for() {
    let (a, _b, _) = pair();
    assert_ne!(a.read(reg::STATUS) & status::LINK_UP, 0);
    assert_eq!(a.read(reg::RA), 0x0000_5452);
    assert_eq!(a.read(reg::RA + 4), 0x8000_0100);
    // By the ports, too: a reset of the whole NIC.
    let by_port = |register: u32, value: u32| {
        a.ports.write(0, &register.to_le_bytes());
        a.ports.write(4, &value.to_le_bytes());
        let mut data = [0xff; 4];
        a.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(by_port(reg::RDTR, 77), 77);
    assert_eq!(by_port(reg::CTRL, ctrl::RST) & ctrl::RST, 0);
    assert_eq!((a.read(reg::RDTR), a.read(reg::RDLEN), a.read(reg::RCTL)), (0, 0, 0));
    // What is beyond the registers is nothing.
    assert_eq!(by_port(0x2_0000, 1), u32::MAX);
    // Parts of a register can be read.
    let mut byte = [0];
    a.registers.read(u64::from(reg::RA) + 1, &mut byte);
    assert_eq!(byte, [0x54]);
}

#[test]
fn frames_go_from_one_to_the_other() {
    let (mut a, mut b, _) = pair();
    for len in [60, 61, 1000, 1514] {
        let sent = frame(2, 1, len);
        a.queue(&sent, 700, 0, 0, 0);
        a.send();
        let (came, written) = b.receive();
        assert_eq!(came, sent);
        assert_eq!(written.status, rxd::DD | rxd::EOP | rxd::IXSM);
        b.queue(&frame(1, 2, len), 2000, 0, 0, 0);
        b.send();
        assert_eq!(a.receive().0, frame(1, 2, len));
    }
    // Short ones are as long as they have to be.
    a.queue(&frame(2, 1, 20), 2000, 0, 0, 0);
    a.send();
    let (came, _) = b.receive();
    assert_eq!((came.len(), &came[..20]), (60, &frame(2, 1, 20)[..]));
    b.wait(|b| b.counter("received") == 5);
    assert_eq!((a.read(0x4080), b.read(0x4074)), (5, 5));
    assert_eq!((a.counter("sent"), a.counter("malformed"), a.read(reg::TDH)), (5, 0, a.tail));
}

#[test]
fn legacy_descriptors_send_too() {
    let (mut a, mut b, _) = pair();
    let sent = frame(2, 1, 80);
    a.memory.write(Gpa(FRAMES.into()), &sent).unwrap();
    let lower = 80 | u32::from(txd::EOP | txd::RS) << 24;
    a.descriptor(&[u64::from(FRAMES), lower.into()].map(u64::to_le_bytes).concat());
    a.send();
    assert_eq!(b.receive().0, sent);
}

#[test]
fn checksums_are_put_in_and_looked_at() {
    let (mut a, mut b, _) = pair();
    for (v4, tcp) in [(true, true), (true, false), (false, true), (false, false)] {
        let (sent, context) = packet(v4, tcp, 333, false);
        a.descriptor(context.as_bytes());
        let options = txd::POPTS_TXSM | if v4 { txd::POPTS_IXSM } else { 0 };
        a.queue(&sent, 100, 0, options, 0);
        a.send();
        let (came, written) = b.receive();
        let right = Checksums::of(&came, 0x8100, false);
        assert_eq!((right.ip, right.transport), (v4.then_some(true), Some(true)));
        let ip = if v4 { rxd::IPCS } else { 0 };
        assert_eq!(written.status, rxd::DD | rxd::EOP | rxd::TCPCS | ip);
        assert_eq!((written.errors, came.len()), (0, sent.len()));
    }
    // A wrong one is told of.
    let (sent, _) = packet(true, true, 100, false);
    a.queue(&sent, 2000, 0, 0, 0);
    a.send();
    assert_eq!(b.receive().1.errors, rxd::ERROR_IP | rxd::ERROR_TCP);
}

/// Sends packets to be cut, and looks at what comes.
fn cut(mut a: Driver, mut b: Driver) {
    for (v4, tcp) in [(true, true), (false, true), (true, false)] {
        let (sent, context) = packet(v4, tcp, 20_000, true);
        let headers = usize::from(context.header_len);
        a.descriptor(context.as_bytes());
        let options = txd::POPTS_TXSM | txd::POPTS_IXSM;
        a.queue(&sent, 4096, txd::TSE, options, 0);
        a.send();
        let mut payload: Vec<u8> = Vec::new();
        while payload.len() < 20_000 {
            let (came, written) = b.receive();
            let right = Checksums::of(&came, 0x8100, false);
            assert_eq!((right.ip, right.transport), (v4.then_some(true), Some(true)));
            assert_eq!((written.errors, written.status & rxd::TCPCS), (0, rxd::TCPCS));
            payload.extend(&came[headers..]);
        }
        assert_eq!(payload, sent[headers..]);
    }
    b.wait(|b| b.counter("received") == 45);
}

#[test]
fn packets_are_cut_by_the_switch_or_by_the_other_nic() {
    let (a, b, _) = pair();
    cut(a, b);
}

#[test]
fn a_network_that_takes_nothing_has_it_done_here() {
    let switch = Switch::new(SwitchOptions::new("lan"));
    let [a, b] = [1, 2].map(|number| {
        Driver::new(number, Arc::new(Plain(switch.port(PortOptions::default()).unwrap())))
    });
    cut(a, b);
}

#[test]
fn tags_are_put_in_and_taken_off() {
    let (mut a, mut b, _) = pair();
    for nic in [&a, &b] {
        nic.write(reg::CTRL, ctrl::SET_LINK_UP | ctrl::VME);
    }
    let (sent, context) = packet(true, true, 300, false);
    a.descriptor(context.as_bytes());
    a.queue(&sent, 200, txd::VLE, txd::POPTS_TXSM | txd::POPTS_IXSM, 0x2007);
    a.send();
    let (came, written) = b.receive();
    assert_eq!((came.len(), written.special), (sent.len(), 0x2007));
    assert_eq!(written.status & (rxd::VP | rxd::TCPCS), rxd::VP | rxd::TCPCS);
    assert_eq!(Checksums::of(&came, 0x8100, false).transport, Some(true));
    // As it is on the wire, for one who does not want tags taken off.
    b.write(reg::CTRL, ctrl::SET_LINK_UP);
    a.queue(&frame(2, 1, 100), 2000, txd::VLE, 0, 7);
    a.send();
    let (came, written) = b.receive();
    assert_eq!((came[12..16].to_vec(), written.status & rxd::VP), (vec![0x81, 0, 0, 7], 0));
    assert_eq!(came[16..], frame(2, 1, 100)[12..]);
    b.write(reg::CTRL, ctrl::SET_LINK_UP | ctrl::VME);
    a.queue(&frame(2, 1, 100), 2000, txd::VLE, 0, 7);
    a.send();
    assert_eq!(b.receive().0, frame(2, 1, 100));
}

#[test]
fn long_frames_lie_in_several_buffers() {
    let (mut a, mut b, _) = pair();
    b.control |= rctl::LPE;
    b.write(reg::RCTL, b.control);
    let sent = frame(2, 1, 9014);
    a.queue(&sent, 4096, 0, 0, 0);
    a.send();
    assert_eq!(b.receive().0, sent);
    // With the check sequence, which nobody has made.
    b.write(reg::RCTL, b.control & !rctl::SECRC);
    a.queue(&sent, 4096, 0, 0, 0);
    a.send();
    let (came, _) = b.receive();
    assert_eq!((came.len(), &came[..9014]), (9018, &sent[..]));
    // Without room for long frames, they are none of the guest's business.
    b.write(reg::RCTL, b.control & !rctl::LPE);
    a.queue(&sent, 4096, 0, 0, 0);
    a.queue(&frame(2, 1, 64), 4096, 0, 0, 0);
    a.send();
    assert_eq!(b.receive().0.len(), 64);
}

#[test]
fn frames_wait_for_descriptors() {
    let (mut a, mut b, _) = pair();
    b.write(reg::RDT, 3);
    b.write(reg::RDH, 0);
    let frames: Vec<_> = (60..80).map(|len| frame(2, 1, len)).collect();
    for frame in &frames {
        a.queue(frame, 2000, 0, 0, 0);
    }
    a.send();
    for sent in &frames {
        assert_eq!(b.receive().0, *sent);
    }
}

/// Also in the very turn in which its worker has heard another ring of its doorbell.
#[test]
fn a_nic_goes_whenever_it_has_to() {
    for pause in 0..400 {
        let (mut a, b, _) = pair();
        a.queue(&frame(2, 1, 60), 2000, 0, 0, 0);
        a.send();
        (0..pause * 10).for_each(|_| std::hint::spin_loop());
        drop((a, b));
    }
}

#[test]
fn interrupts_come_and_go_with_their_causes() {
    let (mut a, mut b, _) = pair();
    for nic in [&a, &b] {
        nic.read(reg::ICR);
        nic.write(reg::IMS, cause::RXT0 | cause::TXDW);
    }
    a.queue(&frame(2, 1, 60), 2000, 0, 0, 0);
    a.send();
    for (nic, cause) in [(&a, cause::TXDW), (&b, cause::RXT0)] {
        nic.line.wait();
        assert_ne!(nic.read(reg::ICR) & cause, 0);
        assert!(!*nic.line.high.lock().unwrap());
        nic.write(reg::IMC, u32::MAX);
    }
    b.receive();
    // Held back for a while, and by the driver's own hand.
    b.write(reg::RDTR, 2000);
    b.write(reg::IMS, cause::RXT0);
    a.queue(&frame(2, 1, 60), 2000, 0, 0, 0);
    a.send();
    b.line.wait();
    assert_eq!(b.read(reg::ICR) & cause::RXT0, cause::RXT0);
    b.write(reg::ICS, cause::RXT0);
    b.line.wait();
}

#[test]
fn the_cable_is_pulled_out_and_plugged_in() {
    let (mut a, mut b, port) = pair();
    a.read(reg::ICR);
    a.write(reg::IMS, cause::LSC);
    for plugged in [false, true] {
        port.plug(plugged);
        a.line.wait();
        assert_eq!(a.read(reg::ICR) & cause::LSC, cause::LSC);
        assert_eq!(a.read(reg::STATUS) & status::LINK_UP != 0, plugged);
        a.queue(&frame(2, 1, 60), 2000, 0, 0, 0);
        a.send();
    }
    assert_eq!(b.receive().0, frame(2, 1, 60));
    a.wait(|a| a.counter("send drops") == 1);
}

#[test]
fn what_makes_no_sense_costs_itself() {
    let (mut a, mut b, _) = pair();
    let bad = |a: &mut Driver, address: u64, len: u32, command: u8, options: u8| {
        let lower = len
            | u32::from(txd::DTYP_DATA) << 20
            | u32::from(command | txd::EOP | txd::RS | txd::DEXT) << 24;
        a.descriptor(Data { address, lower, status: 0, options, special: 0 }.as_bytes());
    };
    // Outside memory, too short, too long, of no kind, to be cut without a context, to be summed
    // where it is not, to be cut with headers of no length.
    bad(&mut a, 2 << 20, 60, 0, 0);
    bad(&mut a, u64::MAX - 10, 60, 0, 0);
    bad(&mut a, FRAMES.into(), 13, 0, 0);
    bad(&mut a, FRAMES.into(), 0xf_ffff, 0, 0);
    bad(&mut a, FRAMES.into(), 60, txd::TSE, 0);
    let (_, mut context) = packet(true, true, 100, false);
    (context.transport_start, context.transport_offset) = (200, 216);
    a.descriptor(context.as_bytes());
    bad(&mut a, FRAMES.into(), 60, 0, txd::POPTS_TXSM);
    let lower = 60 | 7 << 20 | u32::from(txd::EOP | txd::RS | txd::DEXT) << 24;
    a.descriptor(&[u64::from(FRAMES), lower.into()].map(u64::to_le_bytes).concat());
    let (_, mut context) = packet(true, true, 100, true);
    (context.header_len, context.segment_size) = (0, 10);
    a.descriptor(context.as_bytes());
    bad(&mut a, FRAMES.into(), 60, txd::TSE, 0);
    a.send();
    a.wait(|a| a.counter("malformed") == 8);
    assert_eq!(a.counter("sent"), 0);

    // A receive buffer outside memory costs the frame that was to lie there.
    b.memory.write_obj(Gpa(RECEIVE.into()), &(2_u64 << 20)).unwrap();
    a.queue(&frame(2, 1, 60), 2000, 0, 0, 0);
    a.queue(&frame(2, 1, 61), 2000, 0, 0, 0);
    a.send();
    assert_eq!(b.receive().1.errors, rxd::ERROR_DATA);
    assert_eq!(b.receive().0, frame(2, 1, 61));

    // Rings outside memory, without an end, with tails that are nowhere.
    for (base, length, tail) in [(0xffff_f000, 0xf_ff80, 5000), (TRANSMIT, 128, 0xffff)] {
        a.write(reg::TDBAL, base);
        a.write(reg::TDBAL + 8, length);
        a.write(reg::TDT, tail);
        b.write(reg::RDBAL, base);
        b.write(reg::RDLEN, length);
        b.write(reg::RDT, tail);
    }
    for nic in [&mut a, &mut b] {
        nic.write(reg::CTRL, ctrl::RST);
        nic.begin();
    }
    a.queue(&frame(2, 1, 62), 2000, 0, 0, 0);
    a.send();
    assert_eq!(b.receive().0, frame(2, 1, 62));
}

#[test]
fn after_a_reset_memory_is_left_alone() {
    let (mut a, b, _) = pair();
    for _ in 0..200 {
        for _ in 0..40 {
            a.queue(&frame(2, 1, 60), 2000, 0, 0, 0);
        }
        a.place = FRAMES;
        a.write(reg::TDT, a.tail);
        // What the switch still has of them comes to a NIC that receives nothing.
        b.write(reg::RCTL, 0);
        b.memory.write(Gpa(RECEIVE.into()), &[0; 16 * COUNT as usize]).unwrap();
        std::thread::yield_now();
        let mut ring = [1; 16 * COUNT as usize];
        b.memory.read(Gpa(RECEIVE.into()), &mut ring).unwrap();
        assert_eq!(ring, [0; 16 * COUNT as usize]);
        (0..COUNT).for_each(|index| b.lend(index));
        b.write(reg::RDH, 0);
        b.write(reg::RDT, COUNT - 1);
        b.write(reg::RCTL, b.control);
        a.write(reg::CTRL, ctrl::RST);
        a.begin();
    }
}

/// What waits for a network that does not take it is not the guest's frame any more once its driver
/// has reset the NIC, and may use the memory for anything.
#[test]
fn after_a_reset_nothing_of_before_is_sent() {
    let off = |a: &mut Driver| {
        a.write(reg::RCTL, 0);
        a.write(reg::TCTL, 0);
        a.write(reg::CTRL, ctrl::RST);
    };
    nothing_leaves_after(&off, &|_| {});
}

#[test]
fn after_sending_is_switched_off_nothing_of_before_is_sent() {
    nothing_leaves_after(&|a| a.write(reg::TCTL, 0), &|_| {});
}

#[test]
fn after_the_bus_master_is_switched_off_nothing_of_before_is_sent() {
    nothing_leaves_after(&|a| a.decode.set_command(0), &|a| {
        a.write(reg::TCTL, 0);
        a.decode.set_command(COMMAND_BUS_MASTER);
    });
}

/// Has frames wait for a network, and their memory written to after `off`: as soon as that has returned,
/// nothing has to be under way that could tell.
fn nothing_leaves_after(off: &dyn Fn(&mut Driver), on: &dyn Fn(&mut Driver)) {
    let mut a = Driver::new(1, Arc::new(backends::net::loopback::Loopback::new()));
    a.control |= rctl::UPE;
    // No receive descriptors: the cable is full after 64 frames.
    a.write(reg::RDT, 0);
    a.write(reg::RCTL, a.control);
    for batch in 0..2 {
        for _ in 0..40 {
            a.queue(&frame(2, 1, 100), 2000, 0, 0, 0);
        }
        a.write(reg::TDT, a.tail);
        if batch == 0 {
            let last = (a.tail + COUNT - 1) % COUNT;
            a.wait(|a| a.done(TRANSMIT, last));
        }
    }
    // All of the second batch have been taken, and some of it wait.
    a.wait(|a| a.counter("sent") == 80);
    assert!(!a.done(TRANSMIT, (a.tail + COUNT - 1) % COUNT));
    off(&mut a);
    a.memory.write(Gpa(FRAMES.into()), &[0x5e; 100 * 164]).unwrap();
    on(&mut a);
    a.begin();
    // A last frame, behind all that there is.
    a.queue(&frame(1, 2, 64), 2000, 0, 0, 0);
    a.send();
    loop {
        let (came, _) = a.receive();
        assert!(came.iter().any(|byte| *byte != 0x5e), "a frame of what was written afterwards");
        if came == frame(1, 2, 64) {
            return;
        }
    }
}

/// A driver may write a tail before its NIC may access memory.
#[test]
fn what_was_asked_for_before_the_bus_master_was_switched_on_is_done_then() {
    let (mut a, mut b, _) = pair();
    a.decode.set_command(0);
    b.decode.set_command(0);
    a.queue(&frame(2, 1, 60), 2000, 0, 0, 0);
    a.write(reg::TDT, a.tail);
    b.decode.set_command(COMMAND_BUS_MASTER);
    a.decode.set_command(COMMAND_BUS_MASTER);
    assert_eq!(b.receive().0, frame(2, 1, 60));
}

/// What Linux' driver tries when it is asked for a test of the registers (`ethtool -t`): patterns, and
/// the bits that are to be there afterwards.
#[test]
fn registers_keep_the_bits_that_they_have() {
    let (a, _b, _) = pair();
    a.write(reg::RCTL, 0);
    a.write(reg::TCTL, 0);
    let status = a.read(reg::STATUS);
    a.write(reg::STATUS, 0xffff_f833);
    assert_eq!(a.read(reg::STATUS), status);
    let all = u32::MAX;
    let mut tests = vec![
        (reg::FCAL, all, all),
        (reg::FCAH, 0xffff, all),
        (reg::FCT, 0xffff, all),
        (reg::VET, 0xffff, all),
        (reg::RDTR, 0xffff, all),
        (reg::RDBAH, all, all),
        (reg::RDLEN, 0xf_ff80, 0xf_ffff),
        (reg::RDH, 0xffff, 0xffff),
        (reg::RDT, 0xffff, 0xffff),
        (reg::FCRTH, 0xfff8, 0xfff8),
        (reg::FCTTV, 0xffff, 0xffff),
        (reg::TIPG, 0x3fff_ffff, 0x3fff_ffff),
        (reg::TDBAL + 4, all, all),
        (reg::TDBAL + 8, 0xf_ff80, 0xf_ffff),
        (reg::RDBAL, 0xffff_fff0, all),
        (reg::TXCW, 0xc000_ffff, 0xffff),
        (reg::TDBAL, 0xffff_fff0, all),
        (reg::TIDV, 0xffff, 0xffff),
    ];
    tests.extend((0..15).map(|pair| (reg::RA + 8 * pair + 4, 0x8003_ffff, all)));
    tests.extend((reg::MTA..=reg::MTA_LAST).step_by(4).map(|offset| (offset, all, all)));
    for (offset, mask, written) in tests {
        for pattern in [0x5a5a_5a5a, 0xa5a5_a5a5, 0, all] {
            a.write(offset, pattern & written);
            assert_eq!(a.read(offset), pattern & written & mask, "{offset:#x}");
        }
    }
    for control in [0, 0x001f_b3fa, 0x06df_b3fe] {
        a.write(reg::RCTL, control);
        assert_eq!(a.read(reg::RCTL), control);
    }
}

/// The PHY's control register (IEEE 802.3, 22.2.4.1): loopback, at 1000 Mbit/s or so.
fn phy_control(a: &Driver, value: u32) {
    use super::bits::mdic;
    a.write(reg::MDIC, 1 << mdic::PHY_SHIFT | mdic::WRITE | value);
    assert_eq!(a.read(reg::MDIC) & (mdic::READY | mdic::ERROR), mdic::READY);
}

/// As a driver tests its NIC: what it sends comes back, and nobody else hears of it, nor it of them.
#[test]
fn a_nic_that_is_its_own_peer_is_alone() {
    let inside = [
        (|a: &Driver| phy_control(a, 0x4140)) as fn(&Driver),
        |a| a.write(reg::RCTL, a.control | 1 << 6),
        |a| a.write(reg::RCTL, a.control | 3 << 6),
    ];
    for enter in inside {
        let (mut a, mut b, _) = pair();
        enter(&a);
        // With a TCP packet that is to be cut, of which the segments come.
        let mut test = frame(2, 1, 1024);
        test[..12].fill(0xff);
        for _ in 0..20 {
            for _ in 0..15 {
                a.queue(&test, 2000, 0, 0, 0);
            }
            a.send();
            for _ in 0..15 {
                assert_eq!(a.receive().0, test);
            }
        }
        b.queue(&frame(1, 2, 60), 2000, 0, 0, 0);
        b.queue(&frame(1, 2, 61), 2000, 0, 0, 0);
        b.send();
        a.wait(|a| a.counter("unwanted") == 2);
        // The last ones are not to leave, though the NIC stops being its own peer at once.
        for _ in 0..15 {
            a.queue(&test, 2000, 0, 0, 0);
        }
        a.write(reg::TDT, a.tail);
        phy_control(&a, 0x8140);
        a.write(reg::RCTL, a.control);
        a.queue(&frame(2, 1, 64), 2000, 0, 0, 0);
        a.send();
        assert_eq!(b.receive().0, frame(2, 1, 64));
        b.queue(&frame(1, 2, 65), 2000, 0, 0, 0);
        b.send();
        while a.receive().0 != frame(1, 2, 65) {}
        assert_eq!(b.counter("received"), 1);
    }
}

/// Descriptors for them are not given back, as in the driver's test, which sends many more.
#[test]
fn what_a_nic_sends_to_itself_does_not_wait_for_descriptors() {
    let (mut a, mut b, _) = pair();
    phy_control(&a, 0x4140);
    let test = frame(1, 1, 1024);
    for _ in 0..20 {
        for _ in 0..40 {
            a.queue(&test, 2000, 0, 0, 0);
        }
        a.send();
    }
    for index in 0..COUNT - 1 {
        assert!(a.done(RECEIVE, index));
    }
    a.write(reg::CTRL, ctrl::RST);
    phy_control(&a, 0x8140);
    a.begin();
    a.queue(&frame(2, 1, 64), 2000, 0, 0, 0);
    a.send();
    assert_eq!(b.receive().0, frame(2, 1, 64));
}

/// A packet of full size in a VLAN in a VLAN, of whichever kind, both at the usual MTU.
#[test]
fn two_tags_fit_in_front_of_a_packet_of_full_size() {
    let switch = Switch::new(SwitchOptions::new("lan"));
    let [mut a, mut b] = [1, 2].map(|number| {
        Driver::with_mtu(number, Arc::new(switch.port(PortOptions::default()).unwrap()), 1500)
    });
    let mut tagged = frame(2, 1, 1514);
    tagged.splice(12..12, [0x81, 0, 0, 8]);
    for outer in [[0x81, 0, 0, 7], [0x88, 0xa8, 0, 7]] {
        let mut sent = tagged.clone();
        sent.splice(12..12, outer);
        a.queue(&sent, 2000, 0, 0, 0);
        a.send();
        assert_eq!(b.receive().0, sent);
    }
    // The NIC puts the outer one in, and takes it off.
    for nic in [&a, &b] {
        nic.write(reg::CTRL, ctrl::SET_LINK_UP | ctrl::VME);
    }
    a.queue(&tagged, 2000, txd::VLE, 0, 7);
    a.send();
    let (came, written) = b.receive();
    assert_eq!((came, written.special), (tagged.clone(), 7));
    // A byte more is too long, with the tag that is put in or without.
    tagged.push(0);
    a.queue(&tagged, 2000, txd::VLE, 0, 7);
    a.queue(&[&tagged[..12], &[0x81, 0, 0, 7], &tagged[12..]].concat(), 2000, 0, 0, 0);
    a.send();
    a.wait(|a| a.counter("malformed") == 2);
}
