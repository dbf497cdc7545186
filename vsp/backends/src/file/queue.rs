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
    BlockError, BlockErrorKind, Buffer, Completion, Completions, Operation, Queue, Request, SECTOR,
    check,
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

/// An aligned copy of what a guest writes from unaligned memory, a part at a time.
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
    /// A direct write of an aligned copy.
    Copy,
    PunchHole,
    ZeroRange,
    /// Zeroes written like any data.
    WriteZeroes,
    Sync,
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
        let read = slot.operation == Operation::Read;
        let whole_sectors = (slot.offset | slot.left).is_multiple_of(u64::from(SECTOR));
        match self.direct {
            Some((_, alignment)) if slot.is_aligned(alignment) => Method::Direct,
            Some(_) if !read && whole_sectors => Method::Copy,
            _ => Method::Buffered,
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
            (Method::Direct | Method::Copy, Some((target, _))) => *target,
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
            0 if matches!(slot.method, Method::PunchHole | Method::ZeroRange | Method::Sync) => {
                return Some(Ok(slot.len));
            }
            // The file has shrunk, or the host writes nothing without a reason.
            0 => return Some(Err(BlockError::new(BlockErrorKind::Io))),
            1.. => {
                slot.advance(result as u64);
                slot.attempts = 0;
                if slot.left == 0 {
                    return Some(Ok(slot.len));
                }
                if matches!(slot.operation, Operation::Read | Operation::Write { .. }) {
                    let slot = self.slots.get(index)?;
                    let method = self.transfer_method(slot);
                    self.slots.get_mut(index)?.method = method;
                }
                return None;
            }
            _ => result.wrapping_neg(),
        };
        match (errno, slot.method) {
            (libc::EINTR | libc::EAGAIN, _) if slot.attempts < MAX_ATTEMPTS => {
                slot.attempts += 1;
                return None;
            }
            // The host demands more alignment than it has told.
            (libc::EINVAL, Method::Direct) => {
                let read = slot.operation == Operation::Read;
                slot.method = if read { Method::Buffered } else { Method::Copy };
                return None;
            }
            (libc::EINVAL, Method::Copy) => {
                slot.method = Method::Buffered;
                return None;
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
            _ => return Some(Err(BlockError::from_errno(errno))),
        }
        // A host that cannot discard has all the same done what was asked for: a discard is a hint.
        let Operation::WriteZeroes { may_unmap } = self.slots.get(index)?.operation else {
            return Some(Ok(self.slots.get(index)?.len));
        };
        let method = self.zero_method(may_unmap);
        self.slots.get_mut(index)?.method = method;
        None
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
        Operation::Write { fua: true } => libc::RWF_DSYNC,
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
        Method::Copy => {
            let bytes = slot.fill_copy();
            opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32)
                .offset(offset)
                .rw_flags(write_flags)
                .build()
        }
        Method::PunchHole | Method::ZeroRange => {
            let mode = match slot.method {
                Method::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
                _ => libc::FALLOC_FL_ZERO_RANGE,
            };
            opcode::Fallocate::new(fd, slot.left)
                .offset(offset)
                .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
                .build()
        }
        Method::WriteZeroes => {
            let page = ZEROES.0.len() as u64;
            let zeroes = |len: u64| Buffer::new(ZEROES.0.as_ptr().cast_mut(), len as usize);
            let whole = (slot.left / page).min(256);
            slot.pieces.clear();
            slot.first = 0;
            match whole {
                0 => slot.pieces.push(zeroes(slot.left)),
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
        let Image { size, read_only, .. } = *self.image;
        if let Err(error) = check(size, SECTOR, read_only, &request) {
            return done.push(Completion { id, result: Err(error) });
        }
        let nothing = match operation {
            Operation::Flush => read_only,
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
        _uring: Uring,
        _memory: Box<Page>,
        _directory: tempfile::TempDir,
    }

    impl Scripted {
        fn new(operation: Operation) -> Self {
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
            let request = Request { id: 0, operation, offset: 0, len: 4096, buffers: &buffers };
            let mut done = Completions::default();
            // SAFETY: the memory is dropped after the ring.
            unsafe { queue.submit(request, &mut uring, &mut done) };
            assert_eq!((done.len(), queue.in_flight()), (0, 1));
            Self { queue, _uring: uring, _memory: memory, _directory: directory }
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
        // From the middle of a sector there is no way around the page cache.
        assert_eq!(write.method_after(100), Ok(Method::Buffered));
        assert_eq!(write.method_after(412), Ok(Method::Direct));
        assert_eq!(write.method_after(3072), Err(Ok(4096)));
        let mut read = Scripted::new(Operation::Read);
        assert_eq!(read.method_after(100), Ok(Method::Buffered));
        assert_eq!(read.method_after(0), Err(Err(BlockErrorKind::Io)));
    }

    #[test]
    fn a_host_that_is_pickier_than_it_said() {
        let mut read = Scripted::new(Operation::Read);
        assert_eq!(read.method_after(-libc::EINVAL), Ok(Method::Buffered));
        assert_eq!(read.method_after(-libc::EINVAL), Err(Err(BlockErrorKind::Io)));
        let mut write = Scripted::new(WRITE);
        assert_eq!(write.method_after(-libc::EINVAL), Ok(Method::Copy));
        assert_eq!(write.method_after(-libc::EINVAL), Ok(Method::Buffered));
        assert_eq!(write.method_after(-libc::ENOSPC), Err(Err(BlockErrorKind::NoSpace)));
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
