//! Synthetic timers on a thread: it sleeps until the next of all timers is due. It starts with the
//! first one that a guest sets.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::synic::UserSynic;
use crate::VpIndex;
use crate::reference_time::ReferenceClock;
use crate::registers::{GeneralProtection, msr};
use crate::synic::Posted;
use crate::timers::{self, Expiration, TIMERS, Timer};

/// All timers of a partition.
pub(super) struct Timers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// It could not be started, and that was said: a guest may set timers without end.
    complained: AtomicBool,
}

struct Shared {
    clock: ReferenceClock,
    synic: Arc<UserSynic>,
    bank: Mutex<Bank>,
    /// The bank's next deadline may be another.
    changed: Condvar,
}

struct Bank {
    vps: Box<[VpTimers]>,
    ended: bool,
}

/// One processor's.
#[derive(Default)]
struct VpTimers {
    timers: [Timer; TIMERS],
    /// Expirations whose slot was taken; the guest's EOM brings them.
    undelivered: [Option<Expiration>; TIMERS],
}

/// Which timer a register belongs to, and whether it is its COUNT.
fn decode(register: u32) -> (usize, bool) {
    let offset = (register - msr::STIMER0_CONFIG) as usize;
    (offset / 2 % TIMERS, offset % 2 == 1)
}

impl Timers {
    pub(super) fn new(clock: ReferenceClock, synic: &Arc<UserSynic>) -> Self {
        let vps = (0..synic.vp_count()).map(|_| VpTimers::default()).collect();
        let bank = Mutex::new(Bank { vps, ended: false });
        let shared = Shared { clock, synic: Arc::clone(synic), bank, changed: Condvar::new() };
        let complained = AtomicBool::new(false);
        Self { shared: Arc::new(shared), thread: Mutex::default(), complained }
    }

    /// A guest's read of one of the eight registers.
    pub(super) fn read(&self, vp: VpIndex, register: u32) -> u64 {
        let (index, is_count) = decode(register);
        match self.shared.lock().vps.get(vp.0 as usize) {
            Some(vp) if is_count => vp.timers[index].count(),
            Some(vp) => vp.timers[index].config(),
            None => 0,
        }
    }

    /// A guest's write of one of them.
    pub(super) fn write(
        &self,
        vp: VpIndex,
        register: u32,
        value: u64,
    ) -> Result<(), GeneralProtection> {
        let (index, is_count) = decode(register);
        let mut bank = self.shared.lock();
        let now = self.shared.clock.now();
        let Some(timers) = bank.vps.get_mut(vp.0 as usize) else { return Ok(()) };
        let timer = &mut timers.timers[index];
        if is_count {
            timer.set_count(value, now);
        } else {
            timer.set_config(value, now)?;
        }
        let runs = timer.deadline().is_some();
        // What is due already need not wait for another thread.
        self.shared.expire(&mut bank);
        drop(bank);
        if runs {
            self.wake();
        }
        Ok(())
    }

    /// The guest has emptied a slot.
    pub(super) fn end_of_message(&self, vp: VpIndex) {
        let mut bank = self.shared.lock();
        if let Some(timers) = bank.vps.get_mut(vp.0 as usize) {
            self.shared.deliver_again(vp, timers);
        }
    }

    /// Makes the thread look at its deadlines, and starts it if it does not run yet.
    fn wake(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name("timers".to_owned());
            match builder.spawn(move || shared.run()) {
                Ok(handle) => *thread = Some(handle),
                Err(_) if self.complained.swap(true, Ordering::Relaxed) => {}
                Err(error) => tracing::error!(%error, "cannot start the timers' thread"),
            }
        }
        self.shared.changed.notify_one();
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the timers' thread panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Bank> {
        self.bank.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut bank = self.lock();
        while !bank.ended {
            self.expire(&mut bank);
            let timers = bank.vps.iter().flat_map(|vp| &vp.timers);
            bank = match timers.filter_map(Timer::deadline).min() {
                None => self.changed.wait(bank).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let timeout = self.clock.until(deadline);
                    self.changed
                        .wait_timeout(bank, timeout)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// Does what is due.
    fn expire(&self, bank: &mut Bank) {
        let now = self.clock.now();
        for (index, vp) in (0..).map(VpIndex).zip(&mut bank.vps) {
            let mut expired = false;
            for (timer, undelivered) in vp.timers.iter_mut().zip(&mut vp.undelivered) {
                if let Some(expiration) = timer.expire(now) {
                    *undelivered = Some(expiration);
                    expired = true;
                }
            }
            if expired {
                self.deliver_again(index, vp);
            }
        }
    }

    /// Delivers what has expired and could not be delivered yet.
    fn deliver_again(&self, vp: VpIndex, timers: &mut VpTimers) {
        for (index, undelivered) in (0..).zip(&mut timers.undelivered) {
            let done = match *undelivered {
                None => true,
                Some(Expiration::Vector(vector)) => {
                    self.synic.raise_vector(vp, vector);
                    true
                }
                Some(Expiration::Message(sint, due)) => {
                    let message = timers::message(index, due, self.clock.now());
                    self.synic.deliver(vp, sint, &message) != Posted::Busy
                }
            };
            if done {
                *undelivered = None;
            }
        }
    }
}
