//! What a disk is.
//!
//! ```text
//!   Disk    what it is (Geometry); shared by everybody who uses it
//!    └─ queue() ─> Queue    one worker's path to it: takes requests, never blocks, never shared
//!                    ├─ submit(Request)  ─┐
//!                    └─ complete(Cqe)    ─┴─> Completions    what has ended, with its result
//! ```
//!
//! A worker submits requests to its queues, enters its ring once for all of them, and gives each
//! completion of the ring to the queue whose [`Tag`] it carries. Data moves between the disk and
//! the buffers of the request and nowhere in between.
//!
//! A disk of one's own takes a type for each trait:
//!
//! ```
//! use std::io;
//! use backends::block::{
//!     BlockError, BlockErrorKind, Completion, Completions, Disk, Geometry, Operation, Queue, Request,
//! };
//! use backends::uring::{Cqe, Tag, Uring};
//!
//! /// A disk of zeroes. It forgets what is written to it.
//! struct ZeroDisk;
//!
//! impl Disk for ZeroDisk {
//!     fn geometry(&self) -> Geometry {
//!         Geometry { id: "zero".into(), ..Geometry::new(1 << 30) }
//!     }
//!     fn queue(&self, _: Tag, _depth: u16, _: &mut Uring) -> io::Result<Box<dyn Queue>> {
//!         Ok(Box::new(ZeroQueue))
//!     }
//! }
//!
//! struct ZeroQueue;
//!
//! impl Queue for ZeroQueue {
//!     unsafe fn submit(&mut self, request: Request<'_>, _: &mut Uring, done: &mut Completions) {
//!         let result = match request.operation {
//!             Operation::Read => {
//!                 for buffer in request.buffers {
//!                     // SAFETY: the caller of `submit` vouches for its buffers.
//!                     unsafe { buffer.address().write_bytes(0, buffer.len()) };
//!                 }
//!                 Ok(request.len)
//!             }
//!             Operation::Write { .. } | Operation::Flush => Ok(request.len),
//!             _ => Err(BlockError::new(BlockErrorKind::Unsupported)),
//!         };
//!         done.push(Completion { id: request.id, result });
//!     }
//!     fn complete(&mut self, _: &Cqe, _: &mut Uring, _: &mut Completions) {}
//!     fn in_flight(&self) -> usize {
//!         0
//!     }
//! }
//!
//! let mut uring = Uring::new(8)?;
//! let mut queue = ZeroDisk.queue(Tag(1), 4, &mut uring)?;
//! let mut done = Completions::with_capacity(4);
//! let mut sector = [0xffu8; 512];
//! let buffers = [sector.as_mut_slice().into()];
//! let request = Request { id: 9, operation: Operation::Read, offset: 0, len: 512, buffers: &buffers };
//! // SAFETY: the sector is not used before the request has ended.
//! unsafe { queue.submit(request, &mut uring, &mut done) };
//! assert_eq!(done.pop().unwrap(), Completion { id: 9, result: Ok(512) });
//! assert_eq!(sector, [0; 512]);
//! # Ok::<(), io::Error>(())
//! ```
//!
//! `unsafe` appears here only in a contract, that of [`Queue::submit`], and in the promise that an
//! address may cross threads.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::uring::{Cqe, Tag, Uring};

/// The unit in which every disk can be addressed, in bytes: the classic sector.
pub const SECTOR: u32 = 512;

/// What a disk is. All sizes in bytes; none of it but `size` changes while the disk is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Of the whole disk at the moment: a multiple of `logical_block`, and not 0 when it is opened.
    /// It is [`Disk::capacity`] that tells when it changes.
    pub size: u64,
    /// Offsets and lengths of requests are multiples of this: 512, or a larger power of two.
    pub logical_block: u32,
    /// The unit the medium really writes: a multiple of `logical_block`. A hint.
    pub physical_block: u32,
    /// Writes of any kind end with [`BlockErrorKind::ReadOnly`].
    pub read_only: bool,
    /// Whether [`Operation::Discard`] frees space. If not, it does nothing.
    pub discard: bool,
    /// Discards free whole units of this size, at multiples of it.
    pub discard_granularity: u32,
    /// Whether discarded blocks are known to read as zeroes.
    pub discard_zeroes: bool,
    /// Whether zeroes can be written without sending them.
    pub write_zeroes: bool,
    /// Whether seeks cost time.
    pub rotational: bool,
    /// Names the disk, the same in every run: what a guest sees as its serial number.
    pub id: String,
}

