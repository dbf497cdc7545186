//! One worker's way to an image: requests become steps, steps become entries of its ring.
//!
//! Most requests are one step. A request takes several when the kernel transfers less than it was
//! asked for, when it has more pieces than one call takes, or when the host refuses one way of
//! doing it and another is left.

use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::Arc;

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};

use super::open::{Alignment, Image};
use crate::block::{
    BlockError, BlockErrorKind, Buffer, Capacity, Completion, Completions, Operation, Queue,
    Request, check,
};
use crate::uring::{Cqe, Remains, Tag, Target, Token, Uring};

/// Pieces of memory in one system call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Bytes in one system call, well below what the kernel cuts it to.
const MAX_PIECE: usize = 1 << 30;

/// How often a step is tried again after the kernel was busy.
const MAX_ATTEMPTS: u8 = 16;

/// Zeroes, for a host that has no better way to write them.
static ZEROES: Page = Page([0; 4096]);

#[repr(align(4096))]
struct Page([u8; 4096]);

/// An aligned copy of what a guest writes from unaligned memory or reads into it, a part at a time.
#[repr(align(4096))]
struct Copied([u8; 64 << 10]);

impl Copied {
    fn new() -> Box<Self> {
        Box::new(Self([0; 64 << 10]))
    }
}

/// How the host is asked for the next step of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// Between the device and the buffers.
    Direct,
    /// Through the page cache.
    Buffered,
    /// By way of an aligned copy, between the device and that.
    Copy,
    PunchHole,
    ZeroRange,
    /// Zeroes written like any data.
    WriteZeroes,
    Sync,
}

impl Method {
    /// Whether the host is asked to free or to zero a range, rather than given zeroes.
    fn is_range(self) -> bool {
        matches!(self, Self::PunchHole | Self::ZeroRange)
    }
}

/// A request under way.
struct Slot {
    id: u32,
    operation: Operation,
    method: Method,
    /// Where the next step starts, and what is left from there.
    offset: u64,
    left: u64,
    /// What was asked for.
    len: u64,
    /// The buffers, neighbours joined, cut to `len`. The kernel reads them when a step is handed
    /// over. Keeps its room from request to request.
    pieces: Vec<Buffer>,
    /// The first piece not yet used up.
    first: usize,
    copy: Option<Box<Copied>>,
    attempts: u8,
    busy: bool,
    /// The present step of zeroing: how many bytes of it, and whether they are a part of a unit
    /// ([`Image::zero_unit`]), which is written.
    part: u64,
    is_edge: bool,
    /// Units do not count: the host has no room for what would be written.
    whole: bool,
    /// What a write that was to be stable at once has failed with. It is tried again as an ordinary
    /// one, to learn whether it was the writing or the flush behind it that failed.
    unstable: Option<i32>,
}

impl Slot {
    fn new() -> Self {
        Self {
            id: 0,
            operation: Operation::Flush,
            method: Method::Sync,
            offset: 0,
            left: 0,
            len: 0,
            pieces: Vec::new(),
            first: 0,
            copy: None,
            attempts: 0,
            busy: false,
            part: 0,
            is_edge: false,
            whole: false,
            unstable: None,
        }
    }

    fn set_pieces(&mut self, buffers: &[Buffer]) {
        self.pieces.clear();
        self.first = 0;
        let mut left = self.left as usize;
        for buffer in buffers {
            let len = buffer.len().min(left);
            left -= len;
            match self.pieces.last_mut() {
                _ if len == 0 => {}
                Some(last)
                    if last.address().wrapping_add(last.len()) == buffer.address()
                        && last.len() + len <= MAX_PIECE =>
                {
                    *last = Buffer::new(last.address(), last.len() + len);
                }
                _ => self.pieces.push(Buffer::new(buffer.address(), len)),
            }
        }
    }

    fn rest(&self) -> &[Buffer] {
        self.pieces.get(self.first..).unwrap_or_default()
    }

