//! A controller that lies: whatever it shows in its registers, the runner reports it and ends. It
//! never hangs and never panics.
#![allow(unsafe_code)] // the guest's memory

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use guest_drivers::memory::{PAGE, Pages};
use guest_drivers::platform::{Message, Platform, PlatformCounters, PortWrite, Ports};
use guest_drivers::runner::{self, status};
use proptest::prelude::*;
use vmbus::client::HvStatus;
use vmbus::protocol::{Header, MessageKind, VersionResponse};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const PAGES: usize = 256;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; PAGE / 8]);

/// What there is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    /// Status, or alternate status.
    Status,
    /// The bus master's status.
    Master,
    /// Any other register.
    Other,
}

/// A machine with a bus that has nothing to offer, and a drive whose registers can be lied about.
struct Liar<F> {
    memory: NonNull<Page>,
    /// Given what is read, and what a drive would say.
    lie: F,
    /// Turns a drive's identification into something else.
    identification: fn(&mut [u16; 256]),
    pci_address: Cell<u32>,
    /// Blocks of data that the drive wants to move.
    blocks: Cell<u32>,
    identifies: Cell<bool>,
    answers: RefCell<Vec<Vec<u8>>>,
    clock: Cell<u64>,
    lines: RefCell<Vec<String>>,
}

const BSY: u8 = 0x80;
const READY: u8 = 0x50;
const DRQ: u8 = 0x08;
const INTERRUPT: u8 = 0x04;

impl<F: Fn(Read, u8) -> u8> Liar<F> {
    fn new(lie: F, identification: fn(&mut [u16; 256])) -> Self {
        let memory = Box::leak(vec![Page([0; PAGE / 8]); PAGES].into_boxed_slice());
        Self {
            memory: NonNull::from(&mut memory[0]),
            lie,
            identification,
            pci_address: Cell::new(0),
            blocks: Cell::new(0),
            identifies: Cell::new(false),
            answers: RefCell::default(),
            clock: Cell::new(0),
            lines: RefCell::default(),
        }
    }

    /// Lets the guest `work`, and returns its status and what it said last.
    fn run(self, work: &str) -> (u32, String) {
        let status = runner::run(&self, work);
        let memory = std::ptr::slice_from_raw_parts_mut(self.memory.as_ptr(), PAGES);
        // SAFETY: it came from a box of so many pages, and the guest that had references is gone.
        drop(unsafe { Box::from_raw(memory) });
        (status, self.lines.into_inner().pop().unwrap())
    }

    fn answer(&self, message: &(impl IntoBytes + zerocopy::Immutable)) {
        self.answers.borrow_mut().insert(0, message.as_bytes().to_vec());
    }

    fn command(&self, code: u8) {
        self.identifies.set(code == 0xec);
        self.blocks.set(match code {
            0xec => 1,
            0xc4 | 0xc5 => 1, // 4 KiB are less than a block
            _ => 0,
        });
    }

    fn moved(&self) {
        self.blocks.set(self.blocks.get().saturating_sub(1));
    }
}

impl<F: Fn(Read, u8) -> u8> Ports for Liar<F> {
    fn read_8(&self, port: u16) -> u8 {
        let drq = if self.blocks.get() > 0 { DRQ } else { 0 };
        match port {
            0x1f7 | 0x3f6 => (self.lie)(Read::Status, READY | drq),
            0xc002 => (self.lie)(Read::Master, INTERRUPT),
            0x1f0..=0x1f6 | 0xc000..=0xc007 => (self.lie)(Read::Other, 0),
            _ => 0xff,
        }
    }

    fn read_32(&self, port: u16) -> u32 {
        match (port, self.pci_address.get()) {
            (0xcfc, 0x8000_0000) => 0x1237_8086,
            (0xcfc, 0x8000_0800) => 0x7110_8086,
            (0xcfc, 0x8000_080c) => 0x0080_0000,
            (0xcfc, 0x8000_0900) => 0x7111_8086,
            (0xcfc, 0x8000_0920) => 0xc001,
            _ => u32::MAX,
        }
    }

