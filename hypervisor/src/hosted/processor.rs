//! The process's end of a hosted partition: a processor whose instructions are the process's own,
//! and whose intercepts are messages.

#![allow(unsafe_code)] // mmap of the partition's memory, close_range, _exit

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::VolatileSlice;

use super::confine::{self, DESCRIPTORS, Step};
use super::wire::{Intercept, Order, STRING};
use crate::synic::{ConnectionId, HvStatus};

/// The only processor of a hosted partition, and all that its process has left of the world.
///
/// Whoever made the partition may end it at any time. If the root is gone, so is the process.
pub struct Processor {
    interrupt: OwnedFd,
    memory: NonNull<u8>,
    memory_len: usize,
    doorbells: RefCell<Vec<(ConnectionId, OwnedFd)>>,
    interrupts: Cell<u64>,
}

/// The socket to the root, which the process was given as its standard input.
const SOCKET: u32 = 0;

/// Intercepts that are sent before the first's answer is there. The root never waits for room for
/// an answer, and a socket has room for more than these.
const PIPELINED: usize = 16;

/// RCX of a fast *signal event*.
const FAST_SIGNAL_EVENT: u64 = 0x1_005d;

fn socket() -> BorrowedFd<'static> {
    rustix::stdio::stdin()
}

impl Processor {
    /// Becomes the processor of a hosted partition: takes what the root has to give, and gives up
    /// all else. To be called first thing in `main`, by a process that
    /// [`HostedPartition`](super::HostedPartition) has started; other processes get an error.
    pub fn start() -> io::Result<Self> {
        // Whatever the root had open and forgot.
        close_all_from(3)?;
        let Order::Start { memory, file, interrupt } = Order::receive(socket())? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let refuse = |(step, error): (Step, io::Error)| {
            let errno = error.raw_os_error().unwrap_or(0);
            // If it does not arrive, the root sees at least that this process ends.
            let _ = Intercept::NotStarted { step: step as u32, errno }.send(socket());
            error
        };
        let memory_len = usize::try_from(memory).unwrap_or(usize::MAX);
        let memory = map(&file, memory_len).map_err(|error| refuse((Step::Memory, error)))?;
        // Nobody can change the file's size who does not have it.
        drop(file);
        let confinement = confine::confine(SOCKET).map_err(refuse)?;
        let processor = Self {
            interrupt,
            memory,
            memory_len,
            // Never more than there can be descriptors, so that nothing is allocated later.
            doorbells: RefCell::new(Vec::with_capacity(DESCRIPTORS as usize)),
            interrupts: Cell::new(0),
        };
        processor.intercept(&Intercept::Started(confinement.bits()));
        Ok(processor)
    }

