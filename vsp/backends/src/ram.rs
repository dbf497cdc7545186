//! A disk in memory, for tests and benches: what a service provider costs when the disk is free.
//!
//! Requests end inside [`Queue::submit`]. The memory is one anonymous mapping, so an untouched
//! disk takes none and a discard gives it back.
//!
//! `unsafe` copies between that mapping and the buffers of requests by address. Several queues may
//! do so at once, as several heads write one medium: a reader that races a writer may see some of
//! both, as on any disk, and nothing is ever held as a reference into the mapping.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::block::{
    BlockError, Capacity, Completion, Completions, Disk, Geometry, Operation, Queue, Request, check,
};
use crate::uring::{Cqe, Tag, Uring};

const PAGE: u64 = 4096;

/// A disk that lives as long as the process.
#[derive(Clone, Debug)]
pub struct RamDisk {
    memory: Arc<Memory>,
    geometry: Geometry,
    capacity: Capacity,
    /// What a refresh finds.
    resized: Capacity,
}

impl RamDisk {
    /// An empty disk of `size` bytes, a multiple of 512.
    pub fn new(size: u64) -> io::Result<Self> {
        if size == 0 || !size.is_multiple_of(512) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let geometry = Geometry {
            discard: true,
            discard_granularity: PAGE as u32,
            discard_zeroes: true,
            write_zeroes: true,
            id: "ram".into(),
            ..Geometry::new(size)
        };
        let memory = Arc::new(Memory::new(size)?);
        Ok(Self { memory, geometry, capacity: Capacity::new(size), resized: Capacity::new(size) })
    }

    /// Gives it, and all its clones, another size, but no larger one than it was made with. Nobody
    /// sees that before [`Disk::refresh`].
    pub fn resize(&self, size: u64) {
        let block = u64::from(self.geometry.logical_block);
        self.resized.set(size.min(self.memory.len as u64) / block * block);
    }

    /// The same disk, with another idea of itself: `change` may set anything but a larger size.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Geometry)) -> Self {
        change(&mut self.geometry);
        self.geometry.size = self.geometry.size.min(self.memory.len as u64);
        self.capacity = Capacity::new(self.geometry.size);
        self.resized = Capacity::new(self.geometry.size);
        self
    }

    /// Copies bytes out of the disk, without a queue.
    ///
    /// # Panics
    /// If they reach past its end.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let from = self.memory.at(offset, bytes.len() as u64);
        // SAFETY: `at` has checked the range, and `bytes` is not part of the mapping.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes onto the disk, without a queue.
    ///
    /// # Panics
    /// If they reach past its end.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.memory.at(offset, bytes.len() as u64);
        // SAFETY: `at` has checked the range, and `bytes` is not part of the mapping.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}

impl Disk for RamDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.capacity.get(), ..self.geometry.clone() }
    }

    fn capacity(&self) -> Capacity {
        self.capacity.clone()
    }

    fn refresh(&self) -> io::Result<u64> {
        let size = self.resized.get();
        self.capacity.set(size);
        Ok(size)
    }

    fn queue(&self, _: Tag, _: u16, _: &mut Uring) -> io::Result<Box<dyn Queue>> {
        let Geometry { logical_block, read_only, .. } = self.geometry;
        let (memory, capacity) = (Arc::clone(&self.memory), self.capacity.clone());
        Ok(Box::new(RamQueue { memory, capacity, logical_block, read_only }))
    }
}

struct RamQueue {
    memory: Arc<Memory>,
    capacity: Capacity,
    logical_block: u32,
    read_only: bool,
}

impl RamQueue {
    /// # Safety
    /// As [`Queue::submit`].
    unsafe fn run(&self, request: &Request<'_>) -> Result<u64, BlockError> {
        check(self.capacity.get(), self.logical_block, self.read_only, request)?;
        match request.operation {
            Operation::Read | Operation::Write { .. } => {
                let read = request.operation == Operation::Read;
                let mut place = self.memory.at(request.offset, request.len);
                let mut left = request.len as usize;
                for buffer in request.buffers {
                    let len = buffer.len().min(left);
                    let (from, to) =
                        if read { (place, buffer.address()) } else { (buffer.address(), place) };
                    // SAFETY: the caller vouches for the buffer; the other side was checked above
                    // and `left` keeps within it; a guest's memory is no part of this mapping.
                    unsafe { ptr::copy_nonoverlapping(from, to, len) };
                    place = place.wrapping_add(len);
                    left -= len;
                }
            }
            Operation::Flush => {}
            Operation::Discard | Operation::WriteZeroes { .. } => {
                self.memory.zero(request.offset, request.len);
            }
        }
        Ok(request.len)
    }
}

