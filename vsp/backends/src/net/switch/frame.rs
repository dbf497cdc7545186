//! Frames inside the switch: read out of a guest, kept in a pool, written into others.
//!
//! `unsafe` copies from and to guests' buffers, which the callers of the queue vouch for.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::MAX_PORTS;
use super::vlan::{Inner, PortVlan, Tci};
use crate::net::offload::{Checksum, Segments};
use crate::net::pieces::Cursor;
use crate::net::{Dropped, ETHERNET_HEADER, Frame, MAX_FRAME, MacAddr, Offload};

/// Bytes of the two addresses, behind which a tag stands.
const ADDRESSES: usize = 12;

/// Bytes of a tag, and its type (IEEE 802.1Q).
const TAG: usize = 4;
const TAG_TYPE: [u8; 2] = [0x81, 0x00];
/// The types of tags that a provider puts in front: those of service VLANs (802.1Q), and what was used
/// before there were any. They mean nothing to a switch of customers, but to others outside.
const FOREIGN_TYPES: [[u8; 2]; 2] = [[0x88, 0xa8], [0x91, 0x00]];

/// Bytes of the buffers most frames fit in.
const SHORT: usize = 2048;

/// How many buffers of either kind a queue has: as many as some inboxes hold.
const SHORTS: usize = 1024;
const LONGS: usize = 256;

/// How many buffers that are held a frame passes over before another is made, if there may be more: a
/// receiver that keeps many does not slow the frames of others down.
const LOOKS: usize = 16;

/// How many times as many buffers as are left to all a port may hold.
const SHARE: usize = 4;

/// Which part of the buffers is kept for ports that hold few, in even shares.
const KEPT: usize = 4;

/// A frame in the switch, without a tag.
pub(super) struct Stored {
    bytes: Box<[u8]>,
    len: usize,
    /// Which tags it has all the same.
    pub(super) inner: Inner,
    /// Where it belongs, and with which priority.
    pub(super) tci: Tci,
    /// What is left to do to it; places are those in the frame without a tag.
    pub(super) offload: Offload,
}

impl Stored {
    fn new(size: usize) -> Self {
        let bytes = vec![0; size].into_boxed_slice();
        Self { bytes, len: 0, inner: Inner::None, tci: Tci::default(), offload: Offload::NONE }
    }

    /// The frame.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// What a frame's first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) destination: MacAddr,
    pub(super) source: MacAddr,
    /// Its tag, if it has one.
    tag: Option<Tci>,
    inner: Inner,
    /// All its tags in front of the packet, of two at most, in bytes.
    tags: usize,
}

fn is_tag(kind: [u8; 2]) -> bool {
    kind == TAG_TYPE || FOREIGN_TYPES.contains(&kind)
}

impl Header {
    /// Of a frame of `len` bytes that begins so.
    fn parse(start: &[u8; ETHERNET_HEADER + TAG], len: usize) -> Option<Self> {
        let (destination, rest) = start.split_first_chunk()?;
        let (source, rest) = rest.split_first_chunk()?;
        let (kind, rest) = rest.split_first_chunk::<2>()?;
        let (tci, rest) = rest.split_first_chunk::<2>()?;
        let whole = len >= start.len();
        let second = whole && is_tag(*kind) && is_tag(*rest.first_chunk()?);
        let (tag, inner) = match *kind {
            TAG_TYPE if !whole => return None,
            TAG_TYPE if second => (Some(Tci(u16::from_be_bytes(*tci))), Inner::Behind),
            TAG_TYPE => (Some(Tci(u16::from_be_bytes(*tci))), Inner::None),
            kind if is_tag(kind) => (None, Inner::Foreign),
            _ => (None, Inner::None),
        };
        let tags = (usize::from(is_tag(*kind)) + usize::from(second)) * TAG;
        let (destination, source) = (MacAddr(*destination), MacAddr(*source));
        Some(Self { destination, source, tag, inner, tags })
    }

    /// Whether a switch may pass it on: no frame comes from several stations, and those to the
    /// addresses 01-80-C2-00-00-00 to -0F stay on their cable (IEEE 802.1Q, table 8-1).
    fn is_forwarded(&self) -> bool {
        let local = matches!(self.destination.0, [1, 0x80, 0xc2, 0, 0, 0..=0x0f]);
        !local && !self.source.is_multicast()
    }
}

/// The same offload in a frame that has `by` bytes more, or fewer, in front of its IP header.
fn moved(offload: Offload, by: i32) -> Option<Offload> {
    let shift = |at: u16| u16::try_from(i32::from(at) + by).ok();
    let checksum = match offload.checksum {
        Checksum::Partial { start, offset } => Checksum::Partial { start: shift(start)?, offset },
        checksum => checksum,
    };
    let shift_hint = |segments: Segments| Segments {
        header_len: match segments.header_len {
            0 => 0,
            hint => shift(hint).unwrap_or_default(),
        },
        ..segments
    };
    Some(Offload { checksum, segments: offload.segments.map(shift_hint) })
}

