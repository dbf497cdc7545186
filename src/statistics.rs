//! What a machine has counted: printed with `--stats` when the guest has ended, and at any time on
//! SIGUSR1.

use std::sync::Arc;
use std::time::Instant;

use backends::net::switch::Switch;
use emulators::{E1000Counters, IdeCounters, InterruptChips};
use hypervisor::kvm::KernelCounters;
use hypervisor::{Bus, ExitCounters};
use vmbus_server::Host;
use vsp::netvsp::NicCounters;

use crate::machine::Machine;

/// The counters of a machine and of its bus.
pub struct Statistics {
    host: Host,
    exits: Vec<Arc<ExitCounters>>,
    kernel: Vec<Arc<KernelCounters>>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    chips: Option<Arc<InterruptChips>>,
    ide: Option<IdeCounters>,
    nics: Vec<NicStatistics>,
    switches: Vec<Switch>,
    started: Instant,
}

/// What a NIC counts.
pub enum NicStatistics {
    /// A synthetic one, by channel.
    Synthetic(Arc<[NicCounters]>),
    /// An emulated one.
    Emulated(E1000Counters),
}

impl Statistics {
    /// Those of a machine that is about to run, with its bus, its NICs and the switches they are on.
    pub fn new(
        machine: &Machine,
        host: Host,
        nics: Vec<NicStatistics>,
        switches: Vec<Switch>,
    ) -> Self {
        let (ports, mmio) = machine.buses();
        Self {
            host,
            exits: machine.exit_counters(),
            kernel: machine.kernel_counters(),
            ports,
            mmio,
            chips: machine.interrupt_chips(),
            ide: machine.ide_counters(),
            nics,
            switches,
            started: Instant::now(),
        }
    }

    /// Prints them to standard error, a line for each thing that counts.
    pub fn print(&self) {
        let mut report = format!("stats: after {:.3} s\n", self.started.elapsed().as_secs_f64());
        for (index, exits) in self.exits.iter().enumerate() {
            report += &format!("stats: vp{index} exits to user space: {exits}\n");
        }
        for (index, kernel) in self.kernel.iter().enumerate() {
            report += &format!("stats: vp{index} in the kernel: {kernel}\n");
        }
        let (ports, mmio) = (self.ports.unclaimed(), self.mmio.unclaimed());
        report += &format!("stats: accesses to nothing: {ports} ports, {mmio} addresses\n");
        report += &match self.chips.as_deref().map(InterruptChips::counts) {
            None => "stats: interrupt controllers: in the kernel\n".to_owned(),
            Some((messages, taken)) => format!(
                "stats: interrupt controllers: in user space, {messages} messages of the I/O APIC, \
                 {taken} interrupts of the PICs\n"
            ),
        };
        for (channel, (requests, interrupts)) in
            self.ide.iter().flat_map(|ide| ide.get().into_iter().enumerate())
        {
            report += &format!(
                "stats: IDE channel {channel}: requests {requests}, interrupts {interrupts}\n"
            );
        }
        for (instance, index, counters) in self.host.counters() {
            let values = [
                ("packets_in", &counters.packets_in),
                ("packets_out", &counters.packets_out),
                ("enters", &counters.enters),
                ("signals", &counters.signals),
                ("sleeps", &counters.sleeps),
                ("interrupts", &counters.interrupts),
                ("interrupts_merged", &counters.interrupts_merged),
                ("interrupts_spared", &counters.interrupts_spared),
            ];
            let values = values.map(|(name, counter)| format!("{name} {}", counter.get()));
            report += &format!("stats: channel {instance}.{index}: {}\n", values.join(", "));
        }
        let list = |values: &[(&str, u64)]| {
            let values = values.iter().map(|(name, value)| format!("{name} {value}"));
            values.collect::<Vec<_>>().join(", ")
        };
        for (number, nic) in self.nics.iter().enumerate() {
            let channels: Vec<_> = match nic {
                NicStatistics::Synthetic(channels) => {
                    channels.iter().map(|counters| list(&counters.all())).collect()
                }
                NicStatistics::Emulated(counters) => vec![list(&counters.all())],
            };
            for (index, values) in channels.into_iter().enumerate() {
                report += &format!("stats: nic{number}.{index}: {values}\n");
            }
        }
        for switch in &self.switches {
            for (port, counters) in switch.statistics() {
                let values = [
                    ("sent", counters.sent),
                    ("sent bytes", counters.sent_bytes),
                    ("send drops", counters.send_drops),
                    ("received", counters.received),
                    ("received bytes", counters.received_bytes),
                    ("receive drops", counters.receive_drops),
                ];
                let (name, values) = (switch.name(), list(&values));
                report += &format!("stats: switch {name} port {port}: {values}\n");
            }
        }
        if let Some((own, files)) = resident() {
            report += &format!(
                "stats: resident beyond guest memory: {own} KiB of its own, {files} KiB of files\n"
            );
        }
        crate::log::write(&report);
    }
}

/// KiB of anonymous memory and of mapped files that the process has in RAM. Guest memory is
/// neither, but shared.
fn resident() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |key: &str| -> Option<u64> {
        let line = status.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some((field("RssAnon:")?, field("RssFile:")?))
}
