//! The worker of one channel: a thread with an io_uring of its own, which does what the registers
//! ask for while the processors go on.
//!
//! `unsafe` is the promise to the disks that the buffers of a request stay: they lie in guest memory,
//! which is kept mapped for longer than the io_uring lives, or in the job's own buffer, which is held
//! until the request has ended or the io_uring is gone.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use backends::block::{
    BlockError, BlockErrorKind, Buffer, Completion, Completions, Operation, Queue, Request, SECTOR,
};
use backends::uring::{Doorbell, Remains, Tag, Token, Uring};
use hypervisor::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Job, Outcome, Work};
use super::{Attached, Port, table};

const DOORBELL: Token = Token::new(Tag::WORKER, 0);

/// Fields are dropped in order: the io_uring first, so that nothing reaches memory any more when the
/// rest goes.
pub(super) struct Worker {
    uring: Uring,
    port: Arc<Port>,
    memory: GuestMemory,
    disks: [Option<(u64, Box<dyn Queue>)>; 2],
    doorbell: Doorbell<Arc<EventFd>>,
    done: Completions,
    buffers: Vec<Buffer>,
}

/// A job that is being carried out. If the host's failure or a panic cuts it short, its buffer may be in
/// use for as long as the io_uring is there.
struct Held {
    job: Option<Job>,
    remains: Remains,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            self.remains.keep(job);
        }
    }
}

impl Worker {
    /// Made in the thread that will run it, as an io_uring belongs to its thread.
    pub(super) fn new(
        port: Arc<Port>,
        memory: GuestMemory,
        disks: &[Option<Attached>; 2],
    ) -> io::Result<Self> {
        let mut uring = Uring::new(8)?;
        let mut queue = |place: usize, tag| match disks.get(place).and_then(Option::as_ref) {
            Some(Attached { disk, .. }) => {
                let queue = disk.queue(Tag(tag), 1, &mut uring)?;
                Ok::<_, io::Error>(Some((disk.geometry().size, queue)))
            }
            None => Ok(None),
        };
        let disks = [queue(0, 1)?, queue(1, 2)?];
        let doorbell = Doorbell::new(Arc::clone(&port.doorbell), DOORBELL);
        doorbell.arm(&mut uring)?;
        Ok(Self {
            uring,
            port,
            memory,
            disks,
            doorbell,
            done: Completions::with_capacity(1),
            buffers: Vec::new(),
        })
    }

    /// Serves the channel until it is to be stopped.
    pub(super) fn run(&mut self) -> io::Result<()> {
        while !self.port.stop.load(Ordering::Acquire) {
            let mut channel = self.port.lock();
            let (anew, job) = (channel.take_anew(), channel.take_job());
            drop(channel);
            if anew {
                for (_, queue) in self.disks.iter_mut().flatten() {
                    queue.disclaim();
                }
            }
            let mut held = Held { job, remains: self.uring.remains() };
            match &mut held.job {
                Some(job) => {
                    let outcome = self.carry_out(job)?;
                    if let Some(job) = held.job.take() {
                        self.port.access(|channel| channel.finish(job.buffer, outcome));
                    }
                }
                None => self.sleep()?,
            }
        }
        Ok(())
    }

    /// Sleeps until something has happened, and hears it.
    fn sleep(&mut self) -> io::Result<()> {
        self.uring.submit_and_wait(1)?;
        self.hear()
    }

