//! The platform of a bare processor under a hypervisor with Hyper-V's interface.

#![allow(unsafe_code)] // Pages that are shared with the hypervisor.

use core::arch::asm;
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use guest_drivers::boot::{BootParameters, MAX_VPS};
use guest_drivers::memory::{PAGE, Pages};
use guest_drivers::platform::{Message, Platform, PlatformCounters, PortWrite, Ports};
use vmbus::client::HvStatus;

use super::supervisor::{self, ISA_VECTOR, SINT_VECTOR, TICK_VECTOR};
use super::tables::symbol;
use super::{area, console, team};

/// Synthetic registers (TLFS, "Synthetic MSRs").
mod msr {
    // The local APIC's registers (SDM volume 3, 11.12.1.2): the entries for its timer and for the
    // interrupts of the PICs; what the timer counts down from, and how fast.
    pub(super) const LVT_TIMER: u32 = 0x832;
    pub(super) const LVT_LINT0: u32 = 0x835;
    pub(super) const TIMER_COUNT: u32 = 0x838;
    pub(super) const TIMER_DIVIDE: u32 = 0x83e;

    pub(super) const GUEST_OS_ID: u32 = 0x4000_0000;
    pub(super) const HYPERCALL: u32 = 0x4000_0001;
    pub(super) const TSC_FREQUENCY: u32 = 0x4000_0022;
    pub(super) const SCONTROL: u32 = 0x4000_0080;
    pub(super) const SIEFP: u32 = 0x4000_0082;
    pub(super) const SIMP: u32 = 0x4000_0083;
    pub(super) const EOM: u32 = 0x4000_0084;
    pub(super) const SINT0: u32 = 0x4000_0090;
}

/// An open-source system (bit 63) of a kind that has no number.
const GUEST_OS_ID: u64 = 1 << 63 | 0x7f << 56;

/// A tick that ends every sleep in the end: whoever waits for a device in vain finds out by the clock.
mod timer {
    pub(super) const DIVIDE_BY_128: u64 = 0b1010;
    pub(super) const PERIODIC: u64 = 1 << 17;
    /// About a second, at the 1 GHz of hypervisors' local APICs.
    pub(super) const COUNT: u64 = 1_000_000_000 / 128;
}

/// The SINT of the VMBus.
const SINT: u32 = 2;
/// Bytes of a message slot, and of a SINT's event flags.
const SLOT: usize = 256;

const POST_MESSAGE: u64 = 0x5c;
const SIGNAL_EVENT_FAST: u64 = 0x5d | 1 << 16;

/// The input of *post message*.
#[repr(C, align(256))]
struct PostMessage {
    connection: u32,
    reserved: u32,
    message_type: u32,
    size: u32,
    payload: [u8; Message::ROOM],
}

/// A processor, and what it shares with the hypervisor.
pub(crate) struct Machine {
    memory: Pages<'static>,
    /// Where RAM ends.
    memory_end: u64,
    messages: NonNull<u8>,
    events: NonNull<u8>,
    interrupts: NonNull<AtomicU64>,
    /// How many there are.
    processors: usize,
    /// Where signals go without a hypercall; 0 is nowhere.
    doorbell_port: u16,
    halts: Cell<u64>,
    /// The clock's reading at the start, and its nanoseconds per tick as a fraction of 2^32.
    start: u64,
    scale: u64,
}

impl Machine {
    /// Switches on what the hypervisor offers the processor `index`, which this is. To be called once
    /// on each, on the first before all others.
    pub(crate) fn new(parameters: &BootParameters, index: usize) -> Result<Self, &'static str> {
        let [b, c, d] = supervisor::cpuid(0x4000_0000);
        if [b, c, d].map(u32::to_le_bytes).as_flattened() != b"Microsoft Hv" {
            return Err("the hypervisor has no Hyper-V interface");
        }
        let frequency = supervisor::read_msr(msr::TSC_FREQUENCY);
        if !(1_000_000..1 << 40).contains(&frequency) {
            return Err("the hypervisor does not say how fast the time stamp counter is");
        }
        let area = area::of(index);
        let (messages, events) = (area + area::MESSAGES as u64, area + area::EVENTS as u64);
        if index == 0 {
            let registers =
                [(msr::GUEST_OS_ID, GUEST_OS_ID), (msr::HYPERCALL, symbol!("hypercall_page") | 1)];
            for (register, value) in registers {
                // SAFETY: the page is there for just that.
                unsafe { supervisor::write_msr(register, value) };
            }
        }
        for (register, value) in [
            (msr::SIMP, messages | 1),
            (msr::SIEFP, events | 1),
            (msr::SCONTROL, 1),
            (msr::SINT0 + SINT, SINT_VECTOR.into()),
            (msr::TIMER_DIVIDE, timer::DIVIDE_BY_128),
            (msr::LVT_TIMER, timer::PERIODIC | u64::from(TICK_VECTOR)),
            (msr::TIMER_COUNT, timer::COUNT),
        ] {
            // SAFETY: the pages are there for just that, and the timer interrupts.
            unsafe { supervisor::write_msr(register, value) };
        }

