//! The user's side of a run: the other end of the guest's serial port, and all ways to end the guest.
//!
//! On a terminal every key goes to the guest, Ctrl-C too; only what follows Ctrl-A is the program's
//! ([`escape`]). Signals are heard from the run's first moment to the program's last, whether or not
//! there is a machine just then ([`signals`]), and what they wish is remembered ([`end`]). A thread of
//! its own carries it out; nothing that it does waits for the guest, for the host's I/O, or for
//! somebody to read what the program says.

mod end;
mod escape;
mod keyboard;
mod signals;
mod terminal;

pub use terminal::restore as restore_terminal;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use emulators::{Cable, PmBlock, Uart};
use hypervisor::{StopHandle, StopReason};

use crate::log::{self, say};
use crate::machine::Machine;
use crate::outlet::{Event, Limits, Outlet};
use crate::statistics::Statistics;
use end::{Act, End, Wish};
use escape::Key;
use keyboard::Input;
use signals::Meaning;

/// How long a reader of the serial port may take nothing before nobody waits for it.
const OUTPUT: Limits = Limits { bytes: 64 << 10, patience: Duration::from_secs(2) };

/// What a run that is to stop still leaves a reader of its output, and of its messages.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// The user's side of a run; lives over restarts.
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Apart, since to print them may take a moment.
    statistics: Mutex<Option<Arc<Statistics>>>,
    input: Input,
}

#[derive(Default)]
struct State {
    end: End,
    /// The machine of the moment.
    machine: Option<Ends>,
    /// What the program is doing, for whoever waits for it.
    phase: String,
}

/// What of a machine the user reaches.
#[derive(Clone)]
struct Ends {
    uart: Arc<Uart>,
    pm: Arc<PmBlock>,
    stop: StopHandle,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// Listens for signals from now on.
    pub fn new() -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let signals = signals::listen().context("cannot listen for signals")?;
        let heard = Arc::clone(&shared);
        spawn("signals", move || {
            signals::run(signals, |meaning| match meaning {
                Meaning::End(wish) => heard.wish(wish),
                Meaning::Statistics => {
                    if let Some(statistics) = &*lock(&heard.statistics) {
                        statistics.print();
                    }
                }
                Meaning::Continued => terminal::resume(),
            });
        })?;
        let carried_out = Arc::clone(&shared);
        spawn("end", move || carried_out.carry_out())?;
        Ok(Self { shared })
    }

    /// Reads standard input for the guest from now on. A terminal is made raw.
    pub fn listen_to_keyboard(&self) -> anyhow::Result<()> {
        if terminal::is_there() {
            say!("Ctrl-A x ends the guest, Ctrl-A h lists the keys");
            terminal::take();
        }
        let typed = Arc::clone(&self.shared);
        spawn("keyboard", move || {
            let act = |key| match key {
                Key::End => typed.wish(Wish::Stop),
                _ => say!(
                    "Ctrl-A x ends the guest, Ctrl-A Ctrl-A sends one Ctrl-A, Ctrl-A h lists the keys; \
                     all others are the guest's"
                ),
            };
            keyboard::run(&typed.input, || typed.pass(), act);
        })
    }

    /// The cable between this console and the serial port of a machine that `stop` stops. Without an
    /// `output`, nothing that the guest sends goes anywhere.
    pub fn cable(&self, output: Option<Outlet>, stop: StopHandle) -> Arc<dyn Cable> {
        Arc::new(Line { output, shared: Arc::clone(&self.shared), stop })
    }

    /// From now on, keys and the wish to end go to `machine`; one that was there before, too.
    pub fn attach(&self, machine: &Machine, statistics: &Arc<Statistics>) {
        *lock(&self.shared.statistics) = Some(Arc::clone(statistics));
        let ends = Ends { uart: machine.uart(), pm: machine.pm(), stop: machine.stop_handle() };
        let mut state = lock(&self.shared.state);
        state.machine = Some(ends);
        state.end.guest_comes();
        drop(state);
        self.shared.changed.notify_all();
    }

    /// The machine is gone.
    pub fn detach(&self) {
        let mut state = lock(&self.shared.state);
        state.machine = None;
        state.end.guest_goes();
        drop(state);
        *lock(&self.shared.statistics) = None;
    }

    /// Whether somebody wants the run to end: no machine is to be started any more.
    pub fn end_wanted(&self) -> bool {
        lock(&self.shared.state).end.is_wanted()
    }

    /// Sleeps for so long, or until somebody wants the run to end, and returns whether that is so.
    pub fn wait_for_end(&self, timeout: Duration) -> bool {
        let state = lock(&self.shared.state);
        let waited =
            self.shared.changed.wait_timeout_while(state, timeout, |state| !state.end.is_wanted());
        waited.unwrap_or_else(PoisonError::into_inner).0.end.is_wanted()
    }

    /// What the program does from now on, as "… waits for WHAT" would name it.
    pub fn waits_for(&self, what: impl Into<String>) {
        lock(&self.shared.state).phase = what.into();
    }

    /// Waits until what the guest has sent is written, as long as somebody reads it, or until somebody
    /// wants the run to stop.
    pub fn flush(&self, output: &Outlet) {
        let until = Instant::now() + LAST_WORDS;
        let hurry = || lock(&self.shared.state).end.is_stopping() && Instant::now() >= until;
        let left = output.flush(hurry);
        if left > 0 {
            tracing::warn!("the last {left} bytes of the serial port's output were not read");
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        terminal::restore();
    }
}

