//! Which channel a received frame is for: what the guest has set for receive-side scaling.
//!
//! Toeplitz' hash of a frame's addresses and ports, with the guest's key, chooses an entry of the
//! guest's table, and that names a channel. Both as in Microsoft's "RSS Hashing Types" and "Verifying
//! the RSS Hash Calculation" of the Windows driver documentation, whose test vectors are below.

use backends::net::ETHERNET_HEADER;
use vmbus::rndis::{HASH_KEY, INDIRECTION_ENTRIES};

/// Bytes of a frame that are looked at: up to the ports behind the longest IPv4 header and a VLAN tag.
pub(super) const LOOK: usize = ETHERNET_HEADER + 4 + 60 + 4;

/// What the hash is over (`NDIS_HASH_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HashTypes(pub u32);

impl HashTypes {
    /// The hash function: Toeplitz' is the only one there is.
    pub(super) const FUNCTION: u32 = 0xFF;
    pub(super) const TOEPLITZ: u32 = 1;
    pub(super) const IPV4: u32 = 0x100;
    pub(super) const TCP_IPV4: u32 = 0x200;
    pub(super) const IPV6: u32 = 0x400;
    pub(super) const TCP_IPV6: u32 = 0x1000;

    const fn has(self, kind: u32) -> bool {
        self.0 & kind != 0
    }
}

/// How the guest wants frames spread over its channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spread {
    pub types: HashTypes,
    pub key: [u8; HASH_KEY],
    /// The channel for each value of the hash.
    pub table: [u8; INDIRECTION_ENTRIES],
}

impl Spread {
    /// Whether each of so many channels has its even share, one after the other, as Linux deals them
    /// out by itself.
    pub(super) fn is_even(&self, channels: usize) -> bool {
        let even = (0..channels).cycle();
        self.table.iter().zip(even).all(|(entry, channel)| usize::from(*entry) == channel)
    }
}

/// The bytes of a frame that are hashed: both addresses, and both ports.
const INPUT: usize = 36;

/// A [`Spread`], ready for use.
#[derive(Clone, Debug)]
pub(super) struct Steering {
    types: HashTypes,
    /// What each half of each byte adds to the hash.
    nibbles: [[u32; 16]; 2 * INPUT],
    table: [u8; INDIRECTION_ENTRIES],
}

impl Steering {
    pub(super) fn new(spread: &Spread) -> Self {
        let mut nibbles = [[0; 16]; 2 * INPUT];
        for (index, sums) in nibbles.iter_mut().enumerate() {
            for (value, sum) in sums.iter_mut().enumerate() {
                for bit in (0..4).filter(|bit| value & (8 >> bit) != 0) {
                    *sum ^= window(&spread.key, index * 4 + bit);
                }
            }
        }
        Self { types: spread.types, nibbles, table: spread.table }
    }

    /// The channel for a frame that begins with `front`. What cannot be hashed is the first's.
    pub(super) fn channel(&self, front: &[u8; LOOK]) -> u16 {
        self.hash(front).map_or(0, |hash| {
            let index = hash as usize % INDIRECTION_ENTRIES;
            self.table.get(index).map_or(0, |channel| u16::from(*channel))
        })
    }

