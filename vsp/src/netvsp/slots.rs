//! Whose the slots of a receive buffer are: the host's, or the guest's from the packet that names
//! them until its completion.
//!
//! A packet's transaction id names its first slot and a generation, so that one that was never
//! sent, or was answered already, is told from one that is due.

use thiserror::Error;

/// A slot's number in the receive buffer.
pub(super) type Slot = u16;

/// No slot follows.
const END: Slot = Slot::MAX;

/// The guest has completed what it was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("there is no packet {0:#x} to complete")]
pub(super) struct NotSent(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// Nobody uses it.
    Free,
    /// The host does.
    Host,
    /// The guest does; a packet of this generation begins with it.
    GuestFirst(u32),
    /// The guest does.
    Guest,
}

/// The slots of one channel: a range of those of the receive buffer.
#[derive(Debug)]
pub(super) struct Slots {
    first: Slot,
    owners: Box<[Owner]>,
    /// What follows a slot in its packet.
    next: Box<[Slot]>,
    free: Vec<Slot>,
    generation: u32,
}

impl Slots {
    /// `count` slots from `first` on, all of them free.
    pub(super) fn new(first: Slot, count: u16) -> Self {
        let count = count.min(Slot::MAX - first);
        Self {
            first,
            owners: vec![Owner::Free; count.into()].into(),
            next: vec![END; count.into()].into(),
            free: (first..first + count).rev().collect(),
            generation: 0,
        }
    }

    fn index(&self, slot: Slot) -> usize {
        usize::from(slot.wrapping_sub(self.first))
    }

    /// How many nobody uses.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a free slot into use.
    pub(super) fn take(&mut self) -> Option<Slot> {
        let slot = self.free.pop()?;
        let index = self.index(slot);
        *self.owners.get_mut(index)? = Owner::Host;
        Some(slot)
    }

    /// Gives a slot back that the guest has not seen.
    pub(super) fn give_back(&mut self, slot: Slot) {
        let index = self.index(slot);
        if let Some(owner) = self.owners.get_mut(index)
            && *owner == Owner::Host
        {
            *owner = Owner::Free;
            self.free.push(slot);
        }
    }

    /// Hands slots that were taken to the guest, in one packet. Returns its transaction id, `None`
    /// if there are none.
    pub(super) fn hand_over(&mut self, slots: impl IntoIterator<Item = Slot>) -> Option<u64> {
        let mut slots = slots.into_iter();
        let head = slots.next()?;
        // Never 0, which would make an id that other packets have.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let index = self.index(head);
        *self.owners.get_mut(index)? = Owner::GuestFirst(self.generation);
        let mut last = index;
        for slot in slots {
            let index = self.index(slot);
            *self.owners.get_mut(index)? = Owner::Guest;
            *self.next.get_mut(last)? = slot;
            last = index;
        }
        *self.next.get_mut(last)? = END;
        Some(u64::from(self.generation) << 32 | u64::from(head))
    }

    /// The guest has completed a packet: its slots are free again. Returns how many.
    pub(super) fn complete(&mut self, id: u64) -> Result<u32, NotSent> {
        let generation = (id >> 32) as u32;
        let head = Slot::try_from(id & u64::from(u32::MAX)).map_err(|_| NotSent(id))?;
        let index = self.index(head);
        if self.owners.get(index) != Some(&Owner::GuestFirst(generation)) {
            return Err(NotSent(id));
        }
        let mut count = 0;
        let mut slot = head;
        while slot != END {
            let index = self.index(slot);
            let (Some(owner), Some(next)) = (self.owners.get_mut(index), self.next.get(index))
            else {
                break;
            };
            *owner = Owner::Free;
            self.free.push(slot);
            count += 1;
            slot = *next;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_packet_is_completed_once() {
        let mut slots = Slots::new(100, 4);
        let taken: Vec<Slot> = (0..3).map(|_| slots.take().unwrap()).collect();
        assert_eq!(taken, [100, 101, 102]);
        let id = slots.hand_over(taken).unwrap();
        assert_eq!(slots.free(), 1);
        for wrong in [0, 100, id + 1, id ^ 1 << 32, u64::MAX, id & !0xFFFF] {
            assert_eq!(slots.complete(wrong), Err(NotSent(wrong)), "{wrong:#x}");
        }
        assert_eq!(slots.complete(id), Ok(3));
        assert_eq!(slots.complete(id), Err(NotSent(id)));
        assert_eq!(slots.free(), 4);
    }

    #[test]
    fn nothing_is_no_packet() {
        let mut slots = Slots::new(0, 0);
        assert_eq!(slots.take(), None);
        assert_eq!(slots.hand_over([]), None);
    }

    proptest! {
        /// Whatever is taken, handed over, given back and completed, in whatever order and however
        /// wrongly: no slot is in two places.
        #[test]
        fn no_slot_is_in_two_places(
            steps in proptest::collection::vec((0..4u8, any::<u64>(), 1..5usize), 0..200),
        ) {
            let mut slots = Slots::new(7, 20);
            let mut host: Vec<Slot> = Vec::new();
            let mut guest: HashMap<u64, usize> = HashMap::new();
            for (kind, number, count) in steps {
                match kind {
                    0 => host.extend((0..count).map_while(|_| slots.take())),
                    1 => {
                        let gone = host.split_off(host.len().saturating_sub(count));
                        let len = gone.len();
                        if let Some(id) = slots.hand_over(gone) {
                            prop_assert!(guest.insert(id, len).is_none());
                        }
                    }
                    2 => {
                        if let Some(slot) = host.pop() {
                            slots.give_back(slot);
                            slots.give_back(slot);
                        }
                    }
                    _ => {
                        prop_assert_eq!(slots.complete(number), Err(NotSent(number)));
                        let due = guest.keys().min().copied();
                        if let Some(id) = due {
                            let len = guest.remove(&id).unwrap();
                            prop_assert_eq!(slots.complete(id), Ok(len as u32));
                            prop_assert_eq!(slots.complete(id), Err(NotSent(id)));
                        }
                    }
                }
                let theirs: usize = guest.values().sum();
                prop_assert_eq!(slots.free() + host.len() + theirs, 20);
                let distinct: HashSet<_> = slots.free.iter().chain(&host).collect();
                prop_assert_eq!(distinct.len(), slots.free() + host.len());
            }
        }
    }
}
