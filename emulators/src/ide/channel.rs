//! One IDE channel: the registers of up to two drives and of the bus master, as a state machine
//! without I/O.
//!
//! ```text
//!            command                    job is done            last block read or written
//!   Idle ─────────────> Busy (a Job) ────────────────> Data ───────────────────────────> Idle
//!    ^  └─> Data (IDENTIFY, PIO write)  └─> Idle         └─> Busy (more to read or write)
//!    └──────── Armed (DMA command) ──bus master starts──> Busy
//! ```
//!
//! Accesses of the guest come in as reads and writes of registers. What they want of the host comes
//! out of [`Channel::take_job`], and goes back into [`Channel::finish`]; while a job is out, the
//! channel is busy, whatever the guest does, resets included: a reset, of the channel or of a packet
//! device alone, then takes effect when the job has come back, as on a drive that has to finish a
//! sector first. So no request to the host is ever
//! called back, and no memory changes under one.

mod commands;
mod dma;

use backends::block::{BlockErrorKind, Geometry, SECTOR};

use super::bits::{command, control, device, error, master, reason, status};
use super::cd::Cd;
use super::drive::{Drive, DriveError, Form};
use dma::BusMaster;

/// What is buffered of a PIO transfer: as much as the longest 28-bit command moves.
pub(super) const BUFFER: usize = 256 * SECTOR as usize;

/// Sectors that one DMA transfer can move: what the longest table of physical regions names.
const MAX_DMA_SECTORS: u32 = 1 << 20;

/// Something the host shall do for a drive.
#[derive(Debug)]
pub(super) struct Job {
    /// Which drive, 0 or 1.
    pub(super) drive: usize,
    /// What to do.
    pub(super) work: Work,
    /// [`BUFFER`] bytes. They come back with the result.
    pub(super) buffer: Box<[u8]>,
}

/// What to do. Offsets and lengths are bytes, in range and in whole sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// From the disk into the buffer.
    Read { offset: u64, len: u32 },
    /// From the buffer to the disk.
    Write { offset: u64, len: u32, fua: bool },
    /// From the disk to where the table of physical regions at `table` says.
    ReadDma { offset: u64, len: u32, table: u32 },
    /// From there to the disk.
    WriteDma { offset: u64, len: u32, table: u32, fua: bool },
    /// All that was written goes to stable storage.
    Flush,
    /// The start of the buffer goes to where the table says.
    Send { len: u32, table: u32 },
    /// Ranges are read from memory, `len` bytes of them, and discarded.
    Trim { len: u32, table: u32 },
}

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All of it is done. If the table named more memory than there was data, `table_left`.
    Done {
        /// The bus master stays active then, as it waits for more.
        table_left: bool,
    },
    /// The disk could not do it.
    Disk(BlockErrorKind),
    /// The table of physical regions is too short, or not all in RAM.
    Table,
    /// The ranges to be discarded are not on the disk.
    Range,
}

/// What the channel is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// The guest reads or writes `buffer[at..]`; a data block ends at `block`, the buffered part of
    /// the transfer at `end`.
    Data {
        write: bool,
        at: usize,
        block: usize,
        end: usize,
    },
    /// A DMA command waits for the bus master.
    Armed,
    /// A job is to be taken, or is out.
    Busy,
}

/// A reset that waits for the job that is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// DEVICE RESET, of the packet device whose job it is.
    Device,
    /// SRST, of both drives.
    Channel,
}

/// A command that moves sectors.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    kind: Kind,
    form: Form,
    /// The first sector that no job has been made for, and how many there are from there on.
    next: u64,
    left: u32,
    /// Where the present job has started.
    start: u64,
    fua: bool,
}

