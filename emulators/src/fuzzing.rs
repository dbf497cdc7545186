//! Entry points for fuzzers: any bytes are welcome, and what has to hold whatever they are is
//! asserted. libFuzzer calls them, and so do ordinary tests, with its corpus.

use std::sync::Arc;

use hypervisor::Device;

use crate::pci::{ConfigPorts, IoWindow, chipset};

/// Accesses to an IDE channel with disks and CD-ROM drives, and a memory image; see the source for
/// their form.
pub fn fuzz_ide(data: &[u8]) {
    crate::ide::fuzz(data);
}

/// Command blocks to a CD-ROM drive, 12 bytes each.
pub fn fuzz_atapi(data: &[u8]) {
    crate::ide::fuzz_packets(data);
}

/// Accesses to a NIC, with rings and frames; see the source for their form.
pub fn fuzz_e1000(data: &[u8]) {
    crate::e1000::fuzz(data);
}

/// Accesses to the interrupt controllers, with lines and processors that move; see the source for
/// their form.
pub fn fuzz_irqchip(data: &[u8]) {
    crate::irqchip::fuzz(data);
}

/// Accesses to the timer and to the real-time clock at times that are told.
pub fn fuzz_clocks(data: &[u8]) {
    crate::pit::fuzz(data);
    crate::rtc::fuzz(data);
}

/// Accesses to a serial port, and input that comes to it; see the source for their form.
pub fn fuzz_uart(data: &[u8]) {
    crate::uart::fuzz(data);
}

/// Accesses to the ports of PCI's configuration space: a byte chooses port and width, up to four are
/// written.
pub fn fuzz_pci(mut data: &[u8]) {
    let mut pci = ConfigPorts::new(Arc::new(crate::Nothing));
    let decode = chipset::populate(&mut pci);
    let mut window = IoWindow::default();
    window.add(Arc::clone(&decode), chipset::BUS_MASTER_PORTS, Arc::new(crate::Nothing));
    while let Some((&choice, rest)) = data.split_first() {
        let offset = u64::from(choice & 7);
        let width = 1 << (choice >> 3 & 3).min(2);
        let (written, rest) = rest.split_at(rest.len().min(width));
        data = rest;
        if choice & 0x80 == 0 && written.len() == width {
            pci.write(offset, written);
        } else {
            pci.read(offset, &mut [0xff; 4][..width]);
        }
        window.write(u64::from(u16::from(choice) << 6), &[choice]);
        assert_eq!(decode.base().map_or(0, |base| base % u32::from(chipset::BUS_MASTER_PORTS)), 0);
    }
    // Identities stay, whatever was written.
    for (function, id) in
        [(0, 0x1237_8086_u32), (8, 0x7110_8086), (9, 0x7111_8086), (11, 0x7113_8086)]
    {
        let mut found = [0xff; 4];
        pci.write(0, &(1_u32 << 31 | function << 8).to_le_bytes());
        pci.read(4, &mut found);
        assert_eq!(u32::from_le_bytes(found), id);
    }
}
