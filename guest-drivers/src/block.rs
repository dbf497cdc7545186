//! What a driver of a disk is. Synthetic and legacy disks look the same from here.

use core::fmt;

use thiserror::Error;
use vsc::storvsc::{Failure as ScsiFailure, Fault, IdentifyError, SubmitError};

use crate::ide::{AtaFailure, IdeFault};
use crate::memory::Pages;
use crate::storvsc::SideChannels;

/// The most requests that any driver has in flight.
pub const MAX_DEPTH: u16 = 64;

/// Text of fixed size, as devices have it: ASCII, padded with spaces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name<const N: usize>(pub [u8; N]);

impl<const N: usize> fmt::Display for Name<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(str::from_utf8(&self.0).unwrap_or("?").trim())
    }
}

impl<const N: usize> fmt::Debug for Name<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A disk, and how its driver takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// By what it is driven: `storvsc`, `ide-dma` or `ide-pio`.
    pub driver: &'static str,
    /// Which SCSI controller or which IDE channel, from 0.
    pub controller: u8,
    /// Its logical unit there; on an IDE channel, which drive.
    pub lun: u8,
    /// Who made it.
    pub vendor: Name<8>,
    /// What it is.
    pub product: Name<16>,
    /// Bytes of a block.
    pub block_size: u32,
    /// Bytes that the medium writes at once.
    pub physical_block_size: u32,
    /// How many blocks there are.
    pub blocks: u64,
    /// Bytes that one request may transfer.
    pub max_transfer: u32,
    /// Requests in flight at a time.
    pub max_depth: u16,
}

impl Identity {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size.into())
    }
}

/// What a request is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// From the disk into memory.
    Read,
    /// From memory to the disk.
    Write,
    /// What was written is to be on the medium.
    Flush,
}

/// A request. A flush has no blocks and no memory.
#[derive(Clone, Copy, Debug)]
pub struct Request<'m> {
    /// The caller's name for it, below the driver's depth; not in use by another.
    pub slot: u16,
    /// What to do.
    pub operation: Operation,
    /// The first block.
    pub block: u64,
    /// How many.
    pub blocks: u32,
    /// Where the data is, from the first byte on. It is the disk's until the request has ended.
    pub data: Option<Pages<'m>>,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its slot, free again.
    pub slot: u16,
    /// The bytes transferred, which may be fewer than asked for.
    pub outcome: Result<u32, Failure>,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Failure {
    /// The SCSI unit says so.
    #[error(transparent)]
    Scsi(#[from] ScsiFailure),
    /// The ATA drive says so.
    #[error(transparent)]
    Ata(#[from] AtaFailure),
}

/// Why a disk cannot be used, or not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BlockError {
    /// The request was not taken.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The controller is broken.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The disk does not say what it is.
    #[error(transparent)]
    Identify(#[from] IdentifyError),
    /// The IDE channel or its drive is broken.
    #[error(transparent)]
    Ide(#[from] IdeFault),
    /// A request that makes no sense.
    #[error("a request has memory if and only if it transfers blocks, and enough of it")]
    Request,
}

/// What a driver has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounters {
    /// How often the host was told that there is something to do.
    pub signals: u64,
    /// How often it needed no telling.
    pub signals_spared: u64,
}

/// A driver, of one disk, for data in the memory `'m`.
///
/// A turn is: submit some, publish once, poll for what has ended. A driver whose device does one
/// thing at a time does its work where that suits it.
pub trait BlockDriver<'m> {
    /// The disk.
    fn identity(&self) -> &Identity;

    /// Takes a request. The disk learns of it by [`BlockDriver::publish`].
    fn submit(&mut self, request: &Request<'m>) -> Result<(), BlockError>;

    /// Lets the disk know what was submitted.
    fn publish(&mut self);

    /// Hands what has ended to `ended`, and returns how many that were.
    fn poll(&mut self, ended: &mut dyn FnMut(Completion)) -> Result<usize, BlockError>;

    /// Sleeps until there may be something to poll.
    fn sleep(&mut self);

    /// Whether a look at the disk is an intercept, so that who waits had better sleep at once.
    fn looks_cost(&self) -> bool {
        false
    }

    /// What has been counted.
    fn counters(&self) -> BlockCounters;

    /// By what other processors can reach the same disk.
    fn sides(&self) -> SideChannels<'m> {
        SideChannels::NONE
    }
}
