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

/// Hears SIGUSR2 from now on, which would end the program otherwise.
pub fn listen() -> anyhow::Result<Signals> {
    Signals::new([SIGUSR2]).context("cannot listen for signals")
}

/// Has each signal look at the disks, for as long as the program runs; one that has come already, too.
pub fn on_signal(mut signals: Signals, disks: Vec<Arc<dyn Disk>>) -> anyhow::Result<()> {
    thread::Builder::new().name("resize".into()).spawn(move || {
        for _ in signals.forever() {
            look_at(disks.iter().map(|disk| &**disk));
        }
    })?;
    Ok(())
}
