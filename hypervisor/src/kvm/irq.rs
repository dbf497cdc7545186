//! Interrupt lines: the routes of KVM's global interrupt numbers (GSIs), and the ways to raise one.
//!
//! | GSI | goes to |
//! | --- | --- |
//! | 0 to 15 | the pins of both PICs and of the I/O APIC, one to one |
//! | 16 to 23 | the I/O APIC's other pins |
//! | 64 and up | SINT 2 of each processor |

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::call;
use crate::synic::Sint;
use crate::{InterruptLine, PartitionError, VpIndex};

/// The I/O APIC's pins.
const IOAPIC_PINS: u32 = 24;

/// The first of the GSIs that go to a SINT.
const SINT_GSIS: u32 = 64;

/// The GSI of SINT 2 of a processor.
pub(super) fn sint_gsi(vp: VpIndex) -> u32 {
    SINT_GSIS + vp.0
}

/// Tells KVM all routes, the SINTs of `sints` processors among them.
pub(super) fn set_routes(vm: &VmFd, sints: u32) -> Result<(), PartitionError> {
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
    let sints = (0..sints).map(|vp| kvm_irq_routing_entry {
        gsi: sint_gsi(VpIndex(vp)),
        type_: KVM_IRQ_ROUTING_HV_SINT,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            hv_sint: kvm_irq_routing_hv_sint { vcpu: vp, sint: Sint::VMBUS.index().into() },
        },
        ..Default::default()
    });
    let entries: Vec<_> = pic.chain(second_pic).chain(ioapic).chain(sints).collect();
    let table = KvmIrqRouting::from_entries(&entries).expect("a few hundred routes fit");
    vm.set_gsi_routing(&table).map_err(call("cannot set the interrupt routes"))
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
            tracing::warn!(gsi = self.gsi, %error, "cannot set an interrupt line");
        }
    }
}
