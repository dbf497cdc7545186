//! The PCI bus of the legacy machine: one bus, reached through the two ports of configuration
//! mechanism 1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2), with the functions that an
//! i440FX and a PIIX4 put on it ([`chipset`]).
//!
//! A function is 256 bytes and a mask that says which bits of them a guest can change; that alone
//! makes the sizing of base address registers work. What a function *does* stands elsewhere: a
//! function with an I/O range shares a [`Decode`] with the device behind the range, and
//! [`IoWindow`] finds the device at whatever base the guest has chosen last.

pub mod chipset;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypervisor::Device;

/// Command register: the function answers at its I/O ranges.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command register: the function may access memory by itself.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;

const COMMAND: usize = 0x04;
const HEADER_TYPE: usize = 0x0e;
const MULTIFUNCTION: u8 = 0x80;

/// Offset of base address register `n`.
const fn bar(n: usize) -> usize {
    0x10 + 4 * n
}

/// Where a function's I/O range is at the moment and what it may do. Written with the
/// configuration space, read at each access, from any thread.
#[derive(Debug, Default)]
pub struct Decode(AtomicU32);

impl Decode {
    fn set(&self, base: u16, command: u16) {
        self.0.store(u32::from(base) << 16 | u32::from(command), Ordering::Release);
    }

    fn command(&self) -> u16 {
        self.0.load(Ordering::Acquire) as u16
    }

    /// The first port of the range, if the function answers there.
    pub fn base(&self) -> Option<u16> {
        let value = self.0.load(Ordering::Acquire);
        let base = (value >> 16) as u16;
        (value as u16 & COMMAND_IO != 0 && base != 0).then_some(base)
    }

    /// Whether the function may access memory.
    pub fn is_bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }
}

/// One function's configuration space.
#[derive(Clone, Debug)]
pub struct Function {
    bytes: [u8; 256],
    /// Bits that a guest can change.
    writable: [u8; 256],
    /// Who follows its I/O range: which base address register that is, and what to keep current.
    io: Option<(usize, Arc<Decode>)>,
}

impl Function {
    /// A function that is nothing but its identity: base class, sub-class and programming
    /// interface are the bytes of `class`, from the top.
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let mut function = Self { bytes: [0; 256], writable: [0; 256], io: None };
        function.put(0x00, &vendor.to_le_bytes());
        function.put(0x02, &device.to_le_bytes());
        function.put(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        function.allow(0x0c, &[0xff, 0xff]); // cache line size, latency timer
        function.allow(0x3c, &[0xff]); // interrupt line, a note of the firmware's
        function
    }

    /// Sets what a register reads as.
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (register, byte) in self.bytes.iter_mut().skip(offset).zip(bytes) {
            *register = *byte;
        }
    }

    /// Lets a guest change the bits that are ones in `mask`.
    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (register, byte) in self.writable.iter_mut().skip(offset).zip(mask) {
            *register = *byte;
        }
    }

    /// Gives it base address register `n`, `ports` I/O ports (a power of two, 4 at least) that
    /// start at `base`. The upper half of the register is fixed at zero, as ports have 16 bits.
    #[must_use]
    fn with_io(mut self, n: usize, base: u16, ports: u16) -> (Self, Arc<Decode>) {
        const IS_IO: u16 = 1;
        self.put(bar(n), &(base | IS_IO).to_le_bytes());
        self.allow(bar(n), &(!(ports - 1)).to_le_bytes());
        let decode = Arc::new(Decode::default());
        self.io = Some((n, Arc::clone(&decode)));
        self.follow();
        (self, decode)
    }

    fn word(&self, offset: usize) -> u16 {
        let byte = |offset| u16::from(self.read(offset));
        byte(offset) | byte(offset + 1) << 8
    }

    fn follow(&self) {
        if let Some((n, decode)) = &self.io {
            decode.set(self.word(bar(*n)) & !3, self.word(COMMAND));
        }
    }

    fn read(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0xff)
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((register, mask), byte) in registers.zip(data) {
            *register = *register & !mask | byte & mask;
        }
        self.follow();
    }
}

