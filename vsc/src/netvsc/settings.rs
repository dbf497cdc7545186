//! What the NIC is asked and told on its first channel: RNDIS requests, one at a time, each with its
//! answer.

use vmbus::mapped::RingMemory;
use vmbus::rndis::{
    self, ChecksumOffload, Initialize, InitializeComplete, LargeSendOffload, OBJECT_OFFLOAD,
    ObjectHeader, ObjectRequest, Oid, PacketFilter,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::control::{Answer, Question};
use super::sends::Limits;
use super::{Event, Fault, Queue, RequestError, SendError};
use crate::{Doorbell, SharedBuffer};

/// The longest message that the host may send us, which it is told.
const MAX_TRANSFER: u32 = 0x4000;

impl<M: RingMemory, D: Doorbell, B: SharedBuffer, const DEPTH: usize> Queue<M, D, B, DEPTH> {
    /// Begins RNDIS. Returns what the host takes.
    pub(super) fn initialize(
        &mut self,
        before: Limits,
        wait: &mut impl FnMut() -> bool,
    ) -> Result<Limits, Fault> {
        let body = |id| Initialize { id, major: 1, minor: 0, max_transfer: MAX_TRANSFER };
        let question = self.control.ask(rndis::MessageKind::Initialize, body, &[]);
        let question = question.ok_or(Fault::Limits)?;
        let Answer::Initialized(answer) = self.run(&question, |_| {}, wait)? else {
            return Err(Fault::Limits);
        };
        let InitializeComplete { status, max_packets, max_transfer, alignment, .. } = answer;
        if status != rndis::Status::Success.0 {
            return Err(Fault::Rndis(status));
        }
        // A page is the most that anything is aligned to.
        if max_packets == 0 || max_transfer < 2048 || alignment > 12 {
            return Err(Fault::Limits);
        }
        let alignment = 1 << alignment;
        Ok(Limits { frames: max_packets, bytes: max_transfer as usize, alignment, ..before })
    }

    /// Says which frames are wanted: none at first. As all that sets or asks, on the first channel
    /// only; what comes meanwhile is shown to `event`, and `wait` is as of [`Queue::connect`].
    pub fn set_filter(
        &mut self,
        filter: PacketFilter,
        event: impl FnMut(Event<'_, B>),
        wait: impl FnMut() -> bool,
    ) -> Result<(), RequestError> {
        self.set(Oid::CurrentPacketFilter, filter.as_bytes(), event, wait)
    }

    /// Changes a setting.
    pub fn set(
        &mut self,
        oid: Oid,
        value: &[u8],
        event: impl FnMut(Event<'_, B>),
        mut wait: impl FnMut() -> bool,
    ) -> Result<(), RequestError> {
        let question = self.control.ask(rndis::MessageKind::Set, request(oid, value), value);
        let question = question.ok_or(RequestError::Length(value.len()))?;
        match self.run(&question, event, &mut wait)? {
            Answer::Done(rndis::Status::Success) => Ok(()),
            Answer::Done(status) => Err(RequestError::Refused(status)),
            _ => Err(Fault::Rndis(rndis::MessageKind::SetComplete.0).into()),
        }
    }

    /// Reads a setting into `value`. Returns its length.
    pub fn query(
        &mut self,
        oid: Oid,
        value: &mut [u8],
        event: impl FnMut(Event<'_, B>),
        mut wait: impl FnMut() -> bool,
    ) -> Result<usize, RequestError> {
        self.query_with(oid, &[], value, event, &mut wait)
    }

    /// The same with something that goes along with the question.
    fn query_with(
        &mut self,
        oid: Oid,
        given: &[u8],
        value: &mut [u8],
        event: impl FnMut(Event<'_, B>),
        wait: &mut impl FnMut() -> bool,
    ) -> Result<usize, RequestError> {
        let question = self.control.ask(rndis::MessageKind::Query, request(oid, given), given);
        let question = question.ok_or(RequestError::Length(given.len()))?;
        match self.run(&question, event, wait)? {
            Answer::Queried(rndis::Status::Success, len) => {
                let to = value.get_mut(..len).ok_or(RequestError::Length(len))?;
                to.copy_from_slice(self.control.value(len));
                Ok(len)
            }
            Answer::Queried(status, _) => Err(RequestError::Refused(status)),
            _ => Err(Fault::Rndis(rndis::MessageKind::QueryComplete.0).into()),
        }
    }

    /// A setting without which there is no use, of exactly this length.
    pub(super) fn object(
        &mut self,
        oid: Oid,
        value: &mut [u8],
        wait: &mut impl FnMut() -> bool,
    ) -> Result<(), Fault> {
        match self.query_with(oid, &[], value, |_| {}, wait) {
            Ok(len) if len == value.len() => Ok(()),
            Ok(_) | Err(RequestError::Length(_)) => Err(Fault::Lengths),
            Err(RequestError::Refused(status)) => {
                Err(Fault::Object { oid: oid.0, status: status.0 })
            }
            Err(RequestError::Fault(fault)) => Err(fault),
        }
    }

    pub(super) fn number(
        &mut self,
        oid: Oid,
        wait: &mut impl FnMut() -> bool,
    ) -> Result<u32, Fault> {
        let mut value = [0; 4];
        self.object(oid, &mut value, wait)?;
        Ok(u32::from_le_bytes(value))
    }

    /// What can be left to the host; nothing, if it does not say.
    pub(super) fn offloads(
        &mut self,
        wait: &mut impl FnMut() -> bool,
    ) -> Result<(ChecksumOffload, LargeSendOffload), Fault> {
        let mut asked = rndis::Offload::new_zeroed();
        let size = rndis::Offload::SIZE_3;
        asked.header = ObjectHeader { kind: OBJECT_OFFLOAD, revision: 3, size: size as u16 };
        let mut value = [0; size_of::<rndis::Offload>()];
        let oid = Oid::OffloadHardwareCapabilities;
        let len = match self.query_with(oid, asked.as_bytes(), &mut value, |_| {}, wait) {
            Ok(len) => len,
            Err(RequestError::Fault(fault)) => return Err(fault),
            Err(_) => 0,
        };
        // An older host says less, and what it does not say is zero.
        if len < rndis::Offload::SIZE_1 {
            return Ok(Default::default());
        }
        let offload = rndis::Offload::read_from_bytes(&value).map_err(|_| Fault::Lengths)?;
        Ok((offload.checksum, offload.large_send_v2))
    }

    /// Asks, and waits for the answer.
    pub(super) fn run(
        &mut self,
        question: &Question,
        mut event: impl FnMut(Event<'_, B>),
        wait: &mut impl FnMut() -> bool,
    ) -> Result<Answer, Fault> {
        self.tell(question, &mut event, wait)?;
        loop {
            if let Some(answer) = self.control.answer() {
                self.publish();
                return Ok(answer);
            }
            self.pause(wait)?;
            self.poll(&mut event)?;
        }
    }

    /// Sends a control message as soon as there is room for it.
    pub(super) fn tell(
        &mut self,
        question: &Question,
        event: &mut impl FnMut(Event<'_, B>),
        wait: &mut impl FnMut() -> bool,
    ) -> Result<(), Fault> {
        if self.dead {
            return Err(Fault::Dead);
        }
        loop {
            match self.sends.put_control(&mut self.channel, question.bytes()) {
                Ok(()) => {
                    self.publish();
                    return Ok(());
                }
                Err(SendError::Fault(fault)) => {
                    self.dead = true;
                    return Err(fault);
                }
                Err(SendError::Full) => {}
                Err(_) => return Err(Fault::Limits),
            }
            self.pause(wait)?;
            self.poll(&mut *event)?;
        }
    }
}

/// The body of a query or a set, which the value follows.
fn request(oid: Oid, value: &[u8]) -> impl FnOnce(u32) -> ObjectRequest {
    let len = value.len() as u32;
    let offset = if len > 0 { size_of::<ObjectRequest>() as u32 } else { 0 };
    move |id| ObjectRequest { id, oid, len, offset, vc_handle: 0 }
}
