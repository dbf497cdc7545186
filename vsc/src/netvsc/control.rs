//! Questions to the NIC and its answers, as a plain state machine: one question at a time.

use vmbus::rndis::{
    HEADER_SIZE, Header, Indicate, InitializeComplete, MessageKind, QueryComplete, Request,
    RequestComplete, Status,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Fault;

/// The longest question: receive scale parameters, with a table of 128 entries and a key.
const MAX_QUESTION: usize = 640;

/// The longest answer, or indication.
pub(super) const MAX_ANSWER: usize = 1024;

/// A control message to send.
pub(super) struct Question {
    bytes: [u8; MAX_QUESTION],
    len: usize,
}

impl Question {
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// What the NIC has answered.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Initialized(InitializeComplete),
    /// How a query went, and the bytes of its value, which [`Control::value`] has.
    Queried(Status, usize),
    /// How something else went.
    Done(Status),
}

#[derive(Clone, Copy, Debug)]
enum State {
    Idle,
    /// The answer's id and kind.
    Waiting(u32, MessageKind),
    Answered(Answer),
}

#[derive(Debug)]
pub(super) struct Control {
    state: State,
    last_id: u32,
    link_up: bool,
    value: [u8; MAX_ANSWER],
}

impl Control {
    pub(super) fn new() -> Self {
        Self { state: State::Idle, last_id: 0, link_up: false, value: [0; MAX_ANSWER] }
    }

    /// Whether the link is up, by the last that was heard of it.
    pub(super) fn is_link_up(&self) -> bool {
        self.link_up
    }

    pub(super) fn set_link(&mut self, up: bool) {
        self.link_up = up;
    }

    /// Asks. The body is made with the question's id; `None` if it is too long.
    pub(super) fn ask<T: IntoBytes + Immutable>(
        &mut self,
        kind: MessageKind,
        body: impl FnOnce(u32) -> T,
        value: &[u8],
    ) -> Option<Question> {
        self.last_id = self.last_id.wrapping_add(1);
        let body = body(self.last_id);
        let mut question = Question { bytes: [0; _], len: 0 };
        let len = HEADER_SIZE.checked_add(size_of::<T>())?.checked_add(value.len())?;
        let to = question.bytes.get_mut(..len)?;
        let header = Header { kind, len: u32::try_from(len).ok()? };
        let parts = header.as_bytes().iter().chain(body.as_bytes()).chain(value);
        for (to, from) in to.iter_mut().zip(parts) {
            *to = *from;
        }
        question.len = len;
        // The NIC says nothing to a HALT.
        self.state = match kind {
            MessageKind::Halt => State::Idle,
            kind => State::Waiting(self.last_id, MessageKind(kind.0 | COMPLETE)),
        };
        Some(question)
    }

    /// The answer, if it has come.
    pub(super) fn answer(&mut self) -> Option<Answer> {
        let State::Answered(answer) = self.state else { return None };
        self.state = State::Idle;
        Some(answer)
    }

    /// The value of the last query that was answered.
    pub(super) fn value(&self, len: usize) -> &[u8] {
        self.value.get(..len).unwrap_or_default()
    }

    /// Takes a message that is no frame. Returns whether the link is up, if it changed.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Option<bool>, Fault> {
        let (header, body) = Header::read_from_prefix(bytes).map_err(|_| Fault::Lengths)?;
        if header.kind == MessageKind::Indicate {
            let (indicate, _) = Indicate::read_from_prefix(body).map_err(|_| Fault::Lengths)?;
            let up = match indicate.status {
                Status::MediaConnect => true,
                Status::MediaDisconnect => false,
                _ => return Ok(None),
            };
            let changed = core::mem::replace(&mut self.link_up, up) != up;
            return Ok(changed.then_some(up));
        }
        let State::Waiting(id, kind) = self.state else { return Err(Fault::Rndis(header.kind.0)) };
        let (Request { id: given }, _) =
            Request::read_from_prefix(body).map_err(|_| Fault::Lengths)?;
        if (header.kind, given) != (kind, id) {
            return Err(Fault::Rndis(header.kind.0));
        }
        self.state = State::Answered(self.read(kind, body)?);
        Ok(None)
    }

    fn read(&mut self, kind: MessageKind, body: &[u8]) -> Result<Answer, Fault> {
        match kind {
            MessageKind::InitializeComplete => {
                let (complete, _) =
                    InitializeComplete::read_from_prefix(body).map_err(|_| Fault::Lengths)?;
                Ok(Answer::Initialized(complete))
            }
            MessageKind::QueryComplete => {
                let (complete, _) =
                    QueryComplete::read_from_prefix(body).map_err(|_| Fault::Lengths)?;
                let value = match complete.len {
                    0 => Some([].as_slice()),
                    len => (complete.offset as usize)
                        .checked_add(len as usize)
                        .and_then(|end| body.get(complete.offset as usize..end)),
                };
                let value = value.ok_or(Fault::Lengths)?;
                let to = self.value.get_mut(..value.len()).ok_or(Fault::Lengths)?;
                to.copy_from_slice(value);
                Ok(Answer::Queried(complete.status, value.len()))
            }
            _ => {
                let (complete, _) =
                    RequestComplete::read_from_prefix(body).map_err(|_| Fault::Lengths)?;
                Ok(Answer::Done(complete.status))
            }
        }
    }
}

