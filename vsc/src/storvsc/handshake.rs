//! How a controller's first channel is taken into use: begin, agree on a version, learn what is
//! granted, end; then ask for sub-channels, if any are wanted.

use vmbus::mapped::RingMemory;
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::vstor::{NtStatus, Operation, Properties, ProtocolVersion, Version, VstorPacket};
use zerocopy::{FromBytes, IntoBytes};

use super::Fault;
use crate::{Channel, Doorbell};

/// The newest first: the order in which they are asked for.
const VERSIONS: [Version; 3] = [Version::V6_2, Version::V6_0, Version::V5_1];

/// Ids of the handshake's packets count from here; no request's id comes near.
const FIRST_ID: u64 = u64::MAX - 0xff;

const PAGE: u32 = 4096;

/// What was agreed on with the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The protocol's version.
    pub version: Version,
    /// The longest transfer of one request in bytes, a multiple of the page size.
    pub max_transfer: u32,
    /// How many sub-channels the controller grants.
    pub max_subchannels: u16,
    /// How many sub-channels are being offered: as many as were wanted, if granted.
    pub subchannels: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Begin,
    /// The index in [`VERSIONS`].
    Version(usize),
    Properties,
    End,
    Subchannels,
}

/// A handshake under way.
#[derive(Debug)]
pub(super) struct Handshake {
    step: Step,
    id: u64,
    wanted: u16,
    agreement: Agreement,
}

impl Handshake {
    /// Says the first word on a channel that was just opened.
    pub(super) fn begin<M: RingMemory, D: Doorbell>(
        channel: &mut Channel<M, D>,
        wanted: u16,
    ) -> Result<Self, Fault> {
        let mut handshake = Self {
            step: Step::Begin,
            id: FIRST_ID,
            wanted,
            agreement: Agreement {
                version: Version::V6_2,
                max_transfer: 0,
                max_subchannels: 0,
                subchannels: 0,
            },
        };
        handshake.ask(channel)?;
        Ok(handshake)
    }

    /// Takes what has come and says the next word. `None`: not yet at the end.
    pub(super) fn poll<M: RingMemory, D: Doorbell>(
        &mut self,
        channel: &mut Channel<M, D>,
    ) -> Result<Option<Agreement>, Fault> {
        let mut buffer = [0; super::LONGEST_PACKET];
        let Some(packet) = channel.receive(&mut buffer)? else { return Ok(None) };
        if packet.kind != PacketKind::Completion {
            return Err(Fault::PacketKind(packet.kind.0));
        }
        if packet.transaction_id != self.id {
            return Err(Fault::UnknownAnswer(packet.transaction_id));
        }
        let (answer, _) = VstorPacket::read_from_prefix(packet.payload)
            .map_err(|_| Fault::Short(packet.payload.len()))?;
        if answer.operation != Operation::CompleteIo {
            return Err(Fault::Operation(answer.operation.0));
        }
        if self.take(&answer)? {
            channel.publish();
            return Ok(Some(self.agreement));
        }
        self.ask(channel)?;
        Ok(None)
    }

    /// Takes an answer and goes on to the next step; true if that was the last.
    fn take(&mut self, answer: &VstorPacket) -> Result<bool, Fault> {
        let ok = answer.status == NtStatus::Success;
        self.step = match self.step {
            Step::Version(index) if !ok => {
                let index = index + 1;
                self.agreement.version =
                    *VERSIONS.get(index).ok_or(Fault::NoCommonVersion(answer.status.0))?;
                Step::Version(index)
            }
            // It does without, then.
            Step::Subchannels if !ok => return Ok(true),
            step if !ok => {
                return Err(Fault::Refused {
                    operation: step.operation().0,
                    status: answer.status.0,
                });
            }
            Step::Begin => Step::Version(0),
            Step::Version(_) => Step::Properties,
            Step::Properties => {
                self.granted(answer)?;
                Step::End
            }
            Step::End => {
                self.wanted = self.wanted.min(self.agreement.max_subchannels);
                if self.wanted == 0 {
                    return Ok(true);
                }
                Step::Subchannels
            }
            Step::Subchannels => {
                self.agreement.subchannels = self.wanted;
                return Ok(true);
            }
        };
        Ok(false)
    }

    fn granted(&mut self, answer: &VstorPacket) -> Result<(), Fault> {
        let Some(properties) = answer.body::<Properties>() else { return Ok(()) };
        let max_transfer = properties.max_transfer;
        if max_transfer == 0 || !max_transfer.is_multiple_of(PAGE) {
            return Err(Fault::MaxTransfer(max_transfer));
        }
        self.agreement.max_transfer = max_transfer;
        if properties.flags & Properties::FLAG_MULTI_CHANNEL != 0 {
            self.agreement.max_subchannels = properties.max_channels;
        }
        Ok(())
    }

    fn ask<M: RingMemory, D: Doorbell>(
        &mut self,
        channel: &mut Channel<M, D>,
    ) -> Result<(), Fault> {
        let operation = self.step.operation();
        let packet = match self.step {
            Step::Version(_) => VstorPacket::request(
                operation,
                ProtocolVersion { version: self.agreement.version, revision: 0 }.as_bytes(),
            ),
            Step::Subchannels => VstorPacket::request(operation, self.wanted.as_bytes()),
            Step::Begin | Step::Properties | Step::End => VstorPacket::request(operation, &[]),
        };
        self.id += 1;
        channel.send(
            PacketKind::InBand,
            PacketFlags::COMPLETION_REQUESTED,
            self.id,
            &[],
            packet.as_bytes(),
        )?;
        channel.publish();
        Ok(())
    }
}

impl Step {
    fn operation(self) -> Operation {
        match self {
            Self::Begin => Operation::BeginInitialization,
            Self::Version(_) => Operation::QueryProtocolVersion,
            Self::Properties => Operation::QueryProperties,
            Self::End => Operation::EndInitialization,
            Self::Subchannels => Operation::CreateSubChannels,
        }
    }
}
