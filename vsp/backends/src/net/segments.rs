//! Doing in software what an [`Offload`] leaves undone: the segments of a long frame, checksums.
//!
//! A [`Segmenter`] copies headers and leaves payload where it is, so that whoever delivers a frame
//! can cut it on the way.

use std::ops::Range;

use super::checksum::{fold, get, put, sum, word};
use super::headers::{IPV4, IPV6, TCP, UDP, network_layer};
use super::offload::{Checksum, Segmentation};
use super::{Dropped, ETHERNET_HEADER, Offload};

/// Bytes of headers that can be dealt with, Ethernet's to TCP's: the longest IPv4 and TCP headers
/// take 134, and IPv6 may have extensions.
const MAX_HEADERS: usize = 256;

/// Segments of a frame, at most: those of the longest at the smallest MSS that Linux takes (48).
/// A guest could otherwise have us make 65,000 frames out of one.
const MAX_SEGMENTS: usize = 1366;

/// TCP flags that not every segment inherits.
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Finishes one frame: yields what is to be sent in its place.
///
/// ```
/// use backends::net::offload::{Checksum, Offload};
/// use backends::net::segments::Segmenter;
///
/// let mut frame = [0u8; 60];
/// frame[14..].fill(1);
/// let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 6 }, segments: None };
/// let mut segmenter = Segmenter::new(&frame, &offload)?;
/// let segment = segmenter.next(&frame).unwrap();
/// assert_eq!(segment.headers[40..], [0xf2, 0xf2]);
/// assert_eq!(segment.payload, 42..60);
/// assert!(segmenter.next(&frame).is_none());
/// # Ok::<(), backends::net::Dropped>(())
/// ```
#[derive(Clone, Debug)]
pub struct Segmenter {
    headers: [u8; MAX_HEADERS],
    headers_len: usize,
    frame_len: usize,
    /// Where the next segment's payload starts; past the frame when all is done.
    next: usize,
    work: Work,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    /// The frame is as it should be.
    Nothing,
    /// Its checksum goes to this place, and is summed from that one.
    Checksum { start: usize, place: usize },
    /// It is cut.
    Cut(Cut),
}

#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Where the IP header starts, and TCP's or UDP's.
    ip: usize,
    transport: usize,
    v4: bool,
    tcp: bool,
    /// Payload of a segment.
    size: usize,
    /// Segments so far.
    count: u32,
}

/// A frame to send: these headers and that part of the original frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// All that was changed is in here.
    pub headers: &'a [u8],
    /// Of the frame.
    pub payload: Range<usize>,
}

impl Segment<'_> {
    /// Of the whole, in bytes.
    #[allow(clippy::len_without_is_empty, reason = "it has headers")]
    pub fn len(&self) -> usize {
        self.headers.len() + self.payload.len()
    }
}

impl Segmenter {
    /// Looks at a frame and what is left to do to it. Refuses one whose headers are not what its
    /// offload says.
    pub fn new(frame: &[u8], offload: &Offload) -> Result<Self, Dropped> {
        Self::parse(frame, offload).ok_or(Dropped::Malformed)
    }

    fn parse(frame: &[u8], offload: &Offload) -> Option<Self> {
        if frame.len() < ETHERNET_HEADER || !offload.fits(frame.len()) {
            return None;
        }
        let (work, headers_len) = match (offload.checksum, offload.segments) {
            (Checksum::Partial { start, .. }, Some(segments)) => {
                let transport = usize::from(start);
                let (ip, kind) = network_layer(frame)?;
                let v4 = kind == IPV4;
                let tcp = segments.kind != Segmentation::Udp;
                match (segments.kind, kind) {
                    (Segmentation::Tcp4, IPV4) | (Segmentation::Tcp6, IPV6) => {}
                    (Segmentation::Udp, IPV4 | IPV6) => {}
                    _ => return None,
                }
                let shortest = if v4 { 20 } else { 40 };
                if transport < ip + shortest {
                    return None;
                }
                let transport_len = match tcp {
                    true => usize::from(frame.get(transport + 12)? >> 4) * 4,
                    false => 8,
                };
                if tcp && transport_len < 20 {
                    return None;
                }
                let size = usize::from(segments.size);
                let payload = frame.len().checked_sub(transport + transport_len)?;
                if payload.div_ceil(size) > MAX_SEGMENTS {
                    return None;
                }
                let cut = Cut { ip, transport, v4, tcp, size, count: 0 };
                (Work::Cut(cut), transport + transport_len)
            }
            (Checksum::Partial { start, offset }, None) => {
                let start = usize::from(start);
                let place = start + usize::from(offset);
                (Work::Checksum { start, place }, place + 2)
            }
            (_, Some(_)) => return None,
            (_, None) => (Work::Nothing, ETHERNET_HEADER),
        };
        let mut headers = [0; MAX_HEADERS];
        headers.get_mut(..headers_len)?.copy_from_slice(frame.get(..headers_len)?);
        Some(Self { headers, headers_len, frame_len: frame.len(), next: headers_len, work })
    }

