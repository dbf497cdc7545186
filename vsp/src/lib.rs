//! Service providers (VSPs): what the root partition does for its guests' synthetic devices.
//!
//! [`storvsp`] serves disks. It speaks VMBus's storage protocol with the guest and SCSI inside of
//! it, and leaves the disks themselves to [`backends::block`]. [`netvsp`] serves NICs: it speaks the
//! network protocol and RNDIS inside of it, and leaves frames to [`backends::net`].

#[doc(hidden)]
pub mod fuzzing;
pub mod netvsp;
mod precedence;
pub mod scsi;
pub mod storvsp;
mod vigil;
