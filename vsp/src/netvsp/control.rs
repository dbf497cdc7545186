//! A NIC's settings, as a plain state machine: RNDIS control messages in, answers out.
//!
//! The message is in private memory when it comes here. Every request gets its answer, whatever
//! is wrong with it: guests wait for answers without an end, holding locks.

use backends::net::{Link, MacAddr, Offloads};
use vmbus::rndis::{
    ChecksumOffload, ConfigParameter, HASH_KEY, HEADER_SIZE, Header, INDIRECTION_ENTRIES, Indicate,
    Initialize, InitializeComplete, LargeSendOffload, MessageKind, OBJECT_OFFLOAD,
    OBJECT_RSS_CAPABILITIES, OBJECT_RSS_PARAMETERS, ObjectHeader, ObjectRequest, Offload,
    OffloadParameters, Oid, PacketFilter, QueryComplete, ReceiveScaleCapabilities,
    ReceiveScaleParameters, Request, RequestComplete, ResetComplete, Status,
};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// The longest control message that is looked at, in bytes; the longest Linux sends has 608.
pub(super) const MAX_MESSAGE: usize = 2048;

/// The most frames in one packet of the guest, and the longest packet. Linux packs frames into
/// sections of the send buffer only.
const MAX_PACKETS: u32 = 8;
const MAX_TRANSFER: u32 = 0x4_0000;
/// Frames begin at multiples of eight bytes.
const ALIGNMENT: u32 = 3;

/// The largest packet that may be left to be cut, in bytes; Hyper-V's number.
const LARGE_SEND_MAX: u32 = 62780;

/// What a network has to leave to us for frames to be coalesced.
pub(super) const COALESCING: Offloads =
    Offloads::from_bits(Offloads::CHECKSUM.bits() | Offloads::TSO4.bits() | Offloads::TSO6.bits());

/// The objects that can be queried or set.
const SUPPORTED: [Oid; 36] = [
    Oid::SupportedList,
    Oid::HardwareStatus,
    Oid::MediaSupported,
    Oid::MediaInUse,
    Oid::MaximumLookahead,
    Oid::MaximumFrameSize,
    Oid::LinkSpeed,
    Oid::TransmitBufferSpace,
    Oid::ReceiveBufferSpace,
    Oid::TransmitBlockSize,
    Oid::ReceiveBlockSize,
    Oid::VendorId,
    Oid::VendorDescription,
    Oid::CurrentPacketFilter,
    Oid::CurrentLookahead,
    Oid::DriverVersion,
    Oid::MaximumTotalSize,
    Oid::MacOptions,
    Oid::MediaConnectStatus,
    Oid::MaximumSendPackets,
    Oid::VendorDriverVersion,
    Oid::ReceiveScaleCapabilities,
    Oid::ReceiveScaleParameters,
    Oid::RndisConfigParameter,
    Oid::TransmitOk,
    Oid::ReceiveOk,
    Oid::TransmitError,
    Oid::ReceiveError,
    Oid::ReceiveNoBuffer,
    Oid::FriendlyName,
    Oid::PermanentAddress,
    Oid::CurrentAddress,
    Oid::MulticastList,
    Oid::MaximumListSize,
    Oid::OffloadParameters,
    Oid::OffloadHardwareCapabilities,
];

/// What a NIC is.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// Its address.
    pub address: MacAddr,
    /// The largest MTU.
    pub max_mtu: u16,
    /// What the guest may call it; nothing if empty.
    pub name: String,
    /// Channels there can be.
    pub channels: u16,
    /// What may be left to the network in frames that are sent.
    pub takes: Offloads,
    /// What the network may leave to us in frames that are received.
    pub gives: Offloads,
}

/// What the guest has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// Its address.
    pub address: MacAddr,
    /// Which frames it wants: none before its interface is up.
    pub filter: PacketFilter,
    /// Whether it takes frames longer than its MTU, put together from segments.
    pub coalescing: bool,
    /// Where it wants which flow: the channel for each value of the hash. None: all at the first.
    pub indirection: Option<[u8; INDIRECTION_ENTRIES]>,
}

/// Frames that have passed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Statistics {
    pub sent: u64,
    pub received: u64,
    pub send_errors: u64,
    pub receive_errors: u64,
    pub no_buffer: u64,
}

