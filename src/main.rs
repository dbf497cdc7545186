//! The program.

mod boot;
mod machine;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use hypervisor::StopReason;
use hypervisor::synic::{ConnectionId, HvStatus, MessageSink};

use machine::{Machine, MachineConfig};

/// A virtual machine monitor with the device model of a Hyper-V host.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot Linux.
    Run(Run),
}

#[derive(Args)]
struct Run {
    /// The kernel: a bzImage or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial RAM file system
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STRING", default_value = "console=ttyS0 panic=-1")]
    cmdline: String,
    /// Memory: a number with M or G behind it
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    memory: u64,
    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Where the serial port goes: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: String,
    /// Print what was counted when the guest is gone
    #[arg(long)]
    stats: bool,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1_u64 << 30),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1 << 20),
    };
    let number: u64 = digits.parse().map_err(|_| "a size is a number with M or G behind it")?;
    number.checked_mul(unit).ok_or_else(|| "too large".to_owned())
}

/// Takes messages as long as there is no VMBus.
struct NoVmbus;

impl MessageSink for NoVmbus {
    fn post(&self, _: ConnectionId, _: u32, _: &[u8]) -> HvStatus {
        HvStatus::INVALID_CONNECTION_ID
    }
}

fn serial_output(name: &str) -> anyhow::Result<Box<dyn Write + Send>> {
    Ok(match name {
        "stdio" => Box::new(std::io::stdout()),
        "null" => Box::new(std::io::sink()),
        other => match other.strip_prefix("file:") {
            Some(path) => {
                Box::new(File::create(path).with_context(|| format!("cannot create {path}"))?)
            }
            None => bail!("--serial {other}: stdio, null or file:PATH is needed"),
        },
    })
}

fn run(arguments: Run) -> anyhow::Result<()> {
    let config = MachineConfig {
        kernel: arguments.kernel,
        initrd: arguments.initrd,
        command_line: arguments.cmdline,
        memory: arguments.memory,
        vps: arguments.cpus,
    };
    loop {
        let mut machine = Machine::new(&config, serial_output(&arguments.serial)?)?;
        let counters = machine.exit_counters();
        let (ports, mmio) = machine.buses();
        let sink: Arc<dyn MessageSink> = Arc::new(NoVmbus);
        let reason = machine.run(&sink);
        drop(machine);
        if arguments.stats {
            for (index, counters) in counters.iter().enumerate() {
                eprintln!("vp{index}: {counters}");
            }
            eprintln!("unclaimed: {} ports, {} addresses", ports.unclaimed(), mmio.unclaimed());
        }
        match reason {
            StopReason::PowerOff | StopReason::Stopped => return Ok(()),
            StopReason::Reset | StopReason::TripleFault => {}
            StopReason::Error(what) => bail!(what),
        }
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let Command::Run(arguments) = Cli::parse().command;
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("partita: {error:#}");
            ExitCode::FAILURE
        }
    }
}
