//! The requests of one channel: packets in, block requests out to the disks' queues, answers back.
//!
//! A packet is in private memory when it comes here; what it says is checked before it is used, and
//! the guest pages it names are looked up once. A request that is under way holds a slot; slots,
//! buffers and answers are made when the channel is opened, so that a read or a write allocates
//! nothing. Small data (an INQUIRY's answer, an UNMAP's list) is copied; reads and writes go
//! straight between the guest's pages and the disk.
//!
//! `unsafe` is the promise to the disk that its buffers stay: they lie in guest memory, which the
//! engine keeps mapped for longer than its worker's io_uring lives, or in the request's own slot.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use backends::block::{
    Buffer, Completion, Completions, Operation as BlockOperation, Queue, Request,
};
use backends::uring::{Cqe, Tag, Uring};
use hypervisor::{Gpa, GuestMemory};
use vmbus::packet::{GpaRanges, Packet, PacketKind};
use vmbus::vstor::{
    DataDirection, MAX_CDB, NtStatus, Operation, ScsiRequest, SrbStatus, VstorPacket,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::handshake::{Grants, Handshake};
use super::{LUNS, Luns};
use crate::scsi::{self, Action, Command, Direction, Outcome, Parameters, Range, Scratch, Status};

/// The most pieces of guest memory that one packet can name, as its worker's buffer bounds it.
const MAX_PIECES: usize = 2048;

/// What a pattern is repeated to, and how many of these one request writes (WRITE SAME).
const PATTERN_BYTES: usize = 64 << 10;
const PATTERN_BUFFERS: usize = 16;

/// One channel's requests.
pub(crate) struct Engine {
    memory: GuestMemory,
    luns: Arc<Luns>,
    /// The numbers of the LUNs that have a disk, for REPORT LUNS; queue `i` is that of LUN
    /// `present[i]`, and its operations carry `Tag(i + 1)`.
    present: Vec<u8>,
    queues: Vec<Box<dyn Queue>>,
    handshake: Handshake,
    slots: Vec<Slot>,
    free: Vec<u16>,
    done: Completions,
    answers: Vec<(u64, VstorPacket)>,
    /// Transactions of resets that wait until nothing is under way.
    resets: Vec<u64>,
    buffers: Vec<Buffer>,
    scratch: Box<Scratch>,
    /// What takes several steps takes no further one.
    stopping: bool,
    /// Bytes that were handed to disks since somebody last asked.
    volume: u64,
}

/// A request under way.
struct Slot {
    transaction: Transaction,
    /// As it came; it goes back with its result filled in.
    request: ScsiRequest,
    queue: usize,
    /// What the disk is doing, and how many bytes of it.
    operation: BlockOperation,
    len: u64,
    /// What the guest is told has been transferred, if it is not `len`.
    parameters: Option<u32>,
    rest: Rest,
}

/// What is still to be done for a request when the disk has done its present part.
enum Rest {
    Nothing,
    /// Ranges to discard (UNMAP).
    Ranges(std::vec::IntoIter<Range>),
    /// A pattern to go on writing (WRITE SAME).
    Pattern {
        offset: u64,
        left: u64,
        pattern: Box<[u8]>,
    },
}

impl Rest {
    fn is_left(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Ranges(ranges) => ranges.len() > 0,
            Self::Pattern { left, .. } => *left > 0,
        }
    }
}

/// Whom to answer: nobody, if the guest asked for no completion.
type Transaction = Option<u64>;

impl Engine {
    /// Requests that can be under way at a time.
    pub(super) const DEPTH: u16 = 256;

