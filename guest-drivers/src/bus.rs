//! The VMBus, from the guest's side: brought up, its offers gathered, channels opened.
//!
//! [`vmbus::client`] knows the protocol; here is who waits for its answers.

use thiserror::Error;
use vmbus::Guid;
use vmbus::client::{Client, ConnectionError, Contact, Event, RequestError};
use vmbus::mapped::SingleMapped;
use vmbus::protocol::{GpadlId, OfferChannel, Relid, USER_DATA, Version};
use vmbus::ring::{Incoming, Outgoing, RingError};
use vsc::{Channel, Signal};

use crate::memory::Pages;
use crate::platform::{Calls, Platform};

/// How long the root may take for an answer.
const PATIENCE: u64 = 10_000_000_000;
/// For so long the guest looks for a message before it sleeps.
const SPIN: u64 = 20_000;

/// Channels that may be offered: a few controllers, each with one for every processor.
const CHANNELS: usize = 40;

/// A channel of ours.
pub type OpenChannel<'w, P> = Channel<SingleMapped<'w>, Signal<Calls<'w, P>>>;

/// Why something on the bus did not come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BusError {
    /// The root does not keep to the protocol.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// What we asked was not possible.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// No answer.
    #[error("the root does not answer")]
    TimedOut,
    /// The root refuses pages that it was to share.
    #[error("the root refused the pages of a ring or a buffer with status {0:#x}")]
    GpadlRefused(u32),
    /// The root refuses a channel.
    #[error("the root refused to open channel {relid} with status {status:#x}")]
    OpenRefused {
        /// The channel.
        relid: Relid,
        /// Its reason.
        status: u32,
    },
    /// It went away meanwhile.
    #[error("the root withdrew channel {0}")]
    Rescinded(Relid),
    /// The memory for a ring has no usable size.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// Too little memory for a ring.
    #[error("there is no memory for a ring")]
    Memory,
}

/// A channel that is open, for a processor to use.
#[derive(Clone, Copy, Debug)]
pub struct OpenRings<'w> {
    outgoing: SingleMapped<'w>,
    incoming: SingleMapped<'w>,
    connection: u32,
}

impl<'w> OpenRings<'w> {
    /// The channel as the client of this processor has it. Nothing may be under way from one before.
    pub fn channel<P: Platform>(&self, platform: &'w P) -> Result<OpenChannel<'w, P>, RingError> {
        let doorbell = Signal { hypercalls: Calls(platform), connection: self.connection };
        let (incoming, outgoing) = (Incoming::new(self.incoming)?, Outgoing::new(self.outgoing)?);
        Ok(Channel::new(incoming, outgoing, doorbell))
    }
}

/// Waits for an interrupt, for an answer of a device's that should not take long; false if it did.
pub(crate) fn waiting<P: Platform>(platform: &P) -> impl FnMut() -> bool {
    let until = platform.now().saturating_add(PATIENCE);
    move || {
        platform.idle();
        platform.now() < until
    }
}

/// The bus of a guest.
pub struct Bus<'w, P> {
    platform: &'w P,
    client: Client<CHANNELS, CHANNELS>,
}

impl<'w, P: Platform> Bus<'w, P> {
    /// Says hello and gathers all offers.
    pub fn connect(platform: &'w P) -> Result<Self, BusError> {
        let mut bus = Self { platform, client: Client::new(Contact::DEFAULT) };
        bus.client.connect(&mut Calls(platform))?;
        let deadline = bus.deadline();
        while bus.next_event(deadline)? != Event::AllOffered {}
        Ok(bus)
    }

    /// The version agreed upon.
    pub fn version(&self) -> Option<Version> {
        self.client.version()
    }

    /// What is offered, sub-channels left out.
    pub fn offers(&self) -> impl Iterator<Item = &OfferChannel> {
        self.client.offers().filter(|offer| offer.subchannel == 0)
    }

    /// The devices of a class, by the numbers of their channels.
    pub fn devices(&self, class: Guid) -> impl Iterator<Item = Relid> {
        self.offers().filter(move |offer| offer.class == class).map(|offer| offer.relid)
    }

