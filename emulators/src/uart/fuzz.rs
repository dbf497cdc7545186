//! Any accesses to a serial port, with input that comes in between.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::{Device, InterruptLine};

use super::registers::{FIFO, lsr, mcr};
use super::{Cable, Uart};

/// Input that counts upwards, as much as was allowed, and output that is counted.
#[derive(Default)]
struct Peer {
    waiting: Mutex<usize>,
    sent: AtomicUsize,
}

impl Cable for Peer {
    fn send(&self, bytes: &[u8]) {
        self.sent.fetch_add(bytes.len(), Ordering::Relaxed);
    }

    fn receive(&self, room: &mut [u8]) -> usize {
        assert!(room.len() <= FIFO);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = room.len().min(*waiting);
        *waiting -= count;
        room.iter_mut().take(count).for_each(|byte| *byte = b'i');
        count
    }
}

#[derive(Default)]
struct Edges(AtomicUsize);

impl InterruptLine for Edges {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn set_level(&self, _: bool) {}
}

/// Two bytes each: the first chooses read, write or input and the register, the second is written or
/// so much input. In the end a driver that sets the port up finds one that works.
pub(crate) fn fuzz(data: &[u8]) {
    let (peer, edges) = (Arc::new(Peer::default()), Arc::new(Edges::default()));
    let uart = Uart::new(Arc::clone(&edges) as _, Arc::clone(&peer) as _);
    let read = |register| {
        let mut byte = [0];
        uart.read(register, &mut byte);
        byte[0]
    };
    for access in data.chunks_exact(2) {
        let &[choice, value] = access else { continue };
        let register = u64::from(choice & 7);
        match choice >> 3 & 3 {
            0 => drop(read(register)),
            1 => uart.write(register, &[value]),
            2 => uart.write(register, &[value; 3][..usize::from(choice >> 5 & 3)]),
            _ => {
                *peer.waiting.lock().unwrap_or_else(PoisonError::into_inner) += usize::from(value);
                uart.receive();
            }
        }
    }

    *peer.waiting.lock().unwrap_or_else(PoisonError::into_inner) = 0;
    for (register, value) in [(3, 3), (4, mcr::OUT2 | mcr::RTS | mcr::DTR), (1, 0), (2, 0), (2, 7)]
    {
        uart.write(register, &[value]);
    }
    // What was lost, or had changed, before.
    for register in [5, 6, 0, 2] {
        read(register);
    }
    assert_eq!(read(2), 0xc1, "no reason to interrupt");
    assert_eq!(read(5), lsr::HOLDING_EMPTY | lsr::EMPTY);
    let (sent, interrupts) = (peer.sent.load(Ordering::Relaxed), edges.0.load(Ordering::Relaxed));
    uart.write(1, &[1]);
    *peer.waiting.lock().unwrap_or_else(PoisonError::into_inner) = 40;
    uart.receive();
    let mut came = 0;
    while read(5) & lsr::DATA_READY != 0 {
        assert_eq!(read(0), b'i');
        came += 1;
    }
    assert_eq!(came, 40);
    assert_eq!(edges.0.load(Ordering::Relaxed) - interrupts, 3, "16, 16 and 8 bytes");
    uart.write(0, b"o");
    assert_eq!(peer.sent.load(Ordering::Relaxed) - sent, 1);
}
