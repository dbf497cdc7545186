//! Seconds and calendar fields.

/// A moment as a clock's registers show it, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Calendar {
    pub(super) year: i64,
    pub(super) month: i64,
    pub(super) day: i64,
    pub(super) hour: i64,
    pub(super) minute: i64,
    pub(super) second: i64,
}

/// The first and the last second of the years that four digits can write, since 1970.
pub(super) const YEARS: std::ops::RangeInclusive<i64> = -62_167_219_200..=253_402_300_799;

// The calendar repeats itself after 400 years. Years are counted from March, so that the leap day
// is the last of its year.
const DAYS_OF_ERA: i64 = 146_097;
/// Days between 0000-03-01 and 1970-01-01.
const EPOCH: i64 = 719_468;

impl Calendar {
    /// From seconds since 1970.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
        let shifted = days + EPOCH;
        let (era, day_of_era) = (shifted.div_euclid(DAYS_OF_ERA), shifted.rem_euclid(DAYS_OF_ERA));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// Seconds since 1970. A day after the month's last is one of the next month, and so on; a month
    /// that is none is the nearest.
    pub(super) fn to_unix(self) -> i64 {
        let month = self.month.clamp(1, 12);
        let year = self.year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let month_from_march = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * month_from_march + 2) / 5 + self.day - 1;
        let day_of_era = 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * DAYS_OF_ERA + day_of_era - EPOCH;
        ((days * 24 + self.hour) * 60 + self.minute) * 60 + self.second
    }

    /// 1 is Sunday.
    pub(super) fn weekday(self) -> i64 {
        // 1970 began on a Thursday.
        (self.to_unix().div_euclid(86400) + 4).rem_euclid(7) + 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dates() {
        let date = |seconds| {
            let c = Calendar::from_unix(seconds);
            (c.year, c.month, c.day, c.weekday(), c.hour, c.minute, c.second)
        };
        assert_eq!(date(0), (1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(date(-1), (1969, 12, 31, 4, 23, 59, 59));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3, 0, 0, 0));
        assert_eq!(date(951_868_799), (2000, 2, 29, 3, 23, 59, 59));
        assert_eq!(date(951_868_800), (2000, 3, 1, 4, 0, 0, 0));
        assert_eq!(date(1_709_164_800), (2024, 2, 29, 5, 0, 0, 0));
        assert_eq!(date(4_107_542_399), (2100, 2, 28, 1, 23, 59, 59));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2, 0, 0, 0));
        assert_eq!(date(*YEARS.start()), (0, 1, 1, 7, 0, 0, 0));
        assert_eq!(date(*YEARS.end()), (9999, 12, 31, 6, 23, 59, 59));
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in -62_000_000_000_i64..253_000_000_000) {
            prop_assert_eq!(Calendar::from_unix(seconds).to_unix(), seconds);
        }
    }
}
