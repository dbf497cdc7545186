//! The logs of a disk, which READ LOG EXT and SMART READ LOG read (ATA8-ACS-2, annex A): a directory,
//! and what IDENTIFY DEVICE says once more. No errors are logged, and none is said to be.

use super::drive::Drive;

/// The directory: how many pages each log has.
const DIRECTORY: u8 = 0x00;
/// IDENTIFY DEVICE data.
const IDENTIFY: u8 = 0x30;

/// The logs there are, with how many pages they have.
const LOGS: [(u8, u16); 2] = [(DIRECTORY, 1), (IDENTIFY, 2)];

/// Pages of the log at `address`, if there is one.
fn pages(address: u8) -> Option<u16> {
    LOGS.iter().find_map(|(log, pages)| (*log == address).then_some(*pages))
}

/// Puts `count` pages of the log at `address` into `buffer`, from page `first` on. Returns their
/// length in bytes, or nothing if the log has no such pages.
pub(super) fn read(
    drive: &Drive,
    address: u8,
    first: u16,
    count: u16,
    buffer: &mut [u8],
) -> Option<usize> {
    let end = first.checked_add(count)?;
    if count == 0 || end > pages(address)? {
        return None;
    }
    let target = buffer.get_mut(..usize::from(count) * 512)?;
    for (number, page) in (first..).zip(target.as_chunks_mut::<512>().0) {
        page.fill(0);
        match (address, number) {
            (DIRECTORY, _) => directory(page),
            (IDENTIFY, 0) => {
                // Revision 1 of the list of pages: 0 and 1.
                page[0] = 1;
                page[8..11].copy_from_slice(&[2, 0, 1]);
            }
            _ => drive.identify(page),
        }
    }
    Some(target.len())
}

/// A word for each address, with how many pages the log there has; the first is a version.
fn directory(page: &mut [u8; 512]) {
    const VERSION: u16 = 1;
    for (address, pages) in LOGS {
        let word = if address == DIRECTORY { VERSION } else { pages };
        let at = usize::from(address) * 2;
        page[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
}
