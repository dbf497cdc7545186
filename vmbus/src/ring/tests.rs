use std::collections::VecDeque;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::mapped::SingleMapped;
use crate::packet::{GpaRange, Segment, TransferRange, write_gpa_ranges, write_transfer_pages};

/// A ring in the test's own memory.
struct Memory {
    control: Control,
    data: Vec<AtomicU64>,
}

impl Memory {
    fn new(bytes: usize) -> Self {
        Self {
            control: Control::new(),
            data: (0..bytes / 8).map(|_| AtomicU64::new(u64::MAX)).collect(),
        }
    }

    fn ends(&self) -> (Outgoing<SingleMapped<'_>>, Incoming<SingleMapped<'_>>) {
        let memory = SingleMapped { control: &self.control, data: &self.data };
        (Outgoing::new(memory).unwrap(), Incoming::new(memory).unwrap())
    }

    fn set(&self, word: &AtomicU32, value: u32) {
        word.store(value, Ordering::Relaxed);
    }
}

fn push(ring: &mut Outgoing<SingleMapped<'_>>, id: u64, len: usize) -> Result<(), PushError> {
    ring.push(PacketKind::InBand, PacketFlags::NONE, id, &[&vec![id as u8; len]])
}

#[test]
fn a_packet_lies_as_linux_reads_it() {
    let memory = Memory::new(128);
    let (mut out, _) = memory.ends();
    let parts: [&[u8]; 3] = [b"abc", b"defghi", b"jk"];
    out.push(PacketKind::Completion, PacketFlags(0x5), 0x1122_3344_5566_7788, &parts).unwrap();
    assert_eq!(memory.control.write_index.load(Ordering::Relaxed), 0, "not published yet");
    assert!(out.publish());
    let words: Vec<u64> = memory.data.iter().map(|w| w.load(Ordering::Relaxed)).collect();
    assert_eq!(words[0], 0x0005_0004_0002_000b, "type 11, offset 2, length 4, flags 5");
    assert_eq!(words[1], 0x1122_3344_5566_7788);
    assert_eq!(words[2].to_le_bytes(), *b"abcdefgh");
    assert_eq!(words[3].to_le_bytes(), *b"ijk\0\0\0\0\0");
    assert_eq!(words[4], 0, "the trailer holds where the packet began, in its upper half");
    assert_eq!(words[5], u64::MAX, "nothing after it");
    assert_eq!(memory.control.write_index.load(Ordering::Relaxed), 40);

    out.push(PacketKind::InBand, PacketFlags::NONE, 1, &[]).unwrap();
    let _ = out.publish();
    assert_eq!(memory.data[7].load(Ordering::Relaxed), 40 << 32);
}

#[test]
fn a_ring_is_never_filled() {
    let memory = Memory::new(96);
    let (mut out, mut incoming) = memory.ends();
    assert_eq!(out.free(), Ok(88));
    // 24 bytes each without payload: three leave 24, which would fill it.
    for id in 0..3 {
        push(&mut out, id, 0).unwrap();
    }
    assert_eq!(out.free(), Ok(16));
    assert_eq!(push(&mut out, 3, 0), Err(PushError::Full));
    assert!(out.publish());
    let mut buffer = [0; 8];
    for id in 0..3 {
        assert_eq!(incoming.read(&mut buffer).unwrap().unwrap().transaction_id, id);
    }
    assert!(incoming.read(&mut buffer).unwrap().is_none());
    assert_eq!(push(&mut out, 3, 0), Err(PushError::Full), "the room is not given back yet");
    assert!(!incoming.publish());
    push(&mut out, 3, 0).unwrap();
}

#[test]
fn what_can_never_fit_is_no_matter_of_waiting() {
    let memory = Memory::new(96);
    let (mut out, _) = memory.ends();
    assert_eq!(push(&mut out, 0, 64), Ok(()), "88 bytes of 96");
    assert_eq!(push(&mut out, 0, 65), Err(PushError::Packet));
    let odd = out.push_with_headers(PacketKind::GpaDirect, PacketFlags::NONE, 0, &[0; 4], &[]);
    assert_eq!(odd, Err(PushError::Packet));
    let memory = Memory::new(1 << 20);
    let (mut out, _) = memory.ends();
    assert_eq!(push(&mut out, 0, 65535 * 8 - 16), Ok(()));
    assert_eq!(push(&mut out, 0, 65535 * 8 - 15), Err(PushError::Packet), "16 bits of words");
}

