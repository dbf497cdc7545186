//! Guest pages mapped a second time, into one piece.
//!
//! Each stretch of pages that are no neighbours takes one of the kernel's mappings, of which a process has
//! a limited number; when they are used up, threads, rings and memory cannot be had any more. A guest
//! chooses the pages, so what may be taken in this way is bounded: [`Budget`].

#![allow(unsafe_code)] // mmap and munmap of a range of our own.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::GuestMemory;
use crate::{Gpn, PAGE_SIZE};

/// What `vm.max_map_count` is where nobody has changed it (Documentation/admin-guide/sysctl/vm.rst).
const DEFAULT_MAX_MAP_COUNT: usize = 65530;

/// The mappings that a partition's pages may take.
#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    /// Half of what the process may have. The rest is for its threads, their io_urings and its memory,
    /// which take some ten for each channel.
    pub(super) fn of_host() -> Arc<Self> {
        let told = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        let count = told.ok().and_then(|count| count.trim().parse().ok());
        Self::new(count.unwrap_or(DEFAULT_MAX_MAP_COUNT) / 2)
    }

    fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    /// Takes `count` mappings, if there are so many.
    fn take(self: &Arc<Self>, count: usize) -> Option<Share> {
        let taken = |used: usize| used.checked_add(count).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).ok()?;
        Some(Share { budget: Arc::clone(self), count })
    }
}

/// Mappings that were taken of a [`Budget`], until it is dropped.
#[derive(Debug)]
struct Share {
    budget: Arc<Budget>,
    count: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// Guest pages in one contiguous range of host addresses, in the order in which they were named.
///
/// The guest can change them at any time: read and write them through pointers that allow that
/// (volatile or atomic), never through references to plain data.
#[derive(Debug)]
pub struct PageMapping {
    start: NonNull<u8>,
    len: usize,
    /// Given back when the range is unmapped.
    _share: Share,
}

// SAFETY: the range is owned, and its contents are shared with the guest in any case, so whoever
// uses the pointer must already expect others to write.
unsafe impl Send for PageMapping {}
// SAFETY: as above.
unsafe impl Sync for PageMapping {}

impl PageMapping {
    pub(super) fn new(memory: &GuestMemory, pages: &[Gpn]) -> io::Result<Self> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let len = pages
            .len()
            .checked_mul(PAGE_SIZE)
            .filter(|&len| len > 0)
            .ok_or_else(|| invalid("no pages to map"))?;

        // Everything is checked before anything is mapped.
        let offsets = pages
            .iter()
            .map(|&page| memory.file_offset(page).ok_or_else(|| invalid("a page is not RAM")))
            .collect::<io::Result<Vec<u64>>>()?;

        let consecutive = |a: &u64, b: &u64| a + PAGE_SIZE as u64 == *b;
        let count = offsets.chunk_by(consecutive).count();
        let share = memory.inner.mappings.take(count).ok_or_else(|| {
            let Budget { limit, .. } = &*memory.inner.mappings;
            io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!(
                    "pages in {count} pieces, and a guest's may be in {limit} together (half of vm.max_map_count)"
                ),
            )
        })?;

