//! The storage protocol: what the packets of a SCSI or IDE channel carry, at both ends.
//!
//! Every payload is one 64-byte [`VstorPacket`]; a transfer's guest pages ride in the ring
//! packet's GPA-direct headers. Layouts and numbers: `struct vstor_packet` and its kin in Linux's
//! drivers/scsi/storvsc_drv.c, in the form of protocol 5.1 and later.

use open_enum::open_enum;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Guid;

/// The class of a synthetic SCSI controller.
pub const SCSI_CLASS: Guid = Guid::new("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
/// The class of the fast path to one IDE device.
pub const IDE_CLASS: Guid = Guid::new("32412632-86cb-44a2-9b5c-50d1417354f5");
/// The class of a synthetic Fibre Channel adapter.
pub const FIBRE_CHANNEL_CLASS: Guid = Guid::new("2f9bcc4a-0069-4af3-b76b-6fd0be528cda");

/// What a [`VstorPacket`] asks or says (`enum vstor_packet_operation`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum Operation {
    /// The answer to any request.
    CompleteIo = 1,
    /// A device went away; the guest should look again.
    RemoveDevice = 2,
    /// A SCSI command, in a [`ScsiRequest`].
    ExecuteSrb = 3,
    /// Abort everything on a logical unit.
    ResetLun = 4,
    /// Abort everything on an adapter.
    ResetAdapter = 5,
    /// Abort everything on a bus.
    ResetBus = 6,
    /// The handshake starts.
    BeginInitialization = 7,
    /// The handshake ends; commands may follow.
    EndInitialization = 8,
    /// Asks for a [`ProtocolVersion`].
    QueryProtocolVersion = 9,
    /// Asks for [`Properties`].
    QueryProperties = 10,
    /// Devices came or went; the guest should look again.
    EnumerateBus = 11,
    /// Asks for Fibre Channel names.
    FibreChannelData = 12,
    /// Asks for sub-channels, their count in the payload's first `u16`.
    CreateSubChannels = 13,
}

/// In [`VstorPacket::flags`]: the sender wants an answer.
pub const FLAG_REQUEST_COMPLETION: u32 = 1;

/// [`VstorPacket::status`] of an answer (`NTSTATUS`).
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u32)]
pub enum NtStatus {
    /// `STATUS_SUCCESS`
    Success = 0,
    /// `STATUS_UNSUCCESSFUL`
    Unsuccessful = 0xC000_0001,
    /// `STATUS_INVALID_PARAMETER`
    InvalidParameter = 0xC000_000D,
    /// `STATUS_INVALID_DEVICE_REQUEST`
    InvalidDeviceRequest = 0xC000_0010,
    /// `STATUS_REVISION_MISMATCH`: another protocol version, please.
    RevisionMismatch = 0xC000_0059,
    /// `STATUS_NOT_SUPPORTED`
    NotSupported = 0xC000_00BB,
    /// `STATUS_INVALID_DEVICE_STATE`: not now.
    InvalidDeviceState = 0xC000_0184,
}

/// Bytes in a [`VstorPacket`]'s payload.
pub const PAYLOAD_SIZE: usize = 52;

/// One message of the protocol.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VstorPacket {
    /// What it asks or says.
    pub operation: Operation,
    /// [`FLAG_REQUEST_COMPLETION`].
    pub flags: u32,
    /// How it went, in an answer.
    pub status: NtStatus,
    /// By `operation`: a [`ScsiRequest`], a [`ProtocolVersion`], [`Properties`] or a `u16`, at its
    /// front.
    pub payload: [u8; PAYLOAD_SIZE],
}

const _: () = assert!(size_of::<VstorPacket>() == 64);

impl VstorPacket {
    /// An answer with `body` at the front of its payload; what does not fit is cut off.
    pub fn answer(status: NtStatus, body: &[u8]) -> Self {
        let mut payload = [0; PAYLOAD_SIZE];
        for (to, from) in payload.iter_mut().zip(body) {
            *to = *from;
        }
        Self { operation: Operation::CompleteIo, flags: 0, status, payload }
    }

    /// A request that wants an answer, with `body` at the front of its payload.
    pub fn request(operation: Operation, body: &[u8]) -> Self {
        Self { operation, flags: FLAG_REQUEST_COMPLETION, ..Self::answer(NtStatus::Success, body) }
    }

    /// The payload's front as a `T`, which must be no longer than [`PAYLOAD_SIZE`].
    pub fn body<T: FromBytes>(&self) -> Option<T> {
        T::read_from_prefix(&self.payload).ok().map(|(body, _)| body)
    }
}

