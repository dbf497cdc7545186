//! What an 82540EM may show in its registers, and write into its driver's rings and buffers.
#![allow(unsafe_code)] // memory of the guest's

use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::client::HvStatus;

use crate::e1000::{self, E1000};
use crate::memory::{PAGE, Pages};
use crate::net::{HEADER, NicDriver, NicError, SHORTEST};
use crate::platform::{Message, Platform, PlatformCounters, Ports};

/// As many as the driver takes: a page of rings, and buffers.
const PAGES: usize = 1 + 2 * 64;

/// A page's worth of words, aligned to it.
#[repr(C, align(4096))]
struct Memory([AtomicU64; PAGES * PAGE / 8]);

/// A machine with an 82540EM whose registers read whatever the fuzzer says, four bytes for each
/// access, and zeroes when that is used up. When a tail moves, and when the guest sleeps, it writes
/// to memory: each write is a byte that says in which descriptor of which ring, and eight bytes for
/// its second half.
struct Liar<'d> {
    memory: &'d Memory,
    data: Cell<&'d [u8]>,
    pci_address: Cell<u32>,
    clock: Cell<u64>,
}

impl Liar<'_> {
    fn next<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        let data = self.data.get();
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        self.data.set(data.get(N..).unwrap_or_default());
        bytes
    }

    /// Writes into descriptors.
    fn work(&self) {
        let [writes] = self.next();
        for _ in 0..writes % 4 {
            let [descriptor] = self.next();
            let half = u64::from_le_bytes(self.next());
            // Transmit descriptors come first, 128 of either kind; one of eight is enough.
            let descriptor = usize::from(descriptor >> 4) + 128 * usize::from(descriptor & 1);
            if let Some(word) = self.memory.0.get(2 * descriptor + 1) {
                word.store(half, Ordering::Relaxed);
            }
        }
    }
}

