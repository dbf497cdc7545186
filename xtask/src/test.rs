//! `cargo xtask test`: everything that has to hold, with a closing line that counts it.
//!
//! First what needs no guest: formatting, lints, the workspace's tests (the fuzzers' corpora among
//! them), the ring and the switch under loom, and the fuzzers for a while. Then the lab's tests, each with a
//! guest. What cannot run here is skipped and said so; under CI=true a skip fails the run, but for
//! the fuzzers', whose nightly toolchain is not to be had everywhere.

use std::collections::BTreeSet;
use std::env;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::lab::Emulator;
use crate::workspace;

mod fuzzers;
mod lab_tests;
mod programs;

/// What is run.
pub(crate) struct TestOptions {
    /// Whether to run what needs no guest.
    pub(crate) in_process: bool,
    /// Whether to run the lab's tests.
    pub(crate) lab: bool,
    /// Only the lab tests with one of these in their names; all if there is none.
    pub(crate) names: Vec<String>,
    /// How long each fuzzer runs; by default 30 s under CI and 5 s elsewhere.
    pub(crate) fuzz_seconds: Option<u32>,
    /// What runs the lab's L1s.
    pub(crate) emulator: Emulator,
    /// Whether each L1 may use all of the host's cores.
    pub(crate) all_cores: bool,
}

/// What came of the tests so far.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// The skips that fail a run under CI.
    grave_skips: u64,
    /// One line for each failure, skip and oddity, shown again at the end.
    notes: Vec<String>,
}

impl Tally {
    fn pass(&mut self) {
        self.passed += 1;
    }

    fn fail(&mut self, what: impl fmt::Display) {
        self.failed += 1;
        self.notes.push(format!("failed: {what}"));
    }

    /// Has a line shown again at the end.
    fn note(&mut self, what: impl fmt::Display) {
        self.notes.push(what.to_string());
    }

    /// Counts tests that this machine cannot run.
    fn skip(&mut self, count: u64, why: impl fmt::Display) {
        self.grave_skips += count;
        self.allow_skip(count, why);
    }

    /// Counts tests that may be missing even under CI.
    fn allow_skip(&mut self, count: u64, why: impl fmt::Display) {
        self.skipped += count;
        self.notes.push(format!("skipped: {why}"));
    }

    fn check(&mut self, what: &str, passed: bool) {
        if passed { self.pass() } else { self.fail(what) }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped, .. } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Runs the tests; returns 0 if all went well.
pub(crate) fn run(options: &TestOptions) -> Result<u8> {
    let ci = env::var("CI").is_ok_and(|value| value == "true");
    let mut tally = Tally::default();
    if options.in_process {
        formatting_and_lints(&mut tally)?;
        workspace_tests(&mut tally)?;
        loom_tests(&mut tally)?;
        fuzzers::run(&mut tally, options.fuzz_seconds.unwrap_or(if ci { 30 } else { 5 }))?;
    }
    if options.lab {
        lab_tests::run(&mut tally, options)?;
    }
    println!();
    for note in &tally.notes {
        println!("{note}");
    }
    println!("{tally}");
    Ok(u8::from(tally.failed > 0 || ci && tally.grave_skips > 0))
}

fn heading(what: &str) {
    println!("\n== {what}");
}

fn formatting_and_lints(tally: &mut Tally) -> Result<()> {
    heading("cargo fmt --check");
    let status = workspace::cargo().args(["fmt", "--all", "--check"]).status()?;
    tally.check("cargo fmt --check", status.success());

    heading("cargo clippy");
    let status = workspace::cargo()
        .args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])
        .status()?;
    tally.check("cargo clippy", status.success());

    heading("cargo clippy for the built-in guest's image");
    let status = workspace::cargo()
        .args(["clippy", "--quiet", "--package", "guest-drivers", "--features", "image"])
        .args(["--bin", "builtin-guest", "--", "-D", "warnings"])
        // Like the image itself: it has nobody to unwind to.
        .env("CARGO_PROFILE_DEV_PANIC", "abort")
        .status()?;
    tally.check("cargo clippy for the image", status.success());
    Ok(())
}

fn workspace_tests(tally: &mut Tally) -> Result<()> {
    heading("cargo test --workspace");
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    cargo_test(tally, &mut command, "cargo test --workspace")
}

fn loom_tests(tally: &mut Tally) -> Result<()> {
    for (package, what) in
        [("vmbus", "the ring under loom"), ("backends", "the switch's wake-ups under loom")]
    {
        heading(what);
        let mut command = workspace::cargo();
        command
            .args(["test", "--package", package, "--release", "--lib", "loom"])
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", workspace::target_dir().join("loom"));
        cargo_test(tally, &mut command, what)?;
    }
    Ok(())
}

