use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use hypervisor::Gpn;
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::protocol::{
    ChannelMessage, GpaRange, GpadlCreated, GpadlHeader, GpadlId, GpadlTeardown, GpadlTorndown,
    Header, InitiateContact, MESSAGE_CONNECTION_4, MessageKind, OfferChannel, OpenChannel,
    OpenResult, STATUS_SUCCESS, USER_DATA, Version, VersionResponse,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::*;
use crate::DoubleMapped;

const CLASS: Guid = Guid::new("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
const PATIENCE: Duration = Duration::from_secs(20);
const MEMORY: u64 = 4 << 20;
/// Pages of one ring.
const RING: u64 = 4;

/// A SynIC with one message slot, which counts events.
pub(super) struct FakeSynic {
    slot: Mutex<Slot>,
    filled: EventFd,
    slot_free: EventFd,
    bound: Mutex<HashMap<u32, EventFd>>,
    interrupts: Arc<FakePort>,
}

#[derive(Default)]
struct Slot {
    message: Option<Message>,
    wanted: bool,
}

struct FakePort {
    count: AtomicU64,
    vp: AtomicU64,
    event: EventFd,
}

impl EventPort for FakePort {
    fn signal(&self) -> bool {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.event.write(1).is_ok()
    }

    fn retarget(&self, vp: VpIndex) {
        self.vp.store(vp.0.into(), Ordering::SeqCst);
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

impl FakeSynic {
    pub(super) fn new() -> Arc<Self> {
        let port = FakePort { count: AtomicU64::new(0), vp: AtomicU64::new(0), event: event() };
        Arc::new(Self {
            slot: Mutex::default(),
            filled: event(),
            slot_free: event(),
            bound: Mutex::default(),
            interrupts: Arc::new(port),
        })
    }

    fn signal(&self, connection: u32) -> bool {
        self.bound.lock().unwrap().get(&connection).is_some_and(|event| event.write(1).is_ok())
    }
}

impl Synic for FakeSynic {
    fn post(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted {
        assert_eq!(sint, Sint::VMBUS);
        if vp != VpIndex(0) {
            return Posted::Disabled;
        }
        let mut slot = self.slot.lock().unwrap();
        if slot.message.is_some() {
            slot.wanted = true;
            return Posted::Busy;
        }
        slot.message = Some(*message);
        self.filled.write(1).unwrap();
        Posted::Delivered
    }

    fn slot_free(&self) -> &EventFd {
        &self.slot_free
    }

    fn bind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        let before =
            self.bound.lock().unwrap().insert(connection.get(), event.try_clone().unwrap());
        assert!(before.is_none(), "bound twice");
        Ok(())
    }

    fn unbind(&self, connection: ConnectionId, _event: &EventFd) -> io::Result<()> {
        let before = self.bound.lock().unwrap().remove(&connection.get());
        assert!(before.is_some(), "not bound");
        Ok(())
    }

    fn event_port(&self, _: VpIndex, _: Sint, _: EventFlag) -> Option<Arc<dyn EventPort>> {
        Some(Arc::clone(&self.interrupts) as Arc<dyn EventPort>)
    }
}

/// A device that answers every packet with its own payload. The payload `panic` makes its worker
/// panic, and `more` asks for two sub-channels.
struct Echo {
    instance: Guid,
    workers: Vec<JoinHandle<()>>,
    refuse: bool,
}

impl Echo {
    fn new(number: u8) -> Self {
        Self { instance: Guid::from_wire([number; 16]), workers: Vec::new(), refuse: false }
    }
}

impl Device for Echo {
    fn offer(&self) -> crate::OfferParams {
        crate::OfferParams::new(CLASS, self.instance)
    }

    fn open(&mut self, channel: Channel) -> io::Result<()> {
        if self.refuse {
            return Err(io::Error::other("not today"));
        }
        self.workers.push(thread::spawn(move || echo(channel)));
        Ok(())
    }
}

fn echo(mut channel: Channel) {
    let mut buffer = [0; 512];
    while !channel.stop_requested() {
        loop {
            let packet = match channel.receive(&mut buffer) {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                // The guest has broken the ring: give the channel up.
                Err(_) => return,
            };
            let (id, payload) = (packet.transaction_id, packet.payload);
            assert!(!payload.starts_with(b"panic"), "as asked");
            let none = PacketFlags::NONE;
            channel.outgoing.push(PacketKind::Completion, none, id, &[payload]).unwrap();
            if payload.starts_with(b"more") {
                channel.offer_subchannels(2);
            }
        }
        channel.publish();
        if channel.unmask() {
            channel.wait();
        }
        channel.mask();
    }
}

/// The guest's side: posts messages, reads its slot, and keeps its ends of the rings.
struct Guest {
    memory: GuestMemory,
    synic: Arc<FakeSynic>,
    sink: Arc<dyn MessageSink>,
}

struct Rings {
    outgoing: Outgoing<DoubleMapped>,
    incoming: Incoming<DoubleMapped>,
    connection: u32,
}

fn start(devices: Vec<Box<dyn Device>>) -> (Host, Guest) {
    let memory = GuestMemory::new(MEMORY).unwrap();
    let synic = FakeSynic::new();
    let host = Host::new(memory.clone(), Arc::clone(&synic) as Arc<dyn Synic>, 2, devices).unwrap();
    let guest = Guest { memory, synic, sink: host.sink() };
    (host, guest)
}

impl Guest {
    fn post(&self, message: &(impl IntoBytes + Immutable)) -> HvStatus {
        let connection = ConnectionId::new(MESSAGE_CONNECTION_4);
        self.sink.post(connection, MESSAGE_TYPE, message.as_bytes())
    }

    /// Posts, again and again while there is no room.
    fn send(&self, message: &(impl IntoBytes + Immutable)) {
        loop {
            match self.post(message) {
                HvStatus::SUCCESS => return,
                HvStatus::INSUFFICIENT_BUFFERS => thread::yield_now(),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Takes the message out of the slot.
    fn next(&self) -> Message {
        loop {
            let mut slot = self.synic.slot.lock().unwrap();
            if let Some(message) = slot.message.take() {
                if std::mem::take(&mut slot.wanted) {
                    self.synic.slot_free.write(1).unwrap();
                }
                return message;
            }
            drop(slot);
            let patience = Timespec::try_from(PATIENCE).unwrap();
            let fired = wait([&self.synic.filled], Some(patience)).unwrap();
            assert_eq!(fired, [true], "no message came");
        }
    }

    fn expect<T: FromBytes>(&self, kind: MessageKind) -> T {
        let message = self.next();
        assert_eq!(message.message_type, MESSAGE_TYPE);
        let payload = &message.payload[..message.payload_size.into()];
        assert_eq!(Header::read_from_prefix(payload).unwrap().0.kind, kind);
        T::read_from_bytes(payload).unwrap()
    }

    fn connect(&self, offers: usize) {
        self.send(&contact());
        assert_eq!(self.expect::<VersionResponse>(MessageKind::VersionResponse).supported, 1);
        self.send(&Header::new(MessageKind::RequestOffers));
        for _ in 0..offers {
            self.expect::<OfferChannel>(MessageKind::OfferChannel);
        }
        self.expect::<Header>(MessageKind::AllOffersDelivered);
    }

    /// Opens a channel whose rings lie at page `relid * 16`; `None` if it is refused.
    fn open(&self, relid: u32) -> Option<Rings> {
        self.open_with(relid, 0)
    }

    /// As [`Guest::open`], where the rings start with this write index.
    fn open_with(&self, relid: u32, write_index: u32) -> Option<Rings> {
        let first = u64::from(relid) * 16;
        let pages: Vec<u64> = (first..first + 2 * RING).collect();
        let header = GpadlHeader {
            header: Header::new(MessageKind::GpadlHeader),
            relid: Relid(relid),
            gpadl: GpadlId(relid),
            range_bytes: (8 + pages.len() * 8) as u16,
            range_count: 1,
            range: GpaRange { len: (pages.len() * PAGE_SIZE) as u32, offset: 0 },
        };
        let mut message = [0; 28 + 16 * RING as usize];
        message[..28].copy_from_slice(header.as_bytes());
        message[28..].copy_from_slice(pages.as_bytes());
        self.send(&message);
        let created = self.expect::<GpadlCreated>(MessageKind::GpadlCreated);
        assert_eq!(created.status, STATUS_SUCCESS);
        for page in &pages {
            self.memory.write(Gpn(*page).gpa().unwrap(), &[0; PAGE_SIZE]).unwrap();
        }
        self.memory.write_obj(Gpn(first).gpa().unwrap(), &write_index).unwrap();
        self.send(&OpenChannel {
            header: Header::new(MessageKind::OpenChannel),
            relid: Relid(relid),
            open_id: relid,
            ring: GpadlId(relid),
            target_vp: 0,
            downstream_page: RING as u32,
            user_data: [0; USER_DATA],
        });
        let result = self.expect::<OpenResult>(MessageKind::OpenResult);
        assert_eq!((result.relid, result.open_id), (Relid(relid), relid));
        if result.status != STATUS_SUCCESS {
            return None;
        }
        Some(self.rings(relid))
    }

    /// The guest's ends of an open channel.
    fn rings(&self, relid: u32) -> Rings {
        let first = u64::from(relid) * 16;
        let map = |from: u64| {
            let pages: Vec<Gpn> = (from..from + RING).map(Gpn).collect();
            map_ring(&self.memory, &pages).unwrap()
        };
        Rings {
            outgoing: Outgoing::new(map(first)).unwrap(),
            incoming: Incoming::new(map(first + RING)).unwrap(),
            connection: relid | 0x2000,
        }
    }

    fn close(&self, relid: u32) {
        self.send(&ChannelMessage {
            header: Header::new(MessageKind::CloseChannel),
            relid: Relid(relid),
        });
        self.tear_down(relid);
    }

    fn tear_down(&self, relid: u32) {
        self.send(&GpadlTeardown {
            header: Header::new(MessageKind::GpadlTeardown),
            relid: Relid(relid),
            gpadl: GpadlId(relid),
        });
        let torndown = self.expect::<GpadlTorndown>(MessageKind::GpadlTorndown);
        assert_eq!(torndown.gpadl, GpadlId(relid));
    }

    fn send_packet(&self, rings: &mut Rings, id: u64, payload: &[u8]) {
        rings.outgoing.push(PacketKind::InBand, PacketFlags::NONE, id, &[payload]).unwrap();
        if rings.outgoing.publish() {
            assert!(self.synic.signal(rings.connection), "the doorbell is bound");
        }
    }

    fn receive(&self, rings: &mut Rings) -> (u64, Vec<u8>) {
        let mut buffer = [0; 512];
        loop {
            if let Some(packet) = rings.incoming.read(&mut buffer).unwrap() {
                let result = (packet.transaction_id, packet.payload.to_vec());
                let _ = rings.incoming.publish();
                return result;
            }
            if !rings.incoming.unmask() {
                let patience = Timespec::try_from(PATIENCE).unwrap();
                let fired = wait([&self.synic.interrupts.event], Some(patience)).unwrap();
                assert_eq!(fired, [true], "no interrupt came");
            }
            rings.incoming.mask();
        }
    }

    fn echoes(&self, rings: &mut Rings, id: u64) {
        self.send_packet(rings, id, b"echo me!");
        assert_eq!(self.receive(rings), (id, b"echo me!".to_vec()));
    }
}

fn contact() -> InitiateContact {
    InitiateContact {
        header: Header::new(MessageKind::InitiateContact),
        version: Version::V5_3,
        target_vp: 0,
        interrupt: 2,
        monitor_pages: [0; 2],
    }
}

fn echoes(count: u8) -> Vec<Box<dyn Device>> {
    (1..=count).map(|number| Box::new(Echo::new(number)) as Box<dyn Device>).collect()
}

#[test]
fn a_channel_from_offer_to_unload() {
    let (host, guest) = start(echoes(1));
    guest.connect(1);
    for round in 0..10 {
        let mut rings = guest.open(1).unwrap();
        for id in 0..100 {
            guest.echoes(&mut rings, round * 100 + id);
        }
        guest.close(1);
        assert!(!guest.synic.signal(rings.connection), "the doorbell is unbound");
    }
    let counters = host.counters();
    let [(instance, 0, counters)] = &counters[..] else { panic!("one channel") };
    assert_eq!(*instance, Guid::from_wire([1; 16]));
    assert_eq!(counters.packets_in.get(), 1000);
    assert!(counters.interrupts.get() <= 1000);
    assert!(guest.open(1).is_some());
    guest.send(&Header::new(MessageKind::Unload));
    guest.expect::<Header>(MessageKind::UnloadResponse);
    assert!(guest.synic.bound.lock().unwrap().is_empty());
    assert_eq!(host.stop().len(), 1);
}

#[test]
fn a_guest_that_starts_over_finds_a_new_bus() {
    let (_host, guest) = start(echoes(2));
    for _ in 0..3 {
        guest.connect(2);
        for relid in 1..=2 {
            let mut rings = guest.open(relid).unwrap();
            guest.echoes(&mut rings, 1);
        }
    }
}

#[test]
fn subchannels_reach_the_same_device() {
    let (host, guest) = start(echoes(1));
    guest.connect(1);
    let mut first = guest.open(1).unwrap();
    guest.send_packet(&mut first, 1, b"more");
    guest.receive(&mut first);
    for index in 1..=2 {
        let offer = guest.expect::<OfferChannel>(MessageKind::OfferChannel);
        assert_eq!((offer.subchannel, offer.relid.0), (index, u32::from(index) + 1));
    }
    let mut third = guest.open(3).unwrap();
    guest.echoes(&mut third, 7);
    guest.echoes(&mut first, 8);
    assert_eq!(host.counters().iter().map(|c| c.1).collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn sub_channels_are_asked_for_once_in_an_opening() {
    let (mut channel, mut guest) = crate::testing::pair(1 << 20);
    (0..1000).for_each(|_| channel.offer_subchannels(3));
    assert_eq!(guest.subchannels_requested(), Some(3));
    channel.offer_subchannels(2);
    assert_eq!(guest.subchannels_requested(), Some(3));
    channel.publish();
}

#[test]
fn a_broken_ring_costs_its_channel_only() {
    let (_host, guest) = start(echoes(2));
    guest.connect(2);
    let mut bad = guest.open(1).unwrap();
    let mut good = guest.open(2).unwrap();
    guest.echoes(&mut bad, 1);
    // A write index outside of the ring.
    guest.memory.write_obj(Gpn(16).gpa().unwrap(), &u32::MAX).unwrap();
    guest.synic.signal(bad.connection);
    guest.echoes(&mut good, 2);
    guest.close(1);
    let mut again = guest.open(1).unwrap();
    guest.echoes(&mut again, 3);
    // A worker that panics is no different.
    guest.send_packet(&mut again, 4, b"panic");
    guest.close(1);
    guest.echoes(&mut good, 5);
    assert!(guest.open(1).is_some());
}

#[test]
fn a_ring_that_is_broken_from_the_start_is_refused() {
    let (_host, guest) = start(echoes(1));
    guest.connect(1);
    for index in [4, 3 * PAGE_SIZE as u32, u32::MAX] {
        assert!(guest.open_with(1, index).is_none());
        assert!(guest.synic.bound.lock().unwrap().is_empty());
        guest.tear_down(1);
    }
    assert!(guest.open(1).is_some());
}

#[test]
fn a_device_may_refuse() {
    let mut device = Echo::new(1);
    device.refuse = true;
    let (_host, guest) = start(vec![Box::new(device)]);
    guest.connect(1);
    assert!(guest.open(1).is_none());
    assert!(guest.synic.bound.lock().unwrap().is_empty());
    guest.tear_down(1);
    assert!(guest.open(1).is_none(), "and be asked again");
}

#[test]
fn stopping_ends_all_workers_and_gives_the_devices_back() {
    let (host, guest) = start(echoes(3));
    guest.connect(3);
    let mut rings: Vec<Rings> = (1..=3).map(|relid| guest.open(relid).unwrap()).collect();
    guest.echoes(&mut rings[1], 1);
    let devices = host.stop();
    assert_eq!(devices.len(), 3);
    assert!(guest.synic.bound.lock().unwrap().is_empty());
    assert_eq!(guest.post(&contact()), HvStatus::INVALID_CONNECTION_ID);

    let host =
        Host::new(guest.memory.clone(), Arc::clone(&guest.synic) as Arc<dyn Synic>, 2, devices)
            .unwrap();
    let guest = Guest { sink: host.sink(), ..guest };
    guest.connect(3);
}

#[test]
fn a_guest_that_posts_without_a_pause_delays_no_stop() {
    let (host, guest) = start(echoes(1));
    guest.connect(1);
    let _rings = guest.open(1).unwrap();
    thread::scope(|scope| {
        for _ in 0..3 {
            // Until there is no bus any more. Nobody knows this message.
            scope.spawn(|| while guest.post(&[0xffu8; 8]) != HvStatus::INVALID_CONNECTION_ID {});
        }
        assert_eq!(host.stop().len(), 1);
    });
}

#[test]
fn posts_are_checked_before_they_are_taken() {
    let (_host, guest) = start(Vec::new());
    let post = |connection, kind, len| {
        guest.sink.post(ConnectionId::new(connection), kind, &[0xff; 300][..len])
    };
    for connection in [1, 4, 0x0100_0001] {
        assert_eq!(post(connection, 1, 240), HvStatus::SUCCESS);
    }
    for connection in [0, 2, 3, 5, 0x2001, u32::MAX] {
        assert_eq!(post(connection, 1, 8), HvStatus::INVALID_CONNECTION_ID);
    }
    assert_eq!(post(4, 2, 8), HvStatus::INVALID_HYPERCALL_INPUT);
    assert_eq!(post(4, 1, 241), HvStatus::INVALID_HYPERCALL_INPUT);
    guest.connect(0);
}

/// A device whose `open` waits for the test.
struct Slow(mpsc::Receiver<()>);

impl Device for Slow {
    fn offer(&self) -> crate::OfferParams {
        crate::OfferParams::new(CLASS, Guid::ZERO)
    }

    fn open(&mut self, _: Channel) -> io::Result<()> {
        let _ = self.0.recv();
        Err(io::Error::other("slow, and then no"))
    }
}

#[test]
fn a_vp_is_told_to_wait_and_never_waits_here() {
    let (go, slow) = mpsc::channel();
    let (_host, guest) = start(vec![Box::new(Slow(slow))]);
    guest.connect(1);
    thread::scope(|scope| {
        let opening = scope.spawn(|| guest.open(1));
        // Once the bus's thread is in `open`, the posts pile up.
        let mut taken = 0;
        while guest.post(&[0xffu8; 240]) == HvStatus::SUCCESS {
            taken += 1;
            assert!(taken < 1_000_000, "an inbox without end");
            thread::yield_now();
        }
        assert!(taken >= 16);
        go.send(()).unwrap();
        assert!(opening.join().unwrap().is_none());
    });
}

#[test]
fn a_guest_that_reads_no_answers_gets_no_more() {
    let (_host, guest) = start(echoes(1));
    guest.connect(1);
    let teardown = |gpadl| GpadlTeardown {
        header: Header::new(MessageKind::GpadlTeardown),
        relid: Relid(1),
        gpadl: GpadlId(gpadl),
    };
    // Each is owed an answer, and nobody reads them.
    let mut sent = 0;
    let mut refused = 0;
    while refused < 1000 {
        match guest.post(&teardown(sent)) {
            HvStatus::SUCCESS => (sent, refused) = (sent + 1, 0),
            _ => refused += 1,
        }
        assert!(sent < 10_000, "an outbox without end");
        thread::yield_now();
    }
    assert!(sent as usize >= OUTBOX);
    // None of them is lost, and they come in order.
    for gpadl in 0..sent {
        let torndown = guest.expect::<GpadlTorndown>(MessageKind::GpadlTorndown);
        assert_eq!(torndown.gpadl, GpadlId(gpadl));
    }
    guest.connect(1);
}

/// Lets go of its channel and fails, the first time; the second time it is an [`Echo`].
struct Hesitant {
    asked: mpsc::Sender<()>,
    go: mpsc::Receiver<()>,
    echo: Echo,
}

impl Device for Hesitant {
    fn offer(&self) -> crate::OfferParams {
        self.echo.offer()
    }

    fn open(&mut self, channel: Channel) -> io::Result<()> {
        if self.asked.send(()).is_err() {
            return self.echo.open(channel);
        }
        let _ = self.go.recv();
        Err(io::Error::other("not yet"))
    }
}

#[test]
fn late_news_of_the_last_time_harm_no_new_channel() {
    let (asked, question) = mpsc::channel();
    let (answer, go) = mpsc::channel();
    let device = Hesitant { asked, go, echo: Echo::new(1) };
    let (_host, guest) = start(vec![Box::new(device)]);
    guest.connect(1);
    thread::scope(|scope| {
        let first = scope.spawn(|| guest.open(1));
        question.recv().unwrap();
        drop(question);
        // The bus is in the first `open`, and the second request waits behind it: when that is
        // served, nobody has looked at the news that the first channel is gone.
        guest.send(&OpenChannel {
            header: Header::new(MessageKind::OpenChannel),
            relid: Relid(1),
            open_id: 2,
            ring: GpadlId(1),
            target_vp: 0,
            downstream_page: RING as u32,
            user_data: [0; USER_DATA],
        });
        answer.send(()).unwrap();
        assert!(first.join().unwrap().is_none());
    });
    let result = guest.expect::<OpenResult>(MessageKind::OpenResult);
    assert_eq!((result.open_id, result.status), (2, STATUS_SUCCESS));
    let mut rings = guest.rings(1);
    for id in 0..100 {
        guest.echoes(&mut rings, id);
    }
    guest.close(1);
}

/// Rings of which no two pages are neighbours take a mapping of the host for each page.
#[test]
fn scattered_rings_are_refused_before_the_host_has_no_mappings_left() {
    const CHANNELS: u32 = 12;
    const PAGES: usize = 1024;
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    if limit > 70_000 {
        eprintln!("skipped: this host has more mappings than {CHANNELS} channels can take");
        return;
    }
    let (_host, guest) = start(echoes(CHANNELS as u8));
    guest.connect(CHANNELS as usize);
    // The same pages for all.
    let pages: Vec<u64> = (0..2 * PAGES as u64).map(|n| 100 + n % 2 * 2).collect();
    let open = |relid: u32| {
        let header = GpadlHeader {
            header: Header::new(MessageKind::GpadlHeader),
            relid: Relid(relid),
            gpadl: GpadlId(relid),
            range_bytes: (8 + pages.len() * 8) as u16,
            range_count: 1,
            range: GpaRange { len: (pages.len() * PAGE_SIZE) as u32, offset: 0 },
        };
        let (first, rest) = pages.split_at(26);
        let mut message = [0; 28 + 8 * 26];
        message[..28].copy_from_slice(header.as_bytes());
        message[28..].copy_from_slice(first.as_bytes());
        guest.send(&message);
        for part in rest.chunks(28) {
            let mut message = [0; 16 + 8 * 28];
            let kind = [MessageKind::GpadlBody.0, 0, 0, relid];
            message[..16].copy_from_slice(kind.as_bytes());
            message[16..16 + 8 * part.len()].copy_from_slice(part.as_bytes());
            guest.send(&message);
        }
        let created = guest.expect::<GpadlCreated>(MessageKind::GpadlCreated);
        assert_eq!(created.status, STATUS_SUCCESS);
        guest.send(&OpenChannel {
            header: Header::new(MessageKind::OpenChannel),
            relid: Relid(relid),
            open_id: relid,
            ring: GpadlId(relid),
            target_vp: 0,
            downstream_page: PAGES as u32,
            user_data: [0; USER_DATA],
        });
        guest.expect::<OpenResult>(MessageKind::OpenResult).status == STATUS_SUCCESS
    };
    let opened: Vec<u32> = (1..=CHANNELS).take_while(|relid| open(*relid)).collect();
    let count = opened.len() as u32;
    assert!(count > 0 && count < CHANNELS, "{count} channels opened");
    assert!(mappings() < limit * 3 / 4, "{} of {limit} mappings", mappings());
    // Others are not hurt, and what is closed makes room.
    guest.tear_down(count + 1);
    let mut rings = guest.open(CHANNELS).unwrap();
    guest.echoes(&mut rings, 1);
    guest.close(1);
    assert!(open(count + 1));
}
