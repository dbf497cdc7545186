//! The PIIX4's SMBus host controller, with nothing on its bus (82371AB, section 7.3.1).
//!
//! A guest's driver complains about a machine whose firmware has not switched it on; so it is there,
//! and whatever is sent over it, nobody answers.

use std::sync::{Mutex, PoisonError};

use hypervisor::Device;

/// The host controller's registers.
#[derive(Debug, Default)]
pub struct SmBus {
    registers: Mutex<[u8; Self::PORTS as usize]>,
}

impl SmBus {
    /// Where we put it.
    pub const PORT: u16 = 0x700;
    /// How many ports it takes.
    pub const PORTS: u16 = 16;

    const STATUS: usize = 0;
    const CONTROL: usize = 2;
    /// Control: begin a transaction.
    const START: u8 = 0x40;
    /// Status: the device did not answer.
    const DEVICE_ERROR: u8 = 0x04;
}

impl Device for SmBus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        for (byte, register) in data.iter_mut().zip(registers.iter().skip(offset as usize)) {
            *byte = *register;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, byte) in (offset as usize..).zip(data) {
            match at {
                Self::STATUS => registers[at] &= !byte, // a one clears
                Self::CONTROL => {
                    registers[at] = byte & !Self::START;
                    if byte & Self::START != 0 {
                        registers[Self::STATUS] |= Self::DEVICE_ERROR;
                    }
                }
                1 => {} // the slave's status
                _ => {
                    if let Some(register) = registers.get_mut(at) {
                        *register = *byte;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_answers() {
        let bus = SmBus::default();
        let mut status = [0xff];
        bus.read(0, &mut status);
        assert_eq!(status, [0], "idle");
        bus.write(4, &[0xa1]);
        bus.write(2, &[0x48]);
        bus.read(0, &mut status);
        assert_eq!(status, [4]);
        bus.write(0, &[4]);
        bus.read(0, &mut status);
        assert_eq!(status, [0]);
        let mut control = [0xff; 3];
        bus.read(2, &mut control);
        assert_eq!(control, [8, 0, 0xa1]);
    }
}
