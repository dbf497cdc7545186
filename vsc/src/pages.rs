//! Where a transfer's data lies: page lists, put together once and used for many requests.

use zerocopy::IntoBytes;

const PAGE: u64 = 4096;

/// Words before the page numbers: reserved and the count of ranges, length and offset.
const HEADER_WORDS: usize = 2;

/// How many words a [`PageList`] of `pages` pages has.
pub const fn words(pages: usize) -> usize {
    HEADER_WORDS + pages
}

/// Guest memory for one request at a time, as the headers of a GPA-direct packet with one range.
///
/// ```
/// use vsc::{PageList, words};
/// // 6 KiB that begin in the middle of page 0x123 and go on in page 0x200.
/// let list = PageList::<{ words(2) }>::new(6144, 2048, [0x123, 0x200]).unwrap();
/// assert_eq!(list.pages().bytes(), 6144);
/// ```
#[derive(Clone, Debug)]
pub struct PageList<const WORDS: usize> {
    words: [u64; WORDS],
    offset: u32,
    /// Bytes from `offset` to the end of the last page.
    room: u32,
    len: u32,
    /// Words in use.
    used: usize,
}

/// A view of a [`PageList`]; what a request takes.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    pub(crate) header: &'a [u8],
    pub(crate) len: u32,
}

impl Pages<'_> {
    /// Bytes to transfer, at least one.
    pub fn bytes(&self) -> u32 {
        self.len
    }
}

impl<const WORDS: usize> PageList<WORDS> {
    /// `len` bytes, the first of them at byte `offset` of the first page. `None` unless there are
    /// exactly as many `pages` as that takes, and they fit.
    pub fn new(len: u32, offset: u32, pages: impl IntoIterator<Item = u64>) -> Option<Self> {
        let mut list = Self { words: [0; WORDS], offset, room: 0, len: 0, used: 0 };
        let mut count = 0u64;
        for page in pages {
            let at = HEADER_WORDS.checked_add(usize::try_from(count).ok()?)?;
            *list.words.get_mut(at)? = page;
            count += 1;
        }
        let room =
            (count * PAGE).checked_sub(u64::from(offset)).filter(|_| u64::from(offset) < PAGE)?;
        if (u64::from(offset) + u64::from(len)).div_ceil(PAGE) != count {
            return None;
        }
        list.room = u32::try_from(room).ok()?;
        list.resize(len).then_some(list)
    }

    /// From now on `len` bytes, at least one and no more than the pages hold; false if it cannot
    /// be.
    #[must_use]
    pub fn resize(&mut self, len: u32) -> bool {
        if len == 0 || len > self.room {
            return false;
        }
        let pages = (u64::from(self.offset) + u64::from(len)).div_ceil(PAGE);
        let Ok(pages) = usize::try_from(pages) else { return false };
        let [ranges, range, ..] = &mut self.words[..] else { return false };
        *ranges = 1 << 32;
        *range = u64::from(self.offset) << 32 | u64::from(len);
        self.used = words(pages);
        self.len = len;
        true
    }

    /// What a request takes.
    #[inline]
    pub fn pages(&self) -> Pages<'_> {
        let header = self.words.get(..self.used).unwrap_or_default().as_bytes();
        Pages { header, len: self.len }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use vmbus::packet::{Descriptor, Packet, PacketFlags, PacketKind};

    fn parsed(pages: Pages<'_>) -> (u32, u32, Vec<u64>) {
        let header = pages.header;
        let words = 2 + header.len() / 8;
        let descriptor = Descriptor {
            kind: PacketKind::GpaDirect,
            offset8: words as u16,
            len8: words as u16,
            flags: PacketFlags::NONE,
            transaction_id: 0,
        };
        let packet = Packet::new(descriptor, header).unwrap();
        let ranges: Vec<_> = packet.gpa_ranges().unwrap().collect();
        assert_eq!(ranges.len(), 1);
        (ranges[0].len, ranges[0].offset, ranges[0].pfns().collect())
    }

    #[test]
    fn the_server_reads_what_was_meant() {
        let mut list = PageList::<{ words(3) }>::new(9000, 100, [7, 3, 9]).unwrap();
        assert_eq!(parsed(list.pages()), (9000, 100, [7, 3, 9].to_vec()));
        assert!(list.resize(3996));
        assert_eq!(parsed(list.pages()), (3996, 100, [7].to_vec()));
        assert!(list.resize(3997));
        assert_eq!(parsed(list.pages()), (3997, 100, [7, 3].to_vec()));
        assert!(list.resize(3 * 4096 - 100));
        assert!(!list.resize(3 * 4096 - 99));
        assert!(!list.resize(0));
    }

    #[test]
    fn lists_that_do_not_fit_are_refused() {
        assert!(PageList::<4>::new(4096, 0, [1, 2]).is_none());
        assert!(PageList::<4>::new(8192, 0, [1]).is_none());
        assert!(PageList::<4>::new(8192, 0, [1, 2, 3]).is_none());
        assert!(PageList::<3>::new(8192, 0, [1, 2]).is_none());
        assert!(PageList::<4>::new(4096, 4096, [1, 2]).is_none());
        assert!(PageList::<4>::new(0, 0, []).is_none());
    }
}