impl Geometry {
    /// A writable disk of `size` bytes in 512-byte blocks, with no talents.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            logical_block: SECTOR,
            physical_block: SECTOR,
            read_only: false,
            discard: false,
            discard_granularity: SECTOR,
            discard_zeroes: false,
            write_zeroes: false,
            rotational: false,
            id: String::new(),
        }
    }
}

/// The size of a disk in bytes, as its queues check requests against it. It may change while the
/// disk is attached, in whole blocks; all clones see the same.
#[derive(Clone, Debug)]
pub struct Capacity(Arc<AtomicU64>);

impl Capacity {
    /// That of a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self(Arc::new(AtomicU64::new(size)))
    }

    /// In bytes.
    pub fn get(&self) -> u64 {
        // It guards no other memory.
        self.0.load(Ordering::Relaxed)
    }

    /// For the disk itself. Returns what it was before.
    pub fn set(&self, size: u64) -> u64 {
        self.0.swap(size, Ordering::Relaxed)
    }
}

/// Something that keeps blocks. It is shared; the work is done by queues.
///
/// Of every disk that is here today, this holds:
///
/// - A flush that has failed has lost data, and nobody can say which. So no later flush succeeds,
///   by whichever queue, for as long as the disk is open; also one that follows a restart of the
///   guest. A write with `fua` whose data may not have become stable counts as such a flush.
/// - Sectors that are not part of a request keep their content, whatever other requests, from
///   whatever memory, are under way beside it.
/// - What reaches past the end ends with [`BlockErrorKind::OutOfRange`], also if the end has come
///   nearer a moment ago; it never waits for what will not come.
pub trait Disk: Send + Sync {
    /// What it is.
    fn geometry(&self) -> Geometry;

    /// Its size, for who has to see it change. A disk that is made anew for each call never does.
    fn capacity(&self) -> Capacity {
        Capacity::new(self.geometry().size)
    }

    /// Looks at the size anew, and has everybody see it: when a guest looks for its disks, when it
    /// restarts, when the user says so. Returns the size in bytes. It costs a system call, and may
    /// take as long as the host does to say how long a file is.
    fn refresh(&self) -> io::Result<u64> {
        Ok(self.geometry().size)
    }

    /// A path to the disk for the calling worker, which owns `uring`: up to `depth` requests at a
    /// time. Its operations carry `tag`, which is no other queue's of this worker.
    fn queue(&self, tag: Tag, depth: u16, uring: &mut Uring) -> io::Result<Box<dyn Queue>>;
}

/// One worker's path to a disk.
pub trait Queue {
    /// Takes a request. It goes to the host with the worker's next submit, or has ended already if
    /// its completion is in `done` on return. Every request ends exactly once, also one that is
    /// refused: past the end, not in whole blocks, more than `depth` at a time.
    ///
    /// # Safety
    /// Every buffer must be memory that may be read and, for a read, written, until the request's
    /// completion is in `done` or `uring` has been dropped. Others may use that memory meanwhile,
    /// as guests do: what is then transferred is undefined, nothing else is.
    ///
    /// `uring` must be the one the queue was made with.
    unsafe fn submit(&mut self, request: Request<'_>, uring: &mut Uring, done: &mut Completions);

    /// Takes a completion of the worker's ring that carries this queue's tag. It may push further
    /// operations.
    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions);

    /// Requests taken and not ended. A worker that stops waits until it is 0.
    fn in_flight(&self) -> usize;

