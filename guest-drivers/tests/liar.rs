//! A root that lies: whatever it says and writes, the runner reports and ends. It never panics.
#![allow(unsafe_code)] // memory that the guest shares with the liar

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use guest_drivers::bus::{Bus, BusError};
use guest_drivers::memory::{PAGE, Pages};
use guest_drivers::platform::{Message, Platform, PlatformCounters, Ports};
use guest_drivers::runner::{self, status};
use proptest::prelude::*;
use vmbus::Guid;
use vmbus::client::HvStatus;
use vmbus::protocol::{
    GpadlCreated, GpadlId, Header, InitiateContact, MessageKind, OfferChannel, OpenChannel,
    OpenResult, Relid, VersionResponse,
};
use vmbus::vstor::SCSI_CLASS;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const PAGES: usize = 256;

/// A page's worth of words, aligned to it.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; PAGE / 8]);

/// A root that keeps to the protocol until a channel is open, if it does even that, and then
/// scribbles into the guest's memory.
struct Liar {
    memory: NonNull<Page>,
    /// What lies are made of, and which is next.
    lies: Vec<u64>,
    next: Cell<usize>,
    /// So many honest answers first.
    honest: Cell<u32>,
    answers: RefCell<Vec<Vec<u8>>>,
    /// From this message of the guest's on, nothing comes but offers without end.
    flood: Option<MessageKind>,
    flooded: Cell<u32>,
    clock: Cell<u64>,
    lines: RefCell<Vec<String>>,
}

impl Liar {
    fn new(honest: u32, lies: Vec<u64>) -> Self {
        let memory = Box::leak(vec![Page([0; PAGE / 8]); PAGES].into_boxed_slice());
        Self {
            memory: NonNull::from(&mut memory[0]),
            lies,
            next: Cell::new(0),
            honest: Cell::new(honest),
            answers: RefCell::default(),
            flood: None,
            flooded: Cell::new(0),
            clock: Cell::new(0),
            lines: RefCell::default(),
        }
    }

    fn lie(&self) -> u64 {
        let at = self.next.get();
        self.next.set(at + 1);
        // When they are used up they come again, a little different.
        self.lies[at % self.lies.len()].wrapping_add((at / self.lies.len()) as u64)
    }

    fn answer(&self, message: &(impl IntoBytes + zerocopy::Immutable)) {
        let mut bytes = message.as_bytes().to_vec();
        match self.honest.get().checked_sub(1) {
            Some(left) => self.honest.set(left),
            None => {
                let len = bytes.len().max(1);
                bytes[self.lie() as usize % len] = self.lie() as u8;
                bytes.truncate(self.lie() as usize % 300);
            }
        }
        self.answers.borrow_mut().insert(0, bytes);
    }

    /// Answers what the guest says, as a root would.
    fn hear(&self, payload: &[u8]) {
        let Ok((header, _)) = Header::read_from_prefix(payload) else { return };
        if self.flood == Some(header.kind) {
            self.flooded.set(1);
        }
        match header.kind {
            MessageKind::InitiateContact => {
                let _ = InitiateContact::read_from_prefix(payload);
                let mut response = VersionResponse::new_zeroed();
                response.header = Header::new(MessageKind::VersionResponse);
                (response.supported, response.connection) = (1, 4);
                self.answer(&response);
            }
            MessageKind::RequestOffers => {
                let mut offer = OfferChannel::new_zeroed();
                offer.header = Header::new(MessageKind::OfferChannel);
                (offer.class, offer.relid, offer.connection) = (SCSI_CLASS, Relid(1), 0x2001);
                self.answer(&offer);
                self.answer(&Header::new(MessageKind::AllOffersDelivered));
            }
            MessageKind::GpadlHeader => {
                let gpadl = GpadlId(u32::from_le_bytes(payload[12..16].try_into().unwrap()));
                let header = Header::new(MessageKind::GpadlCreated);
                self.answer(&GpadlCreated { header, relid: Relid(1), gpadl, status: 0 });
            }
            MessageKind::OpenChannel => {
                let (open, _) = OpenChannel::read_from_prefix(payload).unwrap();
                let header = Header::new(MessageKind::OpenResult);
                let (relid, open_id) = (open.relid, open.open_id);
                self.answer(&OpenResult { header, relid, open_id, status: 0 });
            }
            MessageKind::Unload => self.answer(&Header::new(MessageKind::UnloadResponse)),
            _ => {}
        }
    }

