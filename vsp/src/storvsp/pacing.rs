//! When to wait a moment: the policy that turns single requests into batches without costing a guest
//! that sends one request at a time.
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
//! Whether a worker stays awake when there is no request at all is [`Vigil`]'s business. All bounds
//! here are multiples of what the host's system calls cost, as there.
//!
//! The policy does no I/O and reads no clock; its worker tells it the time.

use std::time::Duration;

use crate::vigil::{Vigil, average};

/// Never expect more company than this: larger batches save little and delay the first request.
const LARGEST_BATCH: u32 = 16;
/// The first trial after the guest was seen to send single requests, in batches.
const FIRST_TRIAL: u32 = 4;
/// The longest distance between two trials, in batches.
const LAST_TRIAL: u32 = 512;
/// Over how many batches it is seen whether they pay.
const PROBATION: u32 = 8;
/// The longest that a request is held for the next, in units of patience.
const LONGEST_HOLD: u32 = 6;

/// The pace of one channel.
#[derive(Debug)]
pub(super) struct Pacer {
    /// Whether to stay awake; it knows the time between two arrivals.
    vigil: Vigil,
    /// How many requests to gather before they are handed on together.
    expected: u32,
    /// The last batch, if it was smaller than expected.
    remainder: Option<u32>,
    /// What the time between two arrivals was when requests last came alone.
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
}

impl Pacer {
    /// A pacer for a host on which two small system calls take `unit`.
    pub(super) fn new(unit: Duration) -> Self {
        Self {
            vigil: Vigil::new(unit),
            expected: 1,
            remainder: None,
            alone: Duration::ZERO,
            together: Duration::ZERO,
            batches: 0,
            last_batch: Duration::ZERO,
            last_arrival: None,
            until_trial: FIRST_TRIAL,
            trial_distance: FIRST_TRIAL,
        }
    }

    /// `count` requests arrived by `now` (any monotonic origin).
    pub(super) fn arrived(&mut self, now: Duration, count: u32) {
        if let Some(last) = self.last_arrival {
            self.vigil.arrived(now.saturating_sub(last) / count.max(1));
        }
        self.last_arrival = Some(now);
    }

    /// `gathered` requests are held, the last of which came at the last `arrived`. Until when to
    /// wait for another before handing them on; `None`: hand them on now.
    pub(super) fn hold_until(&mut self, gathered: u32) -> Option<Duration> {
        if gathered == 0 || gathered >= self.target() {
            return None;
        }
        // Who is not disturbed sends no later than otherwise. A batch that ends disturbs longer.
        let window = (self.alone + self.alone / 2).min(self.vigil.patience() * LONGEST_HOLD);
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
        let gap = self.vigil.bounded(last.saturating_sub(self.last_batch) / gathered);
        self.last_batch = last;
        if self.expected == 1 {
            self.alone = self.vigil.gap();
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
        if together <= self.vigil.patience() {
            together <= alone + alone / 4
        } else {
            together + together / 2 <= alone
        }
    }

    /// Until when to look for a new request before going to sleep, if at `now` there is none.
    /// `None`: the next one is too far off, or has been missed already; sleep.
    pub(super) fn spin_until(&self) -> Option<Duration> {
        Some(self.last_arrival.unwrap_or_default() + self.vigil.wait()?)
    }

    /// The worker has slept.
    pub(super) fn slept(&mut self) {
        self.vigil.slept();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vigil::PATIENCE;

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

    #[test]
    fn a_slow_guest_is_never_held_in_vain() {
        let cost = UNIT * PATIENCE * 2;
        let (served, batches, held) = serve(32, cost, Duration::ZERO, 10_000);
        assert!(held < cost * served / 1000, "held {held:?} in all");
        assert!(batches * 10 > served * 7, "{batches} batches for {served} requests");
    }
}