    /// `bytes` have been transferred.
    fn advance(&mut self, bytes: u64) {
        self.offset += bytes;
        self.left = self.left.saturating_sub(bytes);
        let mut bytes = bytes as usize;
        while let Some(piece) = self.pieces.get_mut(self.first) {
            if bytes < piece.len() {
                *piece = Buffer::new(piece.address().wrapping_add(bytes), piece.len() - bytes);
                break;
            }
            bytes -= piece.len();
            self.first += 1;
        }
    }

    fn is_aligned(&self, to: Alignment) -> bool {
        let (memory, offset) = (to.memory as usize - 1, u64::from(to.offset) - 1);
        (self.offset | self.left) & offset == 0
            && self.rest().iter().all(|piece| {
                piece.address().addr() & memory == 0 && piece.len() as u64 & offset == 0
            })
    }

    /// Chooses how much the next step of zeroing does, in units of `unit` bytes: what is in front of
    /// the first, all whole ones, what is behind the last.
    fn aim(&mut self, unit: u64) {
        let unit = if self.whole { 1 } else { unit };
        let (before, after) = (self.offset % unit, self.left % unit);
        (self.part, self.is_edge) = match before {
            0 if self.left >= unit => (self.left - after, false),
            _ => (self.left.min(unit - before), true),
        };
    }

    /// Spreads the first `bytes` of what was read over the guest's memory.
    fn spread(&mut self, bytes: u64) {
        let Some(copy) = &self.copy else { return };
        let mut left = copy.0.get(..bytes as usize).unwrap_or_default();
        for piece in self.pieces.get(self.first..).unwrap_or_default() {
            let (now, later) = left.split_at(left.len().min(piece.len()));
            // SAFETY: who submitted the request vouches for its buffers until it has ended; the copy
            // is this slot's own.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), piece.address(), now.len()) };
            left = later;
        }
    }

    /// Room for the next bytes to read.
    fn empty_copy(&mut self) -> &mut [u8] {
        let copy = &mut self.copy.get_or_insert_with(Copied::new).0;
        let len = copy.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        &mut copy[..len]
    }

    /// Copies the next bytes to write out of the guest's memory.
    fn fill_copy(&mut self) -> &[u8] {
        let copy = &mut self.copy.get_or_insert_with(Copied::new).0;
        let mut filled = 0;
        for piece in self.pieces.get(self.first..).unwrap_or_default() {
            let room = &mut copy[filled..];
            let len = piece.len().min(room.len());
            // SAFETY: who submitted the request vouches for its buffers until it has ended; the
            // copy is this slot's own, and has room for `len`.
            unsafe { ptr::copy_nonoverlapping(piece.address(), room.as_mut_ptr(), len) };
            filled += len;
        }
        &copy[..filled]
    }
}

/// See [`Queue`].
pub(super) struct FileQueue {
    image: Arc<Image>,
    capacity: Capacity,
    tag: Tag,
    buffered: Target,
    direct: Option<(Target, Alignment)>,
    slots: Vec<Slot>,
    /// Indices of slots that are not busy, the last used on top.
    free: Vec<u16>,
    /// What the host has not refused yet.
    punch_hole: bool,
    zero_range: bool,
    remains: Remains,
}

impl FileQueue {
    pub(super) fn new(image: Arc<Image>, tag: Tag, depth: u16, uring: &mut Uring) -> Self {
        // What holds a lock is not registered: the ring would keep it for longer than the process.
        let buffered = match image.is_device {
            true => Target::descriptor(image.buffered.as_fd()),
            false => uring.register_file(image.buffered.as_fd()),
        };
        let direct = image
            .direct
            .as_ref()
            .map(|(file, alignment)| (uring.register_file(file.as_fd()), *alignment));
        let (punch_hole, zero_range) = (image.punch_hole, image.zero_range);
        Self {
            capacity: image.capacity.clone(),
            image,
            tag,
            buffered,
            direct,
            slots: (0..depth).map(|_| Slot::new()).collect(),
            free: (0..depth).rev().collect(),
            punch_hole,
            zero_range,
            remains: uring.remains(),
        }
    }