/// The buffers of one sending queue. Those that receivers still hold are passed over, and what one
/// port may hold of them is bounded, so that those who keep frames do not keep others from theirs.
pub(super) struct Pool {
    shorts: Ring,
    longs: Ring,
    /// The last that was taken is a long one.
    last_is_long: bool,
}

struct Ring {
    frames: Vec<Arc<Stored>>,
    /// For each of them the ports that may still hold it, a bit each. Nobody tells when one no longer
    /// does: that is found out when the buffer is used again, or a port seems to hold too many.
    holders: Vec<u64>,
    /// How many buffers each port may hold, and how many are held by any.
    held: [u16; MAX_PORTS],
    used: usize,
    /// Buffers that each port is sure of.
    sure: usize,
    /// Those that are kept for that.
    kept: usize,
    next: usize,
    /// The one that was taken last.
    last: usize,
    /// None was free in this batch.
    exhausted: bool,
    /// Of a buffer, in bytes.
    size: usize,
}

impl Ring {
    fn new(count: usize, size: usize) -> Self {
        let mut ring = Self {
            frames: Vec::with_capacity(count),
            holders: Vec::with_capacity(count),
            held: [0; _],
            used: 0,
            sure: 0,
            kept: 0,
            next: 0,
            last: 0,
            exhausted: false,
            size,
        };
        ring.share(1);
        ring
    }

    /// The buffers are for so many ports.
    fn share(&mut self, ports: usize) {
        let ports = ports.max(1);
        self.sure = (self.frames.capacity() / KEPT / ports).max(1);
        self.kept = self.sure * ports;
    }

    /// Whether nobody else holds a buffer. A look only: it leaves the cache line to who does.
    fn is_free(&self, at: usize) -> bool {
        self.frames.get(at).is_some_and(|frame| Arc::strong_count(frame) == 1)
    }

    /// A buffer that nobody else holds. It is made if there are fewer than there may be.
    fn take(&mut self) -> Option<&mut Arc<Stored>> {
        if self.exhausted {
            return None;
        }
        let count = self.frames.len();
        let mut tried = (self.next..count).chain(0..self.next.min(count));
        let soon = tried.by_ref().take(LOOKS).find(|at| self.is_free(*at));
        let at = match soon {
            Some(at) => at,
            None if count < self.frames.capacity() => {
                self.frames.push(Arc::new(Stored::new(self.size)));
                self.holders.push(0);
                count
            }
            None => match tried.find(|at| self.is_free(*at)) {
                Some(at) => at,
                None => {
                    self.exhausted = true;
                    return None;
                }
            },
        };
        self.release(at);
        self.next = at + 1;
        self.last = at;
        self.frames.get_mut(at)
    }

    /// Nobody holds a buffer any more.
    fn release(&mut self, at: usize) {
        let Some(holders) = self.holders.get_mut(at) else { return };
        let mut left = std::mem::take(holders);
        self.used -= usize::from(left != 0);
        while left != 0 {
            if let Some(held) = self.held.get_mut(left.trailing_zeros() as usize) {
                *held -= 1;
            }
            left &= left - 1;
        }
    }

    /// Whether a port may have the buffer that was taken last. If it seems not to, what is known of all
    /// is brought up to date; who asks does so once in a batch.
    fn admits(&mut self, port: u8) -> bool {
        if self.has_share(port) {
            return true;
        }
        for at in 0..self.holders.len() {
            let held = self.holders.get(at).is_some_and(|holders| *holders != 0);
            if held && at != self.last && self.is_free(at) {
                self.release(at);
            }
        }
        self.has_share(port)
    }

    /// By what is known: a port is sure of some buffers. Beyond that it may hold some times as many as
    /// are left to all, so that there are always some left, however many ports keep theirs.
    fn has_share(&self, port: u8) -> bool {
        let held = self.held.get(usize::from(port)).copied().map_or(usize::MAX, usize::from);
        let left = (self.frames.capacity() - self.used).saturating_sub(self.kept);
        held < self.sure || held < SHARE * left
    }

    /// A port has the buffer that was taken last.
    fn hold(&mut self, port: u8) {
        let (Some(holders), Some(held)) =
            (self.holders.get_mut(self.last), self.held.get_mut(usize::from(port)))
        else {
            return;
        };
        if *holders >> port & 1 == 0 {
            self.used += usize::from(*holders == 0);
            *holders |= 1 << port;
            *held += 1;
        }
    }