#[test]
fn signals_only_into_an_empty_ring_and_unmasked() {
    let memory = Memory::new(512);
    let (mut out, mut incoming) = memory.ends();
    let mut buffer = [0; 8];
    assert!(!out.publish(), "nothing to show");
    push(&mut out, 0, 0).unwrap();
    push(&mut out, 1, 0).unwrap();
    assert!(out.publish(), "the first batch wakes");
    push(&mut out, 2, 0).unwrap();
    assert!(!out.publish(), "the consumer has not seen the first batch yet");
    while incoming.read(&mut buffer).unwrap().is_some() {}
    let _ = incoming.publish();
    incoming.mask();
    push(&mut out, 3, 0).unwrap();
    assert!(!out.publish(), "masked");
    assert!(incoming.unmask(), "and it lies there");
    while incoming.read(&mut buffer).unwrap().is_some() {}
    let _ = incoming.publish();
    assert!(!incoming.unmask());
    push(&mut out, 4, 0).unwrap();
    assert!(out.publish());
}

#[test]
fn a_waiting_producer_is_signalled_once_when_there_is_strictly_more_room() {
    let memory = Memory::new(240);
    let (mut out, mut incoming) = memory.ends();
    let mut buffer = [0; 8];
    // Nine packets of 24 bytes leave 24 free, of which 8 stay.
    for id in 0..9 {
        push(&mut out, id, 0).unwrap();
    }
    let _ = out.publish();
    let mut take = || {
        incoming.read(&mut buffer).unwrap().unwrap();
        incoming.publish()
    };
    assert_eq!(out.set_pending_send(72), Ok(false));
    assert!(!take(), "48 free");
    assert!(!take(), "72 free is not more than 72");
    assert!(take(), "96 free");
    assert!(!take(), "it was told");
    assert_eq!(out.set_pending_send(72), Ok(true), "there is room already");
    assert_eq!(out.set_pending_send(200), Ok(false));
    memory.set(&memory.control.feature_bits, 0);
    for _ in 0..5 {
        assert!(!take(), "this ring does not know of pending sizes");
    }
    assert!(!out.honours_pending_send());
}

#[test]
fn broken_indices_are_errors() {
    let memory = Memory::new(128);
    let mut buffer = [0; 128];
    for bad in [4, 128, 136, u32::MAX, 1] {
        let (mut out, mut incoming) = memory.ends();
        memory.set(&memory.control.write_index, bad);
        let error = RingError::Index { index: bad, size: 128 };
        assert_eq!(incoming.read(&mut buffer).unwrap_err(), error);
        memory.set(&memory.control.read_index, bad);
        assert_eq!(out.free(), Err(error));
        for id in 0..5 {
            let pushed = push(&mut out, id, 0);
            assert_eq!(pushed, if id < 5 { Ok(()) } else { Err(PushError::Ring(error)) });
        }
        assert_eq!(push(&mut out, 5, 0), Err(PushError::Ring(error)));
        assert!(
            Outgoing::new(SingleMapped { control: &memory.control, data: &memory.data }).is_err()
        );
        assert!(
            Incoming::new(SingleMapped { control: &memory.control, data: &memory.data }).is_err()
        );
        memory.set(&memory.control.write_index, 0);
        memory.set(&memory.control.read_index, 0);
    }
}

#[test]
fn broken_descriptors_are_errors() {
    let descriptor = |offset8: u64, len8: u64| 6 | offset8 << 16 | len8 << 32;
    let mut buffer = [0; 16];
    for (word, error) in [
        (descriptor(2, 0), PacketError::Descriptor { offset8: 2, len8: 0 }),
        (descriptor(2, 1), PacketError::Descriptor { offset8: 2, len8: 1 }),
        (descriptor(1, 3), PacketError::Descriptor { offset8: 1, len8: 3 }),
        (descriptor(4, 3), PacketError::Descriptor { offset8: 4, len8: 3 }),
        (descriptor(2, 12), PacketError::PastWriteIndex { len: 104, available: 96 }),
        (descriptor(2, 65535), PacketError::PastWriteIndex { len: 524_288, available: 96 }),
        (descriptor(2, 5), PacketError::TooLong { len: 24 }),
    ] {
        let memory = Memory::new(128);
        let (_, mut incoming) = memory.ends();
        memory.data[0].store(word, Ordering::Relaxed);
        memory.set(&memory.control.write_index, 96);
        assert_eq!(incoming.read(&mut buffer).unwrap_err(), RingError::Packet(error));
    }
}

#[test]
fn sizes_without_room_for_a_packet_are_refused() {
    for bytes in [0, 8, 24] {
        let memory = Memory::new(bytes);
        let ring = Incoming::new(SingleMapped { control: &memory.control, data: &memory.data });
        assert_eq!(ring.unwrap_err(), RingError::Size(bytes));
    }
    Memory::new(32).ends();
}

