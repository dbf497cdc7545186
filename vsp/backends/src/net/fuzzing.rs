//! What the fuzzers feed to this room.
#![allow(unsafe_code)]

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::offload::VirtioNetHeader;
use super::stream::Stream;
use super::switch::vlan::PortVlan;
use super::switch::{PortOptions, Switch, SwitchOptions};
use super::{
    Completion, Completions, ETHERNET_HEADER, Frame, MAX_FRAME, Network, Offload, Offloads,
    QueueConfig,
};
use crate::uring::{Tag, Uring};
use zerocopy::FromBytes;

/// Bytes of a buffer for a frame that leaves.
const ROOM: usize = 2048;

/// Frames to a virtual switch, each in the input as its length (two bytes, the lowest first), the
/// header of a virtio-net device, and its bytes. Every frame has to end once; what leaves has to fit
/// its buffer, and a port that takes no offloads gets none.
///
/// # Panics
/// If the switch does not keep that.
pub fn fuzz_switch(input: &[u8]) {
    let Ok(mut uring) = Uring::new(8) else { return };
    let switch = Switch::new(SwitchOptions::new("fuzz"));
    let vlans = [PortVlan::default(), PortVlan::Access(1), PortVlan::default()];
    let ports: Vec<_> = vlans
        .into_iter()
        .filter_map(|vlan| switch.port(PortOptions { vlan, isolated: false }).ok())
        .collect();
    if let Some(port) = ports.last() {
        let _ = port.set_receive_offloads(Offloads::ALL);
    }
    let config = |tag| QueueConfig { index: 0, tag: Tag(tag), sends: 4, receives: 4 };
    let mut queues: Vec<_> = (1..)
        .zip(&ports)
        .filter_map(|(tag, port)| port.queue(config(tag), &mut uring).ok())
        .collect();
    let mut buffers = vec![[0u8; ROOM]; 4];
    let mut done = Completions::with_capacity(16);
    let mut rest = input;
    while let Some((len, after)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len));
        let Ok((header, after)) = VirtioNetHeader::read_from_prefix(after) else { return };
        let (bytes, after) = after.split_at(len.min(after.len()));
        rest = after;
        let Ok(offload) = Offload::try_from(header) else { continue };
        let mut bytes = bytes.to_vec();
        let frame = Frame {
            id: 9,
            len: bytes.len() as u32,
            buffers: &[bytes.as_mut_slice().into()],
            offload,
        };
        let Some((sender, receivers)) = queues.split_first_mut() else { return };
        // SAFETY: a switch has read a frame when the call returns.
        unsafe { sender.send(frame, &mut uring, &mut done) };
        assert!(matches!(done.pop(), Some(Completion::Sent { id: 9, .. })));
        sender.turn(&mut uring, &mut done);
        for (at, receiver) in receivers.iter_mut().enumerate() {
            for _ in 0..400 {
                for (id, buffer) in (0..).zip(&mut buffers) {
                    // SAFETY: the buffers are recalled below.
                    unsafe {
                        receiver.offer(id, &[buffer.as_mut_slice().into()], &mut uring, &mut done);
                    }
                }
                receiver.turn(&mut uring, &mut done);
                receiver.recall(&mut uring, &mut done);
                let mut received = 0;
                while let Some(completion) = done.pop() {
                    if let Completion::Received { len, offload, .. } = completion {
                        assert!(len as usize <= ROOM && offload.fits(len as usize));
                        assert!(at > 0 || offload.needs() == Offloads::NONE);
                        received += 1;
                    }
                }
                assert_eq!(receiver.in_flight(), 0);
                if received < buffers.len() {
                    break;
                }
            }
        }
    }
}

/// Bytes of a stream, the first of which says in pieces of how many of them they come. The frames in
/// them have to arrive, those that are too short or too long for their buffers apart, until a length
/// comes that no frame has; that, or the end, takes the link down.
///
/// # Panics
/// If they do not.
pub fn fuzz_stream(input: &[u8]) {
    let Some((piece, input)) = input.split_first() else { return };
    // No more than the socket holds.
    let input = &input[..input.len().min(64 << 10)];
    let (Ok(mut uring), Ok((ours, mut theirs))) = (Uring::new(8), UnixStream::pair()) else {
        return;
    };
    let Ok(stream) = Stream::new(ours, "fuzz", 1500) else { return };
    let config = QueueConfig { index: 0, tag: Tag(1), sends: 1, receives: 4 };
    let Ok(mut queue) = stream.queue(config, &mut uring) else { return };
    let mut buffers = vec![[0u8; ROOM]; 4];
    let mut done = Completions::with_capacity(16);
    for (id, buffer) in (0..).zip(&mut buffers) {
        // SAFETY: the buffers outlive the ring's operations, which end below.
        unsafe { queue.offer(id, &[buffer.as_mut_slice().into()], &mut uring, &mut done) };
    }
    let mut pieces = input.chunks(usize::from(*piece) * 16 + 1);
    let (mut expected, mut up, mut open) = (frames(input), true, true);
    while up {
        match pieces.next() {
            Some(piece) => open &= theirs.write_all(piece).is_ok(),
            None if open => open = theirs.shutdown(std::net::Shutdown::Write).is_err(),
            None => {}
        }
        queue.turn(&mut uring, &mut done);
        // With all buffers filled, the ring has nothing to wait for.
        let waits = done.is_empty() && queue.prepare_to_sleep();
        if uring.submit_and_wait(waits.into()).is_err() {
            return;
        }
        while let Some(cqe) = uring.next() {
            queue.complete(&cqe, &mut uring, &mut done);
        }
        while let Some(completion) = done.pop() {
            match completion {
                Completion::Received { id, len, offload } => {
                    let buffer = &mut buffers[id as usize];
                    assert_eq!(expected.next(), buffer.get(..len as usize));
                    assert_eq!(offload, Offload::NONE);
                    // SAFETY: as above.
                    unsafe {
                        queue.offer(id, &[buffer.as_mut_slice().into()], &mut uring, &mut done);
                    }
                }
                Completion::Link(false) => up = false,
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(expected.next(), None);
    queue.recall(&mut uring, &mut done);
    while queue.in_flight() > 0 && uring.submit_and_wait(1).is_ok() {
        while let Some(cqe) = uring.next() {
            queue.complete(&cqe, &mut uring, &mut done);
        }
    }
}

/// The frames of a stream that fit their buffers.
fn frames(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let whole = std::iter::from_fn(move || {
        let (len, rest) = bytes.split_first_chunk()?;
        let len = u32::from_be_bytes(*len) as usize;
        let frame = rest.get(..len).filter(|_| (1..=MAX_FRAME).contains(&len))?;
        bytes = rest.get(len..)?;
        Some(frame)
    });
    whole.filter(|frame| (ETHERNET_HEADER..=ROOM).contains(&frame.len()))
}