        // The reservation makes the range ours; the pages are then mapped over it.
        // SAFETY: a new mapping at an address the kernel chooses disturbs nothing.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE)
        }?;
        let start = NonNull::new(start.cast::<u8>()).expect("mmap does not give address 0");
        let mapping = Self { start, len, _share: share };

        let mut done = 0;
        for run in offsets.chunk_by(consecutive) {
            let run_len = run.len() * PAGE_SIZE;
            let file = memory.inner.file.as_fd();
            let address = mapping.start.as_ptr().wrapping_add(done);
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: the runs together are as long as the reservation, so this one replaces a
            // part of it and nothing else.
            unsafe { mmap(address.cast(), run_len, protection, flags, file, run[0]) }?;
            done += run_len;
        }
        Ok(mapping)
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes mapped: pages times 4096.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for PageMapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and who got a pointer from `as_ptr` may not use it longer.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpa;

    fn page(n: u64) -> Gpn {
        Gpn(n)
    }

    fn read(mapping: &PageMapping, offset: usize) -> u8 {
        assert!(offset < mapping.len());
        let pointer = mapping.as_ptr().wrapping_add(offset);
        // SAFETY: in bounds of a live mapping.
        unsafe { pointer.read_volatile() }
    }

    fn write(mapping: &PageMapping, offset: usize, value: u8) {
        assert!(offset < mapping.len());
        let pointer = mapping.as_ptr().wrapping_add(offset);
        // SAFETY: in bounds of a live mapping.
        unsafe { pointer.write_volatile(value) };
    }

    #[test]
    fn pages_come_in_the_order_named_and_alias_the_guests() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for n in 0..8_u8 {
            memory.write_obj(Gpa(u64::from(n) * 4096), &n).unwrap();
        }
        let pages = [5, 3, 4, 5, 3, 4].map(page);
        let mapping = memory.map(&pages).unwrap();
        assert_eq!(mapping.len(), 6 * 4096);
        let firsts: Vec<u8> = (0..6).map(|n| read(&mapping, n * 4096)).collect();
        assert_eq!(firsts, [5, 3, 4, 5, 3, 4]);

        // The second copy is the first one, and both are the guest's page.
        write(&mapping, 4096 + 7, 0xaa);
        assert_eq!(read(&mapping, 4 * 4096 + 7), 0xaa);
        assert_eq!(memory.read_obj::<u8>(Gpa(3 * 4096 + 7)).unwrap(), 0xaa);

        // A write over the seam of two copies lands at the ring's start.
        write(&mapping, 3 * 4096, 0xbb);
        assert_eq!(read(&mapping, 0), 0xbb);
    }

    #[test]
    fn scattered_pages_are_refused_before_the_host_has_no_mappings_left() {
        let memory = GuestMemory::with_mappings(1 << 20, Budget::new(10)).unwrap();
        let scattered = [1, 3, 5, 7].map(page);
        let one = memory.map(&scattered).unwrap();
        let two = memory.map(&scattered).unwrap();
        assert_eq!(memory.map(&scattered).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        // Neighbours count as one.
        let neighbours = memory.map(&[10, 11, 12, 20, 21].map(page)).unwrap();
        assert_eq!(memory.map(&[page(1)]).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        drop(one);
        let again = memory.map(&scattered).unwrap();
        drop((two, neighbours, again));
        assert_eq!(memory.inner.mappings.used.load(Ordering::Relaxed), 0);
        // What is refused for another reason takes none.
        assert!(memory.map(&[page(1), page(1 << 40)]).is_err());
        assert_eq!(memory.inner.mappings.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_host_says_how_many_mappings_there_may_be() {
        let budget = Budget::of_host();
        assert!(budget.limit > 0);
        assert!(budget.take(budget.limit + 1).is_none());
        assert!(budget.take(usize::MAX).is_none());
    }

    #[test]
    fn both_sides_of_the_hole_can_be_mapped_together() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        let last_low = Gpn(crate::layout::HOLE_START.0 / 4096 - 1);
        let first_high = Gpn(crate::layout::HIGH_RAM_START.0 / 4096);
        memory.write_obj(last_low.gpa().unwrap(), &1_u8).unwrap();
        memory.write_obj(first_high.gpa().unwrap(), &2_u8).unwrap();
        let mapping = memory.map(&[last_low, first_high]).unwrap();
        assert_eq!((read(&mapping, 0), read(&mapping, 4096)), (1, 2));
    }

    #[test]
    fn pages_that_are_not_ram_are_refused() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for pages in [&[][..], &[page(256)], &[page(0), page(u64::MAX)], &[page(1 << 52)]] {
            assert_eq!(memory.map(pages).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