/// Runs a `cargo test`, shows its output and counts its tests.
fn cargo_test(tally: &mut Tally, command: &mut Command, what: &str) -> Result<()> {
    let (success, output) = shown_and_kept(command)?;
    let counts = Counts::of(&output);
    tally.passed += counts.passed;
    tally.failed += counts.failed;
    if counts.failed > 0 {
        tally.notes.extend(failed_tests(&output).map(|name| format!("failed: {name}")));
        for line in how_to_repeat(&output) {
            tally.note(format_args!("  {line}"));
        }
        tally.note(format_args!("  all of it: {}", keep(what, &output)));
    } else if !success {
        tally.fail(format_args!("{what} did not run to its end"));
    } else if counts.passed == 0 {
        tally.fail(format_args!("{what} found no test"));
    }
    if counts.ignored > 0 {
        tally.skip(counts.ignored, format_args!("{} ignored in {what}", counts.ignored));
    }
    Ok(())
}

/// The tests that failed, by what libtest wrote.
fn failed_tests(output: &str) -> impl Iterator<Item = &str> {
    output.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
}

/// The most lines that are shown of what says how to repeat a failure.
const HINTS: usize = 10;

/// What failed tests said about the seed or the input by which they failed, each line once.
fn how_to_repeat(output: &str) -> Vec<&str> {
    let mut known = BTreeSet::new();
    let words = ["seed", "minimal failing input", "regressions"];
    output
        .lines()
        .map(str::trim)
        .filter(|line| words.iter().any(|word| line.contains(word)) && !line.starts_with("test "))
        .filter(|line| known.insert(*line))
        .take(HINTS)
        .collect()
}

/// Keeps what a step said in a file, and says which.
fn keep(what: &str, output: &str) -> String {
    let name: String =
        what.chars().map(|letter| if letter.is_alphanumeric() { letter } else { '-' }).collect();
    let path: PathBuf = workspace::target_dir().join("test-logs").join(format!("{name}.log"));
    let kept = path.parent().map_or(Ok(()), fs::create_dir_all);
    match kept.and_then(|()| fs::write(&path, output)) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("not kept in {}: {error}", path.display()),
    }
}

/// What the "test result" lines of a `cargo test` add up to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    fn of(output: &str) -> Self {
        let mut counts = Self::default();
        for line in output.lines().filter_map(|line| line.strip_prefix("test result: ")) {
            // "ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s"
            let words: Vec<&str> =
                line.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
            for pair in words.windows(2) {
                if let Ok(count) = pair[0].parse::<u64>() {
                    match pair[1] {
                        "passed" => counts.passed += count,
                        "failed" => counts.failed += count,
                        "ignored" => counts.ignored += count,
                        _ => {}
                    }
                }
            }
        }
        counts
    }
}

/// Whether a command succeeds; its output does not matter.
fn quietly(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs a command with its output shown as it comes, and returns whether it succeeded and what it
/// wrote on stdout.
fn shown_and_kept(command: &mut Command) -> Result<(bool, String)> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| {
            format!("could not start {}", command.get_program().to_string_lossy())
        })?;
    let mut kept = String::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            println!("{line}");
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    Ok((child.wait()?.success(), kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_of_all_crates_add_up() {
        let output = "running 3 tests\ntest a ... ok\n\
            test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.05s\n\
            test result: FAILED. 11 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n";
        assert_eq!(Counts::of(output), Counts { passed: 13, failed: 3, ignored: 1 });
    }

    #[test]
    fn a_failure_is_told_with_what_repeats_it() {
        let output = "test a_seed_is_taken ... ok\ntest b ... FAILED\ntest result: FAILED. 1 passed; 1 failed\n\
            ---- b stdout ----\nthread 'b' panicked at b.rs:1:2:\n  seed=17 broke it\nseed=17 broke it\n\
            minimal failing input: order = [1]\n";
        assert_eq!(failed_tests(output).collect::<Vec<_>>(), ["b"]);
        assert_eq!(
            how_to_repeat(output),
            ["seed=17 broke it", "minimal failing input: order = [1]"]
        );
    }

    #[test]
    fn the_closing_line_has_its_exact_form() {
        let mut tally = Tally::default();
        tally.pass();
        tally.skip(2, "no reason");
        assert_eq!(tally.to_string(), "1 passed, 0 failed, 2 skipped");
    }
}
