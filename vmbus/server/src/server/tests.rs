use std::collections::VecDeque;

use hypervisor::PAGE_SIZE;
use proptest::prelude::*;
use vmbus::Guid;
use vmbus::protocol::{GpaRange, MAX_MESSAGE, USER_DATA};

use super::*;

const DISK: Guid = Guid::new("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
const FIRST: Guid = Guid::new("00000000-0000-0000-0000-000000000001");
const SECOND: Guid = Guid::new("00000000-0000-0000-0000-000000000002");
/// Pages from here on are not memory.
const END: u64 = 1 << 20;
/// The first page numbers of a GPADL fit the header message, the others bodies: as Linux does it.
const IN_HEADER: usize = 26;
const IN_BODY: usize = 28;

/// A server with a guest of two VPs and the devices FIRST and SECOND, and what it wanted done.
struct Bench {
    server: Server,
    posts: VecDeque<(u32, Vec<u8>)>,
    rest: VecDeque<Action>,
}

impl Bench {
    fn new() -> Self {
        let mut server = Server::new(2, Limits::default(), |page| page.0 < END);
        assert_eq!(server.offer(OfferParams::new(DISK, FIRST)), Some(Relid(1)));
        assert_eq!(server.offer(OfferParams::new(DISK, SECOND)), Some(Relid(2)));
        Self { server, posts: VecDeque::new(), rest: VecDeque::new() }
    }

    /// With a guest that has all offers.
    fn connected(version: Version) -> Self {
        let mut bench = Self::new();
        bench.send(&contact(version, 0)).unwrap();
        bench.send(&Header::new(MessageKind::RequestOffers)).unwrap();
        assert_eq!(bench.expect::<VersionResponse>(MessageKind::VersionResponse).supported, 1);
        for _ in 0..2 {
            bench.expect::<OfferChannel>(MessageKind::OfferChannel);
        }
        bench.expect::<Header>(MessageKind::AllOffersDelivered);
        bench
    }

    fn collect(&mut self) {
        while let Some(action) = self.server.next_action() {
            match action {
                Action::Post { vp, payload } => self.posts.push_back((vp.0, payload.to_vec())),
                Action::DiscardPosts => self.posts.clear(),
                action => self.rest.push_back(action),
            }
        }
    }

    fn send<T: IntoBytes + Immutable>(&mut self, message: &T) -> Result<(), MessageError> {
        let result = self.server.guest_message(message.as_bytes());
        self.collect();
        result
    }

    /// The next message to the guest, which must be this one, whole.
    fn expect<T: FromBytes>(&mut self, kind: MessageKind) -> T {
        self.expect_at(0, kind)
    }

    fn expect_at<T: FromBytes>(&mut self, vp: u32, kind: MessageKind) -> T {
        let (to, payload) = self.posts.pop_front().unwrap_or_else(|| panic!("no {kind:?}"));
        assert_eq!(Header::read_from_prefix(&payload).unwrap().0.kind, kind);
        assert_eq!(to, vp);
        T::read_from_bytes(&payload).expect("exactly the message's size")
    }

    #[track_caller]
    fn quiet(&self) {
        assert!(self.posts.is_empty(), "{:?}", self.posts);
        assert!(self.rest.is_empty(), "{:?}", self.rest);
    }

    /// Sends a GPADL as Linux does.
    fn gpadl(&mut self, relid: u32, gpadl: u32, pages: &[u64]) -> Result<(), MessageError> {
        let (first, bodies) = gpadl_messages(relid, gpadl, pages);
        let mut result = self.server.guest_message(&first);
        for body in bodies {
            assert_eq!(result, Ok(()));
            result = self.server.guest_message(&body);
        }
        self.collect();
        result
    }

    fn expect_created(&mut self, gpadl: u32) -> bool {
        let created = self.expect::<GpadlCreated>(MessageKind::GpadlCreated);
        assert_eq!(created.gpadl, GpadlId(gpadl));
        created.status == STATUS_SUCCESS
    }

    fn expect_pages(&mut self, gpadl: u32) -> Vec<u64> {
        match self.rest.pop_front() {
            Some(Action::GpadlAdded { gpadl: id, pages, .. }) if id == GpadlId(gpadl) => {
                pages.iter().map(|page| page.0).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    fn expect_removed(&mut self, gpadl: u32) {
        let action = self.rest.pop_front();
        let right = |id: &GpadlId| *id == GpadlId(gpadl);
        assert!(
            matches!(&action, Some(Action::GpadlRemoved { gpadl, .. }) if right(gpadl)),
            "{action:?}"
        );
    }

    fn expect_wanted(&mut self, gpadl: u32) {
        match self.rest.pop_front() {
            Some(Action::GpadlWanted { gpadl: wanted, .. }) => assert_eq!(wanted, GpadlId(gpadl)),
            other => panic!("{other:?}"),
        }
    }

    fn expect_close(&mut self, relid: u32) {
        let action = self.rest.pop_front();
        assert!(
            matches!(action, Some(Action::Close { relid: Relid(r) }) if r == relid),
            "{action:?}"
        );
    }

    /// Opens `relid` with a ring of 2 and 3 pages under the number `gpadl`.
    fn open(&mut self, relid: u32, gpadl: u32) -> OpenRequest {
        self.gpadl(relid, gpadl, &[10, 11, 12, 13, 14]).unwrap();
        assert!(self.expect_created(gpadl));
        self.expect_pages(gpadl);
        self.send(&open(relid, gpadl, 1, 2)).unwrap();
        let Some(Action::Open(request)) = self.rest.pop_front() else { panic!("no Open") };
        self.quiet();
        self.opened(relid, true);
        let result = self.expect::<OpenResult>(MessageKind::OpenResult);
        assert_eq!((result.relid.0, result.open_id, result.status), (relid, 77, STATUS_SUCCESS));
        request
    }

    fn opened(&mut self, relid: u32, ok: bool) {
        self.server.channel_opened(Relid(relid), ok);
        self.collect();
    }

    fn closed(&mut self, relid: u32) {
        self.server.channel_closed(Relid(relid));
        self.collect();
    }
}

fn contact(version: Version, vp: u32) -> InitiateContact {
    InitiateContact {
        header: Header::new(MessageKind::InitiateContact),
        version,
        target_vp: vp,
        interrupt: 2,
        monitor_pages: [0x1000, 0x2000],
    }
}

fn channel(kind: MessageKind, relid: u32) -> ChannelMessage {
    ChannelMessage { header: Header::new(kind), relid: Relid(relid) }
}

fn open(relid: u32, gpadl: u32, vp: u32, downstream_page: u32) -> OpenChannel {
    OpenChannel {
        header: Header::new(MessageKind::OpenChannel),
        relid: Relid(relid),
        open_id: 77,
        ring: GpadlId(gpadl),
        target_vp: vp,
        downstream_page,
        user_data: [9; USER_DATA],
    }
}

fn teardown(relid: u32, gpadl: u32) -> GpadlTeardown {
    GpadlTeardown {
        header: Header::new(MessageKind::GpadlTeardown),
        relid: Relid(relid),
        gpadl: GpadlId(gpadl),
    }
}

fn modify(relid: u32, vp: u32) -> ModifyChannel {
    ModifyChannel {
        header: Header::new(MessageKind::ModifyChannel),
        relid: Relid(relid),
        target_vp: vp,
    }
}

fn gpadl_header(relid: u32, gpadl: u32, pages: usize) -> GpadlHeader {
    GpadlHeader {
        header: Header::new(MessageKind::GpadlHeader),
        relid: Relid(relid),
        gpadl: GpadlId(gpadl),
        range_bytes: (8 + pages * 8) as u16,
        range_count: 1,
        range: GpaRange { len: (pages * PAGE_SIZE) as u32, offset: 0 },
    }
}

fn gpadl_messages(relid: u32, gpadl: u32, pages: &[u64]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let (first, more) = pages.split_at(pages.len().min(IN_HEADER));
    let header = gpadl_header(relid, gpadl, pages.len());
    let header = [header.as_bytes(), first.as_bytes()].concat();
    let bodies = more.chunks(IN_BODY).map(|pages| {
        let body = GpadlBody {
            header: Header::new(MessageKind::GpadlBody),
            message_number: 0,
            gpadl: GpadlId(gpadl),
        };
        let body = [body.as_bytes(), pages.as_bytes()].concat();
        assert!(body.len() <= MAX_MESSAGE);
        body
    });
    assert!(header.len() <= MAX_MESSAGE);
    (header, bodies.collect())
}

#[test]
fn the_guest_learns_which_versions_are_spoken() {
    let mut bench = Bench::new();
    let known = Version::ALL.map(|version| (version, 1));
    let unknown = [(Version::new(6, 0), 0), (Version::new(1, 1), 0), (Version(0), 0)];
    for (version, supported) in known.into_iter().chain(unknown) {
        let result = bench.send(&contact(version, 1));
        assert_eq!(result.is_ok(), supported == 1);
        let answer = bench.expect_at::<VersionResponse>(1, MessageKind::VersionResponse);
        assert_eq!((answer.supported, answer.state), (supported, 0), "{version}");
        assert_eq!(answer.connection, if version.0 >= 0x50000 { 4 } else { 0 });
        assert_eq!(bench.server.version(), (supported == 1).then_some(version));
        bench.quiet();
    }
}

#[test]
fn offers_are_told_once_and_completely() {
    let mut bench = Bench::new();
    let request = Header::new(MessageKind::RequestOffers);
    assert_eq!(bench.send(&request), Err(MessageError::NotConnected(3)));
    bench.send(&contact(Version::V5_3, 0)).unwrap();
    bench.posts.clear();
    bench.send(&request).unwrap();
    for (relid, instance) in [(1, FIRST), (2, SECOND)] {
        let offer = bench.expect::<OfferChannel>(MessageKind::OfferChannel);
        assert_eq!((offer.class, offer.instance), (DISK, instance));
        assert_eq!((offer.relid, offer.connection), (Relid(relid), relid | 0x2000));
        assert_eq!(
            (offer.subchannel, offer.monitor_allocated, offer.dedicated_interrupt),
            (0, 0, 1)
        );
    }
    bench.expect::<Header>(MessageKind::AllOffersDelivered);
    bench.send(&request).unwrap();
    bench.expect::<Header>(MessageKind::AllOffersDelivered);
    bench.quiet();
    // A device that comes later is offered at once.
    bench.server.offer(OfferParams::new(DISK, Guid::ZERO));
    bench.collect();
    assert_eq!(bench.expect::<OfferChannel>(MessageKind::OfferChannel).relid, Relid(3));
}

#[test]
fn gpadls_of_every_size_arrive() {
    let mut bench = Bench::connected(Version::V5_3);
    for (id, count) in [1, 2, 26, 27, 54, 55, 4096, 8190].into_iter().enumerate() {
        let id = 0xe1e10 + id as u32;
        let pages: Vec<u64> = (0..count).map(|i| i * 3 % END).collect();
        bench.gpadl(1, id, &pages).unwrap();
        assert!(bench.expect_created(id));
        assert_eq!(bench.expect_pages(id), pages);
        bench.quiet();
    }
}

#[test]
fn bodies_of_two_gpadls_may_interleave() {
    let mut bench = Bench::connected(Version::V5_3);
    let (one, two): (Vec<u64>, Vec<u64>) = ((0..100).collect(), (1000..1100).collect());
    let (first, bodies) = gpadl_messages(1, 5, &one);
    let (other_first, other_bodies) = gpadl_messages(2, 6, &two);
    for message in [first, other_first]
        .into_iter()
        .chain(bodies.into_iter().zip(other_bodies).flat_map(|(a, b)| [b, a]))
    {
        bench.server.guest_message(&message).unwrap();
    }
    bench.collect();
    assert!(bench.expect_created(6) && bench.expect_created(5));
    assert_eq!(bench.expect_pages(6), two);
    assert_eq!(bench.expect_pages(5), one);
}

#[test]
fn gpadls_that_cannot_be_are_refused_with_an_answer() {
    let mut bench = Bench::connected(Version::V5_3);
    let good = gpadl_header(1, 5, 1);
    let range = GpaRange { len: 4096, offset: 0 };
    let cases: [(GpadlHeader, u64, GpadlError); 8] = [
        (GpadlHeader { relid: Relid(9), ..good }, 1, GpadlError::Channel),
        (GpadlHeader { range_count: 0, ..good }, 1, GpadlError::Shape),
        (GpadlHeader { range_count: 2, ..good }, 1, GpadlError::Shape),
        (GpadlHeader { range_bytes: 24, ..good }, 1, GpadlError::Shape),
        (GpadlHeader { range: GpaRange { len: 0, ..range }, ..good }, 1, GpadlError::Shape),
        (GpadlHeader { range: GpaRange { offset: 8, ..range }, ..good }, 1, GpadlError::Shape),
        (GpadlHeader { range: GpaRange { len: u32::MAX, ..range }, ..good }, 1, GpadlError::Shape),
        (good, END, GpadlError::NotRam(END)),
    ];
    for (header, page, error) in cases {
        let message = [header.as_bytes(), page.as_bytes()].concat();
        assert_eq!(
            bench.server.guest_message(&message),
            Err(MessageError::Gpadl(GpadlId(5), error))
        );
        bench.collect();
        assert!(!bench.expect_created(5));
        bench.quiet();
    }
    // In a later message, too; what follows is met with silence.
    let mut pages = [1; 60];
    pages[40] = u64::MAX;
    let (header, bodies) = gpadl_messages(1, 5, &pages);
    bench.server.guest_message(&header).unwrap();
    let error = |error| Err(MessageError::Gpadl(GpadlId(5), error));
    assert_eq!(bench.server.guest_message(&bodies[0]), error(GpadlError::NotRam(u64::MAX)));
    assert_eq!(bench.server.guest_message(&bodies[1]), error(GpadlError::Unknown));
    bench.collect();
    assert!(!bench.expect_created(5));
    bench.quiet();
    // The number is free again, and then taken.
    bench.gpadl(1, 5, &[1]).unwrap();
    assert!(bench.expect_created(5));
    bench.expect_pages(5);
    assert_eq!(bench.gpadl(2, 5, &[1]), error(GpadlError::InUse));
    assert!(!bench.expect_created(5));
}

#[test]
fn a_guest_cannot_make_us_keep_much() {
    let limits = Limits { gpadls: 3, pages: 100, ring_pages: 64 };
    let mut bench = Bench::connected(Version::V5_3);
    bench.server.limits = limits;
    bench.server.gpadls = Gpadls::new(limits);
    let error = |id| Err(MessageError::Gpadl(GpadlId(id), GpadlError::Limit));
    bench.gpadl(1, 1, &[1; 60]).unwrap();
    assert_eq!(bench.gpadl(1, 2, &[1; 41]), error(2));
    assert_eq!(bench.server.gpadls.total_pages(), 60);
    bench.gpadl(1, 3, &[1; 20]).unwrap();
    bench.gpadl(1, 4, &[1; 20]).unwrap();
    assert_eq!(bench.gpadl(1, 5, &[1]), error(5));
    for id in [1, 3, 4] {
        bench.send(&teardown(1, id)).unwrap();
    }
    assert_eq!(bench.server.gpadls.total_pages(), 0);
    bench.gpadl(1, 6, &[1; 100]).unwrap();
}

#[test]
fn a_channel_opens_and_closes() {
    let mut bench = Bench::connected(Version::V5_3);
    let request = bench.open(2, 5);
    assert_eq!((request.relid, request.primary, request.subchannel), (Relid(2), Relid(2), 0));
    assert_eq!(request.incoming, [Gpn(10), Gpn(11)]);
    assert_eq!(request.outgoing, [Gpn(12), Gpn(13), Gpn(14)]);
    assert_eq!((request.vp, request.user_data), (VpIndex(1), [9; USER_DATA]));

    bench.send(&channel(MessageKind::CloseChannel, 2)).unwrap();
    bench.expect_close(2);
    // The guest wants its pages back while the worker may still touch them.
    bench.send(&teardown(2, 5)).unwrap();
    bench.quiet();
    bench.closed(2);
    bench.expect_removed(5);
    assert_eq!(bench.expect::<GpadlTorndown>(MessageKind::GpadlTorndown).gpadl, GpadlId(5));
    bench.quiet();
    bench.open(2, 5);
}

#[test]
fn opens_that_cannot_be_are_refused_with_an_answer() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.gpadl(1, 5, &[1, 2, 3, 4, 5]).unwrap();
    bench.gpadl(1, 6, &[1; 3000]).unwrap();
    let (partial, _) = gpadl_messages(1, 7, &[1; 40]);
    bench.server.guest_message(&partial).unwrap();
    bench.posts.clear();
    bench.rest.clear();
    let ring = |relid| MessageError::Ring(Relid(relid));
    for (request, error) in [
        (open(9, 5, 0, 2), MessageError::Channel { kind: 5, relid: Relid(9) }),
        (open(1, 5, 2, 2), MessageError::Vp(2)),
        (open(1, 4, 0, 2), ring(1)),
        (open(2, 5, 0, 2), ring(2)),
        (open(1, 7, 0, 2), ring(1)),
        (open(1, 5, 0, 0), ring(1)),
        (open(1, 5, 0, 1), ring(1)),
        (open(1, 5, 0, 4), ring(1)),
        (open(1, 5, 0, 5), ring(1)),
        (open(1, 5, 0, u32::MAX), ring(1)),
        (open(1, 6, 0, 2), ring(1)),
    ] {
        assert_eq!(bench.send(&request), Err(error));
        let result = bench.expect::<OpenResult>(MessageKind::OpenResult);
        assert_eq!((result.relid, result.open_id), (request.relid, 77));
        assert_ne!(result.status, STATUS_SUCCESS);
        bench.quiet();
    }
    // A worker that could not be started.
    bench.send(&open(1, 5, 0, 2)).unwrap();
    bench.rest.clear();
    bench.opened(1, false);
    assert_ne!(bench.expect::<OpenResult>(MessageKind::OpenResult).status, STATUS_SUCCESS);
    // Twice.
    bench.send(&open(1, 5, 0, 2)).unwrap();
    bench.opened(1, true);
    assert_eq!(bench.expect::<OpenResult>(MessageKind::OpenResult).status, STATUS_SUCCESS);
    bench.rest.clear();
    bench.send(&open(1, 5, 0, 2)).unwrap_err();
    assert_ne!(bench.expect::<OpenResult>(MessageKind::OpenResult).status, STATUS_SUCCESS);
    bench.quiet();
}

#[test]
fn a_worker_may_give_up_by_itself() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.open(1, 5);
    bench.closed(1);
    bench.quiet();
    bench.send(&channel(MessageKind::CloseChannel, 1)).unwrap();
    bench.quiet();
    bench.send(&teardown(1, 5)).unwrap();
    bench.expect_removed(5);
    bench.expect::<GpadlTorndown>(MessageKind::GpadlTorndown);
    bench.open(1, 6);
}

#[test]
fn shared_pages_are_given_back_when_no_worker_uses_them() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.open(1, 5);
    bench.server.offer_subchannels(Relid(1), 1);
    bench.collect();
    let relid = bench.expect::<OfferChannel>(MessageKind::OfferChannel).relid.0;
    bench.open(relid, 6);
    for id in [7, 8] {
        bench.gpadl(1, id, &[20, 21]).unwrap();
        assert!(bench.expect_created(id));
        bench.expect_pages(id);
    }
    // While the channel is open, when its worker says so; not if nobody has asked.
    bench.server.gpadl_unused(Relid(1), GpadlId(7));
    bench.collect();
    bench.quiet();
    bench.send(&teardown(1, 7)).unwrap();
    bench.expect_wanted(7);
    bench.quiet();
    bench.server.gpadl_unused(Relid(1), GpadlId(7));
    bench.collect();
    bench.expect_removed(7);
    bench.expect::<GpadlTorndown>(MessageKind::GpadlTorndown);
    // Otherwise when all of the device's workers have stopped: a sub-channel's uses them too.
    bench.send(&channel(MessageKind::CloseChannel, 1)).unwrap();
    bench.expect_close(1);
    bench.expect_close(relid);
    bench.send(&teardown(1, 8)).unwrap();
    bench.expect_wanted(8);
    bench.quiet();
    bench.closed(1);
    bench.quiet();
    bench.closed(relid);
    bench.expect_removed(8);
    assert_eq!(bench.expect::<GpadlTorndown>(MessageKind::GpadlTorndown).gpadl, GpadlId(8));
}

#[test]
fn a_close_that_overtakes_the_open_is_not_lost() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.gpadl(1, 5, &[1, 2, 3, 4]).unwrap();
    bench.send(&open(1, 5, 0, 2)).unwrap();
    bench.posts.clear();
    bench.rest.clear();
    bench.send(&channel(MessageKind::CloseChannel, 1)).unwrap();
    bench.quiet();
    bench.opened(1, true);
    bench.expect_close(1);
    bench.quiet();
}

