//! Ports that a PC has to have, and that do next to nothing.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use hypervisor::{Device, StopHandle, StopReason};

/// Ports where writes go nowhere and reads give zero: the POST code at 0x80 and its alternative at
/// 0xed, whose writes serve as a delay.
#[derive(Debug, Default)]
pub struct Nothing;

impl Nothing {
    /// The ports that kernels write to in order to wait.
    pub const DELAYS: [u16; 2] = [0x80, 0xed];
}

impl Device for Nothing {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

/// The PIIX4's APM control and status, by which software talks to firmware in SMM. There is none:
/// they keep what is written, and nobody answers.
#[derive(Debug, Default)]
pub struct ApmPorts([AtomicU8; 2]);

impl ApmPorts {
    /// The first port.
    pub const PORT: u16 = 0xb2;
    /// How many there are.
    pub const PORTS: u16 = 2;
}

impl Device for ApmPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, register) in data.iter_mut().zip(self.0.iter().skip(offset as usize)) {
            *byte = register.load(Ordering::Relaxed);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (byte, register) in data.iter().zip(self.0.iter().skip(offset as usize)) {
            register.store(*byte, Ordering::Relaxed);
        }
    }
}

/// System control port A of the PS/2: address line 20, which is never masked here, and a reset.
pub struct SystemControl {
    stop: StopHandle,
    bits: AtomicU8,
}

impl SystemControl {
    /// The port.
    pub const PORT: u16 = 0x92;

    const RESET: u8 = 1 << 0;
    const A20: u8 = 1 << 1;

    /// A port whose reset ends the partition's run.
    pub fn new(stop: StopHandle) -> Self {
        Self { stop, bits: AtomicU8::new(Self::A20) }
    }
}

impl Device for SystemControl {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.bits.load(Ordering::Relaxed));
    }

    fn write(&self, _: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let old = self.bits.swap(value, Ordering::Relaxed);
        if value & !old & Self::RESET != 0 {
            self.stop.stop(StopReason::Reset);
        }
    }
}

/// The port to which firmware writes what it would tell its maker: its lines are logged at the level
/// *debug*.
#[derive(Default)]
pub struct DebugPort(Mutex<Vec<u8>>);

impl DebugPort {
    /// Where SeaBIOS and OVMF have it, and where Bochs had it first.
    pub const PORTS: [u16; 2] = [0x402, 0xe9];

    /// What a read gives, by which a guest knows that it is there.
    const HERE: u8 = 0xe9;
    /// A line longer than this is logged in pieces.
    const LONGEST: usize = 256;

    /// The line that has ended, if `byte` ends one.
    fn put(&self, byte: u8) -> Option<String> {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if byte != b'\n' {
            line.push(byte);
        }
        (byte == b'\n' || line.len() >= Self::LONGEST).then(|| {
            let text = String::from_utf8_lossy(&line).replace(char::is_control, "");
            line.clear();
            text
        })
    }
}

impl Device for DebugPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(Self::HERE);
    }

    fn write(&self, _: u64, data: &[u8]) {
        for line in data.iter().filter_map(|byte| self.put(*byte)) {
            tracing::debug!("the guest says: {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &dyn Device, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn apm_ports_keep_what_is_written() {
        let ports = ApmPorts::default();
        ports.write(0, &[1, 2]);
        ports.write(1, &[3]);
        assert_eq!((read(&ports, 0), read(&ports, 1)), (1, 3));
    }

    #[test]
    fn a_fast_reset_is_an_edge() {
        let stop = StopHandle::default();
        let port = SystemControl::new(stop.clone());
        assert_eq!(read(&port, 0), 2);
        port.write(0, &[0]);
        assert!(!stop.is_stopping());
        port.write(0, &[3]);
        assert_eq!(stop.wait(), StopReason::Reset);
    }

    #[test]
    fn debug_lines_are_told_when_they_end() {
        let port = DebugPort::default();
        assert_eq!(read(&port, 0), 0xe9);
        let told: Vec<_> = b"SeaBIOS\r\n\n\x1b[1m".iter().filter_map(|b| port.put(*b)).collect();
        assert_eq!(told, ["SeaBIOS", ""]);
        let told: Vec<_> = (0..1000).filter_map(|_| port.put(b'x')).collect();
        assert_eq!(told.len(), 3);
        assert_eq!(told[0], format!("[1m{}", "x".repeat(252)));
    }
}
