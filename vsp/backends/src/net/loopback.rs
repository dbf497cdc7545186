//! A cable plugged into the socket it comes from: for tests of a NIC that has no peer.
//!
//! What a queue sends comes back to it, into the buffers it has offered, when its turn ends. A
//! frame for which there is no buffer waits and stays under way, so that a NIC that does not
//! receive soon cannot send either.
//!
//! `unsafe` copies from buffer to buffer, as [`Queue::send`] and [`Queue::offer`] allow.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::pieces::{Cursor, Offers};
use super::{
    Buffer, Completion, Completions, Counters, Dropped, Frame, Link, Network, Offload, Offloads,
    Queue, QueueConfig,
};
use crate::uring::{Cqe, Uring};

/// The most queues a NIC can open.
const QUEUES: u16 = 16;

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Loopback {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    pulled: AtomicBool,
    receive: AtomicU8,
}

impl Loopback {
    /// One that is plugged in.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pulls the cable out, or plugs it in again. Queues notice at their next turn; this wakes
    /// nobody.
    pub fn plug(&self, plugged: bool) {
        self.shared.pulled.store(!plugged, Ordering::Relaxed);
    }
}

impl Shared {
    fn is_up(&self) -> bool {
        !self.pulled.load(Ordering::Relaxed)
    }
}

impl Network for Loopback {
    fn link(&self) -> Link {
        Link {
            name: "loopback".into(),
            up: self.shared.is_up(),
            mtu: 9000,
            speed: 10_000,
            mac: None,
            queues: QUEUES,
            takes: Offloads::ALL,
            gives: Offloads::ALL,
        }
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.shared.receive.store(offloads.bits(), Ordering::Relaxed);
        Ok(())
    }

    fn queue(&self, config: QueueConfig, _: &mut Uring) -> io::Result<Box<dyn Queue>> {
        if config.index >= QUEUES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Box::new(LoopbackQueue {
            shared: Arc::clone(&self.shared),
            up: self.shared.is_up(),
            sends: config.sends.into(),
            frames: VecDeque::new(),
            offers: Offers::new(config.receives),
            counters: Counters::default(),
        }))
    }
}

struct LoopbackQueue {
    shared: Arc<Shared>,
    up: bool,
    sends: usize,
    frames: VecDeque<(u32, u32, Offload, Vec<Buffer>)>,
    offers: Offers,
    counters: Counters,
}

impl LoopbackQueue {
    fn sent(&mut self, id: u32, len: u32, result: Result<(), Dropped>, done: &mut Completions) {
        self.counters.count_send(len, result);
        done.push(Completion::Sent { id, result });
    }
}

impl Queue for LoopbackQueue {
    unsafe fn send(&mut self, frame: Frame<'_>, _: &mut Uring, done: &mut Completions) {
        let result = match frame.check() {
            Ok(()) if !self.shared.is_up() => Err(Dropped::LinkDown),
            Ok(()) if self.frames.len() == self.sends => Err(Dropped::Busy),
            result => result,
        };
        if result.is_err() {
            return self.sent(frame.id, frame.len, result, done);
        }
        self.frames.push_back((frame.id, frame.len, frame.offload, frame.buffers.to_vec()));
    }

    unsafe fn offer(&mut self, id: u32, buffers: &[Buffer], _: &mut Uring, done: &mut Completions) {
        self.offers.push(id, buffers, done);
    }

    fn turn(&mut self, _: &mut Uring, done: &mut Completions) {
        let up = self.shared.is_up();
        if up != self.up {
            self.up = up;
            done.push(Completion::Link(up));
        }
        let takes = Offloads::from_bits(self.shared.receive.load(Ordering::Relaxed));
        while let (Some(offer), Some((id, len, offload, pieces))) =
            (self.offers.front(), self.frames.front())
        {
            let (id, len, offload) = (*id, *len, *offload);
            if !takes.contains(offload.needs()) || offer.room < len as usize {
                self.frames.pop_front();
                self.counters.receive_drops += 1;
                self.sent(id, len, Ok(()), done);
                continue;
            }
            let (mut from, mut to) = (Cursor::new(pieces), Cursor::new(&offer.pieces));
            // SAFETY: the callers of `send` and `offer` have vouched for their buffers until the
            // completions below.
            unsafe { from.copy_to(&mut to, len as usize) };
            self.frames.pop_front();
            self.sent(id, len, Ok(()), done);
            self.counters.count_receive(len);
            done.received(self.offers.pop(), len, offload);
        }
    }

    fn complete(&mut self, _: &Cqe, _: &mut Uring, _: &mut Completions) {}

    fn is_ready(&self) -> bool {
        (!self.frames.is_empty() && !self.offers.is_empty()) || self.up != self.shared.is_up()
    }

    fn prepare_to_sleep(&mut self) -> bool {
        !self.is_ready()
    }

    fn recall(&mut self, _: &mut Uring, done: &mut Completions) {
        self.offers.recall(done);
    }

    fn drop_frames(&mut self, _: &mut Uring, done: &mut Completions) {
        while let Some((id, len, ..)) = self.frames.pop_front() {
            self.sent(id, len, Err(Dropped::NoRoom), done);
        }
    }

    fn in_flight(&self) -> usize {
        self.frames.len() + self.offers.len()
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uring::Tag;

    #[test]
    fn frames_come_back_in_order_once_there_is_room() {
        let cable = Loopback::new();
        let mut uring = Uring::new(4).unwrap();
        let config = QueueConfig { index: 0, tag: Tag(1), sends: 2, receives: 2 };
        let mut queue = cable.queue(config, &mut uring).unwrap();
        let mut done = Completions::with_capacity(8);
        let (mut one, mut two) = ([1u8; 60], [2u8; 64]);
        let (mut front, mut back) = ([0u8; 20], [0u8; 1500]);
        for (id, bytes) in [(1, &mut one[..]), (2, &mut two[..]), (3, &mut [3u8; 60][..])] {
            let frame = Frame {
                id,
                len: bytes.len() as u32,
                buffers: &[bytes.into()],
                offload: Offload::NONE,
            };
            // SAFETY: the frames outlive the queue; the third ends in the call.
            unsafe { queue.send(frame, &mut uring, &mut done) };
        }
        let busy = Completion::Sent { id: 3, result: Err(Dropped::Busy) };
        assert_eq!(done.pop(), Some(busy));
        queue.turn(&mut uring, &mut done);
        assert!(done.is_empty());
        assert_eq!(queue.in_flight(), 2);
        let buffers = [front.as_mut_slice().into(), back.as_mut_slice().into()];
        // SAFETY: the buffers are looked at after the completion only.
        unsafe { queue.offer(7, &buffers, &mut uring, &mut done) };
        assert!(queue.is_ready());
        queue.turn(&mut uring, &mut done);
        assert_eq!(done.pop(), Some(Completion::Sent { id: 1, result: Ok(()) }));
        let offload = Offload::NONE;
        assert_eq!(done.pop(), Some(Completion::Received { id: 7, len: 60, offload }));
        assert_eq!((front, &back[..40]), ([1; 20], &[1u8; 40][..]));
        cable.plug(false);
        queue.turn(&mut uring, &mut done);
        assert_eq!(done.pop(), Some(Completion::Link(false)));
        queue.recall(&mut uring, &mut done);
        queue.drop_frames(&mut uring, &mut done);
        assert_eq!(queue.in_flight(), 0);
        assert_eq!(queue.counters().received, 1);
    }
}
