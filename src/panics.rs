//! A panic on any thread ends the run.
//!
//! In a release build it aborts the program, once the terminal is as it was. Where panics unwind, in
//! builds for development and tests, only the thread would end, and a guest whose timer, bus or log
//! is gone waits for it for ever. So whichever thread it is, the machine of the moment is stopped, and
//! the program ends as after any error.

use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use hypervisor::{StopHandle, StopReason};

/// The machine that runs.
static RUNNING: Mutex<Option<StopHandle>> = Mutex::new(None);

fn running() -> MutexGuard<'static, Option<StopHandle>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As long as this lives, a panic stops the machine.
pub struct Watch(());

impl Watch {
    /// Watches over the machine that `stop` stops.
    pub fn over(stop: StopHandle) -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                // First, as what says it may fail to be printed.
                if let Some(stop) = &*running() {
                    let thread = thread::current();
                    let name = thread.name().unwrap_or("without a name");
                    stop.stop(StopReason::Error(format!("the thread {name} panicked")));
                }
                hook(panic);
            }));
        });
        *running() = Some(stop);
        Self(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *running() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_on_any_thread_ends_the_run_and_names_it() {
        let stop = StopHandle::default();
        let watch = Watch::over(stop.clone());
        let thread = thread::Builder::new().name("bell".into());
        let rings = thread.spawn(|| panic!("on purpose")).unwrap();
        assert_eq!(stop.wait(), StopReason::Error("the thread bell panicked".into()));
        assert!(rings.join().is_err());
        // And no run after it.
        drop(watch);
        let next = StopHandle::default();
        assert!(thread::spawn(|| panic!("on purpose")).join().is_err());
        assert!(!next.is_stopping());
    }
}
