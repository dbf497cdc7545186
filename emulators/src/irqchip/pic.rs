//! The pair of 8259A interrupt controllers, as PCs have wired them since the AT: the second's output
//! is line 2 of the first (Intel 231468, "8259A"; the edge/level registers are the 82371AB's).
//!
//! An edge stays latched until it is acknowledged, also when the line has fallen by then: so a device
//! may pulse it.

/// Ports of the first and of the second controller, two each.
pub(super) const PORTS: [u16; 2] = [0x20, 0xa0];
/// Where the registers are that make lines level-triggered, one port for each controller.
pub(super) const ELCR: u16 = 0x4d0;

/// The line that the second controller's output is.
const CASCADE: u8 = 2;
/// The line whose vector a controller gives if there is no interrupt.
const SPURIOUS: u8 = 7;
/// Lines that can be level-triggered: not timer, keyboard, cascade, clock and coprocessor.
const LEVEL_CAPABLE: [u8; 2] = [0xf8, 0xde];

/// Both controllers.
#[derive(Clone, Debug)]
pub(super) struct Pics {
    first: Chip,
    second: Chip,
}

impl Pics {
    /// As after power-on: deaf until they are initialized.
    pub(super) fn new() -> Self {
        Self { first: Chip::new(LEVEL_CAPABLE[0]), second: Chip::new(LEVEL_CAPABLE[1]) }
    }

    /// Whether the output is up: there is an interrupt for the processor.
    pub(super) fn output(&self) -> bool {
        self.first.pending().is_some()
    }

    /// Line `irq`, 0 to 15, goes up or down. Line 2 does not lead here.
    pub(super) fn set_line(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE => {}
            0..8 => self.first.set_line(irq, high),
            8..16 => self.second.set_line(irq - 8, high),
            _ => {}
        }
        self.cascade();
    }

    /// The processor takes the interrupt: its vector.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let irq = self.first.acknowledge();
        let vector = match irq {
            Some(CASCADE) => {
                let irq = self.second.acknowledge();
                self.second.vector(irq)
            }
            irq => self.first.vector(irq),
        };
        self.cascade();
        vector
    }

    /// A read of port `offset`, 0 or 1, of controller 0 or 1.
    pub(super) fn read(&mut self, chip: usize, offset: u64) -> u8 {
        let value = self.chip(chip).read(offset);
        self.cascade(); // a poll acknowledges
        value
    }

    /// A write there.
    pub(super) fn write(&mut self, chip: usize, offset: u64, value: u8) {
        self.chip(chip).write(offset, value);
        self.cascade();
    }

    /// Which lines of controller 0 or 1 are level-triggered.
    pub(super) fn elcr(&mut self, chip: usize) -> u8 {
        self.chip(chip).level
    }

    /// Makes lines level-triggered, of those that can be.
    pub(super) fn set_elcr(&mut self, chip: usize, value: u8) {
        self.chip(chip).set_elcr(value & LEVEL_CAPABLE[chip & 1]);
        self.cascade();
    }

    fn chip(&mut self, chip: usize) -> &mut Chip {
        if chip == 0 { &mut self.first } else { &mut self.second }
    }

    /// The second's output is a line of the first that is no edge: it stays up as long as there are
    /// interrupts, and nothing is lost between two of them.
    fn cascade(&mut self) {
        let high = self.second.pending().is_some();
        self.first.requests = self.first.requests & !(1 << CASCADE) | u8::from(high) << CASCADE;
    }
}

/// What the next write to the odd port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// The mask: initialized, in operation.
    Mask,
    /// Initialization command words 2, 3 and 4.
    Icw2,
    Icw3,
    Icw4,
}

/// One controller.
#[derive(Clone, Debug)]
struct Chip {
    /// The lines as they are.
    lines: u8,
    /// IRR: latched edges, and level-triggered lines as they are.
    requests: u8,
    /// ISR
    in_service: u8,
    /// IMR
    mask: u8,
    /// ELCR
    level: u8,
    /// The vector of line 0.
    base: u8,
    /// The line with the highest priority.
    highest: u8,
    /// False before it has been initialized for the first time.
    awake: bool,
    expected: Expected,
    /// ICW1: no ICW3 follows.
    single: bool,
    /// ICW1: ICW4 follows.
    icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    /// The next read of the even port acknowledges.
    poll: bool,
    /// Reads of the even port show ISR instead of IRR.
    show_in_service: bool,
    /// Lines that were wired to be level-triggered or not; kept over initializations.
    level_capable: u8,
}