    fn hash(&self, front: &[u8; LOOK]) -> Option<u32> {
        let tagged = front.get(12..14) == Some(&[0x81, 0x00]);
        let at = if tagged { 4 } else { 0 };
        let kind = front.get(at + 12..at + 14)?;
        let ip = front.get(at + ETHERNET_HEADER..)?;
        let types = self.types;
        let (addresses, ports) = match kind {
            [0x08, 0x00] if types.has(HashTypes::IPV4 | HashTypes::TCP_IPV4) => {
                // Only the first fragment has ports, and all shall go the same way.
                let [flags, offset] = *ip.get(6..8)? else { return None };
                let whole = flags & 0x3F == 0 && offset == 0;
                let tcp = whole && *ip.get(9)? == 6 && types.has(HashTypes::TCP_IPV4);
                let len = usize::from(ip.first()? & 15) * 4;
                if !tcp && !types.has(HashTypes::IPV4) {
                    return None;
                }
                (ip.get(12..20)?, tcp.then_some(len))
            }
            [0x86, 0xDD] if types.has(HashTypes::IPV6 | HashTypes::TCP_IPV6) => {
                let tcp = *ip.get(6)? == 6 && types.has(HashTypes::TCP_IPV6);
                if !tcp && !types.has(HashTypes::IPV6) {
                    return None;
                }
                (ip.get(8..40)?, tcp.then_some(40))
            }
            _ => return None,
        };
        let ports = match ports {
            Some(at) => ip.get(at..at + 4)?,
            None => &[],
        };
        let bytes = addresses.iter().chain(ports);
        let halves = bytes.flat_map(|byte| [byte >> 4, byte & 15]);
        Some(self.nibbles.iter().zip(halves).fold(0, |hash, (sums, half)| {
            hash ^ sums.get(usize::from(half)).copied().unwrap_or_default()
        }))
    }
}

