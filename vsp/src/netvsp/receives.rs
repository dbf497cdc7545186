//! Frames under way from the network to the guest, by way of the slots of its receive buffer.
//!
//! Empty slots lie with the network. One that has a frame gets its header, and waits until its packet
//! is sent: here, or at the door of the channel that the guest wants the frame on. All tables are made
//! when the channel is opened, so that a frame allocates nothing.
//!
//! `unsafe` is the promise to the network that its buffers stay: they lie in guest memory, which the
//! [`Engine`](super::engine::Engine) keeps mapped for longer than its queue and its worker's io_uring.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use backends::net::{Buffer, Completions, MAX_BUFFERS, MAX_FRAME, Network, Offload, Queue};
use backends::uring::Uring;
use vmbus::packet::TransferRange;

use super::crossing::{Filled, Refused};
use super::handshake::SLOT_HEADER;
use super::receive::{self, Part};
use super::session::{Receive, Session};
use super::slots::{NotSent, Slot, Slots};
use super::steering::{LOOK, Steering};

/// Frames for which slots lie with the network.
pub(super) const RECEIVES: u16 = 256;
/// The most slots for one frame: a coalesced one of the greatest length, with the smallest slots.
pub(super) const MAX_PARTS: usize = MAX_FRAME.div_ceil(2048 - SLOT_HEADER as usize);
/// Slots that wait for their packet, before more frames are taken from other channels.
const MAX_WAITING: usize = RECEIVES as usize * 2;

/// What has become of a frame that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes to the guest here.
    Here,
    /// It goes to the guest on the channel that the guest wants it on.
    Crossed,
    /// That one is not open: it goes on the first.
    Astray,
    /// Too many wait for that one: it is lost.
    Overrun,
    /// The guest does not want it.
    Unwanted,
}

/// What one channel's guest receives.
pub(super) struct Receives {
    session: Arc<Session>,
    network: Arc<dyn Network>,
    channel: u16,
    /// Slots that are kept for control messages.
    kept: usize,
    pub slots: Slots,
    /// Slots that lie with the network, a frame's together.
    offers: Box<[Vec<Slot>]>,
    free_offers: Vec<u16>,
    /// Whether offers take coalesced frames.
    coalescing: bool,
    /// Frames in their slots.
    waiting: VecDeque<Filled>,
    /// The parts of one frame.
    frame: Vec<Filled>,
    buffers: Vec<Buffer>,
    /// How frames are spread over the channels, if not by the network, and since which change.
    steering: Option<Box<Steering>>,
    change: u32,
    /// Channels that frames or slots have been left for since they were last woken.
    touched: Box<[bool]>,
}

impl Receives {
    /// Of a channel that has no slots yet.
    pub(super) fn new(
        session: Arc<Session>,
        network: Arc<dyn Network>,
        channel: u16,
        kept: usize,
    ) -> Self {
        Self {
            network,
            channel,
            kept,
            slots: Slots::new(0, 0..0),
            offers: (0..RECEIVES).map(|_| Vec::with_capacity(MAX_PARTS)).collect(),
            free_offers: (0..RECEIVES).rev().collect(),
            coalescing: false,
            waiting: VecDeque::with_capacity(MAX_WAITING + MAX_PARTS),
            frame: Vec::with_capacity(MAX_PARTS),
            buffers: Vec::with_capacity(MAX_BUFFERS * 2),
            steering: None,
            change: 0,
            touched: vec![false; session.bells.len()].into(),
            session,
        }
    }

    /// Takes this channel's part of the slots. From now on others leave frames for it.
    pub(super) fn open(&mut self) {
        let Some(receive) = self.session.receive.get() else { return };
        let crossing = &receive.crossing;
        self.slots = Slots::new(receive.layout.slots, crossing.home(self.channel));
        crossing.open(self.channel);
        self.session.change();
        // The first channel tells the guest when all are open.
        if let Some(bell) = self.session.bell(0) {
            bell.ring();
        }
    }

    /// Leaves nothing behind, neither frames nor slots.
    pub(super) fn close(&mut self) {
        let Self { session, slots, touched, .. } = self;
        let Some(Receive { crossing, .. }) = session.receive.get() else { return };
        crossing.close(self.channel);
        for slot in slots.let_go() {
            touch(touched, crossing.go_home(slot));
        }
        session.change();
        self.wake_others();
    }

    /// Slots that a frame may take.
    fn parts(&self, slot_size: u32) -> usize {
        let room = slot_size - SLOT_HEADER;
        // A frame lies in no more pieces than the network takes.
        if self.coalescing {
            (MAX_FRAME as u32).div_ceil(room).min(MAX_PARTS as u32) as usize
        } else {
            1
        }
    }

