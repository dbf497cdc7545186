use std::vec::Vec;

use proptest::prelude::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::*;
use crate::Guid;
use crate::protocol::{
    ChannelMessage, GpadlBody, GpadlCreated, GpadlHeader, GpadlTorndown, Header, InitiateContact,
    MESSAGE_CONNECTION, MESSAGE_CONNECTION_4, OpenChannel, OpenResult, VersionResponse,
};

const DEVICE: Guid = Guid::new("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
const OTHER: Guid = Guid::new("f8615163-df3e-46c5-913f-f2d2f965ed0e");

/// Keeps what is posted, and answers with the statuses it was given first.
#[derive(Default)]
struct Bus {
    posts: Vec<(u32, Vec<u8>)>,
    statuses: Vec<HvStatus>,
    pauses: u32,
}

impl Hypercalls for Bus {
    fn post_message(&mut self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        assert_eq!(message_type, 1);
        if let Some(status) = self.statuses.pop()
            && status != HvStatus::SUCCESS
        {
            return status;
        }
        self.posts.push((connection, payload.to_vec()));
        HvStatus::SUCCESS
    }

    fn signal_event(&mut self, _: u32) {}

    fn pause(&mut self, _: u32) {
        self.pauses += 1;
    }
}

impl Bus {
    /// What was posted last.
    fn last<T: FromBytes>(&self) -> (u32, T) {
        let (connection, payload) = self.posts.last().expect("something was posted");
        (*connection, T::read_from_prefix(payload).expect("a whole message").0)
    }

    fn last_kind(&self) -> MessageKind {
        self.last::<Header>().1.kind
    }
}

fn tell<T: IntoBytes + Immutable>(
    client: &mut Client,
    bus: &mut Bus,
    message: &T,
) -> Result<Option<Event>, ConnectionError> {
    client.message(bus, message.as_bytes())
}

fn version_response(supported: u8, connection: u32) -> VersionResponse {
    let header = Header::new(MessageKind::VersionResponse);
    VersionResponse { header, supported, state: 0, padding: 0, connection }
}

fn offer(relid: u32, instance: Guid, subchannel: u16) -> OfferChannel {
    let mut offer = OfferChannel::new_zeroed();
    offer.header.kind = MessageKind::OfferChannel;
    offer.class = DEVICE;
    offer.instance = instance;
    offer.relid = Relid(relid);
    offer.subchannel = subchannel;
    offer.connection = relid | 0x2000;
    offer
}

fn about(kind: MessageKind, relid: u32) -> ChannelMessage {
    ChannelMessage { header: Header::new(kind), relid: Relid(relid) }
}

fn created(relid: u32, gpadl: GpadlId, status: u32) -> GpadlCreated {
    let header = Header::new(MessageKind::GpadlCreated);
    GpadlCreated { header, relid: Relid(relid), gpadl, status }
}

fn torn_down(gpadl: GpadlId) -> GpadlTorndown {
    GpadlTorndown { header: Header::new(MessageKind::GpadlTorndown), gpadl }
}

fn opened(relid: u32, open_id: u32, status: u32) -> OpenResult {
    let header = Header::new(MessageKind::OpenResult);
    OpenResult { header, relid: Relid(relid), open_id, status }
}

/// A client that has been offered channel 1.
fn connected() -> (Client, Bus) {
    let (mut client, mut bus) = (Client::new(Contact::DEFAULT), Bus::default());
    client.connect(&mut bus).unwrap();
    let event = tell(&mut client, &mut bus, &version_response(1, 4));
    assert_eq!(event, Ok(Some(Event::Connected(Version::V5_3))));
    let event = tell(&mut client, &mut bus, &offer(1, DEVICE, 0));
    assert_eq!(event, Ok(Some(Event::Offered(Relid(1)))));
    (client, bus)
}

/// And has opened it with the list that is returned.
fn open() -> (Client, Bus, GpadlId) {
    let (mut client, mut bus) = connected();
    let ring = client.create_gpadl(&mut bus, Relid(1), [5, 6, 7, 8].into_iter()).unwrap();
    let event = tell(&mut client, &mut bus, &created(1, ring, 0));
    assert_eq!(event, Ok(Some(Event::GpadlCreated(ring))));
    client.open(&mut bus, Relid(1), ring, 2, 0, &[0; USER_DATA]).unwrap();
    let (_, request) = bus.last::<OpenChannel>();
    let event = tell(&mut client, &mut bus, &opened(1, request.open_id, 0));
    assert_eq!(event, Ok(Some(Event::Opened(Relid(1)))));
    (client, bus, ring)
}

#[test]
fn versions_are_tried_from_the_newest() {
    let (mut client, mut bus) = (Client::<4, 4>::new(Contact::DEFAULT), Bus::default());
    client.connect(&mut bus).unwrap();
    for version in Version::ALL {
        let (connection, contact) = bus.last::<InitiateContact>();
        assert_eq!(contact.version, version);
        let newer = version >= Version::V5_0;
        assert_eq!(connection, if newer { MESSAGE_CONNECTION_4 } else { MESSAGE_CONNECTION });
        assert_eq!(contact.interrupt, if newer { 2 } else { 0 });
        let result = client.message(&mut bus, version_response(0, 0).as_bytes());
        if version == Version::V2_4 {
            assert_eq!(result, Err(ConnectionError::NoCommonVersion));
        } else {
            assert_eq!(result, Ok(None));
        }
    }
    assert_eq!(client.version(), None);
}

#[test]
fn a_root_without_the_newer_connection_gets_an_older_version() {
    let (mut client, mut bus) = (Client::<4, 4>::new(Contact::DEFAULT), Bus::default());
    bus.statuses = [HvStatus::INVALID_CONNECTION_ID; 4].to_vec();
    client.connect(&mut bus).unwrap();
    assert_eq!(bus.last::<InitiateContact>().1.version, Version::V4_1);
    let event = client.message(&mut bus, version_response(1, 0).as_bytes());
    assert_eq!(event, Ok(Some(Event::Connected(Version::V4_1))));
    assert_eq!(bus.last::<Header>().0, MESSAGE_CONNECTION);
}

#[test]
fn messages_go_where_the_root_said() {
    let (mut client, mut bus) = (Client::<4, 4>::new(Contact::DEFAULT), Bus::default());
    client.connect(&mut bus).unwrap();
    let event = client.message(&mut bus, version_response(1, 77).as_bytes());
    assert_eq!(event, Ok(Some(Event::Connected(Version::V5_3))));
    assert_eq!(bus.last_kind(), MessageKind::RequestOffers);
    assert_eq!(bus.last::<Header>().0, 77);
}

#[test]
fn a_busy_root_is_asked_again_and_a_deaf_one_given_up() {
    let (mut client, mut bus) = connected();
    bus.statuses =
        [HvStatus::SUCCESS, HvStatus::INSUFFICIENT_MEMORY, HvStatus::INSUFFICIENT_BUFFERS].to_vec();
    client.create_gpadl(&mut bus, Relid(1), [1, 2].into_iter()).unwrap();
    assert_eq!(bus.pauses, 2);

    bus.statuses = std::vec![HvStatus::INSUFFICIENT_BUFFERS; 1000];
    assert_eq!(
        client.create_gpadl(&mut bus, Relid(1), [1, 2].into_iter()),
        Err(RequestError::Post(HvStatus::INSUFFICIENT_BUFFERS))
    );
    bus.statuses = std::vec![HvStatus(5)];
    assert_eq!(client.unload(&mut bus), Err(RequestError::Post(HvStatus(5))));
}

#[test]
fn long_lists_go_in_pieces_and_arrive_whole() {
    for count in [1usize, 26, 27, 54, 55, 4096, MAX_GPADL_PAGES] {
        let (mut client, mut bus) = connected();
        bus.posts.clear();
        let pages: Vec<u64> = (0..count as u64).map(|page| page * 3 + 1).collect();
        client.create_gpadl(&mut bus, Relid(1), pages.iter().copied()).unwrap();
        let (_, first) = &bus.posts[0];
        let (header, rest) = GpadlHeader::read_from_prefix(first).unwrap();
        assert_eq!(usize::from(header.range_bytes), 8 + 8 * count);
        assert_eq!((header.range_count, header.range.offset), (1, 0));
        assert_eq!(header.range.len as usize, count * 4096);
        let mut bytes = rest.to_vec();
        for (_, more) in &bus.posts[1..] {
            assert!(more.len() <= 240);
            let (body, rest) = GpadlBody::read_from_prefix(more).unwrap();
            assert_eq!((body.header.kind, body.gpadl), (MessageKind::GpadlBody, header.gpadl));
            bytes.extend_from_slice(rest);
        }
        assert_eq!(bytes, pages.as_bytes(), "{count} pages");
    }
    let (mut client, mut bus) = connected();
    for count in [0, MAX_GPADL_PAGES + 1] {
        assert_eq!(
            client.create_gpadl(&mut bus, Relid(1), (0..count as u32).map(u64::from)),
            Err(RequestError::Pages(count))
        );
    }
}

#[test]
fn a_channel_is_opened_closed_and_opened_again() {
    let (mut client, mut bus, ring) = open();
    assert!(client.is_open(Relid(1)));
    assert_eq!(client.teardown_gpadl(&mut bus, ring), Err(RequestError::Gpadl(ring)));
    let reopen = client.open(&mut bus, Relid(1), ring, 2, 0, &[0; USER_DATA]);
    assert_eq!(reopen, Err(RequestError::Channel(Relid(1))));
    client.close(&mut bus, Relid(1)).unwrap();
    assert_eq!(bus.last_kind(), MessageKind::CloseChannel);
    client.teardown_gpadl(&mut bus, ring).unwrap();
    let event = tell(&mut client, &mut bus, &torn_down(ring));
    assert_eq!(event, Ok(Some(Event::GpadlTornDown(ring))));

    let again = client.create_gpadl(&mut bus, Relid(1), [5, 6, 7, 8].into_iter()).unwrap();
    assert_ne!(again, ring);
    assert_eq!(
        tell(&mut client, &mut bus, &created(1, again, 5)),
        Ok(Some(Event::GpadlRefused { gpadl: again, status: 5 }))
    );
    let refused = client.open(&mut bus, Relid(1), again, 2, 0, &[0; USER_DATA]);
    assert_eq!(refused, Err(RequestError::Gpadl(again)));
}

#[test]
fn a_refused_open_leaves_the_channel_as_it_was() {
    let (mut client, mut bus) = connected();
    let ring = client.create_gpadl(&mut bus, Relid(1), [5, 6, 7, 8].into_iter()).unwrap();
    let _ = tell(&mut client, &mut bus, &created(1, ring, 0)).unwrap();
    client.open(&mut bus, Relid(1), ring, 2, 0, &[0; USER_DATA]).unwrap();
    let open_id = bus.last::<OpenChannel>().1.open_id;
    assert_eq!(
        tell(&mut client, &mut bus, &opened(1, open_id, 9)),
        Ok(Some(Event::OpenRefused { relid: Relid(1), status: 9 }))
    );
    assert!(!client.is_open(Relid(1)));
    client.teardown_gpadl(&mut bus, ring).unwrap();
}

#[test]
fn sub_channels_belong_to_their_device() {
    let (mut client, mut bus) = connected();
    let _ = tell(&mut client, &mut bus, &offer(2, OTHER, 0)).unwrap();
    let _ = tell(&mut client, &mut bus, &offer(9, DEVICE, 1)).unwrap();
    let _ = tell(&mut client, &mut bus, &offer(5, DEVICE, 2)).unwrap();
    let relids: Vec<u32> = client.subchannels(Relid(1)).map(|offer| offer.relid.0).collect();
    assert_eq!(relids, [9, 5]);
    assert_eq!(client.subchannels(Relid(2)).count(), 0);
}

#[test]
fn a_withdrawn_channel_is_released_and_its_number_used_again() {
    let (mut client, mut bus, ring) = open();
    let event = tell(&mut client, &mut bus, &about(MessageKind::RescindOffer, 1));
    assert_eq!(event, Ok(Some(Event::Rescinded(Relid(1)))));
    assert!(client.offer(Relid(1)).is_none() && !client.is_open(Relid(1)));
    assert_eq!(client.close(&mut bus, Relid(1)), Err(RequestError::Channel(Relid(1))));
    client.release(&mut bus, Relid(1)).unwrap();
    assert_eq!(bus.last_kind(), MessageKind::RelidReleased);
    assert_eq!(client.teardown_gpadl(&mut bus, ring), Err(RequestError::Gpadl(ring)));
    assert_eq!(client.release(&mut bus, Relid(1)), Err(RequestError::Channel(Relid(1))));
    let event = tell(&mut client, &mut bus, &offer(1, OTHER, 0));
    assert_eq!(event, Ok(Some(Event::Offered(Relid(1)))));
}

#[test]
fn answers_that_cross_a_release_are_no_lie_but_one_too_many_is() {
    let (mut client, mut bus) = connected();
    let pending = client.create_gpadl(&mut bus, Relid(1), [1, 2].into_iter()).unwrap();
    let _ = tell(&mut client, &mut bus, &about(MessageKind::RescindOffer, 1)).unwrap();
    client.release(&mut bus, Relid(1)).unwrap();
    assert_eq!(tell(&mut client, &mut bus, &created(1, pending, 1)), Ok(None));
    assert!(tell(&mut client, &mut bus, &created(1, pending, 1)).is_err());
}

#[test]
fn offers_beyond_the_table_are_left_alone() {
    let (mut client, mut bus) = (Client::<1, 1>::new(Contact::DEFAULT), Bus::default());
    client.connect(&mut bus).unwrap();
    let _ = client.message(&mut bus, version_response(1, 4).as_bytes()).unwrap();
    let _ = client.message(&mut bus, offer(1, DEVICE, 0).as_bytes()).unwrap();
    let event = client.message(&mut bus, offer(2, OTHER, 0).as_bytes());
    assert_eq!(event, Ok(Some(Event::OfferDropped(Relid(2)))));
    // Its sub-channels too.
    let event = client.message(&mut bus, offer(3, OTHER, 1).as_bytes());
    assert_eq!(event, Ok(Some(Event::OfferDropped(Relid(3)))));
    for relid in [2, 3] {
        let rescind = about(MessageKind::RescindOffer, relid);
        assert_eq!(client.message(&mut bus, rescind.as_bytes()), Ok(None));
        assert_eq!(bus.last::<ChannelMessage>().1.relid, Relid(relid));
    }
    assert!(client.message(&mut bus, about(MessageKind::RescindOffer, 2).as_bytes()).is_err());
}

/// What a lying root says, and what the client says to that. Each lie ends the connection.
#[test]
fn lies_are_reported_and_end_the_connection() {
    type Lie = fn(&mut Client, &mut Bus, GpadlId) -> Result<Option<Event>, ConnectionError>;
    let lies: &[(&str, Lie)] = &[
        ("a second version response", |c, b, _| tell(c, b, &version_response(1, 4))),
        ("an unload response unasked", |c, b, _| {
            tell(c, b, &Header::new(MessageKind::UnloadResponse))
        }),
        ("an offer twice", |c, b, _| tell(c, b, &offer(1, OTHER, 0))),
        ("a device twice", |c, b, _| tell(c, b, &offer(2, DEVICE, 0))),
        ("channel 0", |c, b, _| tell(c, b, &offer(0, OTHER, 0))),
        ("channel 2048", |c, b, _| tell(c, b, &offer(2048, OTHER, 0))),
        ("a sub-channel of nothing", |c, b, _| tell(c, b, &offer(2, OTHER, 1))),
        ("all offers, twice", |c, b, _| {
            let all = Header::new(MessageKind::AllOffersDelivered);
            let _ = tell(c, b, &all).unwrap();
            tell(c, b, &all)
        }),
        ("an unknown channel withdrawn", |c, b, _| {
            tell(c, b, &about(MessageKind::RescindOffer, 7))
        }),
        ("a channel withdrawn twice", |c, b, _| {
            let _ = tell(c, b, &about(MessageKind::RescindOffer, 1)).unwrap();
            tell(c, b, &about(MessageKind::RescindOffer, 1))
        }),
        ("pages known twice", |c, b, ring| tell(c, b, &created(1, ring, 0))),
        ("pages known unasked", |c, b, _| tell(c, b, &created(1, GpadlId(3), 0))),
        ("pages known to another channel", |c, b, _| {
            let id = c.create_gpadl(b, Relid(1), [1].into_iter()).unwrap();
            tell(c, b, &created(2, id, 0))
        }),
        ("pages given back unasked", |c, b, ring| tell(c, b, &torn_down(ring))),
        ("opened twice", |c, b, _| tell(c, b, &opened(1, 1, 0))),
        ("an unknown channel opened", |c, b, _| tell(c, b, &opened(4, 1, 0))),
        ("a guest's message", |c, b, _| tell(c, b, &about(MessageKind::CloseChannel, 1))),
        ("an unknown message", |c, b, _| tell(c, b, &about(MessageKind(999), 1))),
        ("an empty message", |c, b, _| c.message(b, &[])),
        ("a short offer", |c, b, _| c.message(b, &offer(2, OTHER, 0).as_bytes()[..195])),
        ("a short open result", |c, b, _| c.message(b, &opened(1, 1, 0).as_bytes()[..19])),
    ];
    for (name, lie) in lies {
        let (mut client, mut bus, ring) = open();
        let result = lie(&mut client, &mut bus, ring);
        assert!(result.is_err(), "{name}: {result:?}");
        assert_eq!(client.version(), None, "{name}");
        assert_eq!(client.offers().count(), 0, "{name}");
        assert_eq!(bus.last_kind(), MessageKind::Unload, "{name}");
        assert_eq!(
            client.create_gpadl(&mut bus, Relid(1), [1].into_iter()),
            Err(RequestError::State),
            "{name}"
        );
        // What was under way is passed over, and then one may begin anew.
        assert_eq!(tell(&mut client, &mut bus, &offer(2, OTHER, 0)), Ok(None), "{name}");
        let unloaded = Header::new(MessageKind::UnloadResponse);
        assert_eq!(tell(&mut client, &mut bus, &unloaded), Ok(Some(Event::Unloaded)), "{name}");
        client.connect(&mut bus).unwrap();
    }
}

#[test]
fn a_version_response_must_say_where_messages_go() {
    for (state, connection) in [(0, 0), (0, 1 << 24), (1, 4)] {
        let (mut client, mut bus) = (Client::<4, 4>::new(Contact::DEFAULT), Bus::default());
        client.connect(&mut bus).unwrap();
        let response = VersionResponse { state, ..version_response(1, connection) };
        assert_eq!(
            client.message(&mut bus, response.as_bytes()),
            Err(ConnectionError::VersionResponse(Version::V5_3))
        );
        assert_eq!(client.version(), None);
    }
}

/// A message that is right in form, with numbers small enough to hit something.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    (
        prop_oneof![0u32..26, any::<u32>()],
        prop::collection::vec(prop_oneof![0u32..4, Just(FIRST_GPADL), any::<u32>()], 0..58),
    )
        .prop_map(|(kind, words)| {
            [kind, 0].iter().chain(&words).flat_map(|word| word.to_le_bytes()).collect()
        })
}

proptest! {
    #[test]
    fn any_message_is_taken_without_panic(
        messages in prop::collection::vec(
            prop_oneof![plausible(), prop::collection::vec(any::<u8>(), 0..240)],
            0..60,
        ),
    ) {
        let (mut client, mut bus, ring) = open();
        for message in messages {
            if client.message(&mut bus, &message).is_err() {
                prop_assert_eq!(client.version(), None);
                prop_assert!(!client.is_open(Relid(1)));
                client.connect(&mut bus).unwrap();
                let _ = client.message(&mut bus, version_response(1, 4).as_bytes());
            }
            let _ = client.close(&mut bus, Relid(1));
            let _ = client.teardown_gpadl(&mut bus, ring);
            let _ = client.create_gpadl(&mut bus, Relid(1), [1, 2].into_iter());
        }
    }

    #[test]
    fn any_input_of_the_fuzzer_is_taken(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        fuzz_client(&data);
    }
}
