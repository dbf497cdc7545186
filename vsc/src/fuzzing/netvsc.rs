//! A host of a NIC that says what it likes.

use core::cell::RefCell;
use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::nvsp::{
    Capabilities, ChannelType, InitComplete, Message, MessageKind, Outgoing as Nvsp,
    RECEIVE_BUFFER, ReceiveBufferComplete, RndisPacket, RndisPacketComplete, SendBufferComplete,
    Status, SubchannelComplete, SubchannelRequest,
};
use vmbus::packet::{PacketKind, TransferRange, write_transfer_pages};
use vmbus::protocol::GpadlId;
use vmbus::ring::{Incoming, Outgoing};
use vmbus::rndis::{
    self, HEADER_SIZE, Header, InitializeComplete, ObjectRequest, Oid, PacketBody, QueryComplete,
    Request, RequestComplete,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Memory, Root};
use crate::netvsc::{Event, Offload, Queue, Setup, Shared};
use crate::{Channel, PageList, SharedBuffer, words};

/// Packets of the queue under way.
const DEPTH: usize = 4;
/// Words in each of the shared buffers.
const BUFFER: usize = 1024;
/// Bytes of a section.
const SECTION: u32 = 1024;

/// A host that follows a script, and otherwise the protocol.
struct Host<'a> {
    root: Root<'a>,
    /// Whether it answers what it was asked, between its lies.
    honest: bool,
    receive: &'a [AtomicU64],
    send: &'a [AtomicU64],
}

