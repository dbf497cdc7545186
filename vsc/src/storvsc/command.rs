//! SCSI commands: those a disk driver needs, and what their failures look like.

use core::fmt;

use vmbus::vstor::{
    DataDirection, MAX_CDB, MAX_SENSE, NtStatus, ScsiRequest, SrbStatus, VstorPacket,
};

/// A SCSI command for one logical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    lun: u8,
    direction: DataDirection,
    cdb_len: u8,
    cdb: [u8; MAX_CDB],
}

/// Operation codes (SPC-4, SBC-3).
mod opcode {
    pub(super) const TEST_UNIT_READY: u8 = 0x00;
    pub(super) const INQUIRY: u8 = 0x12;
    pub(super) const READ_CAPACITY_10: u8 = 0x25;
    pub(super) const SYNCHRONIZE_CACHE: u8 = 0x35;
    pub(super) const READ_16: u8 = 0x88;
    pub(super) const WRITE_16: u8 = 0x8a;
    pub(super) const SERVICE_ACTION_IN: u8 = 0x9e;
    pub(super) const READ_CAPACITY_16: u8 = 0x10;
}

/// Force unit access, in byte 1 of a write.
const FUA: u8 = 1 << 3;

impl Command {
    /// Any command. `None` if the CDB is empty or longer than 16 bytes.
    pub fn new(lun: u8, cdb: &[u8], direction: DataDirection) -> Option<Self> {
        let mut command = Self { lun, direction, cdb_len: 0, cdb: [0; MAX_CDB] };
        command.cdb.get_mut(..cdb.len())?.copy_from_slice(cdb);
        command.cdb_len = u8::try_from(cdb.len()).ok().filter(|len| *len > 0)?;
        Some(command)
    }

    fn fixed<const N: usize>(lun: u8, cdb: [u8; N], direction: DataDirection) -> Self {
        const { assert!(N > 0 && N <= MAX_CDB) };
        let mut all = [0; MAX_CDB];
        for (to, from) in all.iter_mut().zip(cdb) {
            *to = from;
        }
        Self { lun, direction, cdb_len: N as u8, cdb: all }
    }

    #[inline]
    fn transfer(lun: u8, opcode: u8, flags: u8, lba: u64, blocks: u32, way: DataDirection) -> Self {
        let ([a, b, c, d, e, f, g, h], [i, j, k, l]) = (lba.to_be_bytes(), blocks.to_be_bytes());
        let cdb = [opcode, flags, a, b, c, d, e, f, g, h, i, j, k, l, 0, 0];
        Self { lun, direction: way, cdb_len: 16, cdb }
    }

    /// READ(16) of `blocks` blocks.
    #[inline]
    pub fn read(lun: u8, lba: u64, blocks: u32) -> Self {
        Self::transfer(lun, opcode::READ_16, 0, lba, blocks, DataDirection::Read)
    }

    /// WRITE(16) of `blocks` blocks.
    #[inline]
    pub fn write(lun: u8, lba: u64, blocks: u32) -> Self {
        Self::transfer(lun, opcode::WRITE_16, 0, lba, blocks, DataDirection::Write)
    }

    /// WRITE(16) that is on the medium when it has ended.
    #[inline]
    pub fn write_through(lun: u8, lba: u64, blocks: u32) -> Self {
        Self::transfer(lun, opcode::WRITE_16, FUA, lba, blocks, DataDirection::Write)
    }

    /// SYNCHRONIZE CACHE(10) of the whole unit.
    pub fn flush(lun: u8) -> Self {
        let cdb = [opcode::SYNCHRONIZE_CACHE, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        Self::fixed(lun, cdb, DataDirection::None)
    }

    /// TEST UNIT READY.
    pub fn test_unit_ready(lun: u8) -> Self {
        Self::fixed(lun, [opcode::TEST_UNIT_READY, 0, 0, 0, 0, 0], DataDirection::None)
    }

    /// INQUIRY for the standard data, `len` bytes of it.
    pub fn inquiry(lun: u8, len: u8) -> Self {
        Self::fixed(lun, [opcode::INQUIRY, 0, 0, 0, len, 0], DataDirection::Read)
    }

    /// READ CAPACITY(16), `len` bytes of the answer.
    pub fn read_capacity_16(lun: u8, len: u8) -> Self {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[13]) = (opcode::SERVICE_ACTION_IN, opcode::READ_CAPACITY_16, len);
        Self::fixed(lun, cdb, DataDirection::Read)
    }

