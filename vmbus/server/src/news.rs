//! What workers tell the bus's thread.
//!
//! None of it is lost, nobody waits for room, and it is bounded by what there is: an opened channel ends
//! once and asks for sub-channels once, and a list of pages that the guest wants back becomes unused
//! once. How many of these there are is bounded by the channels' numbers and by
//! [`Limits`](crate::server::Limits). A guest that has its workers do the same again and again adds
//! nothing.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmbus::protocol::Relid;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::channel::ListId;

/// What the bus's thread is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A worker has ended.
    Closed(Opened),
    /// A worker wants sub-channels.
    OfferSubchannels { by: Opened, count: u16 },
    /// Nobody uses a page list any more that the guest wants back.
    GpadlUnused(ListId),
    /// The bus shall end.
    Stop,
}

/// One opening of a channel. Channels are opened again, and news of the last time may be late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) relid: Relid,
    pub(crate) serial: u64,
}

/// The events that have not been heard yet. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct News(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    events: Mutex<VecDeque<Event>>,
    /// Fires when there is something to hear.
    wake: EventFd,
}

impl News {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Inner { events: Mutex::default(), wake })))
    }

    fn events(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.0.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the bus, and wakes it.
    pub(crate) fn tell(&self, event: Event) {
        self.events().push_back(event);
        self.wake();
    }

    /// Wakes the bus for something else.
    pub(crate) fn wake(&self) {
        // Fails only when the counter is full, and then the bus is awake anyway.
        let _ = self.0.wake.write(1);
    }

    /// The oldest event.
    pub(crate) fn next(&self) -> Option<Event> {
        self.events().pop_front()
    }

    /// What fires when there is something to hear.
    pub(crate) fn event(&self) -> &EventFd {
        &self.0.wake
    }
}
