//! What the guest sends: frames, one after the other, in the bytes of one packet.
//!
//! Each is an RNDIS message of three parts: a fixed one, per-packet information, and the frame. The
//! first two are copied out once and checked; the frame stays where it is and goes to the network
//! from there. Only where something in front of it has to change, a tag to be put in, lengths to be
//! filled in before it is cut, or a checksum that the network does not make, its headers are copied
//! ([`Front`]). They are looked at, in a copy, where the guest does not say where TCP or UDP begins:
//! NDIS leaves that to the NIC, and FreeBSD, NetBSD, OpenBSD and illumos leave the offset 0.

use backends::net::checksum::{fold, put, sum};
use backends::net::headers::{Headers, Transport, ipv4_header, network_layer};
use backends::net::large::LargePacket;
use backends::net::offload::Checksum;
use backends::net::{Buffer, ETHERNET_HEADER, MAX_BUFFERS, Offload, Offloads};
use thiserror::Error;
use vmbus::rndis::{
    HEADER_SIZE, Header, LargeSend, MessageKind, PacketBody, PacketInfo, PacketInfoKind,
    TransmitChecksum, VlanTag,
};
use zerocopy::FromBytes;

use super::pages::Reader;

/// The most bytes of per-packet information that a frame can have; Linux sends 64.
const MAX_INFO: usize = 256;
/// The longest headers that are understood: Ethernet's, IP's with options, TCP's with options.
const MAX_HEADERS: usize = 252;
/// Bytes of a VLAN tag.
const TAG: usize = 4;
/// The EtherType in front of a VLAN tag (IEEE 802.1Q).
const TAG_TYPE: u16 = 0x8100;
/// Both Ethernet addresses.
const ADDRESSES: usize = 12;

/// What a NIC takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The longest frame that is not to be cut, with its tags.
    pub max_frame: u32,
    /// What may be left to do.
    pub takes: Offloads,
}

/// A frame to send; its buffers are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outbound {
    /// Bytes.
    pub len: u32,
    /// What is left to do.
    pub offload: Offload,
}

/// The changed front of a frame, for as long as the frame is under way.
#[derive(Debug)]
pub(super) struct Front([u8; MAX_HEADERS + TAG]);

impl Front {
    pub(super) const fn new() -> Self {
        Self([0; _])
    }
}

/// Why a packet's frames were not sent, or not all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Malformed {
    /// A message ends before what it says it has.
    #[error("a message is cut short")]
    Short,
    /// It is not a frame.
    #[error("a message is no frame")]
    Kind,
    /// Parts of a message overlap.
    #[error("parts of a message overlap")]
    Overlap,
    /// Its per-packet information makes no sense.
    #[error("per-packet information makes no sense")]
    Info,
    /// The frame is too short or too long.
    #[error("a frame has an impossible length")]
    Length,
    /// What is left to do to the frame cannot be done.
    #[error("a frame asks for what cannot be done to it")]
    Offload,
    /// There are too many.
    #[error("a packet has too many frames")]
    Count,
    /// It lies in too many pieces.
    #[error("a frame lies in too many pieces")]
    Pieces,
}

/// What per-packet information says.
#[derive(Clone, Copy, Debug, Default)]
struct Info {
    checksum: Option<TransmitChecksum>,
    large: Option<LargeSend>,
    vlan: Option<VlanTag>,
}

/// Takes the next frame of a packet, leaving its memory in `buffers`. `None`: there is no other.
pub(super) fn next_frame(
    reader: &mut Reader<'_>,
    limits: &Limits,
    front: &mut Front,
    buffers: &mut Vec<Buffer>,
) -> Result<Option<Outbound>, Malformed> {
    buffers.clear();
    if reader.left() == 0 {
        return Ok(None);
    }
    let mut message = *reader;
    let mut fixed = [0; HEADER_SIZE + size_of::<PacketBody>()];
    message.read(&mut fixed).ok_or(Malformed::Short)?;
    let (header, body) = fixed.split_at(HEADER_SIZE);
    let header = Header::read_from_bytes(header).map_err(|_| Malformed::Short)?;
    let body = PacketBody::read_from_bytes(body).map_err(|_| Malformed::Short)?;
    if header.kind != MessageKind::Packet {
        return Err(Malformed::Kind);
    }
    let room = header.len.checked_sub(HEADER_SIZE as u32).ok_or(Malformed::Short)?;
    if u64::from(header.len) > reader.left() || (room as usize) < size_of::<PacketBody>() {
        return Err(Malformed::Short);
    }
    let info = read_info(&message, &body, room)?;

    let data_end = body.data_offset.checked_add(body.data_len).ok_or(Malformed::Short)?;
    if data_end > room {
        return Err(Malformed::Short);
    }
    if (body.data_offset as usize) < size_of::<PacketBody>() {
        return Err(Malformed::Overlap);
    }
    let mut frame = *reader;
    frame.skip(HEADER_SIZE as u32 + body.data_offset).ok_or(Malformed::Short)?;
    let outbound = place(frame, body.data_len, info, limits, front, buffers)?;
    reader.skip(header.len).ok_or(Malformed::Short)?;
    Ok(Some(outbound))
}

