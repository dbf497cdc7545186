//! A virtual switch: NICs of this process on one Ethernet.
//!
//! ```text
//!   Switch ── Port (Network) ── PortQueue (Queue)     one worker each; sends into the inboxes
//!      │        └─ Inbox, one for each open queue     of others: lock-free, bounded
//!      ├─ Addresses     which address is where        shared, lock-free
//!      └─ Table         which ports and inboxes are   replaced as a whole; queues look whether
//!                                                     theirs is still the latest
//! ```
//!
//! A frame is copied twice: from the sender's guest into a buffer of the sending queue's pool, and
//! from there into each receiver's guest, by the receiver. In between, the inboxes hold references
//! to it; when the last receiver has dropped its own, the pool's owner can use the buffer again.
//! So nothing is allocated or locked for a frame, a queue can hold no more than its pool, and one
//! that receives nothing costs others no more than the frames its inbox has no room for, which are
//! dropped and counted. What one port may hold of a pool is bounded by what is left for the others, so
//! that a sender reaches whoever receives however many do not.
//!
//! What a frame's sender has left undone stays so until a receiver takes it out; one whose NIC does
//! not take that has it done in software then.
//!
//! In the pool a frame has no VLAN tag: tags are taken off when it comes in and put on, where the
//! receiving port wants one, when it leaves ([`vlan`]). A tag behind that is a part of the frame, and is
//! watched, as it must not become the first one.

mod addresses;
mod frame;
mod port;
pub mod vlan;
pub mod wake;

use std::fmt;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use vmm_sys_util::eventfd::EventFd;

use self::addresses::Addresses;
use self::frame::Stored;
use self::port::PortQueue;
use self::vlan::PortVlan;
use self::wake::Wake;
use super::{Counters, Link, MAX_FRAME, Network, Offloads, Queue, QueueConfig};
use crate::uring::Uring;

/// The most ports of a switch.
pub const MAX_PORTS: usize = 64;

/// The most queues of a port.
const QUEUES: u16 = 64;

/// Frames an inbox has room for.
const INBOX: usize = 512;

/// What a switch is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchOptions {
    /// Names it for people.
    pub name: String,
    /// The longest packet behind an Ethernet header, in bytes.
    pub mtu: u16,
    /// For how long an address is remembered that is not heard of.
    pub ageing: Duration,
}

impl SwitchOptions {
    /// A switch for frames of up to 9000 bytes that remembers addresses for five minutes, as IEEE
    /// 802.1Q recommends.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), mtu: 9000, ageing: Duration::from_secs(300) }
    }
}

/// What a port is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortOptions {
    /// How it takes part in VLANs.
    pub vlan: PortVlan,
    /// Frames from an isolated port reach no other isolated port.
    pub isolated: bool,
}

/// See the module's documentation.
#[derive(Clone)]
pub struct Switch {
    shared: Arc<Shared>,
}

/// A place to plug a NIC into. Dropping it unplugs it.
pub struct Port {
    switch: Arc<Shared>,
    shared: Arc<PortShared>,
}

struct Shared {
    options: SwitchOptions,
    addresses: Addresses,
    started: Instant,
    /// The table as it is now, and its number, by which queues know whether theirs is the latest.
    table: Mutex<Arc<Table>>,
    generation: AtomicU64,
}

/// The ports and what can be reached through them. It never changes; another takes its place.
#[derive(Clone, Default)]
struct Table {
    generation: u64,
    /// By number.
    ports: Vec<Option<Entry>>,
    /// Of all ports, those of a port next to one another.
    inboxes: Vec<Arc<Inbox>>,
}

#[derive(Clone)]
struct Entry {
    port: Arc<PortShared>,
    /// Its inboxes are `inboxes[first..first + count]`.
    first: usize,
    count: usize,
}

struct PortShared {
    number: u8,
    options: PortOptions,
    /// The offloads that the port's NIC takes.
    receive: AtomicU8,
    pulled: AtomicBool,
    /// What its queues that are closed have done.
    closed: Mutex<Counters>,
}