/// The ports of configuration mechanism 1, and the functions of bus 0 behind them.
///
/// It takes byte accesses to its address port's range too and gives them to another device: port
/// 0xcf9 is the reset register.
pub struct ConfigPorts {
    state: Mutex<State>,
    bytewise: Arc<dyn Device>,
}

struct State {
    address: u32,
    /// Device and function number as the address register has them, and the function.
    functions: Vec<(u8, Function)>,
}

impl ConfigPorts {
    /// The first port.
    pub const PORT: u16 = 0xcf8;
    /// How many there are: the address register, and a window of four bytes.
    pub const PORTS: u16 = 8;

    const DATA: u64 = 4;
    const ENABLE: u32 = 1 << 31;

    /// An empty bus. `bytewise` is the device at port 0xcf9.
    pub fn new(bytewise: Arc<dyn Device>) -> Self {
        Self { state: Mutex::new(State { address: 0, functions: Vec::new() }), bytewise }
    }

    /// Puts a function on the bus. A device with several needs function 0.
    pub fn add(&mut self, device: u8, function: u8, config: Function) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.functions.push((device << 3 | function & 7, config));
        let several = state.functions.iter().filter(|(at, _)| at >> 3 == device).count() > 1;
        for (_, config) in state.functions.iter_mut().filter(|(at, _)| at >> 3 == device) {
            if several {
                config.bytes[HEADER_TYPE] |= MULTIFUNCTION;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The function that the address register names, if there is one, and the offset of `port`,
    /// one of the data window's four.
    fn selected(&mut self, port: u64) -> Option<(&mut Function, usize)> {
        let [register, function, bus, _] = self.address.to_le_bytes();
        if self.address & ConfigPorts::ENABLE == 0 || bus != 0 {
            return None;
        }
        let (_, config) = self.functions.iter_mut().find(|(at, _)| *at == function)?;
        Some((config, usize::from(register & 0xfc) + (port & 3) as usize))
    }
}

impl Device for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= Self::DATA {
            if let Some((config, register)) = self.lock().selected(offset) {
                for (at, byte) in (register..).zip(data) {
                    *byte = config.read(at);
                }
            }
        } else if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = self.lock().address.to_le_bytes();
        } else if let (1, [_]) = (offset, &*data) {
            self.bytewise.read(0, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= Self::DATA {
            if let Some((config, register)) = self.lock().selected(offset) {
                config.write(register, data);
            }
        } else if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            // Reserved bits and the two lowest read as zero.
            self.lock().address = u32::from_le_bytes(address) & 0x80ff_fffc;
        } else if let (1, [_]) = (offset, data) {
            self.bytewise.write(0, data);
        }
    }
}

/// The I/O ports in which functions have their ranges: it finds out at each access which one is
/// there, so that a guest may move them while its processors run.
#[derive(Default)]
pub struct IoWindow {
    ranges: Vec<(Arc<Decode>, u16, Arc<dyn Device>)>,
}

impl IoWindow {
    /// The first port.
    pub const PORT: u16 = 0xc000;
    /// How many there are: up to the last.
    pub const PORTS: u16 = 0x4000;

    /// Puts `device` where `decode` says, `ports` wide.
    pub fn add(&mut self, decode: Arc<Decode>, ports: u16, device: Arc<dyn Device>) {
        self.ranges.push((decode, ports, device));
    }

    fn find(&self, offset: u64, len: usize) -> Option<(&dyn Device, u64)> {
        self.ranges.iter().find_map(|(decode, ports, device)| {
            let port = offset + u64::from(Self::PORT);
            let inside = port.checked_sub(decode.base()?.into())?;
            (inside + len as u64 <= u64::from(*ports)).then_some((&**device, inside))
        })
    }
}

impl Device for IoWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.find(offset, data.len()) {
            device.read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(offset, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests;
