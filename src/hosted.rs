//! The built-in guest in a partition without KVM: the same drivers and the same runner as in the
//! image, compiled into this program, which runs itself once more as the guest's process.

#![allow(unsafe_code)] // The processor's memory becomes the guest's pages.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use guest_drivers::boot::{BootParameters, CONSOLE_PORT, EXIT_PORT};
use guest_drivers::json::Object;
use guest_drivers::memory::{PAGE, Pages};
use guest_drivers::platform::{Message, Platform, PlatformCounters, PortWrite, Ports};
use guest_drivers::runner;
use hypervisor::hosted::{GuestProgram, Processor};
use hypervisor::synic::ConnectionId;
use vm_memory::{VolatileMemory, VolatileSlice};
use vmbus::client::HvStatus;

use crate::boot::BuiltinError;

/// The first argument of the process that is a guest. It is no command for people.
pub const COMMAND: &str = "hosted-guest";

/// This program as a guest that does `work`; as much work as in other partitions.
pub fn program(work: &str) -> Result<GuestProgram, BuiltinError> {
    if work.len() > BootParameters::COMMAND_LINE_ROOM {
        return Err(BuiltinError::TooMuchWork { len: work.len() });
    }
    // The file itself, whatever has become of its name.
    let path = "/proc/self/exe".into();
    // Work that begins with a dash is no option.
    Ok(GuestProgram { path, arguments: [COMMAND, "--", work].map(str::to_owned).into() })
}

/// Is the guest. Returns only if this process cannot be one.
pub fn run(work: &str) -> anyhow::Result<()> {
    let processor = Processor::start()
        .context("this command is how partita starts a guest where there is no KVM")?;
    std::panic::set_hook(Box::new(report_panic));
    let guest = HostedGuest::new(processor)?;
    let status = runner::run(&guest, work);
    guest.processor.port_write(EXIT_PORT, 4, &status.to_le_bytes());
    // The root ends this process, now that it knows.
    loop {
        guest.processor.halt();
    }
}

/// How a guest that panics ends, as the image does.
const PANICKED: u32 = 101;

/// Says what went wrong, in the way that the runner's readers expect. Whatever else a panic does is
/// more than this process may.
fn report_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let mut error = Object::default().string("error", panic);
    Processor::last_words(CONSOLE_PORT, 1, error.line().as_bytes());
    Processor::last_words(CONSOLE_PORT, 1, b"\n");
    Processor::last_words(EXIT_PORT, 4, &PANICKED.to_le_bytes());
    // The root ends this process.
    loop {
        std::hint::spin_loop();
    }
}

/// Synthetic registers (TLFS, "Synthetic MSRs").
mod msr {
    pub const GUEST_OS_ID: u32 = 0x4000_0000;
    pub const SCONTROL: u32 = 0x4000_0080;
    pub const SIEFP: u32 = 0x4000_0082;
    pub const SIMP: u32 = 0x4000_0083;
    pub const EOM: u32 = 0x4000_0084;
    pub const SINT2: u32 = 0x4000_0092;
}

/// An open-source system (bit 63) of a kind that has no number.
const GUEST_OS_ID: u64 = 1 << 63 | 0x7f << 56;

/// A guest that waits for a device in vain finds out by the clock, after this at the latest.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// Any vector will do: a process has one interrupt.
const VECTOR: u64 = 0x20;

const POST_MESSAGE: u64 = 0x5c;

/// How the guest divides its memory. Page 0 is left alone, so that no address is 0.
const MESSAGES: usize = PAGE;
const EVENTS: usize = 2 * PAGE;
const INPUT: usize = 3 * PAGE;
const SHARED: usize = 4 * PAGE;

/// Bytes of a SINT's message slot and of its event flags, and where the VMBus's are in their pages.
const PER_SINT: usize = 256;
const SINT: usize = 2 * PER_SINT;

/// The guest's world.
struct HostedGuest {
    processor: Processor,
    started: Instant,
    halts: std::cell::Cell<u64>,
}

impl HostedGuest {
    /// Switches the SynIC on.
    fn new(processor: Processor) -> anyhow::Result<Self> {
        if processor.memory().len() < SHARED {
            bail!("the guest needs {SHARED} bytes of memory for itself");
        }
        for (register, value) in [
            (msr::GUEST_OS_ID, GUEST_OS_ID),
            (msr::SIMP, MESSAGES as u64 | 1),
            (msr::SIEFP, EVENTS as u64 | 1),
            (msr::SCONTROL, 1),
            (msr::SINT2, VECTOR),
        ] {
            if !processor.register_write(register, value) {
                bail!("register {register:#x} does not take {value:#x}");
            }
        }
        Ok(Self { processor, started: Instant::now(), halts: std::cell::Cell::new(0) })
    }

    /// A word of the pages that the hypervisor writes to.
    fn word(memory: &VolatileSlice<'_>, offset: usize) -> u32 {
        memory.get_atomic_ref::<AtomicU32>(offset).map_or(0, |word| word.load(Ordering::Relaxed))
    }
}