impl Host<'_> {
    /// One step of the script, or an honest answer; false at the end of the script.
    fn act(&mut self) -> bool {
        if self.honest {
            self.answer();
        }
        let Some([step, slot, generation, detail]) = self.root.take() else { return false };
        let id = u64::from(generation) << 32 | u64::from(slot);
        match step % 16 {
            // Any bytes at any place in the receive buffer, and a range that may be theirs.
            0..3 => {
                let bytes = self.root.take_up_to(usize::from(detail));
                let at = u32::from(slot) * 8;
                self.receive.write(at as usize, bytes);
                let len = bytes.len() as u32 + u32::from(generation) * u32::from(step >> 4);
                self.deliver(id, at, len);
            }
            // A frame, of which a word may lie.
            3..6 => {
                let mut bytes = [0; 160];
                let Some(lie) = self.root.take::<4>() else { return false };
                frame(&mut bytes, step >> 4);
                if step < 0xf0
                    && let Some(word) = bytes.get_mut(usize::from(slot)..)
                    && let Some(word) = word.first_chunk_mut()
                {
                    *word = lie;
                }
                self.receive.write(0, &bytes);
                self.deliver(id, 0, bytes.len() as u32);
            }
            // A completion, due or not.
            6..8 => {
                let status = Status(u32::from(detail % 8));
                let body = RndisPacketComplete { status };
                let message = Nvsp::new(MessageKind(100 + u32::from(step >> 4)), &body);
                self.root.push(PacketKind::Completion, id, &[], message.as_bytes());
            }
            // A packet of any kind and length.
            8..10 => {
                let bytes = self.root.take_up_to(usize::from(detail) * 2);
                let (headers, payload) = bytes.split_at(bytes.len().min(usize::from(slot) / 8 * 8));
                let headers = headers.as_chunks::<8>().0.as_flattened();
                self.root.push(PacketKind(u16::from(step >> 4)), id, headers, payload);
            }
            // What lies in the receive buffer.
            10 => {
                if let Some(word) = self.root.take()
                    && let Some(place) = self.receive.get(usize::from(detail))
                {
                    place.store(u64::from_le_bytes(word), Ordering::Relaxed);
                }
            }
            11 => self.root.meddle(detail),
            12 => self.root.scribble(detail),
            _ => self.answer(),
        }
        true
    }

    /// Names a range of the receive buffer.
    fn deliver(&mut self, id: u64, offset: u32, len: u32) {
        let mut headers = [0; 16];
        let range = TransferRange { len, offset };
        let headers = write_transfer_pages(&mut headers, RECEIVE_BUFFER, &[range]);
        let body = RndisPacket { channel: ChannelType::Data, section: u32::MAX, section_len: 0 };
        let message = Nvsp::new(MessageKind::SendRndisPacket, &body);
        let headers = headers.unwrap_or_default();
        self.root.push(PacketKind::TransferPages, id, headers, message.as_bytes());
    }

    /// Answers one packet as it should be.
    fn answer(&mut self) {
        let mut buffer = [0; 512];
        let Ok(Some(packet)) = self.root.incoming.read(&mut buffer) else { return };
        let (id, kind) = (packet.transaction_id, packet.kind);
        let message = Message::parse(packet.payload);
        let Some(message) = message.filter(|_| kind != PacketKind::Completion) else {
            let _ = self.root.incoming.publish();
            return;
        };
        let rndis = message.body::<RndisPacket>();
        let answer = match message.kind {
            MessageKind::Init => {
                let status = Status::Success;
                let body = InitComplete { negotiated: 0, max_mdl_chain: 34, status };
                Some(Nvsp::new(MessageKind::InitComplete, &body))
            }
            MessageKind::SendReceiveBuffer => {
                let body = ReceiveBufferComplete {
                    status: Status::Success,
                    sections: 1,
                    offset: 0,
                    slot_size: 2048,
                    slots: 4,
                    end: 8192,
                };
                Some(Nvsp::new(MessageKind::SendReceiveBufferComplete, &body))
            }
            MessageKind::SendSendBuffer => {
                let body = SendBufferComplete { status: Status::Success, section_size: SECTION };
                Some(Nvsp::new(MessageKind::SendSendBufferComplete, &body))
            }
            MessageKind::SubChannel => {
                let count = message.body::<SubchannelRequest>().map_or(0, |body| body.count);
                let body = SubchannelComplete { status: Status::Success, count };
                Some(Nvsp::new(MessageKind::SubChannel, &body))
            }
            MessageKind::SendRndisPacket => {
                let body = RndisPacketComplete { status: Status::Success };
                Some(Nvsp::new(MessageKind::SendRndisPacketComplete, &body))
            }
            _ => None,
        };
        let is_packet = message.kind == MessageKind::SendRndisPacket;
        let _ = self.root.incoming.publish();
        if let Some(answer) = answer {
            self.root.push(PacketKind::Completion, id, &[], answer.as_bytes());
        }
        if let Some(rndis) =
            rndis.filter(|rndis| is_packet && rndis.channel == ChannelType::Control)
        {
            assert!(rndis.section < 8 && rndis.section_len <= SECTION);
            let mut bytes = [0; 64];
            assert!(self.send.read((rndis.section * SECTION) as usize, &mut bytes));
            self.reply(&bytes);
        }
    }

    /// Answers a control message.
    fn reply(&mut self, message: &[u8]) {
        let mut bytes = [0; 64];
        let Ok((header, body)) = Header::read_from_prefix(message) else { return };
        let Ok((Request { id }, _)) = Request::read_from_prefix(body) else { return };
        let status = rndis::Status::Success;
        let len = match header.kind {
            rndis::MessageKind::Initialize => {
                let complete = InitializeComplete {
                    id,
                    max_packets: 4,
                    max_transfer: 0x4000,
                    alignment: 3,
                    ..InitializeComplete::default()
                };
                write(&mut bytes, rndis::MessageKind::InitializeComplete, &complete, &[])
            }
            rndis::MessageKind::Query => {
                let Ok((request, _)) = ObjectRequest::read_from_prefix(body) else { return };
                let value: &[u8] = match request.oid {
                    Oid::PermanentAddress => &[2, 0, 0, 0, 0, 1],
                    Oid::OffloadHardwareCapabilities => &[],
                    _ => &[0; 4],
                };
                let complete = QueryComplete { id, status, len: value.len() as u32, offset: 16 };
                write(&mut bytes, rndis::MessageKind::QueryComplete, &complete, value)
            }
            rndis::MessageKind::Set => {
                let complete = RequestComplete { id, status };
                write(&mut bytes, rndis::MessageKind::SetComplete, &complete, &[])
            }
            _ => return,
        };
        self.receive.write(4096, &bytes);
        self.deliver(0, 4096, len);
    }
}

