//! VLANs: which frames a port takes, and how it hands them out.

use std::fmt;

/// The number of untagged frames, and of frames with a priority tag, at a trunk that has no other
/// for them.
const DEFAULT: u16 = 1;

/// How a port takes part in VLANs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortVlan {
    /// It belongs to one VLAN and knows nothing of it: frames have no tag.
    Access(u16),
    /// It belongs to several: frames have tags, but for those of its native VLAN.
    Trunk {
        /// That of frames without a tag; such frames are refused if there is none.
        native: Option<u16>,
        /// The others.
        allowed: VlanSet,
    },
}

impl Default for PortVlan {
    /// Belongs to all; a frame leaves the way it came.
    fn default() -> Self {
        Self::Trunk { native: Some(DEFAULT), allowed: VlanSet::all() }
    }
}

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// Of all.
    pub fn all() -> Self {
        Self(Box::new([u64::MAX; 64]))
    }

    /// Whether a VLAN is in it.
    pub fn contains(&self, vlan: u16) -> bool {
        self.0.get(usize::from(vlan / 64)).is_some_and(|word| word >> (vlan % 64) & 1 != 0)
    }
}

impl FromIterator<u16> for VlanSet {
    /// Numbers that are no VLAN's are left out.
    fn from_iter<T: IntoIterator<Item = u16>>(vlans: T) -> Self {
        let mut words = Box::new([0; 64]);
        for vlan in vlans {
            if let Some(word) = words.get_mut(usize::from(vlan / 64)) {
                *word |= 1 << (vlan % 64);
            }
        }
        Self(words)
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((1..4095).filter(|vlan| self.contains(*vlan))).finish()
    }
}

/// The two bytes of a tag behind its type: 3 bits of priority, one for what may be dropped first,
/// and the VLAN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tci(pub(super) u16);

impl Tci {
    pub(super) const fn vlan(self) -> u16 {
        self.0 & 0xfff
    }

    const fn with_vlan(self, vlan: u16) -> Self {
        Self(self.0 & 0xf000 | vlan & 0xfff)
    }
}

const fn is_vlan(vlan: u16) -> bool {
    vlan != 0 && vlan < 0xfff
}

impl PortVlan {
    /// Where a frame belongs that came into the switch by this port, with that tag or none; `None`
    /// if the port does not take it.
    pub(super) fn classify(&self, tag: Option<Tci>) -> Option<Tci> {
        let tci = tag.unwrap_or_default();
        let untagged = tci.vlan() == 0;
        let vlan = match self {
            Self::Access(vlan) => untagged.then_some(*vlan),
            Self::Trunk { native, .. } if untagged => *native,
            Self::Trunk { allowed, .. } => Some(tci.vlan()).filter(|vlan| allowed.contains(*vlan)),
        }?;
        is_vlan(vlan).then(|| tci.with_vlan(vlan))
    }

    /// Whether frames of a VLAN leave by this port.
    pub(super) fn takes(&self, vlan: u16) -> bool {
        match self {
            Self::Access(own) => *own == vlan,
            Self::Trunk { native, allowed } => *native == Some(vlan) || allowed.contains(vlan),
        }
    }

    /// The tag with which a frame leaves, if any.
    pub(super) fn tag(&self, tci: Tci) -> Option<Tci> {
        match self {
            Self::Access(_) => None,
            Self::Trunk { native, .. } => (*native != Some(tci.vlan())).then_some(tci),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_ports_know_no_tags() {
        let port = PortVlan::Access(7);
        assert_eq!(port.classify(None), Some(Tci(7)));
        assert_eq!(port.classify(Some(Tci(0xa000))), Some(Tci(0xa007)));
        assert_eq!(port.classify(Some(Tci(7))), None);
        assert!(port.takes(7) && !port.takes(8));
        assert_eq!(port.tag(Tci(0xa007)), None);
    }

    #[test]
    fn trunks_keep_tags() {
        let allowed = [5, 6, 4095, 60_000].into_iter().collect();
        let port = PortVlan::Trunk { native: Some(9), allowed };
        assert_eq!(port.classify(None), Some(Tci(9)));
        assert_eq!(port.classify(Some(Tci(0x2005))), Some(Tci(0x2005)));
        assert_eq!(port.classify(Some(Tci(7))), None);
        assert_eq!(port.classify(Some(Tci(4095))), None);
        assert!(port.takes(9) && port.takes(5) && !port.takes(7));
        assert_eq!(port.tag(Tci(0x2005)), Some(Tci(0x2005)));
        assert_eq!(port.tag(Tci(9)), None);
        let strict = PortVlan::Trunk { native: None, allowed: VlanSet::all() };
        assert_eq!(strict.classify(None), None);
        assert_eq!(strict.classify(Some(Tci(4095))), None);
        assert_eq!(PortVlan::default().classify(Some(Tci(33))), Some(Tci(33)));
    }
}
