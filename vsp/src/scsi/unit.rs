//! A logical unit: one disk and its answer to every command.

use std::sync::atomic::{AtomicU64, Ordering};

use backends::block::{Capacity, Geometry};

use super::cdb::{Cdb, OperationCode};
use super::sense::Sense;
use super::{Action, Command, Direction, Outcome, Scratch};

/// What the transport allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that one command can move.
    pub max_transfer_bytes: u32,
}

/// A disk as SCSI sees it. Channels share one; nothing of it changes but the disk's size.
///
/// When that has changed, one command, on whichever channel, is not carried out and ends with a unit
/// attention condition (SAM-5 5.14): so the initiator, which all channels of a controller are, is
/// told once. INQUIRY and REPORT LUNS are carried out all the same, and REQUEST SENSE brings the
/// condition as its data.
///
/// ```
/// use backends::block::Geometry;
/// use vsp::scsi::{Action, Command, Direction, Limits, LogicalUnit};
///
/// let unit = LogicalUnit::new(&Geometry::new(1 << 30), &Limits { max_transfer_bytes: 1 << 20 });
/// // READ (10) of 8 blocks at LBA 0x100.
/// let cdb = [0x28, 0, 0, 0, 1, 0, 0, 0, 8, 0];
/// let command = Command { cdb: &cdb, direction: Direction::In, transfer_len: 4096 };
/// let action = unit.plan(&command, &[0], &mut [0; 1024]);
/// assert_eq!(action, Action::Read { offset: 0x100 * 512, len: 4096 });
/// ```
#[derive(Debug)]
pub struct LogicalUnit {
    /// Its size is what it was at first.
    pub(super) geometry: Geometry,
    capacity: Capacity,
    /// The size that the initiator knows, or has been told to ask for.
    told: AtomicU64,
    pub(super) block_shift: u32,
    pub(super) max_transfer_blocks: u32,
    /// Printable ASCII, from the disk's id.
    pub(super) serial: Vec<u8>,
    /// NAA designator, locally assigned.
    pub(super) naa: [u8; 8],
}

impl LogicalUnit {
    /// The longest serial number, in bytes.
    const MAX_SERIAL: usize = 64;

    /// A disk for a transport. Its serial number and its designator come from the geometry's id
    /// alone, so that they are the same in every run.
    pub fn new(geometry: &Geometry, limits: &Limits) -> Self {
        let block_shift = geometry.logical_block.trailing_zeros();
        let printable = |byte: u8| if byte.is_ascii_graphic() { byte } else { b'-' };
        let id = geometry.id.as_bytes();
        // FNV-1a.
        let hash = id.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self {
            capacity: Capacity::new(geometry.size),
            told: AtomicU64::new(geometry.size),
            block_shift,
            max_transfer_blocks: (limits.max_transfer_bytes >> block_shift).max(1),
            serial: id.iter().take(Self::MAX_SERIAL).map(|byte| printable(*byte)).collect(),
            // 3 in the high four bits: locally assigned (SPC-4 table 634).
            naa: (3 << 60 | hash >> 4).to_be_bytes(),
            geometry: geometry.clone(),
        }
    }

    /// The same unit, with the size that `capacity` has from time to time.
    #[must_use]
    pub fn following(mut self, capacity: Capacity) -> Self {
        self.told = AtomicU64::new(capacity.get());
        self.capacity = capacity;
        self
    }

    pub(super) fn blocks(&self) -> u64 {
        self.capacity.get() >> self.block_shift
    }

    /// Whether the initiator has still to be told of another size, and is so now.
    fn takes_attention(&self) -> bool {
        let size = self.capacity.get();
        // Every channel looks at each command; only one of them changes it.
        self.told.load(Ordering::Relaxed) != size && self.told.swap(size, Ordering::Relaxed) != size
    }

