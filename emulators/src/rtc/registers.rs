//! The clock's registers, as a state machine that is told what time it is.
//!
//! It does not tick. What has happened between two moments follows from them: seconds that have ended,
//! the alarm's among them, and ticks of the periodic interrupt.

use super::calendar::{Calendar, YEARS};

/// Nanoseconds since 1970. The guest's clock may be set to any year that four digits can write.
pub(super) type Nanos = i128;

const SECOND: Nanos = 1_000_000_000;

/// How long before a second's end the clock says that it is about to change.
const UPDATE_IN_PROGRESS: Nanos = 244_000;

/// Where the divider chain is when it is let go: the next second comes in half of one.
const AFTER_DIVIDER_RESET: Nanos = SECOND / 2;

/// The clock's own oscillator, whose ticks periodic interrupts are counted in.
const HZ: Nanos = 32768;

// Indices.
const SECONDS: u8 = 0x00;
const ALARM_SECONDS: u8 = 0x01;
const MINUTES: u8 = 0x02;
const ALARM_MINUTES: u8 = 0x03;
const HOURS: u8 = 0x04;
const ALARM_HOURS: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
pub(super) const CENTURY: u8 = 0x32;

/// Bits of register A.
mod a {
    pub(super) const UPDATE_IN_PROGRESS: u8 = 1 << 7;
    /// The divider: in operation it is 2; 6 and 7 hold it.
    pub(super) const DIVIDER: u8 = 7 << 4;
    pub(super) const DIVIDER_RESET: u8 = 6 << 4;
    pub(super) const RATE: u8 = 15;
    pub(super) const AT_POWER_ON: u8 = 0x26;
}

/// Bits of register B.
mod b {
    pub(super) const SET: u8 = 1 << 7;
    pub(super) const PERIODIC: u8 = 1 << 6;
    pub(super) const ALARM: u8 = 1 << 5;
    pub(super) const UPDATE: u8 = 1 << 4;
    pub(super) const BINARY: u8 = 1 << 2;
    pub(super) const HOURS_24: u8 = 1 << 1;
}

/// Bits of register C. Those of the sources are where their enables are in B.
const INTERRUPT: u8 = 1 << 7;
const SOURCES: u8 = b::PERIODIC | b::ALARM | b::UPDATE;

/// Register D: there is power.
const VALID: u8 = 1 << 7;

/// The hour register's bit for the afternoon, in 12-hour mode.
const PM: u8 = 1 << 7;

/// An alarm register with both of these bits is one that any value fits.
const ANY: u8 = 0xc0;

const DAY_SECONDS: Nanos = 86400;

/// A set of numbers below 60, a bit for each. It is not empty.
#[derive(Clone, Copy)]
struct Values(u64);

impl Values {
    fn has(self, value: u32) -> bool {
        self.0 >> value & 1 != 0
    }

    /// The least.
    fn first(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// The least that is not below `start`, which is at most 60.
    fn from(self, start: u32) -> Option<u32> {
        let rest = self.0 >> start << start;
        (rest != 0).then(|| rest.trailing_zeros())
    }
}

#[derive(Clone, Debug)]
pub(super) struct Registers {
    /// Alarm registers, and memory. Unused where registers are computed.
    bytes: [u8; 128],
    /// A, B, and the sources in C.
    control: [u8; 3],
    clock: Clock,
    /// Up to when events have been looked for.
    seen: Nanos,
}

/// The guest's time.
#[derive(Clone, Copy, Debug)]
enum Clock {
    /// It is the host's, and so much more.
    Runs { ahead: Nanos },
    /// It stands still, at what may be no date yet, and so far into the second.
    Stands { at: Calendar, fraction: Nanos },
}

impl Registers {
    /// A clock that shows the host's time.
    pub(super) fn new(now: Nanos) -> Self {
        Self {
            bytes: [0; 128],
            control: [a::AT_POWER_ON, b::HOURS_24, 0],
            clock: Clock::Runs { ahead: 0 },
            seen: now,
        }
    }

    fn a(&self) -> u8 {
        self.control[0]
    }

    fn b(&self) -> u8 {
        self.control[1]
    }

    /// Whether it interrupts.
    pub(super) fn output(&self) -> bool {
        self.control[2] & self.b() & SOURCES != 0
    }

    /// It is `now`: sees what has happened since the last time.
    pub(super) fn advance(&mut self, now: Nanos) {
        let before = self.seen;
        self.seen = before.max(now);
        if let Clock::Runs { ahead } = self.clock {
            let second = |at: Nanos| (at + ahead).div_euclid(SECOND);
            if second(self.seen) > second(before) {
                self.control[2] |= b::UPDATE;
                if self.next_alarm(second(before)).is_some_and(|alarm| alarm <= second(self.seen)) {
                    self.control[2] |= b::ALARM;
                }
            }
        }
        if let Some(period) = self.period()
            && tick(self.seen) / period > tick(before) / period
        {
            self.control[2] |= b::PERIODIC;
        }
    }

