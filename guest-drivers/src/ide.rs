//! ATA disks on the two channels of a PIIX4's IDE function, which is found on the PCI bus.
//!
//! A channel does one command at a time, for one of its two drives, and interrupts when it wants
//! something. Data goes one of two ways ([`Transfer`]): the processor moves it through a port, or
//! the controller does by itself, to and from the memory that a table names.
//!
//! How often a driver accesses ports decides how fast it is, as each access may be an intercept.
//! So it never looks before the drive has interrupted, has a command's registers written in one
//! go, and reads none that can say nothing new: a command begins where the last one's end has shown
//! that the drive is ready.
//!
//! - [`disk`]: the driver of a disk.
//! - [`identify`]: what a drive says about itself.
//! - [`bits`]: the numbers.

mod bits;
mod disk;
mod identify;

use core::hint::spin_loop;

use thiserror::Error;

use crate::block::BlockError;
use crate::memory::Pages;
use crate::pci;
use crate::platform::{Platform, PortWrite};
use bits::{command, device, master, register, status};
pub use disk::IdeDisk;
use identify::Drive;
pub use identify::IdentifyError;

/// Bytes of a sector.
const SECTOR: u32 = 512;

/// The IDE function of a PIIX4.
const PIIX4_IDE: (u16, u16) = (0x8086, 0x7111);
/// Its base address register with the bus master's ports, and how many each channel has.
const MASTER_BAR: u8 = 4;
const MASTER_PORTS: u16 = 8;

/// Where the channels are, since the PC/AT: command block, control block, interrupt.
const PLACES: [(u16, u16, u8); 2] = [(0x1f0, 0x3f6, 14), (0x170, 0x376, 15)];

/// How long a drive may take for an answer while it is looked for, in nanoseconds.
const PATIENCE: u64 = 10_000_000_000;

/// How data gets to a disk and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// The controller accesses memory by itself.
    Dma,
    /// The processor moves it, four bytes at a time.
    Pio,
}

/// A drive has ended a command, but not well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "the drive refused with status {status:#04x}, error {error:#04x}, bus master {master:#04x}"
)]
pub struct AtaFailure {
    /// Status register.
    pub status: u8,
    /// Error register.
    pub error: u8,
    /// The bus master's status register; 0 if it had no part in it.
    pub master: u8,
}

/// A drive does not behave as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum IdeFault {
    /// It is busy for ever.
    #[error("drive {drive} of IDE channel {channel} stays busy")]
    Busy {
        /// Which channel.
        channel: u8,
        /// Which drive of it.
        drive: u8,
    },
    /// It has more data to move than it was asked for, or less.
    #[error("the IDE drive has status {0:#04x}, which is not what its command leads to")]
    Status(u8),
    /// What it says about itself cannot be.
    #[error("drive {drive} of IDE channel {channel} is of no use: {error}")]
    Identify {
        /// Which channel.
        channel: u8,
        /// Which drive of it.
        drive: u8,
        /// Why.
        error: IdentifyError,
    },
    /// A drive or a controller without DMA.
    #[error("the IDE disk has no DMA; transfer=pio does without")]
    NoDma,
}

/// A channel and the disks on it.
pub struct Channel<'w, P> {
    platform: &'w P,
    index: u8,
    command: u16,
    control: u16,
    /// The bus master's registers, if there are any.
    master: Option<u16>,
    /// What the bus master's status register keeps for a firmware.
    master_kept: u8,
    /// A page: the bus master's table of memory regions, and behind it room for an identification.
    page: Pages<'w>,
    drives: [Option<Drive>; 2],
}

/// Both channels of the machine's IDE controller, as far as there are disks on them. Each needs a
/// page, which is taken from `memory`.
pub fn find<'w, P: Platform>(
    platform: &'w P,
    memory: &mut Pages<'w>,
) -> Result<[Option<Channel<'w, P>>; 2], BlockError> {
    let (vendor, device) = PIIX4_IDE;
    let mut channels = [None, None];
    let Some(function) = pci::find(platform, vendor, device).next() else {
        return Ok(channels);
    };
    function.enable(platform);
    let master = function.io_base(platform, MASTER_BAR);
    for ((index, place), slot) in (0..).zip(PLACES).zip(&mut channels) {
        let (command, control, irq) = place;
        let master = master.and_then(|base| base.checked_add(MASTER_PORTS * u16::from(index)));
        let page = memory.take(1).ok_or(BlockError::Request)?;
        let mut channel = Channel {
            platform,
            index,
            command,
            control,
            master,
            master_kept: 0,
            page,
            drives: [None, None],
        };
        channel.look()?;
        if channel.drives.iter().any(Option::is_some) {
            channel.start(irq)?;
            *slot = Some(channel);
        }
    }
    Ok(channels)
}