    fn hear(&mut self) -> io::Result<()> {
        while let Some(cqe) = self.uring.next() {
            if cqe.token == DOORBELL {
                self.doorbell.heard(&cqe, &mut self.uring)?;
            } else if let Some(Some((_, queue))) =
                usize::from(cqe.token.tag().0).checked_sub(1).and_then(|at| self.disks.get_mut(at))
            {
                queue.complete(&cqe, &mut self.uring, &mut self.done);
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, job: &mut Job) -> io::Result<Outcome> {
        let write = |fua| Operation::Write { fua };
        let (operation, offset, len, table) = match job.work {
            Work::Read { offset, len } => (Operation::Read, offset, len, None),
            Work::Write { offset, len, fua } => (write(fua), offset, len, None),
            Work::ReadDma { offset, len, table } => (Operation::Read, offset, len, Some(table)),
            Work::WriteDma { offset, len, table, fua } => (write(fua), offset, len, Some(table)),
            Work::Flush => (Operation::Flush, 0, 0, None),
            Work::Trim { len, table } => return self.trim(job, len, table),
            Work::Send { len, table } => return Ok(self.send(&job.buffer, len, table)),
        };
        let mut table_left = false;
        match table {
            Some(table) => match table::walk(&self.memory, table, len, &mut self.buffers) {
                Ok(left) => table_left = left,
                Err(table::BadTable) => return Ok(Outcome::Table),
            },
            None => {
                self.buffers.clear();
                self.buffers.push(Buffer::from(&mut *job.buffer));
            }
        }
        Ok(match self.request(job.drive, operation, offset, len.into())? {
            Ok(()) => Outcome::Done { table_left },
            Err(error) => Outcome::Disk(error.kind),
        })
    }

    /// Makes a request with `self.buffers` and waits for its end.
    fn request(
        &mut self,
        drive: usize,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> io::Result<Result<(), BlockError>> {
        let Some(Some((_, queue))) = self.disks.get_mut(drive) else {
            return Ok(Err(BlockError::new(BlockErrorKind::Unsupported)));
        };
        let request = Request { id: 0, operation, offset, len, buffers: &self.buffers };
        // SAFETY: see the module's documentation.
        unsafe { queue.submit(request, &mut self.uring, &mut self.done) };
        loop {
            if let Some(Completion { result, .. }) = self.done.pop() {
                return Ok(match result {
                    Ok(bytes) if bytes < len => Err(BlockError::new(BlockErrorKind::Io)),
                    Ok(_) => Ok(()),
                    Err(error) => {
                        if error.errno.is_some() {
                            super::limited_warning(drive, &error);
                        }
                        Err(error)
                    }
                });
            }
            self.sleep()?;
        }
    }

    /// Copies the start of `buffer` to the guest's memory.
    fn send(&mut self, buffer: &[u8], len: u32, table: u32) -> Outcome {
        let Ok(table_left) = table::walk(&self.memory, table, len, &mut self.buffers) else {
            return Outcome::Table;
        };
        let mut rest = buffer;
        for target in self.buffers.drain(..) {
            let (source, later) = rest.split_at(target.len().min(rest.len()));
            // SAFETY: the walk has found these bytes in guest memory, which stays mapped and is
            // nobody's by reference.
            unsafe { std::ptr::copy(source.as_ptr(), target.address(), source.len()) };
            rest = later;
        }
        Outcome::Done { table_left }
    }

    /// Discards ranges that lie in the guest's memory: eight bytes each, the first sector in 48 bits
    /// and how many there are in 16 (ATA8-ACS-2, section 7.5.3.2).
    fn trim(&mut self, job: &mut Job, len: u32, table: u32) -> io::Result<Outcome> {
        let Ok(table_left) = table::walk(&self.memory, table, len, &mut self.buffers) else {
            return Ok(Outcome::Table);
        };
        let Some(private) = job.buffer.get_mut(..len as usize) else { return Ok(Outcome::Table) };
        let mut rest = &mut *private;
        for buffer in self.buffers.drain(..) {
            let (target, later) = rest.split_at_mut(buffer.len().min(rest.len()));
            // SAFETY: the walk has found these bytes in guest memory, which stays mapped; the guest
            // may change them meanwhile, which makes the copy some of both and nothing worse.
            unsafe { std::ptr::copy(buffer.address(), target.as_mut_ptr(), target.len()) };
            rest = later;
        }
        let size = match self.disks.get(job.drive) {
            Some(Some((size, _))) => *size,
            _ => 0,
        };
        let sector = u64::from(SECTOR);
        let ranges = || {
            private.as_chunks::<8>().0.iter().filter_map(|entry| {
                let entry = u64::from_le_bytes(*entry);
                let (first, count) = (entry & 0xffff_ffff_ffff, entry >> 48);
                (count > 0).then_some((first * sector, count * sector))
            })
        };
        // All of them are looked at before the first is gone.
        if ranges().any(|(offset, len)| offset + len > size) {
            return Ok(Outcome::Range);
        }
        for (offset, len) in ranges() {
            if self.port.stop.load(Ordering::Acquire) {
                break; // nobody hears of the rest
            }
            if let Err(error) = self.request(job.drive, Operation::Discard, offset, len)? {
                return Ok(Outcome::Disk(error.kind));
            }
        }
        Ok(Outcome::Done { table_left })
    }
}
