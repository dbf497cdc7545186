//! Waits for eventfds.
//!
//! Unsafe for one reason: [`EventFd`] does not lend its descriptor in the standard library's way.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`, as long as that lives.
pub(crate) fn lend(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the EventFd lives, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Sleeps until one of `events` has fired, which it resets, or `timeout` is over. They must not
/// block. Returns which have fired.
pub(crate) fn wait<const N: usize>(
    events: [&EventFd; N],
    timeout: Option<Timespec>,
) -> io::Result<[bool; N]> {
    let mut fds = events.map(|event| PollFd::from_borrowed_fd(lend(event), PollFlags::IN));
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut fired = [false; N];
    for ((fired, fd), event) in fired.iter_mut().zip(&fds).zip(events) {
        if fd.revents().contains(PollFlags::IN) {
            *fired = event.read().is_ok();
        }
    }
    Ok(fired)
}
