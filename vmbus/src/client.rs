//! The guest's end of the bus, as a plain state machine: the root's messages in, [`Event`]s out.
//!
//! ```text
//!   contact ── Connected ── Offered … AllOffered
//!                              │
//!      create_gpadl ── GpadlCreated ── open ── Opened ──  the rings are in use
//!                                              close ── teardown ── GpadlTornDown
//!   unload ── Unloaded
//! ```
//!
//! What a [`Client`] asks goes out by [`Hypercalls::post_message`] at once; the answer comes, some
//! day, through [`Client::message`], which takes what lay in the message slot and never waits.
//! Everything is kept in tables of fixed size; there is no allocation.
//!
//! The root is not trusted here. An answer to a question that was not asked, a channel offered
//! twice, a message cut short: each is a [`ConnectionError`], after which the client has said
//! *unload* and forgotten all channels. The memory it had shared is its own again at
//! [`Event::Unloaded`].

mod events;
mod fuzz;
mod hypercalls;
mod messages;

use crate::protocol::{
    GpadlId, MessageKind, OfferChannel, Relid, STATUS_SUCCESS, USER_DATA, Version,
};

pub use events::{ConnectionError, Event, RequestError};
#[doc(hidden)]
pub use fuzz::fuzz_client;
pub use hypercalls::{HvStatus, Hypercalls};
pub use messages::MAX_GPADL_PAGES;

/// How a guest introduces itself.
#[derive(Clone, Copy, Debug)]
pub struct Contact {
    /// The VP whose message slot the root shall use.
    pub vp: u32,
    /// The SINT of that slot, which only versions from 5.0 on are told; Linux uses 2.
    pub sint: u8,
    /// The addresses of two pages of which the root may make monitor pages. Partita's has no use
    /// for them; 0 will do.
    pub monitor_pages: [u64; 2],
}

impl Contact {
    /// Messages to SINT 2 of VP 0, no monitor pages.
    pub const DEFAULT: Self = Self { vp: 0, sint: 2, monitor_pages: [0; 2] };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing is agreed.
    Idle,
    /// The version with this index in [`Version::ALL`] was asked for.
    Contacting { index: usize },
    /// A version is agreed on.
    Connected { version: Version, connection: u32, all_offered: bool },
    /// The root was told to forget us.
    Unloading,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChannelState {
    Offered,
    Opening { open_id: u32, ring: GpadlId },
    Open { ring: GpadlId },
}

#[derive(Clone, Copy, Debug)]
struct Channel {
    offer: OfferChannel,
    state: ChannelState,
    rescinded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GpadlState {
    Creating,
    Created,
    TearingDown,
}

#[derive(Clone, Copy, Debug)]
struct Gpadl {
    id: GpadlId,
    relid: Relid,
    state: GpadlState,
}

/// The first number that Linux gives to a GPADL; they count up from there.
const FIRST_GPADL: u32 = 0xe1e10;

/// The guest's end of the bus, with room for `CHANNELS` channels and `GPADLS` page lists.
#[derive(Debug)]
pub struct Client<const CHANNELS: usize = 32, const GPADLS: usize = 64> {
    contact: Contact,
    phase: Phase,
    channels: [Option<Channel>; CHANNELS],
    gpadls: [Option<Gpadl>; GPADLS],
    next_gpadl: u32,
    next_open: u32,
    /// Answers that may still come to questions about channels that have been released since.
    late: u32,
    /// Offers for which there was no room, and which may be withdrawn.
    dropped: u32,
}

impl<const CHANNELS: usize, const GPADLS: usize> Client<CHANNELS, GPADLS> {
    /// A client that has said nothing yet.
    pub const fn new(contact: Contact) -> Self {
        Self {
            contact,
            phase: Phase::Idle,
            channels: [None; CHANNELS],
            gpadls: [None; GPADLS],
            next_gpadl: FIRST_GPADL,
            next_open: 1,
            late: 0,
            dropped: 0,
        }
    }

    /// The version agreed upon.
    pub fn version(&self) -> Option<Version> {
        match self.phase {
            Phase::Connected { version, .. } => Some(version),
            _ => None,
        }
    }

    /// The offer of channel `relid`, unless it is withdrawn.
    pub fn offer(&self, relid: Relid) -> Option<&OfferChannel> {
        self.offers().find(|offer| offer.relid == relid)
    }

