//! Disks whose size changes while a machine runs.
//!
//! A guest that looks for its disks finds out by itself. For the others there is SIGUSR2: all disks are
//! looked at, and each guest is told by its next command.

use std::sync::Arc;
use std::thread;

use anyhow::Context;
use backends::block::Disk;
use signal_hook::consts::SIGUSR2;
use signal_hook::iterator::Signals;

/// Looks at the disks' sizes anew.
pub fn look_at<'d>(disks: impl Iterator<Item = &'d dyn Disk>) {
    for disk in disks {
        if let Err(error) = disk.refresh() {
            tracing::warn!("cannot learn a disk's size: {error}");
        }
    }
}

/// From now on a SIGUSR2 has the disks looked at, for as long as the program runs.
pub fn on_signal(disks: Vec<Arc<dyn Disk>>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGUSR2]).context("cannot listen for signals")?;
    thread::Builder::new().name("resize".into()).spawn(move || {
        for _ in signals.forever() {
            look_at(disks.iter().map(|disk| &**disk));
        }
    })?;
    Ok(())
}
