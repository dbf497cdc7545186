//! Does the work, and says what came out: each result is an object of JSON in a line of its own.
//!
//! ```text
//! {"event":"connected","bus":"vmbus","version":"5.3","offers":1}
//! {"event":"opened","channel":1,"driver":"storvsc","controller":0,"disks":1,"channels":1}
//! {"event":"found","driver":"ide","controller":0,"disks":1}
//! {"event":"found","driver":"e1000","nic":0}
//! {"begin":"verify disk=0"}
//! {"result":"verify","disk":0,"bytes":16777216, … }
//! ```
//!
//! What goes wrong is a line with `error` in it, and ends the run.

mod bench;
mod checksum;
mod exchange;
mod flow;
mod hostile;
mod nics;
mod parts;
mod random;
mod verify;

use core::fmt::Display;
use core::iter::Peekable;

pub use hostile::Silence;
use nics::Nics;
use parts::Seat;
use thiserror::Error;
use vmbus::protocol::Relid;
use vmbus::vstor::SCSI_CLASS;

use crate::block::{BlockDriver, BlockError, Failure};
use crate::bus::{Bus, BusError};
use crate::ide::{self, Transfer};
use crate::json::Object;
use crate::memory::Pages;
use crate::net::NicError;
use crate::platform::Platform;
use crate::storvsc::{Controller, LUNS, RING_PAGES};
use crate::work::{self, Identify, Work};

/// Controllers that are looked at.
const CONTROLLERS: usize = 4;

/// How a run ended, for whoever started it. 101 and above are the platform's own.
pub mod status {
    /// All work was done.
    pub const DONE: u32 = 0;
    /// Something went wrong.
    pub const FAILED: u32 = 1;
    /// The command line was not understood.
    pub const MISUNDERSTOOD: u32 = 2;
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RunError {
    /// On the way to the devices.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// With a disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// With a NIC.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// A disk that is not there.
    #[error("there is no disk {asked}; there are {found}, counted from 0")]
    NoDisk {
        /// Which was to be worked on.
        asked: u32,
        /// How many there are.
        found: usize,
    },
    /// A NIC that is not there.
    #[error("there is no NIC {asked}; there are {found}, counted from 0")]
    NoNic {
        /// Which was to be worked with.
        asked: u32,
        /// How many there are.
        found: usize,
    },
    /// One NIC instead of two.
    #[error("NIC {0} is to exchange frames with itself; nic= and peer= are two")]
    OneNic(u32),
    /// A frame that a NIC does not take.
    #[error("frames of {len} bytes are too long; one of the NICs takes {longest}")]
    FrameLength {
        /// As asked for.
        len: u16,
        /// What it takes.
        longest: usize,
    },
    /// What arrived is not what was sent.
    #[error("frame {number} has arrived with another byte {byte} than it was sent with")]
    FrameDiffers {
        /// Which frame of its direction.
        number: u64,
        /// The first byte that differs.
        byte: usize,
    },
    /// Nothing arrives.
    #[error("no frame arrives any more between NIC {nic} and NIC {peer}")]
    Silence {
        /// One of them.
        nic: u32,
        /// The other.
        peer: u32,
    },
    /// More processors than can work on the disk.
    #[error("{asked} processors are to work on the disk, which {found} can")]
    Processors {
        /// As asked for.
        asked: u16,
        /// As many as there are, or as have a channel to the disk.
        found: usize,
    },
    /// A synthetic disk, asked to be an IDE disk.
    #[error("disk {0} is a synthetic one; transfer= says how an IDE disk's data goes")]
    NoIde(u32),
    /// Too little memory for the work.
    #[error("the work takes {needed} pages of memory, and there are {available}")]
    Memory {
        /// Pages.
        needed: usize,
        /// Pages.
        available: usize,
    },
    /// A transfer that this disk does not do.
    #[error(
        "the disk has blocks of {block_size} bytes and takes at most {max_transfer} at once, not {bs}"
    )]
    BlockSize {
        /// As asked for.
        bs: u32,
        /// Of the disk.
        block_size: u32,
        /// Of the disk.
        max_transfer: u32,
    },
    /// The disk is smaller than one transfer.
    #[error("the disk has {0} bytes, which is less than one transfer")]
    Small(u64),
    /// A request that failed.
    #[error("the {operation} of block {block} failed: {failure}")]
    Failed {
        /// What it was.
        operation: &'static str,
        /// Where.
        block: u64,
        /// Why.
        failure: Failure,
    },
    /// A request that did less than it should.
    #[error("the {operation} of block {block} transferred {bytes} of {asked} bytes")]
    Short {
        /// What it was.
        operation: &'static str,
        /// Where.
        block: u64,
        /// As it says.
        bytes: u32,
        /// As was asked.
        asked: u32,
    },
    /// A driver that speaks of what was not asked.
    #[error("the driver ended a request that was not made")]
    Unasked,
    /// A hostile guest is not served any more.
    #[error("{silence}; it was so after `hostile seed={seed} rounds=1`")]
    Hostile {
        /// Of the round.
        seed: u64,
        /// What is silent.
        silence: Silence,
    },
    /// What was read is not what was written.
    #[error("byte {byte} of the disk reads {read:#018x} where {written:#018x} was written")]
    Differs {
        /// Where the first difference is.
        byte: u64,
        /// The eight bytes there.
        read: u64,
        /// As they should be.
        written: u64,
    },
}

