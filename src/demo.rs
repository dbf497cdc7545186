//! `partita demo`: boots the built-in guest with a scratch disk and four NICs, and says in plain
//! words what happened.
//!
//! What the guest reports comes from its console, a line of JSON each. Each line is stamped with what
//! had been counted when it came, so that the cost of what lies between two of them can be told.

mod report;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use backends::block::Disk;
use backends::file::{FileDisk, OpenOptions};
use backends::paths;
use clap::Args;
use emulators::{Cable, E1000Counters, IdeCounters, IdeDisks};
use hypervisor::kvm::KernelCounters;
use hypervisor::{ExitCounters, StopReason};
use rustix::fs::OFlags;
use vmbus_server::Host;
use vsp::storvsp::ControllerBuilder;

use crate::machine::{Guest, Machine, MachineConfig, PartitionKind};
use crate::network::{self, Plugged};
use crate::options::nic::NicOption;
use crate::options::{IrqchipOption, PartitionOption, SynicOption};
use crate::print;
use report::{Costs, Report, Stamped};

/// The built-in guest at work, and what it took
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  partita demo
  partita demo --json | python3 -m json.tool
  partita demo --partition hosted
  partita demo --keep      # and then look at what the guest wrote")]
pub struct Demo {
    /// One object of JSON instead of words
    #[arg(long)]
    json: bool,
    /// Keep the scratch disk, and say where it is
    #[arg(long)]
    keep: bool,
    /// What the guest runs in: kvm; hosted, which is a process; or auto: KVM where it opens
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    partition: PartitionOption,
}

/// What the guest does. Disk 0 and disk 1 are one, on a synthetic controller and on an IDE channel.
/// NICs 0 and 1 are synthetic, 2 and 3 are not.
const WORK: &str = "identify; verify bytes=16M; \
                    checksum disk=0 bytes=4M; checksum disk=1 transfer=dma bytes=4M; \
                    checksum disk=1 transfer=pio bytes=4M; \
                    bench depth=32 time=120ms; bench time=120ms; \
                    bench disk=1 transfer=dma time=120ms; bench disk=1 transfer=pio time=120ms; \
                    exchange nic=0 peer=1 time=60ms; exchange nic=0 peer=1 depth=1 time=60ms; \
                    exchange nic=2 peer=3 time=60ms; exchange nic=2 peer=3 depth=1 time=60ms; \
                    exchange nic=0 peer=2 time=60ms";

/// The NICs, in the guest's order.
const NICS: [&str; 4] = [
    "attach=netvsc,backend=switch:demo",
    "attach=netvsc,backend=switch:demo",
    "attach=e1000,backend=switch:demo",
    "attach=e1000,backend=switch:demo",
];

/// Bytes of the scratch disk.
const DISK: u64 = 64 << 20;
/// Where Linux has files in memory, usually.
const MEMORY_FILES: &str = "/dev/shm";
/// Bytes of memory.
const MEMORY: u64 = 64 << 20;
/// What of a guest's line is kept, in bytes, and how many of its lines.
const LONGEST_LINE: usize = 4096;
const MOST_LINES: usize = 1000;
/// A guest that takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