    /// The next frame to send in place of `frame`, which is the one that was looked at.
    pub fn next(&mut self, frame: &[u8]) -> Option<Segment<'_>> {
        // A frame without payload is one segment all the same.
        let start = self.next;
        let first = start == self.headers_len;
        if frame.len() != self.frame_len || (start >= self.frame_len && !first) {
            return None;
        }
        let headers = self.headers.get_mut(..self.headers_len)?;
        let end = match &mut self.work {
            Work::Nothing => self.frame_len,
            Work::Checksum { start, place } => {
                let rest = frame.get(self.headers_len..)?;
                let rest = match (self.headers_len - *start) % 2 {
                    0 => sum(rest),
                    _ => sum_odd(rest),
                };
                let sum = sum(headers.get(*start..)?) + rest;
                put(headers, *place, checksum(sum))?;
                self.frame_len
            }
            Work::Cut(cut) => {
                let end = start.saturating_add(cut.size).min(self.frame_len);
                cut.write(
                    headers,
                    frame.get(..self.headers_len)?,
                    frame.get(start..end)?,
                    end == self.frame_len,
                )?;
                cut.count = cut.count.wrapping_add(1);
                end
            }
        };
        self.next = end.max(self.headers_len + 1);
        Some(Segment { headers, payload: start..end })
    }
}

impl Cut {
    /// Makes the headers of the next segment out of the original ones.
    fn write(&self, headers: &mut [u8], original: &[u8], payload: &[u8], last: bool) -> Option<()> {
        let ip_len = u16::try_from(headers.len() - self.ip + payload.len()).ok()?;
        let transport_len = u16::try_from(headers.len() - self.transport + payload.len()).ok()?;
        let (ip, transport) = (self.ip, self.transport);
        let addresses = if self.v4 {
            put(headers, ip + 2, ip_len)?;
            let id = get(original, ip + 4)?.wrapping_add(self.count as u16);
            put(headers, ip + 4, id)?;
            put(headers, ip + 10, 0)?;
            let sum = sum(headers.get(ip..transport)?);
            put(headers, ip + 10, !fold(sum))?;
            ip + 12..ip + 20
        } else {
            put(headers, ip + 4, ip_len - 40)?;
            ip + 8..ip + 40
        };
        let place = if self.tcp {
            let sequence = headers.get_mut(transport + 4..transport + 8)?;
            let first =
                u32::from_be_bytes(original.get(transport + 4..transport + 8)?.try_into().ok()?);
            let skipped = self.count.wrapping_mul(self.size as u32);
            sequence.copy_from_slice(&first.wrapping_add(skipped).to_be_bytes());
            let mut flags = *original.get(transport + 13)?;
            if self.count > 0 {
                flags &= !CWR;
            }
            if !last {
                flags &= !(FIN | PSH);
            }
            *headers.get_mut(transport + 13)? = flags;
            transport + 16
        } else {
            put(headers, transport + 4, transport_len)?;
            transport + 6
        };
        put(headers, place, 0)?;
        let protocol = if self.tcp { TCP } else { UDP };
        let pseudo = sum(headers.get(addresses)?) + word(protocol.into()) + word(transport_len);
        let sum = pseudo + sum(headers.get(transport..)?) + sum(payload);
        put(headers, place, checksum(sum))
    }
}

