//! From descriptors to packets: what lies where, and what the driver wants done to it.
//!
//! A packet lies in the buffers of one or more descriptors, up to the one that says it is the end.
//! A legacy descriptor says by itself what is to be done. An extended one refers to a *context*, a
//! descriptor without a buffer that counts for all packets until the next of its kind; there is one
//! for packets that are cut, and one for those that are not (Intel 317453, 3.3.3 to 3.3.7).
//!
//! A descriptor is read once, before it comes here. What a packet's descriptors contradict each other
//! in makes it a bad one, which is not sent but given back.

use backends::net::{Buffer, MAX_BUFFERS, MAX_FRAME};
use hypervisor::{Gpa, GuestMemory};

use super::super::bits::txd;
use super::super::descriptors::{Context, Kind, Raw};
use super::Malformed;
use super::headers::Work;
use super::packets::Reports;

/// What a packet's descriptors have said so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Gathered {
    /// The last context of packets that are not cut, and that of those that are.
    contexts: [Context; 2],
    /// The first descriptor, contexts before the packet included, and how many.
    pub first: u32,
    pub descriptors: u32,
    pieces: Vec<(u64, u32)>,
    /// Bytes.
    pub len: usize,
    /// The first of its data descriptors, if these are extended: POPTS, and whether it is to be cut.
    options: Option<(u8, bool)>,
    /// A legacy checksum: where it begins and where it goes.
    legacy: Option<(usize, usize)>,
    /// Tag control information, if it is to have a VLAN tag.
    pub tag: Option<u16>,
    /// It is all there.
    pub whole: bool,
    pub bad: bool,
    pub reports: Reports,
}

impl Gathered {
    /// Begins with the next packet. Contexts stay.
    pub(super) fn clear(&mut self) {
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        *self = Self { contexts: self.contexts, pieces, ..Self::default() };
    }

    /// Adds descriptor number `index`.
    pub(super) fn add(&mut self, index: u32, raw: Raw) {
        if self.descriptors == 0 {
            self.first = index;
        }
        self.descriptors += 1;
        // What was the last one no longer is.
        self.reports.others |= self.reports.last;
        let command = raw.command();
        self.reports.last = command & txd::RS != 0;
        let (address, len, special) = match raw.kind() {
            Kind::Context(context) => {
                self.contexts[usize::from(context.tucmd() & txd::TSE != 0)] = context;
                return;
            }
            Kind::Unknown => {
                self.bad = true;
                self.whole = command & txd::EOP != 0;
                return;
            }
            Kind::Legacy(legacy) => {
                if command & (txd::EOP | txd::IC) == txd::EOP | txd::IC {
                    let (start, place) = (legacy.checksum_start, legacy.checksum_offset);
                    self.legacy = Some((start.into(), place.into()));
                }
                (legacy.address, legacy.length.into(), legacy.special)
            }
            Kind::Data(data) => {
                self.options.get_or_insert((data.options, command & txd::TSE != 0));
                (data.address, data.length(), data.special)
            }
        };
        if len > 0 {
            self.len += len as usize;
            if self.len > MAX_FRAME {
                self.bad = true;
            }
            // A frame of the greatest length in the smallest pieces that make sense.
            if self.pieces.len() < 4 * MAX_BUFFERS && !self.bad {
                self.pieces.push((address, len));
            } else {
                self.bad = true;
            }
        }
        if command & txd::EOP != 0 {
            self.whole = true;
            self.tag = (command & txd::VLE != 0).then_some(special);
            self.reports.later = command & txd::IDE != 0;
        }
    }

    /// What the packet's first descriptor and its context ask for.
    pub(super) fn work(&self) -> Result<Work, Malformed> {
        let len = self.len;
        let mut work = Work::default();
        if let Some((start, place)) = self.legacy {
            work.transport = Some((start, place, len));
        }
        let Some((options, cut)) = self.options else { return Ok(work) };
        let context = self.contexts[usize::from(cut)];
        if cut {
            if usize::from(context.header_len) > len || context.segment_size == 0 {
                return Err(Malformed);
            }
            work.cut = Some(context);
            return Ok(work);
        }
        let span = |start: u8, place: u8, end: u16| {
            let end = if end == 0 { len } else { usize::from(end) + 1 };
            (usize::from(start), usize::from(place), end)
        };
        let Context { ip_start, ip_offset, ip_end, .. } = context;
        let Context { transport_start, transport_offset, transport_end, .. } = context;
        if options & txd::POPTS_IXSM != 0 {
            work.ip = Some(span(ip_start, ip_offset, ip_end));
        }
        if options & txd::POPTS_TXSM != 0 {
            work.transport = Some(span(transport_start, transport_offset, transport_end));
        }
        for (_, place, end) in work.ip.iter().chain(&work.transport) {
            if *end > len || place + 2 > len {
                return Err(Malformed);
            }
        }
        Ok(work)
    }

    /// Reads the packet's bytes from `skip` on.
    pub(super) fn read(
        &self,
        skip: usize,
        into: &mut [u8],
        memory: &GuestMemory,
    ) -> Result<(), Malformed> {
        let mut skip = skip;
        let mut left = into;
        for (address, len) in &self.pieces {
            if left.is_empty() {
                break;
            }
            let len = *len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let (now, later) = left.split_at_mut((len - skip).min(left.len()));
            let from = address.checked_add(skip as u64).ok_or(Malformed)?;
            memory.read(Gpa(from), now).map_err(|_| Malformed)?;
            skip = 0;
            left = later;
        }
        if left.is_empty() { Ok(()) } else { Err(Malformed) }
    }

