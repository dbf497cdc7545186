//! Partitions of which KVM has only the local APICs, and user space the PICs and the I/O APIC
//! (`KVM_CAP_SPLIT_IRQCHIP`).
//!
//! The I/O APIC's interrupts are messages, each an ioctl. KVM tells the end of those that it has a
//! route for among the first 24 GSIs, so the level-triggered ones have one there; nothing is ever
//! raised by these routes.
//!
//! A PIC's interrupt has no vector before the processor takes it. KVM hands the wire out to us:
//! before each entry the first processor looks at [`SplitIrqchip::intr`], and injects a vector if
//! KVM says that it would be taken, or else asks for an exit as soon as it would be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_msi};
use kvm_ioctls::VmFd;

use super::call;
use super::irq::{IOAPIC_PINS, Routes};
use super::kick::Kick;
use crate::interrupts::{InterruptController, InterruptMessage, LocalApics};
use crate::{InterruptLine, PartitionError, StopHandle, StopReason};

/// Leaves all but the local APICs to user space. Before any processor is made.
pub(super) fn enable(vm: &VmFd) -> Result<(), PartitionError> {
    let capability = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [IOAPIC_PINS.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&capability).map_err(call("cannot create the local APICs alone"))
}

/// The way from the controllers to the processors.
pub(super) struct SplitIrqchip {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    intr: AtomicBool,
    /// Gets the first processor out of KVM.
    first: Kick,
    stop: StopHandle,
}

impl SplitIrqchip {
    pub(super) fn new(vm: &Arc<VmFd>, routes: &Arc<Routes>, stop: StopHandle) -> Self {
        Self {
            vm: Arc::clone(vm),
            routes: Arc::clone(routes),
            intr: AtomicBool::new(false),
            first: Kick::default(),
            stop,
        }
    }

    /// Whether the PICs have an interrupt for the first processor.
    pub(super) fn intr(&self) -> bool {
        self.intr.load(Ordering::Acquire)
    }

    /// For the first processor, to tell its thread.
    pub(super) fn first(&self) -> &Kick {
        &self.first
    }
}

impl LocalApics for SplitIrqchip {
    fn send(&self, message: InterruptMessage) -> bool {
        let InterruptMessage { address, data } = message;
        let taken = self.vm.signal_msi(kvm_msi { address_lo: address, data, ..Default::default() });
        tracing::trace!(?taken, "message {address:#x} {data:#x}");
        // It fails when the guest has switched that local APIC off, or named one that is not there.
        taken.is_ok_and(|taken| taken > 0)
    }

    fn set_level_messages(&self, messages: &[InterruptMessage]) {
        if let Err(error) = self.routes.set_level_messages(messages) {
            self.stop.stop(StopReason::Error(error.to_string()));
        }
    }

    fn set_intr(&self, high: bool) {
        if !self.intr.swap(high, Ordering::AcqRel) && high {
            self.first.kick();
        }
    }
}

/// A line of controllers that are not KVM's. It leads nowhere as long as nobody has brought them.
pub(super) struct ControllerLine {
    pub(super) controller: Option<Arc<dyn InterruptController>>,
    pub(super) gsi: u32,
}

impl InterruptLine for ControllerLine {
    fn pulse(&self) {
        if let Some(controller) = &self.controller {
            controller.pulse(self.gsi);
        }
    }

    fn set_level(&self, high: bool) {
        if let Some(controller) = &self.controller {
            controller.set_line(self.gsi, high);
        }
    }
}
