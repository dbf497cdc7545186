//! UNMAP and WRITE SAME: the commands that give blocks back, or write many with little data.
//!
//! Both need data from the initiator before they can be carried out, so both plan
//! [`Action::Parameters`] first and go on in [`LogicalUnit::with_parameters`].

use super::cdb::{Cdb, OperationCode};
use super::sense::Sense;
use super::unit::{GOOD, LogicalUnit, no_protection};
use super::{Action, Command, Direction, Outcome};

/// Descriptors in one UNMAP.
pub(super) const MAX_DESCRIPTORS: usize = 64;

const UNMAP_HEADER: usize = 8;
const UNMAP_DESCRIPTOR: usize = 16;

/// Bytes that one UNMAP discards.
const MAX_DISCARDED_BYTES: u64 = 4 << 30;

/// Bytes that one WRITE SAME has the host write. The Block Limits page has one limit for all blocks,
/// of zeroes or not, and any but zeroes are written one by one.
const MAX_WRITTEN_BYTES: u64 = 32 << 20;

/// Data the initiator has still to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// In bytes: never more than came with the command, nor than [`Self::MAX_LEN`].
    pub len: u32,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Unmap,
    WriteSame { offset: u64, len: u64, may_unmap: bool },
}

impl Parameters {
    /// The most bytes that are ever asked for: a list of UNMAP's descriptors, or a block.
    pub const MAX_LEN: usize = 4096;
}

const _: () = assert!(UNMAP_HEADER + MAX_DESCRIPTORS * UNMAP_DESCRIPTOR <= Parameters::MAX_LEN);

/// A range of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Of the first byte.
    pub offset: u64,
    /// Never 0.
    pub len: u64,
}

/// The ranges of an UNMAP, all of them checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges<'p> {
    descriptors: &'p [[u8; UNMAP_DESCRIPTOR]],
    block_shift: u32,
}

/// An LBA and a number of blocks.
fn descriptor(bytes: &[u8; UNMAP_DESCRIPTOR]) -> (u64, u32) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *bytes;
    (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u32::from_be_bytes([i, j, k, l]))
}

impl Iterator for Ranges<'_> {
    type Item = Range;

    fn next(&mut self) -> Option<Range> {
        loop {
            let (first, rest) = self.descriptors.split_first()?;
            self.descriptors = rest;
            let (lba, blocks) = descriptor(first);
            if blocks > 0 {
                let [offset, len] = [lba, blocks.into()].map(|blocks| blocks << self.block_shift);
                return Some(Range { offset, len });
            }
        }
    }
}

impl LogicalUnit {
    pub(super) fn max_unmap_blocks(&self) -> u32 {
        (MAX_DISCARDED_BYTES >> self.block_shift) as u32
    }

    pub(super) fn max_write_same_blocks(&self) -> u32 {
        (MAX_WRITTEN_BYTES >> self.block_shift) as u32
    }