/// A process is interrupted by whatever device has something to say, so it need not listen.
impl Ports for HostedGuest {
    fn read_8(&self, port: u16) -> u8 {
        let mut data = [0];
        self.processor.port_read(port, &mut data);
        u8::from_le_bytes(data)
    }

    fn read_32(&self, port: u16) -> u32 {
        let mut data = [0; 4];
        self.processor.port_read(port, &mut data);
        u32::from_le_bytes(data)
    }

    fn write_8(&self, writes: &[PortWrite]) {
        self.processor.port_writes(writes.iter().map(|write| (write.port, write.value)));
    }

    fn write_32(&self, port: u16, value: u32) {
        self.processor.port_write(port, 4, &value.to_le_bytes());
    }

    fn load_32(&self, address: u32) -> u32 {
        let mut data = [0; 4];
        self.processor.mmio_read(address.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn store_32(&self, address: u32, value: u32) {
        // The message orders what both processes have mapped no less than a processor would.
        fence(Ordering::SeqCst);
        self.processor.mmio_write(address.into(), 4, value.into());
    }

    fn read_string(&self, port: u16, words: &[AtomicU64]) {
        let memory = self.processor.memory_start();
        let gpa = words.as_ptr().addr().wrapping_sub(memory.as_ptr().addr());
        self.processor.port_read_string(port, 4, gpa as u64, size_of_val(words));
    }

    fn write_string(&self, port: u16, words: &[AtomicU64]) {
        // The root reads from the message, so that nobody changes it meanwhile.
        let mut bytes = [0; PAGE];
        for words in words.chunks(PAGE / 8) {
            for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
                to.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
            if let Some(bytes) = bytes.get(..size_of_val(words)) {
                self.processor.port_write(port, 4, bytes);
            }
        }
    }
}

impl Platform for HostedGuest {
    fn memory(&self) -> Pages<'_> {
        let memory = self.processor.memory();
        let count = (memory.len() - SHARED) / PAGE;
        // SAFETY: `new` has seen that the memory has these pages.
        let start = unsafe { self.processor.memory_start().add(SHARED) };
        // SAFETY: the memory stays mapped as long as the process lives, has so many pages behind
        // those that are used here, and the root, too, uses them by atomics and volatile accesses.
        unsafe { Pages::new(start, (SHARED / PAGE) as u64, count) }
    }

    fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        let memory = self.processor.memory();
        let payload = payload.get(..Message::ROOM).unwrap_or(payload);
        // The input of the hypercall, as it lies in memory.
        let mut input = [0; 256];
        let head = [connection, 0, message_type, payload.len() as u32];
        for (to, from) in input.chunks_exact_mut(4).zip(head) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        for (to, from) in input.iter_mut().skip(16).zip(payload) {
            *to = *from;
        }
        if let Ok(place) = memory.get_slice(INPUT, input.len()) {
            place.copy_from(&input);
        }
        HvStatus(self.processor.hypercall(POST_MESSAGE, INPUT as u64).0)
    }

    fn signal_event(&self, connection: u32) {
        self.processor.signal_event(ConnectionId::new(connection));
    }

    fn take_message(&self) -> Option<Message> {
        const SLOT: usize = MESSAGES + SINT;
        const PENDING: u8 = 1;

        let memory = self.processor.memory();
        let kind = memory.get_atomic_ref::<AtomicU32>(SLOT).ok()?;
        let message_type = kind.load(Ordering::Acquire);
        if message_type == 0 {
            return None;
        }
        let size = (Self::word(&memory, SLOT + 4) & 0xff) as usize;
        let mut payload = [0; Message::ROOM];
        memory.get_slice(SLOT + 16, payload.len()).ok()?.copy_to(&mut payload);
        kind.store(0, Ordering::Release);
        // The flag is looked at after the slot is free, or a message that came in between waits.
        fence(Ordering::SeqCst);
        let flags = memory.get_atomic_ref::<AtomicU8>(SLOT + 5).ok()?;
        if flags.load(Ordering::Relaxed) & PENDING != 0 {
            self.processor.register_write(msr::EOM, 0);
        }
        Some(Message::new(message_type, payload.get(..size).unwrap_or(&payload)))
    }

    fn idle(&self) {
        self.halts.set(self.halts.get() + 1);
        self.processor.halt_for(LONGEST_SLEEP);
        let memory = self.processor.memory();
        let flags = (EVENTS + SINT..EVENTS + SINT + PER_SINT).step_by(4);
        for flags in flags.filter_map(|at| memory.get_atomic_ref::<AtomicU32>(at).ok()) {
            if flags.load(Ordering::Relaxed) != 0 {
                flags.swap(0, Ordering::AcqRel);
            }
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn line(&self, text: &str) {
        let mut buffer = [b'\n'; 1024];
        // The runner's lines are shorter; a longer one is cut.
        let len = text.len().min(buffer.len() - 1);
        for (to, from) in buffer.iter_mut().zip(text.bytes().take(len)) {
            *to = from;
        }
        if let Some(line) = buffer.get(..=len) {
            self.processor.port_write(CONSOLE_PORT, 1, line);
        }
    }

    fn counters(&self) -> PlatformCounters {
        PlatformCounters { halts: self.halts.get(), interrupts: self.processor.interrupts() }
    }
}
