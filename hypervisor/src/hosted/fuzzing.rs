//! What a hosted partition's process may send, for fuzzers and tests: ordinary functions, so that a
//! corpus can be replayed. They fail by panicking.

use std::sync::Arc;

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::synic::HostedSynic;
use super::vp::{Ended, HostedVp, VpError};
use super::wire::Intercept;
use crate::synic::{ConnectionId, HvStatus, MessageSink};
use crate::{Bus, GuestMemory, StopHandle};

/// More do not fit into a socket that nobody reads.
const MOST_PACKETS: usize = 64;

/// Packets of a process that has gone when they are read: `data` is their lengths, a byte each,
/// each followed by the packet.
pub fn fuzz_intercepts(data: &[u8]) {
    let mut packets = Vec::new();
    let mut rest = data;
    while let Some((len, after)) = rest.split_first()
        && packets.len() < MOST_PACKETS
    {
        let (packet, after) = after.split_at(after.len().min(usize::from(*len)));
        packets.push(packet);
        rest = after;
    }
    serve(&packets);
}

struct Sink;

impl MessageSink for Sink {
    fn post(&self, _: ConnectionId, _: u32, payload: &[u8]) -> HvStatus {
        assert!(payload.len() <= 240);
        HvStatus::SUCCESS
    }
}

/// Whatever a process sends, the root answers it or ends the run, and says which is which.
fn serve(packets: &[&[u8]]) {
    let kind = SocketType::SEQPACKET;
    let (up, ours) =
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("a socket");
    // An empty packet is what the end looks like, and the end is what comes after it.
    let packets: Vec<_> = packets.iter().take_while(|packet| !packet.is_empty()).collect();
    for packet in &packets {
        rustix::net::send(&up, packet, SendFlags::DONTWAIT).expect("room for the packet");
    }
    drop(up);
    let memory = GuestMemory::new(64 << 10).expect("memory");
    let ours = Arc::new(ours);
    let interrupt = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let synic = Arc::new(HostedSynic::new(&memory, &ours, interrupt).expect("an eventfd"));
    let (counters, stop) = (Arc::default(), StopHandle::default());
    let mut vp = HostedVp::new(ours, &memory, &synic, &counters, &Arc::default(), &stop);
    let all_good = packets.iter().all(|packet| {
        Intercept::parse(packet)
            .is_ok_and(|intercept| !matches!(intercept, Intercept::NotStarted { .. }))
    });
    match vp.serve(&Bus::ports(), &Bus::mmio(), &Sink) {
        Ok(Ended::Gone) => assert!(all_good),
        Ok(Ended::Stopped) => assert!(stop.is_stopping()),
        Err(VpError::Garbage(_) | VpError::NotStarted { .. }) => assert!(!all_good),
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Packets that are intercepts, or nearly.
    fn packet() -> impl Strategy<Value = Vec<u8>> {
        let word = || prop_oneof![any::<u32>(), 0_u32..12, 0x4000_0000_u32..0x4000_0200];
        let value =
            || prop_oneof![any::<u64>(), 0_u64..0x2_0000, Just(0x5c), Just(0x5d), Just(0x1_005d)];
        (word(), word(), 0_u32..5, value(), value(), 0_usize..9).prop_map(
            |(kind, index, width, first, second, data)| {
                let words = [kind, index, width, 0].map(u32::to_le_bytes);
                let values = [first, second].map(u64::to_le_bytes);
                [words.as_flattened(), values.as_flattened(), &vec![7; data]].concat()
            },
        )
    }

    proptest! {
        #[test]
        fn intercepts_or_nearly(packets in proptest::collection::vec(packet(), 0..20)) {
            serve(&packets.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            fuzz_intercepts(&data);
        }
    }
}
