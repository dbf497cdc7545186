//! The guest's memory, as far as it is shared with the root: pages that both sides know by number,
//! and that the root may change at any moment. So they are atomics, here as in the root.

#![allow(unsafe_code)] // Addresses that a platform vouches for become references to atomics.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::mapped::SingleMapped;
use vmbus::ring::{Control, FEATURE_PENDING_SEND_SIZE};

/// Bytes of a page.
pub const PAGE: usize = 4096;
const PAGE_WORDS: usize = PAGE / 8;

/// A run of pages, consecutive in the guest's address space and here.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'m> {
    first: u64,
    words: &'m [AtomicU64],
}

impl<'m> Pages<'m> {
    /// The `count` pages at `start`, the first of which is guest page `first`.
    ///
    /// # Safety
    /// For as long as `'m`, the memory at `start` is aligned to pages and valid for reads and
    /// writes, and nobody in this program refers to it other than by atomics.
    pub unsafe fn new(start: NonNull<u8>, first: u64, count: usize) -> Self {
        // SAFETY: says the caller.
        let words = unsafe {
            core::slice::from_raw_parts(start.cast::<AtomicU64>().as_ptr(), count * PAGE_WORDS)
        };
        Self { first, words }
    }

    /// Parts the first `count` pages from the rest; `None` if there are fewer.
    pub fn split(self, count: usize) -> Option<(Self, Self)> {
        let (front, back) = self.words.split_at_checked(count.checked_mul(PAGE_WORDS)?)?;
        let rest = self.first.checked_add(u64::try_from(count).ok()?)?;
        Some((Self { words: front, ..self }, Self { first: rest, words: back }))
    }

    /// Takes the first `count` pages away from these.
    pub fn take(&mut self, count: usize) -> Option<Self> {
        let (taken, rest) = self.split(count)?;
        *self = rest;
        Some(taken)
    }

    /// The number of the first page.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.words.len() / PAGE_WORDS
    }

    /// Their numbers.
    pub fn numbers(&self) -> impl ExactSizeIterator<Item = u64> + use<> {
        let first = self.first;
        (0..self.count() as u32).map(move |page| first.wrapping_add(page.into()))
    }

    /// What is in them.
    pub fn words(&self) -> &'m [AtomicU64] {
        self.words
    }

    /// Copies out the first bytes.
    pub fn read(&self, bytes: &mut [u8]) {
        for (to, word) in bytes.chunks_mut(8).zip(self.words) {
            let word = word.load(Ordering::Relaxed).to_le_bytes();
            for (to, from) in to.iter_mut().zip(word) {
                *to = from;
            }
        }
    }

    /// One direction of a channel, empty: its control page is the first, its data area the others.
    /// `None` if there are no others.
    pub fn ring(self) -> Option<SingleMapped<'m>> {
        let (control, data) = self.split(1).filter(|(_, data)| data.count() > 0)?;
        let control = NonNull::from(control.words.first()?).cast::<Control>();
        // SAFETY: a page is more than the structure, aligned to more than it, and stays; all of
        // it that is ever looked at is atomic.
        let control = unsafe { control.as_ref() };
        control.write_index.store(0, Ordering::Relaxed);
        control.read_index.store(0, Ordering::Relaxed);
        control.interrupt_mask.store(0, Ordering::Relaxed);
        control.pending_send_size.store(0, Ordering::Relaxed);
        control.feature_bits.store(FEATURE_PENDING_SEND_SIZE, Ordering::Release);
        Some(SingleMapped { control, data: data.words })
    }
}
