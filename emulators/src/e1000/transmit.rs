//! From descriptors to frames: what the guest sends.
//!
//! A frame lies in the buffers of one or more descriptors and goes to the network from there. Only
//! headers in which something has to change are copied: a tag is put in, an IP checksum, or lengths
//! that the NIC leaves out because the frame is to be cut. What the network does not take, cutting
//! and checksums, is done here, on a copy of the frame (a *bench*).
//!
//! Descriptors are read once, when the frame is gathered; what they name is checked then. Packets
//! are given back in order, each when its last frame has left.
//!
//! `unsafe` is the promise to the network that its buffers stay: guest memory, which the worker
//! keeps mapped for longer than its io_uring lives, or the fronts and benches here, which are not
//! touched before their frames have ended.
#![allow(unsafe_code)]

use std::collections::VecDeque;

use backends::net::offload::{Checksum, Segmentation, Segments};
use backends::net::segments::Segmenter;
use backends::net::{
    Buffer, Completions, Dropped, ETHERNET_HEADER, Frame, MAX_BUFFERS, MAX_FRAME, MacAddr, Offload,
    Offloads, Queue,
};
use backends::uring::Uring;
use hypervisor::{Gpa, GuestMemory};

use super::bits::txd;
use super::checksum::{ADDRESSES, TAG, fold, get, insert, put, word};
use super::descriptors::{self, Context, Kind, Raw};
use super::registers::Ring;

/// Frames that can be under way to the network.
pub(super) const FRAMES: u16 = 256;
/// Packets that can be.
const PACKETS: usize = 256;
/// Descriptors that are read in one turn.
const DESCRIPTORS: u32 = 1024;
/// Copies of frames that are worked on.
const BENCHES: usize = 4;
/// The longest headers that are understood; a context cannot say more.
const MAX_HEADERS: usize = 256;

/// What of the NIC's settings is about frames to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The network's MTU, in bytes.
    pub mtu: u16,
    /// What the network takes.
    pub takes: Offloads,
    /// Whether tags are put in, and the type in front of them.
    pub tags: bool,
    pub tag_type: u16,
}

/// Where the engine's frames go.
pub(super) struct Way<'a> {
    pub queue: &'a mut dyn Queue,
    pub uring: &'a mut Uring,
    pub done: &'a mut Completions,
}

/// What is to be counted, or done, because of what was sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    /// Length, and whom it was for, of each frame that the guest has sent.
    pub frames: Vec<(u32, MacAddr)>,
    /// Those of them that were to be cut.
    pub cut: u32,
    /// Packets that made no sense.
    pub malformed: u32,
    /// Descriptors were written back whose driver wants to hear of it: at once or later.
    pub report_now: bool,
    pub report_later: bool,
}

impl Tally {
    pub(super) fn clear(&mut self) {
        self.frames.clear();
        (self.cut, self.malformed) = (0, 0);
        (self.report_now, self.report_later) = (false, false);
    }
}

/// What a packet's descriptors have said so far.
#[derive(Clone, Debug, Default)]
struct Gathered {
    /// The first descriptor, contexts before the packet included, and how many.
    first: u32,
    descriptors: u32,
    pieces: Vec<(u64, u32)>,
    len: usize,
    /// The first of its data descriptors, if these are extended: POPTS, and whether it is to be cut.
    options: Option<(u8, bool)>,
    /// A legacy checksum: where it begins and where it goes.
    legacy: Option<(usize, usize)>,
    tag: Option<u16>,
    /// It is all there.
    whole: bool,
    bad: bool,
    reports: Reports,
}

/// Which of a packet's descriptors are to be written back.
#[derive(Clone, Copy, Debug, Default)]
struct Reports {
    last: bool,
    others: bool,
    /// The driver can wait for the last one's.
    later: bool,
}

/// A packet that was taken from the ring.
#[derive(Clone, Copy, Debug)]
struct Packet {
    first: u32,
    descriptors: u32,
    reports: Reports,
    /// Its frames that have not ended.
    frames: u32,
    /// It has no others.
    sealed: bool,
}

