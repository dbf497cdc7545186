//! What a service provider sees of the bus.
//!
//! It implements [`Device`]. For every channel that the guest opens it gets a [`Channel`] and
//! starts a worker that owns it; the worker drops the channel when [`Channel::stop_requested`], or
//! when the guest has broken the ring. Between the two, no lock and no other thread is involved:
//!
//! ```no_run
//! # use vmbus_server::Channel;
//! # use vmbus::{packet::{PacketFlags, PacketKind}, ring::PushError};
//! /// Answers every packet with its own payload.
//! fn echo(mut channel: Channel) -> Result<(), PushError> {
//!     let mut buffer = [0; 4096];
//!     while !channel.stop_requested() {
//!         while let Some(packet) = channel.receive(&mut buffer)? {
//!             channel.outgoing.push(
//!                 PacketKind::Completion,
//!                 PacketFlags::NONE,
//!                 packet.transaction_id,
//!                 &[packet.payload],
//!             )?;
//!         }
//!         channel.publish();
//!         if channel.unmask() {
//!             channel.wait();
//!         }
//!         channel.mask();
//!     }
//!     Ok(())
//! }
//! ```

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hypervisor::memory::GuestMemory;
use hypervisor::synic::EventPort;
use hypervisor::{Gpn, VpIndex};
use vmbus::Guid;
use vmbus::packet::Packet;
use vmbus::protocol::{GpadlId, Relid, USER_DATA};
use vmbus::ring::{Incoming, Outgoing, RingError};
use vmm_sys_util::eventfd::EventFd;

use crate::DoubleMapped;
use crate::news::{Event, News, Opened};
use crate::poll::wait;

/// How a device presents itself to the guest.
#[derive(Clone, Copy, Debug)]
pub struct OfferParams {
    /// What kind of device it is; the guest's drivers bind to it.
    pub class: Guid,
    /// Which of its kind, unique on the bus and the same at every boot.
    pub instance: Guid,
    /// `VMBUS_CHANNEL_*` of Linux's include/linux/hyperv.h.
    pub flags: u16,
    /// How much MMIO space it wants, in MiB.
    pub mmio_megabytes: u16,
    /// For its driver.
    pub user_data: [u8; USER_DATA],
}

impl OfferParams {
    /// An offer without flags, MMIO or user data.
    pub const fn new(class: Guid, instance: Guid) -> Self {
        Self { class, instance, flags: 0, mmio_megabytes: 0, user_data: [0; USER_DATA] }
    }
}

/// A device on the bus: a service provider.
pub trait Device: Send {
    /// How it is offered. Asked once.
    fn offer(&self) -> OfferParams;

    /// The guest has opened the device's channel, or a sub-channel that was offered at
    /// [`Channel::offer_subchannels`]. Starts a worker that owns `channel` and returns; an error
    /// fails the guest's request.
    ///
    /// Called on the bus's thread: it must not wait for the guest.
    fn open(&mut self, channel: Channel) -> io::Result<()>;
}

/// A channel that the guest has opened: all that a service provider needs.
///
/// Dropping it tells the bus that the channel is closed, and with that the guest that its pages
/// are its own again: **no I/O may be under way to guest memory by then.** That the worker has
/// panicked is no exception; let its I/O end before the channel goes, for instance by declaring
/// it after the channel.
pub struct Channel {
    /// The guest's memory, which packets point into.
    pub memory: GuestMemory,
    /// From the guest.
    pub incoming: Incoming<DoubleMapped>,
    /// To the guest.
    pub outgoing: Outgoing<DoubleMapped>,
    /// Fires when the guest signals, and when [`Channel::stop_requested`] becomes true. Reading it
    /// does not block.
    pub doorbell: Arc<EventFd>,
    /// Interrupts the guest.
    pub interrupt: Arc<dyn EventPort>,
    /// Which of the device's channels: 0 for the first.
    pub subchannel: u16,
    /// The channel's number.
    pub relid: Relid,
    /// The VP it interrupted when it was opened.
    pub vp: VpIndex,
    /// What has passed through it.
    pub counters: Arc<ChannelCounters>,
    // The last field, as fields are dropped in this order: by then the rings are unmapped.
    link: Link,
}