    /// The guest's driver has started anew: what it has claimed by its writes is free again. Only a
    /// disk with several paths knows of such claims ([`crate::paths`]). Nothing is in flight.
    fn disclaim(&mut self) {}
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// From the disk into the buffers.
    Read,
    /// From the buffers to the disk.
    Write {
        /// Force unit access: it ends only when these bytes are on stable storage.
        fua: bool,
    },
    /// Ends when every write that had ended before it was submitted is on stable storage.
    Flush,
    /// The bytes are no longer needed.
    Discard,
    /// The bytes read as zeroes from now on.
    WriteZeroes {
        /// Whether the space may be given back.
        may_unmap: bool,
    },
}

/// A piece of memory on one side of a transfer: an address of this process and a length in bytes.
/// Laid out as an iovec, so that an array of them is one the kernel takes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Buffer(libc::iovec);

// SAFETY: it is an address; whoever uses it answers for where it points (see `Queue::submit`).
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Says nothing about whether there is memory.
    pub const fn new(address: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: address.cast(), iov_len: len })
    }

    /// Of the first byte.
    pub const fn address(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// In bytes.
    #[allow(clippy::len_without_is_empty, reason = "not a collection")]
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }
}

impl From<&mut [u8]> for Buffer {
    fn from(bytes: &mut [u8]) -> Self {
        Self::new(bytes.as_mut_ptr(), bytes.len())
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.address(), self.len())
    }
}

/// One request to a disk.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The caller's own number; it comes back in the completion.
    pub id: u32,
    /// What to do.
    pub operation: Operation,
    /// Where on the disk, in bytes; a multiple of the logical block.
    pub offset: u64,
    /// How much, in bytes; a multiple of the logical block. 0 for a flush.
    pub len: u64,
    /// The memory of a read or write, in order: at least `len` bytes together, of which the first
    /// `len` are used. Not looked at by the other operations. The array itself is not needed after
    /// the call.
    pub buffers: &'a [Buffer],
}

/// How a request has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request's own number.
    pub id: u32,
    /// Bytes transferred, which are all that were asked for: a disk that cannot do all of them
    /// says why. A faulty one may say less.
    pub result: Result<u64, BlockError>,
}

/// What has ended, in order, until the worker takes it. It holds as many as can be under way, so
/// that it never allocates.
#[derive(Debug, Default)]
pub struct Completions(VecDeque<Completion>);

impl Completions {
    /// Room for `capacity` before it has to grow.
    pub fn with_capacity(capacity: usize) -> Self {
        Self(VecDeque::with_capacity(capacity))
    }

    /// Adds one.
    pub fn push(&mut self, completion: Completion) {
        self.0.push_back(completion);
    }

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<Completion> {
        self.0.pop_front()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What went wrong, in words that do not change with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockErrorKind {
    /// The host could not read or write.
    Io,
    /// The host has no space left for it.
    NoSpace,
    /// The disk cannot be written to.
    ReadOnly,
    /// It reaches past the end of the disk.
    OutOfRange,
    /// It is not in whole blocks, or its buffers are too small.
    Malformed,
    /// The disk cannot do it.
    Unsupported,
    /// There are too many requests under way.
    Busy,
}

impl fmt::Display for BlockErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "the host failed to read or write",
            Self::NoSpace => "the host has no space left",
            Self::ReadOnly => "the disk is read-only",
            Self::OutOfRange => "the request reaches past the end of the disk",
            Self::Malformed => "the request is malformed",
            Self::Unsupported => "the disk cannot do that",
            Self::Busy => "too many requests are under way",
        })
    }
}

/// Why a request failed: a stable kind, and the host's own number where it gave one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{kind}{}", if *errno == Some(libc::EFBIG) { " within the limit for file sizes" } else { "" })]
pub struct BlockError {
    /// What it comes down to.
    pub kind: BlockErrorKind,
    /// What the host said.
    pub errno: Option<i32>,
}

impl BlockError {
    /// One that the host has not said.
    pub const fn new(kind: BlockErrorKind) -> Self {
        Self { kind, errno: None }
    }

    /// One that the host has said.
    pub const fn from_errno(errno: i32) -> Self {
        let kind = match errno {
            // EFBIG: the host's file system, or a limit of this process, ends here.
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => BlockErrorKind::NoSpace,
            libc::EROFS | libc::EPERM | libc::EBADF => BlockErrorKind::ReadOnly,
            libc::EOPNOTSUPP | libc::ENOSYS => BlockErrorKind::Unsupported,
            _ => BlockErrorKind::Io,
        };
        Self { kind, errno: Some(errno) }
    }
}

