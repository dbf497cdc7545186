//! A root that says what it likes, and a guest that goes on asking.

use super::{Client, Contact, Event, HvStatus, Hypercalls};
use crate::protocol::{GpadlId, MAX_MESSAGE, Relid, USER_DATA};

/// A hypervisor that takes every message, or by the input refuses some.
struct Sink {
    refuse: u8,
    posted: u32,
}

impl Hypercalls for Sink {
    fn post_message(&mut self, _: u32, _: u32, payload: &[u8]) -> HvStatus {
        assert!(payload.len() <= MAX_MESSAGE);
        self.posted = self.posted.wrapping_add(1);
        if self.refuse != 0 && self.posted.is_multiple_of(u32::from(self.refuse)) {
            HvStatus(0x10 + u16::from(self.refuse & 7))
        } else {
            HvStatus::SUCCESS
        }
    }

    fn signal_event(&mut self, _: u32) {}
}

/// Plays `data` as what a root sends and the guest does. Nothing may panic.
///
/// Each step begins with a byte: below 128 a message of so many words follows, of which the
/// shorter ones are padded to a plausible length; from there on it picks what the guest does.
pub fn fuzz_client(data: &[u8]) {
    let Some((&refuse, mut data)) = data.split_first() else { return };
    let mut bus = Sink { refuse, posted: 0 };
    let mut client = Client::<4, 6>::new(Contact::DEFAULT);
    let _ = client.connect(&mut bus);
    let (mut relid, mut gpadl) = (Relid(1), GpadlId(super::FIRST_GPADL));
    while let Some((&step, rest)) = data.split_first() {
        data = rest;
        match step {
            ..128 => {
                let words = usize::from(step & 63).min(MAX_MESSAGE / 4);
                let (bytes, rest) = data.split_at_checked(words * 4).unwrap_or((data, &[]));
                data = rest;
                let mut message = [0; MAX_MESSAGE];
                if let Some(to) = message.get_mut(..bytes.len()) {
                    to.copy_from_slice(bytes);
                }
                let len = if step < 64 { bytes.len() } else { MAX_MESSAGE };
                match client.message(&mut bus, message.get(..len).unwrap_or_default()) {
                    Ok(Some(Event::Offered(offered))) => relid = offered,
                    Ok(_) => {}
                    Err(_) => assert_eq!(client.version(), None, "an error ends the connection"),
                }
            }
            128..160 => {
                let pages = u64::from(step - 128) * 4;
                if let Ok(id) =
                    client.create_gpadl(&mut bus, relid, (0..pages as u32).map(u64::from))
                {
                    gpadl = id;
                }
            }
            160..192 => {
                let _ = client.open(&mut bus, relid, gpadl, 1, 0, &[0; USER_DATA]);
            }
            192..208 => {
                let _ = client.close(&mut bus, relid);
            }
            208..224 => {
                let _ = client.teardown_gpadl(&mut bus, gpadl);
            }
            224..240 => {
                let _ = client.release(&mut bus, relid);
            }
            240..250 => {
                let _ = client.unload(&mut bus);
            }
            250.. => {
                let _ = client.connect(&mut bus);
            }
        }
        assert!(client.offers().count() <= 4);
    }
}
