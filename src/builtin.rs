//! What the built-in guest has beyond a PC's devices: a port by which it says how it ended.

use std::sync::{Mutex, PoisonError};

use guest_drivers::boot::EXIT_PORT;
use hypervisor::{Device, StopHandle, StopReason};

/// The exit port: a write ends the run, and its value is the status.
pub struct ExitPort {
    status: Mutex<Option<u32>>,
    stop: StopHandle,
}

impl ExitPort {
    /// Where it is.
    pub const PORT: u16 = EXIT_PORT;

    /// A port that ends the run by `stop`.
    pub fn new(stop: StopHandle) -> Self {
        Self { status: Mutex::default(), stop }
    }

    /// What the guest wrote, first.
    pub fn status(&self) -> Option<u32> {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for ExitPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.get_or_insert(u32::from_le_bytes(bytes));
        self.stop.stop(StopReason::PowerOff);
    }
}