impl Demo {
    /// Runs it.
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let started = Instant::now();
        let scratch = Scratch::new(self.keep)?;
        let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(&scratch.path, &OpenOptions::default())?);
        let (place, kept) = (scratch.place(), scratch.kept());
        let report = boot(&disk, self.partition, started)?;
        let text = if self.json {
            report.json(kept.as_deref()) + "\n"
        } else {
            report.words(&place, kept.as_deref())
        };
        print(&text)?;
        if let Some(error) = report.error() {
            bail!("the guest reports: {error}");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Lets the guest work on `disk`. If that is to be in whatever does, and KVM opens but then breaks
/// down, the guest starts anew in a hosted partition.
fn boot(
    disk: &Arc<dyn Disk>,
    partition: PartitionOption,
    started: Instant,
) -> anyhow::Result<Report> {
    match boot_in(disk, partition)? {
        (PartitionKind::Kvm(_), Err(why)) if partition == PartitionOption::Auto => {
            let (_, ended) = boot_in(disk, PartitionOption::Hosted)?;
            let kind = PartitionKind::Hosted { without_kvm: Some(format!("KVM failed; {why}")) };
            Ok(ended.map_err(anyhow::Error::msg)?.report(kind, started))
        }
        (kind, ended) => Ok(ended.map_err(anyhow::Error::msg)?.report(kind, started)),
    }
}

/// What a guest that came to its end has left.
struct Ended {
    lines: Vec<Stamped>,
    status: Option<u32>,
}

impl Ended {
    fn report(self, kind: PartitionKind, started: Instant) -> Report {
        Report::new(kind, self.lines, self.status, started.elapsed())
    }
}

/// Lets the guest work on `disk`. Where it did so, and how it ended; or how the partition failed,
/// which is not the guest's fault.
fn boot_in(
    disk: &Arc<dyn Disk>,
    partition: PartitionOption,
) -> anyhow::Result<(PartitionKind, Result<Ended, String>)> {
    let [ide_path, vmbus_path] = paths::split(disk, "the demo's disk", ["IDE", "the VMBus"]);
    let mut ide = IdeDisks::default();
    ide.attach(None, None, ide_path)?;
    let nics: Result<Vec<NicOption>, _> = NICS.iter().map(|nic| nic.parse()).collect();
    let cables = network::plug(&nics?, &[], 1)?.cables;
    let config = MachineConfig {
        ide,
        nics: cables.iter().filter_map(Plugged::emulated).cloned().collect(),
        prefers_vmbus: false,
        guest: Guest::Builtin { work: WORK.to_owned() },
        memory: MEMORY,
        vps: 1,
        partition,
        synic: SynicOption::Auto,
        irqchip: IrqchipOption::Kernel,
    };
    let lines = Lines::default();
    let mut machine = Machine::new(&config, |_| Ok(Arc::new(lines.clone())))?;
    let kind = machine.kind().clone();
    let mut controller = ControllerBuilder::new(0);
    controller.attach(Some(0), vmbus_path)?;
    let mut devices = vec![Box::new(controller.build(1)) as _];
    let nics = cables.iter().filter_map(Plugged::synthetic);
    devices.extend(nics.map(|nic| Box::new(nic) as _));
    let host = Host::new(machine.memory().clone(), machine.synic(), 1, devices)
        .context("cannot start the VMBus")?;
    let sink = host.sink();
    lines.start(Counting {
        started: Instant::now(),
        exits: machine.exit_counters(),
        kernel: machine.kernel_counters(),
        ide: machine.ide_counters(),
        nics: machine.nic_counters(),
        console: match &kind {
            PartitionKind::Kvm(_) => ConsoleExits::PerByte,
            PartitionKind::Hosted { .. } => ConsoleExits::PerLine,
        },
        host,
    });

    let stop = machine.stop_handle();
    let (ended, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = thread::Builder::new().name("watchdog".into()).spawn(move || {
        if watch.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            stop.stop(StopReason::Stopped);
        }
    })?;
    let reason = machine.run(&sink);
    drop(ended);
    let _ = watchdog.join();
    let status = machine.exit_status();
    drop(machine);
    match reason {
        StopReason::PowerOff => {}
        StopReason::Reset | StopReason::TripleFault => bail!("the built-in guest broke down"),
        StopReason::Stopped => bail!("the guest was not done after {} s", PATIENCE.as_secs()),
        StopReason::Error(what) => return Ok((kind, Err(what))),
    }
    Ok((kind, Ok(Ended { lines: lines.finish(), status })))
}

/// What the guest's console takes of exits. They are left out of account: what is measured are disks
/// and NICs.
#[derive(Clone, Copy, Debug)]
enum ConsoleExits {
    /// A string of port writes is an exit for each.
    PerByte,
    /// It is a message.
    PerLine,
}

/// The guest's console: parts what comes into lines, and stamps each.
#[derive(Clone, Default)]
struct Lines(Arc<LinesShared>);

#[derive(Default)]
struct LinesShared {
    counting: OnceLock<Counting>,
    text: Mutex<Text>,
}

#[derive(Default)]
struct Text {
    /// The line that is not whole yet, or as much of it as is kept.
    part: Vec<u8>,
    lines: Vec<Stamped>,
    /// What came so far.
    bytes: u64,
    newlines: u64,
}

/// Where the counts of a stamp come from.
struct Counting {
    started: Instant,
    exits: Vec<Arc<ExitCounters>>,
    kernel: Vec<Arc<KernelCounters>>,
    ide: Option<IdeCounters>,
    nics: Vec<E1000Counters>,
    console: ConsoleExits,
    host: Host,
}

impl Counting {
    /// What has been counted, after that much of console.
    fn costs(&self, text: &Text) -> Costs {
        let console = match self.console {
            ConsoleExits::PerByte => text.bytes,
            ConsoleExits::PerLine => text.newlines,
        };
        let user: u64 = self.exits.iter().map(|exits| exits.total()).sum();
        let kernel: u64 = self.kernel.iter().filter_map(|kernel| kernel.get("exits")).sum();
        let (mut signals, mut interrupts) = (0, 0);
        for (_, _, counters) in self.host.counters() {
            signals += counters.signals.get();
            interrupts += counters.interrupts.get();
        }
        for (name, count) in self.nics.iter().flat_map(E1000Counters::all) {
            match name {
                "signals" => signals += count,
                "interrupts" => interrupts += count,
                _ => {}
            }
        }
        interrupts +=
            self.ide.iter().flat_map(IdeCounters::get).map(|(_, count)| count).sum::<u64>();
        Costs {
            exits: (!self.kernel.is_empty()).then(|| kernel.saturating_sub(console)),
            user_exits: user.saturating_sub(console),
            signals,
            interrupts,
        }
    }
}

impl Lines {
    fn start(&self, counting: Counting) {
        let _ = self.0.counting.set(counting);
    }

    fn finish(&self) -> Vec<Stamped> {
        std::mem::take(&mut self.0.text.lock().unwrap_or_else(PoisonError::into_inner).lines)
    }
}

impl Cable for Lines {
    fn send(&self, bytes: &[u8]) {
        let mut text = self.0.text.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            text.bytes += 1;
            if byte != b'\n' {
                if text.part.len() < LONGEST_LINE {
                    text.part.push(byte);
                }
                continue;
            }
            text.newlines += 1;
            let line = String::from_utf8_lossy(&text.part).into_owned();
            text.part.clear();
            if let Some(counting) = self.0.counting.get()
                && text.lines.len() < MOST_LINES
            {
                let (after, costs) = (counting.started.elapsed(), counting.costs(&text));
                text.lines.push(Stamped { text: line, after, costs });
            }
        }
    }

    fn receive(&self, _: &mut [u8]) -> usize {
        0
    }
}