    /// An engine with a queue to each disk, for the thread that owns `uring`.
    pub(super) fn new(
        memory: GuestMemory,
        luns: &Arc<Luns>,
        grants: Grants,
        primary: bool,
        uring: &mut Uring,
    ) -> io::Result<Self> {
        let present: Vec<u8> = luns.iter().map(|(lun, _)| lun).collect();
        let queues = (1..)
            .zip(luns.iter())
            .map(|(tag, (_, unit))| unit.disk.queue(Tag(tag), Self::DEPTH, uring))
            .collect::<io::Result<_>>()?;
        let depth = usize::from(Self::DEPTH);
        Ok(Self {
            memory,
            luns: Arc::clone(luns),
            present,
            queues,
            handshake: Handshake::new(primary, grants),
            slots: (0..depth).map(|_| Slot::empty()).collect(),
            free: (0..Self::DEPTH).rev().collect(),
            done: Completions::with_capacity(depth),
            answers: Vec::with_capacity(depth),
            resets: Vec::new(),
            buffers: Vec::with_capacity(MAX_PIECES),
            scratch: Box::new([0; _]),
            stopping: false,
            volume: 0,
        })
    }

    /// Slots for further requests.
    pub(super) fn free_slots(&self) -> u32 {
        u32::try_from(self.free.len()).unwrap_or(u32::MAX)
    }

    /// Requests under way.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Answers that are still to be given.
    pub(super) fn owed(&self) -> usize {
        self.in_flight() + self.answers.len() + self.resets.len()
    }

    /// Bytes that were handed to disks since the last call.
    pub(super) fn take_volume(&mut self) -> u64 {
        std::mem::take(&mut self.volume)
    }

