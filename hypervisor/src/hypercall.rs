//! Hypercalls: the guest's way to post a message to the root (TLFS chapters 3 and 11).
//!
//! Linux makes two, *post message* and *signal event*. Signals on connections that the root has
//! bound are caught on the way and never come here.

pub(crate) mod page;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::partition::ExitKind;
use crate::synic::{ConnectionId, HvStatus, MESSAGE_PAYLOAD, MessageSink};
use crate::{Gpa, GuestMemory, PAGE_SIZE};

/// A hypercall that the kernel or the processor leaves to us.
pub(crate) struct Hypercall {
    /// RCX: code in bits 0 to 15, fast in bit 16 (TLFS, "Hypercall inputs").
    pub(crate) control: u64,
    /// The address of the input, or the input itself of a fast one. For *signal event* KVM's own
    /// interface gives the connection, whichever form the guest used.
    pub(crate) input: u64,
}

/// The input of *post message*, `HvCallPostMessage`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PostMessageInput {
    connection: u32,
    reserved: u32,
    message_type: u32,
    payload_size: u32,
    payload: [u8; MESSAGE_PAYLOAD],
}

const _: () = assert!(size_of::<PostMessageInput>() == 256);

impl Hypercall {
    const POST_MESSAGE: u64 = 0x5c;
    const SIGNAL_EVENT: u64 = 0x5d;
    const FAST: u64 = 1 << 16;

    /// The connection and the flag number of a *signal event*, whose input is read from `memory`
    /// unless it is fast; `None` for other hypercalls.
    pub(crate) fn signaled(
        &self,
        memory: &GuestMemory,
    ) -> Option<Result<(ConnectionId, u16), HvStatus>> {
        if self.control & 0xffff != Self::SIGNAL_EVENT {
            return None;
        }
        let input = if self.control & Self::FAST != 0 {
            self.input
        } else if !self.input.is_multiple_of(8) {
            return Some(Err(HvStatus::INVALID_ALIGNMENT));
        } else {
            match memory.read_obj::<u64>(Gpa(self.input)) {
                Ok(input) => input,
                Err(_) => return Some(Err(HvStatus::INVALID_ALIGNMENT)),
            }
        };
        Some(Ok((ConnectionId::new(input as u32), (input >> 32) as u16)))
    }

    /// Does it, and says what kind of exit it was and what the guest gets as its status.
    pub(crate) fn serve(
        &self,
        memory: &GuestMemory,
        sink: &dyn MessageSink,
    ) -> (ExitKind, HvStatus) {
        match self.control & 0xffff {
            Self::POST_MESSAGE => (ExitKind::PostMessage, self.post_message(memory, sink)),
            // Bound connections never come here.
            Self::SIGNAL_EVENT => (ExitKind::SignalEvent, HvStatus::INVALID_CONNECTION_ID),
            _ => (ExitKind::Other, HvStatus::INVALID_HYPERCALL_CODE),
        }
    }

    fn post_message(&self, memory: &GuestMemory, sink: &dyn MessageSink) -> HvStatus {
        const INPUT: usize = size_of::<PostMessageInput>();
        let offset = (self.input % PAGE_SIZE as u64) as usize;
        if self.control & Self::FAST != 0 {
            return HvStatus::INVALID_HYPERCALL_INPUT;
        }
        if !self.input.is_multiple_of(8) || offset > PAGE_SIZE - INPUT {
            return HvStatus::INVALID_ALIGNMENT;
        }
        // One copy, which the guest cannot change any more.
        let Ok(input) = memory.read_obj::<PostMessageInput>(Gpa(self.input)) else {
            return HvStatus::INVALID_ALIGNMENT;
        };
        let payload =
            usize::try_from(input.payload_size).ok().and_then(|size| input.payload.get(..size));
        match payload {
            Some(payload) => {
                sink.post(ConnectionId::new(input.connection), input.message_type, payload)
            }
            None => HvStatus::INVALID_PARAMETER,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use zerocopy::FromZeros;

    use super::*;

    #[derive(Default)]
    struct Sink(Mutex<Vec<(u32, u32, Vec<u8>)>>);

    impl MessageSink for Sink {
        fn post(&self, connection: ConnectionId, message_type: u32, payload: &[u8]) -> HvStatus {
            self.0.lock().unwrap().push((connection.get(), message_type, payload.to_vec()));
            HvStatus::SUCCESS
        }
    }

    fn post(memory: &GuestMemory, sink: &Sink, control: u64, input: u64) -> HvStatus {
        Hypercall { control, input }.serve(memory, sink).1
    }

    #[test]
    fn a_signal_names_its_connection_in_either_form() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write_obj(Gpa(0x3008), &0xabcd_0003_0000_2001_u64).unwrap();
        let signaled = |control, input| Hypercall { control, input }.signaled(&memory);
        let connection = ConnectionId::new(0x2001);
        assert_eq!(signaled(0x1_005d, 0x2001), Some(Ok((connection, 0))));
        assert_eq!(signaled(0x5d, 0x3008), Some(Ok((connection, 3))));
        assert_eq!(signaled(0x5d, 0x3004), Some(Err(HvStatus::INVALID_ALIGNMENT)));
        assert_eq!(signaled(0x5d, 1 << 40), Some(Err(HvStatus::INVALID_ALIGNMENT)));
        assert_eq!(signaled(0x5c, 0x3008), None);
    }

    #[test]
    fn a_posted_message_is_read_once_and_checked() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let sink = Sink::default();
        let mut input = PostMessageInput::new_zeroed();
        (input.connection, input.message_type, input.payload_size) = (0xff00_0004, 1, 3);
        input.payload[..3].copy_from_slice(b"abc");
        memory.write_obj(Gpa(0x2f00), &input).unwrap();

        assert_eq!(post(&memory, &sink, 0x5c, 0x2f00), HvStatus::SUCCESS);
        assert_eq!(*sink.0.lock().unwrap(), [(4, 1, b"abc".to_vec())]);

        assert_eq!(post(&memory, &sink, 0x5c, 0x2f08), HvStatus::INVALID_ALIGNMENT);
        assert_eq!(post(&memory, &sink, 0x5c, 0x2e04), HvStatus::INVALID_ALIGNMENT);
        assert_eq!(post(&memory, &sink, 0x5c, 1 << 30), HvStatus::INVALID_ALIGNMENT);
        assert_eq!(post(&memory, &sink, 0x5c, u64::MAX - 7), HvStatus::INVALID_ALIGNMENT);
        assert_eq!(post(&memory, &sink, 0x1_005c, 0x2f00), HvStatus::INVALID_HYPERCALL_INPUT);
        assert_eq!(post(&memory, &sink, 0x1_005d, 7), HvStatus::INVALID_CONNECTION_ID);
        assert_eq!(post(&memory, &sink, 0x46, 7), HvStatus::INVALID_HYPERCALL_CODE);

        input.payload_size = 241;
        memory.write_obj(Gpa(0x2f00), &input).unwrap();
        assert_eq!(post(&memory, &sink, 0x5c, 0x2f00), HvStatus::INVALID_PARAMETER);
        assert_eq!(sink.0.lock().unwrap().len(), 1);
    }
}
