//! From frames to descriptors: what the guest receives.
//!
//! The network fills buffers of the NIC's own, long enough for any frame, so that nothing is in the
//! guest's memory that the guest has not asked for, and so that a long frame can be taken from the
//! network in one piece: what is to be cut is cut, and what has no checksum gets one, while it is
//! copied into the guest's buffers. Frames for which there are no descriptors wait here, and then in
//! the network.
//!
//! `unsafe` is the promise to the network that its buffers stay: they are made once and dropped after
//! its queue and the io_uring.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use backends::net::checksum::get;
use backends::net::offload::Checksum;
use backends::net::segments::Segmenter;
use backends::net::{MAX_FRAME, MacAddr, Offload};
use hypervisor::{Gpa, GuestMemory};

use super::bits::{rctl, rxcsum, rxd};
use super::checksum::{ADDRESSES, Checksums, TAG};
use super::descriptors::{self, Received};
use super::filter::{CHECK_SEQUENCE, Settings};
use super::registers::Ring;
use super::transmit::Way;

/// Buffers that lie with the network.
pub(super) const BUFFERS: u16 = 64;
/// Buffers for what the NIC sends to itself, which are made when it first does.
pub(super) const INSIDE_BUFFERS: u16 = 32;
/// Frames that are handed on in one turn, segments each.
const FRAMES: u32 = 256;
/// The shortest frame that a guest is to see, without check sequence.
const SHORTEST: usize = 60;
/// The longest headers of segments.
const MAX_HEADERS: usize = 256;

/// What is to be counted, or done, because of what was received.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    /// Length, and whom it was for, of each frame that the guest has got.
    pub frames: Vec<(u32, MacAddr)>,
    /// Frames that it does not want.
    pub unwanted: u32,
    /// Frames that were too long for it.
    pub too_long: u32,
    /// Frames that were lost for its descriptors, or made no sense themselves.
    pub lost: u32,
    /// Few descriptors are left.
    pub few_left: bool,
    /// A frame waits for descriptors.
    pub starved: bool,
}

impl Tally {
    pub(super) fn clear(&mut self) {
        self.frames.clear();
        (self.unwanted, self.too_long, self.lost) = (0, 0, 0);
        (self.few_left, self.starved) = (false, false);
    }
}

/// A frame in a buffer.
struct Arrived {
    buffer: u32,
    len: usize,
    offload: Offload,
}

/// A frame that is handed on, in segments if it is to be cut.
struct Current {
    arrived: Arrived,
    segmenter: Segmenter,
    /// The most that a segment may have, and the most that the guest takes.
    longest: usize,
    limit: usize,
    checksums: Checksums,
    to: MacAddr,
}

/// Whether a buffer is one of the inside's.
fn is_inside(buffer: u32) -> bool {
    buffer >= u32::from(BUFFERS)
}

/// A buffer is free again.
fn release(buffer: u32, free: &mut Vec<u32>, free_inside: &mut Vec<u32>) {
    if is_inside(buffer) { free_inside.push(buffer) } else { free.push(buffer) }
}

/// Lends out free buffers.
fn offer(buffers: &mut [Box<[u8]>], free: &mut Vec<u32>, way: &mut Way<'_>) {
    for id in free.drain(..) {
        let Some(buffer) = buffers.get_mut(id as usize) else { continue };
        // SAFETY: see the module's documentation; nobody looks at the buffer before it is back.
        unsafe { way.queue.offer(id, &[(&mut **buffer).into()], way.uring, way.done) };
    }
}

/// See the module's documentation.
pub(super) struct Receive {
    /// The network's, and then those of the inside.
    buffers: Vec<Box<[u8]>>,
    /// Those that are with neither and hold no frame.
    free: Vec<u32>,
    free_inside: Vec<u32>,
    /// Frames come from the inside, and from nowhere else.
    inside: bool,
    arrived: VecDeque<Arrived>,
    current: Option<Current>,
    epoch: u32,
    head: u32,
    pub tally: Tally,
}

