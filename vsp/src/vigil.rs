//! Whether a worker stays awake for a moment before it goes to sleep.
//!
//! To wake a sleeper costs the guest a signal, and the host the way into a thread. A worker whose
//! next packet is near does better to look for it. How near it is follows from those before.
//!
//! A sleeper cannot tell how soon the next packet would have come, though. To wake it the guest must
//! signal, which may cost it more than the packet: then packets come slowly because the worker
//! sleeps, and it sleeps because they come slowly. So now and then it keeps vigil over a few
//! packets, and stays awake from then on if they come faster.
//!
//! How long is short depends on the host: under nested or emulated virtualization a system call
//! costs fifty times what it does elsewhere, and so do exits. All bounds are therefore multiples of
//! one measured unit, a write to and a read from an eventfd.
//!
//! The policy does no I/O and reads no clock; its worker tells it the time.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// The longest wait for work that is near, in units of the host's system-call cost.
pub(crate) const PATIENCE: u32 = 64;

/// The longest time between two packets over which vigil is kept, in units of patience.
const VIGIL: u32 = 4;
/// Over how many packets vigil is kept: the first may still be delayed by the signal before it.
const VIGIL_LENGTH: u32 = 3;
/// The first vigil after packets were seen to come slowly, in sleeps.
const FIRST_VIGIL: u32 = 4;
/// The longest distance between two vigils, in sleeps.
const LAST_VIGIL: u32 = 512;

/// How one kind of work comes to a worker.
#[derive(Debug)]
pub(crate) struct Vigil {
    /// The longest that anything is waited for.
    patience: Duration,
    /// Moving average of the time between two arrivals.
    gap: Duration,
    /// Arrivals over which vigil is still to be kept.
    left: u32,
    /// Sleeps until the next vigil, and the distance between the last two.
    until_next: u32,
    distance: u32,
}

impl Vigil {
    /// For a host on which two small system calls take `unit`.
    pub(crate) fn new(unit: Duration) -> Self {
        Self {
            patience: unit.saturating_mul(PATIENCE),
            gap: Duration::ZERO,
            left: 0,
            until_next: FIRST_VIGIL,
            distance: FIRST_VIGIL,
        }
    }

    /// What is soon.
    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    /// The time between two arrivals, on average; what is longer than four times the patience
    /// counts as that.
    pub(crate) fn gap(&self) -> Duration {
        self.gap
    }

    /// `gap` after what was last, there is something.
    pub(crate) fn arrived(&mut self, gap: Duration) {
        let gap = self.bounded(gap);
        if self.left > 0 && gap <= self.patience {
            // They come soon enough as long as nobody has to be woken.
            self.left = 0;
            self.distance = FIRST_VIGIL;
            self.gap = gap;
        } else {
            self.gap = average(self.gap, gap);
        }
        self.left = self.left.saturating_sub(1);
    }

    /// A gap, as far as it matters.
    pub(crate) fn bounded(&self, gap: Duration) -> Duration {
        gap.min(self.patience * VIGIL)
    }

    /// For how long after what was last to look for something new. `None`: it is too far off, or
    /// nobody knows; sleep.
    pub(crate) fn wait(&self) -> Option<Duration> {
        match self.left {
            _ if self.gap <= self.patience => Some((self.gap * 2).min(self.patience)),
            0 => None,
            _ => Some(self.patience * VIGIL),
        }
    }

    /// The worker has slept.
    pub(crate) fn slept(&mut self) {
        self.left = 0;
        self.until_next = self.until_next.saturating_sub(1);
        if self.until_next == 0 {
            self.left = VIGIL_LENGTH;
            self.distance = (self.distance * 2).min(LAST_VIGIL);
            self.until_next = self.distance;
        }
    }
}

/// Seven eighths of the old and one of the new: follows a change within a batch or two.
pub(crate) fn average(old: Duration, new: Duration) -> Duration {
    (old * 7 + new) / 8
}

/// Whether there are processors to spare for workers that stay awake beside `vps` virtual
/// processors: they must not take one that their guest runs on.
pub(crate) fn has_spare_processors(vps: u32) -> bool {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    processors > usize::try_from(vps).unwrap_or(usize::MAX)
}

/// What two small system calls cost on this host: the best of a few writes to and reads from an
/// eventfd. Under emulation that is fifty times what it is elsewhere, and so is all that waiting
/// could spare.
pub(crate) fn system_call_cost() -> io::Result<Duration> {
    let event = EventFd::new(EFD_CLOEXEC)?;
    let mut best = Duration::MAX;
    for _ in 0..16 {
        let before = Instant::now();
        event.write(1)?;
        event.read()?;
        best = best.min(before.elapsed());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Duration = Duration::from_nanos(500);

    /// Serves a guest with one packet at a time, which needs `cost` of its own time for each and
    /// `signal` more to wake the worker. Returns how often it slept, and for how long it stayed
    /// awake in vain.
    fn wake(cost: Duration, signal: Duration, packets: u32) -> (u32, Duration) {
        let mut vigil = Vigil::new(UNIT);
        let mut now = Duration::from_secs(1);
        let (mut sleeps, mut in_vain) = (0, Duration::ZERO);
        // When the guest has recovered from its last signal, and when it last sent.
        let (mut recovered, mut last) = (now, now);
        for _ in 0..packets {
            vigil.arrived(now - last);
            last = now;
            let next = now.max(recovered) + cost;
            match vigil.wait() {
                Some(wait) if next <= now + wait => now = next,
                wait => {
                    in_vain += wait.unwrap_or_default();
                    sleeps += 1;
                    vigil.slept();
                    // The worker is up at once, the guest goes on later.
                    now = next;
                    recovered = next + signal;
                }
            }
        }
        (sleeps, in_vain)
    }

    #[test]
    fn a_guest_that_is_slow_for_its_signals_is_waited_for() {
        let patience = UNIT * PATIENCE;
        let (sleeps, _) = wake(patience / 2, patience * 3, 10_000);
        assert!(sleeps < 100, "{sleeps} sleeps");
    }

    #[test]
    fn a_guest_that_is_slow_by_itself_is_hardly_waited_for() {
        let patience = UNIT * PATIENCE;
        for cost in [patience * 2, patience * 3, patience * 50] {
            let (sleeps, in_vain) = wake(cost, patience, 10_000);
            assert!(sleeps > 9_800, "{sleeps} sleeps");
            assert!(in_vain < cost * 10_000 / 50, "{in_vain:?} in vain");
        }
    }
}