    /// What is to be done about a command. `luns` are the logical units of the controller, for
    /// REPORT LUNS.
    pub fn plan(
        &self,
        command: &Command<'_>,
        luns: &[u8],
        scratch: &mut Scratch,
    ) -> Action<'static> {
        match self.try_plan(command, luns, scratch) {
            Ok(action) => action,
            Err(sense) => Action::Complete(Outcome::check_condition(sense)),
        }
    }

    fn try_plan(
        &self,
        command: &Command<'_>,
        luns: &[u8],
        scratch: &mut Scratch,
    ) -> Result<Action<'static>, Sense> {
        use OperationCode as Op;

        let cdb = Cdb::new(command.cdb).ok_or(Sense::INVALID_FIELD_IN_CDB)?;
        if !matches!(cdb.code(), Op::INQUIRY | Op::REPORT_LUNS) && self.takes_attention() {
            let sense = Sense::CAPACITY_HAS_CHANGED;
            return match cdb.code() {
                Op::REQUEST_SENSE => Ok(request_sense(command, &cdb, sense, scratch)),
                _ => Err(sense),
            };
        }
        let lba_6 = || u64::from(cdb.u32::<0>() & 0x1f_ffff);
        let lba_10 = || u64::from(cdb.u32::<2>());
        let blocks_10 = || u32::from(cdb.u16::<7>());
        // In READ (6) and WRITE (6), 0 blocks are 256.
        let blocks_6 = || match cdb.u8::<4>() {
            0 => 256,
            blocks => u32::from(blocks),
        };
        match cdb.code() {
            Op::READ_10 => self.read(command, &cdb, lba_10(), blocks_10(), 7),
            Op::WRITE_10 => self.write(command, &cdb, lba_10(), blocks_10(), 7),
            Op::READ_16 => self.read(command, &cdb, cdb.lba_16(), cdb.u32::<10>(), 10),
            Op::WRITE_16 => self.write(command, &cdb, cdb.lba_16(), cdb.u32::<10>(), 10),
            Op::READ_12 => self.read(command, &cdb, lba_10(), cdb.u32::<6>(), 6),
            Op::WRITE_12 => self.write(command, &cdb, lba_10(), cdb.u32::<6>(), 6),
            Op::READ_6 => self.read_blocks(command, lba_6(), blocks_6(), 4),
            Op::WRITE_6 => self.write_blocks(command, lba_6(), blocks_6(), 4, false),
            Op::SYNCHRONIZE_CACHE_10 => self.synchronize(lba_10(), blocks_10()),
            Op::SYNCHRONIZE_CACHE_16 => self.synchronize(cdb.lba_16(), cdb.u32::<10>()),
            Op::UNMAP => self.unmap(command, &cdb),
            Op::WRITE_SAME_10 => self.write_same(command, &cdb, lba_10(), blocks_10(), 7),
            Op::WRITE_SAME_16 => self.write_same(command, &cdb, cdb.lba_16(), cdb.u32::<10>(), 10),
            Op::VERIFY_10 => self.verify(&cdb, lba_10(), blocks_10()),
            Op::VERIFY_12 => self.verify(&cdb, lba_10(), cdb.u32::<6>()),
            Op::VERIFY_16 => self.verify(&cdb, cdb.lba_16(), cdb.u32::<10>()),

            Op::TEST_UNIT_READY | Op::PREVENT_ALLOW_MEDIUM_REMOVAL => Ok(GOOD),
            Op::REQUEST_SENSE => Ok(request_sense(command, &cdb, Sense::NONE, scratch)),
            Op::INQUIRY => self.inquiry(command, &cdb, scratch),
            Op::MODE_SENSE_6 => self.mode_sense_6(command, &cdb, scratch),
            Op::MODE_SENSE_10 => self.mode_sense_10(command, &cdb, scratch),
            Op::START_STOP_UNIT => self.start_stop(&cdb),
            Op::READ_CAPACITY_10 => Ok(self.read_capacity_10(command, scratch)),
            Op::SERVICE_ACTION_IN_16 => match cdb.u8::<1>() & 0x1f {
                0x10 => Ok(self.read_capacity_16(command, &cdb, scratch)),
                _ => Err(Sense::invalid_cdb_byte(1)),
            },
            Op::REPORT_LUNS => report_luns(command, &cdb, luns, scratch),
            _ => Err(Sense::INVALID_OPERATION_CODE),
        }
    }

    /// READ (10, 12, 16): byte 1 is RDPROTECT, DPO, FUA. FUA asks a read for nothing that the host
    /// would not do.
    fn read(
        &self,
        command: &Command<'_>,
        cdb: &Cdb,
        lba: u64,
        blocks: u32,
        blocks_at: u16,
    ) -> Result<Action<'static>, Sense> {
        no_protection(cdb)?;
        self.read_blocks(command, lba, blocks, blocks_at)
    }

    fn read_blocks(
        &self,
        command: &Command<'_>,
        lba: u64,
        blocks: u32,
        blocks_at: u16,
    ) -> Result<Action<'static>, Sense> {
        let (offset, len) = self.range(lba, u64::from(blocks))?;
        if blocks > self.max_transfer_blocks {
            return Err(Sense::invalid_cdb_byte(blocks_at));
        }
        if len == 0 {
            return Ok(GOOD);
        }
        // An initiator with less memory than blocks gets what fits; SCSI transports call the rest
        // an overflow. With no room for any, the command makes no sense.
        let room = match command.direction {
            Direction::In => {
                u64::from(command.transfer_len) >> self.block_shift << self.block_shift
            }
            Direction::Out | Direction::None => 0,
        };
        match len.min(room) {
            0 => Err(Sense::invalid_cdb_byte(blocks_at)),
            len => Ok(Action::Read { offset, len }),
        }
    }

    /// WRITE (10, 12, 16): byte 1 is WRPROTECT, DPO, FUA.
    fn write(
        &self,
        command: &Command<'_>,
        cdb: &Cdb,
        lba: u64,
        blocks: u32,
        blocks_at: u16,
    ) -> Result<Action<'static>, Sense> {
        no_protection(cdb)?;
        self.write_blocks(command, lba, blocks, blocks_at, cdb.u8::<1>() & 0x08 != 0)
    }

    fn write_blocks(
        &self,
        command: &Command<'_>,
        lba: u64,
        blocks: u32,
        blocks_at: u16,
        fua: bool,
    ) -> Result<Action<'static>, Sense> {
        self.check_writable()?;
        let (offset, len) = self.range(lba, u64::from(blocks))?;
        if blocks > self.max_transfer_blocks {
            return Err(Sense::invalid_cdb_byte(blocks_at));
        }
        if len == 0 {
            return Ok(GOOD);
        }
        // A write of less than was announced would be a lie; it is refused as a whole.
        if command.direction != Direction::Out || u64::from(command.transfer_len) < len {
            return Err(Sense::invalid_cdb_byte(blocks_at));
        }
        Ok(Action::Write { offset, len, fua })
    }

    /// SYNCHRONIZE CACHE (10, 16). It flushes the whole disk whatever the range; IMMED, which would
    /// let it answer earlier, asks for nothing that has to be given.
    fn synchronize(&self, lba: u64, blocks: u32) -> Result<Action<'static>, Sense> {
        self.range(lba, u64::from(blocks))?;
        Ok(if self.geometry.read_only { GOOD } else { Action::Flush })
    }

    /// VERIFY (10, 12, 16) without data: the host vouches for the medium. BYTCHK, a comparison with
    /// data of the initiator, is not supported.
    fn verify(&self, cdb: &Cdb, lba: u64, blocks: u32) -> Result<Action<'static>, Sense> {
        no_protection(cdb)?;
        if cdb.u8::<1>() & 0x06 != 0 {
            return Err(Sense::invalid_cdb_byte(1));
        }
        self.range(lba, u64::from(blocks))?;
        Ok(GOOD)
    }

    /// START STOP UNIT: a disk is always started. Stopping it puts its cache on the medium, unless
    /// NO_FLUSH; ejecting it (LOEJ) is for media that can be.
    fn start_stop(&self, cdb: &Cdb) -> Result<Action<'static>, Sense> {
        let byte = cdb.u8::<4>();
        let (power, no_flush) = (byte >> 4, byte & 0x04 != 0);
        if power != 0 {
            return Ok(GOOD);
        }
        match byte & 0x03 {
            0x00 if !no_flush && !self.geometry.read_only => Ok(Action::Flush),
            0x00 | 0x01 => Ok(GOOD),
            _ => Err(Sense::invalid_cdb_byte(4)),
        }
    }

    /// The last LBA and the block length; an LBA that needs more than 32 bits is all ones.
    fn read_capacity_10(&self, command: &Command<'_>, scratch: &mut Scratch) -> Action<'static> {
        let last = u32::try_from(self.blocks().saturating_sub(1)).unwrap_or(u32::MAX);
        let mut data = [0; 8];
        data[..4].copy_from_slice(&last.to_be_bytes());
        data[4..].copy_from_slice(&self.geometry.logical_block.to_be_bytes());
        data_in(command, &data, usize::MAX, scratch)
    }

    /// SBC-3 table 65.
    fn read_capacity_16(
        &self,
        command: &Command<'_>,
        cdb: &Cdb,
        scratch: &mut Scratch,
    ) -> Action<'static> {
        let Geometry { logical_block, physical_block, discard, discard_zeroes, .. } = self.geometry;
        let mut data = [0; 32];
        data[..8].copy_from_slice(&self.blocks().saturating_sub(1).to_be_bytes());
        data[8..12].copy_from_slice(&logical_block.to_be_bytes());
        // Logical blocks per physical block, as a power of two.
        data[13] = (physical_block.max(logical_block) / logical_block).ilog2() as u8 & 0x0f;
        // LBPME and LBPRZ.
        data[14] = u8::from(discard) << 7 | u8::from(discard && discard_zeroes) << 6;
        data_in(command, &data, cdb.u32::<10>() as usize, scratch)
    }

    /// The bytes of the disk that a range of blocks is.
    pub(super) fn range(&self, lba: u64, blocks: u64) -> Result<(u64, u64), Sense> {
        let end = lba.checked_add(blocks).ok_or(Sense::LBA_OUT_OF_RANGE)?;
        let all = self.blocks();
        if lba >= all || end > all {
            return Err(Sense::LBA_OUT_OF_RANGE);
        }
        // The disk's size has 64 bits, so these do not overflow.
        Ok((lba << self.block_shift, blocks << self.block_shift))
    }

    pub(super) fn check_writable(&self) -> Result<(), Sense> {
        if self.geometry.read_only { Err(Sense::WRITE_PROTECTED) } else { Ok(()) }
    }
}

