//! The root side of VMBus: offers devices to a guest, takes its memory, opens channels.
//!
//! Three layers, from the inside out:
//! - [`server::Server`] is the protocol as a plain state machine: messages in, actions out.
//! - [`host::Host`] gives it a thread, takes the guest's messages, and does what it says: maps
//!   rings, binds doorbells, posts answers.
//! - [`channel`] is what a service provider sees: it implements [`Device`] and is handed a
//!   [`Channel`] for every channel the guest opens.
//!
//! [`testing`] makes channels with no VM around, both ends in one process.

pub mod channel;
#[doc(hidden)]
pub mod fuzzing;
pub mod host;
mod mapping;
mod news;
mod poll;
pub mod server;
pub mod testing;

pub use channel::{Channel, ChannelCounters, Device, OfferParams};
pub use host::Host;
pub use mapping::DoubleMapped;
pub use server::Server;