    /// READ CAPACITY(10), whose answer has 8 bytes.
    pub fn read_capacity_10(lun: u8) -> Self {
        let cdb = [opcode::READ_CAPACITY_10, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        Self::fixed(lun, cdb, DataDirection::Read)
    }

    pub(super) fn opcode(&self) -> u8 {
        self.cdb[0]
    }

    /// Whether it has data.
    pub(super) fn has_data(&self) -> bool {
        self.direction != DataDirection::None
    }

    /// The request for a transfer of `len` bytes.
    #[inline]
    pub(super) fn request(&self, len: u32) -> ScsiRequest {
        let mut cdb_or_sense = [0; MAX_SENSE];
        if let Some(front) = cdb_or_sense.first_chunk_mut::<MAX_CDB>() {
            *front = self.cdb;
        }
        ScsiRequest {
            length: size_of::<ScsiRequest>() as u16,
            srb_status: SrbStatus::Pending,
            scsi_status: 0,
            port: 0,
            path: 0,
            target: 0,
            lun: self.lun,
            cdb_len: self.cdb_len,
            sense_len: MAX_SENSE as u8,
            data_in: self.direction,
            reserved: 0,
            transfer_len: len,
            cdb_or_sense,
            reserved1: 0,
            queue_tag: 0,
            queue_action: 0,
            srb_flags: 0,
            timeout: 60,
            sort_key: 0,
        }
    }
}

/// Why a unit refused a command (SPC-4, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// What kind of reason: 5 is an illegal request, 6 unit attention.
    pub key: u8,
    /// Additional sense code.
    pub code: u8,
    /// Its qualifier.
    pub qualifier: u8,
}

impl Sense {
    /// From sense data in either format; `None` if there is none.
    fn parse(data: &[u8]) -> Option<Self> {
        let at = |index: usize| data.get(index).copied();
        match at(0)? & 0x7f {
            0x70 | 0x71 => Some(Self {
                key: at(2)? & 0xf,
                code: at(12).unwrap_or(0),
                qualifier: at(13).unwrap_or(0),
            }),
            0x72 | 0x73 => Some(Self { key: at(1)? & 0xf, code: at(2)?, qualifier: at(3)? }),
            _ => None,
        }
    }

    /// Something has changed that the guest should know; the command may be tried again.
    pub fn is_unit_attention(self) -> bool {
        self.key == 6
    }
}

/// How a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Failure {
    /// What became of the packet.
    pub status: NtStatus,
    /// What the controller says, without flags.
    pub srb_status: SrbStatus,
    /// What the unit says: 2 is *check condition*.
    pub scsi_status: u8,
    /// And why, if it says.
    pub sense: Option<Sense>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, srb_status, scsi_status, sense } = self;
        if *status != NtStatus::Success {
            return write!(f, "the controller refused the request with {:#x}", status.0);
        }
        match sense {
            Some(Sense { key, code, qualifier }) => {
                write!(
                    f,
                    "the unit refused the command with sense {key:x}/{code:02x}/{qualifier:02x}"
                )
            }
            None => write!(
                f,
                "the command failed with SRB status {:#x} and SCSI status {scsi_status:#x}",
                srb_status.0
            ),
        }
    }
}

/// How the answer says that a command went: the bytes transferred, or why it failed.
#[inline]
pub(super) fn outcome(answer: &VstorPacket, request: &ScsiRequest) -> Result<u32, Failure> {
    let flags = SrbStatus::FLAG_SENSE_VALID | SrbStatus::FLAG_QUEUE_FROZEN;
    let srb_status = SrbStatus(request.srb_status.0 & !flags);
    // An underrun is no failure: it shows in the count.
    if answer.status == NtStatus::Success
        && matches!(srb_status, SrbStatus::Success | SrbStatus::DataOverrun)
        && request.scsi_status == 0
    {
        return Ok(request.transfer_len);
    }
    let sense_valid = request.srb_status.0 & SrbStatus::FLAG_SENSE_VALID != 0;
    let sense_len = usize::from(request.sense_len).min(MAX_SENSE);
    let sense = request.cdb_or_sense.get(..sense_len).filter(|_| sense_valid);
    Err(Failure {
        status: answer.status,
        srb_status,
        scsi_status: request.scsi_status,
        sense: sense.and_then(Sense::parse),
    })
}