#[test]
fn page_ranges_come_through() {
    let memory = Memory::new(1024);
    let (mut out, mut incoming) = memory.ends();
    let ranges: [(u32, u32, &[u64]); 4] = [
        (512, 0x800, &[7]),
        (0x2801, 0x7ff, &[1, 2, 3]),
        (0, 0, &[]),
        (10, 0x1ffc, &[9, 4, u64::MAX]),
    ];
    let mut headers = [0; 256];
    let headers = write_gpa_ranges(&mut headers, &ranges).unwrap();
    let flags = PacketFlags::COMPLETION_REQUESTED;
    out.push_with_headers(PacketKind::GpaDirect, flags, 3, headers, &[b"payload"]).unwrap();
    let _ = out.publish();

    let mut buffer = [0; 256];
    let packet = incoming.read(&mut buffer).unwrap().unwrap();
    assert!(packet.flags.completion_requested());
    assert_eq!(packet.payload, b"payload\0");
    let ranges: Vec<GpaRange<'_>> = packet.gpa_ranges().unwrap().collect();
    let segments = |i: usize| ranges[i].segments().map(|s| (s.gpa, s.len)).collect::<Vec<_>>();
    assert_eq!(ranges.len(), 4);
    assert_eq!(segments(0), [(0x7800, 512)]);
    assert_eq!(segments(1), [(0x17ff, 0x2801)], "neighbours are one stretch");
    assert_eq!(ranges[1].pfns().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(segments(2), []);
    // The first page is skipped by the offset; an impossible page is an impossible address.
    assert_eq!((ranges[3].offset, ranges[3].pfns().len()), (0xffc, 2));
    assert_eq!(segments(3), [(0x4ffc, 4), (u64::MAX, 6)]);
    assert_eq!(packet.transfer_pages().unwrap_err(), PacketError::Kind(9));
}

#[test]
fn page_ranges_past_the_headers_are_refused() {
    let mut buffer = [0; 64];
    let whole = write_gpa_ranges(&mut buffer, &[(8192, 0, &[1, 2])]).unwrap().to_vec();
    let descriptor = |len: usize| Descriptor {
        kind: PacketKind::GpaDirect,
        offset8: 2 + (len / 8) as u16,
        len8: 2 + (len / 8) as u16,
        flags: PacketFlags::NONE,
        transaction_id: 0,
    };
    for len in (0..whole.len()).step_by(8) {
        let packet = Packet::new(descriptor(len), &whole[..len]).unwrap();
        assert_eq!(packet.gpa_ranges().unwrap_err(), PacketError::Ranges, "{len}");
    }
    let packet = Packet::new(descriptor(whole.len()), &whole).unwrap();
    assert_eq!(packet.gpa_ranges().unwrap().count(), 1);
    // Four thousand million ranges, or bytes.
    for at in [4, 8] {
        let mut wild = whole.clone();
        wild[at..at + 4].copy_from_slice(&[0xff; 4]);
        let packet = Packet::new(descriptor(wild.len()), &wild).unwrap();
        assert_eq!(packet.gpa_ranges().unwrap_err(), PacketError::Ranges);
    }
}

#[test]
fn transfer_pages_come_through() {
    let memory = Memory::new(256);
    let (mut out, mut incoming) = memory.ends();
    let sent = [TransferRange { len: 60, offset: 0 }, TransferRange { len: 1514, offset: 4096 }];
    let mut headers = [0; 64];
    let headers = write_transfer_pages(&mut headers, 0xcafe, &sent).unwrap();
    out.push_with_headers(PacketKind::TransferPages, PacketFlags::NONE, 1, headers, &[b"x"])
        .unwrap();
    let _ = out.publish();
    let mut buffer = [0; 64];
    let packet = incoming.read(&mut buffer).unwrap().unwrap();
    let pages = packet.transfer_pages().unwrap();
    assert_eq!(pages.buffer, 0xcafe);
    assert_eq!(pages.ranges().collect::<Vec<_>>(), sent);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Push { headers: usize, len: usize },
    Show,
    Read,
    GiveBack,
    Sleep,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..6, 0usize..100).prop_map(|(words, len)| Step::Push { headers: words * 8, len }),
        2 => Just(Step::Show),
        4 => Just(Step::Read),
        2 => Just(Step::GiveBack),
        1 => Just(Step::Sleep),
    ]
}

