//! Where a frame has checksums, and whether they are right.

use backends::net::checksum::{fold, get, put, sum, word};

/// Ethernet types.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// Protocols of IP.
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Both Ethernet addresses.
pub(super) const ADDRESSES: usize = 12;
/// Bytes of a VLAN tag.
pub(super) const TAG: usize = 4;

/// Puts the checksum of the bytes from `start` to `end` at `place`, where the sum of what else is to
/// count stands already. `None` if that is not all in the frame.
pub(super) fn insert(frame: &mut [u8], start: usize, place: usize, end: usize) -> Option<()> {
    let sum = !fold(sum(frame.get(start..end)?));
    put(frame, place, sum)
}

/// Whether a checksum is right; `None` if there is none to look at.
pub(super) type Right = Option<bool>;

/// The checksums of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Checksums {
    /// That of an IPv4 header.
    pub ip: Right,
    /// That of TCP or UDP. Not of fragments.
    pub transport: Right,
}

impl Checksums {
    /// Looks at those of a frame. If `vouched`, somebody else has seen to that of TCP or UDP.
    pub(super) fn of(frame: &[u8], tag_type: u16, vouched: bool) -> Self {
        let mut checksums = Self::default();
        // The first that is missing is the end of it.
        let _ = checksums.look(frame, tag_type, vouched);
        checksums
    }

    fn look(&mut self, frame: &[u8], tag_type: u16, vouched: bool) -> Option<()> {
        let mut at = ADDRESSES;
        let mut kind = get(frame, at)?;
        if kind == tag_type {
            at += TAG;
            kind = get(frame, at)?;
        }
        let packet = frame.get(at + 2..)?;
        let (addresses, protocol, segment) = match kind {
            IPV4 => {
                let [version, _, len @ ..] = *packet.first_chunk::<4>()?;
                let header = packet.get(..usize::from(version & 0xf) * 4)?;
                if version >> 4 != 4 || header.len() < 20 {
                    return None;
                }
                self.ip = Some(fold(sum(header)) == 0xffff);
                let segment = packet.get(header.len()..usize::from(u16::from_be_bytes(len)))?;
                // More to come, or not the first.
                if get(header, 6)? & 0x3fff != 0 {
                    return None;
                }
                (header.get(12..20)?, *header.get(9)?, segment)
            }
            IPV6 => {
                let len = usize::from(get(packet, 4)?);
                (packet.get(8..40)?, *packet.get(6)?, packet.get(40..)?.get(..len)?)
            }
            _ => return None,
        };
        let place = match protocol {
            TCP => 16,
            UDP => 6,
            _ => return None,
        };
        let written = get(segment, place)?;
        if protocol == UDP && written == 0 {
            return None;
        }
        let len = word(u16::try_from(segment.len()).ok()?);
        self.transport = Some(
            vouched || fold(sum(addresses) + word(protocol.into()) + len + sum(segment)) == 0xffff,
        );
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP packet over IPv4 with right checksums: that of RFC 1071's example would do as well.
    fn frame() -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0]);
        frame.extend([0x45, 0, 0, 33, 0, 1, 0x40, 0, 64, UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x30, 0x39, 0, 53, 0, 13, 0, 0]);
        frame.extend(*b"hello");
        insert(&mut frame, 14, 24, 34).unwrap();
        let pseudo = fold(sum(&frame[26..34]) + word(UDP.into()) + word(13));
        put(&mut frame, 40, pseudo).unwrap();
        let len = frame.len();
        insert(&mut frame, 34, 40, len).unwrap();
        frame
    }

    #[test]
    fn right_and_wrong_are_told_apart() {
        let right = frame();
        let of = |frame: &[u8]| Checksums::of(frame, 0x8100, false);
        assert_eq!(of(&right), Checksums { ip: Some(true), transport: Some(true) });
        let mut tagged = right.clone();
        tagged.splice(12..12, [0x81, 0, 0, 7]);
        assert_eq!(of(&tagged), of(&right));
        // Padding does not count.
        let mut padded = right.clone();
        padded.resize(60, 9);
        assert_eq!(of(&padded), of(&right));
        let mut wrong = right.clone();
        wrong[46] ^= 1;
        assert_eq!(of(&wrong), Checksums { ip: Some(true), transport: Some(false) });
        assert_eq!(Checksums::of(&wrong, 0x8100, true).transport, Some(true));
        wrong[22] ^= 1;
        assert_eq!(of(&wrong).ip, Some(false));
        // Fragments, UDP without checksum, other protocols, frames cut short.
        let mut fragment = right.clone();
        fragment[20] = 0x20;
        assert_eq!(of(&fragment).transport, None);
        let mut without = right.clone();
        without[40..42].fill(0);
        assert_eq!(of(&without).transport, None);
        assert_eq!(of(&[0; 60]), Checksums::default());
        for len in 0..right.len() {
            assert_eq!(of(&right[..len]).transport, None);
        }
    }
}
