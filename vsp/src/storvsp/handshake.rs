//! The handshake with which a guest's storvsc takes a channel into use, as a plain state machine.
//!
//! A primary channel begins, agrees on a version, asks for properties, ends, and may then ask for
//! sub-channels. Sub-channels need no handshake. Guests skip and repeat steps freely (a crash
//! kernel begins anew on a channel its predecessor left), so a step out of order is refused, and
//! *begin* is always right.

use vmbus::vstor::{NtStatus, Operation, Properties, ProtocolVersion, Version, VstorPacket};
use zerocopy::IntoBytes;

/// What the controller grants each guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grants {
    /// Sub-channels that may be asked for.
    pub max_subchannels: u16,
    /// The longest transfer of one request, in bytes, a multiple of the page size.
    pub max_transfer: u32,
}

/// How far a channel has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was said.
    Closed,
    /// Begun, no version yet.
    Begun,
    /// A version is agreed on.
    Versioned,
    /// Commands may come.
    Ready,
}

/// The answer to a packet of the handshake.
#[derive(Debug)]
pub(super) struct Reply {
    /// What goes back to the guest.
    pub packet: VstorPacket,
    /// How many sub-channels to offer now.
    pub subchannels: u16,
}

/// One channel's handshake.
#[derive(Debug)]
pub(super) struct Handshake {
    state: State,
    grants: Grants,
    /// Sub-channels may be asked for: on the primary channel, and once.
    may_ask: bool,
}

impl Handshake {
    /// For a channel that was just opened.
    pub(super) fn new(primary: bool, grants: Grants) -> Self {
        let state = if primary { State::Closed } else { State::Ready };
        Self { state, grants, may_ask: primary }
    }

    /// Whether commands are served.
    pub(super) fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Takes any packet that is neither a command nor a reset.
    pub(super) fn answer(&mut self, packet: &VstorPacket) -> Reply {
        let mut subchannels = 0;
        let packet = match self.step(packet) {
            Ok(Step::Done) => VstorPacket::answer(NtStatus::Success, &[]),
            Ok(Step::Properties(properties)) => {
                VstorPacket::answer(NtStatus::Success, properties.as_bytes())
            }
            Ok(Step::Subchannels(count)) => {
                subchannels = count;
                VstorPacket::answer(NtStatus::Success, &[])
            }
            Err(status) => VstorPacket::answer(status, &[]),
        };
        Reply { packet, subchannels }
    }

    fn step(&mut self, packet: &VstorPacket) -> Result<Step, NtStatus> {
        let in_state = |ok: bool| if ok { Ok(()) } else { Err(NtStatus::InvalidDeviceState) };
        match packet.operation {
            Operation::BeginInitialization => {
                self.state = State::Begun;
                Ok(Step::Done)
            }
            Operation::QueryProtocolVersion => {
                in_state(matches!(self.state, State::Begun | State::Versioned))?;
                let asked: ProtocolVersion = packet.body().ok_or(NtStatus::InvalidParameter)?;
                match asked.version {
                    Version::V6_2 | Version::V6_0 | Version::V5_1 => {
                        self.state = State::Versioned;
                        Ok(Step::Done)
                    }
                    _ => Err(NtStatus::RevisionMismatch),
                }
            }
            Operation::QueryProperties => {
                in_state(self.state == State::Versioned)?;
                Ok(Step::Properties(Properties {
                    max_channels: self.grants.max_subchannels,
                    flags: if self.grants.max_subchannels > 0 {
                        Properties::FLAG_MULTI_CHANNEL
                    } else {
                        0
                    },
                    max_transfer: self.grants.max_transfer,
                    ..Properties::default()
                }))
            }
            Operation::EndInitialization => {
                in_state(self.state == State::Versioned)?;
                self.state = State::Ready;
                Ok(Step::Done)
            }
            Operation::CreateSubChannels => {
                in_state(self.state == State::Ready && self.may_ask)?;
                let count: u16 = packet.body().ok_or(NtStatus::InvalidParameter)?;
                if count > self.grants.max_subchannels {
                    return Err(NtStatus::InvalidParameter);
                }
                self.may_ask = count == 0;
                Ok(Step::Subchannels(count))
            }
            _ => Err(NtStatus::InvalidDeviceRequest),
        }
    }
}

