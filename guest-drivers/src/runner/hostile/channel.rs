//! A channel in the hands of a hostile guest: its rings are written by hand, rightly, nearly so, or not
//! at all.

use core::sync::atomic::Ordering;

use super::arena::{Arena, Bytes, Side};
use super::chaos::Chaos;
use super::wire::{Offer, Wire};
use crate::platform::Platform;

/// An open channel.
pub(super) struct Channel<'w> {
    pub(super) offer: Offer,
    pub(super) gpadl: u32,
    outgoing: Side<'w>,
    incoming: Side<'w>,
    /// Where the next packet goes.
    cursor: u32,
    transaction: u64,
}

impl<'w> Channel<'w> {
    /// Opens a channel with rings of any size that lie in the arena; `None` if the root refuses. Rings of
    /// another `depth` are others.
    pub(super) fn open<P: Platform>(
        wire: &mut Wire<'w, P>,
        chaos: &mut Chaos,
        arena: &Arena<'w>,
        offer: Offer,
        depth: usize,
    ) -> Option<Self> {
        const ROOM: usize = 128;
        let (up, down) = (2 + chaos.count(32), 2 + chaos.count(32));
        // Sometimes where those of another channel are.
        let start = if chaos.percent(95) { depth * ROOM } else { chaos.count(2 * ROOM) };
        let (_, pages) = arena.rings.split(start)?;
        let (pages, _) = pages.split(up + down)?;
        let (up_pages, down_pages) = pages.split(up)?;
        let (outgoing, incoming) = (Side::new(up_pages)?, Side::new(down_pages)?);
        let gpadl = chaos.any_32() | 1;
        if chaos.percent(3) {
            // The root takes a ring up where it stands.
            let at = chaos.odd_32();
            outgoing.control.write_index.store(at, Ordering::Relaxed);
            incoming.control.read_index.store(chaos.or_odd_32(at, 50), Ordering::Relaxed);
        }
        let first = pages.first();
        let scattered = chaos.percent(10);
        let twice = chaos.percent(3);
        let (wrong, other) = (chaos.percent(2), arena.no_page(chaos));
        let count = pages.count() as u64;
        let numbers = (0..count).map(|page| match page {
            // Every other one, so that no two are neighbours.
            page if scattered => first + (page * 2) % count + u64::from(page * 2 >= count),
            page if twice => first + page / 2,
            1 if wrong => other,
            page => first + page,
        });
        if !wire.list(chaos, offer.relid, gpadl, numbers, up + down) {
            // It is asked back whether it was taken or not.
            wire.tear_down(offer.relid, gpadl);
            return None;
        }
        if !wire.open(chaos, offer.relid, gpadl, up as u32) {
            wire.tear_down(offer.relid, gpadl);
            return None;
        }
        Some(Self { offer, gpadl, outgoing, incoming, cursor: 0, transaction: 0 })
    }

    /// Puts a packet with this body into the ring; a multiple of 8 bytes of it are headers. The root does
    /// not see it until [`Channel::publish`].
    pub(super) fn push(&mut self, chaos: &mut Chaos, kind: u16, headers: usize, body: &[u8]) {
        self.transaction += 1;
        let transaction = chaos.or_odd(self.transaction, 5);
        self.push_as(chaos, kind, headers, body, transaction);
    }

    /// The same with this number.
    pub(super) fn push_as(
        &mut self,
        chaos: &mut Chaos,
        kind: u16,
        headers: usize,
        body: &[u8],
        transaction: u64,
    ) {
        let len = body.len().next_multiple_of(8) as u32;
        let total = len + 24;
        if self.free() < total + 8 {
            return;
        }
        let len8 = (16 + u64::from(len)) / 8;
        let offset8 = (16 + headers as u64) / 8;
        // A right one mostly, as the root hears nothing of what comes after a wrong one.
        let percent = if chaos.percent(1) { 40 } else { 0 };
        let flags = u64::from(!chaos.percent(5));
        let first = u64::from(kind)
            | (chaos.or_odd(offset8, percent) & 0xffff) << 16
            | (chaos.or_odd(len8, percent) & 0xffff) << 32
            | flags << 48;
        let mut at = self.cursor;
        for word in [first, transaction].into_iter().chain(body.chunks(8).map(word_of)) {
            self.outgoing.store(at, word);
            at += 8;
        }
        self.outgoing.store(at, u64::from(self.cursor) << 32);
        self.cursor = (at + 8) % self.outgoing.size();
    }

    fn free(&self) -> u32 {
        let size = self.outgoing.size();
        let read = self.outgoing.control.read_index.load(Ordering::Acquire) % size;
        if self.cursor >= read { size - (self.cursor - read) } else { read - self.cursor }
    }