    /// Whether the network has slots of a size that the guest has changed. From now on it has not.
    pub(super) fn changes_size(&mut self) -> bool {
        let changes = self.coalescing != self.session.is_coalescing();
        self.coalescing ^= changes;
        changes
    }

    /// Takes what others have left here. Returns how many frames.
    pub(super) fn arrivals(&mut self) -> u32 {
        if self.session.changes() != self.change {
            self.respread();
        }
        let Self { session, slots, waiting, channel, .. } = self;
        let Some(Receive { crossing, .. }) = session.receive.get() else { return 0 };
        crossing.set_hungry(*channel, false);
        while let Some(slot) = crossing.next_home(*channel) {
            slots.come_home(slot);
        }
        let mut frames = 0;
        while waiting.len() < MAX_WAITING
            && let Some(first) = crossing.next_frame(*channel)
        {
            waiting.extend(crossing.parts(first).filter(|part| slots.adopt(part.slot)));
            frames += 1;
        }
        frames
    }

    /// Looks how frames are to be spread now.
    fn respread(&mut self) {
        self.change = self.session.changes();
        let open = self.session.receive.get().map_or(0, |receive| receive.crossing.open_channels());
        // Who has its frames come back by the channel they were sent for has spread them already.
        let by_network = self.network.follows_senders();
        let spread = self.session.spread();
        let spread =
            spread.filter(|spread| self.touched.len() > 1 && !(by_network && spread.is_even(open)));
        self.steering = spread.map(|spread| Box::new(Steering::new(&spread)));
    }

    /// Offers empty slots to the network.
    pub(super) fn offer(
        &mut self,
        queue: &mut dyn Queue,
        uring: &mut Uring,
        done: &mut Completions,
    ) {
        let Some(receive) = self.session.receive.get() else { return };
        let size = receive.layout.slot_size;
        let parts = self.parts(size);
        while self.slots.free() >= parts + self.kept
            && let Some(index) = self.free_offers.last().copied()
            && let Some(offer) = self.offers.get_mut(usize::from(index))
        {
            offer.clear();
            offer.extend((0..parts).map_while(|_| self.slots.take()));
            self.buffers.clear();
            for slot in &*offer {
                let offset = u32::from(*slot) * size + SLOT_HEADER;
                // That this is memory was looked at when the buffer was shared.
                receive.memory.buffers(offset, size - SLOT_HEADER, &mut self.buffers);
            }
            self.buffers.truncate(MAX_BUFFERS);
            self.free_offers.pop();
            // SAFETY: the buffers lie in guest memory, which the engine keeps mapped until after queue
            // and ring are gone.
            unsafe { queue.offer(index.into(), &self.buffers, uring, done) };
        }
    }

    /// An offer has ended, its first `used` slots with a frame in them: gives the others back.
    pub(super) fn take_back(&mut self, id: u32, used: usize) {
        let Ok(index) = u16::try_from(id) else { return };
        let Some(offer) = self.offers.get_mut(usize::from(index)) else { return };
        for slot in offer.drain(used.min(offer.len())..) {
            self.slots.give_back(slot);
        }
        self.free_offers.push(index);
    }

    /// A frame has come.
    pub(super) fn receive(&mut self, id: u32, len: u32, offload: &Offload) -> Fate {
        self.frame.clear();
        let channel = self.prepare(id, len, offload);
        self.take_back(id, self.frame.len());
        match channel {
            None => Fate::Unwanted,
            Some(channel) if channel == self.channel => {
                self.waiting.extend(self.frame.drain(..));
                Fate::Here
            }
            Some(channel) => self.cross(channel),
        }
    }

    /// Writes the headers of a frame's slots, which are in `self.frame` then. Returns the channel that
    /// it is for; `None` if the guest does not want it.
    fn prepare(&mut self, id: u32, len: u32, offload: &Offload) -> Option<u16> {
        let Receive { memory, layout, capabilities, .. } = self.session.receive.get()?;
        let offer = self.offers.get(usize::try_from(id).ok()?)?;
        let room = layout.slot_size - SLOT_HEADER;
        let slots = offer.get(..len.div_ceil(room) as usize)?;
        let (first, later) = slots.split_first()?;
        let offset = u32::from(*first) * layout.slot_size;
        let mut look = [0; LOOK];
        if self.session.receive_loan.is_over() || !memory.read(offset + SLOT_HEADER, &mut look) {
            return None;
        }
        let wishes = self.session.wishes(*capabilities);
        let part = if later.is_empty() { Part::Whole } else { Part::First };
        let peek = look.first_chunk()?;
        let inbound = receive::prepare(peek, len.min(room), part, offload, &wishes)?;
        memory.write(offset, inbound.front());
        let last = later.is_empty();
        self.frame.push(Filled { slot: *first, len: inbound.len, last });
        let mut left = len.saturating_sub(room);
        for slot in later {
            let last = left <= room;
            // Neither can fail: what is left is as long as there are slots for it.
            let Some(inbound) = receive::prepare_later(left.min(room), last) else { continue };
            memory.write(u32::from(*slot) * layout.slot_size, inbound.front());
            self.frame.push(Filled { slot: *slot, len: inbound.len, last });
            left = left.saturating_sub(room);
        }
        let steering = self.steering.as_ref();
        Some(steering.map_or(self.channel, |steering| steering.channel(&look)))
    }

