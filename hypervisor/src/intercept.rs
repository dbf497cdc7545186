//! Intercepts: which device answers a guest's access to a port or to an address without RAM.
//!
//! A [`Bus`] is filled while a machine is put together, and only read once its processors run, so
//! that finding a device takes no lock.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A device that answers accesses to a range of ports or addresses.
///
/// Called on the thread of the processor that made the access, several at once. Data is little
/// endian and as long as the access: 1, 2, 4 or 8 bytes, all of them in the device's range.
pub trait Device: Send + Sync {
    /// The guest reads at `offset` from the start of the range. `data` is all ones before the call.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);

    /// A string instruction reads at `offset` several times, `width` bytes each. A device with a
    /// data port may do all of it at once.
    fn read_string(&self, offset: u64, width: usize, data: &mut [u8]) {
        for unit in data.chunks_exact_mut(width) {
            self.read(offset, unit);
        }
    }

    /// Whether strings are written at `offset`. For the hypervisor to bring them in one piece, every
    /// single write there may cost a little more.
    fn takes_strings(&self, offset: u64) -> bool {
        let _ = offset;
        false
    }

    /// A string instruction writes at `offset` several times, `width` bytes each.
    fn write_string(&self, offset: u64, width: usize, data: &[u8]) {
        for unit in data.chunks_exact(width) {
            self.write(offset, unit);
        }
    }
}

/// A range of ports or addresses with a name, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is.
    pub name: String,
    /// The first address.
    pub start: u64,
    /// How many there are.
    pub len: u64,
}

impl Claim {
    fn last(&self) -> u64 {
        self.start + (self.len - 1)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}..={:#x}", self.name, self.start, self.last())
    }
}

/// Why a device could not be put on a bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another device is there.
    #[error("{new} overlaps {old}")]
    Overlap {
        /// The device that was to be added.
        new: Claim,
        /// The device that is there.
        old: Claim,
    },
    /// An empty range, or one that goes beyond the bus.
    #[error("{name} claims {len} addresses from {start:#x}, which is no range of this bus")]
    Range {
        /// The device that was to be added.
        name: String,
        /// The first address.
        start: u64,
        /// How many it claims.
        len: u64,
    },
}

/// Ports or addresses and the devices behind them.
pub struct Bus {
    /// The bus's last address.
    last: u64,
    /// In ascending order.
    entries: Vec<(Claim, Arc<dyn Device>)>,
    unclaimed: AtomicU64,
}

impl Bus {
    /// The 65536 I/O ports.
    pub fn ports() -> Self {
        Self::new(0xffff)
    }

    /// All guest physical addresses.
    pub fn mmio() -> Self {
        Self::new(u64::MAX)
    }

    fn new(last: u64) -> Self {
        Self { last, entries: Vec::new(), unclaimed: AtomicU64::new(0) }
    }

