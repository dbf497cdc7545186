//! What the guest receives: a frame in a slot of the receive buffer, with an RNDIS header before it.
//!
//! The network has put the frame behind room for the header. Its front is read once, to see whether
//! the guest wants it and what has to be said of it; a VLAN tag is said beside the frame if the
//! guest takes it there, and cut out of it. A frame that was put together from segments lies in
//! several slots, each with a header of its own.

use backends::net::offload::Checksum;
use backends::net::{ETHERNET_HEADER, MacAddr, Offload};
use vmbus::nvsp::Capabilities;
use vmbus::rndis::{
    HEADER_SIZE, Header, MessageKind, PacketBody, PacketFilter, PacketId, PacketInfo,
    PacketInfoKind, ReceiveChecksum, VlanTag,
};
use zerocopy::IntoBytes;

use super::handshake::SLOT_HEADER;

/// Bytes of a frame that are looked at: up to the protocol in an IP header behind a VLAN tag.
pub(super) const PEEK: usize = 32;

/// Bytes of a VLAN tag.
const TAG: usize = 4;
/// Both Ethernet addresses.
const ADDRESSES: usize = 12;
/// Bytes of one piece of per-packet information.
const INFO: usize = size_of::<PacketInfo>() + 4;

/// Names a frame in several parts. All of them are in one packet, so one name does for all.
const PART_ID: u16 = 1;

/// What a guest wants of the frames it receives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wishes {
    pub address: MacAddr,
    pub filter: PacketFilter,
    pub capabilities: Capabilities,
}

/// The front of a slot: what is written there, and how much of the slot there is to tell of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inbound {
    bytes: [u8; SLOT_HEADER as usize + TAG + ADDRESSES],
    written: usize,
    /// Bytes of per-packet information.
    infos: usize,
    /// Where the frame begins.
    data: u32,
    /// Bytes of the slot that the packet names.
    pub len: u32,
}

impl Inbound {
    fn new(len: u32) -> Option<Self> {
        Some(Self {
            bytes: [0; _],
            written: SLOT_HEADER as usize,
            infos: 0,
            data: SLOT_HEADER,
            len: SLOT_HEADER.checked_add(len)?,
        })
    }

    fn put(&mut self, kind: PacketInfoKind, value: u32) {
        let piece =
            PacketInfo { size: INFO as u32, kind, value_offset: size_of::<PacketInfo>() as u32 };
        let at = HEADER_SIZE + size_of::<PacketBody>() + self.infos;
        if let Some(to) = self.bytes.get_mut(at..at + INFO)
            && let Some((front, back)) = to.split_at_mut_checked(size_of::<PacketInfo>())
        {
            front.copy_from_slice(piece.as_bytes());
            back.copy_from_slice(&value.to_le_bytes());
            self.infos += INFO;
        }
    }

    /// Writes the fixed part.
    fn finish(mut self) -> Option<Self> {
        let header = Header { kind: MessageKind::Packet, len: self.len };
        let body = PacketBody {
            data_offset: self.data - HEADER_SIZE as u32,
            data_len: self.len.checked_sub(self.data)?,
            info_offset: if self.infos > 0 { size_of::<PacketBody>() as u32 } else { 0 },
            info_len: self.infos as u32,
            ..PacketBody::default()
        };
        let (front, rest) = self.bytes.split_at_mut_checked(HEADER_SIZE)?;
        front.copy_from_slice(header.as_bytes());
        rest.get_mut(..size_of::<PacketBody>())?.copy_from_slice(body.as_bytes());
        Some(self)
    }

    /// What goes to the start of the slot.
    pub(super) fn front(&self) -> &[u8] {
        self.bytes.get(..self.written).unwrap_or_default()
    }
}

/// Which part of a frame a slot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// The first of several.
    First,
    /// One after the first; the last is said to be.
    Later { last: bool },
}

impl Part {
    /// What the guest is told of it; `id` is the same for all parts.
    fn info(self, id: u16) -> Option<u32> {
        let flags = match self {
            Self::Whole => return None,
            Self::First => PacketId::PART | PacketId::FIRST,
            Self::Later { last: false } => PacketId::PART,
            Self::Later { last: true } => PacketId::PART | PacketId::LAST,
        };
        Some(zerocopy::transmute!(PacketId { version: 1, flags, id }))
    }
}