/// A frame under way.
#[derive(Clone, Copy, Debug)]
struct Outgone {
    /// The number of its packet, if that is of the ring as it is now.
    packet: Option<u64>,
    bench: Option<usize>,
}

/// The changed front of a frame.
struct Front([u8; MAX_HEADERS + TAG]);

/// A frame's copy, with room for a tag before it.
struct Bench {
    bytes: Box<[u8]>,
    /// Frames that lie in it.
    users: u32,
}

/// A packet that is being cut here.
struct Cutting {
    packet: u64,
    bench: usize,
    /// Where the frame lies in the bench.
    start: usize,
    end: usize,
    segmenter: Segmenter,
}

/// What is done to a frame before the network gets it.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    /// An IP checksum: start, place, end.
    ip: Option<(usize, usize, usize)>,
    /// The same of TCP or UDP.
    transport: Option<(usize, usize, usize)>,
    /// It is to be cut, its headers so long.
    cut: Option<usize>,
}

struct Malformed;

/// See the module's documentation.
pub(super) struct Transmit {
    epoch: u32,
    /// The next descriptor to read.
    fetch: u32,
    /// The last context of packets that are not cut, and that of those that are.
    contexts: [Context; 2],
    gathered: Gathered,
    packets: VecDeque<Packet>,
    /// The number of the first of them.
    first: u64,
    frames: Box<[Outgone]>,
    free: Vec<u16>,
    fronts: Box<[Front]>,
    benches: [Bench; BENCHES],
    cutting: Option<Cutting>,
    buffers: Vec<Buffer>,
    pub tally: Tally,
}

impl Transmit {
    pub(super) fn new() -> Self {
        let frames = usize::from(FRAMES);
        let bench = || Bench { bytes: vec![0; MAX_FRAME + TAG].into(), users: 0 };
        Self {
            epoch: 0,
            fetch: 0,
            contexts: [Context::default(); 2],
            gathered: Gathered::default(),
            packets: VecDeque::with_capacity(PACKETS),
            first: 0,
            frames: vec![Outgone { packet: None, bench: None }; frames].into(),
            free: (0..FRAMES).rev().collect(),
            fronts: (0..frames).map(|_| Front([0; _])).collect(),
            benches: std::array::from_fn(|_| bench()),
            cutting: None,
            buffers: Vec::with_capacity(MAX_BUFFERS + 1),
            tally: Tally::default(),
        }
    }

    /// Begins anew if the ring is another one.
    pub(super) fn follow(&mut self, ring: &Ring) {
        if self.epoch == ring.epoch {
            return;
        }
        self.epoch = ring.epoch;
        self.fetch = ring.head;
        self.gathered = Gathered::default();
        self.first += self.packets.len() as u64;
        self.packets.clear();
        for frame in &mut self.frames {
            frame.packet = None;
        }
        if let Some(Cutting { bench, .. }) = self.cutting.take() {
            self.leave(bench);
        }
    }

    /// Takes what is in the ring and sends it. Returns how many descriptors that were.
    pub(super) fn run(
        &mut self,
        ring: &Ring,
        limits: &Limits,
        memory: &GuestMemory,
        way: &mut Way<'_>,
    ) -> u32 {
        let mut taken = 0;
        loop {
            if !self.cut_on(way) {
                return taken;
            }
            if self.gathered.whole {
                if self.packets.len() >= PACKETS || !self.dispatch(limits, memory, way) {
                    return taken;
                }
                continue;
            }
            if taken >= DESCRIPTORS || ring.available(self.fetch) == 0 {
                return taken;
            }
            let Ok(raw) = memory.read_obj::<Raw>(Gpa(ring.address(self.fetch))) else {
                // There is no ring, and nobody to tell. All that it was said to hold is gone.
                self.tally.malformed += 1;
                self.fetch = ring.tail;
                return taken + 1;
            };
            self.gather(raw);
            // A packet cannot have more than there are, unless the guest moves the tail behind it.
            if self.gathered.descriptors >= ring.count {
                (self.gathered.bad, self.gathered.whole) = (true, true);
            }
            self.fetch = ring.next(self.fetch);
            taken += 1;
        }
    }

