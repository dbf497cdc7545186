//! The bus as a hostile guest speaks to it: messages in any order, and of any shape. Nothing is assumed
//! of the answers but that they come at last.

use core::hint::spin_loop;

use vmbus::client::HvStatus;
use vmbus::nvsp::NETWORK_CLASS;
use vmbus::protocol::{
    ChannelMessage, GpadlCreated, Header, MAX_MESSAGE, MESSAGE_CONNECTION, MESSAGE_CONNECTION_4,
    MESSAGE_TYPE, MessageKind, OfferChannel, OpenResult, Relid, STATUS_SUCCESS, Version,
};
use vmbus::vstor::SCSI_CLASS;
use zerocopy::{FromBytes, IntoBytes};

use super::arena::{Arena, Bytes};
use super::chaos::Chaos;
use super::{Counts, Silence};
use crate::platform::{Message, Platform};

/// How long an answer that is due may take.
const PATIENCE: u64 = 30_000_000_000;
/// How long one is waited for that need not come.
const BRIEF: u64 = 2_000_000;
/// For so long the guest looks for a message before it sleeps.
const SPIN: u64 = 20_000;

/// Channels that are remembered.
const CHANNELS: usize = 64;

/// What a channel leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Disks,
    Nic,
    Other,
}

/// A channel that was offered, and not withdrawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub(super) relid: u32,
    pub(super) connection: u32,
    pub(super) kind: Kind,
    pub(super) subchannel: u16,
}

/// The guest's end of the bus.
pub(super) struct Wire<'w, P> {
    pub(super) platform: &'w P,
    pub(super) counts: Counts,
    /// Where messages go.
    connection: u32,
    offers: [Option<Offer>; CHANNELS],
    all_offered: bool,
    contacted: bool,
    unloaded: bool,
    /// The answers that came last.
    opened: Option<OpenResult>,
    created: Option<GpadlCreated>,
    torn_down: u64,
}

impl<'w, P: Platform> Wire<'w, P> {
    pub(super) fn new(platform: &'w P) -> Self {
        Self {
            platform,
            counts: Counts::default(),
            connection: MESSAGE_CONNECTION_4,
            offers: [None; CHANNELS],
            all_offered: false,
            contacted: false,
            unloaded: false,
            opened: None,
            created: None,
            torn_down: 0,
        }
    }

    /// One of the channels that are offered.
    pub(super) fn any_offer(&self, chaos: &mut Chaos) -> Option<Offer> {
        let count = self.offers.iter().flatten().count();
        self.offers.iter().flatten().nth(chaos.count(count)).copied()
    }

    /// A sub-channel of that kind, if one is offered.
    pub(super) fn subchannel(&self, chaos: &mut Chaos, kind: Kind) -> Option<Offer> {
        let ours = || self.offers.iter().flatten().filter(|o| o.kind == kind && o.subchannel > 0);
        ours().nth(chaos.count(ours().count())).copied()
    }

    /// A VP to be interrupted, which need not exist.
    pub(super) fn vp(&self, chaos: &mut Chaos) -> u32 {
        let vps = self.platform.processors() as u64;
        let right = chaos.below(vps) as u32;
        chaos.or_odd_32(right, 3)
    }

    /// Posts a message; whether it was taken. A root without room is given a little time.
    pub(super) fn post(&mut self, payload: &[u8]) -> bool {
        self.post_to(self.connection, MESSAGE_TYPE, payload)
    }

    /// The same to any connection, as any type.
    fn post_to(&mut self, connection: u32, kind: u32, payload: &[u8]) -> bool {
        self.post_within(5 * BRIEF, connection, kind, payload)
    }

    /// The same, with so much time for a root that has no room, in nanoseconds.
    fn post_within(&mut self, patience: u64, connection: u32, kind: u32, payload: &[u8]) -> bool {
        self.counts.messages += 1;
        let until = self.platform.now().saturating_add(patience);
        loop {
            match self.platform.post_message(connection, kind, payload) {
                HvStatus::SUCCESS => return true,
                HvStatus::INSUFFICIENT_BUFFERS if self.platform.now() < until => {
                    self.counts.full += 1;
                    self.hear();
                    spin_loop();
                }
                _ => return false,
            }
        }
    }

