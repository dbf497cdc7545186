//! Which address was last seen at which port: the switch's memory, written and read by all ports
//! at once without a lock.
//!
//! It has a fixed size, as guests make up as many addresses as they like. An address has eight
//! places where it can be; if they are taken, it takes the one that was heard of least recently.
//! A place is two words, who and where. They are not written together, so the second repeats some
//! of the first: who finds one that does not match has found nothing, and its frame goes to every
//! port, as any to an unknown address does.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::net::MacAddr;

/// Rows of places. With [`WAYS`] in each, 4096 addresses.
const ROWS: usize = 512;

/// Places in a row: their keys fill a cache line.
const WAYS: usize = 8;

/// A number from 0 to 4095 in front of an address: the VLAN it was seen in.
type Key = u64;

#[repr(align(64))]
struct Row {
    /// A VLAN and an address; 0 if nobody has the place.
    who: [AtomicU64; WAYS],
    /// When, in seconds (32 bits), at which port (8 bits), and a part of the key's hash (24 bits).
    seen: [AtomicU64; WAYS],
}

/// See the module's documentation.
pub(super) struct Addresses {
    rows: Box<[Row]>,
    /// Unknown to guests, who could otherwise fill a row of their choice.
    seed: u64,
    /// For how long an address is remembered, in seconds.
    ageing: u32,
}

