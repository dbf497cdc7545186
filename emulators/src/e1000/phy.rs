//! The PHY: registers of IEEE 802.3 (clause 22) and of a Marvell 88E1011, as far as drivers read them.
//! It agrees with the other end at once, and always on 1000 Mbit/s, full duplex.

use super::bits::mdic;

/// The PHY's address.
const ADDRESS: u32 = 1;

/// Numbers of registers.
mod mii {
    pub(super) const CONTROL: u8 = 0;
    pub(super) const STATUS: u8 = 1;
    pub(super) const ID1: u8 = 2;
    pub(super) const ID2: u8 = 3;
    pub(super) const ADVERTISED: u8 = 4;
    pub(super) const PARTNER: u8 = 5;
    pub(super) const EXPANSION: u8 = 6;
    pub(super) const GIGABIT_CONTROL: u8 = 9;
    pub(super) const GIGABIT_STATUS: u8 = 10;
    pub(super) const EXTENDED_STATUS: u8 = 15;
    /// The 88E1011's own.
    pub(super) const SPECIFIC_CONTROL: u8 = 16;
    pub(super) const SPECIFIC_STATUS: u8 = 17;
    pub(super) const EXTENDED_CONTROL: u8 = 20;
}

const CONTROL_RESET: u16 = 1 << 15;
const CONTROL_LOOPBACK: u16 = 1 << 14;
const CONTROL_RESTART: u16 = 1 << 9;
const STATUS_AGREED: u16 = 1 << 5;
const STATUS_LINK: u16 = 1 << 2;
const SPECIFIC_LINK: u16 = 1 << 10;

/// Registers that can be written, and what they are at first.
const DEFAULTS: [(u8, u16); 5] = [
    (mii::CONTROL, 0x1140), // agrees with the other end; full duplex, 1000 Mbit/s
    (mii::ADVERTISED, 0x0de1), // all of 10 and 100 Mbit/s, pauses
    (mii::GIGABIT_CONTROL, 0x0e00),
    (mii::SPECIFIC_CONTROL, 0x0360),
    (mii::EXTENDED_CONTROL, 0x0d60),
];

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Phy {
    registers: [u16; 32],
    /// The last access.
    mdic: u32,
}

/// What an access to the PHY has brought about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Accessed {
    /// The driver wants an interrupt for it.
    pub interrupt: bool,
    /// The PHY has agreed with the other end anew.
    pub agreed: bool,
}

impl Phy {
    pub(super) fn new() -> Self {
        let mut phy = Self { registers: [0; 32], mdic: mdic::READY };
        phy.reset();
        phy
    }

    /// As it comes out of a reset.
    pub(super) fn reset(&mut self) {
        self.registers = [0; 32];
        for (register, value) in DEFAULTS {
            self.registers[usize::from(register & 31)] = value;
        }
    }

    /// Whether it gives back what it is to send, and hears nothing else.
    pub(super) fn loops(&self) -> bool {
        self.registers[usize::from(mii::CONTROL)] & CONTROL_LOOPBACK != 0
    }

    fn read(&self, register: u8, link: bool) -> u16 {
        let when = |value: u16| if link { value } else { 0 };
        match register {
            // 10, 100 Mbit/s and extended status; can agree; has more registers.
            mii::STATUS => 0x7949 | when(STATUS_AGREED | STATUS_LINK),
            mii::ID1 => 0x0141,
            mii::ID2 => 0x0c20,
            mii::PARTNER => when(0xcde1),
            mii::EXPANSION => when(0x000f),
            mii::GIGABIT_STATUS => when(0x7c00),
            mii::EXTENDED_STATUS => 0x3000,
            // 1000 Mbit/s, full duplex, resolved.
            mii::SPECIFIC_STATUS => when(0xa800 | SPECIFIC_LINK),
            register => self.registers.get(usize::from(register)).copied().unwrap_or_default(),
        }
    }

