//! Guest memory: what a partition takes for its RAM.
//!
//! All of it is one file without a name, mapped shared, so that another process can map the same
//! pages by descriptor and a ring can be mapped a second time ([`GuestMemory::map`]). RAM starts at
//! address 0 and goes on at 4 GiB when it is larger than the hole leaves room for
//! ([`crate::layout`]); so there are two regions at most, and to find an address costs two
//! comparisons.
//!
//! Which kind of file it is, and so what its pages cost, is up to the host: [`Backing`].

#![allow(unsafe_code)] // Pointers into the mapping become slices here, after their bounds were checked.

mod backing;
mod mapping;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, VolatileSlice};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use backing::Backing;
use mapping::Budget;
pub use mapping::PageMapping;

use crate::{Gpa, Gpn, PAGE_SIZE, layout};

/// A partition's RAM. Clones are the same memory.
#[derive(Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

struct Inner {
    /// Owns the mappings that `low` and `high` point into.
    mmap: GuestMemoryMmap,
    low: Span,
    high: Span,
    file: Arc<File>,
    backing: Backing,
    /// For [`GuestMemory::map`].
    mappings: Arc<Budget>,
}

/// One region: guest addresses `[gpa, gpa + len)` lie at `host`, and at `file_offset` in the file.
#[derive(Clone, Copy)]
struct Span {
    gpa: u64,
    len: u64,
    host: *mut u8,
    file_offset: u64,
}

// SAFETY: `host` points to a shared mapping that lives as long as `Inner` does. What is done with
// the memory behind it is no different from what the guest's own processors may do at any time,
// so every access is volatile or atomic, whatever the thread.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    const EMPTY: Self = Self { gpa: 0, len: 0, host: std::ptr::null_mut(), file_offset: 0 };

    /// The offset of `[gpa, gpa + len)` in this region, if all of it is in it.
    fn find(&self, gpa: u64, len: u64) -> Option<u64> {
        let offset = gpa.checked_sub(self.gpa)?;
        (offset < self.len && len <= self.len - offset).then_some(offset)
    }
}

/// Why a guest's memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size asked for is no number of pages.
    #[error("{0} bytes of memory is not a number of {PAGE_SIZE}-byte pages above zero")]
    Size(u64),
    /// The host gave no memory.
    #[error("cannot allocate {size} bytes of guest memory")]
    Allocate {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The memory could not be mapped here.
    #[error("cannot map {size} bytes of guest memory")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        source: MmapRegionError,
    },
    /// An access to guest addresses where there is no RAM.
    #[error("no RAM at {gpa}, {len} bytes")]
    NotRam {
        /// Where the access started.
        gpa: Gpa,
        /// Its length in bytes.
        len: usize,
    },
}

/// A stretch of RAM, for those who map it into something else (KVM's slots, other processes).
#[derive(Clone, Copy)]
pub struct Region<'a> {
    /// The guest address of its first byte.
    pub gpa: Gpa,
    /// Its length in bytes, a number of pages.
    pub len: u64,
    /// Where it is mapped in this process.
    pub host: *mut u8,
    /// The file behind it.
    pub fd: BorrowedFd<'a>,
    /// Where in the file it starts.
    pub file_offset: u64,
}

