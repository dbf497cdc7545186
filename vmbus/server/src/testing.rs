//! Channels with no VM around: both ends in one process, over real rings in guest memory.
//!
//! ```
//! # use vmbus::packet::{PacketFlags, PacketKind};
//! let (mut channel, mut guest) = vmbus_server::testing::pair(1 << 20);
//! guest.send(PacketKind::InBand, PacketFlags::NONE, 7, b"hello");
//! let mut buffer = [0; 64];
//! let packet = channel.receive(&mut buffer)?.expect("it was sent");
//! assert_eq!(packet.payload, b"hello\0\0\0");
//! # Ok::<(), vmbus::ring::RingError>(())
//! ```

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hypervisor::memory::GuestMemory;
use hypervisor::synic::EventPort;
use hypervisor::{Gpn, PAGE_SIZE, VpIndex};
use rustix::event::Timespec;
use vmbus::packet::{Packet, PacketFlags, PacketKind};
use vmbus::protocol::{GpadlId, Relid};
use vmbus::ring::{Incoming, Outgoing};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::channel::{Channel, Gpadls, Link, Shared};
use crate::mapping::{DoubleMapped, map_ring};
use crate::news::{Event, News, Opened};
use crate::poll::{lend, wait};

/// The pages per direction that Linux's storvsc has, the control page included.
pub const STORVSC_RING_PAGES: u64 = 32;

/// The guest's end of a channel.
pub struct GuestEnd {
    /// The guest's memory. All below the rings, which are at its end, is the test's.
    pub memory: GuestMemory,
    /// To the host.
    pub outgoing: Outgoing<DoubleMapped>,
    /// From the host.
    pub incoming: Incoming<DoubleMapped>,
    /// Wakes the host's worker.
    pub doorbell: Arc<EventFd>,
    /// What the host raised.
    pub interrupt: Arc<TestPort>,
    shared: Arc<Shared>,
    gpadls: Gpadls,
    relid: Relid,
    news: News,
    closed: bool,
    subchannels: Option<u16>,
    unused: Vec<GpadlId>,
}

/// Counts interrupts instead of raising them.
pub struct TestPort {
    count: AtomicU64,
    event: EventFd,
}

impl TestPort {
    /// Interrupts so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }
}

impl EventPort for TestPort {
    fn signal(&self) -> bool {
        self.count.fetch_add(1, Ordering::AcqRel);
        self.event.write(1).is_ok()
    }

    fn retarget(&self, _vp: VpIndex) {}
}

/// A channel in `bytes` of new guest memory, with rings as large as storvsc's at its end.
///
/// # Panics
/// If the memory cannot be had or is too small.
pub fn pair(bytes: u64) -> (Channel, GuestEnd) {
    let memory = GuestMemory::new(bytes).expect("guest memory");
    let first = bytes / PAGE_SIZE as u64 - 2 * STORVSC_RING_PAGES;
    channel_in(&memory, Gpn(first), STORVSC_RING_PAGES, 0)
}

/// A channel in `memory`, its two rings of `pages` each at page `first`.
///
/// # Panics
/// If there is no memory at these pages.
pub fn channel_in(
    memory: &GuestMemory,
    first: Gpn,
    pages: u64,
    subchannel: u16,
) -> (Channel, GuestEnd) {
    let ring = |from: u64| -> Vec<Gpn> { (from..from + pages).map(Gpn).collect() };
    let (up, down) = (ring(first.0), ring(first.0 + pages));
    for control in [up[0], down[0]] {
        let mut page = [0; PAGE_SIZE];
        page[64] = vmbus::ring::FEATURE_PENDING_SEND_SIZE as u8;
        memory.write(control.gpa().expect("a page"), &page).expect("memory for the ring");
    }
    let map = |pages: &[Gpn]| map_ring(memory, pages).expect("memory for the ring");
    let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");

    let doorbell = Arc::new(event());
    let interrupt = Arc::new(TestPort { count: AtomicU64::new(0), event: event() });
    let shared = Arc::new(Shared::default());
    let gpadls = Gpadls::default();
    let relid = Relid(u32::from(subchannel) + 1);
    let news = News::new().expect("an eventfd");
    let channel = Channel::new(
        memory.clone(),
        Incoming::new(map(&up)).expect("a new ring"),
        Outgoing::new(map(&down)).expect("a new ring"),
        Arc::clone(&doorbell),
        Arc::clone(&interrupt) as Arc<dyn EventPort>,
        subchannel,
        VpIndex(0),
        Link::new(Opened { relid, serial: 0 }, Arc::clone(&shared), gpadls.clone(), news.clone()),
    );
    let guest = GuestEnd {
        memory: memory.clone(),
        outgoing: Outgoing::new(map(&up)).expect("a new ring"),
        incoming: Incoming::new(map(&down)).expect("a new ring"),
        doorbell,
        interrupt,
        shared,
        gpadls,
        relid,
        news,
        closed: false,
        subchannels: None,
        unused: Vec::new(),
    };
    (channel, guest)
}

