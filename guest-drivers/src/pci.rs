//! PCI's configuration space, by the two ports of mechanism 1 (PCI Local Bus Specification 3.0,
//! section 3.2.2.3.2).
//!
//! Only bus 0 is looked at, which is all that a machine without bridges has.

use crate::platform::Ports;

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// Offset of the vendor and device numbers.
const IDENTITY: u8 = 0x00;
/// Offset of the command and status registers.
const COMMAND: u8 = 0x04;
/// Offset of the doubleword with the header type.
const HEADER: u8 = 0x0c;
const MULTIFUNCTION: u32 = 0x80 << 16;

/// Offset of the doubleword with the interrupt line, in its lowest byte.
const INTERRUPT: u8 = 0x3c;

/// Command register: the function answers at its I/O ranges.
const COMMAND_IO: u32 = 1 << 0;
/// Command register: the function answers at its memory ranges.
const COMMAND_MEMORY: u32 = 1 << 1;
/// Command register: the function may access memory by itself.
const COMMAND_BUS_MASTER: u32 = 1 << 2;
/// The status register, whose bits a write of ones clears.
const STATUS: u32 = 0xffff_0000;

/// A function of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(u32);

impl Function {
    fn new(device: u32, function: u32) -> Self {
        Self(ENABLE | device << 11 | function << 8)
    }

    /// The doubleword at `offset`, a multiple of 4; all ones where there is no function.
    pub fn read(self, ports: &(impl Ports + ?Sized), offset: u8) -> u32 {
        ports.write_32(ADDRESS_PORT, self.0 | u32::from(offset));
        ports.read_32(DATA_PORT)
    }

    /// Writes the doubleword at `offset`, a multiple of 4.
    pub fn write(self, ports: &(impl Ports + ?Sized), offset: u8, value: u32) {
        ports.write_32(ADDRESS_PORT, self.0 | u32::from(offset));
        ports.write_32(DATA_PORT, value);
    }

    /// Lets it answer at its ports and addresses, and access memory.
    pub fn enable(self, ports: &(impl Ports + ?Sized)) {
        let command = self.read(ports, COMMAND) & !STATUS;
        self.write(ports, COMMAND, command | COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER);
    }

    /// The first port that base address register `n`, 0 to 5, names, if it names one.
    pub fn io_base(self, ports: &(impl Ports + ?Sized), n: u8) -> Option<u16> {
        const IS_IO: u32 = 1;
        let bar = self.read(ports, 0x10 + 4 * n.min(5));
        let base = u16::try_from(bar & !3).ok()?;
        (bar & IS_IO != 0 && base != 0).then_some(base)
    }

    /// The first address that base address register `n`, 0 to 5, names, if it names one below 4 GiB.
    pub fn memory_base(self, ports: &(impl Ports + ?Sized), n: u8) -> Option<u32> {
        const IS_IO: u32 = 1;
        let bar = self.read(ports, 0x10 + 4 * n.min(5));
        let base = bar & !0xf;
        (bar & IS_IO == 0 && base != 0).then_some(base)
    }

    /// Which of the 16 ISA interrupts its pin leads to, as whoever has connected it has noted down.
    pub fn isa_interrupt(self, ports: &(impl Ports + ?Sized)) -> Option<u8> {
        let line = self.read(ports, INTERRUPT) as u8;
        (1..16).contains(&line).then_some(line)
    }
}

/// The functions with these vendor and device numbers, in the order of their places.
pub fn find<'p, P: Ports + ?Sized>(
    ports: &'p P,
    vendor: u16,
    device: u16,
) -> impl Iterator<Item = Function> + use<'p, P> {
    let wanted = u32::from(device) << 16 | u32::from(vendor);
    // Every bus has a host bridge, as device 0; a machine without is asked once.
    let has_bus = Function::new(0, 0).read(ports, IDENTITY) != u32::MAX;
    let devices = 0..if has_bus { 32 } else { 0 };
    devices
        .flat_map(move |device| {
            let first = Function::new(device, 0);
            let identity = first.read(ports, IDENTITY);
            let several = identity != u32::MAX && first.read(ports, HEADER) & MULTIFUNCTION != 0;
            let others = (1..if several { 8 } else { 1 }).map(move |function| {
                let other = Function::new(device, function);
                (other, other.read(ports, IDENTITY))
            });
            core::iter::once((first, identity)).chain(others)
        })
        .filter(move |(_, identity)| *identity == wanted)
        .map(|(function, _)| function)
}
