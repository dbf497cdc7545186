//! The guest's pages come back to it when nobody uses them any more: never before, and always then.
//!
//! The bus is the real one, without its thread; workers are what a test holds of them. What a guest
//! does, and when workers let go, stop, and are heard, is left to chance.

use std::collections::{BTreeMap, BTreeSet};

use hypervisor::Gpn;
use proptest::prelude::*;
use vmbus::protocol::{
    ChannelMessage, GpaRange, GpadlHeader, GpadlId, GpadlTeardown, GpadlTorndown, Header,
    InitiateContact, MessageKind, OpenChannel, USER_DATA, Version,
};
use zerocopy::{FromBytes, IntoBytes};

use super::tests::FakeSynic;
use super::*;
use crate::channel::Gpadl;

const MEMORY: u64 = 1 << 20;
/// A NIC's first channel, and its sub-channels.
const CHANNELS: usize = 3;
/// The first channel's number.
const FIRST: Relid = Relid(1);
/// Lists that the guest shares with the first channel.
const LISTS: u32 = 3;

/// Keeps what it is given.
struct Shelf(Arc<Mutex<Vec<Channel>>>);

impl Device for Shelf {
    fn offer(&self) -> crate::OfferParams {
        crate::OfferParams::new(Guid::ZERO, Guid::ZERO)
    }

    fn open(&mut self, channel: Channel) -> io::Result<()> {
        self.0.lock().unwrap().push(channel);
        Ok(())
    }
}

/// What a worker has.
struct Worker {
    channel: Channel,
    ring: u32,
    lists: Vec<(u32, Gpadl)>,
}

#[derive(Clone, Debug)]
enum Step {
    /// The guest opens a channel, with a ring of its own.
    Open(usize),
    /// It closes it.
    Close(usize),
    /// It shares a list with the first channel.
    Share(u32),
    /// It wants it back.
    TearDown(u32),
    /// It wants a channel's ring back.
    TearDownRing(usize),
    /// The first channel's worker begins to use a list, and notes it for the others.
    Use(u32),
    /// A worker takes part in what the first has noted.
    Join(usize),
    /// A worker lets go of one list.
    LetGo(usize),
    /// A worker ends, as it was told to or by itself.
    End(usize),
    /// The bus hears one thing that was told it.
    Hear,
}

fn step() -> impl Strategy<Value = Step> {
    let channel = || 0..CHANNELS;
    prop_oneof![
        4 => channel().prop_map(Step::Open),
        2 => channel().prop_map(Step::Close),
        3 => (0..LISTS).prop_map(Step::Share),
        4 => (0..LISTS).prop_map(Step::TearDown),
        1 => channel().prop_map(Step::TearDownRing),
        4 => (0..LISTS).prop_map(Step::Use),
        4 => channel().prop_map(Step::Join),
        3 => channel().prop_map(Step::LetGo),
        3 => channel().prop_map(Step::End),
        6 => Just(Step::Hear),
    ]
}

struct Bench {
    bus: Bus,
    shelf: Arc<Mutex<Vec<Channel>>>,
    /// By the channels' numbers. A sub-channel of the time before may still have one.
    workers: BTreeMap<Relid, Worker>,
    /// What the first channel's worker has noted; the device keeps it until that is opened again.
    session: Vec<(u32, Gpadl)>,
    /// The channels' numbers; sub-channels have none before they are offered.
    relids: [Option<Relid>; CHANNELS],
    /// Lists that are there, those that the guest wants back included.
    lists: BTreeSet<u32>,
    wanted: BTreeSet<u32>,
}

/// The list that a channel's ring is.
fn ring_of(relid: Relid) -> u32 {
    100 + relid.0
}

impl Bench {
    fn new() -> Self {
        let shelf = Arc::new(Mutex::new(Vec::new()));
        let memory = GuestMemory::new(MEMORY).unwrap();
        let (_, inbox) = crossbeam_channel::bounded(1);
        let devices: Vec<Box<dyn Device>> = vec![Box::new(Shelf(Arc::clone(&shelf)))];
        let bus = Bus::new(memory, FakeSynic::new(), 1, devices, inbox, News::new().unwrap());
        let mut bench = Self {
            bus: bus.unwrap(),
            shelf,
            workers: BTreeMap::new(),
            session: Vec::new(),
            relids: [None; CHANNELS],
            lists: BTreeSet::new(),
            wanted: BTreeSet::new(),
        };
        bench.send(
            InitiateContact {
                header: Header::new(MessageKind::InitiateContact),
                version: Version::V5_3,
                target_vp: 0,
                interrupt: 2,
                monitor_pages: [0; 2],
            }
            .as_bytes(),
        );
        bench.send(Header::new(MessageKind::RequestOffers).as_bytes());
        assert!(bench.relids[0].is_some());
        bench
    }

