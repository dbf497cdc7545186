//! The one queue of a stream.
//!
//! `unsafe` hands the kernel addresses: of guest memory, which the caller of [`Queue::send`] vouches
//! for, and of the queue's own memory, which stays where it is until the kernel is done with it.
//! What has come is copied into buffers that the caller of [`Queue::offer`] vouches for.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use io_uring::opcode;

use super::Shared;
use crate::net::pieces::{Cursor, Offers};
use crate::net::{
    Buffer, Completion, Completions, Counters, Dropped, ETHERNET_HEADER, Frame, MAX_FRAME, Offload,
    Offloads, Queue, QueueConfig,
};
use crate::uring::{Cqe, Remains, Tag, Target, Token, Uring};

/// In front of every frame: its length.
const PREFIX: usize = 4;

/// What can be received before any of it is passed on: some of the longest frames.
const INBOUND: usize = 256 << 10;

/// Pieces of memory in one `sendmsg` (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// The shortest frame on an Ethernet, to which shorter ones are padded, without check sequence.
const SHORTEST: usize = 60;

/// Which of the queue's operations a completion is of.
const SEND: u64 = 0;
const RECEIVE: u64 = 1;
const CANCEL: u64 = 2;

/// Where a stream is within frames, each way: what one queue leaves to the next.
#[derive(Debug)]
pub(super) struct Middle {
    inbound: Inbound,
    /// The rest of a frame of which a part has been sent. The other side waits for it.
    begun: Vec<u8>,
}

impl Middle {
    pub(super) fn new() -> Self {
        Self { inbound: Inbound::new(), begun: Vec::new() }
    }
}

