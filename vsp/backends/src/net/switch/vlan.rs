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

/// Tags that a frame has besides the one that says where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inner {
    /// None.
    None,
    /// One behind it.
    Behind,
    /// A provider's, in its place.
    Foreign,
}

const fn is_vlan(vlan: u16) -> bool {
    vlan != 0 && vlan < 0xfff
}

impl PortVlan {
    /// Where a frame belongs that came into the switch by this port, with that tag or none, and with
    /// others besides; `None` if the port does not take it.
    ///
    /// A tag that says nothing of a VLAN has no other behind it: taken off, it would leave that one in
    /// its place, for a VLAN that the port may have no part in. A provider's tag does the same to those
    /// outside, and so passes only where all VLANs do.
    pub(super) fn classify(&self, tag: Option<Tci>, inner: Inner) -> Option<Tci> {
        let tci = tag.unwrap_or_default();
        let untagged = tci.vlan() == 0;
        match inner {
            Inner::Behind if untagged => return None,
            Inner::Foreign if !self.is_open() => return None,
            _ => {}
        }
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

    /// Whether all VLANs pass.
    fn is_open(&self) -> bool {
        matches!(self, Self::Trunk { allowed, .. } if allowed.0.iter().all(|word| *word == u64::MAX))
    }

    /// The tag with which a frame leaves, if any; outside of that, `None` if it does not. Where frames
    /// have no tag, none has two; and one in a trunk's native VLAN keeps its tag if there is another
    /// behind it.
    pub(super) fn tag(&self, tci: Tci, inner: Inner) -> Option<Option<Tci>> {
        match self {
            Self::Access(_) => (inner == Inner::None).then_some(None),
            Self::Trunk { native, .. } => {
                let bare = *native == Some(tci.vlan()) && inner != Inner::Behind;
                Some((!bare).then_some(tci))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_ports_know_no_tags() {
        let port = PortVlan::Access(7);
        assert_eq!(port.classify(None, Inner::None), Some(Tci(7)));
        assert_eq!(port.classify(Some(Tci(0xa000)), Inner::None), Some(Tci(0xa007)));
        assert_eq!(port.classify(Some(Tci(7)), Inner::None), None);
        assert!(port.takes(7) && !port.takes(8));
        assert_eq!(port.tag(Tci(0xa007), Inner::None), Some(None));
    }

    #[test]
    fn trunks_keep_tags() {
        let allowed = [5, 6, 4095, 60_000].into_iter().collect();
        let port = PortVlan::Trunk { native: Some(9), allowed };
        assert_eq!(port.classify(None, Inner::None), Some(Tci(9)));
        assert_eq!(port.classify(Some(Tci(0x2005)), Inner::None), Some(Tci(0x2005)));
        assert_eq!(port.classify(Some(Tci(7)), Inner::None), None);
        assert_eq!(port.classify(Some(Tci(4095)), Inner::None), None);
        assert!(port.takes(9) && port.takes(5) && !port.takes(7));
        assert_eq!(port.tag(Tci(0x2005), Inner::None), Some(Some(Tci(0x2005))));
        assert_eq!(port.tag(Tci(9), Inner::None), Some(None));
        let strict = PortVlan::Trunk { native: None, allowed: VlanSet::all() };
        assert_eq!(strict.classify(None, Inner::None), None);
        assert_eq!(strict.classify(Some(Tci(4095)), Inner::None), None);
        assert_eq!(PortVlan::default().classify(Some(Tci(33)), Inner::None), Some(Tci(33)));
    }

    #[test]
    fn no_tag_takes_another_ones_place() {
        let access = PortVlan::Access(7);
        let some: VlanSet = [5, 6].into_iter().collect();
        let trunk = PortVlan::Trunk { native: Some(9), allowed: some };
        let open = PortVlan::default();
        // Behind a priority tag nothing is taken.
        for port in [&access, &trunk, &open] {
            assert_eq!(port.classify(Some(Tci(0xe000)), Inner::Behind), None);
        }
        assert_eq!(trunk.classify(Some(Tci(5)), Inner::Behind), Some(Tci(5)));
        assert_eq!(access.classify(Some(Tci(7)), Inner::Behind), None);
        // A provider's tag is no way around a port's VLANs.
        let foreign = |port: &PortVlan| port.classify(None, Inner::Foreign);
        assert_eq!((foreign(&access), foreign(&trunk), foreign(&open)), (None, None, Some(Tci(1))));
        // One that leaves keeps the tag that is in front of another.
        assert_eq!(trunk.tag(Tci(9), Inner::Behind), Some(Some(Tci(9))));
        assert_eq!(open.tag(Tci(1), Inner::Foreign), Some(None));
        assert_eq!(access.tag(Tci(7), Inner::Behind), None);
        assert_eq!(access.tag(Tci(7), Inner::Foreign), None);
    }
}