        let start = symbol!("image_end");
        let pages = parameters.memory_end.saturating_sub(start) as usize / PAGE;
        let pointer =
            |address: u64| NonNull::new(address as *mut u8).ok_or("the image lies at address 0");
        // SAFETY: behind the image there is RAM up to its end, mapped where it is, to which nothing
        // else refers; what processors know of it besides their own, they know as atomics.
        let memory = unsafe { Pages::new(pointer(start)?, start / PAGE as u64, pages) };
        Ok(Self {
            memory,
            memory_end: parameters.memory_end,
            messages: pointer(messages)?,
            events: pointer(events)?,
            interrupts: pointer(area + area::INTERRUPTS as u64)?.cast(),
            processors: (parameters.vps as usize).min(MAX_VPS),
            doorbell_port: u16::try_from(parameters.doorbell_port).unwrap_or(0),
            halts: Cell::new(0),
            start: time_stamp(),
            scale: (1_000_000_000 << 32) / frequency,
        })
    }

    /// A word of a page that the hypervisor writes to.
    fn word(page: NonNull<u8>, offset: usize) -> &'static AtomicU32 {
        debug_assert!(offset < PAGE && offset.is_multiple_of(4));
        // SAFETY: in the page.
        let word = unsafe { page.add(offset) }.cast::<AtomicU32>();
        // SAFETY: the page is static, and all who look at it here do so by atomics.
        unsafe { word.as_ref() }
    }
}

/// The I/O APIC (82093AA datasheet): an index and a window onto the register that it names, among
/// them two for each line.
mod io_apic {
    pub(super) const INDEX: usize = 0xfec0_0000;
    pub(super) const WINDOW: usize = INDEX + 0x10;

    /// The first register of a line: vector and kind. The second says which processor.
    pub(super) const fn line(line: u8) -> u32 {
        0x10 + 2 * line as u32
    }
}

/// Sets a register of the I/O APIC.
fn set_io_apic(register: u32, value: u32) {
    let (index, window) = (io_apic::INDEX as *mut u32, io_apic::WINDOW as *mut u32);
    // SAFETY: every PC's I/O APIC is there, and the first 4 GiB are mapped.
    unsafe { index.write_volatile(register) };
    // SAFETY: as above.
    unsafe { window.write_volatile(value) };
}

/// All of it at CPL 0: from CPL 3, each access would be as dear as the call that saves it, and a
/// string pays for each of its parts.
impl Ports for Machine {
    fn read_8(&self, port: u16) -> u8 {
        supervisor::read_port_8(port)
    }

    fn read_32(&self, port: u16) -> u32 {
        supervisor::read_port_32(port)
    }

    fn write_8(&self, writes: &[PortWrite]) {
        supervisor::write_ports(writes);
    }

    fn write_32(&self, port: u16, value: u32) {
        supervisor::write_port_32(port, value);
    }

    fn load_32(&self, address: u32) -> u32 {
        supervisor::load_32(address)
    }

    fn store_32(&self, address: u32, value: u32) {
        // A register that a lying device says is where memory is shall not be one.
        if u64::from(address) >= self.memory_end {
            fence(Ordering::SeqCst);
            // SAFETY: RAM ends below, and the first 4 GiB are mapped.
            unsafe { supervisor::store_32(address, value) };
        }
    }