impl Geometry {
    /// Whether a request can be carried out at all: in range, in whole blocks, enough buffer. Every
    /// queue asks this first, so that no disk sees a request it has to doubt.
    pub fn check(&self, request: &Request<'_>) -> Result<(), BlockError> {
        check(self.size, self.logical_block, self.read_only, request)
    }
}

/// [`Geometry::check`] for a queue that keeps only these three.
pub(crate) fn check(
    size: u64,
    block: u32,
    read_only: bool,
    request: &Request<'_>,
) -> Result<(), BlockError> {
    let transfer = match request.operation {
        Operation::Flush => return Ok(()),
        Operation::Read => true,
        _ if read_only => return Err(BlockError::new(BlockErrorKind::ReadOnly)),
        Operation::Write { .. } => true,
        Operation::Discard | Operation::WriteZeroes { .. } => false,
    };
    if request.offset.checked_add(request.len).is_none_or(|end| end > size) {
        return Err(BlockError::new(BlockErrorKind::OutOfRange));
    }
    let malformed = Err(BlockError::new(BlockErrorKind::Malformed));
    if (request.offset | request.len) & u64::from(block - 1) != 0 {
        return malformed;
    }
    if transfer {
        let sum = |sum: u64, buffer: &Buffer| sum.checked_add(buffer.len() as u64);
        if request.buffers.iter().try_fold(0, sum).is_none_or(|bytes| bytes < request.len) {
            return malformed;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(operation: Operation, offset: u64, len: u64, buffers: &[Buffer]) -> Request<'_> {
        Request { id: 0, operation, offset, len, buffers }
    }

    #[test]
    fn requests_are_checked() {
        let mut geometry = Geometry::new(1 << 20);
        let buffers = [Buffer::new(std::ptr::null_mut(), 1024)];
        let kind = |geometry: &Geometry, operation, offset, len| {
            geometry.check(&request(operation, offset, len, &buffers)).map_err(|error| error.kind)
        };
        let write = Operation::Write { fua: false };
        assert_eq!(kind(&geometry, Operation::Read, (1 << 20) - 1024, 1024), Ok(()));
        for (offset, len) in [((1 << 20) - 512, 1024), (u64::MAX - 511, 512), (1 << 20, 512)] {
            for operation in [Operation::Read, write, Operation::Discard] {
                let expected = Err(BlockErrorKind::OutOfRange);
                assert_eq!(kind(&geometry, operation, offset, len), expected);
            }
        }
        for (offset, len) in [(1, 512), (0, 511), (0, 1536)] {
            assert_eq!(kind(&geometry, write, offset, len), Err(BlockErrorKind::Malformed));
        }
        assert_eq!(kind(&geometry, Operation::Discard, 0, 1 << 20), Ok(()));
        geometry.read_only = true;
        for operation in [write, Operation::Discard, Operation::WriteZeroes { may_unmap: true }] {
            assert_eq!(kind(&geometry, operation, 0, 512), Err(BlockErrorKind::ReadOnly));
        }
        assert_eq!(kind(&geometry, Operation::Flush, 0, 0), Ok(()));
    }

    #[test]
    fn host_errors_get_stable_kinds() {
        let kind = |errno| BlockError::from_errno(errno).kind;
        assert_eq!(kind(libc::EIO), BlockErrorKind::Io);
        assert_eq!(kind(libc::ENOSPC), BlockErrorKind::NoSpace);
        assert_eq!(kind(libc::EDQUOT), BlockErrorKind::NoSpace);
        assert_eq!(kind(libc::EFBIG), BlockErrorKind::NoSpace);
        let said = BlockError::from_errno(libc::EFBIG).to_string();
        assert_eq!(said, "the host has no space left within the limit for file sizes");
        assert_eq!(kind(libc::EROFS), BlockErrorKind::ReadOnly);
        assert_eq!(kind(libc::EOPNOTSUPP), BlockErrorKind::Unsupported);
    }
}
