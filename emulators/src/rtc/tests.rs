use proptest::prelude::*;

use super::*;

/// 2024-12-31 23:59:59, a Tuesday.
const NEW_YEARS_EVE: Nanos = 1_735_689_599 * SECOND;

/// Seconds, minutes, hours, day, month, year, century.
const TIME: [u8; 7] = [SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY];

fn time(clock: &mut Registers, now: Nanos) -> [u8; 7] {
    TIME.map(|index| clock.read(index, now))
}

#[test]
fn it_shows_the_host_s_time_in_decimal() {
    let mut clock = Registers::new(NEW_YEARS_EVE);
    let shown = time(&mut clock, NEW_YEARS_EVE);
    assert_eq!(shown, [0x59, 0x59, 0x23, 0x31, 0x12, 0x24, 0x20]);
    assert_eq!(clock.read(WEEKDAY, NEW_YEARS_EVE), 3);
    assert_eq!(clock.read(A, NEW_YEARS_EVE), 0x26);
    assert_eq!(clock.read(A, NEW_YEARS_EVE + SECOND - 1), 0xa6, "about to change");
    assert_eq!(clock.read(B, NEW_YEARS_EVE), 2);
    assert_eq!(clock.read(D, NEW_YEARS_EVE), 0x80);
    let shown = time(&mut clock, NEW_YEARS_EVE + SECOND);
    assert_eq!(shown, [0, 0, 0, 1, 1, 0x25, 0x20]);
}

#[test]
fn binary_and_twelve_hours() {
    let mut clock = Registers::new(NEW_YEARS_EVE);
    clock.write(B, 0x04, NEW_YEARS_EVE);
    let shown = time(&mut clock, NEW_YEARS_EVE);
    assert_eq!(shown, [59, 59, 0x8b, 31, 12, 24, 20]);
    for (hour, value) in [(0, 12), (1, 1), (11, 11), (12, 0x8c), (13, 0x81), (23, 0x8b)] {
        assert_eq!((clock.encode_hour(hour), clock.decode_hour(value)), (value, hour));
    }
}

#[test]
fn it_can_be_set_in_any_order() {
    let mut clock = Registers::new(NEW_YEARS_EVE);
    // As Linux does it: stop clock and divider, set, go.
    clock.write(B, 0x82, NEW_YEARS_EVE);
    clock.write(A, 0x76, NEW_YEARS_EVE);
    let later = NEW_YEARS_EVE + 1000 * SECOND;
    assert_eq!(clock.read(SECONDS, later), 0x59, "it stands");
    // From the 31st by way of a month without one.
    for (index, value) in [(MONTH, 2), (DAY, 0x29), (YEAR, 0x96), (CENTURY, 0x19), (HOURS, 7)] {
        clock.write(index, value, later);
    }
    clock.write(SECONDS, 0x30, later);
    clock.write(B, 0x02, later);
    clock.write(A, 0x26, later);
    assert_eq!(time(&mut clock, later), [0x30, 0x59, 7, 0x29, 2, 0x96, 0x19]);
    let half = later + SECOND / 2;
    assert_eq!((clock.read(SECONDS, half - 1), clock.read(SECONDS, half)), (0x30, 0x31));
    // While it runs, too.
    clock.write(MINUTES, 0, half);
    assert_eq!(time(&mut clock, half), [0x31, 0, 7, 0x29, 2, 0x96, 0x19]);
}