impl Transfer {
    /// None is under way.
    const NONE: Self =
        Self { kind: Kind::None, form: Form::Short, next: 0, left: 0, start: 0, fua: false };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// No sectors: flush.
    None,
    Read {
        block: usize,
    },
    Write {
        block: usize,
    },
    Verify,
    ReadDma,
    WriteDma,
    Trim,
    /// The command block of a PACKET command, then its data in blocks of at most `limit` bytes.
    Packet {
        limit: usize,
        dma: bool,
    },
}

/// A register of the command block, by its offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Register(u8);

impl Register {
    const FEATURES: Self = Self(1);
    const COUNT: Self = Self(2);
    const DEVICE: Self = Self(6);
    const COMMAND: Self = Self(7);
}

/// One channel.
#[derive(Debug)]
pub(super) struct Channel {
    drives: [Option<Drive>; 2],
    /// The device register: drive, and the upper bits of an address.
    device: u8,
    control: u8,
    phase: Phase,
    /// Whose phase it is.
    active: usize,
    transfer: Transfer,
    /// Bytes of the buffer that a PACKET command sends by DMA, if it does not read the disc.
    sent: u32,
    /// Not here while a job is out.
    buffer: Option<Box<[u8]>>,
    job: Option<Work>,
    /// What came while a job was out.
    reset: Option<Reset>,
    /// A driver has reset the channel, and the worker does not know yet.
    anew: bool,
    /// The drive interrupts.
    interrupt: bool,
    /// The interrupt line as [`Self::take_edge`] last saw it.
    line: bool,
    master: BusMaster,
}

impl Channel {
    pub(super) fn new() -> Self {
        Self {
            drives: [None, None],
            device: 0,
            control: 0,
            phase: Phase::Idle,
            active: 0,
            transfer: Transfer::NONE,
            sent: 0,
            buffer: Some(vec![0; BUFFER].into_boxed_slice()),
            job: None,
            reset: None,
            anew: false,
            interrupt: false,
            line: false,
            master: BusMaster::default(),
        }
    }

    /// Puts a disk or a CD-ROM drive at place 0 or 1.
    pub(super) fn attach(
        &mut self,
        place: usize,
        geometry: &Geometry,
        cd: bool,
    ) -> Result<(), DriveError> {
        let drive = if cd { Drive::new_cd(geometry) } else { Drive::new(geometry) }?;
        if let Some(slot) = self.drives.get_mut(place) {
            *slot = Some(drive);
        }
        Ok(())
    }

    /// The job that the last access has made, if it has made one.
    pub(super) fn take_job(&mut self) -> Option<Job> {
        let buffer = self.buffer.take_if(|_| self.job.is_some())?;
        let work = self.job.take()?;
        Some(Job { drive: self.active, work, buffer })
    }

    /// Whether a driver has reset the channel since the last call; to be heard before the next job.
    pub(super) fn take_anew(&mut self) -> bool {
        std::mem::take(&mut self.anew)
    }

    /// Whether [`Self::take_anew`] would say so.
    pub(super) fn is_anew(&self) -> bool {
        self.anew
    }

    /// Whether a job waits to be taken.
    pub(super) fn has_job(&self) -> bool {
        self.job.is_some()
    }

    /// Whether the interrupt line has gone up since the last call.
    pub(super) fn take_edge(&mut self) -> bool {
        let line = self.interrupt && self.control & control::NIEN == 0;
        let edge = line && !self.line;
        self.line = line;
        if edge {
            self.master.status |= master::INTERRUPT; // it notes every one
        }
        edge
    }

    /// Lets go of the interrupt line.
    fn acknowledge(&mut self) {
        self.interrupt = false;
        self.line = false;
    }

    fn selected(&self) -> usize {
        usize::from(self.device & device::DEV != 0)
    }

    /// Whether the selected drive is at something, so that it takes no register writes.
    fn is_busy(&self) -> bool {
        self.in_reset() || self.phase == Phase::Busy
    }

    fn in_reset(&self) -> bool {
        self.reset == Some(Reset::Channel) || self.control & control::SRST != 0
    }

