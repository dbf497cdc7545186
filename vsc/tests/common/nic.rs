//! A NIC and a guest's client of it in one process.

use std::sync::Arc;

use backends::net::{MacAddr, Network};
use hypervisor::{Gpa, Gpn, GuestMemory};
use vmbus::nvsp::Capabilities;
use vmbus::protocol::GpadlId;
use vmbus::rndis::PacketFilter;
use vmbus_server::testing::GuestEnd;
use vmbus_server::{Device, DoubleMapped};
use vsc::SharedBuffer;
use vsc::netvsc::{Agreement, Event, Queue, Setup, Shared};
use vsp::netvsp::{Nic, NicConfig};

use super::{Bell, PATIENCE, client_channel, raw_channel};

/// Packets under way, on each channel.
pub const SECTIONS: usize = 32;
const SECTION: u64 = 6144;

/// Where the buffers are.
const RECEIVE: u64 = 4 << 20;
const RECEIVE_SIZE: u64 = 2 << 20;
const SEND: u64 = 8 << 20;
/// Pages for frames of the test's own.
pub const PAGES: u64 = 16 << 20;

/// A part of the guest's memory.
#[derive(Clone)]
pub struct Part {
    pub memory: GuestMemory,
    pub at: u64,
    pub size: u64,
}

impl SharedBuffer for Part {
    fn size(&self) -> usize {
        self.size as usize
    }

    fn read(&self, at: usize, to: &mut [u8]) -> bool {
        at + to.len() <= self.size() && self.memory.read(Gpa(self.at + at as u64), to).is_ok()
    }

    fn write(&self, at: usize, from: &[u8]) -> bool {
        at + from.len() <= self.size() && self.memory.write(Gpa(self.at + at as u64), from).is_ok()
    }
}

impl Part {
    fn pages(&self) -> Arc<[Gpn]> {
        (self.at / 4096..(self.at + self.size) / 4096).map(Gpn).collect()
    }
}

pub type NicQueue = Queue<DoubleMapped, Bell, Part, SECTIONS>;

pub fn buffers(memory: &GuestMemory, channels: u16) -> (Part, Part) {
    let size = (SECTIONS as u64 * u64::from(channels) * SECTION).next_multiple_of(4096);
    let receive = Part { memory: memory.clone(), at: RECEIVE, size: RECEIVE_SIZE };
    (receive, Part { memory: memory.clone(), at: SEND, size })
}

pub fn setup(memory: &GuestMemory, mtu: u16, channels: u16) -> Setup<Part> {
    let (receive, send) = buffers(memory, channels);
    Setup {
        receive: Shared { gpadl: GpadlId(1), memory: receive },
        send: Shared { gpadl: GpadlId(2), memory: send },
        mtu,
        capabilities: Capabilities(0),
        subchannels: channels - 1,
    }
}

/// A NIC with its channels open, and the queues to it.
pub struct NicRig {
    pub memory: GuestMemory,
    pub queues: Vec<NicQueue>,
    pub ends: Vec<GuestEnd>,
    pub agreement: Agreement,
    pub nic: Nic,
}

impl NicRig {
    /// With an MTU of 1500 and one channel.
    pub fn new(address: [u8; 6], network: Arc<dyn Network>) -> Self {
        Self::with(address, network, 1, |_| {})
    }

    /// With `channels` in all, and what `change` makes of the setup.
    pub fn with(
        address: [u8; 6],
        network: Arc<dyn Network>,
        channels: u16,
        change: impl FnOnce(&mut Setup<Part>),
    ) -> Self {
        let memory = GuestMemory::new(64 << 20).expect("guest memory");
        let config = NicConfig {
            number: 0,
            address: MacAddr(address),
            max_mtu: 9000,
            channels,
            name: String::new(),
        };
        let mut nic = Nic::new(config, network);
        let mut setup = setup(&memory, 1500, channels);
        change(&mut setup);
        let (root, end) = raw_channel(&memory, 0);
        end.share(setup.receive.gpadl, setup.receive.memory.pages());
        end.share(setup.send.gpadl, setup.send.memory.pages());
        nic.open(root).expect("a worker");
        let (channel, mut end) = client_channel(&memory, end);
        let (queue, agreement) =
            Queue::connect(channel, setup, || end.wait_interrupt(PATIENCE)).expect("a handshake");
        assert_eq!(agreement.subchannels, channels - 1);
        if channels > 1 {
            while end.subchannels_requested().is_none() {
                std::thread::yield_now();
            }
            assert_eq!(end.subchannels_requested(), Some(channels - 1));
        }
        let mut rig = Self { memory, queues: vec![queue], ends: vec![end], agreement, nic };
        for number in 1..channels {
            let (root, end) = raw_channel(&rig.memory, number);
            rig.nic.open(root).expect("a worker");
            let (channel, end) = client_channel(&rig.memory, end);
            let (receive, send) = buffers(&rig.memory, channels);
            let queue = Queue::subchannel(channel, &rig.agreement, number, receive, send);
            rig.queues.push(queue.expect("sections"));
            rig.ends.push(end);
        }
        rig
    }

    /// Frames to it and to everybody come from now on.
    pub fn up(&mut self) {
        let filter = PacketFilter(PacketFilter::DIRECTED | PacketFilter::BROADCAST);
        let (queue, end) = (&mut self.queues[0], &mut self.ends[0]);
        queue.set_filter(filter, |_| {}, || end.wait_interrupt(PATIENCE)).expect("a filter");
    }

    /// Waits on channel `index` until something has come, and returns the frames among it.
    pub fn wait(&mut self, index: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.wait_for(index, |event| {
            if let Event::Received(frame) = event {
                let mut bytes = vec![0; frame.len()];
                assert!(frame.read(0, &mut bytes));
                frames.push(bytes);
            }
        });
        frames
    }

    /// Waits on channel `index` until something has come.
    pub fn wait_for(&mut self, index: usize, mut event: impl FnMut(Event<'_, Part>)) {
        let (queue, end) = (&mut self.queues[index], &mut self.ends[index]);
        loop {
            queue.publish();
            if queue.poll(&mut event).expect("a sound host") > 0 {
                return;
            }
            if queue.rest() {
                assert!(end.wait_interrupt(PATIENCE), "nothing comes");
            }
            queue.wake();
        }
    }

    /// So many frames that come on channel `index`.
    pub fn frames(&mut self, index: usize, count: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while frames.len() < count {
            frames.extend(self.wait(index));
        }
        assert_eq!(frames.len(), count);
        frames
    }

    /// Has all workers stop, and waits for it.
    pub fn stop(mut self) {
        for end in &mut self.ends {
            end.request_stop();
            assert!(end.wait_closed(PATIENCE), "the worker has not stopped");
        }
    }
}

/// A frame of `len` bytes whose contents follow from `seed`.
pub fn frame(to: [u8; 6], from: [u8; 6], len: usize, seed: u64) -> Vec<u8> {
    let mut frame = vec![0; len];
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in &mut frame {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}
