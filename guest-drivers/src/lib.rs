//! The built-in guest: a little program that has no operating system under it, finds the disks and
//! the NICs of the machine it runs in, and works with them. No std, no allocation.
//!
//! - [`platform`] is all that it needs from the world. The image's platform is a bare processor
//!   under a hypervisor; a test's is a thread with the other end of the bus in the same process.
//! - [`bus`] brings the VMBus up and opens channels.
//! - [`block`] is what a driver of a disk is; [`storvsc`] is the one for synthetic SCSI, and [`ide`]
//!   the one for ATA disks on a PC's IDE channels, which it finds by [`pci`].
//! - [`net`] is what a driver of a NIC is; [`netvsc`] is the one for synthetic NICs, and [`e1000`] the
//!   one for an emulated 82540EM, which it finds by [`pci`], too.
//! - [`work`] reads from the command line what is to be done; [`runner`] does it, and says what
//!   came out of each in one line of JSON.
//! - [`boot`] is what a VMM and the image have agreed on.
//!
//! The image itself is the program `builtin-guest` of this crate, which only the build script of
//! the workspace's root package builds: it is carried in `partita`.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod block;
pub mod boot;
pub mod bus;
pub mod e1000;
#[doc(hidden)]
pub mod fuzzing;
pub mod ide;
pub mod json;
pub mod memory;
pub mod net;
pub mod netvsc;
pub mod pci;
pub mod platform;
pub mod runner;
pub mod storvsc;
pub mod work;
