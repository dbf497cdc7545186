//! A 16550A's registers, without a line, a cable or a clock: accesses in, bytes and the level of the
//! interrupt output out (National Semiconductor, PC16550D data sheet, section 8, "Registers").
//!
//! There is no clock because there is no baud rate: what the guest sends has left at once, and what
//! has come and does not reach the FIFO's trigger level counts as timed out at once.

use std::collections::VecDeque;

/// Bytes that the receive FIFO holds.
pub(super) const FIFO: usize = 16;

/// IER: the sources that may interrupt.
pub(super) mod ier {
    pub(crate) const RECEIVED: u8 = 1 << 0;
    pub(crate) const TRANSMITTER_EMPTY: u8 = 1 << 1;
    pub(crate) const LINE_STATUS: u8 = 1 << 2;
    pub(crate) const MODEM_STATUS: u8 = 1 << 3;
}

/// IIR: the source that interrupts, the most urgent first.
pub(super) mod iir {
    pub(crate) const LINE_STATUS: u8 = 0x6;
    pub(crate) const RECEIVED: u8 = 0x4;
    pub(crate) const TIMEOUT: u8 = 0xc;
    pub(crate) const TRANSMITTER_EMPTY: u8 = 0x2;
    pub(crate) const MODEM_STATUS: u8 = 0x0;
    pub(crate) const NONE: u8 = 0x1;
    pub(crate) const FIFOS: u8 = 0xc0;
}

/// FCR: the FIFOs' switch, triggers that empty them, and the receiver's level.
pub(super) mod fcr {
    pub(crate) const ENABLE: u8 = 1 << 0;
    pub(crate) const CLEAR_RECEIVER: u8 = 1 << 1;
    pub(crate) const LEVEL_SHIFT: u8 = 6;
}

/// LCR: registers 0 and 1 are the divisor.
pub(super) const LCR_DLAB: u8 = 1 << 7;

/// MCR: the outputs to the modem, and whether they and the transmitter lead back to the inputs.
pub(super) mod mcr {
    pub(crate) const DTR: u8 = 1 << 0;
    pub(crate) const RTS: u8 = 1 << 1;
    pub(crate) const OUT1: u8 = 1 << 2;
    pub(crate) const OUT2: u8 = 1 << 3;
    pub(crate) const LOOP: u8 = 1 << 4;
}

/// LSR.
pub(super) mod lsr {
    pub(crate) const DATA_READY: u8 = 1 << 0;
    pub(crate) const OVERRUN: u8 = 1 << 1;
    pub(crate) const HOLDING_EMPTY: u8 = 1 << 5;
    pub(crate) const EMPTY: u8 = 1 << 6;
}

/// MSR: the modem's lines, and in the low half which of them have changed.
pub(super) mod msr {
    pub(crate) const CTS: u8 = 1 << 4;
    pub(crate) const DSR: u8 = 1 << 5;
    pub(crate) const RI: u8 = 1 << 6;
    pub(crate) const DCD: u8 = 1 << 7;
    /// RI tells only that ringing has ended.
    pub(crate) const TRAILING_EDGE: u8 = 1 << 2;
}

/// The state of one port.
#[derive(Debug)]
pub(super) struct Registers {
    interrupts: u8,
    /// FCR's bits that last: the switch, and the level in the top bits.
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
    /// LSR's error bits, until they are read.
    errors: u8,
    /// MSR's lower half, until it is read.
    changes: u8,
    /// Whether the transmitter has become empty since somebody heard of it.
    emptied: bool,
    received: VecDeque<u8>,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            interrupts: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            // 9600 baud of 1.8432 MHz, as firmware leaves it.
            divisor: [12, 0],
            errors: 0,
            changes: 0,
            emptied: false,
            received: VecDeque::with_capacity(FIFO),
        }
    }
}

impl Registers {
    /// Register `offset`, 0 to 7, as the guest reads it.
    pub(super) fn read(&mut self, offset: u8) -> u8 {
        match offset & 7 {
            0 | 1 if self.line_control & LCR_DLAB != 0 => {
                let [low, high] = self.divisor;
                if offset & 1 == 0 { low } else { high }
            }
            0 => self.received.pop_front().unwrap_or(0),
            1 => self.interrupts,
            2 => {
                let source = self.source();
                if source == iir::TRANSMITTER_EMPTY {
                    self.emptied = false;
                }
                if self.has_fifos() { source | iir::FIFOS } else { source }
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let ready = if self.received.is_empty() { 0 } else { lsr::DATA_READY };
                ready | lsr::HOLDING_EMPTY | lsr::EMPTY | std::mem::take(&mut self.errors)
            }
            6 => self.modem_lines() | std::mem::take(&mut self.changes),
            _ => self.scratch,
        }
    }

