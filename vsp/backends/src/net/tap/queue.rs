//! One worker's queue of a tap.
//!
//! `unsafe` hands the kernel addresses: of guest memory, which the callers of [`Queue::send`] and
//! [`Queue::offer`] vouch for, and of the queue's own slots, which stay where they are until the
//! kernel is done with them.
#![allow(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use io_uring::opcode;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use zerocopy::FromZeros;

use super::open::Shared;
use crate::net::offload::{Checksum, VirtioNetHeader};
use crate::net::pieces::room;
use crate::net::{
    Buffer, Completion, Completions, Counters, Dropped, Frame, MAX_BUFFERS, Offload, Queue,
    QueueConfig,
};
use crate::uring::{Cqe, Doorbell, Remains, Tag, Target, Token, Uring};

/// In front of every frame.
const HEADER: usize = size_of::<VirtioNetHeader>();

/// Reads in a batch, at most.
const MAX_BATCH: usize = 64;

/// Bytes in a batch of system calls, more or less: who waits for the first does not wait for many more.
/// Batches of the ring (Linux 6.4) have no such bound, since nobody has measured there what it is worth.
const BATCH_BYTES: usize = 64 * 1024;

/// Which of the queue's operations a completion is of: the high half of its token's value. The low
/// half is a slot.
const SEND: u64 = 0;
const READ: u64 = 1;
const POLL: u64 = 2;
const NEWS: u64 = 3;

const fn value(kind: u64, slot: u16) -> u64 {
    kind << 16 | slot as u64
}

/// A frame on its way, or a buffer that was lent.
struct Slot {
    id: u32,
    /// Bytes of the frame, or of the buffer.
    len: usize,
    header: VirtioNetHeader,
    /// Takes the byte by which a frame is longer than its buffer.
    spill: u8,
    /// The header, the caller's buffers, the spill if it is a read. The kernel looks at it when the
    /// operation is handed over. Keeps its room.
    pieces: Vec<Buffer>,
}

impl Slot {
    fn new() -> Self {
        let header = VirtioNetHeader::new_zeroed();
        Self { id: 0, len: 0, header, spill: 0, pieces: Vec::new() }
    }

    fn set_pieces(&mut self, buffers: &[Buffer], len: usize, spill: bool) {
        self.pieces.clear();
        self.pieces.push(Buffer::new((&raw mut self.header).cast(), HEADER));
        let mut left = len;
        for buffer in buffers {
            let len = buffer.len().min(left);
            left -= len;
            if len > 0 {
                self.pieces.push(Buffer::new(buffer.address(), len));
            }
        }
        if spill {
            self.pieces.push(Buffer::new(&raw mut self.spill, 1));
        }
    }
}

/// Slots of one direction. They are made with the queue and do not move.
struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u16>,
}

impl Slots {
    fn new(count: u16) -> Self {
        Self { slots: (0..count).map(|_| Slot::new()).collect(), free: (0..count).rev().collect() }
    }

    fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn get(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(index))
    }

    /// Frees a slot. Returns the number of what it held.
    fn release(&mut self, index: u16) -> Option<u32> {
        let id = self.get(index)?.id;
        self.free.push(index);
        Some(id)
    }
}

/// What becomes readable when the tap is set up or down, or any other network device has changed.
struct News(Arc<Shared>);

impl AsRawFd for News {
    fn as_raw_fd(&self) -> RawFd {
        self.0.news().as_raw_fd()
    }
}

/// See [`Queue`].
pub(super) struct TapQueue {
    shared: Arc<Shared>,
    index: u16,
    tag: Tag,
    target: Target,
    sends: Slots,
    receives: Slots,
    /// Buffers not with the kernel. The one that was offered last is the next to be filled: what its owner
    /// has just read is still in the caches, its own and ours.
    waiting: Vec<u16>,
    /// Of the present batch, those that found no frame.
    unfilled: Vec<u16>,
    /// Reads with the kernel.
    reading: usize,
    /// Whether the kernel will tell when there is something to read.
    polling: bool,
    /// Whether the ring can be told not to wait for a frame. Of a file that does not block it tries
    /// reads that find nothing again, unless each says that it shall not; kernels before 6.4 do not
    /// take that of a tap. There, reads are system calls.
    nowait: bool,
    /// How many reads the next batch has, and how many of the present one found a frame.
    batch: usize,
    hits: usize,
    /// Buffers that the present batch does not fill are to go back to their owner.
    recalled: bool,
    news: Doorbell<News>,
    up: bool,
    counters: Counters,
    remains: Remains,
}

