//! Two guests' netvsc, each against a netvsp, with the virtual switch between them: frames from one
//! to the other, with nothing of a VM about it.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::net::MacAddr;
use backends::net::switch::{PortOptions, Switch, SwitchOptions};
use hypervisor::{Gpa, Gpn, GuestMemory};
use rustix::thread::CpuSet;
use vmbus::nvsp::Capabilities;
use vmbus::protocol::GpadlId;
use vmbus::rndis::PacketFilter;
use vmbus_server::testing::{GuestEnd, channel_in};
use vmbus_server::{Device, DoubleMapped};
use vsc::netvsc::{ETHERNET_HEADER, Event, Offload, Queue, SendError, Setup, Shared};
use vsc::{Channel, SharedBuffer};
use vsp::netvsp::{InlineWorker, Nic, NicConfig};

use crate::{GRACE, Idle, pin, thread_time};

/// Packets that a guest may have on their way.
const DEPTH: usize = 128;
/// Frames that may be between the two guests: no more than the switch keeps for one, so that none is
/// lost. The receiver says how many have come, as TCP does.
const WINDOW: u64 = 448;
/// After so many frames it says so.
const ACKNOWLEDGED: u64 = 64;
/// Frames that are sent between two turns.
const BATCH: u64 = 64;

/// Pages of a ring, one direction, as Linux's netvsc has.
const RING_PAGES: u64 = 32;
/// Where the buffers are, and their bytes.
const RECEIVE: u64 = 4 << 20;
const RECEIVE_SIZE: u64 = 2 << 20;
const SEND: u64 = 6 << 20;
const SEND_SIZE: u64 = 1 << 20;
const MEMORY: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Addresses of the two.
const ADDRESSES: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

type Bell = Box<dyn FnMut() + Send>;

/// A part of a guest's memory.
struct Part {
    memory: GuestMemory,
    at: u64,
    size: u64,
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

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// One thread, for guests and workers in turns.
    One,
    /// A guest and its worker in one thread, the others in another; both spin.
    Two,
    /// One for each. Who has nothing to do sleeps, and is woken by an eventfd.
    Four,
}

/// What a stretch of frames came to.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Frames that arrived.
    pub frames: u64,
    /// In which time.
    pub time: Duration,
    /// Of which the receiving guest's thread ran so long.
    pub cpu: Duration,
    /// Times a guest rang a worker's doorbell.
    pub signals: u64,
    /// Times a worker interrupted a guest.
    pub interrupts: u64,
}

impl Sample {
    /// Frames a second.
    pub fn rate(&self) -> f64 {
        self.frames as f64 / self.time.as_secs_f64()
    }

    /// Nanoseconds that the receiving guest's thread ran for each frame: the cost where it does all
    /// the work, however busy the machine.
    pub fn cpu_nanoseconds(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.frames.max(1) as f64
    }
}

/// A guest with one NIC.
struct Guest {
    /// The worker, if it has no thread of its own.
    worker: Option<InlineWorker>,
    queue: Queue<DoubleMapped, Bell, Part, DEPTH>,
    end: GuestEnd,
    address: [u8; 6],
    /// Frames that have come, and how many of them the sender was told of.
    received: u64,
    told: u64,
}

impl Guest {
    fn new(switch: &Switch, address: [u8; 6], inline: bool) -> anyhow::Result<Self> {
        let memory = GuestMemory::new(MEMORY)?;
        let (root, mut end) = channel_in(&memory, Gpn(0), RING_PAGES, 0);
        let part = |gpadl: u32, at, size| {
            let pages = (at / 4096..(at + size) / 4096).map(Gpn).collect();
            end.share(GpadlId(gpadl), pages);
            Shared { gpadl: GpadlId(gpadl), memory: Part { memory: memory.clone(), at, size } }
        };
        let setup = Setup {
            receive: part(1, RECEIVE, RECEIVE_SIZE),
            send: part(2, SEND, SEND_SIZE),
            mtu: 1500,
            capabilities: Capabilities::default(),
            subchannels: 0,
        };
        let config = NicConfig {
            number: 0,
            address: MacAddr(address),
            max_mtu: 1500,
            channels: 1,
            name: String::new(),
        };
        let mut nic = Nic::new(config, Arc::new(switch.port(PortOptions::default())?));
        let mut worker = None;
        if inline {
            worker = Some(nic.open_inline(root).context("the worker did not start")?);
        } else {
            nic.open(root).context("the worker did not start")?;
        }

        // The rings go to the client; those of a channel that nobody uses take their place.
        let (_, spare) = channel_in(&memory, Gpn(2 * RING_PAGES), 2, 0);
        let incoming = mem::replace(&mut end.incoming, spare.incoming);
        let outgoing = mem::replace(&mut end.outgoing, spare.outgoing);
        let doorbell = Arc::clone(&end.doorbell);
        // Fails only when the counter is full, and then the worker is awake.
        let ring: Bell = Box::new(move || drop(doorbell.write(1)));
        let mut wait = || match &mut worker {
            Some(worker) => worker.turn().is_ok(),
            None => end.wait_interrupt(PATIENCE),
        };
        let (mut queue, _) =
            Queue::connect(Channel::new(incoming, outgoing, ring), setup, &mut wait)?;
        let filter = PacketFilter(PacketFilter::DIRECTED | PacketFilter::BROADCAST);
        queue.set_filter(filter, |_| {}, &mut wait)?;
        queue.wake();
        Ok(Self { worker, queue, end, address, received: 0, told: 0 })
    }

