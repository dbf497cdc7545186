//! The root side of KVM's in-kernel SynIC.
//!
//! The kernel knows the SINTs and raises them when an eventfd of ours is written. The pages behind
//! them, message slots and event flags, it leaves to us: a processor tells us when its guest moves
//! one, and from then on [`KvmSynic`] writes it.
//!
//! KVM does not say when a guest has emptied a slot, except through a *resample* irqfd that fires
//! at the end of every interrupt of that SINT. Channels interrupt by the same SINT, so it could be
//! there only while a message waits. But to add one took 3 to 14 ms and to take it away 12 to 24 ms
//! where this was measured (a KVM under emulation): the kernel waits for grace periods, far longer
//! than a guest needs for a message. So a timer looks again instead.

#![allow(unsafe_code)] // ioctl, timerfd

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvm_bindings::{KVM_HYPERV_EVENTFD_DEASSIGN, KVMIO, kvm_hyperv_eventfd};
use kvm_ioctls::VmFd;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vm_memory::{VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;
use zerocopy::IntoBytes;

use super::{call, irq};
use crate::synic::{ConnectionId, EventFlag, EventPort, Message, Posted, Sint, Synic};
use crate::{Gpa, GuestMemory, PAGE_SIZE, PartitionError, VpIndex};

ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);

/// Bytes of one SINT's slot in the SIM page, and of its flags in the SIEF page.
const PER_SINT: u64 = 256;

/// In SIMP and SIEFP: the page is in use. The page's address is in the bits above 11.
const ENABLE: u64 = 1;

/// In a message's flags: others wait.
const MESSAGE_PENDING: u8 = 1;

/// How long after a busy slot to look again.
const LOOK_AGAIN: Duration = Duration::from_micros(500);

/// The SynICs of a partition's processors.
pub struct KvmSynic {
    vm: Arc<VmFd>,
    processors: Arc<Processors>,
    /// A timerfd: read like an eventfd, it gives a count and is quiet again.
    look_again: EventFd,
}

/// All processors' pages, and the memory they lie in.
struct Processors {
    memory: GuestMemory,
    vps: Box<[VpSynic]>,
}

impl Processors {
    fn vp(&self, vp: VpIndex) -> Option<&VpSynic> {
        self.vps.get(vp.0 as usize)
    }

    /// A SINT's part of a page, if the guest has enabled it and it is RAM.
    fn sint_area(&self, register: &AtomicU64, sint: Sint) -> Option<VolatileSlice<'_>> {
        let value = register.load(Ordering::Acquire);
        if value & ENABLE == 0 {
            return None;
        }
        let area = page_of(value).checked_add(u64::from(sint.index()) * PER_SINT)?;
        self.memory.slice(area, PER_SINT as usize)
    }
}

/// One processor's.
#[derive(Default)]
struct VpSynic {
    /// The guest's SIMP, SIEFP registers as it wrote them.
    message_page: AtomicU64,
    event_page: AtomicU64,
    /// Raises SINT 2. Not there when KVM has no SynIC.
    interrupt: OnceLock<EventFd>,
}

impl VpSynic {
    fn raise(&self) {
        if let Some(event) = self.interrupt.get() {
            // It fails only when the counter is full, and then an interrupt is on its way.
            let _ = event.write(1);
        }
    }
}

/// The pages a guest has named for one processor, as KVM reports them.
#[derive(Clone, Copy, Debug)]
pub(super) struct SynicPages {
    /// SIMP
    pub(super) message_page: u64,
    /// SIEFP
    pub(super) event_page: u64,
}

impl KvmSynic {
    pub(super) fn new(
        vm: &Arc<VmFd>,
        memory: &GuestMemory,
        vps: u32,
    ) -> Result<Self, PartitionError> {
        let look_again = timer().map_err(call("cannot make a timer"))?;
        let vps = (0..vps).map(|_| VpSynic::default()).collect();
        let processors = Arc::new(Processors { memory: memory.clone(), vps });
        Ok(Self { vm: Arc::clone(vm), processors, look_again })
    }

    /// Gives the first `count` processors their interrupts, once KVM has routes for them.
    pub(super) fn attach_interrupts(&self, count: u32) -> Result<(), PartitionError> {
        for (index, vp) in (0..count).map(VpIndex).zip(&self.processors.vps) {
            let event = irq::irqfd(&self.vm, irq::sint_gsi(index))?;
            vp.interrupt.set(event).ok();
        }
        Ok(())
    }