    fn send(&mut self, message: &[u8]) {
        let _ = self.bus.server.guest_message(message);
        self.bus.act();
        self.look();
    }

    /// Reads the messages to the guest.
    fn look(&mut self) {
        while let Some((_, message)) = self.bus.outbox.pop_front() {
            let payload = &message.payload[..message.payload_size.into()];
            let kind = Header::read_from_prefix(payload).unwrap().0.kind;
            match kind {
                MessageKind::GpadlTorndown => {
                    let id = GpadlTorndown::read_from_bytes(payload).unwrap().gpadl.0;
                    assert!(self.wanted.remove(&id), "{id} was answered twice, or nobody asked");
                    self.lists.remove(&id);
                    for (channel, worker) in &self.workers {
                        let uses = worker.lists.iter().any(|(list, _)| *list == id);
                        assert!(!uses && worker.ring != id, "channel {channel} still uses {id}");
                    }
                }
                MessageKind::OfferChannel => {
                    let offer = vmbus::protocol::OfferChannel::read_from_bytes(payload).unwrap();
                    self.relids[usize::from(offer.subchannel)] = Some(offer.relid);
                }
                MessageKind::RescindOffer => {
                    let gone = ChannelMessage::read_from_bytes(payload).unwrap().relid;
                    for relid in self.relids.iter_mut().filter(|relid| **relid == Some(gone)) {
                        *relid = None;
                    }
                    // Its ring went with it.
                    self.lists.remove(&ring_of(gone));
                    self.wanted.remove(&ring_of(gone));
                    let released = MessageKind::RelidReleased;
                    let message = ChannelMessage { header: Header::new(released), relid: gone };
                    let _ = self.bus.server.guest_message(message.as_bytes());
                    self.bus.act();
                }
                _ => {}
            }
        }
    }

    fn hear(&mut self) -> bool {
        let Some(event) = self.bus.news.next() else { return false };
        self.bus.hear(&event);
        self.look();
        true
    }

    /// What is wanted back and not answered is in use: by a worker, by what the device keeps, or as the
    /// ring of a channel that is not known to be closed.
    fn check(&mut self) {
        while self.hear() {}
        for id in &self.wanted {
            let in_session = self.session.iter().any(|(list, _)| list == id);
            let by_worker = self.workers.values().any(|worker| {
                worker.ring == *id || worker.lists.iter().any(|(list, _)| list == id)
            });
            assert!(in_session || by_worker, "{id} is used by nobody, and was not given back");
        }
    }

    /// One of those that run.
    fn worker(&mut self, number: usize) -> Option<(Relid, &mut Worker)> {
        let count = self.workers.len().max(1);
        self.workers.iter_mut().nth(number % count).map(|(relid, worker)| (*relid, worker))
    }

    fn share(&mut self, relid: Relid, id: u32, pages: &[u64]) {
        if !self.lists.insert(id) {
            return;
        }
        let header = GpadlHeader {
            header: Header::new(MessageKind::GpadlHeader),
            relid,
            gpadl: GpadlId(id),
            range_bytes: (8 + pages.len() * 8) as u16,
            range_count: 1,
            range: GpaRange { len: (pages.len() * PAGE_SIZE) as u32, offset: 0 },
        };
        self.send(&[header.as_bytes(), pages.as_bytes()].concat());
    }

    fn tear_down(&mut self, relid: Relid, id: u32) {
        if self.lists.contains(&id) && self.wanted.insert(id) {
            let header = Header::new(MessageKind::GpadlTeardown);
            self.send(GpadlTeardown { header, relid, gpadl: GpadlId(id) }.as_bytes());
        }
    }