    /// When it interrupts next, unless it does already.
    pub(super) fn next_interrupt(&self) -> Option<Nanos> {
        if self.output() {
            return None;
        }
        let enabled = |source| self.b() & source != 0;
        let periodic = self.period().filter(|_| enabled(b::PERIODIC)).map(|period| {
            let next = (tick(self.seen) / period + 1) * period;
            (next * SECOND + HZ - 1).div_euclid(HZ)
        });
        let Clock::Runs { ahead } = self.clock else { return periodic };
        let second = (self.seen + ahead).div_euclid(SECOND);
        let update = enabled(b::UPDATE).then_some(second + 1);
        let alarm = if enabled(b::ALARM) { self.next_alarm(second) } else { None };
        let of_seconds = update.into_iter().chain(alarm).map(|second| second * SECOND - ahead);
        of_seconds.chain(periodic).min()
    }

    /// A read of register `index`.
    pub(super) fn read(&mut self, index: u8, now: Nanos) -> u8 {
        match index {
            A => self.a() | if self.is_updating(now) { a::UPDATE_IN_PROGRESS } else { 0 },
            B => self.b(),
            C => {
                let interrupt = if self.output() { INTERRUPT } else { 0 };
                interrupt | std::mem::take(&mut self.control[2])
            }
            D => VALID,
            _ => match self.field(index, self.calendar(now)) {
                Some(value) => value,
                None => self.bytes.get(usize::from(index)).copied().unwrap_or(0),
            },
        }
    }

    /// A write to it.
    pub(super) fn write(&mut self, index: u8, value: u8, now: Nanos) {
        match index {
            A => self.set_control(value & !a::UPDATE_IN_PROGRESS, self.b(), now),
            // To set the clock switches the interrupt of its updates off.
            B if value & b::SET != 0 => self.set_control(self.a(), value & !b::UPDATE, now),
            B => self.set_control(self.a(), value, now),
            C | D => {}
            _ => {
                let mut calendar = self.calendar(now);
                if self.set_field(index, value, &mut calendar) {
                    self.set_calendar(calendar, now);
                } else if let Some(byte) = self.bytes.get_mut(usize::from(index)) {
                    *byte = value;
                }
            }
        }
    }

    /// New values of A and B, by which the clock may stop or go.
    fn set_control(&mut self, a: u8, b: u8, now: Nanos) {
        let resets = a & a::DIVIDER_RESET == a::DIVIDER_RESET;
        let (at, mut fraction) = self.time(now);
        if resets {
            fraction = AFTER_DIVIDER_RESET;
        }
        (self.control[0], self.control[1]) = (a, b);
        let stands = resets || b & b::SET != 0;
        self.clock = match self.clock {
            Clock::Runs { .. } if !stands => return,
            Clock::Stands { .. } if !stands => {
                Clock::Runs { ahead: seconds(at) * SECOND + fraction - now }
            }
            _ => Clock::Stands { at, fraction },
        };
    }

    /// What the clock shows, and how far into the second it is.
    fn time(&self, now: Nanos) -> (Calendar, Nanos) {
        match self.clock {
            Clock::Stands { at, fraction } => (at, fraction),
            Clock::Runs { ahead } => {
                let seconds = (now + ahead).div_euclid(SECOND);
                (Calendar::from_unix(seconds as i64), (now + ahead).rem_euclid(SECOND))
            }
        }
    }

    fn calendar(&self, now: Nanos) -> Calendar {
        self.time(now).0
    }

    fn set_calendar(&mut self, calendar: Calendar, now: Nanos) {
        let (_, into) = self.time(now);
        match &mut self.clock {
            Clock::Stands { at, .. } => *at = calendar,
            Clock::Runs { ahead } => {
                *ahead = seconds(calendar) * SECOND + into - now;
            }
        }
    }

    fn is_updating(&self, now: Nanos) -> bool {
        let (_, fraction) = self.time(now);
        matches!(self.clock, Clock::Runs { .. }) && fraction >= SECOND - UPDATE_IN_PROGRESS
    }

    /// Ticks between periodic interrupts, if there are any. The divider runs also when the clock
    /// is being set.
    fn period(&self) -> Option<Nanos> {
        let rate = self.a() & a::RATE;
        let runs = self.a() & a::DIVIDER == a::AT_POWER_ON & a::DIVIDER;
        match rate {
            0 => None,
            // The two slowest of the first are the same as 8 and 9.
            1 | 2 => Some(rate + 6),
            _ => Some(rate - 1),
        }
        .filter(|_| runs)
        .map(|shift| 1 << shift)
    }