/// Reads the per-packet information of a message whose body is `room` bytes long and whose fixed
/// part has been read.
fn read_info(message: &Reader<'_>, body: &PacketBody, room: u32) -> Result<Info, Malformed> {
    let mut info = Info::default();
    if body.info_len == 0 {
        return Ok(info);
    }
    let end = body.info_offset.checked_add(body.info_len).ok_or(Malformed::Short)?;
    let behind = body.info_offset.checked_sub(size_of::<PacketBody>() as u32);
    let behind = behind.ok_or(Malformed::Overlap)?;
    if end > room {
        return Err(Malformed::Short);
    }
    let data_end = body.data_offset.checked_add(body.data_len).ok_or(Malformed::Short)?;
    if body.data_offset < end && body.info_offset < data_end {
        return Err(Malformed::Overlap);
    }
    let mut bytes = [0; MAX_INFO];
    let bytes = bytes.get_mut(..body.info_len as usize).ok_or(Malformed::Info)?;
    let mut reader = *message;
    reader.skip(behind).ok_or(Malformed::Short)?;
    reader.read(bytes).ok_or(Malformed::Short)?;

    let mut left: &[u8] = bytes;
    while !left.is_empty() {
        let (piece, _) = PacketInfo::read_from_prefix(left).map_err(|_| Malformed::Info)?;
        // An entry is at least as long as its front, so this ends.
        if (piece.size as usize) < size_of::<PacketInfo>() {
            return Err(Malformed::Info);
        }
        let (entry, rest) = left.split_at_checked(piece.size as usize).ok_or(Malformed::Info)?;
        left = rest;
        let value = || {
            if (piece.value_offset as usize) < size_of::<PacketInfo>() {
                return Err(Malformed::Info);
            }
            let value = entry.get(piece.value_offset as usize..).and_then(<[u8]>::first_chunk);
            value.map(|value| u32::from_le_bytes(*value)).ok_or(Malformed::Info)
        };
        match piece.kind {
            PacketInfoKind::Checksum => info.checksum = Some(TransmitChecksum(value()?)),
            PacketInfoKind::LargeSend => info.large = Some(LargeSend(value()?)),
            PacketInfoKind::Vlan => info.vlan = Some(VlanTag(value()?)),
            _ => {}
        }
    }
    Ok(info)
}

/// Finds the memory of a frame of `len` bytes that begins at `frame`, and says what is left to do.
fn place(
    mut frame: Reader<'_>,
    len: u32,
    info: Info,
    limits: &Limits,
    front: &mut Front,
    buffers: &mut Vec<Buffer>,
) -> Result<Outbound, Malformed> {
    let tag = if info.vlan.is_some() { TAG as u32 } else { 0 };
    if (len as usize) < ETHERNET_HEADER {
        return Err(Malformed::Length);
    }
    let mut offload = Offload::NONE;
    // How many bytes of the frame are taken from `front`.
    let mut copied = 0;
    if let Some(large) = info.large {
        let headers = len.min(MAX_HEADERS as u32) as usize;
        let headers = front.0.get_mut(..headers).ok_or(Malformed::Length)?;
        frame.clone().read(headers).ok_or(Malformed::Short)?;
        (offload, copied) = prepare_large(headers, len, large, limits).ok_or(Malformed::Offload)?;
    } else {
        if len + tag > limits.max_frame {
            return Err(Malformed::Length);
        }
        if let Some(checksum) = info.checksum.filter(|checksum| asks(*checksum)) {
            (offload, copied) = checksums(frame, len, checksum, limits, front)?;
        }
        if info.vlan.is_some() && copied == 0 {
            copied = ADDRESSES;
            let addresses = front.0.get_mut(..copied).ok_or(Malformed::Length)?;
            frame.clone().read(addresses).ok_or(Malformed::Short)?;
        }
    }
    frame.skip(copied as u32).ok_or(Malformed::Short)?;
    let rest = len - copied as u32;
    if let Some(vlan) = info.vlan {
        front.0.copy_within(ADDRESSES..copied, ADDRESSES + TAG);
        let [a, b] = TAG_TYPE.to_be_bytes();
        let [c, d] = vlan.tci().to_be_bytes();
        if let Some(place) = front.0.get_mut(ADDRESSES..ADDRESSES + TAG) {
            place.copy_from_slice(&[a, b, c, d]);
        }
        copied += TAG;
        offload = offload.shifted(TAG as u16);
    }
    if copied > 0 {
        let bytes = front.0.get_mut(..copied).ok_or(Malformed::Length)?;
        buffers.push(bytes.into());
    }
    frame.buffers(rest, buffers).ok_or(Malformed::Short)?;
    if buffers.len() > MAX_BUFFERS {
        return Err(Malformed::Pieces);
    }
    let len = len + tag;
    if !offload.fits(len as usize) || !limits.takes.contains(offload.needs()) {
        return Err(Malformed::Offload);
    }
    Ok(Outbound { len, offload })
}