    /// Lets the root see what was pushed, and tells it, mostly.
    pub(super) fn publish<P: Platform>(&self, wire: &mut Wire<'w, P>, chaos: &mut Chaos) {
        self.outgoing.control.write_index.store(self.cursor, Ordering::Release);
        wire.counts.packets = wire.counts.packets.wrapping_add(1);
        if !chaos.percent(3) {
            wire.platform.signal_event(self.offer.connection);
        }
    }

    /// Takes all that has come, unread; whether there was anything.
    pub(super) fn drain(&self) -> bool {
        let control = self.incoming.control;
        let written = control.write_index.load(Ordering::Acquire);
        control.read_index.swap(written, Ordering::Release) != written
    }

    /// Takes all that has come, and tells of each packet's kind and number.
    pub(super) fn read(&self, mut each: impl FnMut(u16, u64)) {
        let control = self.incoming.control;
        let size = self.incoming.size();
        let written = control.write_index.load(Ordering::Acquire) % size;
        let mut at = (control.read_index.load(Ordering::Relaxed) % size) & !7;
        // One's own ring is as broken as one has made it.
        for _ in 0..1024 {
            if at == written & !7 {
                break;
            }
            let descriptor = self.incoming.load(at);
            each(descriptor as u16, self.incoming.load(at + 8));
            let bytes = (descriptor >> 32) as u16;
            at = (at + u32::from(bytes) * 8 + 8) % size;
        }
        control.read_index.store(written, Ordering::Release);
    }

    /// Lets some time pass in which what comes is taken, or is not.
    pub(super) fn linger<P: Platform>(&self, wire: &mut Wire<'w, P>, chaos: &mut Chaos) {
        for _ in 0..chaos.below(4) {
            wire.linger(chaos.below(100_000));
            if chaos.percent(90) && self.drain() && chaos.percent(50) {
                wire.platform.signal_event(self.offer.connection);
            }
        }
    }

    /// Spoils something of the rings.
    pub(super) fn spoil<P: Platform>(&mut self, wire: &mut Wire<'w, P>, chaos: &mut Chaos) {
        let (up, down) = (self.outgoing.control, self.incoming.control);
        let odd = chaos.odd_32();
        match chaos.below(8) {
            0 => up.write_index.store(odd, Ordering::Release),
            1 => {
                let ahead = self.cursor.wrapping_add(odd & 0xffff & !7) % self.outgoing.size();
                up.write_index.store(ahead, Ordering::Release);
            }
            2 => down.read_index.store(odd, Ordering::Release),
            3 => up.read_index.store(odd, Ordering::Release),
            4 => down.write_index.store(odd, Ordering::Release),
            5 => down.pending_send_size.store(odd, Ordering::Release),
            6 => down.interrupt_mask.store(odd, Ordering::Release),
            _ => {
                down.feature_bits.store(odd, Ordering::Release);
                for _ in 0..chaos.below(512) {
                    let (at, word) = (chaos.any_32() & !7, chaos.any());
                    self.outgoing.store(at, word);
                }
            }
        }
        for _ in 0..chaos.below(4) {
            wire.platform.signal_event(self.offer.connection);
        }
    }

    /// Lets go of the channel, in one of many orders.
    pub(super) fn leave<P: Platform>(self, wire: &mut Wire<'w, P>, chaos: &mut Chaos) {
        let Self { offer: Offer { relid, .. }, gpadl, .. } = self;
        match chaos.below(10) {
            0 => wire.tear_down(relid, gpadl),
            1 => wire.close(relid),
            2 => {
                wire.tear_down(relid, gpadl);
                wire.close(relid);
            }
            3 => {}
            _ => {
                wire.close(relid);
                wire.tear_down(relid, gpadl);
            }
        }
        wire.await_teardown();
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    for (to, from) in all.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(all)
}

/// The headers of a packet that names guest pages, for so many bytes of data.
pub(super) fn ranges(chaos: &mut Chaos, arena: &Arena<'_>, len: u32) -> Bytes {
    let mut headers = Bytes::new();
    let odd = chaos.percent(4);
    let percent = if odd { 40 } else { 0 };
    let offset = if chaos.percent(80) { 0 } else { chaos.below(4096) as u32 };
    let pages = (u64::from(len) + u64::from(offset)).div_ceil(4096).min(256);
    headers.u32(0).u32(chaos.or_odd_32(1, percent / 2));
    headers.u32(chaos.or_odd_32(len, percent)).u32(chaos.or_odd_32(offset, percent));
    let neighbours = chaos.percent(50);
    let first = arena.data.first() + chaos.below(256);
    for number in 0..pages {
        let page = if neighbours { first + number } else { arena.page(chaos) };
        headers.u64(page);
    }
    headers
}
