//! What a drive says about itself: the 256 words of IDENTIFY DEVICE (ATA8-ACS-2, section 7.13).

use thiserror::Error;

use super::SECTOR;

/// Bytes of the answer.
pub(super) const LEN: usize = 512;

/// What of it a driver needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Drive {
    /// The model's first characters.
    pub(super) model: [u8; 16],
    /// How many sectors there are.
    pub(super) sectors: u64,
    /// Bytes that the medium writes at once.
    pub(super) physical_sector: u32,
    /// Whether it takes commands with 48 bits of address.
    pub(super) long: bool,
    /// Whether it transfers by DMA.
    pub(super) dma: bool,
    /// Sectors that it can transfer in one piece by PIO, at most; 0 if always one by one.
    pub(super) multiple: u8,
}

/// Why an answer is that of no disk, or not of one that this driver knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum IdentifyError {
    /// A bit was lost on the way, or it is no answer at all.
    #[error("its identification has a wrong checksum")]
    Checksum,
    /// It is a packet device, or something older than ATA.
    #[error("it says that it is no ATA disk")]
    NoAta,
    /// It knows cylinders only.
    #[error("it has no linear addresses")]
    NoLba,
    /// Its sectors are longer than 512 bytes.
    #[error("its sectors are not 512 bytes long")]
    Sector,
    /// There is nothing on it.
    #[error("it says that it has no sectors")]
    Empty,
}

impl Drive {
    pub(super) fn parse(answer: &[u8; LEN]) -> Result<Self, IdentifyError> {
        const SIGNATURE: u8 = 0xa5;
        const PACKET_DEVICE: u16 = 0x8000;
        const HAS_LBA: u16 = 1 << 9;
        const HAS_DMA: u16 = 1 << 8;
        const HAS_LONG: u16 = 1 << 10;
        const LONG_SECTORS: u16 = 1 << 12;
        const SEVERAL_PER_PHYSICAL: u16 = 1 << 13;

        // Old drives have no checksum, and zeroes or anything else in its place.
        let sum = answer.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        if answer[LEN - 2] == SIGNATURE && sum != 0 {
            return Err(IdentifyError::Checksum);
        }
        let mut words = [0_u16; LEN / 2];
        for (word, bytes) in words.iter_mut().zip(answer.as_chunks().0) {
            *word = u16::from_le_bytes(*bytes);
        }
        let word = |index: usize| words.get(index).copied().unwrap_or(0);
        // Words 83 and 106 say by their two upper bits that they mean something.
        let valid = |index| if word(index) >> 14 == 1 { word(index) } else { 0 };
        let number = |first: usize, count: usize| {
            let words = words.iter().skip(first).take(count);
            words.rev().fold(0, |number, word| number << 16 | u64::from(*word))
        };

        if word(0) & PACKET_DEVICE != 0 {
            return Err(IdentifyError::NoAta);
        }
        if word(49) & HAS_LBA == 0 {
            return Err(IdentifyError::NoLba);
        }
        let shape = valid(106);
        if shape & LONG_SECTORS != 0 {
            return Err(IdentifyError::Sector);
        }
        let long = valid(83) & HAS_LONG != 0;
        let short_sectors = number(60, 2).min(1 << 28);
        let sectors = if long { number(100, 4).min(1 << 48) } else { short_sectors };
        if sectors == 0 {
            return Err(IdentifyError::Empty);
        }
        let mut model = [b' '; 16];
        for (to, word) in model.as_chunks_mut().0.iter_mut().zip(words.iter().skip(27)) {
            *to = word.to_be_bytes();
        }
        let physical = if shape & SEVERAL_PER_PHYSICAL != 0 { shape & 0xf } else { 0 };
        Ok(Self {
            model,
            sectors,
            physical_sector: SECTOR << physical,
            long,
            dma: word(49) & HAS_DMA != 0,
            multiple: word(47) as u8,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An answer with these words, its checksum right.
    fn answer(words: &[(usize, u16)]) -> [u8; LEN] {
        let mut answer = [0; LEN];
        for (index, word) in words {
            answer[2 * index..][..2].copy_from_slice(&word.to_le_bytes());
        }
        answer[LEN - 2] = 0xa5;
        answer[LEN - 1] = answer.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
        answer
    }

    #[test]
    fn a_disk_with_everything() {
        let words = [
            (27, u16::from_be_bytes(*b"Bi")),
            (28, u16::from_be_bytes(*b"g ")),
            (47, 0x8010),
            (49, 0x0300),
            (60, 0xffff),
            (61, 0x0fff),
            (83, 0x4400),
            (100, 0x5678),
            (102, 1),
            (106, 0x6003),
        ];
        let drive = Drive::parse(&answer(&words)).unwrap();
        assert_eq!(&drive.model[..4], b"Big ");
        assert_eq!((drive.sectors, drive.long, drive.dma), (0x1_0000_5678, true, true));
        assert_eq!((drive.physical_sector, drive.multiple), (4096, 16));
    }

    #[test]
    fn a_disk_with_the_least() {
        let drive = Drive::parse(&answer(&[(49, 0x0200), (61, 1), (106, 0xffff)])).unwrap();
        assert_eq!((drive.sectors, drive.long, drive.dma), (0x1_0000, false, false));
        assert_eq!((drive.physical_sector, drive.multiple), (512, 0));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let refused = |words: &[_]| Drive::parse(&answer(words)).unwrap_err();
        assert_eq!(refused(&[(0, 0x85c0)]), IdentifyError::NoAta);
        assert_eq!(refused(&[(49, 0x0100)]), IdentifyError::NoLba);
        assert_eq!(refused(&[(49, 0x0200), (106, 0x5000)]), IdentifyError::Sector);
        assert_eq!(refused(&[(49, 0x0200)]), IdentifyError::Empty);
        let mut damaged = answer(&[(49, 0x0200), (60, 1)]);
        damaged[100] ^= 4;
        assert_eq!(Drive::parse(&damaged), Err(IdentifyError::Checksum));
        assert_eq!(Drive::parse(&[0xff; LEN]), Err(IdentifyError::NoAta));
    }

    proptest! {
        #[test]
        fn any_answer_is_a_disk_or_none(
            words in prop::collection::vec((0..255_usize, any::<u16>()), 0..30),
        ) {
            if let Ok(drive) = Drive::parse(&answer(&words)) {
                prop_assert!(drive.sectors > 0 && drive.sectors <= 1 << 48);
                prop_assert!(drive.physical_sector >= 512);
            }
        }
    }
}
