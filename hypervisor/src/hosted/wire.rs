//! What passes between a hosted partition's process and its root, over a socket that keeps packets
//! apart: *intercepts* go up, each is answered by one reply, and doorbells come down.
//!
//! The process may send whatever it likes. A packet is copied out of the socket once, and
//! [`Intercept::parse`] decides from that copy alone what it is.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::synic::ConnectionId;

/// Bytes that one intercept can move to or from a port in a row (`rep outs`, `rep ins`).
pub(super) const STRING: usize = 4096;

/// Bytes of the longest packet that goes up.
pub(super) const LONGEST: usize = size_of::<Header>() + STRING;

/// How every packet that goes up begins.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: u32,
    /// A port, a register, or the step of the start.
    index: u32,
    /// Bytes of an access: 1, 2 or 4, and to memory also 8.
    width: u32,
    reserved: u32,
    values: [u64; 2],
}

const _: () = assert!(size_of::<Header>() == 32);

mod kind {
    pub(super) const STARTED: u32 = 1;
    pub(super) const NOT_STARTED: u32 = 2;
    pub(super) const PORT_READ: u32 = 3;
    pub(super) const PORT_WRITE: u32 = 4;
    pub(super) const REGISTER_READ: u32 = 5;
    pub(super) const REGISTER_WRITE: u32 = 6;
    pub(super) const HYPERCALL: u32 = 7;
    pub(super) const PORT_READ_STRING: u32 = 8;
    pub(super) const MMIO_READ: u32 = 9;
    pub(super) const MMIO_WRITE: u32 = 10;

    pub(super) const START: u32 = 0x81;
    pub(super) const DONE: u32 = 0x82;
    pub(super) const FAULT: u32 = 0x83;
    pub(super) const BIND: u32 = 0x84;
    pub(super) const UNBIND: u32 = 0x85;
}

/// What a processor cannot do by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intercept<'a> {
    /// The process is confined and about to run the guest; the bits say by what.
    Started(u32),
    /// It cannot be: which step failed, and with which error number.
    NotStarted { step: u32, errno: i32 },
    /// `in`
    PortRead { port: u16, width: usize },
    /// `out`, as often in a row as `data` has room for `width`.
    PortWrite { port: u16, width: usize, data: &'a [u8] },
    /// `rep ins`: `len` bytes from the port go to memory at `gpa`.
    PortReadString { port: u16, width: usize, gpa: u64, len: usize },
    /// A load from an address that is a device's.
    MmioRead { gpa: u64, width: usize },
    /// A store to one.
    MmioWrite { gpa: u64, width: usize, value: u64 },
    /// `rdmsr`
    RegisterRead { register: u32 },
    /// `wrmsr`
    RegisterWrite { register: u32, value: u64 },
    /// A hypercall, with RCX and RDX.
    Hypercall { control: u64, input: u64 },
}

/// Why a packet is no intercept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Garbage {
    /// Too short for a header, or longer than any intercept is.
    #[error("{0} bytes are no intercept")]
    Length(usize),
    /// Of no known kind.
    #[error("there is no intercept of kind {0}")]
    Kind(u32),
    /// A port or a width that no processor has, or a string that its width does not divide.
    #[error("an access of {len} bytes, each of width {width}, to port {port:#x} is not possible")]
    Port { port: u32, width: u32, len: usize },
    /// A width that no load or store has.
    #[error("an access of {width} bytes to address {gpa:#x} is not possible")]
    Mmio { gpa: u64, width: u32 },
}

