//! The synthetic interrupt controller, as the root partition sees it.
//!
//! Terms are those of the Hyper-V TLFS, chapter 11 ("Virtual Interrupts"): a virtual processor
//! has sixteen SINTs; each has a 256-byte message slot in the SIM page and 2048 event flags in
//! the SIEF page. The guest speaks to the root by two hypercalls, *post message* and *signal
//! event*; the root speaks to the guest by filling a slot or setting a flag, and raising the SINT.
//!
//! [`Synic`] is all that the rooms above know of it. Whether the kernel serves it
//! ([`crate::kvm`]) or our own code does changes nothing for them.

pub(crate) mod pages;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::VpIndex;

/// Bytes of payload in a SynIC message (TLFS 11.8.1).
pub const MESSAGE_PAYLOAD: usize = 240;

/// The index of a synthetic interrupt source, 0 to 15 (TLFS 11.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sint(u8);

impl Sint {
    /// How many there are per virtual processor.
    pub const COUNT: u8 = 16;
    /// The SINT that VMBus guests use (`VMBUS_MESSAGE_SINT` in Linux).
    pub const VMBUS: Sint = Sint(2);

    /// `None` from 16 on.
    pub fn new(index: u8) -> Option<Self> {
        (index < Self::COUNT).then_some(Self(index))
    }

    /// The index, below 16.
    pub fn index(self) -> u8 {
        self.0
    }
}

/// The id a guest names in *post message* and *signal event*; 24 bits count (TLFS 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(u32);

impl ConnectionId {
    /// Keeps the low 24 bits, as the hypervisor does.
    pub const fn new(id: u32) -> Self {
        Self(id & 0x00ff_ffff)
    }

    /// The id, below 2^24.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// The number of an event flag in a SINT's 2048 (TLFS 11.9). For VMBus it is the channel's relid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventFlag(u16);

impl EventFlag {
    /// How many there are per SINT.
    pub const COUNT: u16 = 2048;

    /// `None` from 2048 on.
    pub fn new(flag: u16) -> Option<Self> {
        (flag < Self::COUNT).then_some(Self(flag))
    }

    /// The number, below 2048.
    pub fn get(self) -> u16 {
        self.0
    }
}

/// A message as it lies in a SIM slot (`HV_MESSAGE`, TLFS 11.8.1).
#[derive(Clone, Copy, IntoBytes, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Message {
    /// `HV_MESSAGE_TYPE`; 0 marks an empty slot, 1 is the first of the types for VMBus.
    pub message_type: u32,
    /// Bytes of payload in use.
    pub payload_size: u8,
    /// Bit 0: more messages wait; the guest must write EOM after it has emptied the slot.
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// Sending partition or port; zero for us.
    pub sender: u64,
    /// The payload.
    pub payload: [u8; MESSAGE_PAYLOAD],
}

const _: () = assert!(size_of::<Message>() == 256);

impl Message {
    /// A message of `message_type` with `payload`; `None` if it is longer than 240 bytes.
    pub fn new(message_type: u32, payload: &[u8]) -> Option<Self> {
        let mut message = Self {
            message_type,
            payload_size: u8::try_from(payload.len()).ok()?,
            flags: 0,
            reserved: [0; 2],
            sender: 0,
            payload: [0; MESSAGE_PAYLOAD],
        };
        message.payload.get_mut(..payload.len())?.copy_from_slice(payload);
        Some(message)
    }
}

/// What became of a message that was to be posted to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// It lies in the slot and the SINT was raised.
    Delivered,
    /// The slot is taken. The guest was asked to write EOM, and [`Synic::slot_free`] will fire.
    Busy,
    /// The guest has no SIM page, has masked the SINT or there is no such VP: try never or later.
    Disabled,
}

/// The root partition's side of the SynIC of one partition.
pub trait Synic: Send + Sync {
    /// Puts `message` into the slot of `sint` on `vp`. Only one thread at a time may post.
    fn post(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted;

    /// Fires when a slot that was [`Posted::Busy`] may be free; may fire without cause.
    fn slot_free(&self) -> &EventFd;

    /// From now on, a guest's *signal event* on `connection` fires `event`, with no exit to user
    /// space where the host can do that.
    fn bind(&self, connection: ConnectionId, event: &EventFd) -> std::io::Result<()>;

    /// Undoes [`Synic::bind`].
    fn unbind(&self, connection: ConnectionId, event: &EventFd) -> std::io::Result<()>;

    /// A way to set `flag` of `sint` on `vp` and interrupt it.
    fn event_port(&self, vp: VpIndex, sint: Sint, flag: EventFlag) -> Option<Arc<dyn EventPort>>;
}

/// One event flag of one SINT: how a channel interrupts the guest.
pub trait EventPort: Send + Sync {
    /// Sets the flag and, if it was clear, raises the SINT. Lock-free; any thread.
    /// Returns whether an interrupt was raised.
    fn signal(&self) -> bool;

    /// Later signals go to `vp`. Does nothing if there is no such VP.
    fn retarget(&self, vp: VpIndex);
}

/// Who takes the messages that the guest posts.
pub trait MessageSink: Send + Sync {
    /// Called on the VP's thread; must not block. The result is the hypercall's status.
    fn post(&self, connection: ConnectionId, message_type: u32, payload: &[u8]) -> HvStatus;
}

/// A hypercall's result, `HV_STATUS` (TLFS appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HvStatus(pub u16);

impl HvStatus {
    /// `HV_STATUS_SUCCESS`
    pub const SUCCESS: Self = Self(0);
    /// `HV_STATUS_INVALID_HYPERCALL_CODE`
    pub const INVALID_HYPERCALL_CODE: Self = Self(2);
    /// `HV_STATUS_INVALID_HYPERCALL_INPUT`
    pub const INVALID_HYPERCALL_INPUT: Self = Self(3);
    /// `HV_STATUS_INVALID_ALIGNMENT`
    pub const INVALID_ALIGNMENT: Self = Self(4);
    /// `HV_STATUS_INVALID_PARAMETER`
    pub const INVALID_PARAMETER: Self = Self(5);
    /// `HV_STATUS_INSUFFICIENT_MEMORY`: Linux waits and tries again.
    pub const INSUFFICIENT_MEMORY: Self = Self(0x0b);
    /// `HV_STATUS_INVALID_CONNECTION_ID`
    pub const INVALID_CONNECTION_ID: Self = Self(0x12);
    /// `HV_STATUS_INSUFFICIENT_BUFFERS`: Linux waits and tries again.
    pub const INSUFFICIENT_BUFFERS: Self = Self(0x13);
}