impl Receive {
    pub(super) fn new() -> Self {
        Self {
            buffers: (0..BUFFERS).map(|_| vec![0; MAX_FRAME].into()).collect(),
            free: (0..BUFFERS.into()).collect(),
            free_inside: Vec::new(),
            inside: false,
            arrived: VecDeque::with_capacity(BUFFERS.into()),
            current: None,
            epoch: 0,
            head: 0,
            tally: Tally::default(),
        }
    }

    /// Lends the network what is free.
    pub(super) fn offer(&mut self, way: &mut Way<'_>) {
        offer(&mut self.buffers, &mut self.free, way);
    }

    /// Lends the inside what is free.
    pub(super) fn offer_inside(&mut self, way: &mut Way<'_>) {
        offer(&mut self.buffers, &mut self.free_inside, way);
    }

    /// From now on frames come from the inside, or from the network again. What has come from the other
    /// is thrown away.
    pub(super) fn listen(&mut self, inside: bool) {
        if self.inside == inside {
            return;
        }
        self.discard();
        self.inside = inside;
        let first = u32::from(BUFFERS);
        if inside && self.buffers.len() == usize::from(BUFFERS) {
            self.buffers.extend((0..INSIDE_BUFFERS).map(|_| vec![0; MAX_FRAME].into()));
            self.free_inside.extend(first..first + u32::from(INSIDE_BUFFERS));
        }
    }

    /// A buffer has come back empty, or what was in it is done with.
    pub(super) fn returned(&mut self, id: u32) {
        release(id, &mut self.free, &mut self.free_inside);
    }

    /// A frame has come.
    pub(super) fn arrived(&mut self, buffer: u32, len: u32, offload: Offload) {
        if self.inside != is_inside(buffer) {
            self.tally.unwanted += 1;
            return self.returned(buffer);
        }
        self.arrived.push_back(Arrived { buffer, len: len as usize, offload });
    }

    /// Throws away what has come while the guest receives nothing.
    pub(super) fn discard(&mut self) {
        let current = self.current.take().map(|current| current.arrived);
        for arrived in current.into_iter().chain(self.arrived.drain(..)) {
            release(arrived.buffer, &mut self.free, &mut self.free_inside);
            self.tally.unwanted += 1;
        }
    }

    /// Begins anew if the ring is another one.
    pub(super) fn follow(&mut self, ring: &Ring) {
        if self.epoch != ring.epoch {
            self.epoch = ring.epoch;
            self.head = ring.head;
        }
    }

    /// The next descriptor that will be used.
    pub(super) fn head(&self) -> u32 {
        self.head
    }

    /// Hands on what has come, as far as there are descriptors. Returns how many frames were dealt
    /// with.
    pub(super) fn run(&mut self, ring: &Ring, settings: &Settings, memory: &GuestMemory) -> u32 {
        let before = ring.available(self.head);
        let mut count = 0;
        while count < FRAMES {
            if self.current.is_none() {
                let Some(arrived) = self.arrived.pop_front() else { break };
                count += 1;
                match self.look(arrived, settings) {
                    Ok(current) => self.current = Some(current),
                    Err(buffer) => {
                        self.returned(buffer);
                        continue;
                    }
                }
            }
            match self.hand_on(ring, settings, memory) {
                Some(handed) => count += handed,
                None => {
                    self.tally.starved = true;
                    break;
                }
            }
        }
        let after = ring.available(self.head);
        let threshold = ring.count >> ((settings.control >> rctl::RDMTS_SHIFT & 3) + 1);
        self.tally.few_left |= before > threshold && after <= threshold;
        count
    }