impl TapQueue {
    pub(super) fn new(
        shared: Arc<Shared>,
        config: QueueConfig,
        uring: &mut Uring,
    ) -> io::Result<Self> {
        let QueueConfig { index, tag, sends, receives } = config;
        // Not registered: the ring would keep the tap for longer than this queue.
        let target = Target::descriptor(shared.fd(index));
        let news = Doorbell::new(News(Arc::clone(&shared)), Token::new(tag, value(NEWS, 0)));
        news.arm(uring)?;
        let up = shared.is_up();
        let nowait = can_skip_waiting(shared.fd(index));
        Ok(Self {
            shared,
            index,
            tag,
            target,
            sends: Slots::new(sends),
            receives: Slots::new(receives),
            waiting: Vec::with_capacity(receives.into()),
            unfilled: Vec::with_capacity(MAX_BATCH),
            reading: 0,
            polling: false,
            nowait,
            batch: 1,
            hits: 0,
            recalled: false,
            news,
            up,
            counters: Counters::default(),
            remains: uring.remains(),
        })
    }

    fn token(&self, kind: u64, slot: u16) -> u64 {
        Token::new(self.tag, value(kind, slot)).user_data()
    }

    /// A frame has ended.
    fn sent(&mut self, id: u32, len: u32, result: Result<(), Dropped>, done: &mut Completions) {
        self.counters.count_send(len, result);
        done.push(Completion::Sent { id, result });
    }

    /// Whether there is a reason to read.
    fn wants_batch(&self) -> bool {
        self.up && self.reading == 0 && !self.polling && !self.waiting.is_empty()
    }

    /// Reads a batch, without waiting.
    fn read_batch(&mut self, uring: &mut Uring, done: &mut Completions) {
        if !self.wants_batch() {
            return;
        }
        if !self.nowait {
            return self.read_now(uring, done);
        }
        self.hits = 0;
        for _ in 0..self.batch {
            let Some(index) = self.waiting.pop() else { break };
            let token = self.token(READ, index);
            let Some(slot) = self.receives.get(index) else { break };
            slot.header = VirtioNetHeader::default();
            let pieces = &slot.pieces;
            let entry =
                opcode::Readv::new(self.target.fd(), pieces.as_ptr().cast(), pieces.len() as u32)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
                    .flags(self.target.flags())
                    .user_data(token);
            // SAFETY: who offered the buffer vouches for it. The header, the spill and the pieces
            // are the slot's, which is not touched before the read has completed, and outlives it
            // even if this queue does not.
            if unsafe { uring.push(&entry) }.is_err() {
                self.waiting.push(index);
                break;
            }
            self.reading += 1;
        }
    }

    /// [`Self::read_batch`] by a system call for each frame.
    fn read_now(&mut self, uring: &mut Uring, done: &mut Completions) {
        let fd = self.shared.fd(self.index).as_raw_fd();
        let mut bytes = 0;
        for _ in 0..MAX_BATCH {
            if bytes >= BATCH_BYTES {
                return;
            }
            let Some(index) = self.waiting.pop() else { return };
            let Some(slot) = self.receives.get(index) else { return };
            slot.header = VirtioNetHeader::default();
            let pieces = &slot.pieces;
            // SAFETY: who offered the buffer vouches for it; header, spill and pieces are the
            // slot's, which stays where it is during the call.
            let read = unsafe { libc::readv(fd, pieces.as_ptr().cast(), pieces.len() as i32) };
            match usize::try_from(read) {
                Ok(read) if self.received(index, read, done) => bytes += read,
                Ok(_) => {
                    self.counters.receive_drops += 1;
                    self.waiting.push(index);
                }
                Err(_) => {
                    self.waiting.push(index);
                    match io::Error::last_os_error().raw_os_error() {
                        Some(libc::EINTR | libc::ENOMEM) => {}
                        Some(libc::EAGAIN) | None => self.poll(uring),
                        Some(errno) => self.lost(errno, done),
                    }
                    return;
                }
            }
        }
    }