    /// The partition's memory below the hole; it starts at guest address 0.
    pub fn memory(&self) -> VolatileSlice<'_> {
        // SAFETY: it is mapped as long as the process lives, and shared with the root, which
        // expects all of it to change at any time.
        unsafe { VolatileSlice::new(self.memory.as_ptr(), self.memory_len) }
    }

    /// Where the memory is mapped.
    pub fn memory_start(&self) -> NonNull<u8> {
        self.memory
    }

    /// `in` of 1, 2 or 4 bytes.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let value = self.intercept(&Intercept::PortRead { port, width: data.len() });
        for (to, from) in data.iter_mut().zip(value.unwrap_or(u64::MAX).to_le_bytes()) {
            *to = from;
        }
    }

    /// `rep outs`: all of `data` goes to `port`, `width` bytes (1, 2 or 4) at a time.
    pub fn port_write(&self, port: u16, width: usize, data: &[u8]) {
        for data in data.chunks(STRING) {
            self.intercept(&Intercept::PortWrite { port, width, data });
        }
    }

    /// Several `out`s of one byte each, in order. They are all on their way before the first answer
    /// is waited for.
    pub fn port_writes(&self, writes: impl IntoIterator<Item = (u16, u8)>) {
        let mut answers = 0;
        for (port, value) in writes {
            if answers == PIPELINED {
                self.reply();
                answers -= 1;
            }
            self.send(&Intercept::PortWrite { port, width: 1, data: &[value] });
            answers += 1;
        }
        for _ in 0..answers {
            self.reply();
        }
    }

    /// `rep ins`: fills `len` bytes of the partition's memory, from the address `gpa` on, from
    /// `port`, `width` bytes (1, 2 or 4) at a time. False is a fault: there is no such memory.
    pub fn port_read_string(&self, port: u16, width: usize, gpa: u64, len: usize) -> bool {
        (0..len).step_by(STRING).all(|at| {
            let gpa = gpa.saturating_add(at as u64);
            let len = (len - at).min(STRING);
            self.intercept(&Intercept::PortReadString { port, width, gpa, len }).is_some()
        })
    }

    /// A load of 1, 2, 4 or 8 bytes from an address that is a device's.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let value = self.intercept(&Intercept::MmioRead { gpa, width: data.len() });
        for (to, from) in data.iter_mut().zip(value.unwrap_or(u64::MAX).to_le_bytes()) {
            *to = from;
        }
    }

    /// A store of the lowest `width` bytes of `value`, 1, 2, 4 or 8, to an address that is a device's.
    pub fn mmio_write(&self, gpa: u64, width: usize, value: u64) {
        self.intercept(&Intercept::MmioWrite { gpa, width, value });
    }

    /// [`Self::port_write`] from wherever the process comes to grief, such as a panic's hook: needs
    /// no processor at hand, and waits for no answer.
    pub fn last_words(port: u16, width: usize, data: &[u8]) {
        for data in data.chunks(STRING) {
            let _ = Intercept::PortWrite { port, width, data }.send(socket());
        }
    }

    /// `rdmsr`; `None` is a fault.
    pub fn register_read(&self, register: u32) -> Option<u64> {
        self.intercept(&Intercept::RegisterRead { register })
    }

    /// `wrmsr`; false is a fault.
    pub fn register_write(&self, register: u32, value: u64) -> bool {
        self.intercept(&Intercept::RegisterWrite { register, value }).is_some()
    }

    /// A hypercall with these in RCX and RDX.
    pub fn hypercall(&self, control: u64, input: u64) -> HvStatus {
        let status = self.intercept(&Intercept::Hypercall { control, input });
        HvStatus(status.map_or(HvStatus::INVALID_HYPERCALL_CODE.0, |status| status as u16))
    }

    /// The hypercall *signal event*. On a connection that the root has bound it is a write to the
    /// doorbell, which nobody else has a hand in; earlier writes to memory are seen before it.
    pub fn signal_event(&self, connection: ConnectionId) -> HvStatus {
        if !self.has_doorbell(connection) {
            self.hear();
        }
        let doorbells = self.doorbells.borrow();
        let Some((_, doorbell)) = doorbells.iter().find(|(id, _)| *id == connection) else {
            drop(doorbells);
            return self.hypercall(FAST_SIGNAL_EVENT, connection.get().into());
        };
        fence(Ordering::SeqCst);
        // It fails only when the counter is full, and then it rings.
        let _ = rustix::io::write(doorbell, &1_u64.to_ne_bytes());
        HvStatus::SUCCESS
    }

    fn has_doorbell(&self, connection: ConnectionId) -> bool {
        self.doorbells.borrow().iter().any(|(id, _)| *id == connection)
    }

    /// `hlt`: sleeps until there is an interrupt. Returns at once if there was one since the last
    /// time.
    pub fn halt(&self) {
        self.wait_for_interrupt(None);
    }

    /// `hlt` with a timer set: sleeps until there is an interrupt, but no longer than that.
    pub fn halt_for(&self, limit: Duration) {
        let seconds = i64::try_from(limit.as_secs()).unwrap_or(i64::MAX);
        self.wait_for_interrupt(Some(Timespec {
            tv_sec: seconds,
            tv_nsec: limit.subsec_nanos().into(),
        }));
    }

    fn wait_for_interrupt(&self, limit: Option<Timespec>) {
        let mut fds = [PollFd::new(&self.interrupt, PollFlags::IN)];
        while poll(&mut fds, limit.as_ref()) == Err(rustix::io::Errno::INTR) {}
        let mut count = [0; 8];
        if rustix::io::read(&self.interrupt, &mut count).is_ok() {
            self.interrupts.set(self.interrupts.get().saturating_add(u64::from_ne_bytes(count)));
        }
    }

    /// How many interrupts there were until the last [`Self::halt`].
    pub fn interrupts(&self) -> u64 {
        self.interrupts.get()
    }

    /// Hears what the root has to say already.
    fn hear(&self) {
        let mut fds = [PollFd::from_borrowed_fd(socket(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        while poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) {
            self.obey();
        }
    }

    /// The next order; what a reply says is returned.
    fn obey(&self) -> Option<Option<u64>> {
        match Order::receive(socket()) {
            Ok(Order::Bind(connection, doorbell)) => {
                let mut doorbells = self.doorbells.borrow_mut();
                if doorbells.len() < doorbells.capacity() {
                    doorbells.push((connection, doorbell));
                }
                None
            }
            Ok(Order::Unbind(connection)) => {
                self.doorbells.borrow_mut().retain(|(id, _)| *id != connection);
                None
            }
            Ok(Order::Done(value)) => Some(Some(value)),
            Ok(Order::Fault) => Some(None),
            // The root is gone, or not what it should be.
            Ok(Order::Start { .. }) | Err(_) => end(),
        }
    }

    /// Has the root do it, and waits for its reply; `None` is a fault.
    fn intercept(&self, intercept: &Intercept<'_>) -> Option<u64> {
        self.send(intercept);
        self.reply()
    }

    fn send(&self, intercept: &Intercept<'_>) {
        if intercept.send(socket()).is_err() {
            end();
        }
    }

    fn reply(&self) -> Option<u64> {
        loop {
            if let Some(reply) = self.obey() {
                return reply;
            }
        }
    }
}

/// Ends the process, at once.
fn end() -> ! {
    // SAFETY: nothing runs after it, and the process has nothing to tidy up.
    unsafe { libc::_exit(1) }
}

fn close_all_from(first: u32) -> io::Result<()> {
    // SAFETY: called first thing in the process, before anything here has opened any.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn map(file: &impl AsFd, len: usize) -> io::Result<NonNull<u8>> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let start = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0) }?;
    Ok(NonNull::new(start.cast()).expect("mmap does not give address 0"))
}
