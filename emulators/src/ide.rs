//! The IDE function of a PIIX4: two channels with up to two drives each, ATA disks or CD-ROM drives.
//!
//! - [`channel`]: the registers, as a state machine without I/O.
//! - [`drive`]: a disk's own registers, and what it says about itself.
//! - [`log`]: a disk's logs.
//! - [`cd`]: a CD-ROM drive's commands.
//! - [`table`]: the bus master's table of memory regions.
//! - [`worker`]: the thread that does a channel's I/O.
//! - [`bits`]: the numbers.
//!
//! A disk has the size here that it had when the machine started, as nobody expects of an ATA disk that it
//! grows. What it has lost since is not found (IDNF).
//!
//! A processor's access locks the channel, moves its registers, and if that made a job, rings the
//! worker's doorbell. It never waits for a disk: the worker holds the lock only to take the job and
//! to bring the result, and then interrupts.

mod bits;
mod cd;
mod channel;
mod drive;
mod fuzz;
mod log;
mod table;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use backends::block::Disk;
use hypervisor::{Device, GuestMemory, InterruptLine};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::pci::Decode;
pub(crate) use cd::fuzz as fuzz_packets;
use channel::Channel;
pub use drive::DriveError;
pub(crate) use fuzz::fuzz;
use worker::Worker;

/// Where a channel's registers are, and its interrupt: what they have been since the PC/AT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The first of the command block's [`Place::PORTS`] ports.
    pub command: u16,
    /// The control block's port.
    pub control: u16,
    /// The ISA interrupt.
    pub irq: u8,
}

impl Place {
    /// The primary and the secondary channel.
    pub const ALL: [Self; 2] = [
        Self { command: 0x1f0, control: 0x3f6, irq: 14 },
        Self { command: 0x170, control: 0x376, irq: 15 },
    ];

    /// Ports of the command block.
    pub const PORTS: u16 = 8;

    /// The command block's ports, as first and how many, where a write says nothing before the
    /// command that follows it: all but data and command.
    pub fn quiet_ports(self) -> (u16, u16) {
        (self.command + 1, 6)
    }
}

/// The drives of both channels and where they are.
#[derive(Clone, Default)]
pub struct IdeDisks([[Option<Attached>; 2]; 2]);

#[derive(Clone)]
struct Attached {
    disk: Arc<dyn Disk>,
    cd: bool,
}

impl IdeDisks {
    /// Attaches a disk at the place that is asked for, as far as it is; the first free one otherwise.
    /// Returns its channel and its place there.
    pub fn attach(
        &mut self,
        channel: Option<u8>,
        device: Option<u8>,
        disk: Arc<dyn Disk>,
    ) -> Result<(u8, u8), DriveError> {
        drive::Drive::new(&disk.geometry())?;
        self.place(channel, device, Attached { disk, cd: false })
    }

    /// Attaches a CD-ROM drive with `disc` in it where a drive is expected, which is the second
    /// channel, or else at the first free place.
    pub fn attach_cd(&mut self, disc: Arc<dyn Disk>) -> Result<(u8, u8), DriveError> {
        drive::Drive::new_cd(&disc.geometry())?;
        let attached = Attached { disk: disc, cd: true };
        self.place(Some(1), None, attached.clone()).or_else(|_| self.place(None, None, attached))
    }

    fn place(
        &mut self,
        channel: Option<u8>,
        device: Option<u8>,
        attached: Attached,
    ) -> Result<(u8, u8), DriveError> {
        let wanted = |asked: Option<u8>, have: u8| asked.is_none_or(|asked| asked == have);
        for (at, devices) in (0..).zip(&mut self.0) {
            for (place, slot) in (0..).zip(devices) {
                if wanted(channel, at) && wanted(device, place) && slot.is_none() {
                    *slot = Some(attached);
                    return Ok((at, place));
                }
            }
        }
        Err(match (channel, device) {
            (Some(channel), Some(device)) => DriveError::Taken { channel, device },
            _ => DriveError::Full,
        })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().flatten().all(Option::is_none)
    }
}

/// What the processors and the worker share of a channel.
struct Port {
    channel: Mutex<Channel>,
    doorbell: Arc<EventFd>,
    /// Locked for a whole edge: the guest may answer the worker's so fast that its own next one would
    /// otherwise begin while the line is still up, and be none.
    line: Mutex<Arc<dyn InterruptLine>>,
    stop: AtomicBool,
    jobs: AtomicU64,
    interrupts: AtomicU64,
}

impl Port {
    fn lock(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `access` move the registers, and passes on what comes of it.
    fn access<T>(&self, access: impl FnOnce(&mut Channel) -> T) -> T {
        let mut channel = self.lock();
        let (had_job, was_anew) = (channel.has_job(), channel.is_anew());
        let value = access(&mut channel);
        let job = channel.has_job() && !had_job;
        let anew = channel.is_anew() && !was_anew;
        let edge = channel.take_edge();
        drop(channel);
        if job {
            self.jobs.fetch_add(1, Ordering::Relaxed);
        }
        if job || anew {
            self.ring();
        }
        if edge {
            self.interrupts.fetch_add(1, Ordering::Relaxed);
            // An edge, made here and now: a pulse would have a thread of the kernel make it.
            let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
            line.set_level(true);
            line.set_level(false);
        }
        value
    }

    fn ring(&self) {
        // It fails only when the counter is full, and then the worker is on its way.
        let _ = self.doorbell.write(1);
    }
}

/// Both channels, with their workers. Dropped, it stops them when what is under way has ended.
pub struct Ide {
    ports: [Arc<Port>; 2],
    workers: Vec<JoinHandle<()>>,
}

impl Ide {
    /// Channels with `disks` in a guest's memory, which interrupt by `lines`.
    pub fn new(
        memory: &GuestMemory,
        disks: &IdeDisks,
        lines: [Arc<dyn InterruptLine>; 2],
    ) -> io::Result<Self> {
        let mut ports = Vec::with_capacity(2);
        for (disks, line) in disks.0.iter().zip(lines) {
            let mut channel = Channel::new();
            for (place, disk) in disks.iter().enumerate() {
                if let Some(Attached { disk, cd }) = disk {
                    channel.attach(place, &disk.geometry(), *cd).map_err(io::Error::other)?;
                }
            }
            ports.push(Arc::new(Port {
                channel: Mutex::new(channel),
                doorbell: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
                line: Mutex::new(line),
                stop: AtomicBool::new(false),
                jobs: AtomicU64::new(0),
                interrupts: AtomicU64::new(0),
            }));
        }
        let ports: [Arc<Port>; 2] =
            ports.try_into().unwrap_or_else(|_| unreachable!("there are two channels"));
        let mut ide = Self { ports, workers: Vec::new() };
        for (index, disks) in disks.0.iter().enumerate() {
            if disks.iter().any(Option::is_some) {
                ide.start(index, memory, disks)?;
            }
        }
        Ok(ide)
    }