    /// Goes back to the first buffers, which are still in the processor's cache, if all are free, as
    /// they are where receivers keep up. Otherwise the way from there would lead over those that are
    /// held, which is slow: another processor has just written to them. Receivers free them in order,
    /// so the last tells of all.
    fn rewind(&mut self) {
        self.exhausted = false;
        if self.next > 0 && self.is_free(self.next - 1) && self.is_free(0) {
            self.next = 0;
        }
    }
}

impl Pool {
    pub(super) fn new() -> Self {
        let (shorts, longs) = (Ring::new(SHORTS, SHORT), Ring::new(LONGS, MAX_FRAME));
        Self { shorts, longs, last_is_long: false }
    }

    fn last_ring(&mut self) -> &mut Ring {
        if self.last_is_long { &mut self.longs } else { &mut self.shorts }
    }

    /// The buffers are for so many ports.
    pub(super) fn share(&mut self, ports: usize) {
        self.shorts.share(ports);
        self.longs.share(ports);
    }

    /// The frame that was stored last.
    pub(super) fn last(&self) -> Option<&Arc<Stored>> {
        let ring = if self.last_is_long { &self.longs } else { &self.shorts };
        ring.frames.get(ring.last)
    }

    /// Whether a port may have it.
    pub(super) fn admits(&mut self, port: u8) -> bool {
        self.last_ring().admits(port)
    }

    /// A port has it.
    pub(super) fn hold(&mut self, port: u8) {
        self.last_ring().hold(port);
    }

    /// Nobody had room for the frame that was stored last: its buffer is the next. Without that, the
    /// way to it would lead over all that are held.
    pub(super) fn take_back(&mut self) {
        let ring = self.last_ring();
        ring.next = ring.next.saturating_sub(1);
    }

    /// A batch has ended.
    pub(super) fn rewind(&mut self) {
        self.shorts.rewind();
        self.longs.rewind();
    }

    /// Takes a frame in: reads it once out of its buffers and decides where it belongs. `longest`
    /// is the longest without tags, in bytes, that need not be cut.
    ///
    /// # Safety
    /// The frame's buffers must be readable memory.
    pub(super) unsafe fn store(
        &mut self,
        frame: &Frame<'_>,
        vlan: &PortVlan,
        longest: usize,
    ) -> Result<(Header, Tci), Dropped> {
        frame.check()?;
        let len = frame.len as usize;
        let mut start = [0; ETHERNET_HEADER + TAG];
        let mut from = Cursor::new(frame.buffers);
        let begin = start.get_mut(..len.min(ETHERNET_HEADER + TAG)).unwrap_or_default();
        // SAFETY: the caller vouches for the buffers, and `start` is ours.
        unsafe { from.read(begin) };
        let header = Header::parse(&start, len).ok_or(Dropped::Malformed)?;
        if !header.is_forwarded() {
            return Err(Dropped::Refused);
        }
        let tci = vlan.classify(header.tag, header.inner).ok_or(Dropped::Refused)?;
        if frame.len as usize > longest + header.tags && frame.offload.segments.is_none() {
            return Err(Dropped::Refused);
        }
        // What is kept of the start, and how much of the frame is behind it.
        let (mut kept, mut kept_len, mut offload) = (start, begin_len(len), frame.offload);
        if header.tag.is_some() {
            kept.copy_within(ADDRESSES + TAG.., ADDRESSES);
            kept_len -= TAG;
            offload = moved(offload, -(TAG as i32)).ok_or(Dropped::Malformed)?;
        }
        let len = kept_len + (len - begin_len(len));
        if !offload.fits(len) {
            return Err(Dropped::Malformed);
        }
        self.last_is_long = len > SHORT;
        let arc = self.last_ring().take().ok_or(Dropped::NoRoom)?;
        let stored = Arc::get_mut(arc).ok_or(Dropped::NoRoom)?;
        let bytes = stored.bytes.get_mut(..len).ok_or(Dropped::Malformed)?;
        let (to_start, to_rest) = bytes.split_at_mut_checked(kept_len).ok_or(Dropped::Malformed)?;
        to_start.copy_from_slice(kept.get(..kept_len).unwrap_or_default());
        // SAFETY: the caller vouches for the buffers; the pool is no part of them.
        unsafe { from.read(to_rest) };
        (stored.len, stored.tci, stored.offload) = (len, tci, offload);
        stored.inner = header.inner;
        Ok((header, tci))
    }
}

/// How many bytes of a frame are looked at first.
fn begin_len(len: usize) -> usize {
    len.min(ETHERNET_HEADER + TAG)
}

/// A frame on its way out: its headers, its payload, and a tag between the addresses and the rest
/// if it gets one.
pub(super) struct Leaving<'a> {
    pub(super) headers: &'a [u8],
    pub(super) payload: &'a [u8],
    pub(super) tag: Option<Tci>,
}