    /// All offers, withdrawn ones left out.
    pub fn offers(&self) -> impl Iterator<Item = &OfferChannel> {
        self.channels.iter().flatten().filter(|channel| !channel.rescinded).map(|c| &c.offer)
    }

    /// The offers of sub-channels of the device that `primary` leads to.
    pub fn subchannels(&self, primary: Relid) -> impl Iterator<Item = &OfferChannel> {
        let device = self.offer(primary).map(|offer| (offer.class, offer.instance));
        self.offers().filter(move |o| o.subchannel != 0 && Some((o.class, o.instance)) == device)
    }

    /// Whether channel `relid` is open.
    pub fn is_open(&self, relid: Relid) -> bool {
        self.channels.iter().flatten().any(|channel| {
            channel.offer.relid == relid
                && !channel.rescinded
                && matches!(channel.state, ChannelState::Open { .. })
        })
    }

    /// Says hello. [`Event::Connected`] or [`ConnectionError::NoCommonVersion`] follows, and after
    /// the first the offers.
    pub fn connect(&mut self, bus: &mut impl Hypercalls) -> Result<(), ConnectionError> {
        self.forget();
        self.try_version(bus, 0)
    }

    /// Makes `pages`, guest page numbers, known to the root for use with channel `relid`.
    /// [`Event::GpadlCreated`] or [`Event::GpadlRefused`] follows.
    pub fn create_gpadl(
        &mut self,
        bus: &mut impl Hypercalls,
        relid: Relid,
        pages: impl ExactSizeIterator<Item = u64>,
    ) -> Result<GpadlId, RequestError> {
        let connection = self.connection()?;
        self.live_channel(relid)?;
        let count = pages.len();
        if !(1..=MAX_GPADL_PAGES).contains(&count) {
            return Err(RequestError::Pages(count));
        }
        let place = self.gpadls.iter_mut().find(|place| place.is_none());
        let place = place.ok_or(RequestError::Full)?;
        let id = GpadlId(self.next_gpadl);
        messages::post_gpadl(bus, connection, relid, id, pages).map_err(RequestError::Post)?;
        // Numbers are not used again, so that a late answer is not mistaken for another's.
        self.next_gpadl = self.next_gpadl.wrapping_add(1);
        *place = Some(Gpadl { id, relid, state: GpadlState::Creating });
        Ok(id)
    }

    /// Asks for the pages back. [`Event::GpadlTornDown`] follows, once the root has let go of
    /// them. The channel that uses them as its ring must be closed before.
    pub fn teardown_gpadl(
        &mut self,
        bus: &mut impl Hypercalls,
        id: GpadlId,
    ) -> Result<(), RequestError> {
        let connection = self.connection()?;
        let in_use = self.channels.iter().flatten().any(|channel| match channel.state {
            ChannelState::Offered => false,
            ChannelState::Opening { ring, .. } | ChannelState::Open { ring } => ring == id,
        });
        let gpadl = self
            .gpadl(id)
            .filter(|gpadl| gpadl.state == GpadlState::Created && !in_use)
            .ok_or(RequestError::Gpadl(id))?;
        messages::post_teardown(bus, connection, gpadl.relid, id).map_err(RequestError::Post)?;
        gpadl.state = GpadlState::TearingDown;
        Ok(())
    }

    /// Opens channel `relid` with the rings that lie in `ring`'s pages, that to the root at page 0
    /// and that from it at page `downstream_page`, both initialised. The root shall interrupt
    /// `vp`. [`Event::Opened`] or [`Event::OpenRefused`] follows.
    pub fn open(
        &mut self,
        bus: &mut impl Hypercalls,
        relid: Relid,
        ring: GpadlId,
        downstream_page: u32,
        vp: u32,
        user_data: &[u8; USER_DATA],
    ) -> Result<(), RequestError> {
        let connection = self.connection()?;
        let open_id = self.next_open;
        self.gpadl(ring)
            .filter(|gpadl| gpadl.state == GpadlState::Created && gpadl.relid == relid)
            .ok_or(RequestError::Gpadl(ring))?;
        let channel = self.live_channel(relid)?;
        if channel.state != ChannelState::Offered {
            return Err(RequestError::Channel(relid));
        }
        messages::post_open(
            bus,
            connection,
            relid,
            open_id,
            ring,
            (vp, downstream_page),
            user_data,
        )
        .map_err(RequestError::Post)?;
        channel.state = ChannelState::Opening { open_id, ring };
        self.next_open = self.next_open.wrapping_add(1);
        Ok(())
    }

