//! The client's messages: those it posts are put together here, those it gets taken apart.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{ConnectionError, Contact, HvStatus, Hypercalls};
use crate::protocol::{
    ChannelMessage, GpaRange, GpadlBody, GpadlCreated, GpadlHeader, GpadlId, GpadlTeardown,
    GpadlTorndown, Header, InitiateContact, MAX_MESSAGE, MESSAGE_CONNECTION, MESSAGE_CONNECTION_4,
    MESSAGE_TYPE, MessageKind, OfferChannel, OpenChannel, OpenResult, Relid, USER_DATA, Version,
    VersionResponse,
};

/// The most pages in one GPADL: its bytes, the range's own eight included, are counted in 16 bits.
pub const MAX_GPADL_PAGES: usize = (u16::MAX as usize - size_of::<GpaRange>()) / 8;

/// Page numbers that fit behind a [`GpadlHeader`].
const PAGES_IN_HEADER: usize = (MAX_MESSAGE - size_of::<GpadlHeader>()) / 8;
/// Page numbers that fit behind a [`GpadlBody`].
const PAGES_IN_BODY: usize = (MAX_MESSAGE - size_of::<GpadlBody>()) / 8;

const _: () = assert!(PAGES_IN_HEADER == 26 && PAGES_IN_BODY == 28);

/// How often a message is posted before the root is given up, as in Linux.
const ATTEMPTS: u32 = 100;

/// A message of the root.
#[derive(Clone, Copy, Debug)]
pub(super) enum Incoming {
    Offer(OfferChannel),
    Rescind(Relid),
    AllOffers,
    OpenResult(OpenResult),
    GpadlCreated(GpadlCreated),
    GpadlTornDown(GpadlId),
    Version(VersionResponse),
    UnloadResponse,
}

impl Incoming {
    pub(super) fn parse(payload: &[u8]) -> Result<Self, ConnectionError> {
        let Header { kind, .. } = read(payload, 0)?;
        Ok(match kind {
            MessageKind::OfferChannel => Self::Offer(read(payload, kind.0)?),
            MessageKind::RescindOffer => {
                Self::Rescind(read::<ChannelMessage>(payload, kind.0)?.relid)
            }
            MessageKind::AllOffersDelivered => Self::AllOffers,
            MessageKind::OpenResult => Self::OpenResult(read(payload, kind.0)?),
            MessageKind::GpadlCreated => Self::GpadlCreated(read(payload, kind.0)?),
            MessageKind::GpadlTorndown => {
                Self::GpadlTornDown(read::<GpadlTorndown>(payload, kind.0)?.gpadl)
            }
            MessageKind::VersionResponse => Self::Version(read(payload, kind.0)?),
            MessageKind::UnloadResponse => Self::UnloadResponse,
            _ => return Err(ConnectionError::Unexpected(kind.0)),
        })
    }

    fn kind(&self) -> MessageKind {
        match self {
            Self::Offer(_) => MessageKind::OfferChannel,
            Self::Rescind(_) => MessageKind::RescindOffer,
            Self::AllOffers => MessageKind::AllOffersDelivered,
            Self::OpenResult(_) => MessageKind::OpenResult,
            Self::GpadlCreated(_) => MessageKind::GpadlCreated,
            Self::GpadlTornDown(_) => MessageKind::GpadlTorndown,
            Self::Version(_) => MessageKind::VersionResponse,
            Self::UnloadResponse => MessageKind::UnloadResponse,
        }
    }

    /// What it means that this message comes now.
    pub(super) fn unexpected(self) -> ConnectionError {
        ConnectionError::Unexpected(self.kind().0)
    }
}

fn read<T: FromBytes>(payload: &[u8], kind: u32) -> Result<T, ConnectionError> {
    T::read_from_prefix(payload)
        .map(|(message, _)| message)
        .map_err(|_| ConnectionError::Short(kind))
}

/// Posts until the root has taken the message, or refuses it for good.
fn post(
    bus: &mut impl Hypercalls,
    connection: u32,
    payload: &[u8],
    may_be_unknown: bool,
) -> Result<(), HvStatus> {
    let mut attempt = 0;
    loop {
        match bus.post_message(connection, MESSAGE_TYPE, payload) {
            HvStatus::SUCCESS => return Ok(()),
            // Linux tries these again, the last one because a host may be slow to make the port.
            status @ (HvStatus::INSUFFICIENT_MEMORY | HvStatus::INSUFFICIENT_BUFFERS)
                if attempt == ATTEMPTS =>
            {
                return Err(status);
            }
            HvStatus::INSUFFICIENT_MEMORY | HvStatus::INSUFFICIENT_BUFFERS => {}
            HvStatus::INVALID_CONNECTION_ID if !may_be_unknown && attempt < ATTEMPTS => {}
            status => return Err(status),
        }
        attempt += 1;
        bus.pause(attempt);
    }
}