/// Where others leave frames for one queue.
struct Inbox {
    port: u8,
    queue: u16,
    frames: ArrayQueue<Arc<Stored>>,
    wake: Wake,
    eventfd: EventFd,
    /// Frames for which there was no room. Senders write it.
    full: OwnLine<AtomicU64>,
    /// The owner writes them.
    counters: OwnLine<SharedCounters>,
}

/// In cache lines of its own, so that who writes it takes nothing else away from other processors:
/// two lines, as processors fetch them in pairs.
#[derive(Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

impl<T> Deref for OwnLine<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// [`Counters`] that one thread writes and others read.
#[derive(Default)]
struct SharedCounters([AtomicU64; 6]);

impl SharedCounters {
    fn store(&self, counters: &Counters) {
        let Counters { sent, sent_bytes, send_drops, received, received_bytes, receive_drops } =
            *counters;
        let values = [sent, sent_bytes, send_drops, received, received_bytes, receive_drops];
        self.0.iter().zip(values).for_each(|(to, from)| to.store(from, Ordering::Relaxed));
    }

    fn load(&self) -> Counters {
        let [sent, sent_bytes, send_drops, received, received_bytes, receive_drops] =
            std::array::from_fn(|at| {
                self.0.get(at).map_or(0, |value| value.load(Ordering::Relaxed))
            });
        Counters { sent, sent_bytes, send_drops, received, received_bytes, receive_drops }
    }
}

impl Inbox {
    fn counters(&self) -> Counters {
        let mut counters = self.counters.load();
        counters.receive_drops += self.full.load(Ordering::Relaxed);
        counters
    }
}

/// The switch has no port left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("switch {0} has no more than {MAX_PORTS} ports")]
pub struct NoPort(String);

impl Switch {
    /// One without ports.
    pub fn new(options: SwitchOptions) -> Self {
        let ageing = u32::try_from(options.ageing.as_secs()).unwrap_or(u32::MAX);
        let shared = Shared {
            options,
            addresses: Addresses::new(ageing),
            started: Instant::now(),
            table: Mutex::new(Arc::default()),
            generation: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Adds a port.
    pub fn port(&self, options: PortOptions) -> Result<Port, NoPort> {
        let mut table = self.shared.lock();
        let number = (0..MAX_PORTS).find(|number| table.entry(*number).is_none());
        let number = number.ok_or_else(|| NoPort(self.shared.options.name.clone()))?;
        let shared = Arc::new(PortShared {
            number: number as u8,
            options,
            receive: AtomicU8::new(0),
            pulled: AtomicBool::new(false),
            closed: Mutex::default(),
        });
        self.shared.change(&mut table, |table| {
            table.ports.resize(table.ports.len().max(number + 1), None);
            let entry = Entry { port: Arc::clone(&shared), first: 0, count: 0 };
            table.ports.get_mut(number).into_iter().for_each(|place| *place = Some(entry.clone()));
        });
        drop(table);
        Ok(Port { switch: Arc::clone(&self.shared), shared })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared.options.name
    }

    /// Each port's number and statistics; see [`Port::statistics`].
    pub fn statistics(&self) -> Vec<(usize, Counters)> {
        let table = self.shared.table();
        let ports = table.ports.iter().enumerate();
        ports.filter_map(|(number, _)| Some((number, table.statistics(number)?))).collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Arc<Table>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the table by a changed copy.
    fn change(&self, table: &mut Arc<Table>, change: impl FnOnce(&mut Table)) {
        let mut next = Table::clone(table);
        change(&mut next);
        next.generation += 1;
        next.inboxes.sort_by_key(|inbox| (inbox.port, inbox.queue));
        for (number, entry) in next.ports.iter_mut().enumerate() {
            let Some(entry) = entry else { continue };
            let its = |inbox: &Arc<Inbox>| usize::from(inbox.port) == number;
            entry.first = next.inboxes.iter().position(its).unwrap_or(0);
            entry.count = next.inboxes.iter().filter(|inbox| its(inbox)).count();
        }
        let generation = next.generation;
        *table = Arc::new(next);
        self.generation.store(generation, Ordering::Release);
    }

    /// The table as it is now.
    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.lock())
    }

    /// Seconds since it was made.
    fn now(&self) -> u32 {
        self.started.elapsed().as_secs() as u32
    }

    /// The longest frame without tags that need not be cut, in bytes.
    fn longest(&self) -> usize {
        usize::from(self.options.mtu) + super::ETHERNET_HEADER
    }
}

impl Table {
    fn entry(&self, number: usize) -> Option<&Entry> {
        self.ports.get(number)?.as_ref()
    }

