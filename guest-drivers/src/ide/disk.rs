//! The driver of an ATA disk: one request at a time, and an interrupt for each step of it.
//!
//! ```text
//!   DMA       command, bus master starts ── interrupt ── done
//!   PIO read  command ── interrupt ── block in ── interrupt ── block in … done
//!   PIO write command, block out ── interrupt ── block out … ── interrupt ── done
//! ```
//!
//! A block of PIO is what the drive takes in one piece.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use super::bits::{command, device, master, register, status};
use super::identify::Drive;
use super::{AtaFailure, Channel, IdeFault, SECTOR, Transfer, device_bit};
use crate::block::{
    BlockCounters, BlockDriver, BlockError, Completion, Identity, Name, Operation, Request,
};
use crate::memory::{PAGE, Pages};
use crate::platform::{Platform, PortWrite};

/// Bytes of the longest transfer: what the shorter form of a command can say.
const MAX_TRANSFER: u32 = 256 * SECTOR;

/// A region of the bus master's memory crosses no such boundary (82371AB, section 2.7.2).
const BOUNDARY: u64 = 64 << 10;

/// A table's last entry.
const LAST: u64 = 1 << 63;

/// Writes that a command takes: twice a count, an address of three bytes and the device and command
/// registers; and the bus master's status and command registers.
const MAX_WRITES: usize = 12;

