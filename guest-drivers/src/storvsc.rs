//! Disks of synthetic SCSI controllers, by [`vsc::storvsc`].

use vmbus::mapped::SingleMapped;
use vmbus::vstor::DataDirection;
use vsc::Signal;
use vsc::storvsc::{Agreement, Command, Disk, IdentifyError, PageList, Pages as PageView, words};
use vsc::storvsc::{Fault, Queue, Scratch};

use crate::block::{
    BlockCounters, BlockDriver, BlockError, Completion, Identity, MAX_DEPTH, Name, Operation,
    Request,
};
use crate::boot::MAX_VPS;
use crate::bus::{OpenRings, waiting};
use crate::memory::{PAGE, Pages};
use crate::platform::{Calls, Platform};

/// Pages of a controller's channel, both rings together: 32 each, as Linux's storvsc has.
pub const RING_PAGES: usize = 64;

/// Logical units that a controller may have here.
pub const LUNS: usize = 64;

/// Pages of the longest transfer.
const TRANSFER_PAGES: usize = 32;

type ScsiQueue<'w, P> = Queue<SingleMapped<'w>, Signal<Calls<'w, P>>, { MAX_DEPTH as usize }>;

/// A controller, its channel open.
pub struct Controller<'w, P: Platform> {
    platform: &'w P,
    index: u8,
    queue: ScsiQueue<'w, P>,
    agreement: Agreement,
    /// Its sub-channels, in order: for the second processor, the third, and so on.
    sides: [Option<OpenRings<'w>>; MAX_VPS - 1],
    scratch: ScratchPage<'w>,
}

/// The page into which small answers come.
struct ScratchPage<'w> {
    page: Pages<'w>,
    list: PageList<{ words(1) }>,
}

impl Scratch for ScratchPage<'_> {
    fn pages(&mut self, len: u32) -> Option<PageView<'_>> {
        self.list.resize(len).then(|| self.list.pages())
    }

    fn read(&self, bytes: &mut [u8]) {
        self.page.read(bytes);
    }
}

impl<'w, P: Platform> Controller<'w, P> {
    /// Takes the controller whose channel was opened into use, and asks for a sub-channel for each
    /// other processor. It needs a page, the first of `memory`.
    pub fn connect(
        platform: &'w P,
        index: u8,
        rings: OpenRings<'w>,
        memory: &mut Pages<'w>,
    ) -> Result<Self, BlockError> {
        let others = platform.processors().saturating_sub(1).min(MAX_VPS - 1) as u16;
        let channel = rings.channel(platform).map_err(Fault::from)?;
        let page = memory.take(1).ok_or(BlockError::Request)?;
        let list = PageList::new(PAGE as u32, 0, page.numbers()).ok_or(BlockError::Request)?;
        let (queue, agreement) = Queue::connect(channel, others, waiting(platform))?;
        Ok(Self {
            platform,
            index,
            queue,
            agreement,
            sides: [None; MAX_VPS - 1],
            scratch: ScratchPage { page, list },
        })
    }

    /// How many sub-channels are being offered.
    pub fn subchannels(&self) -> u16 {
        self.agreement.subchannels
    }

    /// Has sub-channel `number`, from 1 on, for the processor of that number.
    pub fn add_subchannel(&mut self, number: u16, rings: OpenRings<'w>) {
        let place = usize::from(number).checked_sub(1).and_then(|index| self.sides.get_mut(index));
        if let Some(place) = place {
            *place = Some(rings);
        }
    }

    /// Which units are there, by REPORT LUNS: bit `n` for unit `n`.
    pub fn units(&mut self) -> Result<u64, BlockError> {
        const LEN: usize = 8 + 8 * LUNS;
        let [a, b, c, d] = (LEN as u32).to_be_bytes();
        let cdb = [0xa0, 0, 0, 0, 0, 0, a, b, c, d, 0, 0];
        let command = Command::new(0, &cdb, DataDirection::Read).ok_or(BlockError::Request)?;
        let data = self.scratch.pages(LEN as u32).ok_or(BlockError::Request)?;
        let outcome = self.queue.run(&command, Some(data), waiting(self.platform))?;
        let Ok(len) = outcome else {
            return Ok(1); // a controller that does not know the command; unit 0 is there if any is
        };
        let mut answer = [0; LEN];
        self.scratch.read(&mut answer);
        let answer = answer.get(..usize::try_from(len).unwrap_or(LEN)).unwrap_or(&answer);
        let mut units = 0;
        if let Some(([a, b, c, d, ..], list)) = answer.split_first_chunk::<8>() {
            let listed = u32::from_be_bytes([*a, *b, *c, *d]) as usize / 8;
            for entry in list.chunks_exact(8).take(listed) {
                // Peripheral device addressing, single level (SAM-5, 4.7).
                if let [0, unit, ..] = entry
                    && usize::from(*unit) < LUNS
                {
                    units |= 1 << unit;
                }
            }
        }
        Ok(units)
    }

