//! The fuzzers' way to the parsers of what a guest says to its NIC, and what has to hold whatever
//! that is.

use backends::net::{Buffer, ETHERNET_HEADER, Link, MAX_BUFFERS, MAX_FRAME, MacAddr, Offloads};
use hypervisor::{Gpa, GuestMemory};
use vmbus::nvsp::{Message, MessageKind};
use vmbus::packet::Segment;
use vmbus::rndis::{HEADER_SIZE, Header};
use zerocopy::FromBytes;

use super::control::{Control, MAX_MESSAGE};
use super::handshake::{Grants, Handshake, SLOT_HEADER, Step};
use super::objects::{Identity, Objects};
use super::pages::Reader;
use super::slots::Slots;
use super::steering::{LOOK, Steering};
use super::transmit::{Front, Limits, next_frame};

/// NVSP messages, one after the other: a byte of length, and what they say. GPADLs have as many
/// pages as their number says. Between them, a length of 255 is followed by eight bytes that are the
/// transaction id of a completion.
pub(crate) fn fuzz_nvsp(mut data: &[u8]) {
    let grants = Grants { subchannels: 3, max_mtu: 9000 };
    let mut handshake = Handshake::new(grants);
    let mut slots = Slots::new(0, 0..0);
    let mut sent = Vec::new();
    while let Some((len, rest)) = data.split_first() {
        if *len == u8::MAX {
            let Some((id, rest)) = rest.split_first_chunk() else { return };
            data = rest;
            let free = slots.free();
            let id = u64::from_le_bytes(*id);
            let was_sent = sent.iter().position(|packet| *packet == id);
            assert_eq!(slots.complete(id).is_ok(), was_sent.is_some());
            if let Some(index) = was_sent {
                sent.swap_remove(index);
                assert!(slots.free() > free);
            }
            continue;
        }
        let (payload, rest) = rest.split_at(rest.len().min((*len).into()));
        data = rest;
        let Some(message) = Message::parse(payload) else { continue };
        let pages = |gpadl: vmbus::protocol::GpadlId| {
            (gpadl.0 != 0).then_some(usize::try_from(gpadl.0).unwrap_or(usize::MAX))
        };
        let reply = handshake.take(&message, pages);
        match message.kind {
            // Guests wait for these answers without an end.
            MessageKind::Init
            | MessageKind::SendReceiveBuffer
            | MessageKind::SendSendBuffer
            | MessageKind::SubChannel => assert!(reply.answer.is_some()),
            _ => assert!(reply.answer.is_none()),
        }
        match reply.step {
            Step::ReceiveBuffer(layout) => {
                let bytes = u64::from(layout.slot_size) * u64::from(layout.slots);
                assert!(bytes <= u64::from(layout.gpadl.0) * 4096 && layout.slots > 0);
                let frame = u32::from(handshake.mtu()) + ETHERNET_HEADER as u32 + 4;
                assert!(layout.slot_size >= SLOT_HEADER + frame);
                slots = Slots::new(layout.slots, 0..layout.slots);
                (0..layout.slots).for_each(|slot| slots.come_home(slot));
                sent.clear();
                while let Some(slot) = slots.take()
                    && sent.len() < 4
                {
                    sent.extend(slots.hand_over([slot]));
                }
            }
            Step::SendBuffer(layout) => {
                let bytes = u64::from(layout.section_size) * u64::from(layout.sections);
                assert!(bytes <= u64::from(layout.gpadl.0) * 4096 && layout.sections > 0);
            }
            Step::Subchannels(count) => assert!((1..=grants.subchannels).contains(&count)),
            Step::None | Step::RevokeReceive | Step::RevokeSend => {}
        }
    }
}

/// RNDIS control messages, one after the other: two bytes of length, and what they say.
pub(crate) fn fuzz_control(mut data: &[u8]) {
    let identity = Identity {
        address: MacAddr([2, 0, 0, 0, 0, 7]),
        max_mtu: 9000,
        name: "fuzz".into(),
        channels: 4,
        takes: Offloads::ALL,
        gives: Offloads::ALL,
    };
    let link = Link {
        name: "fuzz".into(),
        up: true,
        mtu: 9000,
        speed: 10_000,
        mac: None,
        queues: 4,
        takes: Offloads::ALL,
        gives: Offloads::ALL,
    };
    let mut control = Control::new(Objects::new(identity, &link));
    let mut up = true;
    while let Some(([low, high], rest)) = data.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(MAX_MESSAGE);
        let (message, rest) = rest.split_at(rest.len().min(len));
        data = rest;
        let answer = control.take(message);
        up = !up;
        for reply in [answer, control.set_link(up)].into_iter().flatten() {
            // It fits the smallest slot there is, and says how long it is.
            assert!(reply.len() <= 2048);
            let (header, _) = Header::read_from_prefix(&reply).expect("a header");
            assert_eq!(header.len as usize, reply.len());
            assert!(reply.len() > HEADER_SIZE);
        }
        let settings = control.settings();
        assert!(settings.address.is_station());
        if let Some(spread) = settings.spread {
            // What follows is a frame, as good as any other.
            let mut front = [0; LOOK];
            front.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
            assert!(Steering::new(&spread).channel(&front) < 4);
        }
    }
}

thread_local! {
    static MEMORY: Option<GuestMemory> = GuestMemory::new(1 << 20).ok();
}

/// A packet of frames: a byte says how many stretches it lies in, two bytes for each how long it
/// is, the rest is what lies there. The last stretch is partly beyond memory if the byte's
/// uppermost bit is set.
pub(crate) fn fuzz_data(data: &[u8]) {
    MEMORY.with(|memory| {
        let Some(memory) = memory else { return };
        let Some((choice, mut rest)) = data.split_first() else { return };
        let mut segments = Vec::new();
        let mut gpa = 64;
        for _ in 0..choice & 0x3F {
            let Some(([low, high], after)) = rest.split_first_chunk() else { break };
            rest = after;
            let len = u32::from(u16::from_le_bytes([*low, *high]));
            segments.push(Segment { gpa, len });
            gpa += u64::from(len) + 8;
        }
        if choice & 0x80 != 0 {
            segments.push(Segment { gpa: (1 << 20) - 16, len: 40 });
        }
        let mut left = rest;
        for segment in &segments {
            let (now, later) = left.split_at(left.len().min(segment.len as usize));
            let _ = memory.write(Gpa(segment.gpa), now);
            left = later;
        }
        let takes = if choice & 0x40 == 0 { Offloads::ALL } else { Offloads::NONE };
        let limits = Limits { max_frame: 9022, takes };
        let mut reader = Reader::new(memory, &segments);
        let (mut front, mut buffers) = (Front::new(), Vec::new());
        loop {
            let before = reader.left();
            match next_frame(&mut reader, &limits, &mut front, &mut buffers) {
                Ok(None) => break assert_eq!(before, 0),
                Err(_) => break,
                Ok(Some(frame)) => {
                    assert!(reader.left() < before);
                    let bytes: usize = buffers.iter().map(Buffer::len).sum();
                    assert_eq!(bytes, frame.len as usize);
                    assert!((ETHERNET_HEADER..=MAX_FRAME).contains(&bytes));
                    assert!(buffers.len() <= MAX_BUFFERS);
                    assert!(frame.offload.fits(bytes) && takes.contains(frame.offload.needs()));
                }
            }
        }
    });
}
