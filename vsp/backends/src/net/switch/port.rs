//! One worker's queue of a port: both ends of a frame's way.
//!
//! `unsafe` passes on the promises of [`Queue::send`] and [`Queue::offer`] about buffers.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::frame::{Leaving, Pool, Stored, flow, leaving_offload};
use super::{Entry, Inbox, Port, PortShared, Shared, Table, ring};
use crate::net::pieces::{Cursor, Offers};
use crate::net::segments::Segmenter;
use crate::net::{
    Buffer, Completion, Completions, Counters, Dropped, ETHERNET_HEADER, Frame, Offload, Queue,
    QueueConfig,
};
use crate::uring::{Cqe, Doorbell, Token, Uring};

/// An inbox's eventfd, which the doorbell shares with those who ring it.
struct Bell(Arc<Inbox>);

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.eventfd.as_raw_fd()
    }
}

/// Inboxes of a table that were to get frames in this batch.
#[derive(Default)]
struct Touched {
    inboxes: Vec<usize>,
    /// For each inbox of the table.
    marks: Vec<Mark>,
}

/// What has become of a batch's frames for one inbox.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Mark {
    /// There were any.
    touched: bool,
    /// Some were left there.
    left: bool,
    /// So many had no room. From the first of them on, none of the batch is tried any more: looking
    /// would keep the receiver from making room.
    full: u32,
}

impl Touched {
    fn of(table: &Table) -> Self {
        let count = table.inboxes.len();
        Self { inboxes: Vec::with_capacity(count), marks: vec![Mark::default(); count] }
    }

    /// Leaves the pool's last frame in a port's inbox: always the same one for a flow.
    fn deliver(&mut self, table: &Table, entry: &Entry, pool: &mut Pool) -> Result<(), Dropped> {
        let inboxes = table.inboxes(entry);
        let (Some(frame), port) = (pool.last(), entry.port.number) else { return Ok(()) };
        let chosen = match inboxes.len() {
            // Nobody listens.
            0 => return Ok(()),
            1 => 0,
            count => flow(frame.bytes()) as usize % count,
        };
        let index = entry.first + chosen;
        let (Some(inbox), Some(mark)) = (inboxes.get(chosen), self.marks.get_mut(index)) else {
            return Ok(());
        };
        if !mark.touched {
            mark.touched = true;
            self.inboxes.push(index);
        }
        let left = mark.full == 0
            && pool.admits(port)
            && pool.last().is_some_and(|frame| inbox.frames.push(Arc::clone(frame)).is_ok());
        if !left {
            mark.full = mark.full.saturating_add(1);
            return Err(Dropped::NoRoom);
        }
        pool.hold(port);
        mark.left = true;
        Ok(())
    }

    /// Rings those whose owner may sleep, once for all their frames.
    fn wake(&mut self, table: &Table) {
        for index in self.inboxes.drain(..) {
            let mark = self.marks.get_mut(index).map(mem::take).unwrap_or_default();
            let Some(inbox) = table.inboxes.get(index) else { continue };
            if mark.full > 0 {
                inbox.full.fetch_add(mark.full.into(), Ordering::Relaxed);
            }
            if mark.left && inbox.wake.is_due() {
                ring(inbox);
            }
        }
    }
}

/// See [`Queue`].
pub(super) struct PortQueue {
    switch: Arc<Shared>,
    port: Arc<PortShared>,
    bell: Doorbell<Bell>,
    table: Arc<Table>,
    touched: Touched,
    pool: Pool,
    /// Seconds, as of the last turn.
    now: u32,
    up: bool,
    offers: Offers,
    /// A frame of which some segments have been received.
    cutting: Option<(Arc<Stored>, Segmenter)>,
    counters: Counters,
}

impl PortQueue {
    pub(super) fn new(
        port: &Port,
        inbox: &Arc<Inbox>,
        config: QueueConfig,
        uring: &mut Uring,
    ) -> io::Result<Self> {
        let bell = Doorbell::new(Bell(Arc::clone(inbox)), Token::new(config.tag, 0));
        bell.arm(uring)?;
        let mut queue = Self {
            switch: Arc::clone(&port.switch),
            port: Arc::clone(&port.shared),
            bell,
            table: Arc::default(),
            touched: Touched::default(),
            pool: Pool::new(),
            now: 0,
            up: port.shared.is_up(),
            offers: Offers::new(config.receives),
            cutting: None,
            counters: Counters::default(),
        };
        queue.refresh();
        Ok(queue)
    }

    fn inbox(&self) -> &Inbox {
        &self.bell.get_ref().0
    }

    /// Takes the latest table.
    fn refresh(&mut self) {
        self.touched.wake(&self.table);
        self.table = self.switch.table();
        self.touched = Touched::of(&self.table);
        self.pool.share(self.table.ports.iter().flatten().count());
    }

