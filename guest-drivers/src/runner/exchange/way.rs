//! The accounts of one direction: what was sent, what of it has arrived, and how.

/// The frames of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Way {
    /// So many were sent, numbered from 0.
    pub(super) sent: u64,
    /// So many of them have arrived.
    pub(super) received: u64,
    /// Arrivals of what had arrived.
    pub(super) duplicates: u64,
    /// Arrivals after a later one.
    pub(super) overtaken: u64,
    /// One more than the latest that has arrived.
    end: u64,
    /// Which of the [`Way::WINDOW`] before `end` have arrived: bit 0 of the first for the latest.
    seen: [u64; Self::WORDS],
    /// Those before this one are not waited for any more.
    given_up: u64,
    /// So many of them have not arrived.
    lost: u64,
    /// How often in a row none has arrived.
    silences: u32,
}

impl Way {
    /// Frames whose arrival is remembered, more than there can be under way.
    const WINDOW: u64 = 64 * Self::WORDS as u64;
    const WORDS: usize = 4;
    /// A frame that so many later ones have overtaken is lost.
    const LATE: u64 = 64;

    /// Frames that may still arrive.
    pub(super) fn under_way(&self) -> u64 {
        self.sent - self.received - self.lost
    }

    /// Frame `number`, which has been sent, is here.
    pub(super) fn arrived(&mut self, number: u64) {
        self.silences = 0;
        if number >= self.end {
            self.shift(number + 1 - self.end);
            self.end = number + 1;
            if let Some(latest) = self.seen.first_mut() {
                *latest |= 1;
            }
        } else {
            let age = self.end - 1 - number;
            let word = self.seen.get_mut((age / 64) as usize);
            // Nobody knows of one that old any more; it cannot be under way.
            let Some(word) = word.filter(|word| **word & 1 << (age % 64) == 0) else {
                self.duplicates += 1;
                return;
            };
            *word |= 1 << (age % 64);
            self.overtaken += 1;
        }
        self.received += 1;
        if number < self.given_up {
            self.lost -= 1;
        }
        self.give_up_before(self.end.saturating_sub(Self::LATE));
    }

    /// Whether frame `number`, one of those that are remembered, has arrived.
    fn has_arrived(&self, number: u64) -> bool {
        let Some(age) = self.end.checked_sub(number + 1) else { return false };
        self.seen.get((age / 64) as usize).is_some_and(|word| word & 1 << (age % 64) != 0)
    }

    /// Takes for lost what has not arrived of the frames before `limit`.
    fn give_up_before(&mut self, limit: u64) {
        while self.given_up < limit {
            self.lost += u64::from(!self.has_arrived(self.given_up));
            self.given_up += 1;
        }
    }

    /// Moves what is remembered.
    fn shift(&mut self, by: u64) {
        let (words, bits) = ((by.min(Self::WINDOW) / 64) as usize, by % 64);
        self.seen.copy_within(..Self::WORDS - words, words);
        for word in self.seen.iter_mut().take(words) {
            *word = 0;
        }
        if bits > 0 {
            let mut carry = 0;
            for word in &mut self.seen {
                (carry, *word) = (*word >> (64 - bits), *word << bits | carry);
            }
        }
    }

    /// Nothing arrives: what is under way is lost. Returns how often in a row that was so.
    pub(super) fn give_up(&mut self) -> u32 {
        if self.under_way() > 0 {
            self.give_up_before(self.sent);
            self.silences += 1;
        }
        self.silences
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_lost_is_not_waited_for() {
        let mut way = Way { sent: 10, ..Way::default() };
        (0..4).for_each(|number| way.arrived(number));
        assert_eq!(way.under_way(), 6);
        way.give_up();
        assert_eq!((way.under_way(), way.lost), (0, 6));
        // One was only late.
        way.arrived(7);
        assert_eq!((way.under_way(), way.lost, way.received), (0, 5, 5));
        way.sent += 3;
        assert_eq!(way.under_way(), 3);
        way.give_up();
        way.give_up(); // nothing is under way, which says nothing
        way.sent += 1;
        way.give_up();
        way.sent += 1;
        assert_eq!(way.give_up(), 3);
    }

    proptest! {
        /// Against lists of what has arrived.
        #[test]
        fn arrivals_are_told_apart(
            order in prop::collection::vec((0_u64..120, 0_u64..6), 0..200),
        ) {
            let mut way = Way { sent: 1000, ..Way::default() };
            let (mut seen, mut duplicates, mut overtaken) = (Vec::new(), 0, 0);
            let mut base = 0;
            for (ahead, step) in order {
                base += step;
                let number = (base + ahead).min(999);
                let latest = seen.iter().max().copied();
                // What is older than the window is not asked about.
                if latest.is_some_and(|latest: u64| latest >= number + Way::WINDOW) {
                    continue;
                }
                if seen.contains(&number) {
                    duplicates += 1;
                } else {
                    overtaken += u64::from(latest.is_some_and(|latest| latest > number));
                    seen.push(number);
                }
                way.arrived(number);
            }
            prop_assert_eq!(way.received, seen.len() as u64);
            prop_assert_eq!((way.duplicates, way.overtaken), (duplicates, overtaken));
            let end = seen.iter().max().map_or(0, |latest| latest + 1);
            let late = (0..end.saturating_sub(Way::LATE)).filter(|number| !seen.contains(number));
            prop_assert_eq!(way.lost, late.count() as u64);
            prop_assert_eq!(way.under_way(), 1000 - way.received - way.lost);
        }
    }
}