    fn write_8(&self, writes: &[PortWrite]) {
        for write in writes {
            match write.port {
                0x1f6 if write.value & 0x10 != 0 => self.command(0),
                0x1f7 => self.command(write.value),
                _ => {}
            }
        }
    }

    fn write_32(&self, port: u16, value: u32) {
        if port == 0xcf8 {
            self.pci_address.set(value);
        }
    }

    fn read_string(&self, _: u16, words: &[AtomicU64]) {
        let mut identification = [0; 256];
        for (index, word) in [(47, 0x8010), (49, 0x0300), (60, 0x0800), (83, 0x4000)] {
            identification[index] = word;
        }
        (self.identification)(&mut identification);
        let bytes = identification.as_bytes();
        for (word, bytes) in words.iter().zip(bytes.as_chunks().0) {
            let value = if self.identifies.get() { u64::from_le_bytes(*bytes) } else { 0 };
            word.store(value, Ordering::Relaxed);
        }
        self.moved();
    }

    fn write_string(&self, _: u16, _: &[AtomicU64]) {
        self.moved();
    }
}

impl<F: Fn(Read, u8) -> u8> Platform for Liar<F> {
    fn memory(&self) -> Pages<'_> {
        // SAFETY: leaked, so it stays, and reached by nothing but this.
        unsafe { Pages::new(self.memory.cast(), 16, PAGES) }
    }

    fn post_message(&self, _: u32, _: u32, payload: &[u8]) -> HvStatus {
        let Ok((header, _)) = Header::read_from_prefix(payload) else {
            panic!("no message: {payload:?}")
        };
        match header.kind {
            MessageKind::InitiateContact => {
                let mut response = VersionResponse::new_zeroed();
                response.header = Header::new(MessageKind::VersionResponse);
                (response.supported, response.connection) = (1, 4);
                self.answer(&response);
            }
            MessageKind::RequestOffers => {
                self.answer(&Header::new(MessageKind::AllOffersDelivered));
            }
            MessageKind::Unload => self.answer(&Header::new(MessageKind::UnloadResponse)),
            _ => {}
        }
        HvStatus::SUCCESS
    }

    fn signal_event(&self, _: u32) {}

    fn take_message(&self) -> Option<Message> {
        self.answers.borrow_mut().pop().map(|payload| Message::new(1, &payload))
    }

    fn idle(&self) {}

    fn now(&self) -> u64 {
        // Patience soon ends.
        self.clock.set(self.clock.get() + 50_000_000);
        self.clock.get()
    }

    fn line(&self, text: &str) {
        self.lines.borrow_mut().push(text.to_owned());
    }

    fn counters(&self) -> PlatformCounters {
        PlatformCounters::default()
    }
}

/// What a run says in the end that fails.
fn failure(
    lie: impl Fn(Read, u8) -> u8,
    identification: fn(&mut [u16; 256]),
    work: &str,
) -> String {
    let (status, line) = Liar::new(lie, identification).run(work);
    assert_eq!(status, status::FAILED, "{line}");
    line.strip_prefix("{\"error\":\"").unwrap().strip_suffix("\"}").unwrap().to_owned()
}

fn honest(_: Read, value: u8) -> u8 {
    value
}

#[test]
fn an_honest_drive_is_believed() {
    for work in ["identify", "bench bs=4k time=1s", "bench rw=write transfer=pio time=1s"] {
        let (status, line) = Liar::new(honest, |_| ()).run(work);
        assert_eq!(status, status::DONE, "{line}");
    }
}

