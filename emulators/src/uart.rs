//! The serial port: a 16550A between the guest and a [`Cable`].
//!
//! The [`registers`] do no I/O. What leaves them goes into the cable when their lock is free again,
//! so that a cable that takes its time keeps nobody from them but the processor that has sent; and
//! what the guest has not read yet stays with the cable.

mod fuzz;
mod registers;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::{Device, InterruptLine};

pub(crate) use fuzz::fuzz;
use registers::{FIFO, Registers};

/// What a serial port is connected to.
pub trait Cable: Send + Sync {
    /// The guest sends. A processor waits as long as this takes.
    fn send(&self, bytes: &[u8]);

    /// Fills `room` from the front with what has come for the guest, and says how much that was.
    /// Never waits. [`Uart::receive`] says that there is something again.
    fn receive(&self, room: &mut [u8]) -> usize;
}

/// A cable that leads nowhere.
impl Cable for () {
    fn send(&self, _: &[u8]) {}

    fn receive(&self, _: &mut [u8]) -> usize {
        0
    }
}

/// A serial port.
pub struct Uart {
    state: Mutex<State>,
    line: Arc<dyn InterruptLine>,
    cable: Arc<dyn Cable>,
}

#[derive(Default)]
struct State {
    registers: Registers,
    /// How the interrupt output was last.
    interrupts: bool,
}

impl Uart {
    /// The first port of COM1.
    pub const COM1: u16 = 0x3f8;
    /// COM1's interrupt line.
    pub const COM1_IRQ: u8 = 4;
    /// How many ports it takes.
    pub const PORTS: u16 = 8;

    /// A port at the end of `cable`, which interrupts by `line`.
    pub fn new(line: Arc<dyn InterruptLine>, cable: Arc<dyn Cable>) -> Self {
        Self { state: Mutex::default(), line, cable }
    }

    /// Something has come by the cable. The guest gets it as it reads.
    pub fn receive(&self) {
        self.fill(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes from the cable once the guest has read what there was: so the interrupt output goes
    /// down in between, and each batch is an edge.
    fn fill(&self, state: &mut State) {
        let mut bytes = [0; FIFO];
        let room = state.registers.room();
        if state.registers.is_drained()
            && let Some(room) = bytes.get_mut(..room).filter(|room| !room.is_empty())
        {
            let count = self.cable.receive(room);
            for &byte in bytes.iter().take(count.min(FIFO)) {
                state.registers.receive(byte);
            }
        }
        self.update(state);
    }

    /// IRQ 4 is an ISA line: the output's rising edges are what counts.
    fn update(&self, state: &mut State) {
        let now = state.registers.interrupts();
        if now && !state.interrupts {
            self.line.pulse();
        }
        state.interrupts = now;
    }
}

impl Device for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        for (offset, byte) in (offset..).zip(data) {
            *byte = state.registers.read(offset as u8);
            self.update(&mut state);
            self.fill(&mut state);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, &byte) in (offset..).zip(data) {
            let mut state = self.lock();
            let sent = state.registers.write(offset as u8, byte);
            self.update(&mut state);
            self.fill(&mut state);
            drop(state);
            if let Some(byte) = sent {
                self.cable.send(&[byte]);
            }
        }
    }
}