    /// Asks to be told when there is something to read.
    fn poll(&mut self, uring: &mut Uring) {
        let token = Token::new(self.tag, value(POLL, 0));
        let poll = opcode::PollAdd::new(self.target.fd(), libc::POLLIN as u32).build();
        // SAFETY: a poll points to nothing.
        let pushed = unsafe { uring.push_waiting(poll.flags(self.target.flags()), token) };
        self.polling = pushed.is_ok();
    }

    fn read_done(&mut self, index: u16, result: i32, uring: &mut Uring, done: &mut Completions) {
        self.reading = self.reading.saturating_sub(1);
        match usize::try_from(result) {
            Ok(read) if self.received(index, read, done) => self.hits += 1,
            Ok(_) => {
                // What came is of no use, but its buffer is.
                self.counters.receive_drops += 1;
                self.hits += 1;
                self.unfilled.push(index);
            }
            Err(_) => {
                self.unfilled.push(index);
                match result.wrapping_neg() {
                    libc::EAGAIN | libc::EINTR | libc::ENOMEM => {}
                    // EBADFD: the tap was deleted.
                    errno => self.lost(errno, done),
                }
            }
        }
        if self.reading > 0 {
            return;
        }
        let missed = self.unfilled.len();
        while let Some(index) = self.unfilled.pop() {
            self.waiting.push(index);
        }
        let returned = if mem::take(&mut self.recalled) { missed } else { 0 };
        for _ in 0..returned {
            let Some(index) = self.waiting.pop() else { break };
            let id = self.receives.release(index);
            id.into_iter().for_each(|id| done.push(Completion::Returned { id }));
        }
        if !self.up {
            return;
        }
        if missed > 0 {
            self.batch = (self.hits + 1).next_power_of_two().min(MAX_BATCH);
            self.poll(uring);
        } else {
            self.batch = (self.batch * 2).min(MAX_BATCH);
        }
    }

    /// Passes on what was read into a slot. Returns whether that could be done.
    fn received(&mut self, index: u16, read: usize, done: &mut Completions) -> bool {
        let Some(slot) = self.receives.get(index) else { return false };
        let (Some(len), Ok(offload)) = (read.checked_sub(HEADER), Offload::try_from(slot.header))
        else {
            return false;
        };
        if len > slot.len {
            return false;
        }
        let len = len as u32;
        self.counters.count_receive(len);
        let id = self.receives.release(index);
        done.received(id, len, offload);
        true
    }

    /// The tap is of no use any more.
    fn lost(&mut self, errno: i32, done: &mut Completions) {
        if self.up {
            self.up = false;
            self.shared.gone.store(true, Ordering::Relaxed);
            let error = io::Error::from_raw_os_error(errno);
            tracing::warn!(queue = self.index, %error, "a tap was lost");
            done.push(Completion::Link(false));
        }
    }
}

impl Queue for TapQueue {
    unsafe fn send(&mut self, frame: Frame<'_>, uring: &mut Uring, done: &mut Completions) {
        let Frame { id, len, buffers, offload } = frame;
        let result = match frame.check() {
            Ok(()) if !self.up => Err(Dropped::LinkDown),
            Ok(()) if !self.shared.offloads().contains(offload.needs()) => Err(Dropped::Malformed),
            Ok(()) => self.sends.free.pop().ok_or(Dropped::Busy),
            Err(dropped) => Err(dropped),
        };
        let index = match result {
            Ok(index) => index,
            Err(dropped) => return self.sent(id, len, Err(dropped), done),
        };
        let token = self.token(SEND, index);
        let Some(slot) = self.sends.get(index) else { return };
        (slot.id, slot.len) = (id, len as usize);
        // That a checksum is right is not for a sender to say.
        let checksum = match offload.checksum {
            Checksum::Valid => Checksum::Unknown,
            checksum => checksum,
        };
        slot.header = Offload { checksum, ..offload }.into();
        slot.set_pieces(buffers, len as usize, false);
        let pieces = &slot.pieces;
        let entry =
            opcode::Writev::new(self.target.fd(), pieces.as_ptr().cast(), pieces.len() as u32)
                .build()
                .flags(self.target.flags())
                .user_data(token);
        // SAFETY: the caller vouches for the buffers. The header and the pieces are the slot's,
        // which is not touched before the write has completed, and outlives it even if this queue
        // does not.
        if unsafe { uring.push(&entry) }.is_err() {
            self.sends.free.push(index);
            self.sent(id, len, Err(Dropped::Busy), done);
        }
    }