    fn start(
        &mut self,
        index: usize,
        memory: &GuestMemory,
        disks: &[Option<Attached>; 2],
    ) -> io::Result<()> {
        let Some(port) = self.ports.get(index) else { return Ok(()) };
        let (port, memory, disks) = (Arc::clone(port), memory.clone(), disks.clone());
        let (ready, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(format!("ide{index}"));
        self.workers.push(thread.spawn(move || {
            let mut worker = match Worker::new(port, memory, &disks) {
                Ok(worker) => worker,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(()));
            if let Err(error) = worker.run() {
                tracing::error!(channel = index, %error, "an IDE channel is lost: io_uring failed");
            }
        })?);
        started.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }

    /// The command block of channel 0 or 1, [`Place::PORTS`] ports.
    pub fn command_block(&self, channel: usize) -> Arc<dyn Device> {
        Arc::new(CommandBlock(Arc::clone(&self.ports[channel & 1])))
    }

    /// The control block of channel 0 or 1, one port.
    pub fn control_block(&self, channel: usize) -> Arc<dyn Device> {
        Arc::new(ControlBlock(Arc::clone(&self.ports[channel & 1])))
    }

    /// The bus-master registers of both channels, 16 ports; `decode` is the function's, which says
    /// whether they may access memory.
    pub fn bus_master(&self, decode: Arc<Decode>) -> Arc<dyn Device> {
        let ports = self.ports.each_ref().map(Arc::downgrade);
        decode.on_bus_master(move |master| {
            for port in ports.iter().filter_map(Weak::upgrade) {
                port.access(|channel| channel.allow_master(master));
            }
        });
        Arc::new(BusMasterBlock { ports: self.ports.clone(), decode })
    }

    /// Requests made to the host and interrupts raised, for each channel.
    pub fn counters(&self) -> IdeCounters {
        IdeCounters(self.ports.clone())
    }
}

/// What an [`Ide`] counts, readable while it works and after.
#[derive(Clone)]
pub struct IdeCounters([Arc<Port>; 2]);

impl IdeCounters {
    /// Requests to the host and interrupts of each channel.
    pub fn get(&self) -> [(u64, u64); 2] {
        self.0.each_ref().map(|port| {
            (port.jobs.load(Ordering::Relaxed), port.interrupts.load(Ordering::Relaxed))
        })
    }
}

impl Drop for Ide {
    fn drop(&mut self) {
        for port in &self.ports {
            port.stop.store(true, Ordering::Release);
            port.ring();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// The eight ports of a channel's command block.
struct CommandBlock(Arc<Port>);

impl Device for CommandBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 {
            return self.0.access(|channel| channel.read_data(data));
        }
        for (register, byte) in (offset as u8..).zip(data) {
            *byte = self.0.access(|channel| channel.read(register));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            return self.0.access(|channel| channel.write_data(data));
        }
        for (register, byte) in (offset as u8..).zip(data) {
            self.0.access(|channel| channel.write(register, *byte));
        }
    }

    fn takes_strings(&self, offset: u64) -> bool {
        offset == 0
    }

    fn read_string(&self, offset: u64, width: usize, data: &mut [u8]) {
        if offset == 0 {
            return self.0.access(|channel| channel.read_data(data));
        }
        for unit in data.chunks_exact_mut(width) {
            self.read(offset, unit);
        }
    }

    fn write_string(&self, offset: u64, width: usize, data: &[u8]) {
        if offset == 0 {
            return self.0.access(|channel| channel.write_data(data));
        }
        for unit in data.chunks_exact(width) {
            self.write(offset, unit);
        }
    }
}

/// The one port of a channel's control block.
struct ControlBlock(Arc<Port>);

impl Device for ControlBlock {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0.lock().read_control());
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let Some(value) = data.first() {
            self.0.access(|channel| channel.write_control(*value));
        }
    }
}

/// The sixteen ports of the bus master, eight for each channel.
struct BusMasterBlock {
    ports: [Arc<Port>; 2],
    decode: Arc<Decode>,
}

impl BusMasterBlock {
    fn port(&self, offset: u64) -> &Port {
        let [primary, secondary] = &self.ports;
        if offset < 8 { primary } else { secondary }
    }
}

impl Device for BusMasterBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.port(offset).lock().read_master(offset as u8 & 7);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            let register = offset as u8 & 7;
            self.port(offset).access(|channel| {
                channel.write_master(register, *byte, self.decode.is_bus_master());
            });
        }
    }
}

#[cfg(test)]
#[path = "ide/tests.rs"]
mod tests;