impl Ports for Liar<'_> {
    fn read_32(&self, _: u16) -> u32 {
        // There has to be a NIC before it can lie.
        match self.pci_address.get() {
            0x8000_0000 => 0x100e_8086,
            0x8000_0010 => 0xfeb0_0000,
            0x8000_003c => 11,
            _ => 0,
        }
    }

    fn write_32(&self, port: u16, value: u32) {
        if port == 0xcf8 {
            self.pci_address.set(value);
        }
    }

    fn load_32(&self, _: u32) -> u32 {
        u32::from_le_bytes(self.next())
    }

    fn store_32(&self, address: u32, _: u32) {
        // The tails of both rings.
        if matches!(address, 0xfeb0_2818 | 0xfeb0_3818) {
            self.work();
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

    fn idle(&self) {
        self.work();
    }

    fn now(&self) -> u64 {
        // Patience soon ends.
        self.clock.set(self.clock.get().saturating_add(500_000_000));
        self.clock.get()
    }

    fn line(&self, _: &str) {}

    fn counters(&self) -> PlatformCounters {
        PlatformCounters::default()
    }
}

/// Lets `drive` have a driver whose NIC says `data`: what it reads from registers and from rings, in
/// order. What went wrong at the start, or what it returns.
fn with_liar(
    data: &[u8],
    drive: impl FnOnce(&Liar<'_>, &mut E1000<'_, Liar<'_>>) -> Result<(), NicError>,
) -> Result<(), NicError> {
    let memory = Memory([const { AtomicU64::new(0) }; PAGES * PAGE / 8]);
    let (data, pci_address, clock) = (Cell::new(data), Cell::new(0), Cell::new(0));
    let liar = Liar { memory: &memory, data, pci_address, clock };
    let mut pages = liar.memory();
    let Some(function) = e1000::find(&liar).next() else { return Ok(()) };
    drive(&liar, &mut E1000::start(&liar, function, &mut pages)?)
}

/// The driver of 82540EMs against a NIC that says `data`.
pub fn fuzz_e1000(data: &[u8]) {
    let _ = with_liar(data, |liar, nic| {
        use_it(liar, nic);
        Ok(())
    });
}

fn use_it(liar: &Liar<'_>, nic: &mut E1000<'_, Liar<'_>>) {
    const TURNS: usize = 100;

    assert!(nic.identity().mac.is_station());
    let longest = nic.identity().longest_frame();
    for turn in 0..TURNS {
        let mut room = 0;
        while room < 5 && nic.send(&[turn as u8; SHORTEST]).is_ok_and(|taken| taken) {
            room += 1;
        }
        let mut count = 0;
        let outcome = nic.publish().and_then(|()| {
            nic.poll(&mut |frame| {
                assert!((HEADER..=longest.max(2048)).contains(&frame.len()));
                count += 1;
            })
        });
        match outcome {
            // Damaged ones are counted and not shown.
            Ok(taken) => assert!(count <= taken && taken <= 128),
            Err(_) => {
                assert!(nic.send(&[0; SHORTEST]).is_err() && nic.rest().is_err(), "it is dead");
                return;
            }
        }
        if nic.rest().is_ok() && !nic.is_ready() {
            liar.idle();
        }
        nic.wake();
        if turn % 16 == 15 {
            nic.quiet();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::e1000::E1000Fault;
    use crate::net::MacAddress;

    /// What a NIC says until it runs: no reset, an address, a link.
    fn beginning() -> Vec<u8> {
        let words = [0x2_u32, 0, 0x5452_0010, 0x1200_0010, 0x5634_0010];
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.extend([0, 0]); // nothing is written when the tails are set
        bytes.extend(2_u32.to_le_bytes());
        bytes
    }

    /// What comes of a start, when registers read so.
    fn outcome(words: &[u32]) -> Result<(), NicError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        with_liar(&bytes, |_, _| Ok(()))
    }

    #[test]
    fn lies_are_told_apart() {
        let fault = |fault: E1000Fault| Err(NicError::from(fault));
        assert_eq!(outcome(&[u32::MAX]), fault(E1000Fault::Absent));
        let resets = [&[2], [u32::MAX; 20].as_slice()].concat();
        assert_eq!(outcome(&resets), fault(E1000Fault::Reset));
        assert_eq!(outcome(&[2, 0]), fault(E1000Fault::Eeprom));
        let nobody = MacAddress([1, 0, 0x5e, 0, 0, 1]);
        let words = [2, 0, 0x0001_0010, 0x005e_0010, 0x0100_0010];
        assert_eq!(outcome(&words), fault(E1000Fault::Address(nobody)));

        let runs = |half: u64| {
            let descriptor = [&[1, 1], half.to_le_bytes().as_slice()].concat();
            with_liar(&[beginning(), descriptor].concat(), |liar, nic| {
                liar.idle();
                nic.poll(&mut |_| {}).map(|count| assert_eq!(count, 1))
            })
        };
        assert_eq!(runs(60 | 3 << 32), Ok(()));
        assert_eq!(runs(2049 | 3 << 32), fault(E1000Fault::Length(2049)));
        assert_eq!(runs(13 | 3 << 32), fault(E1000Fault::Length(13)));
        assert_eq!(runs(60 | 1 << 32), fault(E1000Fault::Pieces));
    }

    proptest! {
        #[test]
        fn any_answers(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_e1000(&data);
        }

        #[test]
        fn any_answers_of_one_that_runs(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_e1000(&[beginning(), data].concat());
        }

        /// Descriptors that are done, of any length.
        #[test]
        fn any_frames(descriptors in prop::collection::vec((any::<u16>(), 0_u8..4, 0_u8..3), 0..100)) {
            let mut data = beginning();
            for (slot, (len, status, errors)) in descriptors.into_iter().enumerate() {
                let [a, b] = len.to_le_bytes();
                let len = if errors == 0 { [a, b & 7] } else { [a, b] };
                data.extend([1, (slot as u8) << 4 | 1, len[0], len[1], 0, 0, status, errors, 0, 0]);
            }
            fuzz_e1000(&data);
        }
    }
}
