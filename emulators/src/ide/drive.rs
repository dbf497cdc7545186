//! One drive on a channel, an ATA disk or a CD-ROM: its registers, its settings, and what it says
//! about itself.

use backends::block::{Geometry, SECTOR};

use super::bits::{device, error, status};
use super::cd::Cd;

/// Sectors that fit one data block of READ and WRITE MULTIPLE, at most.
pub(super) const MAX_MULTIPLE: u8 = 16;

/// 512-byte blocks of ranges that one DATA SET MANAGEMENT command may send, at most.
pub(super) const MAX_TRIM_BLOCKS: u16 = 8;

/// Heads and sectors per track that a disk of ours claims, as all disks do since cylinders ran out.
const HEADS: u8 = 16;
const SECTORS: u8 = 63;

const MODEL: &str = "Partita IDE disk";
const FIRMWARE: &str = "1.0";

/// Why a disk cannot be put on an IDE channel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriveError {
    /// Its blocks are larger than an ATA sector.
    #[error(
        "an IDE disk has sectors of 512 bytes, and this one has blocks of {0}; say attach=scsi, or \
         block-size=512 if what is on it was made for that"
    )]
    Block(u32),
    /// The place is taken.
    #[error("there is a disk at channel={channel},device={device} already")]
    Taken {
        /// 0 or 1.
        channel: u8,
        /// 0 or 1.
        device: u8,
    },
    /// There is no place left.
    #[error("both channels have two disks already")]
    Full,
}

/// A register with the value it had before, for 48-bit commands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pair {
    pub(super) current: u8,
    pub(super) previous: u8,
}

impl Pair {
    pub(super) fn write(&mut self, value: u8) {
        *self = Self { current: value, previous: self.current };
    }

    pub(super) fn set(&mut self, current: u8) {
        *self = Self { current, previous: 0 };
    }

    pub(super) fn get(self, high: bool) -> u8 {
        if high { self.previous } else { self.current }
    }
}

/// An address or a count of a command, in the form that the command has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// 28 bits or cylinder, head and sector.
    Short,
    /// 48 bits.
    Long,
}

/// A disk or a CD-ROM drive.
#[derive(Debug)]
pub(super) struct Drive {
    /// If it is a CD-ROM drive, what understands its commands.
    pub(super) cd: Option<Cd>,
    serial: String,
    rotational: bool,
    trim: bool,
    trim_zeroes: bool,
    physical_shift: u32,
    /// All of it, in sectors.
    pub(super) sectors: u64,
    pub(super) read_only: bool,

    pub(super) features: Pair,
    pub(super) count: Pair,
    /// Low, middle and high byte of the address.
    pub(super) lba: [Pair; 3],
    pub(super) error: u8,
    pub(super) status: u8,

    /// Sectors per block of READ and WRITE MULTIPLE; 0 if that was not set.
    pub(super) multiple: u8,
    pub(super) write_cache: bool,
    pub(super) look_ahead: bool,
    pub(super) smart: bool,
    /// The transfer mode last set, as SET FEATURES writes it.
    mode: u8,
    heads: u8,
    track: u8,
}

impl Drive {
    pub(super) fn new(geometry: &Geometry) -> Result<Self, DriveError> {
        if geometry.logical_block != SECTOR {
            return Err(DriveError::Block(geometry.logical_block));
        }
        let ratio = (geometry.physical_block / geometry.logical_block).max(1);
        let mut drive = Self {
            cd: None,
            serial: geometry.id.clone(),
            rotational: geometry.rotational,
            trim: geometry.discard && !geometry.read_only,
            trim_zeroes: geometry.discard_zeroes,
            physical_shift: ratio.ilog2(),
            // 48 bits of sectors; no host has a file that large.
            sectors: (geometry.size / u64::from(SECTOR)).min((1 << 48) - 1),
            read_only: geometry.read_only,
            features: Pair::default(),
            count: Pair::default(),
            lba: [Pair::default(); 3],
            error: 0,
            status: 0,
            multiple: MAX_MULTIPLE,
            write_cache: true,
            look_ahead: true,
            smart: true,
            mode: 0,
            heads: HEADS,
            track: SECTORS,
        };
        drive.put_signature();
        Ok(drive)
    }

    /// A CD-ROM drive with that disc.
    pub(super) fn new_cd(geometry: &Geometry) -> Result<Self, DriveError> {
        let disc = Geometry { read_only: true, logical_block: SECTOR, ..geometry.clone() };
        let mut drive = Self::new(&disc)?;
        drive.cd = Some(Cd::new(geometry.size));
        drive.put_signature();
        Ok(drive)
    }

    /// Whether DATA SET MANAGEMENT can TRIM.
    pub(super) fn trims(&self) -> bool {
        self.trim
    }