    /// The guest has written SIMP, SIEFP or SCONTROL. Pages that are new are cleared, as Hyper-V
    /// overlays them with empty ones.
    pub(super) fn set_pages(&self, vp: VpIndex, pages: SynicPages) {
        let Some(synic) = self.processors.vp(vp) else { return };
        for (register, value) in
            [(&synic.message_page, pages.message_page), (&synic.event_page, pages.event_page)]
        {
            let old = register.load(Ordering::Relaxed);
            if value & ENABLE != 0
                && value != old
                && let Some(page) = self.processors.memory.slice(page_of(value), PAGE_SIZE)
            {
                page.copy_from(&[0_u8; PAGE_SIZE]);
            }
            register.store(value, Ordering::Release);
        }
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

fn page_of(register: u64) -> Gpa {
    Gpa(register & !(PAGE_SIZE as u64 - 1))
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

/// Puts `message` into `slot` if it is empty. If it is not, asks the guest to say when it is.
///
/// The type is what says that a slot is taken, so it is written last, and after the request to
/// tell us it is read again: the guest may have emptied the slot before it could see the request.
fn fill(slot: &VolatileSlice<'_>, message: &Message) -> Option<Posted> {
    let kind = slot.get_atomic_ref::<AtomicU32>(0).ok()?;
    if kind.load(Ordering::Acquire) != 0 {
        let flags = slot.get_atomic_ref::<std::sync::atomic::AtomicU8>(5).ok()?;
        flags.fetch_or(MESSAGE_PENDING, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if kind.load(Ordering::Acquire) != 0 {
            return Some(Posted::Busy);
        }
    }
    let bytes = message.as_bytes();
    let end = 16 + usize::from(message.payload_size).min(message.payload.len());
    slot.offset(4).ok()?.copy_from(&bytes[4..end]);
    kind.store(message.message_type, Ordering::Release);
    Some(Posted::Delivered)
}

/// Sets a flag in a SINT's `flags`; whether it was clear.
fn set_flag(flags: &VolatileSlice<'_>, flag: EventFlag) -> Option<bool> {
    let (word, bit) = (usize::from(flag.get() / 32), flag.get() % 32);
    let word = flags.get_atomic_ref::<AtomicU32>(word * 4).ok()?;
    Some(word.fetch_or(1 << bit, Ordering::SeqCst) & 1 << bit == 0)
}

impl Synic for KvmSynic {
    fn post(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted {
        // SINT 2 is the only one that has a route.
        let Some(synic) = self.processors.vp(vp).filter(|_| sint == Sint::VMBUS) else {
            return Posted::Disabled;
        };
        let Some(slot) = self.processors.sint_area(&synic.message_page, sint) else {
            return Posted::Disabled;
        };
        match fill(&slot, message) {
            Some(Posted::Delivered) => {
                synic.raise();
                Posted::Delivered
            }
            Some(Posted::Busy) => {
                set_timer(&self.look_again, LOOK_AGAIN);
                Posted::Busy
            }
            Some(Posted::Disabled) | None => Posted::Disabled,
        }
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
        self.processors.vp(vp).filter(|_| sint == Sint::VMBUS)?;
        let processors = Arc::clone(&self.processors);
        Some(Arc::new(KvmEventPort { processors, vp: AtomicU32::new(vp.0), sint, flag }))
    }
}

struct KvmEventPort {
    processors: Arc<Processors>,
    vp: AtomicU32,
    sint: Sint,
    flag: EventFlag,
}

impl EventPort for KvmEventPort {
    fn signal(&self) -> bool {
        let vp = VpIndex(self.vp.load(Ordering::Acquire));
        let Some(vp) = self.processors.vp(vp) else { return false };
        let was_clear = self
            .processors
            .sint_area(&vp.event_page, self.sint)
            .and_then(|flags| set_flag(&flags, self.flag))
            .unwrap_or(false);
        if was_clear {
            vp.raise();
        }
        was_clear
    }

    fn retarget(&self, vp: VpIndex) {
        if self.processors.vp(vp).is_some() {
            self.vp.store(vp.0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &[u8]) -> Message {
        Message::new(1, text).unwrap()
    }

    fn slot(memory: &GuestMemory) -> VolatileSlice<'_> {
        memory.slice(Gpa(0x1200), 256).unwrap()
    }

    #[test]
    fn a_message_is_laid_into_an_empty_slot() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        assert_eq!(fill(&slot(&memory), &message(b"hello")), Some(Posted::Delivered));
        let mut bytes = [0; 21];
        memory.read(Gpa(0x1200), &mut bytes).unwrap();
        assert_eq!(bytes[..8], [1, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(bytes[16..], *b"hello");
        // Nothing beyond the payload was touched.
        assert_eq!(memory.read_obj::<u8>(Gpa(0x1200 + 21)).unwrap(), 0);
    }

    #[test]
    fn a_taken_slot_is_left_alone_but_for_the_request() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        fill(&slot(&memory), &message(b"first"));
        assert_eq!(fill(&slot(&memory), &message(b"other")), Some(Posted::Busy));
        let mut bytes = [0; 21];
        memory.read(Gpa(0x1200), &mut bytes).unwrap();
        assert_eq!(bytes[..8], [1, 0, 0, 0, 5, 1, 0, 0]);
        assert_eq!(bytes[16..], *b"first");

        // The guest empties it as Linux does: the type goes to 0, the flag stays.
        memory.write_obj(Gpa(0x1200), &0_u32).unwrap();
        assert_eq!(fill(&slot(&memory), &message(b"other")), Some(Posted::Delivered));
        memory.read(Gpa(0x1200), &mut bytes).unwrap();
        assert_eq!(bytes[..8], [1, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(bytes[16..], *b"other");
    }

    #[test]
    fn a_flag_interrupts_once_until_the_guest_clears_it() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let flag = EventFlag::new(2047).unwrap();
        assert_eq!(set_flag(&slot(&memory), flag), Some(true));
        assert_eq!(set_flag(&slot(&memory), flag), Some(false));
        assert_eq!(memory.read_obj::<u8>(Gpa(0x1200 + 255)).unwrap(), 0x80);
        memory.write_obj(Gpa(0x1200 + 255), &0_u8).unwrap();
        assert_eq!(set_flag(&slot(&memory), flag), Some(true));
        assert_eq!(set_flag(&slot(&memory), EventFlag::new(0).unwrap()), Some(true));
        assert_eq!(memory.read_obj::<u8>(Gpa(0x1200)).unwrap(), 1);
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
