//! The bits and numbers of an ATA register file (ATA/ATAPI Command Set 2, T13/2015-D, and for the
//! register addresses ATA/ATAPI-7 volume 2, T13/1532D).

/// Status register.
pub(crate) mod status {
    /// The drive is busy; all other bits mean nothing.
    pub(crate) const BSY: u8 = 0x80;
    /// The drive takes commands.
    pub(crate) const DRDY: u8 = 0x40;
    /// The drive failed.
    pub(crate) const DF: u8 = 0x20;
    /// A seek is complete, which it always is.
    pub(crate) const DSC: u8 = 0x10;
    /// Data is to be moved.
    pub(crate) const DRQ: u8 = 0x08;
    /// The error register says why.
    pub(crate) const ERR: u8 = 0x01;
}

/// Error register.
pub(crate) mod error {
    /// The transfer over the cable failed; here, the memory that was to be used.
    pub(crate) const ICRC: u8 = 0x80;
    /// The data could not be read.
    pub(crate) const UNC: u8 = 0x40;
    /// There is no such sector.
    pub(crate) const IDNF: u8 = 0x10;
    /// The command was not carried out.
    pub(crate) const ABRT: u8 = 0x04;
    /// What the diagnostics found, drive 0 and 1: both are well.
    pub(crate) const DIAGNOSTICS_PASSED: u8 = 0x01;
}

/// Device register.
pub(crate) mod device {
    /// The address is an LBA.
    pub(crate) const LBA: u8 = 0x40;
    /// Drive 1.
    pub(crate) const DEV: u8 = 0x10;
    /// Obsolete bits that have to read as ones.
    pub(crate) const ONES: u8 = 0xa0;
}

/// Device control register.
pub(crate) mod control {
    /// Reads show what was written before the last write (48-bit addresses).
    pub(crate) const HOB: u8 = 0x80;
    /// Software reset, as long as it is set.
    pub(crate) const SRST: u8 = 0x04;
    /// No interrupts.
    pub(crate) const NIEN: u8 = 0x02;
}

/// Bus-master command register (82371AB, section 2.7.1).
pub(crate) mod master {
    /// Run.
    pub(crate) const START: u8 = 0x01;
    /// Towards memory: a read from the disk.
    pub(crate) const TO_MEMORY: u8 = 0x08;

    /// Status: a transfer is under way, or stopped before the table's end.
    pub(crate) const ACTIVE: u8 = 0x01;
    /// Status: memory could not be accessed.
    pub(crate) const ERROR: u8 = 0x02;
    /// Status: the drive has interrupted.
    pub(crate) const INTERRUPT: u8 = 0x04;
    /// Status: what a firmware notes about both drives' ability.
    pub(crate) const DRIVES_CAPABLE: u8 = 0x60;
}

/// Commands.
pub(crate) mod command {
    pub(crate) const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub(crate) const DEVICE_RESET: u8 = 0x08;
    pub(crate) const RECALIBRATE: u8 = 0x10;
    pub(crate) const READ_SECTORS: u8 = 0x20;
    pub(crate) const READ_SECTORS_NO_RETRY: u8 = 0x21;
    pub(crate) const READ_SECTORS_EXT: u8 = 0x24;
    pub(crate) const READ_DMA_EXT: u8 = 0x25;
    pub(crate) const READ_MULTIPLE_EXT: u8 = 0x29;
    pub(crate) const READ_LOG_EXT: u8 = 0x2f;
    pub(crate) const WRITE_SECTORS: u8 = 0x30;
    pub(crate) const WRITE_SECTORS_NO_RETRY: u8 = 0x31;
    pub(crate) const WRITE_SECTORS_EXT: u8 = 0x34;
    pub(crate) const WRITE_DMA_EXT: u8 = 0x35;
    pub(crate) const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub(crate) const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub(crate) const READ_VERIFY: u8 = 0x40;
    pub(crate) const READ_VERIFY_NO_RETRY: u8 = 0x41;
    pub(crate) const READ_VERIFY_EXT: u8 = 0x42;
    pub(crate) const SEEK: u8 = 0x70;
    pub(crate) const EXECUTE_DIAGNOSTIC: u8 = 0x90;
    pub(crate) const INITIALIZE_PARAMETERS: u8 = 0x91;
    pub(crate) const PACKET: u8 = 0xa0;
    pub(crate) const IDENTIFY_PACKET_DEVICE: u8 = 0xa1;
    pub(crate) const SMART: u8 = 0xb0;
    pub(crate) const READ_MULTIPLE: u8 = 0xc4;
    pub(crate) const WRITE_MULTIPLE: u8 = 0xc5;
    pub(crate) const SET_MULTIPLE: u8 = 0xc6;
    pub(crate) const READ_DMA: u8 = 0xc8;
    pub(crate) const READ_DMA_NO_RETRY: u8 = 0xc9;
    pub(crate) const WRITE_DMA: u8 = 0xca;
    pub(crate) const WRITE_DMA_NO_RETRY: u8 = 0xcb;
    pub(crate) const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub(crate) const IDLE_IMMEDIATE: u8 = 0xe1;
    pub(crate) const STANDBY: u8 = 0xe2;
    pub(crate) const IDLE: u8 = 0xe3;
    pub(crate) const CHECK_POWER_MODE: u8 = 0xe5;
    pub(crate) const SLEEP: u8 = 0xe6;
    pub(crate) const FLUSH_CACHE: u8 = 0xe7;
    pub(crate) const FLUSH_CACHE_EXT: u8 = 0xea;
    pub(crate) const IDENTIFY_DEVICE: u8 = 0xec;
    pub(crate) const SET_FEATURES: u8 = 0xef;
}

/// What the count register says about a PACKET command's data.
pub(crate) mod reason {
    /// The command block is wanted.
    pub(crate) const COMMAND: u8 = 0x01;
    /// Data goes to the guest.
    pub(crate) const TO_GUEST: u8 = 0x02;
    /// The command has ended.
    pub(crate) const STATUS: u8 = 0x03;
}

/// Values of the features register: sub-commands of SET FEATURES, SMART and DATA SET MANAGEMENT.
pub(crate) mod feature {
    pub(crate) const ENABLE_WRITE_CACHE: u8 = 0x02;
    pub(crate) const TRANSFER_MODE: u8 = 0x03;
    pub(crate) const KEEP_SETTINGS: u8 = 0x66;
    pub(crate) const DISABLE_LOOK_AHEAD: u8 = 0x55;
    pub(crate) const DISABLE_WRITE_CACHE: u8 = 0x82;
    pub(crate) const ENABLE_LOOK_AHEAD: u8 = 0xaa;
    pub(crate) const REVERT_SETTINGS: u8 = 0xcc;

    pub(crate) const SMART_READ_DATA: u8 = 0xd0;
    pub(crate) const SMART_READ_THRESHOLDS: u8 = 0xd1;
    pub(crate) const SMART_AUTOSAVE: u8 = 0xd2;
    pub(crate) const SMART_READ_LOG: u8 = 0xd5;
    pub(crate) const SMART_ENABLE: u8 = 0xd8;
    pub(crate) const SMART_DISABLE: u8 = 0xd9;
    pub(crate) const SMART_RETURN_STATUS: u8 = 0xda;

    pub(crate) const TRIM: u8 = 0x01;
    /// The data of a PACKET command goes by DMA.
    pub(crate) const PACKET_DMA: u8 = 0x01;
}
