//! VMBus as both ends know it: the messages that set a channel up, the packets that run in it,
//! and the ring that carries them. No std, no allocation, no hypervisor.
//!
//! A *channel* is a pair of rings in guest memory, one per direction, and a doorbell each way.
//! The guest learns of a channel by an *offer*, hands the ring's pages over as a *GPADL* (guest
//! physical address descriptor list), and opens it; [`protocol`] has those messages. From then on
//! the two ends speak in [`packet`]s through an [`Incoming`](ring::Incoming) and an
//! [`Outgoing`](ring::Outgoing) ring. [`vstor`] is what a storage channel's packets contain, [`nvsp`] and, inside of it, [`rndis`] what
//! a NIC's do.
//!
//! Everything is little-endian, as x86 is: the structures are read and written as they lie.

#![no_std]

#[cfg(any(test, loom))]
extern crate std;

#[cfg(not(loom))]
pub mod client;
#[doc(hidden)]
pub mod fuzzing;
pub mod guid;
pub mod mapped;
pub mod nvsp;
pub mod packet;
pub mod protocol;
pub mod ring;
pub mod rndis;
mod sync;
pub mod vstor;

pub use guid::Guid;
pub use mapped::DoubleMapped;

const _: () = assert!(cfg!(target_endian = "little"), "wire structures are used as they lie");
