//! The real-time clock and its CMOS memory (Motorola MC146818): what time it is when a guest
//! starts. It shows the host's time in UTC, cannot be set, and does not interrupt.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use hypervisor::Device;

/// The clock behind ports 0x70 (index) and 0x71 (data).
#[derive(Debug, Default)]
pub struct Cmos {
    index: AtomicU8,
}

impl Cmos {
    /// The index port; the data port is the next one.
    pub const PORT: u64 = 0x70;
    /// How many ports it takes.
    pub const PORTS: u64 = 2;
    /// Which register holds the century; the FADT says so.
    pub const CENTURY: u8 = 0x32;
}

/// A moment as the clock's registers show it, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: u64,
    month: u64,
    day: u64,
    /// 1 is Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Calendar {
    /// From seconds since 1970.
    fn from_unix(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86400, seconds % 86400);
        // Years counted from March, so that the leap day is the last of its year; eras of 400
        // years. 719468 days lie between 0000-03-01 and 1970-01-01.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        Self {
            year,
            month,
            day,
            weekday: (days + 4) % 7 + 1, // 1970 began on a Thursday
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// The value of a register.
    fn register(&self, index: u8) -> u8 {
        // Registers A to D.
        const DIVIDER_32768_HZ: u8 = 0x26;
        const HOURS_TO_24: u8 = 0x02;
        const VALID: u8 = 0x80;

        let decimal = |value: u64| (value / 10 % 10 * 16 + value % 10) as u8;
        match index {
            0x00 => decimal(self.second),
            0x02 => decimal(self.minute),
            0x04 => decimal(self.hour),
            0x06 => decimal(self.weekday),
            0x07 => decimal(self.day),
            0x08 => decimal(self.month),
            0x09 => decimal(self.year % 100),
            0x0a => DIVIDER_32768_HZ, // never in the middle of an update
            0x0b => HOURS_TO_24,      // binary-coded decimal
            0x0d => VALID,
            Cmos::CENTURY => decimal(self.year / 100),
            _ => 0,
        }
    }
}

impl Device for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let index = self.index.load(Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for (offset, byte) in (offset..).zip(data) {
            *byte = match offset {
                1 => Calendar::from_unix(now).register(index),
                _ => 0xff, // the index cannot be read back
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(index)) = (offset, data.first()) {
            // The high bit masks NMIs and is no part of the index.
            self.index.store(index & 0x7f, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let date = |seconds| {
            let c = Calendar::from_unix(seconds);
            (c.year, c.month, c.day, c.weekday, c.hour, c.minute, c.second)
        };
        assert_eq!(date(0), (1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3, 0, 0, 0));
        assert_eq!(date(951_868_799), (2000, 2, 29, 3, 23, 59, 59));
        assert_eq!(date(951_868_800), (2000, 3, 1, 4, 0, 0, 0));
        assert_eq!(date(1_709_164_800), (2024, 2, 29, 5, 0, 0, 0));
        assert_eq!(date(4_107_542_399), (2100, 2, 28, 1, 23, 59, 59));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2, 0, 0, 0));
    }

    #[test]
    fn registers_are_in_decimal() {
        let date = Calendar::from_unix(1_735_689_599); // 2024-12-31 23:59:59
        let values = [9, 8, 7, 4, 2, 0, Cmos::CENTURY].map(|index| date.register(index));
        assert_eq!(values, [0x24, 0x12, 0x31, 0x23, 0x59, 0x59, 0x20]);
        assert_eq!(date.register(0x0a) & 0x80, 0, "no update in progress");
    }

    #[test]
    fn the_data_port_shows_what_the_index_port_names() {
        let cmos = Cmos::default();
        let mut data = [0];
        cmos.write(0, &[0x8d]); // with the NMI mask
        cmos.read(1, &mut data);
        assert_eq!(data, [0x80]);
    }
}