    /// What the registers show after a reset: what kind of drive it is, and that it is well.
    pub(super) fn put_signature(&mut self) {
        let (middle, high, status) = match self.cd {
            None => (0, 0, status::DRDY | status::DSC),
            Some(_) => (0x14, 0xeb, 0), // it takes commands all the same
        };
        self.count.set(1);
        self.lba[0].set(1);
        self.lba[1].set(middle);
        self.lba[2].set(high);
        self.error = error::DIAGNOSTICS_PASSED;
        self.status = status;
    }

    /// INITIALIZE DEVICE PARAMETERS: how cylinder, head and sector are to be understood.
    pub(super) fn set_geometry(&mut self, heads: u8, track: u8) {
        (self.heads, self.track) = (heads, track);
    }

    fn cylinders(&self) -> u16 {
        let track = u64::from(self.heads) * u64::from(self.track);
        // What cylinders cannot say, nobody asks them for.
        u16::try_from(self.sectors / track.max(1)).unwrap_or(u16::MAX).min(16383)
    }

    /// Sets a transfer mode (SET FEATURES 03h). Returns whether there is such a one.
    pub(super) fn set_mode(&mut self, mode: u8) -> bool {
        let known = match mode >> 3 {
            0 => mode <= 1,     // PIO default, with or without flow control
            1 => mode & 7 <= 4, // PIO
            4 => mode & 7 <= 2, // multiword DMA
            8 => mode & 7 <= 5, // Ultra DMA
            _ => false,
        };
        if known && mode >> 3 >= 4 {
            self.mode = mode;
        }
        known
    }

    /// The first sector that the registers name, if that can be one.
    pub(super) fn address(&self, form: Form, device_register: u8) -> Option<u64> {
        let byte = |pair: Pair| u64::from(pair.current);
        let [low, middle, high] = self.lba;
        let low24 = byte(low) | byte(middle) << 8 | byte(high) << 16;
        if form == Form::Long {
            let byte = |pair: Pair| u64::from(pair.previous);
            return Some(low24 | byte(low) << 24 | byte(middle) << 32 | byte(high) << 40);
        }
        let nibble = u64::from(device_register & 0x0f);
        if device_register & device::LBA != 0 {
            return Some(low24 | nibble << 24);
        }
        let (cylinder, sector) = (low24 >> 8, byte(low));
        let (heads, track) = (u64::from(self.heads), u64::from(self.track));
        let valid = nibble < heads && (1..=track).contains(&sector);
        valid.then(|| (cylinder * heads + nibble) * track + sector - 1)
    }

    /// How many sectors the registers name; 0 stands for the most.
    pub(super) fn sector_count(&self, form: Form) -> u32 {
        let low = u32::from(self.count.current);
        match form {
            Form::Short if low == 0 => 256,
            Form::Short => low,
            Form::Long => match low | u32::from(self.count.previous) << 8 {
                0 => 65536,
                count => count,
            },
        }
    }

    /// Shows an address in the registers: where something went wrong. Returns the device register's
    /// part of it.
    pub(super) fn put_address(&mut self, lba: u64, form: Form, device_register: u8) -> u8 {
        let [b0, b1, b2, b3, b4, b5, ..] = lba.to_le_bytes();
        let (current, previous, nibble) = if form == Form::Long {
            ([b0, b1, b2], [b3, b4, b5], device_register & 0x0f)
        } else if device_register & device::LBA != 0 {
            ([b0, b1, b2], [0; 3], b3 & 0x0f)
        } else {
            let track = u64::from(self.track.max(1));
            let (sector, rest) = (lba % track + 1, lba / track);
            let heads = u64::from(self.heads.max(1));
            let [c0, c1, ..] = (rest / heads).to_le_bytes();
            ([sector as u8, c0, c1], [0; 3], (rest % heads) as u8 & 0x0f)
        };
        for (register, (current, previous)) in
            self.lba.iter_mut().zip(current.into_iter().zip(previous))
        {
            *register = Pair { current, previous };
        }
        device_register & 0xf0 | nibble
    }

