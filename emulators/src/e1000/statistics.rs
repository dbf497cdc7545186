//! The statistics registers: a count is gone when it has been read.

use backends::net::MacAddr;

use super::bits::reg;

const COUNT: usize = (reg::STATISTICS_LAST - reg::STATISTICS) as usize / 4 + 1;

/// Offsets from the first of them.
mod at {
    pub(super) const RECEIVE_ERRORS: u32 = 0x0c;
    pub(super) const MISSED: u32 = 0x10;
    /// Received by size, 64 bytes to 1522; the sent ones lie behind [`SENT_SIZES`] alike.
    pub(super) const RECEIVED_SIZES: u32 = 0x5c;
    pub(super) const RECEIVED: u32 = 0x74;
    pub(super) const RECEIVED_BROADCAST: u32 = 0x78;
    pub(super) const RECEIVED_MULTICAST: u32 = 0x7c;
    pub(super) const SENT: u32 = 0x80;
    pub(super) const RECEIVED_BYTES: u32 = 0x88;
    pub(super) const SENT_BYTES: u32 = 0x90;
    pub(super) const NO_BUFFERS: u32 = 0xa0;
    pub(super) const TOO_LONG: u32 = 0xac;
    pub(super) const ALL_RECEIVED_BYTES: u32 = 0xc0;
    pub(super) const ALL_SENT_BYTES: u32 = 0xc8;
    pub(super) const ALL_RECEIVED: u32 = 0xd0;
    pub(super) const ALL_SENT: u32 = 0xd4;
    pub(super) const SENT_SIZES: u32 = 0xd8;
    pub(super) const SENT_MULTICAST: u32 = 0xf0;
    pub(super) const SENT_BROADCAST: u32 = 0xf4;
    pub(super) const CONTEXTS: u32 = 0xf8;
}

/// Counters of 64 bits, the lower half first.
const WIDE: [u32; 4] =
    [at::RECEIVED_BYTES, at::SENT_BYTES, at::ALL_RECEIVED_BYTES, at::ALL_SENT_BYTES];

/// The check sequence counts.
const CHECK_SEQUENCE: u32 = 4;
/// The shortest frame on a wire.
const SHORTEST: u32 = 64;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Statistics([u32; COUNT]);

impl Statistics {
    pub(super) fn new() -> Self {
        Self([0; COUNT])
    }

    /// The register at `offset` from the first.
    pub(super) fn read(&mut self, offset: u32) -> u32 {
        let Some(place) = self.0.get_mut(offset as usize / 4) else { return 0 };
        // The lower half of a wide one goes with the upper.
        if WIDE.contains(&offset) {
            return *place;
        }
        let value = std::mem::take(place);
        if let Some(lower) = WIDE.iter().find(|wide| **wide + 4 == offset) {
            self.0[*lower as usize / 4] = 0;
        }
        value
    }

    fn add(&mut self, offset: u32, value: u32) {
        if let Some(place) = self.0.get_mut(offset as usize / 4) {
            *place = place.saturating_add(value);
        }
    }

    fn add_wide(&mut self, offset: u32, value: u32) {
        let at = offset as usize / 4;
        if let Some([low, high]) = self.0.get_mut(at..at + 2) {
            let sum = (u64::from(*high) << 32 | u64::from(*low)).wrapping_add(value.into());
            (*low, *high) = (sum as u32, (sum >> 32) as u32);
        }
    }

    /// Adds frames to the register for their size.
    fn add_size(&mut self, first: u32, len: u32) {
        let class = match len {
            ..=64 => 0,
            65..=127 => 1,
            128..=255 => 2,
            256..=511 => 3,
            512..=1023 => 4,
            _ => 5,
        };
        self.add(first + 4 * class, 1);
    }

    /// A frame that went, without check sequence.
    pub(super) fn sent(&mut self, len: u32, to: MacAddr) {
        let len = (len + CHECK_SEQUENCE).max(SHORTEST);
        self.add(at::SENT, 1);
        self.add(at::ALL_SENT, 1);
        self.add_wide(at::SENT_BYTES, len);
        self.add_wide(at::ALL_SENT_BYTES, len);
        self.add_size(at::SENT_SIZES, len);
        match to {
            MacAddr::BROADCAST => self.add(at::SENT_BROADCAST, 1),
            to if to.is_multicast() => self.add(at::SENT_MULTICAST, 1),
            _ => {}
        }
    }

    /// A packet that went to be cut.
    pub(super) fn cut(&mut self) {
        self.add(at::CONTEXTS, 1);
    }

    /// A frame that came and that the guest has got.
    pub(super) fn received(&mut self, len: u32, to: MacAddr) {
        let len = (len + CHECK_SEQUENCE).max(SHORTEST);
        self.add(at::RECEIVED, 1);
        self.add_wide(at::RECEIVED_BYTES, len);
        self.add_size(at::RECEIVED_SIZES, len);
        match to {
            MacAddr::BROADCAST => self.add(at::RECEIVED_BROADCAST, 1),
            to if to.is_multicast() => self.add(at::RECEIVED_MULTICAST, 1),
            _ => {}
        }
        self.seen(len - CHECK_SEQUENCE);
    }

    /// A frame that came, whatever becomes of it.
    fn seen(&mut self, len: u32) {
        self.add(at::ALL_RECEIVED, 1);
        self.add_wide(at::ALL_RECEIVED_BYTES, (len + CHECK_SEQUENCE).max(SHORTEST));
    }

    /// A frame that was longer than the guest takes.
    pub(super) fn too_long(&mut self) {
        self.add(at::TOO_LONG, 1);
    }

    /// A frame that was lost since the guest's descriptors made no sense.
    pub(super) fn lost(&mut self) {
        self.add(at::MISSED, 1);
        self.add(at::RECEIVE_ERRORS, 1);
    }

    /// A frame that had to wait for descriptors.
    pub(super) fn waits(&mut self) {
        self.add(at::NO_BUFFERS, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_when_they_are_read() {
        let mut statistics = Statistics::new();
        for (len, to) in [(42, MacAddr::BROADCAST), (1514, MacAddr([2; 6]))] {
            statistics.sent(len, to);
            statistics.received(len, to);
        }
        assert_eq!((statistics.read(at::SENT), statistics.read(at::SENT)), (2, 0));
        assert_eq!(statistics.read(at::RECEIVED_BROADCAST), 1);
        assert_eq!(statistics.read(at::RECEIVED_SIZES), 1);
        assert_eq!(statistics.read(at::SENT_SIZES + 20), 1);
        assert_eq!(statistics.read(at::ALL_RECEIVED), 2);
        // Both halves of a wide one.
        assert_eq!(statistics.read(at::SENT_BYTES), 64 + 1518);
        assert_eq!(statistics.read(at::SENT_BYTES), 64 + 1518);
        assert_eq!(statistics.read(at::SENT_BYTES + 4), 0);
        assert_eq!(statistics.read(at::SENT_BYTES), 0);
        (0..3).for_each(|_| statistics.add_wide(at::RECEIVED_BYTES, u32::MAX));
        assert_eq!(statistics.read(at::RECEIVED_BYTES + 4), 3);
        // They stay at their greatest.
        statistics.add(at::MISSED, u32::MAX);
        statistics.lost();
        assert_eq!(statistics.read(at::MISSED), u32::MAX);
    }
}
