//! Entry points for fuzzers, which are ordinary functions so that a corpus can be replayed as a
//! test. They fail by panicking.

use core::array;

use crate::mapped::SingleMapped;
use crate::packet::{Packet, PacketFlags, PacketKind};
use crate::ring::{Control, Incoming, Outgoing};
use crate::sync::{AtomicU64, Ordering};

/// Bytes of the ring's data area.
const SIZE: u32 = 512;

/// Both ends' code against another side that may write anything, anywhere, between any two steps:
/// `data` says what, where and when.
pub fn fuzz_ring(data: &[u8]) {
    let control = Control::new();
    let words: [AtomicU64; SIZE as usize / 8] = array::from_fn(|_| AtomicU64::new(0));
    let memory = SingleMapped { control: &control, data: &words };
    let (Ok(mut incoming), Ok(mut outgoing)) = (Incoming::new(memory), Outgoing::new(memory))
    else {
        return;
    };
    let mut buffer = [0; 256];
    let mut steps = Bytes(data);
    while let Some([step]) = steps.take() {
        match step % 16 {
            0 => control.write_index.store(steps.index(), Ordering::Relaxed),
            1 => control.read_index.store(steps.index(), Ordering::Relaxed),
            2 => control.interrupt_mask.store(steps.index(), Ordering::Relaxed),
            3 => control.pending_send_size.store(steps.index(), Ordering::Relaxed),
            4 => control.feature_bits.store(steps.index(), Ordering::Relaxed),
            // A stretch of words, and a descriptor, which is rarely found by chance.
            5 | 6 => {
                let [at, count] = steps.take().unwrap_or_default();
                for word in words.iter().skip(usize::from(at) % words.len()).take(count.into()) {
                    let Some(bytes) = steps.take() else { break };
                    word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
                }
            }
            7 | 8 => {
                let [at, kind, offset8, len8] = steps.take().unwrap_or_default();
                let kind = [6, 7, 9, 11][usize::from(kind) % 4];
                let word = kind | u64::from(offset8 % 16) << 16 | u64::from(len8 % 64) << 32;
                if let Some(to) = words.get(usize::from(at) % words.len()) {
                    to.store(word, Ordering::Relaxed);
                }
            }
            9..=11 => {
                if let Ok(Some(packet)) = incoming.read(&mut buffer) {
                    look_at(&packet);
                }
            }
            12 => {
                let _ = incoming.publish();
                if step & 16 != 0 {
                    incoming.mask();
                } else {
                    let _ = incoming.unmask();
                }
            }
            13 | 14 => {
                let [len] = steps.take().unwrap_or_default();
                let _ = outgoing.push(
                    PacketKind::InBand,
                    PacketFlags::NONE,
                    1,
                    &[buffer.get(..len.into()).unwrap_or_default()],
                );
            }
            _ => {
                let _ = outgoing.publish();
                let _ = outgoing.free();
                let _ = outgoing.set_pending_send(steps.index());
            }
        }
    }
}

/// All that a packet's receiver may ask of it.
fn look_at(packet: &Packet<'_>) {
    if let Ok(ranges) = packet.gpa_ranges() {
        for range in ranges {
            let bytes: u64 = range.segments().map(|segment| u64::from(segment.len)).sum();
            assert_eq!(bytes, u64::from(range.len), "the pages of a range hold its bytes");
            let pages = (u64::from(range.offset) + u64::from(range.len)).div_ceil(4096);
            assert_eq!(range.pfns().len() as u64, pages, "and no page more");
        }
    }
    if let Ok(pages) = packet.transfer_pages() {
        assert!(pages.ranges().count() <= 64, "no more ranges than bytes for them");
    }
}

/// What is left of the fuzzer's bytes.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    /// An index: mostly a sound one, sometimes anything.
    fn index(&mut self) -> u32 {
        match self.take() {
            Some([255]) => self.take().map_or(0, u32::from_le_bytes),
            Some([word]) => u32::from(word) * 8 % (SIZE + 8),
            None => 0,
        }
    }
}
