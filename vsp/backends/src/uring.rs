//! One worker's own `io_uring`.
//!
//! Everything a worker waits for completes in the same ring: its doorbell, its disks, later its
//! tap. So it sleeps in one place, and one `io_uring_enter` both hands over what it has collected
//! and brings back what is done. The ring is set up for exactly that use: one issuing thread, and
//! completion work that runs only when that thread asks for it (Linux 6.1; older kernels, down to
//! 5.15, get the same ring with fewer such promises).
//!
//! Completions carry a [`Token`]: 16 bits that say whose it is, 48 bits that are the owner's own.
//!
//! `unsafe` is needed here because an entry holds addresses that the kernel uses after the call
//! that handed it over has returned; [`Uring::push`] states what its caller owes.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, types};

pub use self::remains::Remains;

mod remains;

/// `user_data` of the entry by which a dropped ring cancels what is still under way.
const CANCEL: u64 = u64::MAX;

/// How long a dropped ring waits for what it has cancelled before it says so, and cancels again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Places for registered files in a ring.
const FILE_SLOTS: u32 = 64;

/// Whose completion it is: the worker itself or one of its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(pub u16);

impl Tag {
    /// The worker's own operations, such as its doorbell; queues get any other number but 0xffff.
    pub const WORKER: Self = Self(0);
}

/// What an operation is known by in its completion (`user_data`): a [`Tag`] in the high 16 bits,
/// a number of the owner's choice in the low 48.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(u64);

impl Token {
    const VALUE_BITS: u32 = 48;
    const VALUE_MASK: u64 = (1 << Self::VALUE_BITS) - 1;

    /// Bits of `value` above the 48th are lost.
    pub const fn new(tag: Tag, value: u64) -> Self {
        Self(((tag.0 as u64) << Self::VALUE_BITS) | (value & Self::VALUE_MASK))
    }

    /// Whose it is.
    pub const fn tag(self) -> Tag {
        Tag((self.0 >> Self::VALUE_BITS) as u16)
    }

    /// The owner's own number.
    pub const fn value(self) -> u64 {
        self.0 & Self::VALUE_MASK
    }

    /// As it stands in an entry.
    pub const fn user_data(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.tag().0, self.value())
    }
}

/// One completion, as the kernel wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    /// Which operation it is.
    pub token: Token,
    /// As the system call would return it: a count, or a negated errno.
    pub result: i32,
    /// `IORING_CQE_F_*`.
    pub flags: u32,
}

impl Cqe {
    /// Whether a multishot operation stays armed after this completion.
    pub fn more(&self) -> bool {
        cqueue::more(self.flags)
    }
}

/// What a ring has done so far. Enters per completion is the price of an I/O in system calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// `io_uring_enter` calls.
    pub enters: u64,
    /// Entries handed to the kernel.
    pub sqes: u64,
    /// Completions taken back.
    pub cqes: u64,
}

/// A file an operation can name: by its place in the ring's table of registered files, which
/// spares the kernel a reference count per operation, or by its descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    fd: types::Fd,
    flags: Flags,
}

impl Target {
    /// The file by its descriptor. It has to stay open while entries that name it are under way.
    pub fn descriptor(fd: BorrowedFd<'_>) -> Self {
        Self { fd: types::Fd(fd.as_raw_fd()), flags: Flags::empty() }
    }

    /// What the entry's builder takes as its descriptor.
    pub fn fd(&self) -> types::Fd {
        self.fd
    }

    /// Flags the built entry must be given for [`Self::fd`] to mean this file.
    pub fn flags(&self) -> Flags {
        self.flags
    }

    /// Whether it is in the table of registered files.
    pub fn is_registered(&self) -> bool {
        self.flags.contains(Flags::FIXED_FILE)
    }
}

