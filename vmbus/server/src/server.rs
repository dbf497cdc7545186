//! The protocol as a plain state machine: the guest's messages in, [`Action`]s out.
//!
//! Nothing here does I/O or waits. Where the protocol makes the guest wait for us (a channel's
//! worker must have stopped before its pages are given back), the server notes what it owes and
//! pays when told that the worker has.
//!
//! A guest may send anything in any order. What makes no sense is refused, by a failing answer
//! where the protocol has one and silently otherwise; what the server keeps for a guest is bounded
//! by [`Limits`].

mod action;
mod channels;
mod gpadl;

use std::collections::VecDeque;

use hypervisor::{Gpn, VpIndex};
use vmbus::protocol::{
    self as p, ChannelMessage, GpadlBody, GpadlCreated, GpadlHeader, GpadlId, GpadlTeardown,
    GpadlTorndown, Header, InitiateContact, MessageKind, ModifyChannel, ModifyChannelResponse,
    OfferChannel, OpenChannel, OpenResult, Relid, STATUS_SUCCESS, STATUS_UNSUCCESSFUL, Version,
    VersionResponse,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::channel::OfferParams;
pub use action::{Action, Limits, MessageError, OpenRequest};
use channels::{Channel, Channels, State};
pub use gpadl::GpadlError;
use gpadl::{Gpadls, Progress};

/// What has been agreed with the guest.
#[derive(Clone, Copy, Debug)]
enum Connection {
    /// Nothing.
    None,
    /// All workers are being stopped; what follows then.
    Resetting(Next),
    /// A version. The guest may or may not have asked for the offers.
    Up { version: Version, vp: VpIndex, asked: bool },
}

#[derive(Clone, Copy, Debug)]
enum Next {
    /// Nobody waits.
    Nothing,
    /// The guest wants to talk.
    Contact(InitiateContact),
    /// The guest wants to go.
    Unload { vp: VpIndex },
}

/// The root's end of the bus, for one guest.
pub struct Server {
    is_ram: Box<dyn Fn(Gpn) -> bool + Send>,
    vps: u32,
    limits: Limits,
    connection: Connection,
    channels: Channels,
    gpadls: Gpadls,
    actions: VecDeque<Action>,
}

impl Server {
    /// A bus without devices, for a guest with `vps` virtual processors. `is_ram` says of a guest
    /// page whether memory is there; pages elsewhere are refused.
    pub fn new(vps: u32, limits: Limits, is_ram: impl Fn(Gpn) -> bool + Send + 'static) -> Self {
        Self {
            is_ram: Box::new(is_ram),
            vps,
            limits,
            connection: Connection::None,
            channels: Channels::default(),
            gpadls: Gpadls::new(limits),
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The version agreed upon.
    pub fn version(&self) -> Option<Version> {
        match self.connection {
            Connection::Up { version, .. } => Some(version),
            _ => None,
        }
    }

    /// What the guest signals when it has put something into the ring of `relid`.
    pub fn connection_of(relid: Relid) -> u32 {
        relid.0 | 2 << 12
    }

    /// Offers a device. `None` if there are no channel numbers left.
    pub fn offer(&mut self, params: OfferParams) -> Option<Relid> {
        let relid = self.channels.add(params, None, 0)?;
        self.tell_offer(relid);
        Some(relid)
    }

    /// Offers `count` sub-channels of the device whose first channel is `primary`, which must be
    /// open and have none.
    pub fn offer_subchannels(&mut self, primary: Relid, count: u16) {
        let Some(channel) = self.channels.get(primary) else { return };
        let open = matches!(channel.state, State::Open { .. } | State::Opening { .. });
        let some = !self.channels.subchannels(primary).is_empty();
        if channel.primary.is_some() || !open || channel.rescinded || some {
            return;
        }
        let params = channel.params;
        for subchannel in 1..=count {
            let Some(relid) = self.channels.add(params, Some(primary), subchannel) else { return };
            self.tell_offer(relid);
        }
    }

    /// Withdraws an offer, closing its channel and those of its sub-channels. The guest hears of it when no worker
    /// touches its memory any more.
    pub fn rescind(&mut self, relid: Relid) {
        self.rescind_subchannels(relid);
        let Some(channel) = self.channels.get_mut(relid) else { return };
        if channel.rescinded {
            return;
        }
        channel.rescinded = true;
        channel.released = !channel.offered;
        channel.untold = channel.offered;
        self.close(relid);
        self.withdraw_if_done(relid);
    }

    /// Closes everything and forgets the guest, as when the partition is reset.
    pub fn reset(&mut self) {
        self.begin_reset(Next::Nothing);
    }

    /// Whether any channel has a worker, or is about to.
    pub fn is_busy(&self) -> bool {
        self.channels.are_busy()
    }

    /// The worker of `relid` has started, or failed to.
    pub fn channel_opened(&mut self, relid: Relid, ok: bool) {
        let Some(channel) = self.channels.get_mut(relid) else { return };
        let State::Opening { open_id, ring, close } = channel.state else { return };
        channel.state = if ok { State::Open { ring } } else { State::Closed };
        if !close && !channel.rescinded {
            let status = if ok { STATUS_SUCCESS } else { STATUS_UNSUCCESSFUL };
            self.post(&OpenResult {
                header: Header::new(MessageKind::OpenResult),
                relid,
                open_id,
                status,
            });
        }
        if !ok {
            self.stopped(relid);
        } else if close {
            self.close(relid);
        }
    }

    /// The worker of `relid` has stopped and will not touch the guest's memory any more: because it
    /// was told to, or because it gave up.
    pub fn channel_closed(&mut self, relid: Relid) {
        let Some(channel) = self.channels.get_mut(relid) else { return };
        match channel.state {
            State::Closed => return,
            // It gave up before we heard that it had begun: the guest shall have its answer first.
            State::Opening { .. } => return self.channel_opened(relid, false),
            State::Open { .. } | State::Closing { .. } => channel.state = State::Closed,
        }
        self.stopped(relid);
    }

    /// Pays what was owed until the worker had stopped.
    fn stopped(&mut self, relid: Relid) {
        self.rescind_subchannels(relid);
        for owner in [Some(relid), self.channels.get(relid).and_then(|channel| channel.primary)] {
            let Some(owner) = owner else { continue };
            let is_idle = self.channels.is_idle(owner);
            for gpadl in self.gpadls.torn_down(owner) {
                if is_idle {
                    self.give_back(owner, gpadl);
                } else {
                    // The ring, for which nobody was asked as long as its worker ran.
                    self.ask_for(owner, gpadl);
                }
            }
        }
        self.withdraw_if_done(relid);
        self.finish_reset();
    }

    /// A message that the guest has posted to a connection that
    /// [takes messages](Server::takes_messages_on).
    pub fn guest_message(&mut self, payload: &[u8]) -> Result<(), MessageError> {
        let header = read::<Header>(payload, 0)?;
        let kind = header.kind;
        match kind {
            MessageKind::InitiateContact => {
                let contact = read::<InitiateContact>(payload, kind.0)?;
                self.begin_reset(Next::Contact(contact));
                return if Version::ALL.contains(&contact.version) {
                    Ok(())
                } else {
                    Err(MessageError::Version(contact.version))
                };
            }
            MessageKind::Unload => {
                if let Connection::Up { vp, .. } = self.connection {
                    self.begin_reset(Next::Unload { vp });
                    return Ok(());
                }
            }
            _ => {}
        }
        let Connection::Up { version, .. } = self.connection else {
            return Err(MessageError::NotConnected(kind.0));
        };
        match kind {
            MessageKind::RequestOffers => self.request_offers(),
            MessageKind::OpenChannel => return self.open(&read(payload, kind.0)?),
            MessageKind::CloseChannel => {
                let ChannelMessage { relid, .. } = read(payload, kind.0)?;
                if self.channels.get(relid).is_none() {
                    return Err(MessageError::Channel { kind: kind.0, relid });
                }
                self.close(relid);
                self.rescind_subchannels(relid);
            }
            MessageKind::GpadlHeader => {
                let (header, rest) = GpadlHeader::read_from_prefix(payload)
                    .map_err(|_| MessageError::Short(kind.0))?;
                return self.gpadl_header(&header, rest);
            }
            MessageKind::GpadlBody => {
                let (body, rest) = GpadlBody::read_from_prefix(payload)
                    .map_err(|_| MessageError::Short(kind.0))?;
                let done = self.gpadls.more(body.gpadl, rest, &self.is_ram);
                return self.gpadl_answer(body.gpadl, done);
            }
            MessageKind::GpadlTeardown => {
                let GpadlTeardown { relid, gpadl, .. } = read(payload, kind.0)?;
                self.gpadl_teardown(relid, gpadl);
            }
            MessageKind::RelidReleased => {
                let ChannelMessage { relid, .. } = read(payload, kind.0)?;
                match self.channels.get_mut(relid) {
                    Some(channel) if channel.rescinded => channel.released = true,
                    _ => return Err(MessageError::Channel { kind: kind.0, relid }),
                }
                self.withdraw_if_done(relid);
            }
            MessageKind::ModifyChannel => {
                return self.modify_channel(version, &read(payload, kind.0)?);
            }
            _ => return Err(MessageError::Unknown(kind.0)),
        }
        Ok(())
    }

    /// Whether a guest may post messages to the connection with this id.
    pub fn takes_messages_on(connection: u32) -> bool {
        matches!(connection, p::MESSAGE_CONNECTION | p::MESSAGE_CONNECTION_4)
    }

    fn request_offers(&mut self) {
        if let Connection::Up { asked, .. } = &mut self.connection {
            *asked = true;
        }
        for relid in self.channels.relids() {
            self.tell_offer(relid);
        }
        self.post(&Header::new(MessageKind::AllOffersDelivered));
    }

    fn open(&mut self, request: &OpenChannel) -> Result<(), MessageError> {
        let relid = request.relid;
        match self.check_open(request) {
            Ok((incoming, outgoing)) => {
                let Some(channel) = self.channels.get_mut(relid) else { return Ok(()) };
                channel.state =
                    State::Opening { open_id: request.open_id, ring: request.ring, close: false };
                let request = OpenRequest {
                    relid,
                    primary: channel.primary.unwrap_or(relid),
                    subchannel: channel.subchannel,
                    incoming,
                    outgoing,
                    vp: VpIndex(request.target_vp),
                    user_data: request.user_data,
                };
                self.actions.push_back(Action::Open(request));
                Ok(())
            }
            Err(error) => {
                self.post(&OpenResult {
                    header: Header::new(MessageKind::OpenResult),
                    relid,
                    open_id: request.open_id,
                    status: STATUS_UNSUCCESSFUL,
                });
                Err(error)
            }
        }
    }

    fn check_open(&self, request: &OpenChannel) -> Result<(Vec<Gpn>, Vec<Gpn>), MessageError> {
        let relid = request.relid;
        let openable = |channel: &&Channel| {
            channel.offered && !channel.rescinded && channel.state == State::Closed
        };
        if self.channels.get(relid).filter(openable).is_none() {
            return Err(MessageError::Channel { kind: MessageKind::OpenChannel.0, relid });
        }
        if request.target_vp >= self.vps {
            return Err(MessageError::Vp(request.target_vp));
        }
        let sizes = 2..=self.limits.ring_pages;
        self.gpadls
            .pages(relid, request.ring)
            .and_then(|pages| pages.split_at_checked(request.downstream_page as usize))
            .filter(|(up, down)| sizes.contains(&up.len()) && sizes.contains(&down.len()))
            .map(|(up, down)| (up.to_vec(), down.to_vec()))
            .ok_or(MessageError::Ring(relid))
    }

    /// Has the worker stopped, if there is one.
    fn close(&mut self, relid: Relid) {
        let Some(channel) = self.channels.get_mut(relid) else { return };
        match &mut channel.state {
            State::Closed | State::Closing { .. } => {}
            State::Opening { close, .. } => *close = true,
            State::Open { ring } => {
                channel.state = State::Closing { ring: *ring };
                self.actions.push_back(Action::Close { relid });
            }
        }
    }

    fn modify_channel(
        &mut self,
        version: Version,
        request: &ModifyChannel,
    ) -> Result<(), MessageError> {
        let ModifyChannel { relid, target_vp, .. } = *request;
        let known = self.channels.get(relid).is_some_and(|channel| {
            channel.offered && matches!(channel.state, State::Open { .. } | State::Opening { .. })
        });
        let result = if !known {
            Err(MessageError::Channel { kind: MessageKind::ModifyChannel.0, relid })
        } else if target_vp >= self.vps {
            Err(MessageError::Vp(target_vp))
        } else {
            self.actions.push_back(Action::Retarget { relid, vp: VpIndex(target_vp) });
            Ok(())
        };
        if version >= Version::V5_3 {
            self.post(&ModifyChannelResponse {
                header: Header::new(MessageKind::ModifyChannelResponse),
                relid,
                status: if result.is_ok() { STATUS_SUCCESS } else { STATUS_UNSUCCESSFUL },
            });
        }
        result
    }

    fn gpadl_header(&mut self, header: &GpadlHeader, rest: &[u8]) -> Result<(), MessageError> {
        let GpadlHeader { relid, gpadl, .. } = *header;
        let usable = |channel: &Channel| channel.offered && !channel.rescinded;
        let done = if self.channels.get(relid).is_some_and(usable) {
            self.gpadls.begin(header, rest, &self.is_ram)
        } else {
            Err((relid, GpadlError::Channel))
        };
        self.gpadl_answer(gpadl, done)
    }

    /// Tells the guest how its list went, once that is known.
    fn gpadl_answer(&mut self, gpadl: GpadlId, done: Progress) -> Result<(), MessageError> {
        let (relid, status, result) = match done {
            Ok(None) => return Ok(()),
            Ok(Some((relid, pages))) => {
                self.actions.push_back(Action::GpadlAdded { relid, gpadl, pages });
                (relid, STATUS_SUCCESS, Ok(()))
            }
            Err((relid, error)) => {
                (relid, STATUS_UNSUCCESSFUL, Err(MessageError::Gpadl(gpadl, error)))
            }
        };
        // A body of a list that nobody knows has failed long ago.
        if result != Err(MessageError::Gpadl(gpadl, GpadlError::Unknown)) {
            self.post(&GpadlCreated {
                header: Header::new(MessageKind::GpadlCreated),
                relid,
                gpadl,
                status,
            });
        }
        result
    }

    fn gpadl_teardown(&mut self, relid: Relid, gpadl: GpadlId) {
        // Whose list it is decides, not whose the guest says it is.
        let owner = self.gpadls.owner(gpadl).unwrap_or(relid);
        if self.gpadls.torn_down(owner).contains(&gpadl) {
            return;
        }
        if self.channels.is_idle(owner) || !self.gpadls.tear_down_later(gpadl) {
            return self.give_back(owner, gpadl);
        }
        self.ask_for(owner, gpadl);
    }

    /// Has workers let go of a list that the guest wants back. A ring is in use until its worker stops; who
    /// else uses pages is not known here.
    fn ask_for(&mut self, owner: Relid, gpadl: GpadlId) {
        let is_ring = self.channels.get(owner).is_some_and(|channel| match channel.state {
            State::Opening { ring, .. } | State::Open { ring } | State::Closing { ring } => {
                ring == gpadl
            }
            State::Closed => false,
        });
        if !is_ring && self.gpadls.ask_for(gpadl) {
            self.actions.push_back(Action::GpadlWanted { relid: owner, gpadl });
        }
    }

    /// No worker uses a list any more that the guest wants back, as [`Action::GpadlWanted`] said.
    pub fn gpadl_unused(&mut self, relid: Relid, gpadl: GpadlId) {
        if self.gpadls.torn_down(relid).contains(&gpadl) {
            self.give_back(relid, gpadl);
        }
    }

    fn give_back(&mut self, relid: Relid, gpadl: GpadlId) {
        if self.gpadls.remove(gpadl) {
            self.actions.push_back(Action::GpadlRemoved { relid, gpadl });
        }
        self.post(&GpadlTorndown { header: Header::new(MessageKind::GpadlTorndown), gpadl });
    }

    /// Forgets the lists of a channel without a word to the guest.
    fn drop_gpadls(&mut self, relid: Relid) {
        for gpadl in self.gpadls.remove_all(relid) {
            self.actions.push_back(Action::GpadlRemoved { relid, gpadl });
        }
    }

    fn begin_reset(&mut self, next: Next) {
        // What the guest asked for last is what it waits for now.
        self.connection = Connection::Resetting(next);
        self.actions.retain(|action| !matches!(action, Action::Post { .. }));
        self.actions.push_back(Action::DiscardPosts);
        for relid in self.channels.relids() {
            self.close(relid);
        }
        self.finish_reset();
    }

    fn finish_reset(&mut self) {
        let Connection::Resetting(next) = self.connection else { return };
        if self.is_busy() {
            return;
        }
        for relid in self.channels.relids() {
            self.drop_gpadls(relid);
        }
        self.channels.retain(|channel| {
            channel.offered = false;
            channel.primary.is_none() && !channel.rescinded
        });
        self.connection = Connection::None;
        match next {
            Next::Nothing => {}
            Next::Contact(contact) => self.answer_contact(&contact),
            Next::Unload { vp } => {
                self.post_to(vp, &Header::new(MessageKind::UnloadResponse));
            }
        }
    }

    fn answer_contact(&mut self, contact: &InitiateContact) {
        let version = contact.version;
        let supported = Version::ALL.contains(&version) && contact.target_vp < self.vps;
        let vp = VpIndex(contact.target_vp);
        if supported {
            self.connection = Connection::Up { version, vp, asked: false };
        }
        self.post_to(
            vp,
            &VersionResponse {
                header: Header::new(MessageKind::VersionResponse),
                supported: u8::from(supported),
                state: 0,
                padding: 0,
                connection: if version >= Version::V5_0 { p::MESSAGE_CONNECTION_4 } else { 0 },
            },
        );
    }

    /// Sub-channels live as long as the first channel is open; the next time, they are asked for
    /// again.
    fn rescind_subchannels(&mut self, primary: Relid) {
        for relid in self.channels.subchannels(primary) {
            self.rescind(relid);
        }
    }

    /// Tells the guest of a channel, unless it knows.
    fn tell_offer(&mut self, relid: Relid) {
        if !matches!(self.connection, Connection::Up { asked: true, .. }) {
            return;
        }
        let Some(channel) = self.channels.get_mut(relid) else { return };
        if channel.offered || channel.rescinded {
            return;
        }
        channel.offered = true;
        let OfferParams { class, instance, flags, mmio_megabytes, user_data } = channel.params;
        let offer = OfferChannel {
            header: Header::new(MessageKind::OfferChannel),
            class,
            instance,
            reserved: [0; 16],
            flags,
            mmio_megabytes,
            user_data,
            subchannel: channel.subchannel,
            reserved2: 0,
            relid,
            monitor_id: 0,
            monitor_allocated: 0,
            dedicated_interrupt: 1,
            connection: Self::connection_of(relid),
        };
        self.post(&offer);
    }

    /// Tells the guest of a withdrawn channel that no worker holds on to, and forgets it once the guest has let go.
    fn withdraw_if_done(&mut self, relid: Relid) {
        let Some(channel) = self.channels.get_mut(relid) else { return };
        if !channel.rescinded || channel.state != State::Closed {
            return;
        }
        let released = channel.released;
        let untold = std::mem::take(&mut channel.untold);
        self.drop_gpadls(relid);
        if untold {
            self.post(&ChannelMessage { header: Header::new(MessageKind::RescindOffer), relid });
        }
        if released {
            self.channels.remove(relid);
        }
    }

    /// Posts to the VP that the guest named, while it listens.
    fn post<T: IntoBytes + Immutable>(&mut self, message: &T) {
        if let Connection::Up { vp, .. } = self.connection {
            self.post_to(vp, message);
        }
    }

    fn post_to<T: IntoBytes + Immutable>(&mut self, vp: VpIndex, message: &T) {
        const { assert!(size_of::<T>() <= p::MAX_MESSAGE) };
        self.actions.push_back(Action::Post { vp, payload: message.as_bytes().into() });
    }
}

fn read<T: FromBytes>(payload: &[u8], kind: u32) -> Result<T, MessageError> {
    T::read_from_prefix(payload).map(|(message, _)| message).map_err(|_| MessageError::Short(kind))
}

#[cfg(test)]
mod tests;