    /// Adds a descriptor to the packet that is gathered.
    fn gather(&mut self, raw: Raw) {
        let index = self.fetch;
        let Self { gathered, contexts, .. } = self;
        if gathered.descriptors == 0 {
            *gathered = Gathered {
                first: index,
                pieces: std::mem::take(&mut gathered.pieces),
                ..Gathered::default()
            };
            gathered.pieces.clear();
        }
        gathered.descriptors += 1;
        // What was the last one no longer is.
        gathered.reports.others |= gathered.reports.last;
        let command = raw.command();
        gathered.reports.last = command & txd::RS != 0;
        let (address, len, special) = match raw.kind() {
            Kind::Context(context) => {
                contexts[usize::from(context.tucmd() & txd::TSE != 0)] = context;
                return;
            }
            Kind::Unknown => {
                gathered.bad = true;
                gathered.whole = command & txd::EOP != 0;
                return;
            }
            Kind::Legacy(legacy) => {
                if command & (txd::EOP | txd::IC) == txd::EOP | txd::IC {
                    let (start, place) = (legacy.checksum_start, legacy.checksum_offset);
                    gathered.legacy = Some((start.into(), place.into()));
                }
                (legacy.address, legacy.length.into(), legacy.special)
            }
            Kind::Data(data) => {
                gathered.options.get_or_insert((data.options, command & txd::TSE != 0));
                (data.address, data.length(), data.special)
            }
        };
        if len > 0 {
            gathered.len += len as usize;
            if gathered.len > MAX_FRAME {
                gathered.bad = true;
            }
            // A frame of the greatest length in the smallest pieces that make sense.
            if gathered.pieces.len() < 4 * MAX_BUFFERS && !gathered.bad {
                gathered.pieces.push((address, len));
            } else {
                gathered.bad = true;
            }
        }
        if command & txd::EOP != 0 {
            gathered.whole = true;
            gathered.tag = (command & txd::VLE != 0).then_some(special);
            gathered.reports.later = command & txd::IDE != 0;
        }
    }

    /// Sends the packet that was gathered. False: it has to wait.
    fn dispatch(&mut self, limits: &Limits, memory: &GuestMemory, way: &mut Way<'_>) -> bool {
        let number = self.first + self.packets.len() as u64;
        let Gathered { first, descriptors, reports, .. } = self.gathered;
        let mut packet = Packet { first, descriptors, reports, frames: 0, sealed: true };
        match self.send(number, limits, memory, way) {
            Ok(Some((frames, sealed))) => {
                packet.frames = frames;
                packet.sealed = sealed;
            }
            Ok(None) => return false,
            Err(Malformed) => self.tally.malformed += 1,
        }
        self.packets.push_back(packet);
        (self.gathered.descriptors, self.gathered.whole) = (0, false);
        true
    }

    /// Returns how many frames there are, and whether those are all. `None`: there is no room.
    fn send(
        &mut self,
        number: u64,
        limits: &Limits,
        memory: &GuestMemory,
        way: &mut Way<'_>,
    ) -> Result<Option<(u32, bool)>, Malformed> {
        let len = self.gathered.len;
        if self.gathered.bad || len < ETHERNET_HEADER {
            return Err(Malformed);
        }
        let tag = self.gathered.tag.filter(|_| limits.tags);
        let work = self.work()?;
        if work.cut.is_none() && len > ETHERNET_HEADER + TAG + usize::from(limits.mtu) {
            return Err(Malformed);
        }
        let Some(&slot) = self.free.last() else { return Ok(None) };
        let mut to = [0; 6];
        self.read(0, &mut to, memory)?;
        let sent = if let Some((offload, copied)) = self.plain(&work, limits) {
            let (offload, copied) = self.front(slot, &work, offload, copied, memory, limits)?;
            let mut frame_len = len;
            if let Some(tci) = tag {
                self.put_tag(slot, copied, limits.tag_type, tci)?;
                frame_len += TAG;
            }
            let in_front = copied + if tag.is_some() { TAG } else { 0 };
            let offload = if tag.is_some() { shifted(offload) } else { offload };
            if frame_len > MAX_FRAME {
                return Err(Malformed);
            }
            self.buffers.clear();
            if in_front > 0 {
                let front = self.fronts.get_mut(usize::from(slot)).ok_or(Malformed)?;
                self.buffers.push(front.0.get_mut(..in_front).ok_or(Malformed)?.into());
            }
            self.rest(copied, memory)?;
            if self.buffers.len() <= MAX_BUFFERS && limits.takes.contains(offload.needs()) {
                self.hand_over(number, None, frame_len, offload, way);
                Some((1, true))
            } else {
                self.bench(number, &work, tag, limits, memory, way)?
            }
        } else {
            self.bench(number, &work, tag, limits, memory, way)?
        };
        if sent.is_some() {
            self.tally.frames.push((len as u32, MacAddr(to)));
            self.tally.cut += u32::from(work.cut.is_some());
        }
        Ok(sent)
    }

