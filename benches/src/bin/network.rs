//! Frames between two NICs without a VM, as a table: netvsc, netvsp, the switch, and back up.
//!
//! Every figure is the median of several runs.

use std::time::{Duration, Instant};

use benches::nics::{self, Threads};
use benches::stats::Runs;
use benches::wire::Wire;
use benches::{pin, processors, thread_time};
use clap::Parser;

/// Measures the network path without a VM: netvsc to netvsc through the switch, in one process.
#[derive(Parser)]
#[command(after_help = "Examples:
  network
  network --seconds 3 --runs 9")]
struct Options {
    /// Seconds of each run.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Runs of which to take the median.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Let the system choose the processors; otherwise, two threads have one each.
    #[arg(long)]
    unpinned: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds from 0.01 to 3600".into()),
    }
}

/// `figure` with its range, in units of `unit`.
fn spread(runs: &Runs, unit: f64) -> String {
    let [median, least, most] = [runs.median(), runs.least(), runs.most()].map(|f| f / unit);
    format!("{median:.2} ({least:.2} to {most:.2})")
}

/// Frames a second, where `pass` passes some and says how long that took.
fn rate(time: Duration, pass: impl Fn(u64) -> Duration) -> f64 {
    const FRAMES: u64 = 100_000;
    let (started, mut frames, mut passed) = (Instant::now(), 0, Duration::ZERO);
    while started.elapsed() < time {
        passed += pass(FRAMES);
        frames += FRAMES;
    }
    frames as f64 / passed.as_secs_f64()
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let time = Duration::from_secs_f64(options.seconds);
    let cpus = processors();
    let own = (!options.unpinned).then_some(&cpus);
    println!(
        "millions of frames a second: median (range) of {} runs\n\
         one thread: all take turns; by the thread's own time\n\
         two threads: a guest and its worker in each, and both spin; wall time\n\
         four threads: one for each, who sleep and wake each other; wall time",
        options.runs
    );
    println!(
        "\n{:<10} {:<8} {:>22} {:>22} {:>22} {:>14} {:>17}",
        "",
        "frame",
        "one thread",
        "two threads",
        "four threads",
        "signals/frame",
        "interrupts/frame"
    );
    for len in [64, 1500] {
        let wire = Wire::new(len);
        let (mut one, mut two) = (Runs::new(), Runs::new());
        for _ in 0..options.runs {
            one.push(rate(time, |frames| {
                let before = thread_time();
                wire.one_thread(frames);
                thread_time().saturating_sub(before)
            }));
            two.push(rate(time, |frames| {
                wire.two_threads(frames, |cpu| pin(&cpus, own.map(|_| cpu)))
            }));
            pin(&cpus, None);
        }
        let (one, two) = (spread(&one, 1e6), spread(&two, 1e6));
        println!("{:<10} {:<8} {one:>22} {two:>22} {:>22}", "switch", format!("{len} B"), "-");
    }
    for len in [64, 1500] {
        let [mut one, mut two, mut four, mut signals, mut interrupts] = [const { Runs::new() }; 5];
        for _ in 0..options.runs {
            one.push(1e9 / nics::pass(Threads::One, len, time, None)?.cpu_nanoseconds());
            two.push(nics::pass(Threads::Two, len, time, own)?.rate());
            let sample = nics::pass(Threads::Four, len, time, None)?;
            four.push(sample.rate());
            signals.push(sample.signals as f64 / sample.frames.max(1) as f64);
            interrupts.push(sample.interrupts as f64 / sample.frames.max(1) as f64);
        }
        println!(
            "{:<10} {:<8} {:>22} {:>22} {:>22} {:>14.4} {:>17.4}",
            "netvsc",
            format!("{len} B"),
            spread(&one, 1e6),
            spread(&two, 1e6),
            spread(&four, 1e6),
            signals.median(),
            interrupts.median(),
        );
    }
    Ok(())
}