enum Step {
    Done,
    Properties(Properties),
    Subchannels(u16),
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANTS: Grants = Grants { max_subchannels: 3, max_transfer: 1 << 20 };

    fn ask(handshake: &mut Handshake, operation: Operation, body: &[u8]) -> (NtStatus, u16) {
        let reply = handshake.answer(&VstorPacket::request(operation, body));
        assert_eq!(reply.packet.operation, Operation::CompleteIo);
        (reply.packet.status, reply.subchannels)
    }

    #[test]
    fn linux_order() {
        let mut shake = Handshake::new(true, GRANTS);
        let version = |v: u16| [v as u8, (v >> 8) as u8, 0, 0];
        assert!(!shake.is_ready());
        assert_eq!(ask(&mut shake, Operation::BeginInitialization, &[]).0, NtStatus::Success);
        assert_eq!(
            ask(&mut shake, Operation::QueryProtocolVersion, &version(0x0603)).0,
            NtStatus::RevisionMismatch
        );
        assert_eq!(
            ask(&mut shake, Operation::QueryProtocolVersion, &version(0x0602)).0,
            NtStatus::Success
        );
        let reply = shake.answer(&VstorPacket::request(Operation::QueryProperties, &[]));
        let properties: Properties = reply.packet.body().unwrap();
        assert_eq!((properties.max_channels, properties.flags), (3, 1));
        assert_eq!(properties.max_transfer, 1 << 20);
        assert_eq!(ask(&mut shake, Operation::EndInitialization, &[]).0, NtStatus::Success);
        assert!(shake.is_ready());
        assert_eq!(ask(&mut shake, Operation::CreateSubChannels, &[2, 0]), (NtStatus::Success, 2));
        assert_eq!(
            ask(&mut shake, Operation::CreateSubChannels, &[2, 0]),
            (NtStatus::InvalidDeviceState, 0),
            "once"
        );
    }

    #[test]
    fn sub_channels_are_granted_once_and_on_the_primary_channel() {
        let mut shake = Handshake::new(true, GRANTS);
        let begin = |shake: &mut Handshake| {
            ask(shake, Operation::BeginInitialization, &[]);
            ask(shake, Operation::QueryProtocolVersion, &[0x02, 0x06, 0, 0]);
            ask(shake, Operation::EndInitialization, &[]);
        };
        let create =
            |shake: &mut Handshake, count| ask(shake, Operation::CreateSubChannels, &[count, 0]);
        begin(&mut shake);
        // Neither none nor too many are a grant.
        assert_eq!(create(&mut shake, 0), (NtStatus::Success, 0));
        assert_eq!(create(&mut shake, 4), (NtStatus::InvalidParameter, 0));
        assert_eq!(create(&mut shake, 3), (NtStatus::Success, 3));
        assert_eq!(create(&mut shake, 3), (NtStatus::InvalidDeviceState, 0));
        // Whoever begins anew on the same channel has what was granted.
        begin(&mut shake);
        assert_eq!(create(&mut shake, 3), (NtStatus::InvalidDeviceState, 0));
        let mut sub = Handshake::new(false, GRANTS);
        assert_eq!(create(&mut sub, 1), (NtStatus::InvalidDeviceState, 0));
        begin(&mut sub);
        assert_eq!(create(&mut sub, 1), (NtStatus::InvalidDeviceState, 0));
    }

    #[test]
    fn steps_out_of_order_are_refused() {
        let mut shake = Handshake::new(true, GRANTS);
        for operation in
            [Operation::EndInitialization, Operation::QueryProperties, Operation::CreateSubChannels]
        {
            assert_eq!(ask(&mut shake, operation, &[]).0, NtStatus::InvalidDeviceState);
        }
        assert_eq!(ask(&mut shake, Operation(99), &[]).0, NtStatus::InvalidDeviceRequest);
        assert!(!shake.is_ready());
    }

    #[test]
    fn sub_channels_need_none() {
        assert!(Handshake::new(false, GRANTS).is_ready());
    }
}