fn key(vlan: u16, mac: MacAddr) -> Key {
    let [a, b, c, d, e, f] = mac.0;
    u64::from(vlan) << 48 | u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

fn pack(hash: u64, port: u8, now: u32) -> u64 {
    (hash & 0xff_ffff) << 40 | u64::from(port) << 32 | u64::from(now)
}

impl Addresses {
    pub(super) fn new(ageing: u32) -> Self {
        let zeroes = || std::array::from_fn(|_| AtomicU64::new(0));
        let row = || Row { who: zeroes(), seen: zeroes() };
        let rows = (0..ROWS).map(|_| row()).collect();
        Self { rows, seed: RandomState::new().hash_one(0) | 1, ageing }
    }

    /// The row of a key, and its hash.
    fn row(&self, key: Key) -> Option<(&Row, u64)> {
        // Multiplication spreads upwards; the high half decides.
        let hash = (key ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = (hash ^ (hash >> 29)).wrapping_mul(self.seed);
        let row = self.rows.get((hash >> 40) as usize % ROWS)?;
        Some((row, hash >> 16))
    }

    fn is_fresh(&self, seen: u64, now: u32) -> bool {
        now.wrapping_sub(seen as u32) <= self.ageing
    }

    /// Where an address is, if that is known at `now`.
    pub(super) fn find(&self, vlan: u16, mac: MacAddr, now: u32) -> Option<u8> {
        let key = key(vlan, mac);
        let (row, hash) = self.row(key)?;
        let place = row.who.iter().position(|who| who.load(Ordering::Relaxed) == key)?;
        let seen = row.seen.get(place)?.load(Ordering::Relaxed);
        let port = (seen >> 32) as u8;
        (seen == pack(hash, port, seen as u32) && self.is_fresh(seen, now)).then_some(port)
    }

    /// An address was seen at a port.
    pub(super) fn learn(&self, vlan: u16, mac: MacAddr, port: u8, now: u32) {
        let key = key(vlan, mac);
        let Some((row, hash)) = self.row(key) else { return };
        let value = pack(hash, port, now);
        let mut oldest = (u32::MAX, 0);
        let mut places = row.who.iter().zip(&row.seen).enumerate();
        let known = places.find_map(|(place, (who, seen))| {
            let held = who.load(Ordering::Relaxed);
            if held == key {
                return Some(seen);
            }
            let seen = seen.load(Ordering::Relaxed);
            let rank = match held {
                0 => 0,
                _ => u32::MAX - now.wrapping_sub(seen as u32),
            };
            if rank < oldest.0 {
                oldest = (rank, place);
            }
            None
        });
        if let Some(seen) = known {
            // Most frames have nothing new to say, and leave the cache line to all its readers.
            if seen.load(Ordering::Relaxed) != value {
                seen.store(value, Ordering::Relaxed);
            }
            return;
        }
        let (Some(who), Some(seen)) = (row.who.get(oldest.1), row.seen.get(oldest.1)) else {
            return;
        };
        // If somebody else is faster, the address's next frame gets a place.
        let held = who.load(Ordering::Relaxed);
        if who.compare_exchange(held, key, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            seen.store(value, Ordering::Relaxed);
        }
    }

    /// Forgets what was seen at a port.
    pub(super) fn forget(&self, port: u8) {
        for row in &self.rows {
            for (who, seen) in row.who.iter().zip(&row.seen) {
                if (seen.load(Ordering::Relaxed) >> 32) as u8 == port {
                    seen.store(0, Ordering::Relaxed);
                    who.store(0, Ordering::Relaxed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(number: u32) -> MacAddr {
        let [a, b, c, d] = number.to_be_bytes();
        MacAddr([2, 0, a, b, c, d])
    }

    #[test]
    fn addresses_are_learnt_move_and_age() {
        let table = Addresses::new(300);
        assert_eq!(table.find(1, mac(1), 0), None);
        table.learn(1, mac(1), 4, 10);
        table.learn(2, mac(1), 5, 10);
        assert_eq!(table.find(1, mac(1), 10), Some(4));
        assert_eq!(table.find(2, mac(1), 10), Some(5));
        assert_eq!(table.find(3, mac(1), 10), None);
        table.learn(1, mac(1), 6, 20);
        assert_eq!(table.find(1, mac(1), 320), Some(6));
        assert_eq!(table.find(1, mac(1), 321), None);
        assert_eq!(table.find(2, mac(1), 311), None);
        table.learn(1, mac(1), 6, 400);
        table.learn(1, mac(2), 7, 400);
        table.forget(6);
        assert_eq!(table.find(1, mac(1), 400), None);
        assert_eq!(table.find(1, mac(2), 400), Some(7));
    }

    /// However many addresses somebody makes up, the table is as large as it was, what it says is
    /// true, and the latest are in it.
    #[test]
    fn a_flood_of_addresses_takes_no_more_room() {
        let table = Addresses::new(300);
        for number in 0..100_000u32 {
            table.learn(1, mac(number), (number % 64) as u8, number / 1000);
        }
        let mut known = 0;
        for number in 0..100_000u32 {
            if let Some(port) = table.find(1, mac(number), 100) {
                assert_eq!(u32::from(port), number % 64);
                known += 1;
            }
        }
        assert!((2000..=4096).contains(&known), "{known}");
        assert_eq!(table.find(1, mac(99_999), 100), Some((99_999 % 64) as u8));
    }

    /// A table of a size that a network has keeps all of it.
    #[test]
    fn a_thousand_addresses_fit() {
        let table = Addresses::new(300);
        (0..1000).for_each(|number| table.learn(1, mac(number), (number % 64) as u8, 1));
        let known = (0..1000).filter(|number| table.find(1, mac(*number), 1).is_some()).count();
        assert!(known >= 990, "{known}");
    }

    /// Ports that learn and look up at once never find an address where it has never been.
    #[test]
    fn racing_ports_find_no_wrong_port() {
        let table = Addresses::new(300);
        std::thread::scope(|scope| {
            for thread in 0..2u32 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..60_000u32 {
                        let number = round.wrapping_mul(7919) % 20_000;
                        table.learn(1, mac(number), (number % 50) as u8, 1);
                        let other = (round + thread).wrapping_mul(104_729) % 20_000;
                        let found = table.find(1, mac(other), 1);
                        assert!(found.is_none_or(|port| u32::from(port) == other % 50));
                    }
                });
            }
        });
    }
}