/// Whether a command may be part of a search for disks or for what has become of them, so that the
/// disk's size has to be looked at before it ([`backends::block::Disk::refresh`]).
pub fn looks_anew(cdb: &[u8]) -> bool {
    use OperationCode as Op;

    matches!(
        cdb.first().map(|code| OperationCode(*code)),
        Some(
            Op::TEST_UNIT_READY
                | Op::INQUIRY
                | Op::READ_CAPACITY_10
                | Op::SERVICE_ACTION_IN_16
                | Op::REPORT_LUNS
        )
    )
}

/// What is to be done about a command to a logical unit that does not exist, on a controller whose
/// units are `luns`.
///
/// INQUIRY succeeds and says so, as SPC-4 6.6.2 has it: Linux takes a refusal for a disk.
pub fn plan_absent(command: &Command<'_>, luns: &[u8], scratch: &mut Scratch) -> Action<'static> {
    use OperationCode as Op;

    let absent = Sense::LOGICAL_UNIT_NOT_SUPPORTED;
    let result = match Cdb::new(command.cdb) {
        None => Err(Sense::INVALID_FIELD_IN_CDB),
        Some(cdb) => match cdb.code() {
            Op::INQUIRY => Ok(super::inquiry::absent(command, &cdb, scratch)),
            Op::REQUEST_SENSE => Ok(request_sense(command, &cdb, absent, scratch)),
            Op::REPORT_LUNS => report_luns(command, &cdb, luns, scratch),
            _ => Err(absent),
        },
    };
    result.unwrap_or_else(|sense| Action::Complete(Outcome::check_condition(sense)))
}

/// Done, with nothing moved.
pub(super) const GOOD: Action<'static> = Action::Complete(Outcome::good(0));

/// Answers with data, cut to what the CDB allows and to the memory that came with the command.
pub(super) fn data_in(
    command: &Command<'_>,
    data: &[u8],
    allocation_length: usize,
    scratch: &mut Scratch,
) -> Action<'static> {
    let room = match command.direction {
        Direction::In => command.transfer_len as usize,
        Direction::Out | Direction::None => 0,
    };
    let len = data.len().min(allocation_length).min(room).min(scratch.len());
    scratch[..len].copy_from_slice(&data[..len]);
    Action::Complete(Outcome::good(len as u32))
}

