//! storvsp: the service provider behind the guest's storvsc, a synthetic SCSI controller.
//!
//! ```text
//!   Controller           a device on the bus, with up to 64 LUNs; knows who may attach
//!    └─ Worker           one for each open channel: a thread with an io_uring of its own
//!        ├─ Pacer        when to wait a moment for more
//!        ├─ Handshake    how a channel is taken into use
//!        └─ Engine       requests under way: packets in, block requests out, answers back
//! ```
//!
//! A guest opens the controller's channel, and as many sub-channels as it has further processors;
//! each channel takes requests for any LUN and answers its own. Workers share the LUNs, of which
//! nothing changes but a disk's size, and nothing else.
//!
//! A disk's size is looked at when a guest asks what the disk is ([`crate::scsi::looks_anew`]); whoever may
//! change it can call [`Disk::refresh`] at any time. The guest's next command tells it.
//!
//! A disk on an emulated IDE channel can be offered here too, as a device of its own with that one
//! disk as LUN 0 ([`Controller::ide`]): a guest that knows the VMBus takes this path to it.

mod engine;
mod fuzz;
mod handshake;
mod pacing;
mod worker;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use backends::block::Disk;
use thiserror::Error;
use tracing::debug;
use vmbus::{Guid, vstor};
use vmbus_server::{Channel, Device, OfferParams};

use crate::scsi::{Limits, LogicalUnit};
use crate::vigil::has_spare_processors;
use handshake::Grants;
use worker::Worker;

pub(crate) use fuzz::fuzz;

/// The longest transfer of one request, in bytes. Guests split what is longer.
const MAX_TRANSFER: u32 = 1 << 20;

/// LUNs on a controller, as on a Hyper-V host.
pub const LUNS: usize = 64;

/// The LUNs of a controller, of which each has one target.
pub(crate) struct Luns {
    place: Place,
    /// `None` where no disk is.
    units: [Option<Unit>; LUNS],
}

/// Which controller it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A SCSI controller, by its number.
    Scsi(u8),
    /// The other path to a disk on an emulated IDE channel.
    Ide {
        /// The channel.
        channel: u8,
        /// The place on it.
        device: u8,
    },
}

impl fmt::Display for Place {
    /// Short enough for the name of a thread.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scsi(number) => write!(f, "storvsp{number}"),
            Self::Ide { channel, device } => write!(f, "storvsp-i{channel}:{device}"),
        }
    }
}

/// A disk in its place.
pub(crate) struct Unit {
    pub(crate) scsi: LogicalUnit,
    pub(crate) disk: Arc<dyn Disk>,
}

impl Luns {
    fn empty(place: Place) -> Self {
        Self { place, units: [const { None }; LUNS] }
    }

    pub(crate) fn get(&self, lun: u8) -> Option<&Unit> {
        self.units.get(usize::from(lun))?.as_ref()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u8, &Unit)> {
        (0u8..).zip(&self.units).filter_map(|(lun, unit)| Some((lun, unit.as_ref()?)))
    }

    /// Whether a request for this path and target is for the controller's one target. Guests take an
    /// IDE disk's target from the offer; Linux leaves the path 0.
    pub(crate) fn is_target(&self, path: u8, target: u8) -> bool {
        match self.place {
            Place::Scsi(_) => path == 0 && target == 0,
            Place::Ide { channel, device } => (path == 0 || path == channel) && target == device,
        }
    }
}

impl Unit {
    fn new(disk: Arc<dyn Disk>) -> Self {
        let scsi = LogicalUnit::new(&disk.geometry(), &Limits { max_transfer_bytes: MAX_TRANSFER });
        Self { scsi: scsi.following(disk.capacity()), disk }
    }
}

/// Why a disk was not attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AttachError {
    /// There is a disk already.
    #[error("LUN {0} is taken")]
    Taken(u8),
    /// There is no such LUN.
    #[error("there is no LUN {0}; LUNs are 0 to 63")]
    NoSuchLun(u8),
    /// All LUNs are taken.
    #[error("the controller is full; it takes 64 disks")]
    Full,
}

/// A synthetic SCSI controller.
pub struct Controller {
    luns: Arc<Luns>,
    grants: Grants,
    may_spin: bool,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("place", &self.luns.place).finish_non_exhaustive()
    }
}

/// A controller in the making.
pub struct ControllerBuilder {
    luns: Luns,
}

impl ControllerBuilder {
    /// Controller `number` of a partition, without disks. Azure's images know the first four by
    /// their instance.
    pub fn new(number: u8) -> Self {
        Self { luns: Luns::empty(Place::Scsi(number)) }
    }

    /// Attaches `disk` at `lun`, or at the lowest free one. Returns where.
    pub fn attach(&mut self, lun: Option<u8>, disk: Arc<dyn Disk>) -> Result<u8, AttachError> {
        let lun = match lun {
            Some(lun) => lun,
            None => (0u8..)
                .zip(&self.luns.units)
                .find_map(|(lun, unit)| unit.is_none().then_some(lun))
                .ok_or(AttachError::Full)?,
        };
        let unit = self.luns.units.get_mut(usize::from(lun)).ok_or(AttachError::NoSuchLun(lun))?;
        if unit.is_some() {
            return Err(AttachError::Taken(lun));
        }
        *unit = Some(Unit::new(disk));
        Ok(lun)
    }

    /// The controller for a partition of `vps` virtual processors, each of which gets a channel.
    pub fn build(self, vps: u32) -> Controller {
        let subchannels = u16::try_from(vps.saturating_sub(1)).unwrap_or(u16::MAX);
        Controller::new(self.luns, subchannels, vps)
    }
}