/// What was received: bytes that hold frames one after the other, perhaps the last in part.
struct Inbound {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl fmt::Debug for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbound")
            .field("start", &self.start)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

/// The other side has sent a length that no frame has.
#[derive(Debug, PartialEq, Eq)]
struct Broken;

impl Inbound {
    fn new() -> Self {
        Self { bytes: vec![0; INBOUND].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Where the next whole frame is, behind its length.
    fn frame(&self) -> Result<Option<(usize, usize)>, Broken> {
        let held = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((prefix, rest)) = held.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix) as usize;
        if !(1..=MAX_FRAME).contains(&len) {
            return Err(Broken);
        }
        Ok((rest.len() >= len).then_some((self.start + PREFIX, len)))
    }

    /// The frame at hand has been passed on.
    fn pass(&mut self, len: usize) {
        self.start = (self.start + PREFIX + len).min(self.end);
    }

    /// Room for more, behind what is held. What is left of a frame is moved to the front if there
    /// is not enough for the longest.
    fn room(&mut self) -> &mut [u8] {
        if self.bytes.len() - self.end < MAX_FRAME + PREFIX || self.start == self.end {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }
}

/// A frame on its way.
struct Slot {
    id: u32,
    len: u32,
    prefix: [u8; PREFIX],
    pieces: Vec<Buffer>,
}

/// What the kernel looks at while it sends: it does not move.
struct Message {
    header: libc::msghdr,
    pieces: Vec<Buffer>,
}

/// See [`Queue`].
pub(super) struct StreamQueue {
    shared: Arc<Shared>,
    tag: Tag,
    target: Target,
    inbound: Option<Inbound>,
    /// Whether the kernel may write to the inbound bytes.
    receiving: bool,
    /// The rest of a frame that another queue has begun. It goes before all else.
    begun: Vec<u8>,
    offers: Offers,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Frames not wholly sent, in order, and how much of the first of them is.
    queue: VecDeque<u16>,
    sent: usize,
    message: Box<Message>,
    sending: bool,
    up: bool,
    counters: Counters,
    remains: Remains,
}

/// How long the frame that begins with `bytes` is without its padding, which a stream has no use
/// for. passt as Debian 12 has it drops a frame that is longer than the packet of IP in it: all that
/// a guest acknowledges through an e1000.
fn unpadded(bytes: &[u8; SHORTEST], len: u32) -> u32 {
    let packet = match bytes[12..20] {
        // The packet's length, and that of what follows its header.
        [0x08, 0x00, _, _, high, low, ..] => u16::from_be_bytes([high, low]).into(),
        [0x86, 0xdd, .., high, low] => 40 + u32::from(u16::from_be_bytes([high, low])),
        _ => return len,
    };
    len.min(packet.saturating_add(ETHERNET_HEADER as u32))
}

impl StreamQueue {
    pub(super) fn new(
        shared: Arc<Shared>,
        config: QueueConfig,
        middle: Middle,
        uring: &Uring,
    ) -> Self {
        let QueueConfig { tag, sends, receives, .. } = config;
        let Middle { inbound, begun } = middle;
        let slot = || Slot { id: 0, len: 0, prefix: [0; PREFIX], pieces: Vec::new() };
        // SAFETY: all zeroes is a message header without anything.
        let header = unsafe { mem::zeroed() };
        let target = Target::descriptor(shared.socket.as_fd());
        let up = shared.is_up();
        Self {
            shared,
            tag,
            target,
            inbound: Some(inbound),
            receiving: false,
            begun,
            offers: Offers::new(receives),
            slots: (0..sends).map(|_| slot()).collect(),
            free: (0..sends).rev().collect(),
            queue: VecDeque::with_capacity(sends.into()),
            sent: 0,
            message: Box::new(Message { header, pieces: Vec::with_capacity(MAX_PIECES) }),
            sending: false,
            up,
            counters: Counters::default(),
            remains: uring.remains(),
        }
    }

    fn token(&self, kind: u64) -> Token {
        Token::new(self.tag, kind)
    }

    /// The stream is of no use any more.
    fn lost(&mut self, why: &dyn fmt::Display, done: &mut Completions) {
        if self.up {
            self.up = false;
            if !self.shared.gone.swap(true, Ordering::Relaxed) {
                tracing::warn!("{} was lost: {why}", self.shared.name);
            }
            done.push(Completion::Link(false));
        }
        if !self.sending {
            while let Some(index) = self.queue.pop_front() {
                self.ended(index, Err(Dropped::LinkDown), done);
            }
            self.sent = 0;
        }
    }

    fn ended(&mut self, index: u16, result: Result<(), Dropped>, done: &mut Completions) {
        let Some(slot) = self.slots.get(usize::from(index)) else { return };
        self.counters.count_send(slot.len, result);
        done.push(Completion::Sent { id: slot.id, result });
        self.free.push(index);
    }

    /// Fills offered buffers with frames that have come.
    fn pass_on(&mut self, done: &mut Completions) {
        while let (Some(inbound), Some(offer)) = (&mut self.inbound, self.offers.front()) {
            let (at, len) = match inbound.frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return,
                Err(Broken) => return self.lost(&"it broke the protocol", done),
            };
            let frame = inbound.bytes.get(at..at + len).unwrap_or_default();
            if len < ETHERNET_HEADER || len > offer.room {
                self.counters.receive_drops += 1;
                inbound.pass(len);
                continue;
            }
            // SAFETY: who offered the buffer vouches for it until the completion below.
            unsafe { Cursor::new(&offer.pieces).write(frame) };
            inbound.pass(len);
            self.counters.count_receive(len as u32);
            done.received(self.offers.pop(), len as u32, Offload::NONE);
        }
    }

    /// `bytes` more have been received.
    fn has_come(&mut self, bytes: usize) {
        if let Some(inbound) = &mut self.inbound {
            inbound.end = (inbound.end + bytes).min(inbound.bytes.len());
        }
    }

    /// Asks the kernel for more, if there is somewhere to put it.
    fn receive(&mut self, uring: &mut Uring) {
        if self.receiving || !self.up || self.offers.is_empty() {
            return;
        }
        let (token, target) = (self.token(RECEIVE), self.target);
        let Some(inbound) = &mut self.inbound else { return };
        let room = inbound.room();
        let entry = opcode::Recv::new(target.fd(), room.as_mut_ptr(), room.len() as u32)
            .build()
            .flags(target.flags());
        // SAFETY: this memory is not touched before the operation has completed, and outlives it
        // even if this queue does not.
        self.receiving = unsafe { uring.push_waiting(entry, token) }.is_ok();
    }

    /// Sends what waits, as much of it as goes into one message.
    fn transmit(&mut self, uring: &mut Uring) {
        if self.sending || !self.up || (self.queue.is_empty() && self.begun.is_empty()) {
            return;
        }
        let (token, target) = (self.token(SEND), self.target);
        let message = &mut *self.message;
        message.pieces.clear();
        let mut skip = self.sent;
        if !self.begun.is_empty() {
            message.pieces.push(Buffer::from(self.begun.as_mut_slice()));
        }
        // By itself: what is begun happens once in a stream's life.
        for index in self.queue.iter().filter(|_| self.begun.is_empty()) {
            let Some(slot) = self.slots.get(usize::from(*index)) else { break };
            if message.pieces.len() + slot.pieces.len() > MAX_PIECES {
                break;
            }
            for piece in &slot.pieces {
                let skipped = skip.min(piece.len());
                skip -= skipped;
                if skipped < piece.len() {
                    let address = piece.address().wrapping_add(skipped);
                    message.pieces.push(Buffer::new(address, piece.len() - skipped));
                }
            }
        }
        message.header.msg_iov = message.pieces.as_mut_ptr().cast();
        message.header.msg_iovlen = message.pieces.len();
        let entry = opcode::SendMsg::new(target.fd(), &raw const message.header)
            .flags(libc::MSG_NOSIGNAL as u32)
            .build()
            .flags(target.flags());
        // SAFETY: who sent the frames vouches for their buffers. The message, the slots and what was
        // begun are not touched before the operation has completed, and outlive it even if this queue
        // does not.
        self.sending = unsafe { uring.push_waiting(entry, token) }.is_ok();
    }

    /// `bytes` of the message have gone.
    fn gone(&mut self, bytes: usize, done: &mut Completions) {
        if !self.begun.is_empty() {
            self.begun.drain(..bytes.min(self.begun.len()));
            return;
        }
        self.sent += bytes;
        while let Some(index) = self.queue.front().copied() {
            let Some(slot) = self.slots.get(usize::from(index)) else { return };
            let whole = PREFIX + slot.len as usize;
            if self.sent < whole {
                return;
            }
            self.sent -= whole;
            self.queue.pop_front();
            self.ended(index, Ok(()), done);
        }
    }
}

impl Queue for StreamQueue {
    unsafe fn send(&mut self, frame: Frame<'_>, _: &mut Uring, done: &mut Completions) {
        let Frame { id, len, buffers, offload } = frame;
        let result = match frame.check() {
            Ok(()) if !self.up => Err(Dropped::LinkDown),
            Ok(()) if offload.needs() != Offloads::NONE => Err(Dropped::Malformed),
            Ok(()) => self.free.pop().ok_or(Dropped::Busy),
            Err(dropped) => Err(dropped),
        };
        let index = match result {
            Ok(index) => index,
            Err(dropped) => {
                self.counters.count_send(len, Err(dropped));
                return done.push(Completion::Sent { id, result: Err(dropped) });
            }
        };
        let mut len = len;
        if len as usize <= SHORTEST {
            let mut bytes = [0; SHORTEST];
            // SAFETY: who sends the frame vouches for its buffers.
            unsafe { Cursor::new(buffers).read(bytes.get_mut(..len as usize).unwrap_or_default()) };
            len = unpadded(&bytes, len);
        }
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return };
        (slot.id, slot.len, slot.prefix) = (id, len, len.to_be_bytes());
        slot.pieces.clear();
        slot.pieces.push(Buffer::new(slot.prefix.as_mut_ptr(), PREFIX));
        let mut left = len as usize;
        for buffer in buffers {
            let len = buffer.len().min(left);
            left -= len;
            if len > 0 {
                slot.pieces.push(Buffer::new(buffer.address(), len));
            }
        }
        self.queue.push_back(index);
    }

