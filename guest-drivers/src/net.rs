//! What a driver of a NIC is. Synthetic and legacy NICs look the same from here.

use core::fmt;

use thiserror::Error;
use vsc::netvsc;

use crate::bus::BusError;
use crate::e1000::E1000Fault;

/// Bytes of an Ethernet header: two addresses, and what kind of frame it is.
pub const HEADER: usize = 14;

/// Bytes of the shortest frame that goes over a wire, its check sequence not counted.
pub const SHORTEST: usize = 60;

/// Bytes of the longest packet that a frame carries here: what every Ethernet takes.
pub const MTU: u16 = 1500;

/// Bytes of the longest frame, its check sequence not counted.
pub const LONGEST: usize = HEADER + MTU as usize;

/// The address of a station.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether a NIC can have it: it is no group's, and not nothing.
    pub fn is_station(self) -> bool {
        let [first, ..] = self.0;
        first & 1 == 0 && self != Self::default()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// By what it is driven: `netvsc` or `e1000`.
    pub driver: &'static str,
    /// Its address.
    pub mac: MacAddress,
    /// Bytes of the longest packet that a frame may carry.
    pub mtu: u16,
}

impl Identity {
    /// Bytes of the longest frame.
    pub fn longest_frame(&self) -> usize {
        (HEADER + usize::from(self.mtu)).min(LONGEST)
    }
}

/// Why a NIC cannot be used, or not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NicError {
    /// On the way to it.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The synthetic NIC is broken.
    #[error(transparent)]
    Netvsc(#[from] netvsc::Fault),
    /// The synthetic NIC does not take a setting.
    #[error(transparent)]
    Setting(#[from] netvsc::RequestError),
    /// The emulated NIC is broken.
    #[error(transparent)]
    E1000(#[from] E1000Fault),
    /// A frame that is none, or that the NIC does not take.
    #[error("a frame of {0} bytes is not possible")]
    Frame(usize),
    /// The guest has too little.
    #[error("there is no memory for a NIC")]
    Memory,
}

/// What a driver has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NicCounters {
    /// How often the host was told that there is something to do.
    pub signals: u64,
    /// How often the NIC's registers were accessed, each time an intercept.
    pub accesses: u64,
    /// Frames that came, and were not whole.
    pub damaged: u64,
}

/// A driver of one NIC.
///
/// A turn is: send some, publish once, poll for what has come. Frames are copied, both ways, so
/// that nobody has to keep them; they begin with their addresses and have no check sequence.
///
/// Whoever wants to sleep tells each of its NICs first, by [`NicDriver::rest`], and then asks each
/// whether it [is ready](NicDriver::is_ready), in this order, as NICs may share an interrupt. After
/// the sleep each is to [wake](NicDriver::wake). A NIC that is not looked after any more is to be
/// [quiet](NicDriver::quiet), or it keeps the interrupt to itself.
pub trait NicDriver {
    /// The NIC.
    fn identity(&self) -> &Identity;

    /// Whether the cable leads anywhere.
    fn has_link(&mut self) -> bool;

    /// Takes a frame, which the NIC learns of by [`NicDriver::publish`]. False if there is no room
    /// now.
    fn send(&mut self, frame: &[u8]) -> Result<bool, NicError>;

    /// Lets the NIC know what was sent, and of the room that it has for more to come.
    fn publish(&mut self) -> Result<(), NicError>;

    /// Hands frames that have come to `received`, not all if there are many, and returns how many
    /// that were.
    fn poll(&mut self, received: &mut dyn FnMut(&[u8])) -> Result<usize, NicError>;

    /// Whether there may be something to poll: costs nothing.
    fn is_ready(&self) -> bool;

    /// Publishes, and has the next frame interrupt.
    fn rest(&mut self) -> Result<(), NicError>;

    /// Frames need not interrupt any more.
    fn wake(&mut self);

    /// Frames must not interrupt any more, until the next [`NicDriver::rest`].
    fn quiet(&mut self);

    /// What has been counted.
    fn counters(&self) -> NicCounters;
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn addresses_are_written_and_told_apart() {
        let mac = MacAddress([0x52, 0x54, 0, 0xab, 1, 0xff]);
        assert_eq!(mac.to_string(), "52:54:00:ab:01:ff");
        assert!(mac.is_station());
        for no_station in [[0; 6], [1, 0, 0x5e, 0, 0, 1], [0xff; 6]] {
            assert!(!MacAddress(no_station).is_station());
        }
    }
}