    /// What IDENTIFY DEVICE or IDENTIFY PACKET DEVICE sends (ATA8-ACS-2, sections 7.13 and 7.14).
    pub(super) fn identify(&self, page: &mut [u8; 512]) {
        let mut words = [0_u16; 256];
        let is_cd = self.cd.is_some();
        let mut text = |first: usize, len: usize, text: &str| {
            // Space-padded; the first character of each pair is in the high byte.
            let mut bytes = text.bytes().chain(std::iter::repeat(b' '));
            for word in words.iter_mut().skip(first).take(len) {
                *word = u16::from_be_bytes([
                    bytes.next().unwrap_or(b' '),
                    bytes.next().unwrap_or(b' '),
                ]);
            }
        };
        text(10, 10, &self.serial);
        text(23, 4, FIRMWARE);
        text(27, 20, if is_cd { "Partita CD-ROM" } else { MODEL });

        let bit = |on: bool, bit: u16| u16::from(on) << bit;
        let cylinders = self.cylinders();
        let chs = u32::from(cylinders) * u32::from(self.heads) * u32::from(self.track);
        let short = u32::try_from(self.sectors).unwrap_or(u32::MAX).min(0x0fff_ffff);
        // The bits of the modes that there are, and in the upper byte of the one that is set.
        let modes = |count: u16, kind: u8| {
            let selected = if self.mode >> 3 == kind { 0x100 << (self.mode & 7) } else { 0 };
            ((1 << count) - 1) | selected
        };
        // SMART, power management, write cache, look-ahead; 48-bit addresses, both flushes; WRITE
        // DMA FUA EXT, READ LOG EXT.
        let commands = [0x0069, 0x7400, 0x4060];
        let enabled =
            0x0008 | bit(self.smart, 0) | bit(self.write_cache, 5) | bit(self.look_ahead, 6);
        let long = self.sectors;
        // A CD-ROM drive: removable, with command blocks of 12 bytes that it asks for within 50 us.
        // The page is short, as there is no addressing and no cache to describe.
        let packet = [
            (0, 0x85c0),
            (49, 0x0f00),
            (53, 0x0006),
            (63, modes(3, 4)),
            (64, 0x0003),
            (65, 120),
            (66, 120),
            (67, 120),
            (68, 120),
            (80, 0x00f0),
            (82, 0x0010), // PACKET
            (83, 0x4000),
            (84, 0x4000),
            (85, 0x0010),
            (87, 0x4000),
            (88, modes(6, 8)),
            (93, 0x400b),
        ];
        let disk = [
            (0, 0x0040), // an ATA disk that is not removable
            (1, cylinders),
            (3, u16::from(HEADS)),
            (6, u16::from(SECTORS)),
            (47, 0x8000 | u16::from(MAX_MULTIPLE)),
            (49, 0x0f00), // DMA, LBA, IORDY
            (50, 0x4000),
            (53, 0x0007), // words 54 to 58, 64 to 70 and 88 are valid
            (54, cylinders),
            (55, self.heads.into()),
            (56, self.track.into()),
            (57, chs as u16),
            (58, (chs >> 16) as u16),
            (59, if self.multiple == 0 { 0 } else { 0x0100 | u16::from(self.multiple) }),
            (60, short as u16),
            (61, (short >> 16) as u16),
            (63, modes(3, 4)),
            (64, 0x0003), // PIO modes 3 and 4
            (65, 120),    // nanoseconds per cycle, of multiword DMA and of PIO
            (66, 120),
            (67, 120),
            (68, 120),
            // Reads after TRIM: always the same, and zeroes.
            (69, bit(self.trim && self.trim_zeroes, 14) | bit(self.trim && self.trim_zeroes, 5)),
            (80, 0x03f0), // ATA-4 to ACS-2
            (82, commands[0]),
            (83, commands[1]),
            (84, commands[2]),
            (85, enabled),
            (86, commands[1] & 0x3fff),
            (87, commands[2]),
            (88, modes(6, 8)),
            (93, 0x400b), // reset found drive 0 by its jumper, and a cable of 40 wires
            (100, long as u16),
            (101, (long >> 16) as u16),
            (102, (long >> 32) as u16),
            (105, if self.trim { MAX_TRIM_BLOCKS } else { 0 }),
            (106, 0x4000 | bit(self.physical_shift > 0, 13) | self.physical_shift as u16 & 0xf),
            (169, bit(self.trim, 0)),
            (217, if self.rotational { 7200 } else { 1 }),
        ];
        for &(word, value) in if is_cd { &packet[..] } else { &disk[..] } {
            if let Some(register) = words.get_mut::<usize>(word) {
                *register = value;
            }
        }
        for (bytes, word) in page.chunks_exact_mut(2).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        page[510] = 0xa5; // a checksum follows
        seal(page);
    }

    /// What SMART READ DATA sends: that there is nothing to say. Attributes of a disk that does not
    /// age would be invented.
    pub(super) fn smart_data(page: &mut [u8; 512]) {
        page.fill(0);
        page[0] = 16; // the structure's revision
        page[368] = 0x03; // attributes are saved, also by themselves
        seal(page);
    }
}

/// Sets the last byte so that all add up to zero.
fn seal(page: &mut [u8; 512]) {
    page[511] = 0;
    let sum = page.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte));
    page[511] = sum.wrapping_neg();
}