    /// Leaves the frame in `self.frame` to another channel.
    fn cross(&mut self, channel: u16) -> Fate {
        let Self { session, slots, waiting, frame, touched, .. } = self;
        let Some(Receive { crossing, .. }) = session.receive.get() else { return Fate::Unwanted };
        let mut fate = Fate::Crossed;
        let mut result = crossing.send(channel, frame).map(|()| channel);
        if result == Err(Refused::Closed) {
            fate = Fate::Astray;
            if self.channel > 0 {
                result = crossing.send(0, frame).map(|()| 0);
            }
        }
        match result {
            Ok(channel) => {
                frame.iter().for_each(|part| slots.send_away(part.slot));
                touch(touched, channel);
            }
            Err(Refused::Closed) => waiting.extend(frame.drain(..)),
            Err(Refused::Full) => {
                frame.iter().for_each(|part| slots.give_back(part.slot));
                fate = Fate::Overrun;
            }
        }
        fate
    }

    /// The guest has completed a packet: its slots are free again, here or at home.
    pub(super) fn complete(&mut self, id: u64) -> Result<u32, NotSent> {
        let count = self.slots.complete(id)?;
        self.send_home();
        Ok(count)
    }

    fn send_home(&mut self) {
        let Self { session, slots, touched, .. } = self;
        let Some(Receive { crossing, .. }) = session.receive.get() else { return };
        for slot in slots.leaving() {
            touch(touched, crossing.go_home(slot));
        }
    }

    /// Wakes the channels that something was left for, once for all of it.
    pub(super) fn wake_others(&mut self) {
        for (channel, touched) in (0..).zip(&mut self.touched) {
            if std::mem::take(touched)
                && let Some(Receive { crossing, .. }) = self.session.receive.get()
                && let Some(bell) = self.session.bell(channel)
                && (crossing.has_frames(channel) || crossing.is_hungry(channel))
            {
                bell.ring();
            }
        }
    }

    /// Whether others have left something here that can be taken.
    pub(super) fn has_news(&self) -> bool {
        let receive = self.session.receive.get();
        receive.is_some_and(|Receive { crossing, .. }| {
            crossing.has_homecomers(self.channel)
                || (self.waiting.len() < MAX_WAITING && crossing.has_frames(self.channel))
        })
    }

    /// Whether no slots lie with the network.
    pub(super) fn is_idle(&self) -> bool {
        self.free_offers.len() == usize::from(RECEIVES)
    }

    /// Whether this channel may sleep; from now on others wake it. False if they have left something
    /// already, or the channel `has_more` to do.
    pub(super) fn prepare_to_sleep(&mut self, has_more: impl FnOnce() -> bool) -> bool {
        if let Some(Receive { crossing, layout, .. }) = self.session.receive.get() {
            let starved = self.slots.free() < self.parts(layout.slot_size) + self.kept;
            crossing.set_hungry(self.channel, starved);
        }
        let has_news = || self.has_news() || has_more();
        self.session.bell(self.channel).is_none_or(|bell| bell.wake.may_sleep(has_news))
    }

    /// Whether frames wait for their packet.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets go of the frames that wait: the guest has its buffer back.
    pub(super) fn drop_waiting(&mut self) {
        let Self { slots, waiting, .. } = self;
        waiting.drain(..).for_each(|part| slots.give_back(part.slot));
        self.send_home();
    }

    /// Hands as many frames to the guest as there are places in `ranges`, and none in part. Returns
    /// their packet's transaction id, and how many ranges it has.
    pub(super) fn hand_over(
        &mut self,
        slot_size: u32,
        ranges: &mut [TransferRange],
    ) -> Option<(u64, usize)> {
        let mut count = 0;
        for (index, (range, part)) in ranges.iter_mut().zip(&self.waiting).enumerate() {
            *range = TransferRange { len: part.len, offset: u32::from(part.slot) * slot_size };
            if part.last {
                count = index + 1;
            }
        }
        let batch = self.waiting.drain(..count).map(|part| part.slot);
        Some((self.slots.hand_over(batch)?, count))
    }
}

fn touch(touched: &mut [bool], channel: u16) {
    if let Some(touched) = touched.get_mut(usize::from(channel)) {
        *touched = true;
    }
}