    pub(super) fn unmap(&self, command: &Command<'_>, cdb: &Cdb) -> Result<Action<'static>, Sense> {
        if !self.geometry.discard && !self.geometry.read_only {
            return Err(Sense::INVALID_OPERATION_CODE);
        }
        self.check_writable()?;
        // ANCHOR.
        if cdb.u8::<1>() & 0x01 != 0 {
            return Err(Sense::invalid_cdb_byte(1));
        }
        match usize::from(cdb.u16::<7>()) {
            0 => Ok(GOOD),
            len if !(UNMAP_HEADER..=Parameters::MAX_LEN).contains(&len) => {
                Err(Sense::PARAMETER_LIST_LENGTH_ERROR)
            }
            len => parameters(command, len as u32, 7, What::Unmap),
        }
    }

    pub(super) fn write_same(
        &self,
        command: &Command<'_>,
        cdb: &Cdb,
        lba: u64,
        blocks: u32,
        blocks_at: u16,
    ) -> Result<Action<'static>, Sense> {
        self.check_writable()?;
        no_protection(cdb)?;
        let flags = cdb.u8::<1>();
        let unmap = flags & 0x08 != 0;
        // NDOB, "no data-out buffer", is one of the 16-byte command alone.
        let no_data = cdb.code() == OperationCode::WRITE_SAME_16 && flags & 0x01 != 0;
        // ANCHOR, PBDATA, LBDATA.
        if flags & 0x16 != 0 || (unmap && !self.geometry.discard) {
            return Err(Sense::invalid_cdb_byte(1));
        }
        let (offset, len) = self.range(lba, u64::from(blocks))?;
        if blocks == 0 || blocks > self.max_write_same_blocks() {
            return Err(Sense::invalid_cdb_byte(blocks_at));
        }
        if no_data {
            return Ok(Action::WriteZeroes { offset, len, may_unmap: unmap });
        }
        let what = What::WriteSame { offset, len, may_unmap: unmap };
        match self.geometry.logical_block {
            block if block as usize <= Parameters::MAX_LEN => {
                parameters(command, block, blocks_at, what)
            }
            _ => Err(Sense::INVALID_OPERATION_CODE),
        }
    }

    /// Goes on with a command whose parameters are there. `bytes` is private memory: it is looked
    /// at more than once.
    pub fn with_parameters<'p>(&self, parameters: Parameters, bytes: &'p [u8]) -> Action<'p> {
        let action = match bytes.get(..parameters.len as usize) {
            None => Err(Sense::PARAMETER_LIST_LENGTH_ERROR),
            Some(bytes) => match parameters.what {
                What::Unmap => self.unmap_list(bytes),
                What::WriteSame { offset, len, may_unmap } => {
                    Ok(if bytes.iter().all(|&byte| byte == 0) {
                        Action::WriteZeroes { offset, len, may_unmap }
                    } else {
                        Action::WriteSame { offset, len, pattern: bytes }
                    })
                }
            },
        };
        action.unwrap_or_else(|sense| Action::Complete(Outcome::check_condition(sense)))
    }

    /// Checks the whole list before anything of it is done (SBC-3 5.30.2).
    fn unmap_list<'p>(&self, bytes: &'p [u8]) -> Result<Action<'p>, Sense> {
        let Some((header, rest)) = bytes.split_first_chunk::<UNMAP_HEADER>() else {
            return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
        };
        let [a, b, c, d, ..] = *header;
        // The data length does not count itself.
        let data_len = usize::from(u16::from_be_bytes([a, b]));
        let descriptors_len = usize::from(u16::from_be_bytes([c, d]));
        let Some(list) = rest.get(..descriptors_len) else {
            return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
        };
        if data_len < descriptors_len + (UNMAP_HEADER - 2) {
            return Err(Sense::invalid_parameter_byte(0));
        }
        // A piece of a descriptor at the end is ignored.
        let (descriptors, _) = list.as_chunks::<UNMAP_DESCRIPTOR>();
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(Sense::invalid_parameter_byte(2));
        }
        let mut total = 0;
        for bytes in descriptors {
            let (lba, blocks) = descriptor(bytes);
            if blocks > 0 {
                self.range(lba, blocks.into())?;
                total += u64::from(blocks);
            }
        }
        if total > u64::from(self.max_unmap_blocks()) {
            return Err(Sense::INVALID_FIELD_IN_PARAMETERS);
        }
        if total == 0 {
            return Ok(Action::Complete(Outcome::good(bytes.len() as u32)));
        }
        Ok(Action::Discard(Ranges { descriptors, block_shift: self.block_shift }))
    }
}

/// Asks for `len` bytes, if the initiator has sent that many. `len_at` is where the CDB says how
/// many there are.
fn parameters(
    command: &Command<'_>,
    len: u32,
    len_at: u16,
    what: What,
) -> Result<Action<'static>, Sense> {
    if command.direction != Direction::Out || command.transfer_len < len {
        return Err(Sense::invalid_cdb_byte(len_at));
    }
    Ok(Action::Parameters(Parameters { len, what }))
}
