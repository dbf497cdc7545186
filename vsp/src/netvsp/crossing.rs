//! How a frame that came by one channel's queue gets to another channel, whose it is to deliver.
//!
//! A frame stays in its slots, and what crosses is the number of its first. Each channel has a door:
//! a queue of frames that others have left there, and one of its own slots that come home. Both are
//! bounded and without a lock. A channel that closes leaves nothing behind: what is at its door, or
//! comes there while it closes, goes home.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crossbeam_queue::ArrayQueue;

use super::slots::Slot;

/// Frames that can be at a door.
const FRAMES: usize = 512;
/// No slot follows.
const END: Slot = Slot::MAX;

/// A slot with a frame in it, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filled {
    pub slot: Slot,
    /// How much of the slot is to be told of, in bytes.
    pub len: u32,
    /// Whether the frame ends in it.
    pub last: bool,
}

/// Why a frame did not cross.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The other channel is not open.
    Closed,
    /// Too many frames are at its door.
    Full,
}

#[derive(Debug)]
struct Door {
    open: AtomicBool,
    /// First slots of frames.
    frames: ArrayQueue<Slot>,
    /// Has room for all slots whose home this is.
    home: ArrayQueue<Slot>,
    /// The channel waits for its slots.
    hungry: AtomicBool,
}

/// The doors of a NIC's channels.
#[derive(Debug)]
pub(super) struct Crossing {
    doors: Box<[Door]>,
    /// For each slot of a frame that crosses, how much of it there is, and the next one above that.
    links: Box<[AtomicU64]>,
    /// Slots of each channel.
    share: u16,
}

impl Crossing {
    /// Between so many channels, which have the slots in equal parts. All slots are at home, and all
    /// channels closed.
    pub(super) fn new(slots: u16, channels: u16) -> Self {
        let share = slots / channels.max(1);
        let crossing = Self {
            doors: (0..channels)
                .map(|_| Door {
                    open: AtomicBool::new(false),
                    frames: ArrayQueue::new(FRAMES),
                    home: ArrayQueue::new(usize::from(share).max(1)),
                    hungry: AtomicBool::new(false),
                })
                .collect(),
            links: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            share,
        };
        (0..share * channels).for_each(|slot| {
            crossing.go_home(slot);
        });
        crossing
    }

    fn door(&self, channel: u16) -> Option<&Door> {
        self.doors.get(usize::from(channel))
    }

    /// The slots whose home a channel is.
    pub(super) fn home(&self, channel: u16) -> Range<Slot> {
        let first = channel.saturating_mul(self.share);
        first..first.saturating_add(self.share)
    }

    /// Frames may cross to this channel from now on.
    pub(super) fn open(&self, channel: u16) {
        if let Some(door) = self.door(channel) {
            door.open.store(true, Ordering::SeqCst);
        }
    }

    /// None may any more, and those that have go home with their slots.
    pub(super) fn close(&self, channel: u16) {
        let Some(door) = self.door(channel) else { return };
        door.open.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.sweep(channel);
    }

    /// How many channels are open.
    pub(super) fn open_channels(&self) -> usize {
        self.doors.iter().filter(|door| door.open.load(Ordering::SeqCst)).count()
    }

    fn sweep(&self, channel: u16) {
        while let Some(frame) = self.next_frame(channel) {
            self.parts(frame).for_each(|part| {
                self.go_home(part.slot);
            });
        }
    }

    /// Leaves a frame, of at least one part, at another channel's door. Its slots are that channel's
    /// then.
    pub(super) fn send(&self, to: u16, frame: &[Filled]) -> Result<(), Refused> {
        let open = |door: &&Door| door.open.load(Ordering::Relaxed);
        let door = self.door(to).filter(open).ok_or(Refused::Closed)?;
        let Some(first) = frame.first() else { return Ok(()) };
        for (index, part) in frame.iter().enumerate() {
            let next = frame.get(index + 1).map_or(END, |part| part.slot);
            if let Some(link) = self.links.get(usize::from(part.slot)) {
                // The queue publishes it.
                link.store(u64::from(next) << 32 | u64::from(part.len), Ordering::Relaxed);
            }
        }
        door.frames.push(first.slot).map_err(|_| Refused::Full)?;
        fence(Ordering::SeqCst);
        if !door.open.load(Ordering::SeqCst) {
            // Either the one that closed has seen the frame, or this one sees that it has closed.
            self.sweep(to);
        }
        Ok(())
    }

    /// Takes the first slot of a frame from a channel's own door.
    pub(super) fn next_frame(&self, channel: u16) -> Option<Slot> {
        self.door(channel)?.frames.pop()
    }

