//! Throughput runs of the storage path without a VM, as tables.
//!
//! Every figure is the median of several runs; in the comparison with fio, the two take turns, so
//! that both see the same machine.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use backends::file::{Direct, FileDisk, OpenOptions};
use backends::ram::RamDisk;
use benches::rig::{Order, Reads, Rig, Waiting};
use benches::stats::Runs;
use benches::{fio, pin, processors, ring};
use clap::{Parser, ValueEnum};
use rustix::thread::CpuSet;
use tempfile::NamedTempFile;

/// Measures the storage path without a VM: storvsc and storvsp in one process.
#[derive(Parser)]
#[command(after_help = "Examples:
  storage
  storage ring ram --runs 9
  storage tmpfs disk --seconds 3 --disk /var/tmp
  storage disk --only '4k random QD32' --runs 15")]
struct Options {
    /// What to measure; all if none is named.
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Seconds of each run.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Runs of which to take the median.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// MiB in the files that are read.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// A folder on a tmpfs.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// A folder on a disk.
    #[arg(long, default_value = ".")]
    disk: PathBuf,
    /// Of the reads of files, only those whose name contains this, such as QD32.
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Let the system choose the processors; otherwise, the client and the worker have one each.
    #[arg(long)]
    unpinned: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds from 0.01 to 3600".into()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Packets through one ring.
    Ring,
    /// Reads of a disk in memory.
    Ram,
    /// Reads of a file on a tmpfs, beside fio.
    Tmpfs,
    /// Reads of a file on a disk, beside fio.
    Disk,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let parts = if options.parts.is_empty() { Part::value_variants() } else { &options.parts };
    for part in parts {
        match part {
            Part::Ring => rings(&options),
            Part::Ram => ram(&options)?,
            Part::Tmpfs => file("tmpfs", &options.tmpfs, &options)?,
            Part::Disk => file("disk", &options.disk, &options)?,
        }
    }
    Ok(())
}

fn time(options: &Options) -> Duration {
    Duration::from_secs_f64(options.seconds)
}

/// `figure` with its range, in units of `unit`.
fn spread(runs: &Runs, unit: f64, digits: usize) -> String {
    let [median, least, most] = [runs.median(), runs.least(), runs.most()].map(|f| f / unit);
    format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
}

fn rings(options: &Options) {
    println!("\nring, millions of packets a second: median (range) of {} runs", options.runs);
    println!("{:<10} {:<12} {:>26} {:>26}", "payload", "data area", "two cores", "one core");
    let cpus = processors();
    for payload in [64, 4096] {
        for pages in [31, 256] {
            let (mut two, mut one) = (Runs::default(), Runs::default());
            for _ in 0..options.runs {
                two.push(ring::two_threads(pages, payload, time(options), &cpus));
                one.push(ring::one_thread(pages, payload, time(options)));
            }
            println!(
                "{:<10} {:<12} {:>26} {:>26}",
                format!("{payload} B"),
                format!("{} KiB", pages * 4),
                spread(&two, 1e6, 2),
                spread(&one, 1e6, 2),
            );
        }
    }
}

/// The processors of which client and worker have one each, if they are to.
fn own<'a>(cpus: &'a CpuSet, options: &Options) -> Option<&'a CpuSet> {
    (!options.unpinned).then_some(cpus)
}

fn ram(options: &Options) -> anyhow::Result<()> {
    println!(
        "\nRAM disk, nanoseconds a read: median (range) of {} runs\n\
         one thread: client and worker take turns; the thread's own time\n\
         client spins, client sleeps: worker on a core of its own; wall time",
        options.runs
    );
    println!(
        "{:<8} {:<8} {:>24} {:>24} {:>24} {:>12}",
        "block", "batch", "one thread", "client spins", "client sleeps", "signals/read"
    );
    let cpus = processors();
    let mut inline = Rig::inline(Arc::new(RamDisk::new(64 << 20)?))?;
    let mut rig = Rig::new(Arc::new(RamDisk::new(64 << 20)?), own(&cpus, options))?;
    for block in [512, 4096] {
        for depth in [1, 4, 16] {
            let [mut alone, mut spins, mut sleeps, mut signals] = [const { Runs::new() }; 4];
            for _ in 0..options.runs {
                let order = Order::Random;
                let reads = |waiting| Reads { block, depth, order, waiting, batches: true };
                let sample = inline.read(&reads(Waiting::Spin), time(options), u64::MAX)?;
                alone.push(sample.cpu_nanoseconds());
                let sample = rig.read(&reads(Waiting::Spin), time(options), u64::MAX)?;
                spins.push(sample.nanoseconds());
                signals.push(sample.signals as f64 / sample.reads as f64);
                let sample = rig.read(&reads(Waiting::Sleep), time(options), u64::MAX)?;
                sleeps.push(sample.nanoseconds());
            }
            println!(
                "{:<8} {:<8} {:>24} {:>24} {:>24} {:>12.3}",
                format!("{block} B"),
                depth,
                spread(&alone, 1.0, 0),
                spread(&spins, 1.0, 0),
                spread(&sleeps, 1.0, 0),
                signals.median(),
            );
        }
    }
    drop(rig);
    pin(&cpus, None);
    Ok(())
}

