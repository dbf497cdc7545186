//! Frames in pieces: copying to and from them, and those that were lent for frames to come.
//!
//! `unsafe` copies by address; the contracts pass on those of [`Queue::send`] and [`Queue::offer`].
//!
//! [`Queue::send`]: super::Queue::send
//! [`Queue::offer`]: super::Queue::offer
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ptr;

use super::{Buffer, Completion, Completions, MAX_BUFFERS};

/// Bytes that `buffers` hold together.
pub(super) fn room(buffers: &[Buffer]) -> usize {
    buffers.iter().fold(0, |sum, buffer| sum.saturating_add(buffer.len()))
}

/// A place in a row of buffers.
pub(super) struct Cursor<'a> {
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that lie behind.
    used: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(buffers: &'a [Buffer]) -> Self {
        Self { buffers, used: 0 }
    }

    /// Walks up to `len` bytes ahead, a stretch of one buffer at a time.
    fn walk(&mut self, mut len: usize, mut stretch: impl FnMut(*mut u8, usize)) {
        while let Some(buffer) = self.buffers.first() {
            let here = (buffer.len() - self.used).min(len);
            stretch(buffer.address().wrapping_add(self.used), here);
            self.used += here;
            len -= here;
            if len == 0 {
                return;
            }
            self.buffers = self.buffers.get(1..).unwrap_or_default();
            self.used = 0;
        }
    }

    /// Leaves bytes out.
    #[cfg(test)]
    pub(super) fn skip(&mut self, len: usize) {
        self.walk(len, |_, _| {});
    }

    /// Copies the next bytes out; short only if there are no more.
    ///
    /// # Safety
    /// The buffers must be readable memory that is no part of `to`.
    pub(super) unsafe fn read(&mut self, to: &mut [u8]) {
        let mut at = to.as_mut_ptr();
        self.walk(to.len(), |address, len| {
            // SAFETY: the caller vouches for the buffer, and all stretches together are no longer
            // than `to`.
            unsafe { ptr::copy_nonoverlapping(address, at, len) };
            at = at.wrapping_add(len);
        });
    }

    /// Copies bytes in; short only if there is no more room.
    ///
    /// # Safety
    /// The buffers must be writable memory that is no part of `from`.
    pub(super) unsafe fn write(&mut self, from: &[u8]) {
        let mut at = from.as_ptr();
        self.walk(from.len(), |address, len| {
            // SAFETY: the caller vouches for the buffer, and all stretches together are no longer
            // than `from`.
            unsafe { ptr::copy_nonoverlapping(at, address, len) };
            at = at.wrapping_add(len);
        });
    }

    /// Copies `len` bytes from one row of buffers to another, which may be the same memory.
    ///
    /// # Safety
    /// The buffers of both must be memory, readable here and writable there.
    pub(super) unsafe fn copy_to(&mut self, to: &mut Cursor<'_>, len: usize) {
        self.walk(len, |from, len| {
            let mut from = from.cast_const();
            to.walk(len, |to, len| {
                // SAFETY: the caller vouches for both sides.
                unsafe { ptr::copy(from, to, len) };
                from = from.wrapping_add(len);
            });
        });
    }
}

/// A buffer lent for a frame.
pub(super) struct Offer {
    pub(super) id: u32,
    pub(super) pieces: Vec<Buffer>,
    pub(super) room: usize,
}

/// Buffers lent for frames, in order. None allocates once it has been round.
pub(super) struct Offers {
    waiting: VecDeque<Offer>,
    spare: Vec<Offer>,
    limit: usize,
}

impl Offers {
    pub(super) fn new(limit: u16) -> Self {
        let limit = usize::from(limit);
        Self { waiting: VecDeque::with_capacity(limit), spare: Vec::with_capacity(limit), limit }
    }

    /// Takes one, or gives it back at once.
    pub(super) fn push(&mut self, id: u32, buffers: &[Buffer], done: &mut Completions) {
        if buffers.len() > MAX_BUFFERS || self.waiting.len() == self.limit {
            return done.push(Completion::Returned { id });
        }
        let empty = || Offer { id, pieces: Vec::with_capacity(buffers.len()), room: 0 };
        let mut offer = self.spare.pop().unwrap_or_else(empty);
        offer.id = id;
        offer.pieces.clear();
        offer.pieces.extend_from_slice(buffers);
        offer.room = room(buffers);
        self.waiting.push_back(offer);
    }

    pub(super) fn front(&self) -> Option<&Offer> {
        self.waiting.front()
    }

    /// The one in front has been used. Returns its number.
    pub(super) fn pop(&mut self) -> Option<u32> {
        let offer = self.waiting.pop_front()?;
        let id = offer.id;
        self.spare.push(offer);
        Some(id)
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Gives all back.
    pub(super) fn recall(&mut self, done: &mut Completions) {
        while let Some(id) = self.pop() {
            done.push(Completion::Returned { id });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Cuts `bytes` into buffers of the given lengths, the last taking the rest.
    fn cut(mut bytes: &mut [u8], lengths: &[usize]) -> Vec<Buffer> {
        let mut buffers = Vec::new();
        for len in lengths {
            let (now, later) = bytes.split_at_mut((*len).min(bytes.len()));
            buffers.push(now.into());
            bytes = later;
        }
        buffers.push(bytes.into());
        buffers
    }

    proptest! {
        #[test]
        fn pieces_hold_what_is_written(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            one in prop::collection::vec(0usize..60, 0..6),
            two in prop::collection::vec(0usize..60, 0..6),
            skip in 0usize..250,
        ) {
            let mut middle = vec![0u8; bytes.len()];
            let mut end = vec![0u8; bytes.len()];
            let expected = bytes.clone();
            let (from, to) = (cut(&mut bytes, &one), cut(&mut middle, &two));
            // SAFETY: both lie in vectors of this test.
            unsafe { Cursor::new(&from).copy_to(&mut Cursor::new(&to), expected.len()) };
            // SAFETY: as above.
            unsafe { Cursor::new(&to).read(&mut end) };
            prop_assert_eq!(&end, &expected);
            // SAFETY: as above.
            unsafe { Cursor::new(&from).write(&vec![7; expected.len()]) };
            let mut cursor = Cursor::new(&to);
            cursor.skip(skip);
            let mut rest = vec![0; expected.len().saturating_sub(skip)];
            // SAFETY: as above.
            unsafe { cursor.read(&mut rest) };
            prop_assert_eq!(&rest[..], expected.get(skip..).unwrap_or_default());
            prop_assert_eq!(room(&from), expected.len());
            prop_assert!(bytes.iter().all(|byte| *byte == 7));
        }
    }
}