    /// What the packet's first descriptor and its context ask for.
    fn work(&self) -> Result<Work, Malformed> {
        let len = self.gathered.len;
        let mut work = Work::default();
        if let Some((start, place)) = self.gathered.legacy {
            work.transport = Some((start, place, len));
        }
        let Some((options, cut)) = self.gathered.options else { return Ok(work) };
        let context = &self.contexts[usize::from(cut)];
        if cut {
            let headers = usize::from(context.header_len);
            if headers > len || context.segment_size == 0 {
                return Err(Malformed);
            }
            work.cut = Some(headers);
            return Ok(work);
        }
        let span = |start: u8, place: u8, end: u16| {
            let end = if end == 0 { len } else { usize::from(end) + 1 };
            (usize::from(start), usize::from(place), end)
        };
        let Context { ip_start, ip_offset, ip_end, .. } = *context;
        let Context { transport_start, transport_offset, transport_end, .. } = *context;
        if options & txd::POPTS_IXSM != 0 {
            work.ip = Some(span(ip_start, ip_offset, ip_end));
        }
        if options & txd::POPTS_TXSM != 0 {
            work.transport = Some(span(transport_start, transport_offset, transport_end));
        }
        for (_, place, end) in work.ip.iter().chain(&work.transport) {
            if *end > len || place + 2 > len {
                return Err(Malformed);
            }
        }
        Ok(work)
    }

    /// What is left to the network, and how many bytes have to be copied for the rest; `None` if that
    /// takes a copy of the whole.
    fn plain(&self, work: &Work, limits: &Limits) -> Option<(Offload, usize)> {
        let mut offload = Offload::NONE;
        let mut copied = 0;
        if let Some(headers) = work.cut {
            return Some((offload, headers));
        }
        if let Some((_, _, end)) = work.ip {
            copied = end;
        }
        if let Some((start, place, end)) = work.transport {
            let offset = place.checked_sub(start)?;
            if end != self.gathered.len || start < ETHERNET_HEADER {
                return None;
            }
            let (start, offset) = (u16::try_from(start).ok()?, u16::try_from(offset).ok()?);
            offload.checksum = Checksum::Partial { start, offset };
        }
        if self.gathered.tag.is_some() && limits.tags {
            copied = copied.max(ADDRESSES);
        }
        (copied <= MAX_HEADERS).then_some((offload, copied))
    }

    /// Copies the first bytes of the frame and changes them.
    fn front(
        &mut self,
        slot: u16,
        work: &Work,
        offload: Offload,
        copied: usize,
        memory: &GuestMemory,
        limits: &Limits,
    ) -> Result<(Offload, usize), Malformed> {
        if copied == 0 {
            return Ok((offload, 0));
        }
        let mut headers = [0; MAX_HEADERS];
        let headers = headers.get_mut(..copied).ok_or(Malformed)?;
        self.read(0, headers, memory)?;
        let mut offload = offload;
        if work.cut.is_some() {
            offload = complete(headers, self.gathered.len, &self.contexts[1], limits.takes)
                .ok_or(Malformed)?;
        } else if let Some((start, place, end)) = work.ip {
            insert(headers, start, place, end).ok_or(Malformed)?;
        }
        let front = self.fronts.get_mut(usize::from(slot)).ok_or(Malformed)?;
        front.0.get_mut(..copied).ok_or(Malformed)?.copy_from_slice(headers);
        Ok((offload, copied))
    }

