//! Which frames the guest wants, and how (Intel 317453, 3.2.1).

use backends::net::{MacAddr, TAGS};

use super::bits::{ADDRESS_VALID, rctl};

/// Addresses that are compared in full.
const ADDRESSES: usize = 16;
/// Words of the tables with a bit for each hash of multicast addresses, and for each VLAN.
const WORDS: usize = 128;

/// The longest frame that is not long, check sequence included and without VLAN tags.
const USUAL: usize = 1518;
/// The longest of all.
const LONGEST: usize = 16384;
/// Bytes of the check sequence.
pub(super) const CHECK_SEQUENCE: usize = 4;

/// What the guest has set for frames that come; the worker has a copy.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// RCTL.
    pub control: u32,
    /// RXCSUM.
    pub checksums: u32,
    /// VET: the type in front of a VLAN tag.
    pub tag_type: u16,
    /// CTRL.VME: tags are taken off received frames and can be put into those to send.
    pub tags: bool,
    /// RAL and RAH, alternately.
    pub addresses: [u32; 2 * ADDRESSES],
    /// MTA.
    pub multicast: [u32; WORDS],
    /// VFTA.
    pub vlans: [u32; WORDS],
}

impl Settings {
    /// Those after a reset of a NIC with this address.
    pub(super) fn new(address: MacAddr) -> Self {
        let [a, b, c, d, e, f] = address.0;
        let mut addresses = [0; _];
        addresses[0] = u32::from_le_bytes([a, b, c, d]);
        addresses[1] = u32::from(u16::from_le_bytes([e, f])) | ADDRESS_VALID;
        Self {
            control: 0,
            checksums: 0,
            tag_type: 0x8100,
            tags: false,
            addresses,
            multicast: [0; WORDS],
            vlans: [0; WORDS],
        }
    }

    /// Bytes of each buffer.
    pub(super) fn buffer_size(&self) -> u32 {
        let size = 2048 >> (self.control >> rctl::BSIZE_SHIFT & 3);
        // The largest of the extended sizes is reserved.
        if self.control & rctl::BSEX != 0 && size < 2048 { size * 16 } else { size }
    }

    /// The longest frame that the guest takes, without check sequence. The chip itself would count one
    /// tag as part of the usual length; drivers have room for more, and expect two to pass.
    pub(super) fn longest(&self) -> usize {
        let longest = match self.control & rctl::LPE {
            0 => USUAL + TAGS,
            _ => LONGEST,
        };
        longest - CHECK_SEQUENCE
    }

    /// Whether a frame is to be given to the guest; `tag` is the tag control information if there is
    /// a tag.
    pub(super) fn wants(&self, to: MacAddr, tag: Option<u16>) -> bool {
        self.wants_vlan(tag) && self.wants_address(to)
    }

    fn wants_vlan(&self, tag: Option<u16>) -> bool {
        let Some(tag) = tag.filter(|_| self.control & rctl::VFE != 0) else { return true };
        let number = usize::from(tag & 0xfff);
        self.vlans.get(number / 32).is_some_and(|word| word >> (number % 32) & 1 != 0)
    }

    fn wants_address(&self, to: MacAddr) -> bool {
        let has = |bit| self.control & bit != 0;
        if to == MacAddr::BROADCAST && has(rctl::BAM) {
            return true;
        }
        if has(if to.is_multicast() { rctl::MPE } else { rctl::UPE }) {
            return true;
        }
        let [a, b, c, d, e, f] = to.0;
        let (low, high) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        let (pairs, _) = self.addresses.as_chunks::<2>();
        // The two bits above an address would have it compared with the source, as nobody does.
        let exact = pairs.iter().any(|[ral, rah]| {
            *ral == low && *rah & 0x3_ffff == u32::from(high) && *rah & ADDRESS_VALID != 0
        });
        exact || (to.is_multicast() && self.has_hash(high))
    }

    /// Whether the table has the hash of an address that ends with these bytes.
    fn has_hash(&self, end: u16) -> bool {
        let shift = match self.control >> rctl::MO_SHIFT & 3 {
            0 => 4,
            1 => 3,
            2 => 2,
            _ => 0,
        };
        let hash = usize::from(end >> shift & 0xfff);
        self.multicast.get(hash / 32).is_some_and(|word| word >> (hash % 32) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    const OTHER: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x57]);
    const GROUP: MacAddr = MacAddr([0x01, 0x00, 0x5e, 0, 0, 0xfb]);

    fn wants(settings: &Settings, to: MacAddr) -> bool {
        settings.wants(to, None)
    }

    #[test]
    fn addresses_are_told_apart() {
        let mut settings = Settings::new(OWN);
        assert!(wants(&settings, OWN) && !wants(&settings, OTHER));
        assert!(!wants(&settings, MacAddr::BROADCAST) && !wants(&settings, GROUP));
        settings.control = rctl::BAM;
        assert!(wants(&settings, MacAddr::BROADCAST) && !wants(&settings, GROUP));
        settings.control = rctl::MPE;
        assert!(wants(&settings, GROUP) && !wants(&settings, OTHER));
        settings.control = rctl::UPE;
        assert!(wants(&settings, OTHER) && !wants(&settings, GROUP));
        settings.control = 0;
        (settings.addresses[30], settings.addresses[31]) = (0x1200_5452, 0x5734);
        assert!(!wants(&settings, OTHER), "an address that is not valid");
        settings.addresses[31] |= ADDRESS_VALID;
        assert!(wants(&settings, OTHER));
    }

    #[test]
    fn groups_are_hashed_as_the_offset_says() {
        for (offset, hash) in [(0, 0xfb0), (1, 0xf60), (2, 0xec0), (3, 0xb00)] {
            let mut settings = Settings::new(OWN);
            settings.control = offset << rctl::MO_SHIFT;
            settings.multicast[hash / 32] = 1 << (hash % 32);
            assert!(wants(&settings, GROUP), "offset {offset}");
            settings.multicast[hash / 32] = !(1 << (hash % 32));
            assert!(!wants(&settings, GROUP), "offset {offset}");
        }
    }

    #[test]
    fn vlans_are_filtered_if_that_is_wanted() {
        let mut settings = Settings::new(OWN);
        assert!(settings.wants(OWN, Some(0x2007)));
        settings.control = rctl::VFE;
        assert!(!settings.wants(OWN, Some(0x2007)) && settings.wants(OWN, None));
        settings.vlans[0] = 1 << 7;
        assert!(settings.wants(OWN, Some(0x2007)) && !settings.wants(OWN, Some(0x2008)));
    }

    #[test]
    fn long_frames_have_to_be_asked_for() {
        let mut settings = Settings::new(OWN);
        assert_eq!(settings.longest(), 1522);
        settings.control = rctl::LPE;
        assert_eq!(settings.longest(), 16380);
    }

    #[test]
    fn buffers_have_the_size_that_is_set() {
        let mut settings = Settings::new(OWN);
        let size = |settings: &mut Settings, value: u32, extended| {
            settings.control = value << rctl::BSIZE_SHIFT | if extended { rctl::BSEX } else { 0 };
            settings.buffer_size()
        };
        let sizes = [0, 1, 2, 3].map(|value| size(&mut settings, value, false));
        assert_eq!(sizes, [2048, 1024, 512, 256]);
        let sizes = [0, 1, 2, 3].map(|value| size(&mut settings, value, true));
        assert_eq!(sizes, [2048, 16384, 8192, 4096]);
    }
}