/// RDPROTECT, WRPROTECT, VRPROTECT: a disk formatted without protection information has none.
pub(super) fn no_protection(cdb: &Cdb) -> Result<(), Sense> {
    if cdb.u8::<1>() & 0xe0 == 0 { Ok(()) } else { Err(Sense::invalid_cdb_byte(1)) }
}

/// REQUEST SENSE. Sense data goes out with the command it belongs to, so none of that is ever left.
fn request_sense(
    command: &Command<'_>,
    cdb: &Cdb,
    sense: Sense,
    scratch: &mut Scratch,
) -> Action<'static> {
    let allocation_length = usize::from(cdb.u8::<4>());
    match cdb.u8::<1>() & 0x01 {
        0 => data_in(command, &sense.to_bytes(), allocation_length, scratch),
        _ => data_in(command, &sense.to_descriptor_bytes(), allocation_length, scratch),
    }
}

/// REPORT LUNS (SPC-4 6.33): single-level peripheral device addresses.
fn report_luns(
    command: &Command<'_>,
    cdb: &Cdb,
    luns: &[u8],
    scratch: &mut Scratch,
) -> Result<Action<'static>, Sense> {
    const HEADER: usize = 8;
    const ENTRY: usize = 8;
    let luns = match cdb.u8::<2>() {
        // Addressed as usual, or all.
        0x00 | 0x02 => luns,
        // Well-known ones, of which there are none.
        0x01 => &[],
        _ => return Err(Sense::invalid_cdb_byte(2)),
    };
    let mut data: Scratch = [0; _];
    let mut len = HEADER;
    for (entry, lun) in data[HEADER..].chunks_exact_mut(ENTRY).zip(luns) {
        entry[1] = *lun;
        len += ENTRY;
    }
    data[..4].copy_from_slice(&((len - HEADER) as u32).to_be_bytes());
    Ok(data_in(command, &data[..len], cdb.u32::<6>() as usize, scratch))
}
