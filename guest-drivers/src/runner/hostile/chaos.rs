//! Choices, from a seed: the same ones every time.

use crate::runner::random::mixed;

/// A source of choices.
#[derive(Debug)]
pub(super) struct Chaos(u64);

impl Chaos {
    /// Of this seed. Neighbouring seeds have nothing in common.
    pub(super) fn new(seed: u64) -> Self {
        Self(mixed(seed))
    }

    /// Any number.
    pub(super) fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mixed(self.0)
    }

    /// Any number of 32 bits.
    pub(super) fn any_32(&mut self) -> u32 {
        self.any() as u32
    }

    /// A number below `limit`, or 0.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        // The upper half of a product with a fraction.
        ((u128::from(self.any()) * u128::from(limit)) >> 64) as u64
    }

    /// A number of things below `limit`, or 0.
    pub(super) fn count(&mut self, limit: usize) -> usize {
        self.below(limit as u64) as usize
    }

    /// True in so many of a hundred cases.
    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of these; the first if there is none.
    pub(super) fn of<T: Copy>(&mut self, first: T, others: &[T]) -> T {
        let choice = self.count(others.len() + 1);
        choice.checked_sub(1).and_then(|index| others.get(index)).copied().unwrap_or(first)
    }

    /// A number at which programs are wrong: about a power of two, about none or all, or any.
    pub(super) fn odd(&mut self) -> u64 {
        let near = self.below(5).wrapping_sub(2);
        match self.below(4) {
            0 => near,
            1 => (1u64 << self.below(64)).wrapping_add(near),
            2 => (1u64 << self.below(20)).wrapping_mul(self.below(16)).wrapping_add(near),
            _ => self.any() >> self.below(64),
        }
    }

    /// The same of 32 bits.
    pub(super) fn odd_32(&mut self) -> u32 {
        self.odd() as u32
    }

    /// Mostly what is right, and an odd number in so many of a hundred cases.
    pub(super) fn or_odd(&mut self, right: u64, percent: u64) -> u64 {
        if self.percent(percent) { self.odd() } else { right }
    }

    /// The same of 32 bits.
    pub(super) fn or_odd_32(&mut self, right: u32, percent: u64) -> u32 {
        self.or_odd(right.into(), percent) as u32
    }
}