/// The 32 bits of the key from bit `from` on.
fn window(key: &[u8; HASH_KEY], from: usize) -> u32 {
    let bytes = key.iter().copied().chain(std::iter::repeat(0)).skip(from / 8).take(5);
    let five = bytes.fold(0u64, |bits, byte| bits << 8 | u64::from(byte));
    (five >> (8 - from % 8)) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The key of Microsoft's test vectors.
    const KEY: [u8; HASH_KEY] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];
    const ALL: u32 = 0x1701;

    fn steering(types: u32) -> Steering {
        let mut table = [0; INDIRECTION_ENTRIES];
        (0..).zip(&mut table).for_each(|(index, entry)| *entry = index);
        Steering::new(&Spread { types: HashTypes(types), key: KEY, table })
    }

    fn ipv4(from: [u8; 4], to: [u8; 4], protocol: u8, ports: [u16; 2]) -> [u8; LOOK] {
        let mut front = [0; LOOK];
        front[12..15].copy_from_slice(&[8, 0, 0x45]);
        front[23] = protocol;
        front[26..30].copy_from_slice(&from);
        front[30..34].copy_from_slice(&to);
        front[34..36].copy_from_slice(&ports[0].to_be_bytes());
        front[36..38].copy_from_slice(&ports[1].to_be_bytes());
        front
    }

    fn ipv6(from: &str, to: &str, ports: [u16; 2]) -> [u8; LOOK] {
        let address = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let mut front = [0; LOOK];
        front[12..15].copy_from_slice(&[0x86, 0xDD, 0x60]);
        front[20] = 6;
        front[22..38].copy_from_slice(&address(from));
        front[38..54].copy_from_slice(&address(to));
        front[54..56].copy_from_slice(&ports[0].to_be_bytes());
        front[56..58].copy_from_slice(&ports[1].to_be_bytes());
        front
    }

    #[test]
    fn hashes_are_as_microsoft_computes_them() {
        for (from, to, ports, addresses, all) in [
            ([66, 9, 149, 187], [161, 142, 100, 80], [2794, 1766], 0x323e_8fc2, 0x51cc_c178),
            ([199, 92, 111, 2], [65, 69, 140, 83], [14230, 4739], 0xd718_262a, 0xc626_b0ea),
            ([24, 19, 198, 95], [12, 22, 207, 184], [12898, 38024], 0xd2d0_a5de, 0x5c2b_394a),
        ] {
            let tcp = ipv4(from, to, 6, ports);
            assert_eq!(steering(ALL).hash(&tcp), Some(all));
            assert_eq!(steering(0x101).hash(&tcp), Some(addresses));
            assert_eq!(steering(ALL).hash(&ipv4(from, to, 17, ports)), Some(addresses));
        }
        let front = ipv6("3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", [2794, 1766]);
        assert_eq!(steering(ALL).hash(&front), Some(0x4020_7d3d));
        assert_eq!(steering(0x401).hash(&front), Some(0x2cc1_8cd5));
    }

    #[test]
    fn tags_options_and_fragments() {
        let plain = ipv4([66, 9, 149, 187], [161, 142, 100, 80], 6, [2794, 1766]);
        let mut tagged = [0; LOOK];
        tagged[12..14].copy_from_slice(&[0x81, 0]);
        tagged[16..].copy_from_slice(&plain[12..LOOK - 4]);
        assert_eq!(steering(ALL).hash(&tagged), Some(0x51cc_c178));
        assert_eq!(steering(ALL).channel(&tagged), 0x78);

        let mut options = plain;
        options[14] = 0x4F;
        options.copy_within(34..38, 74);
        options[34..74].fill(1);
        assert_eq!(steering(ALL).hash(&options), Some(0x51cc_c178));
        for fragment in [[0x20, 0], [0, 1]] {
            let mut front = plain;
            front[20..22].copy_from_slice(&fragment);
            assert_eq!(steering(ALL).hash(&front), Some(0x323e_8fc2));
        }
    }

    #[test]
    fn what_cannot_be_hashed_is_the_first_channel_s() {
        let mut arp = [0; LOOK];
        arp[12..14].copy_from_slice(&[8, 6]);
        assert_eq!(steering(ALL).channel(&arp), 0);
        let udp = ipv4([1; 4], [2; 4], 17, [1, 2]);
        assert_eq!(steering(0x201).hash(&udp), None);
        assert_eq!(steering(1).hash(&udp), None);
        // Nothing that a frame can say is out of bounds.
        assert_eq!(steering(ALL).channel(&[0xFF; LOOK]), 0);
    }

    proptest! {
        /// Whatever a frame says, it is hashed as by the definition, a bit at a time, and goes to a
        /// channel that the table names.
        #[test]
        fn any_frame_has_a_channel(
            bytes in proptest::collection::vec(any::<u8>(), LOOK),
            key in proptest::collection::vec(any::<u8>(), HASH_KEY),
            version in 0..3usize,
        ) {
            let mut front = *bytes.first_chunk().unwrap();
            let key = *key.first_chunk().unwrap();
            let kinds = [None, Some([0x08, 0x00]), Some([0x86, 0xDD])];
            if let Some(Some(kind)) = kinds.get(version) {
                front[12..14].copy_from_slice(kind);
            }
            let table = std::array::from_fn(|index| (index % 5) as u8);
            let types = HashTypes(HashTypes::TOEPLITZ | HashTypes::IPV4 | HashTypes::IPV6);
            let steering = Steering::new(&Spread { types, key, table });
            let addresses = match front[12..14] {
                [0x08, 0x00] => Some(&front[26..34]),
                [0x86, 0xDD] => Some(&front[22..54]),
                _ => None,
            };
            let naive = addresses.map(|bytes| {
                let set = |bit: &usize| bytes[bit / 8] & (0x80 >> (bit % 8)) != 0;
                let bits = (0..bytes.len() * 8).filter(set);
                bits.fold(0, |hash, bit| hash ^ window(&key, bit))
            });
            if front[12..14] != [0x81, 0x00] {
                prop_assert_eq!(steering.hash(&front), naive);
            }
            prop_assert!(steering.channel(&front) < 5);
        }
    }

    #[test]
    fn even_shares() {
        let spread = |entry: fn(usize) -> u8| Spread {
            types: HashTypes(ALL),
            key: KEY,
            table: std::array::from_fn(entry),
        };
        assert!(spread(|index| (index % 3) as u8).is_even(3));
        assert!(!spread(|index| (index % 3) as u8).is_even(2));
        assert!(!spread(|_| 1).is_even(2));
        assert!(spread(|_| 0).is_even(1));
    }
}