impl Chip {
    fn new(level_capable: u8) -> Self {
        Self {
            lines: 0,
            requests: 0,
            in_service: 0,
            mask: 0,
            level: 0,
            base: 0,
            highest: 0,
            awake: false,
            expected: Expected::Mask,
            single: false,
            icw4: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            poll: false,
            show_in_service: false,
            level_capable,
        }
    }

    fn set_line(&mut self, line: u8, high: bool) {
        let bit = 1 << (line & 7);
        let was = self.lines & bit != 0;
        self.lines = self.lines & !bit | if high { bit } else { 0 };
        if self.level & bit != 0 {
            self.requests = self.requests & !bit | self.lines & bit;
        } else if high && !was {
            self.requests |= bit;
        }
    }

    fn set_elcr(&mut self, level: u8) {
        debug_assert_eq!(level & !self.level_capable, 0);
        self.level = level;
        self.requests = self.requests & !level | self.lines & level;
    }

    /// The line with the highest priority of those in `lines`.
    fn first_of(&self, lines: u8) -> Option<u8> {
        match lines.rotate_right(self.highest.into()) {
            0 => None,
            rotated => Some((rotated.trailing_zeros() as u8 + self.highest) & 7),
        }
    }

    /// How far `line` is from the highest priority.
    fn rank(&self, line: u8) -> u8 {
        line.wrapping_sub(self.highest) & 7
    }

    /// The line whose interrupt is to be taken, if it comes before what is in service.
    fn pending(&self) -> Option<u8> {
        if !self.awake || !matches!(self.expected, Expected::Mask) {
            return None;
        }
        let line = self.first_of(self.requests & !self.mask)?;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        // The second controller's own order counts for what comes from it.
        if self.special_fully_nested {
            blocking &= !(1 << CASCADE);
        }
        let blocked =
            self.first_of(blocking).is_some_and(|blocker| self.rank(blocker) <= self.rank(line));
        (!blocked).then_some(line)
    }

