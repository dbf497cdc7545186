//! Chores in one command each: `cargo xtask lab`, `demo`, `soak`, `test`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use lab::{Emulator, LabFile, LabOptions};
use soak::SoakOptions;
use test::TestOptions;

mod demo;
mod lab;
mod progress;
mod soak;
mod test;
mod workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Chores of this workspace")]
#[command(after_help = "Example:\n  cargo xtask demo")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    Demo(DemoArgs),
    Soak(SoakArgs),
    Test(TestArgs),
    Lab(LabArgs),
}

/// Run a command beside a real KVM, on any machine
///
/// Starts a Debian Linux under emulation (L1) whose KVM boots unmodified guests (L2), and runs the command there
/// with `partita` on its PATH. In L1: /lab/cloud/vmlinuz and /lab/full/vmlinuz, Debian's kernels, and
/// /lab/new/vmlinuz, its backports' for clouds; /lab/initrd, an initramfs for guests on any of them; `with-script SCRIPT OUT`, which makes one that runs SCRIPT. What the command
/// leaves in /lab/out, and what it changes of the files given, comes back to target/lab/out. The first call brings
/// packages by apt into target/lab, as any user, and installs nothing.
#[derive(Args)]
#[command(after_help = "Example, a guest that lists its disks:
  echo 'wait-for /dev/sda; lsblk' >/tmp/ls.sh
  cargo xtask lab --script /tmp/ls.sh -- sh -c 'truncate -s 64M /tmp/d
    partita run --kernel /lab/cloud/vmlinuz --initrd /lab/initrd --disk path=/tmp/d'")]
struct LabArgs {
    /// Processors of L1
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of L1
    #[arg(long, default_value = "4G")]
    memory: String,
    /// A file or folder for L1, at DEST or /lab/files/NAME; may be repeated
    #[arg(long = "file", value_name = "SRC[:DEST]")]
    files: Vec<LabFile>,
    /// A shell script that every guest on /lab/initrd runs
    #[arg(long, value_name = "F")]
    script: Option<PathBuf>,
    /// Have QEMU in L1 as well
    #[arg(long)]
    peers: bool,
    /// Let L1 use all of the host's cores, for measurements; an emulated machine on more than one now and then
    /// loses an interrupt
    #[arg(long)]
    all_cores: bool,
    /// What runs L1: the QEMU of the distribution's backports, if the host's mirror has it, or its own
    #[arg(long, value_enum, default_value_t = Emulator::Backports)]
    emulator: Emulator,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Take this program along as `partita` instead of building it
    #[arg(long, value_name = "PROGRAM")]
    partita: Option<PathBuf>,
    /// Look for newer packages
    #[arg(long)]
    refresh: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Boot Debian Linux with a disk made for it, and watch it work on the disk
///
/// The guest runs on this host's KVM where that can be a Hyper-V host, and in the lab elsewhere.
/// The disk is a scratch file that goes away with the guest.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask demo")]
struct DemoArgs {
    /// Take the guest to the lab even if this host could run it
    #[arg(long)]
    lab: bool,
}

/// Run all tests: formatting, lints, tests in process, loom, fuzzers, guests in the lab
///
/// The last line counts them: `N passed, N failed, N skipped`. Under CI=true a skip is a failure,
/// but for the fuzzers', who need a nightly toolchain.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask test                 everything
  cargo xtask test --in-process    what needs no guest
  cargo xtask test --lab 01 04     the lab tests with these in their names")]
struct TestArgs {
    /// Only what needs no guest
    #[arg(long, conflicts_with = "lab")]
    in_process: bool,
    /// Only the lab's tests
    #[arg(long)]
    lab: bool,
    /// How long each fuzzer runs; 30 under CI=true and 5 elsewhere, if not given
    #[arg(long, value_name = "SECONDS")]
    fuzz_seconds: Option<u32>,
    /// What runs the lab's machines: the QEMU of the distribution's backports, or its own
    #[arg(long, value_enum, default_value_t = Emulator::Backports)]
    emulator: Emulator,
    /// Let each of the lab's machines use all of the host's cores
    #[arg(long)]
    all_cores: bool,
    /// Only the lab tests with one of these in their names
    #[arg(value_name = "NAME", requires = "lab")]
    names: Vec<String>,
}

/// Have hostile guests do everything wrongly for hours, an honest one beside each
///
/// A hostile guest drives all of its devices wrongly, as the built-in guest's `hostile` does, for some minutes. Beside
/// it a machine works on its own disks and NICs and checks every byte. Each guest is one line: seeds run, channels
/// opened, and the program's threads, descriptors, mappings and memory before and after. What is wrong is said with
/// the work that shows it again.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask soak --hours 1")]
struct SoakArgs {
    /// How long, such as 0.5
    #[arg(long)]
    hours: f64,
    /// The first seed; otherwise others each time
    #[arg(long)]
    seed: Option<u64>,
    /// What guests run in: kvm, hosted or auto
    #[arg(long, default_value = "auto", value_parser = ["kvm", "hosted", "auto"])]
    partition: String,
    /// How many minutes each hostile guest lives
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    minutes: u64,
    /// Take this program instead of building it
    #[arg(long, value_name = "PROGRAM")]
    partita: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Cli::parse().chore) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(chore: Chore) -> Result<u8> {
    match chore {
        Chore::Demo(args) => demo::run(args.lab),
        Chore::Test(args) => test::run(&TestOptions {
            in_process: !args.lab,
            lab: !args.in_process,
            names: args.names,
            fuzz_seconds: args.fuzz_seconds,
            emulator: args.emulator,
            all_cores: args.all_cores,
        }),
        Chore::Soak(args) => soak::run(&SoakOptions {
            hours: args.hours,
            seed: args.seed,
            partition: args.partition,
            minutes: args.minutes,
            partita: args.partita,
        }),
        Chore::Lab(args) => {
            let outcome = lab::run(&LabOptions {
                cpus: args.cpus,
                memory: args.memory,
                files: args.files,
                script: args.script,
                peers: args.peers,
                timeout: Duration::from_secs(args.timeout),
                partita: args.partita,
                all_cores: args.all_cores,
                emulator: args.emulator,
                refresh: args.refresh,
                command: args.command,
            })?;
            if outcome.out_dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
                eprintln!("lab: what the command left is in {}", outcome.out_dir.display());
            }
            Ok(outcome.status)
        }
    }
}
