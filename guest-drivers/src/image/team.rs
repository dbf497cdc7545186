//! Processors that work together: the first has something for the others to do, and waits for them.
//!
//! Each of the others has a mailbox. The first puts a task in and interrupts the processor, which may
//! have halted; that one takes the task out when it has done it, and interrupts the first.

#![allow(unsafe_code)] // A task lies on the first processor's stack, and others refer to it.

use core::hint::spin_loop;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use guest_drivers::boot::MAX_VPS;
use guest_drivers::platform::Platform;

use super::machine::Machine;
use super::{fail, status, supervisor};

/// The first has filled the tables and introduced the guest to the hypervisor.
static FIRST_IS_READY: AtomicBool = AtomicBool::new(false);
/// How many others are.
static OTHERS_READY: AtomicUsize = AtomicUsize::new(0);

/// How long the others may take, in nanoseconds.
const PATIENCE: u64 = 10_000_000_000;

/// What a processor is to do.
struct Task<'t>(&'t (dyn Fn(usize, &Machine) + Sync));

/// A processor's task, or null if it has none.
static MAILBOXES: [AtomicPtr<Task<'static>>; MAX_VPS] =
    [const { AtomicPtr::new(ptr::null_mut()) }; MAX_VPS];

/// Returns when the first processor is so far that others may start.
pub(super) fn wait_for_first() {
    while !FIRST_IS_READY.load(Ordering::Acquire) {
        spin_loop();
    }
}

/// Lets the other processors start, and waits until they have.
pub(super) fn gather(machine: &Machine) {
    FIRST_IS_READY.store(true, Ordering::Release);
    let until = machine.now().saturating_add(PATIENCE);
    while OTHERS_READY.load(Ordering::Acquire) + 1 < machine.processors() {
        if machine.now() > until {
            fail(status::NO_MACHINE, "not all processors have started");
        }
        spin_loop();
    }
}

/// Is processor `index`, not the first: does what comes into its mailbox.
pub(super) fn serve(index: usize, machine: &Machine) -> ! {
    OTHERS_READY.fetch_add(1, Ordering::Release);
    loop {
        let Some(mailbox) = MAILBOXES.get(index) else { supervisor::exit(status::NO_MACHINE) };
        match NonNull::new(mailbox.load(Ordering::Acquire)) {
            None => machine.idle(),
            Some(task) => {
                // SAFETY: whoever put it there keeps it until the mailbox is empty again.
                let Task(work) = unsafe { task.as_ref() };
                work(index, machine);
                mailbox.store(ptr::null_mut(), Ordering::Release);
                supervisor::wake(0);
            }
        }
    }
}

/// [`Platform::together`].
pub(super) fn together<R: Send, O>(
    first: &Machine,
    places: &mut [Option<R>],
    work: impl Fn(usize, &Machine) -> R + Sync,
    own: impl FnOnce() -> O,
) -> O {
    let others = OTHERS_READY.load(Ordering::Relaxed).min(places.len());
    let mailboxes = MAILBOXES.get(1..=others).unwrap_or_default();
    let places = Places(places.as_mut_ptr());
    let task = |index: usize, machine: &Machine| {
        let result = work(index, machine);
        // SAFETY: a place for each of the others, whose numbers count from 1.
        let place = unsafe { places.start().add(index - 1) };
        // SAFETY: no other processor writes there, and the first does not look before this task has
        // ended.
        unsafe { place.write(Some(result)) };
    };
    let task = Task(&task);
    for (index, mailbox) in (1..).zip(mailboxes) {
        mailbox.store((&raw const task).cast_mut().cast(), Ordering::Release);
        supervisor::wake(index);
    }
    let out = own();
    // Nothing here unwinds, so the task stays until the last has done it.
    while mailboxes.iter().any(|mailbox| !mailbox.load(Ordering::Acquire).is_null()) {
        first.idle();
    }
    out
}

/// The places of results.
struct Places<R>(*mut Option<R>);

impl<R> Places<R> {
    /// By a method, so that closures take hold of all of it.
    fn start(&self) -> *mut Option<R> {
        self.0
    }
}

// SAFETY: processors write results, which may go from one to another, each to a place of its own.
unsafe impl<R: Send> Sync for Places<R> {}