#[test]
fn updates_interrupt_each_second() {
    let start = NEW_YEARS_EVE + 300_000;
    let mut clock = Registers::new(start);
    clock.advance(start + 5 * SECOND);
    assert!(!clock.output());
    assert_eq!(clock.read(C, start) & 0x90, 0x10, "seen, but not enabled");
    clock.write(B, 0x12, start);
    assert_eq!(clock.next_interrupt(), Some(NEW_YEARS_EVE + 6 * SECOND));
    clock.advance(NEW_YEARS_EVE + 6 * SECOND - 1);
    assert!(!clock.output());
    clock.advance(NEW_YEARS_EVE + 6 * SECOND);
    assert!(clock.output());
    assert_eq!(clock.next_interrupt(), None);
    assert_eq!((clock.read(C, start) & 0x90, clock.read(C, start)), (0x90, 0));
    assert_eq!(clock.next_interrupt(), Some(NEW_YEARS_EVE + 7 * SECOND));
    clock.write(B, 0x92, start);
    assert_eq!((clock.read(B, start), clock.next_interrupt()), (0x82, None));
}

#[test]
fn alarms() {
    let mut clock = Registers::new(NEW_YEARS_EVE);
    for (index, value) in [(ALARM_HOURS, 0x23), (ALARM_MINUTES, 0x59), (ALARM_SECONDS, 0x58)] {
        clock.write(index, value, NEW_YEARS_EVE);
        assert_eq!(clock.read(index, NEW_YEARS_EVE), value);
    }
    clock.write(B, 0x22, NEW_YEARS_EVE);
    let next = NEW_YEARS_EVE + 86399 * SECOND;
    assert_eq!(clock.next_interrupt(), Some(next));
    clock.advance(next - 1);
    assert!(!clock.output());
    // A sleep over several days misses none.
    clock.advance(next + 3 * 86400 * SECOND);
    assert!(clock.output());
    assert_eq!(clock.read(C, next) & 0xb0, 0xb0);
    // Any hour, any minute.
    clock.write(ALARM_HOURS, 0xff, next);
    clock.write(ALARM_MINUTES, 0xc0, next);
    assert_eq!(clock.next_interrupt(), Some(next + (3 * 86400 + 60) * SECOND));
    // None.
    clock.write(ALARM_SECONDS, 0x60, next);
    assert_eq!(clock.next_interrupt(), None);
}

#[test]
fn periods() {
    let start = 0; // a multiple of all periods
    let mut clock = Registers::new(start);
    for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)] {
        clock.write(A, 0x20 | rate, start);
        clock.write(B, 0x42, start);
        let next = clock.next_interrupt().unwrap();
        assert_eq!((SECOND + next - 1) / next, hz.max(1), "rate {rate}");
        let mut fresh = clock.clone();
        fresh.advance(next - 1);
        assert!(!fresh.output());
        fresh.advance(next);
        assert!(fresh.output());
        assert_eq!(fresh.read(C, next) & 0xc0, 0xc0);
    }
    clock.write(A, 0x20, start);
    assert_eq!(clock.next_interrupt(), None);
    clock.write(A, 0x66, start);
    assert_eq!(clock.next_interrupt(), None, "the divider is held");
}

#[test]
fn the_rest_is_memory() {
    let mut clock = Registers::new(0);
    for index in (0x0e..0x80).filter(|index| *index != CENTURY) {
        clock.write(index, index ^ 0x55, 0);
    }
    for index in (0x0e..0x80).filter(|index| *index != CENTURY) {
        assert_eq!(clock.read(index, 0), index ^ 0x55);
    }
    clock.write(D, 0, 0);
    assert_eq!(clock.read(D, 0), 0x80);
}

proptest! {
    /// Whatever is written, the next interrupt lies ahead, comes then, and not before.
    #[test]
    fn interrupts_come_when_they_are_said_to(
        steps in proptest::collection::vec((any::<u8>(), any::<u8>(), 0..3_000_000_000_u64), 0..60)
    ) {
        let mut clock = Registers::new(NEW_YEARS_EVE);
        let mut now = NEW_YEARS_EVE;
        for (index, value, after) in steps {
            now += Nanos::from(after);
            clock.advance(now);
            clock.write(index % 16, value, now);
            clock.read(index & 0x7f, now);
            if let Some(next) = clock.next_interrupt() {
                prop_assert!(next > now);
                let mut later = clock.clone();
                later.advance(next - 1);
                prop_assert!(!later.output());
                later.advance(next);
                prop_assert!(later.output());
            }
        }
    }
}