    /// How a request starts out.
    fn first_method(&self, slot: &Slot) -> Method {
        match slot.operation {
            Operation::Read | Operation::Write { .. } => self.transfer_method(slot),
            Operation::Flush => Method::Sync,
            Operation::Discard => Method::PunchHole,
            Operation::WriteZeroes { may_unmap } => self.zero_method(may_unmap),
        }
    }

    /// How the rest of a read or write is best done: see the module's documentation.
    fn transfer_method(&self, slot: &Slot) -> Method {
        match self.direct {
            Some((_, alignment)) if slot.is_aligned(alignment) => Method::Direct,
            Some(_) => Method::Copy,
            None => Method::Buffered,
        }
    }

    fn zero_method(&self, may_unmap: bool) -> Method {
        match (self.punch_hole, self.zero_range) {
            (true, zero_range) if may_unmap || !zero_range => Method::PunchHole,
            (_, true) => Method::ZeroRange,
            _ => Method::WriteZeroes,
        }
    }

    /// Pushes the next step of a request.
    fn issue(&mut self, index: usize, uring: &mut Uring) -> io::Result<()> {
        let token = Token::new(self.tag, index as u64);
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        let target = match (slot.method, &self.direct) {
            (Method::Direct | Method::Copy | Method::WriteZeroes, Some((target, _))) => *target,
            (method, direct) if method.is_range() => {
                slot.aim(self.image.zero_unit);
                match direct {
                    Some((target, _)) if slot.is_edge => *target,
                    _ => self.buffered,
                }
            }
            _ => self.buffered,
        };
        let entry = step(slot, target);
        let mut flags = target.flags();
        if slot.attempts > 0 {
            // It would have had to wait; so let it.
            flags |= Flags::ASYNC;
        }
        // SAFETY: the buffers are vouched for by who submitted the request. The pieces and the copy
        // are the slot's, which are not touched before the step has completed, and outlive it even
        // if this queue does not.
        unsafe { uring.push(&entry.flags(flags).user_data(token.user_data())) }
    }

    /// What follows from a step's result: the request's end, or another step.
    fn after(&mut self, index: usize, result: i32) -> Option<Result<u64, BlockError>> {
        let slot = self.slots.get_mut(index)?;
        let errno = match result {
            // Another queue may have been told what this one should have been.
            0 if slot.method == Method::Sync => {
                return Some(self.image.may_flush().map(|()| slot.len));
            }
            0 if slot.method.is_range() && !slot.is_edge => {
                let part = slot.part;
                return self.moved(index, part);
            }
            // The file has shrunk, or the host writes nothing without a reason.
            0 => return Some(Err(self.failed(index, None))),
            1.. => return self.moved(index, result as u64),
            _ => result.wrapping_neg(),
        };
        match (errno, slot.method) {
            (libc::EINTR | libc::EAGAIN, _) if slot.attempts < MAX_ATTEMPTS => {
                slot.attempts += 1;
                return None;
            }
            // The host demands more alignment than it has told.
            (libc::EINVAL, Method::Direct) => {
                slot.method = Method::Copy;
                return None;
            }
            (_, Method::Sync) => {
                self.image.flush_has_failed(errno);
                return Some(Err(BlockError::from_errno(errno)));
            }
            (_, Method::Direct | Method::Copy | Method::Buffered)
                if slot.operation == (Operation::Write { fua: true })
                    && slot.unstable.is_none() =>
            {
                slot.unstable = Some(errno);
                return None;
            }
            (libc::ENOSPC | libc::EDQUOT, Method::PunchHole | Method::ZeroRange)
                if slot.is_edge =>
            {
                slot.whole = true;
                return None;
            }
            (_, Method::PunchHole | Method::ZeroRange) if slot.is_edge => {
                return Some(Err(self.failed(index, Some(errno))));
            }
            (libc::EOPNOTSUPP | libc::ENOSYS, Method::PunchHole) => self.punch_hole = false,
            (libc::EOPNOTSUPP | libc::ENOSYS, Method::ZeroRange) => self.zero_range = false,
            (libc::EINVAL, Method::PunchHole | Method::ZeroRange) => {
                // Not this range, for instance because the device's blocks are larger.
                if slot.operation != Operation::Discard {
                    slot.method = Method::WriteZeroes;
                    return None;
                }
            }
            _ => return Some(Err(self.failed(index, Some(errno)))),
        }
        // A host that cannot discard has all the same done what was asked for: a discard is a hint.
        let Operation::WriteZeroes { may_unmap } = self.slots.get(index)?.operation else {
            return Some(Ok(self.slots.get(index)?.len));
        };
        let method = self.zero_method(may_unmap);
        self.slots.get_mut(index)?.method = method;
        None
    }