    fn status(&self) -> u8 {
        let selected = self.selected();
        let Some(Some(drive)) = self.drives.get(selected) else { return 0 };
        if self.in_reset() {
            return status::BSY;
        }
        if selected != self.active {
            return drive.status;
        }
        match self.phase {
            Phase::Idle => drive.status,
            Phase::Data { .. } => drive.status | status::DRQ,
            // DMARQ waits for the bus master; DRQ says so.
            Phase::Armed => drive.status | status::DRQ,
            Phase::Busy => status::BSY,
        }
    }

    /// Reads the status without acknowledging the interrupt (alternate status).
    pub(super) fn read_control(&self) -> u8 {
        self.status()
    }

    /// Reads register 1 to 7 of the command block.
    pub(super) fn read(&mut self, register: u8) -> u8 {
        if Register(register) == Register::COMMAND {
            self.acknowledge();
            return self.status();
        }
        let high = self.control & control::HOB != 0;
        let Some(Some(drive)) = self.drives.get(self.selected()) else {
            // Nobody drives the bus but the resistor that pulls bit 7 down, and the other drive,
            // which answers with zeroes.
            return 0;
        };
        match Register(register) {
            Register::FEATURES => drive.error,
            Register::COUNT => drive.count.get(high),
            Register::DEVICE => self.device | device::ONES,
            _ => match drive.lba.get(usize::from(register).wrapping_sub(3)) {
                Some(pair) => pair.get(high),
                None => 0,
            },
        }
    }

    /// Writes register 1 to 7 of the command block.
    pub(super) fn write(&mut self, register: u8, value: u8) {
        if self.is_busy() {
            // Packet devices hear one command at any time.
            let resets = Register(register) == Register::COMMAND && value == command::DEVICE_RESET;
            if resets
                && self.phase == Phase::Busy
                && self.selected() == self.active
                && self.cd().is_some()
            {
                self.reset.get_or_insert(Reset::Device);
            }
            return;
        }
        self.control &= !control::HOB; // any write does that
        match Register(register) {
            Register::COMMAND => return self.command(value),
            Register::DEVICE => self.device = value,
            _ => {}
        }
        // Both drives hear what is written.
        for drive in self.drives.iter_mut().flatten() {
            match Register(register) {
                Register::FEATURES => drive.features.write(value),
                Register::COUNT => drive.count.write(value),
                _ => {
                    if let Some(pair) = drive.lba.get_mut(usize::from(register).wrapping_sub(3)) {
                        pair.write(value);
                    }
                }
            }
        }
    }

    /// Writes the device control register.
    pub(super) fn write_control(&mut self, value: u8) {
        let before = self.control;
        self.control = value;
        if before & control::SRST == 0 && value & control::SRST != 0 {
            self.anew = true;
            if self.phase == Phase::Busy {
                self.reset = Some(Reset::Channel);
            } else {
                self.restart();
            }
        }
    }

    /// What DEVICE RESET comes to: the selected packet device is as after power-on, and nothing else
    /// is changed. It does not interrupt, and stays selected (ATA/ATAPI-7 volume 1, section 6.15).
    fn restart_device(&mut self) {
        self.reset = None;
        let selected = self.selected();
        if selected == self.active {
            self.acknowledge();
            self.phase = Phase::Idle;
            self.transfer = Transfer::NONE;
        }
        if let Some(Some(drive)) = self.drives.get_mut(selected) {
            drive.put_signature();
        }
    }

    /// What a reset of the channel comes to in the end.
    fn restart(&mut self) {
        self.reset = None;
        self.acknowledge();
        self.job = None;
        self.phase = Phase::Idle;
        self.active = 0;
        self.device = 0;
        self.master.status &= !master::ACTIVE;
        for drive in self.drives.iter_mut().flatten() {
            drive.put_signature();
        }
    }