    /// Adds the memory of the packet's bytes from `skip` on to the buffers.
    pub(super) fn buffers(
        &self,
        skip: usize,
        memory: &GuestMemory,
        buffers: &mut Vec<Buffer>,
    ) -> Result<(), Malformed> {
        let mut skip = skip;
        for (address, len) in &self.pieces {
            let len = *len as usize;
            let slice = memory.slice(Gpa(*address), len).ok_or(Malformed)?;
            if skip >= len {
                skip -= len;
                continue;
            }
            let start = slice.ptr_guard_mut().as_ptr().wrapping_add(skip);
            buffers.push(Buffer::new(start, len - skip));
            skip = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::super::super::descriptors::{Data, Legacy};
    use super::*;

    fn raw(descriptor: &(impl IntoBytes + Immutable)) -> Raw {
        Raw::read_from_bytes(descriptor.as_bytes()).unwrap()
    }

    fn data(address: u64, len: u32, command: u8, options: u8) -> Raw {
        let command = u32::from(command | txd::DEXT) << 24;
        let lower = len | u32::from(txd::DTYP_DATA) << 20 | command;
        raw(&Data { address, lower, status: 0, options, special: 0x123 })
    }

    fn context(tucmd: u8, header_len: u8, segment_size: u16) -> Raw {
        raw(&Context {
            ip_start: 14,
            ip_offset: 24,
            ip_end: 33,
            transport_start: 34,
            transport_offset: 50,
            transport_end: 0,
            command: u32::from(tucmd | txd::DEXT) << 24,
            header_len,
            segment_size,
            ..Context::default()
        })
    }

    #[test]
    fn a_packet_ends_where_its_descriptors_say() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let bytes: Vec<u8> = (0..200).collect();
        memory.write(Gpa(0x1000), &bytes[..120]).unwrap();
        memory.write(Gpa(0x3000), &bytes[120..]).unwrap();
        let mut gathered = Gathered::default();
        for (index, raw) in [
            context(0, 0, 0),
            data(0x1000, 120, txd::RS, txd::POPTS_IXSM | txd::POPTS_TXSM),
            // Only the first one's options count.
            data(0x3000, 80, txd::EOP | txd::VLE | txd::IDE, 0),
        ]
        .into_iter()
        .enumerate()
        {
            assert!(!gathered.whole);
            gathered.add(5 + index as u32, raw);
        }
        assert!(gathered.whole && !gathered.bad);
        assert_eq!((gathered.first, gathered.descriptors, gathered.len), (5, 3, 200));
        assert_eq!(gathered.tag, Some(0x123));
        assert_eq!(gathered.reports, Reports { last: false, others: true, later: true });
        let work = gathered.work().unwrap();
        assert_eq!((work.ip, work.transport), (Some((14, 24, 34)), Some((34, 50, 200))));

        for skip in [0, 1, 119, 120, 199] {
            let mut read = vec![0; 200 - skip];
            gathered.read(skip, &mut read, &memory).unwrap();
            assert_eq!(read, bytes[skip..]);
            let mut buffers = Vec::new();
            gathered.buffers(skip, &memory, &mut buffers).unwrap();
            assert_eq!(buffers.iter().map(Buffer::len).sum::<usize>(), 200 - skip);
            assert_eq!(buffers.len(), if skip < 120 { 2 } else { 1 });
        }
        assert_eq!(gathered.read(1, &mut [0; 200], &memory), Err(Malformed));
    }

    #[test]
    fn contexts_count_for_the_packets_that_follow() {
        let mut gathered = Gathered::default();
        gathered.add(0, context(txd::TSE, 54, 1400));
        for _ in 0..2 {
            gathered.add(1, data(0x1000, 3000, txd::EOP | txd::TSE, 0));
            let cut = gathered.work().unwrap().cut.unwrap();
            assert_eq!((cut.header_len, cut.segment_size), (54, 1400));
            gathered.clear();
        }
        // Packets that are not cut have another, which nobody has set.
        gathered.add(2, data(0x1000, 3000, txd::EOP, 0));
        assert_eq!(gathered.work().unwrap().cut, None);
        gathered.clear();
        // Longer headers than the packet is.
        gathered.add(3, data(0x1000, 53, txd::EOP | txd::TSE, 0));
        assert_eq!(gathered.work().err(), Some(Malformed));
    }

    #[test]
    fn legacy_descriptors_say_it_themselves() {
        let mut gathered = Gathered::default();
        let legacy = Legacy {
            address: 0x1000,
            length: 100,
            checksum_offset: 50,
            command: txd::EOP | txd::IC | txd::RS,
            status: 0,
            checksum_start: 34,
            special: 7,
        };
        gathered.add(0, raw(&legacy));
        assert!(gathered.whole && gathered.reports.last);
        assert_eq!(gathered.tag, None);
        let work = gathered.work().unwrap();
        assert_eq!((work.ip, work.transport), (None, Some((34, 50, 100))));
    }

    #[test]
    fn what_cannot_be_sent_is_bad() {
        let mut gathered = Gathered::default();
        gathered.add(0, data(0x1000, MAX_FRAME as u32 + 1, 0, 0));
        assert!(gathered.bad && !gathered.whole);
        gathered.clear();
        for _ in 0..4 * MAX_BUFFERS {
            gathered.add(0, data(0x1000, 1, 0, 0));
        }
        assert!(!gathered.bad);
        gathered.add(0, data(0x1000, 1, txd::EOP, 0));
        assert!(gathered.bad && gathered.whole);
        gathered.clear();
        let unknown = 7 << 20 | u32::from(txd::DEXT | txd::EOP) << 24;
        gathered.add(0, Raw { low: 0, lower: unknown, upper: 0 });
        assert!(gathered.bad && gathered.whole);
    }
}
