//! Making a tap or joining one that exists.
//!
//! `unsafe` calls `ioctl`, for which there is no other way to a tap.
#![allow(unsafe_code)]

use std::ffi::c_ulong;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

use super::queue::TapQueue;
use crate::net::offload::VirtioNetHeader;
use crate::net::{Link, Network, Offloads, Queue, QueueConfig};
use crate::uring::Uring;

/// Bytes of a device's name, its final zero included (`IFNAMSIZ`).
const NAME_SIZE: usize = libc::IFNAMSIZ;

/// The most queues a NIC gets of a tap.
const MAX_QUEUES: u16 = 64;

/// Changes to network devices (`RTMGRP_LINK` of linux/rtnetlink.h).
const LINK_GROUP: u32 = 1;
/// The most news that are taken away at a time.
const MAX_NEWS: u32 = 64;

/// What a tap has to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapOptions {
    /// How many queues, at least 1.
    pub queues: u16,
    /// The MTU of a tap that is made here; the kernel's 1500 if it is not said.
    pub mtu: Option<u16>,
}

impl Default for TapOptions {
    fn default() -> Self {
        Self { queues: 1, mtu: None }
    }
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says it")]
pub enum OpenError {
    #[error(
        "'{name}' cannot name a tap; a name has 1 to 15 letters, digits, '-', '_' and '.', and \
         not only dots"
    )]
    Name { name: String },
    #[error("a tap has 1 to {MAX_QUEUES} queues, not {queues}")]
    Queues { queues: u16 },
    #[error("the host has no taps: /dev/net/tun cannot be opened; 'modprobe tun' may help")]
    NoTaps { source: io::Error },
    #[error(
        "making tap {name} takes rights this user has not; as root, run: \
         ip tuntap add dev {name} mode tap user {user}{multi_queue} && ip link set {name} up"
    )]
    NoRight { name: String, user: String, multi_queue: &'static str },
    #[error("tap {name} belongs to another user, or is not a tap")]
    NotOurs { name: String, source: io::Error },
    #[error("tap {name} is in use")]
    Busy { name: String },
    #[error(
        "{name} is no tap, or was made without multi_queue and cannot have {queues} queues; \
         give queues=1 or make it with: ip tuntap add dev {name} mode tap multi_queue"
    )]
    Unfit { name: String, queues: u16 },
    #[error("cannot {what} tap {name}")]
    Host { name: String, what: &'static str, source: io::Error },
}

/// `struct ifreq` of `linux/if.h`, with the members that are used here.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_SIZE],
    value: i32,
    rest: [u8; 20],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new(name: &[u8; NAME_SIZE], value: i32) -> Self {
        Self { name: *name, value, rest: [0; 20] }
    }
}

/// Calls `ioctl` with a pointer to `argument`.
///
/// # Safety
/// `request` must be one that reads and writes no more than a `T`.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: c_ulong, argument: &mut T) -> io::Result<()> {
    let argument: *mut T = argument;
    // SAFETY: the descriptor is open, and the caller vouches for the argument.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request whose argument is an `ifreq`; all of those used here read and write no more of it.
fn interface(fd: BorrowedFd<'_>, request: c_ulong, ifreq: &mut InterfaceRequest) -> io::Result<()> {
    // SAFETY: the type is as large as an `ifreq`.
    unsafe { ioctl(fd, request, ifreq) }
}

/// A tap of the host.
#[derive(Debug)]
pub struct Tap {
    shared: Arc<Shared>,
}

/// What a tap's queues have in common.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    raw_name: [u8; NAME_SIZE],
    queues: Vec<Place>,
    multi_queue: bool,
    offloads: Offloads,
    /// Hears of all changes to the host's network devices.
    news: OwnedFd,
    /// The tap is set down.
    down: AtomicBool,
    /// The host has taken the tap away.
    pub(super) gone: AtomicBool,
}

/// A queue of the tap, whether somebody has it open or not.
#[derive(Debug)]
struct Place {
    file: File,
    open: AtomicBool,
}

impl Tap {
    /// Joins the tap `name`, or makes it if there is none.
    pub fn open(name: &str, options: TapOptions) -> Result<Self, OpenError> {
        let raw_name = raw_name(name).ok_or_else(|| OpenError::Name { name: name.into() })?;
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(OpenError::Queues { queues: options.queues });
        }
        let host = |what| move |source| OpenError::Host { name: name.into(), what, source };
        let socket = rustix::net::socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(io::Error::from)
        .map_err(host("ask about"))?;
        let mut flags = InterfaceRequest::new(&raw_name, 0);
        let existed = interface(socket.as_fd(), libc::SIOCGIFFLAGS, &mut flags).is_ok();