    /// Closes channel `relid`. The root gives no answer to that; its rings are the guest's again
    /// when [`Client::teardown_gpadl`] is answered.
    pub fn close(&mut self, bus: &mut impl Hypercalls, relid: Relid) -> Result<(), RequestError> {
        let connection = self.connection()?;
        let channel = self.live_channel(relid)?;
        if !matches!(channel.state, ChannelState::Open { .. }) {
            return Err(RequestError::Channel(relid));
        }
        messages::post_relid(bus, connection, MessageKind::CloseChannel, relid)
            .map_err(RequestError::Post)?;
        channel.state = ChannelState::Offered;
        Ok(())
    }

    /// Lets go of a channel that was withdrawn, and of all page lists that were made for it. Its
    /// number may then be used for another.
    pub fn release(&mut self, bus: &mut impl Hypercalls, relid: Relid) -> Result<(), RequestError> {
        let connection = self.connection()?;
        let place = self
            .channels
            .iter_mut()
            .find(|place| place.is_some_and(|c| c.offer.relid == relid && c.rescinded));
        let place = place.ok_or(RequestError::Channel(relid))?;
        let Some(channel) = *place else { return Err(RequestError::Channel(relid)) };
        if matches!(channel.state, ChannelState::Open { .. }) {
            messages::post_relid(bus, connection, MessageKind::CloseChannel, relid)
                .map_err(RequestError::Post)?;
        }
        messages::post_relid(bus, connection, MessageKind::RelidReleased, relid)
            .map_err(RequestError::Post)?;
        *place = None;
        if matches!(channel.state, ChannelState::Opening { .. }) {
            self.late = self.late.saturating_add(1);
        }
        for place in &mut self.gpadls {
            if let Some(gpadl) = place.take_if(|gpadl| gpadl.relid == relid)
                && gpadl.state != GpadlState::Created
            {
                self.late = self.late.saturating_add(1);
            }
        }
        Ok(())
    }

    /// Tells the root to forget the guest, whatever is open. [`Event::Unloaded`] follows.
    pub fn unload(&mut self, bus: &mut impl Hypercalls) -> Result<(), RequestError> {
        let connection = self.connection()?;
        messages::post_header(bus, connection, MessageKind::Unload).map_err(RequestError::Post)?;
        self.forget();
        self.phase = Phase::Unloading;
        Ok(())
    }

    /// Takes what lay in the message slot. `None`: nothing that concerns the caller.
    ///
    /// An error ends the connection: *unload* has been posted if the root would understand it,
    /// and all channels are forgotten.
    pub fn message(
        &mut self,
        bus: &mut impl Hypercalls,
        payload: &[u8],
    ) -> Result<Option<Event>, ConnectionError> {
        let result = self.take(bus, payload);
        if result.is_err() && self.unload(bus).is_err() {
            self.forget();
        }
        result
    }

    fn take(
        &mut self,
        bus: &mut impl Hypercalls,
        payload: &[u8],
    ) -> Result<Option<Event>, ConnectionError> {
        use messages::Incoming;

        let message = Incoming::parse(payload);
        match self.phase {
            Phase::Idle => Err(message.map_or_else(|error| error, Incoming::unexpected)),
            Phase::Contacting { index } => match message? {
                Incoming::Version(response) => self.version_response(bus, index, &response),
                other => Err(other.unexpected()),
            },
            // Whatever was under way does not matter any more.
            Phase::Unloading => match message {
                Ok(Incoming::UnloadResponse) => {
                    self.phase = Phase::Idle;
                    Ok(Some(Event::Unloaded))
                }
                _ => Ok(None),
            },
            Phase::Connected { connection, .. } => match message? {
                Incoming::Offer(offer) => self.offered(&offer).map(Some),
                Incoming::Rescind(relid) => self.rescinded(bus, connection, relid),
                Incoming::AllOffers => self.all_offered().map(Some),
                Incoming::GpadlCreated(answer) => self.gpadl_created(&answer),
                Incoming::GpadlTornDown(id) => self.gpadl_torn_down(id),
                Incoming::OpenResult(answer) => self.open_result(&answer),
                other @ (Incoming::Version(_) | Incoming::UnloadResponse) => {
                    Err(other.unexpected())
                }
            },
        }
    }