    /// The sub-channel `number` of the device that `primary` leads to, which is being offered.
    pub fn subchannel(&mut self, primary: Relid, number: u16) -> Result<Relid, BusError> {
        let deadline = self.deadline();
        loop {
            let offered = self.client.subchannels(primary).find(|o| o.subchannel == number);
            if let Some(offer) = offered {
                return Ok(offer.relid);
            }
            match self.next_event(deadline)? {
                Event::OfferDropped(_) => return Err(BusError::Memory),
                Event::Rescinded(gone) if gone == primary => {
                    return Err(BusError::Rescinded(primary));
                }
                _ => {}
            }
        }
    }

    /// Opens channel `relid` with rings in `pages`, half for each direction, and interrupts on
    /// processor `vp`.
    pub fn open(
        &mut self,
        relid: Relid,
        pages: Pages<'w>,
        vp: u32,
    ) -> Result<OpenRings<'w>, BusError> {
        let platform = self.platform;
        let half = pages.count() / 2;
        let (outgoing, incoming) = pages.split(half).ok_or(BusError::Memory)?;
        let outgoing = outgoing.ring().ok_or(BusError::Memory)?;
        let incoming = incoming.ring().ok_or(BusError::Memory)?;
        let offer = self.client.offer(relid).ok_or(BusError::Rescinded(relid))?;
        let connection = offer.connection;

        let gpadl = self.share(relid, pages)?;
        let deadline = self.deadline();
        let downstream = u32::try_from(half).map_err(|_| BusError::Memory)?;
        let no_data = &[0; USER_DATA];
        self.client.open(&mut Calls(platform), relid, gpadl, downstream, vp, no_data)?;
        loop {
            match self.next_event(deadline)? {
                Event::Opened(opened) if opened == relid => break,
                Event::OpenRefused { relid, status } => {
                    return Err(BusError::OpenRefused { relid, status });
                }
                Event::Rescinded(gone) if gone == relid => return Err(BusError::Rescinded(relid)),
                _ => {}
            }
        }
        Ok(OpenRings { outgoing, incoming, connection })
    }

    /// Gives the root access to `pages`, for the device that channel `relid` leads to, as long as the
    /// guest is on the bus.
    pub fn share(&mut self, relid: Relid, pages: Pages<'w>) -> Result<GpadlId, BusError> {
        let bus = &mut Calls(self.platform);
        let gpadl = self.client.create_gpadl(bus, relid, pages.numbers())?;
        let deadline = self.deadline();
        loop {
            match self.next_event(deadline)? {
                Event::GpadlCreated(id) if id == gpadl => return Ok(gpadl),
                Event::GpadlRefused { status, .. } => return Err(BusError::GpadlRefused(status)),
                Event::Rescinded(gone) if gone == relid => return Err(BusError::Rescinded(relid)),
                _ => {}
            }
        }
    }

    /// Takes leave of the root; all memory is the guest's again after that.
    pub fn unload(mut self) -> Result<(), BusError> {
        self.client.unload(&mut Calls(self.platform))?;
        let deadline = self.deadline();
        while self.next_event(deadline)? != Event::Unloaded {}
        Ok(())
    }

    /// Until when the answer to what is asked now may come. Whatever else the root says meanwhile, and
    /// however much, does not move it.
    fn deadline(&self) -> u64 {
        self.platform.now().saturating_add(PATIENCE)
    }

    /// The next thing that the root has to say.
    fn next_event(&mut self, deadline: u64) -> Result<Event, BusError> {
        let mut spin_until = self.platform.now().saturating_add(SPIN);
        loop {
            let now = self.platform.now();
            if now > deadline {
                return Err(BusError::TimedOut);
            }
            if let Some(message) = self.platform.take_message() {
                let bus = &mut Calls(self.platform);
                if let Some(event) = self.client.message(bus, message.payload())? {
                    return Ok(event);
                }
            } else if now < spin_until {
                core::hint::spin_loop();
            } else {
                self.platform.idle();
                spin_until = self.platform.now().saturating_add(SPIN);
            }
        }
    }
}
