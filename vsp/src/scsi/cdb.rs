//! Command descriptor blocks: the operation codes, and fields read without a thought about length.

/// The first byte of a CDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationCode(pub u8);

#[allow(missing_docs, reason = "the standard's own names")]
impl OperationCode {
    pub const TEST_UNIT_READY: Self = Self(0x00);
    pub const REQUEST_SENSE: Self = Self(0x03);
    pub const READ_6: Self = Self(0x08);
    pub const WRITE_6: Self = Self(0x0a);
    pub const INQUIRY: Self = Self(0x12);
    pub const MODE_SENSE_6: Self = Self(0x1a);
    pub const START_STOP_UNIT: Self = Self(0x1b);
    pub const PREVENT_ALLOW_MEDIUM_REMOVAL: Self = Self(0x1e);
    pub const READ_CAPACITY_10: Self = Self(0x25);
    pub const READ_10: Self = Self(0x28);
    pub const WRITE_10: Self = Self(0x2a);
    pub const VERIFY_10: Self = Self(0x2f);
    pub const SYNCHRONIZE_CACHE_10: Self = Self(0x35);
    pub const WRITE_SAME_10: Self = Self(0x41);
    pub const UNMAP: Self = Self(0x42);
    pub const MODE_SENSE_10: Self = Self(0x5a);
    pub const READ_16: Self = Self(0x88);
    pub const WRITE_16: Self = Self(0x8a);
    pub const VERIFY_16: Self = Self(0x8f);
    pub const SYNCHRONIZE_CACHE_16: Self = Self(0x91);
    pub const WRITE_SAME_16: Self = Self(0x93);
    /// READ CAPACITY (16) is one of its service actions.
    pub const SERVICE_ACTION_IN_16: Self = Self(0x9e);
    pub const REPORT_LUNS: Self = Self(0xa0);
    pub const READ_12: Self = Self(0xa8);
    pub const WRITE_12: Self = Self(0xaa);
    pub const VERIFY_12: Self = Self(0xaf);

    /// Bytes of a CDB with this code: its top three bits are a group (SPC-4 4.2.5.1). Groups
    /// without a length, of which no command is known here, count as the code alone.
    const fn cdb_len(self) -> usize {
        match self.0 >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            5 => 12,
            _ => 1,
        }
    }
}

/// A complete CDB of up to 16 bytes, zeroes behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cdb([u8; 16]);

impl Cdb {
    /// `None` if it is shorter than its operation code says.
    pub(super) fn new(bytes: &[u8]) -> Option<Self> {
        let len = OperationCode(*bytes.first()?).cdb_len();
        let mut cdb = [0; 16];
        cdb[..len].copy_from_slice(bytes.get(..len)?);
        Some(Self(cdb))
    }

    pub(super) fn code(&self) -> OperationCode {
        OperationCode(self.0[0])
    }

    pub(super) const fn u8<const AT: usize>(&self) -> u8 {
        const { assert!(AT < 16) };
        self.0[AT]
    }

    pub(super) const fn u16<const AT: usize>(&self) -> u16 {
        const { assert!(AT + 1 < 16) };
        u16::from_be_bytes([self.0[AT], self.0[AT + 1]])
    }

    pub(super) const fn u32<const AT: usize>(&self) -> u32 {
        const { assert!(AT + 3 < 16) };
        u32::from_be_bytes([self.0[AT], self.0[AT + 1], self.0[AT + 2], self.0[AT + 3]])
    }

    /// Of 8 bytes from byte 2 on, where every 16-byte command has its LBA.
    pub(super) fn lba_16(&self) -> u64 {
        u64::from(self.u32::<2>()) << 32 | u64::from(self.u32::<6>())
    }
}
