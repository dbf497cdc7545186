//! The EEPROM: 64 words that hold the NIC's address, read by a register or by the wires of its serial
//! interface (a 93C46, as Microwire has it). It cannot be written; what a driver tries goes nowhere.

use backends::net::MacAddr;

use super::bits::{eecd, eerd};

/// Words.
const WORDS: usize = 64;
/// What all words add up to.
const SUM: u16 = 0xbaba;
const CHECKSUM: usize = 0x3f;

/// Bits of a command: one that begins it, two of operation, six of address.
const COMMAND_BITS: u32 = 9;
/// The operation that reads, behind the bit that begins a command.
const READ: u16 = 0b110;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Eeprom {
    words: [u16; WORDS],
    /// The last access by the register.
    eerd: u32,
    /// The wires as software has left them.
    wires: u32,
    serial: Serial,
}

/// What the chip is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serial {
    /// It takes a command; so many bits have come.
    Command { bits: u32, value: u16 },
    /// It gives words, bit by bit from this word on; so many bits have gone.
    Reading { word: usize, bits: usize },
    /// It is done, or does not know the command.
    Ready,
}

impl Eeprom {
    /// That of a NIC whose address is `address`.
    pub(super) fn new(address: MacAddr) -> Self {
        let mut words = [0; WORDS];
        let (pairs, _) = address.0.as_chunks::<2>();
        for (word, pair) in words.iter_mut().zip(pairs) {
            *word = u16::from_le_bytes(*pair);
        }
        // Identities as in PCI's configuration space, and settings of the chip (Intel 317453,
        // chapter 5): a full-duplex copper port that wakes nobody.
        for (at, word) in [
            (0x04, 0xffff), // LEDs as usual
            (0x0a, 0x640a),
            (0x0b, 0x001e),
            (0x0c, 0x8086),
            (0x0d, 0x100e),
            (0x0e, 0x8086),
            (0x0f, 0x3040),
        ] {
            words[at] = word;
        }
        let sum = words.iter().fold(0_u16, |sum, word| sum.wrapping_add(*word));
        words[CHECKSUM] = SUM.wrapping_sub(sum);
        Self { words, eerd: 0, wires: 0, serial: Serial::Ready }
    }

    fn word(&self, at: usize) -> u16 {
        self.words.get(at % WORDS).copied().unwrap_or_default()
    }

    /// EERD.
    pub(super) fn read_register(&self) -> u32 {
        self.eerd
    }

    /// EERD: a read is done at once.
    pub(super) fn write_register(&mut self, value: u32) {
        let address = value >> eerd::ADDRESS_SHIFT & 0xff;
        self.eerd = address << eerd::ADDRESS_SHIFT;
        if value & eerd::START != 0 {
            let word = u32::from(self.word(address as usize));
            self.eerd |= eerd::DONE | word << eerd::DATA_SHIFT;
        }
    }

    /// EECD: whoever asks for the wires gets them.
    pub(super) fn read_wires(&self) -> u32 {
        let grant = if self.wires & eecd::REQUEST != 0 { eecd::GRANT } else { 0 };
        let out = match self.serial {
            Serial::Command { .. } => false,
            // Before the first bit comes a zero.
            Serial::Reading { word, bits } => bits
                .checked_sub(1)
                .is_some_and(|bit| self.word(word + bit / 16) >> (15 - bit % 16) & 1 != 0),
            Serial::Ready => true,
        };
        let out = if out { eecd::DATA_OUT } else { 0 };
        eecd::PRESENT | self.wires | grant | out
    }

    /// EECD.
    pub(super) fn write_wires(&mut self, value: u32) {
        let was = self.wires;
        self.wires = value
            & (eecd::CLOCK | eecd::SELECT | eecd::DATA_IN | eecd::FLASH_WRITES | eecd::REQUEST);
        if value & eecd::SELECT == 0 {
            self.serial = Serial::Command { bits: 0, value: 0 };
        } else if value & eecd::CLOCK != 0 && was & eecd::CLOCK == 0 {
            self.serial = self.clock(value & eecd::DATA_IN != 0);
        }
    }

    /// The clock rises.
    fn clock(&self, data: bool) -> Serial {
        match self.serial {
            // Zeros before the first one mean nothing.
            Serial::Command { bits: 0, .. } if !data => self.serial,
            Serial::Command { bits, value } => {
                let value = value << 1 | u16::from(data);
                match bits + 1 {
                    COMMAND_BITS if value >> 6 == READ => {
                        Serial::Reading { word: usize::from(value & 0x3f), bits: 0 }
                    }
                    COMMAND_BITS => Serial::Ready,
                    bits => Serial::Command { bits, value },
                }
            }
            // Word after word, and then from the first again.
            Serial::Reading { word, bits } => {
                Serial::Reading { word, bits: bits % (WORDS * 16) + 1 }
            }
            Serial::Ready => Serial::Ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    fn by_register(eeprom: &mut Eeprom, at: u32) -> u16 {
        eeprom.write_register(at << eerd::ADDRESS_SHIFT | eerd::START);
        let value = eeprom.read_register();
        assert_ne!(value & eerd::DONE, 0);
        (value >> eerd::DATA_SHIFT) as u16
    }

    /// Moves the clock up and down, and returns what is on the data wire in between.
    fn clock(eeprom: &mut Eeprom, wires: u32) -> bool {
        eeprom.write_wires(wires | eecd::CLOCK);
        let out = eeprom.read_wires() & eecd::DATA_OUT != 0;
        eeprom.write_wires(wires);
        out
    }

    fn command(eeprom: &mut Eeprom, command: u16) {
        eeprom.write_wires(eecd::REQUEST);
        assert_ne!(eeprom.read_wires() & eecd::GRANT, 0);
        eeprom.write_wires(eecd::REQUEST | eecd::SELECT);
        for bit in (0..COMMAND_BITS).rev() {
            let data = if command >> bit & 1 != 0 { eecd::DATA_IN } else { 0 };
            assert!(!clock(eeprom, eecd::REQUEST | eecd::SELECT | data) || bit == 0);
        }
    }

    #[test]
    fn the_address_is_there_and_all_adds_up() {
        let mut eeprom = Eeprom::new(ADDRESS);
        let words: Vec<_> = (0..64).map(|at| by_register(&mut eeprom, at)).collect();
        assert_eq!(words[..3], [0x5452, 0x1200, 0x5634]);
        assert_eq!(words.iter().fold(0_u16, |sum, word| sum.wrapping_add(*word)), SUM);
    }

    #[test]
    fn the_wires_show_what_the_register_shows() {
        let mut eeprom = Eeprom::new(ADDRESS);
        for at in 0..64 {
            command(&mut eeprom, READ << 6 | at);
            let select = eecd::REQUEST | eecd::SELECT;
            // The word, and the one after it.
            for at in [at, (at + 1) % 64] {
                let word =
                    (0..16).fold(0, |word, _| word << 1 | u16::from(clock(&mut eeprom, select)));
                assert_eq!(word, by_register(&mut eeprom, at.into()), "word {at}");
            }
        }
    }

    #[test]
    fn writes_go_nowhere_and_are_ready_at_once() {
        let mut eeprom = Eeprom::new(ADDRESS);
        command(&mut eeprom, 0b101 << 6);
        let select = eecd::REQUEST | eecd::SELECT;
        (0..16).for_each(|_| assert!(clock(&mut eeprom, select)));
        assert_eq!(by_register(&mut eeprom, 0), 0x5452);
    }
}
