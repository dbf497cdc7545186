//! The PCI bus of the legacy machine: one bus, reached through the two ports of configuration
//! mechanism 1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2), with the functions that an
//! i440FX and a PIIX4 put on it ([`chipset`]).
//!
//! A function is 256 bytes and a mask that says which bits of them a guest can change; that alone
//! makes the sizing of base address registers work. What a function *does* stands elsewhere: a
//! function with a range of ports or of memory shares a [`Decode`] with the device behind the range,
//! and [`IoWindow`] or [`MemoryWindow`] finds the device at whatever base the guest has chosen last.
//!
//! There is no firmware that would give functions their places, so each has one from the start.
//! Interrupt pins lead to the lines of [`IRQS`], which functions share ([`SharedLine`]).

pub mod chipset;
mod line;
pub mod nic;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use hypervisor::{Device, layout};

pub use line::SharedLine;

/// Command register: the function answers at its I/O ranges.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command register: the function answers at its memory ranges.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may access memory by itself.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;

const COMMAND: usize = 0x04;
const HEADER_TYPE: usize = 0x0e;
const MULTIFUNCTION: u8 = 0x80;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

/// The first device number that is no chip's.
pub const FIRST_SLOT: u8 = 3;
/// The device numbers that a bus has.
pub const SLOTS: u8 = 32;

/// The ISA interrupts that interrupt pins are wired to: nobody else has them, and they reach PICs and
/// I/O APIC alike.
pub const IRQS: [u8; 3] = [10, 11, 5];

/// Which of [`IRQS`] the first interrupt pin of a device is wired to.
pub const fn irq_of(device: u8) -> u8 {
    IRQS[device.wrapping_sub(FIRST_SLOT) as usize % IRQS.len()]
}

/// Offset of base address register `n`.
const fn bar(n: usize) -> usize {
    0x10 + 4 * n
}

/// Where a function's range is at the moment and what it may do. Written with the configuration
/// space, read at each access, from any thread.
pub struct Decode {
    /// The base, and the command register below it.
    value: AtomicU64,
    /// The bit of the command register that has the function answer.
    enable: u16,
    /// Is told when the function may access memory, and when it may no longer.
    on_bus_master: OnceLock<Box<dyn Fn(bool) + Send + Sync>>,
}

impl fmt::Debug for Decode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (base, command) = (self.base(), self.command());
        f.debug_struct("Decode")
            .field("base", &base)
            .field("command", &command)
            .finish_non_exhaustive()
    }
}

impl Decode {
    fn new(enable: u16) -> Self {
        Self { value: AtomicU64::new(0), enable, on_bus_master: OnceLock::new() }
    }

    /// That of a function that is nowhere and may do what `command` says.
    pub(crate) fn fixed(command: u16) -> Self {
        let decode = Self::new(0);
        decode.set(0, command);
        decode
    }

    fn set(&self, base: u32, command: u16) {
        let value = u64::from(base) << 16 | u64::from(command);
        let before = self.value.swap(value, Ordering::AcqRel) as u16;
        if (before ^ command) & COMMAND_BUS_MASTER != 0
            && let Some(told) = self.on_bus_master.get()
        {
            told(command & COMMAND_BUS_MASTER != 0);
        }
    }

    /// Sets whom to tell when the function may access memory, and when it may no longer: in the thread
    /// that has changed that, before its access ends. There is one for each follower.
    pub(crate) fn on_bus_master(&self, told: impl Fn(bool) + Send + Sync + 'static) {
        let _ = self.on_bus_master.set(Box::new(told));
    }

    /// As a write to the command register does.
    #[cfg(test)]
    pub(crate) fn set_command(&self, command: u16) {
        self.set(0, command);
    }

    fn command(&self) -> u16 {
        self.value.load(Ordering::Acquire) as u16
    }