/// Whether a checksum is to be made.
fn asks(checksum: TransmitChecksum) -> bool {
    // Any of them.
    let any = TransmitChecksum::TCP | TransmitChecksum::UDP | TransmitChecksum::IP_HEADER;
    checksum.has(any)
}

/// Sees to the checksums of a frame of `len` bytes that begins at `frame`. Returns what is left to the
/// network, and how many of the first bytes are in `front`, changed.
///
/// The guest has put the pseudo-header's sum where TCP's or UDP's goes.
fn checksums(
    frame: Reader<'_>,
    len: u32,
    checksum: TransmitChecksum,
    limits: &Limits,
    front: &mut Front,
) -> Result<(Offload, usize), Malformed> {
    let kind = if checksum.has(TransmitChecksum::TCP) {
        Some(Transport::Tcp)
    } else {
        checksum.has(TransmitChecksum::UDP).then_some(Transport::Udp)
    };
    let said = checksum.transport_offset();
    let in_software = kind.is_some() && !limits.takes.contains(Offloads::CHECKSUM);
    let ip_header = checksum.has(TransmitChecksum::IP_HEADER);
    if kind.is_some() && said > 0 && !in_software && !ip_header {
        return Ok((partial(said, kind).ok_or(Malformed::Offload)?, 0));
    }
    let headers = front.0.get_mut(..len.min(MAX_HEADERS as u32) as usize);
    let headers = headers.ok_or(Malformed::Length)?;
    frame.clone().read(headers).ok_or(Malformed::Short)?;
    let start = match (kind, said) {
        (None, _) => 0,
        (Some(_), 1..) => said,
        (Some(kind), 0) => {
            let found = Headers::find(headers).filter(|found| found.kind == kind);
            let found = found.ok_or(Malformed::Offload)?;
            u16::try_from(found.transport).map_err(|_| Malformed::Offload)?
        }
    };
    let mut offload = partial(start, kind).ok_or(Malformed::Offload)?;
    let mut copied = 0;
    // An IPv6 header has none, and some guests ask for it all the same.
    if ip_header && let Some((ip, end)) = ipv4_header(headers) {
        put(headers, ip + 10, 0).ok_or(Malformed::Offload)?;
        let header = headers.get(ip..end).ok_or(Malformed::Offload)?;
        let made = !fold(sum(header));
        put(headers, ip + 10, made).ok_or(Malformed::Offload)?;
        copied = end;
    }
    if in_software && let Checksum::Partial { start, offset } = offload.checksum {
        let place = usize::from(start) + usize::from(offset);
        let made = sum_of(frame, start.into(), len).ok_or(Malformed::Offload)?;
        // In UDP, 0 would mean that there is none.
        let made = if made == 0 { 0xffff } else { made };
        put(headers, place, made).ok_or(Malformed::Offload)?;
        copied = copied.max(place + 2);
        offload = Offload::NONE;
    }
    Ok((offload, copied))
}

/// The checksum of the bytes from `start` to the end of a frame of `len` bytes.
fn sum_of(mut frame: Reader<'_>, start: u32, len: u32) -> Option<u16> {
    let mut left = len.checked_sub(start)?;
    frame.skip(start)?;
    let mut all = 0;
    let mut chunk = [0; 512];
    while left > 0 {
        // All but the last have an even length, so that sums are added like numbers.
        let now = chunk.get_mut(..left.min(512) as usize)?;
        frame.read(now)?;
        left -= now.len() as u32;
        all += sum(now);
    }
    Some(!fold(all))
}

/// That a checksum is left to the network, if one is to be made of what begins at `start`.
fn partial(start: u16, kind: Option<Transport>) -> Option<Offload> {
    let Some(kind) = kind else { return Some(Offload::NONE) };
    let checksum = Checksum::Partial { start, offset: kind.checksum_offset() };
    (usize::from(start) > ETHERNET_HEADER).then_some(Offload { checksum, ..Offload::NONE })
}

/// Makes the headers of a frame of `len` bytes that is to be cut what the network takes. Returns what
/// is left to it, and how many bytes of headers there are.
fn prepare_large(
    headers: &mut [u8],
    len: u32,
    large: LargeSend,
    limits: &Limits,
) -> Option<(Offload, usize)> {
    if !large.is_v2() {
        return None;
    }
    let (ip, _) = network_layer(headers)?;
    let transport = match large.transport_offset() {
        0 => Headers::find(headers).filter(|found| found.kind == Transport::Tcp)?.transport,
        said => said.into(),
    };
    let packet = LargePacket {
        len: len as usize,
        ip,
        transport,
        v4: !large.is_ipv6(),
        tcp: true,
        size: u16::try_from(large.segment_size()).ok()?,
    };
    packet.complete(headers, limits.takes)
}

#[cfg(test)]
mod tests;
