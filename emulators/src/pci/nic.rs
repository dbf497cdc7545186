//! The configuration space of an 82540EM.

use std::sync::Arc;

use hypervisor::layout;

use super::{
    COMMAND, COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY, Decode, FIRST_SLOT, Function,
    IoWindow, irq_of,
};

/// Bytes of the range with its registers.
pub const MEMORY: u32 = 0x2_0000;
/// Ports by which they are reached too.
pub const PORTS: u16 = 64;

/// Registers among them, as offset and bytes, where a write says nothing before something else is
/// accessed, which drivers do after each that matters: the EEPROM's wires, the pause between
/// interrupts and the hold on their causes, tables of addresses and VLANs.
pub const QUIET: [(u32, u32); 4] = [(0x10, 4), (0xc4, 4), (0xd8, 4), (0x5200, 0x600)];

const INTEL: u16 = 0x8086;

/// The NIC that is device number `slot`, and where its registers are, in memory and by ports. It has
/// no option ROM.
pub fn function(slot: u8) -> (Function, Arc<Decode>, Arc<Decode>) {
    let index = slot.saturating_sub(FIRST_SLOT);
    let mut function = Function::new(INTEL, 0x100e, 0x02_0000, 2);
    function.put(COMMAND, &(COMMAND_IO | COMMAND_MEMORY).to_le_bytes());
    function.allow(COMMAND, &(COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
    // Status: fast back-to-back, medium DEVSEL timing.
    function.put(0x06, &0x0280_u16.to_le_bytes());
    // Subsystem: a PRO/1000 MT Desktop Adapter.
    function.put(0x2c, &INTEL.to_le_bytes());
    function.put(0x2e, &0x001e_u16.to_le_bytes());
    function.put(0x3e, &[0xff]); // minimal grant
    let base = layout::PCI_MMIO_START.0 as u32 + MEMORY * u32::from(index);
    let (function, memory) = function.with_memory(0, base, MEMORY);
    // The first ports are the bus master's of the IDE function.
    let port = IoWindow::PORT + PORTS * (u16::from(index) + 1);
    let (function, ports) = function.with_io(1, port, PORTS);
    (function.with_pin(irq_of(slot)), memory, ports)
}