/// As [`sum`], of bytes that follow an odd number of others.
fn sum_odd(bytes: &[u8]) -> u64 {
    word(fold(sum(bytes)).swap_bytes())
}

/// What goes into a TCP or UDP header; there, 0 would mean that there is none.
fn checksum(sum: u64) -> u16 {
    match !fold(sum) {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::net::offload::Segments;

    /// The checksum of RFC 1071, the slow way.
    fn plain_sum(words: impl Iterator<Item = u8>) -> u16 {
        let bytes: Vec<u8> = words.collect();
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or_default();
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    struct Packet {
        frame: Vec<u8>,
        ip: usize,
        transport: usize,
        v4: bool,
        tcp: bool,
    }

    /// A long frame as a guest makes it, with the sum of the pseudo-header in the checksum's place.
    fn packet(v4: bool, tcp: bool, tag: bool, payload: usize) -> Packet {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if tag {
            frame.extend([0x81, 0, 0, 7]);
        }
        frame.extend(if v4 { IPV4 } else { IPV6 }.to_be_bytes());
        let ip = frame.len();
        let transport_len = if tcp { 32 } else { 8 };
        let rest = (transport_len + payload) as u16;
        if v4 {
            frame.extend([0x45, 0]);
            frame.extend((rest + 20).to_be_bytes());
            frame.extend([0xff, 0xfe, 0x40, 0, 64, if tcp { TCP } else { UDP }, 0, 0]);
            frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        } else {
            frame.extend([0x60, 0, 0, 0]);
            frame.extend(rest.to_be_bytes());
            frame.extend([if tcp { TCP } else { UDP }, 64]);
            frame.extend([0xfd; 16]);
            frame.extend([0xfe; 16]);
        }
        let transport = frame.len();
        if tcp {
            frame.extend([0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0, 0, 0, 0, 9]);
            frame.extend([0x80, CWR | 0x10 | PSH | FIN, 1, 0, 0, 0, 0, 0]);
            frame.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            frame.extend([0x12, 0x34, 0, 80]);
            frame.extend(rest.to_be_bytes());
            frame.extend([0, 0]);
        }
        frame.extend((0..payload).map(|at| (at * 7 + at / 251) as u8));
        Packet { frame, ip, transport, v4, tcp }
    }

    fn offload(packet: &Packet, size: u16) -> Offload {
        let kind = match (packet.tcp, packet.v4) {
            (true, true) => Segmentation::Tcp4,
            (true, false) => Segmentation::Tcp6,
            (false, _) => Segmentation::Udp,
        };
        let offset = if packet.tcp { 16 } else { 6 };
        Offload {
            checksum: Checksum::Partial { start: packet.transport as u16, offset },
            segments: Some(Segments { kind, ecn: true, size, header_len: 0 }),
        }
    }

    /// What a receiver checks: lengths and both checksums.
    fn check(packet: &Packet, bytes: &[u8]) {
        let Packet { ip, transport, v4, tcp, .. } = *packet;
        let rest = (bytes.len() - transport) as u16;
        let addresses = if v4 {
            assert_eq!(usize::from(get(bytes, ip + 2).unwrap()), bytes.len() - ip);
            assert_eq!(plain_sum(bytes[ip..transport].iter().copied()), 0xffff);
            &bytes[ip + 12..ip + 20]
        } else {
            assert_eq!(get(bytes, ip + 4), Some(rest));
            &bytes[ip + 8..ip + 40]
        };
        let pseudo = [0, if tcp { TCP } else { UDP }].into_iter().chain(rest.to_be_bytes());
        let all = addresses.iter().copied().chain(pseudo).chain(bytes[transport..].iter().copied());
        assert_eq!(plain_sum(all), 0xffff);
        if !tcp {
            assert_eq!(get(bytes, transport + 4), Some(rest));
        }
    }

    proptest! {
        /// The segments hold the payload, in order, and each is a frame that a receiver takes.
        #[test]
        fn segments_are_whole_frames(
            v4: bool, tcp: bool, tag: bool, payload in 0usize..9000, size in 48u16..2000,
        ) {
            let packet = packet(v4, tcp, tag, payload);
            let mut segmenter = Segmenter::new(&packet.frame, &offload(&packet, size)).unwrap();
            let headers = packet.frame.len() - payload;
            let mut carried = Vec::new();
            let mut count = 0usize;
            while let Some(segment) = segmenter.next(&packet.frame) {
                prop_assert!(segment.payload.len() <= usize::from(size));
                let bytes = [segment.headers, &packet.frame[segment.payload.clone()]].concat();
                prop_assert_eq!(bytes.len(), segment.len());
                check(&packet, &bytes);
                let last = segment.payload.end == packet.frame.len();
                if tcp {
                    let at = packet.transport;
                    let sequence = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap());
                    let expected = 0xffff_ff00u32.wrapping_add(carried.len() as u32);
                    prop_assert_eq!(sequence, expected);
                    let cwr = if count == 0 { CWR } else { 0 };
                    let end = if last { FIN | PSH } else { 0 };
                    prop_assert_eq!(bytes[at + 13], 0x10 | cwr | end);
                }
                if v4 {
                    let id = get(&bytes, packet.ip + 4).unwrap();
                    prop_assert_eq!(id, 0xfffeu16.wrapping_add(count as u16));
                }
                carried.extend_from_slice(&bytes[headers..]);
                count += 1;
            }
            prop_assert_eq!(count, payload.div_ceil(size.into()).max(1));
            prop_assert_eq!(&carried[..], &packet.frame[headers..]);
        }

        #[test]
        fn a_checksum_is_finished_wherever_it_is(
            frame in prop::collection::vec(any::<u8>(), 20..200), start in 14u16..150, offset in 0u16..30,
        ) {
            let offload = Offload { checksum: Checksum::Partial { start, offset }, segments: None };
            let (start, place) = (usize::from(start), usize::from(start + offset));
            let segmenter = Segmenter::new(&frame, &offload);
            prop_assert_eq!(segmenter.is_ok(), place + 2 <= frame.len());
            let Ok(mut segmenter) = segmenter else { return Ok(()) };
            let segment = segmenter.next(&frame).unwrap();
            let bytes = [segment.headers, &frame[segment.payload.clone()]].concat();
            prop_assert!(segmenter.next(&frame).is_none());
            let mut expected = frame.clone();
            let sum = match !plain_sum(frame[start..].iter().copied()) {
                0 => 0xffff,
                sum => sum,
            };
            put(&mut expected, place, sum);
            prop_assert_eq!(bytes, expected);
        }

        /// Nothing a guest says makes it panic or go on without end.
        #[test]
        fn any_frame_ends(
            frame in prop::collection::vec(any::<u8>(), 0..400), start in 0u16..400, offset in 0u16..40,
            size: u16, kind in 0..4,
        ) {
            let kind = [Segmentation::Tcp4, Segmentation::Tcp6, Segmentation::Udp].get(kind as usize).copied();
            let segments = kind.map(|kind| Segments { kind, ecn: false, size, header_len: 0 });
            let offload = Offload { checksum: Checksum::Partial { start, offset }, segments };
            if let Ok(mut segmenter) = Segmenter::new(&frame, &offload) {
                let mut count = 0;
                while let Some(segment) = segmenter.next(&frame) {
                    prop_assert!(frame.get(segment.payload.clone()).is_some());
                    count += 1;
                }
                prop_assert!((1..=MAX_SEGMENTS).contains(&count));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let four = packet(true, true, false, 3000);
        let refused = |frame: &[u8], offload: Offload| {
            assert_eq!(Segmenter::new(frame, &offload).err(), Some(Dropped::Malformed));
        };
        let good = offload(&four, 1448);
        let with = |kind, size| Offload {
            segments: Some(Segments { kind, ecn: false, size, header_len: 0 }),
            ..good
        };
        refused(&four.frame, with(Segmentation::Tcp6, 1448));
        refused(&four.frame, with(Segmentation::Tcp4, 2));
        refused(&four.frame, Offload { checksum: Checksum::Unknown, ..good });
        let early = Checksum::Partial { start: 20, offset: 16 };
        refused(&four.frame, Offload { checksum: early, ..good });
        let mut short = four.frame.clone();
        short[four.transport + 12] = 0x40;
        refused(&short, good);
        refused(&four.frame[..50], good);
    }
}
