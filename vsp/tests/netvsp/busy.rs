//! A network that is busy with the frames it has: as long as it is used, it does not drop them when
//! they are wanted back, as the kernel does not with what it is writing.
#![allow(unsafe_code)] // What a queue's callers promise is passed on.

use std::io;

use backends::net::loopback::Loopback;
use backends::net::{
    Buffer, Completions, Counters, Frame, Link, Network, Offloads, Queue, QueueConfig,
};
use backends::uring::{Cqe, Uring};

/// See the module's documentation.
pub struct Busy(pub Loopback);

impl Network for Busy {
    fn link(&self) -> Link {
        self.0.link()
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.0.set_receive_offloads(offloads)
    }

    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(BusyQueue(self.0.queue(config, uring)?)))
    }
}

struct BusyQueue(Box<dyn Queue>);

impl Queue for BusyQueue {
    unsafe fn send(&mut self, frame: Frame<'_>, uring: &mut Uring, done: &mut Completions) {
        // SAFETY: the caller's promise.
        unsafe { self.0.send(frame, uring, done) }
    }

    unsafe fn offer(
        &mut self,
        id: u32,
        buffers: &[Buffer],
        uring: &mut Uring,
        done: &mut Completions,
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.0.offer(id, buffers, uring, done) }
    }

    fn turn(&mut self, uring: &mut Uring, done: &mut Completions) {
        self.0.turn(uring, done);
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions) {
        self.0.complete(cqe, uring, done);
    }

    fn is_ready(&self) -> bool {
        self.0.is_ready()
    }

    fn prepare_to_sleep(&mut self) -> bool {
        self.0.prepare_to_sleep()
    }

    /// Only who stops does this to a queue that nothing is offered to: then all ends.
    fn recall(&mut self, uring: &mut Uring, done: &mut Completions) {
        self.0.recall(uring, done);
        self.0.drop_frames(uring, done);
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    fn counters(&self) -> Counters {
        self.0.counters()
    }
}
