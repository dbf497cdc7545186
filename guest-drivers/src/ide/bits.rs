//! The numbers that an ATA driver needs: registers and commands (ATA/ATAPI Command Set 2,
//! T13/2015-D), and the bus master's (82371AB, section 2.7).

/// Registers of the command block, from its first port.
pub(super) mod register {
    pub(in crate::ide) const DATA: u16 = 0;
    pub(in crate::ide) const ERROR: u16 = 1;
    pub(in crate::ide) const COUNT: u16 = 2;
    pub(in crate::ide) const LBA: [u16; 3] = [3, 4, 5];
    pub(in crate::ide) const DEVICE: u16 = 6;
    /// Command when written, status when read, which lets go of the interrupt.
    pub(in crate::ide) const COMMAND: u16 = 7;
}

/// Status register.
pub(super) mod status {
    pub(in crate::ide) const BSY: u8 = 0x80;
    pub(in crate::ide) const DF: u8 = 0x20;
    pub(in crate::ide) const DRQ: u8 = 0x08;
    pub(in crate::ide) const ERR: u8 = 0x01;
}

/// Device register.
pub(super) mod device {
    /// Bits that were to be ones once, and the address is an LBA.
    pub(in crate::ide) const LBA: u8 = 0xe0;
    /// Drive 1.
    pub(in crate::ide) const DEV: u8 = 0x10;
}

/// Device control register: interrupts, and no reset.
pub(super) const CONTROL: u8 = 0;

/// Bus-master registers of a channel, from its first port.
pub(super) mod master {
    pub(in crate::ide) const COMMAND: u16 = 0;
    pub(in crate::ide) const STATUS: u16 = 2;
    pub(in crate::ide) const TABLE: u16 = 4;

    /// Command: run.
    pub(in crate::ide) const START: u8 = 0x01;
    /// Command: towards memory, a read from the disk.
    pub(in crate::ide) const TO_MEMORY: u8 = 0x08;

    /// Status: memory could not be accessed. Cleared by a one.
    pub(in crate::ide) const ERROR: u8 = 0x02;
    /// Status: the drive has interrupted. Cleared by a one.
    pub(in crate::ide) const INTERRUPT: u8 = 0x04;
    /// Status: what a firmware has noted about the drives, to be left as it is.
    pub(in crate::ide) const DRIVES_CAPABLE: u8 = 0x60;
}

/// Commands. Where there are two, the second has 48 bits of address.
pub(super) mod command {
    pub(in crate::ide) const READ_SECTORS: [u8; 2] = [0x20, 0x24];
    pub(in crate::ide) const WRITE_SECTORS: [u8; 2] = [0x30, 0x34];
    pub(in crate::ide) const READ_MULTIPLE: [u8; 2] = [0xc4, 0x29];
    pub(in crate::ide) const WRITE_MULTIPLE: [u8; 2] = [0xc5, 0x39];
    pub(in crate::ide) const READ_DMA: [u8; 2] = [0xc8, 0x25];
    pub(in crate::ide) const WRITE_DMA: [u8; 2] = [0xca, 0x35];
    pub(in crate::ide) const FLUSH_CACHE: [u8; 2] = [0xe7, 0xea];
    pub(in crate::ide) const SET_MULTIPLE: u8 = 0xc6;
    pub(in crate::ide) const IDENTIFY_DEVICE: u8 = 0xec;
}
