//! Writes to devices that need no answer: KVM keeps them in a ring, without an exit, until the next
//! exit of any processor ("coalesced" I/O in the kernel's documentation).
//!
//! Good for a register that only says what the next access is about, such as the CMOS's index or an
//! IDE drive's address registers. KVM looks at ports and addresses alone, so there must be no other
//! register among the bytes of a wide one.

#![allow(unsafe_code)] // The ring is a page shared with the kernel.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::PAGE_SIZE;

/// Entries in the ring: what a page holds behind two indices (`KVM_COALESCED_MMIO_MAX`).
const ENTRIES: u32 =
    ((PAGE_SIZE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring of a virtual machine.
pub(super) struct DeferredWrites {
    page: NonNull<u8>,
    /// Held by whoever takes entries out, until the devices have seen them: so they stay in order.
    reader: Mutex<()>,
}

// SAFETY: the page is mapped as long as this exists; its indices are accessed atomically, and its
// entries by the kernel before `last` passes them and under `reader` after that.
unsafe impl Send for DeferredWrites {}
// SAFETY: as above.
unsafe impl Sync for DeferredWrites {}

impl DeferredWrites {
    /// The ring of the machine that `vcpu` is a processor of.
    pub(super) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE_SIZE as u64;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let anywhere = std::ptr::null_mut();
        // SAFETY: a new mapping at an address the kernel chooses disturbs nothing.
        let page = unsafe { mmap(anywhere, PAGE_SIZE, protection, MapFlags::SHARED, fd, offset) }?;
        let page = NonNull::new(page.cast()).expect("mmap does not give address 0");
        Ok(Self { page, reader: Mutex::default() })
    }

    fn index(&self, offset: usize) -> &AtomicU32 {
        let pointer = self.page.as_ptr().wrapping_add(offset).cast();
        // SAFETY: both indices lie aligned at the start of the page, and everybody who accesses
        // them while this exists does so atomically or is the kernel.
        unsafe { AtomicU32::from_ptr(pointer) }
    }

    /// Gives `write` what has been deferred, in order: whether it was to a port, where, and bytes.
    /// What another processor goes on to write meanwhile is for a later call: it may never stop.
    pub(super) fn drain(&self, mut write: impl FnMut(bool, u64, &[u8])) {
        let first = self.index(offset_of!(kvm_coalesced_mmio_ring, first));
        let last = self.index(offset_of!(kvm_coalesced_mmio_ring, last));
        if first.load(Ordering::Relaxed) == last.load(Ordering::Relaxed) {
            return;
        }
        let _reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..ENTRIES {
            let at = first.load(Ordering::Relaxed);
            if at == last.load(Ordering::Acquire) {
                return;
            }
            let offset = size_of::<kvm_coalesced_mmio_ring>()
                + (at % ENTRIES) as usize * size_of::<kvm_coalesced_mmio>();
            let entry = self.page.as_ptr().wrapping_add(offset).cast::<kvm_coalesced_mmio>();
            // SAFETY: the entry lies in the page, and the kernel leaves it alone until `first` has
            // passed it.
            let entry = unsafe { entry.read() };
            let len = (entry.len as usize).min(entry.data.len());
            // SAFETY: both fields of the union are the same number.
            let is_port = unsafe { entry.__bindgen_anon_1.pio } != 0;
            write(is_port, entry.phys_addr, &entry.data[..len]);
            // Only now: whoever finds the ring empty goes on at once, and must find the device as
            // the entry has left it.
            first.store((at + 1) % ENTRIES, Ordering::Release);
        }
    }
}

impl Drop for DeferredWrites {
    fn drop(&mut self) {
        // SAFETY: the page is ours, and nobody has a pointer to it beyond our borrow.
        let result = unsafe { munmap(self.page.as_ptr().cast(), PAGE_SIZE) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring that no kernel knows.
    fn ring() -> DeferredWrites {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let anywhere = std::ptr::null_mut();
        // SAFETY: a new mapping at an address the kernel chooses disturbs nothing.
        let page = unsafe {
            rustix::mm::mmap_anonymous(anywhere, PAGE_SIZE, protection, MapFlags::PRIVATE)
        };
        let page = NonNull::new(page.unwrap().cast()).unwrap();
        DeferredWrites { page, reader: Mutex::default() }
    }

    /// As the kernel does when a guest writes; the entries are all zeroes.
    fn put(ring: &DeferredWrites) -> bool {
        let index = |offset| ring.index(offset);
        let (first, last) = (
            index(offset_of!(kvm_coalesced_mmio_ring, first)),
            index(offset_of!(kvm_coalesced_mmio_ring, last)),
        );
        let next = (last.load(Ordering::Relaxed) + 1) % ENTRIES;
        let room = next != first.load(Ordering::Acquire);
        if room {
            last.store(next, Ordering::Release);
        }
        room
    }

    #[test]
    fn what_was_there_is_drained_while_another_processor_writes_on() {
        let ring = ring();
        while put(&ring) {}
        let mut count = 0;
        ring.drain(|_, _, _| {
            count += 1;
            assert!(count <= ENTRIES, "it goes on for ever");
            put(&ring);
        });
        assert!(count >= ENTRIES - 1, "{count}");
        let mut rest = 0;
        ring.drain(|_, _, _| rest += 1);
        assert!(rest > 0);
        ring.drain(|_, _, _| panic!("there is nothing left"));
    }
}
