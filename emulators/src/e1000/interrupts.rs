//! Causes of interrupts, their mask, and when they become one: drivers ask for causes to be held back
//! so that several share an interrupt, and for a pause between interrupts (Intel 317453, 13.4.17 to
//! 13.4.30).
//!
//! Time is in nanoseconds from any beginning, and told by the caller.

use super::bits::cause;

/// Units of ITR.
const PAUSE_UNIT: u64 = 256;
/// Units of the delays.
const DELAY_UNIT: u64 = 1024;

/// Holds a cause back for a while after the last event, and no longer than another while after the
/// first.
#[derive(Clone, Copy, Debug, Default)]
struct Delay {
    /// RDTR or TIDV.
    after_last: u16,
    /// RADV or TADV. 0: for ever.
    after_first: u16,
    /// When the cause is due, and when it is at the latest.
    due: Option<(u64, u64)>,
}

impl Delay {
    /// Something has happened. Returns whether the cause is due at once.
    fn event(&mut self, now: u64) -> bool {
        if self.after_last == 0 {
            self.due = None;
            return true;
        }
        let latest = match (self.due, self.after_first) {
            (Some((_, latest)), _) => latest,
            (None, 0) => u64::MAX,
            (None, after) => now + u64::from(after) * DELAY_UNIT,
        };
        self.due = Some(((now + u64::from(self.after_last) * DELAY_UNIT).min(latest), latest));
        false
    }

    fn expire(&mut self, now: u64) -> bool {
        let expired = self.due.is_some_and(|(due, _)| due <= now);
        if expired {
            self.due = None;
        }
        expired
    }
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub(super) struct Interrupts {
    causes: u32,
    mask: u32,
    /// ITR.
    pause: u16,
    receive: Delay,
    transmit: Delay,
    /// Before that, the line does not rise.
    quiet_until: u64,
    high: bool,
}

impl Interrupts {
    /// ICR: reading takes the causes back.
    pub(super) fn take_causes(&mut self) -> u32 {
        std::mem::take(&mut self.causes)
    }

    /// ICR: ones take causes back.
    pub(super) fn clear_causes(&mut self, causes: u32) {
        self.causes &= !causes;
    }

    /// ICS, and what happens: causes are there from now on.
    pub(super) fn add(&mut self, causes: u32) {
        self.causes |= causes & cause::ALL;
    }

    /// IMS.
    pub(super) fn mask(&self) -> u32 {
        self.mask
    }

    /// IMS: ones let causes through.
    pub(super) fn allow(&mut self, causes: u32) {
        self.mask |= causes & cause::ALL;
    }

    /// IMC: ones hold causes back.
    pub(super) fn forbid(&mut self, causes: u32) {
        self.mask &= !causes;
    }

    /// ITR.
    pub(super) fn pause(&self) -> u16 {
        self.pause
    }

    /// ITR. A pause that has begun is as long as it was.
    pub(super) fn set_pause(&mut self, pause: u16) {
        self.pause = pause;
    }

    /// RDTR, RADV, TIDV and TADV.
    pub(super) fn delays(&self) -> [u16; 4] {
        let Self { receive, transmit, .. } = self;
        [receive.after_last, receive.after_first, transmit.after_last, transmit.after_first]
    }

    /// The same. Causes that are held back stay so until their time.
    pub(super) fn set_delays(&mut self, delays: [u16; 4]) {
        let Self { receive, transmit, .. } = self;
        [receive.after_last, receive.after_first, transmit.after_last, transmit.after_first] =
            delays;
    }

    /// RDTR's highest bit: what is held back of received frames is due.
    pub(super) fn flush_receive(&mut self) {
        if self.receive.due.take().is_some() {
            self.add(cause::RXT0);
        }
    }

    /// Frames have come.
    pub(super) fn received(&mut self, now: u64) {
        if self.receive.event(now) {
            self.add(cause::RXT0);
        }
    }

    /// Transmit descriptors were written back; `delayed` if the driver can wait to hear of it.
    pub(super) fn sent(&mut self, delayed: bool, now: u64) {
        if !delayed || self.transmit.event(now) {
            self.transmit.due = None;
            self.add(cause::TXDW);
        }
    }