    unsafe fn offer(&mut self, id: u32, buffers: &[Buffer], _: &mut Uring, done: &mut Completions) {
        self.offers.push(id, buffers, done);
    }

    fn turn(&mut self, uring: &mut Uring, done: &mut Completions) {
        if !self.receiving {
            self.pass_on(done);
        }
        self.receive(uring);
        self.transmit(uring);
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions) {
        match cqe.token.value() {
            RECEIVE => {
                self.receiving = false;
                match usize::try_from(cqe.result) {
                    Ok(0) => self.lost(&"its other side is gone", done),
                    Ok(bytes) => {
                        self.has_come(bytes);
                        self.pass_on(done);
                    }
                    Err(_) => match cqe.result.wrapping_neg() {
                        libc::ECANCELED | libc::EINTR | libc::EAGAIN => {}
                        errno => self.lost(&io::Error::from_raw_os_error(errno), done),
                    },
                }
                self.receive(uring);
            }
            SEND => {
                self.sending = false;
                match usize::try_from(cqe.result) {
                    Ok(bytes) => self.gone(bytes, done),
                    Err(_) => match cqe.result.wrapping_neg() {
                        libc::EINTR | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => {}
                        errno => self.lost(&io::Error::from_raw_os_error(errno), done),
                    },
                }
                if !self.up {
                    self.lost(&"its other side is gone", done);
                }
                self.transmit(uring);
            }
            _ => {}
        }
    }

