//! What the limits of a process (`getrlimit(2)`, the shell's `ulimit`) do to a run.
//!
//! The one for the size of files comes with a signal that ends a process, SIGXFSZ. That must not be
//! a guest's end whose image is longer: the write fails all the same, and is told to the guest as a
//! full disk is. Descriptors are counted beforehand, since a guest opens its channels when it likes,
//! and would miss a disk then without a word to the user. The same goes for the locked memory that
//! some kernels count io_uring's rings as.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, anyhow, bail};
use backends::uring::Uring;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::SIGXFSZ;

use crate::advice;

/// Entries of a ring such as workers have.
const RING: u32 = 256;

/// Has writes beyond the limit for file sizes fail, and do no more than that. A handler that does
/// nothing, and not the kernel's own ignoring: programs that are started inherit the latter.
pub fn outlive_file_size_limit() -> anyhow::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))
        .context("cannot set the limit for file sizes' signal aside")?;
    Ok(())
}

/// How many descriptors a machine may come to have open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptors {
    /// Virtual processors.
    pub vps: u64,
    /// Disks and CD-ROMs.
    pub disks: u64,
    /// Channels of synthetic devices, sub-channels included.
    pub channels: u64,
    /// Queues of NICs and uplinks, each of which may have a tap's.
    pub queues: u64,
}

impl Descriptors {
    /// What a process has, a partition and its legacy devices, which are some 20, and what comes and
    /// goes.
    const BASE: u64 = 32;

    /// Somewhat more of each than was counted: 4, 3, 3 and 2.
    fn count(self) -> u64 {
        Self::BASE + 5 * self.vps + 4 * self.disks + 4 * self.channels + 3 * self.queues
    }

    /// Whether anything works by io_uring.
    pub fn needs_io_uring(self) -> bool {
        self.disks > 0 || self.queues > 0
    }

    /// Sees to it that so many can be opened: raises the soft limit as far as that takes.
    pub fn make_room(self) -> anyhow::Result<()> {
        let limit = getrlimit(Resource::Nofile);
        if let Some(raised) = raised(limit, self.count())? {
            setrlimit(Resource::Nofile, raised).context("cannot raise the limit of open files")?;
        }
        Ok(())
    }
}

/// Makes a ring as a disk's worker does, so that it is known before the guest runs if there are none.
pub fn try_io_uring() -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Memlock);
    if limit.current != limit.maximum {
        // What is not to be had shows below.
        let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
    }
    match Uring::new(RING) {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(anyhow!("cannot set up io_uring: {error}; {}", advice::on_io_uring(&error)))
        }
    }
}

/// The limits with which `needed` descriptors can be opened, if these have to change for it.
fn raised(limit: Rlimit, needed: u64) -> anyhow::Result<Option<Rlimit>> {
    if let Some(most) = limit.maximum
        && most < needed
    {
        bail!(
            "the limit of open files is {most}, and this machine may open {needed}; \
             raise it (ulimit -Hn {needed}, systemd's LimitNOFILE=) or give it fewer devices"
        );
    }
    let enough = limit.current.is_none_or(|current| current >= needed);
    Ok((!enough).then_some(Rlimit { current: Some(needed), ..limit }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_as_far_as_needed_and_the_hard_one_is_kept() {
        let limits = |current, maximum| Rlimit { current, maximum };
        let raised = |current, maximum| raised(limits(current, maximum), 100);
        assert_eq!(raised(Some(100), Some(200)).unwrap(), None);
        assert_eq!(raised(None, None).unwrap(), None);
        assert_eq!(raised(Some(99), Some(200)).unwrap(), Some(limits(Some(100), Some(200))));
        assert_eq!(raised(Some(50), Some(100)).unwrap(), Some(limits(Some(100), Some(100))));
        assert_eq!(raised(Some(50), None).unwrap(), Some(limits(Some(100), None)));
        let refused = raised(Some(50), Some(99)).unwrap_err().to_string();
        assert!(
            refused.starts_with(
                "the limit of open files is 99, and this machine may open 100; raise it"
            ),
            "{refused}"
        );
    }
}
