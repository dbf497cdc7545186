//! What the synthetic devices cost, measured without a VM: a guest's client and the root's service
//! provider in one process, over the same rings, at the host's native speed.
//!
//! - [`ring`]: packets a second through one ring.
//! - [`rig`]: storvsc against storvsp over any disk; a worker thread on one side, the caller on the
//!   other.
//! - [`wire`]: frames from one port of the virtual switch to another.
//! - [`nics`]: the same from one netvsc to another, each with its netvsp.
//! - [`fio`]: the same reads by fio, for comparison.
//!
//! `cargo bench -p benches` runs the small ones under criterion; the programs `storage` and
//! `network` do the long ones and print tables. Figures of one machine and one run compare; others do not.

pub mod fio;
pub mod nics;
pub mod rig;
pub mod ring;
pub mod stats;
pub mod wire;

use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Has this thread, and those it starts from now on, run on processor `cpu` only, counted from 0
/// among those that are allowed; any of them if `None`. Does nothing where there is but one.
pub fn pin(allowed: &CpuSet, cpu: Option<usize>) {
    let mut wanted = *allowed;
    if let Some(index) = cpu {
        let mut present = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        if let Some(cpu) = present.nth(index) {
            wanted = CpuSet::new();
            wanted.set(cpu);
        }
    }
    // Without it, figures are noisier; that is all.
    let _ = sched_setaffinity(None, &wanted);
}

/// The processors this process may use.
pub fn processors() -> CpuSet {
    sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new())
}

/// How long the calling thread has run: where one thread does all the work, this is what the work
/// costs, however busy the machine.
pub fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// How much longer a measurement goes on if nothing has come: on a busy machine a peer may have to wait for its
/// processor longer than the whole of it takes.
pub const GRACE: Duration = Duration::from_secs(30);

/// What a thread does that spins and found nothing to do: after some times it lets others run, as on a
/// busy machine the one it waits for may be among them.
#[derive(Debug, Default)]
pub struct Idle(u32);

impl Idle {
    /// There was nothing.
    pub fn nothing(&mut self) {
        self.0 += 1;
        if self.0 < 200 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }

    /// There was something.
    pub fn something(&mut self) {
        self.0 = 0;
    }
}
