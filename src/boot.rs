//! Starting a guest directly, without firmware: for Linux, the kernel, its initrd and its parameters
//! go into guest memory, with the tables that a BIOS would have left there. The built-in guest needs
//! less of the same.
//!
//! ```text
//!     0x500  global descriptor table
//!    0x7000  boot parameters ("zero page")
//!    0x8ff0  stack
//!    0x9000  page tables that map the first 4 GiB to themselves, 24 KiB
//!   0x20000  command line, as long as the kernel takes one, and 64 KiB at most
//!   0x9fc00  end of conventional memory
//!   0xe0000  ACPI tables
//!   0xf0000  SMBIOS tables, if there are any
//!  0x100000  RAM goes on: the kernel where it wants to be, the initrd at the end
//! ```

mod acpi;
mod builtin;
mod linux;
pub mod long_mode;
mod smbios;

pub use acpi::PciBus;
pub use builtin::{BuiltinBoot, BuiltinError};
pub use linux::LinuxBoot;
