//! Standard input, where it is a terminal: raw while a guest has it, so that every key is the guest's,
//! and as it was at the end, however that comes about.
//!
//! A program in the background leaves a terminal alone: to change it, or to read from it, would stop
//! the program.

use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// There is one standard input, and whoever ends the program restores it, a panic too.
static STATE: Mutex<State> = Mutex::new(State { cooked: None, wanted: false });

struct State {
    /// How the terminal was, once it has been made raw.
    cooked: Option<Termios>,
    /// Whether it is to be raw.
    wanted: bool,
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether standard input is a terminal.
pub fn is_there() -> bool {
    stdin().is_terminal()
}

/// Whether the terminal is this program's at the moment. One that controls no session is.
pub fn is_ours() -> bool {
    tcgetpgrp(stdin()).map_or(true, |foreground| foreground == getpgrp())
}

/// Makes the terminal raw from now on.
pub fn take() {
    state().wanted = true;
    resume();
}

/// Makes it raw again, if it is to be: somebody else may have had it meanwhile.
pub fn resume() {
    let mut state = state();
    if !state.wanted || !is_ours() {
        return;
    }
    let Ok(now) = tcgetattr(stdin()) else { return };
    let mut raw = now.clone();
    raw.make_raw();
    // A newline of the program's own messages still returns the carriage.
    raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
    // Before it changes: a signal may come in between.
    state.cooked.get_or_insert(now);
    let _ = tcsetattr(stdin(), OptionalActions::Now, &raw);
}

/// Leaves the terminal as it was.
pub fn restore() {
    let mut state = state();
    state.wanted = false;
    if let Some(cooked) = state.cooked.take()
        && is_ours()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &cooked);
    }
}