    /// The channel is to be closed: requests that take several steps are cut short.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Takes the answers that are ready.
    pub(super) fn answers(&mut self) -> impl Iterator<Item = (u64, VstorPacket)> + '_ {
        self.answers.drain(..)
    }

    /// Takes a packet from the guest. Returns how many sub-channels it asks for.
    pub(super) fn take(&mut self, packet: &Packet<'_>, uring: &mut Uring) -> u16 {
        let transaction = packet.flags.completion_requested().then_some(packet.transaction_id);
        let Ok((vstor, _)) = VstorPacket::read_from_prefix(packet.payload) else {
            self.reply(transaction, VstorPacket::answer(NtStatus::InvalidParameter, &[]));
            return 0;
        };
        match vstor.operation {
            Operation::ExecuteSrb if self.handshake.is_ready() => {
                self.execute(transaction, packet, &vstor, uring);
            }
            Operation::ExecuteSrb => {
                self.reply(transaction, VstorPacket::answer(NtStatus::InvalidDeviceState, &[]));
            }
            Operation::ResetBus | Operation::ResetAdapter | Operation::ResetLun => {
                // Requests cannot be called back from the host; they end by themselves.
                self.resets.extend(transaction);
            }
            _ => {
                let reply = self.handshake.answer(&vstor);
                self.reply(transaction, reply.packet);
                return reply.subchannels;
            }
        }
        0
    }

    fn reply(&mut self, transaction: Transaction, packet: VstorPacket) {
        self.answers.extend(transaction.map(|id| (id, packet)));
    }

    /// Starts a SCSI command.
    fn execute(
        &mut self,
        transaction: Transaction,
        packet: &Packet<'_>,
        vstor: &VstorPacket,
        uring: &mut Uring,
    ) {
        let invalid = |request: &ScsiRequest| failed(request, SrbStatus::InvalidRequest);
        let Some(request) = vstor.body::<ScsiRequest>() else { return };
        let Some(ranges) = data_ranges(packet) else {
            return self.reply(transaction, invalid(&request));
        };
        let cdb_len = usize::from(request.cdb_len);
        let Some(cdb) = request.cdb_or_sense.get(..cdb_len).filter(|_| cdb_len <= MAX_CDB) else {
            return self.reply(transaction, invalid(&request));
        };
        let Some(available) = self.look_up(ranges) else {
            return self.reply(transaction, invalid(&request));
        };
        let command = Command {
            cdb,
            direction: match request.data_in {
                DataDirection::Read => Direction::In,
                DataDirection::Write => Direction::Out,
                _ => Direction::None,
            },
            transfer_len: u32::try_from(available).unwrap_or(u32::MAX).min(request.transfer_len),
        };
        let here = self.luns.is_target(request.path, request.target);
        let lun = if here { request.lun } else { u8::MAX };
        let queue = self.present.iter().position(|present| *present == lun);
        let (Some(unit), Some(queue)) = (self.luns.get(lun), queue) else {
            let listed: &[u8] = if here { &self.present } else { &[] };
            let action = scsi::plan_absent(&command, listed, &mut self.scratch);
            return match action {
                Action::Complete(outcome) => {
                    self.complete_now(transaction, &request, ranges, outcome);
                }
                _ => self.reply(transaction, invalid(&request)),
            };
        };
        if scsi::looks_anew(cdb)
            && let Err(error) = unit.disk.refresh()
        {
            limited::warn!(lun, "cannot learn a disk's size: {error}");
        }
        let action = unit.scsi.plan(&command, &self.present, &mut self.scratch);
        let Action::Parameters(parameters) = action else {
            return self.carry_out(
                Start { transaction, request, queue, parameters: None },
                action,
                ranges,
                uring,
            );
        };
        let mut bytes = [0; Parameters::MAX_LEN];
        let wanted = usize::try_from(parameters.len).unwrap_or(usize::MAX);
        let Some(bytes) = bytes.get_mut(..wanted) else {
            return self.reply(transaction, invalid(&request));
        };
        if !self.copy_from_guest(ranges, bytes) {
            return self.reply(transaction, invalid(&request));
        }
        let start = Start { transaction, request, queue, parameters: Some(parameters.len) };
        let action = unit.scsi.with_parameters(parameters, bytes);
        self.carry_out(start, action, ranges, uring);
    }

    /// Does what the SCSI target has planned, or starts to.
    fn carry_out(
        &mut self,
        start: Start,
        action: Action<'_>,
        ranges: GpaRanges<'_>,
        uring: &mut Uring,
    ) {
        let mut rest = Rest::Nothing;
        let (operation, offset, len) = match action {
            Action::Complete(outcome) => {
                return self.complete_now(start.transaction, &start.request, ranges, outcome);
            }
            Action::Read { offset, len } => (BlockOperation::Read, offset, len),
            Action::Write { offset, len, fua } => (BlockOperation::Write { fua }, offset, len),
            Action::Flush => (BlockOperation::Flush, 0, 0),
            Action::WriteZeroes { offset, len, may_unmap } => {
                (BlockOperation::WriteZeroes { may_unmap }, offset, len)
            }
            Action::Discard(ranges) => {
                rest = Rest::Ranges(ranges.collect::<Vec<_>>().into_iter());
                (BlockOperation::Discard, 0, 0)
            }
            Action::WriteSame { offset, len, pattern } => {
                let times = (PATTERN_BYTES / pattern.len().max(1)).max(1);
                let pattern = pattern.repeat(times).into_boxed_slice();
                rest = Rest::Pattern { offset, left: len, pattern };
                (BlockOperation::Write { fua: false }, 0, 0)
            }
            Action::Parameters(_) => {
                let packet = failed(&start.request, SrbStatus::InvalidRequest);
                return self.reply(start.transaction, packet);
            }
        };
        // The worker takes no packet without a free slot.
        let Some(index) = self.free.pop() else {
            let packet = failed(&start.request, SrbStatus::Aborted);
            return self.reply(start.transaction, packet);
        };
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return };
        *slot = Slot {
            transaction: start.transaction,
            request: start.request,
            queue: start.queue,
            operation,
            len,
            parameters: start.parameters,
            rest,
        };
        if matches!(slot.rest, Rest::Nothing) {
            let request =
                Request { id: index.into(), operation, offset, len, buffers: &self.buffers };
            let Some(queue) = self.queues.get_mut(start.queue) else { return };
            self.volume += len;
            // SAFETY: the buffers lie in guest memory, which `self.memory` keeps mapped until
            // after the io_uring is gone; a guest may write there at any time.
            unsafe { queue.submit(request, uring, &mut self.done) };
        } else if !self.go_on(index, uring) {
            self.done.push(Completion { id: index.into(), result: Ok(0) });
        }
    }

    /// Starts the next part of a request that has several. Returns whether there was one.
    fn go_on(&mut self, index: u16, uring: &mut Uring) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return false };
        let (offset, len) = match &mut slot.rest {
            Rest::Nothing => return false,
            Rest::Ranges(ranges) => match ranges.next() {
                Some(range) => (range.offset, range.len),
                None => return false,
            },
            Rest::Pattern { offset, left, pattern } => {
                if *left == 0 {
                    return false;
                }
                // Only read from, as this is a write.
                let piece = Buffer::new(pattern.as_ptr().cast_mut(), pattern.len());
                self.buffers.clear();
                self.buffers.extend([piece; PATTERN_BUFFERS]);
                let len = (*left).min((pattern.len() * PATTERN_BUFFERS) as u64);
                let at = *offset;
                *offset = at.saturating_add(len);
                *left -= len;
                (at, len)
            }
        };
        slot.len = len;
        let Some(queue) = self.queues.get_mut(slot.queue) else { return false };
        let operation = slot.operation;
        let request = Request { id: index.into(), operation, offset, len, buffers: &self.buffers };
        // SAFETY: the buffers lie in the slot's pattern, which stays until the request has ended.
        unsafe { queue.submit(request, uring, &mut self.done) };
        true
    }

    /// Takes a completion of the worker's ring.
    pub(super) fn complete(&mut self, cqe: &Cqe, uring: &mut Uring) {
        let queue = usize::from(cqe.token.tag().0).checked_sub(1);
        if let Some(queue) = queue.and_then(|index| self.queues.get_mut(index)) {
            queue.complete(cqe, uring, &mut self.done);
        }
    }

    /// Turns what has ended into answers.
    pub(super) fn settle(&mut self, uring: &mut Uring) {
        while let Some(Completion { id, result }) = self.done.pop() {
            let Ok(index) = u16::try_from(id) else { continue };
            let Some(slot) = self.slots.get(usize::from(index)) else { continue };
            if let Err(error) = result
                && error.errno.is_some()
            {
                // The host's trouble, not the guest's: worth a line, though not one for each.
                self.report(usize::from(index), &error);
            }
            let outcome = scsi::outcome(slot.operation, slot.len, result);
            let cut_short = self.stopping && slot.rest.is_left();
            if outcome.status == Status::GOOD && !cut_short && self.go_on(index, uring) {
                continue;
            }
            let Some(slot) = self.slots.get_mut(usize::from(index)) else { continue };
            let outcome = match slot.parameters {
                Some(bytes) => outcome.with_transferred(bytes),
                None => outcome,
            };
            let answer = match outcome.status {
                Status::GOOD if cut_short => failed(&slot.request, SrbStatus::Aborted),
                _ => answered(&slot.request, outcome),
            };
            let transaction = slot.transaction.take();
            slot.rest = Rest::Nothing;
            self.free.push(index);
            self.reply(transaction, answer);
        }
        if self.in_flight() == 0 && !self.resets.is_empty() {
            let success = VstorPacket::answer(NtStatus::Success, &[]);
            self.answers.extend(self.resets.drain(..).map(|id| (id, success)));
        }
    }

    fn report(&self, slot: usize, error: &backends::block::BlockError) {
        let Some(slot) = self.slots.get(slot) else { return };
        let lun = self.present.get(slot.queue).copied().unwrap_or_default();
        limited::warn!(lun, errno = error.errno, "a disk of the host failed: {error}");
    }

    /// Answers a command that needs no disk, with its data from the scratch.
    fn complete_now(
        &mut self,
        transaction: Transaction,
        request: &ScsiRequest,
        ranges: GpaRanges<'_>,
        outcome: Outcome,
    ) {
        let len = usize::try_from(outcome.transferred).unwrap_or(usize::MAX);
        let from_guest = request.data_in != DataDirection::Read;
        let copied = from_guest
            || self.scratch.get(..len).is_some_and(|data| self.copy_to_guest(ranges, data));
        let answer = if copied {
            answered(request, outcome)
        } else {
            failed(request, SrbStatus::InvalidRequest)
        };
        self.reply(transaction, answer);
    }

    /// Finds the memory that `ranges` name and leaves it in `self.buffers`. Returns how many bytes
    /// it is; `None` if some of it is no memory.
    fn look_up(&mut self, ranges: GpaRanges<'_>) -> Option<u64> {
        self.buffers.clear();
        let mut bytes = 0u64;
        for segment in ranges.flat_map(|range| range.segments()) {
            let len = usize::try_from(segment.len).ok()?;
            let memory = self.memory.slice(Gpa(segment.gpa), len)?;
            if self.buffers.len() == self.buffers.capacity() {
                return None;
            }
            self.buffers.push(Buffer::new(memory.ptr_guard_mut().as_ptr(), len));
            bytes = bytes.checked_add(u64::from(segment.len))?;
        }
        Some(bytes)
    }

    /// Spreads `data` over the memory that `ranges` name, as far as that goes.
    fn copy_to_guest(&self, ranges: GpaRanges<'_>, data: &[u8]) -> bool {
        let mut left = data;
        for segment in ranges.flat_map(|range| range.segments()) {
            let len = left.len().min(segment.len as usize);
            let (now, later) = left.split_at(len);
            if self.memory.write(Gpa(segment.gpa), now).is_err() {
                return false;
            }
            left = later;
        }
        left.is_empty()
    }

    /// Fills `data` from the memory that `ranges` name.
    fn copy_from_guest(&self, ranges: GpaRanges<'_>, data: &mut [u8]) -> bool {
        let mut left = data;
        for segment in ranges.flat_map(|range| range.segments()) {
            let len = left.len().min(segment.len as usize);
            let (now, later) = left.split_at_mut(len);
            if self.memory.read(Gpa(segment.gpa), now).is_err() {
                return false;
            }
            left = later;
        }
        left.is_empty()
    }
}