    fn inboxes(&self, entry: &Entry) -> &[Arc<Inbox>] {
        self.inboxes.get(entry.first..entry.first + entry.count).unwrap_or_default()
    }

    /// Of a port, if there is one of this number.
    fn statistics(&self, number: usize) -> Option<Counters> {
        let entry = self.entry(number)?;
        let closed = entry.port.closed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = *closed;
        self.inboxes(entry).iter().for_each(|inbox| sum.add(&inbox.counters()));
        Some(sum)
    }
}

impl PortShared {
    fn is_up(&self) -> bool {
        !self.pulled.load(Ordering::Relaxed)
    }

    fn takes(&self) -> Offloads {
        Offloads::from_bits(self.receive.load(Ordering::Relaxed))
    }
}

impl Port {
    /// Its number, from 0: the lowest that was free.
    pub fn number(&self) -> usize {
        self.shared.number.into()
    }

    /// Pulls the cable out, or plugs it in again.
    pub fn plug(&self, plugged: bool) {
        self.shared.pulled.store(!plugged, Ordering::Relaxed);
        if !plugged {
            self.switch.addresses.forget(self.shared.number);
        }
        let table = self.switch.table();
        for inbox in table.entry(self.number()).map_or(&[][..], |entry| table.inboxes(entry)) {
            ring(inbox);
        }
    }

    /// What has gone through it, from the NIC's side. Frames that came for it and found no room are
    /// among the drops.
    pub fn statistics(&self) -> Counters {
        self.switch.table().statistics(self.number()).unwrap_or_default()
    }
}

/// Wakes the owner of an inbox whatever it does.
fn ring(inbox: &Inbox) {
    // Only a counter that is about to overflow refuses, and that rings too.
    let _ = inbox.eventfd.write(1);
}

impl Network for Port {
    fn link(&self) -> Link {
        let SwitchOptions { name, mtu, .. } = &self.switch.options;
        Link {
            name: format!("switch:{name}"),
            up: self.shared.is_up(),
            mtu: *mtu,
            speed: 10_000,
            mac: None,
            queues: QUEUES,
            takes: Offloads::ALL,
            gives: Offloads::ALL,
        }
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.shared.receive.store(offloads.bits(), Ordering::Relaxed);
        Ok(())
    }

    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        if config.index >= QUEUES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let inbox = Arc::new(Inbox {
            port: self.shared.number,
            queue: config.index,
            frames: ArrayQueue::new(INBOX),
            wake: Wake::new(),
            eventfd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            full: OwnLine::default(),
            counters: OwnLine::default(),
        });
        let queue = PortQueue::new(self, &inbox, config, uring)?;
        let mut table = self.switch.lock();
        let taken = |other: &Arc<Inbox>| other.port == inbox.port && other.queue == inbox.queue;
        if table.inboxes.iter().any(taken) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        self.switch.change(&mut table, |table| table.inboxes.push(inbox));
        Ok(Box::new(queue))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let number = self.shared.number;
        // Its queues, should they outlive it, send nothing more.
        self.shared.pulled.store(true, Ordering::Relaxed);
        let mut table = self.switch.lock();
        self.switch.change(&mut table, |table| {
            table.inboxes.retain(|inbox| inbox.port != number);
            table.ports.get_mut(usize::from(number)).into_iter().for_each(|entry| *entry = None);
        });
        self.switch.addresses.forget(number);
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port")
            .field("switch", &self.switch.options.name)
            .field("number", &self.shared.number)
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

const _: () = assert!(MAX_PORTS <= u8::MAX as usize && MAX_FRAME < 1 << 17);