/// A disk on a channel, in use.
pub struct IdeDisk<'c, 'w, P> {
    channel: &'c mut Channel<'w, P>,
    about: Drive,
    identity: Identity,
    transfer: Transfer,
    /// What the drive is at, and for whom.
    under_way: Option<(u16, UnderWay<'w>)>,
    /// There was a sleep since the last look.
    slept: bool,
}

#[derive(Clone, Copy)]
enum UnderWay<'w> {
    /// The bus master moves so many bytes.
    Dma { len: u32 },
    /// `words[at..]` are still to be read.
    Reading { words: &'w [AtomicU64], at: usize },
    /// `words[at..]` are still to be written.
    Writing { words: &'w [AtomicU64], at: usize },
    /// A command without data.
    Flush,
}

impl<'c, 'w, P: Platform> IdeDisk<'c, 'w, P> {
    pub(super) fn new(
        about: Drive,
        drive: u8,
        transfer: Transfer,
        channel: &'c mut Channel<'w, P>,
    ) -> Result<Self, BlockError> {
        if transfer == Transfer::Dma && (channel.master.is_none() || !about.dma) {
            return Err(IdeFault::NoDma.into());
        }
        channel.select(drive);
        let identity = Identity {
            driver: match transfer {
                Transfer::Dma => "ide-dma",
                Transfer::Pio => "ide-pio",
            },
            controller: channel.index,
            lun: drive,
            // As SCSI names an ATA disk (SAT-3, 8.1.2).
            vendor: Name(*b"ATA     "),
            product: Name(about.model),
            block_size: SECTOR,
            physical_block_size: about.physical_sector,
            blocks: about.sectors,
            max_transfer: MAX_TRANSFER,
            max_depth: 1,
        };
        Ok(Self { channel, about, identity, transfer, under_way: None, slept: false })
    }

    /// Words of a block of PIO.
    fn block(&self) -> usize {
        usize::from(self.about.multiple.max(1)) * SECTOR as usize / 8
    }

    /// Writes the registers of a command for `blocks` sectors from `block` on, the command itself,
    /// and what `then` says.
    fn command(
        &self,
        codes: [u8; 2],
        block: u64,
        blocks: u32,
        first: Option<PortWrite>,
        then: Option<PortWrite>,
    ) -> Result<(), BlockError> {
        let channel = &*self.channel;
        let end = block.checked_add(blocks.into()).filter(|end| *end <= self.about.sectors);
        let end = end.ok_or(BlockError::Request)?;
        let [short, long] = codes;
        let [b0, b1, b2, b3, b4, b5, ..] = block.to_le_bytes();
        let drive = device::LBA | device_bit(self.identity.lun);

        let mut writes = [PortWrite::default(); MAX_WRITES];
        let mut places = writes.iter_mut();
        let mut put = |write| {
            if let Some(place) = places.next() {
                *place = write;
            }
        };
        first.into_iter().for_each(&mut put);
        let [low, middle, high] = register::LBA;
        // The shorter form spares four writes.
        let (code, upper) = if blocks <= 256 && end <= 1 << 28 {
            (short, b3 & 0x0f)
        } else if blocks <= 0x1_0000 && self.about.long {
            put(channel.to(register::COUNT, (blocks >> 8) as u8));
            put(channel.to(low, b3));
            put(channel.to(middle, b4));
            put(channel.to(high, b5));
            (long, 0)
        } else {
            return Err(BlockError::Request);
        };
        put(channel.to(register::COUNT, blocks as u8)); // 0 stands for the most
        put(channel.to(low, b0));
        put(channel.to(middle, b1));
        put(channel.to(high, b2));
        put(channel.to(register::DEVICE, drive | upper));
        put(channel.to(register::COMMAND, code));
        then.into_iter().for_each(&mut put);
        let left = places.len();
        channel.write(writes.get(..MAX_WRITES - left).unwrap_or_default());
        Ok(())
    }

    /// Has the bus master move `len` bytes of `data`.
    fn start_dma(
        &mut self,
        to_memory: bool,
        block: u64,
        blocks: u32,
        (data, len): (Pages<'w>, u32),
    ) -> Result<(), BlockError> {
        let port = self.channel.master.ok_or(IdeFault::NoDma)?;
        let clear = master::INTERRUPT | master::ERROR | self.channel.master_kept;
        let clear = PortWrite { port: port + master::STATUS, value: clear };
        fill(self.channel.page.words(), data, len).ok_or(BlockError::Request)?;
        // The data and the table are there before the drive is told.
        fence(Ordering::SeqCst);
        let (codes, direction) = if to_memory {
            (command::READ_DMA, master::TO_MEMORY)
        } else {
            (command::WRITE_DMA, 0)
        };
        let start = PortWrite { port: port + master::COMMAND, value: master::START | direction };
        self.command(codes, block, blocks, Some(clear), Some(start))
    }

    /// The drive has interrupted, or somebody else. What it was at, if that has ended.
    fn look(&mut self) -> Result<Option<Completion>, BlockError> {
        let Some((slot, under_way)) = self.under_way else { return Ok(None) };
        let mut noted = 0;
        if let (UnderWay::Dma { .. }, Some(port)) = (under_way, self.channel.master) {
            // Says whether the interrupt is the end, and that all data is in memory.
            noted = self.channel.platform.read_8(port + master::STATUS);
            if noted & master::INTERRUPT == 0 {
                return Ok(None);
            }
            self.channel.write(&[PortWrite { port: port + master::COMMAND, value: 0 }]);
        }
        let status = self.channel.platform.read_8(self.channel.command + register::COMMAND);
        if status & status::BSY != 0 {
            return match under_way {
                UnderWay::Dma { .. } => Err(IdeFault::Status(status).into()),
                _ => Ok(None),
            };
        }
        if status & (status::ERR | status::DF) != 0 || noted & master::ERROR != 0 {
            let error = self.channel.platform.read_8(self.channel.command + register::ERROR);
            let failure = AtaFailure { status, error, master: noted };
            return Ok(Some(Completion { slot, outcome: Err(failure.into()) }));
        }
        let wants_data = status & status::DRQ != 0;
        let bytes = |words: &[AtomicU64]| (words.len() * 8) as u32;
        let done = match under_way {
            UnderWay::Dma { len } if !wants_data => {
                fence(Ordering::SeqCst);
                len
            }
            UnderWay::Flush if !wants_data => 0,
            UnderWay::Reading { words, at } if wants_data => {
                let end = (at + self.block()).min(words.len());
                let block = words.get(at..end).unwrap_or_default();
                self.channel.platform.read_string(self.channel.command + register::DATA, block);
                if end < words.len() {
                    self.under_way = Some((slot, UnderWay::Reading { words, at: end }));
                    return Ok(None);
                }
                bytes(words)
            }
            UnderWay::Writing { words, at } if wants_data && at < words.len() => {
                let at = self.write_block(words, at);
                self.under_way = Some((slot, UnderWay::Writing { words, at }));
                return Ok(None);
            }
            UnderWay::Writing { words, at } if !wants_data && at >= words.len() => bytes(words),
            _ => return Err(IdeFault::Status(status).into()),
        };
        Ok(Some(Completion { slot, outcome: Ok(done) }))
    }

    /// Writes the next block of `words`, from `at` on. Returns where it ends.
    fn write_block(&self, words: &[AtomicU64], at: usize) -> usize {
        let end = (at + self.block()).min(words.len());
        let block = words.get(at..end).unwrap_or_default();
        self.channel.platform.write_string(self.channel.command + register::DATA, block);
        end
    }

    /// Begins what `operation` says.
    fn start(&mut self, request: &Request<'w>) -> Result<UnderWay<'w>, BlockError> {
        let Request { slot: _, operation, block, blocks, data } = *request;
        if operation == Operation::Flush {
            // No address, and so no count either.
            let code = command::FLUSH_CACHE[usize::from(self.about.long)];
            self.channel.write(&[self.channel.to(register::COMMAND, code)]);
            return Ok(UnderWay::Flush);
        }
        let len = blocks.checked_mul(SECTOR).filter(|len| (1..=MAX_TRANSFER).contains(len));
        let len = len.ok_or(BlockError::Request)?;
        let data = data.ok_or(BlockError::Request)?;
        let words = data.words().get(..len as usize / 8).ok_or(BlockError::Request)?;
        let read = operation == Operation::Read;
        if self.transfer == Transfer::Dma {
            self.start_dma(read, block, blocks, (data, len))?;
            return Ok(UnderWay::Dma { len });
        }
        let codes = match (read, self.about.multiple) {
            (true, 0) => command::READ_SECTORS,
            (true, _) => command::READ_MULTIPLE,
            (false, 0) => command::WRITE_SECTORS,
            (false, _) => command::WRITE_MULTIPLE,
        };
        self.command(codes, block, blocks, None, None)?;
        if read {
            return Ok(UnderWay::Reading { words, at: 0 });
        }
        // The drive asks for the first block without an interrupt.
        let status = self.channel.wait(self.identity.lun)?;
        let at = if status & status::DRQ != 0 { self.write_block(words, 0) } else { 0 };
        Ok(UnderWay::Writing { words, at })
    }
}

impl<'w, P: Platform> BlockDriver<'w> for IdeDisk<'_, 'w, P> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn submit(&mut self, request: &Request<'w>) -> Result<(), BlockError> {
        if self.under_way.is_some() {
            return Err(BlockError::Request);
        }
        self.under_way = Some((request.slot, self.start(request)?));
        self.slept = false;
        Ok(())
    }

    fn publish(&mut self) {}

    fn poll(&mut self, ended: &mut dyn FnMut(Completion)) -> Result<usize, BlockError> {
        if !core::mem::take(&mut self.slept) {
            return Ok(0);
        }
        let Some(completion) = self.look()? else { return Ok(0) };
        self.under_way = None;
        ended(completion);
        Ok(1)
    }

    fn sleep(&mut self) {
        self.channel.platform.idle();
        self.slept = true;
    }

    fn looks_cost(&self) -> bool {
        true
    }

    fn counters(&self) -> BlockCounters {
        BlockCounters::default()
    }
}

/// Fills the bus master's table with the first `len` bytes of `data`: in each entry an address, a
/// length in 16 bits (0 stands for 64 KiB), and whether it is the last. `None` if it has no room, or
/// the data has no such address.
fn fill(table: &[AtomicU64], data: Pages<'_>, len: u32) -> Option<()> {
    let mut at = data.first().checked_mul(PAGE as u64)?;
    let end = at.checked_add(len.into()).filter(|end| *end <= 1 << 32)?;
    let mut entries = table.iter();
    while at < end {
        let next = (at / BOUNDARY + 1).saturating_mul(BOUNDARY).min(end);
        let last = if next == end { LAST } else { 0 };
        entries.next()?.store(at | ((next - at) & 0xffff) << 32 | last, Ordering::Relaxed);
        at = next;
    }
    Some(())
}