/// In a message's kind: that it is an answer (`RNDIS_MSG_COMPLETION`).
const COMPLETE: u32 = 0x8000_0000;

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use vmbus::rndis::{ObjectRequest, Oid};

    use super::*;

    fn message<T: IntoBytes + Immutable>(kind: MessageKind, body: &T, rest: &[u8]) -> Vec<u8> {
        let len = (HEADER_SIZE + size_of::<T>() + rest.len()) as u32;
        [Header { kind, len }.as_bytes(), body.as_bytes(), rest].concat()
    }

    fn asking() -> (Control, u32) {
        let mut control = Control::new();
        let query = |id| ObjectRequest { id, oid: Oid::LinkSpeed, len: 0, offset: 0, vc_handle: 0 };
        let question = control.ask(MessageKind::Query, query, &[]).unwrap();
        assert_eq!(question.bytes()[..8], [4, 0, 0, 0, 28, 0, 0, 0]);
        let id = u32::from_le_bytes(*question.bytes()[8..].first_chunk().unwrap());
        (control, id)
    }

    fn complete(id: u32, len: u32, offset: u32, value: &[u8]) -> Vec<u8> {
        let complete = QueryComplete { id, status: Status::Success, len, offset };
        message(MessageKind::QueryComplete, &complete, value)
    }

    #[test]
    fn an_answer_is_to_its_question() {
        let (mut control, id) = asking();
        assert!(control.answer().is_none());
        assert_eq!(control.take(&complete(id, 4, 16, &[1, 2, 3, 4])), Ok(None));
        assert!(matches!(control.answer(), Some(Answer::Queried(Status::Success, 4))));
        assert_eq!(control.value(4), [1, 2, 3, 4]);
        assert!(control.answer().is_none());
        // Once.
        let again = control.take(&complete(id, 4, 16, &[1, 2, 3, 4]));
        assert_eq!(again, Err(Fault::Rndis(MessageKind::QueryComplete.0)));
    }

    #[test]
    fn answers_that_lie() {
        for (len, offset) in [(5, 16), (4, 17), (u32::MAX, 16), (4, u32::MAX), (u32::MAX, u32::MAX)]
        {
            let (mut control, id) = asking();
            let lie = control.take(&complete(id, len, offset, &[1, 2, 3, 4]));
            assert_eq!(lie, Err(Fault::Lengths), "{len} {offset}");
        }
        let (mut control, id) = asking();
        let other = control.take(&complete(id + 1, 0, 0, &[]));
        assert_eq!(other, Err(Fault::Rndis(MessageKind::QueryComplete.0)));
        let done = RequestComplete { id, status: Status::Success };
        let other = control.take(&message(MessageKind::SetComplete, &done, &[]));
        assert_eq!(other, Err(Fault::Rndis(MessageKind::SetComplete.0)));
        let long = control.take(&complete(id, 2000, 16, &[0; 2000]));
        assert_eq!(long, Err(Fault::Lengths));
        assert_eq!(control.take(&[4, 0, 0]), Err(Fault::Lengths));
    }

    #[test]
    fn the_link_is_told_of_when_it_changes() {
        let mut control = Control::new();
        let mut indicate = |status| {
            let indicate = Indicate { status, len: 0, offset: 0 };
            control.take(&message(MessageKind::Indicate, &indicate, &[]))
        };
        assert_eq!(indicate(Status::MediaDisconnect), Ok(None));
        assert_eq!(indicate(Status::MediaConnect), Ok(Some(true)));
        assert_eq!(indicate(Status::LinkSpeedChange), Ok(None));
        assert_eq!(indicate(Status::MediaConnect), Ok(None));
        assert_eq!(indicate(Status::MediaDisconnect), Ok(Some(false)));
    }
}
