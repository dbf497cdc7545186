//! Service clients: what a guest runs at its end of a synthetic device's channel. No std, no
//! allocation, no thread: whoever runs a client owns it, calls it, and sleeps for it.
//!
//! - [`Channel`] is the base of each: both rings of an open channel and a [`Doorbell`].
//! - [`storvsc`] is the client of a synthetic SCSI controller, [`netvsc`] that of a synthetic NIC.
//! - [`PageList`] names memory for one request, a [`SharedBuffer`] is named once for all.
//!
//! How a channel comes to be open is the business of [`vmbus::client`].
//!
//! The root is not trusted: what it sends is copied out of the ring once, checked, and then used.
//! A client that is lied to says so and is dead from then on; it never panics.

#![no_std]

#[cfg(test)]
extern crate std;

mod buffer;
mod channel;
#[doc(hidden)]
pub mod fuzzing;
pub mod netvsc;
mod pages;
pub mod storvsc;
mod table;

pub use buffer::SharedBuffer;
pub use channel::{Channel, Counters, Doorbell, Signal};
pub use pages::{PageList, Pages, words};