    unsafe fn offer(&mut self, id: u32, buffers: &[Buffer], _: &mut Uring, done: &mut Completions) {
        let index = if buffers.len() > MAX_BUFFERS { None } else { self.receives.free.pop() };
        let Some(index) = index else { return done.push(Completion::Returned { id }) };
        let Some(slot) = self.receives.get(index) else { return };
        (slot.id, slot.len) = (id, room(buffers));
        let len = slot.len;
        slot.set_pieces(buffers, len, true);
        self.waiting.push(index);
    }

    fn turn(&mut self, uring: &mut Uring, done: &mut Completions) {
        let up = self.shared.is_up();
        if up != self.up {
            self.up = up;
            done.push(Completion::Link(up));
        }
        self.read_batch(uring, done);
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions) {
        let slot = cqe.token.value() as u16;
        match cqe.token.value() >> 16 {
            SEND => {
                let Some(len) = self.sends.get(slot).map(|slot| slot.len as u32) else { return };
                let Some(id) = self.sends.release(slot) else { return };
                let result = match cqe.result.wrapping_neg() {
                    ..=0 => Ok(()),
                    // The device is down.
                    libc::EIO => Err(Dropped::LinkDown),
                    libc::EBADFD => {
                        self.lost(libc::EBADFD, done);
                        Err(Dropped::LinkDown)
                    }
                    libc::EINVAL => Err(Dropped::Malformed),
                    libc::EAGAIN | libc::ENOMEM | libc::ENOBUFS => Err(Dropped::NoRoom),
                    errno => Err(Dropped::Host(errno)),
                };
                self.sent(id, len, result, done);
            }
            READ => {
                self.read_done(slot, cqe.result, uring, done);
                self.read_batch(uring, done);
            }
            POLL => {
                self.polling = false;
                self.read_batch(uring, done);
            }
            NEWS => {
                self.shared.look();
                if let Err(error) = self.news.heard(cqe, uring) {
                    tracing::warn!(queue = self.index, %error, "a tap's link is not watched any more");
                }
            }
            _ => {}
        }
    }

    fn is_ready(&self) -> bool {
        self.wants_batch() || self.up != self.shared.is_up()
    }

    fn prepare_to_sleep(&mut self) -> bool {
        !self.is_ready()
    }

    fn recall(&mut self, _: &mut Uring, done: &mut Completions) {
        while let Some(index) = self.waiting.pop() {
            let id = self.receives.release(index);
            id.into_iter().for_each(|id| done.push(Completion::Returned { id }));
        }
        // Those with the kernel are soon back: none waits there.
        self.recalled = self.reading > 0;
    }

    fn in_flight(&self) -> usize {
        self.sends.used() + self.receives.used()
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

/// Whether the kernel takes `RWF_NOWAIT` of this tap. A frame that is there already is lost.
fn can_skip_waiting(fd: BorrowedFd<'_>) -> bool {
    let mut nothing = [0];
    let mut buffers = [IoSliceMut::new(&mut nothing)];
    // An offset of -1: as files without one have it.
    let read = preadv2(fd, &mut buffers, u64::MAX, ReadWriteFlags::NOWAIT);
    !matches!(read, Err(Errno::OPNOTSUPP))
}

impl Drop for TapQueue {
    /// A queue that goes with operations under way leaves behind what the kernel still looks at.
    fn drop(&mut self) {
        self.shared.close(self.index);
        if self.sends.used() + self.reading > 0 {
            let sends = mem::replace(&mut self.sends, Slots::new(0));
            let receives = mem::replace(&mut self.receives, Slots::new(0));
            self.remains.keep((sends, receives, Arc::clone(&self.shared)));
        }
    }
}
