//! A controller and a guest's client of it in one process, over real rings.
#![allow(dead_code)] // each test program uses its part

pub mod nic;

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use backends::block::Disk;
use hypervisor::{Gpa, Gpn, GuestMemory};
use vmbus_server::testing::{GuestEnd, channel_in};
use vmbus_server::{Channel as RootChannel, Device, DoubleMapped};
use vsc::Channel;
use vsc::storvsc::{Agreement, PageList, Pages, Queue, Scratch, words};
use vsp::storvsp::{Controller, ControllerBuilder};

pub const PATIENCE: Duration = Duration::from_secs(20);
/// Pages of a ring, one direction.
pub const RING_PAGES: u64 = 32;
/// Slots of each queue.
pub const DEPTH: usize = 128;

pub type Bell = Box<dyn FnMut() + Send>;
pub type GuestQueue = Queue<DoubleMapped, Bell, DEPTH>;

/// A guest's end of a channel, and the client's channel over it. The rings change hands; those of
/// a small channel that nobody uses take their place.
pub fn client_channel(
    memory: &GuestMemory,
    mut end: GuestEnd,
) -> (Channel<DoubleMapped, Bell>, GuestEnd) {
    let (_, spare) = channel_in(memory, Gpn(0), 2, 0);
    let incoming = mem::replace(&mut end.incoming, spare.incoming);
    let outgoing = mem::replace(&mut end.outgoing, spare.outgoing);
    let doorbell = Arc::clone(&end.doorbell);
    let ring: Bell = Box::new(move || doorbell.write(1).expect("an eventfd"));
    (Channel::new(incoming, outgoing, ring), end)
}

/// A channel at `index` from the end of memory: the root's end and the guest's.
pub fn raw_channel(memory: &GuestMemory, index: u16) -> (RootChannel, GuestEnd) {
    let pages = memory.size() / 4096 - 2 * RING_PAGES * (u64::from(index) + 1);
    channel_in(memory, Gpn(pages), RING_PAGES, index)
}

/// A controller with its channels open, and the queues to it.
pub struct Rig {
    pub memory: GuestMemory,
    pub queues: Vec<GuestQueue>,
    pub ends: Vec<GuestEnd>,
    pub agreement: Agreement,
    _controller: Controller,
}

impl Rig {
    /// With `queues` channels in all.
    pub fn new(disks: Vec<Arc<dyn Disk>>, queues: u16) -> Self {
        let memory = GuestMemory::new(64 << 20).expect("guest memory");
        let mut builder = ControllerBuilder::new(0);
        for disk in disks {
            builder.attach(None, disk).expect("a free LUN");
        }
        let mut controller = builder.build(u32::from(queues));
        let (root, end) = raw_channel(&memory, 0);
        controller.open(root).expect("a worker");
        let (channel, mut end) = client_channel(&memory, end);
        let (queue, agreement) =
            Queue::connect(channel, queues - 1, || end.wait_interrupt(PATIENCE))
                .expect("a handshake");
        assert_eq!(agreement.subchannels, queues - 1);
        if queues > 1 {
            while end.subchannels_requested().is_none() {
                std::thread::yield_now();
            }
            assert_eq!(end.subchannels_requested(), Some(queues - 1));
        }
        let mut rig = Self {
            memory: memory.clone(),
            queues: vec![queue],
            ends: vec![end],
            agreement,
            _controller: controller,
        };
        for index in 1..queues {
            let (root, end) = raw_channel(&memory, index);
            rig._controller.open(root).expect("a worker");
            let (channel, end) = client_channel(&memory, end);
            rig.queues.push(Queue::subchannel(channel, &agreement));
            rig.ends.push(end);
        }
        rig
    }

    pub fn queue(&mut self) -> (&mut GuestQueue, &mut GuestEnd) {
        (&mut self.queues[0], &mut self.ends[0])
    }

    /// Has all workers stop, and waits for it.
    pub fn stop(mut self) {
        for end in &mut self.ends {
            end.request_stop();
            assert!(end.wait_closed(PATIENCE), "the worker has not stopped");
        }
    }
}

/// Small answers come to the page at this address.
pub struct ScratchPage {
    pub memory: GuestMemory,
    pub list: PageList<{ words(1) }>,
    pub page: u64,
}

impl ScratchPage {
    pub fn new(memory: &GuestMemory, page: u64) -> Self {
        let list = PageList::new(4096, 0, [page]).expect("one page");
        Self { memory: memory.clone(), list, page }
    }
}

impl Scratch for ScratchPage {
    fn pages(&mut self, len: u32) -> Option<Pages<'_>> {
        self.list.resize(len).then(|| self.list.pages())
    }

    fn read(&self, bytes: &mut [u8]) {
        self.memory.read(Gpa(self.page * 4096), bytes).expect("guest memory");
    }
}