    /// The guest writes register `offset`, 0 to 7. Returns the byte that leaves the port, if one does.
    pub(super) fn write(&mut self, offset: u8, value: u8) -> Option<u8> {
        match offset & 7 {
            0 | 1 if self.line_control & LCR_DLAB != 0 => {
                let [low, high] = &mut self.divisor;
                *(if offset & 1 == 0 { low } else { high }) = value;
            }
            0 => return self.transmit(value),
            1 => {
                let enabled = value & !self.interrupts;
                self.interrupts = value & 0x0f;
                // Who asks to hear of an empty transmitter hears at once, as it is empty.
                self.emptied |= enabled & ier::TRANSMITTER_EMPTY != 0;
            }
            2 => self.control_fifos(value),
            3 => self.line_control = value,
            4 => {
                let before = self.modem_lines();
                self.modem_control = value & 0x1f;
                self.note_changes(before);
            }
            // What they show is not the guest's to write.
            5 | 6 => {}
            _ => self.scratch = value,
        }
        None
    }

    /// How many bytes of input it would take now.
    pub(super) fn room(&self) -> usize {
        if self.is_looped() { 0 } else { self.capacity().saturating_sub(self.received.len()) }
    }

    /// Whether it holds no input.
    pub(super) fn is_drained(&self) -> bool {
        self.received.is_empty()
    }

    /// Takes a byte of input. Without [`Self::room`] it is lost, and the guest told so.
    pub(super) fn receive(&mut self, byte: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
            return;
        }
        self.errors |= lsr::OVERRUN;
        if !self.has_fifos() {
            // The register is overwritten; a FIFO stays as it is.
            self.received.clear();
            self.received.push_back(byte);
        }
    }

    /// Whether the interrupt output is up.
    pub(super) fn interrupts(&self) -> bool {
        self.source() != iir::NONE
    }

    /// The most urgent source that the guest wants to hear of, as IIR names it.
    fn source(&self) -> u8 {
        let wants = |bit| self.interrupts & bit != 0;
        if wants(ier::LINE_STATUS) && self.errors != 0 {
            iir::LINE_STATUS
        } else if wants(ier::RECEIVED) && !self.received.is_empty() {
            if self.received.len() >= self.level() { iir::RECEIVED } else { iir::TIMEOUT }
        } else if wants(ier::TRANSMITTER_EMPTY) && self.emptied {
            iir::TRANSMITTER_EMPTY
        } else if wants(ier::MODEM_STATUS) && self.changes != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn has_fifos(&self) -> bool {
        self.fifo_control & fcr::ENABLE != 0
    }

    fn is_looped(&self) -> bool {
        self.modem_control & mcr::LOOP != 0
    }

    fn capacity(&self) -> usize {
        if self.has_fifos() { FIFO } else { 1 }
    }

    /// So many bytes are received data; fewer are a timeout.
    fn level(&self) -> usize {
        match self.fifo_control >> fcr::LEVEL_SHIFT {
            _ if !self.has_fifos() => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.emptied = true;
        if self.is_looped() {
            self.receive(byte);
            return None;
        }
        Some(byte)
    }

    fn control_fifos(&mut self, value: u8) {
        let switched = (value ^ self.fifo_control) & fcr::ENABLE != 0;
        // The other bits count only in a write that has the FIFOs on.
        let on = value & fcr::ENABLE != 0;
        if switched || on && value & fcr::CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        self.fifo_control = if on { value & (fcr::ENABLE | 3 << fcr::LEVEL_SHIFT) } else { 0 };
    }

    /// MSR's upper half: a peer that is there and listens, or what the guest put out itself.
    fn modem_lines(&self) -> u8 {
        if !self.is_looped() {
            return msr::DCD | msr::DSR | msr::CTS;
        }
        let loops = [
            (mcr::RTS, msr::CTS),
            (mcr::DTR, msr::DSR),
            (mcr::OUT1, msr::RI),
            (mcr::OUT2, msr::DCD),
        ];
        let high = loops.iter().filter(|(output, _)| self.modem_control & output != 0);
        high.fold(0, |lines, (_, input)| lines | input)
    }

    fn note_changes(&mut self, before: u8) {
        let now = self.modem_lines();
        let changed = (before ^ now) & !msr::RI | before & !now & msr::RI;
        self.changes |= changed >> 4;
        debug_assert_eq!(msr::RI >> 4, msr::TRAILING_EDGE);
    }
}
