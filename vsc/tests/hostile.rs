//! storvsc against a controller that lies: it says which lie it was and is dead from then on.

mod common;

use common::{Bell, DEPTH, GuestQueue, client_channel, raw_channel};
use hypervisor::GuestMemory;
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::ring::PushError;
use vmbus::vstor::{NtStatus, Operation, Properties, ScsiRequest, SrbStatus, Version, VstorPacket};
use vmbus_server::{Channel as RootChannel, DoubleMapped};
use vsc::Channel;
use vsc::storvsc::{Agreement, Command, Fault, PageList, Queue, SubmitError, words};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The root's end, which says what the test wants.
struct Liar {
    channel: RootChannel,
}

impl Liar {
    /// The next packet of the client.
    fn hear(&mut self) -> Option<(u64, VstorPacket)> {
        let mut buffer = [0; 4096];
        let packet = self.channel.receive(&mut buffer).expect("a sound ring")?;
        let (vstor, _) = VstorPacket::read_from_prefix(packet.payload).expect("a whole packet");
        Some((packet.transaction_id, vstor))
    }

    fn say(&mut self, kind: PacketKind, id: u64, payload: &[u8]) {
        match self.channel.outgoing.push(kind, PacketFlags::NONE, id, &[payload]) {
            Ok(()) | Err(PushError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        self.channel.publish();
    }

    fn answer(&mut self, id: u64, packet: &VstorPacket) {
        self.say(PacketKind::Completion, id, packet.as_bytes());
    }

    /// One step of an honest handshake, but for what `twist` makes of the answer.
    fn shake(&mut self, twist: &mut dyn FnMut(Operation, &VstorPacket, &mut VstorPacket)) {
        while let Some((id, asked)) = self.hear() {
            let mut answer = VstorPacket::answer(NtStatus::Success, &[]);
            if asked.operation == Operation::QueryProperties {
                let properties = Properties {
                    max_transfer: 1 << 20,
                    max_channels: 7,
                    flags: Properties::FLAG_MULTI_CHANNEL,
                    ..Properties::default()
                };
                answer = VstorPacket::answer(NtStatus::Success, properties.as_bytes());
            }
            twist(asked.operation, &asked, &mut answer);
            self.answer(id, &answer);
        }
    }
}

fn pair() -> (Liar, Channel<DoubleMapped, Bell>, GuestMemory) {
    let memory = GuestMemory::new(1 << 20).expect("guest memory");
    let (root, end) = raw_channel(&memory, 0);
    let (channel, _) = client_channel(&memory, end);
    (Liar { channel: root }, channel, memory)
}

/// A handshake whose answers are twisted.
fn connect(
    subchannels: u16,
    mut twist: impl FnMut(Operation, &VstorPacket, &mut VstorPacket),
) -> Result<(GuestQueue, Agreement, Liar, GuestMemory), Fault> {
    let (mut liar, channel, memory) = pair();
    let mut turns = 0;
    let (queue, agreement) = Queue::connect(channel, subchannels, || {
        liar.shake(&mut twist);
        turns += 1;
        turns < 50
    })?;
    Ok((queue, agreement, liar, memory))
}

fn connected() -> (GuestQueue, Liar) {
    let (queue, _, liar, _) = connect(0, |_, _, _| {}).expect("an honest handshake");
    (queue, liar)
}

/// A queue with a read in flight in slot 3, and the id under which to answer it.
fn reading() -> (GuestQueue, Liar, u64) {
    let (mut queue, mut liar) = connected();
    let list = PageList::<{ words(1) }>::new(4096, 0, [1]).unwrap();
    queue.submit(3, &Command::read(0, 0, 8), Some(list.pages())).unwrap();
    queue.publish();
    let (id, asked) = liar.hear().expect("a request");
    assert_eq!(asked.operation, Operation::ExecuteSrb);
    (queue, liar, id)
}

fn success(transferred: u32) -> VstorPacket {
    let mut request = ScsiRequest::new_zeroed();
    request.srb_status = SrbStatus::Success;
    request.transfer_len = transferred;
    VstorPacket::answer(NtStatus::Success, request.as_bytes())
}

#[test]
fn older_versions_are_taken() {
    let mut asked = Vec::new();
    let (_, agreement, ..) = connect(2, |operation, packet, answer| {
        if operation == Operation::QueryProtocolVersion {
            let version: u16 = packet.body().unwrap();
            asked.push(version);
            if version > 0x0501 {
                answer.status = NtStatus::RevisionMismatch;
            }
        }
    })
    .unwrap();
    assert_eq!(asked, [0x0602, 0x0600, 0x0501]);
    assert_eq!(agreement.version, Version::V5_1);
    assert_eq!((agreement.max_subchannels, agreement.subchannels), (7, 2));
}

#[test]
fn no_more_sub_channels_than_there_are_and_none_if_refused() {
    let (_, agreement, ..) = connect(20, |_, _, _| {}).unwrap();
    assert_eq!(agreement.subchannels, 7);
    let (_, agreement, ..) = connect(20, |operation, _, answer| {
        if operation == Operation::CreateSubChannels {
            answer.status = NtStatus::NotSupported;
        }
    })
    .unwrap();
    assert_eq!(agreement.subchannels, 0);
}

#[test]
fn handshakes_that_fail() {
    let refuse = |which: Operation| {
        connect(1, move |operation, _, answer| {
            if operation == which {
                answer.status = NtStatus::Unsuccessful;
            }
        })
        .err()
    };
    for operation in
        [Operation::BeginInitialization, Operation::QueryProperties, Operation::EndInitialization]
    {
        assert_eq!(
            refuse(operation),
            Some(Fault::Refused { operation: operation.0, status: 0xC000_0001 })
        );
    }
    assert_eq!(refuse(Operation::QueryProtocolVersion), Some(Fault::NoCommonVersion(0xC000_0001)));
    for max_transfer in [0, 1, 4095, u32::MAX] {
        let fault = connect(0, move |operation, _, answer| {
            if operation == Operation::QueryProperties {
                let properties = Properties { max_transfer, ..Properties::default() };
                *answer = VstorPacket::answer(NtStatus::Success, properties.as_bytes());
            }
        })
        .err();
        assert_eq!(fault, Some(Fault::MaxTransfer(max_transfer)));
    }
    let fault = connect(0, |_, _, answer| answer.operation = Operation::RemoveDevice).err();
    assert_eq!(fault, Some(Fault::Operation(2)));
}

#[test]
fn a_controller_that_is_silent_is_given_up() {
    let (_liar, channel, _memory) = pair();
    let result = Queue::<_, _, DEPTH>::connect(channel, 0, || false);
    assert_eq!(result.err(), Some(Fault::TimedOut));
}

#[test]
fn lies_end_the_queue() {
    type Lie = fn(&mut Liar, u64);
    type Verdict = fn(u64) -> Fault;
    let lies: &[(&str, Lie, Verdict)] = &[
        (
            "an id never given",
            |liar, id| liar.answer(id + 1, &success(4096)),
            |id| Fault::UnknownAnswer(id + 1),
        ),
        (
            "an id of no slot",
            |liar, id| liar.answer(id | 0xffff, &success(4096)),
            |id| Fault::UnknownAnswer(id | 0xffff),
        ),
        (
            "a generation to come",
            |liar, id| liar.answer(id + (1 << 32), &success(1)),
            |id| Fault::UnknownAnswer(id + (1 << 32)),
        ),
        (
            "the same twice",
            |liar, id| {
                liar.answer(id, &success(4096));
                liar.answer(id, &success(4096));
            },
            Fault::AnsweredTwice,
        ),
        (
            "more than was asked for",
            |liar, id| liar.answer(id, &success(4097)),
            |_| Fault::TooMuch { claimed: 4097, asked: 4096 },
        ),
        (
            "half an answer",
            |liar, id| liar.say(PacketKind::Completion, id, &success(4096).as_bytes()[..56]),
            |_| Fault::Short(56),
        ),
        (
            "nothing at all",
            |liar, id| liar.say(PacketKind::Completion, id, &[]),
            |_| Fault::Short(0),
        ),
        (
            "a command for the guest",
            |liar, id| {
                let packet = VstorPacket::request(Operation::ExecuteSrb, &[]);
                liar.say(PacketKind::InBand, id, packet.as_bytes());
            },
            |_| Fault::Operation(3),
        ),
        (
            "an answer that is none",
            |liar, id| {
                let packet = VstorPacket::request(Operation::EnumerateBus, &[]);
                liar.answer(id, &packet);
            },
            |_| Fault::Operation(11),
        ),
        (
            "a kind that a controller does not send",
            |liar, id| liar.say(PacketKind(12), id, success(1).as_bytes()),
            |_| Fault::PacketKind(12),
        ),
        (
            "announcements without end",
            |liar, _| {
                let packet = VstorPacket::answer(NtStatus::Success, &[]);
                let packet = VstorPacket { operation: Operation::EnumerateBus, ..packet };
                for _ in 0..300 {
                    liar.say(PacketKind::InBand, 0, packet.as_bytes());
                }
            },
            |_| Fault::Flood,
        ),
    ];
    for (name, lie, fault) in lies {
        let (mut queue, mut liar, id) = reading();
        lie(&mut liar, id);
        let mut completions = 0;
        let result = queue.poll(|_| completions += 1);
        assert_eq!(result, Err(fault(id)), "{name}");
        assert!(completions <= 1, "{name}");
        assert_eq!(queue.poll(|_| panic!("{name}")), Err(Fault::Dead));
        let submitted = queue.submit(5, &Command::flush(0), None);
        assert_eq!(submitted, Err(SubmitError::Fault(Fault::Dead)), "{name}");
    }
}

#[test]
fn a_packet_longer_than_any_is_a_broken_ring() {
    let (mut queue, mut liar, id) = reading();
    liar.say(PacketKind::Completion, id, &[0; 1024]);
    assert!(matches!(queue.poll(|_| {}), Err(Fault::Ring(_))));
}

#[test]
fn announcements_are_noted() {
    let (mut queue, mut liar, id) = reading();
    let packet = VstorPacket::answer(NtStatus::Success, &[]);
    let packet = VstorPacket { operation: Operation::EnumerateBus, ..packet };
    liar.say(PacketKind::InBand, 0, packet.as_bytes());
    liar.answer(id, &success(512));
    assert!(!queue.disks_changed());
    let mut ended = Vec::new();
    assert_eq!(queue.poll(|completion| ended.push(completion)), Ok(1));
    assert_eq!((ended[0].slot, ended[0].outcome), (3, Ok(512)));
    assert!(queue.disks_changed() && !queue.disks_changed());
}

#[test]
fn failures_are_told_apart() {
    let (mut queue, mut liar, id) = reading();
    let mut request = ScsiRequest::new_zeroed();
    request.srb_status = SrbStatus(0x84 | 0x40);
    request.scsi_status = 2;
    request.sense_len = 255; // more than there can be
    request.cdb_or_sense[..4].copy_from_slice(&[0x72, 3, 0x11, 0]);
    liar.answer(id, &VstorPacket::answer(NtStatus::Success, request.as_bytes()));
    let mut failure = None;
    queue.poll(|completion| failure = completion.outcome.err()).unwrap();
    let failure = failure.expect("it failed");
    assert_eq!(failure.srb_status, SrbStatus::Error);
    let sense = failure.sense.unwrap();
    assert_eq!((sense.key, sense.code, sense.qualifier), (3, 0x11, 0));
    assert_eq!(failure.to_string(), "the unit refused the command with sense 3/11/00");
}

#[test]
fn a_sleeping_client_is_interrupted_and_a_waking_one_is_not() {
    let (mut queue, mut liar, id) = reading();
    let interrupts = |liar: &Liar| liar.channel.counters.interrupts.get();
    queue.wake();
    let before = interrupts(&liar);
    liar.answer(id, &success(4096));
    assert_eq!(interrupts(&liar), before);
    assert!(!queue.rest(), "there is something: do not sleep");
    assert_eq!(queue.poll(|_| {}), Ok(1));
    assert!(queue.rest());
    let packet = VstorPacket::answer(NtStatus::Success, &[]);
    let packet = VstorPacket { operation: Operation::EnumerateBus, ..packet };
    liar.say(PacketKind::InBand, 0, packet.as_bytes());
    assert_eq!(interrupts(&liar), before + 1);
}
