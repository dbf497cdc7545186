//! The functions of an Intel 440FX host bridge and a PIIX4 (82371AB), as a Hyper-V generation 1
//! machine has them: a firmware or a kernel that knows those chips finds what it expects.
//!
//! Register numbers and their meaning are from the 82371AB's datasheet (Intel 290562-001).

use std::sync::Arc;

use super::{COMMAND_BUS_MASTER, COMMAND_IO, ConfigPorts, Decode, Function, IoWindow};
use crate::{PmBlock, SmBus};

const INTEL: u16 = 0x8086;

/// The device number of the PIIX4; the host bridge is 0.
const PIIX4: u8 = 1;

/// Ports of the bus-master registers, both channels.
pub const BUS_MASTER_PORTS: u16 = 16;

/// Where the bus-master registers are until a guest moves them.
pub const BUS_MASTER_PORT: u16 = IoWindow::PORT;

/// Ports there, as first and how many, where a write says nothing before a transfer is started:
/// status and table of each channel.
pub const QUIET_BUS_MASTER_PORTS: [(u16, u16); 4] = [
    (BUS_MASTER_PORT + 2, 1),
    (BUS_MASTER_PORT + 4, 4),
    (BUS_MASTER_PORT + 10, 1),
    (BUS_MASTER_PORT + 12, 4),
];

/// Puts the chips on the bus, with the IDE function. Returns where its bus-master registers are.
pub fn populate(bus: &mut ConfigPorts) -> Arc<Decode> {
    populate_without_ide(bus);
    let (ide, decode) = ide();
    bus.add(PIIX4, 1, ide);
    decode
}

/// Puts the chips on the bus for a machine that has no IDE disks.
pub fn populate_without_ide(bus: &mut ConfigPorts) {
    bus.add(0, 0, host_bridge());
    bus.add(PIIX4, 0, isa_bridge());
    bus.add(PIIX4, 3, power_management());
}

/// 82441FX. What it does about memory matters to a firmware, which none of our guests is yet.
fn host_bridge() -> Function {
    let mut function = Function::new(INTEL, 0x1237, 0x06_0000, 2);
    function.put(0x04, &0x0006_u16.to_le_bytes()); // memory and bus master, for good
    function.allow(0x50, &[0xff; 16]); // its control registers, PAM and SMRAM among them
    function
}

fn isa_bridge() -> Function {
    let mut function = Function::new(INTEL, 0x7110, 0x06_0100, 0);
    function.put(0x04, &0x0007_u16.to_le_bytes());
    // PIRQRC: where PCI interrupts go. To nowhere, until somebody says otherwise.
    function.put(0x60, &[0x80; 4]);
    function.allow(0x60, &[0x8f; 4]);
    function
}

/// Both channels at the ports and interrupts that they have had since the AT, so there is no
/// interrupt pin; bus mastering for each.
fn ide() -> (Function, Arc<Decode>) {
    // Programming interface: bus master, both channels in compatibility mode for good.
    let mut function = Function::new(INTEL, 0x7111, 0x01_0180, 1);
    function.put(0x04, &COMMAND_IO.to_le_bytes());
    function.allow(0x04, &(COMMAND_IO | COMMAND_BUS_MASTER).to_le_bytes());
    // Status: fast back-to-back, medium DEVSEL timing.
    function.put(0x06, &0x0280_u16.to_le_bytes());
    // IDETIM: both channels are decoded. Timings can be set and change nothing.
    function.put(0x40, &[0x00, 0x80, 0x00, 0x80]);
    function.allow(0x40, &[0xff; 5]); // and SIDETIM
    function.allow(0x48, &[0x0f]); // UDMACTL
    function.allow(0x4a, &[0x33, 0x33]); // UDMATIM
    function.with_io(4, BUS_MASTER_PORT, BUS_MASTER_PORTS)
}

/// The function that ACPI's fixed hardware belongs to. Its ports are fixed, and its SCI is wired to
/// ISA interrupt 9. The SMBus is its too.
fn power_management() -> Function {
    let mut function = Function::new(INTEL, 0x7113, 0x06_8000, 3);
    function.put(0x06, &0x0280_u16.to_le_bytes());
    function.put(0x40, &u32::from(PmBlock::PORT | 1).to_le_bytes()); // PMBASE
    function.put(0x80, &[1]); // PMREGMISC: the ports are decoded
    function.put(0x90, &u32::from(SmBus::PORT | 1).to_le_bytes()); // SMBBA
    function.put(0xd2, &[0x09]); // SMBHSTCFG: switched on, interrupts by IRQ 9
    function
}