impl Queue for RamQueue {
    unsafe fn submit(&mut self, request: Request<'_>, _: &mut Uring, done: &mut Completions) {
        // SAFETY: the caller vouches for the buffers.
        let result = unsafe { self.run(&request) };
        done.push(Completion { id: request.id, result });
    }

    fn complete(&mut self, _: &Cqe, _: &mut Uring, _: &mut Completions) {}

    fn in_flight(&self) -> usize {
        0
    }
}

/// An anonymous mapping.
#[derive(Debug)]
struct Memory {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: it is plain memory, used by address alone.
unsafe impl Send for Memory {}
// SAFETY: as above; what concurrent copies may see is in the module's documentation.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(size: u64) -> io::Result<Self> {
        let len = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping where there is none.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// The address of `offset`, from which `len` bytes are within the mapping.
    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len as u64), "outside the disk");
        self.start.as_ptr().cast::<u8>().wrapping_add(offset as usize)
    }

    /// Whole pages are given back, and are zero when they are touched again.
    fn zero(&self, offset: u64, len: u64) {
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(PAGE), end - end % PAGE);
        let clear = |from: u64, to: u64| {
            // SAFETY: `at` has checked the range.
            unsafe { self.at(from, to - from).write_bytes(0, (to - from) as usize) };
        };
        if first >= last {
            return clear(offset, end);
        }
        clear(offset, first);
        let pages = self.at(first, last - first).cast();
        // SAFETY: whole pages of this mapping, of whose content nobody holds a reference.
        let given_back = unsafe { madvise(pages, (last - first) as usize, Advice::LinuxDontNeed) };
        if given_back.is_err() {
            clear(first, last);
        }
        clear(last, end);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more: queues hold it by `Arc`.
        if let Err(error) = unsafe { munmap(self.start.as_ptr(), self.len) } {
            limited::warn!(%error, "could not unmap a disk in memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockErrorKind, Buffer};

    fn run(disk: &RamDisk, operation: Operation, offset: u64, bytes: &mut [u8]) -> Completion {
        let mut uring = Uring::new(1).unwrap();
        let mut done = Completions::with_capacity(1);
        let mut queue = disk.queue(Tag(1), 1, &mut uring).unwrap();
        let len = bytes.len() as u64;
        let buffers: Vec<Buffer> = bytes.chunks_mut(700).map(Buffer::from).collect();
        let request = Request { id: 3, operation, offset, len, buffers: &buffers };
        // SAFETY: the bytes outlive the request, which ends at once.
        unsafe { queue.submit(request, &mut uring, &mut done) };
        assert_eq!(done.len(), 1);
        done.pop().unwrap()
    }

    #[test]
    fn it_keeps_what_is_written() {
        let disk = RamDisk::new(1 << 20).unwrap();
        let mut bytes: Vec<u8> = (0..8192u32).map(|i| (i * 7) as u8).collect();
        let write = Operation::Write { fua: false };
        assert_eq!(run(&disk, write, 512, &mut bytes).result, Ok(8192));
        let mut back = vec![0; 8192];
        assert_eq!(run(&disk, Operation::Read, 512, &mut back).result, Ok(8192));
        assert_eq!(back, bytes);

        // Zeroes from 1024 to 9216: a part of a page, a page, a part of a page.
        let mut none = vec![0; 8192];
        assert_eq!(run(&disk, Operation::Discard, 1024, &mut none).result, Ok(8192));
        let mut back = vec![1; 8704];
        disk.read(512, &mut back);
        assert_eq!(back[..512], bytes[..512]);
        assert!(back[512..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn it_refuses_what_it_must() {
        let disk = RamDisk::new(4096).unwrap().with(|geometry| geometry.read_only = true);
        let kind = |completion: Completion| completion.result.unwrap_err().kind;
        let mut bytes = [0; 1024];
        assert_eq!(kind(run(&disk, Operation::Read, 3584, &mut bytes)), BlockErrorKind::OutOfRange);
        let write = Operation::Write { fua: true };
        assert_eq!(kind(run(&disk, write, 0, &mut bytes)), BlockErrorKind::ReadOnly);
        assert!(RamDisk::new(0).is_err());
        assert!(RamDisk::new(513).is_err());
    }
}
