//! The guest's end of the bus against the root's, both as plain state machines: bytes go across,
//! in order, and as late as the test likes.

use std::collections::VecDeque;

use hypervisor::Gpn;
use proptest::prelude::*;
use vmbus::client::{Client, ConnectionError, Contact, Event, HvStatus, Hypercalls, RequestError};
use vmbus::protocol::{GpadlId, Relid, USER_DATA, Version};
use vmbus::{Guid, vstor};
use vmbus_server::OfferParams;
use vmbus_server::server::{Action, Limits, Server};

const FIRST: OfferParams =
    OfferParams::new(vstor::SCSI_CLASS, Guid::new("f8b3781a-1e82-4818-a1c3-63d806ec15bb"));
const SECOND: OfferParams =
    OfferParams::new(vstor::SCSI_CLASS, Guid::new("f8b3781b-1e82-4818-a1c3-63d806ec15bb"));

/// Where the guest's messages wait for the root.
#[derive(Default)]
struct Wire(VecDeque<Vec<u8>>);

impl Hypercalls for Wire {
    fn post_message(&mut self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        assert_eq!(message_type, 1);
        assert!(Server::takes_messages_on(connection));
        self.0.push_back(payload.to_vec());
        HvStatus::SUCCESS
    }

    fn signal_event(&mut self, _: u32) {}
}

struct Bus {
    server: Server,
    up: Wire,
    down: VecDeque<Vec<u8>>,
    /// Workers that were told to stop.
    stopping: VecDeque<Relid>,
    client: Client,
    events: Vec<Event>,
}

impl Bus {
    fn new() -> Self {
        let mut server = Server::new(2, Limits::default(), |page: Gpn| page.0 < 1 << 20);
        server.offer(FIRST).expect("a number");
        server.offer(SECOND).expect("a number");
        Self {
            server,
            up: Wire::default(),
            down: VecDeque::new(),
            stopping: VecDeque::new(),
            client: Client::new(Contact::DEFAULT),
            events: Vec::new(),
        }
    }

    /// The root takes one message, if there is one.
    fn root_takes(&mut self) -> bool {
        let Some(message) = self.up.0.pop_front() else { return false };
        // Versions it does not speak are an error and an answer; so is what came too late.
        let _ = self.server.guest_message(&message);
        self.act();
        true
    }

    /// The root does what it owes. Workers start at once and stop when told to by the test.
    fn act(&mut self) {
        while let Some(action) = self.server.next_action() {
            match action {
                Action::Post { payload, .. } => self.down.push_back(payload.into_vec()),
                Action::DiscardPosts => self.down.clear(),
                Action::Open(request) => self.server.channel_opened(request.relid, true),
                Action::Close { relid } => self.stopping.push_back(relid),
                // No worker uses any list.
                Action::GpadlWanted { relid, gpadl } => self.server.gpadl_unused(relid, gpadl),
                Action::Retarget { .. }
                | Action::GpadlAdded { .. }
                | Action::GpadlRemoved { .. } => {}
            }
        }
    }

    fn worker_stops(&mut self) -> bool {
        let Some(relid) = self.stopping.pop_front() else { return false };
        self.server.channel_closed(relid);
        self.act();
        true
    }

    /// The guest takes one message, if there is one.
    fn guest_takes(&mut self) -> Result<bool, ConnectionError> {
        let Some(message) = self.down.pop_front() else { return Ok(false) };
        let event = self.client.message(&mut self.up, &message)?;
        self.events.extend(event);
        Ok(true)
    }

    /// Everything that is under way arrives. Returns what the guest was told.
    fn settle(&mut self) -> Vec<Event> {
        while self.root_takes() || self.worker_stops() || self.guest_takes().expect("no lie") {}
        std::mem::take(&mut self.events)
    }

    fn connected() -> Self {
        let mut bus = Self::new();
        bus.client.connect(&mut bus.up).unwrap();
        assert_eq!(
            bus.settle(),
            [
                Event::Connected(Version::V5_3),
                Event::Offered(Relid(1)),
                Event::Offered(Relid(2)),
                Event::AllOffered,
            ]
        );
        bus
    }

    /// Makes a list of `pages` pages for `relid` and opens the channel with it.
    fn open(&mut self, relid: Relid, pages: u64) -> GpadlId {
        let ring = self.create(relid, pages).unwrap();
        assert_eq!(self.settle(), [Event::GpadlCreated(ring)]);
        self.try_open(relid, ring, (pages / 2) as u32).unwrap();
        assert_eq!(self.settle(), [Event::Opened(relid)]);
        ring
    }

