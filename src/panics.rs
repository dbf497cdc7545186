//! A panic on any thread ends the run.
//!
//! In a release build it aborts the program, once the terminal is as it was. Where panics unwind, in
//! builds for development and tests, only the thread would end, and a guest whose timer, bus or log
//! is gone waits for it for ever. So whichever thread it is, the machine of the moment is stopped, and
//! the program ends as after any error.

use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use hypervisor::{StopHandle, StopReason};

static STATE: Mutex<State> = Mutex::new(State { running: None, panicked: None });

struct State {
    /// The machine that runs.
    running: Option<StopHandle>,
    /// A thread that has panicked while none did.
    panicked: Option<String>,
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn reason(thread: &str) -> StopReason {
    StopReason::Error(format!("the thread {thread} panicked"))
}

/// Has panics heard from now on.
pub fn listen() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // First, as it may take for ever to print what has happened.
            let thread = thread::current();
            let name = thread.name().unwrap_or("without a name");
            let mut state = state();
            match &state.running {
                Some(stop) => stop.stop(reason(name)),
                None => state.panicked = Some(name.to_owned()),
            }
            drop(state);
            hook(panic);
        }));
    });
}

/// As long as this lives, a panic stops the machine; one that was before does so at once.
pub struct Watch(());

impl Watch {
    /// Watches over the machine that `stop` stops.
    pub fn over(stop: StopHandle) -> Self {
        let mut state = state();
        if let Some(thread) = &state.panicked {
            stop.stop(reason(thread));
        }
        state.running = Some(stop);
        Self(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        state().running = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_on_any_thread_ends_the_run_or_the_next_and_is_named() {
        listen();
        let panic = || {
            let thread = thread::Builder::new().name("bell".into());
            assert!(thread.spawn(|| panic!("on purpose")).unwrap().join().is_err());
        };
        let ended = StopReason::Error("the thread bell panicked".into());
        let stop = StopHandle::default();
        let watch = Watch::over(stop.clone());
        panic();
        assert_eq!(stop.wait(), ended);
        drop(watch);
        let stop = StopHandle::default();
        drop(Watch::over(stop.clone()));
        assert!(!stop.is_stopping());
        panic();
        assert!(!stop.is_stopping(), "it is not watched over any more");
        let stop = StopHandle::default();
        let _watch = Watch::over(stop.clone());
        assert_eq!(stop.wait(), ended);
    }
}