    /// Puts a tag behind the addresses in a frame's front.
    fn put_tag(
        &mut self,
        slot: u16,
        copied: usize,
        tag_type: u16,
        tci: u16,
    ) -> Result<(), Malformed> {
        let front = self.fronts.get_mut(usize::from(slot)).ok_or(Malformed)?;
        front.0.copy_within(ADDRESSES..copied.max(ADDRESSES), ADDRESSES + TAG);
        put(&mut front.0, ADDRESSES, tag_type).ok_or(Malformed)?;
        put(&mut front.0, ADDRESSES + 2, tci).ok_or(Malformed)
    }

    /// Reads the frame's bytes from `skip` on.
    fn read(&self, skip: usize, into: &mut [u8], memory: &GuestMemory) -> Result<(), Malformed> {
        let mut skip = skip;
        let mut left = into;
        for (address, len) in &self.gathered.pieces {
            if left.is_empty() {
                break;
            }
            let len = *len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let (now, later) = left.split_at_mut((len - skip).min(left.len()));
            let from = address.checked_add(skip as u64).ok_or(Malformed)?;
            memory.read(Gpa(from), now).map_err(|_| Malformed)?;
            skip = 0;
            left = later;
        }
        if left.is_empty() { Ok(()) } else { Err(Malformed) }
    }

    /// Adds the memory of the frame's bytes from `skip` on to the buffers.
    fn rest(&mut self, skip: usize, memory: &GuestMemory) -> Result<(), Malformed> {
        let mut skip = skip;
        for (address, len) in &self.gathered.pieces {
            let len = *len as usize;
            let slice = memory.slice(Gpa(*address), len).ok_or(Malformed)?;
            if skip >= len {
                skip -= len;
                continue;
            }
            let start = slice.ptr_guard_mut().as_ptr().wrapping_add(skip);
            self.buffers.push(Buffer::new(start, len - skip));
            skip = 0;
        }
        Ok(())
    }

    /// Gives the network what is in `buffers`, by the free slot that is next.
    fn hand_over(
        &mut self,
        packet: u64,
        bench: Option<usize>,
        len: usize,
        offload: Offload,
        way: &mut Way<'_>,
    ) {
        let Some(slot) = self.free.pop() else { return };
        if let Some(place) = self.frames.get_mut(usize::from(slot)) {
            *place = Outgone { packet: Some(packet), bench };
        }
        let frame = Frame { id: slot.into(), len: len as u32, buffers: &self.buffers, offload };
        // SAFETY: see the module's documentation.
        unsafe { way.queue.send(frame, way.uring, way.done) };
    }

    /// Sends a copy of the packet, on which all is done that there is to do.
    fn bench(
        &mut self,
        number: u64,
        work: &Work,
        tag: Option<u16>,
        limits: &Limits,
        memory: &GuestMemory,
        way: &mut Way<'_>,
    ) -> Result<Option<(u32, bool)>, Malformed> {
        let free = self.benches.iter().position(|bench| bench.users == 0);
        let Some(index) = free else { return Ok(None) };
        let len = self.gathered.len;
        let mut bytes = match self.benches.get_mut(index) {
            Some(bench) => std::mem::take(&mut bench.bytes),
            None => return Err(Malformed),
        };
        let prepared = self.prepare(&mut bytes, work, tag, limits, memory);
        let Some(bench) = self.benches.get_mut(index) else { return Err(Malformed) };
        bench.bytes = bytes;
        let offload = prepared?;
        let (start, end) = (if tag.is_some() { 0 } else { TAG }, TAG + len);
        let frame = bench.bytes.get_mut(start..end).ok_or(Malformed)?;
        if limits.takes.contains(offload.needs()) {
            self.buffers.clear();
            self.buffers.push(frame.into());
            bench.users += 1;
            self.hand_over(number, Some(index), end - start, offload, way);
            return Ok(Some((1, true)));
        }
        let segmenter = Segmenter::new(frame, &offload).map_err(|_: Dropped| Malformed)?;
        // The cutting itself is a user.
        bench.users += 1;
        self.cutting = Some(Cutting { packet: number, bench: index, start, end, segmenter });
        Ok(Some((0, false)))
    }