impl<'w, P: Platform> Channel<'w, P> {
    /// Which of the two drives are disks.
    pub fn disks(&self) -> impl Iterator<Item = u8> + use<P> {
        let [first, second] = &self.drives;
        [first.is_some().then_some(0), second.is_some().then_some(1)].into_iter().flatten()
    }

    /// The disk that is drive 0 or 1; `None` if that is none.
    pub fn disk(
        &mut self,
        drive: u8,
        transfer: Transfer,
    ) -> Result<Option<IdeDisk<'_, 'w, P>>, BlockError> {
        match self.drives.get(usize::from(drive)) {
            Some(Some(about)) => Ok(Some(IdeDisk::new(*about, drive, transfer, self)?)),
            _ => Ok(None),
        }
    }

    /// Looks for drives.
    fn look(&mut self) -> Result<(), IdeFault> {
        // Nobody on the cable pulls it down.
        const NOTHING: u8 = 0xff;
        if self.platform.read_8(self.control) == NOTHING {
            return Ok(());
        }
        self.write(&[PortWrite { port: self.control, value: bits::CONTROL }]);
        for drive in [0, 1] {
            let about = self.identify(drive)?;
            if let Some(place) = self.drives.get_mut(usize::from(drive)) {
                *place = about;
            }
        }
        Ok(())
    }

    /// Asks a drive what it is; `None` if it is no disk, or not there.
    fn identify(&self, drive: u8) -> Result<Option<Drive>, IdeFault> {
        self.select(drive);
        self.write(&[self.to(register::COMMAND, command::IDENTIFY_DEVICE)]);
        if self.platform.read_8(self.control) == 0 {
            return Ok(None);
        }
        let status = self.wait(drive)?;
        if status & (status::ERR | status::DF) != 0 {
            return Ok(None); // a packet device refuses, so that it is not taken for a disk
        }
        if status & status::DRQ == 0 {
            return Err(IdeFault::Status(status));
        }
        let mut answer = [0; identify::LEN];
        let (_, room) = self.page.words().split_at(self.page.words().len() / 2);
        let room = room.get(..identify::LEN / 8).unwrap_or(room);
        self.platform.read_string(self.command + register::DATA, room);
        for (bytes, word) in answer.as_chunks_mut().0.iter_mut().zip(room) {
            *bytes = word.load(core::sync::atomic::Ordering::Relaxed).to_le_bytes();
        }
        let channel = self.index;
        let about = Drive::parse(&answer);
        about.map(Some).map_err(|error| IdeFault::Identify { channel, drive, error })
    }

    /// Makes the channel ready for commands: the drives know how they transfer, the bus master where
    /// its table is, and interrupts arrive.
    fn start(&mut self, irq: u8) -> Result<(), IdeFault> {
        for (drive, about) in (0..).zip(self.drives) {
            let Some(multiple) = about.map(|about| about.multiple).filter(|count| *count > 0)
            else {
                continue;
            };
            self.select(drive);
            self.write(&[
                self.to(register::COUNT, multiple),
                self.to(register::COMMAND, command::SET_MULTIPLE),
            ]);
            let status = self.wait(drive)?;
            if status & (status::ERR | status::DF) != 0
                && let Some(Some(about)) = self.drives.get_mut(usize::from(drive))
            {
                about.multiple = 0;
            }
        }
        if let Some(master) = self.master {
            let kept = self.platform.read_8(master + master::STATUS);
            self.master_kept = kept & master::DRIVES_CAPABLE;
            match u32::try_from(self.page.first() * crate::memory::PAGE as u64) {
                Ok(table) => self.platform.write_32(master + master::TABLE, table),
                Err(_) => self.master = None, // it has 32 bits of address
            }
        }
        // Lets go of the interrupts of what was asked so far.
        self.platform.read_8(self.command + register::COMMAND);
        self.platform.listen(irq);
        Ok(())
    }

    /// Turns to a drive, and gives it the 400 ns that it may take to answer.
    fn select(&self, drive: u8) {
        self.write(&[self.to(register::DEVICE, device::LBA | device_bit(drive))]);
        self.platform.read_8(self.control);
    }

    /// Waits for the end of a command that should not take long, looking all the time.
    fn wait(&self, drive: u8) -> Result<u8, IdeFault> {
        let until = self.platform.now().saturating_add(PATIENCE);
        loop {
            let status = self.platform.read_8(self.control);
            if status & status::BSY == 0 {
                return Ok(status);
            }
            if self.platform.now() > until {
                return Err(IdeFault::Busy { channel: self.index, drive });
            }
            spin_loop();
        }
    }

    fn to(&self, register: u16, value: u8) -> PortWrite {
        PortWrite { port: self.command + register, value }
    }

    fn write(&self, writes: &[PortWrite]) {
        self.platform.write_8(writes);
    }
}

fn device_bit(drive: u8) -> u8 {
    if drive == 0 { 0 } else { device::DEV }
}