    fn read_string(&self, port: u16, words: &[AtomicU64]) {
        supervisor::read_port_string(port, words);
    }

    fn write_string(&self, port: u16, words: &[AtomicU64]) {
        supervisor::write_port_string_32(port, words);
    }

    fn listen(&self, irq: u8) {
        const MASKED: u64 = 1 << 16;
        // The PICs see the line too, and nobody has told them what to do with it.
        // SAFETY: touches no memory.
        unsafe { supervisor::write_msr(msr::LVT_LINT0, MASKED) };
        // To processor 0, on the rising edge.
        set_io_apic(io_apic::line(irq) + 1, 0);
        set_io_apic(io_apic::line(irq), ISA_VECTOR.into());
    }
}

impl Platform for Machine {
    fn memory(&self) -> Pages<'_> {
        self.memory
    }

    fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        let mut input = PostMessage {
            connection,
            reserved: 0,
            message_type,
            size: payload.len().min(Message::ROOM) as u32,
            payload: [0; Message::ROOM],
        };
        for (to, from) in input.payload.iter_mut().zip(payload) {
            *to = *from;
        }
        let address = core::ptr::from_mut(&mut input).expose_provenance() as u64;
        // SAFETY: addresses are physical ones here, and the input lies in one page, being aligned
        // to its size.
        HvStatus(unsafe { supervisor::hypercall(POST_MESSAGE, address) } as u16)
    }

    fn signal_event(&self, connection: u32) {
        // The ring may have been written just now.
        fence(Ordering::SeqCst);
        if self.doorbell_port != 0 {
            return supervisor::ring_port(self.doorbell_port, connection);
        }
        // SAFETY: a fast call: the input is the connection, with flag number 0.
        unsafe { supervisor::hypercall(SIGNAL_EVENT_FAST, connection.into()) };
    }

    fn take_message(&self) -> Option<Message> {
        const PENDING: u32 = 1 << 8; // bit 0 of the flags, which follow the payload's size

        let slot = SINT as usize * SLOT;
        let kind = Self::word(self.messages, slot);
        let message_type = kind.load(Ordering::Acquire);
        if message_type == 0 {
            return None;
        }
        let size_and_flags = Self::word(self.messages, slot + 4);
        let size = (size_and_flags.load(Ordering::Relaxed) & 0xff) as usize;
        let mut payload = [0; Message::ROOM];
        for (at, bytes) in payload.chunks_exact_mut(4).enumerate() {
            let word = Self::word(self.messages, slot + 16 + 4 * at).load(Ordering::Relaxed);
            for (to, from) in bytes.iter_mut().zip(word.to_le_bytes()) {
                *to = from;
            }
        }
        kind.store(0, Ordering::Release);
        // The flag is looked at after the slot is free, or a message that came in between waits.
        fence(Ordering::SeqCst);
        if size_and_flags.load(Ordering::Relaxed) & PENDING != 0 {
            // SAFETY: writes to no memory of ours but the slot.
            unsafe { supervisor::write_msr(msr::EOM, 0) };
        }
        Some(Message::new(message_type, payload.get(..size).unwrap_or(&payload)))
    }

    fn idle(&self) {
        self.halts.set(self.halts.get() + 1);
        supervisor::idle();
        for offset in (0..SLOT).step_by(4) {
            let flags = Self::word(self.events, SINT as usize * SLOT + offset);
            if flags.load(Ordering::Relaxed) != 0 {
                flags.swap(0, Ordering::AcqRel);
            }
        }
    }

    fn now(&self) -> u64 {
        let ticks = time_stamp().saturating_sub(self.start);
        ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64
    }

    fn line(&self, text: &str) {
        console::line(format_args!("{text}"));
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn together<R: Send, O>(
        &self,
        places: &mut [Option<R>],
        work: impl Fn(usize, &Self) -> R + Sync,
        own: impl FnOnce() -> O,
    ) -> O {
        team::together(self, places, work, own)
    }

    fn counters(&self) -> PlatformCounters {
        // SAFETY: it is static, and what counts there is the processor itself.
        let interrupts = unsafe { self.interrupts.as_ref() };
        PlatformCounters { halts: self.halts.get(), interrupts: interrupts.load(Ordering::Relaxed) }
    }
}

fn time_stamp() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe {
        asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}
