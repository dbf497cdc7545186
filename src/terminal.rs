//! The user's end of the serial port, and the signals that end a run.
//!
//! On a terminal every key goes to the guest, Ctrl-C included: the terminal is put into raw mode
//! and restored at the end. Two Ctrl-C within two seconds end the run, as do two SIGINT where
//! standard input is no terminal. SIGTERM presses the guest's power button; a second one ends the
//! run. SIGUSR1 prints what the machine has counted so far.

use std::io::{self, IsTerminal, Read};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::machine::Machine;
use crate::statistics::Statistics;
use anyhow::Context;
use emulators::{PmBlock, Uart};
use hypervisor::{StopHandle, StopReason};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

/// What Ctrl-C sends.
const CTRL_C: u8 = 3;

/// How close two Ctrl-C have to be.
const TWICE: Duration = Duration::from_secs(2);

/// How the terminal was, while it is raw; for whoever ends the program, a panic too.
static COOKED: OnceLock<Termios> = OnceLock::new();

/// The user's side of a run; lives over restarts.
pub struct Console {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    /// The machine of the moment.
    machine: Option<Ends>,
    last_interrupt: Option<Instant>,
    power_button_pressed: bool,
    stopped: bool,
}

/// What of a machine the user reaches.
struct Ends {
    uart: Arc<Uart>,
    pm: Arc<PmBlock>,
    stop: StopHandle,
    statistics: Arc<Statistics>,
}

impl Shared {
    /// One Ctrl-C. The second in a row ends the run.
    fn interrupt(&mut self) {
        let now = Instant::now();
        let twice = self.last_interrupt.is_some_and(|last| now.duration_since(last) < TWICE);
        self.last_interrupt = Some(now);
        if twice {
            self.stop();
        }
    }

    /// Somebody wants the guest to end.
    fn terminate(&mut self) {
        if self.power_button_pressed {
            return self.stop();
        }
        self.power_button_pressed = true;
        if let Some(machine) = &self.machine {
            machine.pm.press_power_button();
        }
    }

    fn print_statistics(&self) {
        if let Some(machine) = &self.machine {
            machine.statistics.print();
        }
    }

    fn stop(&mut self) {
        self.stopped = true;
        if let Some(machine) = &self.machine {
            machine.stop.stop(StopReason::Stopped);
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// Starts to listen for signals and, if the serial port leads to `stdio`, to the keyboard.
    pub fn new(stdio: bool) -> anyhow::Result<Self> {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1])
            .context("cannot listen for signals")?;
        let heard = Arc::clone(&shared);
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGUSR1 => lock(&heard).print_statistics(),
                    SIGINT => {
                        eprintln!("partita: twice to stop the guest");
                        lock(&heard).interrupt();
                    }
                    _ => {
                        eprintln!("partita: pressing the guest's power button; again to stop it");
                        lock(&heard).terminate();
                    }
                }
            }
        })?;
        if stdio {
            make_raw();
            let typed = Arc::clone(&shared);
            // It ends with the program, asleep in a read.
            thread::Builder::new().name("keyboard".into()).spawn(move || keyboard(&typed))?;
        }
        Ok(Self { shared })
    }

    /// From now on, keys and the wish to end go to `machine`.
    pub fn attach(&self, machine: &Machine, statistics: &Arc<Statistics>) {
        let ends = Ends {
            uart: machine.uart(),
            pm: machine.pm(),
            stop: machine.stop_handle(),
            statistics: Arc::clone(statistics),
        };
        lock(&self.shared).machine = Some(ends);
    }

    /// Whether somebody wants the run to end, so that no other machine is to follow.
    pub fn wants_end(&self) -> bool {
        let shared = lock(&self.shared);
        shared.power_button_pressed || shared.stopped
    }

    /// The machine is gone.
    pub fn detach(&self) {
        lock(&self.shared).machine = None;
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        restore();
    }
}

fn keyboard(shared: &Mutex<Shared>) {
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut buffer) {
        let mut typed = buffer.get(..count).unwrap_or_default();
        for _ in typed.iter().filter(|byte| **byte == CTRL_C && COOKED.get().is_some()) {
            lock(shared).interrupt();
        }
        while !typed.is_empty() {
            let uart = lock(shared).machine.as_ref().map(|ends| Arc::clone(&ends.uart));
            let taken = uart.map_or(typed.len(), |uart| uart.receive(typed));
            typed = typed.get(taken..).unwrap_or_default();
            if taken == 0 {
                // The guest's FIFO is full.
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

fn make_raw() {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return;
    }
    let Ok(cooked) = tcgetattr(&stdin) else { return };
    let mut raw = cooked.clone();
    raw.make_raw();
    // A newline of the program's own messages still returns the carriage.
    raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
    if COOKED.set(cooked).is_ok() && tcsetattr(&stdin, OptionalActions::Now, &raw).is_ok() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            hook(panic);
        }));
    }
}

fn restore() {
    if let Some(cooked) = COOKED.get() {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, cooked);
    }
}
