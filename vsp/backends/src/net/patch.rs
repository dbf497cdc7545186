//! A patch cable: joins a port of a [`switch`](super::switch) and another network, such as a tap,
//! by a thread that hands frames from one to the other.
//!
//! Each direction has its own buffers. A buffer is lent to the queue on one side, comes back with a
//! frame, is sent by the queue on the other side, and is then lent again. So a side that takes
//! nothing leaves the other side's frames where they are, and nothing is allocated for a frame.
//! What one side leaves undone in a frame is left undone as far as the other side takes that.
//!
//! `unsafe` lends out the buffers, which live until the ring is gone.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::switch::Port;
use super::{
    Buffer, Completion, Completions, Frame, MAX_FRAME, Network, Offloads, Queue, QueueConfig,
    longest_frame,
};
use crate::uring::{Doorbell, Tag, Token, Uring};

/// Frames under way in each direction.
const FRAMES: u16 = 256;

/// Operations between two enters.
const ENTRIES: u32 = 512;

/// Whose completions they are.
const STOP: Token = Token::new(Tag::WORKER, 0);
const PORT: Tag = Tag(1);
const FAR: Tag = Tag(2);

/// Asks threads to end, and wakes them.
#[derive(Debug)]
pub(super) struct Stop {
    requested: AtomicBool,
    /// Is never read, so that it wakes all who hear it.
    eventfd: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { requested: AtomicBool::new(false), eventfd })
    }

    pub(super) fn request(&self) {
        self.requested.store(true, Ordering::Release);
        // Only a counter that is about to overflow refuses, and that wakes too.
        let _ = self.eventfd.write(1);
    }

    pub(super) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }
}

impl AsRawFd for Stop {
    fn as_raw_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as this is.
        unsafe { BorrowedFd::borrow_raw(self.eventfd.as_raw_fd()) }
    }
}

/// The frames of one direction, in memory that the [`Patch`] has: what is received on one side is sent on
/// the other, so neither side may take it along.
struct Buffers {
    start: *mut u8,
    len: usize,
    /// Of a buffer, in bytes.
    room: usize,
}

impl Buffers {
    fn new(room: usize, memory: &mut Vec<u8>) -> Self {
        *memory = vec![0; room * usize::from(FRAMES)];
        Self { start: memory.as_mut_ptr(), len: memory.len(), room }
    }

    /// One of them. A number that none has gets one without bytes.
    fn get(&self, id: u32) -> Buffer {
        let start = (id as usize).saturating_mul(self.room);
        if start >= self.len {
            return Buffer::new(self.start, 0);
        }
        Buffer::new(self.start.wrapping_add(start), self.room)
    }
}

/// One side of the cable: its queue, and the buffers that this queue receives into.
struct Side {
    queue: Box<dyn Queue>,
    done: Completions,
    buffers: Buffers,
}

impl Side {
    fn new(
        network: &dyn Network,
        tag: Tag,
        buffers: Buffers,
        uring: &mut Uring,
    ) -> io::Result<Self> {
        let config = QueueConfig { index: 0, tag, sends: FRAMES, receives: FRAMES };
        let queue = network.queue(config, uring)?;
        let done = Completions::with_capacity(2 * usize::from(FRAMES) + 2);
        Ok(Self { queue, done, buffers })
    }

    fn offer(&mut self, id: u32, uring: &mut Uring) {
        let buffer = self.buffers.get(id);
        // SAFETY: the memory outlives the ring, and nobody else uses this buffer until it is back.
        unsafe { self.queue.offer(id, &[buffer], uring, &mut self.done) };
    }
}

/// The cable while it is plugged in. Fields are dropped in order: the ring and the queues first, so that
/// nothing reaches the buffers any more when they go.
struct Patch<'a> {
    uring: Uring,
    port: Side,
    far: Side,
    stop: Doorbell<Arc<Stop>>,
    plug: &'a Port,
    /// It is to come to its end.
    closing: bool,
    /// Of the buffers of both sides.
    _memory: [Vec<u8>; 2],
}