#[test]
fn a_drive_that_is_never_ready_is_given_up() {
    let busy = |read, value| if read == Read::Status { BSY } else { value };
    let error = failure(busy, |_| (), "identify");
    assert_eq!(error, "drive 0 of IDE channel 0 stays busy");

    // Once it is found, in the midst of a command.
    for (work, error) in [
        ("bench transfer=pio time=100s", "the controller does not answer"),
        ("bench rw=write transfer=pio time=100s", "drive 0 of IDE channel 0 stays busy"),
        (
            "bench time=100s",
            "the IDE drive has status 0x80, which is not what its command leads to",
        ),
    ] {
        let reads = Cell::new(0);
        let busy = |read, value| {
            reads.set(reads.get() + 1);
            if read == Read::Status && reads.get() > 20 { BSY } else { value }
        };
        assert_eq!(failure(busy, |_| (), work), error, "{work}");
    }
    let silent = |read, value| if read == Read::Master { 0 } else { value };
    assert_eq!(failure(silent, |_| (), "bench"), "the controller does not answer");
}

#[test]
fn data_that_is_not_there_and_data_that_nobody_wants() {
    let nothing = |read, value| if read == Read::Status { value & !DRQ } else { value };
    let lie = "the IDE drive has status 0x50, which is not what its command leads to";
    assert_eq!(failure(nothing, |_| (), "identify"), lie);

    let reads = Cell::new(0);
    let nothing = |read, value| {
        reads.set(reads.get() + 1);
        if read == Read::Status && reads.get() > 20 { value & !DRQ } else { value }
    };
    assert_eq!(failure(nothing, |_| (), "bench transfer=pio time=100s"), lie);

    for work in ["bench time=100s", "bench rw=write transfer=pio time=100s"] {
        let reads = Cell::new(0);
        let more = |read, value| {
            reads.set(reads.get() + 1);
            if read == Read::Status && reads.get() > 20 { value | DRQ } else { value }
        };
        let lie = "the IDE drive has status 0x58, which is not what its command leads to";
        assert_eq!(failure(more, |_| (), work), lie, "{work}");
    }
}

#[test]
fn an_identification_that_cannot_be_is_told() {
    let work = "identify";
    let error = |identification| failure(honest, identification, work);
    let of = "drive 0 of IDE channel 0 is of no use: ";
    let no_lba = error(|words| words[49] = 0x0100);
    assert_eq!(no_lba, format!("{of}it has no linear addresses"));
    assert_eq!(error(|words| words[60] = 0), format!("{of}it says that it has no sectors"));
    let checksum = error(|words| words[255] = 0x01a5);
    assert_eq!(checksum, format!("{of}its identification has a wrong checksum"));
    assert_eq!(error(|words| words[0] = 0x85c0), format!("{of}it says that it is no ATA disk"));
    let without = failure(honest, |words| words[49] = 0x0200, "bench");
    assert_eq!(without, "the IDE disk has no DMA; transfer=pio does without");
    let (status, line) = Liar::new(honest, |words| words[49] = 0x0200).run("bench transfer=pio");
    assert_eq!(status, status::DONE, "{line}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_liar_is_reported(
        honest in 0_u32..80,
        lies in prop::collection::vec(any::<u8>(), 1..40),
        transfer in prop_oneof![Just("dma"), Just("pio")],
    ) {
        let reads = Cell::new(0);
        let lie = |read, value| {
            reads.set(reads.get() + 1);
            let lie = lies[reads.get() as usize % lies.len()];
            match (reads.get() > honest, read, lie % 4) {
                (false, ..) | (_, _, 0) => value,
                // Plausible values hurt most.
                (_, Read::Status, 1) => [READY, READY | DRQ, BSY, 0x51, 0x71, 0][lie as usize % 6],
                (_, Read::Master, 1) => lie & 7,
                _ => lie,
            }
        };
        let work = format!("identify; bench time=2s transfer={transfer};
                            verify bytes=64k bs=4k transfer={transfer}");
        let (status, line) = Liar::new(lie, |_| ()).run(&work);
        // It may say nothing worse than that there is no device.
        if status != status::DONE {
            prop_assert_eq!(status, status::FAILED);
            prop_assert!(line.starts_with(r#"{"error":""#), "{}", line);
        }
    }
}
