//! The NIC as its own peer, as drivers have it to test it: what it sends comes back to it, and the
//! network neither hears nor says anything. The MAC can be told so (RCTL.LBM), and the PHY.
//!
//! Frames go to a queue of a network that is a cable plugged into itself, a few at a time; so nothing of
//! them is under way when a turn ends. Those for which there is no buffer are lost, as on a wire.

use std::io;

use backends::net::loopback::Loopback;
use backends::net::{Completion, Completions, Network, Offloads, Queue, QueueConfig};
use backends::uring::{Tag, Uring};
use hypervisor::GuestMemory;

use super::filter::Settings;
use super::receive::{INSIDE_BUFFERS, Receive};
use super::registers::Ring;
use super::transmit::{DESCRIPTORS, FRAMES, Limits, Transmit, Way};

/// Descriptors that are taken at a time: fewer than there are buffers, as each may be a frame.
const BATCH: u32 = INSIDE_BUFFERS as u32 / 2;
/// Its completions do not come by the io_uring.
const TAG: Tag = Tag(2);

/// See the module's documentation.
pub(super) struct Inside {
    queue: Box<dyn Queue>,
    done: Completions,
}

/// The rings as they are in a turn, and what is at their ends.
pub(super) struct Ends<'a> {
    pub transmit: &'a mut Transmit,
    pub out: &'a Ring,
    pub limits: &'a Limits,
    pub receive: &'a mut Receive,
    /// None if nothing is received.
    pub into: Option<&'a Ring>,
    pub settings: &'a Settings,
    pub memory: &'a GuestMemory,
}

impl Inside {
    pub(super) fn new(uring: &mut Uring) -> io::Result<Self> {
        let cable = Loopback::new();
        cable.set_receive_offloads(Offloads::ALL)?;
        let (sends, receives) = (FRAMES, INSIDE_BUFFERS);
        let queue = cable.queue(QueueConfig { index: 0, tag: TAG, sends, receives }, uring)?;
        let done = Completions::with_capacity(usize::from(sends) + usize::from(receives));
        Ok(Self { queue, done })
    }

    /// Takes what is in one ring to the other. Returns how much was done, and the head of the transmit
    /// ring, if it has moved.
    pub(super) fn run(&mut self, ends: &mut Ends<'_>, uring: &mut Uring) -> (u32, Option<u32>) {
        let Self { queue, done } = self;
        let Ends { transmit, out, limits, receive, into, settings, memory } = ends;
        let (mut count, mut head) = (0, None);
        while count < DESCRIPTORS {
            let mut way = Way { queue: &mut **queue, uring, done };
            receive.offer_inside(&mut way);
            let mut progress = transmit.run(out, BATCH, limits, memory, &mut way);
            queue.turn(uring, done);
            queue.drop_frames(uring, done);
            while let Some(completion) = done.pop() {
                match completion {
                    Completion::Sent { id, .. } => {
                        transmit.sent(id);
                        progress += 1;
                    }
                    Completion::Received { id, len, offload } => receive.arrived(id, len, offload),
                    Completion::Returned { id } => receive.returned(id),
                    Completion::Link(_) => {}
                }
            }
            head = transmit.write_back(out, memory).or(head);
            match into {
                Some(into) => drop(receive.run(into, settings, memory)),
                None => receive.discard(),
            }
            if progress == 0 {
                break;
            }
            count += progress;
        }
        (count, head)
    }
}