#[test]
fn contact_starts_over_once_all_workers_have_stopped() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.open(1, 5);
    bench.open(2, 6);
    // An answer that the guest has not read yet would confuse the next one.
    bench.gpadl(1, 7, &[1]).unwrap();
    assert_eq!(bench.posts.len(), 1);
    bench.expect_pages(7);
    bench.send(&contact(Version::V4_0, 1)).unwrap();
    bench.expect_close(1);
    bench.expect_close(2);
    bench.quiet();
    assert_eq!(
        bench.send(&Header::new(MessageKind::RequestOffers)),
        Err(MessageError::NotConnected(3))
    );
    bench.closed(2);
    bench.quiet();
    // It asks again, for another version.
    bench.send(&contact(Version::V5_1, 1)).unwrap();
    bench.quiet();
    bench.closed(1);
    for gpadl in [5, 7, 6] {
        bench.expect_removed(gpadl);
    }
    let answer = bench.expect_at::<VersionResponse>(1, MessageKind::VersionResponse);
    assert_eq!((answer.supported, bench.server.version()), (1, Some(Version::V5_1)));
    bench.quiet();
    bench.send(&Header::new(MessageKind::RequestOffers)).unwrap();
    assert_eq!(bench.posts.len(), 3, "both offers again, and the end");
    assert_eq!(bench.server.gpadls.total_pages(), 0);
}

