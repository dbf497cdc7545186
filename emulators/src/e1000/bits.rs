//! Registers and bits of the 82540EM (Intel 317453, "PCI/PCI-X Family of Gigabit Ethernet
//! Controllers Software Developer's Manual", chapter 13), by their names there.

/// Offsets of registers in the memory range.
pub(super) mod reg {
    pub const CTRL: u32 = 0x0000;
    /// The same register once more.
    pub const CTRL_DUP: u32 = 0x0004;
    pub const STATUS: u32 = 0x0008;
    pub const EECD: u32 = 0x0010;
    pub const EERD: u32 = 0x0014;
    pub const CTRL_EXT: u32 = 0x0018;
    pub const MDIC: u32 = 0x0020;
    pub const FCAL: u32 = 0x0028;
    pub const FCAH: u32 = 0x002c;
    pub const FCT: u32 = 0x0030;
    pub const VET: u32 = 0x0038;
    pub const ICR: u32 = 0x00c0;
    pub const ITR: u32 = 0x00c4;
    pub const ICS: u32 = 0x00c8;
    pub const IMS: u32 = 0x00d0;
    pub const IMC: u32 = 0x00d8;
    pub const RCTL: u32 = 0x0100;
    pub const FCTTV: u32 = 0x0170;
    pub const TXCW: u32 = 0x0178;
    pub const TCTL: u32 = 0x0400;
    pub const TIPG: u32 = 0x0410;
    pub const AIT: u32 = 0x0458;
    pub const LEDCTL: u32 = 0x0e00;
    pub const PBA: u32 = 0x1000;
    pub const FCRTL: u32 = 0x2160;
    pub const FCRTH: u32 = 0x2168;
    pub const RDBAL: u32 = 0x2800;
    pub const RDBAH: u32 = 0x2804;
    pub const RDLEN: u32 = 0x2808;
    pub const RDH: u32 = 0x2810;
    pub const RDT: u32 = 0x2818;
    pub const RDTR: u32 = 0x2820;
    pub const RXDCTL: u32 = 0x2828;
    pub const RADV: u32 = 0x282c;
    pub const TXDMAC: u32 = 0x3000;
    pub const TDBAL: u32 = 0x3800;
    pub const TDH: u32 = 0x3810;
    pub const TDT: u32 = 0x3818;
    pub const TIDV: u32 = 0x3820;
    pub const TXDCTL: u32 = 0x3828;
    pub const TADV: u32 = 0x382c;
    pub const TSPMT: u32 = 0x3830;
    /// The first of the statistics registers.
    pub const STATISTICS: u32 = 0x4000;
    /// The last of them.
    pub const STATISTICS_LAST: u32 = 0x40fc;
    pub const RXCSUM: u32 = 0x5000;
    /// The first of 128.
    pub const MTA: u32 = 0x5200;
    pub const MTA_LAST: u32 = 0x53fc;
    /// The first of 16 pairs, RAL and RAH.
    pub const RA: u32 = 0x5400;
    pub const RA_LAST: u32 = 0x547c;
    /// The first of 128.
    pub const VFTA: u32 = 0x5600;
    pub const VFTA_LAST: u32 = 0x57fc;
    pub const WUC: u32 = 0x5800;
    pub const WUFC: u32 = 0x5808;
    pub const MANC: u32 = 0x5820;
}

/// Device control.
pub(super) mod ctrl {
    pub const FULL_DUPLEX: u32 = 1 << 0;
    /// SLU: the driver wants the link up.
    pub const SET_LINK_UP: u32 = 1 << 6;
    pub const SPEED_1000: u32 = 2 << 8;
    pub const RST: u32 = 1 << 26;
    /// VLAN mode: tags are taken off and put in.
    pub const VME: u32 = 1 << 30;
    pub const PHY_RST: u32 = 1 << 31;
}

/// Device status.
pub(super) mod status {
    pub const FULL_DUPLEX: u32 = 1 << 0;
    pub const LINK_UP: u32 = 1 << 1;
    pub const SPEED_1000: u32 = 2 << 6;
    pub const DETECTED_1000: u32 = 2 << 8;
}

/// EEPROM control: the wires of the chip, which software moves.
pub(super) mod eecd {
    pub const CLOCK: u32 = 1 << 0;
    pub const SELECT: u32 = 1 << 1;
    pub const DATA_IN: u32 = 1 << 2;
    pub const DATA_OUT: u32 = 1 << 3;
    /// Whether its flash may be written.
    pub const FLASH_WRITES: u32 = 3 << 4;
    pub const REQUEST: u32 = 1 << 6;
    pub const GRANT: u32 = 1 << 7;
    pub const PRESENT: u32 = 1 << 8;
}