/// Prepares the frame, or its first part, of `len` bytes that lies [`SLOT_HEADER`] bytes into its
/// slot and begins with `peek`. `None`: the guest does not want it.
pub(super) fn prepare(
    peek: &[u8; PEEK],
    len: u32,
    part: Part,
    offload: &Offload,
    wishes: &Wishes,
) -> Option<Inbound> {
    let destination = *peek.first_chunk::<6>()?;
    if (len as usize) < ETHERNET_HEADER || !wishes.filter.takes(destination, wishes.address.0) {
        return None;
    }
    let tag = match peek.get(ADDRESSES..ADDRESSES + TAG)? {
        [0x81, 0x00, high, low] if len as usize >= ETHERNET_HEADER + TAG => {
            Some(u16::from_be_bytes([*high, *low]))
        }
        _ => None,
    };
    let behind_tag = peek.get(if tag.is_some() { TAG } else { 0 }..)?;
    let tag = tag.filter(|_| wishes.capabilities.has(Capabilities::IEEE_8021Q));

    let mut inbound = Inbound::new(len)?;
    if let Some(checksum) = checksum(offload.checksum, behind_tag) {
        inbound.put(PacketInfoKind::Checksum, checksum.0);
    }
    if let Some(info) = part.info(PART_ID) {
        inbound.put(PacketInfoKind::PacketId, info);
    }
    if let Some(tci) = tag {
        inbound.put(PacketInfoKind::Vlan, VlanTag::from_tci(tci).0);
        // The addresses move to where the tag ends.
        inbound.data += TAG as u32;
        inbound.written += TAG + ADDRESSES;
        let (start, end) = (inbound.data as usize, inbound.written);
        inbound.bytes.get_mut(start..end)?.copy_from_slice(peek.get(..ADDRESSES)?);
    }
    inbound.finish()
}

/// Prepares a part of a frame after the first.
pub(super) fn prepare_later(len: u32, last: bool) -> Option<Inbound> {
    let mut inbound = Inbound::new(len)?;
    inbound.put(PacketInfoKind::PacketId, Part::Later { last }.info(PART_ID)?);
    inbound.finish()
}

