//! What a partition is, whichever way the host runs it: how it starts, how it stops, how its
//! devices interrupt it, and what it counts. [`crate::kvm`] is the way by KVM, [`crate::hosted`] the
//! way without.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::synic::{MessageSink, Synic};
use crate::{Bus, Gpa, GuestMemory, MemoryError, VpIndex};

/// Why a partition could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// The host has no KVM.
    #[error("/dev/kvm does not exist: load kvm-intel or kvm-amd, and enable virtualization")]
    NoKvm,
    /// It has one, but not for us.
    #[error("no permission to open /dev/kvm: join its group (often kvm), or run as root")]
    NoPermission,
    /// KVM speaks another version of its interface.
    #[error("/dev/kvm has API version {0}, and 12 is needed")]
    ApiVersion(i32),
    /// KVM lacks something without which this cannot work.
    #[error("this host's KVM lacks {0}")]
    Lacking(&'static str),
    /// More processors than KVM allows, or none.
    #[error("{asked} virtual processors: this host allows 1 to {max}")]
    VpCount {
        /// What was asked for.
        asked: u32,
        /// What there can be.
        max: u32,
    },
    /// A call that should not fail did.
    #[error("{what}")]
    Call {
        /// What was to be done.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// What was to be written to memory did not fit.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A guest's memory, processors and SynIC.
pub trait Partition: Send {
    /// Its RAM.
    fn memory(&self) -> &GuestMemory;

    /// Its SynIC, as the root side sees it.
    fn synic(&self) -> Arc<dyn Synic>;

    /// Stops [`Self::run`]; for devices and other threads.
    fn stop_handle(&self) -> StopHandle;

    /// The exits of each processor, in order.
    fn exit_counters(&self) -> Vec<Arc<ExitCounters>>;

    /// A line into the interrupt controllers: 0 to 15 are the PC's IRQs, up to 23 the I/O APIC's.
    /// It leads nowhere in a partition that has none.
    fn interrupt_line(&self, gsi: u32) -> Result<Arc<dyn InterruptLine>, PartitionError>;

    /// From now on a guest's writes to `count` ports from `port` need not exit: their device sees
    /// them at the next exit of any processor, before that. Only for registers whose writes nobody
    /// can notice until something else is accessed. Does nothing where that is not possible.
    fn defer_port_writes(&self, port: u16, count: u32) -> Result<(), PartitionError> {
        let _ = (port, count);
        Ok(())
    }

    /// The same of writes to the `len` addresses from `gpa`, where no RAM is.
    fn defer_memory_writes(&self, gpa: Gpa, len: u32) -> Result<(), PartitionError> {
        let _ = (gpa, len);
        Ok(())
    }

    /// Runs the processors until somebody stops them; then they are gone. The buses have the
    /// devices, and `sink` takes the guest's messages.
    fn run(&mut self, ports: &Arc<Bus>, mmio: &Arc<Bus>, sink: &Arc<dyn MessageSink>)
    -> StopReason;
}

/// How a partition's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a restart.
    Reset,
    /// A processor had nowhere left to take its faults; a real machine restarts.
    TripleFault,
    /// Somebody outside the guest ended it.
    Stopped,
    /// The host could not go on running it; one line that says why.
    Error(String),
}

/// Stops a partition's run, from any thread. Clones stop the same one.
#[derive(Clone, Default)]
pub struct StopHandle {
    shared: Arc<StopShared>,
}

#[derive(Default)]
struct StopShared {
    /// The same as `reason.is_some()`, for those who look often.
    stopping: AtomicBool,
    reason: Mutex<Option<StopReason>>,
    changed: Condvar,
}

impl StopHandle {
    /// Ends the run. The first reason counts.
    pub fn stop(&self, reason: StopReason) {
        let shared = &*self.shared;
        let mut slot = shared.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(reason);
            shared.stopping.store(true, Ordering::Release);
            shared.changed.notify_all();
        }
    }

    /// Whether the run is to end.
    pub fn is_stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Acquire)
    }

    /// Sleeps until somebody calls [`Self::stop`].
    pub fn wait(&self) -> StopReason {
        let shared = &*self.shared;
        let mut slot = shared.reason.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*slot {
                Some(reason) => return reason.clone(),
                None => {
                    slot = shared.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// An interrupt line of the partition's interrupt controllers.
pub trait InterruptLine: Send + Sync {
    /// One rising edge, as ISA devices make. Never blocks; any thread.
    fn pulse(&self);

    /// Holds the line up or down, as PCI devices and the SCI do.
    fn set_level(&self, high: bool);
}

/// Where a processor starts, in long mode with flat segments, paging on and interrupts off.
///
/// The descriptor table and the page tables are in guest memory already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootState {
    /// The first instruction (`rip`).
    pub entry: Gpa,
    /// The argument (`rsi`); Linux expects its boot parameters there.
    pub argument: u64,
    /// The stack (`rsp`).
    pub stack: Gpa,
    /// The top page table (`cr3`).
    pub page_table: Gpa,
    /// The descriptor table.
    pub gdt: Gpa,
    /// Bytes in the descriptor table, less one.
    pub gdt_limit: u16,
    /// The selector of a 64-bit code segment in it.
    pub code_selector: u16,
    /// The selector of a data segment in it.
    pub data_selector: u16,
}

/// The kinds of exits to user space that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// `in`
    PortRead,
    /// `out`
    PortWrite,
    /// A load from an address without RAM.
    MmioRead,
    /// A store to an address without RAM.
    MmioWrite,
    /// A write to a SynIC register that moves a page.
    Synic,
    /// An access to a synthetic register that user space serves.
    Register,
    /// The hypercall *post message*.
    PostMessage,
    /// The hypercall *signal event* on a connection that nobody has bound.
    SignalEvent,
    /// A crash report, or a reset through a Hyper-V register.
    SystemEvent,
    /// The guest has ended a level-triggered interrupt of an I/O APIC that is not KVM's.
    EndOfInterrupt,
    /// A processor can take the interrupt of a PIC that is not KVM's.
    InterruptWindow,
    /// A signal of ours: to stop, to look at the PICs, or to end an interrupt that ends by itself.
    Kick,
    /// Anything else.
    Other,
}

impl ExitKind {
    /// All kinds, in the order in which they are counted.
    pub const ALL: [Self; 13] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Synic,
        Self::Register,
        Self::PostMessage,
        Self::SignalEvent,
        Self::SystemEvent,
        Self::EndOfInterrupt,
        Self::InterruptWindow,
        Self::Kick,
        Self::Other,
    ];

    /// A short name, for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port reads",
            Self::PortWrite => "port writes",
            Self::MmioRead => "mmio reads",
            Self::MmioWrite => "mmio writes",
            Self::Synic => "synic pages",
            Self::Register => "synthetic registers",
            Self::PostMessage => "messages posted",
            Self::SignalEvent => "unbound signals",
            Self::SystemEvent => "system events",
            Self::EndOfInterrupt => "interrupts ended",
            Self::InterruptWindow => "interrupt windows",
            Self::Kick => "kicks",
            Self::Other => "other exits",
        }
    }
}