    /// The parts of a frame that was taken.
    pub(super) fn parts(&self, first: Slot) -> impl Iterator<Item = Filled> + '_ {
        let mut next = first;
        std::iter::from_fn(move || {
            let slot = next;
            let link = self.links.get(usize::from(slot))?.load(Ordering::Relaxed);
            next = (link >> 32) as Slot;
            Some(Filled { slot, len: link as u32, last: next == END })
        })
    }

    /// Sends a slot home. Returns where that is.
    pub(super) fn go_home(&self, slot: Slot) -> u16 {
        let home = slot / self.share.max(1);
        if let Some(door) = self.door(home) {
            // There is room for all of them, and none is there twice.
            let _ = door.home.push(slot);
        }
        home
    }

    /// Takes a slot that has come home.
    pub(super) fn next_home(&self, channel: u16) -> Option<Slot> {
        self.door(channel)?.home.pop()
    }

    /// Says whether a channel waits for slots to come home.
    pub(super) fn set_hungry(&self, channel: u16, hungry: bool) {
        if let Some(door) = self.door(channel)
            && door.hungry.load(Ordering::Relaxed) != hungry
        {
            door.hungry.store(hungry, Ordering::SeqCst);
        }
    }

    /// Whether it does. For those that have sent some home before.
    pub(super) fn is_hungry(&self, channel: u16) -> bool {
        fence(Ordering::SeqCst);
        self.door(channel).is_some_and(|door| door.hungry.load(Ordering::Relaxed))
    }

    /// Whether there are frames at a channel's door.
    pub(super) fn has_frames(&self, channel: u16) -> bool {
        self.door(channel).is_some_and(|door| !door.frames.is_empty())
    }

    /// Whether slots have come home to a channel that waits for them.
    pub(super) fn has_homecomers(&self, channel: u16) -> bool {
        self.door(channel)
            .is_some_and(|door| door.hungry.load(Ordering::Relaxed) && !door.home.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::thread;

    use super::*;

    fn whole(slot: Slot, len: u32) -> Filled {
        Filled { slot, len, last: true }
    }

    fn at_home(crossing: &Crossing, channel: u16) -> Vec<Slot> {
        std::iter::from_fn(|| crossing.next_home(channel)).collect()
    }

    #[test]
    fn frames_cross_whole_and_in_order() {
        let crossing = Crossing::new(11, 2);
        assert_eq!((crossing.home(0), crossing.home(1)), (0..5, 5..10));
        assert_eq!(at_home(&crossing, 0), [0, 1, 2, 3, 4]);
        assert_eq!(crossing.send(1, &[whole(3, 60)]), Err(Refused::Closed));
        assert_eq!(crossing.send(2, &[whole(3, 60)]), Err(Refused::Closed));
        crossing.open(1);
        assert_eq!(crossing.open_channels(), 1);
        let parts = [(4, 2048, false), (0, 2048, false), (2, 7, true)]
            .map(|(slot, len, last)| Filled { slot, len, last });
        crossing.send(1, &parts).unwrap();
        crossing.send(1, &[whole(3, 60)]).unwrap();
        assert!(crossing.has_frames(1) && !crossing.has_frames(0));
        let first = crossing.next_frame(1).unwrap();
        assert_eq!(crossing.parts(first).collect::<Vec<_>>(), parts);
        let second = crossing.next_frame(1).unwrap();
        assert_eq!(crossing.parts(second).collect::<Vec<_>>(), [whole(3, 60)]);
        assert_eq!(crossing.next_frame(1), None);
        assert_eq!(crossing.go_home(3), 0);
        assert!(!crossing.has_homecomers(0));
        crossing.set_hungry(0, true);
        assert!(crossing.has_homecomers(0) && crossing.is_hungry(0));
        assert_eq!(at_home(&crossing, 0), [3]);
    }

    #[test]
    fn a_door_that_is_full_takes_no_more() {
        let crossing = Crossing::new(2000, 2);
        at_home(&crossing, 0);
        crossing.open(1);
        let taken = (0..1000).take_while(|slot| crossing.send(1, &[whole(*slot, 60)]).is_ok());
        assert_eq!(taken.count(), FRAMES);
        crossing.close(1);
        assert_eq!(at_home(&crossing, 0).len(), FRAMES);
    }

    /// One channel sends while the other opens and closes: all slots are at home in the end, each
    /// once.
    #[test]
    fn no_slot_is_lost_to_a_channel_that_closes() {
        const SLOTS: u16 = 64;
        let crossing = Crossing::new(2 * SLOTS, 2);
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                for _ in 0..20_000 {
                    if let Some(slot) = crossing.next_home(0)
                        && crossing.send(1, &[whole(slot, 60)]).is_err()
                    {
                        crossing.go_home(slot);
                    }
                }
            });
            while !sender.is_finished() {
                crossing.open(1);
                for _ in 0..8 {
                    let frame = crossing.next_frame(1);
                    frame.into_iter().for_each(|slot| {
                        crossing.go_home(slot);
                    });
                }
                crossing.close(1);
            }
        });
        let home = at_home(&crossing, 0);
        assert_eq!(home.len(), usize::from(SLOTS));
        assert_eq!(home.into_iter().collect::<HashSet<_>>().len(), usize::from(SLOTS));
    }
}
