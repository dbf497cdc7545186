//! What a frame needs before the network can have it, and how much of it that changes.
//!
//! A driver leaves checksums, VLAN tags and the cutting of long packets to the NIC. The network takes
//! most of that over, as an [`Offload`]; the rest is done to a copy of the frame's first bytes (its
//! [`Front`]), so that payload goes out from where it lies. Only for what neither can do is the whole
//! frame copied and finished.

use backends::net::checksum::{get, put};
use backends::net::large::LargePacket;
use backends::net::offload::Checksum;
use backends::net::{ETHERNET_HEADER, Offload, Offloads};

use super::super::bits::txd;
use super::super::checksum::{ADDRESSES, TAG, insert};
use super::super::descriptors::Context;

/// The longest headers that are understood; a context cannot say more.
const MAX_HEADERS: usize = 256;

/// What is done to a frame before the network gets it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    /// An IP checksum: start, place, end.
    pub ip: Option<(usize, usize, usize)>,
    /// The same of TCP or UDP.
    pub transport: Option<(usize, usize, usize)>,
    /// It is to be cut as this says.
    pub cut: Option<Context>,
}

impl Work {
    /// What of it is left to the network for a frame of `len` bytes, and how many of these have to be
    /// copied for the rest; `None` if that takes a copy of the whole.
    pub(super) fn plan(&self, len: usize, tagged: bool) -> Option<(Offload, usize)> {
        let mut offload = Offload::NONE;
        let mut copied = 0;
        if let Some(context) = self.cut {
            return Some((offload, context.header_len.into()));
        }
        if let Some((_, _, end)) = self.ip {
            copied = end;
        }
        if let Some((start, place, end)) = self.transport {
            let offset = place.checked_sub(start)?;
            if end != len || start < ETHERNET_HEADER {
                return None;
            }
            let (start, offset) = (u16::try_from(start).ok()?, u16::try_from(offset).ok()?);
            offload.checksum = Checksum::Partial { start, offset };
        }
        if tagged {
            copied = copied.max(ADDRESSES);
        }
        (copied <= MAX_HEADERS).then_some((offload, copied))
    }

    /// Does the rest to the copied headers of a frame of `len` bytes. Returns what is left to the
    /// network in the end: `offload`, which was the plan, or how the frame is to be cut.
    pub(super) fn change(
        &self,
        headers: &mut [u8],
        len: usize,
        offload: Offload,
        takes: Offloads,
    ) -> Option<Offload> {
        if let Some(context) = &self.cut {
            return complete(headers, len, context, takes);
        }
        if let Some((start, place, end)) = self.ip {
            insert(headers, start, place, end)?;
        }
        Some(offload)
    }

    /// Does all that is not about single segments to a copy of the whole frame. Returns what is left
    /// then: nothing, or how it is to be cut.
    pub(super) fn finish(&self, frame: &mut [u8]) -> Option<Offload> {
        let len = frame.len();
        let mut offload = Offload::NONE;
        if let Some(context) = &self.cut {
            let headers = frame.get_mut(..usize::from(context.header_len))?;
            offload = complete(headers, len, context, Offloads::ALL)?;
        }
        if let Some((start, place, end)) = self.ip {
            insert(frame, start, place, end)?;
        }
        if let Some((start, place, end)) = self.transport {
            insert(frame, start, place, end)?;
            // Which would mean, in UDP, that there is none.
            if get(frame, place) == Some(0) {
                put(frame, place, 0xffff)?;
            }
        }
        Some(offload)
    }
}

/// The changed first bytes of a frame, with room for a tag.
pub(super) struct Front([u8; MAX_HEADERS + TAG]);

impl Front {
    pub(super) const fn new() -> Self {
        Self([0; _])
    }

    /// Its first `len` bytes, if it has so many.
    pub(super) fn get_mut(&mut self, len: usize) -> Option<&mut [u8]> {
        self.0.get_mut(..len)
    }
}

/// A VLAN tag that is put into a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct VlanTag {
    /// The type in front of it.
    pub kind: u16,
    /// Tag control information.
    pub tci: u16,
}

impl VlanTag {
    /// Puts it behind the addresses in a front that holds `len` bytes; those that follow move back.
    pub(super) fn insert(self, front: &mut Front, len: usize) -> Option<()> {
        let Front(bytes) = front;
        bytes.copy_within(ADDRESSES..len.max(ADDRESSES), ADDRESSES + TAG);
        self.put(bytes)
    }