    /// Adds the causes whose time has come.
    pub(super) fn tick(&mut self, now: u64) {
        if self.receive.expire(now) {
            self.add(cause::RXT0);
        }
        if self.transmit.expire(now) {
            self.add(cause::TXDW);
        }
    }

    /// What the line is to be now. To be asked after each change.
    pub(super) fn level(&mut self, now: u64) -> bool {
        if self.causes & self.mask == 0 {
            self.high = false;
        } else if !self.high && now >= self.quiet_until {
            self.high = true;
            self.quiet_until = now + u64::from(self.pause) * PAUSE_UNIT;
        }
        self.high
    }

    /// When the line is to rise if nothing else happens.
    pub(super) fn deadline(&self) -> Option<u64> {
        if self.high {
            return None;
        }
        if self.causes & self.mask != 0 {
            return Some(self.quiet_until);
        }
        let due = |delay: &Delay, cause| delay.due.filter(|_| self.mask & cause != 0);
        let due = [due(&self.receive, cause::RXT0), due(&self.transmit, cause::TXDW)];
        let first = due.into_iter().flatten().map(|(due, _)| due).min()?;
        Some(first.max(self.quiet_until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_causes_are_kept() {
        let mut interrupts = Interrupts::default();
        interrupts.add(cause::LSC);
        assert!(!interrupts.level(0));
        assert_eq!(interrupts.deadline(), None);
        interrupts.allow(cause::LSC | cause::RXT0);
        assert!(interrupts.level(0));
        interrupts.forbid(cause::LSC);
        assert!(!interrupts.level(0));
        assert_eq!((interrupts.mask(), interrupts.take_causes()), (cause::RXT0, cause::LSC));
        interrupts.allow(u32::MAX);
        assert!(!interrupts.level(0));
    }

    #[test]
    fn interrupts_keep_their_distance() {
        let mut interrupts = Interrupts::default();
        interrupts.set_pause(100);
        interrupts.allow(cause::RXT0);
        interrupts.received(1000);
        assert!(interrupts.level(1000));
        // What comes before it is heard of is the same interrupt.
        interrupts.received(1500);
        assert!(interrupts.level(1500));
        interrupts.take_causes();
        assert!(!interrupts.level(2000));
        interrupts.received(3000);
        assert!(!interrupts.level(3000));
        assert_eq!(interrupts.deadline(), Some(26_600));
        assert!(!interrupts.level(26_599));
        assert!(interrupts.level(26_600));
        assert_eq!(interrupts.deadline(), None);
    }

    #[test]
    fn causes_are_held_back_after_the_last_and_no_longer_than_after_the_first() {
        let mut interrupts = Interrupts::default();
        interrupts.allow(u32::MAX);
        interrupts.set_delays([10, 15, 20, 0]);
        interrupts.received(0);
        assert_eq!(interrupts.deadline(), Some(10 * 1024));
        interrupts.received(9 * 1024);
        assert_eq!(interrupts.deadline(), Some(15 * 1024));
        interrupts.tick(15 * 1024 - 1);
        assert!(!interrupts.level(15 * 1024 - 1));
        interrupts.tick(15 * 1024);
        assert!(interrupts.level(15 * 1024));
        assert_eq!(interrupts.take_causes(), cause::RXT0);
        assert!(!interrupts.level(15 * 1024));

        interrupts.sent(true, 20 * 1024);
        interrupts.sent(true, 30 * 1024);
        assert_eq!(interrupts.deadline(), Some(50 * 1024));
        // One that cannot wait takes the others along.
        interrupts.sent(false, 31 * 1024);
        assert!(interrupts.level(31 * 1024));
        assert_eq!(interrupts.take_causes(), cause::TXDW);
        assert!(!interrupts.level(31 * 1024));
        assert_eq!(interrupts.deadline(), None);

        interrupts.received(40 * 1024);
        interrupts.flush_receive();
        assert_eq!(interrupts.take_causes(), cause::RXT0);
    }
}