        // A tap made for one queue has none of what several take, and the other way round.
        let mut multi_queue = options.queues > 1;
        let first = match join(&raw_name, multi_queue) {
            Err(JoinError::Attach(error))
                if existed && !multi_queue && error.raw_os_error() == Some(libc::EINVAL) =>
            {
                multi_queue = true;
                join(&raw_name, multi_queue)
            }
            result => result,
        };
        let explain = |error| explain(error, name, existed, options.queues);
        let mut files = vec![first.map_err(explain)?];
        while files.len() < usize::from(options.queues) {
            files.push(join(&raw_name, multi_queue).map_err(explain)?);
        }
        let fd = files[0].as_fd();
        let mut header = size_of::<VirtioNetHeader>() as i32;
        // SAFETY: the request reads an int.
        unsafe { ioctl(fd, libc::TUNSETVNETHDRSZ, &mut header) }.map_err(host("set up"))?;
        let kinds = Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::TSO_ECN;
        // UDP came with Linux 6.2.
        let offloads = [Offloads::ALL, kinds]
            .into_iter()
            .find(|offloads| set_offloads(fd, *offloads).is_ok())
            .unwrap_or(Offloads::NONE);
        set_offloads(fd, Offloads::NONE).map_err(host("set up"))?;
        if !existed {
            if let Some(mtu) = options.mtu {
                let mut request = InterfaceRequest::new(&raw_name, mtu.into());
                interface(socket.as_fd(), libc::SIOCSIFMTU, &mut request)
                    .map_err(host("set the MTU of"))?;
            }
            let mut request = InterfaceRequest::new(&raw_name, libc::IFF_UP);
            interface(socket.as_fd(), libc::SIOCSIFFLAGS, &mut request)
                .map_err(host("bring up"))?;
        }
        let queues =
            files.into_iter().map(|file| Place { file, open: AtomicBool::new(false) }).collect();
        let shared = Shared {
            name: name.to_owned(),
            raw_name,
            queues,
            multi_queue,
            offloads,
            news: subscribe().map_err(host("hear of changes to"))?,
            down: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        };
        shared.look();
        // Until somebody listens to a queue, the kernel should give it no flow. The only queue of a
        // tap cannot be told so.
        for index in 0..options.queues {
            shared.attach(index, false).map_err(host("set up"))?;
        }
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl Shared {
    /// Has the kernel give flows to a queue, or no more.
    fn attach(&self, index: u16, attach: bool) -> io::Result<()> {
        if !self.multi_queue {
            return Ok(());
        }
        let flag = if attach { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = InterfaceRequest::new(&self.raw_name, flag);
        interface(self.fd(index), libc::TUNSETQUEUE, &mut request)
    }

    /// # Panics
    /// If there is no such queue.
    pub(super) fn fd(&self, index: u16) -> BorrowedFd<'_> {
        self.queues[usize::from(index)].file.as_fd()
    }

    /// Gives a queue back.
    pub(super) fn close(&self, index: u16) {
        if let Err(error) = self.attach(index, false)
            && !self.gone.load(Ordering::Relaxed)
        {
            tracing::debug!(tap = self.name, index, %error, "the tap did not let go of a queue");
        }
        if let Some(place) = self.queues.get(usize::from(index)) {
            place.open.store(false, Ordering::Release);
        }
    }

    pub(super) fn is_up(&self) -> bool {
        !self.gone.load(Ordering::Relaxed) && !self.down.load(Ordering::Relaxed)
    }

    /// What becomes readable when any network device has changed.
    pub(super) fn news(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// Looks whether the tap is set up. What the news were does not matter, and whoever of the queues
    /// takes them away: all of them look.
    pub(super) fn look(&self) {
        let mut nothing = [0; 8];
        let take = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        for _ in 0..MAX_NEWS {
            // ENOBUFS tells that some news were lost, and others may wait.
            match rustix::net::recv(&self.news, &mut nothing, take) {
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(_) => break,
            }
        }
        let mut request = InterfaceRequest::new(&self.raw_name, 0);
        // One that cannot be asked is gone, which a queue finds out by itself.
        let flags = interface(self.news.as_fd(), libc::SIOCGIFFLAGS, &mut request)
            .map(|()| request.value & 0xFFFF);
        let down = flags.is_ok_and(|flags| flags & libc::IFF_UP == 0);
        self.down.store(down, Ordering::Relaxed);
    }

    pub(super) const fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// In bytes; what taps start out with if the host does not say.
    fn mtu(&self) -> u16 {
        let mut request = InterfaceRequest::new(&self.raw_name, 0);
        let socket = rustix::net::socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let asked = socket
            .map_err(io::Error::from)
            .and_then(|socket| interface(socket.as_fd(), libc::SIOCGIFMTU, &mut request));
        match asked {
            Ok(()) => u16::try_from(request.value).unwrap_or(u16::MAX),
            Err(_) => 1500,
        }
    }
}

impl Network for Tap {
    fn link(&self) -> Link {
        Link {
            name: format!("tap:{}", self.shared.name),
            up: self.shared.is_up(),
            mtu: self.shared.mtu(),
            speed: 10_000,
            mac: None,
            queues: self.shared.queues.len() as u16,
            takes: self.shared.offloads,
            gives: self.shared.offloads,
        }
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        set_offloads(self.shared.fd(0), offloads & self.shared.offloads)
    }

    fn follows_senders(&self) -> bool {
        true
    }

    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        let place = self.shared.queues.get(usize::from(config.index));
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        if place.open.swap(true, Ordering::Acquire) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let attached = self.shared.attach(config.index, true);
        match attached.and_then(|()| TapQueue::new(Arc::clone(&self.shared), config, uring)) {
            Ok(queue) => Ok(Box::new(queue)),
            Err(error) => {
                self.shared.close(config.index);
                Err(error)
            }
        }
    }
}

/// Says what the kernel may leave undone in what it hands out.
fn set_offloads(fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let kinds = [
        (Offloads::CHECKSUM, libc::TUN_F_CSUM),
        (Offloads::TSO4, libc::TUN_F_TSO4),
        (Offloads::TSO6, libc::TUN_F_TSO6),
        (Offloads::TSO_ECN, libc::TUN_F_TSO_ECN),
        (Offloads::USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let checksum = offloads.contains(Offloads::CHECKSUM);
    let flags = kinds
        .into_iter()
        .filter(|(kind, _)| checksum && offloads.contains(*kind))
        .fold(0, |flags, (_, flag)| flags | flag);
    // SAFETY: this request takes its flags in place of a pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A socket that is told of changes to network devices, in the network that this thread is in.
fn subscribe() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, LINK_GROUP))?;
    Ok(socket)
}

/// At which step joining a tap failed.
enum JoinError {
    Open(io::Error),
    Attach(io::Error),
}

/// One more queue of a tap.
fn join(name: &[u8; NAME_SIZE], multi_queue: bool) -> Result<File, JoinError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(JoinError::Open)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = InterfaceRequest::new(name, flags);
    interface(file.as_fd(), libc::TUNSETIFF, &mut request).map_err(JoinError::Attach)?;
    Ok(file)
}

