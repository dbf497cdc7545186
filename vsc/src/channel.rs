//! An open channel, as a client sees it.

use vmbus::client::Hypercalls;
use vmbus::mapped::RingMemory;
use vmbus::packet::{Packet, PacketFlags, PacketKind};
use vmbus::ring::{Incoming, Outgoing, PushError, RingError};

/// How a client wakes the service provider at the other end.
///
/// A closure will do; [`Signal`] is the one for a guest.
pub trait Doorbell {
    /// Wakes it.
    fn ring(&mut self);
}

impl<F: FnMut()> Doorbell for F {
    fn ring(&mut self) {
        self();
    }
}

/// The doorbell of a channel whose offer names `connection`, by hypercall.
#[derive(Clone, Copy, Debug)]
pub struct Signal<H> {
    /// The hypervisor.
    pub hypercalls: H,
    /// [`vmbus::protocol::OfferChannel::connection`]
    pub connection: u32,
}

impl<H: Hypercalls> Doorbell for Signal<H> {
    fn ring(&mut self) {
        self.hypercalls.signal_event(self.connection);
    }
}

/// What has passed through a channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets to the root.
    pub packets_out: u64,
    /// Packets from the root.
    pub packets_in: u64,
    /// How often the doorbell was rung.
    pub signals: u64,
    /// How often something was published and the doorbell was not rung, as the root was awake.
    pub signals_spared: u64,
}

/// Both rings of an open channel, and the doorbell of the other end.
///
/// Packets are gathered: nothing that is sent is seen, and no room of what is received is given
/// back, before [`Channel::publish`], which rings the doorbell at most once.
#[derive(Debug)]
pub struct Channel<M, D> {
    incoming: Incoming<M>,
    outgoing: Outgoing<M>,
    doorbell: D,
    /// What was sent or received and not yet published.
    unpublished: bool,
    /// The root has been asked to signal when there is room.
    wants_room: bool,
    counters: Counters,
}

impl<M: RingMemory, D: Doorbell> Channel<M, D> {
    /// The channel with these rings.
    pub fn new(incoming: Incoming<M>, outgoing: Outgoing<M>, doorbell: D) -> Self {
        Self {
            incoming,
            outgoing,
            doorbell,
            unpublished: false,
            wants_room: false,
            counters: Counters::default(),
        }
    }

    /// Puts a packet into the ring; `headers` as of [`Outgoing::push_with_headers`].
    #[inline]
    pub fn send(
        &mut self,
        kind: PacketKind,
        flags: PacketFlags,
        transaction_id: u64,
        headers: &[u8],
        payload: &[u8],
    ) -> Result<(), PushError> {
        self.outgoing.push_with_headers(kind, flags, transaction_id, headers, &[payload])?;
        self.counters.packets_out += 1;
        self.unpublished = true;
        Ok(())
    }

    /// Copies the next packet out of the ring; `None` if there is none.
    #[inline]
    pub fn receive<'b>(&mut self, buffer: &'b mut [u8]) -> Result<Option<Packet<'b>>, RingError> {
        let packet = self.incoming.read(buffer)?;
        if packet.is_some() {
            self.counters.packets_in += 1;
            self.unpublished = true;
        }
        Ok(packet)
    }

    /// Whether a packet may be there: one atomic load.
    #[inline]
    pub fn has_data(&self) -> bool {
        self.incoming.has_data()
    }

    /// Whether packets of `bytes` together, as of [`vmbus::packet::ring_size`], can be sent now.
    #[inline]
    pub fn has_room(&mut self, bytes: u32) -> Result<bool, RingError> {
        self.outgoing.fits(bytes)
    }

    /// Asks for an interrupt, from the next [`Channel::publish`] on, when there is room for `bytes`.
    /// Returns whether there is already, for which none may come.
    pub fn want_room(&mut self, bytes: u32) -> Result<bool, RingError> {
        self.wants_room = !self.outgoing.set_pending_send(bytes)?;
        if !self.wants_room {
            self.outgoing.set_pending_send(0)?;
        }
        Ok(!self.wants_room)
    }

    /// Shows the root what was sent, gives it back the room of what was received, and rings its
    /// doorbell if it may be asleep.
    #[inline]
    pub fn publish(&mut self) {
        if !core::mem::take(&mut self.unpublished) {
            return;
        }
        let signal_data = self.outgoing.publish();
        let signal_room = self.incoming.publish();
        if signal_data || signal_room {
            self.counters.signals += 1;
            self.doorbell.ring();
        } else {
            self.counters.signals_spared += 1;
        }
    }

    /// Asks not to be interrupted: the client polls.
    pub fn wake(&mut self) {
        self.incoming.mask();
        if core::mem::take(&mut self.wants_room) {
            // What is wrong with the ring, the next packet will tell.
            let _ = self.outgoing.set_pending_send(0);
        }
    }

    /// Publishes, and asks for an interrupt when there is something. Returns whether the client may
    /// sleep; if not, there is something already.
    #[must_use = "what is there already brings no interrupt"]
    pub fn rest(&mut self) -> bool {
        self.publish();
        !self.incoming.unmask()
    }

    /// What has passed through.
    pub fn counters(&self) -> Counters {
        self.counters
    }
}