    /// Puts `device` at `len` addresses from `start`.
    pub fn add(
        &mut self,
        name: &str,
        start: u64,
        len: u64,
        device: Arc<dyn Device>,
    ) -> Result<(), BusError> {
        let fits = len
            .checked_sub(1)
            .and_then(|less| start.checked_add(less))
            .is_some_and(|last| last <= self.last);
        if !fits {
            return Err(BusError::Range { name: name.to_owned(), start, len });
        }
        let new = Claim { name: name.to_owned(), start, len };
        let at = self.entries.partition_point(|(claim, _)| claim.start <= start);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i));
        let after = self.entries.get(at);
        for (old, _) in before.into_iter().chain(after) {
            if old.start <= new.last() && new.start <= old.last() {
                return Err(BusError::Overlap { new, old: old.clone() });
            }
        }
        self.entries.insert(at, (new, device));
        Ok(())
    }

    /// The device that claims all of `[address, address + len)`, and the offset in its range.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn Device, u64)> {
        let at = self.entries.partition_point(|(claim, _)| claim.start <= address);
        let (claim, device) = self.entries.get(at.checked_sub(1)?)?;
        let offset = address - claim.start;
        let end = offset.checked_add(len as u64)?;
        (end <= claim.len).then_some((&**device, offset))
    }

    /// A guest's read. Where no device is, all bits are ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => self.count_unclaimed(address),
        }
    }

    /// A guest's write. Where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => self.count_unclaimed(address),
        }
    }

    /// A guest's string read: `data` is a number of units of `width` bytes, all from `address`.
    pub fn read_string(&self, address: u64, width: usize, data: &mut [u8]) {
        data.fill(0xff);
        match self.find(address, width) {
            Some((device, offset)) => device.read_string(offset, width, data),
            None => self.count_unclaimed(address),
        }
    }

    /// A guest's string write.
    pub fn write_string(&self, address: u64, width: usize, data: &[u8]) {
        match self.find(address, width) {
            Some((device, offset)) => device.write_string(offset, width, data),
            None => self.count_unclaimed(address),
        }
    }

    /// Whether strings of units of `width` bytes are written at `address`.
    pub fn takes_strings(&self, address: u64, width: usize) -> bool {
        self.find(address, width).is_some_and(|(device, offset)| device.takes_strings(offset))
    }

    fn count_unclaimed(&self, address: u64) {
        self.unclaimed.fetch_add(1, Ordering::Relaxed);
        tracing::trace!(address = format_args!("{address:#x}"), "unclaimed access");
    }

    /// How many accesses no device has claimed.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// Who claims what, in ascending order.
    pub fn claims(&self) -> impl Iterator<Item = &Claim> {
        self.entries.iter().map(|(claim, _)| claim)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Device for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn device() -> Arc<Recorder> {
        Arc::default()
    }

    #[test]
    fn neighbours_fit_and_overlaps_do_not() {
        let mut bus = Bus::ports();
        bus.add("a", 0x10, 8, device()).unwrap();
        bus.add("c", 0x20, 8, device()).unwrap();
        bus.add("b", 0x18, 8, device()).unwrap();
        for (start, len) in [(0x10, 1), (0x0f, 2), (0x17, 1), (0x08, 0x40), (0x1f, 1), (0x27, 1)] {
            let error = bus.add("x", start, len, device()).unwrap_err();
            assert!(matches!(error, BusError::Overlap { .. }), "{start:#x} {len}: {error}");
        }
        bus.add("d", 0x28, 1, device()).unwrap();
        bus.add("before", 0x0f, 1, device()).unwrap();
        let names: Vec<_> = bus.claims().map(|claim| claim.name.as_str()).collect();
        assert_eq!(names, ["before", "a", "b", "c", "d"]);
    }

    #[test]
    fn ranges_end_with_the_bus() {
        let mut bus = Bus::ports();
        bus.add("top", 0xffff, 1, device()).unwrap();
        assert!(bus.add("none", 1, 0, device()).is_err());
        assert!(bus.add("beyond", 0xfffe, 3, device()).is_err());
        assert!(bus.add("wrap", u64::MAX, 2, device()).is_err());
        Bus::mmio().add("all", 0, u64::MAX, device()).unwrap();
        Bus::mmio().add("last", u64::MAX, 1, device()).unwrap();
    }

    #[test]
    fn an_access_reaches_its_device_or_reads_ones() {
        let recorder = device();
        let mut bus = Bus::ports();
        bus.add("dev", 0x100, 4, recorder.clone()).unwrap();
        let mut data = [0; 2];
        bus.read(0x102, &mut data);
        assert_eq!(data, [2, 2]);
        bus.write(0x101, &[7]);
        assert_eq!(*recorder.0.lock().unwrap(), [(1, vec![7])]);
        assert_eq!(bus.unclaimed(), 0);

        // A string instruction stays at its port.
        let mut string = [0; 4];
        bus.read_string(0x101, 2, &mut string);
        assert_eq!(string, [1; 4]);
        bus.write_string(0x103, 1, &[8, 9]);
        assert_eq!(recorder.0.lock().unwrap()[1..], [(3, vec![8]), (3, vec![9])]);

        // Half in, half out: nobody's.
        bus.read(0x103, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.read(0xff, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.write(0x104, &[1]);
        assert_eq!(bus.unclaimed(), 3);
    }
}