    /// The disk at `lun`; `None` if there is none.
    pub fn disk(&mut self, lun: u8) -> Result<Option<StorvscDisk<'_, 'w, P>>, BlockError> {
        let waiting = waiting(self.platform);
        let disk = match Disk::identify(&mut self.queue, lun, &mut self.scratch, waiting) {
            Ok(Some(disk)) => disk,
            Ok(None) | Err(IdentifyError::NotADisk(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let identity = Identity {
            driver: "storvsc",
            controller: self.index,
            lun,
            vendor: Name(disk.vendor),
            product: Name(disk.product),
            block_size: disk.block_size,
            physical_block_size: disk.physical_block_size,
            blocks: disk.blocks,
            max_transfer: self.agreement.max_transfer.min((TRANSFER_PAGES * PAGE) as u32),
            max_depth: MAX_DEPTH,
        };
        self.queue.wake();
        let sides = SideChannels {
            rings: self.sides,
            agreement: Some(self.agreement),
            identity: Some(identity),
        };
        let Self { platform, queue, .. } = self;
        Ok(Some(StorvscDisk { platform: *platform, queue, identity, sides }))
    }
}

/// The channels by which processors other than the first reach a disk.
#[derive(Clone, Copy, Debug)]
pub struct SideChannels<'w> {
    rings: [Option<OpenRings<'w>>; MAX_VPS - 1],
    agreement: Option<Agreement>,
    identity: Option<Identity>,
}

impl<'w> SideChannels<'w> {
    /// Of a disk that only the first processor reaches.
    pub const NONE: Self = Self { rings: [None; MAX_VPS - 1], agreement: None, identity: None };

    /// For how many processors there is one.
    pub fn count(&self) -> usize {
        self.rings.iter().map_while(Option::as_ref).count()
    }

    /// Lets `work` have the disk on processor `index`, which this is and whose `platform` it is.
    pub fn with_disk<P: Platform, R>(
        self,
        index: usize,
        platform: &'w P,
        work: impl FnOnce(&mut dyn BlockDriver<'w>) -> R,
    ) -> Result<R, BlockError> {
        let rings = index.checked_sub(1).and_then(|index| self.rings.get(index).copied().flatten());
        let (Some(rings), Some(agreement), Some(identity)) = (rings, self.agreement, self.identity)
        else {
            return Err(BlockError::Request);
        };
        let channel = rings.channel(platform).map_err(Fault::from)?;
        let mut queue = ScsiQueue::subchannel(channel, &agreement);
        queue.wake();
        Ok(work(&mut StorvscDisk { platform, queue: &mut queue, identity, sides: Self::NONE }))
    }
}

/// A disk of a controller, in use by one processor.
pub struct StorvscDisk<'c, 'w, P: Platform> {
    platform: &'w P,
    queue: &'c mut ScsiQueue<'w, P>,
    identity: Identity,
    sides: SideChannels<'w>,
}

impl<'w, P: Platform> BlockDriver<'w> for StorvscDisk<'_, 'w, P> {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn submit(&mut self, request: &Request<'w>) -> Result<(), BlockError> {
        let Request { slot, operation, block, blocks, data } = *request;
        let (lun, queue) = (self.identity.lun, &mut *self.queue);
        let command = match operation {
            Operation::Read => Command::read(lun, block, blocks),
            Operation::Write => Command::write(lun, block, blocks),
            Operation::Flush => return Ok(queue.submit(slot, &Command::flush(lun), None)?),
        };
        let len = blocks.checked_mul(self.identity.block_size).ok_or(BlockError::Request)?;
        let pages = data.ok_or(BlockError::Request)?.numbers();
        let used = (len as usize).div_ceil(PAGE);
        let list = PageList::<{ words(TRANSFER_PAGES) }>::new(len, 0, pages.take(used));
        let list = list.ok_or(BlockError::Request)?;
        Ok(queue.submit(slot, &command, Some(list.pages()))?)
    }

    fn publish(&mut self) {
        self.queue.publish();
    }

    fn poll(&mut self, ended: &mut dyn FnMut(Completion)) -> Result<usize, BlockError> {
        if !self.queue.has_data() {
            return Ok(0);
        }
        let count = self.queue.poll(|completion| {
            ended(Completion {
                slot: completion.slot,
                outcome: completion.outcome.map_err(Into::into),
            });
        })?;
        Ok(count)
    }

    fn sleep(&mut self) {
        if self.queue.rest() {
            self.platform.idle();
        }
        self.queue.wake();
    }

    fn counters(&self) -> BlockCounters {
        let counters = self.queue.counters();
        BlockCounters { signals: counters.signals, signals_spared: counters.signals_spared }
    }

    fn sides(&self) -> SideChannels<'w> {
        self.sides
    }
}