/// The threads end with the program: they wait for the user, who may be silent for ever.
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.spawn(run).with_context(|| format!("cannot start the thread {name}"))?;
    Ok(())
}

/// Where the serial port's output goes.
pub fn output(descriptor: OwnedFd) -> io::Result<Outlet> {
    Outlet::new(descriptor, OUTPUT, "serial-out", |event| match event {
        Event::Stalled => tracing::warn!(
            "nobody takes the serial port's output; until somebody does, only the last of it is kept"
        ),
        Event::Resumed(lost) => {
            tracing::warn!("{lost} bytes of the serial port's output are lost");
        }
        Event::Failed(error) => {
            tracing::warn!(%error, "the serial port's output is lost");
        }
        Event::Closed => tracing::warn!("the serial port's output is lost: its reader has gone"),
    })
}

/// The same, to standard output.
pub fn standard_output() -> io::Result<Outlet> {
    output(io::stdout().as_fd().try_clone_to_owned()?)
}

impl Shared {
    fn wish(&self, wish: Wish) {
        lock(&self.state).end.wish(wish, Instant::now());
        self.changed.notify_all();
    }

    /// There is something for the guest to read.
    fn pass(&self) {
        let uart = lock(&self.state).machine.as_ref().map(|machine| Arc::clone(&machine.uart));
        if let Some(uart) = uart {
            uart.receive();
        }
    }

    /// Does what is to be done when it is to be done.
    fn carry_out(&self) {
        let mut state = lock(&self.state);
        loop {
            let now = Instant::now();
            if let Some(act) = state.end.due(now) {
                let (machine, phase) = (state.machine.clone(), state.phase.clone());
                drop(state);
                let seen = perform(act, machine.as_ref(), &phase);
                state = lock(&self.state);
                if seen {
                    state.end.button_seen(now);
                }
                continue;
            }
            state = match state.end.next() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let waited =
                        self.changed.wait_timeout(state, at.saturating_duration_since(now));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// Returns whether the guest has seen its power button.
fn perform(act: Act, machine: Option<&Ends>, phase: &str) -> bool {
    match act {
        Act::SayAsked => say!("pressing the guest's power button; again to stop it"),
        Act::Press => {
            if let Some(machine) = machine {
                if machine.pm.power_button_seen() {
                    return true;
                }
                machine.pm.press_power_button();
            }
        }
        Act::Stop => {
            if let Some(machine) = machine {
                machine.stop.stop(StopReason::Stopped);
            }
        }
        Act::SayWaiting => say!("waiting for {phase}; once more to end without"),
        Act::Exit => {
            terminal::restore();
            say!("ended without waiting for {phase}");
            log::flush(LAST_WORDS);
            signal_hook::low_level::exit(1);
        }
    }
    false
}

/// A cable to this console.
struct Line {
    output: Option<Outlet>,
    shared: Arc<Shared>,
    stop: StopHandle,
}

impl Cable for Line {
    fn send(&self, bytes: &[u8]) {
        if let Some(output) = &self.output {
            output.send(bytes, || self.stop.is_stopping());
        }
    }

    fn receive(&self, room: &mut [u8]) -> usize {
        self.shared.input.take(room)
    }
}
