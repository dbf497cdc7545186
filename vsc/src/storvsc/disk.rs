//! What a disk says of itself.

use core::fmt;

use thiserror::Error;
use vmbus::mapped::RingMemory;
use vmbus::vstor::SrbStatus;

use super::{Command, Failure, Pages, Queue, SubmitError};
use crate::Doorbell;

/// Memory that a controller can write and the caller can read, for small answers.
pub trait Scratch {
    /// `len` bytes of it, at most 255.
    fn pages(&mut self, len: u32) -> Option<Pages<'_>>;

    /// Copies out its first bytes.
    fn read(&self, bytes: &mut [u8]);
}

/// A disk, as INQUIRY and READ CAPACITY describe it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Its logical unit number.
    pub lun: u8,
    /// How many blocks it has, at least one.
    pub blocks: u64,
    /// Bytes in a block, a power of two from 512 to 65536.
    pub block_size: u32,
    /// Bytes that the medium writes at once, a multiple of `block_size`.
    pub physical_block_size: u32,
    /// Who made it, in ASCII, padded with spaces.
    pub vendor: [u8; 8],
    /// What it is.
    pub product: [u8; 16],
    /// And which revision of it.
    pub revision: [u8; 4],
}

/// Why a disk could not be identified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum IdentifyError {
    /// The scratch memory is too small.
    #[error("the scratch memory is too small")]
    Scratch,
    /// The request could not be made.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The disk refuses to say.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// It said less than it must.
    #[error("the unit answered command {opcode:#04x} with {len} bytes")]
    Short {
        /// The command.
        opcode: u8,
        /// Bytes.
        len: u32,
    },
    /// It is something else.
    #[error("the unit is a device of type {0:#04x}, not a disk")]
    NotADisk(u8),
    /// A size that cannot be.
    #[error("the unit claims to have blocks of {block_size} bytes, the last at {last}")]
    Capacity {
        /// The last block's number.
        last: u64,
        /// Bytes in a block.
        block_size: u32,
    },
}

/// Bytes of standard INQUIRY data that are asked for.
const INQUIRY_LEN: u8 = 36;
/// Bytes of the answer to READ CAPACITY(16).
const CAPACITY_LEN: u8 = 32;
/// How often a unit may have something to say before it serves.
const ATTENTIONS: u32 = 8;

impl Disk {
    /// Asks for the disk at `lun`, while nothing else is in flight; `None` if there is none.
    /// `wait` as of [`Queue::connect`].
    pub fn identify<M: RingMemory, D: Doorbell, const DEPTH: usize>(
        queue: &mut Queue<M, D, DEPTH>,
        lun: u8,
        scratch: &mut impl Scratch,
        mut wait: impl FnMut() -> bool,
    ) -> Result<Option<Self>, IdentifyError> {
        let mut inquiry = [0; INQUIRY_LEN as usize];
        let command = Command::inquiry(lun, INQUIRY_LEN);
        match ask(queue, &command, scratch, &mut inquiry, &mut wait) {
            Ok(()) => {}
            Err(IdentifyError::Failure(failure))
                if matches!(failure.srb_status, SrbStatus::InvalidLun | SrbStatus::NoDevice) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let [peripheral, _, _, _, _, _, _, _, text @ ..] = inquiry;
        match peripheral {
            0x00 => {}
            // "Not capable of supporting a device": how an absent unit answers.
            0x7f => return Ok(None),
            other => return Err(IdentifyError::NotADisk(other)),
        }
        let (vendor, product, revision) = names(&text);

        // A new unit has news for whoever asks first: take it all.
        for _ in 0..ATTENTIONS {
            match queue.run(&Command::test_unit_ready(lun), None, &mut wait)? {
                Ok(_) => break,
                Err(Failure { sense: Some(sense), .. }) if sense.is_unit_attention() => {}
                Err(failure) => return Err(failure.into()),
            }
        }

        let mut capacity = [0; CAPACITY_LEN as usize];
        let command = Command::read_capacity_16(lun, CAPACITY_LEN);
        let (last, block_size, exponent) =
            match ask(queue, &command, scratch, &mut capacity, &mut wait) {
                Ok(()) => {
                    let [a, b, c, d, e, f, g, h, i, j, k, l, _, exponent, ..] = capacity;
                    let last = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
                    (last, u32::from_be_bytes([i, j, k, l]), u32::from(exponent & 0xf))
                }
                Err(IdentifyError::Failure(_)) => {
                    let mut capacity = [0; 8];
                    let command = Command::read_capacity_10(lun);
                    ask(queue, &command, scratch, &mut capacity, &mut wait)?;
                    let [a, b, c, d, e, f, g, h] = capacity;
                    let last = u32::from_be_bytes([a, b, c, d]);
                    (u64::from(last), u32::from_be_bytes([e, f, g, h]), 0)
                }
                Err(error) => return Err(error),
            };
        let wrong = IdentifyError::Capacity { last, block_size };
        if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
            return Err(wrong);
        }
        let blocks = last.checked_add(1).ok_or(wrong)?;
        blocks.checked_mul(u64::from(block_size)).ok_or(wrong)?;
        let physical_block_size = block_size.checked_shl(exponent).unwrap_or(block_size);
        Ok(Some(Self {
            lun,
            blocks,
            block_size,
            physical_block_size: physical_block_size.max(block_size),
            vendor,
            product,
            revision,
        }))
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(u64::from(self.block_size))
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |bytes| str::from_utf8(bytes).unwrap_or("?");
        f.debug_struct("Disk")
            .field("lun", &self.lun)
            .field("blocks", &self.blocks)
            .field("block_size", &self.block_size)
            .field("physical_block_size", &self.physical_block_size)
            .field("vendor", &text(&self.vendor))
            .field("product", &text(&self.product))
            .field("revision", &text(&self.revision))
            .finish()
    }
}

/// Runs a command whose whole answer comes through `scratch`.
fn ask<M: RingMemory, D: Doorbell, const DEPTH: usize>(
    queue: &mut Queue<M, D, DEPTH>,
    command: &Command,
    scratch: &mut impl Scratch,
    answer: &mut [u8],
    wait: &mut impl FnMut() -> bool,
) -> Result<(), IdentifyError> {
    let asked = u32::try_from(answer.len()).unwrap_or(u32::MAX);
    let pages = scratch.pages(asked).filter(|p| p.len == asked).ok_or(IdentifyError::Scratch)?;
    let len = queue.run(command, Some(pages), wait)??;
    if len < asked {
        return Err(IdentifyError::Short { opcode: command.opcode(), len });
    }
    scratch.read(answer);
    Ok(())
}

/// Vendor, product and revision, whatever is printable of them.
fn names(text: &[u8; 28]) -> ([u8; 8], [u8; 16], [u8; 4]) {
    let mut printable = [b' '; 28];
    for (to, from) in printable.iter_mut().zip(text) {
        if matches!(from, b' '..=b'~') {
            *to = *from;
        }
    }
    let (vendor, rest) = printable.split_first_chunk().unwrap_or((&[b' '; 8], &[]));
    let (product, rest) = rest.split_first_chunk().unwrap_or((&[b' '; 16], &[]));
    (*vendor, *product, rest.first_chunk().copied().unwrap_or([b' '; 4]))
}