    /// The first second after `after` that the alarm is set for; none if it is for none of a day.
    ///
    /// Found from the values themselves and not by trying one second after the other: a guest may
    /// set the alarm for a second that never comes, and each access to the clock asks for it.
    fn next_alarm(&self, after: Nanos) -> Option<Nanos> {
        let hours = self.alarm_values(ALARM_HOURS, 24)?;
        let minutes = self.alarm_values(ALARM_MINUTES, 60)?;
        let seconds = self.alarm_values(ALARM_SECONDS, 60)?;
        let of_day = (after + 1).rem_euclid(DAY_SECONDS);
        let midnight = after + 1 - of_day;
        let of_day = of_day as u32;
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        let at =
            |hour: u32, minute: u32, second: u32| Nanos::from((hour * 60 + minute) * 60 + second);
        let (first_minute, first_second) = (minutes.first(), seconds.first());
        let this_minute = || {
            let there = hours.has(hour) && minutes.has(minute);
            Some(at(hour, minute, seconds.from(second).filter(|_| there)?))
        };
        let this_hour =
            || Some(at(hour, minutes.from(minute + 1).filter(|_| hours.has(hour))?, first_second));
        let today = || Some(at(hours.from(hour + 1)?, first_minute, first_second));
        let next = this_minute().or_else(this_hour).or_else(today);
        let tomorrow = || DAY_SECONDS + at(hours.first(), first_minute, first_second);
        Some(midnight + next.unwrap_or_else(tomorrow))
    }

    /// The values below `count` that an alarm register stands for: all of them if its two high bits
    /// are set, otherwise one, or none.
    fn alarm_values(&self, index: u8, count: u32) -> Option<Values> {
        let wanted = self.bytes.get(usize::from(index)).copied().unwrap_or(ANY);
        if wanted & ANY == ANY {
            return Some(Values((1 << count) - 1));
        }
        let (value, shown) = match index {
            ALARM_HOURS => {
                let hour = self.decode_hour(wanted);
                (hour, self.encode_hour(hour))
            }
            _ => {
                let value = self.decode(wanted);
                (value, self.encode(value))
            }
        };
        // The clock shows a value in one way only, and compares what it shows.
        let possible = shown == wanted && (0..count.into()).contains(&value);
        possible.then(|| Values(1 << value))
    }

    /// A number as registers have it: decimal, or binary if the guest wants that.
    fn encode(&self, value: i64) -> u8 {
        if self.b() & b::BINARY != 0 {
            value as u8
        } else {
            (value / 10 % 10 * 16 + value % 10) as u8
        }
    }

    fn decode(&self, value: u8) -> i64 {
        if self.b() & b::BINARY != 0 {
            value.into()
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 15)
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.b() & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let shown = self.encode((hour + 11) % 12 + 1);
        if hour >= 12 { shown | PM } else { shown }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.b() & b::HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    /// The value of a register that shows a part of the time.
    fn field(&self, index: u8, at: Calendar) -> Option<u8> {
        Some(match index {
            SECONDS => self.encode(at.second),
            MINUTES => self.encode(at.minute),
            HOURS => self.encode_hour(at.hour),
            WEEKDAY => self.encode(at.weekday()),
            DAY => self.encode(at.day),
            MONTH => self.encode(at.month),
            YEAR => self.encode(at.year.rem_euclid(100)),
            CENTURY => self.encode(at.year.div_euclid(100)),
            _ => return None,
        })
    }

    /// Sets the part of the time that a register shows. False if it shows none. The weekday follows
    /// from the others.
    fn set_field(&self, index: u8, value: u8, at: &mut Calendar) -> bool {
        let number = self.decode(value);
        match index {
            SECONDS => at.second = number,
            MINUTES => at.minute = number,
            HOURS => at.hour = self.decode_hour(value),
            WEEKDAY => {}
            DAY => at.day = number,
            MONTH => at.month = number,
            // Two digits each, whatever a byte can hold beyond them.
            YEAR => at.year = at.year.div_euclid(100) * 100 + number.min(99),
            CENTURY => at.year = number.min(99) * 100 + at.year.rem_euclid(100),
            _ => return false,
        }
        true
    }
}

/// Seconds since 1970 at which a clock starts that was set to `at`. It stays within four digits of
/// years: a guest that writes days and months that there are not would get further each time.
fn seconds(at: Calendar) -> Nanos {
    at.to_unix().clamp(*YEARS.start(), *YEARS.end()).into()
}

/// Ticks of the oscillator since 1970.
fn tick(at: Nanos) -> Nanos {
    (at * HZ).div_euclid(SECOND)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