    /// The first port or address of the range, if the function answers there.
    pub fn base(&self) -> Option<u32> {
        let value = self.value.load(Ordering::Acquire);
        let base = (value >> 16) as u32;
        (value as u16 & self.enable != 0 && base != 0).then_some(base)
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
    /// Who follows its ranges: which base address register that is, and what to keep current.
    ranges: Vec<(usize, Arc<Decode>)>,
}

impl Function {
    /// A function that is nothing but its identity: base class, sub-class and programming
    /// interface are the bytes of `class`, from the top.
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let mut function = Self { bytes: [0; 256], writable: [0; 256], ranges: Vec::new() };
        function.put(0x00, &vendor.to_le_bytes());
        function.put(0x02, &device.to_le_bytes());
        function.put(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        function.allow(0x0c, &[0xff, 0xff]); // cache line size, latency timer
        function.allow(INTERRUPT_LINE, &[0xff]); // a note of the firmware's
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
        let decode = self.decode(n, COMMAND_IO);
        (self, decode)
    }

    /// Gives it base address register `n`, `bytes` of memory (a power of two, 16 at least) that start
    /// at `base`, for 32-bit addresses and without prefetching.
    #[must_use]
    fn with_memory(mut self, n: usize, base: u32, bytes: u32) -> (Self, Arc<Decode>) {
        self.put(bar(n), &base.to_le_bytes());
        self.allow(bar(n), &(!(bytes - 1)).to_le_bytes());
        let decode = self.decode(n, COMMAND_MEMORY);
        (self, decode)
    }

    /// Gives it interrupt pin A, and notes where that is wired to as a firmware would.
    #[must_use]
    fn with_pin(mut self, irq: u8) -> Self {
        self.put(INTERRUPT_LINE, &[irq]);
        self.put(INTERRUPT_PIN, &[1]);
        self
    }

    /// A follower of base address register `n`.
    fn decode(&mut self, n: usize, enable: u16) -> Arc<Decode> {
        let decode = Arc::new(Decode::new(enable));
        self.ranges.push((n, Arc::clone(&decode)));
        self.follow();
        decode
    }

    fn word(&self, offset: usize) -> u16 {
        let byte = |offset| u16::from(self.read(offset));
        byte(offset) | byte(offset + 1) << 8
    }

    fn follow(&self) {
        let command = self.word(COMMAND);
        for (n, decode) in &self.ranges {
            let base = u32::from(self.word(bar(*n))) | u32::from(self.word(bar(*n) + 2)) << 16;
            // The lowest bits say what kind of range it is.
            let kind = if decode.enable == COMMAND_IO { 3 } else { 0xf };
            decode.set(base & !kind, command);
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

/// Functions' ranges of one kind: it finds out at each access which one is there, so that a guest may
/// move them while its processors run.
#[derive(Default)]
struct Ranges(Vec<(Arc<Decode>, u32, Arc<dyn Device>)>);

impl Ranges {
    fn find(&self, address: u64, len: usize) -> Option<(&dyn Device, u64)> {
        self.0.iter().find_map(|(decode, size, device)| {
            let inside = address.checked_sub(decode.base()?.into())?;
            (inside + len as u64 <= u64::from(*size)).then_some((&**device, inside))
        })
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

/// The I/O ports in which functions have their ranges.
#[derive(Default)]
pub struct IoWindow(Ranges);

impl IoWindow {
    /// The first port.
    pub const PORT: u16 = 0xc000;
    /// How many there are: up to the last.
    pub const PORTS: u16 = 0x4000;

    /// Puts `device` where `decode` says, `ports` wide.
    pub fn add(&mut self, decode: Arc<Decode>, ports: u16, device: Arc<dyn Device>) {
        self.0.0.push((decode, ports.into(), device));
    }
}

impl Device for IoWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset + u64::from(Self::PORT), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset + u64::from(Self::PORT), data);
    }
}

/// The addresses in which functions have their ranges: [`layout::PCI_MMIO_START`] and
/// [`layout::PCI_MMIO_SIZE`].
#[derive(Default)]
pub struct MemoryWindow(Ranges);

impl MemoryWindow {
    /// Puts `device` where `decode` says, `bytes` wide.
    pub fn add(&mut self, decode: Arc<Decode>, bytes: u32, device: Arc<dyn Device>) {
        self.0.0.push((decode, bytes, device));
    }
}

impl Device for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset + layout::PCI_MMIO_START.0, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset + layout::PCI_MMIO_START.0, data);
    }
}

#[cfg(test)]
mod tests;