    /// Has its worker take a turn, if that has no thread.
    fn work(&mut self) -> anyhow::Result<()> {
        if let Some(worker) = &mut self.worker {
            worker.turn()?;
        }
        Ok(())
    }

    /// Tells everybody where it is.
    fn hello(&mut self) -> anyhow::Result<()> {
        let mut hello = [0; 60];
        hello[..6].fill(0xff);
        hello[6..12].copy_from_slice(&self.address);
        hello[12..14].copy_from_slice(&[0x88, 0xb5]);
        self.queue.send(&hello, &Offload::default())?;
        while self.queue.in_flight() > 0 || self.queue.counters().packets_out == 0 {
            self.queue.publish();
            self.work()?;
            self.queue.poll(|_| {})?;
        }
        Ok(())
    }

    /// Sends up to `count` of the same frame. Returns how many.
    fn send(&mut self, frame: &[u8], count: u64) -> anyhow::Result<u64> {
        let mut sent = 0;
        while sent < count {
            match self.queue.send(frame, &Offload::default()) {
                Ok(()) => sent += 1,
                Err(SendError::Full) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.queue.publish();
        Ok(sent)
    }

    /// Takes what has come, as the sender: how many frames have arrived, if that is said.
    fn heard(&mut self) -> anyhow::Result<Option<u64>> {
        let mut heard = None;
        self.queue.poll(|event| {
            let mut count = [0; 8];
            if let Event::Received(frame) = event
                && frame.read(ETHERNET_HEADER, &mut count)
            {
                heard = Some(u64::from_le_bytes(count));
            }
        })?;
        Ok(heard)
    }

    /// Takes what has come, as the receiver: frames are copied out, as a guest does. Returns how many.
    fn receive(&mut self, into: &mut [u8]) -> anyhow::Result<u64> {
        let mut frames = 0;
        let mut odd = None;
        self.queue.poll(|event| {
            if let Event::Received(frame) = event {
                let into = into.get_mut(..frame.len());
                if into.is_some_and(|into| frame.read(0, into)) {
                    frames += 1;
                } else {
                    odd = Some(frame.len());
                }
            }
        })?;
        ensure!(odd.is_none(), "a frame of {odd:?} bytes, which nobody sent");
        self.received += frames;
        if self.received - self.told >= ACKNOWLEDGED {
            let mut frame = [0; 60];
            let count = self.received.to_le_bytes();
            let parts = [&ADDRESSES[0][..], &ADDRESSES[1], &[0x88, 0xb5], &count];
            let bytes = parts.into_iter().flatten();
            frame.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            if self.send(&frame, 1)? == 1 {
                self.told = self.received;
            }
        }
        self.queue.publish();
        Ok(frames)
    }

    /// Sleeps until there may be something, but not for ever: the end of a run is told otherwise.
    fn sleep(&mut self) {
        if self.queue.rest() {
            self.end.wait_interrupt(Duration::from_millis(20));
        }
        self.queue.wake();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.worker = None;
        self.end.request_stop();
        self.end.wait_closed(PATIENCE);
    }
}

/// Passes frames of `len` bytes from one guest to another for `time`. Given `cpus`, of two threads each
/// has one of the first two processors for its own.
pub fn pass(
    threads: Threads,
    len: usize,
    time: Duration,
    cpus: Option<&CpuSet>,
) -> anyhow::Result<Sample> {
    let switch = Switch::new(SwitchOptions::new("bench"));
    let inline = threads != Threads::Four;
    let mut frame = [&ADDRESSES[1][..], &ADDRESSES[0], &[0x88, 0xb5]].concat();
    frame.resize(len, 0xa5);
    let over = AtomicBool::new(false);

    if threads == Threads::One {
        let [mut sender, mut receiver] = guests(&switch)?;
        receiver.hello()?;
        let (mut sent, mut arrived) = (0, 0);
        return measure(&mut receiver, time, |receiver| {
            sent += sender.send(&frame, BATCH.min((arrived + WINDOW).saturating_sub(sent)))?;
            sender.work()?;
            arrived = sender.heard()?.unwrap_or(arrived);
            receiver.work()
        });
    }
    thread::scope(|scope| {
        let (ready, is_ready) = mpsc::channel();
        // Frames to a guest that is not there yet would be lost.
        let (go, may_go) = mpsc::channel::<()>();
        let (over, frame, switch) = (&over, &frame, &switch);
        let sender = scope.spawn(move || -> anyhow::Result<u64> {
            if let Some(cpus) = cpus {
                pin(cpus, Some(1));
            }
            let mut sender = Guest::new(switch, ADDRESSES[0], inline)?;
            let _ = ready.send(());
            if may_go.recv().is_err() {
                return Ok(0);
            }
            let (mut sent, mut arrived, mut idle) = (0, 0, Idle::default());
            while !over.load(Ordering::Relaxed) {
                let now = sender.send(frame, BATCH.min((arrived + WINDOW).saturating_sub(sent)))?;
                sent += now;
                sender.work()?;
                let heard = sender.heard()?;
                arrived = heard.unwrap_or(arrived);
                match (now, heard) {
                    (0, None) if inline => idle.nothing(),
                    (0, None) => sender.sleep(),
                    _ => idle.something(),
                }
            }
            Ok(sender.queue.counters().signals)
        });
        if let Some(cpus) = cpus {
            pin(cpus, Some(0));
        }
        let result = (move || {
            let mut receiver = Guest::new(switch, ADDRESSES[1], inline)?;
            is_ready.recv().context("the sender did not start")?;
            receiver.hello()?;
            let _ = go.send(());
            measure(&mut receiver, time, Guest::work)
        })();
        over.store(true, Ordering::Relaxed);
        if let Some(cpus) = cpus {
            pin(cpus, None);
        }
        let signals = sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        let sample = result?;
        Ok(Sample { signals: sample.signals + signals, ..sample })
    })
}

fn guests(switch: &Switch) -> anyhow::Result<[Guest; 2]> {
    let [a, b] = ADDRESSES;
    Ok([Guest::new(switch, a, true)?, Guest::new(switch, b, true)?])
}

/// Has `receiver` take frames for `time`, doing `between` before each look.
fn measure(
    receiver: &mut Guest,
    time: Duration,
    mut between: impl FnMut(&mut Guest) -> anyhow::Result<()>,
) -> anyhow::Result<Sample> {
    let mut into = [0; 2048];
    let (before, interrupts) = (receiver.queue.counters().signals, receiver.end.interrupt.count());
    let (mut frames, mut turns, mut idle) = (0, 0u32, Idle::default());
    let (started, cpu) = (Instant::now(), thread_time());
    loop {
        between(receiver)?;
        let now = receiver.receive(&mut into)?;
        frames += now;
        if now > 0 {
            idle.something();
        } else if receiver.worker.is_none() {
            receiver.sleep();
        } else {
            idle.nothing();
        }
        // The clock is not free.
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(16) {
            let elapsed = started.elapsed();
            if elapsed >= time && (frames > 0 || elapsed >= time + GRACE) {
                break;
            }
        }
    }
    let (time, cpu) = (started.elapsed(), thread_time().saturating_sub(cpu));
    Ok(Sample {
        frames,
        time,
        cpu,
        signals: receiver.queue.counters().signals - before,
        interrupts: receiver.end.interrupt.count() - interrupts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_pass() {
        for threads in [Threads::One, Threads::Two, Threads::Four] {
            let sample = pass(threads, 64, Duration::from_millis(50), None).unwrap();
            assert!(sample.frames > 0 && sample.rate() > 0.0, "{threads:?}: {sample:?}");
        }
    }
}