/// The scratch disk: a sparse file, in memory where the host has a place for such files. It has a name
/// only if it is to be kept, so that nothing is left of it however the program ends.
struct Scratch {
    /// Where it can be opened.
    path: PathBuf,
    folder: PathBuf,
    keep: bool,
    file: File,
}

impl Scratch {
    fn new(keep: bool) -> anyhow::Result<Self> {
        // What is to be kept is not to fill the host's memory.
        let in_memory = (!keep).then(|| Self::nameless(Path::new(MEMORY_FILES)).ok()).flatten();
        let scratch = match in_memory {
            Some(scratch) => scratch,
            None if keep => Self::named(&std::env::temp_dir())?,
            None => Self::nameless(&std::env::temp_dir())?,
        };
        scratch.file.set_len(DISK).context("cannot give the scratch disk its size")?;
        Ok(scratch)
    }

    fn nameless(folder: &Path) -> anyhow::Result<Self> {
        let nameless = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::TMPFILE.bits().cast_signed())
            .open(folder);
        let file = match nameless {
            Ok(file) => file,
            // Not every file system can.
            Err(_) => {
                let named = Self::named(folder)?;
                let _ = std::fs::remove_file(&named.path);
                named.file
            }
        };
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Ok(Self { path, folder: folder.to_owned(), keep: false, file })
    }

    fn named(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(format!("partita-demo-{}.img", std::process::id()));
        let file = File::create_new(&path)
            .with_context(|| format!("cannot make the scratch disk {}", path.display()))?;
        Ok(Self { path, folder: folder.to_owned(), keep: true, file })
    }

    /// In words, what kind of file it is.
    fn place(&self) -> String {
        let folder = self.folder.display();
        if self.folder.starts_with(MEMORY_FILES) {
            format!("a file in memory ({folder})")
        } else {
            format!("a file in {folder}")
        }
    }

    /// Where it is, if it is kept.
    fn kept(&self) -> Option<PathBuf> {
        self.keep.then(|| self.path.clone())
    }
}
