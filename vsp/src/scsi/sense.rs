//! Sense data: why a command was not done.

/// The broad reason (SPC-4 table 48).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SenseKey(pub u8);

impl SenseKey {
    /// Nothing to report.
    pub const NO_SENSE: Self = Self(0x0);
    /// The medium could not be read or written.
    pub const MEDIUM_ERROR: Self = Self(0x3);
    /// The command is wrong.
    pub const ILLEGAL_REQUEST: Self = Self(0x5);
    /// Something about the unit is not as it was.
    pub const UNIT_ATTENTION: Self = Self(0x6);
    /// The medium is protected.
    pub const DATA_PROTECT: Self = Self(0x7);
}

/// The narrow reason: additional sense code and qualifier (SPC-4 annex E).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdditionalSense(pub u8, pub u8);

/// The byte of a command that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldPointer {
    /// In the CDB, or else in the parameter data.
    pub in_cdb: bool,
    /// Counted from 0.
    pub byte: u16,
}

/// Why a command was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// The broad reason.
    pub key: SenseKey,
    /// The narrow reason.
    pub additional: AdditionalSense,
    /// The byte that is wrong, where it is known.
    pub field: Option<FieldPointer>,
}

impl Sense {
    /// Bytes of [`Self::to_bytes`].
    pub const LEN: usize = 18;

    /// Nothing to report.
    pub const NONE: Self = Self::new(SenseKey::NO_SENSE, 0x00, 0x00);
    /// The host could not write.
    pub const WRITE_ERROR: Self = Self::new(SenseKey::MEDIUM_ERROR, 0x0c, 0x00);
    /// The host could not read.
    pub const UNRECOVERED_READ_ERROR: Self = Self::new(SenseKey::MEDIUM_ERROR, 0x11, 0x00);
    /// Parameters are shorter than they say, or longer than can be.
    pub const PARAMETER_LIST_LENGTH_ERROR: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x1a, 0x00);
    /// There is no such command here.
    pub const INVALID_OPERATION_CODE: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x20, 0x00);
    /// It reaches past the end of the disk.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x21, 0x00);
    /// A field of the CDB has a value it cannot have.
    pub const INVALID_FIELD_IN_CDB: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x24, 0x00);
    /// There is no such logical unit.
    pub const LOGICAL_UNIT_NOT_SUPPORTED: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x25, 0x00);
    /// A field of the parameters has a value it cannot have.
    pub const INVALID_FIELD_IN_PARAMETERS: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x26, 0x00);
    /// The disk is read-only.
    pub const WRITE_PROTECTED: Self = Self::new(SenseKey::DATA_PROTECT, 0x27, 0x00);
    /// The host has no space left for it.
    pub const SPACE_ALLOCATION_FAILED: Self = Self::new(SenseKey::DATA_PROTECT, 0x27, 0x07);
    /// The disk has another size than before.
    pub const CAPACITY_HAS_CHANGED: Self = Self::new(SenseKey::UNIT_ATTENTION, 0x2a, 0x09);
    /// Mode pages have no saved values.
    pub const SAVING_NOT_SUPPORTED: Self = Self::new(SenseKey::ILLEGAL_REQUEST, 0x39, 0x00);

    const fn new(key: SenseKey, code: u8, qualifier: u8) -> Self {
        Self { key, additional: AdditionalSense(code, qualifier), field: None }
    }

    /// [`Self::INVALID_FIELD_IN_CDB`], and it is this byte.
    pub const fn invalid_cdb_byte(byte: u16) -> Self {
        let mut sense = Self::INVALID_FIELD_IN_CDB;
        sense.field = Some(FieldPointer { in_cdb: true, byte });
        sense
    }

    /// [`Self::INVALID_FIELD_IN_PARAMETERS`], and it is this byte.
    pub const fn invalid_parameter_byte(byte: u16) -> Self {
        let mut sense = Self::INVALID_FIELD_IN_PARAMETERS;
        sense.field = Some(FieldPointer { in_cdb: false, byte });
        sense
    }

    /// Fixed format, current error (SPC-4 table 53).
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0] = 0x70;
        bytes[2] = self.key.0;
        bytes[7] = (Self::LEN - 8) as u8;
        bytes[12] = self.additional.0;
        bytes[13] = self.additional.1;
        if let Some(field) = self.field {
            // Sense-key specific: valid, and in the CDB or not (table 57).
            bytes[15] = 0x80 | if field.in_cdb { 0x40 } else { 0 };
            bytes[16..18].copy_from_slice(&field.byte.to_be_bytes());
        }
        bytes
    }

    /// Descriptor format, without descriptors (SPC-4 table 28).
    pub(super) fn to_descriptor_bytes(self) -> [u8; 8] {
        [0x72, self.key.0, self.additional.0, self.additional.1, 0, 0, 0, 0]
    }
}