    /// Posts without a look at what comes back, which then fills the root's queues.
    pub(super) fn flood(&mut self, payload: &[u8], count: u64) {
        for _ in 0..count {
            self.counts.messages += 1;
            let status = self.platform.post_message(self.connection, MESSAGE_TYPE, payload);
            if status != HvStatus::SUCCESS {
                self.counts.full += 1;
            }
        }
    }

    /// Takes all messages that there are.
    pub(super) fn hear(&mut self) {
        // As many as a queue of the root's holds: there is other work.
        for _ in 0..1024 {
            let Some(message) = self.platform.take_message() else { return };
            self.take(&message);
        }
    }

    fn take(&mut self, message: &Message) {
        let payload = message.payload();
        self.counts.answers += 1;
        let Ok((Header { kind, .. }, _)) = Header::read_from_prefix(payload) else { return };
        match kind {
            MessageKind::OfferChannel => {
                if let Ok((offer, _)) = OfferChannel::read_from_prefix(payload) {
                    self.offered(&offer);
                }
            }
            MessageKind::RescindOffer => {
                if let Ok((ChannelMessage { relid, .. }, _)) =
                    ChannelMessage::read_from_prefix(payload)
                {
                    let gone = |place: &Option<Offer>| place.is_some_and(|o| o.relid == relid.0);
                    self.offers.iter_mut().filter(|place| gone(place)).for_each(|o| *o = None);
                    let released =
                        ChannelMessage { header: Header::new(MessageKind::RelidReleased), relid };
                    // One that is not released keeps its number until the guest goes.
                    let _ = self.platform.post_message(
                        self.connection,
                        MESSAGE_TYPE,
                        released.as_bytes(),
                    );
                }
            }
            MessageKind::AllOffersDelivered => self.all_offered = true,
            MessageKind::OpenResult => {
                self.opened = OpenResult::read_from_prefix(payload).ok().map(|(result, _)| result);
                self.refused(self.opened.map(|opened| opened.status));
            }
            MessageKind::GpadlCreated => {
                self.created =
                    GpadlCreated::read_from_prefix(payload).ok().map(|(answer, _)| answer);
                self.refused(self.created.map(|created| created.status));
            }
            MessageKind::GpadlTorndown => self.torn_down += 1,
            MessageKind::VersionResponse => self.contacted = true,
            MessageKind::UnloadResponse => self.unloaded = true,
            _ => {}
        }
    }

    fn refused(&mut self, status: Option<u32>) {
        if status != Some(STATUS_SUCCESS) {
            self.counts.refusals += 1;
        }
    }

    fn offered(&mut self, offer: &OfferChannel) {
        let kind = match offer.class {
            SCSI_CLASS => Kind::Disks,
            NETWORK_CLASS => Kind::Nic,
            _ => Kind::Other,
        };
        let OfferChannel { relid: Relid(relid), connection, subchannel, .. } = *offer;
        let known = |place: &Option<Offer>| place.is_some_and(|offer| offer.relid == relid);
        let place = self.offers.iter().position(known);
        let place = place.or_else(|| self.offers.iter().position(Option::is_none));
        if let Some(place) = place.and_then(|index| self.offers.get_mut(index)) {
            *place = Some(Offer { relid, connection, kind, subchannel });
        }
    }

    /// Hears messages until `done`, or so many nanoseconds are over.
    fn until(&mut self, patience: u64, done: impl Fn(&Self) -> bool) -> bool {
        let started = self.platform.now();
        let mut spin_until = started.saturating_add(SPIN);
        loop {
            self.hear();
            if done(self) {
                return true;
            }
            let now = self.platform.now();
            if now.saturating_sub(started) > patience {
                return false;
            }
            if now < spin_until || patience <= BRIEF {
                spin_loop();
            } else {
                self.platform.idle();
                spin_until = self.platform.now().saturating_add(SPIN);
            }
        }
    }

