//! What the guest sends: out of the ring, to the network, and back to the guest.
//!
//! - [`gather`]: descriptors into packets, with what is to be done to them.
//! - [`headers`]: what of that is left to the network, and doing the rest.
//! - [`packets`]: those under way, until their descriptors are written back.
//!
//! Here frames are handed to the network, from where they lie if possible. Those with which it cannot
//! help are finished, and cut, on a copy of the frame (a *bench*).
//!
//! `unsafe` is the promise to the network that its buffers stay: guest memory, which the worker
//! keeps mapped for longer than its io_uring lives, or the fronts and benches here, which are not
//! touched before their frames have ended.
#![allow(unsafe_code)]

mod gather;
mod headers;
mod packets;

use backends::net::segments::Segmenter;
use backends::net::{
    Buffer, Completions, Dropped, ETHERNET_HEADER, Frame, MAX_BUFFERS, MAX_FRAME, MacAddr, Offload,
    Offloads, Queue, longest_frame,
};
use backends::uring::Uring;
use hypervisor::{Gpa, GuestMemory};

use super::checksum::TAG;
use super::descriptors::Raw;
use super::registers::Ring;
use gather::Gathered;
use headers::{Front, VlanTag, Work};
use packets::{Packet, Packets};

/// Frames that can be under way to the network.
pub(super) const FRAMES: u16 = 256;
/// Descriptors that are read in one turn.
pub(super) const DESCRIPTORS: u32 = 1024;
/// Copies of frames that are worked on.
const BENCHES: usize = 4;

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

/// A frame under way.
#[derive(Clone, Copy, Debug)]
struct Outgone {
    /// The number of its packet, if that is of the ring as it is now.
    packet: Option<u64>,
    bench: Option<usize>,
}

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

/// A packet that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Malformed;

