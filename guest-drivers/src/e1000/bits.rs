//! Registers and descriptors of the 82540EM, as far as the driver uses them (PCI/PCI-X Family of
//! Gigabit Ethernet Controllers Software Developer's Manual, Intel 317453-006).

/// Offsets of registers, each of 32 bits (table 13-2).
pub(super) mod register {
    pub(crate) const CTRL: u32 = 0x0000;
    pub(crate) const STATUS: u32 = 0x0008;
    pub(crate) const EERD: u32 = 0x0014;
    pub(crate) const ICR: u32 = 0x00c0;
    pub(crate) const IMS: u32 = 0x00d0;
    pub(crate) const IMC: u32 = 0x00d8;
    pub(crate) const RCTL: u32 = 0x0100;
    pub(crate) const TCTL: u32 = 0x0400;
    pub(crate) const TIPG: u32 = 0x0410;
    pub(crate) const RDBAL: u32 = 0x2800;
    pub(crate) const RDBAH: u32 = 0x2804;
    pub(crate) const RDLEN: u32 = 0x2808;
    pub(crate) const RDH: u32 = 0x2810;
    pub(crate) const RDT: u32 = 0x2818;
    pub(crate) const TDBAL: u32 = 0x3800;
    pub(crate) const TDBAH: u32 = 0x3804;
    pub(crate) const TDLEN: u32 = 0x3808;
    pub(crate) const TDH: u32 = 0x3810;
    pub(crate) const TDT: u32 = 0x3818;
    pub(crate) const RAL0: u32 = 0x5400;
    pub(crate) const RAH0: u32 = 0x5404;
}

/// Device control (13.4.1).
pub(super) mod ctrl {
    /// Full duplex.
    pub(crate) const FD: u32 = 1 << 0;
    /// The speed is what the PHY has found.
    pub(crate) const ASDE: u32 = 1 << 5;
    /// Set link up.
    pub(crate) const SLU: u32 = 1 << 6;
    /// Reset; clears itself.
    pub(crate) const RST: u32 = 1 << 26;
}

/// Device status (13.4.2): the link is up.
pub(super) const STATUS_LU: u32 = 1 << 1;

/// EEPROM read (13.4.4): a word's number from bit 8 on, the word from bit 16 on.
pub(super) mod eerd {
    pub(crate) const START: u32 = 1 << 0;
    pub(crate) const DONE: u32 = 1 << 4;
}

/// Interrupt causes (13.4.17).
pub(super) mod cause {
    /// Few receive descriptors are left.
    pub(crate) const RXDMT0: u32 = 1 << 4;
    /// None is left.
    pub(crate) const RXO: u32 = 1 << 6;
    /// A frame has come.
    pub(crate) const RXT0: u32 = 1 << 7;
}

/// Receive control (13.4.22); buffers have 2048 bytes if nothing else is said.
pub(super) mod rctl {
    pub(crate) const EN: u32 = 1 << 1;
    /// Broadcasts are accepted.
    pub(crate) const BAM: u32 = 1 << 15;
    /// The check sequence does not get into memory.
    pub(crate) const SECRC: u32 = 1 << 26;
}

/// Transmit control (13.4.33).
pub(super) mod tctl {
    pub(crate) const EN: u32 = 1 << 1;
    /// Short frames are padded.
    pub(crate) const PSP: u32 = 1 << 3;
    /// Collision threshold and distance for full duplex, as the manual recommends.
    pub(crate) const COLLISIONS: u32 = 0x0f << 4 | 0x40 << 12;
}

/// Inter-packet gap: the values for copper (13.4.34).
pub(super) const TIPG_COPPER: u32 = 10 | 8 << 10 | 6 << 20;

/// The receive address is valid (13.5.3).
pub(super) const RAH_AV: u32 = 1 << 31;

/// The second half of a legacy transmit descriptor (3.3.3): a length of 16 bits, and these.
pub(super) mod transmit {
    /// End of packet.
    pub(crate) const EOP: u64 = 1 << 24;
    /// The NIC appends the check sequence.
    pub(crate) const IFCS: u64 = 1 << 25;
    /// The NIC shall report.
    pub(crate) const RS: u64 = 1 << 27;
    /// Its report: done.
    pub(crate) const DD: u64 = 1 << 32;
}

/// The second half of a receive descriptor (3.2.3): a length and a checksum of 16 bits each, and
/// these.
pub(super) mod receive {
    /// Done: there is a frame, or a piece of one.
    pub(crate) const DD: u64 = 1 << 32;
    /// End of packet.
    pub(crate) const EOP: u64 = 1 << 33;
    /// CRC, symbol, sequence, carrier extension and data errors: the frame is damaged.
    pub(crate) const ERRORS: u64 = 0x97 << 40;
}