/// One NIC's settings.
#[derive(Debug)]
pub(super) struct Control {
    identity: Identity,
    initialized: bool,
    settings: Settings,
    link_up: bool,
    /// In Mbit/s.
    speed: u32,
    statistics: Statistics,
}

impl Control {
    pub(super) fn new(identity: Identity, link: &Link) -> Self {
        let settings = Settings {
            address: identity.address,
            filter: PacketFilter(0),
            coalescing: false,
            indirection: None,
        };
        Self {
            identity,
            initialized: false,
            settings,
            link_up: link.up,
            speed: link.speed,
            statistics: Statistics::default(),
        }
    }

    /// What the guest has set.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Tells what has passed so far, for queries.
    pub(super) fn set_statistics(&mut self, statistics: Statistics) {
        self.statistics = statistics;
    }

    /// The cable was plugged in or pulled out. Returns the message that tells the guest, unless it
    /// knows, or will ask when it begins.
    pub(super) fn set_link(&mut self, up: bool) -> Option<Vec<u8>> {
        let changed = up != self.link_up;
        self.link_up = up;
        let status = if up { Status::MediaConnect } else { Status::MediaDisconnect };
        (changed && self.initialized)
            .then(|| message(MessageKind::Indicate, &Indicate { status, len: 0, offset: 0 }, &[]))
    }

    /// The guest takes no frames in several slots.
    pub(super) fn forbid_coalescing(&mut self) {
        self.identity.gives = Offloads::NONE;
    }

    /// Whether the network would coalesce.
    fn can_coalesce(&self) -> bool {
        self.identity.gives.contains(COALESCING)
    }

