//! Entry points for fuzzers: any bytes are welcome, and what has to hold whatever they are is
//! asserted. libFuzzer calls them, and so do ordinary tests, with its corpus.

mod netvsc;
mod storvsc;

use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::mapped::SingleMapped;
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::ring::{Control, Incoming, Outgoing};

pub use netvsc::fuzz_netvsc;
pub use storvsc::fuzz_storvsc;

/// Words in each ring's data area.
const RING: usize = 256;

/// The memory of both rings, as a guest leaves it.
struct Memory {
    up: (Control, [AtomicU64; RING]),
    down: (Control, [AtomicU64; RING]),
}

impl Memory {
    fn new() -> Self {
        let ring = || (Control::new(), core::array::from_fn(|_| AtomicU64::new(0)));
        Self { up: ring(), down: ring() }
    }

    /// The rings to the root and from it.
    fn rings(&self) -> [SingleMapped<'_>; 2] {
        [&self.up, &self.down].map(|(control, data)| SingleMapped { control, data })
    }
}

/// The root's end of a channel, with a script of what to do there.
struct Root<'a> {
    script: &'a [u8],
    incoming: Incoming<SingleMapped<'a>>,
    outgoing: Outgoing<SingleMapped<'a>>,
    up: SingleMapped<'a>,
    down: SingleMapped<'a>,
}

impl<'a> Root<'a> {
    fn new(memory: &'a Memory, script: &'a [u8]) -> Option<Self> {
        let [up, down] = memory.rings();
        let (incoming, outgoing) = (Incoming::new(up).ok()?, Outgoing::new(down).ok()?);
        Some(Self { script, incoming, outgoing, up, down })
    }

    /// The next bytes of the script.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.script.split_first_chunk::<N>()?;
        self.script = rest;
        Some(*bytes)
    }

    /// Up to `len` of them.
    fn take_up_to(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.script.split_at_checked(len).unwrap_or((self.script, &[]));
        self.script = rest;
        bytes
    }

    fn push(&mut self, kind: PacketKind, id: u64, headers: &[u8], payload: &[u8]) {
        let _ = self.outgoing.free();
        let flags = match kind {
            PacketKind::TransferPages => PacketFlags::COMPLETION_REQUESTED,
            _ => PacketFlags::NONE,
        };
        let _ = self.outgoing.push_with_headers(kind, flags, id, headers, &[payload]);
        let _ = self.outgoing.publish();
    }

    /// Changes an index of a ring, by the script.
    fn meddle(&mut self, detail: u8) {
        let Some(index) = self.take() else { return };
        let index = u32::from_le_bytes(index);
        let (down, up) = (self.down.control, self.up.control);
        match detail % 4 {
            0 => down.write_index.store(index, Ordering::Relaxed),
            1 => up.read_index.store(index % (RING as u32 * 8), Ordering::Relaxed),
            2 => down.write_index.store(index & 0x7f8, Ordering::Relaxed),
            _ => down.pending_send_size.store(index, Ordering::Relaxed),
        }
    }

    /// Changes a word in the ring to the client, by the script.
    fn scribble(&mut self, detail: u8) {
        if let Some(word) = self.take()
            && let Some(place) = self.down.data.get(usize::from(detail))
        {
            place.store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }
}