impl Leaving<'_> {
    /// In bytes.
    pub(super) fn len(&self) -> usize {
        self.headers.len() + self.payload.len() + if self.tag.is_some() { TAG } else { 0 }
    }

    /// Writes the frame into buffers that have room for it.
    ///
    /// # Safety
    /// The buffers behind `to` must be writable memory.
    pub(super) unsafe fn write(&self, mut to: Cursor<'_>) {
        let (addresses, rest) = self.headers.split_at(ADDRESSES.min(self.headers.len()));
        let mut tag = [0; TAG];
        let tag = self.tag.map_or(&[][..], |Tci(tci)| {
            tag = [TAG_TYPE[0], TAG_TYPE[1], tci.to_be_bytes()[0], tci.to_be_bytes()[1]];
            &tag
        });
        for bytes in [addresses, tag, rest, self.payload] {
            // SAFETY: the caller vouches for the buffers; what is written is the switch's.
            unsafe { to.write(bytes) };
        }
    }
}

/// What is left to do to a frame that leaves with that tag.
pub(super) fn leaving_offload(offload: Offload, tag: Option<Tci>) -> Option<Offload> {
    match tag {
        Some(_) => moved(offload, TAG as i32),
        None => Some(offload),
    }
}

/// A number that frames of one flow have in common.
pub(super) fn flow(bytes: &[u8]) -> u32 {
    let kind = bytes.get(12..14).unwrap_or_default();
    // Addresses and, of TCP and UDP, ports; of what is neither, the Ethernet addresses.
    let (addresses, ports) = match kind {
        [0x08, 0x00] => {
            let header = bytes.get(14).map_or(0, |byte| usize::from(byte & 15) * 4);
            let whole =
                bytes.get(20..22).is_some_and(|bytes| bytes[0] & 0x3f == 0 && bytes[1] == 0);
            let ported = whole && matches!(bytes.get(23), Some(6 | 17));
            (bytes.get(26..34), ported.then_some(14 + header))
        }
        [0x86, 0xdd] => (bytes.get(22..54), matches!(bytes.get(20), Some(6 | 17)).then_some(54)),
        _ => (bytes.get(..12), None),
    };
    let ports = ports.and_then(|at| bytes.get(at..at + 4)).unwrap_or_default();
    let words = addresses.unwrap_or_default().chunks(4).chain([ports]);
    let hash = words.fold(0u64, |hash, word| {
        let word = word.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    });
    ((hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of the next buffer, by which it is known, and a hold on it.
    fn take(ring: &mut Ring) -> Option<(*const u8, Arc<Stored>)> {
        ring.take().map(|frame| (frame.bytes.as_ptr(), Arc::clone(frame)))
    }

    #[test]
    fn buffers_are_used_again_when_nobody_holds_them() {
        let mut ring = Ring::new(4, 64);
        let (first, one) = take(&mut ring).unwrap();
        let (second, two) = take(&mut ring).unwrap();
        assert_ne!(first, second);
        // Some are held: it goes on behind them.
        drop(one);
        ring.rewind();
        let (third, three) = take(&mut ring).unwrap();
        assert_eq!(third, first, "one is free, so none is made");
        drop((two, three));
        ring.rewind();
        assert_eq!(take(&mut ring).unwrap().0, first);
        // All are held, and no more are to be made.
        let held: Vec<_> = (0..4).map_while(|_| take(&mut ring)).collect();
        assert!(held.len() >= 3 && take(&mut ring).is_none());
        drop(held);
        assert!(take(&mut ring).is_none(), "not in the same batch");
        ring.rewind();
        assert!(take(&mut ring).is_some());
    }

    #[test]
    fn those_that_are_held_for_long_are_not_looked_at_for_each_frame() {
        let mut ring = Ring::new(1000, 64);
        let _held: Vec<_> = (0..300).map(|_| take(&mut ring).unwrap()).collect();
        for _ in 0..2000 {
            ring.take().unwrap();
            ring.rewind();
        }
        // Of the others there are so many that the way over the 300 is rare.
        let count = ring.frames.len();
        assert!((400..=1000).contains(&count), "{count}");
    }

    #[test]
    fn a_buffer_that_nobody_took_is_the_next() {
        let mut pool = Pool::new();
        let held: Vec<_> = (0..100).map(|_| take(&mut pool.shorts).unwrap()).collect();
        let (last, frame) = take(&mut pool.shorts).unwrap();
        drop(frame);
        // Without looking at those that are held.
        for _ in 0..3 {
            pool.take_back();
            assert_eq!(pool.shorts.next, held.len());
            assert_eq!(take(&mut pool.shorts).unwrap().0, last);
        }
    }
}