/// What is known of a frame's checksums. `frame` is its front, without a tag.
fn checksum(checksum: Checksum, frame: &[u8]) -> Option<ReceiveChecksum> {
    let tcp = Some(ReceiveChecksum(ReceiveChecksum::TCP_SUCCEEDED));
    let udp = Some(ReceiveChecksum(ReceiveChecksum::UDP_SUCCEEDED));
    match checksum {
        Checksum::Unknown => None,
        // Where it would go says whose it is, whatever headers are in between.
        Checksum::Partial { offset: 6, .. } => udp,
        Checksum::Partial { .. } => tcp,
        Checksum::Valid => {
            let protocol = match frame.get(ADDRESSES..ADDRESSES + 2)? {
                [0x08, 0x00] => *frame.get(ETHERNET_HEADER + 9)?,
                [0x86, 0xDD] => *frame.get(ETHERNET_HEADER + 6)?,
                _ => return None,
            };
            match protocol {
                6 => tcp,
                17 => udp,
                _ => None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::FromBytes;

    use super::*;

    const ME: [u8; 6] = [2, 0, 0, 0, 0, 7];

    fn wishes(capabilities: u64) -> Wishes {
        Wishes {
            address: MacAddr(ME),
            filter: PacketFilter(PacketFilter::DIRECTED | PacketFilter::BROADCAST),
            capabilities: Capabilities(capabilities),
        }
    }

    fn peek(destination: [u8; 6], rest: &[u8]) -> [u8; PEEK] {
        let mut peek = [0; PEEK];
        peek[..6].copy_from_slice(&destination);
        peek[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        peek[12..12 + rest.len()].copy_from_slice(rest);
        peek
    }

    /// As Linux reads it: the frame's place in the slot and its length, and the pieces of
    /// information.
    fn read(inbound: &Inbound) -> (u32, u32, Vec<(PacketInfoKind, u32)>) {
        let (header, rest) = Header::read_from_prefix(inbound.front()).unwrap();
        assert_eq!((header.kind, header.len), (MessageKind::Packet, inbound.len));
        let (body, _) = PacketBody::read_from_prefix(rest).unwrap();
        assert!(8 + body.data_offset + body.data_len <= inbound.len);
        let mut infos = Vec::new();
        let mut left = &rest[body.info_offset as usize..][..body.info_len as usize];
        while !left.is_empty() {
            let (info, _) = PacketInfo::read_from_prefix(left).unwrap();
            let value = u32::read_from_prefix(&left[info.value_offset as usize..]).unwrap().0;
            infos.push((info.kind, value));
            left = &left[info.size as usize..];
        }
        (8 + body.data_offset, body.data_len, infos)
    }

    #[test]
    fn a_plain_frame() {
        let inbound =
            prepare(&peek(ME, &[8, 6]), 60, Part::Whole, &Offload::NONE, &wishes(0)).unwrap();
        assert_eq!((inbound.len, inbound.front().len()), (156, 96));
        assert_eq!(read(&inbound), (96, 60, vec![]));
    }

    #[test]
    fn frames_that_nobody_wants() {
        for destination in [[2, 0, 0, 0, 0, 8], [1, 0, 0x5E, 0, 0, 1]] {
            let unwanted =
                prepare(&peek(destination, &[]), 60, Part::Whole, &Offload::NONE, &wishes(0));
            assert!(unwanted.is_none());
        }
        assert!(
            prepare(&peek([0xFF; 6], &[]), 60, Part::Whole, &Offload::NONE, &wishes(0)).is_some()
        );
        assert!(prepare(&peek(ME, &[]), 13, Part::Whole, &Offload::NONE, &wishes(0)).is_none());
    }

    #[test]
    fn tags_are_cut_out_for_those_who_take_them_beside() {
        let peek = peek(ME, &[0x81, 0, 0xA1, 0x23, 8, 0]);
        let beside =
            prepare(&peek, 64, Part::Whole, &Offload::NONE, &wishes(Capabilities::IEEE_8021Q))
                .unwrap();
        let tag = (PacketInfoKind::Vlan, 0x123 << 4 | 5);
        assert_eq!(read(&beside), (100, 60, vec![tag]));
        assert_eq!(beside.front()[100..112], peek[..12]);
        let inside = prepare(&peek, 64, Part::Whole, &Offload::NONE, &wishes(0)).unwrap();
        assert_eq!(read(&inside), (96, 64, vec![]));
        assert_eq!(inside.front().len(), 96);
    }

    #[test]
    fn parts_are_told_of() {
        let first = prepare(&peek(ME, &[8, 6]), 900, Part::First, &Offload::NONE, &wishes(0));
        let parts =
            [first.unwrap(), prepare_later(900, false).unwrap(), prepare_later(1, true).unwrap()];
        let told = parts.map(|part| read(&part));
        let id = |flags: u32| vec![(PacketInfoKind::PacketId, 1 | flags << 8 | 1 << 16)];
        assert_eq!(told, [(96, 900, id(3)), (96, 900, id(1)), (96, 1, id(5))]);
    }

    #[test]
    fn checksums_that_were_found_right() {
        let valid = |checksum, rest: &[u8]| {
            let offload = Offload { checksum, segments: None };
            let inbound = prepare(
                &peek(ME, rest),
                100,
                Part::Whole,
                &offload,
                &wishes(Capabilities::IEEE_8021Q),
            );
            read(&inbound.unwrap()).2
        };
        let mut v4 = [8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6];
        let partial = Checksum::Partial { start: 34, offset: 16 };
        let tcp = (PacketInfoKind::Checksum, ReceiveChecksum::TCP_SUCCEEDED);
        let udp = (PacketInfoKind::Checksum, ReceiveChecksum::UDP_SUCCEEDED);
        assert_eq!(valid(partial, &v4), [tcp]);
        assert_eq!(valid(Checksum::Unknown, &v4), []);
        let tagged = [&[0x81, 0, 0, 1][..], &v4].concat();
        assert_eq!(valid(Checksum::Valid, &tagged), [tcp, (PacketInfoKind::Vlan, 1 << 4)]);
        v4[11] = 17;
        assert_eq!(valid(Checksum::Valid, &v4), [udp]);
        v4[11] = 1;
        assert_eq!(valid(Checksum::Valid, &v4), []);
        let v6 = [0x86, 0xDD, 0x60, 0, 0, 0, 0, 0, 17];
        assert_eq!(valid(Checksum::Valid, &v6), [udp]);
        // Behind an extension header.
        let v6 = [0x86, 0xDD, 0x60, 0, 0, 0, 0, 0, 43];
        assert_eq!(valid(Checksum::Valid, &v6), []);
        assert_eq!(valid(Checksum::Partial { start: 62, offset: 6 }, &v6), [udp]);
        assert_eq!(valid(partial, &v6), [tcp]);
    }

    proptest! {
        /// Whatever comes, what the guest is told lies in what it is given.
        #[test]
        fn what_is_told_is_there(
            peek: [u8; PEEK],
            len in 0u32..70000,
            capabilities: u64,
            start: u16,
            offset: u16,
        ) {
            let mut wishes = wishes(capabilities);
            wishes.filter = PacketFilter(PacketFilter::PROMISCUOUS);
            let checksum = Checksum::Partial { start, offset };
            if let Some(inbound) = prepare(&peek, len, Part::First, &Offload { checksum, segments: None }, &wishes) {
                let (at, data_len, _) = read(&inbound);
                prop_assert!(at >= SLOT_HEADER && at + data_len == SLOT_HEADER + len);
                prop_assert!(inbound.front().len() <= SLOT_HEADER as usize + TAG + ADDRESSES);
            }
        }
    }
}
