//! Whose the slots of a receive buffer are: the host's, or the guest's from the packet that names
//! them until its completion.
//!
//! A packet's transaction id names its first slot and a generation, so that one that was never
//! sent, or was answered already, is told from one that is due.
//!
//! Each channel is the home of a part of the slots. A frame that is another channel's to deliver takes
//! its slots there; when the guest has completed them they go home ([`super::crossing`]).

use std::ops::Range;

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
    /// Another channel.
    Away,
    /// Nobody uses it.
    Free,
    /// The host does.
    Host,
    /// The guest does; a packet of this generation begins with it.
    GuestFirst(u32),
    /// The guest does.
    Guest,
}

/// The slots of a receive buffer, as one channel sees them.
#[derive(Debug)]
pub(super) struct Slots {
    home: Range<Slot>,
    owners: Box<[Owner]>,
    /// What follows a slot in its packet.
    next: Box<[Slot]>,
    free: Vec<Slot>,
    /// Other channels' slots that are to go home.
    leaving: Vec<Slot>,
    with_guest: usize,
    generation: u32,
}

impl Slots {
    /// A buffer of `count` slots, of which those in `home` are this channel's. All are away at first.
    pub(super) fn new(count: u16, home: Range<Slot>) -> Self {
        Self {
            owners: vec![Owner::Away; count.into()].into(),
            next: vec![END; count.into()].into(),
            free: Vec::with_capacity(home.len()),
            home,
            leaving: Vec::new(),
            with_guest: 0,
            generation: 0,
        }
    }

    /// How many nobody uses.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// How many are the guest's.
    pub(super) fn with_guest(&self) -> usize {
        self.with_guest
    }

    /// Changes a slot's owner, if it is what it should be. Returns whether it was.
    fn pass(&mut self, slot: Slot, from: Owner, to: Owner) -> bool {
        match self.owners.get_mut(usize::from(slot)) {
            Some(owner) if *owner == from => {
                *owner = to;
                true
            }
            _ => false,
        }
    }

    /// Nobody uses a slot any more, which is not away.
    fn release(&mut self, slot: Slot) {
        let Some(owner) = self.owners.get_mut(usize::from(slot)) else { return };
        if self.home.contains(&slot) {
            *owner = Owner::Free;
            self.free.push(slot);
        } else {
            *owner = Owner::Away;
            self.leaving.push(slot);
        }
    }

    /// A slot of this channel has come home.
    pub(super) fn come_home(&mut self, slot: Slot) {
        if self.home.contains(&slot) && self.pass(slot, Owner::Away, Owner::Free) {
            self.free.push(slot);
        }
    }

    /// A slot has come from another channel, for the guest. False if it was here already.
    pub(super) fn adopt(&mut self, slot: Slot) -> bool {
        self.pass(slot, Owner::Away, Owner::Host)
    }

    /// A slot that was taken goes to another channel.
    pub(super) fn send_away(&mut self, slot: Slot) {
        self.pass(slot, Owner::Host, Owner::Away);
    }