    /// Reads the data register: any number of bytes, as string instructions do.
    pub(super) fn read_data(&mut self, mut data: &mut [u8]) {
        while !data.is_empty()
            && self.selected() == self.active
            && let Phase::Data { write: false, at, block, end } = self.phase
            && let Some(source) = self.buffer.as_deref().and_then(|buffer| buffer.get(at..block))
        {
            let count = data.len().min(source.len());
            let (now, later) = data.split_at_mut(count);
            now.copy_from_slice(&source[..count]);
            data = later;
            self.advance(false, at + count, block, end);
        }
    }

    /// Writes the data register.
    pub(super) fn write_data(&mut self, mut data: &[u8]) {
        while !data.is_empty()
            && self.selected() == self.active
            && let Phase::Data { write: true, at, block, end } = self.phase
            && let Some(target) =
                self.buffer.as_deref_mut().and_then(|buffer| buffer.get_mut(at..block))
        {
            let count = data.len().min(target.len());
            let (now, later) = data.split_at(count);
            target[..count].copy_from_slice(now);
            data = later;
            self.advance(true, at + count, block, end);
        }
    }

    /// Data has been moved up to `at`: goes on with the block, the next block, or the disk.
    fn advance(&mut self, write: bool, at: usize, block: usize, end: usize) {
        if at < block {
            self.phase = Phase::Data { write, at, block, end };
        } else if at < end {
            self.next_block(write, at, end);
            self.interrupt = true;
        } else if write && matches!(self.transfer.kind, Kind::Packet { .. }) {
            self.packet();
        } else if write {
            let Transfer { start, fua, .. } = self.transfer;
            let len = end as u32;
            self.order(Work::Write { offset: start * u64::from(SECTOR), len, fua });
        } else if self.transfer.left > 0 {
            self.order_sectors();
        } else if matches!(self.transfer.kind, Kind::Packet { .. }) {
            self.succeed();
        } else {
            self.phase = Phase::Idle;
        }
    }

    /// Lets the guest move the block that starts at `at`.
    fn next_block(&mut self, write: bool, at: usize, end: usize) {
        let block = (at + self.block()).min(end);
        self.phase = Phase::Data { write, at, block, end };
        if let Kind::Packet { .. } = self.transfer.kind
            && let Some(drive) = self.drive_mut()
        {
            let [low, high, ..] = (block - at).to_le_bytes();
            drive.lba[1].set(low);
            drive.lba[2].set(high);
            drive.count.set(reason::TO_GUEST);
        }
    }

    /// Bytes in a data block of the command.
    fn block(&self) -> usize {
        match self.transfer.kind {
            Kind::Read { block } | Kind::Write { block } => block,
            Kind::Packet { limit, .. } => limit,
            _ => SECTOR as usize,
        }
    }

    fn order(&mut self, work: Work) {
        self.phase = Phase::Busy;
        self.job = Some(work);
    }

    /// Takes the next sectors off the transfer, `most` of them. Returns the first and how many.
    fn take_sectors(&mut self, most: u32) -> (u64, u32) {
        let transfer = &mut self.transfer;
        let count = transfer.left.min(most);
        transfer.start = transfer.next;
        transfer.next += u64::from(count);
        transfer.left -= count;
        (transfer.start * u64::from(SECTOR), count * SECTOR)
    }

    /// Reads what fits the buffer.
    fn order_sectors(&mut self) {
        let (offset, len) = self.take_sectors(BUFFER as u32 / SECTOR);
        self.order(Work::Read { offset, len });
    }

    /// Lets the guest write what fits the buffer.
    fn ask_for_sectors(&mut self) {
        let (_, len) = self.take_sectors(BUFFER as u32 / SECTOR);
        let end = len as usize;
        self.phase = Phase::Data { write: true, at: 0, block: self.block().min(end), end };
    }

