//! What a guest and its NIC say to each other, as a plain state machine: RNDIS control messages in,
//! answers out. What they talk about are [`Objects`].
//!
//! The message is in private memory when it comes here. Every request gets its answer, whatever
//! is wrong with it: guests wait for answers without an end, holding locks.

use vmbus::rndis::{
    HEADER_SIZE, Header, Indicate, Initialize, InitializeComplete, MessageKind, ObjectRequest, Oid,
    QueryComplete, Request, RequestComplete, ResetComplete, Status,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::objects::{Objects, Settings, Statistics, slice};

/// The longest control message that is looked at, in bytes; the longest Linux sends has 608.
pub(super) const MAX_MESSAGE: usize = 2048;

/// The most frames in one packet of the guest, and the longest packet. Linux packs frames into
/// sections of the send buffer only.
pub(super) const MAX_PACKETS: u32 = 8;
const MAX_TRANSFER: u32 = 0x4_0000;
/// Frames begin at multiples of eight bytes.
const ALIGNMENT: u32 = 3;

/// One NIC's conversation with its guest.
#[derive(Debug)]
pub(super) struct Control {
    objects: Objects,
    initialized: bool,
}

impl Control {
    pub(super) fn new(objects: Objects) -> Self {
        Self { objects, initialized: false }
    }

    /// What the guest has set.
    pub(super) fn settings(&self) -> &Settings {
        self.objects.settings()
    }

    /// Tells what has passed so far, for queries.
    pub(super) fn set_statistics(&mut self, statistics: Statistics) {
        self.objects.set_statistics(statistics);
    }

    /// The cable was plugged in or pulled out. Returns the message that tells the guest, unless it
    /// knows, or will ask when it begins.
    pub(super) fn set_link(&mut self, up: bool) -> Option<Vec<u8>> {
        let changed = self.objects.set_link(up);
        let status = if up { Status::MediaConnect } else { Status::MediaDisconnect };
        (changed && self.initialized)
            .then(|| message(MessageKind::Indicate, &Indicate { status, len: 0, offset: 0 }, &[]))
    }

    /// The guest takes no frames in several slots.
    pub(super) fn forbid_coalescing(&mut self) {
        self.objects.forbid_coalescing();
    }

    /// Takes a message. Returns the answer; a HALT has none, and what is no request neither.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, _) = Header::read_from_prefix(bytes).ok()?;
        let body = bytes.get(HEADER_SIZE..usize::try_from(header.len).ok()?)?;
        match header.kind {
            MessageKind::Initialize => {
                let (request, _) = Initialize::read_from_prefix(body).ok()?;
                self.initialized = true;
                let complete = InitializeComplete {
                    id: request.id,
                    status: Status::Success.0,
                    major: 1,
                    minor: 0,
                    device_flags: 1,
                    medium: 0,
                    max_packets: MAX_PACKETS,
                    max_transfer: MAX_TRANSFER,
                    alignment: ALIGNMENT,
                    families: [0; 2],
                };
                Some(message(MessageKind::InitializeComplete, &complete, &[]))
            }
            MessageKind::Halt => {
                self.objects.reset();
                self.initialized = false;
                None
            }
            MessageKind::Reset => {
                self.objects.reset();
                let complete = ResetComplete { status: Status::Success, addressing_reset: 1 };
                Some(message(MessageKind::ResetComplete, &complete, &[]))
            }
            MessageKind::KeepAlive => {
                let (request, _) = Request::read_from_prefix(body).ok()?;
                let complete = RequestComplete { id: request.id, status: Status::Success };
                Some(message(MessageKind::KeepAliveComplete, &complete, &[]))
            }
            MessageKind::Query => {
                let (request, _) = Request::read_from_prefix(body).ok()?;
                let value =
                    self.value(body).and_then(|(oid, given)| self.objects.query(oid, given));
                let (status, value) = match value {
                    Ok(value) => (Status::Success, value),
                    Err(status) => (status, Vec::new()),
                };
                let offset = if value.is_empty() { 0 } else { size_of::<QueryComplete>() as u32 };
                let len = value.len() as u32;
                let complete = QueryComplete { id: request.id, status, len, offset };
                Some(message(MessageKind::QueryComplete, &complete, &value))
            }
            MessageKind::Set => {
                let (request, _) = Request::read_from_prefix(body).ok()?;
                let result = self.value(body).and_then(|(oid, value)| self.objects.set(oid, value));
                let status = result.err().unwrap_or(Status::Success);
                let complete = RequestComplete { id: request.id, status };
                Some(message(MessageKind::SetComplete, &complete, &[]))
            }
            _ => None,
        }
    }

    /// What a query or set names, and the value that came with it.
    fn value<'b>(&self, body: &'b [u8]) -> Result<(Oid, &'b [u8]), Status> {
        if !self.initialized {
            return Err(Status::Failure);
        }
        let (request, _) =
            ObjectRequest::read_from_prefix(body).map_err(|_| Status::InvalidLength)?;
        let value = if request.len == 0 {
            Some([].as_slice())
        } else {
            slice(body, request.offset, request.len)
        };
        Ok((request.oid, value.ok_or(Status::InvalidLength)?))
    }
}

