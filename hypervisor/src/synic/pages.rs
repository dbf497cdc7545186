//! The pages behind the SINTs: message slots and event flags in guest memory, written by the root
//! and emptied by the guest. Who tells where they are, the kernel or our own registers, and how an
//! interrupt is raised is up to those who use this.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use vm_memory::{VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::{EventFlag, EventPort, Message, Posted, Sint};
use crate::{Gpa, GuestMemory, PAGE_SIZE, VpIndex};

/// Bytes of one SINT's slot in the SIM page, and of its flags in the SIEF page.
const PER_SINT: u64 = 256;

/// In SIMP and SIEFP: the page is in use; its address is in the bits above 11. In SCONTROL: the
/// SynIC is on.
pub(crate) const ENABLE: u64 = 1;

/// In a message's flags: others wait.
const MESSAGE_PENDING: u8 = 1;

/// The page that SIMP, SIEFP and their like name.
pub(crate) fn page_of(register: u64) -> Gpa {
    Gpa(register & !(PAGE_SIZE as u64 - 1))
}

/// The registers by which a processor's guest says where its pages are, and whether anything may
/// come into them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegisters {
    /// SCONTROL
    pub(crate) control: u64,
    /// SIMP
    pub(crate) message_page: u64,
    /// SIEFP
    pub(crate) event_page: u64,
}

/// All processors' pages, and the memory they lie in.
pub(crate) struct SynicPages {
    memory: GuestMemory,
    vps: Box<[VpPages]>,
    /// What raises SINT 2 of a processor for which [`Self::raise_otherwise`] says so.
    otherwise: OnceLock<Box<dyn Fn(VpIndex) + Send + Sync>>,
}

/// One processor's.
#[derive(Default)]
struct VpPages {
    /// SCONTROL has its bit. While it has not, nothing is delivered, and the pages stay as they are.
    on: AtomicBool,
    message_page: AtomicU64,
    event_page: AtomicU64,
    /// Raises SINT 2. Not there in a partition without a SynIC.
    interrupt: OnceLock<EventFd>,
    /// Something else raises it.
    otherwise: AtomicBool,
}

impl SynicPages {
    pub(crate) fn new(memory: &GuestMemory, vps: u32) -> Self {
        let vps = (0..vps).map(|_| VpPages::default()).collect();
        Self { memory: memory.clone(), vps, otherwise: OnceLock::new() }
    }

    fn vp(&self, vp: VpIndex) -> Option<&VpPages> {
        self.vps.get(vp.0 as usize)
    }

    /// From now on writing `event` raises the VMBus's SINT on `vp`.
    pub(crate) fn attach_interrupt(&self, vp: VpIndex, event: EventFd) {
        if let Some(vp) = self.vp(vp) {
            vp.interrupt.set(event).ok();
        }
    }

    /// What raises it where [`Self::raise_otherwise`] says so.
    pub(crate) fn attach_otherwise(&self, raise: Box<dyn Fn(VpIndex) + Send + Sync>) {
        self.otherwise.set(raise).ok();
    }

    /// Whether the event is not what raises the VMBus's SINT on `vp`.
    pub(crate) fn raise_otherwise(&self, vp: VpIndex, otherwise: bool) {
        if let Some(vp) = self.vp(vp) {
            vp.otherwise.store(otherwise, Ordering::Release);
        }
    }

    /// Raises the VMBus's SINT on `vp`.
    pub(crate) fn raise(&self, index: VpIndex) {
        let Some(vp) = self.vp(index) else { return };
        if vp.otherwise.load(Ordering::Acquire) {
            if let Some(raise) = self.otherwise.get() {
                raise(index);
            }
        } else if let Some(event) = vp.interrupt.get() {
            // It fails only when the counter is full, and then an interrupt is on its way.
            let _ = event.write(1);
        }
    }

    /// The guest has named its pages. Those that are new are cleared, as Hyper-V overlays them with
    /// empty ones.
    pub(crate) fn set(&self, vp: VpIndex, registers: PageRegisters) {
        let Some(pages) = self.vp(vp) else { return };
        for (page, value) in [
            (&pages.message_page, registers.message_page),
            (&pages.event_page, registers.event_page),
        ] {
            let old = page.load(Ordering::Relaxed);
            if value & ENABLE != 0
                && value != old
                && let Some(bytes) = self.memory.slice(page_of(value), PAGE_SIZE)
            {
                bytes.copy_from(&[0_u8; PAGE_SIZE]);
            }
            page.store(value, Ordering::Release);
        }
        pages.on.store(registers.control & ENABLE != 0, Ordering::Release);
    }

