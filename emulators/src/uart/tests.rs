use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::registers::{LCR_DLAB, fcr, ier, iir, lsr, mcr};
use super::*;

#[derive(Default)]
struct Count(AtomicU32);

impl Count {
    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

impl InterruptLine for Count {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn set_level(&self, _: bool) {}
}

#[derive(Default)]
struct Peer {
    typed: Mutex<VecDeque<u8>>,
    seen: Mutex<Vec<u8>>,
}

impl Cable for Peer {
    fn send(&self, bytes: &[u8]) {
        self.seen.lock().unwrap().extend_from_slice(bytes);
    }
    fn receive(&self, room: &mut [u8]) -> usize {
        let mut typed = self.typed.lock().unwrap();
        let count = typed.len().min(room.len());
        for (to, byte) in room.iter_mut().zip(typed.drain(..count)) {
            *to = byte;
        }
        count
    }
}

struct Bench {
    uart: Uart,
    line: Arc<Count>,
    peer: Arc<Peer>,
}

impl Bench {
    fn new() -> Self {
        let (line, peer) = (Arc::new(Count::default()), Arc::new(Peer::default()));
        Self { uart: Uart::new(line.clone(), peer.clone()), line, peer }
    }

    /// With its FIFOs on, as every driver of the last thirty years has them.
    fn with_fifos() -> Self {
        let bench = Self::new();
        bench.write(2, fcr::ENABLE);
        bench
    }

    fn read(&self, register: u64) -> u8 {
        let mut byte = [0];
        self.uart.read(register, &mut byte);
        byte[0]
    }

    fn write(&self, register: u64, value: u8) {
        self.uart.write(register, &[value]);
    }

    fn type_keys(&self, keys: &[u8]) {
        self.peer.typed.lock().unwrap().extend(keys);
        self.uart.receive();
    }

    fn seen(&self) -> Vec<u8> {
        self.peer.seen.lock().unwrap().clone()
    }

    /// IIR without the bits that say that there are FIFOs.
    fn source(&self) -> u8 {
        self.read(2) & !iir::FIFOS
    }
}

#[test]
fn what_the_guest_writes_goes_into_the_cable_and_it_is_always_ready_for_more() {
    let bench = Bench::new();
    let text: Vec<u8> = (0..1000_u32).map(|n| n as u8).collect();
    for byte in &text {
        bench.write(0, *byte);
        assert_eq!(bench.read(5), lsr::HOLDING_EMPTY | lsr::EMPTY);
    }
    assert_eq!(bench.seen(), text);
    assert_eq!(bench.line.get(), 0, "nobody wanted to hear of it");
}

#[test]
fn received_data_comes_before_the_transmitter_and_stays_until_it_is_read() {
    let bench = Bench::with_fifos();
    bench.write(1, ier::RECEIVED | ier::TRANSMITTER_EMPTY);
    bench.type_keys(b"xyz");
    assert_eq!(bench.source(), iir::RECEIVED);
    assert_eq!(bench.source(), iir::RECEIVED);
    assert_eq!(bench.read(0), b'x');
    assert_eq!(bench.source(), iir::RECEIVED);
    assert_eq!((bench.read(0), bench.read(0)), (b'y', b'z'));
    // The transmitter's turn; to name it is to have told of it.
    assert_eq!(bench.source(), iir::TRANSMITTER_EMPTY);
    assert_eq!(bench.source(), iir::NONE);
    bench.write(0, b'o');
    assert_eq!(bench.source(), iir::TRANSMITTER_EMPTY);
}

#[test]
fn the_transmitters_interrupt_comes_back_when_it_is_enabled_anew() {
    let bench = Bench::new();
    for edges in 1..=3 {
        // As Linux tests a port when it opens it.
        bench.write(1, ier::TRANSMITTER_EMPTY);
        assert_eq!(bench.line.get(), edges);
        assert_eq!(bench.source(), iir::TRANSMITTER_EMPTY);
        assert_eq!(bench.source(), iir::NONE);
        bench.write(1, ier::TRANSMITTER_EMPTY);
        assert_eq!(bench.source(), iir::NONE, "it was enabled already");
        bench.write(1, 0);
    }
}

#[test]
fn a_lost_byte_is_the_most_urgent_and_told_once() {
    let bench = Bench::with_fifos();
    bench.write(4, mcr::LOOP);
    bench.write(1, 0x0f);
    for byte in 0..=FIFO as u8 {
        bench.write(0, byte);
    }
    assert_eq!(bench.source(), iir::LINE_STATUS);
    assert_eq!(bench.read(5) & (lsr::OVERRUN | lsr::DATA_READY), lsr::OVERRUN | lsr::DATA_READY);
    assert_eq!(bench.read(5) & lsr::OVERRUN, 0);
    assert_eq!(bench.source(), iir::RECEIVED);
    for byte in 0..FIFO as u8 {
        assert_eq!(bench.read(0), byte, "a full FIFO keeps what it has");
    }
    assert_eq!(bench.read(5) & lsr::DATA_READY, 0);
}

#[test]
fn data_below_the_trigger_level_is_a_timeout() {
    let bench = Bench::with_fifos();
    bench.write(1, ier::RECEIVED);
    for (setting, level) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
        bench.write(2, fcr::ENABLE | fcr::CLEAR_RECEIVER | setting << fcr::LEVEL_SHIFT);
        bench.type_keys(&vec![b'k'; level]);
        assert_eq!(bench.source(), iir::RECEIVED);
        bench.read(0);
        assert_eq!(bench.source(), if level == 1 { iir::NONE } else { iir::TIMEOUT });
        while bench.read(5) & lsr::DATA_READY != 0 {
            bench.read(0);
        }
    }
}

