//! What the channels of one opened NIC share: its buffers, and what the guest has set.
//!
//! The first channel's worker writes it, all workers read it, and no lock is on the way of a frame.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use backends::net::MacAddr;
use vmbus::nvsp::{Capabilities, Version};
use vmbus::rndis::PacketFilter;
use vmbus_server::channel::Counter;

use super::control::{Settings, Statistics};
use super::handshake::{ReceiveLayout, SendLayout};
use super::pages::Shared;
use super::receive::Wishes;

/// The receive buffer, and what was agreed on before it was shared.
#[derive(Debug)]
pub(super) struct Receive {
    pub memory: Shared,
    pub layout: ReceiveLayout,
    pub version: Version,
    pub capabilities: Capabilities,
    /// The longest frame that is not to be cut.
    pub max_frame: u32,
}

/// The send buffer.
#[derive(Debug)]
pub(super) struct Send {
    pub memory: Shared,
    pub layout: SendLayout,
}

/// One NIC, from the opening of its first channel on.
#[derive(Debug, Default)]
pub(super) struct Session {
    pub receive: OnceLock<Receive>,
    pub send: OnceLock<Send>,
    /// The receive buffer is the guest's again.
    revoked: AtomicBool,
    filter: AtomicU32,
    address: AtomicU64,
    coalescing: AtomicBool,
}

impl Session {
    /// Nothing more may be put into the receive buffer.
    pub(super) fn revoke(&self) {
        self.revoked.store(true, Ordering::Release);
    }

    pub(super) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// What the guest has set is this from now on.
    pub(super) fn set(&self, settings: &Settings) {
        let [a, b, c, d, e, f] = settings.address.0;
        let address = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        self.address.store(address, Ordering::Relaxed);
        self.filter.store(settings.filter.0, Ordering::Relaxed);
        self.coalescing.store(settings.coalescing, Ordering::Relaxed);
    }

    /// Whether the guest takes frames that were put together from segments.
    pub(super) fn is_coalescing(&self) -> bool {
        self.coalescing.load(Ordering::Relaxed)
    }

    /// What the guest wants of the frames it receives.
    pub(super) fn wishes(&self, capabilities: Capabilities) -> Wishes {
        let [a, b, c, d, e, f, ..] = self.address.load(Ordering::Relaxed).to_le_bytes();
        Wishes {
            address: MacAddr([a, b, c, d, e, f]),
            filter: PacketFilter(self.filter.load(Ordering::Relaxed)),
            capabilities,
        }
    }
}

/// What has passed through one channel of a NIC since it was made. The channel's worker counts.
#[derive(Debug, Default)]
pub struct NicCounters {
    /// Frames that were sent.
    pub sent: Counter,
    /// Bytes of them.
    pub sent_bytes: Counter,
    /// Frames that the network would not send.
    pub send_drops: Counter,
    /// Packets of the guest that made no sense, or whose frames did not.
    pub malformed: Counter,
    /// Frames that were received.
    pub received: Counter,
    /// Bytes of them.
    pub received_bytes: Counter,
    /// Frames that came and that the guest had not asked for.
    pub unwanted: Counter,
    /// Packets that took received frames to the guest, several in each.
    pub deliveries: Counter,
    /// Completions by the guest of packets that it was not sent.
    pub not_sent: Counter,
    /// Answers to control messages that were lost, as the guest held all slots.
    pub answers_lost: Counter,
}

impl NicCounters {
    /// Each with its name.
    pub fn all(&self) -> [(&'static str, u64); 10] {
        [
            ("sent", self.sent.get()),
            ("sent bytes", self.sent_bytes.get()),
            ("send drops", self.send_drops.get()),
            ("malformed", self.malformed.get()),
            ("received", self.received.get()),
            ("received bytes", self.received_bytes.get()),
            ("unwanted", self.unwanted.get()),
            ("deliveries", self.deliveries.get()),
            ("not sent", self.not_sent.get()),
            ("answers lost", self.answers_lost.get()),
        ]
    }
}

/// What the guest is told when it asks.
pub(super) fn statistics(counters: &[NicCounters]) -> Statistics {
    let mut all = Statistics::default();
    for channel in counters {
        all.sent += channel.sent.get();
        all.received += channel.received.get();
        all.send_errors += channel.send_drops.get() + channel.malformed.get();
    }
    all
}
