//! Log lines that a guest or a peer can cause, held to a few.
//!
//! Who can break a ring can break it a thousand times a second. If each time wrote a line, a guest could
//! fill its host's disk and hide what matters. So each place in the code that writes such a line has an
//! account: [`BURST`] lines at once, then one in [`PAUSE`]. What was left out is counted, and told with
//! the next line.
//!
//! ```
//! for _ in 0..1000 {
//!     limited::warn!(disk = 3, "a disk of the host failed");
//! }
//! ```
//!
//! What a guest does rightly, though often, is no warning: see `tracing::debug!`.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[doc(hidden)]
pub use tracing;

/// Lines that one place may write at once.
pub const BURST: u64 = 5;

/// The time in which it earns another.
pub const PAUSE: Duration = Duration::from_secs(10);

const PAUSE_MS: u64 = PAUSE.as_millis() as u64;

/// One place's account.
#[derive(Debug)]
pub struct Limit {
    /// When the account is full again, in milliseconds of the clock.
    full_at: AtomicU64,
    left_out: AtomicU64,
}

impl Limit {
    /// A full one.
    pub const fn new() -> Self {
        Self { full_at: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// Whether a line may be written now: how many were left out before it.
    pub fn allows(&self) -> Option<u64> {
        static START: OnceLock<Instant> = OnceLock::new();
        let now = START.get_or_init(Instant::now).elapsed().as_millis();
        self.allows_at(u64::try_from(now).unwrap_or(u64::MAX))
    }

    fn allows_at(&self, now: u64) -> Option<u64> {
        let spend = |full_at: u64| {
            let full_at = full_at.max(now).saturating_add(PAUSE_MS);
            (full_at - now <= BURST * PAUSE_MS).then_some(full_at)
        };
        match self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend) {
            Ok(_) => Some(self.left_out.swap(0, Ordering::Relaxed)),
            Err(_) => {
                self.left_out.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes a line of the given level, as `tracing`'s macro of that name does, unless this place has
/// written too many.
#[macro_export]
macro_rules! limited {
    ($level:ident, $($line:tt)*) => {{
        static LIMIT: $crate::Limit = $crate::Limit::new();
        if let Some(left_out) = LIMIT.allows() {
            if left_out > 0 {
                $crate::tracing::$level!("{left_out} lines like the next were left out");
            }
            $crate::tracing::$level!($($line)*);
        }
    }};
}

/// [`tracing::error!`], [`limited!`].
#[macro_export]
macro_rules! error {
    ($($line:tt)*) => { $crate::limited!(error, $($line)*) };
}

/// [`tracing::warn!`], [`limited!`].
#[macro_export]
macro_rules! warn {
    ($($line:tt)*) => { $crate::limited!(warn, $($line)*) };
}

/// [`tracing::debug!`], [`limited!`].
#[macro_export]
macro_rules! debug {
    ($($line:tt)*) => { $crate::limited!(debug, $($line)*) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_cut_off_and_what_was_left_out_is_told() {
        let limit = Limit::new();
        let written = |at| (0..1000).filter(|_| limit.allows_at(at).is_some()).count() as u64;
        assert_eq!(written(7), BURST);
        assert_eq!(written(7 + PAUSE_MS - 1), 0);
        assert_eq!(limit.allows_at(7 + PAUSE_MS), Some(2000 - BURST));
        assert_eq!(written(7 + PAUSE_MS), 0);
    }

    #[test]
    fn a_day_of_abuse_is_some_thousand_lines() {
        let limit = Limit::new();
        let day = 24 * 60 * 60 * 1000;
        let lines = (0..day).step_by(10).filter(|at| limit.allows_at(*at).is_some()).count() as u64;
        assert_eq!(lines, BURST - 1 + day / PAUSE_MS);
    }

    #[test]
    fn who_was_quiet_may_write_again() {
        let limit = Limit::new();
        assert!((0..BURST).all(|_| limit.allows_at(0).is_some()));
        let later = 10 * BURST * PAUSE_MS;
        assert_eq!((0..100).filter(|_| limit.allows_at(later).is_some()).count() as u64, BURST);
        // A clock that stands still, or has come to its end, harms nobody.
        assert!(limit.allows_at(0).is_none());
        let _ = limit.allows_at(u64::MAX);
    }

    #[test]
    fn places_have_accounts_of_their_own() {
        let place = |quiet: bool| {
            if !quiet {
                crate::warn!(number = 1, "one {}", "place");
            }
            crate::debug!("another");
        };
        (0..100).for_each(|n| place(n % 2 == 0));
        crate::error!("a third");
    }
}