#[test]
fn the_fifo_control_clears_the_receiver() {
    let bench = Bench::with_fifos();
    bench.type_keys(b"xyz");
    bench.write(2, fcr::ENABLE | fcr::CLEAR_RECEIVER);
    assert_eq!(bench.read(5) & lsr::DATA_READY, 0);
    // To switch the FIFOs clears as well, and without them clears nothing.
    bench.type_keys(b"xyz");
    bench.write(2, 0);
    assert_eq!(bench.read(5) & lsr::DATA_READY, 0);
    assert_eq!(bench.read(2) & iir::FIFOS, 0);
    bench.type_keys(b"x");
    bench.write(2, fcr::CLEAR_RECEIVER);
    assert_eq!(bench.read(0), b'x');
}

#[test]
fn input_waits_in_the_cable_and_each_batch_of_it_interrupts() {
    let bench = Bench::with_fifos();
    bench.write(1, ier::RECEIVED);
    bench.type_keys(&[b'x'; 2 * FIFO + 1]);
    assert_eq!(bench.line.get(), 1);
    bench.type_keys(b"y");
    assert_eq!(bench.line.get(), 1, "more of what is there");
    let mut read = Vec::new();
    while bench.read(5) & lsr::DATA_READY != 0 {
        read.push(bench.read(0));
    }
    assert_eq!(read, [&[b'x'; 2 * FIFO + 1][..], b"y"].concat());
    assert_eq!(bench.line.get(), 3);
    assert_eq!(bench.source(), iir::NONE);
}

#[test]
fn without_fifos_it_holds_one_byte() {
    let bench = Bench::new();
    bench.type_keys(b"xy");
    assert_eq!(bench.peer.typed.lock().unwrap().len(), 1);
    assert_eq!((bench.read(0), bench.read(0)), (b'x', b'y'));
    bench.write(4, mcr::LOOP);
    bench.write(0, b'a');
    bench.write(0, b'b');
    assert_eq!(bench.read(5) & lsr::OVERRUN, lsr::OVERRUN);
    assert_eq!(bench.read(0), b'b');
}

#[test]
fn looped_back_it_hears_itself_and_nobody_else() {
    let bench = Bench::with_fifos();
    assert_eq!(bench.read(6), 0xb0, "a peer that is there and listens");
    bench.write(4, mcr::LOOP);
    assert_eq!(bench.read(6), 0x0b, "its lines have gone");
    // As Linux looks for a port.
    bench.write(4, mcr::LOOP | mcr::RTS | mcr::OUT2);
    assert_eq!(bench.read(6) & 0xf0, 0x90);
    bench.write(4, mcr::LOOP | mcr::OUT1);
    assert_eq!(bench.read(6), 0x49);
    bench.write(1, ier::MODEM_STATUS);
    bench.write(4, mcr::LOOP);
    assert_eq!(bench.source(), iir::MODEM_STATUS);
    assert_eq!(bench.read(6), 0x04, "ringing has ended");
    assert_eq!(bench.source(), iir::NONE);
    bench.write(0, b'l');
    bench.type_keys(b"k");
    assert_eq!((bench.read(0), bench.read(0)), (b'l', 0));
    assert_eq!(bench.seen(), b"");
    bench.write(4, 0);
    assert_eq!(bench.read(0), b'k');
}

#[test]
fn it_looks_like_a_16550a() {
    let bench = Bench::new();
    assert_eq!(bench.read(2), iir::NONE, "no FIFOs after a reset");
    bench.write(2, fcr::ENABLE);
    assert_eq!(bench.read(2), iir::FIFOS | iir::NONE);
    bench.write(2, fcr::ENABLE | 1 << 5);
    assert_eq!(bench.read(2), iir::FIFOS | iir::NONE, "not the 64 bytes of a 16750");
    bench.write(7, 0x5a);
    assert_eq!(bench.read(7), 0x5a);
    bench.write(1, 0xff);
    assert_eq!(bench.read(1), 0x0f, "no bits of later chips");
    bench.write(4, 0xff);
    assert_eq!(bench.read(4), 0x1f);
    bench.write(4, 0);
    bench.write(3, LCR_DLAB | 3);
    assert_eq!((bench.read(0), bench.read(1)), (12, 0));
    bench.write(0, 1);
    bench.write(1, 2);
    assert_eq!((bench.read(0), bench.read(1)), (1, 2));
    bench.write(3, 3);
    assert_eq!((bench.read(0), bench.read(1)), (0, 0x0f));
    assert_eq!(bench.read(3), 3);
    assert_eq!(bench.seen(), b"");
}

proptest! {
    #[test]
    fn any_order_of_accesses_leaves_a_port_that_can_be_set_up(data: Vec<u8>) {
        fuzz(&data);
    }
}
