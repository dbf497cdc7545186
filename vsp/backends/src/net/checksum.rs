//! Internet checksums (RFC 1071): the one's complement of a one's complement sum of 16-bit words.
//!
//! A sum is kept as it comes: in the byte order of this machine, which the arithmetic allows, and
//! with what carries over not yet added again. So sums are added like numbers, and [`fold`] makes the
//! word out of them that stands in a frame.

/// The sum of 16-bit words; of an odd number of bytes, the last is followed by a zero.
pub fn sum(bytes: &[u8]) -> u64 {
    // Four words at a time: each half of eight bytes is a sum of two already.
    let (chunks, rest) = bytes.as_chunks::<8>();
    let mut sum = 0_u64;
    for chunk in chunks {
        let word = u64::from_ne_bytes(*chunk);
        sum += (word >> 32) + (word & 0xffff_ffff);
    }
    let mut last = [0; 8];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    let word = u64::from_ne_bytes(last);
    sum + (word >> 32) + (word & 0xffff_ffff)
}

/// A number as [`sum`] would find it in a frame.
pub const fn word(value: u16) -> u64 {
    value.to_be() as u64
}

/// A sum as the number that it is in a frame.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::from_be(sum as u16)
}

/// The word at byte `at` of a frame.
pub fn get(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|word| u16::from_be_bytes(*word))
}

/// Writes the word at byte `at` of a frame. `None` if it is not in the frame.
pub fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_slow_way() {
        let bytes: Vec<u8> = (0..999_u32).map(|at| (at * 31 + at / 7) as u8).collect();
        for len in [0, 1, 2, 7, 8, 9, 20, 63, 64, 998, 999] {
            let slow = bytes[..len].chunks(2).fold(0_u64, |sum, pair| {
                let low = pair.get(1).copied().unwrap_or_default();
                sum + u64::from(u16::from_be_bytes([pair[0], low]))
            });
            let mut folded = slow;
            while folded > 0xffff {
                folded = (folded >> 16) + (folded & 0xffff);
            }
            assert_eq!(fold(sum(&bytes[..len])), folded as u16, "{len} bytes");
        }
    }

    #[test]
    fn words_are_summed_as_they_stand_in_a_frame() {
        let mut bytes = [0; 4];
        put(&mut bytes, 2, 0x1234).unwrap();
        assert_eq!(fold(sum(&bytes) + word(0xff)), 0x1333);
        assert_eq!((fold(word(0x1234)), get(&bytes, 2)), (0x1234, Some(0x1234)));
        assert_eq!((get(&bytes, 3), put(&mut bytes, 3, 0)), (None, None));
    }
}
