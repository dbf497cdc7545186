//! Interrupt lines: the routes of KVM's global interrupt numbers (GSIs), and the ways to raise one.
//!
//! | GSI | goes to |
//! | --- | --- |
//! | 0 to 15 | the pins of both PICs and of the I/O APIC, one to one |
//! | 16 to 23 | the I/O APIC's other pins |
//! | the same, without KVM's controllers | nowhere; level-triggered messages are noted there ([`super::split`]) |
//! | 64 and up | SINT 2 of each processor: to the kernel's SynIC, or a message to its local APIC |

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Irqchip, call};
use crate::interrupts::InterruptMessage;
use crate::synic::Sint;
use crate::{InterruptLine, PartitionError, VpIndex, layout};

/// The I/O APIC's pins.
pub(super) const IOAPIC_PINS: u32 = 24;

/// The first of the GSIs that go to a SINT.
const SINT_GSIS: u32 = 64;

/// The GSI of SINT 2 of a processor.
pub(super) fn sint_gsi(vp: VpIndex) -> u32 {
    SINT_GSIS + vp.0
}

/// The route to SINT 2 of a processor in the kernel's SynIC.
pub(super) fn kernel_sint(vp: VpIndex) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi: sint_gsi(vp),
        type_: KVM_IRQ_ROUTING_HV_SINT,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            hv_sint: kvm_irq_routing_hv_sint { vcpu: vp.0, sint: Sint::VMBUS.index().into() },
        },
        ..Default::default()
    }
}

/// The route by which SINT 2 of a processor becomes `vector` of its local APIC.
pub(super) fn sint_vector(vp: VpIndex, vector: u8) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi: sint_gsi(vp),
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: msi_address(vp),
                data: vector.into(),
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

/// Where a message goes that interrupts one processor (SDM volume 3, 11.11): the APIC id is in
/// bits 12 to 19, and the data's upper bits, all zero, make it fixed and edge-triggered.
fn msi_address(vp: VpIndex) -> u32 {
    layout::LOCAL_APIC.0 as u32 | (vp.0 & 0xff) << 12
}

/// Raises `vector` of a processor's local APIC, without a route. Any thread.
pub(super) fn raise_vector(vm: &VmFd, vp: VpIndex, vector: u8) {
    let message =
        kvm_msi { address_lo: msi_address(vp), data: vector.into(), ..Default::default() };
    // It fails when the guest has switched that local APIC off, which is its affair.
    let _ = vm.signal_msi(message);
}

/// The route by which KVM knows a level-triggered message, to tell us its end: `gsi` is below 24.
fn level_message(gsi: u32, message: InterruptMessage) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

/// The routes from the lines to KVM's own controllers.
fn kernel_lines() -> Vec<kvm_irq_routing_entry> {
    let chip = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let pic = (0..8).map(|gsi| chip(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
    let second_pic = (8..16).map(|gsi| chip(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
    let ioapic = (0..IOAPIC_PINS).map(|gsi| chip(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    pic.chain(second_pic).chain(ioapic).collect()
}

/// All routes of a partition. KVM takes them only together.
pub(super) struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

struct Table {
    /// Those of the first GSIs.
    lines: Vec<kvm_irq_routing_entry>,
    sints: Vec<kvm_irq_routing_entry>,
}

impl Routes {
    /// Tells KVM nothing yet.
    pub(super) fn new(vm: &Arc<VmFd>, irqchip: Irqchip) -> Self {
        let lines = match irqchip {
            Irqchip::Kernel => kernel_lines(),
            Irqchip::Split => Vec::new(),
        };
        let table = Mutex::new(Table { lines, sints: Vec::new() });
        Self { vm: Arc::clone(vm), table }
    }

    /// Where the SINTs lead. `sints` is asked while nobody else changes a route.
    pub(super) fn set_sints(
        &self,
        sints: impl Iterator<Item = kvm_irq_routing_entry>,
    ) -> Result<(), PartitionError> {
        self.change(|table| table.sints = sints.collect())
    }

    /// The messages of which KVM is to tell the end; for partitions without its I/O APIC.
    pub(super) fn set_level_messages(
        &self,
        messages: &[InterruptMessage],
    ) -> Result<(), PartitionError> {
        let lines =
            (0..IOAPIC_PINS).zip(messages).map(|(gsi, message)| level_message(gsi, *message));
        self.change(|table| table.lines = lines.collect())
    }

    fn change(&self, change: impl FnOnce(&mut Table)) -> Result<(), PartitionError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut table);
        let entries: Vec<_> = table.lines.iter().chain(&table.sints).copied().collect();
        let entries = KvmIrqRouting::from_entries(&entries).expect("a few hundred routes fit");
        self.vm.set_gsi_routing(&entries).map_err(call("cannot set the interrupt routes"))
    }
}

/// An eventfd that raises `gsi` in the kernel when it is written.
pub(super) fn irqfd(vm: &VmFd, gsi: u32) -> Result<EventFd, PartitionError> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(call("cannot make an eventfd"))?;
    vm.register_irqfd(&event, gsi).map_err(call("cannot bind an event to an interrupt"))?;
    Ok(event)
}

/// A line of the interrupt controllers.
pub(super) struct KvmLine {
    vm: Arc<VmFd>,
    gsi: u32,
    edge: EventFd,
}

impl KvmLine {
    pub(super) fn new(vm: &Arc<VmFd>, gsi: u32) -> Result<Self, PartitionError> {
        Ok(Self { vm: Arc::clone(vm), gsi, edge: irqfd(vm, gsi)? })
    }
}

impl InterruptLine for KvmLine {
    fn pulse(&self) {
        // It fails only when the counter is full, and then an edge is on its way.
        let _ = self.edge.write(1);
    }

    fn set_level(&self, high: bool) {
        if let Err(error) = self.vm.set_irq_line(self.gsi, high) {
            limited::warn!(gsi = self.gsi, %error, "cannot set an interrupt line");
        }
    }
}