/// Does the work of `command_line`, and returns a [`status`].
pub fn run<P: Platform>(platform: &P, command_line: &str) -> u32 {
    // All of it is read before anything is done.
    if let Some(error) = work::parse(command_line).find_map(Result::err) {
        tell_error(platform, error);
        return status::MISUNDERSTOOD;
    }
    match work_on(platform, command_line) {
        Ok(()) => status::DONE,
        Err(error) => {
            tell_error(platform, error);
            status::FAILED
        }
    }
}

/// Says that something went wrong, in the way that the run's readers expect.
pub fn tell_error(platform: &impl Platform, error: impl Display) {
    tell(platform, Object::default().string("error", error));
}

fn tell(platform: &impl Platform, mut object: Object) {
    platform.line(object.line());
}

/// Tasks as they are written and as they are understood.
type Tasks<'t> = Peekable<&'t mut dyn Iterator<Item = (&'t str, Work)>>;

fn work_on<P: Platform>(platform: &P, command_line: &str) -> Result<(), RunError> {
    let tasks = command_line.split(';').map(str::trim).filter(|task| !task.is_empty());
    // They were read before.
    let mut tasks = tasks.filter_map(|task| Some((task, work::parse(task).next()?.ok()?)));
    let mut tasks: Tasks<'_> = (&mut tasks as &mut dyn Iterator<Item = _>).peekable();
    while let Some((_, work)) = tasks.peek() {
        let Work::Hostile(hostile) = *work else {
            work_honestly(platform, &mut tasks)?;
            continue;
        };
        if let Some((task, _)) = tasks.next() {
            tell(platform, Object::default().string("begin", task));
        }
        tell(platform, hostile.run(platform, platform.memory())?);
        hostile.rest(platform);
    }
    Ok(())
}

/// Takes all devices into use, and does what is to be done up to the next task that wants the machine for
/// itself.
fn work_honestly<P: Platform>(platform: &P, tasks: &mut Tasks<'_>) -> Result<(), RunError> {
    let mut memory = platform.memory();
    let mut bus = Bus::connect(platform)?;
    let connected = Object::default().string("event", "connected").string("bus", "vmbus");
    let connected = match bus.version() {
        Some(version) => connected.string("version", version),
        None => connected,
    };
    tell(platform, connected.number("offers", bus.offers().count()));

    let mut disks = Disks::open(platform, &mut bus, &mut memory)?;
    let mut nics = Nics::open(platform, &mut bus, &mut memory)?;
    let honest = |(_, work): &(&str, Work)| !matches!(work, Work::Hostile(_));
    while let Some((task, work)) = tasks.next_if(honest) {
        tell(platform, Object::default().string("begin", task));
        match work {
            Work::Identify(which) => {
                let all = |count| 0..u32::try_from(count).unwrap_or(u32::MAX);
                let one = |number: u32| number..number.saturating_add(1);
                let (of_disks, of_nics) = match which {
                    Identify::All => (all(disks.count), all(nics.count())),
                    Identify::Disk(number) => (one(number), 0..0),
                    Identify::Nic(number) => (0..0, one(number)),
                };
                for number in of_disks {
                    disks.with(number, None, |disk| {
                        tell(platform, identify(number, disk));
                        Ok(())
                    })?;
                }
                for number in of_nics {
                    tell(platform, nics.identify(number)?);
                }
            }
            Work::Verify(verify) => {
                disks.with(verify.disk, verify.transfer, |disk| {
                    tell(platform, verify.run(Seat::new(platform, disk, memory))?);
                    Ok(())
                })?;
            }
            Work::Checksum(checksum) => {
                disks.with(checksum.disk, checksum.transfer, |disk| {
                    tell(platform, checksum.run(Seat::new(platform, disk, memory))?);
                    Ok(())
                })?;
            }
            Work::Bench(bench) => {
                disks.with(bench.disk, bench.transfer, |disk| {
                    tell(platform, bench.run(Seat::new(platform, disk, memory))?);
                    Ok(())
                })?;
            }
            Work::Exchange(exchange) => {
                let pair = nics.pair([exchange.nic, exchange.peer])?;
                tell(platform, exchange.run(platform, pair)?);
            }
            // Not here.
            Work::Hostile(_) => {}
        }
    }
    Ok(bus.unload()?)
}

fn identify(number: u32, disk: &dyn BlockDriver<'_>) -> Object {
    let identity = disk.identity();
    Object::default()
        .string("result", "identify")
        .number("disk", number)
        .string("driver", identity.driver)
        .number("controller", identity.controller)
        .number("lun", identity.lun)
        .string("vendor", identity.vendor)
        .string("product", identity.product)
        .number("bytes", identity.bytes())
        .number("block_size", identity.block_size)
        .number("physical_block_size", identity.physical_block_size)
        .number("max_transfer", identity.max_transfer)
}

/// All disks of the machine: those of its SCSI controllers, and then those of its IDE channels.
struct Disks<'w, P: Platform> {
    controllers: [Option<Controller<'w, P>>; CONTROLLERS],
    /// Bit `n` for unit `n`, for each controller.
    units: [u64; CONTROLLERS],
    channels: [Option<ide::Channel<'w, P>>; 2],
    count: usize,
}

impl<'w, P: Platform> Disks<'w, P> {
    fn open(
        platform: &'w P,
        bus: &mut Bus<'w, P>,
        memory: &mut Pages<'w>,
    ) -> Result<Self, RunError> {
        let mut channels = [Relid(0); CONTROLLERS];
        let found = bus.devices(SCSI_CLASS).zip(&mut channels).map(|(relid, place)| *place = relid);
        let found = found.count();
        let mut disks = Self {
            controllers: [const { None }; CONTROLLERS],
            units: [0; CONTROLLERS],
            channels: [const { None }; 2],
            count: 0,
        };
        let places = disks.controllers.iter_mut().zip(&mut disks.units);
        for ((index, relid), (place, units)) in (0..).zip(channels).take(found).zip(places) {
            let ring = memory.take(RING_PAGES).ok_or(BusError::Memory)?;
            let rings = bus.open(relid, ring, 0)?;
            let controller = place.insert(Controller::connect(platform, index, rings, memory)?);
            let channels = 1 + controller.subchannels();
            for number in 1..channels {
                let relid = bus.subchannel(relid, number)?;
                let ring = memory.take(RING_PAGES).ok_or(BusError::Memory)?;
                controller.add_subchannel(number, bus.open(relid, ring, number.into())?);
            }
            *units = controller.units()?;
            let count = units.count_ones();
            disks.count += count as usize;
            tell(
                platform,
                Object::default()
                    .string("event", "opened")
                    .number("channel", relid)
                    .string("driver", "storvsc")
                    .number("controller", index)
                    .number("disks", count)
                    .number("channels", channels),
            );
        }
        disks.channels = ide::find(platform, memory)?;
        for (index, channel) in disks.channels.iter().enumerate() {
            let Some(channel) = channel else { continue };
            let count = channel.disks().count();
            disks.count += count;
            tell(
                platform,
                Object::default()
                    .string("event", "found")
                    .string("driver", "ide")
                    .number("controller", index)
                    .number("disks", count),
            );
        }
        Ok(disks)
    }

    /// Lets `work` have disk `number`, driven as `transfer` says if it is an IDE disk.
    fn with(
        &mut self,
        number: u32,
        transfer: Option<Transfer>,
        work: impl FnOnce(&mut dyn BlockDriver<'w>) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        let mut before = number;
        let found = self.count;
        for (controller, units) in self.controllers.iter_mut().zip(self.units) {
            let Some(controller) = controller else { continue };
            for lun in (0..LUNS as u8).filter(|lun| units & 1 << lun != 0) {
                if before > 0 {
                    before -= 1;
                } else if transfer.is_some() {
                    return Err(RunError::NoIde(number));
                } else if let Some(mut disk) = controller.disk(lun)? {
                    return work(&mut disk);
                }
            }
        }
        let transfer = transfer.unwrap_or(Transfer::Dma);
        for channel in self.channels.iter_mut().flatten() {
            for drive in channel.disks() {
                if before > 0 {
                    before -= 1;
                } else if let Some(mut disk) = channel.disk(drive, transfer)? {
                    return work(&mut disk);
                }
            }
        }
        Err(RunError::NoDisk { asked: number, found })
    }
}