impl GuestEnd {
    /// Sends one packet and signals if the host wants that.
    ///
    /// # Panics
    /// If the ring is full or broken.
    pub fn send(&mut self, kind: PacketKind, flags: PacketFlags, id: u64, payload: &[u8]) {
        self.outgoing.push(kind, flags, id, &[payload]).expect("room in the ring");
        self.publish();
    }

    /// Sends one GPA-direct packet that wants a completion, and signals if the host wants that.
    /// Ranges are `(len, offset, page numbers)`.
    ///
    /// # Panics
    /// If the ring is full or broken, or the ranges do not fit their pages.
    pub fn send_gpa_direct(&mut self, id: u64, ranges: &[(u32, u32, &[u64])], payload: &[u8]) {
        let mut headers = vec![0; 8 + ranges.iter().map(|r| 8 + r.2.len() * 8).sum::<usize>()];
        let headers = vmbus::packet::write_gpa_ranges(&mut headers, ranges).expect("sound ranges");
        self.outgoing
            .push_with_headers(
                PacketKind::GpaDirect,
                PacketFlags::COMPLETION_REQUESTED,
                id,
                headers,
                &[payload],
            )
            .expect("room in the ring");
        self.publish();
    }

    /// Shows the host what was pushed and gives room back; signals it if it wants that.
    pub fn publish(&mut self) {
        let (for_packets, for_room) = (self.outgoing.publish(), self.incoming.publish());
        if for_packets || for_room {
            self.doorbell.write(1).expect("an eventfd");
        }
    }

    /// The next packet from the host, if there is one.
    ///
    /// # Panics
    /// If the ring is broken.
    pub fn receive<'b>(&mut self, buffer: &'b mut [u8]) -> Option<Packet<'b>> {
        self.incoming.read(buffer).expect("a sound ring")
    }

    /// The next packet from the host; sleeps until there is one, for at most `timeout`, and gives
    /// the room of all packets before it back.
    ///
    /// # Panics
    /// If the ring is broken.
    pub fn wait<'b>(&mut self, buffer: &'b mut [u8], timeout: Duration) -> Option<Packet<'b>> {
        self.publish();
        self.incoming.mask();
        if !self.incoming.unmask() {
            self.wait_interrupt(timeout);
        }
        self.incoming.mask();
        self.receive(buffer)
    }

    /// Sleeps until the host interrupts, for at most `timeout`; false if it did not.
    pub fn wait_interrupt(&self, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).expect("a short time");
        let fired = wait([&self.interrupt.event], Some(timeout));
        matches!(fired, Ok([true]))
    }

    /// For a poll of one's own: readable while an interrupt is unseen.
    pub fn interrupt_fd(&self) -> BorrowedFd<'_> {
        lend(&self.interrupt.event)
    }

    /// Makes `pages` known to the host's end as `id`.
    pub fn share(&self, id: GpadlId, pages: Arc<[Gpn]>) {
        self.gpadls.insert(self.relid, id, pages);
    }

    /// Wants the pages of `id` back. Returns whether the host's end still uses them.
    pub fn tear_down(&self, id: GpadlId) -> bool {
        let used = self.gpadls.want(self.relid, id);
        if used {
            self.doorbell.write(1).expect("an eventfd");
        }
        used
    }

    /// Waits until the host's end has let go of the pages of `id`, for at most `timeout`; false if it has
    /// not.
    pub fn wait_unused(&mut self, id: GpadlId, timeout: Duration) -> bool {
        self.wait_until(timeout, |guest| guest.unused.contains(&id))
    }

    /// Asks the host's worker to end, as the bus does when the guest closes the channel.
    pub fn request_stop(&self) {
        self.shared.stop(&self.doorbell);
    }

    /// Whether the host's end has been dropped.
    pub fn closed(&mut self) -> bool {
        self.take_events();
        self.closed
    }

    /// Waits until the host's end has been dropped, for at most `timeout`; false if it was not.
    pub fn wait_closed(&mut self, timeout: Duration) -> bool {
        self.wait_until(timeout, |guest| guest.closed)
    }

    /// How many sub-channels the host's end has asked for.
    pub fn subchannels_requested(&mut self) -> Option<u16> {
        self.take_events();
        self.subchannels
    }

    fn wait_until(&mut self, timeout: Duration, is_so: impl Fn(&Self) -> bool) -> bool {
        let timeout = Timespec::try_from(timeout).expect("a short time");
        loop {
            self.take_events();
            if is_so(self) {
                return true;
            }
            if !matches!(wait([self.news.event()], Some(timeout)), Ok([true])) {
                return false;
            }
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.news.next() {
            self.note(&event);
        }
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::Closed(_) => self.closed = true,
            Event::OfferSubchannels { count, .. } => self.subchannels = Some(*count),
            Event::GpadlUnused(list) => self.unused.push(list.id),
            Event::Stop => {}
        }
    }
}
