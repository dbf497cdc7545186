//! Synthetic NICs, by [`vsc::netvsc`].

use core::sync::atomic::AtomicU64;

use vmbus::mapped::SingleMapped;
use vmbus::nvsp::Capabilities;
use vmbus::protocol::Relid;
use vmbus::rndis::PacketFilter;
use vsc::Signal;
use vsc::netvsc::{Event, Fault, Offload, Queue, SendError, Setup, Shared};

use crate::bus::{Bus, BusError, waiting};
use crate::memory::Pages;
use crate::net::{Identity, LONGEST, MTU, MacAddress, NicCounters, NicDriver, NicError};
use crate::platform::{Calls, Platform};

/// Pages of a NIC's channel, both rings together.
const RING_PAGES: usize = 32;

/// Pages that the host leaves frames in: some three hundred slots.
const RECEIVE_PAGES: usize = 128;

/// Packets on their way to the host, each of which may have several frames.
const DEPTH: usize = 64;

/// Pages of the send buffer: a section of 6144 bytes for each packet.
const SEND_PAGES: usize = DEPTH * 6144 / crate::memory::PAGE;

type NicQueue<'w, P> = Queue<SingleMapped<'w>, Signal<Calls<'w, P>>, &'w [AtomicU64], DEPTH>;

/// A NIC on its only channel.
pub struct Netvsc<'w, P: Platform> {
    queue: NicQueue<'w, P>,
    identity: Identity,
    /// What keeps from sleep is no frame, but has to be polled for all the same.
    stirs: bool,
    damaged: u64,
    /// The frame that is looked at: the host cannot change it any more.
    frame: [u8; LONGEST],
}

impl<'w, P: Platform> Netvsc<'w, P> {
    /// Takes the NIC that channel `relid` leads to into use. Its rings and buffers come from `memory`.
    pub fn open(
        platform: &'w P,
        bus: &mut Bus<'w, P>,
        relid: Relid,
        memory: &mut Pages<'w>,
    ) -> Result<Self, NicError> {
        let mut take = |pages| memory.take(pages).ok_or(NicError::Memory);
        let (rings, receive, send) = (take(RING_PAGES)?, take(RECEIVE_PAGES)?, take(SEND_PAGES)?);
        let channel = bus.open(relid, rings, 0)?.channel(platform).map_err(Fault::from)?;
        let mut share = |pages: Pages<'w>| {
            Ok::<_, BusError>(Shared { gpadl: bus.share(relid, pages)?, memory: pages.words() })
        };
        let setup = Setup {
            receive: share(receive)?,
            send: share(send)?,
            mtu: MTU,
            capabilities: Capabilities(0),
            subchannels: 0,
        };
        let (mut queue, agreement) = Queue::connect(channel, setup, waiting(platform))?;
        let wanted = PacketFilter::DIRECTED | PacketFilter::BROADCAST;
        queue.set_filter(PacketFilter(wanted), |_| {}, waiting(platform))?;
        queue.wake();
        let identity = Identity {
            driver: "netvsc",
            mac: MacAddress(agreement.address),
            mtu: agreement.mtu.min(agreement.max_mtu),
        };
        Ok(Self { queue, identity, stirs: false, damaged: 0, frame: [0; LONGEST] })
    }
}

impl<P: Platform> NicDriver for Netvsc<'_, P> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn has_link(&mut self) -> bool {
        self.queue.is_link_up()
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, NicError> {
        match self.queue.send(frame, &Offload::default()) {
            Ok(()) => Ok(true),
            Err(SendError::Full) => Ok(false),
            Err(SendError::TooLong { .. } | SendError::Short) => Err(NicError::Frame(frame.len())),
            Err(SendError::Fault(fault)) => Err(fault.into()),
        }
    }

    fn publish(&mut self) -> Result<(), NicError> {
        // What goes wrong here, the next poll tells.
        self.queue.publish();
        Ok(())
    }

    fn poll(&mut self, received: &mut dyn FnMut(&[u8])) -> Result<usize, NicError> {
        let Self { queue, frame: copy, damaged, .. } = self;
        let mut count = 0;
        queue.poll(|event| {
            let Event::Received(frame) = event else { return };
            count += 1;
            let copy = copy.get_mut(..frame.len());
            match copy.and_then(|copy| frame.read(0, copy).then_some(copy)) {
                Some(copy) => received(copy),
                None => *damaged += 1, // longer than was agreed on
            }
        })?;
        Ok(count)
    }

    fn is_ready(&self) -> bool {
        self.stirs || self.queue.has_data()
    }

    fn rest(&mut self) -> Result<(), NicError> {
        self.stirs = !self.queue.rest();
        Ok(())
    }

    fn wake(&mut self) {
        self.stirs = false;
        self.queue.wake();
    }

    fn quiet(&mut self) {
        self.wake();
    }

    fn counters(&self) -> NicCounters {
        let signals = self.queue.counters().signals;
        NicCounters { signals, accesses: 0, damaged: self.damaged }
    }
}