    /// Asks for the version at `index`, or the first after it that the root listens to.
    fn try_version(
        &mut self,
        bus: &mut impl Hypercalls,
        index: usize,
    ) -> Result<(), ConnectionError> {
        for (index, version) in Version::ALL.iter().enumerate().skip(index) {
            match messages::post_contact(bus, &self.contact, *version) {
                Ok(()) => {
                    self.phase = Phase::Contacting { index };
                    return Ok(());
                }
                // An older root does not know the connection that newer versions use.
                Err(HvStatus::INVALID_CONNECTION_ID) => {}
                Err(status) => {
                    self.phase = Phase::Idle;
                    return Err(ConnectionError::Post(status));
                }
            }
        }
        self.phase = Phase::Idle;
        Err(ConnectionError::NoCommonVersion)
    }

    fn version_response(
        &mut self,
        bus: &mut impl Hypercalls,
        index: usize,
        response: &crate::protocol::VersionResponse,
    ) -> Result<Option<Event>, ConnectionError> {
        if response.supported == 0 {
            return self.try_version(bus, index + 1).map(|()| None);
        }
        let version = Version::ALL.get(index).copied().unwrap_or(Version::V2_4);
        let connection = if version >= Version::V5_0 {
            response.connection
        } else {
            crate::protocol::MESSAGE_CONNECTION
        };
        // A connection's number has 24 bits.
        if response.state != 0 || connection == 0 || connection >> 24 != 0 {
            return Err(ConnectionError::VersionResponse(version));
        }
        self.phase = Phase::Connected { version, connection, all_offered: false };
        messages::post_header(bus, connection, MessageKind::RequestOffers)
            .map_err(ConnectionError::Post)?;
        Ok(Some(Event::Connected(version)))
    }

    fn offered(&mut self, offer: &OfferChannel) -> Result<Event, ConnectionError> {
        let relid = offer.relid;
        if !(1..=Relid::MAX.0).contains(&relid.0) {
            return Err(ConnectionError::Relid(relid));
        }
        let mut has_primary = offer.subchannel == 0;
        for Channel { offer: other, rescinded, .. } in self.channels.iter().flatten() {
            let same_device = (other.class, other.instance) == (offer.class, offer.instance);
            if other.relid == relid
                || (same_device && !rescinded && other.subchannel == offer.subchannel)
            {
                return Err(ConnectionError::Offer(relid));
            }
            has_primary |= same_device && !rescinded && other.subchannel == 0;
        }
        // A sub-channel's device may be one that there was no room for.
        if !has_primary && self.dropped == 0 {
            return Err(ConnectionError::Offer(relid));
        }
        let channel = Channel { offer: *offer, state: ChannelState::Offered, rescinded: false };
        match self.channels.iter_mut().find(|place| place.is_none()) {
            Some(place) if has_primary => {
                *place = Some(channel);
                Ok(Event::Offered(relid))
            }
            _ => {
                self.dropped = self.dropped.saturating_add(1);
                Ok(Event::OfferDropped(relid))
            }
        }
    }

    fn all_offered(&mut self) -> Result<Event, ConnectionError> {
        match &mut self.phase {
            Phase::Connected { all_offered, .. } if !*all_offered => {
                *all_offered = true;
                Ok(Event::AllOffered)
            }
            _ => Err(ConnectionError::Unexpected(MessageKind::AllOffersDelivered.0)),
        }
    }

    fn rescinded(
        &mut self,
        bus: &mut impl Hypercalls,
        connection: u32,
        relid: Relid,
    ) -> Result<Option<Event>, ConnectionError> {
        let lie = Err(ConnectionError::Channel { kind: MessageKind::RescindOffer.0, relid });
        if let Some(channel) = self.channel(relid) {
            if core::mem::replace(&mut channel.rescinded, true) {
                return lie;
            }
            return Ok(Some(Event::Rescinded(relid)));
        }
        let Some(dropped) = self.dropped.checked_sub(1) else { return lie };
        self.dropped = dropped;
        messages::post_relid(bus, connection, MessageKind::RelidReleased, relid)
            .map_err(ConnectionError::Post)?;
        Ok(None)
    }