    /// Puts it behind the addresses of a frame that has room before it, into which these move.
    pub(super) fn insert_with_room(self, bytes: &mut [u8]) -> Option<()> {
        bytes.copy_within(TAG..TAG + ADDRESSES, 0);
        self.put(bytes)
    }

    fn put(self, frame: &mut [u8]) -> Option<()> {
        put(frame, ADDRESSES, self.kind)?;
        put(frame, ADDRESSES + 2, self.tci)
    }
}

/// Completes the headers of a packet of `len` bytes that is to be cut.
fn complete(headers: &mut [u8], len: usize, context: &Context, takes: Offloads) -> Option<Offload> {
    let packet = LargePacket {
        len,
        ip: context.ip_start.into(),
        transport: context.transport_start.into(),
        v4: context.tucmd() & txd::TUCMD_IP != 0,
        tcp: context.tucmd() & txd::TUCMD_TCP != 0,
        size: context.segment_size,
    };
    let (offload, headers_len) = packet.complete(headers, takes)?;
    // The context says how long they are, too.
    (headers_len == headers.len()).then_some(offload)
}

#[cfg(test)]
mod tests {
    use backends::net::checksum::{fold, sum};

    use super::*;

    const PLAIN: Work = Work { ip: None, transport: None, cut: None };

    #[test]
    fn only_what_has_to_change_is_copied() {
        let ip = Some((14, 24, 34));
        let partial = |start, offset| Offload {
            checksum: Checksum::Partial { start, offset },
            segments: None,
        };
        assert_eq!(PLAIN.plan(1000, false), Some((Offload::NONE, 0)));
        assert_eq!(PLAIN.plan(1000, true), Some((Offload::NONE, ADDRESSES)));
        assert_eq!(Work { ip, ..PLAIN }.plan(1000, true), Some((Offload::NONE, 34)));
        let both = Work { ip, transport: Some((34, 50, 1000)), cut: None };
        assert_eq!(both.plan(1000, false), Some((partial(34, 16), 34)));
        // The network sums to the end, from behind Ethernet's header, to a place that follows; and
        // there is a limit to headers.
        for transport in [(34, 50, 999), (13, 50, 1000), (34, 33, 1000)] {
            assert_eq!(Work { transport: Some(transport), ..PLAIN }.plan(1000, false), None);
        }
        assert_eq!(Work { ip: Some((14, 24, 257)), ..PLAIN }.plan(1000, false), None);
    }

    #[test]
    fn all_can_be_done_to_a_copy() {
        let mut frame = [7; 60];
        put(&mut frame, 24, 0).unwrap();
        put(&mut frame, 40, 0).unwrap();
        let ip = Some((14, 24, 34));
        let work = Work { ip, transport: Some((34, 40, 50)), cut: None };
        assert_eq!(work.finish(&mut frame), Some(Offload::NONE));
        // What is summed with its checksum adds up to all ones.
        let sum = |bytes| fold(sum(bytes));
        assert_eq!((sum(&frame[14..34]), sum(&frame[34..50])), (0xffff, 0xffff));
        assert!(frame[50..].iter().all(|byte| *byte == 7));
        // A checksum of 0 would mean that there is none.
        let mut frame = [0xff; 60];
        assert_eq!(work.finish(&mut frame), Some(Offload::NONE));
        assert_eq!((get(&frame, 24), get(&frame, 40)), (Some(0), Some(0xffff)));
        let outside = Work { ip: Some((14, 59, 34)), ..PLAIN };
        assert_eq!(outside.finish(&mut frame), None);
    }

    #[test]
    fn a_tag_goes_behind_the_addresses() {
        let tag = VlanTag { kind: 0x8100, tci: 0x0123 };
        let bytes: Vec<u8> = (0..40).collect();
        let expected = [&bytes[..12], &[0x81, 0, 1, 0x23], &bytes[12..]].concat();

        let mut front = Front::new();
        front.get_mut(40).unwrap().copy_from_slice(&bytes);
        tag.insert(&mut front, 40).unwrap();
        assert_eq!(front.get_mut(44).unwrap(), expected);

        let mut with_room = [&[0; TAG], bytes.as_slice()].concat();
        tag.insert_with_room(&mut with_room).unwrap();
        assert_eq!(with_room, expected);
    }
}
