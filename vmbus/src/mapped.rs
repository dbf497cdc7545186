//! Where a ring lies: [`RingMemory`], and the two ways to have one.
//!
//! This module holds the crate's unsafe code: it turns the addresses at which somebody mapped a
//! ring's pages into references to atomics. The pages stay shared with the other side, so nothing
//! here is ever a `&[u8]`.
#![allow(unsafe_code)]

use core::ptr::NonNull;

use crate::{ring::Control, sync::AtomicU64};

/// One direction of a channel: its control page and its data area.
///
/// Both are shared with the other side, which may change any word at any moment.
pub trait RingMemory {
    /// The first bytes of the control page.
    fn control(&self) -> &Control;

    /// The data area, as words. Where [`RingMemory::mirrored`], it follows itself: the second
    /// half shows the same memory as the first.
    fn data(&self) -> &[AtomicU64];

    /// Whether [`RingMemory::data`] shows the area twice, so that no packet wraps.
    fn mirrored(&self) -> bool;
}

impl<M: RingMemory> RingMemory for &M {
    fn control(&self) -> &Control {
        (**self).control()
    }

    fn data(&self) -> &[AtomicU64] {
        (**self).data()
    }

    fn mirrored(&self) -> bool {
        (**self).mirrored()
    }
}

/// A ring in memory that is mapped once: packets may wrap.
#[derive(Clone, Copy, Debug)]
pub struct SingleMapped<'a> {
    /// The control page.
    pub control: &'a Control,
    /// The data area.
    pub data: &'a [AtomicU64],
}

impl RingMemory for SingleMapped<'_> {
    fn control(&self) -> &Control {
        self.control
    }

    fn data(&self) -> &[AtomicU64] {
        self.data
    }

    fn mirrored(&self) -> bool {
        false
    }
}

/// A ring whose data area is mapped twice in a row. `Owner` keeps the mapping alive.
#[derive(Debug)]
pub struct DoubleMapped<Owner> {
    control: NonNull<Control>,
    data: NonNull<AtomicU64>,
    words: usize,
    _owner: Owner,
}

// SAFETY: the pointers lead to shared atomics, valid as long as the owner, which is Send itself.
unsafe impl<Owner: Send> Send for DoubleMapped<Owner> {}
// SAFETY: through a shared reference only atomics are reached, and the owner is never touched.
unsafe impl<Owner: Sync> Sync for DoubleMapped<Owner> {}

impl<Owner> DoubleMapped<Owner> {
    /// The ring whose control page is at `control` and whose data area, `size` bytes long, is at
    /// `data` and again at `data + size`.
    ///
    /// # Safety
    /// As long as `owner` lives, wherever it is moved: `control` is valid for 4096 bytes and
    /// `data` for `2 * size`, both for reads and writes and aligned to 8. Nobody in this process
    /// makes a Rust reference to that memory other than to atomics, and `size` is a multiple of 8.
    pub unsafe fn new(control: NonNull<u8>, data: NonNull<u8>, size: usize, owner: Owner) -> Self {
        Self { control: control.cast(), data: data.cast(), words: size / 4, _owner: owner }
    }
}

impl<Owner> RingMemory for DoubleMapped<Owner> {
    fn control(&self) -> &Control {
        // SAFETY: valid and aligned while the owner lives, by the contract of `new`; all fields
        // of Control are atomics or never read.
        unsafe { self.control.as_ref() }
    }

    fn data(&self) -> &[AtomicU64] {
        // SAFETY: `2 * size` bytes are `size / 4` words; valid by the contract of `new`.
        unsafe { core::slice::from_raw_parts(self.data.as_ptr(), self.words) }
    }

    fn mirrored(&self) -> bool {
        true
    }
}