    fn gpadl_created(
        &mut self,
        answer: &crate::protocol::GpadlCreated,
    ) -> Result<Option<Event>, ConnectionError> {
        let id = answer.gpadl;
        let place = self.gpadls.iter_mut().find(|place| place.is_some_and(|g| g.id == id));
        match place {
            Some(place) => match place {
                Some(gpadl)
                    if gpadl.state == GpadlState::Creating && gpadl.relid == answer.relid =>
                {
                    if answer.status == STATUS_SUCCESS {
                        gpadl.state = GpadlState::Created;
                        return Ok(Some(Event::GpadlCreated(id)));
                    }
                    *place = None;
                    Ok(Some(Event::GpadlRefused { gpadl: id, status: answer.status }))
                }
                _ => Err(ConnectionError::Gpadl { kind: MessageKind::GpadlCreated.0, gpadl: id }),
            },
            None => self.late_gpadl(MessageKind::GpadlCreated, id),
        }
    }

    fn gpadl_torn_down(&mut self, id: GpadlId) -> Result<Option<Event>, ConnectionError> {
        let place = self.gpadls.iter_mut().find(|place| place.is_some_and(|g| g.id == id));
        match place {
            Some(place) if place.is_some_and(|g| g.state == GpadlState::TearingDown) => {
                *place = None;
                Ok(Some(Event::GpadlTornDown(id)))
            }
            Some(_) => {
                Err(ConnectionError::Gpadl { kind: MessageKind::GpadlTorndown.0, gpadl: id })
            }
            None => self.late_gpadl(MessageKind::GpadlTorndown, id),
        }
    }

    /// An answer about a list that is not in the table: right if its channel was released.
    fn late_gpadl(
        &mut self,
        kind: MessageKind,
        id: GpadlId,
    ) -> Result<Option<Event>, ConnectionError> {
        let issued = id.0.wrapping_sub(FIRST_GPADL) < self.next_gpadl.wrapping_sub(FIRST_GPADL);
        self.late_answer(issued).ok_or(ConnectionError::Gpadl { kind: kind.0, gpadl: id })
    }

    fn open_result(
        &mut self,
        answer: &crate::protocol::OpenResult,
    ) -> Result<Option<Event>, ConnectionError> {
        let (relid, next_open) = (answer.relid, self.next_open);
        if let Some(channel) = self.channel(relid)
            && let ChannelState::Opening { open_id, ring } = channel.state
            && open_id == answer.open_id
        {
            let opened = answer.status == STATUS_SUCCESS;
            channel.state =
                if opened { ChannelState::Open { ring } } else { ChannelState::Offered };
            let event = if opened {
                Event::Opened(relid)
            } else {
                Event::OpenRefused { relid, status: answer.status }
            };
            // Of a channel that was withdrawn meanwhile, the caller knows all there is to know.
            return Ok((!channel.rescinded).then_some(event));
        }
        let issued = answer.open_id.wrapping_sub(1) < next_open.wrapping_sub(1);
        self.late_answer(issued)
            .ok_or(ConnectionError::Channel { kind: MessageKind::OpenResult.0, relid })
    }

    /// Accounts for an answer that nobody waits for any more, if one may come.
    fn late_answer(&mut self, issued: bool) -> Option<Option<Event>> {
        if !issued {
            return None;
        }
        self.late = self.late.checked_sub(1)?;
        Some(None)
    }

    fn connection(&self) -> Result<u32, RequestError> {
        match self.phase {
            Phase::Connected { connection, .. } => Ok(connection),
            _ => Err(RequestError::State),
        }
    }

    fn channel(&mut self, relid: Relid) -> Option<&mut Channel> {
        self.channels.iter_mut().flatten().find(|channel| channel.offer.relid == relid)
    }

    fn live_channel(&mut self, relid: Relid) -> Result<&mut Channel, RequestError> {
        self.channel(relid).filter(|channel| !channel.rescinded).ok_or(RequestError::Channel(relid))
    }

    fn gpadl(&mut self, id: GpadlId) -> Option<&mut Gpadl> {
        self.gpadls.iter_mut().flatten().find(|gpadl| gpadl.id == id)
    }

    fn forget(&mut self) {
        self.phase = Phase::Idle;
        self.channels = [None; CHANNELS];
        self.gpadls = [None; GPADLS];
        self.late = 0;
        self.dropped = 0;
    }
}

#[cfg(test)]
mod tests;
