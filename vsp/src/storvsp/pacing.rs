//! When to wait a moment: the policy that turns single requests into batches, and sleep into
//! short spins, without costing a guest that sends one request at a time.
//!
//! A disk that is faster than its guest completes every request before the next one arrives, and
//! then each request pays for a system call and an interrupt of its own, however deep the guest's
//! queue is. Waiting a little for company makes one call and one interrupt serve many. But a
//! guest that sends one request and waits for it must not be kept waiting for company that never
//! comes. The two cannot be told apart by looking, only by trying: now and then one request is
//! held for about the time the next would take to arrive. If one does, more are expected next
//! time; if none does, the next trial is put off twice as long.
//!
//! A guest that is interrupted for each request sends slowly for that very reason. So the time
//! between requests is kept twice: as it is when each is answered at once, and as it is when they
//! are held. Holding goes on only as long as it pays: if requests do not come sooner with it than
//! without, they are single again.
//!
//! Nor can a sleeper tell how soon the next request would have come. To wake it the guest must
//! signal, which may cost it more than the request: then requests come slowly because the worker
//! sleeps, and it sleeps because they come slowly. So now and then it keeps vigil over a few
//! requests, and stays awake from then on if they come faster.
//!
//! How long is short depends on the host: under nested or emulated virtualization a system call
//! costs fifty times what it does elsewhere, and so do exits. All bounds here are therefore
//! multiples of one measured unit, a write to and a read from an eventfd.
//!
//! The policy does no I/O and reads no clock; its worker tells it the time.

use std::time::Duration;

/// Never expect more company than this: larger batches save little and delay the first request.
const LARGEST_BATCH: u32 = 16;
/// The first trial after the guest was seen to send single requests, in batches.
const FIRST_TRIAL: u32 = 4;
/// The longest distance between two trials, in batches.
const LAST_TRIAL: u32 = 512;
/// Over how many batches it is seen whether they pay.
const PROBATION: u32 = 8;
/// The longest wait for company or for work, in units of the host's system-call cost.
const PATIENCE: u32 = 64;

/// The longest time between two requests over which vigil is kept, in units of patience.
const VIGIL: u32 = 4;
/// The longest that a request is held for the next, in the same units.
const LONGEST_HOLD: u32 = 6;
/// Over how many requests vigil is kept: the first may still be delayed by the signal before it.
const VIGIL_LENGTH: u32 = 3;

/// The pace of one channel.
#[derive(Debug)]
pub(super) struct Pacer {
    /// The longest that anything is waited for.
    patience: Duration,
    /// How many requests to gather before they are handed on together.
    expected: u32,
    /// The last batch, if it was smaller than expected.
    remainder: Option<u32>,
    /// Moving average of the time between two arrivals.
    gap: Duration,
    /// What `gap` was when requests last came alone.
    alone: Duration,
    /// What it is in batches, from the last of one to the last of the next.
    together: Duration,
    /// How many batches of more than one there were since it was last asked whether they pay.
    batches: u32,
    /// When the last request of the last batch arrived.
    last_batch: Duration,
    last_arrival: Option<Duration>,
    /// Batches until the next trial, and the distance between the last two.
    until_trial: u32,
    trial_distance: u32,
    /// Requests over which vigil is still to be kept.
    vigil: u32,
    /// Sleeps until the next vigil, and the distance between the last two.
    until_vigil: u32,
    vigil_distance: u32,
}

impl Pacer {
    /// A pacer for a host on which two small system calls take `unit`.
    pub(super) fn new(unit: Duration) -> Self {
        Self {
            patience: unit.saturating_mul(PATIENCE),
            expected: 1,
            remainder: None,
            gap: Duration::ZERO,
            alone: Duration::ZERO,
            together: Duration::ZERO,
            batches: 0,
            last_batch: Duration::ZERO,
            last_arrival: None,
            until_trial: FIRST_TRIAL,
            trial_distance: FIRST_TRIAL,
            vigil: 0,
            until_vigil: FIRST_TRIAL,
            vigil_distance: FIRST_TRIAL,
        }
    }