    /// Takes a message. Returns the answer; a HALT has none, and what is no request neither.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, _) = Header::read_from_prefix(bytes).ok()?;
        let body = bytes.get(HEADER_SIZE..usize::try_from(header.len).ok()?)?;
        match header.kind {
            MessageKind::Initialize => {
                let (request, _) = Initialize::read_from_prefix(body).ok()?;
                self.initialized = true;
                let complete = InitializeComplete {
                    id: request.id,
                    status: Status::Success.0,
                    major: 1,
                    minor: 0,
                    device_flags: 1,
                    medium: 0,
                    max_packets: MAX_PACKETS,
                    max_transfer: MAX_TRANSFER,
                    alignment: ALIGNMENT,
                    families: [0; 2],
                };
                Some(message(MessageKind::InitializeComplete, &complete, &[]))
            }
            MessageKind::Halt => {
                self.reset();
                self.initialized = false;
                None
            }
            MessageKind::Reset => {
                self.reset();
                let complete = ResetComplete { status: Status::Success, addressing_reset: 1 };
                Some(message(MessageKind::ResetComplete, &complete, &[]))
            }
            MessageKind::KeepAlive => {
                let (request, _) = Request::read_from_prefix(body).ok()?;
                let complete = RequestComplete { id: request.id, status: Status::Success };
                Some(message(MessageKind::KeepAliveComplete, &complete, &[]))
            }
            MessageKind::Query => {
                let (request, _) = Request::read_from_prefix(body).ok()?;
                let value = self.value(body).and_then(|(oid, given)| self.query(oid, given));
                let (status, value) = match value {
                    Ok(value) => (Status::Success, value),
                    Err(status) => (status, Vec::new()),
                };
                let offset = if value.is_empty() { 0 } else { size_of::<QueryComplete>() as u32 };
                let len = value.len() as u32;
                let complete = QueryComplete { id: request.id, status, len, offset };
                Some(message(MessageKind::QueryComplete, &complete, &value))
            }
            MessageKind::Set => {
                let (request, _) = Request::read_from_prefix(body).ok()?;
                let result = self.value(body).and_then(|(oid, value)| self.set(oid, value));
                let status = result.err().unwrap_or(Status::Success);
                let complete = RequestComplete { id: request.id, status };
                Some(message(MessageKind::SetComplete, &complete, &[]))
            }
            _ => None,
        }
    }

    fn reset(&mut self) {
        self.settings = Settings {
            address: self.settings.address,
            filter: PacketFilter(0),
            coalescing: false,
            indirection: None,
        };
    }

    /// What a query or set names, and the value that came with it.
    fn value<'b>(&self, body: &'b [u8]) -> Result<(Oid, &'b [u8]), Status> {
        if !self.initialized {
            return Err(Status::Failure);
        }
        let (request, _) =
            ObjectRequest::read_from_prefix(body).map_err(|_| Status::InvalidLength)?;
        let value = if request.len == 0 {
            Some([].as_slice())
        } else {
            slice(body, request.offset, request.len)
        };
        Ok((request.oid, value.ok_or(Status::InvalidLength)?))
    }

    fn query(&self, oid: Oid, given: &[u8]) -> Result<Vec<u8>, Status> {
        let number = |number: u32| Ok(number.to_le_bytes().to_vec());
        let count = |count: u64| number(u32::try_from(count).unwrap_or(u32::MAX));
        let frame = u32::from(self.identity.max_mtu) + 14;
        match oid {
            Oid::SupportedList => Ok(SUPPORTED.as_bytes().to_vec()),
            Oid::HardwareStatus | Oid::MediaSupported | Oid::MediaInUse => number(0),
            Oid::MaximumFrameSize | Oid::MaximumLookahead | Oid::CurrentLookahead => {
                number(self.identity.max_mtu.into())
            }
            // In units of 100 bits per second, as far as these go.
            Oid::LinkSpeed => number(self.speed.saturating_mul(10_000)),
            Oid::TransmitBufferSpace | Oid::ReceiveBufferSpace => number(frame * 256),
            Oid::TransmitBlockSize | Oid::ReceiveBlockSize | Oid::MaximumTotalSize => number(frame),
            // No IEEE number.
            Oid::VendorId => number(0x00FF_FFFF),
            Oid::VendorDescription => Ok(b"Partita\0".to_vec()),
            Oid::CurrentPacketFilter => number(self.settings.filter.0),
            // NDIS 6.30
            Oid::DriverVersion => number(0x061E),
            Oid::VendorDriverVersion => number(0x0001_0000),
            // No loopback of its own frames; VLAN tags and priorities beside the frame.
            Oid::MacOptions => number(0x0008 | 0x0040 | 0x0200),
            Oid::MediaConnectStatus => number((!self.link_up).into()),
            Oid::MaximumSendPackets => number(MAX_PACKETS),
            Oid::TransmitOk => count(self.statistics.sent),
            Oid::ReceiveOk => count(self.statistics.received),
            Oid::TransmitError => count(self.statistics.send_errors),
            Oid::ReceiveError => count(self.statistics.receive_errors),
            Oid::ReceiveNoBuffer => count(self.statistics.no_buffer),
            Oid::FriendlyName => {
                // Of 255 characters at most, and the zero behind them.
                let units = self.identity.name.encode_utf16().take(255);
                Ok(units.chain([0]).flat_map(u16::to_le_bytes).collect())
            }
            Oid::PermanentAddress => Ok(self.identity.address.0.to_vec()),
            Oid::CurrentAddress => Ok(self.settings.address.0.to_vec()),
            Oid::MulticastList => Ok(Vec::new()),
            Oid::MaximumListSize => number(32),
            Oid::OffloadHardwareCapabilities | Oid::OffloadCurrentConfig => {
                Ok(self.offload(given.len()))
            }
            Oid::ReceiveScaleCapabilities => {
                let capabilities = ReceiveScaleCapabilities {
                    header: ObjectHeader {
                        kind: OBJECT_RSS_CAPABILITIES,
                        revision: 2,
                        size: ReceiveScaleCapabilities::SIZE,
                    },
                    flags: ReceiveScaleCapabilities::TOEPLITZ_TCP,
                    interrupts: self.identity.channels.into(),
                    queues: self.identity.channels.into(),
                    entries: INDIRECTION_ENTRIES as u16,
                    padding: 0,
                };
                let size = ReceiveScaleCapabilities::SIZE.into();
                Ok(capabilities.as_bytes().get(..size).unwrap_or_default().to_vec())
            }
            _ => Err(Status::NotSupported),
        }
    }

    /// What may be left to the NIC, in the latest revision that fits `room` bytes.
    fn offload(&self, room: usize) -> Vec<u8> {
        let takes = self.identity.takes;
        let mut offload = Offload::new_zeroed();
        let (revision, size) = match room {
            0 | Offload::SIZE_3.. => (3, Offload::SIZE_3),
            Offload::SIZE_2.. => (2, Offload::SIZE_2),
            _ => (1, Offload::SIZE_1),
        };
        offload.header = ObjectHeader { kind: OBJECT_OFFLOAD, revision, size: size as u16 };
        if takes.contains(Offloads::CHECKSUM) {
            let all = ChecksumOffload::IP_OPTIONS
                | ChecksumOffload::TCP_OPTIONS
                | ChecksumOffload::TCP
                | ChecksumOffload::UDP;
            offload.checksum = ChecksumOffload {
                ipv4_transmit_encapsulation: Offload::ETHERNET,
                ipv4_transmit: all,
                ipv4_receive_encapsulation: Offload::ETHERNET,
                ipv4_receive: all,
                ipv6_transmit_encapsulation: Offload::ETHERNET,
                ipv6_transmit: all,
                ipv6_receive_encapsulation: Offload::ETHERNET,
                ipv6_receive: all,
            };
        }
        let mut large = LargeSendOffload::default();
        if takes.contains(Offloads::CHECKSUM | Offloads::TSO4) {
            large.ipv4_encapsulation = Offload::ETHERNET;
            large.ipv4_max = LARGE_SEND_MAX;
            large.ipv4_min_segments = 2;
        }
        if takes.contains(Offloads::CHECKSUM | Offloads::TSO6) {
            large.ipv6_encapsulation = Offload::ETHERNET;
            large.ipv6_max = LARGE_SEND_MAX;
            large.ipv6_min_segments = 2;
            large.ipv6_options = ChecksumOffload::IP_OPTIONS | ChecksumOffload::TCP_OPTIONS;
        }
        offload.large_send_v2 = large;
        let coalescing = self.can_coalesce();
        offload.coalescing_ipv4 = coalescing.into();
        offload.coalescing_ipv6 = coalescing.into();
        offload.as_bytes().get(..size).unwrap_or_default().to_vec()
    }

    fn set(&mut self, oid: Oid, value: &[u8]) -> Result<(), Status> {
        match oid {
            Oid::CurrentPacketFilter => {
                let (filter, _) =
                    PacketFilter::read_from_prefix(value).map_err(|_| Status::InvalidLength)?;
                self.settings.filter = filter;
                Ok(())
            }
            // Frames are always handed over whole.
            Oid::CurrentLookahead => Ok(()),
            // All groups are let through if any is: the guest sorts them itself.
            Oid::MulticastList if value.len().is_multiple_of(6) => Ok(()),
            Oid::MulticastList => Err(Status::InvalidLength),
            Oid::OffloadParameters => self.set_offload(value),
            Oid::ReceiveScaleParameters => self.set_receive_scale(value),
            Oid::RndisConfigParameter => self.set_parameter(value),
            _ => Err(Status::NotSupported),
        }
    }

    fn set_offload(&mut self, value: &[u8]) -> Result<(), Status> {
        // Checksums and segments that the guest does not leave to us need no telling: each frame
        // says what is left to do.
        OffloadParameters::read_from_prefix(value).map_err(|_| Status::InvalidLength)?;
        let coalescing = value.get(OffloadParameters::COALESCING_OFFSET..).unwrap_or_default();
        match coalescing {
            [2, 2, ..] if self.can_coalesce() => self.settings.coalescing = true,
            [0, 0, ..] | [] | [_] => {}
            _ => self.settings.coalescing = false,
        }
        Ok(())
    }

    fn set_receive_scale(&mut self, value: &[u8]) -> Result<(), Status> {
        let (parameters, _) =
            ReceiveScaleParameters::read_from_prefix(value).map_err(|_| Status::InvalidLength)?;
        if parameters.header.kind != OBJECT_RSS_PARAMETERS {
            return Err(Status::InvalidData);
        }
        if parameters.flags & ReceiveScaleParameters::DISABLE != 0 {
            self.settings.indirection = None;
            return Ok(());
        }
        if parameters.flags & ReceiveScaleParameters::KEY_UNCHANGED == 0 {
            let len = parameters.key_size.into();
            let key = slice(value, parameters.key_offset, len).ok_or(Status::InvalidLength)?;
            if key.len() > HASH_KEY {
                return Err(Status::InvalidLength);
            }
        }
        if parameters.flags & ReceiveScaleParameters::TABLE_UNCHANGED == 0 {
            let len = parameters.table_size.into();
            let bytes = slice(value, parameters.table_offset, len).ok_or(Status::InvalidLength)?;
            let (entries, rest) = bytes.as_chunks::<4>();
            if entries.is_empty() || entries.len() > INDIRECTION_ENTRIES || !rest.is_empty() {
                return Err(Status::InvalidLength);
            }
            let mut table = [0; INDIRECTION_ENTRIES];
            for (to, from) in table.iter_mut().zip(entries.iter().cycle()) {
                let channel = u32::from_le_bytes(*from);
                if channel >= self.identity.channels.into() {
                    return Err(Status::InvalidData);
                }
                *to = u8::try_from(channel).map_err(|_| Status::InvalidData)?;
            }
            self.settings.indirection = Some(table);
        }
        Ok(())
    }

    fn set_parameter(&mut self, value: &[u8]) -> Result<(), Status> {
        let (parameter, _) =
            ConfigParameter::read_from_prefix(value).map_err(|_| Status::InvalidLength)?;
        let text = |offset, len| {
            let bytes = slice(value, offset, len)?;
            let (units, rest) = bytes.as_chunks::<2>();
            let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
            rest.is_empty().then(|| char::decode_utf16(units).map(|unit| unit.unwrap_or('?')))
        };
        let name = text(parameter.name_offset, parameter.name_len).ok_or(Status::InvalidLength)?;
        let new = text(parameter.value_offset, parameter.value_len).ok_or(Status::InvalidLength)?;
        if !name.eq("NetworkAddress".chars()) {
            return Err(Status::NotSupported);
        }
        let digits: Option<Vec<u8>> = new.map(|c| c.to_digit(16).map(|d| d as u8)).collect();
        let digits = digits.ok_or(Status::InvalidData)?;
        let (pairs, rest) = digits.as_chunks::<2>();
        let mut address = MacAddr::default();
        if pairs.len() != address.0.len() || !rest.is_empty() {
            return Err(Status::InvalidData);
        }
        for (to, [high, low]) in address.0.iter_mut().zip(pairs) {
            *to = high << 4 | low;
        }
        if !address.is_station() {
            return Err(Status::InvalidData);
        }
        self.settings.address = address;
        Ok(())
    }
}