/// A message with this body, and what follows it.
fn message<T: IntoBytes + Immutable>(kind: MessageKind, body: &T, rest: &[u8]) -> Vec<u8> {
    let len = (HEADER_SIZE + size_of::<T>() + rest.len()) as u32;
    [Header { kind, len }.as_bytes(), body.as_bytes(), rest].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netvsp::objects::tests::objects;

    fn control() -> Control {
        Control::new(objects())
    }

    fn ready() -> Control {
        let mut control = control();
        let request = Initialize { id: 1, major: 1, minor: 0, max_transfer: 0x4000 };
        let answer = control.take(&message(MessageKind::Initialize, &request, &[])).unwrap();
        let complete = InitializeComplete::read_from_bytes(&answer[8..]).unwrap();
        assert_eq!((complete.id, complete.status, complete.alignment), (1, 0, 3));
        control
    }

    fn request(oid: Oid, value: &[u8]) -> ObjectRequest {
        ObjectRequest { id: 9, oid, len: value.len() as u32, offset: 20, vc_handle: 0 }
    }

    fn query(control: &mut Control, oid: Oid, given: &[u8]) -> (Status, Vec<u8>) {
        let asked = message(MessageKind::Query, &request(oid, given), given);
        let answer = control.take(&asked).unwrap();
        let (header, body) = Header::read_from_prefix(&answer).unwrap();
        assert_eq!((header.kind, header.len as usize), (MessageKind::QueryComplete, answer.len()));
        let (complete, rest) = QueryComplete::read_from_prefix(body).unwrap();
        assert_eq!((complete.id, complete.len as usize), (9, rest.len()));
        (complete.status, rest.to_vec())
    }

    fn set(control: &mut Control, oid: Oid, value: &[u8]) -> Status {
        let asked = message(MessageKind::Set, &request(oid, value), value);
        let answer = control.take(&asked).unwrap();
        let (complete, rest) = RequestComplete::read_from_prefix(&answer[8..]).unwrap();
        assert_eq!((complete.id, rest.len()), (9, 0));
        complete.status
    }

    #[test]
    fn the_link_is_told_of_once() {
        let mut control = control();
        assert_eq!(control.set_link(false), None);
        let mut control = ready();
        assert_eq!(control.set_link(true), None);
        let down = control.set_link(false).unwrap();
        assert_eq!(down[8..12], 0x4001_000Cu32.to_le_bytes());
        assert_eq!(control.set_link(false), None);
        let up = control.set_link(true).unwrap();
        assert_eq!((up.len(), &up[8..12]), (20, 0x4001_000Bu32.to_le_bytes().as_slice()));
    }

    #[test]
    fn life_and_death() {
        let mut control = control();
        assert_eq!(query(&mut control, Oid::PermanentAddress, &[]).0, Status::Failure);
        let mut control = ready();
        let keep = message(MessageKind::KeepAlive, &Request { id: 5 }, &[]);
        let answer = control.take(&keep).unwrap();
        assert_eq!(answer[..16], [8, 0, 0, 0x80, 16, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        set(&mut control, Oid::CurrentPacketFilter, &[0xD, 0, 0, 0]);
        let reset = message(MessageKind::Reset, &Request { id: 0 }, &[]);
        assert_eq!(control.take(&reset).unwrap()[8..], [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(control.settings().filter.0, 0);
        let halt = message(MessageKind::Halt, &Request { id: 0 }, &[]);
        assert_eq!(control.take(&halt), None);
        assert_eq!(query(&mut control, Oid::PermanentAddress, &[]).0, Status::Failure);
    }

    #[test]
    fn wild_lengths_are_refused() {
        let mut control = ready();
        // Shorter than it says it is, or than a header.
        assert_eq!(control.take(&[4, 0, 0, 0, 200, 0, 0, 0]), None);
        assert_eq!(control.take(&[4, 0, 0, 0, 4, 0, 0, 0]), None);
        assert_eq!(control.take(&[4, 0, 0]), None);
        for (offset, len) in [(u32::MAX, 4), (20, u32::MAX), (24, 1), (u32::MAX, u32::MAX)] {
            let request = ObjectRequest { id: 9, oid: Oid::LinkSpeed, len, offset, vc_handle: 0 };
            let asked = message(MessageKind::Query, &request, &[0; 4]);
            let answer = control.take(&asked).unwrap();
            let (complete, _) = QueryComplete::read_from_prefix(&answer[8..]).unwrap();
            assert_eq!(complete.status, Status::InvalidLength);
        }
    }
}
