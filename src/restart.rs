//! What a guest's reset leads to: the next machine, at once or after a pause, or the end.
//!
//! A guest that resets itself as soon as it runs, for want of a root file system for instance, would
//! otherwise do so for ever and take a processor for it. So each restart is told in a line, and those
//! of a guest that does not live for long wait longer and longer.

use std::process::ExitCode;
use std::time::Duration;

use crate::console::Console;
use crate::log::say;

/// The program's status if a guest's reset ends it: neither the success of a guest that switched
/// itself off nor an error of this program. A kernel that panics with `panic=-1` ends so.
pub const RESET_STATUS: u8 = 2;

/// A guest that has lived so long has not just failed to start.
const LONG_LIFE: Duration = Duration::from_secs(30);

/// The pause before the second restart in a row; each one after it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// How a guest came to its reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It asked for one.
    Asked,
    /// A triple fault.
    BrokeDown,
}

impl Cause {
    fn describe(self) -> &'static str {
        match self {
            Self::Asked => "the guest has reset itself",
            Self::BrokeDown => "the guest has broken down (triple fault)",
        }
    }
}

/// The restarts of a run so far.
#[derive(Debug, Default)]
pub struct Restarts {
    count: u64,
    /// Those in a row that came soon.
    quick: u32,
}

impl Restarts {
    /// Another one, of a guest that `lived` so long. How long to wait before it.
    fn pause(&mut self, lived: Duration) -> Duration {
        self.count += 1;
        self.quick = if lived < LONG_LIFE { self.quick.saturating_add(1) } else { 0 };
        match self.quick.checked_sub(2) {
            None => Duration::ZERO,
            Some(doublings) => FIRST_PAUSE
                .saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX))
                .min(LONGEST_PAUSE),
        }
    }

    /// Says that the guest starts again, and waits until it may. False if the user wants the end.
    pub fn wait(&mut self, cause: Cause, lived: Duration, console: &Console) -> bool {
        if console.end_wanted() {
            return false;
        }
        let pause = self.pause(lived);
        let when = match pause {
            Duration::ZERO => String::new(),
            pause => format!(" in {} s", pause.as_secs_f64()),
        };
        say!(
            "{} after {:.1} s; restart {}{when}",
            cause.describe(),
            lived.as_secs_f64(),
            self.count
        );
        !console.wait_for_end(pause)
    }
}

/// Says why a reset is the end, and with which status.
pub fn end(cause: Cause) -> ExitCode {
    say!("{}; --on-reset exit ends the run", cause.describe());
    RESET_STATUS.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_each_quick_restart_and_end_with_a_long_life() {
        let mut restarts = Restarts::default();
        let mut pause = |lived| restarts.pause(Duration::from_secs(lived)).as_millis();
        let grown: Vec<_> = (0..8).map(|_| pause(1)).collect();
        assert_eq!(grown, [0, 250, 500, 1000, 2000, 4000, 8000, 8000]);
        for _ in 0..100 {
            assert_eq!(pause(0), 8000);
        }
        assert_eq!(pause(30), 0);
        assert_eq!([pause(1), pause(1), pause(1)], [0, 250, 500]);
        assert_eq!(restarts.count, 112);
    }
}