    /// What follows when a step has done `bytes`.
    fn moved(&mut self, index: usize, bytes: u64) -> Option<Result<u64, BlockError>> {
        let slot = self.slots.get_mut(index)?;
        let whole = bytes >= slot.left;
        if whole && slot.method != Method::Copy && slot.unstable.is_none() {
            return Some(Ok(slot.len));
        }
        // By the direct descriptor the next step has to begin at a block again.
        let unit = match &self.direct {
            Some((_, alignment)) if !whole => u64::from(alignment.offset),
            _ => 1,
        };
        let bytes = bytes - bytes % unit;
        if bytes == 0 {
            return Some(Err(self.failed(index, None)));
        }
        if slot.method == Method::Copy && slot.operation == Operation::Read {
            slot.spread(bytes);
        }
        slot.advance(bytes);
        slot.attempts = 0;
        if slot.left == 0 {
            return Some(match slot.unstable {
                // A host that does not know how to do both at once.
                Some(libc::EOPNOTSUPP) => {
                    slot.method = Method::Sync;
                    return None;
                }
                // It was written; so it was the flush that failed.
                Some(errno) => {
                    self.image.flush_has_failed(errno);
                    Err(BlockError::from_errno(errno))
                }
                None => Ok(slot.len),
            });
        }
        if matches!(slot.operation, Operation::Read | Operation::Write { .. }) {
            let slot = self.slots.get(index)?;
            let method = self.transfer_method(slot);
            self.slots.get_mut(index)?.method = method;
        }
        None
    }

    /// Why a request fails that the host has ended early, or with `errno`: it may be the end of the
    /// image, which has come nearer.
    fn failed(&self, index: usize, errno: Option<i32>) -> BlockError {
        let end = self.slots.get(index).map_or(0, |slot| slot.offset + slot.left);
        match (self.image.refresh(), errno) {
            (Ok(size), _) if end > size => BlockError::new(BlockErrorKind::OutOfRange),
            (_, Some(errno)) => BlockError::from_errno(errno),
            (_, None) => BlockError::new(BlockErrorKind::Io),
        }
    }

    fn finish(&mut self, index: usize, result: Result<u64, BlockError>, done: &mut Completions) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.busy = false;
        slot.copy = None;
        self.free.push(index as u16);
        done.push(Completion { id: slot.id, result });
    }
}

