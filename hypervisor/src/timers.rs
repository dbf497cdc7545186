//! Synthetic timers (TLFS 12.3): four per processor, each one-shot or periodic, that send a message
//! to a SINT or raise a vector when they expire.
//!
//! A plain state machine, in units of reference time (100 ns). Who runs it asks for the next
//! [`Timer::deadline`], and calls [`Timer::expire`] when that has come.

use zerocopy::{Immutable, IntoBytes};

use crate::registers::{FIRST_VECTOR, GeneralProtection};
use crate::synic::{Message, Sint};

/// How many a processor has.
pub(crate) const TIMERS: usize = 4;

/// The shortest period, 100 us: shorter ones would keep a thread of the host busy.
const SHORTEST_PERIOD: u64 = 1000;

/// `HvMessageTimerExpired`
const TIMER_EXPIRED: u32 = 0x8000_0010;

// HV_X64_MSR_STIMERx_CONFIG
const ENABLE: u64 = 1;
const PERIODIC: u64 = 1 << 1;
const AUTO_ENABLE: u64 = 1 << 3;
const DIRECT: u64 = 1 << 12;

/// What an expiration does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expiration {
    /// Raises this vector.
    Vector(u8),
    /// Sends a message to this SINT; the time is when the timer was due.
    Message(Sint, u64),
}

/// One timer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timer {
    config: u64,
    count: u64,
    deadline: Option<u64>,
}

impl Timer {
    /// The CONFIG register.
    pub(crate) fn config(&self) -> u64 {
        self.config
    }

    /// The COUNT register.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// When it expires next, if it does.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// The guest writes CONFIG.
    pub(crate) fn set_config(&mut self, value: u64, now: u64) -> Result<(), GeneralProtection> {
        if value & DIRECT != 0 && vector(value) < FIRST_VECTOR {
            return Err(GeneralProtection);
        }
        self.config = value;
        // Without a SINT there is nobody to tell.
        if value & DIRECT == 0 && value >> 16 & 0xf == 0 {
            self.config &= !ENABLE;
        }
        self.start(now);
        Ok(())
    }

    /// The guest writes COUNT: the time, or the period.
    pub(crate) fn set_count(&mut self, value: u64, now: u64) {
        self.count = value;
        if value == 0 {
            self.config &= !ENABLE;
        } else if self.config & AUTO_ENABLE != 0 {
            self.config |= ENABLE;
        }
        self.start(now);
    }

    fn period(&self) -> u64 {
        self.count.max(SHORTEST_PERIOD)
    }

    fn start(&mut self, now: u64) {
        self.deadline = if self.config & ENABLE == 0 || self.count == 0 {
            None
        } else if self.config & PERIODIC != 0 {
            now.checked_add(self.period())
        } else {
            Some(self.count)
        };
    }

    /// What is to be done if its time has come. Periods that were missed are not made up for.
    pub(crate) fn expire(&mut self, now: u64) -> Option<Expiration> {
        let due = self.deadline.filter(|deadline| *deadline <= now)?;
        if self.config & PERIODIC != 0 {
            let late = (now - due) % self.period();
            self.deadline = now.checked_add(self.period() - late);
        } else {
            self.config &= !ENABLE;
            self.deadline = None;
        }
        if self.config & DIRECT != 0 {
            return Some(Expiration::Vector(vector(self.config)));
        }
        Sint::new((self.config >> 16 & 0xf) as u8).map(|sint| Expiration::Message(sint, due))
    }
}

fn vector(config: u64) -> u8 {
    (config >> 4) as u8
}

/// `HV_TIMER_MESSAGE_PAYLOAD`
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct TimerPayload {
    index: u32,
    reserved: u32,
    expiration: u64,
    delivery: u64,
}

const _: () = assert!(size_of::<TimerPayload>() == 24);