    /// A SINT's part of the event page of `pages` or of the message page, if the guest has enabled
    /// the page and the SynIC, and it is RAM.
    fn sint_area(
        &self,
        pages: &VpPages,
        register: &AtomicU64,
        sint: Sint,
    ) -> Option<VolatileSlice<'_>> {
        let value = register.load(Ordering::Acquire);
        if value & ENABLE == 0 || !pages.on.load(Ordering::Acquire) {
            return None;
        }
        let area = page_of(value).checked_add(u64::from(sint.index()) * PER_SINT)?;
        self.memory.slice(area, PER_SINT as usize)
    }

    /// Puts `message` into a slot, and raises nothing yet. One thread at a time.
    pub(crate) fn fill(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted {
        self.vp(vp)
            .and_then(|vp| self.sint_area(vp, &vp.message_page, sint))
            .and_then(|slot| fill(&slot, message))
            .unwrap_or(Posted::Disabled)
    }

    /// A flag of the VMBus's SINT on `vp`. Others have no event to raise them.
    pub(crate) fn event_port(
        self: &Arc<Self>,
        vp: VpIndex,
        sint: Sint,
        flag: EventFlag,
    ) -> Option<Arc<dyn EventPort>> {
        self.vp(vp).filter(|_| sint == Sint::VMBUS)?;
        let pages = Arc::clone(self);
        Some(Arc::new(PagePort { pages, vp: AtomicU32::new(vp.0), sint, flag }))
    }
}

/// Puts `message` into `slot` if it is empty. If it is not, asks the guest to say when it is.
///
/// The type is what says that a slot is taken, so it is written last, and after the request to
/// tell us it is read again: the guest may have emptied the slot before it could see the request.
fn fill(slot: &VolatileSlice<'_>, message: &Message) -> Option<Posted> {
    let kind = slot.get_atomic_ref::<AtomicU32>(0).ok()?;
    if kind.load(Ordering::Acquire) != 0 {
        let flags = slot.get_atomic_ref::<AtomicU8>(5).ok()?;
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

struct PagePort {
    pages: Arc<SynicPages>,
    vp: AtomicU32,
    sint: Sint,
    flag: EventFlag,
}

impl EventPort for PagePort {
    fn signal(&self) -> bool {
        let index = VpIndex(self.vp.load(Ordering::Acquire));
        let Some(vp) = self.pages.vp(index) else { return false };
        let was_clear = self
            .pages
            .sint_area(vp, &vp.event_page, self.sint)
            .and_then(|flags| set_flag(&flags, self.flag))
            .unwrap_or(false);
        if was_clear {
            self.pages.raise(index);
        }
        was_clear
    }

    fn retarget(&self, vp: VpIndex) {
        if self.pages.vp(vp).is_some() {
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
    fn a_synic_that_is_off_delivers_nothing_and_keeps_its_pages() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let pages = Arc::new(SynicPages::new(&memory, 1));
        let vp = VpIndex(0);
        let set = |control| {
            let registers = PageRegisters { control, message_page: 0x1001, event_page: 0x2001 };
            pages.set(vp, registers);
        };
        let port = pages.event_port(vp, Sint::VMBUS, EventFlag::new(0).unwrap()).unwrap();
        set(0);
        assert_eq!(pages.fill(vp, Sint::VMBUS, &message(b"early")), Posted::Disabled);
        assert!(!port.signal());
        assert_eq!(memory.read_obj::<[u64; 32]>(Gpa(0x1200)).unwrap(), [0; 32]);
        assert_eq!(memory.read_obj::<u64>(Gpa(0x2200)).unwrap(), 0);
        set(ENABLE);
        assert_eq!(pages.fill(vp, Sint::VMBUS, &message(b"first")), Posted::Delivered);
        assert!(port.signal());
        set(0);
        memory.write_obj(Gpa(0x2200), &0_u64).unwrap();
        assert_eq!(pages.fill(vp, Sint::VMBUS, &message(b"other")), Posted::Disabled);
        assert!(!port.signal());
        set(ENABLE);
        assert!(port.signal());
        assert_eq!(pages.fill(vp, Sint::VMBUS, &message(b"other")), Posted::Busy, "the first's");
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
}