/// A worker's ring. It is made in the thread that uses it and cannot leave it: kernels hold a
/// single-issuer ring to that.
///
/// Dropping it cancels what is still under way and waits for it, so that the kernel touches no
/// buffer afterwards. What cannot be cancelled, such as a write that a disk is busy with, is waited
/// for as long as it takes; a line says so. It should therefore be declared before, and so dropped
/// before, what its operations point into. A queue's own memory is safe in any order: see [`Remains`].
pub struct Uring {
    ring: IoUring,
    /// Completion work waits for an enter that asks for it.
    deferred: bool,
    in_flight: u64,
    /// Operations since the last enter.
    collected: usize,
    counters: Counters,
    files: u32,
    file_slots: u32,
    /// Operations that may wait for ever, by what they carry: kernels before 5.19 cancel none whose
    /// name they are not told.
    waits: Vec<u64>,
    remains: Remains,
    /// Not `Send`.
    thread: PhantomData<*mut ()>,
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("fd", &self.ring.as_raw_fd())
            .field("deferred", &self.deferred)
            .field("in_flight", &self.in_flight)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl AsRawFd for Uring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Uring {
    /// A ring for the calling thread that collects up to `entries` operations between two enters
    /// (rounded up to a power of two); four times as many completions fit.
    pub fn new(entries: u32) -> io::Result<Self> {
        let (ring, deferred) = Self::build(entries)?;
        let file_slots = match ring.submitter().register_files_sparse(FILE_SLOTS) {
            Ok(()) => FILE_SLOTS,
            // Before 5.19; operations then name their files by descriptor.
            Err(_) => 0,
        };
        Ok(Self {
            ring,
            deferred,
            in_flight: 0,
            collected: 0,
            counters: Counters::default(),
            files: 0,
            file_slots,
            waits: Vec::new(),
            remains: Remains::default(),
            thread: PhantomData,
        })
    }

    /// Takes the best setup the kernel knows: it refuses flags it does not with `EINVAL`.
    fn build(entries: u32) -> io::Result<(IoUring, bool)> {
        let base = || {
            let mut builder = IoUring::builder();
            builder.dontfork().setup_clamp().setup_cqsize(entries.saturating_mul(4));
            builder
        };
        let refused = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);

        // 6.1
        let mut builder = base();
        builder.setup_submit_all().setup_taskrun_flag();
        builder.setup_single_issuer().setup_defer_taskrun();
        match builder.build(entries) {
            Err(error) if refused(&error) => {}
            result => return result.map(|ring| (ring, true)),
        }
        // 5.19
        let mut builder = base();
        builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
        match builder.build(entries) {
            Err(error) if refused(&error) => {}
            result => return result.map(|ring| (ring, false)),
        }
        base().build(entries).map(|ring| (ring, false))
    }

    /// Whether completion work runs only when this thread asks for it (Linux 6.1).
    pub fn is_deferred(&self) -> bool {
        self.deferred
    }

