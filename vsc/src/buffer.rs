//! Buffers that a client shares with the root once, by GPADL, and uses for as long as its channel
//! is open.

use core::sync::atomic::{AtomicU64, Ordering};

/// Memory that both sides reach, and that the root may change at any moment: what is read twice may
/// differ. Whoever has it vouches that it stays for as long as the root knows of it.
///
/// Words will do, as a guest has its pages.
pub trait SharedBuffer {
    /// Its bytes.
    fn size(&self) -> usize;

    /// Copies the bytes from `at` on out; false if they are not all there.
    fn read(&self, at: usize, to: &mut [u8]) -> bool;

    /// Copies bytes to where they begin at `at`; false if there is no room.
    fn write(&self, at: usize, from: &[u8]) -> bool;
}

impl<B: SharedBuffer> SharedBuffer for &B {
    fn size(&self) -> usize {
        (**self).size()
    }

    #[inline]
    fn read(&self, at: usize, to: &mut [u8]) -> bool {
        (**self).read(at, to)
    }

    #[inline]
    fn write(&self, at: usize, from: &[u8]) -> bool {
        (**self).write(at, from)
    }
}

/// The words with the `len` bytes from `at` on, if they are there, and where in the first of them
/// the bytes begin.
fn words(all: &[AtomicU64], at: usize, len: usize) -> Option<(&[AtomicU64], usize)> {
    let end = at.checked_add(len)?.div_ceil(8);
    Some((all.get(at / 8..end)?, at % 8))
}

impl SharedBuffer for &[AtomicU64] {
    fn size(&self) -> usize {
        self.len() * 8
    }

    #[inline]
    fn read(&self, at: usize, to: &mut [u8]) -> bool {
        let Some((mut words, within)) = words(self, at, to.len()) else { return false };
        let mut rest = to;
        if within > 0
            && let Some((first, others)) = words.split_first()
        {
            let bytes = first.load(Ordering::Relaxed).to_le_bytes();
            let (head, tail) = rest.split_at_mut(rest.len().min(8 - within));
            for (to, from) in head.iter_mut().zip(bytes.iter().skip(within)) {
                *to = *from;
            }
            (words, rest) = (others, tail);
        }
        let (whole, tail) = rest.as_chunks_mut::<8>();
        let count = whole.len();
        for (to, from) in whole.iter_mut().zip(words) {
            *to = from.load(Ordering::Relaxed).to_le_bytes();
        }
        if let Some(last) = words.get(count) {
            for (to, from) in tail.iter_mut().zip(last.load(Ordering::Relaxed).to_le_bytes()) {
                *to = from;
            }
        }
        true
    }

    #[inline]
    fn write(&self, at: usize, from: &[u8]) -> bool {
        /// Replaces some bytes of a word. The others are ours too: nobody else writes there.
        fn patch(word: &AtomicU64, skip: usize, from: &[u8]) {
            let mut bytes = word.load(Ordering::Relaxed).to_le_bytes();
            for (to, from) in bytes.iter_mut().skip(skip).zip(from) {
                *to = *from;
            }
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
        let Some((mut words, within)) = words(self, at, from.len()) else { return false };
        let mut rest = from;
        if within > 0
            && let Some((first, others)) = words.split_first()
        {
            let (head, tail) = rest.split_at(rest.len().min(8 - within));
            patch(first, within, head);
            (words, rest) = (others, tail);
        }
        let (whole, tail) = rest.as_chunks::<8>();
        for (to, from) in words.iter().zip(whole) {
            to.store(u64::from_le_bytes(*from), Ordering::Relaxed);
        }
        if !tail.is_empty()
            && let Some(last) = words.get(whole.len())
        {
            patch(last, 0, tail);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is written is read, and nothing beside it changes.
        #[test]
        fn words_hold_bytes_at_any_place(
            at in 0usize..70,
            bytes in prop::collection::vec(any::<u8>(), 0..70),
        ) {
            let words: [AtomicU64; 8] = core::array::from_fn(|_| AtomicU64::new(0x5a5a_5a5a_5a5a_5a5a));
            let buffer: &[AtomicU64] = &words;
            let fits = at + bytes.len() <= 64;
            let mut back = vec![0; bytes.len()];
            prop_assert_eq!(buffer.write(at, &bytes), fits);
            prop_assert_eq!(buffer.read(at, &mut back), fits);
            let mut all = vec![0; 64];
            prop_assert!(buffer.read(0, &mut all));
            if fits {
                prop_assert_eq!(&back, &bytes);
                let expected: Vec<u8> = [vec![0x5a; at], bytes.clone(), vec![0x5a; 64 - at - bytes.len()]].concat();
                prop_assert_eq!(all, expected);
            } else {
                prop_assert_eq!(all, vec![0x5a; 64]);
            }
        }
    }
}