/// See the module's documentation.
pub(super) struct Transmit {
    epoch: u32,
    /// The next descriptor to read.
    fetch: u32,
    gathered: Gathered,
    packets: Packets,
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
            gathered: Gathered::default(),
            packets: Packets::new(),
            frames: vec![Outgone { packet: None, bench: None }; frames].into(),
            free: (0..FRAMES).rev().collect(),
            fronts: (0..frames).map(|_| Front::new()).collect(),
            benches: std::array::from_fn(|_| bench()),
            cutting: None,
            buffers: Vec::with_capacity(MAX_BUFFERS + 1),
            tally: Tally::default(),
        }
    }

    /// Begins anew if the ring is another one. Returns whether it is.
    pub(super) fn follow(&mut self, ring: &Ring) -> bool {
        if self.epoch == ring.epoch {
            return false;
        }
        self.epoch = ring.epoch;
        self.fetch = ring.head;
        self.gathered.clear();
        self.packets.forget();
        for frame in &mut self.frames {
            frame.packet = None;
        }
        if let Some(Cutting { bench, .. }) = self.cutting.take() {
            self.leave(bench);
        }
        true
    }

    /// Frames that are under way.
    pub(super) fn under_way(&self) -> usize {
        self.frames.len() - self.free.len()
    }

    /// Forgets what has been read and not been sent yet, so that it is read again, and what is left of a
    /// packet that is being cut.
    pub(super) fn halt(&mut self) {
        if let Some(Cutting { packet, bench, .. }) = self.cutting.take() {
            self.leave(bench);
            if let Some(packet) = self.packets.get_mut(packet) {
                packet.sealed = true;
            }
        }
        if self.gathered.descriptors > 0 {
            self.fetch = self.gathered.first;
            self.gathered.clear();
        }
    }

    /// Takes what is in the ring, up to about `most` descriptors, and sends it. Returns how many that
    /// were.
    pub(super) fn run(
        &mut self,
        ring: &Ring,
        most: u32,
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
                if self.packets.is_full() || !self.dispatch(limits, memory, way) {
                    return taken;
                }
                continue;
            }
            if taken >= most || ring.available(self.fetch) == 0 {
                return taken;
            }
            let Ok(raw) = memory.read_obj::<Raw>(Gpa(ring.address(self.fetch))) else {
                // There is no ring, and nobody to tell. All that it was said to hold is gone.
                self.tally.malformed += 1;
                self.fetch = ring.tail;
                return taken + 1;
            };
            self.gathered.add(self.fetch, raw);
            // A packet cannot have more than there are, unless the guest moves the tail behind it.
            if self.gathered.descriptors >= ring.count {
                (self.gathered.bad, self.gathered.whole) = (true, true);
            }
            self.fetch = ring.next(self.fetch);
            taken += 1;
        }
    }

    /// Sends the packet that was gathered. False: it has to wait.
    fn dispatch(&mut self, limits: &Limits, memory: &GuestMemory, way: &mut Way<'_>) -> bool {
        let number = self.packets.next_number();
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
        self.packets.push(packet);
        self.gathered.clear();
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
        let tag = tag.map(|tci| VlanTag { kind: limits.tag_type, tci });
        let work = self.gathered.work()?;
        let tag_len = if tag.is_some() { TAG } else { 0 };
        if work.cut.is_none() && len + tag_len > longest_frame(limits.mtu) {
            return Err(Malformed);
        }
        let Some(&slot) = self.free.last() else { return Ok(None) };
        let mut to = [0; 6];
        self.gathered.read(0, &mut to, memory)?;
        let placed = match work.plan(len, tag.is_some()) {
            Some(plan) => self.place(slot, &work, plan, tag, limits, memory)?,
            None => None,
        };
        let sent = if let Some((frame_len, offload)) = placed {
            self.hand_over(number, None, frame_len, offload, way);
            Some((1, true))
        } else {
            self.bench(number, &work, tag, limits, memory, way)?
        };
        if sent.is_some() {
            self.tally.frames.push((len as u32, MacAddr(to)));
            self.tally.cut += u32::from(work.cut.is_some());
        }
        Ok(sent)
    }

    /// Leaves the memory of the packet's one frame in `buffers`: what is copied, and changed, in the
    /// slot's front, and the rest where it is. Returns how long the frame is, and what is left to the
    /// network; `None` if that does not take it so.
    fn place(
        &mut self,
        slot: u16,
        work: &Work,
        plan: (Offload, usize),
        tag: Option<VlanTag>,
        limits: &Limits,
        memory: &GuestMemory,
    ) -> Result<Option<(usize, Offload)>, Malformed> {
        let (mut offload, copied) = plan;
        let (mut in_front, mut frame_len) = (copied, self.gathered.len);
        let front = self.fronts.get_mut(usize::from(slot)).ok_or(Malformed)?;
        let headers = front.get_mut(copied).ok_or(Malformed)?;
        self.gathered.read(0, headers, memory)?;
        offload = work.change(headers, frame_len, offload, limits.takes).ok_or(Malformed)?;
        if let Some(tag) = tag {
            tag.insert(front, copied).ok_or(Malformed)?;
            offload = offload.shifted(TAG as u16);
            in_front += TAG;
            frame_len += TAG;
        }
        if frame_len > MAX_FRAME {
            return Err(Malformed);
        }
        self.buffers.clear();
        if in_front > 0 {
            self.buffers.push(front.get_mut(in_front).ok_or(Malformed)?.into());
        }
        self.gathered.buffers(copied, memory, &mut self.buffers)?;
        let taken = self.buffers.len() <= MAX_BUFFERS && limits.takes.contains(offload.needs());
        Ok(taken.then_some((frame_len, offload)))
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
        tag: Option<VlanTag>,
        limits: &Limits,
        memory: &GuestMemory,
        way: &mut Way<'_>,
    ) -> Result<Option<(u32, bool)>, Malformed> {
        let free = self.benches.iter().position(|bench| bench.users == 0);
        let Some(index) = free else { return Ok(None) };
        let Some(bench) = self.benches.get_mut(index) else { return Err(Malformed) };
        let len = self.gathered.len;
        // Behind the room for a tag.
        let frame = bench.bytes.get_mut(TAG..TAG + len).ok_or(Malformed)?;
        self.gathered.read(0, frame, memory)?;
        let mut offload = work.finish(frame).ok_or(Malformed)?;
        if let Some(tag) = tag {
            tag.insert_with_room(&mut bench.bytes).ok_or(Malformed)?;
            offload = offload.shifted(TAG as u16);
        }
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
            let Some(headers) = front.get_mut(segment.headers.len()) else { break };
            headers.copy_from_slice(segment.headers);
            self.buffers.clear();
            self.buffers.push(headers.into());
            let payload = frame.get_mut(segment.payload).unwrap_or_default();
            if !payload.is_empty() {
                self.buffers.push(payload.into());
            }
            place.users += 1;
            if let Some(packet) = self.packets.get_mut(packet) {
                packet.frames += 1;
            }
            self.hand_over(packet, Some(bench), len, Offload::NONE, way);
        }
        if let Some(packet) = self.packets.get_mut(packet) {
            packet.sealed = true;
        }
        self.leave(bench);
        true
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
        if let Some(packet) = packet.and_then(|number| self.packets.get_mut(number)) {
            packet.frames = packet.frames.saturating_sub(1);
        }
    }

    /// Gives packets that have left back to the guest. Returns the head of the ring, if it has moved.
    pub(super) fn write_back(&mut self, ring: &Ring, memory: &GuestMemory) -> Option<u32> {
        self.packets.write_back(ring, memory, &mut self.tally)
    }
}