    /// Finds out about a frame. One that is not for the guest gives its buffer back.
    fn look(&mut self, arrived: Arrived, settings: &Settings) -> Result<Current, u32> {
        let buffer = arrived.buffer;
        let frame = self.buffers.get(buffer as usize).and_then(|bytes| bytes.get(..arrived.len));
        let Some((frame, to)) = frame.and_then(|frame| Some((frame, *frame.first_chunk::<6>()?)))
        else {
            self.tally.lost += 1;
            return Err(buffer);
        };
        let to = MacAddr(to);
        let tag = if get(frame, ADDRESSES) == Some(settings.tag_type) {
            get(frame, ADDRESSES + 2)
        } else {
            None
        };
        let longest = match arrived.offload.segments {
            Some(segments) => arrived.len.min(usize::from(segments.size) + MAX_HEADERS),
            None => arrived.len,
        };
        if !settings.wants(to, tag) {
            self.tally.unwanted += 1;
            return Err(buffer);
        }
        let limit = settings.longest();
        // Whether segments are too long is known when they are cut.
        if arrived.offload.segments.is_none() && arrived.len > limit {
            self.tally.too_long += 1;
            return Err(buffer);
        }
        let Ok(segmenter) = Segmenter::new(frame, &arrived.offload) else {
            self.tally.lost += 1;
            return Err(buffer);
        };
        let vouched = arrived.offload.checksum != Checksum::Unknown;
        let mut checksums = Checksums::of(frame, settings.tag_type, vouched);
        if arrived.offload.segments.is_some() {
            // The segments' own are made with them.
            checksums.ip = checksums.ip.map(|_| true);
        }
        Ok(Current { arrived, segmenter, longest, limit, checksums, to })
    }

    /// Copies the current frame, or as many of its segments as there is room for, into the guest's
    /// buffers. `None`: there is too little room for the next.
    fn hand_on(&mut self, ring: &Ring, settings: &Settings, memory: &GuestMemory) -> Option<u32> {
        let Self { buffers, free, free_inside, current, head, tally, .. } = self;
        let Some(Current { arrived, segmenter, longest, limit, checksums, to }) = current else {
            return Some(0);
        };
        let frame = buffers.get(arrived.buffer as usize).and_then(|all| all.get(..arrived.len));
        let frame = frame.unwrap_or_default();
        let size = settings.buffer_size() as usize;
        let needed = (longest.saturating_add(CHECK_SEQUENCE).max(SHORTEST)).div_ceil(size) as u32;
        let mut handed = 0;
        loop {
            let available = ring.available(*head);
            if needed > available && needed < ring.count {
                return if handed > 0 { Some(handed) } else { None };
            }
            let Some(segment) = segmenter.next(frame) else { break };
            if needed >= ring.count {
                // No ring of this length will ever have room.
                tally.lost += 1;
                continue;
            }
            let payload = frame.get(segment.payload.clone()).unwrap_or_default();
            let len = segment.len();
            if len > *limit {
                tally.too_long += 1;
                continue;
            }
            let inbound = Inbound::new(segment.headers, payload, settings, checksums);
            match inbound.put(ring, head, size, memory) {
                Ok(()) => tally.frames.push((len as u32, *to)),
                Err(BadDescriptor) => tally.lost += 1,
            }
            handed += 1;
        }
        release(arrived.buffer, free, free_inside);
        *current = None;
        Some(handed)
    }
}

/// A descriptor or its buffer is where no memory is.
struct BadDescriptor;

/// A frame as the guest is to see it.
struct Inbound<'a> {
    /// Its bytes, in order; the last are padding and the check sequence, which nobody has made.
    pieces: [&'a [u8]; 4],
    len: usize,
    status: u8,
    errors: u8,
    special: u16,
}

