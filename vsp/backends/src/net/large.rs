//! Large sends: what the headers of a packet that a NIC is to cut have to become before a network
//! takes it.
//!
//! Drivers leave out what the NIC puts into each segment anew: IP's length, with it IPv4's checksum,
//! and TCP's or UDP's length in the sum of the pseudo-header (Intel 317453, 3.5; NDIS's LSOv2 likewise).
//! A network, which takes frames as virtio does, wants the headers of one packet that is as long as
//! all of it. Every NIC whose guests send so completes them here.

use super::checksum::{fold, get, put, sum, word};
use super::offload::{Checksum, Segmentation, Segments};
use super::{ETHERNET_HEADER, Offload, Offloads};

/// TCP's flag CWR, in the byte of flags.
const CWR: u8 = 0x80;

/// A packet that is to be cut, as its driver has described it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargePacket {
    /// Of the frame, in bytes.
    pub len: usize,
    /// Where the IP header begins, from the frame's start.
    pub ip: usize,
    /// Where the TCP or UDP header begins.
    pub transport: usize,
    /// IPv4 rather than IPv6.
    pub v4: bool,
    /// TCP rather than UDP.
    pub tcp: bool,
    /// Payload of each segment but the last, in bytes.
    pub size: u16,
}

impl LargePacket {
    /// Completes the headers; `headers` are the frame's first bytes, these or more. Returns what is left
    /// to the network, and how many bytes of headers there are. A packet of one segment is not to be
    /// cut, and of ECN nothing is said unless `takes`, what the network takes, has it.
    ///
    /// `None`: the headers are not what the driver has said, and are of no use now.
    pub fn complete(&self, headers: &mut [u8], takes: Offloads) -> Option<(Offload, usize)> {
        let Self { len, ip, transport, v4, tcp, size } = *self;
        if ip < ETHERNET_HEADER || size == 0 {
            return None;
        }
        let ip_len = u16::try_from(len.checked_sub(ip)?).ok()?;
        let transport_len = u16::try_from(len.checked_sub(transport)?).ok()?;
        let first = *headers.get(ip)?;
        if v4 {
            let header_len = usize::from(first & 0xf) * 4;
            if first >> 4 != 4 || header_len < 20 || transport != ip + header_len {
                return None;
            }
            put(headers, ip + 2, ip_len)?;
            put(headers, ip + 10, 0)?;
            let checksum = !fold(sum(headers.get(ip..transport)?));
            put(headers, ip + 10, checksum)?;
        } else {
            if first >> 4 != 6 || transport < ip + 40 {
                return None;
            }
            put(headers, ip + 4, ip_len.checked_sub(40)?)?;
        }
        let (header_len, offset) = if tcp {
            (usize::from(*headers.get(transport + 12)? >> 4) * 4, 16)
        } else {
            put(headers, transport + 4, transport_len)?;
            (8, 6)
        };
        let headers_len = transport + header_len;
        if tcp && header_len < 20 || headers_len > headers.len() {
            return None;
        }
        let payload = len.checked_sub(headers_len)?;
        let place = transport + usize::from(offset);
        let seed = fold(word(get(headers, place)?) + word(transport_len));
        put(headers, place, seed)?;
        let kind = match (tcp, v4) {
            (false, _) => Segmentation::Udp,
            (true, true) => Segmentation::Tcp4,
            (true, false) => Segmentation::Tcp6,
        };
        let cwr = tcp && *headers.get(transport + 13)? & CWR != 0;
        let segments = Segments {
            kind,
            ecn: cwr && takes.contains(Offloads::TSO_ECN),
            size,
            header_len: u16::try_from(headers_len).ok()?,
        };
        let checksum = Checksum::Partial { start: u16::try_from(transport).ok()?, offset };
        let segments = (payload > usize::from(size)).then_some(segments);
        Some((Offload { checksum, segments }, headers_len))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A packet with options in all headers that can have some, as a driver sends it, and as a network
    /// takes it, for which only IPv4's checksum is missing.
    fn packets(v4: bool, tcp: bool, ip: usize, payload: usize) -> (LargePacket, Vec<u8>, Vec<u8>) {
        let (ip_len, transport_len) = (if v4 { 24 } else { 48 }, if tcp { 32 } else { 8 });
        let transport = ip + ip_len;
        let len = transport + transport_len + payload;
        let mut sent: Vec<u8> = (0..len).map(|at| (at * 7 + at / 251) as u8).collect();
        let place = transport + if tcp { 16 } else { 6 };
        let rest = (len - transport) as u16;
        if v4 {
            sent[ip] = 0x46;
            sent[ip + 2..ip + 4].fill(0);
            sent[ip + 10..ip + 12].fill(0);
        } else {
            sent[ip] = 0x60;
            sent[ip + 4..ip + 6].fill(0);
        }
        if tcp {
            sent[transport + 12] = 0x80;
            sent[transport + 13] = 0x10 | CWR;
        } else {
            sent[transport + 4..transport + 6].fill(0);
        }
        put(&mut sent, place, 0xfff0).unwrap();
        let mut taken = sent.clone();
        if v4 {
            put(&mut taken, ip + 2, (len - ip) as u16).unwrap();
        } else {
            put(&mut taken, ip + 4, (len - ip - 40) as u16).unwrap();
        }
        if !tcp {
            put(&mut taken, transport + 4, rest).unwrap();
        }
        // What carries over is added again.
        let seed = 0xfff0 + u32::from(rest);
        put(&mut taken, place, (seed + (seed >> 16)) as u16).unwrap();
        (LargePacket { len, ip, transport, v4, tcp, size: 1400 }, sent, taken)
    }

    proptest! {
        #[test]
        fn headers_become_those_of_one_long_packet(
            v4: bool, tcp: bool, tag: bool, payload in 0usize..9000, more in 0usize..100,
        ) {
            let ip = if tag { 18 } else { 14 };
            let (packet, mut sent, mut taken) = packets(v4, tcp, ip, payload);
            let expected_len = sent.len() - payload;
            let (headers, rest) = sent.split_at_mut(expected_len + more.min(payload));
            let (offload, headers_len) = packet.complete(headers, Offloads::ALL).unwrap();
            prop_assert_eq!(headers_len, expected_len);
            if v4 {
                prop_assert_eq!(fold(sum(&headers[ip..packet.transport])), 0xffff);
                taken[ip + 10..ip + 12].copy_from_slice(&headers[ip + 10..ip + 12]);
            }
            prop_assert_eq!([&*headers, &*rest].concat(), taken);
            let offset = if tcp { 16 } else { 6 };
            let start = packet.transport as u16;
            prop_assert_eq!(offload.checksum, Checksum::Partial { start, offset });
            let kind = match (tcp, v4) {
                (true, true) => Segmentation::Tcp4,
                (true, false) => Segmentation::Tcp6,
                (false, _) => Segmentation::Udp,
            };
            let header_len = headers_len as u16;
            let segments = Segments { kind, ecn: tcp, size: 1400, header_len };
            prop_assert_eq!(offload.segments, (payload > 1400).then_some(segments));
            prop_assert!(offload.fits(packet.len));
        }

        /// Nothing a guest says makes it panic.
        #[test]
        fn any_headers_end(
            len: usize, ip in 0usize..60, transport: usize, near in 0usize..120, size: u16,
            flags: [bool; 3], headers in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let [v4, tcp, far] = flags;
            let (transport, len) = if far { (transport, len) } else { (ip + near, len % 70_000) };
            let packet = LargePacket { len, ip, transport, v4, tcp, size };
            let mut headers = headers;
            if let Some((offload, headers_len)) = packet.complete(&mut headers, Offloads::ALL) {
                prop_assert!(offload.fits(len) && headers_len <= len.min(headers.len()));
            }
        }
    }

    #[test]
    fn what_is_not_as_it_was_said_is_refused() {
        let (good, sent, _) = packets(true, true, 14, 5000);
        let complete = |packet: LargePacket, change: &dyn Fn(&mut Vec<u8>)| {
            let mut sent = sent.clone();
            change(&mut sent);
            packet.complete(&mut sent, Offloads::ALL).is_some()
        };
        let same = |_: &mut Vec<u8>| {};
        assert!(complete(good, &same));
        assert!(!complete(LargePacket { size: 0, ..good }, &same));
        assert!(!complete(LargePacket { v4: false, ..good }, &same));
        assert!(!complete(LargePacket { ip: 10, transport: 34, ..good }, &same));
        assert!(!complete(LargePacket { transport: 42, ..good }, &same));
        // More than IP can have, less than the headers.
        assert!(!complete(LargePacket { len: 14 + 65536, ..good }, &same));
        assert!(!complete(LargePacket { len: 14 + 24 + 31, ..good }, &same));
        // Lengths of headers that cannot be, and headers that are not all there.
        assert!(!complete(good, &|sent| sent[14] = 0x44));
        assert!(!complete(good, &|sent| sent[38 + 12] = 0x40));
        assert!(!complete(good, &|sent| sent.truncate(69)));
        assert!(complete(good, &|sent| sent.truncate(70)));
        // An extension header may lie between IPv6's and TCP's, which begins behind both.
        let (six, mut sent, _) = packets(false, true, 14, 5000);
        assert!(LargePacket { transport: 53, ..six }.complete(&mut sent, Offloads::ALL).is_none());
    }

    #[test]
    fn ecn_is_left_to_a_network_that_takes_it() {
        let ecn = |takes| {
            let (packet, mut sent, _) = packets(true, true, 14, 5000);
            packet.complete(&mut sent, takes).unwrap().0.segments.unwrap().ecn
        };
        assert!(ecn(Offloads::TSO4 | Offloads::TSO_ECN));
        assert!(!ecn(Offloads::TSO4));
    }
}
