//! Getting a processor out of KVM.
//!
//! Set what it shall see and send its thread [`signal`]. The handler runs on that thread and sets
//! `immediate_exit` in the processor's page, so the signal works at any time: in KVM it interrupts;
//! before KVM it makes the next entry return at once; after KVM the processor's loop looks at what
//! was set anyway.

#![allow(unsafe_code)] // The handler writes by pointer, and threads are named by number.

use std::cell::Cell;
use std::sync::{Mutex, Once, PoisonError};

use vmm_sys_util::signal::register_signal_handler;

use super::call;
use crate::PartitionError;

/// The signal: the first real-time signal that libc leaves us.
pub(super) fn signal() -> i32 {
    vmm_sys_util::signal::SIGRTMIN()
}

thread_local! {
    /// The `immediate_exit` of the processor that runs on this thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let pointer = IMMEDIATE_EXIT.get();
    if !pointer.is_null() {
        // SAFETY: the thread has promised that the byte stays until it sets the pointer back to
        // null.
        unsafe { pointer.write_volatile(1) };
    }
}

/// Before the first processor runs.
pub(super) fn install_handler() -> Result<(), PartitionError> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| {
        result = register_signal_handler(signal(), on_signal);
    });
    result.map_err(call("cannot install a signal handler"))
}

/// Which byte the signal sets on this thread, null for none. The caller keeps it mapped until it
/// has set another.
pub(super) fn set_immediate_exit(byte: *mut u8) {
    IMMEDIATE_EXIT.set(byte);
}

/// One processor's thread, for others who want the processor's attention.
#[derive(Default)]
pub(super) struct Kick(Mutex<Option<libc::pthread_t>>);

impl Kick {
    /// The processor runs on this thread.
    pub(super) fn begin(&self) {
        // SAFETY: it only tells a number.
        self.set(Some(unsafe { libc::pthread_self() }));
    }

    /// It runs no more.
    pub(super) fn end(&self) {
        self.set(None);
    }

    fn set(&self, thread: Option<libc::pthread_t>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }

    /// Makes the processor look at what has changed before it enters the guest again. Its own thread
    /// does so anyway.
    pub(super) fn kick(&self) {
        // SAFETY: it only tells a number.
        let own = unsafe { libc::pthread_self() };
        let thread = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.filter(|thread| *thread != own) {
            // SAFETY: the thread has not ended: before it does, it waits for the lock.
            unsafe { libc::pthread_kill(thread, signal()) };
        }
    }
}
