//! Where things lie in a guest's physical address space.
//!
//! ```text
//!            0  RAM, up to 3 GiB
//!   0xc0000000  PCI memory windows                              512 MiB
//!   0xe0000000  VMBus memory windows (synthetic video, vPCI)    256 MiB
//!   0xf0000000  unused
//!   0xfec00000  I/O APIC
//!   0xfee00000  local APICs
//!   0xfffbc000  pages KVM wants for itself on old Intel hosts   16 KiB
//!   0xfffc0000  firmware                                        256 KiB
//!  0x100000000  the rest of RAM
//! ```

use crate::Gpa;

/// One past the last byte of low RAM where there is more than fits below it: the hole starts here.
pub const HOLE_START: Gpa = Gpa(0xc000_0000);

/// Where RAM goes on after the hole: 4 GiB.
pub const HIGH_RAM_START: Gpa = Gpa(0x1_0000_0000);

/// Memory windows of the emulated PCI bus.
pub const PCI_MMIO_START: Gpa = Gpa(0xc000_0000);
/// Bytes in [`PCI_MMIO_START`]'s window.
pub const PCI_MMIO_SIZE: u64 = 0x2000_0000;

/// Memory windows that VMBus devices may ask for.
pub const VMBUS_MMIO_START: Gpa = Gpa(0xe000_0000);
/// Bytes in [`VMBUS_MMIO_START`]'s window.
pub const VMBUS_MMIO_SIZE: u64 = 0x1000_0000;

/// The I/O APIC's registers, where every PC has them.
pub const IOAPIC: Gpa = Gpa(0xfec0_0000);

/// The local APICs' registers, where every PC has them.
pub const LOCAL_APIC: Gpa = Gpa(0xfee0_0000);

/// One page for KVM's identity map (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: Gpa = Gpa(0xfffb_c000);

/// Three pages for KVM's task state segment (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: Gpa = Gpa(0xfffb_d000);

const _: () = assert!(PCI_MMIO_START.0 >= HOLE_START.0);
const _: () = assert!(PCI_MMIO_START.0 + PCI_MMIO_SIZE <= VMBUS_MMIO_START.0);
const _: () = assert!(VMBUS_MMIO_START.0 + VMBUS_MMIO_SIZE <= IOAPIC.0);
