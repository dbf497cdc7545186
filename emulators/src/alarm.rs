//! A device's sense of time: a thread that wakes it at the moment it has asked for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

/// A device that has something to do at certain times.
pub(crate) trait Timed: Send + Sync + 'static {
    /// The alarm has gone off. Who wants another one sets it.
    fn expire(&self);
}

/// One alarm of one device. Its thread starts when it is set for the first time, and ends with it.
///
/// The device sets it under its own lock, in [`Timed::expire`] too, so that the last to change the
/// device decides.
pub(crate) struct Alarm {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// It could not be started, and that was said: a guest may set alarms without end.
    complained: AtomicBool,
    name: &'static str,
    device: Weak<dyn Timed>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    at: Option<Instant>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, device: &Weak<dyn Timed>) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            state = match state.at {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) if at > now => {
                    let waited = self.changed.wait_timeout(state, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    state.at = None;
                    drop(state);
                    match device.upgrade() {
                        Some(device) => device.expire(),
                        None => return,
                    }
                    self.lock()
                }
            };
        }
    }
}

impl Alarm {
    /// An alarm for `device`, on a thread of this name.
    pub(crate) fn new(name: &'static str, device: Weak<dyn Timed>) -> Self {
        let complained = AtomicBool::new(false);
        Self { shared: Arc::default(), thread: Mutex::default(), complained, name, device }
    }

    /// Goes off then, and at no other time; at once if that has passed.
    pub(crate) fn set(&self, at: Option<Instant>) {
        let mut state = self.shared.lock();
        if state.at == at {
            return;
        }
        let earlier = at.is_some_and(|at| state.at.is_none_or(|old| at < old));
        state.at = at;
        drop(state);
        if !earlier {
            return; // the thread finds out when it wakes
        }
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let (shared, device) = (Arc::clone(&self.shared), Weak::clone(&self.device));
            let builder = std::thread::Builder::new().name(self.name.to_owned());
            match builder.stack_size(128 << 10).spawn(move || shared.run(&device)) {
                Ok(handle) => *thread = Some(handle),
                Err(_) if self.complained.swap(true, Ordering::Relaxed) => {}
                Err(error) => tracing::error!(%error, "cannot start the {} thread", self.name),
            }
        }
        self.shared.changed.notify_one();
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // The thread itself may have been the last to hold the device.
        let other = thread.filter(|thread| thread.thread().id() != std::thread::current().id());
        if other.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the {} thread panicked", self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;

    struct Bell {
        alarm: Alarm,
        rang: Mutex<Sender<()>>,
        again: Mutex<u32>,
    }

    impl Timed for Bell {
        fn expire(&self) {
            let mut again = self.again.lock().unwrap();
            *again = again.saturating_sub(1);
            self.alarm.set((*again > 0).then(Instant::now));
            self.rang.lock().unwrap().send(()).unwrap();
        }
    }

    #[test]
    fn it_goes_off_when_it_is_set_and_not_otherwise() {
        let (rang, rings) = channel();
        let bell = Arc::new_cyclic(|bell: &Weak<Bell>| Bell {
            alarm: Alarm::new("bell", Weak::clone(bell) as _),
            rang: Mutex::new(rang),
            again: Mutex::new(3),
        });
        let set = |at| {
            let _device = bell.again.lock().unwrap();
            bell.alarm.set(at);
        };
        set(Some(Instant::now() + Duration::from_secs(1000)));
        set(Some(Instant::now()));
        for _ in 0..3 {
            rings.recv().unwrap();
        }
        set(Some(Instant::now() + Duration::from_secs(1000)));
        set(None);
        drop(bell);
        assert!(rings.recv().is_err(), "no more, and all threads have ended");
    }
}