    /// Takes the interrupt that is pending, if there is one.
    fn acknowledge(&mut self) -> Option<u8> {
        let line = self.pending()?;
        let bit = 1 << line;
        if self.level & bit == 0 {
            self.requests &= !bit;
        }
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.highest = (line + 1) & 7;
        }
        Some(line)
    }

    fn vector(&self, line: Option<u8>) -> u8 {
        self.base | line.unwrap_or(SPURIOUS)
    }

    fn read(&mut self, offset: u64) -> u8 {
        const POLL_PENDING: u8 = 0x80;
        if std::mem::take(&mut self.poll) {
            return self.acknowledge().map_or(0, |line| POLL_PENDING | line);
        }
        match offset {
            0 if self.show_in_service => self.in_service,
            0 => self.requests,
            _ => self.mask,
        }
    }

    fn write(&mut self, offset: u64, value: u8) {
        const IS_ICW1: u8 = 1 << 4;
        const IS_OCW3: u8 = 1 << 3;
        match (offset, self.expected) {
            (0, _) if value & IS_ICW1 != 0 => self.initialize(value),
            (0, _) if value & IS_OCW3 != 0 => self.command(value),
            (0, _) => self.end_of_interrupt(value),
            (_, Expected::Mask) => self.mask = value,
            (_, Expected::Icw2) => {
                self.base = value & 0xf8;
                self.expected = match (self.single, self.icw4) {
                    (false, _) => Expected::Icw3,
                    (true, true) => Expected::Icw4,
                    (true, false) => Expected::Mask,
                };
            }
            // How the two are wired together; it cannot be otherwise.
            (_, Expected::Icw3) => {
                self.expected = if self.icw4 { Expected::Icw4 } else { Expected::Mask };
            }
            (_, Expected::Icw4) => {
                self.auto_eoi = value & 1 << 1 != 0;
                self.special_fully_nested = value & 1 << 4 != 0;
                self.expected = Expected::Mask;
            }
        }
    }

    /// ICW1. Its level-trigger bit means nothing in a PC with edge/level registers.
    fn initialize(&mut self, value: u8) {
        let Self { lines, level, level_capable, .. } = *self;
        *self = Self {
            lines,
            level,
            requests: lines & level,
            awake: true,
            expected: Expected::Icw2,
            single: value & 1 << 1 != 0,
            icw4: value & 1 != 0,
            ..Self::new(level_capable)
        };
    }

    /// OCW3
    fn command(&mut self, value: u8) {
        match value >> 5 & 3 {
            2 => self.special_mask = false,
            3 => self.special_mask = true,
            _ => {}
        }
        self.poll = value & 1 << 2 != 0;
        match value & 3 {
            2 => self.show_in_service = false,
            3 => self.show_in_service = true,
            _ => {}
        }
    }

    /// OCW2
    fn end_of_interrupt(&mut self, value: u8) {
        let line = value & 7;
        let after = |line| (line + 1) & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            // The one that came last, which is the highest in service; to rotate, too.
            1 | 5 => {
                let ending =
                    if self.special_mask { self.in_service & !self.mask } else { self.in_service };
                if let Some(line) = self.first_of(ending) {
                    self.in_service &= !(1 << line);
                    if value >> 5 == 5 {
                        self.highest = after(line);
                    }
                }
            }
            3 => self.in_service &= !(1 << line),
            7 => {
                self.in_service &= !(1 << line);
                self.highest = after(line);
            }
            6 => self.highest = after(line),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As Linux sets them up: vectors 0x30 and 0x38, all lines open.
    fn initialized() -> Pics {
        let mut pics = Pics::new();
        for (chip, base, wiring) in [(0, 0x30, 4), (1, 0x38, 2)] {
            pics.write(chip, 0, 0x11);
            for value in [base, wiring, 1, 0] {
                pics.write(chip, 1, value);
            }
        }
        pics
    }

    fn pulse(pics: &mut Pics, irq: u8) {
        pics.set_line(irq, true);
        pics.set_line(irq, false);
    }

    #[test]
    fn nothing_comes_before_they_are_initialized() {
        let mut pics = Pics::new();
        pulse(&mut pics, 4);
        assert!(!pics.output());
        pics.write(0, 0, 0x11);
        pulse(&mut pics, 4);
        assert!(!pics.output());
        assert!(!initialized().output());
    }

    #[test]
    fn an_edge_interrupts_once() {
        let mut pics = initialized();
        pics.set_line(4, true);
        assert_eq!((pics.output(), pics.read(0, 0)), (true, 0x10));
        assert_eq!(pics.acknowledge(), 0x34);
        pics.write(0, 0, 0x0b); // show ISR
        assert_eq!((pics.output(), pics.read(0, 0)), (false, 0x10));
        pics.write(0, 0, 0x20); // end of interrupt
        assert_eq!((pics.output(), pics.read(0, 0)), (false, 0));
        pics.set_line(4, false);
        pulse(&mut pics, 4);
        assert!(pics.output());
    }

    #[test]
    fn a_level_interrupts_as_long_as_it_is_high() {
        let mut pics = initialized();
        pics.set_elcr(1, 0xff);
        pics.set_elcr(0, 0xff);
        assert_eq!((pics.elcr(0), pics.elcr(1)), (0xf8, 0xde));
        pics.set_line(9, true);
        for _ in 0..2 {
            assert_eq!(pics.acknowledge(), 0x39);
            assert!(!pics.output());
            pics.write(1, 0, 0x61);
            pics.write(0, 0, 0x62);
            assert!(pics.output());
        }
        pics.set_line(9, false);
        assert!(!pics.output());
        // Too late for a processor that has seen it: the spurious interrupt, with nothing in service.
        assert_eq!(pics.acknowledge(), 0x37);
        pics.write(0, 0, 0x0b);
        assert_eq!(pics.read(0, 0), 0);
    }

    #[test]
    fn the_higher_line_comes_first_and_interrupts_the_lower() {
        let mut pics = initialized();
        pulse(&mut pics, 6);
        pulse(&mut pics, 14);
        pulse(&mut pics, 8);
        assert_eq!(pics.acknowledge(), 0x38);
        assert!(!pics.output(), "line 2 is in service");
        pulse(&mut pics, 1);
        assert_eq!(pics.acknowledge(), 0x31);
        pics.write(0, 0, 0x20);
        pics.write(1, 0, 0x20);
        pics.write(0, 0, 0x20);
        assert_eq!(pics.acknowledge(), 0x3e);
        pics.write(1, 0, 0x20);
        pics.write(0, 0, 0x20);
        assert_eq!(pics.acknowledge(), 0x36);
    }

    #[test]
    fn masks_hold_back_and_keep() {
        let mut pics = initialized();
        pics.write(0, 1, 0x10);
        pulse(&mut pics, 4);
        assert_eq!((pics.output(), pics.read(0, 1)), (false, 0x10));
        pics.write(0, 1, 0);
        assert_eq!(pics.acknowledge(), 0x34);
        // Special mask mode: what is masked does not block.
        pulse(&mut pics, 5);
        assert!(!pics.output());
        pics.write(0, 0, 0x68);
        pics.write(0, 1, 0x10);
        assert_eq!(pics.acknowledge(), 0x35);
    }

    #[test]
    fn priorities_rotate() {
        let mut pics = initialized();
        pics.write(0, 0, 0xc3); // line 3 is the lowest
        pulse(&mut pics, 0);
        pulse(&mut pics, 4);
        assert_eq!(pics.acknowledge(), 0x34);
        pics.write(0, 0, 0xa0); // end it, and it becomes the lowest
        pulse(&mut pics, 4);
        assert_eq!(pics.acknowledge(), 0x30);
        pics.write(0, 0, 0xe0);
        assert_eq!(pics.acknowledge(), 0x34);
    }

    #[test]
    fn interrupts_may_end_by_themselves() {
        let mut pics = initialized();
        pics.write(0, 0, 0x11);
        for value in [0x30, 4, 3, 0] {
            pics.write(0, 1, value);
        }
        pulse(&mut pics, 4);
        assert_eq!(pics.acknowledge(), 0x34);
        pics.write(0, 0, 0x0b);
        assert_eq!(pics.read(0, 0), 0);
    }

    #[test]
    fn polls_acknowledge() {
        let mut pics = initialized();
        pics.write(1, 0, 0x0c);
        assert_eq!(pics.read(1, 0), 0);
        pulse(&mut pics, 14);
        pics.write(1, 0, 0x0c);
        assert_eq!(pics.read(1, 0), 0x86);
        assert!(!pics.output());
    }

    proptest! {
        /// Whatever was written, no vector is outside the two ranges of eight, and when nothing is
        /// masked, in service or level-triggered, each edge comes to the processor.
        #[test]
        fn no_edge_is_lost(
            writes in proptest::collection::vec((0..2_usize, 0..2_u64, any::<u8>()), 0..40),
            edges in any::<u16>(),
        ) {
            let mut pics = initialized();
            for (chip, offset, value) in writes {
                pics.write(chip, offset, value);
                pulse(&mut pics, value & 15);
                if pics.output() {
                    let bases = [pics.first.base, pics.second.base];
                    let vector = pics.acknowledge();
                    prop_assert!(bases.contains(&(vector & 0xf8)));
                }
            }
            // Again from the start.
            for (chip, base) in [(0, 0x30), (1, 0x38)] {
                pics.write(chip, 0, 0x11);
                for value in [base, 0, 1, 0] {
                    pics.write(chip, 1, value);
                }
                pics.set_elcr(chip, 0);
            }
            for irq in 0..16 {
                if edges & 1 << irq != 0 {
                    pulse(&mut pics, irq);
                }
            }
            let mut seen = 0_u16;
            while pics.output() {
                let irq = pics.acknowledge() - 0x30;
                prop_assert_eq!(seen & 1 << irq, 0, "twice");
                seen |= 1 << irq;
                pics.write(1, 0, 0x20);
                pics.write(0, 0, 0x20);
            }
            prop_assert_eq!(seen, edges & !(1 << CASCADE));
        }
    }
}