    /// Hears messages for a moment.
    pub(super) fn linger(&mut self, nanoseconds: u64) {
        self.until(nanoseconds.min(BRIEF), |_| false);
    }

    /// Says hello in one of many ways, and asks what there is; whether anything was offered.
    pub(super) fn contact(&mut self, chaos: &mut Chaos) -> bool {
        let rejected = Version(chaos.odd_32());
        let version = if chaos.percent(5) {
            rejected
        } else {
            let [newest, others @ ..] = Version::ALL;
            chaos.of(newest, &others)
        };
        let vp = if chaos.percent(80) { 0 } else { self.vp(chaos) };
        let floods = if chaos.percent(10) { chaos.below(40) } else { 1 };
        for _ in 0..floods {
            self.hello(5 * BRIEF, version, vp);
        }
        self.until(BRIEF, |wire| wire.contacted);
        self.request_offers(BRIEF)
    }

    fn hello(&mut self, patience: u64, version: Version, vp: u32) -> bool {
        self.contacted = false;
        self.offers = [None; CHANNELS];
        self.connection =
            if version >= Version::V5_0 { MESSAGE_CONNECTION_4 } else { MESSAGE_CONNECTION };
        let mut message = Bytes::new();
        message.u32(MessageKind::InitiateContact.0).u32(0).u32(version.0).u32(vp);
        // The SINT of the messages, and no monitor pages.
        message.u64(2).u64(0).u64(0);
        self.post_within(patience, self.connection, MESSAGE_TYPE, message.get())
    }

    fn request_offers(&mut self, patience: u64) -> bool {
        self.all_offered = false;
        self.post(Header::new(MessageKind::RequestOffers).as_bytes());
        self.until(patience, |wire| wire.all_offered)
    }

    /// Takes leave of the root, whatever was said before. It must answer that.
    pub(super) fn leave(&mut self) -> Result<(), Silence> {
        let deadline = self.platform.now().saturating_add(PATIENCE);
        while self.platform.now() < deadline {
            // A root that has no room is one that is still busy with what was said before.
            if !self.hello(PATIENCE, Version::V5_3, 0)
                || !self.until(PATIENCE, |wire| wire.contacted)
            {
                break;
            }
            self.unloaded = false;
            let leave = Header::new(MessageKind::Unload);
            self.post_within(PATIENCE, self.connection, MESSAGE_TYPE, leave.as_bytes());
            // The contact that was answered may have been one before this; then this one still waits, and
            // the leave was heard by nobody.
            if self.until(PATIENCE / 10, |wire| wire.unloaded) {
                self.offers = [None; CHANNELS];
                return Ok(());
            }
        }
        Err(Silence::Bus)
    }

    /// Lists `pages` under the number `gpadl`; whether the root has taken them.
    pub(super) fn list(
        &mut self,
        chaos: &mut Chaos,
        relid: u32,
        gpadl: u32,
        pages: impl Iterator<Item = u64>,
        count: usize,
    ) -> bool {
        // A right one mostly: an odd one shows little of what comes behind it.
        let odd = chaos.percent(6);
        let percent = if odd { 40 } else { 0 };
        let bytes = 8 + 8 * count as u64;
        let mut message = Bytes::new();
        message.u32(MessageKind::GpadlHeader.0).u32(0);
        message.u32(chaos.or_odd_32(relid, percent)).u32(gpadl);
        message.u16(chaos.or_odd(bytes, percent) as u16);
        message.u16(chaos.or_odd(1, percent / 2) as u16);
        message.u32(chaos.or_odd_32(count as u32 * 4096, percent));
        message.u32(chaos.or_odd_32(0, percent / 2));
        self.created = None;
        let mut pages = pages;
        for page in pages.by_ref().take(26) {
            message.u64(page);
        }
        self.post(message.get());
        let mut left = count.saturating_sub(26);
        while left > 0 {
            let mut body = Bytes::new();
            body.u32(MessageKind::GpadlBody.0).u32(0).u32(chaos.or_odd_32(0, percent / 4));
            body.u32(chaos.or_odd_32(gpadl, percent / 8));
            for page in pages.by_ref().take(28) {
                body.u64(page);
            }
            self.post(body.get());
            left = left.saturating_sub(28);
            if odd && chaos.percent(10) {
                // Taken back before it is all there, or never completed.
                if chaos.percent(50) {
                    self.tear_down(relid, gpadl);
                }
                return false;
            }
        }
        let answered = self.until(BRIEF, |wire| wire.created.is_some());
        answered && self.created.is_some_and(|created| created.status == STATUS_SUCCESS)
    }