    /// Takes a frame in and hands it to those it is for. Some may have no room for it.
    ///
    /// # Safety
    /// The frame's buffers must be readable memory.
    unsafe fn forward(&mut self, frame: &Frame<'_>) -> Result<(), Dropped> {
        if self.switch.generation.load(Ordering::Acquire) != self.table.generation {
            self.refresh();
        }
        let Self { port: own, pool, table, touched, switch, now, .. } = self;
        // SAFETY: the caller vouches for the buffers.
        let stored = unsafe { pool.store(frame, &own.options.vlan, switch.longest()) };
        let (header, tci) = stored?;
        let vlan = tci.vlan();
        if header.source.is_station() {
            switch.addresses.learn(vlan, header.source, own.number, *now);
        }
        let known = match header.destination.is_multicast() {
            true => None,
            false => switch.addresses.find(vlan, header.destination, *now),
        };
        let takes = |entry: &&Entry| {
            let port = &entry.port;
            port.number != own.number
                && port.is_up()
                && port.options.vlan.takes(vlan)
                && !(port.options.isolated && own.options.isolated)
        };
        if let Some(entry) = known.and_then(|number| table.entry(number.into())) {
            // One that is not to have it, or has sent it, leaves it at that.
            let delivered = match Some(entry).filter(takes) {
                Some(entry) => touched.deliver(table, entry, pool),
                None => Ok(()),
            };
            if delivered.is_err() {
                pool.take_back();
            }
            return delivered;
        }
        let (mut reached, mut full) = (0u32, 0u32);
        for entry in table.ports.iter().flatten().filter(takes) {
            match touched.deliver(table, entry, pool) {
                Ok(()) => reached += 1,
                Err(_) => full += 1,
            }
        }
        if reached == 0 && full > 0 {
            pool.take_back();
            return Err(Dropped::NoRoom);
        }
        Ok(())
    }

    /// Fills offered buffers with what is in the inbox.
    fn receive(&mut self, done: &mut Completions) {
        while !self.offers.is_empty() {
            let next = self.cutting.take().or_else(|| self.start());
            let Some((frame, segmenter)) = next else { return };
            self.cutting = self.fill(frame, segmenter, done);
        }
    }

    /// Takes a frame from the inbox that can be received.
    fn start(&mut self) -> Option<(Arc<Stored>, Segmenter)> {
        loop {
            let frame = self.inbox().frames.pop()?;
            if self.port.options.vlan.tag(frame.tci, frame.inner).is_none() {
                self.counters.receive_drops += 1;
                continue;
            }
            let whole = self.port.takes().contains(frame.offload.needs());
            let offload = if whole { &Offload::NONE } else { &frame.offload };
            match Segmenter::new(frame.bytes(), offload) {
                Ok(segmenter) => return Some((frame, segmenter)),
                Err(_) => self.counters.receive_drops += 1,
            }
        }
    }

    /// Puts as much of a frame into buffers as there are. Returns what is left of it.
    fn fill(
        &mut self,
        frame: Arc<Stored>,
        mut segmenter: Segmenter,
        done: &mut Completions,
    ) -> Option<(Arc<Stored>, Segmenter)> {
        let tag = self.port.options.vlan.tag(frame.tci, frame.inner).flatten();
        loop {
            let Some(offer) = self.offers.front() else { return Some((frame, segmenter)) };
            let segment = segmenter.next(frame.bytes())?;
            // Headers that were not touched are as long as Ethernet's.
            let whole = segment.headers.len() == ETHERNET_HEADER;
            let offload = if whole { frame.offload } else { Offload::NONE };
            let payload = frame.bytes().get(segment.payload).unwrap_or_default();
            let leaving = Leaving { headers: segment.headers, payload, tag };
            let len = leaving.len();
            let offload = leaving_offload(offload, tag).filter(|_| len <= offer.room);
            let Some(offload) = offload else {
                self.counters.receive_drops += 1;
                continue;
            };
            // SAFETY: who offered the buffer vouches for it until its completion, which is below.
            unsafe { leaving.write(Cursor::new(&offer.pieces)) };
            self.counters.count_receive(len as u32);
            done.received(self.offers.pop(), len as u32, offload);
        }
    }
}

impl Queue for PortQueue {
    unsafe fn send(&mut self, frame: Frame<'_>, _: &mut Uring, done: &mut Completions) {
        let result = if self.up {
            // SAFETY: the caller vouches for the buffers.
            unsafe { self.forward(&frame) }
        } else {
            Err(Dropped::LinkDown)
        };
        self.counters.count_send(frame.len, result);
        done.push(Completion::Sent { id: frame.id, result });
    }

    unsafe fn offer(&mut self, id: u32, buffers: &[Buffer], _: &mut Uring, done: &mut Completions) {
        self.offers.push(id, buffers, done);
    }

    fn turn(&mut self, _: &mut Uring, done: &mut Completions) {
        self.inbox().wake.awake();
        self.touched.wake(&self.table);
        self.pool.rewind();
        self.now = self.switch.now();
        let up = self.port.is_up();
        if up != self.up {
            self.up = up;
            done.push(Completion::Link(up));
        }
        self.receive(done);
        self.inbox().counters.store(&self.counters);
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, _: &mut Completions) {
        if let Err(error) = self.bell.heard(cqe, uring) {
            limited::warn!(port = self.port.number, %error, "a port cannot be woken any more");
        }
    }

    fn is_ready(&self) -> bool {
        let waiting = self.cutting.is_some() || !self.inbox().frames.is_empty();
        (waiting && !self.offers.is_empty()) || self.up != self.port.is_up()
    }

    fn prepare_to_sleep(&mut self) -> bool {
        self.touched.wake(&self.table);
        self.inbox().wake.may_sleep(|| self.is_ready())
    }

    fn recall(&mut self, _: &mut Uring, done: &mut Completions) {
        self.offers.recall(done);
    }

    fn in_flight(&self) -> usize {
        self.offers.len()
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

impl Drop for PortQueue {
    fn drop(&mut self) {
        self.touched.wake(&self.table);
        self.inbox().counters.store(&self.counters);
        let own = &self.bell.get_ref().0;
        let mut table = self.switch.lock();
        if !table.inboxes.iter().any(|inbox| Arc::ptr_eq(inbox, own)) {
            return;
        }
        self.switch
            .change(&mut table, |table| table.inboxes.retain(|inbox| !Arc::ptr_eq(inbox, own)));
        self.port.closed.lock().unwrap_or_else(PoisonError::into_inner).add(&own.counters());
    }
}
