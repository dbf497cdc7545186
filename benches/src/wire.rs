//! Frames from one port of the virtual switch to another, with no NIC at either end.
//!
//! `unsafe` promises the switch buffers that live as long as its queues.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use backends::net::switch::{Port, PortOptions, Switch, SwitchOptions};
use backends::net::{Completion, Completions, Frame, Network, Offload, Queue, QueueConfig};
use backends::uring::{Tag, Uring};

use crate::Idle;

/// Frames that are sent, and buffers that are offered, between two turns.
const BATCH: u32 = 64;

/// Addresses of the two ends.
const ENDS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

/// A switch with two ports.
pub struct Wire {
    ports: [Port; 2],
    frame: Vec<u8>,
}

/// One end: a worker's queue, its frame and its buffers. Fields are dropped in order.
struct End {
    queue: Box<dyn Queue>,
    uring: Uring,
    done: Completions,
    frame: Vec<u8>,
    buffers: Vec<Vec<u8>>,
}

impl Wire {
    /// For frames of `len` bytes, at least 14.
    pub fn new(len: usize) -> Self {
        let switch = Switch::new(SwitchOptions::new("bench"));
        let port = || switch.port(PortOptions::default()).expect("a port");
        let mut frame = [&ENDS[1][..], &ENDS[0], &[0x88, 0xb5]].concat();
        frame.resize(len, 0xa5);
        Self { ports: [port(), port()], frame }
    }

    fn end(&self, number: usize) -> End {
        let mut uring = Uring::new(8).expect("an io_uring");
        let config = QueueConfig { index: 0, tag: Tag(1), sends: 256, receives: 256 };
        let queue = self.ports[number].queue(config, &mut uring).expect("a queue");
        let buffers = vec![vec![0; self.frame.len() + 64]; BATCH as usize];
        let done = Completions::with_capacity(1024);
        let mut end = End { queue, uring, done, frame: self.frame.clone(), buffers };
        (0..BATCH).for_each(|id| end.offer(id));
        end
    }

    /// Lets the switch know who is where.
    fn introduce(&self, receiver: &mut End) {
        receiver.frame.copy_within(0..6, 6);
        receiver.frame[..6].fill(0xff);
        receiver.send(1);
        receiver.receive();
    }

    /// Passes `frames` with one thread at both ends.
    pub fn one_thread(&self, frames: u64) -> Duration {
        let (mut sender, mut receiver) = (self.end(0), self.end(1));
        self.introduce(&mut receiver);
        sender.receive();
        let started = Instant::now();
        let mut received = 0;
        while received < frames {
            sender.send(BATCH);
            received += receiver.receive();
        }
        started.elapsed()
    }

    /// Passes `frames` from one thread to another, each on a processor of its own if `pin` sees to
    /// that. What the receiver has no room for is sent again.
    pub fn two_threads(&self, frames: u64, pin: impl Fn(usize) + Sync) -> Duration {
        let (ready, over) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin(1);
                let (mut sender, mut idle) = (self.end(0), Idle::default());
                ready.store(true, Ordering::Release);
                while !over.load(Ordering::Relaxed) {
                    match sender.send(BATCH) {
                        0 => idle.nothing(),
                        _ => idle.something(),
                    }
                    sender.receive();
                }
            });
            pin(0);
            let (mut receiver, mut idle) = (self.end(1), Idle::default());
            while !ready.load(Ordering::Acquire) {
                idle.nothing();
            }
            self.introduce(&mut receiver);
            let started = Instant::now();
            let mut received = 0;
            while received < frames {
                match receiver.receive() {
                    0 => idle.nothing(),
                    some => {
                        received += some;
                        idle.something();
                    }
                }
            }
            let elapsed = started.elapsed();
            over.store(true, Ordering::Relaxed);
            elapsed
        })
    }
}

impl End {
    fn offer(&mut self, id: u32) {
        let Some(buffer) = self.buffers.get_mut(id as usize) else { return };
        // SAFETY: the buffers outlive the queue and are not looked into.
        unsafe {
            self.queue.offer(id, &[buffer.as_mut_slice().into()], &mut self.uring, &mut self.done);
        }
    }

    /// Sends the same frame `count` times. Returns how often somebody had room for it.
    fn send(&mut self, count: u32) -> u64 {
        let buffers = [self.frame.as_mut_slice().into()];
        let len = self.frame.len() as u32;
        for id in 0..count {
            let frame = Frame { id, len, buffers: &buffers, offload: Offload::NONE };
            // SAFETY: the frame outlives the queue.
            unsafe { self.queue.send(frame, &mut self.uring, &mut self.done) };
        }
        self.queue.turn(&mut self.uring, &mut self.done);
        self.settle().1
    }

    /// Takes what has come. Returns how many frames.
    fn receive(&mut self) -> u64 {
        self.queue.turn(&mut self.uring, &mut self.done);
        self.settle().0
    }

    /// Frames received and sent.
    fn settle(&mut self) -> (u64, u64) {
        let (mut received, mut sent) = (0, 0);
        while let Some(completion) = self.done.pop() {
            match completion {
                Completion::Received { id, .. } => {
                    received += 1;
                    self.offer(id);
                }
                Completion::Sent { result: Ok(()), .. } => sent += 1,
                _ => {}
            }
        }
        (received, sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_pass() {
        let wire = Wire::new(64);
        assert!(wire.one_thread(1000) > Duration::ZERO);
        assert!(wire.two_threads(1000, |_| {}) > Duration::ZERO);
        let statistics = wire.ports[1].statistics();
        assert!(statistics.received >= 2000, "{statistics:?}");
    }
}