    /// Adds an operation to those that the next enter hands over. Enters at once if there is no
    /// room left, and fails only if the kernel then takes nothing.
    ///
    /// # Safety
    /// What the entry points to must stay valid, and must not be used in ways that conflict with
    /// the operation, until its completion has come out of [`Self::next`] (the last one, if it has
    /// several) or this ring has been dropped. Structures that only describe the operation, such
    /// as an array of iovecs, must stay so until it has been handed over.
    pub unsafe fn push(&mut self, entry: &Entry) -> io::Result<()> {
        // A full queue is handed over; if the kernel is out of memory for a moment, it may take a
        // second call.
        for _ in 0..4 {
            // SAFETY: the caller vouches for what the entry points to.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.in_flight += 1;
                self.collected += 1;
                return Ok(());
            }
            self.enter(0)?;
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// [`Self::push`] of an operation that may not end by itself, such as a poll or a receive. Its
    /// token stays the same when it is pushed again.
    ///
    /// # Safety
    /// As [`Self::push`].
    pub unsafe fn push_waiting(&mut self, entry: Entry, token: Token) -> io::Result<()> {
        if !self.waits.contains(&token.0) {
            self.waits.push(token.0);
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { self.push(&entry.user_data(token.0)) }
    }

    /// Where a queue leaves what the kernel may still use when the queue goes.
    pub fn remains(&self) -> Remains {
        self.remains.clone()
    }

    /// Operations collected and not yet handed over.
    pub fn pending(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Operations collected since the last enter. Unlike [`Self::pending`] it does not look at memory
    /// that the kernel shares.
    pub fn collected(&self) -> usize {
        self.collected
    }

    /// Operations whose last completion has not come out of [`Self::next`] yet.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// What this ring has done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Hands over what was collected and brings in what is done, without waiting. Costs a system
    /// call only if there is something to do.
    pub fn submit(&mut self) -> io::Result<()> {
        let submission = self.ring.submission();
        if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
            return Ok(());
        }
        drop(submission);
        self.enter(0)
    }

    /// Whether [`Self::submit`] or [`Self::next`] has something to do, by a look at memory that
    /// the kernel shares: for polling.
    pub fn is_ready(&mut self) -> bool {
        let submission = self.ring.submission();
        let work = submission.taskrun() || !submission.is_empty();
        drop(submission);
        work || !self.ring.completion().is_empty()
    }

    /// Hands over what was collected and sleeps until `want` completions are there to be taken. A
    /// signal to the thread may end the wait early.
    pub fn submit_and_wait(&mut self, want: usize) -> io::Result<()> {
        if self.ring.completion().len() >= want {
            return self.submit();
        }
        self.enter(want)
    }

    /// As [`Self::submit_and_wait`], but no longer than `timeout`.
    pub fn submit_and_wait_timeout(&mut self, want: usize, timeout: Duration) -> io::Result<()> {
        if self.ring.completion().len() >= want {
            return self.submit();
        }
        let timespec = types::Timespec::from(timeout);
        let arguments = types::SubmitArgs::new().timespec(&timespec);
        self.counters.enters += 1;
        self.collected = 0;
        let before = self.pending();
        let result = self.ring.submitter().submit_with_args(want, &arguments);
        self.counters.sqes += before.saturating_sub(self.pending()) as u64;
        tolerate(result.map(drop))
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        let mut pending = self.pending();
        self.collected = 0;
        loop {
            self.counters.enters += 1;
            // GETEVENTS even when not waiting: it lets deferred completion work run in a call that
            // is made anyway.
            // SAFETY: no argument is passed, so the kernel reads only the queue, whose entries
            // were vouched for when they were pushed.
            let result = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(
                    pending as u32,
                    want as u32,
                    EnterFlags::GETEVENTS.bits(),
                    None,
                )
            };
            let left = self.pending();
            self.counters.sqes += pending.saturating_sub(left) as u64;
            let progress = left < pending;
            pending = left;
            // Kernels before 5.18 stop at an entry they refuse, and leave the rest.
            match result {
                Ok(_) if pending > 0 && progress => {}
                result => return tolerate(result.map(drop)),
            }
        }
    }

    /// Takes the oldest completion that is there. It brings none in: see [`Self::submit`].
    ///
    /// One at a time, so that its owner can push the operation that follows from it.
    #[allow(clippy::should_implement_trait, reason = "an iterator would hold the ring")]
    pub fn next(&mut self) -> Option<Cqe> {
        let entry = self.ring.completion().next()?;
        let cqe =
            Cqe { token: Token(entry.user_data()), result: entry.result(), flags: entry.flags() };
        self.counters.cqes += 1;
        if !cqe.more() {
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        Some(cqe)
    }

    /// Puts a file into the ring's table. If the table is full or the kernel has none, the target
    /// names the descriptor itself, so the file must be kept open either way.
    ///
    /// The table keeps the file referenced until the ring is dropped.
    pub fn register_file(&mut self, fd: BorrowedFd<'_>) -> Target {
        if self.files < self.file_slots {
            let slot = self.files;
            let result = self.ring.submitter().register_files_update(slot, &[fd.as_raw_fd()]);
            if matches!(result, Ok(1)) {
                self.files += 1;
                return Target { fd: types::Fd(slot as RawFd), flags: Flags::FIXED_FILE };
            }
        }
        Target::descriptor(fd)
    }

    /// Cancels everything and waits for it. Returns the completions that nobody has heard of.
    fn drain(&mut self) -> io::Result<Vec<Cqe>> {
        let mut unheard = Vec::new();
        let mut told = false;
        while self.in_flight > 0 {
            self.cancel_all()?;
            let again = Instant::now() + PATIENCE;
            while self.in_flight > 0
                && let Some(left) = again.checked_duration_since(Instant::now())
            {
                self.submit_and_wait_timeout(1, left)?;
                while let Some(cqe) = self.next() {
                    match cqe.token.0 {
                        CANCEL if cqe.result == -libc::EINVAL => self.cancel_waits()?,
                        CANCEL => {}
                        _ => unheard.push(cqe),
                    }
                }
            }
            if self.in_flight > 0 && !told {
                told = true;
                tracing::warn!(
                    operations = self.in_flight,
                    "the host does not end I/O that was cancelled; its worker waits for it"
                );
            }
        }
        Ok(unheard)
    }

    /// Cancels whatever is under way (Linux 5.19).
    fn cancel_all(&mut self) -> io::Result<()> {
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any().all()).build();
        // SAFETY: a cancellation points to nothing.
        unsafe { self.push(&cancel.user_data(CANCEL)) }
    }

    /// Cancels by name what may wait for ever. Anything else ends by itself.
    fn cancel_waits(&mut self) -> io::Result<()> {
        for wait in std::mem::take(&mut self.waits) {
            let cancel = opcode::AsyncCancel::new(wait).build();
            // SAFETY: a cancellation points to nothing.
            unsafe { self.push(&cancel.user_data(CANCEL)) }?;
            self.waits.push(wait);
        }
        Ok(())
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        match self.drain() {
            Ok(unheard) => self.remains.release(unheard),
            Err(error) => {
                tracing::error!(%error, "an io_uring was closed with operations under way");
                self.remains.abandon();
            }
        }
    }
}

/// Not errors for a worker: it comes back after it has taken what completions there are.
fn tolerate(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// An eventfd heard through the ring.
///
/// One multishot poll stays armed: the eventfd wakes it at every write, whether or not its counter
/// was read back in between, so hearing costs neither an operation nor a system call. The counter
/// is never read, hence the first arming of a doorbell that rang before is heard at once.
#[derive(Debug)]
pub struct Doorbell<F> {
    eventfd: F,
    token: Token,
}

impl<F: AsRawFd> Doorbell<F> {
    /// Hears `eventfd`; its completions carry `token`.
    pub fn new(eventfd: F, token: Token) -> Self {
        Self { eventfd, token }
    }

    /// The eventfd itself.
    pub fn get_ref(&self) -> &F {
        &self.eventfd
    }

    /// Starts to hear it, with the ring's next submit.
    pub fn arm(&self, uring: &mut Uring) -> io::Result<()> {
        let fd = types::Fd(self.eventfd.as_raw_fd());
        let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build();
        // SAFETY: a poll points to nothing, and holds the file by itself.
        unsafe { uring.push_waiting(poll, self.token) }
    }

    /// To be called with each completion that carries the doorbell's token: arms it again when the
    /// kernel has ended it, as it does when the completion queue was full.
    pub fn heard(&self, cqe: &Cqe, uring: &mut Uring) -> io::Result<()> {
        if cqe.result < 0 && cqe.result != -libc::ECANCELED {
            return Err(io::Error::from_raw_os_error(-cqe.result));
        }
        if cqe.more() { Ok(()) } else { self.arm(uring) }
    }
}

#[cfg(test)]
mod tests;