    /// Copies the packet behind the room for a tag and does what is not about single segments.
    fn prepare(
        &self,
        bytes: &mut [u8],
        work: &Work,
        tag: Option<u16>,
        limits: &Limits,
        memory: &GuestMemory,
    ) -> Result<Offload, Malformed> {
        let len = self.gathered.len;
        let frame = bytes.get_mut(TAG..TAG + len).ok_or(Malformed)?;
        self.read(0, frame, memory)?;
        let mut offload = Offload::NONE;
        if let Some(headers) = work.cut {
            let headers = frame.get_mut(..headers).ok_or(Malformed)?;
            offload = complete(headers, len, &self.contexts[1], Offloads::ALL).ok_or(Malformed)?;
        }
        if let Some((start, place, end)) = work.ip {
            insert(frame, start, place, end).ok_or(Malformed)?;
        }
        if let Some((start, place, end)) = work.transport {
            insert(frame, start, place, end).ok_or(Malformed)?;
            // Which would mean, in UDP, that there is none.
            if get(frame, place) == Some(0) {
                put(frame, place, 0xffff).ok_or(Malformed)?;
            }
        }
        if let Some(tci) = tag {
            bytes.copy_within(TAG..TAG + ADDRESSES, 0);
            put(bytes, ADDRESSES, limits.tag_type).ok_or(Malformed)?;
            put(bytes, ADDRESSES + 2, tci).ok_or(Malformed)?;
            offload = shifted(offload);
        }
        Ok(offload)
    }

    /// Sends segments of the packet that is being cut. False: there are more than there is room for.
    fn cut_on(&mut self, way: &mut Way<'_>) -> bool {
        let Some(mut cutting) = self.cutting.take() else { return true };
        let Cutting { packet, bench, start, end, .. } = cutting;
        loop {
            let Some(&slot) = self.free.last() else {
                self.cutting = Some(cutting);
                return false;
            };
            let Some(place) = self.benches.get_mut(bench) else { break };
            let Some(frame) = place.bytes.get_mut(start..end) else { break };
            let Some(segment) = cutting.segmenter.next(frame) else { break };
            let len = segment.len();
            let Some(front) = self.fronts.get_mut(usize::from(slot)) else { break };
            let Some(headers) = front.0.get_mut(..segment.headers.len()) else { break };
            headers.copy_from_slice(segment.headers);
            self.buffers.clear();
            self.buffers.push(headers.into());
            let payload = frame.get_mut(segment.payload).unwrap_or_default();
            if !payload.is_empty() {
                self.buffers.push(payload.into());
            }
            place.users += 1;
            if let Some(packet) = self.packet(packet) {
                packet.frames += 1;
            }
            self.hand_over(packet, Some(bench), len, Offload::NONE, way);
        }
        if let Some(packet) = self.packet(packet) {
            packet.sealed = true;
        }
        self.leave(bench);
        true
    }