/// What every request starts with.
#[derive(Clone, Copy)]
struct Start {
    transaction: Transaction,
    request: ScsiRequest,
    queue: usize,
    parameters: Option<u32>,
}

impl Slot {
    fn empty() -> Self {
        Self {
            transaction: None,
            request: ScsiRequest::new_zeroed(),
            queue: LUNS,
            operation: BlockOperation::Flush,
            len: 0,
            parameters: None,
            rest: Rest::Nothing,
        }
    }
}

/// The guest memory that comes with a packet: none with an in-band one. `None` if the packet makes
/// no sense.
fn data_ranges<'b>(packet: &Packet<'b>) -> Option<GpaRanges<'b>> {
    match packet.kind {
        PacketKind::InBand => Some(GpaRanges::EMPTY),
        PacketKind::GpaDirect => packet.gpa_ranges().ok(),
        _ => None,
    }
}

/// The answer to a request that came to an outcome.
fn answered(request: &ScsiRequest, outcome: Outcome) -> VstorPacket {
    let mut request = *request;
    request.srb_status = SrbStatus::Success;
    request.scsi_status = outcome.status.0;
    request.transfer_len = outcome.transferred;
    if outcome.status != Status::GOOD {
        request.srb_status = SrbStatus::Error;
        request.sense_len = 0;
    }
    if let Some(sense) = &outcome.sense {
        let bytes = sense.to_bytes();
        request.srb_status = SrbStatus::ErrorWithSense;
        request.sense_len = bytes.len() as u8;
        for (to, from) in request.cdb_or_sense.iter_mut().zip(bytes) {
            *to = from;
        }
    }
    VstorPacket::answer(NtStatus::Success, request.as_bytes())
}

/// The answer to a request that was not even looked at.
fn failed(request: &ScsiRequest, status: SrbStatus) -> VstorPacket {
    let mut request = *request;
    request.srb_status = status;
    request.scsi_status = 0;
    request.transfer_len = 0;
    request.sense_len = 0;
    VstorPacket::answer(NtStatus::Success, request.as_bytes())
}