/// Writes a message to the front of `bytes`. Returns its length.
fn write<T: IntoBytes + Immutable>(
    bytes: &mut [u8],
    kind: rndis::MessageKind,
    body: &T,
    rest: &[u8],
) -> u32 {
    let len = (HEADER_SIZE + size_of::<T>() + rest.len()) as u32;
    let header = Header { kind, len };
    let parts = header.as_bytes().iter().chain(body.as_bytes()).chain(rest);
    bytes.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
    len
}

/// A frame with one piece of information, of this kind.
fn frame(bytes: &mut [u8; 160], kind: u8) {
    let body = PacketBody {
        data_offset: 52,
        data_len: 100,
        info_offset: 36,
        info_len: 16,
        ..PacketBody::default()
    };
    let info = [16, 0, 0, 0, kind, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0];
    write(bytes, rndis::MessageKind::Packet, &body, &info);
    bytes[4] = 160;
}

/// A host of a NIC that says what it likes: `data` is its script. The first byte says whether it
/// keeps to the protocol in between.
pub fn fuzz_netvsc(data: &[u8]) {
    let Some((&choice, script)) = data.split_first() else { return };
    let memory = Memory::new();
    let [up, down] = memory.rings();
    let (Ok(answers), Ok(requests)) = (Incoming::new(down), Outgoing::new(up)) else { return };
    let Some(root) = Root::new(&memory, script) else { return };
    let buffers: [[AtomicU64; BUFFER]; 2] =
        core::array::from_fn(|_| core::array::from_fn(|_| AtomicU64::new(0)));
    let [receive, send] = &buffers;
    let (receive, send) = (receive.as_slice(), send.as_slice());
    let host = RefCell::new(Host { root, honest: choice & 1 != 0, receive, send });
    let act = || host.borrow_mut().act();

    let channel = Channel::new(answers, requests, || {});
    let wanted = u16::from(choice >> 1 & 1);
    let setup = Setup {
        receive: Shared { gpadl: GpadlId(1), memory: receive },
        send: Shared { gpadl: GpadlId(2), memory: send },
        mtu: 1500,
        capabilities: Capabilities::default(),
        subchannels: wanted,
    };
    let Ok((mut queue, agreement)) = Queue::<_, _, _, DEPTH>::connect(channel, setup, act) else {
        return;
    };
    assert!(agreement.subchannels <= wanted);

    let Some(list) = PageList::<{ words(1) }>::new(600, 0, [1]) else { return };
    // Which frames in pages are the host's.
    let mut tags = [false; 8];
    loop {
        let bytes = [0xa5; 300];
        for len in [60, 300] {
            let _ = queue.send(bytes.get(..len).unwrap_or_default(), &Offload::default());
        }
        if let Some((tag, place)) = (0..).zip(&mut tags).find(|(_, busy)| !**busy) {
            *place = queue.send_pages(tag, list.pages(), &Offload::default()).is_ok();
        }
        queue.publish();
        let acted = act();
        let polled = queue.poll(|event| match event {
            Event::Received(frame) => {
                let mut last = [0; 14];
                assert!(frame.len() >= 14 && frame.len() <= BUFFER * 8);
                assert!(frame.read(frame.len() - 14, &mut last));
                assert!(!frame.read(frame.len() - 13, &mut last));
            }
            Event::Sent { tag, .. } => {
                let busy = tags.get_mut(tag as usize).map(core::mem::take);
                assert_eq!(busy, Some(true), "what was not under way has ended");
            }
            Event::Link(_) => {}
        });
        assert!(queue.in_flight() <= DEPTH);
        if polled.is_err() {
            assert!(queue.poll(|_| {}).is_err(), "a fault ends the queue");
            return;
        }
        if !acted {
            return;
        }
        let _ = queue.rest();
        queue.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_script_is_survived(script in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_netvsc(&script);
        }

        #[test]
        fn any_script_of_an_otherwise_honest_host_is_survived(
            choice in any::<u8>(),
            steps in prop::collection::vec((any::<u8>(), 0u8..100, 0u8..4, any::<u8>()), 0..100),
        ) {
            let mut script = Vec::from([choice | 1]);
            for (step, slot, generation, detail) in steps {
                script.extend([step, slot, generation, detail]);
            }
            fuzz_netvsc(&script);
        }
    }
}
