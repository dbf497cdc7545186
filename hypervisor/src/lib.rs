//! The thin hypervisor: partitions, virtual processors, guest memory, intercepts and the SynIC.
//! No device, no driver and no file format lives here.

pub mod hosted;
mod hypercall;
mod intercept;
pub mod interrupts;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod partition;
mod reference_time;
mod registers;
pub mod synic;
mod timers;
mod types;

pub use hypercall::page::{DOORBELL_PORT, HYPERCALL_PORT};
pub use intercept::{Bus, BusError, Claim, Device};
pub use memory::{GuestMemory, MemoryError, PageMapping};
pub use partition::{
    BootState, ExitCounters, ExitKind, InterruptLine, Partition, PartitionError, StopHandle,
    StopReason,
};
pub use types::{Gpa, Gpn, PAGE_SIZE, VpIndex};
