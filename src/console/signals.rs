//! The signals that the program listens for while it runs a guest.
//!
//! What a user's shell or service manager sends to end a program asks: INT, TERM and HUP. QUIT stops.
//! A hangup that whoever started the program ignores, as `nohup` does, stays ignored. PIPE is ignored
//! by every Rust program, so that a reader that has gone is an error of the write.

use std::io;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::end::Wish;

/// The same signal twice so shortly after another is one: `timeout` sends it to its child, and then to
/// the process group that this child is in.
const ECHO: Duration = Duration::from_millis(100);

/// What a signal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// Somebody wants the guest to end.
    End(Wish),
    /// Somebody wants to see the statistics.
    Statistics,
    /// The program was stopped and goes on; the terminal may have been somebody else's meanwhile.
    Continued,
}

/// Listens from now on.
pub fn listen() -> io::Result<Signals> {
    let hangup = (!is_ignored(SIGHUP)).then_some(SIGHUP);
    Signals::new([SIGINT, SIGTERM, SIGQUIT, SIGUSR1, SIGCONT].into_iter().chain(hangup))
}

/// Calls `mean` for each signal, for ever.
pub fn run(mut signals: Signals, mean: impl Fn(Meaning)) {
    let mut last: Option<(i32, Instant)> = None;
    for signal in signals.forever() {
        let meaning = match signal {
            SIGUSR1 => Meaning::Statistics,
            SIGCONT => Meaning::Continued,
            SIGQUIT => Meaning::End(Wish::Stop),
            _ => Meaning::End(Wish::Ask),
        };
        if matches!(meaning, Meaning::End(_)) {
            let now = Instant::now();
            let echo = last.is_some_and(|(other, at)| other == signal && now - at < ECHO);
            last = Some((signal, now));
            if echo {
                continue;
            }
        }
        mean(meaning);
    }
}

/// Whether this signal is ignored.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignored_in(&status).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The mask of ignored signals, from the lowest number on (proc_pid_status(5), "SigIgn").
fn ignored_in(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        assert_eq!(ignored_in("Name:\tx\nSigBlk:\tff\nSigIgn:\t0000000000001001\n"), Some(0x1001));
        assert_eq!(ignored_in("Name:\tx\n"), None);
        assert!(is_ignored(signal_hook::consts::SIGPIPE), "as in every Rust program");
        assert!(!is_ignored(signal_hook::consts::SIGSEGV));
    }
}
