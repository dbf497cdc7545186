//! `cargo xtask soak`: hostile guests for hours, each for some minutes and with seeds of its own, and an honest machine
//! beside each.

mod figures;
mod machines;

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};

use crate::workspace;
use machines::Plan;

/// What is to be done.
pub(crate) struct SoakOptions {
    /// For so many hours.
    pub(crate) hours: f64,
    /// The first seed; a new one each time if there is none.
    pub(crate) seed: Option<u64>,
    /// What guests run in.
    pub(crate) partition: String,
    /// Of each hostile guest's life, in minutes.
    pub(crate) minutes: u64,
    /// The program, instead of one that is built.
    pub(crate) partita: Option<PathBuf>,
}

/// Runs machines until the time is over; returns 0 if nothing was wrong.
pub(crate) fn run(options: &SoakOptions) -> Result<u8> {
    if !(options.hours > 0.0 && options.hours <= 10_000.0) {
        bail!("--hours {}: it is a number of hours above 0, such as 0.5", options.hours);
    }
    let partita = match &options.partita {
        Some(program) => program.clone(),
        None => {
            let status =
                workspace::cargo().args(["build", "--release", "--bin", "partita"]).status()?;
            if !status.success() {
                bail!("partita cannot be built");
            }
            workspace::target_dir().join("release/partita")
        }
    };
    let until = Instant::now() + Duration::from_secs_f64(options.hours * 3600.0);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    // Each life's seeds begin at a multiple of a million.
    let mut seed = options.seed.unwrap_or(clock % 1_000_000 * 1_000_000);
    let (mut seeds, mut channels, mut lives, mut faults) = (0, 0, 0, 0);
    while Instant::now() < until {
        let left = until.saturating_duration_since(Instant::now()).as_secs();
        let seconds = (60 * options.minutes).min(left).max(10);
        let (warm_up, hostility) =
            (format!("time={}s", seconds / 4), format!("time={}s", seconds - seconds / 4));
        let plan = Plan {
            partita: &partita,
            partition: &options.partition,
            seed,
            warm_up: &warm_up,
            hostility: &hostility,
        };
        let report = machines::soak(&plan)?;
        println!("seed {seed}: {report}");
        seeds += report.rounds;
        channels += report.channels;
        faults += report.faults.len();
        lives += 1;
        seed = seed.wrapping_add(1_000_000);
    }
    println!("{lives} guests, {seeds} seeds, {channels} channels opened, {faults} faults");
    Ok(u8::from(faults > 0))
}