    /// Opens a channel; whether the root says that it is open.
    pub(super) fn open(
        &mut self,
        chaos: &mut Chaos,
        relid: u32,
        gpadl: u32,
        downstream: u32,
    ) -> bool {
        let mut message = Bytes::new();
        message.u32(MessageKind::OpenChannel.0).u32(0).u32(chaos.or_odd_32(relid, 1));
        message.u32(chaos.any_32()).u32(chaos.or_odd_32(gpadl, 1)).u32(self.vp(chaos));
        message.u32(chaos.or_odd_32(downstream, 3)).litter(chaos, 15);
        self.opened = None;
        self.post(message.get());
        if chaos.percent(5) {
            self.close(relid);
        }
        // With so much to do at once a worker is not begun in no time.
        self.until(10 * BRIEF, |wire| wire.opened.is_some());
        let opened = self.opened.is_some_and(|opened| opened.status == STATUS_SUCCESS);
        self.counts.channels += u64::from(opened);
        opened
    }

    pub(super) fn close(&mut self, relid: u32) {
        let header = Header::new(MessageKind::CloseChannel);
        self.post(ChannelMessage { header, relid: Relid(relid) }.as_bytes());
    }

    /// Wants pages back, without a wait for the answer.
    pub(super) fn tear_down(&mut self, relid: u32, gpadl: u32) {
        let mut message = Bytes::new();
        message.u32(MessageKind::GpadlTeardown.0).u32(0).u32(relid).u32(gpadl);
        self.post(message.get());
    }

    /// Waits a little for pages that were wanted back.
    pub(super) fn await_teardown(&mut self) {
        let before = self.torn_down;
        self.until(BRIEF, |wire| wire.torn_down != before);
    }

    /// A message, or a flood of them, that nobody expects.
    pub(super) fn babble(&mut self, chaos: &mut Chaos, arena: &Arena<'_>) {
        // A hello or a leave ends what all others are about.
        let kinds = if chaos.percent(10) {
            [14, 16, 14, 16, 14, 16, 14, 16, 14, 16, 14]
        } else {
            [3, 5, 7, 8, 9, 11, 13, 19, 21, 22, 23]
        };
        let kind = chaos.of(22, &kinds);
        let kind = chaos.or_odd_32(kind, 10);
        let mut message = Bytes::new();
        message.u32(kind).u32(chaos.or_odd_32(0, 10));
        let relid = self.any_offer(chaos).map_or(1, |offer| offer.relid);
        message.u32(chaos.or_odd_32(relid, 20));
        while chaos.percent(85) && message.get().len() < MAX_MESSAGE - 8 {
            let page = arena.page(chaos);
            let odd = chaos.odd();
            message.u64(chaos.of(0, &[page, odd, relid.into()]));
        }
        let len = message.get().len();
        let len = if chaos.percent(20) { chaos.count(len) } else { len };
        let message = message.get().get(..len).unwrap_or_default();
        if chaos.percent(10) {
            let connection = chaos.or_odd_32(self.connection, 50);
            let kind = chaos.or_odd_32(MESSAGE_TYPE, 30);
            self.post_to(connection, kind, message);
        } else if chaos.percent(30) {
            let count = chaos.below(400);
            self.flood(message, count);
        } else {
            self.post(message);
        }
    }
}