    fn is_ready(&self) -> bool {
        let whole = || self.inbound.as_ref().is_some_and(|inbound| inbound.frame() != Ok(None));
        self.up && !self.receiving && !self.offers.is_empty() && whole()
    }

    fn prepare_to_sleep(&mut self) -> bool {
        !self.is_ready()
    }

    fn recall(&mut self, uring: &mut Uring, done: &mut Completions) {
        self.offers.recall(done);
        if self.receiving {
            let cancel = opcode::AsyncCancel::new(self.token(RECEIVE).user_data()).build();
            // SAFETY: a cancellation points to nothing. If it cannot be pushed, the operation ends
            // with what comes next.
            let _ = unsafe { uring.push(&cancel.user_data(self.token(CANCEL).user_data())) };
        }
    }

    fn in_flight(&self) -> usize {
        self.queue.len() + self.offers.len() + usize::from(self.receiving)
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

impl StreamQueue {
    /// What the next queue has to know. Nothing is with the kernel any more.
    fn middle(&mut self, inbound: Inbound) -> Middle {
        let mut begun = mem::take(&mut self.begun);
        let front = self.queue.front().and_then(|index| self.slots.get(usize::from(*index)));
        if let Some(slot) = front.filter(|_| self.sent > 0) {
            begun = vec![0; PREFIX + slot.len as usize];
            // SAFETY: who sent the frame vouches for its buffers for as long as this queue lives.
            unsafe { Cursor::new(&slot.pieces).read(&mut begun) };
            begun.drain(..self.sent.min(begun.len()));
        }
        Middle { inbound, begun }
    }
}

impl Drop for StreamQueue {
    /// A queue that goes with operations under way, as its worker gave up, takes note of how they
    /// ended: the stream goes on where it stopped, be that within a frame. If it goes before its ring
    /// they have not ended. Then it leaves behind what the kernel still looks at, and the stream is
    /// lost.
    fn drop(&mut self) {
        let Some(unheard) = (match self.sending || self.receiving {
            true => self.remains.unheard(self.tag),
            false => Some(Vec::new()),
        }) else {
            self.shared.gone.store(true, Ordering::Relaxed);
            let empty = Box::new(Message { header: self.message.header, pieces: Vec::new() });
            let message = mem::replace(&mut self.message, empty);
            let (slots, begun) = (mem::take(&mut self.slots), mem::take(&mut self.begun));
            let used = (message, slots, begun, self.inbound.take(), Arc::clone(&self.shared));
            return self.remains.keep(used);
        };
        for cqe in unheard {
            // What has failed is found out again by the next queue.
            match (cqe.token.value(), usize::try_from(cqe.result)) {
                (RECEIVE, Ok(bytes)) => self.has_come(bytes),
                (SEND, Ok(bytes)) => self.gone(bytes, &mut Completions::default()),
                _ => {}
            }
        }
        if let Some(inbound) = self.inbound.take() {
            let middle = self.middle(inbound);
            self.shared.put_back(middle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_left_out() {
        let frame = |front: [u8; 8]| {
            let mut bytes = [0; SHORTEST];
            bytes[12..20].copy_from_slice(&front);
            bytes
        };
        // A packet of IPv4 with 40 bytes, one of IPv6 with none behind its header, and one of ARP.
        let four = frame([8, 0, 0x45, 0, 0, 40, 0, 0]);
        assert_eq!((unpadded(&four, 60), unpadded(&four, 54), unpadded(&four, 50)), (54, 54, 50));
        let six = frame([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0]);
        assert_eq!((unpadded(&six, 60), unpadded(&six, 54)), (54, 54));
        assert_eq!(unpadded(&frame([8, 6, 0, 1, 8, 0, 6, 4]), 60), 60);
        // One that says to be longer than it is stays as it is. One that says to have nothing is its
        // receiver's to refuse.
        assert_eq!(unpadded(&frame([8, 0, 0x45, 0, 0xff, 0xff, 0, 0]), 60), 60);
        assert_eq!(unpadded(&frame([8, 0, 0x45, 0, 0, 0, 0, 0]), 60), 14);
    }
}