#[test]
fn unload_is_answered_once_all_workers_have_stopped() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.open(1, 5);
    bench.send(&Header::new(MessageKind::Unload)).unwrap();
    bench.expect_close(1);
    bench.quiet();
    bench.closed(1);
    bench.expect_removed(5);
    bench.expect::<Header>(MessageKind::UnloadResponse);
    bench.quiet();
    assert_eq!(bench.server.version(), None);
}

#[test]
fn a_withdrawn_offer_keeps_its_number_until_released() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.open(1, 5);
    bench.server.rescind(Relid(1));
    bench.collect();
    bench.expect_close(1);
    bench.quiet();
    // A guest that lets go of its own accord does not end the worker's hold either.
    bench.send(&channel(MessageKind::CloseChannel, 1)).unwrap();
    bench.quiet();
    bench.closed(1);
    bench.expect_removed(5);
    bench.expect::<ChannelMessage>(MessageKind::RescindOffer);
    bench.quiet();
    assert!(bench.server.channels.get(Relid(1)).is_some(), "the guest has not let go");
    bench.send(&channel(MessageKind::RelidReleased, 1)).unwrap();
    assert!(bench.server.channels.get(Relid(1)).is_none());
    bench.quiet();

    bench.server.rescind(Relid(2));
    bench.collect();
    bench.expect::<ChannelMessage>(MessageKind::RescindOffer);
    assert!(bench.gpadl(2, 6, &[1]).is_err());
    assert!(!bench.expect_created(6));
    bench.send(&open(2, 6, 0, 2)).unwrap_err();
    bench.expect::<OpenResult>(MessageKind::OpenResult);
    assert!(bench.server.channels.get(Relid(2)).is_some(), "the guest has not let go");
    bench.send(&channel(MessageKind::RelidReleased, 2)).unwrap();
    assert!(bench.server.channels.relids().is_empty());
    bench.send(&channel(MessageKind::RelidReleased, 2)).unwrap_err();
    bench.quiet();
}