impl Channel {
    #[allow(clippy::too_many_arguments)] // the fields, once
    pub(crate) fn new(
        memory: GuestMemory,
        incoming: Incoming<DoubleMapped>,
        outgoing: Outgoing<DoubleMapped>,
        doorbell: Arc<EventFd>,
        interrupt: Arc<dyn EventPort>,
        subchannel: u16,
        vp: VpIndex,
        link: Link,
    ) -> Self {
        let relid = link.opened.relid;
        let counters = Arc::clone(&link.shared.counters);
        Self {
            memory,
            incoming,
            outgoing,
            doorbell,
            interrupt,
            subchannel,
            relid,
            vp,
            counters,
            link,
        }
    }

    /// Whether the worker shall end: the guest has closed the channel, or the partition stops. The
    /// doorbell fires when this changes.
    pub fn stop_requested(&self) -> bool {
        self.link.shared.stop.load(Ordering::Acquire)
    }

    /// Asks the bus to offer `count` sub-channels of this device, numbered from 1; returns at
    /// once. Opened ones come to [`Device::open`]. Further calls on the same opened channel do
    /// nothing.
    pub fn offer_subchannels(&self, count: u16) {
        if !self.link.has_asked.swap(true, Ordering::Relaxed) {
            self.link.news.tell(Event::OfferSubchannels { by: self.link.opened, count });
        }
    }

    /// The guest pages that the guest has listed under `id` for this channel, if it does not want them
    /// back. While the channel is open it gets them back when there is no [`Gpadl`] any more.
    pub fn gpadl(&self, id: GpadlId) -> Option<Gpadl> {
        self.link.gpadls.lend(self.relid, id, &self.link.news)
    }

    /// [`Incoming::read`], counted.
    pub fn receive<'b>(&mut self, buffer: &'b mut [u8]) -> Result<Option<Packet<'b>>, RingError> {
        let packet = self.incoming.read(buffer)?;
        if packet.is_some() {
            self.counters.packets_in.add(1);
        }
        Ok(packet)
    }

    /// Shows the guest what was pushed and gives it the room of what was read; interrupts it if
    /// that is needed, at most once.
    pub fn publish(&mut self) {
        let sent = self.outgoing.has_unpublished();
        let (for_packets, for_room) = (self.outgoing.publish(), self.incoming.publish());
        if for_packets || for_room {
            self.signal();
        } else if sent {
            self.counters.interrupts_spared.add(1);
        }
    }

    /// Interrupts the guest, counted.
    pub fn signal(&self) {
        if self.interrupt.signal() {
            self.counters.interrupts.add(1);
        } else {
            self.counters.interrupts_merged.add(1);
        }
    }

    /// [`Incoming::mask`]: call it after waking.
    pub fn mask(&mut self) {
        self.incoming.mask();
    }

    /// [`Incoming::unmask`], the other way round: whether the worker may sleep now.
    pub fn unmask(&mut self) -> bool {
        let sleep = !self.incoming.unmask();
        if sleep {
            self.counters.sleeps.add(1);
        }
        sleep
    }

    /// Sleeps until the doorbell fires: for a worker that waits for nothing else. May return
    /// without cause.
    pub fn wait(&self) {
        // An error is a wakeup without cause.
        if let Ok([true]) = wait([&self.doorbell], None) {
            self.counters.signals.add(1);
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // All is done by the fields. That there is a Drop keeps a worker from taking the rings
        // out and outliving its own notice of closing.
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("relid", &self.relid)
            .field("subchannel", &self.subchannel)
            .finish_non_exhaustive()
    }
}

/// A count that one thread at a time writes and any may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; without a locked instruction, as there is one writer.
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What has passed through a channel since it was first opened. The worker counts.
#[derive(Debug, Default)]
pub struct ChannelCounters {
    /// Packets from the guest.
    pub packets_in: Counter,
    /// Packets to the guest; the worker adds what it pushes.
    pub packets_out: Counter,
    /// Interrupts raised.
    pub interrupts: Counter,
    /// Interrupts that were due while the guest had not yet seen the one before.
    pub interrupts_merged: Counter,
    /// Batches of packets that needed no interrupt, as the guest was awake.
    pub interrupts_spared: Counter,
    /// Signals heard from the guest; the worker adds what it reads from its doorbell.
    pub signals: Counter,
    /// How often the worker found nothing to do and went to sleep.
    pub sleeps: Counter,
    /// System calls of the worker's io_uring; the worker adds them.
    pub enters: Counter,
}

/// What the bus and a channel's worker share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    stop: AtomicBool,
    pub(crate) counters: Arc<ChannelCounters>,
}

impl Shared {
    pub(crate) fn new(counters: Arc<ChannelCounters>) -> Self {
        Self { stop: AtomicBool::new(false), counters }
    }