/// A version of the protocol, major in the upper byte.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Version(pub u16);

impl Version {
    /// Windows 8.
    pub const V5_1: Self = Self(0x0501);
    /// Windows 8.1.
    pub const V6_0: Self = Self(0x0600);
    /// Windows 10.
    pub const V6_2: Self = Self(0x0602);
}

/// What [`Operation::QueryProtocolVersion`] carries.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ProtocolVersion {
    /// The version the guest would speak.
    pub version: Version,
    /// Unused.
    pub revision: u16,
}

const _: () = assert!(size_of::<ProtocolVersion>() == 4);

/// What answers [`Operation::QueryProperties`] (`struct vmstorage_channel_properties`).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Properties {
    /// Zero.
    pub reserved: u32,
    /// How many sub-channels the guest may ask for.
    pub max_channels: u16,
    /// Zero.
    pub reserved1: u16,
    /// [`Properties::FLAG_MULTI_CHANNEL`].
    pub flags: u32,
    /// The longest transfer in bytes, a multiple of the page size.
    pub max_transfer: u32,
    /// Zero.
    pub reserved2: [u32; 2],
}

const _: () = assert!(size_of::<Properties>() == 24);

impl Properties {
    /// In [`Properties::flags`]: sub-channels may be asked for
    /// (`STORAGE_CHANNEL_SUPPORTS_MULTI_CHANNEL`).
    pub const FLAG_MULTI_CHANNEL: u32 = 1;
}

/// Which way a command's data goes.
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u8)]
pub enum DataDirection {
    /// From the guest to the device.
    Write = 0,
    /// From the device to the guest.
    Read = 1,
    /// There is none.
    None = 2,
}

/// How a command ended, for the guest's adapter driver (`SRB_STATUS_*`); the upper two bits are
/// flags.
#[open_enum]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(u8)]
pub enum SrbStatus {
    /// Not yet.
    Pending = 0x00,
    /// Well.
    Success = 0x01,
    /// It was aborted.
    Aborted = 0x02,
    /// See the SCSI status.
    Error = 0x04,
    /// The request makes no sense.
    InvalidRequest = 0x06,
    /// There is no such target.
    NoDevice = 0x08,
    /// Fewer or more bytes than asked for.
    DataOverrun = 0x12,
    /// There is no such logical unit; Linux removes it.
    InvalidLun = 0x20,
    /// [`SrbStatus::Error`], with sense data in the request.
    ErrorWithSense = 0x84,
}

impl SrbStatus {
    /// Flag: the sense data is in the request (`SRB_STATUS_AUTOSENSE_VALID`).
    pub const FLAG_SENSE_VALID: u8 = 0x80;
    /// Flag: the queue is frozen.
    pub const FLAG_QUEUE_FROZEN: u8 = 0x40;
}

/// The longest CDB that a request holds.
pub const MAX_CDB: usize = 16;
/// The most sense data that a request holds.
pub const MAX_SENSE: usize = 20;

/// A SCSI command, and in the answer what became of it (`struct vmscsi_request`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ScsiRequest {
    /// Bytes in this structure, 52.
    pub length: u16,
    /// How it went, for the adapter driver.
    pub srb_status: SrbStatus,
    /// SCSI status: 0 good, 2 check condition.
    pub scsi_status: u8,
    /// The adapter's port.
    pub port: u8,
    /// The bus.
    pub path: u8,
    /// The target.
    pub target: u8,
    /// The logical unit.
    pub lun: u8,
    /// Bytes of CDB in use.
    pub cdb_len: u8,
    /// Room for sense data; in the answer, bytes of it.
    pub sense_len: u8,
    /// Which way the data goes.
    pub data_in: DataDirection,
    /// Zero.
    pub reserved: u8,
    /// Bytes to transfer; in the answer, bytes transferred.
    pub transfer_len: u32,
    /// The CDB, [`MAX_CDB`] bytes of it; in a failure's answer, sense data.
    pub cdb_or_sense: [u8; MAX_SENSE],
    /// Zero.
    pub reserved1: u16,
    /// Tagged queueing.
    pub queue_tag: u8,
    /// Tagged queueing.
    pub queue_action: u8,
    /// `SRB_FLAGS_*`.
    pub srb_flags: u32,
    /// Seconds.
    pub timeout: u32,
    /// A hint for the order.
    pub sort_key: u32,
}

const _: () = assert!(size_of::<ScsiRequest>() == PAYLOAD_SIZE);