/// The entry for the next step.
fn step(slot: &mut Slot, target: Target) -> Entry {
    let fd = target.fd();
    let offset = slot.offset;
    let write_flags = match slot.operation {
        Operation::Write { fua: true } if slot.unstable.is_none() => libc::RWF_DSYNC,
        _ => 0,
    };
    match slot.method {
        Method::Direct | Method::Buffered => {
            let read = slot.operation == Operation::Read;
            let pieces = slot.rest();
            let pieces = &pieces[..pieces.len().min(MAX_PIECES)];
            match (pieces, read) {
                ([piece], true) => opcode::Read::new(fd, piece.address(), piece.len() as u32)
                    .offset(offset)
                    .build(),
                ([piece], false) => opcode::Write::new(fd, piece.address(), piece.len() as u32)
                    .offset(offset)
                    .rw_flags(write_flags)
                    .build(),
                (_, true) => opcode::Readv::new(fd, pieces.as_ptr().cast(), pieces.len() as u32)
                    .offset(offset)
                    .build(),
                (_, false) => opcode::Writev::new(fd, pieces.as_ptr().cast(), pieces.len() as u32)
                    .offset(offset)
                    .rw_flags(write_flags)
                    .build(),
            }
        }
        Method::Copy if slot.operation == Operation::Read => {
            let room = slot.empty_copy();
            opcode::Read::new(fd, room.as_mut_ptr(), room.len() as u32).offset(offset).build()
        }
        Method::Copy => {
            let bytes = slot.fill_copy();
            opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32)
                .offset(offset)
                .rw_flags(write_flags)
                .build()
        }
        Method::PunchHole | Method::ZeroRange if !slot.is_edge => {
            let mode = match slot.method {
                Method::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
                _ => libc::FALLOC_FL_ZERO_RANGE,
            };
            opcode::Fallocate::new(fd, slot.part)
                .offset(offset)
                .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
                .build()
        }
        Method::PunchHole | Method::ZeroRange | Method::WriteZeroes => {
            let page = ZEROES.0.len() as u64;
            let zeroes = |len: u64| Buffer::new(ZEROES.0.as_ptr().cast_mut(), len as usize);
            let len = if slot.method.is_range() { slot.part } else { slot.left };
            let whole = (len / page).min(256);
            slot.pieces.clear();
            slot.first = 0;
            match whole {
                0 => slot.pieces.push(zeroes(len)),
                _ => slot.pieces.extend((0..whole).map(|_| zeroes(page))),
            }
            opcode::Writev::new(fd, slot.pieces.as_ptr().cast(), slot.pieces.len() as u32)
                .offset(offset)
                .build()
        }
        Method::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

impl Queue for FileQueue {
    unsafe fn submit(&mut self, request: Request<'_>, uring: &mut Uring, done: &mut Completions) {
        let Request { id, operation, offset, len, buffers } = request;
        let Image { block, read_only, .. } = *self.image;
        if let Err(error) = check(self.capacity.get(), block, read_only, &request) {
            return done.push(Completion { id, result: Err(error) });
        }
        let nothing = match operation {
            Operation::Flush => {
                if let Err(error) = self.image.may_flush() {
                    return done.push(Completion { id, result: Err(error) });
                }
                read_only
            }
            // `fallocate` refuses an empty range.
            _ => len == 0,
        };
        if nothing || (operation == Operation::Discard && !self.punch_hole) {
            return done.push(Completion { id, result: Ok(len) });
        }
        let Some(index) = self.free.pop().map(usize::from) else {
            let result = Err(BlockError::new(BlockErrorKind::Busy));
            return done.push(Completion { id, result });
        };
        let Some(slot) = self.slots.get_mut(index) else { return };
        (slot.id, slot.operation) = (id, operation);
        (slot.offset, slot.left, slot.len) = (offset, len, len);
        (slot.attempts, slot.busy) = (0, true);
        (slot.whole, slot.unstable) = (false, None);
        match operation {
            Operation::Read | Operation::Write { .. } => slot.set_pieces(buffers),
            _ => slot.set_pieces(&[]),
        }
        let method = self.slots.get(index).map(|slot| self.first_method(slot));
        if let (Some(slot), Some(method)) = (self.slots.get_mut(index), method) {
            slot.method = method;
        }
        if let Err(error) = self.issue(index, uring) {
            self.finish(index, Err(host_error(&error)), done);
        }
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions) {
        let index = cqe.token.value() as usize;
        if !self.slots.get(index).is_some_and(|slot| slot.busy) {
            return;
        }
        match self.after(index, cqe.result) {
            Some(result) => self.finish(index, result, done),
            None => {
                if let Err(error) = self.issue(index, uring) {
                    self.finish(index, Err(host_error(&error)), done);
                }
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Drop for FileQueue {
    /// A queue that goes with requests under way leaves behind what the kernel still looks at.
    fn drop(&mut self) {
        let flushes = |slot: &Slot| {
            slot.busy && matches!(slot.operation, Operation::Flush | Operation::Write { fua: true })
        };
        if self.slots.iter().any(flushes) {
            self.image.hear_of_lost_writes();
        }
        if self.in_flight() > 0 {
            self.remains.keep((mem::take(&mut self.slots), Arc::clone(&self.image)));
        }
    }
}

fn host_error(error: &io::Error) -> BlockError {
    BlockError::from_errno(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Disk;
    use crate::file::{FileDisk, OpenOptions};

    const WRITE: Operation = Operation::Write { fua: false };

    /// A queue with direct I/O whose only request has been taken and not handed over, so that a
    /// test can say what the kernel has answered.
    struct Scripted {
        queue: FileQueue,
        uring: Uring,
        _memory: Box<Page>,
        directory: tempfile::TempDir,
    }

    impl Scripted {
        fn new(operation: Operation) -> Self {
            match operation {
                Operation::Flush => Self::at(operation, 0, 0),
                _ => Self::at(operation, 0, 4096),
            }
        }

        fn path(&self) -> std::path::PathBuf {
            self.directory.path().join("disk.img")
        }

        /// What the worker does when the request goes on.
        fn issue(&mut self) {
            self.queue.issue(0, &mut self.uring).unwrap();
        }

        fn at(operation: Operation, offset: u64, len: u64) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk.img");
            std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
            let disk = FileDisk::open(&path, &OpenOptions::default()).unwrap();
            assert_eq!(disk.geometry().size, 1 << 20);
            let mut uring = Uring::new(8).unwrap();
            let mut queue = FileQueue::new(disk.image(), Tag(1), 1, &mut uring);
            queue.direct = Some((queue.buffered, Alignment { memory: 512, offset: 512 }));
            (queue.punch_hole, queue.zero_range) = (true, true);
            let mut memory = Box::new(Page([0; 4096]));
            let buffers = [Buffer::from(memory.0.as_mut_slice())];
            let request = Request { id: 0, operation, offset, len, buffers: &buffers };
            let mut done = Completions::default();
            // SAFETY: the memory is dropped after the ring.
            unsafe { queue.submit(request, &mut uring, &mut done) };
            assert_eq!((done.len(), queue.in_flight()), (0, 1));
            Self { queue, uring, _memory: memory, directory }
        }

        /// How the request goes on after a result, if it does.
        fn method_after(&mut self, result: i32) -> Result<Method, Result<u64, BlockErrorKind>> {
            match self.queue.after(0, result) {
                Some(end) => Err(end.map_err(|error| error.kind)),
                None => Ok(self.queue.slots[0].method),
            }
        }
    }

    #[test]
    fn a_busy_kernel_is_asked_again_but_not_for_ever() {
        let mut read = Scripted::new(Operation::Read);
        for _ in 0..MAX_ATTEMPTS {
            assert_eq!(read.method_after(-libc::EAGAIN), Ok(Method::Direct));
        }
        assert_eq!(read.method_after(-libc::EAGAIN), Err(Err(BlockErrorKind::Io)));
        let mut read = Scripted::new(Operation::Read);
        assert_eq!(read.method_after(-libc::EINTR), Ok(Method::Direct));
        assert_eq!(read.method_after(4096), Err(Ok(4096)));
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let mut write = Scripted::new(WRITE);
        assert_eq!(write.method_after(512), Ok(Method::Direct));
        let slot = &write.queue.slots[0];
        assert_eq!((slot.offset, slot.left, slot.rest()[0].len()), (512, 3584, 3584));
        // A part of a sector is done again, as there is no way to go on within one.
        assert_eq!(write.method_after(612), Ok(Method::Direct));
        let slot = &write.queue.slots[0];
        assert_eq!((slot.offset, slot.left), (1024, 3072));
        assert_eq!(write.method_after(3072), Err(Ok(4096)));
        for result in [0, 100] {
            let mut read = Scripted::new(Operation::Read);
            assert_eq!(read.method_after(result), Err(Err(BlockErrorKind::Io)), "{result}");
        }
    }

    #[test]
    fn what_lies_behind_the_end_is_out_of_range() {
        let mut read = Scripted::new(Operation::Read);
        let image = std::fs::File::options().write(true).open(read.path()).unwrap();
        image.set_len(512).unwrap();
        assert_eq!(read.method_after(512), Ok(Method::Direct));
        assert_eq!(read.method_after(0), Err(Err(BlockErrorKind::OutOfRange)));
        assert_eq!(read.queue.capacity.get(), 512);
    }

    #[test]
    fn a_flush_that_failed_is_told_to_every_queue_and_every_later_flush() {
        let mut flush = Scripted::new(Operation::Flush);
        let mut beside =
            FileQueue::new(Arc::clone(&flush.queue.image), Tag(2), 2, &mut flush.uring);
        let mut done = Completions::default();
        let request =
            |id| Request { id, operation: Operation::Flush, offset: 0, len: 0, buffers: &[] };
        // SAFETY: there are no buffers.
        unsafe { beside.submit(request(1), &mut flush.uring, &mut done) };
        assert_eq!(flush.method_after(-libc::EIO), Err(Err(BlockErrorKind::Io)));
        // The kernel has told the one, and knows nothing any more for the other.
        assert_eq!(beside.after(0, 0), Some(Err(BlockError::new(BlockErrorKind::Io))));
        // SAFETY: as above.
        unsafe { beside.submit(request(2), &mut flush.uring, &mut done) };
        let end = Completion { id: 2, result: Err(BlockError::new(BlockErrorKind::Io)) };
        assert_eq!(done.pop(), Some(end));
        beside.finish(0, Ok(0), &mut done);
    }

    #[test]
    fn a_forced_write_that_was_written_and_not_flushed_is_a_flush_that_failed() {
        let fua = Operation::Write { fua: true };
        let failed = Err(Err(BlockErrorKind::Io));
        let mut write = Scripted::new(fua);
        assert_eq!(write.method_after(-libc::EIO), Ok(Method::Direct));
        assert_eq!(write.method_after(4096), failed);
        assert!(write.queue.image.may_flush().is_err());
        // A host that has to be asked for both.
        let mut write = Scripted::new(fua);
        assert_eq!(write.method_after(-libc::EOPNOTSUPP), Ok(Method::Direct));
        assert_eq!(write.method_after(4096), Ok(Method::Sync));
        assert_eq!(write.method_after(0), Err(Ok(4096)));
        // One that cannot be written has lost nobody else's.
        let mut write = Scripted::new(fua);
        assert_eq!(write.method_after(-libc::EIO), Ok(Method::Direct));
        assert_eq!(write.method_after(-libc::EIO), failed);
        assert!(write.queue.image.may_flush().is_ok());
    }

    #[test]
    fn a_host_that_is_pickier_than_it_said() {
        for operation in [Operation::Read, WRITE] {
            let mut request = Scripted::new(operation);
            assert_eq!(request.method_after(-libc::EINVAL), Ok(Method::Copy));
            // Never by way of the page cache, beside direct writes.
            assert_eq!(request.method_after(-libc::EINVAL), Err(Err(BlockErrorKind::Io)));
        }
        let mut write = Scripted::new(WRITE);
        assert_eq!(write.method_after(-libc::ENOSPC), Err(Err(BlockErrorKind::NoSpace)));
    }

    #[test]
    fn parts_of_a_unit_are_written_and_the_rest_is_ranges() {
        let zero = Operation::WriteZeroes { may_unmap: false };
        let mut zeroes = Scripted::at(zero, 512, 3 * 4096);
        let step = |zeroes: &Scripted| {
            let slot = &zeroes.queue.slots[0];
            (slot.offset, slot.part, slot.is_edge)
        };
        assert_eq!(step(&zeroes), (512, 3584, true));
        assert_eq!(zeroes.method_after(3584), Ok(Method::ZeroRange));
        zeroes.issue();
        assert_eq!(step(&zeroes), (4096, 8192, false));
        assert_eq!(zeroes.method_after(0), Ok(Method::ZeroRange));
        zeroes.issue();
        assert_eq!(step(&zeroes), (12288, 512, true));
        // No room to write a part of a hole: then it is the file system's.
        assert_eq!(zeroes.method_after(-libc::ENOSPC), Ok(Method::ZeroRange));
        zeroes.issue();
        assert_eq!(step(&zeroes), (12288, 512, false));
        assert_eq!(zeroes.method_after(0), Err(Ok(3 * 4096)));
    }

    #[test]
    fn zeroes_get_there_one_way_or_another() {
        let refused = -libc::EOPNOTSUPP;
        let mut unmap = Scripted::new(Operation::WriteZeroes { may_unmap: true });
        assert_eq!(unmap.queue.slots[0].method, Method::PunchHole);
        assert_eq!(unmap.method_after(refused), Ok(Method::ZeroRange));
        assert_eq!(unmap.method_after(refused), Ok(Method::WriteZeroes));
        assert_eq!(unmap.method_after(4096), Err(Ok(4096)));
        let mut keep = Scripted::new(Operation::WriteZeroes { may_unmap: false });
        assert_eq!(keep.queue.slots[0].method, Method::ZeroRange);
        assert_eq!(keep.method_after(refused), Ok(Method::PunchHole));
        assert_eq!(keep.method_after(0), Err(Ok(4096)));
        let mut odd = Scripted::new(Operation::WriteZeroes { may_unmap: true });
        assert_eq!(odd.method_after(-libc::EINVAL), Ok(Method::WriteZeroes));
        assert!(odd.queue.punch_hole, "another range may do");
    }

    #[test]
    fn a_discard_is_a_hint() {
        let mut discard = Scripted::new(Operation::Discard);
        assert_eq!(discard.method_after(-libc::EOPNOTSUPP), Err(Ok(4096)));
        assert!(!discard.queue.punch_hole);
        let mut discard = Scripted::new(Operation::Discard);
        assert_eq!(discard.method_after(-libc::EIO), Err(Err(BlockErrorKind::Io)));
    }

    /// What a host without `fallocate` makes of zeroes, beside a write to the neighbouring sector.
    #[test]
    fn zeroes_and_their_neighbours_do_not_undo_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::write(&path, vec![0xee; 1 << 20]).unwrap();
        let disk = FileDisk::open(&path, &OpenOptions::default()).unwrap();
        let mut uring = Uring::new(64).unwrap();
        let mut queue = FileQueue::new(disk.image(), Tag(1), 2, &mut uring);
        (queue.punch_hole, queue.zero_range) = (false, false);
        let mut done = Completions::default();
        let mut memory = Box::new(Page([0; 4096]));
        for round in 0..500_u64 {
            let at = (round % 256) * 4096;
            memory.0[..512].fill(round as u8 | 1);
            let data = [Buffer::new(memory.0.as_mut_ptr(), 512)];
            let zero = Operation::WriteZeroes { may_unmap: false };
            let mut requests = [
                Request { id: 0, operation: WRITE, offset: at, len: 512, buffers: &data },
                Request { id: 1, operation: zero, offset: at + 512, len: 1024, buffers: &[] },
            ];
            requests.rotate_left(round as usize % 2);
            for request in requests {
                // SAFETY: the memory is dropped after the ring.
                unsafe { queue.submit(request, &mut uring, &mut done) };
            }
            while done.len() < 2 {
                uring.submit_and_wait(1).unwrap();
                while let Some(cqe) = uring.next() {
                    queue.complete(&cqe, &mut uring, &mut done);
                }
            }
            while let Some(end) = done.pop() {
                assert!(end.result.is_ok(), "{end:?}");
            }
            let there = &std::fs::read(&path).unwrap()[at as usize..][..2048];
            assert!(there[..512] == memory.0[..512], "round {round}");
            assert!(there[512..1536].iter().all(|&byte| byte == 0), "round {round}");
        }
        drop(uring);
    }

    #[test]
    fn neighbouring_buffers_are_joined() {
        let mut slot = Slot::new();
        slot.left = 3 * 4096;
        let at = |page: usize| Buffer::new(ptr::without_provenance_mut(page * 4096), 4096);
        slot.set_pieces(&[at(1), at(2), at(9), at(10)]);
        let pieces: Vec<_> = slot.rest().iter().map(|b| (b.address().addr(), b.len())).collect();
        assert_eq!(pieces, [(4096, 8192), (9 * 4096, 4096)]);
    }
}