    /// `count` requests arrived by `now` (any monotonic origin).
    pub(super) fn arrived(&mut self, now: Duration, count: u32) {
        if let Some(last) = self.last_arrival {
            let gap = (now.saturating_sub(last) / count.max(1)).min(self.patience * VIGIL);
            if self.vigil > 0 && gap <= self.patience {
                // They come soon enough as long as nobody has to be woken.
                self.vigil = 0;
                self.vigil_distance = FIRST_TRIAL;
                self.gap = gap;
            } else {
                self.gap = average(self.gap, gap);
            }
        }
        self.vigil = self.vigil.saturating_sub(1);
        self.last_arrival = Some(now);
    }

    /// `gathered` requests are held, the last of which came at the last `arrived`. Until when to
    /// wait for another before handing them on; `None`: hand them on now.
    pub(super) fn hold_until(&mut self, gathered: u32) -> Option<Duration> {
        if gathered == 0 || gathered >= self.target() {
            return None;
        }
        // Who is not disturbed sends no later than otherwise. A batch that ends disturbs longer.
        let window = (self.alone + self.alone / 2).min(self.patience * LONGEST_HOLD);
        Some(self.last_arrival.unwrap_or_default() + window)
    }

    /// How many to gather this time: on trial, twice as many as were expected.
    fn target(&self) -> u32 {
        if self.until_trial == 0 { (self.expected * 2).min(LARGEST_BATCH) } else { self.expected }
    }

    /// `gathered` requests were handed on together: learn from it.
    pub(super) fn handed_on(&mut self, gathered: u32) {
        let gathered = gathered.clamp(1, LARGEST_BATCH);
        if self.until_trial > 0 {
            self.until_trial -= 1;
        } else if gathered > self.expected {
            // More than expected: try for still more at once.
            self.expected = gathered;
        } else {
            self.postpone_trial();
        }
        // A burst leaves a small batch behind when it ends, and the next burst is like the last: only
        // two small ones in a row are news.
        let small = (gathered < self.expected).then_some(gathered);
        if let (Some(other), Some(gathered)) = (self.remainder.take(), small) {
            self.expected = gathered.max(other);
        } else {
            self.remainder = small;
        }

        let last = self.last_arrival.unwrap_or_default();
        let gap = (last.saturating_sub(self.last_batch) / gathered).min(self.patience * VIGIL);
        self.last_batch = last;
        if self.expected == 1 {
            self.alone = self.gap;
            self.batches = 0;
        } else {
            self.together = if self.batches == 0 { gap } else { average(self.together, gap) };
            self.batches += 1;
            if self.batches == PROBATION {
                if self.pays() {
                    self.batches = 1;
                    self.trial_distance = FIRST_TRIAL;
                } else {
                    self.expected = 1;
                    self.batches = 0;
                    self.postpone_trial();
                }
            }
        }
    }

    /// Puts the next trial off for twice as long as the last.
    fn postpone_trial(&mut self) {
        self.trial_distance = (self.trial_distance * 2).min(LAST_TRIAL);
        self.until_trial = self.trial_distance;
    }

    /// Whether batches pay. If requests come quickly, they spare the host much even if they spare the
    /// guest nothing; otherwise it must be clear that they come sooner.
    fn pays(&self) -> bool {
        let (alone, together) = (self.alone, self.together);
        if together <= self.patience {
            together <= alone + alone / 4
        } else {
            together + together / 2 <= alone
        }
    }

    /// Until when to look for a new request before going to sleep, if at `now` there is none.
    /// `None`: the next one is too far off, or has been missed already; sleep.
    pub(super) fn spin_until(&self) -> Option<Duration> {
        let wait = match self.vigil {
            _ if self.gap <= self.patience => (self.gap * 2).min(self.patience),
            0 => return None,
            _ => self.patience * VIGIL,
        };
        Some(self.last_arrival.unwrap_or_default() + wait)
    }

