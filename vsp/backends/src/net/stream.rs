//! A network behind a stream socket: each frame with its length, four bytes, the highest first, in
//! front of it. QEMU calls this `-netdev stream`; passt speaks it (see [`super::user`]), and so do
//! the switches of two machines (see [`super::uplink`]).
//!
//! Frames are sent from the guest's memory, as many in one `sendmsg` as are there; what comes is
//! received as much at a time as has come, and copied to where its frames belong.
//!
//! There are no words in this protocol for offloads, and one stream has one queue.

mod queue;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use self::queue::{Middle, StreamQueue};
use super::{Link, Network, Offloads, Queue, QueueConfig};
use crate::uring::Uring;

/// See the module's documentation.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    mtu: u16,
}

#[derive(Debug)]
struct Shared {
    name: String,
    socket: UnixStream,
    /// The other side has gone, or has broken the protocol, or we have hung up.
    gone: AtomicBool,
    /// Where the stream is within frames; with the queue while one is open.
    middle: Mutex<Option<Middle>>,
}

impl Shared {
    fn is_up(&self) -> bool {
        !self.gone.load(Ordering::Relaxed)
    }

    fn put_back(&self, middle: Middle) {
        *self.middle.lock().unwrap_or_else(PoisonError::into_inner) = Some(middle);
    }
}

impl Stream {
    /// A network behind a connected socket, for packets of up to `mtu` bytes.
    pub fn new(socket: UnixStream, name: impl Into<String>, mtu: u16) -> io::Result<Self> {
        // The ring waits; the socket itself must not say that it would have to.
        socket.set_nonblocking(false)?;
        let middle = Mutex::new(Some(Middle::new()));
        let gone = AtomicBool::new(false);
        let shared = Shared { name: name.into(), socket, gone, middle };
        Ok(Self { shared: Arc::new(shared), mtu })
    }

    /// Ends the connection. A queue that is open finds it lost, and says nothing.
    pub fn hang_up(&self) {
        self.shared.gone.store(true, Ordering::Relaxed);
        // Refused only if the other side was faster.
        let _ = self.shared.socket.shutdown(Shutdown::Both);
    }

    /// The socket, to be used before a queue is open.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.shared.socket
    }
}

impl Network for Stream {
    fn link(&self) -> Link {
        Link {
            name: self.shared.name.clone(),
            up: self.shared.is_up(),
            mtu: self.mtu,
            speed: 10_000,
            mac: None,
            queues: 1,
            takes: Offloads::NONE,
            gives: Offloads::NONE,
        }
    }

    fn set_receive_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        if config.index > 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let middle = self.shared.middle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let middle = middle.ok_or(io::ErrorKind::ResourceBusy)?;
        Ok(Box::new(StreamQueue::new(Arc::clone(&self.shared), config, middle, uring)))
    }
}
