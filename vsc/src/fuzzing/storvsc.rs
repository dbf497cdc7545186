//! A storage controller that answers what it likes.

use core::cell::RefCell;

use vmbus::packet::PacketKind;
use vmbus::ring::{Incoming, Outgoing};
use vmbus::vstor::{NtStatus, Operation, Properties, ScsiRequest, SrbStatus, VstorPacket};
use zerocopy::{FromBytes, IntoBytes};

use super::{Memory, Root};
use crate::Channel;
use crate::storvsc::{Command, Disk, PageList, Pages, Queue, Scratch, words};

/// Slots of the queue.
const DEPTH: usize = 4;

/// A controller that follows a script, and otherwise the protocol.
struct Controller<'a> {
    root: Root<'a>,
    /// Whether it answers what it was asked, between its lies.
    honest: bool,
}

impl Controller<'_> {
    /// One step of the script, or an honest answer; false at the end of the script.
    fn act(&mut self) -> bool {
        if self.honest {
            self.answer();
        }
        let root = &mut self.root;
        let Some([step, slot, generation, detail]) = root.take() else { return false };
        let id = u64::from(generation) << 32 | u64::from(slot);
        match step % 16 {
            // An answer that is whole, with details from the script.
            0..6 => {
                let mut packet = VstorPacket::answer(NtStatus(u32::from(detail >> 6)), &[]);
                packet.operation = Operation(u32::from(step >> 4));
                if step >> 4 == 0 {
                    packet.operation = Operation::CompleteIo;
                }
                let rest = root.script;
                let _ = root.take::<16>();
                for (to, from) in packet.payload.iter_mut().zip(rest.iter().take(16)) {
                    *to = *from;
                }
                let id = if step & 8 == 0 { id } else { u64::MAX - u64::from(slot) };
                root.push(PacketKind::Completion, id, &[], packet.as_bytes());
            }
            // A packet of any kind and length.
            6..9 => {
                let bytes = root.take_up_to(usize::from(detail) * 2);
                root.push(PacketKind(u16::from(step >> 4)), id, &[], bytes);
            }
            9..12 => root.meddle(detail),
            12 => root.scribble(detail),
            _ => self.answer(),
        }
        true
    }

    /// Answers one request as it should be.
    fn answer(&mut self) {
        let mut buffer = [0; 512];
        let Ok(Some(packet)) = self.root.incoming.read(&mut buffer) else { return };
        let id = packet.transaction_id;
        let Ok((asked, _)) = VstorPacket::read_from_prefix(packet.payload) else { return };
        let answer = match (asked.operation, asked.body::<ScsiRequest>()) {
            (Operation::ExecuteSrb, Some(mut request)) => {
                request.srb_status = SrbStatus::Success;
                VstorPacket::answer(NtStatus::Success, request.as_bytes())
            }
            (Operation::QueryProperties, _) => {
                let properties = Properties { max_transfer: 1 << 20, ..Properties::default() };
                VstorPacket::answer(NtStatus::Success, properties.as_bytes())
            }
            _ => VstorPacket::answer(NtStatus::Success, &[]),
        };
        self.root.push(PacketKind::Completion, id, &[], answer.as_bytes());
        let _ = self.root.incoming.publish();
    }
}

/// What a controller can write, were there one.
struct Answers<'a> {
    list: PageList<{ words(1) }>,
    bytes: &'a [u8],
}

impl Scratch for Answers<'_> {
    fn pages(&mut self, len: u32) -> Option<Pages<'_>> {
        self.list.resize(len).then(|| self.list.pages())
    }

    fn read(&self, bytes: &mut [u8]) {
        for (to, from) in bytes.iter_mut().zip(self.bytes) {
            *to = *from;
        }
    }
}

/// A controller that answers what it likes: `data` is its script. The first byte says whether it
/// keeps to the protocol in between.
pub fn fuzz_storvsc(data: &[u8]) {
    let Some((&choice, script)) = data.split_first() else { return };
    let memory = Memory::new();
    let [up, down] = memory.rings();
    let (Ok(answers), Ok(requests)) = (Incoming::new(down), Outgoing::new(up)) else { return };
    let Some(root) = Root::new(&memory, script) else { return };
    let controller = RefCell::new(Controller { root, honest: choice & 1 != 0 });
    let act = || controller.borrow_mut().act();

    let channel = Channel::new(answers, requests, || {});
    let Ok((mut queue, agreement)) =
        Queue::<_, _, DEPTH>::connect(channel, u16::from(choice >> 1 & 3), act)
    else {
        return;
    };
    assert!(agreement.max_transfer > 0 && agreement.max_transfer.is_multiple_of(4096));
    assert!(agreement.subchannels <= agreement.max_subchannels.min(3));

    let Some(list) = PageList::<{ words(1) }>::new(4096, 0, [1]) else { return };
    let mut answers = Answers { list: list.clone(), bytes: script };
    if choice & 8 != 0
        && let Ok(Some(disk)) = Disk::identify(&mut queue, choice >> 4, &mut answers, act)
    {
        assert!(disk.blocks > 0 && disk.block_size >= 512);
        assert!(disk.physical_block_size >= disk.block_size);
    }

    let mut in_flight = [false; DEPTH];
    loop {
        for slot in 0..DEPTH as u16 {
            let submitted = match slot % 2 {
                0 => queue.submit(slot, &Command::read(0, 0, 8), Some(list.pages())),
                _ => queue.submit(slot, &Command::flush(0), None),
            };
            if submitted.is_ok()
                && let Some(busy) = in_flight.get_mut(usize::from(slot))
            {
                assert!(!core::mem::replace(busy, true), "a slot in flight was taken again");
            }
        }
        queue.publish();
        let acted = act();
        let polled = queue.poll(|completion| {
            if let Some(busy) = in_flight.get_mut(usize::from(completion.slot)) {
                assert!(core::mem::take(busy), "what was not in flight has ended");
            }
            assert!(completion.outcome.is_err() || completion.outcome.is_ok_and(|n| n <= 4096));
        });
        // `identify` may have been left with requests of its own in flight.
        if !acted || polled.is_err() || !queue.rest() {
            assert!(polled.is_ok() || queue.poll(|_| {}).is_err(), "a fault ends the queue");
            if !acted || polled.is_err() {
                return;
            }
        }
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
            fuzz_storvsc(&script);
        }

        #[test]
        fn any_script_of_an_otherwise_honest_controller_is_survived(
            choice in any::<u8>(),
            steps in prop::collection::vec((0u8..16, 0u8..5, 0u8..4, any::<u8>()), 0..100),
        ) {
            let mut script = Vec::from([choice | 1]);
            for (step, slot, generation, detail) in steps {
                script.extend([step, slot, generation, detail]);
            }
            fuzz_storvsc(&script);
        }
    }
}