/// Hands frames from `port` to `far` and back until `stop` is requested or, if the link of `far` does
/// not come `back` once it is down, until it is. Then `hang_up` is called, to have `far` end what it
/// cannot finish.
pub(super) fn run(
    port: &Port,
    far: &dyn Network,
    stop: &Arc<Stop>,
    back: bool,
    hang_up: impl Fn(),
) -> io::Result<()> {
    let link = far.link();
    port.plug(link.up);
    port.set_receive_offloads(link.takes)?;
    let near = port.link();
    far.set_receive_offloads(near.takes & link.gives)?;
    let room = |offloads| match offloads == Offloads::NONE {
        true => longest_frame(near.mtu),
        false => MAX_FRAME,
    };
    let mut uring = Uring::new(ENTRIES)?;
    let stop = Doorbell::new(Arc::clone(stop), STOP);
    stop.arm(&mut uring)?;
    let mut memory = [const { Vec::new() }; 2];
    let [near_memory, far_memory] = &mut memory;
    let near = Buffers::new(room(link.takes), near_memory);
    let near = Side::new(port, PORT, near, &mut uring)?;
    let far_buffers = Buffers::new(room(link.gives), far_memory);
    let far = Side::new(far, FAR, far_buffers, &mut uring)?;
    let closing = !back && !link.up;
    let mut patch = Patch { uring, port: near, far, stop, plug: port, closing, _memory: memory };
    patch.serve(back, &hang_up)
}

impl Patch<'_> {
    fn serve(&mut self, back: bool, hang_up: &dyn Fn()) -> io::Result<()> {
        for id in 0..u32::from(FRAMES) {
            self.port.offer(id, &mut self.uring);
            self.far.offer(id, &mut self.uring);
        }
        let mut recalled = false;
        loop {
            self.closing |= self.stop.get_ref().is_requested();
            if self.closing && !recalled {
                recalled = true;
                hang_up();
                for side in [&mut self.port, &mut self.far] {
                    side.queue.recall(&mut self.uring, &mut side.done);
                    side.queue.drop_frames(&mut self.uring, &mut side.done);
                }
            }
            let handed = self.turn(back)?;
            let idle = self.port.queue.in_flight() + self.far.queue.in_flight() == 0;
            if self.closing && idle {
                return Ok(());
            }
            // The stop may have been heard in this turn, and its eventfd wakes nobody twice.
            if handed == 0
                && (self.closing || !self.stop.get_ref().is_requested())
                && self.port.queue.prepare_to_sleep()
                && self.far.queue.prepare_to_sleep()
            {
                self.uring.submit_and_wait(1)?;
            }
        }
    }

    /// A turn of both sides, with one enter for both. Returns how much was done.
    fn turn(&mut self, back: bool) -> io::Result<u32> {
        let Self { uring, port, far, stop, plug, closing, .. } = self;
        port.queue.turn(uring, &mut port.done);
        far.queue.turn(uring, &mut far.done);
        uring.submit()?;
        while let Some(cqe) = uring.next() {
            match cqe.token.tag() {
                PORT => port.queue.complete(&cqe, uring, &mut port.done),
                FAR => far.queue.complete(&cqe, uring, &mut far.done),
                _ if cqe.token == STOP => stop.heard(&cqe, uring)?,
                _ => {}
            }
        }
        let (outgoing, _) = hand_on(port, far, *closing, uring);
        let (incoming, link) = hand_on(far, port, *closing, uring);
        if let Some(up) = link {
            plug.plug(up);
            *closing |= !up && !back;
        }
        Ok(outgoing + incoming)
    }
}

/// Takes what `from` has done: frames go to `to`, and buffers that `from` has sent from are lent to
/// `to` again, unless the cable is being unplugged. Returns how much there was, and the state of the
/// link if it has changed.
fn hand_on(
    from: &mut Side,
    to: &mut Side,
    closing: bool,
    uring: &mut Uring,
) -> (u32, Option<bool>) {
    let (mut count, mut link) = (0, None);
    while let Some(completion) = from.done.pop() {
        count += 1;
        match completion {
            Completion::Link(up) => link = Some(up),
            _ if closing => {}
            Completion::Received { id, len, offload } => {
                let frame = Frame { id, len, buffers: &[from.buffers.get(id)], offload };
                // SAFETY: the memory outlives the ring, and nobody else uses this buffer until the
                // frame has ended.
                unsafe { to.queue.send(frame, uring, &mut to.done) };
            }
            Completion::Sent { id, .. } => to.offer(id, uring),
            Completion::Returned { id } => from.offer(id, uring),
        }
    }
    (count, link)
}