    fn open(&mut self, channel: usize) {
        let Some(relid) = self.relids[channel] else { return };
        let (ring, first) = (ring_of(relid), 16 * (channel as u64 + 1));
        for page in first..first + 4 {
            self.bus.memory.write(Gpn(page).gpa().unwrap(), &[0; PAGE_SIZE]).unwrap();
        }
        self.share(relid, ring, &[first, first + 1, first + 2, first + 3]);
        self.send(
            OpenChannel {
                header: Header::new(MessageKind::OpenChannel),
                relid,
                open_id: 1,
                ring: GpadlId(ring),
                target_vp: 0,
                downstream_page: 2,
                user_data: [0; USER_DATA],
            }
            .as_bytes(),
        );
        let Some(opened) = self.shelf.lock().unwrap().pop() else { return };
        if channel == 0 {
            self.session.clear();
            opened.offer_subchannels(CHANNELS as u16 - 1);
        }
        let worker = Worker { channel: opened, ring, lists: Vec::new() };
        assert!(self.workers.insert(relid, worker).is_none(), "opened twice");
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Open(channel) => self.open(channel),
            Step::Close(channel) => {
                if let Some(relid) = self.relids[channel] {
                    let header = Header::new(MessageKind::CloseChannel);
                    self.send(ChannelMessage { header, relid }.as_bytes());
                }
            }
            Step::Share(id) => {
                if let Some(relid) = self.relids[0] {
                    self.share(relid, id, &[u64::from(id) + 200]);
                }
            }
            Step::TearDown(id) => {
                if let Some(relid) = self.relids[0] {
                    self.tear_down(relid, id);
                }
            }
            Step::TearDownRing(channel) => {
                if let Some(relid) = self.relids[channel] {
                    self.tear_down(relid, ring_of(relid));
                }
            }
            Step::Use(id) => {
                if let Some(worker) = self.workers.get_mut(&FIRST)
                    && let Some(gpadl) = worker.channel.gpadl(GpadlId(id))
                {
                    worker.lists.push((id, gpadl.clone()));
                    self.session.push((id, gpadl));
                }
            }
            Step::Join(number) => {
                // A worker of the time before has the notes of that: it cannot have these.
                let noted = self.session.first().cloned();
                if let Some((_, worker)) = self.worker(number)
                    && let Some(noted) = noted
                    && !worker.channel.stop_requested()
                    && !noted.1.is_wanted()
                {
                    worker.lists.push(noted);
                }
            }
            Step::LetGo(number) => {
                if let Some((relid, worker)) = self.worker(number)
                    && !worker.lists.is_empty()
                {
                    let (id, _) = worker.lists.remove(0);
                    if relid == FIRST {
                        self.session.retain(|(list, _)| *list != id);
                    }
                }
            }
            Step::End(number) => {
                if let Some((relid, _)) = self.worker(number) {
                    self.workers.remove(&relid);
                }
            }
            Step::Hear => drop(self.hear()),
        }
        self.look();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn pages_come_back_when_nobody_uses_them(steps in prop::collection::vec(step(), 0..120)) {
        let mut bench = Bench::new();
        for (count, step) in steps.iter().enumerate() {
            bench.step(step);
            if count % 16 == 15 {
                bench.check();
            }
        }
        bench.check();
        bench.session.clear();
        bench.workers.clear();
        bench.check();
        prop_assert!(bench.wanted.is_empty());
    }
}

/// The first channel is opened anew while a sub-channel of the time before still holds a list.
#[test]
fn pages_that_the_time_before_used_come_back_in_the_next() {
    let mut bench = Bench::new();
    let steps = [
        Step::Open(0),
        Step::Hear,
        Step::Open(1),
        Step::Share(0),
        Step::Use(0),
        Step::Join(1),
        Step::Close(0),
        Step::End(0),
        Step::Hear,
        Step::Open(0),
    ];
    steps.iter().for_each(|step| bench.step(step));
    assert!(bench.workers[&Relid(2)].channel.stop_requested());
    assert!(!bench.workers[&FIRST].channel.stop_requested());
    bench.step(&Step::TearDown(0));
    assert!(bench.wanted.contains(&0), "the sub-channel's worker has it");
    bench.step(&Step::End(1));
    bench.check();
    assert!(!bench.workers.contains_key(&Relid(2)) && !bench.wanted.contains(&0));
}

/// The guest wants pages back while its first channel closes, and opens it again before the others have.
#[test]
fn pages_that_were_wanted_while_the_channel_closed_come_back() {
    let mut bench = Bench::new();
    let steps = [
        Step::Open(0),
        Step::Hear,
        Step::Open(1),
        Step::Share(0),
        Step::Use(0),
        Step::Join(1),
        Step::Close(0),
        Step::TearDown(0),
        Step::End(0),
        Step::Hear,
        Step::Open(0),
        Step::End(1),
    ];
    steps.iter().for_each(|step| bench.step(step));
    bench.check();
    assert!(bench.wanted.is_empty());
}

/// Whoever held a list of the time before lets go of it while the guest wants another one back, to which
/// it has given the same number.
#[test]
fn news_of_a_list_that_is_gone_are_not_about_the_next() {
    let mut bench = Bench::new();
    let steps = [
        Step::Open(0),
        Step::Share(0),
        Step::Use(0),
        Step::TearDown(0),
        Step::End(0),
        Step::Hear,
        Step::Hear,
    ];
    steps.iter().for_each(|step| bench.step(step));
    assert!(bench.wanted.is_empty() && bench.workers.is_empty());
    // What the device kept goes now, and that is not heard before the end.
    let steps = [Step::Share(0), Step::Open(0), Step::Use(0), Step::TearDown(0), Step::Hear];
    steps.iter().for_each(|step| bench.step(step));
    assert!(bench.wanted.contains(&0), "the new worker has it");
    bench.check();
    bench.step(&Step::LetGo(0));
    bench.check();
    assert!(bench.wanted.is_empty());
}