    /// Takes the slots that are to go home to other channels.
    pub(super) fn leaving(&mut self) -> impl Iterator<Item = Slot> + '_ {
        self.leaving.drain(..)
    }

    /// Lets go of all that are here, whoever uses them.
    pub(super) fn let_go(&mut self) -> impl Iterator<Item = Slot> + '_ {
        self.free.clear();
        self.with_guest = 0;
        let here = (0..).zip(&mut self.owners).filter(|(_, owner)| **owner != Owner::Away);
        let here = here.map(|(slot, owner)| {
            *owner = Owner::Away;
            slot
        });
        here.chain(self.leaving.drain(..))
    }

    /// Takes a free slot into use.
    pub(super) fn take(&mut self) -> Option<Slot> {
        let slot = self.free.pop()?;
        self.pass(slot, Owner::Free, Owner::Host);
        Some(slot)
    }

    /// Gives a slot back that the guest has not seen.
    pub(super) fn give_back(&mut self, slot: Slot) {
        if self.owners.get(usize::from(slot)) == Some(&Owner::Host) {
            self.release(slot);
        }
    }

    /// Hands slots that were taken to the guest, in one packet. Returns its transaction id, `None`
    /// if there are none.
    pub(super) fn hand_over(&mut self, slots: impl IntoIterator<Item = Slot>) -> Option<u64> {
        let mut slots = slots.into_iter();
        let head = slots.next()?;
        // Never 0, which would make an id that other packets have.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let mut last = usize::from(head);
        *self.owners.get_mut(last)? = Owner::GuestFirst(self.generation);
        self.with_guest += 1;
        for slot in slots {
            let index = usize::from(slot);
            *self.owners.get_mut(index)? = Owner::Guest;
            *self.next.get_mut(last)? = slot;
            self.with_guest += 1;
            last = index;
        }
        *self.next.get_mut(last)? = END;
        Some(u64::from(self.generation) << 32 | u64::from(head))
    }

    /// The guest has completed a packet: its slots are free again. Returns how many.
    pub(super) fn complete(&mut self, id: u64) -> Result<u32, NotSent> {
        let generation = (id >> 32) as u32;
        let head = Slot::try_from(id & u64::from(u32::MAX)).map_err(|_| NotSent(id))?;
        if self.owners.get(usize::from(head)) != Some(&Owner::GuestFirst(generation)) {
            return Err(NotSent(id));
        }
        let mut count = 0;
        let mut slot = head;
        while let Some(next) = self.next.get(usize::from(slot)).copied() {
            self.release(slot);
            count += 1;
            slot = next;
        }
        self.with_guest = self.with_guest.saturating_sub(count as usize);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    /// With all slots of its own.
    fn alone(first: Slot, count: u16) -> Slots {
        let home = first..first + count;
        let mut slots = Slots::new(first + count, home.clone());
        home.rev().for_each(|slot| slots.come_home(slot));
        slots
    }

    #[test]
    fn a_packet_is_completed_once() {
        let mut slots = alone(100, 4);
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
        let mut slots = alone(0, 0);
        assert_eq!(slots.take(), None);
        assert_eq!(slots.hand_over([]), None);
    }

    #[test]
    fn slots_of_others_go_home() {
        let mut slots = Slots::new(8, 0..4);
        (0..4).for_each(|slot| slots.come_home(slot));
        // One that is here does not come, and one of another channel is not free here.
        slots.come_home(2);
        slots.come_home(5);
        assert!(!slots.adopt(2) && slots.adopt(5) && slots.adopt(6) && !slots.adopt(5));
        assert_eq!(slots.free(), 4);
        let own = slots.take().unwrap();
        let id = slots.hand_over([5, own]).unwrap();
        slots.give_back(6);
        assert_eq!(slots.leaving().collect::<Vec<_>>(), [6]);
        assert_eq!(slots.complete(id), Ok(2));
        assert_eq!(slots.leaving().collect::<Vec<_>>(), [5]);
        let gone = slots.take().unwrap();
        slots.send_away(gone);
        assert_eq!(slots.free(), 3);
        assert!(slots.adopt(7));
        let mut all: Vec<Slot> = slots.let_go().collect();
        all.sort_unstable();
        all.push(gone);
        assert_eq!(all.len(), 5);
        assert_eq!((slots.free(), slots.take()), (0, None));
    }

    proptest! {
        /// Whatever is taken, handed over, given back and completed, in whatever order and however
        /// wrongly: no slot is in two places.
        #[test]
        fn no_slot_is_in_two_places(
            steps in proptest::collection::vec((0..4u8, any::<u64>(), 1..5usize), 0..200),
        ) {
            let mut slots = alone(7, 20);
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
                prop_assert_eq!(slots.with_guest(), theirs);
                let distinct: HashSet<_> = slots.free.iter().chain(&host).collect();
                prop_assert_eq!(distinct.len(), slots.free() + host.len());
            }
        }
    }
}