/// EEPROM read.
pub(super) mod eerd {
    pub const START: u32 = 1 << 0;
    pub const DONE: u32 = 1 << 4;
    pub const ADDRESS_SHIFT: u32 = 8;
    pub const DATA_SHIFT: u32 = 16;
}

/// Access to the PHY.
pub(super) mod mdic {
    pub const REGISTER_SHIFT: u32 = 16;
    pub const PHY_SHIFT: u32 = 21;
    pub const WRITE: u32 = 1 << 26;
    pub const READ: u32 = 2 << 26;
    pub const OPERATION: u32 = 3 << 26;
    pub const READY: u32 = 1 << 28;
    pub const INTERRUPT: u32 = 1 << 29;
    pub const ERROR: u32 = 1 << 30;
}

/// Causes of interrupts.
pub(super) mod cause {
    /// Descriptors were written back.
    pub const TXDW: u32 = 1 << 0;
    /// The transmit ring is empty.
    pub const TXQE: u32 = 1 << 1;
    /// The link has changed.
    pub const LSC: u32 = 1 << 2;
    /// Few receive descriptors are left.
    pub const RXDMT0: u32 = 1 << 4;
    /// Frames have come.
    pub const RXT0: u32 = 1 << 7;
    /// An access to the PHY is done.
    pub const MDAC: u32 = 1 << 9;
    /// All that there are.
    pub const ALL: u32 = 0x0001_ffff;
}

/// Receive control.
pub(super) mod rctl {
    pub const EN: u32 = 1 << 1;
    /// All unicast frames.
    pub const UPE: u32 = 1 << 3;
    /// All multicast frames.
    pub const MPE: u32 = 1 << 4;
    /// Long frames.
    pub const LPE: u32 = 1 << 5;
    /// Loopback.
    pub const LBM: u32 = 3 << 6;
    pub const RDMTS_SHIFT: u32 = 8;
    pub const MO_SHIFT: u32 = 12;
    /// Broadcast frames.
    pub const BAM: u32 = 1 << 15;
    pub const BSIZE_SHIFT: u32 = 16;
    /// Frames are filtered by VLAN.
    pub const VFE: u32 = 1 << 18;
    /// Buffer sizes are 16 times as large.
    pub const BSEX: u32 = 1 << 25;
    /// The check sequence is taken off.
    pub const SECRC: u32 = 1 << 26;
}

/// Transmit control.
pub(super) mod tctl {
    pub const EN: u32 = 1 << 1;
}

/// Checksums of received frames.
pub(super) mod rxcsum {
    pub const IPOFL: u32 = 1 << 8;
    pub const TUOFL: u32 = 1 << 9;
}

/// RAH: the address is valid.
pub(super) const ADDRESS_VALID: u32 = 1 << 31;

/// Receive descriptors: status, and errors above it.
pub(super) mod rxd {
    pub const DD: u8 = 1 << 0;
    pub const EOP: u8 = 1 << 1;
    /// Nothing was found out about checksums.
    pub const IXSM: u8 = 1 << 2;
    /// A VLAN tag was taken off.
    pub const VP: u8 = 1 << 3;
    pub const TCPCS: u8 = 1 << 5;
    pub const IPCS: u8 = 1 << 6;

    pub const ERROR_TCP: u8 = 1 << 5;
    pub const ERROR_IP: u8 = 1 << 6;
    pub const ERROR_DATA: u8 = 1 << 7;
}

/// Transmit descriptors: the command byte, which all kinds have at the same place.
pub(super) mod txd {
    pub const EOP: u8 = 1 << 0;
    /// Legacy: a checksum is put in.
    pub const IC: u8 = 1 << 2;
    /// Extended: the packet is cut.
    pub const TSE: u8 = 1 << 2;
    /// The driver wants to see DD.
    pub const RS: u8 = 1 << 3;
    /// No legacy descriptor.
    pub const DEXT: u8 = 1 << 5;
    /// A VLAN tag is put in.
    pub const VLE: u8 = 1 << 6;
    /// The interrupt can wait.
    pub const IDE: u8 = 1 << 7;

    pub const DD: u8 = 1 << 0;

    /// Context: TCP rather than UDP, IPv4 rather than IPv6.
    pub const TUCMD_TCP: u8 = 1 << 0;
    pub const TUCMD_IP: u8 = 1 << 1;

    /// Data: the IP header's checksum, and that of TCP or UDP.
    pub const POPTS_IXSM: u8 = 1 << 0;
    pub const POPTS_TXSM: u8 = 1 << 1;

    /// Kinds of extended descriptors.
    pub const DTYP_CONTEXT: u8 = 0;
    pub const DTYP_DATA: u8 = 1;
}