impl<'a> Intercept<'a> {
    /// What the packet says.
    pub(super) fn parse(packet: &'a [u8]) -> Result<Self, Garbage> {
        let length = Garbage::Length(packet.len());
        if packet.len() > LONGEST {
            return Err(length);
        }
        let (header, data) = Header::read_from_prefix(packet).map_err(|_| length)?;
        let Header { kind, index, width, reserved: _, values: [first, second] } = header;
        let no_access = |len| Garbage::Port { port: index, width, len };
        let port = || match (u16::try_from(index), width) {
            (Ok(port), 1 | 2 | 4) => Ok((port, width as usize)),
            _ => Err(no_access(data.len())),
        };
        let string = |width, len| {
            let possible = (1..=STRING).contains(&len) && len.is_multiple_of(width);
            if possible { Ok(len) } else { Err(no_access(len)) }
        };
        let mmio = || match width {
            1 | 2 | 4 | 8 => Ok(width as usize),
            _ => Err(Garbage::Mmio { gpa: first, width }),
        };
        if kind != kind::PORT_WRITE && !data.is_empty() {
            return Err(length);
        }
        Ok(match kind {
            kind::STARTED => Self::Started(index),
            kind::NOT_STARTED => Self::NotStarted { step: index, errno: first as i32 },
            kind::PORT_READ => {
                let (port, width) = port()?;
                Self::PortRead { port, width }
            }
            kind::PORT_WRITE => {
                let (port, width) = port()?;
                string(width, data.len())?;
                Self::PortWrite { port, width, data }
            }
            kind::PORT_READ_STRING => {
                let (port, width) = port()?;
                let len = string(width, usize::try_from(second).unwrap_or(usize::MAX))?;
                Self::PortReadString { port, width, gpa: first, len }
            }
            kind::MMIO_READ => Self::MmioRead { gpa: first, width: mmio()? },
            kind::MMIO_WRITE => Self::MmioWrite { gpa: first, width: mmio()?, value: second },
            kind::REGISTER_READ => Self::RegisterRead { register: index },
            kind::REGISTER_WRITE => Self::RegisterWrite { register: index, value: first },
            kind::HYPERCALL => Self::Hypercall { control: first, input: second },
            _ => return Err(Garbage::Kind(kind)),
        })
    }

    /// Sends it up. Sleeps while the root has not taken earlier ones.
    pub(super) fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let (kind, index, width, values, data): (u32, u32, usize, [u64; 2], &[u8]) = match *self {
            Self::Started(by) => (kind::STARTED, by, 0, [0; 2], &[]),
            Self::NotStarted { step, errno } => {
                (kind::NOT_STARTED, step, 0, [errno as u64, 0], &[])
            }
            Self::PortRead { port, width } => (kind::PORT_READ, port.into(), width, [0; 2], &[]),
            Self::PortWrite { port, width, data } => {
                (kind::PORT_WRITE, port.into(), width, [0; 2], data)
            }
            Self::PortReadString { port, width, gpa, len } => {
                (kind::PORT_READ_STRING, port.into(), width, [gpa, len as u64], &[])
            }
            Self::MmioRead { gpa, width } => (kind::MMIO_READ, 0, width, [gpa, 0], &[]),
            Self::MmioWrite { gpa, width, value } => {
                (kind::MMIO_WRITE, 0, width, [gpa, value], &[])
            }
            Self::RegisterRead { register } => (kind::REGISTER_READ, register, 0, [0; 2], &[]),
            Self::RegisterWrite { register, value } => {
                (kind::REGISTER_WRITE, register, 0, [value, 0], &[])
            }
            Self::Hypercall { control, input } => (kind::HYPERCALL, 0, 0, [control, input], &[]),
        };
        let mut packet = [0; LONGEST];
        let header = Header { kind, index, width: width as u32, reserved: 0, values };
        let len = size_of::<Header>() + data.len();
        let (head, room) = packet.split_at_mut(size_of::<Header>());
        head.copy_from_slice(header.as_bytes());
        room.get_mut(..data.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        rustix::net::send(socket, &packet[..len], SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// A packet that comes down.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Down {
    kind: u32,
    connection: u32,
    value: u64,
}

const _: () = assert!(size_of::<Down>() == 16);

/// What the root says.
#[derive(Debug)]
pub(super) enum Order<Fd> {
    /// The first of all: bytes of memory that begin at guest address 0, the file they are in, and
    /// what an interrupt fires.
    Start { memory: u64, file: Fd, interrupt: Fd },
    /// The intercept is over; this is what it gives.
    Done(u64),
    /// The intercept is a general protection fault.
    Fault,
    /// From now on *signal event* on this connection is a write to the descriptor.
    Bind(ConnectionId, Fd),
    /// Not any more.
    Unbind(ConnectionId),
}

impl Order<BorrowedFd<'_>> {
    /// Sends it down. Never sleeps: a process that does not read gets no more.
    pub(super) fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let (kind, connection, value) = match self {
            Self::Start { memory, .. } => (kind::START, 0, *memory),
            Self::Done(value) => (kind::DONE, 0, *value),
            Self::Fault => (kind::FAULT, 0, 0),
            Self::Bind(connection, _) => (kind::BIND, connection.get(), 0),
            Self::Unbind(connection) => (kind::UNBIND, connection.get(), 0),
        };
        let packet = Down { kind, connection, value };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let descriptors: &[BorrowedFd<'_>] = match self {
            Self::Start { file, interrupt, .. } => &[*file, *interrupt],
            Self::Bind(_, fd) => &[*fd],
            _ => &[],
        };
        if descriptors.is_empty() {
            rustix::net::send(socket, packet.as_bytes(), flags)?;
            return Ok(());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(descriptors));
        sendmsg(socket, &[IoSlice::new(packet.as_bytes())], &mut control, flags)?;
        Ok(())
    }
}