impl<'a> Inbound<'a> {
    fn new(
        headers: &'a [u8],
        payload: &'a [u8],
        settings: &Settings,
        checksums: &Checksums,
    ) -> Self {
        static NOTHING: [u8; SHORTEST + CHECK_SEQUENCE] = [0; _];
        let (mut status, mut errors, mut special) = (0, 0, 0);
        let (addresses, mut rest) = headers.split_at(ADDRESSES.min(headers.len()));
        let mut payload = payload;
        if settings.tags && get(rest, 0) == Some(settings.tag_type) {
            // A tag's second half lies in the payload, if nothing in the headers was touched.
            let tci = match (get(rest, 2), get(payload, 0)) {
                (Some(tci), _) => {
                    rest = rest.get(TAG..).unwrap_or_default();
                    Some(tci)
                }
                (None, Some(tci)) => {
                    payload = payload.get(2..).unwrap_or_default();
                    rest = &[];
                    Some(tci)
                }
                (None, None) => None,
            };
            if let Some(tci) = tci {
                special = tci;
                status |= rxd::VP;
            }
        }
        let len = addresses.len() + rest.len() + payload.len();
        let has = |bit| settings.checksums & bit != 0;
        if let Some(right) = checksums.ip.filter(|_| has(rxcsum::IPOFL)) {
            status |= rxd::IPCS;
            errors |= if right { 0 } else { rxd::ERROR_IP };
        }
        if let Some(right) = checksums.transport.filter(|_| has(rxcsum::TUOFL)) {
            status |= rxd::TCPCS;
            errors |= if right { 0 } else { rxd::ERROR_TCP };
        }
        if status & (rxd::IPCS | rxd::TCPCS) == 0 {
            status |= rxd::IXSM;
        }
        let keeps_sequence = settings.control & rctl::SECRC == 0;
        let padding =
            SHORTEST.saturating_sub(len) + if keeps_sequence { CHECK_SEQUENCE } else { 0 };
        let padding = NOTHING.get(..padding).unwrap_or_default();
        let pieces = [addresses, rest, payload, padding];
        Self { pieces, len: len + padding.len(), status, errors, special }
    }

    /// Puts it into the ring from `head` on, which has room for it.
    fn put(
        mut self,
        ring: &Ring,
        head: &mut u32,
        size: usize,
        memory: &GuestMemory,
    ) -> Result<(), BadDescriptor> {
        let mut result = Ok(());
        let mut left = self.len;
        while left > 0 {
            let now = left.min(size);
            left -= now;
            let at = ring.address(*head);
            *head = ring.next(*head);
            let address = memory.read_obj::<u64>(Gpa(at)).map_err(|_| BadDescriptor)?;
            let mut errors = self.errors;
            if self.copy(address, now, memory).is_err() {
                errors |= rxd::ERROR_DATA;
                result = Err(BadDescriptor);
            }
            let last = left == 0;
            let written = Received {
                length: now as u16,
                checksum: 0,
                status: self.status | rxd::DD | if last { rxd::EOP } else { 0 },
                errors: if last { errors } else { errors & rxd::ERROR_DATA },
                special: self.special,
            };
            // One store of eight bytes, behind those of the data: who sees DD sees all.
            fence(Ordering::Release);
            let place = Gpa(at.wrapping_add(descriptors::WRITTEN));
            let written: u64 = zerocopy::transmute!(written);
            memory.write_obj(place, &written).map_err(|_| BadDescriptor)?;
        }
        result
    }

    /// Copies the next `len` bytes to `address`. Address 0 is where a driver has put no buffer.
    fn copy(
        &mut self,
        address: u64,
        len: usize,
        memory: &GuestMemory,
    ) -> Result<(), BadDescriptor> {
        let bad = address == 0 || memory.slice(Gpa(address), len).is_none();
        let mut at = address;
        let mut left = len;
        for piece in &mut self.pieces {
            let (now, later) = piece.split_at(left.min(piece.len()));
            *piece = later;
            left -= now.len();
            if !bad && !now.is_empty() {
                memory.write(Gpa(at), now).map_err(|_| BadDescriptor)?;
            }
            at = at.wrapping_add(now.len() as u64);
        }
        if bad { Err(BadDescriptor) } else { Ok(()) }
    }
}
