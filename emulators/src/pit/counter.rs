//! One of the timer's counters.

/// How a count is written and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    /// The low byte, then the high one.
    Both = 3,
}

/// What a mode does with its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// 0: up when the count has come to an end.
    Terminal,
    /// 1: down from a trigger to the end of the count.
    OneShot,
    /// 2: down for one tick in each period.
    Rate,
    /// 3: down in the second half of each period.
    Square,
    /// 4: down for one tick when the count has come to an end.
    SoftwareStrobe,
    /// 5: the same, from a trigger.
    HardwareStrobe,
}

impl Mode {
    /// From bits 1 to 3 of a control word; the highest means nothing to modes 2 and 3.
    fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Terminal,
            1 => Self::OneShot,
            2 | 6 => Self::Rate,
            3 | 7 => Self::Square,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    /// Whether the gate's rising edge starts it, and nothing else.
    fn is_triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Counter {
    mode: Mode,
    access: Access,
    decimal: bool,
    /// What was written last; 0 is the largest count.
    written: u16,
    /// The low byte, when the high one is still to come.
    low: Option<u8>,
    /// The next byte to be read is the high one.
    high_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    /// When the count was loaded; not there before it has been.
    loaded: Option<u64>,
    /// How far it was when the gate stopped it.
    stopped: Option<u64>,
}

impl Counter {
    pub(super) const fn new() -> Self {
        Self {
            mode: Mode::Terminal,
            access: Access::Both,
            decimal: false,
            written: 0,
            low: None,
            high_next: false,
            latched: None,
            latched_status: None,
            gate: false,
            loaded: None,
            stopped: None,
        }
    }

    /// A control word for this counter.
    pub(super) fn control(&mut self, value: u8, now: u64) {
        self.access = match value >> 4 & 3 {
            0 => return self.latch(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        self.mode = Mode::from_bits(value >> 1);
        self.decimal = value & 1 != 0;
        (self.loaded, self.stopped) = (None, None);
        (self.low, self.high_next) = (None, false);
        (self.latched, self.latched_status) = (None, None);
    }

    /// Keeps the count as it is for the next read.
    fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.shown(now));
            self.high_next = false;
        }
    }

    /// The read-back command.
    pub(super) fn read_back(&mut self, count: bool, status: bool, now: u64) {
        if count {
            self.latch(now);
        }
        if status && self.latched_status.is_none() {
            const NO_COUNT: u8 = 1 << 6;
            let output = u8::from(self.output(now)) << 7;
            let no_count = if self.loaded.is_none() { NO_COUNT } else { 0 };
            let mode = (self.mode as u8) << 1;
            let access = (self.access as u8) << 4;
            self.latched_status = Some(output | no_count | access | mode | u8::from(self.decimal));
        }
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.shown(now)).to_le_bytes();
        let is_high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        if is_high || self.access == Access::Low {
            self.latched = None;
        }
        if is_high { high } else { low }
    }

    pub(super) fn write(&mut self, value: u8, now: u64) {
        self.written = match (self.access, self.low.take()) {
            (Access::Low, _) => value.into(),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, None) => {
                self.low = Some(value);
                if self.mode == Mode::Terminal {
                    (self.loaded, self.stopped) = (None, None); // the first byte stops it
                }
                return;
            }
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
        };
        if !self.mode.is_triggered() {
            self.load(now);
        }
    }

    fn load(&mut self, now: u64) {
        self.loaded = Some(now);
        self.stopped = (!self.gate && !self.mode.is_triggered()).then_some(0);
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, self.loaded) {
            (Mode::OneShot | Mode::HardwareStrobe, _) if gate => self.load(now),
            (Mode::OneShot | Mode::HardwareStrobe, _) | (_, None) => {}
            (Mode::Rate | Mode::Square, Some(_)) if gate => self.load(now),
            (_, Some(_)) if gate => {
                let passed = self.stopped.take().unwrap_or(0);
                self.loaded = Some(now.saturating_sub(passed));
            }
            (_, Some(_)) => self.stopped = Some(self.passed(now)),
        }
    }

    /// The count that was written.
    fn count(&self) -> u64 {
        let most = if self.decimal { 10_000 } else { 0x1_0000 };
        let digits =
            |value: u16| (0..4).rev().fold(0, |sum, n| sum * 10 + u64::from(value >> (4 * n) & 15));
        match if self.decimal { digits(self.written) % 10_000 } else { self.written.into() } {
            0 => most,
            count => count,
        }
    }

    /// Ticks since it was loaded, as far as the gate has let them count.
    fn passed(&self, now: u64) -> u64 {
        match (self.stopped, self.loaded) {
            (Some(passed), _) => passed,
            (None, Some(loaded)) => now.saturating_sub(loaded),
            (None, None) => 0,
        }
    }

    pub(super) fn output(&self, now: u64) -> bool {
        let (passed, count) = (self.passed(now), self.count());
        match (self.mode, self.loaded) {
            (Mode::Terminal, None) => false,
            (_, None) => true,
            (Mode::Terminal | Mode::OneShot, _) => passed >= count,
            // A period of one tick, which the chip forbids, has no room for it.
            (Mode::Rate, _) => !self.gate || count == 1 || passed % count != count - 1,
            (Mode::Square, _) => !self.gate || passed % count < count.div_ceil(2),
            (Mode::SoftwareStrobe | Mode::HardwareStrobe, _) => passed != count,
        }
    }

    /// The first tick after `seen` at which the output rises, if nothing changes.
    pub(super) fn next_edge(&self, seen: u64) -> Option<u64> {
        let (loaded, None) = (self.loaded?, self.stopped) else { return None };
        let count = self.count();
        let once = |after| Some(loaded.checked_add(after)?).filter(|edge| *edge > seen);
        match self.mode {
            Mode::Terminal | Mode::OneShot => once(count),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => once(count + 1),
            Mode::Rate | Mode::Square => {
                let periods = seen.saturating_sub(loaded) / count + 1;
                loaded.checked_add(periods.checked_mul(count)?)
            }
        }
    }

    /// What the counting element shows.
    fn shown(&self, now: u64) -> u16 {
        if self.loaded.is_none() {
            return self.written;
        }
        let (passed, count) = (self.passed(now), self.count());
        let modulus = if self.decimal { 10_000 } else { 0x1_0000 };
        let value = match self.mode {
            Mode::Rate => count - passed % count,
            // It counts by twos, twice in a period.
            Mode::Square => count - passed % count * 2 % count,
            // It goes on, from the top.
            _ => (modulus + count - passed % modulus) % modulus,
        } % modulus;
        if !self.decimal {
            return value as u16;
        }
        (0..4).fold(0, |shown, n| shown | ((value / 10_u64.pow(n) % 10) as u16) << (4 * n))
    }
}
