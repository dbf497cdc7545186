//! Where the headers of a frame are, for a NIC whose driver leaves it to the NIC to find out.
//!
//! Frames come from guests: what is looked at is the caller's own copy of a frame's first bytes, and a
//! header that does not end in them is not found.

use super::ETHERNET_HEADER;
use super::checksum::get;

/// Ethernet types.
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;

/// Types of VLAN tags: those of IEEE 802.1Q, and what providers used before there was one for them.
const TAGS: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// The most tags in front of a packet.
const MAX_TAGS: usize = 2;

/// Protocols of IP.
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Headers that may lie between IPv6's and the transport's (RFC 8200): for each hop, for routers on the
/// way, for the destination; and that of AH (RFC 4302), whose length is told otherwise.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
const AUTHENTICATION: u8 = 51;

/// Which transport a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// Where its header has the checksum, in bytes.
    pub const fn checksum_offset(self) -> u16 {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// Where the headers of a frame with a packet of TCP or UDP are, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// IP's.
    pub ip: usize,
    /// IPv4 rather than IPv6.
    pub v4: bool,
    /// That of TCP or UDP.
    pub transport: usize,
    /// Which of them.
    pub kind: Transport,
}

impl Headers {
    /// Finds those of a frame of which `start` are the first bytes. `None`: it is no packet of TCP or
    /// UDP, or a fragment of one, or its headers do not lie in `start`.
    pub fn find(start: &[u8]) -> Option<Self> {
        let (ip, kind) = network_layer(start)?;
        let v4 = kind == IPV4;
        let (transport, protocol) = match kind {
            IPV4 => {
                let header_len = ipv4_header_len(start, ip)?;
                // More to come, or not the first.
                if get(start, ip + 6)? & 0x3fff != 0 {
                    return None;
                }
                (ip + header_len, *start.get(ip + 9)?)
            }
            IPV6 => transport_of_ipv6(start, ip)?,
            _ => return None,
        };
        let kind = match protocol {
            TCP => Transport::Tcp,
            UDP => Transport::Udp,
            _ => return None,
        };
        let place = transport + usize::from(kind.checksum_offset());
        get(start, place).map(|_| Self { ip, v4, transport, kind })
    }
}

/// Where the IP header of a frame starts, and its Ethernet type.
pub fn network_layer(start: &[u8]) -> Option<(usize, u16)> {
    let mut at = ETHERNET_HEADER - 2;
    let mut kind = get(start, at)?;
    for _ in 0..MAX_TAGS {
        if !TAGS.contains(&kind) {
            break;
        }
        at += 4;
        kind = get(start, at)?;
    }
    Some((at + 2, kind))
}

/// Where the IPv4 header of a frame begins and ends. `None` if there is none that lies in `start`.
pub fn ipv4_header(start: &[u8]) -> Option<(usize, usize)> {
    let (ip, kind) = network_layer(start)?;
    let len = ipv4_header_len(start, ip).filter(|_| kind == IPV4)?;
    start.get(ip..ip + len).map(|_| (ip, ip + len))
}

fn ipv4_header_len(start: &[u8], ip: usize) -> Option<usize> {
    let first = *start.get(ip)?;
    let len = usize::from(first & 0xf) * 4;
    (first >> 4 == 4 && len >= 20).then_some(len)
}

fn transport_of_ipv6(start: &[u8], ip: usize) -> Option<(usize, u8)> {
    if start.get(ip)? >> 4 != 6 {
        return None;
    }
    let mut next = *start.get(ip + 6)?;
    let mut at = ip + 40;
    // Each header takes some of `start`, so this ends.
    loop {
        let units = |at: usize| start.get(at + 1).copied().map(usize::from);
        let len = match next {
            HOP_BY_HOP | ROUTING | DESTINATION => (units(at)? + 1) * 8,
            AUTHENTICATION => (units(at)? + 2) * 4,
            _ => return Some((at, next)),
        };
        next = *start.get(at)?;
        at += len;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tagged(tags: usize, kind: u16) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tag in TAGS.iter().rev().take(tags) {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 7]);
        }
        frame.extend(kind.to_be_bytes());
        frame
    }

    fn four(tags: usize, options: usize, protocol: u8) -> Vec<u8> {
        let mut frame = tagged(tags, IPV4);
        frame.push(0x45 + options as u8);
        frame.extend([0; 8]);
        frame.push(protocol);
        frame.resize(frame.len() + 10 + 4 * options + 20, 0);
        frame
    }

    /// With a header of each kind that is passed over, and then one of the protocol.
    fn six(tags: usize, protocol: u8) -> Vec<u8> {
        let mut frame = tagged(tags, IPV6);
        frame.extend([0x60, 0, 0, 0, 0, 0, HOP_BY_HOP, 64]);
        frame.extend([0xfd; 32]);
        frame.extend([ROUTING, 1]);
        frame.extend([0; 14]);
        frame.extend([AUTHENTICATION, 0]);
        frame.extend([0; 6]);
        frame.extend([DESTINATION, 4]);
        frame.extend([0; 22]);
        frame.extend([protocol, 0]);
        frame.extend([0; 6 + 20]);
        frame
    }

    #[test]
    fn headers_are_found_behind_tags_options_and_extensions() {
        for tags in 0..=2 {
            let ip = 14 + 4 * tags;
            for (protocol, kind) in [(TCP, Transport::Tcp), (UDP, Transport::Udp)] {
                for options in [0, 1, 10] {
                    let frame = four(tags, options, protocol);
                    let transport = ip + 20 + 4 * options;
                    let found = Headers { ip, v4: true, transport, kind };
                    assert_eq!(Headers::find(&frame), Some(found));
                    assert_eq!(ipv4_header(&frame), Some((ip, transport)));
                }
                let found = Headers { ip, v4: false, transport: ip + 40 + 56, kind };
                assert_eq!(Headers::find(&six(tags, protocol)), Some(found));
            }
        }
    }

    #[test]
    fn what_is_no_whole_packet_is_not_found() {
        let whole = four(1, 1, TCP);
        let end = 18 + 24 + 18;
        for len in 0..end {
            assert_eq!(Headers::find(&whole[..len]), None, "{len}");
        }
        assert!(Headers::find(&whole[..end]).is_some());
        let mut fragment = six(0, UDP);
        for len in 0..14 + 96 + 8 {
            assert_eq!(Headers::find(&fragment[..len]), None, "{len}");
        }
        // Another protocol, a fragment of either kind, a third tag, headers of no length.
        let changed = |at: usize, value: u8| {
            let mut frame = whole.clone();
            frame[at] = value;
            Headers::find(&frame)
        };
        assert_eq!(
            (changed(18 + 9, 1), changed(18 + 6, 0x20), changed(18 + 7, 1)),
            (None, None, None)
        );
        assert_eq!((changed(18, 0x44), changed(18, 0x66)), (None, None));
        fragment[14 + 6] = 44;
        assert_eq!(Headers::find(&fragment), None);
        let mut third = four(2, 0, TCP);
        third.splice(12..12, [0x81, 0, 0, 7]);
        assert_eq!(Headers::find(&third), None);
    }

    proptest! {
        #[test]
        fn any_bytes_end(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300), tag: bool, six: bool,
        ) {
            if tag && let Some(place) = bytes.get_mut(12..14) {
                place.copy_from_slice(&if six { IPV6 } else { IPV4 }.to_be_bytes());
            }
            if let Some(found) = Headers::find(&bytes) {
                prop_assert!(found.transport + 8 <= bytes.len() && found.transport >= found.ip + 20);
            }
        }
    }
}
