//! The memory that a hostile guest lets devices do what they like with, and no other: a device that does
//! as it is told may overwrite all of this, and the guest lives on.

use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::ring::Control;

use super::chaos::Chaos;
use crate::memory::{PAGE, Pages};

const PAGE_WORDS: usize = PAGE / 8;

/// Pages that the rings of channels lie in.
pub(super) const RINGS: usize = 512;
/// Pages whose addresses are told to devices, which read and write them.
pub(super) const DATA: usize = 1024;
/// Pages that devices read other addresses from, which therefore no device writes data to.
pub(super) const TABLES: usize = 512;
/// All of them.
pub(super) const NEEDED: usize = RINGS + DATA + TABLES;

/// Pages of the tables that are an IDE controller's.
const REGIONS: usize = 64;
/// Pages of them where NICs find what to receive into: the longest ring, and room for its start.
const RECEIVES: usize = 320;

/// Pages behind a place in the data at which the longest access that one address leads to ends.
const MARGIN: usize = 32;

/// That memory.
#[derive(Clone, Copy)]
pub(super) struct Arena<'w> {
    pub(super) rings: Pages<'w>,
    pub(super) data: Pages<'w>,
    pub(super) tables: Pages<'w>,
    /// The first page behind all the guest's memory.
    end: u64,
}

impl<'w> Arena<'w> {
    /// Parts it from the memory of the guest; `None` if that is too small.
    pub(super) fn new(mut memory: Pages<'w>) -> Option<Self> {
        let end = memory.first().saturating_add(memory.count() as u64);
        let (rings, data) = (memory.take(RINGS)?, memory.take(DATA)?);
        Some(Self { rings, data, tables: memory.take(TABLES)?, end })
    }

    /// The number of a page for data, or in a few of a hundred cases of one that is no memory.
    pub(super) fn page(&self, chaos: &mut Chaos) -> u64 {
        if chaos.percent(2) {
            return self.no_page(chaos);
        }
        self.data.first().wrapping_add(chaos.below((DATA - MARGIN) as u64))
    }

    /// The number of a page that is no memory, as far as the guest knows.
    pub(super) fn no_page(&self, chaos: &mut Chaos) -> u64 {
        let end = self.end;
        let far = chaos.any() | 1 << 40;
        chaos.of(end, &[end + 1, end + 0xffff, 0xf_0000, 1 << 36, 1 << 52, u64::MAX, far])
    }

    /// An address in the data, or one that is no memory's.
    pub(super) fn address(&self, chaos: &mut Chaos) -> u64 {
        let page = self.page(chaos).wrapping_mul(PAGE as u64);
        let aligned = chaos.below(PAGE as u64) & !7;
        let any = chaos.below(PAGE as u64);
        page.wrapping_add(chaos.of(0, &[aligned, any, 0xfff]))
    }

    /// Makes addresses of all that devices may take for some.
    pub(super) fn prepare(&self, chaos: &mut Chaos) {
        for word in self.regions().words() {
            word.store(self.region(chaos), Ordering::Relaxed);
        }
        for words in self.receive_descriptors().words().chunks_exact(2) {
            if let [address, rest] = words {
                address.store(self.address(chaos), Ordering::Relaxed);
                rest.store(chaos.any(), Ordering::Relaxed);
            }
        }
    }

    /// A sum of all that lies in it.
    pub(super) fn sum(&self) -> u64 {
        let all = [self.rings, self.data, self.tables];
        let words = all.iter().flat_map(Pages::words);
        words
            .fold(0, |sum: u64, word| sum.rotate_left(5).wrapping_add(word.load(Ordering::Relaxed)))
    }

