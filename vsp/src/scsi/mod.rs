//! The SCSI target: what a disk answers to each command. Bytes in, actions out; no I/O.
//!
//! A [`LogicalUnit`] is one disk as SCSI sees it. [`LogicalUnit::plan`] looks at a command and says
//! what is to be done: most often a read or write of a range that is known to lie within the disk,
//! else an answer that is complete already. Whoever carries it out, a VMBus channel or an IDE
//! register file, moves the data and turns the disk's result into SCSI's words with [`outcome`].
//!
//! ```text
//!   Command ──plan──> Complete(Outcome)            answered; its data, if any, in the scratch
//!                     Read · Write · Flush         a disk request, then outcome()
//!                     Parameters ──with_parameters──> Discard · WriteZeroes · WriteSame
//! ```
//!
//! A command whose answer needs data that the initiator has still to send (UNMAP, WRITE SAME) takes
//! two steps, so that the data is copied out of shared memory once and then looked at.
//!
//! Commands, fields and sense codes are those of SPC-4 and SBC-3; comments name the table where it
//! is not obvious. Nothing a command can hold makes this code panic, allocate, or name a byte past
//! the end of the disk; [`crate::fuzzing::fuzz_cdb`] holds it to that.

mod cdb;
mod inquiry;
mod mode;
mod provisioning;
mod sense;
mod unit;

#[cfg(test)]
mod tests;

use backends::block::{BlockError, BlockErrorKind, Operation};

pub use cdb::OperationCode;
pub use provisioning::{Parameters, Range, Ranges};
pub use sense::{AdditionalSense, FieldPointer, Sense, SenseKey};
pub use unit::{Limits, LogicalUnit, looks_anew, plan_absent};

/// Room for the data of any command that is answered without a disk.
pub type Scratch = [u8; 1024];

/// Which way a command's data goes, as the transport announced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the initiator.
    In,
    /// From the initiator.
    Out,
    /// There is none.
    None,
}

/// A command as it came from the initiator, unchecked.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// The command descriptor block; what is beyond 16 bytes is not looked at.
    pub cdb: &'a [u8],
    /// Which way the data goes.
    pub direction: Direction,
    /// Bytes of memory that came with the command. No more than this moves, whatever the CDB says.
    pub transfer_len: u32,
}

/// What is to be done about a command. Offsets and lengths are bytes of the disk, in whole blocks,
/// within its size, and never longer than the memory that came with the command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<'p> {
    /// Nothing more: this is the answer. Its data is the first `transferred` bytes of the scratch.
    Complete(Outcome),
    /// Read from the disk into the initiator's memory.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write from the initiator's memory to the disk.
    Write {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Not done before it is on stable storage.
        fua: bool,
    },
    /// Make stable what was written.
    Flush,
    /// Copy this many bytes of the initiator's data into private memory, and go on with
    /// [`LogicalUnit::with_parameters`].
    Parameters(Parameters),
    /// Discard each of these; the command has transferred its parameters.
    Discard(Ranges<'p>),
    /// Have the range read as zeroes; the command has transferred its parameters.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether the space may be given back.
        may_unmap: bool,
    },
    /// Write one block over and over; the command has transferred its parameters.
    WriteSame {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// The block.
        pattern: &'p [u8],
    },
}

/// SCSI's one-byte summary of a command (SAM-5 table 37).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    /// Done.
    pub const GOOD: Self = Self(0x00);
    /// Not done, or not quite; the sense data says why.
    pub const CHECK_CONDITION: Self = Self(0x02);
    /// To be tried again.
    pub const BUSY: Self = Self(0x08);
}

/// How a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The summary.
    pub status: Status,
    /// Why, with a check condition.
    pub sense: Option<Sense>,
    /// Bytes that have moved, either way.
    pub transferred: u32,
}

impl Outcome {
    /// Done, with so many bytes moved.
    pub const fn good(transferred: u32) -> Self {
        Self { status: Status::GOOD, sense: None, transferred }
    }

    /// Refused or failed.
    pub const fn check_condition(sense: Sense) -> Self {
        Self { status: Status::CHECK_CONDITION, sense: Some(sense), transferred: 0 }
    }

    /// A success that has moved something else than a disk request's data, such as parameters.
    #[must_use]
    pub const fn with_transferred(mut self, bytes: u32) -> Self {
        if self.status.0 == Status::GOOD.0 {
            self.transferred = bytes;
        }
        self
    }
}

/// How a command ends whose disk request of `len` bytes has ended with `result`.
pub fn outcome(operation: Operation, len: u64, result: Result<u64, BlockError>) -> Outcome {
    let kind = match result {
        Ok(bytes) if bytes >= len => {
            let moved = matches!(operation, Operation::Read | Operation::Write { .. });
            return Outcome::good(if moved { u32::try_from(len).unwrap_or(u32::MAX) } else { 0 });
        }
        // A disk that does less than it was asked to has lost the rest.
        Ok(_) => BlockErrorKind::Io,
        Err(error) => error.kind,
    };
    Outcome::check_condition(match kind {
        BlockErrorKind::NoSpace => Sense::SPACE_ALLOCATION_FAILED,
        BlockErrorKind::ReadOnly => Sense::WRITE_PROTECTED,
        BlockErrorKind::OutOfRange => Sense::LBA_OUT_OF_RANGE,
        BlockErrorKind::Malformed => Sense::INVALID_FIELD_IN_CDB,
        BlockErrorKind::Unsupported => Sense::INVALID_OPERATION_CODE,
        BlockErrorKind::Busy => {
            return Outcome { status: Status::BUSY, sense: None, transferred: 0 };
        }
        _ if operation == Operation::Read => Sense::UNRECOVERED_READ_ERROR,
        _ => Sense::WRITE_ERROR,
    })
}
