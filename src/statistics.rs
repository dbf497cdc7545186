//! `--stats`: what the machine counted, printed when the guest has ended.

use std::sync::Arc;
use std::time::Instant;

use hypervisor::{Bus, ExitCounters};
use vmbus_server::Host;

use crate::machine::Machine;

/// The counters of a machine, which outlive it.
pub struct Statistics {
    exits: Vec<Arc<ExitCounters>>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    started: Instant,
}

impl Statistics {
    /// Those of a machine that is about to run.
    pub fn new(machine: &Machine) -> Self {
        let (ports, mmio) = machine.buses();
        Self { exits: machine.exit_counters(), ports, mmio, started: Instant::now() }
    }

    /// Prints them to standard error.
    pub fn print(&self, host: &Host) {
        eprintln!("ran: {:.3} s", self.started.elapsed().as_secs_f64());
        for (index, exits) in self.exits.iter().enumerate() {
            eprintln!("vp{index} exits to user space: {exits}");
        }
        eprintln!(
            "accesses to nothing: {} ports, {} addresses",
            self.ports.unclaimed(),
            self.mmio.unclaimed()
        );
        for (instance, index, counters) in host.counters() {
            eprintln!(
                "channel {instance}.{index}: {} packets in, {} out, {} enters, {} signals heard, \
                 {} sleeps, {} interrupts, {} merged, {} spared",
                counters.packets_in.get(),
                counters.packets_out.get(),
                counters.enters.get(),
                counters.signals.get(),
                counters.sleeps.get(),
                counters.interrupts.get(),
                counters.interrupts_merged.get(),
                counters.interrupts_spared.get(),
            );
        }
        if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
            let resident = |key: &str| {
                let line = status.lines().find(|line| line.starts_with(key))?;
                line.split_whitespace().nth(1)?.parse::<u64>().ok()
            };
            if let (Some(anonymous), Some(file)) = (resident("RssAnon:"), resident("RssFile:")) {
                eprintln!(
                    "resident beyond guest memory: {anonymous} KiB of its own, {file} KiB of files"
                );
            }
        }
    }
}
