//! The root side of KVM's in-kernel SynIC.
//!
//! The kernel knows the SINTs and raises them when an eventfd of ours is written. The pages behind
//! them, message slots and event flags, it leaves to us: a processor tells us when its guest moves
//! one, and from then on [`SynicPages`] writes it.
//!
//! KVM does not say when a guest has emptied a slot, except through a *resample* irqfd that fires
//! at the end of every interrupt of that SINT. Channels interrupt by the same SINT, so it could be
//! there only while a message waits. But to add one took 3 to 14 ms and to take it away 12 to 24 ms
//! where this was measured (a KVM under emulation): the kernel waits for grace periods, far longer
//! than a guest needs for a message. So a timer looks again instead, soon at first and ever later as long
//! as the guest leaves the message where it is.

#![allow(unsafe_code)] // ioctl, timerfd

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use kvm_bindings::{KVM_HYPERV_EVENTFD_DEASSIGN, KVMIO, kvm_hyperv_eventfd};
use kvm_ioctls::VmFd;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::{call, irq};
use crate::synic::pages::{PageRegisters, SynicPages};
use crate::synic::{ConnectionId, EventFlag, EventPort, Message, Posted, Sint, Synic};
use crate::{GuestMemory, PartitionError, VpIndex};

ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);

/// How long after a slot was found busy for the first time to look again.
const LOOK_AGAIN: Duration = Duration::from_micros(500);

/// How often that time doubles: up to 128 ms.
const DOUBLINGS: u8 = 8;

/// When to look again at slots that are busy. One thread at a time posts.
#[derive(Debug, Default)]
struct Backoff {
    /// How often in a row none was free.
    busy: AtomicU8,
}

impl Backoff {
    /// A slot was free.
    fn reset(&self) {
        self.busy.store(0, Ordering::Relaxed);
    }

    /// A slot was busy, once more. Returns how long to wait.
    fn wait(&self) -> Duration {
        let busy = self.busy.load(Ordering::Relaxed);
        self.busy.store((busy + 1).min(DOUBLINGS), Ordering::Relaxed);
        LOOK_AGAIN * (1 << busy)
    }
}

/// The SynICs of a partition's processors.
pub(super) struct KvmSynic {
    vm: Arc<VmFd>,
    pages: Arc<SynicPages>,
    /// A timerfd: read like an eventfd, it gives a count and is quiet again.
    look_again: EventFd,
    backoff: Backoff,
}

impl KvmSynic {
    pub(super) fn new(
        vm: &Arc<VmFd>,
        memory: &GuestMemory,
        vps: u32,
    ) -> Result<Self, PartitionError> {
        let look_again = timer().map_err(call("cannot make a timer"))?;
        let pages = Arc::new(SynicPages::new(memory, vps));
        Ok(Self { vm: Arc::clone(vm), pages, look_again, backoff: Backoff::default() })
    }

    /// Gives the first `count` processors their interrupts, once KVM has routes for them.
    pub(super) fn attach_interrupts(&self, count: u32) -> Result<(), PartitionError> {
        for index in (0..count).map(VpIndex) {
            self.pages.attach_interrupt(index, irq::irqfd(&self.vm, irq::sint_gsi(index))?);
        }
        Ok(())
    }

    /// The guest has written SIMP, SIEFP or SCONTROL.
    pub(super) fn set_pages(&self, vp: VpIndex, registers: PageRegisters) {
        self.pages.set(vp, registers);
    }

    fn eventfd(&self, connection: ConnectionId, event: &EventFd, flags: u32) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let binding = kvm_hyperv_eventfd {
            conn_id: connection.get(),
            fd: event.as_raw_fd(),
            flags,
            ..Default::default()
        };
        // SAFETY: the ioctl reads the structure and no more.
        let result = unsafe { ioctl_with_ref(&*self.vm, KVM_HYPERV_EVENTFD(), &binding) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn timer() -> io::Result<EventFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let fd: RawFd = timer.into_raw_fd();
    // SAFETY: the descriptor is ours, and given away.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}

fn set_timer(timer: &EventFd, after: Duration) {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open as long as `timer` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) };
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let value = Timespec { tv_sec: 0, tv_nsec: after.subsec_nanos().into() };
    let setting = Itimerspec { it_interval: zero, it_value: value };
    if let Err(error) = rustix::time::timerfd_settime(fd, TimerfdTimerFlags::empty(), &setting) {
        tracing::error!(%error, "cannot set the timer of the message slots");
    }
}

impl Synic for KvmSynic {
    fn post(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted {
        // SINT 2 is the only one that has a route.
        if sint != Sint::VMBUS {
            return Posted::Disabled;
        }
        let posted = self.pages.fill(vp, sint, message);
        match posted {
            Posted::Delivered => {
                self.backoff.reset();
                self.pages.raise(vp);
            }
            Posted::Busy => set_timer(&self.look_again, self.backoff.wait()),
            Posted::Disabled => {}
        }
        posted
    }

    fn slot_free(&self) -> &EventFd {
        &self.look_again
    }

    fn bind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        self.eventfd(connection, event, 0)
    }

    fn unbind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        self.eventfd(connection, event, KVM_HYPERV_EVENTFD_DEASSIGN)
    }

    fn event_port(&self, vp: VpIndex, sint: Sint, flag: EventFlag) -> Option<Arc<dyn EventPort>> {
        self.pages.event_port(vp, sint, flag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_never_emptied_is_looked_at_ever_less() {
        let backoff = Backoff::default();
        let minute = Duration::from_secs(60);
        let looks = |backoff: &Backoff| {
            let mut now = Duration::ZERO;
            std::iter::from_fn(|| {
                now += backoff.wait();
                (now < minute).then_some(now)
            })
            .collect::<Vec<_>>()
        };
        let at = looks(&backoff);
        assert_eq!(at[..3], [1, 3, 7].map(|halves| LOOK_AGAIN * halves));
        assert!((400..500).contains(&at.len()), "{} looks in a minute", at.len());
        // Whoever empties it is answered as soon as ever.
        backoff.reset();
        assert_eq!(backoff.wait(), LOOK_AGAIN);
    }

    #[test]
    fn the_timer_reads_like_an_eventfd() {
        let timer = timer().unwrap();
        assert!(timer.read().is_err(), "quiet until set");
        set_timer(&timer, Duration::from_micros(1));
        while timer.read().is_err() {
            std::thread::yield_now();
        }
        assert!(timer.read().is_err(), "once only");
    }
}
