//! Numbers that look random and are the same every time.

/// One of a sequence of well mixed numbers: the output function of SplitMix64 (Steele, Lea, Flood:
/// Fast splittable pseudorandom number generators).
#[inline]
pub(super) fn mixed(index: u64) -> u64 {
    let mut z = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A generator of places below some number.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number below `limit`, or 0.
    #[inline]
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        // The upper half of a product with a fraction.
        ((u128::from(mixed(self.0)) * u128::from(limit)) >> 64) as u64
    }
}