/// A file of random bytes in `folder`, all of them on the medium.
fn fill(folder: &Path, mib: u64) -> anyhow::Result<NamedTempFile> {
    let mut file = NamedTempFile::new_in(folder)
        .with_context(|| format!("cannot make a file in {}", folder.display()))?;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut chunk = vec![0; 1 << 20];
    for _ in 0..mib {
        for word in chunk.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&chunk)?;
    }
    file.as_file().sync_all()?;
    Ok(file)
}

fn file(name: &str, folder: &Path, options: &Options) -> anyhow::Result<()> {
    let image = fill(folder, options.size)?;
    let open = |direct| {
        FileDisk::open(
            image.path(),
            &OpenOptions { read_only: true, direct, lock: false, ..OpenOptions::default() },
        )
    };
    let direct = open(Direct::Auto)?.is_direct();
    println!(
        "\n{name}, file of {} MiB in {}, {}; reads a second: median (range) of {} runs",
        options.size,
        folder.display(),
        if direct { "direct" } else { "through the page cache" },
        options.runs
    );
    let fio = fio::version();
    match &fio {
        Some(version) => println!("beside {version} with io_uring, in turns, on the same file"),
        None => println!("fio is not installed: no comparison"),
    }
    println!(
        "{:<20} {:>25} {:>25} {:>25} {:>25} {:>19}",
        "", "one thread", "client spins", "client sleeps", "fio", "of fio's"
    );
    let cpus = processors();
    for (label, block, depth, order) in [
        ("4k random QD1", 4 << 10, 1, Order::Random),
        ("4k random QD32", 4 << 10, 32, Order::Random),
        ("128k sequential QD1", 128 << 10, 1, Order::Sequential),
        ("128k sequential QD8", 128 << 10, 8, Order::Sequential),
        ("128k sequential QD32", 128 << 10, 32, Order::Sequential),
    ] {
        if options.only.as_ref().is_some_and(|word| !label.contains(word.as_str())) {
            continue;
        }
        let reads = |waiting| Reads { block, depth, order, waiting, batches: false };
        let [mut alone, mut spins, mut sleeps, mut peer] = [const { Runs::new() }; 4];
        for _ in 0..options.runs {
            for (runs, inline, waiting) in [
                (&mut alone, true, Waiting::Sleep),
                (&mut spins, false, Waiting::Spin),
                (&mut sleeps, false, Waiting::Sleep),
            ] {
                let disk = Arc::new(open(Direct::Auto)?);
                let mut rig = match inline {
                    true => Rig::inline(disk)?,
                    false => Rig::new(disk, own(&cpus, options))?,
                };
                rig.read(&reads(waiting), time(options) / 10, u64::MAX)?;
                runs.push(rig.read(&reads(waiting), time(options), u64::MAX)?.rate());
                drop(rig);
                pin(&cpus, None);
            }
            if fio.is_some() {
                let reads = reads(Waiting::Sleep);
                peer.push(fio::read(image.path(), &reads, time(options), direct)?);
            }
        }
        let ratio = |runs: &Runs| match peer.median() {
            peer if peer > 0.0 => format!("{:.0} %", runs.median() / peer * 100.0),
            _ => "-".into(),
        };
        println!(
            "{label:<20} {:>25} {:>25} {:>25} {:>25} {:>19}",
            spread(&alone, 1.0, 0),
            spread(&spins, 1.0, 0),
            spread(&sleeps, 1.0, 0),
            spread(&peer, 1.0, 0),
            [&alone, &spins, &sleeps].map(ratio).join(" "),
        );
    }
    Ok(())
}
