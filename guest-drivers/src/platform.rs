//! All that the guest needs from the world.

use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::client::{HvStatus, Hypercalls};

use crate::memory::Pages;

/// A message of the root, copied out of its slot.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// `HV_MESSAGE_TYPE`; 1 is the VMBus's.
    pub message_type: u32,
    len: usize,
    payload: [u8; Self::ROOM],
}

impl Message {
    /// Bytes of payload that a slot has room for.
    pub const ROOM: usize = 240;

    /// A message; what of `payload` does not fit is cut off.
    pub fn new(message_type: u32, payload: &[u8]) -> Self {
        let mut message =
            Self { message_type, len: payload.len().min(Self::ROOM), payload: [0; Self::ROOM] };
        for (to, from) in message.payload.iter_mut().zip(payload) {
            *to = *from;
        }
        message
    }

    /// What it says.
    pub fn payload(&self) -> &[u8] {
        self.payload.get(..self.len).unwrap_or_default()
    }
}

/// What a platform has counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlatformCounters {
    /// How often the processor was put to sleep.
    pub halts: u64,
    /// How often it was interrupted.
    pub interrupts: u64,
}

/// A write of 8 bits to a port, as one of several in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PortWrite {
    /// Where to.
    pub port: u16,
    /// What.
    pub value: u8,
}

/// A PC's ports, the addresses where devices have registers, and these devices' interrupts. What is
/// written here already is a machine without any: reads give ones, and writes go nowhere.
///
/// Every access may be an intercept, which costs more than anything else that a driver does.
pub trait Ports {
    /// `in`, 8 bits.
    fn read_8(&self, _port: u16) -> u8 {
        u8::MAX
    }

    /// `in`, 32 bits.
    fn read_32(&self, _port: u16) -> u32 {
        u32::MAX
    }

    /// Several `out`s of 8 bits, in order.
    fn write_8(&self, _writes: &[PortWrite]) {}

    /// `out`, 32 bits.
    fn write_32(&self, _port: u16, _value: u32) {}

    /// `rep insd`: fills `words`, which lie in [`Platform::memory`], 32 bits at a time.
    fn read_string(&self, _port: u16, words: &[AtomicU64]) {
        for word in words {
            word.store(u64::MAX, Ordering::Relaxed);
        }
    }

    /// `rep outsd`: writes `words`, which lie in [`Platform::memory`], 32 bits at a time.
    fn write_string(&self, _port: u16, _words: &[AtomicU64]) {}

    /// A load of 32 bits from `address`, below 4 GiB, where a device has a register.
    fn load_32(&self, _address: u32) -> u32 {
        u32::MAX
    }

    /// A store of 32 bits to such an address. What was written to memory before is seen before it.
    fn store_32(&self, _address: u32, _value: u32) {}

    /// From now on the rising edge of an ISA interrupt ends a [sleep](Platform::idle), as a message
    /// or an event does.
    fn listen(&self, _irq: u8) {}
}

/// The world of one guest, as one of its processors sees it.
///
/// Everything works through a shared reference: several drivers have one each.
pub trait Platform: Ports {
    /// The memory that the guest may share with the root. It is one run of pages, always the same;
    /// whoever asks first parts it.
    fn memory(&self) -> Pages<'_>;

    /// The hypercall *post message*: `payload`, at most 240 bytes, to `connection`.
    fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus;

    /// The hypercall *signal event*, on a connection that the root has offered.
    fn signal_event(&self, connection: u32);

    /// Takes the message out of the VMBus's slot if there is one, and tells the hypervisor if
    /// another waits for the slot.
    fn take_message(&self) -> Option<Message>;

    /// Sleeps until there is a message, an event or an interrupt that the guest
    /// [listens](Ports::listen) for, and then clears all event flags of the VMBus's
    /// SINT: whoever has slept looks into the rings. Returns at once if an interrupt came since the
    /// last time, and may return without cause; without any it does so after a second or a few, so that
    /// who waits in vain finds out.
    ///
    /// All flags, as a flag that stays set brings no interrupt any more: that of another channel,
    /// whose driver does not wait now, would be missed when it does.
    fn idle(&self);

    /// Nanoseconds since some moment; never fewer than before.
    fn now(&self) -> u64;

    /// Writes a line, which has no newline in it, to the console.
    fn line(&self, text: &str);

    /// What has been counted.
    fn counters(&self) -> PlatformCounters;

    /// How many processors can [work together](Platform::together). This one is number 0, and the
    /// one that gets the root's messages.
    fn processors(&self) -> usize {
        1
    }

    /// Has processors 1, 2 and so on, one for each of `places`, do `work`, and this one its `own`. Each
    /// is told its number and is given the world as it sees it; what comes out goes to its place.
    /// Returns when all have ended. Processors that do not exist leave their places as they are.
    fn together<R: Send, O>(
        &self,
        places: &mut [Option<R>],
        work: impl Fn(usize, &Self) -> R + Sync,
        own: impl FnOnce() -> O,
    ) -> O
    where
        Self: Sized,
    {
        let _ = (places, work);
        own()
    }
}

/// A platform's hypercalls, for the clients that want them by themselves.
#[derive(Debug)]
pub struct Calls<'p, P: ?Sized>(pub &'p P);

impl<P: ?Sized> Clone for Calls<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: ?Sized> Copy for Calls<'_, P> {}

impl<P: Platform + ?Sized> Hypercalls for Calls<'_, P> {
    fn post_message(&mut self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        self.0.post_message(connection, message_type, payload)
    }

    fn signal_event(&mut self, connection: u32) {
        self.0.signal_event(connection);
    }

    fn pause(&mut self, attempt: u32) {
        let until = self.0.now().saturating_add(u64::from(attempt.min(10)) * 100_000);
        while self.0.now() < until {
            core::hint::spin_loop();
        }
    }
}
