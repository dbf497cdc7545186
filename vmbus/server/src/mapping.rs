//! Maps a ring's pages so that no packet wraps.
//!
//! Unsafe because it vouches for the addresses: a [`PageMapping`] owns a range of this process
//! that shows guest pages, and the ring keeps it.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;

use hypervisor::memory::{GuestMemory, PageMapping};
use hypervisor::{Gpn, PAGE_SIZE};

/// One direction of a channel, its data area mapped twice in a row.
pub type DoubleMapped = vmbus::DoubleMapped<PageMapping>;

/// Maps the ring whose control page is the first of `pages` and whose data area the others.
pub(crate) fn map_ring(memory: &GuestMemory, pages: &[Gpn]) -> io::Result<DoubleMapped> {
    let Some((control, data)) = pages.split_first().filter(|(_, data)| !data.is_empty()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a ring has at least two pages"));
    };
    let twice: Vec<Gpn> = [&[*control], data, data].concat();
    let mapping = memory.map(&twice)?;
    debug_assert_eq!(mapping.len(), twice.len() * PAGE_SIZE);
    let start = NonNull::new(mapping.as_ptr())
        .ok_or_else(|| io::Error::other("a mapping cannot be at address 0"))?;
    // SAFETY: the mapping holds the control page and after it the data area, twice.
    let area = unsafe { start.add(PAGE_SIZE) };
    // SAFETY: the mapping is page-aligned, readable and writable, and lives in the ring as its
    // owner; moving it does not move the pages. Guest memory is otherwise reached by volatile and
    // atomic accesses alone.
    Ok(unsafe { vmbus::DoubleMapped::new(start, area, data.len() * PAGE_SIZE, mapping) })
}