    fn packet(&mut self, number: u64) -> Option<&mut Packet> {
        self.packets.get_mut(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    /// A frame no longer lies in a bench.
    fn leave(&mut self, bench: usize) {
        if let Some(bench) = self.benches.get_mut(bench) {
            bench.users = bench.users.saturating_sub(1);
        }
    }

    /// A frame has ended.
    pub(super) fn sent(&mut self, id: u32) {
        let Some(frame) = self.frames.get_mut(id as usize) else { return };
        let Outgone { packet, bench } =
            std::mem::replace(frame, Outgone { packet: None, bench: None });
        self.free.push(id as u16);
        if let Some(bench) = bench {
            self.leave(bench);
        }
        if let Some(packet) = packet.and_then(|number| self.packet(number)) {
            packet.frames = packet.frames.saturating_sub(1);
        }
    }

    /// Gives packets that have left back to the guest. Returns the head of the ring, if it has moved.
    pub(super) fn write_back(&mut self, ring: &Ring, memory: &GuestMemory) -> Option<u32> {
        let mut head = None;
        while let Some(packet) = self.packets.front() {
            if packet.frames > 0 || !packet.sealed {
                break;
            }
            let Packet { first, descriptors, reports, .. } = *packet;
            self.packets.pop_front();
            self.first += 1;
            let mut index = first;
            for left in (0..descriptors).rev() {
                let reports = if left == 0 {
                    reports.last
                } else {
                    reports.others && self.asks_for_report(ring, index, memory)
                };
                if reports {
                    let status = Gpa(ring.address(index).wrapping_add(descriptors::STATUS));
                    // A ring that is not there any more is not written to.
                    let _ = memory.write(status, &[txd::DD]);
                }
                index = ring.next(index);
            }
            if reports.last || reports.others {
                let later = reports.later && !reports.others;
                self.tally.report_later |= later;
                self.tally.report_now |= !later;
            }
            head = Some(index);
        }
        head
    }

    /// Whether a descriptor says that it is to be written back. It may have changed since; that only
    /// concerns who has changed it.
    fn asks_for_report(&self, ring: &Ring, index: u32, memory: &GuestMemory) -> bool {
        let raw = memory.read_obj::<Raw>(Gpa(ring.address(index)));
        raw.is_ok_and(|raw| raw.command() & txd::RS != 0)
    }
}

/// The same of a frame that has got a tag.
fn shifted(mut offload: Offload) -> Offload {
    if let Checksum::Partial { start, .. } = &mut offload.checksum {
        *start += TAG as u16;
    }
    if let Some(segments) = &mut offload.segments {
        segments.header_len += TAG as u16;
    }
    offload
}

/// Makes the headers of a packet that is to be cut what they would be if there were such long
/// packets. Drivers leave IP's length out, and TCP's or UDP's in the sum of the pseudo-header, as the
/// NIC puts each segment's there; a network wants them all.
fn complete(headers: &mut [u8], len: usize, context: &Context, takes: Offloads) -> Option<Offload> {
    let (ip, transport) = (usize::from(context.ip_start), usize::from(context.transport_start));
    let (tcp, v4) = (context.tucmd() & txd::TUCMD_TCP != 0, context.tucmd() & txd::TUCMD_IP != 0);
    if ip < ETHERNET_HEADER {
        return None;
    }
    let ip_len = u16::try_from(len.checked_sub(ip)?).ok()?;
    let version = *headers.get(ip)? >> 4;
    if v4 {
        let header_len = usize::from(*headers.get(ip)? & 0xf) * 4;
        if version != 4 || header_len < 20 || transport != ip + header_len {
            return None;
        }
        put(headers, ip + 2, ip_len)?;
        put(headers, ip + 10, 0)?;
        insert(headers, ip, ip + 10, transport)?;
    } else {
        if version != 6 || transport < ip + 40 {
            return None;
        }
        put(headers, ip + 4, ip_len.checked_sub(40)?)?;
    }
    let (transport_len, offset) =
        if tcp { (usize::from(*headers.get(transport + 12)? >> 4) * 4, 16) } else { (8, 6) };
    if tcp && transport_len < 20 || transport + transport_len != headers.len() {
        return None;
    }
    let segment_len = u16::try_from(len - transport).ok()?;
    let place = transport + offset;
    if !tcp {
        put(headers, transport + 4, segment_len)?;
    }
    let seed = fold(word(get(headers, place)?) + word(segment_len));
    put(headers, place, seed)?;
    let size = context.segment_size;
    let kind = match (tcp, v4) {
        (false, _) => Segmentation::Udp,
        (true, true) => Segmentation::Tcp4,
        (true, false) => Segmentation::Tcp6,
    };
    // CWR
    let ecn = tcp && *headers.get(transport + 13)? & 0x80 != 0;
    let segments = (len - headers.len() > usize::from(size)).then_some(Segments {
        kind,
        ecn: ecn && takes.contains(Offloads::TSO_ECN),
        size,
        header_len: headers.len() as u16,
    });
    let checksum = Checksum::Partial { start: transport as u16, offset: offset as u16 };
    Some(Offload { checksum, segments })
}