/// One processor's exits to user space, by kind; readable while it runs.
#[derive(Debug, Default)]
pub struct ExitCounters {
    counts: [AtomicU64; ExitKind::ALL.len()],
}

impl ExitCounters {
    /// Counts one. Only the processor's own thread does.
    pub(crate) fn count(&self, kind: ExitKind) {
        // One writer, so no read-modify-write is needed.
        let counter = &self.counts[kind as usize];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// How many there were of one kind.
    pub fn get(&self, kind: ExitKind) -> u64 {
        self.counts[kind as usize].load(Ordering::Relaxed)
    }

    /// How many there were.
    pub fn total(&self) -> u64 {
        ExitKind::ALL.into_iter().map(|kind| self.get(kind)).sum()
    }
}

impl fmt::Display for ExitCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} exits", self.total())?;
        for kind in ExitKind::ALL {
            let count = self.get(kind);
            if count > 0 {
                write!(f, ", {count} {}", kind.name())?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for VpIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vp{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_to_stop_counts() {
        let handle = StopHandle::default();
        assert!(!handle.is_stopping());
        let other = handle.clone();
        let thread = std::thread::spawn(move || other.wait());
        handle.stop(StopReason::PowerOff);
        handle.stop(StopReason::Reset);
        assert!(handle.is_stopping());
        assert_eq!(thread.join().unwrap(), StopReason::PowerOff);
        assert_eq!(handle.wait(), StopReason::PowerOff);
    }

    #[test]
    fn counters_add_up() {
        let counters = ExitCounters::default();
        for (n, kind) in ExitKind::ALL.into_iter().enumerate() {
            for _ in 0..=n {
                counters.count(kind);
            }
        }
        assert_eq!(counters.total(), 91);
        assert_eq!(counters.get(ExitKind::PortRead), 1);
        assert!(counters.to_string().starts_with("91 exits, 1 port reads"));
    }
}
