//! The fuzzer's way to the engine: packets without a ring, on a RAM disk.

use std::cell::RefCell;
use std::sync::Arc;

use backends::block::Disk;
use backends::ram::RamDisk;
use backends::uring::Uring;
use hypervisor::GuestMemory;
use vmbus::packet::Packet;
use vmbus::packet::{Descriptor, PacketFlags, PacketKind};

use super::ControllerBuilder;
use super::engine::Engine;
use super::handshake::Grants;

/// A channel's engine and what it works on; making it takes longer than a run.
struct Bench {
    // Dropped first: see `Uring`.
    uring: Uring,
    engine: Engine,
}

impl Bench {
    fn new() -> Option<Self> {
        let mut uring = Uring::new(8).ok()?;
        let memory = GuestMemory::new(1 << 20).ok()?;
        let mut builder = ControllerBuilder::new(0);
        for block in [512, 4096] {
            let disk = RamDisk::new(1 << 20).ok()?;
            let disk: Arc<dyn Disk> = Arc::new(disk.with(|geometry| {
                geometry.logical_block = block;
                geometry.physical_block = 4096;
            }));
            builder.attach(None, disk).ok()?;
        }
        let luns = builder.build(4).luns;
        let grants = Grants { max_subchannels: 3, max_transfer: 1 << 20 };
        // Ready without a handshake, as sub-channels are.
        let engine = Engine::new(memory, &luns, grants, false, &mut uring).ok()?;
        Some(Self { uring, engine })
    }
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = RefCell::new(Bench::new());
}

/// Packets one after the other: a byte for the kind, a byte for the flags, two bytes for where the
/// payload starts, two for the length, and what they say. Every packet that asks for a completion
/// gets one, and nothing stays under way.
pub(crate) fn fuzz(mut data: &[u8]) {
    BENCH.with_borrow_mut(|bench| {
        let Some(Bench { uring, engine }) = bench else { return };
        let mut id = 1;
        while let Some(([kind, flags, o0, o1, l0, l1], rest)) = data.split_first_chunk() {
            let len = usize::from(u16::from_le_bytes([*l0, *l1])).min(rest.len());
            let (body, rest) = rest.split_at(len);
            data = rest;
            let descriptor = Descriptor {
                kind: PacketKind(u16::from(*kind)),
                offset8: u16::from_le_bytes([*o0, *o1]),
                len8: 0,
                flags: PacketFlags(u16::from(*flags)),
                transaction_id: id,
            };
            let Ok(packet) = Packet::new(descriptor, body) else { continue };
            let wanted = usize::from(packet.flags.completion_requested());
            engine.take(&packet, uring);
            engine.settle(uring);
            // A RAM disk is done at once.
            assert_eq!(engine.in_flight(), 0);
            let answers: Vec<u64> = engine.answers().map(|(id, _)| id).collect();
            assert_eq!(answers, vec![id; wanted]);
            id += 1;
        }
    });
}