impl GuestMemory {
    /// Allocates `size` bytes of RAM, a number of pages. Nothing is touched yet; the host gives
    /// pages as they are used.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        Self::with_mappings(size, Budget::of_host())
    }

    fn with_mappings(size: u64, mappings: Arc<Budget>) -> Result<Self, MemoryError> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE as u64) {
            return Err(MemoryError::Size(size));
        }
        let (file, backing) =
            backing::allocate(size).map_err(|source| MemoryError::Allocate { size, source })?;
        let file = Arc::new(file);
        let low_len = size.min(layout::HOLE_START.0);
        let high_len = size - low_len;

        let mut regions = Vec::with_capacity(2);
        let low = Self::map_region(&file, backing, 0, low_len, 0, &mut regions)?;
        let high = match high_len {
            0 => Span::EMPTY,
            len => {
                let gpa = layout::HIGH_RAM_START.0;
                Self::map_region(&file, backing, gpa, len, low_len, &mut regions)?
            }
        };
        let mmap = GuestMemoryMmap::from_regions(regions)
            .expect("two regions in ascending order do not overlap");
        Ok(Self { inner: Arc::new(Inner { mmap, low, high, file, backing, mappings }) })
    }

    /// The kernel places mappings of files that may have huge pages so that huge pages fit: file
    /// offset and host address agree modulo 2 MiB. Guest addresses agree with both by our layout.
    fn map_region(
        file: &Arc<File>,
        backing: Backing,
        gpa: u64,
        len: u64,
        file_offset: u64,
        regions: &mut Vec<GuestRegionMmap>,
    ) -> Result<Span, MemoryError> {
        let region = usize::try_from(len)
            .map_err(|_| MmapRegionError::InvalidOffsetLength)
            .and_then(|len| {
                let offset = FileOffset::from_arc(Arc::clone(file), file_offset);
                MmapRegion::from_file(offset, len)
            })
            .map_err(|source| MemoryError::Map { size: len, source })?;
        let host = region.as_ptr();
        backing.advise(host, region.size());
        regions.push(
            GuestRegionMmap::new(region, GuestAddress(gpa))
                .expect("the layout ends far below 2^64"),
        );
        Ok(Span { gpa, len, host, file_offset })
    }

    fn find(&self, gpa: Gpa, len: usize) -> Option<(&Span, u64)> {
        let Inner { low, high, .. } = &*self.inner;
        let len = len as u64;
        match low.find(gpa.0, len) {
            Some(offset) => Some((low, offset)),
            None => high.find(gpa.0, len).map(|offset| (high, offset)),
        }
    }

    /// The memory at `[gpa, gpa + len)`; `None` if any of it is not RAM.
    pub fn slice(&self, gpa: Gpa, len: usize) -> Option<VolatileSlice<'_>> {
        let (span, offset) = self.find(gpa, len)?;
        let pointer = span.host.wrapping_add(offset as usize);
        // SAFETY: `find` saw that the whole range lies in the region, whose mapping lives as long
        // as `self`, the lifetime of the slice.
        Some(unsafe { VolatileSlice::new(pointer, len) })
    }

    /// Fills `data` from guest memory at `gpa`.
    pub fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MemoryError> {
        let len = data.len();
        let slice = self.slice(gpa, len).ok_or(MemoryError::NotRam { gpa, len })?;
        slice.copy_to(data);
        Ok(())
    }

    /// Copies `data` to guest memory at `gpa`.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        let len = data.len();
        let slice = self.slice(gpa, len).ok_or(MemoryError::NotRam { gpa, len })?;
        slice.copy_from(data);
        Ok(())
    }

    /// Copies a structure out of guest memory, once.
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, gpa: Gpa) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies a structure into guest memory.
    pub fn write_obj<T: IntoBytes + Immutable>(
        &self,
        gpa: Gpa,
        value: &T,
    ) -> Result<(), MemoryError> {
        self.write(gpa, value.as_bytes())
    }

    /// Maps the given pages, in the given order and as often as they are named, into one range of
    /// host addresses: a guest's scattered buffer in one piece, or a ring twice in a row. Refused with
    /// [`io::ErrorKind::QuotaExceeded`] if all that is mapped so would be in more pieces than are good
    /// for this process.
    pub fn map(&self, pages: &[Gpn]) -> io::Result<PageMapping> {
        PageMapping::new(self, pages)
    }

    /// The offset of a page in the file, if it is RAM.
    fn file_offset(&self, page: Gpn) -> Option<u64> {
        let (span, offset) = self.find(page.gpa()?, PAGE_SIZE)?;
        Some(span.file_offset + offset)
    }

    /// The same memory as the rust-vmm crates know it.
    pub fn inner(&self) -> &GuestMemoryMmap {
        &self.inner.mmap
    }

    /// The regions, in ascending order.
    pub fn regions(&self) -> impl Iterator<Item = Region<'_>> {
        let fd = self.inner.file.as_fd();
        [&self.inner.low, &self.inner.high].into_iter().filter(|span| span.len > 0).map(
            move |span| Region {
                gpa: Gpa(span.gpa),
                len: span.len,
                host: span.host,
                fd,
                file_offset: span.file_offset,
            },
        )
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.inner.low.len + self.inner.high.len
    }

    /// What kind of memory the host gave.
    pub fn backing(&self) -> Backing {
        self.inner.backing
    }

    /// Whether two handles are the same memory.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory")
            .field("size", &self.size())
            .field("backing", &self.backing())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes_that_are_no_pages_are_refused() {
        assert!(matches!(GuestMemory::new(0), Err(MemoryError::Size(0))));
        assert!(matches!(GuestMemory::new(5000), Err(MemoryError::Size(5000))));
    }

    #[test]
    fn ram_leaves_the_hole_out() {
        let memory = GuestMemory::new(5 * GIB).unwrap();
        assert_eq!(memory.size(), 5 * GIB);
        let regions: Vec<_> = memory.regions().map(|r| (r.gpa.0, r.len, r.file_offset)).collect();
        assert_eq!(regions, [(0, 3 * GIB, 0), (4 * GIB, 2 * GIB, 3 * GIB)]);

        let there = |gpa, len| memory.slice(Gpa(gpa), len).is_some();
        assert!(there(0, 1));
        assert!(there(3 * GIB - 1, 1));
        assert!(!there(3 * GIB - 1, 2));
        assert!(!there(3 * GIB, 1));
        assert!(!there(4 * GIB - 1, 1));
        assert!(there(4 * GIB, 4096));
        assert!(there(6 * GIB - 8, 8));
        assert!(!there(6 * GIB - 8, 9));
        assert!(!there(6 * GIB, 0));
        assert!(!there(u64::MAX, 1));
        assert!(!there(8, usize::MAX));
    }

    #[test]
    fn small_memory_is_one_region() {
        let memory = GuestMemory::new(2 << 20).unwrap();
        assert_eq!(memory.regions().count(), 1);
        assert!(memory.slice(Gpa(0), 2 << 20).is_some());
        assert!(memory.slice(Gpa(0), (2 << 20) + 1).is_none());
        assert!(memory.slice(layout::HIGH_RAM_START, 1).is_none());
    }

    #[test]
    fn what_is_written_is_read() {
        let memory = GuestMemory::new(4 * GIB).unwrap();
        for gpa in [Gpa(0x1003), Gpa(4 * GIB + 0x5001)] {
            memory.write_obj(gpa, &0x0123_4567_89ab_cdef_u64).unwrap();
            assert_eq!(memory.read_obj::<u64>(gpa).unwrap(), 0x0123_4567_89ab_cdef);
            assert_eq!(memory.read_obj::<u8>(gpa).unwrap(), 0xef);
        }
        let mut byte = [0];
        assert!(memory.read(layout::HOLE_START, &mut byte).is_err());
        assert!(memory.write(layout::HOLE_START, &byte).is_err());
    }

    #[test]
    fn huge_pages_can_line_up() {
        let memory = GuestMemory::new(64 << 20).unwrap();
        if memory.backing().may_be_huge() {
            for region in memory.regions() {
                assert_eq!(region.host as usize % (2 << 20), 0);
                assert_eq!(region.file_offset % (2 << 20), 0);
            }
        }
    }
}
