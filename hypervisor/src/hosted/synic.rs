//! The SynIC of a hosted partition: pages in shared memory, an eventfd for the interrupt, and
//! doorbells that the root hands over.

#![allow(unsafe_code)] // an EventFd lends its descriptor

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::wire::Order;
use crate::registers::SintState;
use crate::synic::pages::{PageRegisters, SynicPages};
use crate::synic::{ConnectionId, EventFlag, EventPort, HvStatus, Message, Posted, Sint, Synic};
use crate::{GuestMemory, VpIndex};

/// The only processor.
const VP: VpIndex = VpIndex(0);

/// The SynIC of the one processor.
pub(super) struct HostedSynic {
    socket: Arc<OwnedFd>,
    pages: Arc<SynicPages>,
    /// A bit per SINT that is not masked.
    open: AtomicU16,
    /// A slot was found taken.
    busy: AtomicBool,
    slot_free: EventFd,
    /// What the connections are bound to that the process has doorbells of.
    bound: Mutex<HashMap<ConnectionId, EventFd>>,
}

/// The descriptor of `event`, as long as that lives.
pub(super) fn lend(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as the EventFd lives, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl HostedSynic {
    /// Interrupts the process by `interrupt`, and sends it doorbells through `socket`.
    pub(super) fn new(
        memory: &GuestMemory,
        socket: &Arc<OwnedFd>,
        interrupt: EventFd,
    ) -> io::Result<Self> {
        let pages = Arc::new(SynicPages::new(memory, 1));
        pages.attach_interrupt(VP, interrupt);
        Ok(Self {
            socket: Arc::clone(socket),
            pages,
            open: AtomicU16::new(0),
            busy: AtomicBool::new(false),
            slot_free: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            bound: Mutex::default(),
        })
    }

    fn bound(&self) -> MutexGuard<'_, HashMap<ConnectionId, EventFd>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has written SIMP, SIEFP or SCONTROL.
    pub(super) fn set_pages(&self, registers: PageRegisters) {
        self.pages.set(VP, registers);
    }

    /// The guest has written a SINT.
    pub(super) fn set_sint(&self, sint: Sint, state: SintState) {
        let bit = 1 << sint.index();
        if state.is_open() {
            self.open.fetch_or(bit, Ordering::AcqRel);
        } else {
            self.open.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// The guest has written EOM.
    pub(super) fn end_of_message(&self) {
        if self.busy.swap(false, Ordering::SeqCst) {
            // It fails only when the counter is full, and then it has fired.
            let _ = self.slot_free.write(1);
        }
    }

    /// A device has something to say that is no message and no event.
    pub(super) fn interrupt(&self) {
        self.pages.raise(VP);
    }

    /// A *signal event* that did not take the doorbell.
    pub(super) fn signal(&self, connection: ConnectionId) -> HvStatus {
        match self.bound().get(&connection) {
            Some(event) => {
                let _ = event.write(1);
                HvStatus::SUCCESS
            }
            None => HvStatus::INVALID_CONNECTION_ID,
        }
    }
}

impl Synic for HostedSynic {
    fn post(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted {
        if self.open.load(Ordering::Acquire) & 1 << sint.index() == 0 {
            return Posted::Disabled;
        }
        let mut posted = self.pages.fill(vp, sint, message);
        if posted == Posted::Busy {
            // From now on the guest's EOM is told. It may have been there already, so once more.
            self.busy.store(true, Ordering::SeqCst);
            posted = self.pages.fill(vp, sint, message);
        }
        if posted == Posted::Delivered {
            self.pages.raise(vp);
        }
        posted
    }

    fn slot_free(&self) -> &EventFd {
        &self.slot_free
    }

    fn bind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        let mut bound = self.bound();
        if bound.contains_key(&connection) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Order::Bind(connection, lend(event)).send(&*self.socket)?;
        bound.insert(connection, event.try_clone()?);
        Ok(())
    }

    /// The process may keep its copy of the doorbell; whoever has unbound it hears it no more.
    fn unbind(&self, connection: ConnectionId, _: &EventFd) -> io::Result<()> {
        if self.bound().remove(&connection).is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        match Order::Unbind(connection).send(&*self.socket) {
            // It has died, and its doorbells with it.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }

    fn event_port(&self, vp: VpIndex, sint: Sint, flag: EventFlag) -> Option<Arc<dyn EventPort>> {
        self.pages.event_port(vp, sint, flag)
    }
}
