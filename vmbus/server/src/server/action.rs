//! What goes out of the server: what it wants done, and what it refused.

use std::sync::Arc;

use hypervisor::{Gpn, VpIndex};
use thiserror::Error;
use vmbus::protocol::{GpadlId, Relid, USER_DATA, Version};

use super::gpadl::GpadlError;

/// How much a guest may make the server keep.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Page lists at a time.
    pub gpadls: usize,
    /// Pages in all lists together, eight bytes of ours each.
    pub pages: usize,
    /// Pages of one direction of a channel, the control page included; at least two.
    pub ring_pages: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { gpadls: 4096, pages: 1 << 17, ring_pages: 1024 }
    }
}

/// What the server wants done, in this order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Post a message of type [`MESSAGE_TYPE`](vmbus::protocol::MESSAGE_TYPE) to `vp`'s slot of the VMBus SINT,
    /// after all posted before.
    Post {
        /// The VP.
        vp: VpIndex,
        /// The message's payload, at most [`MAX_MESSAGE`](vmbus::protocol::MAX_MESSAGE) bytes.
        payload: Box<[u8]>,
    },
    /// Forget messages that are not yet in the slot: a new guest would not understand them.
    DiscardPosts,
    /// Start a worker, then call [`Server::channel_opened`](super::Server::channel_opened).
    Open(OpenRequest),
    /// Stop a worker; when it has stopped, call [`Server::channel_closed`](super::Server::channel_closed).
    Close {
        /// The channel.
        relid: Relid,
    },
    /// Interrupt `vp` from now on.
    Retarget {
        /// The channel.
        relid: Relid,
        /// The VP.
        vp: VpIndex,
    },
    /// A list of pages is known.
    GpadlAdded {
        /// The channel it is for.
        relid: Relid,
        /// Its number.
        gpadl: GpadlId,
        /// Its pages. All are RAM.
        pages: Arc<[Gpn]>,
    },
    /// The guest wants a list of pages back. When no worker uses it any more, call
    /// [`Server::gpadl_unused`](super::Server::gpadl_unused); when the device's workers have stopped, it
    /// is removed by itself.
    GpadlWanted {
        /// The channel it is for.
        relid: Relid,
        /// Its number.
        gpadl: GpadlId,
    },
    /// A list of pages is the guest's again.
    GpadlRemoved {
        /// The channel it was for.
        relid: Relid,
        /// Its number.
        gpadl: GpadlId,
    },
}

/// All that is needed to start a channel's worker.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// The channel.
    pub relid: Relid,
    /// The device's first channel; the same as `relid` unless this is a sub-channel.
    pub primary: Relid,
    /// Its index among the device's channels.
    pub subchannel: u16,
    /// The pages of the ring from the guest, its control page first.
    pub incoming: Vec<Gpn>,
    /// The pages of the ring to the guest, its control page first.
    pub outgoing: Vec<Gpn>,
    /// The VP to interrupt; it exists.
    pub vp: VpIndex,
    /// For the service provider.
    pub user_data: [u8; USER_DATA],
}

/// Why a message of the guest was not obeyed. For the log only: where the guest is owed an answer,
/// it gets one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MessageError {
    /// Shorter than its kind demands.
    #[error("message {0} is cut short")]
    Short(u32),
    /// Not a message that a guest sends.
    #[error("message {0} is unknown")]
    Unknown(u32),
    /// Sent before a version was agreed upon.
    #[error("message {0} came before a version was negotiated")]
    NotConnected(u32),
    /// A version that is not spoken here.
    #[error("version {0} is not supported")]
    Version(Version),
    /// A channel that does not exist or cannot do that now.
    #[error("message {kind} does not fit the state of channel {relid}")]
    Channel {
        /// The message.
        kind: u32,
        /// The channel.
        relid: Relid,
    },
    /// An open message names rings that cannot be.
    #[error("channel {0} is to open with an impossible ring")]
    Ring(Relid),
    /// A VP that does not exist.
    #[error("there is no VP {0}")]
    Vp(u32),
    /// A list of pages that cannot be.
    #[error("GPADL {0}: {1}")]
    Gpadl(GpadlId, GpadlError),
}