impl Controller {
    /// The path by the VMBus to `disk`, which is also device 0 or 1 of IDE channel 0 or 1, for a
    /// partition of `vps` virtual processors. It has one channel, as guests expect of IDE.
    pub fn ide(channel: u8, device: u8, disk: Arc<dyn Disk>, vps: u32) -> Self {
        let mut luns = Luns::empty(Place::Ide { channel, device });
        luns.units[0] = Some(Unit::new(disk));
        Self::new(luns, 0, vps)
    }

    fn new(luns: Luns, max_subchannels: u16, vps: u32) -> Self {
        Self {
            luns: Arc::new(luns),
            grants: Grants { max_subchannels, max_transfer: MAX_TRANSFER },
            may_spin: has_spare_processors(vps),
        }
    }
}

/// The instance of SCSI controller `number`: those of Azure, from which its images tell the disks of
/// one controller from another's.
fn scsi_instance(number: u8) -> Guid {
    let mut wire = Guid::new("f8b3781a-1e82-4818-a1c3-63d806ec15bb").to_wire();
    // The first byte on the wire is the last of the first group.
    wire[0] = wire[0].wrapping_add(number);
    Guid::from_wire(wire)
}

/// The instance of an IDE disk: channel, device and a fixed number. Guests read the target from it.
fn ide_instance(channel: u8, device: u8) -> Guid {
    let mut wire = [0; 16];
    (wire[0], wire[4]) = (channel, device);
    wire[6..8].copy_from_slice(&0x8899_u16.to_le_bytes());
    Guid::from_wire(wire)
}

/// What an IDE disk's offer says besides: path, target, and that it is such a disk. Old guests read
/// it.
fn ide_offer(channel: u8, device: u8) -> OfferParams {
    const IDE_DEVICE: u8 = 2;
    let mut offer = OfferParams::new(vstor::IDE_CLASS, ide_instance(channel, device));
    offer.user_data[2..4].copy_from_slice(&[channel, device]);
    offer.user_data[8] = IDE_DEVICE;
    offer
}

/// The worker of a channel in the thread that made it, and at whose pleasure it works: for benches,
/// and for a program with a thread to spin. Dropping it closes the channel.
pub struct InlineWorker(Worker);

impl Controller {
    /// Serves `channel` in the calling thread, whenever [`InlineWorker::turn`] is called there. The
    /// guest's signals are neither wanted nor heard.
    pub fn open_inline(&self, channel: Channel) -> io::Result<InlineWorker> {
        let mut worker = Worker::new(channel, &self.luns, self.grants, false)?;
        worker.stay_awake();
        Ok(InlineWorker(worker))
    }
}

impl InlineWorker {
    /// Takes what packets there are and answers what has ended. If it `may_sleep` and there is
    /// nothing to answer, it sleeps until a disk is done, should one be busy. Returns whether there
    /// was anything to do; an error means that the guest has broken its ring, or that the host's
    /// io_uring failed, and that the worker is to be dropped.
    pub fn turn(&mut self, may_sleep: bool) -> io::Result<bool> {
        self.0.turn(may_sleep).map_err(io::Error::other)
    }
}

impl Device for Controller {
    fn offer(&self) -> OfferParams {
        match self.luns.place {
            Place::Scsi(number) => OfferParams::new(vstor::SCSI_CLASS, scsi_instance(number)),
            Place::Ide { channel, device } => ide_offer(channel, device),
        }
    }

    fn open(&mut self, channel: Channel) -> io::Result<()> {
        let name = format!("{}.{}", self.luns.place, channel.subchannel);
        let (luns, grants, may_spin) = (Arc::clone(&self.luns), self.grants, self.may_spin);
        let (ready, is_ready) = mpsc::sync_channel(1);
        thread::Builder::new().name(name.clone()).spawn(move || {
            match Worker::new(channel, &luns, grants, may_spin) {
                Ok(mut worker) => {
                    let _ = ready.send(Ok(()));
                    match worker.run() {
                        Ok(()) => debug!("{name}: closed"),
                        Err(fault) => {
                            let source = std::error::Error::source(&fault);
                            let why = source.map(|s| format!(": {s}")).unwrap_or_default();
                            // A guest may open channels and break them as long as it likes.
                            limited::warn!("{name}: channel given up: {fault}{why}");
                        }
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("the worker ended at once")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backends::ram::RamDisk;

    #[test]
    fn luns_are_given_out_from_the_lowest() {
        let disk = || Arc::new(RamDisk::new(1 << 20).unwrap()) as Arc<dyn Disk>;
        let mut builder = ControllerBuilder::new(0);
        assert_eq!(builder.attach(None, disk()), Ok(0));
        assert_eq!(builder.attach(Some(1), disk()), Ok(1));
        assert_eq!(builder.attach(Some(1), disk()), Err(AttachError::Taken(1)));
        assert_eq!(builder.attach(None, disk()), Ok(2));
        assert_eq!(builder.attach(Some(64), disk()), Err(AttachError::NoSuchLun(64)));
        for _ in 3..64 {
            builder.attach(None, disk()).unwrap();
        }
        assert_eq!(builder.attach(None, disk()), Err(AttachError::Full));
    }

    #[test]
    fn instances_are_those_of_azure() {
        assert_eq!(scsi_instance(1).to_string(), "f8b3781b-1e82-4818-a1c3-63d806ec15bb");
    }

    #[test]
    fn ide_disks_are_told_by_their_place() {
        let disk = Arc::new(RamDisk::new(1 << 20).unwrap());
        let offer = Controller::ide(1, 0, disk, 1).offer();
        assert_eq!(offer.class, vstor::IDE_CLASS);
        assert_eq!(offer.instance.to_string(), "00000001-0000-8899-0000-000000000000");
        assert_eq!(offer.user_data[..12], [0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    }
}