proptest! {
    /// Whatever the sizes and whenever either side publishes: what is sent arrives, in order and
    /// once, and a sleeping consumer is woken.
    #[test]
    fn what_is_sent_arrives(
        words in 4usize..80,
        start in 0u32..80,
        steps in prop::collection::vec(step(), 0..300),
    ) {
        let memory = Memory::new(words * 8);
        // Rings are taken up where their indices stand.
        let start = start % words as u32 * 8;
        memory.set(&memory.control.read_index, start);
        memory.set(&memory.control.write_index, start);
        let (mut out, mut incoming) = memory.ends();
        let mut next = 0u64;
        let mut hidden = VecDeque::new();
        let mut shown = VecDeque::new();
        let mut asleep = false;
        let mut buffer = [0; 256];
        for step in steps {
            match step {
                Step::Push { headers, len } => {
                    let body: Vec<u8> = (0..headers + len).map(|i| (next as usize + i) as u8).collect();
                    let (head, payload) = body.split_at(headers);
                    let room = out.free().unwrap();
                    let size = ring_size(body.len()) as u32;
                    // The payload in three parts, cut at odd places.
                    let (a, rest) = payload.split_at(len / 3);
                    let (b, c) = rest.split_at(rest.len() / 2);
                    let kind = PacketKind::InBand;
                    let pushed = out.push_with_headers(kind, PacketFlags::NONE, next, head, &[a, b, c]);
                    if size > out.capacity() - 8 {
                        prop_assert_eq!(pushed, Err(PushError::Packet));
                    } else if size > room {
                        prop_assert_eq!(pushed, Err(PushError::Full));
                    } else {
                        prop_assert_eq!(pushed, Ok(()));
                        hidden.push_back((next, body, headers));
                        next += 1;
                    }
                }
                Step::Show => {
                    let news = !hidden.is_empty();
                    shown.append(&mut hidden);
                    let woken = out.publish();
                    prop_assert!(!(asleep && news) || woken, "a sleeper must be woken");
                    asleep &= !woken;
                }
                Step::Read if !asleep => {
                    let packet = incoming.read(&mut buffer).unwrap();
                    match (packet, shown.pop_front()) {
                        (None, None) => {}
                        (Some(packet), Some((id, body, headers))) => {
                            prop_assert_eq!(packet.transaction_id, id);
                            let payload = &body[headers..];
                            let (sent, pad) = packet.payload.split_at(payload.len());
                            prop_assert_eq!(sent, payload);
                            prop_assert!(pad.len() < 8 && pad.iter().all(|b| *b == 0));
                        }
                        (got, due) => prop_assert!(false, "{got:?} where {due:?} was due"),
                    }
                }
                Step::GiveBack => {
                    let _ = incoming.publish();
                }
                Step::Sleep if shown.is_empty() => {
                    let _ = incoming.publish();
                    prop_assert!(!incoming.unmask());
                    asleep = true;
                }
                Step::Read | Step::Sleep => {}
            }
            if !asleep {
                incoming.mask();
            }
        }
    }

    /// The other side may write anything, anywhere, at any time.
    #[test]
    fn nothing_the_other_side_does_panics(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        crate::fuzzing::fuzz_ring(&data);
    }

    /// Stretches are the pages' bytes, in order, whatever is merged.
    #[test]
    fn segments_are_the_range(
        pages in prop::collection::vec(0u64..6, 1..20),
        offset in 0u32..4096,
        cut in 0u32..4096,
    ) {
        let len = pages.len() as u32 * 4096 - offset - cut.min(4095 - offset % 4096);
        let mut buffer = [0; 256];
        let headers = write_gpa_ranges(&mut buffer, &[(len, offset, &pages)]).unwrap();
        let words = 2 + (headers.len() / 8) as u16;
        let descriptor = Descriptor {
            kind: PacketKind::GpaDirect,
            offset8: words,
            len8: words,
            flags: PacketFlags::NONE,
            transaction_id: 0,
        };
        let packet = Packet::new(descriptor, headers).unwrap();
        let range = packet.gpa_ranges().unwrap().next().unwrap();
        let by_segments = range.segments().flat_map(|Segment { gpa, len }| gpa..gpa + u64::from(len));
        let by_pages = (offset..offset + len)
            .map(|i| pages[i as usize / 4096] * 4096 + u64::from(i % 4096));
        prop_assert!(by_segments.eq(by_pages));
        let mut all = range.segments().collect::<Vec<_>>();
        all.dedup_by(|b, a| a.gpa + u64::from(a.len) == b.gpa);
        prop_assert_eq!(all.len(), range.segments().count(), "neighbours are merged");
    }
}