    /// One more offer. There is no room for so many, and so numbers may come again.
    fn next_of_flood(&self) -> OfferChannel {
        let count = self.flooded.get();
        self.flooded.set(count + 1);
        let mut offer = OfferChannel::new_zeroed();
        offer.header = Header::new(MessageKind::OfferChannel);
        offer.relid = Relid(1 + count.min(Relid::MAX.0 - 1));
        let mut instance = [0; 16];
        instance[..4].copy_from_slice(&count.to_le_bytes());
        offer.instance = Guid::from_wire(instance);
        offer
    }

    /// Changes some words of the rings, most often where their indices are.
    fn scribble(&self) {
        let words = self.memory().words();
        for _ in 0..4 {
            let (place, value) = (self.lie(), self.lie());
            let at = match place % 4 {
                0 => 32 * PAGE / 8,                              // the ring from the root
                1 => 33 * PAGE / 8 + (place >> 2) as usize % 32, // its first packets
                2 => 33 * PAGE / 8 + (place >> 2) as usize % (PAGE / 8),
                _ => (place >> 2) as usize % words.len(),
            };
            // Plausible values hurt most.
            let value =
                if value.is_multiple_of(2) { value >> 1 & 0x0000_0fff_0000_0fff } else { value };
            words[at].store(value, Ordering::Relaxed);
        }
    }
}

impl Ports for Liar {}

impl Platform for Liar {
    fn memory(&self) -> Pages<'_> {
        // SAFETY: leaked, so it stays, and reached by nothing but this.
        unsafe { Pages::new(self.memory.cast(), 16, PAGES) }
    }

    fn post_message(&self, _: u32, _: u32, payload: &[u8]) -> HvStatus {
        if self.honest.get() == 0 && self.lie().is_multiple_of(16) {
            return HvStatus(self.lie() as u16);
        }
        self.hear(payload);
        HvStatus::SUCCESS
    }

    fn signal_event(&self, _: u32) {
        self.scribble();
    }

    fn take_message(&self) -> Option<Message> {
        if self.flooded.get() > 0 {
            return Some(Message::new(1, self.next_of_flood().as_bytes()));
        }
        let honest = self.answers.borrow_mut().pop();
        if honest.is_none() && self.honest.get() == 0 && self.lie().is_multiple_of(64) {
            let lie: Vec<u8> =
                (0..self.lie() % 30).flat_map(|_| self.lie().to_le_bytes()).collect();
            return Some(Message::new(self.lie() as u32, &lie));
        }
        honest.map(|payload| Message::new(1, &payload))
    }

    fn idle(&self) {
        self.scribble();
    }

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

fn run(honest: u32, lies: Vec<u64>) -> (u32, Vec<String>) {
    run_with(Liar::new(honest, lies))
}

fn run_with(liar: Liar) -> (u32, Vec<String>) {
    let status = runner::run(&liar, "identify; verify bytes=64k bs=4k; bench time=1s");
    // SAFETY: it came from a box of so many pages, and the guest that had references is gone.
    let pages =
        unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(liar.memory.as_ptr(), PAGES)) };
    drop(pages);
    (status, liar.lines.into_inner())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_liar_is_reported(
        honest in prop_oneof![3 => Just(5u32), 2 => 0u32..6],
        lies in prop::collection::vec(any::<u64>(), 1..40),
    ) {
        let (status, lines) = run(honest, lies);
        // It may say nothing worse than that there is no device.
        if status != status::DONE {
            prop_assert_eq!(status, status::FAILED);
            prop_assert!(lines.last().unwrap().starts_with(r#"{"error":""#), "{:?}", lines);
        }
    }
}

#[test]
fn a_root_that_goes_on_and_on_is_given_up() {
    for flood in [
        MessageKind::InitiateContact,
        MessageKind::RequestOffers,
        MessageKind::GpadlHeader,
        MessageKind::OpenChannel,
    ] {
        let liar = Liar { flood: Some(flood), ..Liar::new(u32::MAX, vec![1]) };
        let (status, lines) = run_with(liar);
        assert_eq!(status, status::FAILED, "{flood:?}");
        assert!(lines.last().unwrap().contains("error"), "{flood:?}: {lines:?}");
    }
}

#[test]
fn a_root_that_goes_on_and_on_is_left() {
    let liar = Liar { flood: Some(MessageKind::Unload), ..Liar::new(u32::MAX, vec![1]) };
    let bus = Bus::connect(&liar).unwrap();
    assert_eq!(bus.unload(), Err(BusError::TimedOut));
}

#[test]
fn a_root_that_says_nothing_more_is_given_up() {
    let (status, lines) = run(u32::MAX, vec![1]);
    assert_eq!(status, status::FAILED);
    assert!(lines.len() > 1 && lines.last().unwrap().contains("error"), "{lines:?}");
}