#[test]
fn moving_a_channel_is_answered_from_5_3_on() {
    for version in Version::ALL {
        let mut bench = Bench::connected(version);
        bench.open(1, 5);
        let answer = |bench: &mut Bench| {
            (version >= Version::V5_3).then(|| {
                bench
                    .expect::<ModifyChannelResponse>(MessageKind::ModifyChannelResponse)
                    .status
                    .eq(&STATUS_SUCCESS)
            })
        };
        bench.send(&modify(1, 0)).unwrap();
        let action = bench.rest.pop_front();
        assert!(
            matches!(action, Some(Action::Retarget { relid: Relid(1), vp: VpIndex(0) })),
            "{action:?}"
        );
        assert_ne!(answer(&mut bench), Some(false));
        bench.quiet();
        for (relid, vp) in [(1, 2), (2, 0), (7, 0)] {
            bench.send(&modify(relid, vp)).unwrap_err();
            assert_ne!(answer(&mut bench), Some(true));
            bench.quiet();
        }
    }
}

#[test]
fn subchannels_come_and_go_with_the_first_channel() {
    let mut bench = Bench::connected(Version::V5_3);
    let ask = |bench: &mut Bench, count| {
        bench.server.offer_subchannels(Relid(1), count);
        bench.collect();
    };
    ask(&mut bench, 2);
    bench.quiet();
    bench.open(1, 5);
    ask(&mut bench, 2);
    for index in 1..=2 {
        let offer = bench.expect::<OfferChannel>(MessageKind::OfferChannel);
        assert_eq!((offer.class, offer.instance, offer.subchannel), (DISK, FIRST, index));
        assert_eq!(offer.relid, Relid(2 + u32::from(index)));
    }
    ask(&mut bench, 1);
    bench.quiet();
    let request = bench.open(4, 6);
    assert_eq!((request.primary, request.subchannel), (Relid(1), 2));

    // As Linux closes them: the sub-channel, then the first one.
    bench.send(&channel(MessageKind::CloseChannel, 4)).unwrap();
    bench.send(&teardown(4, 6)).unwrap();
    bench.expect_close(4);
    bench.closed(4);
    bench.expect_removed(6);
    bench.expect::<GpadlTorndown>(MessageKind::GpadlTorndown);
    bench.send(&channel(MessageKind::CloseChannel, 1)).unwrap();
    bench.expect_close(1);
    for relid in [3, 4] {
        let rescind = bench.expect::<ChannelMessage>(MessageKind::RescindOffer);
        assert_eq!(rescind.relid, Relid(relid));
    }
    bench.send(&teardown(1, 5)).unwrap();
    bench.closed(1);
    bench.expect_removed(5);
    bench.expect::<GpadlTorndown>(MessageKind::GpadlTorndown);
    bench.send(&channel(MessageKind::RelidReleased, 4)).unwrap();

    // The next time the numbers in use are left alone.
    bench.open(1, 5);
    ask(&mut bench, 2);
    for relid in [5, 6] {
        let offer = bench.expect::<OfferChannel>(MessageKind::OfferChannel);
        assert_eq!(offer.relid, Relid(relid));
    }
    // After a reset they are gone, released or not.
    bench.send(&contact(Version::V5_3, 0)).unwrap();
    bench.closed(1);
    assert_eq!(bench.server.channels.relids(), [1, 2].map(Relid));
}

