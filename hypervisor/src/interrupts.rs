//! Interrupt controllers that are no part of the hypervisor.
//!
//! A partition can have KVM's PICs and I/O APIC, or only its local APICs. In that case somebody else
//! brings the rest, an [`InterruptController`]: the partition tells it what lines and processors do,
//! and it tells the processors through [`LocalApics`].

/// The PC's interrupt controllers beyond the processors' local APICs: a pair of PICs, whose output
/// is wired to the first processor, and an I/O APIC.
///
/// Any thread calls it.
pub trait InterruptController: Send + Sync {
    /// Line `gsi` goes up or down.
    fn set_line(&self, gsi: u32, high: bool);

    /// Line `gsi` goes up and down, and nothing comes in between.
    fn pulse(&self, gsi: u32);

    /// The first processor, which has seen [`LocalApics::set_intr`] high, takes the interrupt and
    /// wants its vector.
    fn acknowledge(&self) -> u8;

    /// A processor has ended an interrupt that one of [`LocalApics::set_level_messages`] brought
    /// it.
    fn end_of_interrupt(&self, vector: u8);
}

/// A message to local APICs as I/O APICs and devices send it: a write of `data` to `address` (SDM
/// volume 3, 11.11, "Message Signalled Interrupts").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// Whom it is for.
    pub address: u32,
    /// Vector, delivery mode and trigger mode.
    pub data: u32,
}

/// The processors' side, for an [`InterruptController`]. Never calls that back.
pub trait LocalApics: Send + Sync {
    /// Sends a message. False if no local APIC has taken it up.
    fn send(&self, message: InterruptMessage) -> bool;

    /// From now on the end of an interrupt by one of these messages, 24 at most, is told to the
    /// controller; before, that of others might have been, and may still. Costs KVM a grace period.
    fn set_level_messages(&self, messages: &[InterruptMessage]);

    /// Holds the first processor's interrupt pin up or down.
    fn set_intr(&self, high: bool);
}
