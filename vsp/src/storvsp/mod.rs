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
//! each channel takes requests for any LUN and answers its own. Workers share the LUNs, which do
//! not change, and nothing else.

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
use tracing::{debug, warn};
use vmbus::{Guid, vstor};
use vmbus_server::{Channel, Device, OfferParams};

use crate::scsi::{Limits, LogicalUnit};
use handshake::Grants;
use worker::Worker;

pub(crate) use fuzz::fuzz;

/// The longest transfer of one request, in bytes. Guests split what is longer.
const MAX_TRANSFER: u32 = 1 << 20;

/// LUNs on a controller, as on a Hyper-V host.
pub const LUNS: usize = 64;

/// The LUNs of a controller. `None` where no disk is.
pub(crate) struct Luns([Option<Unit>; LUNS]);

/// A disk in its place.
pub(crate) struct Unit {
    pub(crate) scsi: LogicalUnit,
    pub(crate) disk: Arc<dyn Disk>,
}

impl Luns {
    fn empty() -> Self {
        Self([const { None }; LUNS])
    }

    pub(crate) fn get(&self, lun: u8) -> Option<&Unit> {
        self.0.get(usize::from(lun))?.as_ref()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u8, &Unit)> {
        (0u8..).zip(&self.0).filter_map(|(lun, unit)| Some((lun, unit.as_ref()?)))
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
    number: u8,
    luns: Arc<Luns>,
    grants: Grants,
    may_spin: bool,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("number", &self.number).finish_non_exhaustive()
    }
}

/// A controller in the making.
pub struct ControllerBuilder {
    number: u8,
    luns: Luns,
}

impl ControllerBuilder {
    /// Controller `number` of a partition, without disks. Azure's images know the first four by
    /// their instance.
    pub fn new(number: u8) -> Self {
        Self { number, luns: Luns::empty() }
    }

    /// Attaches `disk` at `lun`, or at the lowest free one. Returns where.
    pub fn attach(&mut self, lun: Option<u8>, disk: Arc<dyn Disk>) -> Result<u8, AttachError> {
        let lun = match lun {
            Some(lun) => lun,
            None => (0u8..)
                .zip(&self.luns.0)
                .find_map(|(lun, unit)| unit.is_none().then_some(lun))
                .ok_or(AttachError::Full)?,
        };
        let place = self.luns.0.get_mut(usize::from(lun)).ok_or(AttachError::NoSuchLun(lun))?;
        if place.is_some() {
            return Err(AttachError::Taken(lun));
        }
        let scsi = LogicalUnit::new(&disk.geometry(), &Limits { max_transfer_bytes: MAX_TRANSFER });
        *place = Some(Unit { scsi, disk });
        Ok(lun)
    }

    /// The controller for a partition of `vps` virtual processors, each of which gets a channel.
    pub fn build(self, vps: u32) -> Controller {
        // A worker that spins must not take the processor that its guest runs on.
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Controller {
            number: self.number,
            luns: Arc::new(self.luns),
            grants: Grants {
                max_subchannels: u16::try_from(vps.saturating_sub(1)).unwrap_or(u16::MAX),
                max_transfer: MAX_TRANSFER,
            },
            may_spin: processors > usize::try_from(vps).unwrap_or(usize::MAX),
        }
    }
}

/// The instance of controller `number`: those of Azure, from which its images tell the disks of
/// one controller from another's.
fn instance(number: u8) -> Guid {
    let mut wire = Guid::new("f8b3781a-1e82-4818-a1c3-63d806ec15bb").to_wire();
    // The first byte on the wire is the last of the first group.
    wire[0] = wire[0].wrapping_add(number);
    Guid::from_wire(wire)
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
        OfferParams::new(vstor::SCSI_CLASS, instance(self.number))
    }

    fn open(&mut self, channel: Channel) -> io::Result<()> {
        let name = format!("storvsp{}.{}", self.number, channel.subchannel);
        let (luns, grants, may_spin) = (Arc::clone(&self.luns), self.grants, self.may_spin);
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (number, subchannel) = (self.number, channel.subchannel);
        thread::Builder::new().name(name).spawn(move || {
            match Worker::new(channel, &luns, grants, may_spin) {
                Ok(mut worker) => {
                    let _ = ready.send(Ok(()));
                    match worker.run() {
                        Ok(()) => debug!(controller = number, subchannel, "closed"),
                        Err(fault) => {
                            let source = std::error::Error::source(&fault);
                            let why = source.map(|s| format!(": {s}")).unwrap_or_default();
                            // A guest may open channels and break them as long as it likes.
                            crate::limited!(warn!(
                                "storvsp{number}.{subchannel}: channel given up: {fault}{why}"
                            ));
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
        assert_eq!(instance(1).to_string(), "f8b3781b-1e82-4818-a1c3-63d806ec15bb");
    }
}
