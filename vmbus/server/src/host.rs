//! The bus at work: one thread that owns the [`Server`] and the devices.
//!
//! It sleeps until a VP posts a message, a worker has news or a message slot comes free. The data
//! path does not pass here: a channel's worker hears its own doorbell and raises its own
//! interrupts.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use hypervisor::memory::GuestMemory;
use hypervisor::synic::{
    ConnectionId, EventFlag, EventPort, HvStatus, Message, MessageSink, Posted, Sint, Synic,
};
use hypervisor::{PAGE_SIZE, VpIndex};
use rustix::event::Timespec;
use vmbus::Guid;
use vmbus::protocol::{MAX_MESSAGE, MESSAGE_TYPE, Relid};
use vmbus::ring::{Incoming, Outgoing, RingError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::channel::{Channel, ChannelCounters, Device, Gpadls, Link, Shared};
use crate::mapping::map_ring;
use crate::news::{Event, News, Opened};
use crate::poll::wait;
use crate::server::{Action, Limits, OpenRequest, Server};

/// Messages of the guest that wait for the bus's thread. Linux posts the 147 messages of a network
/// receive buffer in a row, and waits when told that there is no room.
const INBOX: usize = 64;

/// Messages to the guest from which on no more of its own are taken: a guest that does not read
/// the answers gets none.
const OUTBOX: usize = 256;

/// How long a taken slot is left alone if nobody says that it is free.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The bus of one partition, at work until it is dropped.
pub struct Host {
    sink: Arc<Inbox>,
    news: News,
    counters: CounterTable,
    thread: Option<JoinHandle<Vec<Box<dyn Device>>>>,
}

/// The counters of every channel that was ever opened, by device and index among its channels.
type CounterTable = Arc<Mutex<BTreeMap<(Guid, u16), Arc<ChannelCounters>>>>;

impl Host {
    /// Offers `devices` to a guest with this `memory`, which reaches the bus through `synic` on
    /// `vps` virtual processors.
    pub fn new(
        memory: GuestMemory,
        synic: Arc<dyn Synic>,
        vps: u32,
        devices: Vec<Box<dyn Device>>,
    ) -> io::Result<Self> {
        let news = News::new()?;
        let (posts, inbox) = crossbeam_channel::bounded(INBOX);
        let bus = Bus::new(memory, synic, vps, devices, inbox, news.clone())?;
        let counters = Arc::clone(&bus.counters);
        let thread = std::thread::Builder::new().name("vmbus".into()).spawn(move || bus.run())?;
        let sink = Arc::new(Inbox { posts, news: news.clone() });
        Ok(Self { sink, news, counters, thread: Some(thread) })
    }

    /// Where the guest's messages go.
    pub fn sink(&self) -> Arc<dyn MessageSink> {
        Arc::clone(&self.sink) as Arc<dyn MessageSink>
    }

    /// What has passed through the channels so far: instance of the device, index among its
    /// channels, counters.
    pub fn counters(&self) -> Vec<(Guid, u16, Arc<ChannelCounters>)> {
        let table = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        table.iter().map(|((guid, index), counters)| (*guid, *index, counters.clone())).collect()
    }

    /// Closes all channels, waits until their workers have ended, and gives the devices back.
    pub fn stop(mut self) -> Vec<Box<dyn Device>> {
        self.join()
    }

    fn join(&mut self) -> Vec<Box<dyn Device>> {
        let Some(thread) = self.thread.take() else { return Vec::new() };
        // If the thread is gone already, there is nobody to tell.
        self.news.tell(Event::Stop);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.join();
    }
}

/// One posted message: its length, and room for the longest.
struct Post {
    len: usize,
    bytes: [u8; MAX_MESSAGE],
}

/// Where VPs leave the guest's messages.
struct Inbox {
    posts: Sender<Post>,
    news: News,
}

impl MessageSink for Inbox {
    fn post(&self, connection: ConnectionId, message_type: u32, payload: &[u8]) -> HvStatus {
        if !Server::takes_messages_on(connection.get()) {
            return HvStatus::INVALID_CONNECTION_ID;
        }
        let mut post = Post { len: payload.len(), bytes: [0; MAX_MESSAGE] };
        match post.bytes.get_mut(..payload.len()) {
            Some(bytes) if message_type == MESSAGE_TYPE => bytes.copy_from_slice(payload),
            _ => return HvStatus::INVALID_HYPERCALL_INPUT,
        }
        match self.posts.try_send(post) {
            Ok(()) => {
                self.news.wake();
                HvStatus::SUCCESS
            }
            Err(TrySendError::Full(_)) => HvStatus::INSUFFICIENT_BUFFERS,
            Err(TrySendError::Disconnected(_)) => HvStatus::INVALID_CONNECTION_ID,
        }
    }
}

/// A device's place on the bus.
#[derive(Clone, Copy)]
struct Offered {
    index: usize,
    instance: Guid,
}

/// A channel with a worker.
struct Running {
    serial: u64,
    shared: Arc<Shared>,
    doorbell: Arc<EventFd>,
    port: Arc<dyn EventPort>,
}

/// What the thread owns.
struct Bus {
    server: Server,
    memory: GuestMemory,
    synic: Arc<dyn Synic>,
    devices: Vec<Box<dyn Device>>,
    by_relid: HashMap<Relid, Offered>,
    running: HashMap<Relid, Running>,
    serial: u64,
    gpadls: Gpadls,
    counters: CounterTable,
    inbox: Receiver<Post>,
    news: News,
    /// To the guest, the first one first.
    outbox: VecDeque<(VpIndex, Message)>,
    /// The slot of the first message was taken.
    blocked: bool,
    stopping: bool,
    complaints: Complaints,
}

impl Bus {
    fn new(
        memory: GuestMemory,
        synic: Arc<dyn Synic>,
        vps: u32,
        devices: Vec<Box<dyn Device>>,
        inbox: Receiver<Post>,
        news: News,
    ) -> io::Result<Self> {
        let ram = memory.clone();
        let mut server = Server::new(vps, Limits::default(), move |page| {
            page.gpa().is_some_and(|gpa| ram.slice(gpa, PAGE_SIZE).is_some())
        });
        let mut by_relid = HashMap::new();
        for (index, device) in devices.iter().enumerate() {
            let offer = device.offer();
            let relid = server
                .offer(offer)
                .ok_or_else(|| io::Error::other("there are more devices than channel numbers"))?;
            by_relid.insert(relid, Offered { index, instance: offer.instance });
        }
        Ok(Self {
            server,
            memory,
            synic,
            devices,
            by_relid,
            running: HashMap::new(),
            serial: 0,
            gpadls: Gpadls::default(),
            counters: CounterTable::default(),
            inbox,
            news,
            outbox: VecDeque::new(),
            blocked: false,
            stopping: false,
            complaints: Complaints::default(),
        })
    }

    fn run(mut self) -> Vec<Box<dyn Device>> {
        loop {
            // News first: a guest that posts without a pause does not keep workers' ends unheard.
            while let Some(event) = self.news.next() {
                self.hear(&event);
            }
            if !self.stopping
                && self.outbox.len() < OUTBOX
                && let Ok(post) = self.inbox.try_recv()
            {
                let payload = post.bytes.get(..post.len).unwrap_or_default();
                if let Err(error) = self.server.guest_message(payload) {
                    self.complaints.say(&error);
                }
                self.act();
                continue;
            }
            if self.stopping && !self.server.is_busy() {
                return self.devices;
            }
            if !self.flush() {
                continue;
            }
            let timeout = self.blocked.then_some(RETRY);
            match wait([self.news.event(), self.synic.slot_free()], timeout) {
                // Nothing fired: the guest may have moved its message page meanwhile.
                Ok([false, false] | [_, true]) => self.blocked = false,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!("the bus cannot wait: {error}");
                    // Nothing can be heard any more, but workers can still be told to end.
                    self.hear(&Event::Stop);
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn hear(&mut self, event: &Event) {
        match event {
            Event::Closed(opened) => self.closed(*opened),
            Event::OfferSubchannels { by, count } => {
                if self.is_current(*by) {
                    self.server.offer_subchannels(by.relid, *count);
                }
            }
            Event::GpadlUnused(list) => {
                if self.gpadls.is_unused(*list) {
                    self.server.gpadl_unused(list.relid, list.id);
                }
            }
            Event::Stop => {
                self.stopping = true;
                self.server.reset();
            }
        }
        self.act();
    }

    fn is_current(&self, opened: Opened) -> bool {
        self.running.get(&opened.relid).is_some_and(|running| running.serial == opened.serial)
    }

    fn closed(&mut self, opened: Opened) {
        if !self.is_current(opened) {
            return;
        }
        if let Some(running) = self.running.remove(&opened.relid) {
            self.unbind(opened.relid, &running.doorbell);
        }
        self.server.channel_closed(opened.relid);
    }

    fn unbind(&self, relid: Relid, doorbell: &EventFd) {
        let connection = ConnectionId::new(Server::connection_of(relid));
        if let Err(error) = self.synic.unbind(connection, doorbell) {
            tracing::warn!("channel {relid}: cannot unbind its doorbell: {error}");
        }
    }

    /// Does what the server wants.
    fn act(&mut self) {
        while let Some(action) = self.server.next_action() {
            match action {
                Action::Post { vp, payload } => {
                    if let Some(message) = Message::new(MESSAGE_TYPE, &payload) {
                        self.outbox.push_back((vp, message));
                    }
                }
                Action::DiscardPosts => {
                    self.outbox.clear();
                    self.blocked = false;
                }
                Action::Open(request) => {
                    let relid = request.relid;
                    let opened = self.open(request);
                    if let Err(error) = &opened {
                        self.complaints.say(&format_args!("cannot open channel {relid}: {error}"));
                    }
                    self.server.channel_opened(relid, opened.is_ok());
                }
                Action::Close { relid } => {
                    if let Some(running) = self.running.get(&relid) {
                        running.shared.stop(&running.doorbell);
                    }
                }
                Action::Retarget { relid, vp } => {
                    if let Some(running) = self.running.get(&relid) {
                        running.port.retarget(vp);
                    }
                }
                Action::GpadlAdded { relid, gpadl, pages } => {
                    self.gpadls.insert(relid, gpadl, pages);
                }
                Action::GpadlWanted { relid, gpadl } => {
                    if !self.gpadls.want(relid, gpadl) {
                        self.server.gpadl_unused(relid, gpadl);
                    } else if let Some(running) = self.running.get(&relid) {
                        // Fails only when the counter is full, and then the worker is awake anyway.
                        let _ = running.doorbell.write(1);
                    }
                }
                Action::GpadlRemoved { relid, gpadl } => self.gpadls.remove(relid, gpadl),
            }
        }
    }

    fn open(&mut self, request: OpenRequest) -> io::Result<()> {
        let OpenRequest { relid, primary, subchannel, incoming, outgoing, vp, .. } = request;
        let no = |what: &str| io::Error::other(format!("there is no {what}"));
        let broken = |error: RingError| io::Error::new(io::ErrorKind::InvalidData, error);
        let offered = *self.by_relid.get(&primary).ok_or_else(|| no("device"))?;
        let device = self.devices.get_mut(offered.index).ok_or_else(|| no("device"))?;

        let incoming = Incoming::new(map_ring(&self.memory, &incoming)?).map_err(broken)?;
        let outgoing = Outgoing::new(map_ring(&self.memory, &outgoing)?).map_err(broken)?;
        let flag = u16::try_from(relid.0).ok().and_then(EventFlag::new);
        let port = flag
            .and_then(|flag| self.synic.event_port(vp, Sint::VMBUS, flag))
            .ok_or_else(|| no("event flag"))?;
        let doorbell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        self.synic.bind(ConnectionId::new(Server::connection_of(relid)), &doorbell)?;

        let counters = {
            let mut table = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(table.entry((offered.instance, subchannel)).or_default())
        };
        let shared = Arc::new(Shared::new(counters));
        self.serial += 1;
        let opened = Opened { relid, serial: self.serial };
        let link = Link::new(opened, Arc::clone(&shared), self.gpadls.clone(), self.news.clone());
        let channel = Channel::new(
            self.memory.clone(),
            incoming,
            outgoing,
            Arc::clone(&doorbell),
            Arc::clone(&port),
            subchannel,
            vp,
            link,
        );
        match device.open(channel) {
            Ok(()) => {
                let serial = self.serial;
                self.running.insert(relid, Running { serial, shared, doorbell, port });
                Ok(())
            }
            Err(error) => {
                self.unbind(relid, &doorbell);
                Err(error)
            }
        }
    }

    /// Posts what the slots take. False if there is room for more of the guest's own messages
    /// than before, so that those that wait should be looked at again.
    fn flush(&mut self) -> bool {
        let full = self.outbox.len() >= OUTBOX;
        while !self.blocked
            && let Some((vp, message)) = self.outbox.front()
        {
            match self.synic.post(*vp, Sint::VMBUS, message) {
                Posted::Busy => self.blocked = true,
                Posted::Delivered => {
                    self.outbox.pop_front();
                }
                Posted::Disabled => {
                    self.complaints.say(&"a message is due to a VP that takes none");
                    self.outbox.pop_front();
                }
            }
        }
        !(full && self.outbox.len() < OUTBOX)
    }
}

/// Log lines that a guest can cause: one a second at most.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    kept_back: u64,
}

impl Complaints {
    fn say(&mut self, what: &dyn std::fmt::Display) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.kept_back += 1;
            return;
        }
        let kept_back = std::mem::take(&mut self.kept_back);
        self.last = Some(now);
        tracing::warn!(kept_back, "VMBus: {what}");
    }
}

#[cfg(test)]
mod lending;
#[cfg(test)]
mod tests;