/// `len` bytes from `offset` on, if they are there.
fn slice(bytes: &[u8], offset: u32, len: u32) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

/// A message with this body, and what follows it.
fn message<T: IntoBytes + Immutable>(kind: MessageKind, body: &T, rest: &[u8]) -> Vec<u8> {
    let len = (HEADER_SIZE + size_of::<T>() + rest.len()) as u32;
    [Header { kind, len }.as_bytes(), body.as_bytes(), rest].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> Control {
        let identity = Identity {
            address: MacAddr([2, 0, 0, 0, 0, 7]),
            max_mtu: 1500,
            name: "lan".into(),
            channels: 2,
            takes: Offloads::ALL,
            gives: Offloads::ALL,
        };
        let link = Link {
            name: "test".into(),
            up: true,
            mtu: 1500,
            speed: 10_000,
            mac: None,
            queues: 2,
            takes: Offloads::ALL,
            gives: Offloads::ALL,
        };
        Control::new(identity, &link)
    }

    fn ready() -> Control {
        let mut control = control();
        let request = Initialize { id: 1, major: 1, minor: 0, max_transfer: 0x4000 };
        let answer = control.take(&message(MessageKind::Initialize, &request, &[])).unwrap();
        let complete = InitializeComplete::read_from_bytes(&answer[8..]).unwrap();
        assert_eq!((complete.id, complete.status, complete.alignment), (1, 0, 3));
        control
    }

    fn request(oid: Oid, value: &[u8]) -> ObjectRequest {
        ObjectRequest { id: 9, oid, len: value.len() as u32, offset: 20, vc_handle: 0 }
    }

    fn query(control: &mut Control, oid: Oid, given: &[u8]) -> (Status, Vec<u8>) {
        let asked = message(MessageKind::Query, &request(oid, given), given);
        let answer = control.take(&asked).unwrap();
        let (header, body) = Header::read_from_prefix(&answer).unwrap();
        assert_eq!((header.kind, header.len as usize), (MessageKind::QueryComplete, answer.len()));
        let (complete, rest) = QueryComplete::read_from_prefix(body).unwrap();
        assert_eq!((complete.id, complete.len as usize), (9, rest.len()));
        (complete.status, rest.to_vec())
    }

    fn set(control: &mut Control, oid: Oid, value: &[u8]) -> Status {
        let asked = message(MessageKind::Set, &request(oid, value), value);
        let answer = control.take(&asked).unwrap();
        let (complete, rest) = RequestComplete::read_from_prefix(&answer[8..]).unwrap();
        assert_eq!((complete.id, rest.len()), (9, 0));
        complete.status
    }

    #[test]
    fn what_linux_asks() {
        let mut control = ready();
        let number = |value: u32| (Status::Success, value.to_le_bytes().to_vec());
        assert_eq!(query(&mut control, Oid::MaximumFrameSize, &[]), number(1500));
        assert_eq!(query(&mut control, Oid::MediaConnectStatus, &[]), number(0));
        assert_eq!(query(&mut control, Oid::LinkSpeed, &[]), number(100_000_000));
        let address = (Status::Success, vec![2, 0, 0, 0, 0, 7]);
        assert_eq!(query(&mut control, Oid::PermanentAddress, &[]), address);
        let name = (Status::Success, b"l\0a\0n\0\0\0".to_vec());
        assert_eq!(query(&mut control, Oid::FriendlyName, &[]), name);
        for (room, revision, size) in [(112, 1, 112), (144, 2, 144), (156, 3, 156)] {
            let (status, value) =
                query(&mut control, Oid::OffloadHardwareCapabilities, &vec![0; room]);
            assert_eq!((status, value.len()), (Status::Success, size));
            assert_eq!(value[..4], [0xA7, revision, size as u8, 0]);
            // TCP with options and UDP over IPv4, and the largest large send.
            assert_eq!(value[8], 0x55);
            assert_eq!(value[84..88], LARGE_SEND_MAX.to_le_bytes());
        }
        let (_, value) = query(&mut control, Oid::ReceiveScaleCapabilities, &[0; 20]);
        assert_eq!((value.len(), &value[12..18]), (18, [2, 0, 0, 0, 128, 0].as_slice()));
        let unknown = (Status::NotSupported, vec![]);
        assert_eq!(query(&mut control, Oid(0x1234), &[]), unknown);
        for oid in SUPPORTED {
            let queried = query(&mut control, oid, &[]).0;
            let is_set = set(&mut control, oid, &[]) != Status::NotSupported;
            assert!(queried == Status::Success || is_set, "{oid:?}");
        }
    }

    #[test]
    fn what_linux_sets() {
        let mut control = ready();
        assert_eq!(set(&mut control, Oid::CurrentPacketFilter, &[0xD, 0, 0, 0]), Status::Success);
        assert_eq!(control.settings().filter.0, 0xD);

        let mut offload = [0; 28];
        offload[..4].copy_from_slice(&[0x80, 3, 28, 0]);
        offload[22..24].fill(2);
        assert_eq!(set(&mut control, Oid::OffloadParameters, &offload), Status::Success);
        assert!(control.settings().coalescing);
        offload[22..24].fill(0);
        set(&mut control, Oid::OffloadParameters, &offload);
        assert!(control.settings().coalescing);
        offload[22..24].fill(1);
        set(&mut control, Oid::OffloadParameters, &offload);
        assert!(!control.settings().coalescing);
        offload[22..24].fill(2);
        control.forbid_coalescing();
        set(&mut control, Oid::OffloadParameters, &offload);
        assert!(!control.settings().coalescing);
        // Before version 5.
        assert_eq!(set(&mut control, Oid::OffloadParameters, &offload[..22]), Status::Success);
    }

    #[test]
    fn the_address_can_be_changed() {
        let mut control = ready();
        let mut change = |name: &str, value: &str| {
            let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let (name, value): (Vec<u8>, Vec<u8>) = (utf16(name), utf16(value));
            let parameter = ConfigParameter {
                name_offset: 20,
                name_len: name.len() as u32,
                kind: 2,
                value_offset: 20 + name.len() as u32,
                value_len: value.len() as u32,
            };
            let value = [parameter.as_bytes(), &name, &value].concat();
            let status = set(&mut control, Oid::RndisConfigParameter, &value);
            (status, control.settings().address.to_string())
        };
        let ok = change("NetworkAddress", "0a0b0C0d0e0f");
        assert_eq!(ok, (Status::Success, "0a:0b:0c:0d:0e:0f".into()));
        for (value, status) in [
            ("0a0b0c0d0e", Status::InvalidData),
            ("0a0b0c0d0e0g", Status::InvalidData),
            ("010b0c0d0e0f", Status::InvalidData),
            ("000000000000", Status::InvalidData),
        ] {
            let kept = change("NetworkAddress", value);
            assert_eq!(kept, (status, "0a:0b:0c:0d:0e:0f".into()), "{value}");
        }
        assert_eq!(change("Speed", "1").0, Status::NotSupported);
    }

    #[test]
    fn indirection_tables_name_channels_there_are() {
        let mut control = ready();
        let mut value = ReceiveScaleParameters {
            header: ObjectHeader { kind: OBJECT_RSS_PARAMETERS, revision: 2, size: 40 },
            flags: 0,
            base_cpu: 0,
            hash: 1,
            table_size: 512,
            padding0: 0,
            table_offset: 40,
            key_size: 40,
            padding1: 0,
            key_offset: 40 + 512,
            masks: [0; 3],
        };
        let table = |entry: u8| [vec![[1, 0, 0, 0]; 127], vec![[entry, 0, 0, 0]]].concat().concat();
        let whole = |value: &ReceiveScaleParameters, entry| {
            [value.as_bytes(), &table(entry), &[0; 40]].concat()
        };
        let oid = Oid::ReceiveScaleParameters;
        assert_eq!(set(&mut control, oid, &whole(&value, 0)), Status::Success);
        let table = control.settings().indirection.unwrap();
        assert_eq!((table[0], table[127]), (1, 0));
        assert_eq!(set(&mut control, oid, &whole(&value, 2)), Status::InvalidData);
        assert_eq!(control.settings().indirection, Some(table));
        value.table_offset = 41;
        assert_eq!(set(&mut control, oid, &whole(&value, 0)), Status::InvalidData);
        value.table_offset = u32::MAX;
        assert_eq!(set(&mut control, oid, &whole(&value, 0)), Status::InvalidLength);
        value.flags = ReceiveScaleParameters::DISABLE;
        assert_eq!(set(&mut control, oid, &whole(&value, 0)), Status::Success);
        assert_eq!(control.settings().indirection, None);
    }

    #[test]
    fn the_link_is_told_of_once() {
        let mut control = control();
        assert_eq!(control.set_link(false), None);
        let mut control = ready();
        assert_eq!(control.set_link(true), None);
        let down = control.set_link(false).unwrap();
        assert_eq!(down[8..12], 0x4001_000Cu32.to_le_bytes());
        assert_eq!(control.set_link(false), None);
        let up = control.set_link(true).unwrap();
        assert_eq!((up.len(), &up[8..12]), (20, 0x4001_000Bu32.to_le_bytes().as_slice()));
    }

    #[test]
    fn life_and_death() {
        let mut control = control();
        assert_eq!(query(&mut control, Oid::PermanentAddress, &[]).0, Status::Failure);
        let mut control = ready();
        let keep = message(MessageKind::KeepAlive, &Request { id: 5 }, &[]);
        let answer = control.take(&keep).unwrap();
        assert_eq!(answer[..16], [8, 0, 0, 0x80, 16, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        set(&mut control, Oid::CurrentPacketFilter, &[0xD, 0, 0, 0]);
        let reset = message(MessageKind::Reset, &Request { id: 0 }, &[]);
        assert_eq!(control.take(&reset).unwrap()[8..], [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(control.settings().filter.0, 0);
        let halt = message(MessageKind::Halt, &Request { id: 0 }, &[]);
        assert_eq!(control.take(&halt), None);
        assert_eq!(query(&mut control, Oid::PermanentAddress, &[]).0, Status::Failure);
    }

    #[test]
    fn wild_lengths_are_refused() {
        let mut control = ready();
        // Shorter than it says it is, or than a header.
        assert_eq!(control.take(&[4, 0, 0, 0, 200, 0, 0, 0]), None);
        assert_eq!(control.take(&[4, 0, 0, 0, 4, 0, 0, 0]), None);
        assert_eq!(control.take(&[4, 0, 0]), None);
        for (offset, len) in [(u32::MAX, 4), (20, u32::MAX), (24, 1), (u32::MAX, u32::MAX)] {
            let request = ObjectRequest { id: 9, oid: Oid::LinkSpeed, len, offset, vc_handle: 0 };
            let asked = message(MessageKind::Query, &request, &[0; 4]);
            let answer = control.take(&asked).unwrap();
            let (complete, _) = QueryComplete::read_from_prefix(&answer[8..]).unwrap();
            assert_eq!(complete.status, Status::InvalidLength);
        }
    }
}