fn explain(error: JoinError, name: &str, existed: bool, queues: u16) -> OpenError {
    let name = name.to_owned();
    match error {
        JoinError::Open(source) if source.raw_os_error() != Some(libc::EMFILE) => {
            OpenError::NoTaps { source }
        }
        JoinError::Open(source) => OpenError::Host { name, what: "open", source },
        JoinError::Attach(source) => match source.raw_os_error() {
            Some(libc::EPERM) if existed => OpenError::NotOurs { name, source },
            Some(libc::EPERM) => {
                let user = std::env::var("USER").unwrap_or_else(|_| "$USER".into());
                let multi_queue = if queues > 1 { " multi_queue" } else { "" };
                OpenError::NoRight { name, user, multi_queue }
            }
            Some(libc::EBUSY) => OpenError::Busy { name },
            Some(libc::EINVAL | libc::E2BIG) => OpenError::Unfit { name, queues },
            _ => OpenError::Host { name, what: "join", source },
        },
    }
}

/// The name as the kernel takes it, if it can be one.
fn raw_name(name: &str) -> Option<[u8; NAME_SIZE]> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let fits = (1..NAME_SIZE).contains(&name.len())
        && name.bytes().all(plain)
        && name.bytes().any(|byte| byte != b'.');
    let mut raw = [0; NAME_SIZE];
    fits.then(|| {
        raw.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        raw
    })
}

const _: () = assert!(mem::offset_of!(InterfaceRequest, value) == 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(raw_name("tap0").unwrap(), *b"tap0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert!(raw_name("abcdefghijklmno").is_some());
        for bad in ["", "abcdefghijklmnop", "a b", "a/b", "tap%d", "..", "ä"] {
            let error = Tap::open(bad, TapOptions::default()).unwrap_err();
            assert!(matches!(error, OpenError::Name { .. }), "{bad}: {error}");
        }
    }

    #[test]
    fn refusals_say_what_would_help() {
        let denied = || JoinError::Attach(io::Error::from_raw_os_error(libc::EPERM));
        let message = explain(denied(), "lab0", false, 4).to_string();
        assert!(message.contains("ip tuntap add dev lab0 mode tap user "), "{message}");
        assert!(message.contains(" multi_queue && ip link set lab0 up"), "{message}");
        let message = explain(denied(), "eth0", true, 1).to_string();
        assert_eq!(message, "tap eth0 belongs to another user, or is not a tap");
    }
}
