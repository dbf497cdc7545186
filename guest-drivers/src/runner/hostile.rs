//! `hostile`: everything that a guest may do to its devices and should not, drawn from a seed.
//!
//! A *round* has one seed and begins and ends without a connection to the bus: it says hello, draws a
//! number of acts, each of which drives one device wrongly, and takes leave, which the root must
//! answer. The seeds of a run's rounds count up, so that round `n` of a run that began with seed `s`
//! is the first one of `hostile seed=s+n rounds=1`. What the guest does follows from the seed alone but
//! for what time and the root's answers change.
//!
//! Devices are told addresses within the [arena] or where no memory is, so that a root that does as it is
//! told does not hurt the guest, and what goes wrong is the root's fault.
//!
//! - [`chaos`]: the choices.
//! - [`wire`]: messages of the bus; [`channel`]: rings.
//! - [`storage`], [`network`]: what goes through channels.
//! - [`ide`], [`e1000`]: what is behind ports and registers.

mod arena;
mod channel;
mod chaos;
mod e1000;
mod ide;
mod network;
mod storage;
mod wire;

use thiserror::Error;

use super::{RunError, tell};
use crate::json::Object;
use crate::memory::Pages;
use crate::platform::Platform;
use crate::work::Hostile;
use arena::Arena;
use chaos::Chaos;
use wire::{Kind, Wire};

/// How often a run says how far it has come, in nanoseconds.
const PROGRESS: u64 = 1_000_000_000;

/// The root has not done what it must do at last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Silence {
    /// A guest that says hello, or takes leave.
    #[error("the root answers no guest any more")]
    Bus,
    /// Memory of a guest that has taken leave was written to.
    #[error("a device writes to memory that it was to let go of")]
    Memory,
    /// A reset of a channel with drives.
    #[error("IDE channel {0} stays busy after its reset")]
    Ide(u8),
    /// A reset of a NIC.
    #[error("an e1000 does not come out of its reset")]
    E1000,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Messages that were posted, taken or not.
    messages: u64,
    /// How often the root had no room for one.
    full: u64,
    /// Messages of the root.
    answers: u64,
    /// Those that said no.
    refusals: u64,
    /// Channels that were opened.
    channels: u64,
    /// Batches of packets that were published.
    packets: u64,
    /// Accesses to ports and registers.
    accesses: u64,
}

impl Hostile {
    /// Does it, with all of the guest's memory.
    pub(super) fn run<'w, P: Platform>(
        &self,
        platform: &'w P,
        memory: Pages<'w>,
    ) -> Result<Object, RunError> {
        let available = memory.count();
        let arena =
            Arena::new(memory).ok_or(RunError::Memory { needed: arena::NEEDED, available })?;
        arena.prepare(&mut Chaos::new(self.seed));
        let legacy = Legacy { ide: ide::find(platform), nics: e1000::find(platform) };
        let mut wire = Wire::new(platform);
        let started = platform.now();
        let mut told = started;
        let mut rounds = 0;
        while rounds < self.rounds && platform.now().saturating_sub(started) < self.time {
            let seed = self.seed.wrapping_add(rounds);
            let fail = |silence| RunError::Hostile { seed, silence };
            round(&mut wire, &arena, &legacy, seed).map_err(fail)?;
            rounds += 1;
            let now = platform.now();
            if now.saturating_sub(told) >= PROGRESS {
                told = now;
                let progress = Object::default().string("event", "hostile").number("seed", seed);
                tell(platform, progress.number("rounds", rounds));
            }
        }
        let Counts { messages, full, answers, refusals, channels, packets, accesses } = wire.counts;
        Ok(Object::default()
            .string("result", "hostile")
            .number("seed", self.seed)
            .number("rounds", rounds)
            .number("nanoseconds", platform.now().saturating_sub(started))
            .number("channels", channels)
            .number("batches", packets)
            .number("messages", messages)
            .number("full", full)
            .number("answers", answers)
            .number("refusals", refusals)
            .number("accesses", accesses))
    }
}

impl Hostile {
    /// Does nothing for a while.
    pub(super) fn rest<P: Platform>(&self, platform: &P) {
        let until = platform.now().saturating_add(self.rest);
        while platform.now() < until {
            platform.idle();
        }
    }
}

/// What is behind ports and registers.
struct Legacy {
    ide: Option<ide::Controller>,
    nics: e1000::Nics,
}

fn round<'w, P: Platform>(
    wire: &mut Wire<'w, P>,
    arena: &Arena<'w>,
    legacy: &Legacy,
    seed: u64,
) -> Result<(), Silence> {
    let mut chaos = Chaos::new(seed);
    let chaos = &mut chaos;
    wire.contact(chaos);
    for _ in 0..4 + chaos.below(12) {
        arena.litter(chaos);
        match chaos.below(16) {
            0 => {
                wire.contact(chaos);
            }
            1 | 2 => {
                for _ in 0..chaos.below(16) {
                    wire.babble(chaos, arena);
                }
                if chaos.percent(70) {
                    wire.contact(chaos);
                }
            }
            3 | 4 => {
                if let Some(controller) = legacy.ide {
                    ide::visit(wire, chaos, arena, controller);
                }
            }
            5 | 6 => e1000::visit(wire, chaos, arena, &legacy.nics),
            _ => {
                let Some(offer) = wire.any_offer(chaos) else {
                    // Nothing is known of any channel: what was said last was no hello.
                    wire.contact(chaos);
                    continue;
                };
                match offer.kind {
                    Kind::Disks => storage::visit(wire, chaos, arena, offer, 0),
                    Kind::Nic => network::visit(wire, chaos, arena, offer, 0),
                    Kind::Other => {}
                }
            }
        }
    }
    if let Some(controller) = legacy.ide {
        ide::rest(wire, controller)?;
    }
    e1000::rest(wire, &legacy.nics)?;
    wire.leave()?;
    // Everybody has let go of it.
    if chaos.percent(5) {
        let before = arena.sum();
        wire.linger(2_000_000);
        if arena.sum() != before {
            return Err(Silence::Memory);
        }
    }
    Ok(())
}