    /// The worker has slept.
    pub(super) fn slept(&mut self) {
        self.vigil = 0;
        self.until_vigil = self.until_vigil.saturating_sub(1);
        if self.until_vigil == 0 {
            self.vigil = VIGIL_LENGTH;
            self.vigil_distance = (self.vigil_distance * 2).min(LAST_TRIAL);
            self.until_vigil = self.vigil_distance;
        }
    }
}

/// Seven eighths of the old and one of the new: follows a change within a batch or two.
fn average(old: Duration, new: Duration) -> Duration {
    (old * 7 + new) / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Duration = Duration::from_nanos(500);

    /// Serves a guest that keeps `depth` requests in flight, needs `cost` of its own time for each
    /// and `interrupt` for each batch that is answered, and whose disk answers at once. Returns
    /// requests, batches, and for how long requests were held in vain.
    fn serve(
        depth: u32,
        cost: Duration,
        interrupt: Duration,
        requests: u32,
    ) -> (u32, u32, Duration) {
        let mut pacer = Pacer::new(UNIT);
        let mut now = Duration::from_secs(1);
        let (mut served, mut batches) = (0, 0);
        let mut waiting = depth; // requests the guest can still send
        let mut held = Duration::ZERO;
        while served < requests {
            now += cost;
            pacer.arrived(now, 1);
            waiting -= 1;
            let mut gathered = 1;
            while let Some(until) = pacer.hold_until(gathered) {
                if waiting > 0 && now + cost <= until {
                    now += cost;
                    waiting -= 1;
                    gathered += 1;
                    pacer.arrived(now, 1);
                } else {
                    held += until - now;
                    now = until;
                    break;
                }
            }
            pacer.handed_on(gathered);
            served += gathered;
            batches += 1;
            waiting += gathered;
            now += interrupt;
        }
        (served, batches, held)
    }

    #[test]
    fn a_deep_queue_is_served_in_batches() {
        let (served, batches, _) = serve(32, Duration::from_micros(3), Duration::ZERO, 100_000);
        assert!(batches * 8 < served, "{batches} batches for {served} requests");
    }

    #[test]
    fn a_shallow_queue_is_served_whole() {
        let (served, batches, _) = serve(4, Duration::from_micros(3), Duration::ZERO, 100_000);
        assert!(batches * 2 < served, "{batches} batches for {served} requests");
    }

    #[test]
    fn a_guest_that_is_slow_for_its_interrupts_is_served_in_batches() {
        let patience = UNIT * PATIENCE;
        let (served, batches, _) = serve(32, patience * 6 / 5, patience * 2, 100_000);
        assert!(batches * 8 < served, "{batches} batches for {served} requests");
    }

    #[test]
    fn a_single_request_is_hardly_ever_held() {
        let cost = Duration::from_micros(10);
        let (served, batches, held) = serve(1, cost, Duration::ZERO, 100_000);
        assert_eq!(served, batches);
        assert!(held < cost * served / 100, "held {held:?} in all");
    }

    /// Serves a guest with one request at a time, which needs `cost` of its own time for each and `signal` more to
    /// wake the worker. Returns how often it slept, and for how long it spun in vain.
    fn wake(cost: Duration, signal: Duration, requests: u32) -> (u32, Duration) {
        let mut pacer = Pacer::new(UNIT);
        let mut now = Duration::from_secs(1);
        let (mut sleeps, mut in_vain) = (0, Duration::ZERO);
        // When the guest has recovered from its last signal.
        let mut recovered = now;
        for _ in 0..requests {
            pacer.arrived(now, 1);
            pacer.handed_on(1);
            let next = now.max(recovered) + cost;
            match pacer.spin_until() {
                Some(until) if next <= until => now = next,
                until => {
                    in_vain += until.map_or(Duration::ZERO, |until| until.saturating_sub(now));
                    sleeps += 1;
                    pacer.slept();
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

    #[test]
    fn a_slow_guest_is_never_held_in_vain() {
        let cost = UNIT * PATIENCE * 2;
        let (served, batches, held) = serve(32, cost, Duration::ZERO, 10_000);
        assert!(held < cost * served / 1000, "held {held:?} in all");
        assert!(batches * 10 > served * 7, "{batches} batches for {served} requests");
    }
}
