//! What a client tells its caller: what has happened, or what went wrong.

use thiserror::Error;

use super::HvStatus;
use crate::protocol::{GpadlId, Relid, Version};

/// What a message of the root came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Event {
    /// A version is agreed on; offers follow.
    Connected(Version),
    /// There is a channel: see [`Client::offer`](super::Client::offer).
    Offered(Relid),
    /// There is a channel, and no room in the table for it. It is left alone.
    OfferDropped(Relid),
    /// These were all that the root has now. More may come at any time.
    AllOffered,
    /// The root knows the pages.
    GpadlCreated(GpadlId),
    /// The root does not take the pages; the number is free again.
    GpadlRefused {
        /// The list.
        gpadl: GpadlId,
        /// The root's reason.
        status: u32,
    },
    /// The pages are the guest's again.
    GpadlTornDown(GpadlId),
    /// The channel may be used.
    Opened(Relid),
    /// The root does not open the channel.
    OpenRefused {
        /// The channel.
        relid: Relid,
        /// The root's reason.
        status: u32,
    },
    /// The offer is withdrawn and the channel dead: stop using it, then call [`Client::release`](super::Client::release).
    Rescinded(Relid),
    /// The root has forgotten the guest; all shared memory is the guest's again.
    Unloaded,
}

/// Why the connection is over: the root does not keep to the protocol, or does not listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ConnectionError {
    /// Shorter than its kind demands.
    #[error("message {0} of the root is cut short")]
    Short(u32),
    /// Nothing that a root sends, or not now.
    #[error("the root sent message {0} out of turn")]
    Unexpected(u32),
    /// All versions were refused.
    #[error("the root speaks no version that we do")]
    NoCommonVersion,
    /// The version response makes no sense.
    #[error("the root accepted version {0} but did not say where it takes messages")]
    VersionResponse(Version),
    /// A channel number that cannot be.
    #[error("the root offered channel {0}; they go from 1 to 2047")]
    Relid(Relid),
    /// A number or a device that was offered before, or a sub-channel of nothing.
    #[error("the root offered channel {0} although it has no place for it")]
    Offer(Relid),
    /// A channel that is not there, or not in that state.
    #[error("the root sent message {kind} for channel {relid}, which did not wait for it")]
    Channel {
        /// The message.
        kind: u32,
        /// The channel.
        relid: Relid,
    },
    /// A page list that is not there, or not in that state.
    #[error("the root sent message {kind} for GPADL {gpadl}, which did not wait for it")]
    Gpadl {
        /// The message.
        kind: u32,
        /// The list.
        gpadl: GpadlId,
    },
    /// A message could not be posted.
    #[error("posting a message failed with status {0}")]
    Post(HvStatus),
}

/// Why something was not asked of the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RequestError {
    /// Nothing is agreed with the root, or it was asked already.
    #[error("the bus is not in a state for that")]
    State,
    /// No such channel, or not in a state for that.
    #[error("channel {0} is not in a state for that")]
    Channel(Relid),
    /// No such page list, or it is in use, or not yet or no more known to the root.
    #[error("GPADL {0} is not in a state for that")]
    Gpadl(GpadlId),
    /// The table is full.
    #[error("there are too many GPADLs")]
    Full,
    /// A GPADL has at least one page, and at most [`MAX_GPADL_PAGES`](super::MAX_GPADL_PAGES).
    #[error("a GPADL cannot have {0} pages")]
    Pages(usize),
    /// The message could not be posted.
    #[error("posting a message failed with status {0}")]
    Post(HvStatus),
}
