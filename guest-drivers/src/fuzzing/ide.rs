//! What an IDE controller may show in its registers.
#![allow(unsafe_code)] // memory of the guest's

use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::client::HvStatus;

use crate::block::{BlockDriver, Operation, Request};
use crate::ide::{self, Transfer};
use crate::memory::{PAGE, Pages};
use crate::platform::{Message, Platform, PlatformCounters, Ports};

const PAGES: usize = 8;

/// A page's worth of words, aligned to it.
#[repr(C, align(4096))]
struct Memory([AtomicU64; PAGES * PAGE / 8]);

/// A machine with an IDE controller that reads whatever the fuzzer says, a byte for each access and
/// 512 for a string, and zeroes when that is used up.
struct Liar<'d> {
    memory: &'d Memory,
    data: Cell<&'d [u8]>,
    pci_address: Cell<u32>,
    clock: Cell<u64>,
}

impl Liar<'_> {
    fn next(&self) -> u8 {
        let (byte, rest) = self.data.get().split_first().unwrap_or((&0, &[]));
        self.data.set(rest);
        *byte
    }
}

impl Ports for Liar<'_> {
    fn read_8(&self, _: u16) -> u8 {
        self.next()
    }

    fn read_32(&self, _: u16) -> u32 {
        // There has to be a controller before it can lie.
        match self.pci_address.get() {
            0x8000_0000 | 0x8000_0800 => 0x7111_8086,
            _ => 0xc001,
        }
    }

    fn write_32(&self, port: u16, value: u32) {
        if port == 0xcf8 {
            self.pci_address.set(value);
        }
    }

    fn read_string(&self, _: u16, words: &[AtomicU64]) {
        for word in words.iter().take(64) {
            let bytes = [(); 8].map(|()| self.next());
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }
}

impl Platform for Liar<'_> {
    fn memory(&self) -> Pages<'_> {
        // SAFETY: it is there as long as this is, and all of it is atomic.
        unsafe { Pages::new(NonNull::from(self.memory).cast(), 1, PAGES) }
    }

    fn post_message(&self, _: u32, _: u32, _: &[u8]) -> HvStatus {
        HvStatus::SUCCESS
    }

    fn signal_event(&self, _: u32) {}

    fn take_message(&self) -> Option<Message> {
        None
    }

    fn idle(&self) {}

    fn now(&self) -> u64 {
        // Patience soon ends.
        self.clock.set(self.clock.get().saturating_add(2_000_000_000));
        self.clock.get()
    }

    fn line(&self, _: &str) {}

    fn counters(&self) -> PlatformCounters {
        PlatformCounters::default()
    }
}

/// The driver of ATA disks, told `data` by its controller: what it reads from registers, in order.
pub fn fuzz_ide(data: &[u8]) {
    const LOOKS: usize = 20;
    const SLOT: u16 = 3;

    let memory = Memory([const { AtomicU64::new(0) }; PAGES * PAGE / 8]);
    let (data, pci_address, clock) = (Cell::new(data), Cell::new(0), Cell::new(0));
    let liar = Liar { memory: &memory, data, pci_address, clock };
    let mut pages = liar.memory();
    let Ok(mut channels) = ide::find(&liar, &mut pages) else { return };
    for channel in channels.iter_mut().flatten() {
        for drive in channel.disks() {
            for transfer in [Transfer::Dma, Transfer::Pio] {
                let Ok(Some(mut disk)) = channel.disk(drive, transfer) else { continue };
                let sectors = disk.identity().blocks;
                for (operation, block, blocks) in [
                    (Operation::Read, 0, 1),
                    (Operation::Write, sectors.saturating_sub(17), 17),
                    (Operation::Read, sectors / 2, 40),
                    (Operation::Flush, 0, 0),
                ] {
                    let data = (operation != Operation::Flush).then_some(pages);
                    let request = Request { slot: SLOT, operation, block, blocks, data };
                    if disk.submit(&request).is_err() {
                        break;
                    }
                    let mut ended = None;
                    for _ in 0..LOOKS {
                        disk.sleep();
                        let Ok(count) = disk.poll(&mut |completion| ended = Some(completion))
                        else {
                            return;
                        };
                        assert_eq!(count, usize::from(ended.is_some()));
                        if count > 0 {
                            break;
                        }
                    }
                    let Some(ended) = ended else { break };
                    assert_eq!(ended.slot, SLOT);
                    if let Ok(bytes) = ended.outcome {
                        assert_eq!(bytes, blocks * 512, "all or nothing");
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_answers(data in prop::collection::vec(any::<u8>(), 0..1200)) {
            fuzz_ide(&data);
        }
    }
}