#[test]
fn numbers_run_out_without_harm() {
    let mut bench = Bench::connected(Version::V5_3);
    bench.open(1, 5);
    bench.server.offer_subchannels(Relid(1), u16::MAX);
    bench.collect();
    assert_eq!(bench.posts.len(), 2045);
    assert_eq!(bench.server.offer(OfferParams::new(DISK, Guid::ZERO)), None);
}

#[test]
fn messages_that_are_cut_short_do_nothing() {
    let messages: [Vec<u8>; 9] = [
        contact(Version::V5_3, 0).as_bytes().to_vec(),
        open(1, 5, 0, 2).as_bytes().to_vec(),
        channel(MessageKind::CloseChannel, 1).as_bytes().to_vec(),
        gpadl_header(1, 5, 1).as_bytes().to_vec(),
        gpadl_messages(1, 5, &[1; 27]).1[0][..16].to_vec(),
        teardown(1, 5).as_bytes().to_vec(),
        channel(MessageKind::RelidReleased, 1).as_bytes().to_vec(),
        modify(1, 0).as_bytes().to_vec(),
        Header::new(MessageKind::Unload).as_bytes().to_vec(),
    ];
    for message in messages {
        let mut bench = Bench::connected(Version::V5_3);
        for len in 0..message.len() {
            let result = bench.server.guest_message(&message[..len]);
            assert!(matches!(result, Err(MessageError::Short(_))), "{result:?}");
            bench.collect();
            bench.quiet();
        }
    }
}

#[test]
fn messages_that_no_guest_sends_do_nothing() {
    let mut bench = Bench::connected(Version::V5_3);
    for kind in (0..100).filter(|kind| ![3, 5, 7, 8, 9, 11, 13, 14, 16, 22].contains(kind)) {
        let message = [kind, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1u32];
        assert_eq!(
            bench.server.guest_message(message.as_bytes()),
            Err(MessageError::Unknown(kind))
        );
        bench.collect();
        bench.quiet();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a guest sends, and whenever its workers start and stop.
    #[test]
    fn no_guest_breaks_the_bus(data in prop::collection::vec(any::<u8>(), 0..1500)) {
        crate::fuzzing::fuzz_server(&data);
    }
}