    /// The tables from which an IDE controller takes memory regions.
    pub(super) fn regions(&self) -> Pages<'w> {
        self.split(0, REGIONS)
    }

    /// Where a NIC's rings to receive into lie: each word that may be an address is one.
    pub(super) fn receive_descriptors(&self) -> Pages<'w> {
        self.split(REGIONS, RECEIVES)
    }

    /// Where its rings to transmit lie, whose addresses are only read from.
    pub(super) fn transmit_descriptors(&self) -> Pages<'w> {
        self.split(REGIONS + RECEIVES, TABLES - REGIONS - RECEIVES)
    }

    /// So many pages of the tables.
    fn split(&self, first: usize, count: usize) -> Pages<'w> {
        let rest = self.tables.split(first).map_or(self.tables, |(_, rest)| rest);
        rest.split(count).map_or(rest, |(pages, _)| pages)
    }

    /// A memory region as a table of an IDE controller has it, up to 64 KiB.
    pub(super) fn region(&self, chaos: &mut Chaos) -> u64 {
        let address = self.address(chaos) as u32;
        // With 32 bits of address what is no memory may become some that is not ours.
        let start = self.data.first() * PAGE as u64;
        let end = start + ((DATA - MARGIN) * PAGE) as u64;
        let ours = (start..end).contains(&address.into());
        let address = if ours { address } else { 0xf000_0000 };
        let short = chaos.below(4096);
        let any = chaos.any() & 0xffff;
        let len = chaos.of(4096, &[512, short, 0, any]);
        let last = u64::from(chaos.percent(30)) << 63;
        u64::from(address) | len << 32 | last
    }

    /// Fills some of the data with bytes that mean nothing.
    pub(super) fn litter(&self, chaos: &mut Chaos) {
        let start = chaos.count(DATA * PAGE_WORDS);
        let words = self.data.words().get(start..).unwrap_or_default();
        for word in words.iter().take(chaos.count(PAGE_WORDS)) {
            word.store(chaos.any(), Ordering::Relaxed);
        }
    }
}

/// Writes bytes into shared words, from byte `at` on, a multiple of 8; what does not fit is left out.
pub(super) fn write(words: &[AtomicU64], at: usize, bytes: &[u8]) {
    let words = words.get(at / 8..).unwrap_or_default();
    for (word, bytes) in words.iter().zip(bytes.chunks(8)) {
        let mut all = [0; 8];
        for (to, from) in all.iter_mut().zip(bytes) {
            *to = *from;
        }
        word.store(u64::from_le_bytes(all), Ordering::Relaxed);
    }
}

/// One direction of a channel, as whoever has listed its pages sees it.
#[derive(Clone, Copy)]
pub(super) struct Side<'w> {
    pub(super) control: &'w Control,
    data: Pages<'w>,
}

impl<'w> Side<'w> {
    /// In these pages, empty; `None` if there are fewer than two.
    pub(super) fn new(pages: Pages<'w>) -> Option<Self> {
        let ring = pages.ring()?;
        let (_, data) = pages.split(1)?;
        Some(Self { control: ring.control, data })
    }

    /// Bytes of the data area.
    pub(super) fn size(&self) -> u32 {
        (self.data.count() * PAGE) as u32
    }

    /// The word at `at`, once around.
    pub(super) fn load(&self, at: u32) -> u64 {
        let index = (at % self.size().max(1) / 8) as usize;
        self.data.words().get(index).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Writes a word at `at`, once around.
    pub(super) fn store(&self, at: u32, word: u64) {
        let index = (at % self.size().max(1) / 8) as usize;
        if let Some(place) = self.data.words().get(index) {
            place.store(word, Ordering::Relaxed);
        }
    }
}

/// Bytes of a message or a packet under construction. What does not fit is left out.
pub(super) struct Bytes {
    bytes: [u8; Self::ROOM],
    len: usize,
}

impl Bytes {
    /// As many as fit.
    pub(super) const ROOM: usize = 4096;

    pub(super) fn new() -> Self {
        Self { bytes: [0; _], len: 0 }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> &mut Self {
        let end = self.len + bytes.len();
        if let Some(room) = self.bytes.get_mut(self.len..end) {
            room.copy_from_slice(bytes);
            self.len = end;
        }
        self
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.push(&value.to_le_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.push(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.push(&value.to_le_bytes())
    }

    pub(super) fn litter(&mut self, chaos: &mut Chaos, words: usize) -> &mut Self {
        for _ in 0..words {
            self.u64(chaos.any());
        }
        self
    }

    /// Changes a few bytes, in so many of a hundred cases.
    pub(super) fn spoil(&mut self, chaos: &mut Chaos, percent: u64) -> &mut Self {
        while chaos.percent(percent) {
            let at = chaos.count(self.len) & !3;
            let odd = chaos.odd_32().to_le_bytes();
            if let Some(place) = self.bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&odd);
            }
        }
        self
    }

    pub(super) fn get(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
