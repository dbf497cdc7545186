//! Packets that were taken from the ring, from then until the guest has them back.
//!
//! A packet may leave as many frames, which end in any order, and its descriptors are the guest's
//! again only when all have ended; so packets wait here and are given back in the order of the ring.
//! Frames know their packet by its number, which is never used again: one that belongs to a ring of
//! before finds nothing here.

use std::collections::VecDeque;

use hypervisor::{Gpa, GuestMemory};

use super::super::bits::txd;
use super::super::descriptors::{self, Raw};
use super::super::registers::Ring;
use super::Tally;

/// Packets that can be under way.
const PACKETS: usize = 256;

/// Which of a packet's descriptors are to be written back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reports {
    pub last: bool,
    pub others: bool,
    /// The driver can wait for the last one's.
    pub later: bool,
}

/// A packet that was taken from the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    /// Its first descriptor, and how many it has.
    pub first: u32,
    pub descriptors: u32,
    pub reports: Reports,
    /// Its frames that have not ended.
    pub frames: u32,
    /// It has no others.
    pub sealed: bool,
}

/// See the module's documentation.
pub(super) struct Packets {
    queue: VecDeque<Packet>,
    /// The number of the first of them.
    first: u64,
}

impl Packets {
    pub(super) fn new() -> Self {
        Self { queue: VecDeque::with_capacity(PACKETS), first: 0 }
    }

    pub(super) fn is_full(&self) -> bool {
        self.queue.len() >= PACKETS
    }

    /// The number that the next packet will have.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.queue.len() as u64
    }

    pub(super) fn push(&mut self, packet: Packet) {
        self.queue.push_back(packet);
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Packet> {
        self.queue.get_mut(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    /// The ring that they are from is gone.
    pub(super) fn forget(&mut self) {
        self.first = self.next_number();
        self.queue.clear();
    }

    /// Gives packets that have left back to the guest. Returns the head of the ring, if it has moved.
    pub(super) fn write_back(
        &mut self,
        ring: &Ring,
        memory: &GuestMemory,
        tally: &mut Tally,
    ) -> Option<u32> {
        let mut head = None;
        while let Some(packet) = self.queue.front() {
            if packet.frames > 0 || !packet.sealed {
                break;
            }
            let Packet { first, descriptors, reports, .. } = *packet;
            self.queue.pop_front();
            self.first += 1;
            let mut index = first;
            for left in (0..descriptors).rev() {
                let reports = if left == 0 {
                    reports.last
                } else {
                    reports.others && asks_for_report(ring, index, memory)
                };
                if reports {
                    let status = Gpa(ring.address(index).wrapping_add(descriptors::STATUS));
                    // A ring that is not there any more is not written to.
                    let _ = memory.write(status, &[txd::DD]);
                }
                index = ring.next(index);
            }
            if reports.last || reports.others {
                let later = reports.later && !reports.others;
                tally.report_later |= later;
                tally.report_now |= !later;
            }
            head = Some(index);
        }
        head
    }
}

/// Whether a descriptor says that it is to be written back. It may have changed since; that only
/// concerns who has changed it.
fn asks_for_report(ring: &Ring, index: u32, memory: &GuestMemory) -> bool {
    let raw = memory.read_obj::<Raw>(Gpa(ring.address(index)));
    raw.is_ok_and(|raw| raw.command() & txd::RS != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_given_back_in_order() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let ring = Ring { base: 0x1000, count: 8, ..Ring::default() };
        // Both descriptors of the second packet ask for a report.
        for index in [7, 0] {
            let raw = Raw { low: 0, lower: u32::from(txd::RS) << 24, upper: 0 };
            memory.write_obj(Gpa(ring.address(index)), &raw).unwrap();
        }
        let reported = |index| {
            let raw: Raw = memory.read_obj(Gpa(ring.address(index))).unwrap();
            raw.upper as u8 == txd::DD
        };
        let mut packets = Packets::new();
        let mut tally = Tally::default();
        let none = Reports::default();
        let both = Reports { last: true, others: true, later: true };
        for (first, descriptors, reports, frames) in [(6, 1, none, 1), (7, 2, both, 0)] {
            packets.push(Packet { first, descriptors, reports, frames, sealed: true });
        }
        // The second has left, the first has not.
        assert_eq!(packets.write_back(&ring, &memory, &mut tally), None);
        packets.get_mut(0).unwrap().frames = 0;
        assert_eq!(packets.write_back(&ring, &memory, &mut tally), Some(1));
        assert_eq!([6, 7, 0, 1].map(reported), [false, true, true, false]);
        // One that does not ask for the last alone cannot wait.
        assert_eq!((tally.report_now, tally.report_later), (true, false));
        assert_eq!(packets.next_number(), 2);
    }

    #[test]
    fn a_number_is_never_used_again() {
        let mut packets = Packets::new();
        let packet = Packet {
            first: 0,
            descriptors: 1,
            reports: Reports::default(),
            frames: 1,
            sealed: true,
        };
        packets.push(packet);
        packets.forget();
        assert!(packets.get_mut(0).is_none());
        assert_eq!(packets.next_number(), 1);
        packets.push(packet);
        assert!(packets.get_mut(0).is_none());
        assert!(packets.get_mut(1).is_some());
        assert!(packets.get_mut(2).is_none());
    }
}
