//! Each fuzzer for a while, as many at a time as there are processors, where a nightly toolchain is
//! present. The corpora are replayed by the workspace's tests anyway.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result};

use super::{Tally, heading, quietly};
use crate::workspace;

/// Runs each for so many seconds.
pub(super) fn run(tally: &mut Tally, seconds: u32) -> Result<()> {
    heading("the fuzzers");
    if !quietly("cargo", &["+nightly", "--version"]) {
        println!("skipped: no nightly toolchain");
        tally.allow_skip(1, "the fuzzers: no nightly toolchain here; their corpora were replayed");
        return Ok(());
    }
    if !quietly("cargo", &["+nightly", "fuzz", "--version"]) {
        println!("installing cargo-fuzz");
        let status = command(&["install", "--quiet", "--locked", "cargo-fuzz"]).status()?;
        if !status.success() {
            tally.skip(1, "the fuzzers: cargo-fuzz does not install");
            return Ok(());
        }
    }
    let list = command(&["fuzz", "list"]).output()?;
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let targets: Vec<&str> = list.split_whitespace().collect();
    if targets.is_empty() {
        tally.fail("cargo fuzz list names no target");
    }
    // All of them at once, as a fuzzer that is built holds the others up.
    if !command(&["fuzz", "build"]).status()?.success() {
        tally.fail("cargo fuzz build");
        return Ok(());
    }
    let at_a_time = thread::available_parallelism().map_or(1, usize::from).min(targets.len());
    println!("{} fuzzers, {seconds} s each, {at_a_time} at a time", targets.len());
    let left = Mutex::new(targets.into_iter());
    let tally = Mutex::new(tally);
    let work = || -> Result<()> {
        loop {
            let next = left.lock().ok().and_then(|mut left| left.next());
            let Some(target) = next else { return Ok(()) };
            let output = fuzz(target, seconds)?;
            if let Ok(mut tally) = tally.lock() {
                report(&mut tally, target, &output);
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_a_time).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// What is found along the way goes to a folder of its own; the corpus is only read.
fn fuzz(target: &str, seconds: u32) -> Result<Output> {
    let found = workspace::target_dir().join("fuzz-found").join(target);
    fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
    let corpus = workspace::root().join("fuzz/corpus").join(target);
    let output = command(&["fuzz", "run", target])
        .arg(found)
        .args(corpus.is_dir().then_some(corpus))
        .args(["--", &format!("-max_total_time={seconds}"), "-print_final_stats=1"])
        .output()?;
    Ok(output)
}

fn report(tally: &mut Tally, target: &str, output: &Output) {
    let log = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        let runs =
            log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        println!("{target}: {} runs", runs.map_or("?", str::trim));
        tally.pass();
    } else {
        print!("{log}");
        // "Test unit written to fuzz/artifacts/TARGET/crash-…"
        let input = log.lines().find_map(|line| line.split_once("Test unit written to "));
        let input = input.map_or("no input was kept", |(_, path)| path.trim());
        tally.fail(format_args!("fuzzer {target}: {input}"));
    }
}

/// A command of the nightly toolchain's cargo, by way of rustup.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.arg("+nightly").args(args).current_dir(workspace::root()).stdin(Stdio::null());
    // The fuzzers' own target folder, apart from the workspace's.
    command.env_remove("CARGO_TARGET_DIR");
    command
}