fn post_struct<T: IntoBytes + Immutable>(
    bus: &mut impl Hypercalls,
    connection: u32,
    message: &T,
) -> Result<(), HvStatus> {
    const { assert!(size_of::<T>() <= MAX_MESSAGE) };
    post(bus, connection, message.as_bytes(), false)
}

pub(super) fn post_contact(
    bus: &mut impl Hypercalls,
    contact: &Contact,
    version: Version,
) -> Result<(), HvStatus> {
    let newer = version >= Version::V5_0;
    let message = InitiateContact {
        header: Header::new(MessageKind::InitiateContact),
        version,
        target_vp: contact.vp,
        interrupt: if newer { u64::from(contact.sint) } else { 0 },
        monitor_pages: contact.monitor_pages,
    };
    let connection = if newer { MESSAGE_CONNECTION_4 } else { MESSAGE_CONNECTION };
    post(bus, connection, message.as_bytes(), true)
}

pub(super) fn post_header(
    bus: &mut impl Hypercalls,
    connection: u32,
    kind: MessageKind,
) -> Result<(), HvStatus> {
    post_struct(bus, connection, &Header::new(kind))
}

pub(super) fn post_relid(
    bus: &mut impl Hypercalls,
    connection: u32,
    kind: MessageKind,
    relid: Relid,
) -> Result<(), HvStatus> {
    post_struct(bus, connection, &ChannelMessage { header: Header::new(kind), relid })
}

pub(super) fn post_teardown(
    bus: &mut impl Hypercalls,
    connection: u32,
    relid: Relid,
    gpadl: GpadlId,
) -> Result<(), HvStatus> {
    let header = Header::new(MessageKind::GpadlTeardown);
    post_struct(bus, connection, &GpadlTeardown { header, relid, gpadl })
}

/// `place` is the VP to interrupt and the page at which the ring from the root begins.
pub(super) fn post_open(
    bus: &mut impl Hypercalls,
    connection: u32,
    relid: Relid,
    open_id: u32,
    ring: GpadlId,
    place: (u32, u32),
    user_data: &[u8; USER_DATA],
) -> Result<(), HvStatus> {
    let message = OpenChannel {
        header: Header::new(MessageKind::OpenChannel),
        relid,
        open_id,
        ring,
        target_vp: place.0,
        downstream_page: place.1,
        user_data: *user_data,
    };
    post_struct(bus, connection, &message)
}

/// Posts a list of at most [`MAX_GPADL_PAGES`] pages, in as many messages as it takes.
pub(super) fn post_gpadl(
    bus: &mut impl Hypercalls,
    connection: u32,
    relid: Relid,
    gpadl: GpadlId,
    mut pages: impl ExactSizeIterator<Item = u64>,
) -> Result<(), HvStatus> {
    let count = pages.len();
    let bytes = size_of::<GpaRange>() + count * 8;
    let header = GpadlHeader {
        header: Header::new(MessageKind::GpadlHeader),
        relid,
        gpadl,
        range_bytes: u16::try_from(bytes).unwrap_or(u16::MAX),
        range_count: 1,
        range: GpaRange { len: u32::try_from(count * 4096).unwrap_or(u32::MAX), offset: 0 },
    };
    let body = GpadlBody { header: Header::new(MessageKind::GpadlBody), message_number: 0, gpadl };

    let mut front = header.as_bytes();
    let mut room = PAGES_IN_HEADER;
    loop {
        let mut message = [0; MAX_MESSAGE];
        let mut len = front.len();
        if let Some(to) = message.get_mut(..len) {
            to.copy_from_slice(front);
        }
        for page in pages.by_ref().take(room) {
            if let Some(to) = message.get_mut(len..len + 8) {
                to.copy_from_slice(&page.to_le_bytes());
                len += 8;
            }
        }
        post(bus, connection, message.get(..len).unwrap_or_default(), false)?;
        if pages.len() == 0 {
            return Ok(());
        }
        front = body.as_bytes();
        room = PAGES_IN_BODY;
    }
}
