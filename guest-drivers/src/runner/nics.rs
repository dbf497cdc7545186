//! The NICs of the machine: those on its VMBus, and then those on its PCI bus.

use vmbus::nvsp::NETWORK_CLASS;
use vmbus::protocol::Relid;

use super::{RunError, tell};
use crate::bus::Bus;
use crate::e1000::{self, E1000};
use crate::json::Object;
use crate::memory::Pages;
use crate::net::{Identity, NicDriver};
use crate::netvsc::Netvsc;
use crate::platform::Platform;

/// NICs that are looked at.
const NICS: usize = 8;

/// A NIC, by whatever it is driven.
#[expect(clippy::large_enum_variant, reason = "there is no other place for it")]
enum Nic<'w, P: Platform> {
    Netvsc(Netvsc<'w, P>),
    E1000(E1000<'w, P>),
}

impl<P: Platform> Nic<'_, P> {
    fn driver(&mut self) -> &mut dyn NicDriver {
        match self {
            Self::Netvsc(nic) => nic,
            Self::E1000(nic) => nic,
        }
    }
}

/// All NICs of the machine.
pub(super) struct Nics<'w, P: Platform> {
    nics: [Option<Nic<'w, P>>; NICS],
    count: usize,
}

impl<'w, P: Platform> Nics<'w, P> {
    pub(super) fn open(
        platform: &'w P,
        bus: &mut Bus<'w, P>,
        memory: &mut Pages<'w>,
    ) -> Result<Self, RunError> {
        let mut nics = Self { nics: [const { None }; NICS], count: 0 };
        let mut channels = [Relid(0); NICS];
        let found = bus.devices(NETWORK_CLASS).zip(&mut channels);
        let found = found.map(|(relid, place)| *place = relid).count();
        for relid in channels.into_iter().take(found) {
            let nic = Nic::Netvsc(Netvsc::open(platform, bus, relid, memory)?);
            let opened = Object::default().string("event", "opened").number("channel", relid);
            tell(platform, opened.string("driver", "netvsc").number("nic", nics.count));
            nics.add(nic);
        }
        for function in e1000::find(platform).take(NICS - nics.count) {
            let nic = Nic::E1000(E1000::start(platform, function, memory)?);
            let found = Object::default().string("event", "found").string("driver", "e1000");
            tell(platform, found.number("nic", nics.count));
            nics.add(nic);
        }
        Ok(nics)
    }

    fn add(&mut self, nic: Nic<'w, P>) {
        if let Some(place) = self.nics.get_mut(self.count) {
            *place = Some(nic);
            self.count += 1;
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// What NIC `number` is.
    pub(super) fn identify(&mut self, number: u32) -> Result<Object, RunError> {
        let missing = self.missing(number);
        let nic = usize::try_from(number).ok().and_then(|number| self.nics.get_mut(number));
        let nic = nic.and_then(Option::as_mut).ok_or(missing)?.driver();
        let Identity { driver, mac, mtu } = *nic.identity();
        Ok(Object::default()
            .string("result", "identify")
            .number("nic", number)
            .string("driver", driver)
            .string("mac", mac)
            .number("mtu", mtu)
            .string("link", if nic.has_link() { "up" } else { "down" }))
    }

    /// Two different ones.
    pub(super) fn pair(&mut self, numbers: [u32; 2]) -> Result<[&mut dyn NicDriver; 2], RunError> {
        let [first, second] = numbers;
        if first == second {
            return Err(RunError::OneNic(first));
        }
        let found = numbers.map(|number| (number as usize) < self.count);
        for (number, found) in numbers.into_iter().zip(found) {
            if !found {
                return Err(self.missing(number));
            }
        }
        let missing = self.missing(first);
        match self.nics.get_disjoint_mut(numbers.map(|number| number as usize)) {
            Ok([Some(first), Some(second)]) => Ok([first.driver(), second.driver()]),
            _ => Err(missing),
        }
    }

    fn missing(&self, asked: u32) -> RunError {
        RunError::NoNic { asked, found: self.count }
    }
}