    fn write(&mut self, register: u8, value: u16) -> bool {
        let Some((register, _)) = DEFAULTS.iter().find(|(known, _)| *known == register) else {
            return false;
        };
        let mut value = value;
        let mut agreed = false;
        if *register == mii::CONTROL {
            if value & CONTROL_RESET != 0 {
                self.reset();
                return true;
            }
            agreed = value & CONTROL_RESTART != 0;
            value &= !CONTROL_RESTART;
        }
        if let Some(place) = self.registers.get_mut(usize::from(*register)) {
            *place = value;
        }
        agreed
    }

    /// MDIC.
    pub(super) fn read_register(&self) -> u32 {
        self.mdic
    }

    /// MDIC: an access is done at once. `link` is whether the cable is plugged in.
    pub(super) fn write_register(&mut self, value: u32, link: bool) -> Accessed {
        let register = (value >> mdic::REGISTER_SHIFT & 31) as u8;
        let ours = value >> mdic::PHY_SHIFT & 31 == ADDRESS;
        let mut agreed = false;
        self.mdic = value & !mdic::ERROR | mdic::READY;
        match value & mdic::OPERATION {
            mdic::READ if ours => {
                self.mdic = self.mdic & !0xffff | u32::from(self.read(register, link));
            }
            mdic::WRITE if ours => agreed = self.write(register, value as u16),
            _ => self.mdic |= mdic::ERROR,
        }
        Accessed { interrupt: value & mdic::INTERRUPT != 0, agreed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(phy: &mut Phy, register: u32, link: bool) -> u16 {
        let request = 1 << mdic::PHY_SHIFT | register << mdic::REGISTER_SHIFT | mdic::READ;
        assert_eq!(phy.write_register(request, link), Accessed::default());
        let value = phy.read_register();
        assert_eq!(value & (mdic::READY | mdic::ERROR), mdic::READY);
        value as u16
    }

    #[test]
    fn it_is_what_drivers_look_for() {
        let mut phy = Phy::new();
        assert_eq!((read(&mut phy, 2, true), read(&mut phy, 3, true)), (0x0141, 0x0c20));
        assert_eq!(read(&mut phy, 1, true) & 0x24, 0x24);
        assert_eq!(read(&mut phy, 1, false) & 0x24, 0);
        assert_eq!(read(&mut phy, 17, true) & 0xec00, 0xac00);
        // No other PHY answers.
        phy.write_register(2 << mdic::PHY_SHIFT | mdic::READ, true);
        assert_ne!(phy.read_register() & mdic::ERROR, 0);
    }

    #[test]
    fn restarts_and_resets_agree_anew() {
        let mut phy = Phy::new();
        let write = |phy: &mut Phy, register: u32, value: u32| {
            let place = 1 << mdic::PHY_SHIFT | register << mdic::REGISTER_SHIFT;
            phy.write_register(place | mdic::WRITE | mdic::INTERRUPT | value, true)
        };
        assert_eq!(write(&mut phy, 4, 0x0c01), Accessed { interrupt: true, agreed: false });
        assert_eq!(read(&mut phy, 4, true), 0x0c01);
        assert!(write(&mut phy, 0, 0x1340).agreed);
        assert_eq!(read(&mut phy, 0, true), 0x1140);
        assert!(write(&mut phy, 0, 0x8000).agreed);
        assert_eq!((read(&mut phy, 0, true), read(&mut phy, 4, true)), (0x1140, 0x0de1));
        // What it sends comes back until it is told otherwise, or is reset.
        for off in [0x0140, 0x8140] {
            write(&mut phy, 0, 0x4140);
            assert!(phy.loops());
            write(&mut phy, 0, off);
            assert!(!phy.loops());
        }
        // An identity stays.
        assert!(!write(&mut phy, 2, 0).agreed);
        assert_eq!(read(&mut phy, 2, true), 0x0141);
    }
}
