//! What the guest's end of the bus needs of the hypervisor: two hypercalls.

use core::fmt;

/// A hypercall's result, `HV_STATUS` (TLFS appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HvStatus(pub u16);

impl HvStatus {
    /// `HV_STATUS_SUCCESS`
    pub const SUCCESS: Self = Self(0);
    /// `HV_STATUS_INSUFFICIENT_MEMORY`: wait and try again.
    pub const INSUFFICIENT_MEMORY: Self = Self(0x0b);
    /// `HV_STATUS_INVALID_CONNECTION_ID`
    pub const INVALID_CONNECTION_ID: Self = Self(0x12);
    /// `HV_STATUS_INSUFFICIENT_BUFFERS`: wait and try again.
    pub const INSUFFICIENT_BUFFERS: Self = Self(0x13);
}

impl fmt::Display for HvStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What the guest's side of the bus needs of the hypervisor. Implemented by whoever runs a client.
pub trait Hypercalls {
    /// *Post message*: `payload`, at most 240 bytes, to `connection`.
    fn post_message(&mut self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus;

    /// *Signal event*: rings the doorbell of the channel whose offer names `connection`.
    fn signal_event(&mut self, connection: u32);

    /// Lets some time pass before a message is posted again, for the `attempt`th time.
    fn pause(&mut self, attempt: u32) {
        let _ = attempt;
        core::hint::spin_loop();
    }
}

impl<H: Hypercalls + ?Sized> Hypercalls for &mut H {
    fn post_message(&mut self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        (**self).post_message(connection, message_type, payload)
    }

    fn signal_event(&mut self, connection: u32) {
        (**self).signal_event(connection);
    }

    fn pause(&mut self, attempt: u32) {
        (**self).pause(attempt);
    }
}
