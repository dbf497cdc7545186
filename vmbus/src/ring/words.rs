//! How bytes get out of a ring's words and into them. The words are the other side's too, so each is
//! an atomic.

use core::array;

use crate::{
    packet::Descriptor,
    sync::{AtomicU64, Ordering},
};

/// The `bytes` at `index`, in one piece or, where the area ends, two.
pub(super) fn span(data: &[AtomicU64], index: u32, bytes: u32) -> (&[AtomicU64], &[AtomicU64]) {
    let (start, count) = ((index / 8) as usize, (bytes / 8) as usize);
    if let Some(whole) = data.get(start..start + count) {
        return (whole, &[]);
    }
    let first = data.get(start..).unwrap_or_default();
    (first, data.get(..count.saturating_sub(first.len())).unwrap_or_default())
}

/// Words that are copied without a look at how many are left: what a storage packet has.
const STRIDE: usize = 8;

#[inline]
pub(super) fn load(to: &mut [[u8; 8]], from: &[AtomicU64]) {
    let (to_strides, to) = to.as_chunks_mut::<STRIDE>();
    let (strides, from) = from.as_chunks::<STRIDE>();
    for (to, from) in to_strides.iter_mut().zip(strides) {
        let words: [u64; STRIDE] = array::from_fn(|i| from[i].load(Ordering::Relaxed));
        *to = words.map(u64::to_le_bytes);
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.load(Ordering::Relaxed).to_le_bytes();
    }
}

#[inline]
fn store(to: &[AtomicU64], from: &[[u8; 8]]) {
    let (to_strides, to) = to.as_chunks::<STRIDE>();
    let (strides, from) = from.as_chunks::<STRIDE>();
    for (to, from) in to_strides.iter().zip(strides) {
        for (to, from) in to.iter().zip(from) {
            to.store(u64::from_le_bytes(*from), Ordering::Relaxed);
        }
    }
    for (to, from) in to.iter().zip(from) {
        to.store(u64::from_le_bytes(*from), Ordering::Relaxed);
    }
}

/// Writes a packet to `words`, which are exactly as many as it takes. Returns whether it did: not,
/// if a part that is not the last ends within a word.
#[inline]
pub(super) fn write_straight(
    words: &[AtomicU64],
    descriptor: Descriptor,
    headers: &[u8],
    payload: &[&[u8]],
    trailer: u64,
) -> bool {
    let [first, second, body @ .., last] = words else { return false };
    let descriptor: [u64; 2] = zerocopy::transmute!(descriptor);
    first.store(descriptor[0], Ordering::Relaxed);
    second.store(descriptor[1], Ordering::Relaxed);
    last.store(trailer, Ordering::Relaxed);
    let (headers, _) = headers.as_chunks();
    let Some((to, mut body)) = body.split_at_checked(headers.len()) else { return false };
    store(to, headers);
    for part in payload {
        let (whole, rest) = part.as_chunks();
        let Some((to, after)) = body.split_at_checked(whole.len()) else { return false };
        store(to, whole);
        body = after;
        if !rest.is_empty() {
            let [word] = body else { return false };
            let mut padded = [0; 8];
            for (to, from) in padded.iter_mut().zip(rest) {
                *to = *from;
            }
            word.store(u64::from_le_bytes(padded), Ordering::Relaxed);
            body = &[];
        }
    }
    true
}

/// Writes a packet to `words` and, when these are full, to those `after` them.
#[cold]
pub(super) fn write_in_pieces(
    words: &[AtomicU64],
    after: &[AtomicU64],
    descriptor: Descriptor,
    headers: &[u8],
    payload: &[&[u8]],
    trailer: u64,
) {
    let mut writer = WordWriter { words, after, partial: [0; 8], filled: 0 };
    let descriptor: [[u8; 8]; 2] = zerocopy::transmute!(descriptor);
    writer.put(&descriptor);
    writer.write(headers);
    for part in payload {
        writer.write(part);
    }
    writer.pad();
    writer.put(&[trailer.to_le_bytes()]);
}

/// Gathers bytes into words of the ring.
struct WordWriter<'m> {
    /// Where the next words go,
    words: &'m [AtomicU64],
    /// and where those after them.
    after: &'m [AtomicU64],
    partial: [u8; 8],
    filled: usize,
}

impl WordWriter<'_> {
    #[inline]
    fn put(&mut self, mut words: &[[u8; 8]]) {
        while !words.is_empty() {
            if self.words.is_empty() {
                self.words = core::mem::take(&mut self.after);
            }
            let count = words.len().min(self.words.len());
            let (Some((to, later)), Some((from, rest))) =
                (self.words.split_at_checked(count), words.split_at_checked(count))
            else {
                return;
            };
            if count == 0 {
                return;
            }
            for (to, from) in to.iter().zip(from) {
                to.store(u64::from_le_bytes(*from), Ordering::Relaxed);
            }
            (self.words, words) = (later, rest);
        }
    }

    #[inline]
    fn write(&mut self, mut bytes: &[u8]) {
        if self.filled > 0 {
            let count = bytes.len().min(8 - self.filled);
            let (now, later) = bytes.split_at_checked(count).unwrap_or((bytes, &[]));
            if let Some(to) = self.partial.get_mut(self.filled..self.filled + count) {
                to.copy_from_slice(now);
            }
            self.filled += count;
            bytes = later;
            if self.filled < 8 {
                return;
            }
            self.filled = 0;
            self.put(&[self.partial]);
        }
        let (whole, rest) = bytes.as_chunks::<8>();
        self.put(whole);
        if let Some(to) = self.partial.get_mut(..rest.len()) {
            to.copy_from_slice(rest);
        }
        self.filled = rest.len();
    }

    /// Completes the last word with zeros.
    fn pad(&mut self) {
        if self.filled > 0 {
            self.write([0; 8].get(self.filled..).unwrap_or_default());
        }
    }
}