    /// The guest may read the first `end` bytes of the buffer.
    fn offer(&mut self, end: usize) {
        self.next_block(false, 0, end);
        self.interrupt = true;
    }

    /// Takes a job back.
    pub(super) fn finish(&mut self, buffer: Box<[u8]>, outcome: Outcome) {
        let len = buffer.len();
        self.buffer = Some(buffer);
        debug_assert_eq!(len, BUFFER);
        match self.reset {
            Some(Reset::Device) => return self.restart_device(),
            None if self.phase == Phase::Busy => {}
            _ => return self.restart(),
        }
        let table_left = match outcome {
            Outcome::Done { table_left } => table_left,
            failure => return self.fail(failure),
        };
        match self.transfer.kind {
            Kind::Read { .. } | Kind::Packet { dma: false, .. } => {
                let sectors = self.transfer.next - self.transfer.start;
                return self.offer((sectors as usize * SECTOR as usize).min(BUFFER));
            }
            Kind::Write { .. } if self.transfer.left > 0 => {
                self.ask_for_sectors();
                self.interrupt = true;
                return;
            }
            Kind::Verify if self.transfer.left > 0 => return self.order_sectors(),
            Kind::ReadDma | Kind::WriteDma | Kind::Trim | Kind::Packet { .. } => {
                if !table_left {
                    self.master.status &= !master::ACTIVE;
                }
            }
            Kind::None | Kind::Write { .. } | Kind::Verify => {}
        }
        self.succeed();
    }

    fn cd(&mut self) -> Option<&mut Cd> {
        self.drive_mut()?.cd.as_mut()
    }

    fn drive_mut(&mut self) -> Option<&mut Drive> {
        self.drives.get_mut(self.active)?.as_mut()
    }

    /// Ends a command well.
    fn succeed(&mut self) {
        self.phase = Phase::Idle;
        self.interrupt = true;
        let packet = matches!(self.transfer.kind, Kind::Packet { .. });
        if let Some(drive) = self.drive_mut() {
            drive.status = status::DRDY | status::DSC;
            drive.error = 0;
            if packet {
                drive.count.set(reason::STATUS);
            }
        }
    }

    /// Ends a command with bits of the error register.
    fn abort(&mut self, bits: u8) {
        self.succeed();
        if let Some(drive) = self.drive_mut() {
            drive.status |= status::ERR;
            drive.error = bits;
        }
    }

    /// Ends a command that the host could not carry out.
    fn fail(&mut self, outcome: Outcome) {
        let reading =
            matches!(self.transfer.kind, Kind::Read { .. } | Kind::ReadDma | Kind::Verify);
        let bits = match outcome {
            Outcome::Table => error::ICRC | error::ABRT,
            Outcome::Range => error::IDNF | error::ABRT,
            Outcome::Disk(BlockErrorKind::OutOfRange) => error::IDNF,
            Outcome::Disk(BlockErrorKind::Io) if reading => error::UNC,
            _ => error::ABRT,
        };
        self.abort(bits);
        let Transfer { start, form, kind, .. } = self.transfer;
        if !matches!(kind, Kind::Read { .. } | Kind::Write { .. }) {
            self.master.status &= !master::ACTIVE;
            if outcome == Outcome::Table {
                self.master.status |= master::ERROR;
            }
        }
        if let Some(cd) = self.cd() {
            cd.host_failed(outcome != Outcome::Table);
            return self.check_condition();
        }
        let device_register = self.device;
        let Some(drive) = self.drive_mut() else { return };
        // That somebody else writes the disk is no fault of the device.
        let faulty = matches!(outcome, Outcome::Disk(kind) if kind != BlockErrorKind::ReadOnly);
        if !reading && faulty {
            drive.status |= status::DF;
        }
        let device_register = drive.put_address(start, form, device_register);
        if self.selected() == self.active {
            self.device = device_register;
        }
    }
}

#[cfg(test)]
#[path = "channel_tests.rs"]
mod tests;