    /// Asks the worker to end.
    pub(crate) fn stop(&self, doorbell: &EventFd) {
        self.stop.store(true, Ordering::Release);
        // Fails only when the counter is full, and then the worker is awake anyway.
        let _ = doorbell.write(1);
    }
}

/// Guest pages that a worker uses: a GPADL. The guest does not get them back before all clones are
/// gone.
#[derive(Clone, Debug)]
pub struct Gpadl(Arc<Lent>);

impl Gpadl {
    /// The pages, in the guest's order.
    pub fn pages(&self) -> &Arc<[Gpn]> {
        &self.0.pages
    }

    /// Whether the guest wants them back. The doorbell of the channel they are for fires when this
    /// changes.
    pub fn is_wanted(&self) -> bool {
        self.0.wanted.load(Ordering::Acquire)
    }
}

#[derive(Debug)]
struct Lent {
    pages: Arc<[Gpn]>,
    wanted: AtomicBool,
    list: ListId,
    news: News,
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Otherwise the bus asks for it no more than the guest does.
        if *self.wanted.get_mut() {
            self.news.tell(Event::GpadlUnused(self.list));
        }
    }
}

/// One list of pages. Guests give a number to another list when they have the first back, and whoever
/// used that may still hold it, or let go of it now: of this list, whichever opening of the channel lent
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListId {
    pub(crate) relid: Relid,
    pub(crate) id: GpadlId,
    serial: u64,
}

/// The page lists of all channels, by channel and number.
#[derive(Clone, Default)]
pub(crate) struct Gpadls(Arc<Mutex<PageLists>>);

#[derive(Default)]
struct PageLists {
    lists: HashMap<(Relid, GpadlId), PageList>,
    /// Lists that there have been.
    serial: u64,
}

struct PageList {
    serial: u64,
    pages: Arc<[Gpn]>,
    /// The guest wants it back.
    wanted: bool,
    lent: Weak<Lent>,
}

impl Gpadls {
    fn lock(&self) -> MutexGuard<'_, PageLists> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lend(&self, relid: Relid, id: GpadlId, news: &News) -> Option<Gpadl> {
        let mut lists = self.lock();
        let list = lists.lists.get_mut(&(relid, id)).filter(|list| !list.wanted)?;
        if let Some(lent) = list.lent.upgrade() {
            return Some(Gpadl(lent));
        }
        let lent = Arc::new(Lent {
            pages: Arc::clone(&list.pages),
            wanted: AtomicBool::new(false),
            list: ListId { relid, id, serial: list.serial },
            news: news.clone(),
        });
        list.lent = Arc::downgrade(&lent);
        Some(Gpadl(lent))
    }

    pub(crate) fn insert(&self, relid: Relid, id: GpadlId, pages: Arc<[Gpn]>) {
        let mut lists = self.lock();
        lists.serial += 1;
        let list = PageList { serial: lists.serial, pages, wanted: false, lent: Weak::new() };
        lists.lists.insert((relid, id), list);
    }

    /// Lends a list no more. Returns whether somebody uses it; then an [`Event::GpadlUnused`] follows.
    pub(crate) fn want(&self, relid: Relid, id: GpadlId) -> bool {
        let lent = self.lock().lists.get_mut(&(relid, id)).and_then(|list| {
            list.wanted = true;
            list.lent.upgrade()
        });
        let Some(lent) = lent else { return false };
        // If all others let go now, it is dropped here, and tells of it.
        lent.wanted.store(true, Ordering::Release);
        true
    }

    /// Whether this very list is there, and nobody uses it.
    pub(crate) fn is_unused(&self, list: ListId) -> bool {
        let lists = self.lock();
        let there = lists.lists.get(&(list.relid, list.id));
        there.is_some_and(|there| there.serial == list.serial && there.lent.strong_count() == 0)
    }

    pub(crate) fn remove(&self, relid: Relid, id: GpadlId) {
        self.lock().lists.remove(&(relid, id));
    }
}

/// A channel's connection to the bus; dropping it says that the channel is closed.
pub(crate) struct Link {
    opened: Opened,
    shared: Arc<Shared>,
    gpadls: Gpadls,
    news: News,
    /// Sub-channels have been asked for.
    has_asked: AtomicBool,
}

impl Link {
    pub(crate) fn new(opened: Opened, shared: Arc<Shared>, gpadls: Gpadls, news: News) -> Self {
        Self { opened, shared, gpadls, news, has_asked: AtomicBool::new(false) }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.news.tell(Event::Closed(self.opened));
    }
}