impl Order<OwnedFd> {
    /// Waits for the next one.
    pub(super) fn receive(socket: impl AsFd) -> io::Result<Self> {
        let mut bytes = [0; size_of::<Down>()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received =
            recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?.bytes;
        let mut descriptors = [None, None];
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        for (place, fd) in descriptors.iter_mut().zip(fds.flatten()) {
            *place = Some(fd);
        }
        if received != bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Down { kind, connection, value } = zerocopy::transmute!(bytes);
        let connection = ConnectionId::new(connection);
        Ok(match (kind, descriptors) {
            (kind::START, [Some(file), Some(interrupt)]) => {
                Self::Start { memory: value, file, interrupt }
            }
            (kind::DONE, _) => Self::Done(value),
            (kind::FAULT, _) => Self::Fault,
            (kind::BIND, [Some(fd), None]) => Self::Bind(connection, fd),
            (kind::UNBIND, _) => Self::Unbind(connection),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn packet(kind: u32, index: u32, width: u32, data: &[u8]) -> Vec<u8> {
        let header = Header { kind, index, width, reserved: 0, values: [7, 8] };
        [header.as_bytes(), data].concat()
    }

    #[test]
    fn intercepts_arrive() {
        let (up, down) = pair();
        let mut buffer = [0; LONGEST + 1];
        for sent in [
            Intercept::Started(5),
            Intercept::NotStarted { step: 3, errno: 38 },
            Intercept::PortRead { port: 0xffff, width: 4 },
            Intercept::PortWrite { port: 0x3f8, width: 1, data: b"hello" },
            Intercept::PortWrite { port: 0x1f0, width: 4, data: &[1; STRING] },
            Intercept::PortReadString { port: 0x1f0, width: 4, gpa: 0x12_3000, len: STRING },
            Intercept::MmioRead { gpa: 0xfeb0_0008, width: 4 },
            Intercept::MmioWrite { gpa: u64::MAX, width: 8, value: 1 << 63 },
            Intercept::RegisterRead { register: 0x4000_0080 },
            Intercept::RegisterWrite { register: 0x4000_0084, value: u64::MAX },
            Intercept::Hypercall { control: 0x1_005d, input: 0x2001 },
        ] {
            sent.send(&up).unwrap();
            let (len, _) = rustix::net::recv(&down, &mut buffer, RecvFlags::empty()).unwrap();
            assert_eq!(Intercept::parse(&buffer[..len]), Ok(sent));
        }
        let long = Intercept::PortWrite { port: 1, width: 1, data: &[0; STRING + 1] };
        assert!(long.send(&up).is_err());
    }

    #[test]
    fn orders_arrive_with_their_descriptors() {
        let (up, down) = pair();
        let fd = down.as_fd();
        Order::Start { memory: 4096, file: fd, interrupt: fd }.send(&down).unwrap();
        Order::Bind(ConnectionId::new(9), fd).send(&down).unwrap();
        Order::Unbind(ConnectionId::new(9)).send(&down).unwrap();
        Order::Done(77).send(&down).unwrap();
        Order::Fault.send(&down).unwrap();
        let receive = || Order::receive(&up).unwrap();
        assert!(matches!(receive(), Order::Start { memory: 4096, .. }));
        assert!(matches!(receive(), Order::Bind(id, _) if id.get() == 9));
        assert!(matches!(receive(), Order::Unbind(id) if id.get() == 9));
        assert!(matches!(receive(), Order::Done(77)));
        assert!(matches!(receive(), Order::Fault));
        drop(down);
        assert!(Order::receive(&up).is_err());
    }

    #[test]
    fn garbage_is_told_apart() {
        let parse = |packet: &[u8]| Intercept::parse(packet).map(|_| ()).unwrap_err();
        assert_eq!(parse(&[]), Garbage::Length(0));
        assert_eq!(parse(&[1; 31]), Garbage::Length(31));
        assert_eq!(parse(&packet(kind::PORT_WRITE, 1, 1, &[0; STRING + 1])), Garbage::Length(4129));
        assert_eq!(parse(&packet(kind::HYPERCALL, 0, 0, &[0])), Garbage::Length(33));
        assert_eq!(parse(&packet(0, 0, 0, &[])), Garbage::Kind(0));
        assert_eq!(parse(&packet(kind::DONE, 0, 0, &[])), Garbage::Kind(kind::DONE));
        for (port, width, len) in [(0x1_0000, 1, 1), (1, 3, 3), (1, 0, 1), (1, 4, 6), (1, 1, 0)] {
            let garbage = Garbage::Port { port, width, len };
            assert_eq!(parse(&packet(kind::PORT_WRITE, port, width, &vec![0; len])), garbage);
        }
        // The packets of this test say that a string is 8 bytes long.
        let garbage = Garbage::Port { port: 1, width: 3, len: 0 };
        assert_eq!(parse(&packet(kind::PORT_READ_STRING, 1, 3, &[])), garbage);
        for width in [0, 3, 16] {
            let garbage = Garbage::Mmio { gpa: 7, width };
            assert_eq!(parse(&packet(kind::MMIO_READ, 0, width, &[])), garbage);
            assert_eq!(parse(&packet(kind::MMIO_WRITE, 0, width, &[])), garbage);
        }
        let mut string = packet(kind::PORT_READ_STRING, 1, 4, &[]);
        for len in [0, 9, STRING + 4] {
            string[24..28].copy_from_slice(&(len as u32).to_le_bytes());
            assert_eq!(parse(&string), Garbage::Port { port: 1, width: 4, len });
        }
    }

    proptest! {
        /// Nothing panics, and what is accepted is an access that a processor can make.
        #[test]
        fn any_bytes_are_an_intercept_or_none(
            kind in prop_oneof![0_u32..12, any::<u32>()],
            index in any::<u32>(),
            width in prop_oneof![0_u32..9, any::<u32>()],
            data in proptest::collection::vec(any::<u8>(), 0..64),
            cut in 0_usize..100,
        ) {
            let mut bytes = packet(kind, index, width, &data);
            bytes.truncate(cut);
            match Intercept::parse(&bytes) {
                Ok(Intercept::PortRead { width, .. }) => prop_assert!([1, 2, 4].contains(&width)),
                Ok(Intercept::PortReadString { width, len, .. }) => {
                    prop_assert!(len > 0 && len <= STRING && len % width == 0);
                }
                Ok(Intercept::PortWrite { width, data, .. }) => {
                    prop_assert!(!data.is_empty() && data.len() % width == 0);
                }
                Ok(Intercept::MmioRead { width, .. } | Intercept::MmioWrite { width, .. }) => {
                    prop_assert!([1, 2, 4, 8].contains(&width));
                }
                Ok(_) => prop_assert_eq!(bytes.len(), size_of::<Header>()),
                Err(_) => {}
            }
        }
    }
}
