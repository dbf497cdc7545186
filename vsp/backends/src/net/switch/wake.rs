//! Waking a worker that may sleep, and not one that is awake.
//!
//! A receiver says that it will sleep and then looks for work once more; a sender leaves work and
//! then looks whether the receiver sleeps. Each has a fence between the two, so that at least one
//! of them sees the other: no work is left to a sleeper. Whoever takes the word back, sender or
//! receiver, is the only one to do so, and a sender that does wakes the receiver.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Whether a receiver may sleep.
#[derive(Debug)]
pub struct Wake {
    asleep: AtomicBool,
}

impl Default for Wake {
    fn default() -> Self {
        Self::new()
    }
}

impl Wake {
    /// Of one that is awake.
    pub fn new() -> Self {
        Self { asleep: AtomicBool::new(false) }
    }

    /// Of a sender that has left work. If true, it has to wake the receiver.
    pub fn is_due(&self) -> bool {
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.take_back()
    }

    /// Of a receiver that wants to sleep. If false, there is work, and it should not.
    pub fn may_sleep(&self, has_work: impl FnOnce() -> bool) -> bool {
        self.asleep.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        if has_work() {
            self.take_back();
            return false;
        }
        true
    }

    /// Of a receiver that is awake, for whatever reason: nobody needs to wake it.
    pub fn awake(&self) {
        if self.asleep.load(Ordering::Relaxed) {
            self.take_back();
        }
    }

    /// Takes the receiver's word back. Returns whether it was still there. All changes are swaps,
    /// so that each knows of those before it.
    fn take_back(&self) -> bool {
        self.asleep.swap(false, Ordering::AcqRel)
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::collections::VecDeque;

    use loom::sync::{Arc, Mutex, Notify};
    use loom::thread;

    use super::*;

    /// Stands for the queue of frames and the eventfd.
    struct Inbox {
        frames: Mutex<VecDeque<u32>>,
        wake: Wake,
        bell: Notify,
    }

    impl Inbox {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                frames: Mutex::new(VecDeque::new()),
                wake: Wake::new(),
                bell: Notify::new(),
            })
        }

        fn send(&self, frame: u32) {
            self.frames.lock().unwrap().push_back(frame);
            if self.wake.is_due() {
                self.bell.notify();
            }
        }

        /// Takes frames until it has `count`. A wake-up that is lost is a deadlock, which loom finds.
        fn receive(&self, count: usize) {
            let mut taken = 0;
            loop {
                self.wake.awake();
                while self.frames.lock().unwrap().pop_front().is_some() {
                    taken += 1;
                }
                if taken == count {
                    return;
                }
                if self.wake.may_sleep(|| !self.frames.lock().unwrap().is_empty()) {
                    self.bell.wait();
                }
            }
        }
    }

    fn model(f: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(f);
    }

    #[test]
    fn loom_no_frame_is_left_to_a_sleeper() {
        model(|| {
            let inbox = Inbox::new();
            let sender = Arc::clone(&inbox);
            let sender = thread::spawn(move || (0..2).for_each(|frame| sender.send(frame)));
            inbox.receive(2);
            sender.join().unwrap();
        });
    }

    #[test]
    fn loom_two_senders() {
        model(|| {
            let inbox = Inbox::new();
            let senders: Vec<_> = (0..2)
                .map(|frame| {
                    let inbox = Arc::clone(&inbox);
                    thread::spawn(move || inbox.send(frame))
                })
                .collect();
            inbox.receive(2);
            senders.into_iter().for_each(|sender| sender.join().unwrap());
        });
    }
}
