//! What a NIC is asked and told: its objects, by their ids (OIDs).
//!
//! Some are what it is ([`Identity`]), some what the guest has set ([`Settings`]), some what has
//! happened. Values are those of NDIS, as Linux' drivers/net/hyperv/rndis_filter.c uses them.

use backends::net::{Link, MacAddr, Offloads};
use vmbus::rndis::{
    ChecksumOffload, ConfigParameter, HASH_KEY, INDIRECTION_ENTRIES, LargeSendOffload,
    OBJECT_OFFLOAD, OBJECT_RSS_CAPABILITIES, OBJECT_RSS_PARAMETERS, ObjectHeader, Offload,
    OffloadParameters, Oid, PacketFilter, ReceiveScaleCapabilities, ReceiveScaleParameters, Status,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::control::MAX_PACKETS;
use super::steering::{HashTypes, Spread};

/// The most TCP payload that may be left to be cut, in bytes: what the longest IPv4 packet has beside its
/// header and TCP's with all options. To the network, a large send costs hardly more than a small one.
const LARGE_SEND_MAX: u32 = 65535 - 20 - 60;

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
    /// How it wants frames spread over its channels; none if it leaves that to the network.
    pub spread: Option<Spread>,
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

/// One NIC's objects.
#[derive(Debug)]
pub(super) struct Objects {
    identity: Identity,
    settings: Settings,
    /// How the guest last wanted frames spread; it may go back to that, or to parts of it.
    spread: Spread,
    link_up: bool,
    /// In Mbit/s.
    speed: u32,
    statistics: Statistics,
}

impl Objects {
    pub(super) fn new(identity: Identity, link: &Link) -> Self {
        let settings = Settings {
            address: identity.address,
            filter: PacketFilter(0),
            coalescing: false,
            spread: None,
        };
        let spread = Spread {
            types: HashTypes::default(),
            key: [0; HASH_KEY],
            table: [0; INDIRECTION_ENTRIES],
        };
        Self {
            identity,
            settings,
            spread,
            link_up: link.up,
            speed: link.speed,
            statistics: Statistics::default(),
        }
    }

    /// What the guest has set.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Forgets what the guest has set, but for its address.
    pub(super) fn reset(&mut self) {
        self.settings = Settings {
            address: self.settings.address,
            filter: PacketFilter(0),
            coalescing: false,
            spread: None,
        };
    }

    /// Tells what has passed so far, for queries.
    pub(super) fn set_statistics(&mut self, statistics: Statistics) {
        self.statistics = statistics;
    }

    /// The cable was plugged in or pulled out. Returns whether that is new.
    pub(super) fn set_link(&mut self, up: bool) -> bool {
        std::mem::replace(&mut self.link_up, up) != up
    }

    /// The guest takes no frames in several slots.
    pub(super) fn forbid_coalescing(&mut self) {
        self.identity.gives = Offloads::NONE;
    }

    /// Whether the network would coalesce.
    fn can_coalesce(&self) -> bool {
        self.identity.gives.contains(COALESCING)
    }

    /// Asks for an object. `given` is what the guest has sent along.
    pub(super) fn query(&self, oid: Oid, given: &[u8]) -> Result<Vec<u8>, Status> {
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

    /// Sets an object.
    pub(super) fn set(&mut self, oid: Oid, value: &[u8]) -> Result<(), Status> {
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
            self.settings.spread = None;
            return Ok(());
        }
        let mut spread = self.spread;
        if parameters.flags & ReceiveScaleParameters::HASH_UNCHANGED == 0 {
            spread.types = HashTypes(parameters.hash);
            let function = parameters.hash & HashTypes::FUNCTION;
            if parameters.hash != 0 && function != HashTypes::TOEPLITZ {
                return Err(Status::InvalidData);
            }
        }
        if parameters.flags & ReceiveScaleParameters::KEY_UNCHANGED == 0 {
            let len = parameters.key_size.into();
            let key = slice(value, parameters.key_offset, len).ok_or(Status::InvalidLength)?;
            let place = spread.key.get_mut(..key.len()).ok_or(Status::InvalidLength)?;
            place.copy_from_slice(key);
        }
        if parameters.flags & ReceiveScaleParameters::TABLE_UNCHANGED == 0 {
            let len = parameters.table_size.into();
            let bytes = slice(value, parameters.table_offset, len).ok_or(Status::InvalidLength)?;
            let (entries, rest) = bytes.as_chunks::<4>();
            if entries.is_empty() || entries.len() > INDIRECTION_ENTRIES || !rest.is_empty() {
                return Err(Status::InvalidLength);
            }
            for (to, from) in spread.table.iter_mut().zip(entries.iter().cycle()) {
                let channel = u32::from_le_bytes(*from);
                if channel >= self.identity.channels.into() {
                    return Err(Status::InvalidData);
                }
                *to = u8::try_from(channel).map_err(|_| Status::InvalidData)?;
            }
        }
        self.spread = spread;
        // Without a hash there is nothing to spread by.
        self.settings.spread = (spread.types != HashTypes::default()).then_some(spread);
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
pub(super) fn slice(bytes: &[u8], offset: u32, len: u32) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Those of a NIC with two channels.
    pub(in crate::netvsp) fn objects() -> Objects {
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
        Objects::new(identity, &link)
    }

    fn query(objects: &mut Objects, oid: Oid, given: &[u8]) -> (Status, Vec<u8>) {
        match objects.query(oid, given) {
            Ok(value) => (Status::Success, value),
            Err(status) => (status, Vec::new()),
        }
    }

    fn set(objects: &mut Objects, oid: Oid, value: &[u8]) -> Status {
        objects.set(oid, value).err().unwrap_or(Status::Success)
    }

    #[test]
    fn what_linux_asks() {
        let mut objects = objects();
        let number = |value: u32| (Status::Success, value.to_le_bytes().to_vec());
        assert_eq!(query(&mut objects, Oid::MaximumFrameSize, &[]), number(1500));
        assert_eq!(query(&mut objects, Oid::MediaConnectStatus, &[]), number(0));
        assert_eq!(query(&mut objects, Oid::LinkSpeed, &[]), number(100_000_000));
        let address = (Status::Success, vec![2, 0, 0, 0, 0, 7]);
        assert_eq!(query(&mut objects, Oid::PermanentAddress, &[]), address);
        let name = (Status::Success, b"l\0a\0n\0\0\0".to_vec());
        assert_eq!(query(&mut objects, Oid::FriendlyName, &[]), name);
        for (room, revision, size) in [(112, 1, 112), (144, 2, 144), (156, 3, 156)] {
            let (status, value) =
                query(&mut objects, Oid::OffloadHardwareCapabilities, &vec![0; room]);
            assert_eq!((status, value.len()), (Status::Success, size));
            assert_eq!(value[..4], [0xA7, revision, size as u8, 0]);
            // TCP with options and UDP over IPv4, and the largest large send.
            assert_eq!(value[8], 0x55);
            assert_eq!(value[84..88], LARGE_SEND_MAX.to_le_bytes());
        }
        let (_, value) = query(&mut objects, Oid::ReceiveScaleCapabilities, &[0; 20]);
        assert_eq!((value.len(), &value[12..18]), (18, [2, 0, 0, 0, 128, 0].as_slice()));
        let unknown = (Status::NotSupported, vec![]);
        assert_eq!(query(&mut objects, Oid(0x1234), &[]), unknown);
        for oid in SUPPORTED {
            let queried = query(&mut objects, oid, &[]).0;
            let is_set = set(&mut objects, oid, &[]) != Status::NotSupported;
            assert!(queried == Status::Success || is_set, "{oid:?}");
        }
    }

    #[test]
    fn what_linux_sets() {
        let mut objects = objects();
        assert_eq!(set(&mut objects, Oid::CurrentPacketFilter, &[0xD, 0, 0, 0]), Status::Success);
        assert_eq!(objects.settings().filter.0, 0xD);

        let mut offload = [0; 28];
        offload[..4].copy_from_slice(&[0x80, 3, 28, 0]);
        offload[22..24].fill(2);
        assert_eq!(set(&mut objects, Oid::OffloadParameters, &offload), Status::Success);
        assert!(objects.settings().coalescing);
        offload[22..24].fill(0);
        set(&mut objects, Oid::OffloadParameters, &offload);
        assert!(objects.settings().coalescing);
        offload[22..24].fill(1);
        set(&mut objects, Oid::OffloadParameters, &offload);
        assert!(!objects.settings().coalescing);
        offload[22..24].fill(2);
        objects.forbid_coalescing();
        set(&mut objects, Oid::OffloadParameters, &offload);
        assert!(!objects.settings().coalescing);
        // Before version 5.
        assert_eq!(set(&mut objects, Oid::OffloadParameters, &offload[..22]), Status::Success);
    }

    #[test]
    fn the_address_can_be_changed() {
        let mut objects = objects();
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
            let status = set(&mut objects, Oid::RndisConfigParameter, &value);
            (status, objects.settings().address.to_string())
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
        let mut objects = objects();
        let mut value = ReceiveScaleParameters {
            header: ObjectHeader { kind: OBJECT_RSS_PARAMETERS, revision: 2, size: 40 },
            flags: 0,
            base_cpu: 0,
            hash: 0x1701,
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
            [value.as_bytes(), &table(entry), &[7; 40]].concat()
        };
        let oid = Oid::ReceiveScaleParameters;
        assert_eq!(set(&mut objects, oid, &whole(&value, 0)), Status::Success);
        let spread = objects.settings().spread.unwrap();
        assert_eq!((spread.table[0], spread.table[127], spread.key), (1, 0, [7; 40]));
        assert_eq!(spread.types, HashTypes(0x1701));
        assert_eq!(set(&mut objects, oid, &whole(&value, 2)), Status::InvalidData);
        assert_eq!(objects.settings().spread, Some(spread));
        value.table_offset = 41;
        assert_eq!(set(&mut objects, oid, &whole(&value, 0)), Status::InvalidData);
        value.table_offset = u32::MAX;
        assert_eq!(set(&mut objects, oid, &whole(&value, 0)), Status::InvalidLength);
        value.flags = ReceiveScaleParameters::DISABLE;
        assert_eq!(set(&mut objects, oid, &whole(&value, 0)), Status::Success);
        assert_eq!(objects.settings().spread, None);
        // All that there was before.
        value.flags = ReceiveScaleParameters::HASH_UNCHANGED
            | ReceiveScaleParameters::KEY_UNCHANGED
            | ReceiveScaleParameters::TABLE_UNCHANGED;
        assert_eq!(set(&mut objects, oid, value.as_bytes()), Status::Success);
        assert_eq!(objects.settings().spread, Some(spread));
        // A hash that is not Toeplitz', and none at all.
        value.flags &= !ReceiveScaleParameters::HASH_UNCHANGED;
        value.hash = 0x1702;
        assert_eq!(set(&mut objects, oid, value.as_bytes()), Status::InvalidData);
        value.hash = 0;
        assert_eq!(set(&mut objects, oid, value.as_bytes()), Status::Success);
        assert_eq!(objects.settings().spread, None);
    }
}