    fn create(&mut self, relid: Relid, pages: u64) -> Result<GpadlId, RequestError> {
        let pages: Vec<u64> = (100..100 + pages).collect();
        self.client.create_gpadl(&mut self.up, relid, pages.into_iter())
    }

    fn try_open(&mut self, relid: Relid, ring: GpadlId, at: u32) -> Result<(), RequestError> {
        self.client.open(&mut self.up, relid, ring, at, 1, &[0; USER_DATA])
    }
}

#[test]
fn a_life() {
    let mut bus = Bus::connected();
    let offer = *bus.client.offer(Relid(2)).unwrap();
    assert_eq!((offer.class, offer.instance), (SECOND.class, SECOND.instance));
    assert_eq!(offer.connection, Server::connection_of(Relid(2)));

    for _ in 0..3 {
        let ring = bus.open(Relid(1), 64);
        bus.server.offer_subchannels(Relid(1), 2);
        bus.act();
        let relids: Vec<Relid> = bus
            .settle()
            .into_iter()
            .map(|event| match event {
                Event::Offered(relid) => relid,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(relids.len(), 2);
        let known: Vec<Relid> = bus.client.subchannels(Relid(1)).map(|o| o.relid).collect();
        assert_eq!(known, relids);
        let sub_ring = bus.open(relids[0], 8);

        bus.client.close(&mut bus.up, relids[0]).unwrap();
        bus.client.teardown_gpadl(&mut bus.up, sub_ring).unwrap();
        assert_eq!(bus.settle(), [Event::GpadlTornDown(sub_ring)]);

        // Sub-channels go with the device's first.
        bus.client.close(&mut bus.up, Relid(1)).unwrap();
        bus.client.teardown_gpadl(&mut bus.up, ring).unwrap();
        let mut events = bus.settle();
        events.sort_by_key(|event| matches!(event, Event::GpadlTornDown(_)));
        assert_eq!(
            events,
            [Event::Rescinded(relids[0]), Event::Rescinded(relids[1]), Event::GpadlTornDown(ring)]
        );
        for relid in relids {
            bus.client.release(&mut bus.up, relid).unwrap();
        }
        assert_eq!(bus.settle(), []);
    }
    bus.client.unload(&mut bus.up).unwrap();
    assert_eq!(bus.settle(), [Event::Unloaded]);
    bus.client.connect(&mut bus.up).unwrap();
    assert_eq!(bus.settle().len(), 4);
}

#[test]
fn pages_come_back_when_the_worker_has_stopped() {
    let mut bus = Bus::connected();
    let ring = bus.open(Relid(1), 8);
    bus.client.close(&mut bus.up, Relid(1)).unwrap();
    bus.client.teardown_gpadl(&mut bus.up, ring).unwrap();
    while bus.root_takes() || bus.guest_takes().unwrap() {}
    assert_eq!(bus.events, []);
    assert!(bus.worker_stops());
    assert_eq!(bus.settle(), [Event::GpadlTornDown(ring)]);
}

#[test]
fn long_lists_arrive() {
    let mut bus = Bus::connected();
    for pages in [1, 26, 27, 54, 4096, 8190] {
        let id = bus.create(Relid(2), pages).unwrap();
        assert_eq!(bus.settle(), [Event::GpadlCreated(id)], "{pages} pages");
        bus.client.teardown_gpadl(&mut bus.up, id).unwrap();
        assert_eq!(bus.settle(), [Event::GpadlTornDown(id)]);
    }
    let pages = [1 << 30].into_iter();
    let id = bus.client.create_gpadl(&mut bus.up, Relid(2), pages).unwrap();
    let refused = bus.settle();
    assert!(matches!(refused[..], [Event::GpadlRefused { gpadl, .. }] if gpadl == id));
}

#[test]
fn impossible_rings_are_refused_and_possible_ones_then_taken() {
    let mut bus = Bus::connected();
    let ring = bus.create(Relid(1), 8).unwrap();
    let _ = bus.settle();
    for at in [0, 1, 7, 8, u32::MAX] {
        bus.try_open(Relid(1), ring, at).unwrap();
        let refused = bus.settle();
        assert!(matches!(refused[..], [Event::OpenRefused { relid: Relid(1), .. }]), "{at}");
    }
    bus.try_open(Relid(1), ring, 4).unwrap();
    assert_eq!(bus.settle(), [Event::Opened(Relid(1))]);
}

#[test]
fn a_device_is_unplugged_and_another_plugged_in() {
    let mut bus = Bus::connected();
    bus.open(Relid(1), 8);
    bus.server.rescind(Relid(1));
    bus.act();
    assert_eq!(bus.settle(), [Event::Rescinded(Relid(1))]);
    bus.client.release(&mut bus.up, Relid(1)).unwrap();
    assert_eq!(bus.settle(), []);
    let relid = bus.server.offer(FIRST).unwrap();
    bus.act();
    assert_eq!(bus.settle(), [Event::Offered(relid)]);
    bus.open(relid, 8);
}

/// What either side may do at any time.
#[derive(Clone, Copy, Debug)]
enum Step {
    RootTakes,
    GuestTakes,
    WorkerStops,
    Create { relid: u32, pages: u64 },
    Open { relid: u32 },
    Close { relid: u32 },
    TearDown { which: usize },
    Release { relid: u32 },
    Unload,
    Connect,
    OfferSubchannels { relid: u32, count: u16 },
    Rescind { relid: u32 },
    Plug,
}

fn step() -> impl Strategy<Value = Step> {
    let relid = 1u32..8;
    prop_oneof![
        10 => Just(Step::RootTakes),
        10 => Just(Step::GuestTakes),
        3 => Just(Step::WorkerStops),
        4 => (relid.clone(), 2u64..60).prop_map(|(relid, pages)| Step::Create { relid, pages }),
        4 => relid.clone().prop_map(|relid| Step::Open { relid }),
        3 => relid.clone().prop_map(|relid| Step::Close { relid }),
        3 => (0usize..8).prop_map(|which| Step::TearDown { which }),
        4 => relid.clone().prop_map(|relid| Step::Release { relid }),
        1 => prop_oneof![9 => Just(Step::Connect), 1 => Just(Step::Unload)],
        2 => (relid.clone(), 1u16..4)
            .prop_map(|(relid, count)| Step::OfferSubchannels { relid, count }),
        2 => relid.prop_map(|relid| Step::Rescind { relid }),
        1 => Just(Step::Plug),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// However late messages are, and whatever crosses what, the root never looks like a liar,
    /// and in the end everything can be given back.
    #[test]
    fn an_honest_root_is_never_taken_for_a_liar(steps in prop::collection::vec(step(), 0..250)) {
        let mut bus = Bus::connected();
        let mut rings: Vec<(u32, GpadlId)> = Vec::new();
        let mut plugged = 0u8;
        for step in steps {
            match step {
                Step::RootTakes => drop(bus.root_takes()),
                Step::GuestTakes => {
                    let told = bus.guest_takes();
                    prop_assert!(told.is_ok(), "{:?}", told);
                }
                Step::WorkerStops => drop(bus.worker_stops()),
                Step::Create { relid, pages } => {
                    if let Ok(id) = bus.create(Relid(relid), pages) {
                        rings.push((relid, id));
                    }
                }
                Step::Open { relid } => {
                    if let Some((_, ring)) = rings.iter().rev().find(|ring| ring.0 == relid) {
                        let _ = bus.try_open(Relid(relid), *ring, 2);
                    }
                }
                Step::Close { relid } => {
                    let _ = bus.client.close(&mut bus.up, Relid(relid));
                }
                Step::TearDown { which } => {
                    if let Some((_, ring)) = rings.iter().rev().nth(which) {
                        let _ = bus.client.teardown_gpadl(&mut bus.up, *ring);
                    }
                }
                Step::Release { relid } => {
                    let _ = bus.client.release(&mut bus.up, Relid(relid));
                }
                Step::Unload => drop(bus.client.unload(&mut bus.up)),
                Step::Connect => {
                    // As a guest that starts anew: its slot is empty when the root hears of it.
                    bus.client.connect(&mut bus.up).unwrap();
                    while bus.root_takes() {}
                }
                Step::OfferSubchannels { relid, count } => {
                    bus.server.offer_subchannels(Relid(relid), count);
                    bus.act();
                }
                Step::Rescind { relid } => {
                    bus.server.rescind(Relid(relid));
                    bus.act();
                }
                Step::Plug => {
                    plugged += 1;
                    let instance = Guid::from_wire([plugged; 16]);
                    bus.server.offer(OfferParams::new(vstor::SCSI_CLASS, instance)).unwrap();
                    bus.act();
                }
            }
        }
        bus.settle();
        if bus.client.version().is_some() {
            bus.client.unload(&mut bus.up).unwrap();
            let told = bus.settle();
            prop_assert_eq!(told.last(), Some(&Event::Unloaded));
        }
        prop_assert!(!bus.server.is_busy());
    }
}
