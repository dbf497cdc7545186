//! Log lines that a guest can cause, held to a few a second.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// Lines a second that one place in the code may write.
const LINES: u32 = 5;

/// A place's account: which second it is, and how many lines it has written in it.
pub(crate) struct Limit {
    second: AtomicU64,
    lines: AtomicU32,
}

impl Limit {
    pub(crate) const fn new() -> Self {
        Self { second: AtomicU64::new(0), lines: AtomicU32::new(0) }
    }

    /// Whether a line may be written now.
    pub(crate) fn allows(&self) -> bool {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let now = START.get_or_init(Instant::now).elapsed().as_secs() + 1;
        if self.second.swap(now, Ordering::Relaxed) != now {
            self.lines.store(0, Ordering::Relaxed);
        }
        self.lines.fetch_add(1, Ordering::Relaxed) < LINES
    }
}

/// Writes a log line unless this place has written too many in this second.
macro_rules! limited {
    ($level:ident!($($line:tt)*)) => {{
        static LIMIT: $crate::limited::Limit = $crate::limited::Limit::new();
        if LIMIT.allows() {
            $level!($($line)*);
        }
    }};
}

pub(crate) use limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_cut_off() {
        let limit = Limit::new();
        // At most two seconds pass here.
        assert!((0..1000).filter(|_| limit.allows()).count() <= 2 * LINES as usize);
    }
}