/// The alarm's next second, found by trying each of a day.
fn next_alarm_by_trial(clock: &Registers, after: Nanos) -> Option<Nanos> {
    let fits = |index: u8, shown: u8| {
        let wanted = clock.bytes[usize::from(index)];
        wanted & 0xc0 == 0xc0 || wanted == shown
    };
    (after + 1..=after + 86400).find(|at| {
        let of_day = at.rem_euclid(86400) as i64;
        fits(ALARM_HOURS, clock.encode_hour(of_day / 3600))
            && fits(ALARM_MINUTES, clock.encode(of_day / 60 % 60))
            && fits(ALARM_SECONDS, clock.encode(of_day % 60))
    })
}

/// A register's value that is often one that the clock shows.
fn alarm_value() -> impl Strategy<Value = u8> {
    prop_oneof![
        any::<u8>(),
        0..60_u8,
        (0..6_u8, 0..10_u8).prop_map(|(tens, ones)| tens << 4 | ones),
        (0..13_u8).prop_map(|hour| hour | PM),
        Just(0xff)
    ]
}

proptest! {
    #[test]
    fn the_next_alarm_is_the_first_second_that_fits(
        b in any::<u8>(),
        alarm in [alarm_value(), alarm_value(), alarm_value()],
        after in -200_000..200_000_i64,
    ) {
        let mut clock = Registers::new(NEW_YEARS_EVE);
        clock.write(B, b, NEW_YEARS_EVE);
        for (index, value) in [ALARM_SECONDS, ALARM_MINUTES, ALARM_HOURS].into_iter().zip(alarm) {
            clock.write(index, value, NEW_YEARS_EVE);
        }
        let after = Nanos::from(after);
        prop_assert_eq!(clock.next_alarm(after), next_alarm_by_trial(&clock, after));
    }
}

/// What the clock computes does not become more with the values that a guest writes: an alarm for a
/// second that never comes is known for one at once.
#[test]
fn an_alarm_that_never_comes_is_not_searched_for() {
    let mut clock = Registers::new(NEW_YEARS_EVE);
    clock.write(ALARM_HOURS, 0xff, NEW_YEARS_EVE);
    clock.write(ALARM_MINUTES, 0xff, NEW_YEARS_EVE);
    clock.write(ALARM_SECONDS, 0x7f, NEW_YEARS_EVE);
    clock.write(B, 0x22, NEW_YEARS_EVE);
    assert!(clock.alarm_values(ALARM_SECONDS, 60).is_none());
    assert_eq!(clock.next_interrupt(), None);
    clock.advance(NEW_YEARS_EVE + 3 * 86400 * SECOND);
    assert!(!clock.output());
}

/// Each value that is none of the register's takes the clock further than it was, and so do many.
#[test]
fn no_number_of_writes_takes_the_clock_out_of_four_digits() {
    for running in [true, false] {
        let mut clock = Registers::new(NEW_YEARS_EVE);
        clock.write(B, if running { 0x06 } else { 0x86 }, NEW_YEARS_EVE);
        for index in [YEAR, DAY, MONTH, HOURS, CENTURY].into_iter().cycle().take(100_000) {
            clock.write(index, 0xff, NEW_YEARS_EVE);
        }
        clock.write(B, 0x06, NEW_YEARS_EVE);
        assert_eq!(clock.calendar(NEW_YEARS_EVE).year, 9999);
        // From there it can be set to any time.
        for (index, value) in TIME.into_iter().zip([59, 59, 23, 31, 12, 24, 20]).rev() {
            clock.write(index, value, NEW_YEARS_EVE);
        }
        assert_eq!(time(&mut clock, NEW_YEARS_EVE), [59, 59, 23, 31, 12, 24, 20]);
    }
}
