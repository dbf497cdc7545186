//! What the channels of one opened NIC share: its buffers, and what the guest has set.
//!
//! The first channel's worker writes it, all workers read it, and no lock is on the way of a frame:
//! there is one around how frames are to be spread, which workers take when that has changed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use backends::net::MacAddr;
use backends::net::switch::wake::Wake;
use vmbus::nvsp::{Capabilities, Version};
use vmbus::rndis::PacketFilter;
use vmbus_server::channel::{Counter, Gpadl};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::crossing::Crossing;
use super::handshake::{ReceiveLayout, SendLayout};
use super::objects::{Settings, Statistics};
use super::pages::Shared;
use super::receive::Wishes;
use super::receives::Fate;
use super::steering::Spread;

/// The receive buffer, and what was agreed on before it was shared.
#[derive(Debug)]
pub(super) struct Receive {
    pub memory: Shared,
    pub layout: ReceiveLayout,
    pub version: Version,
    pub capabilities: Capabilities,
    /// The longest frame that is not to be cut.
    pub max_frame: u32,
    /// From channel to channel.
    pub crossing: Crossing,
}

/// The send buffer.
#[derive(Debug)]
pub(super) struct Send {
    pub memory: Shared,
    pub layout: SendLayout,
}

/// A buffer that the guest has shared, until it wants it back. Each worker has a part in it.
#[derive(Debug, Default)]
pub(super) struct Loan {
    gpadl: Mutex<Option<Gpadl>>,
    over: AtomicBool,
}

impl Loan {
    /// The buffer lies in these pages.
    pub(super) fn begin(&self, gpadl: Gpadl) {
        *self.gpadl.lock().unwrap_or_else(PoisonError::into_inner) = Some(gpadl);
    }

    /// A part in it, to be kept for as long as the network may use the buffer.
    pub(super) fn join(&self) -> Option<Gpadl> {
        self.gpadl.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the guest wants it back: nothing new may be put there or taken from there.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.gpadl.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Wakes one channel's worker for what others have left to it.
#[derive(Debug)]
pub(super) struct Bell {
    pub wake: Wake,
    pub event: Arc<EventFd>,
}

impl Bell {
    fn new() -> io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self { wake: Wake::new(), event })
    }

    /// Wakes the worker if it sleeps.
    pub(super) fn ring(&self) {
        if self.wake.is_due() {
            // Fails only when the counter is full, and then it has been rung.
            let _ = self.event.write(1);
        }
    }
}

/// One NIC, from the opening of its first channel on.
#[derive(Debug)]
pub(super) struct Session {
    pub receive: OnceLock<Receive>,
    pub send: OnceLock<Send>,
    /// One for each channel there can be.
    pub bells: Box<[Bell]>,
    /// Of the pages of the two.
    pub receive_loan: Loan,
    pub send_loan: Loan,
    filter: AtomicU32,
    address: AtomicU64,
    coalescing: AtomicBool,
    spread: Mutex<Option<Spread>>,
    /// Counts changes to `spread`, and to which channels are open.
    changes: AtomicU32,
}

impl Session {
    /// With so many channels at most.
    pub(super) fn new(channels: u16) -> io::Result<Self> {
        Ok(Self {
            receive: OnceLock::new(),
            send: OnceLock::new(),
            bells: (0..channels).map(|_| Bell::new()).collect::<io::Result<_>>()?,
            receive_loan: Loan::default(),
            send_loan: Loan::default(),
            filter: AtomicU32::new(0),
            address: AtomicU64::new(0),
            coalescing: AtomicBool::new(false),
            spread: Mutex::new(None),
            changes: AtomicU32::new(0),
        })
    }

    /// The bell of a channel.
    pub(super) fn bell(&self, channel: u16) -> Option<&Bell> {
        self.bells.get(usize::from(channel))
    }

    /// A number that changes when frames are to be spread in another way, or over other channels.
    pub(super) fn changes(&self) -> u32 {
        self.changes.load(Ordering::Acquire)
    }

    /// Frames may have to be spread in another way.
    pub(super) fn change(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// How frames are to be spread. Takes a lock.
    pub(super) fn spread(&self) -> Option<Spread> {
        *self.spread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing more may be put into the receive buffer. All workers wake and take their slots back.
    pub(super) fn revoke_receive(&self) {
        self.receive_loan.end();
        self.bells.iter().for_each(Bell::ring);
    }

    /// Nothing more may be sent from the send buffer. All workers wake and let go of it.
    pub(super) fn revoke_send(&self) {
        self.send_loan.end();
        self.bells.iter().for_each(Bell::ring);
    }

    /// What the guest has set is this from now on.
    pub(super) fn set(&self, settings: &Settings) {
        let [a, b, c, d, e, f] = settings.address.0;
        let address = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        self.address.store(address, Ordering::Relaxed);
        self.filter.store(settings.filter.0, Ordering::Relaxed);
        self.coalescing.store(settings.coalescing, Ordering::Relaxed);
        let mut spread = self.spread.lock().unwrap_or_else(PoisonError::into_inner);
        if *spread != settings.spread {
            *spread = settings.spread;
            drop(spread);
            self.change();
        }
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
    /// Frames that went to another channel, as the guest has them spread.
    pub crossed: Counter,
    /// Frames that were to go to a channel that is not open, and went to the first.
    pub astray: Counter,
    /// Frames that were lost, as too many waited for the channel they were to go to.
    pub overrun: Counter,
    /// Completions by the guest of packets that it was not sent.
    pub not_sent: Counter,
    /// Answers to control messages that were lost, as the guest held all slots.
    pub answers_lost: Counter,
}

impl NicCounters {
    /// A frame of `len` bytes has come.
    pub(super) fn count_received(&self, fate: Fate, len: u32) {
        match fate {
            Fate::Unwanted => return self.unwanted.add(1),
            Fate::Overrun => return self.overrun.add(1),
            Fate::Here => {}
            Fate::Crossed => self.crossed.add(1),
            Fate::Astray => self.astray.add(1),
        }
        self.received.add(1);
        self.received_bytes.add(len.into());
    }

    /// Each with its name.
    pub fn all(&self) -> [(&'static str, u64); 13] {
        [
            ("sent", self.sent.get()),
            ("sent bytes", self.sent_bytes.get()),
            ("send drops", self.send_drops.get()),
            ("malformed", self.malformed.get()),
            ("received", self.received.get()),
            ("received bytes", self.received_bytes.get()),
            ("unwanted", self.unwanted.get()),
            ("deliveries", self.deliveries.get()),
            ("crossed", self.crossed.get()),
            ("astray", self.astray.get()),
            ("overrun", self.overrun.get()),
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
        all.no_buffer += channel.overrun.get();
        all.send_errors += channel.send_drops.get() + channel.malformed.get();
    }
    all
}