/// The message that says that timer `index` was due at `expiration`, sent `now`.
pub(crate) fn message(index: u32, expiration: u64, now: u64) -> Message {
    let payload = TimerPayload { index, reserved: 0, expiration, delivery: now };
    Message::new(TIMER_EXPIRED, payload.as_bytes()).expect("24 bytes fit into 240")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIRECT_ED: u64 = DIRECT | 0xed << 4;
    const TO_SINT_2: u64 = 2 << 16;

    #[test]
    fn a_one_shot_expires_once() {
        let mut timer = Timer::default();
        timer.set_config(DIRECT_ED | AUTO_ENABLE, 0).unwrap();
        timer.set_count(5000, 100);
        assert_eq!(timer.config() & ENABLE, 1, "by itself");
        assert_eq!(timer.deadline(), Some(5000));
        assert_eq!(timer.expire(4999), None);
        assert_eq!(timer.expire(5001), Some(Expiration::Vector(0xed)));
        assert_eq!(timer.config() & ENABLE, 0);
        assert_eq!(timer.deadline(), None);
        // One that is in the past expires at once.
        timer.set_count(1, 6000);
        assert_eq!(timer.expire(6000), Some(Expiration::Vector(0xed)));
    }

    #[test]
    fn a_periodic_one_expires_at_its_pace() {
        let mut timer = Timer::default();
        timer.set_count(10_000, 0);
        assert_eq!(timer.deadline(), None);
        timer.set_config(ENABLE | PERIODIC | TO_SINT_2, 500).unwrap();
        assert_eq!(timer.deadline(), Some(10_500));
        let message = |due| Some(Expiration::Message(Sint::VMBUS, due));
        assert_eq!(timer.expire(10_600), message(10_500));
        assert_eq!(timer.deadline(), Some(20_500));
        assert_eq!(timer.expire(51_000), message(20_500));
        assert_eq!(timer.deadline(), Some(60_500), "missed ones are left out");
        timer.set_count(0, 52_000);
        assert_eq!(timer.deadline(), None);
        assert_eq!(timer.config() & ENABLE, 0);
    }

    #[test]
    fn no_period_is_shorter_than_a_thread_of_the_host_can_bear() {
        for period in [1, 2, SHORTEST_PERIOD - 1, SHORTEST_PERIOD] {
            let mut timer = Timer::default();
            timer.set_count(period, 0);
            timer.set_config(ENABLE | PERIODIC | DIRECT_ED, 0).unwrap();
            let expirations = (0..10 * SHORTEST_PERIOD).filter(|now| timer.expire(*now).is_some());
            assert_eq!(expirations.count(), 9, "{period}");
        }
        // Nor is there one of no time at all.
        let mut timer = Timer::default();
        timer.set_count(0, 0);
        timer.set_config(ENABLE | PERIODIC | DIRECT_ED, 0).unwrap();
        assert_eq!(timer.deadline(), None);
    }

    #[test]
    fn what_cannot_be_delivered_is_not_enabled() {
        let mut timer = Timer::default();
        timer.set_count(1, 0);
        timer.set_config(ENABLE, 0).unwrap();
        assert_eq!(timer.config() & ENABLE, 0);
        let before = timer.config();
        assert_eq!(timer.set_config(ENABLE | DIRECT | 15 << 4, 0), Err(GeneralProtection));
        assert_eq!(timer.config(), before);
    }

    #[test]
    fn the_message_says_which_and_when() {
        let message = message(3, 77, 99);
        assert_eq!((message.message_type, message.payload_size), (0x8000_0010, 24));
        assert_eq!(message.payload[0], 3);
        assert_eq!((message.payload[8], message.payload[16]), (77, 99));
    }

    proptest! {
        /// Whatever is written when: a timer never expires early, and after it has expired its next
        /// deadline, if any, is in the future.
        #[test]
        fn never_early_and_never_stuck(
            steps in proptest::collection::vec((0_u8..3, any::<u64>(), 0_u64..1 << 20), 1..50)
        ) {
            let (mut timer, mut now) = (Timer::default(), 0_u64);
            for (what, value, later) in steps {
                now += later;
                match what {
                    0 => {
                        let _ = timer.set_config(value, now);
                    }
                    1 => timer.set_count(value % (1 << 22), now),
                    _ => {
                        let deadline = timer.deadline();
                        let expired = timer.expire(now);
                        let due = deadline.is_some_and(|deadline| deadline <= now);
                        prop_assert_eq!(expired.is_some(), due);
                        if due {
                            prop_assert!(timer.deadline().is_none_or(|next| next > now));
                        }
                    }
                }
                prop_assert!(timer.deadline().is_none() || timer.config() & ENABLE != 0);
            }
        }
    }
}
