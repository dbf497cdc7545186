//! The lab's tests: shell scripts of `tests/lab` that run in L1, each in one of its own.
//!
//! A test is `NAME.sh`; `NAME.guest.sh` beside it is what its guests run. It passes if it exits
//! with 0. One whose script has a line `# kernels: A B` runs once for each of these kernels, as `NAME@A` and
//! `NAME@B`, with `KERNEL` in its environment.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Tally, TestOptions, heading, programs};
use crate::lab::{self, Emulator, LabFile, LabOptions};
use crate::workspace;

/// Runs the tests it is given, with a line before and after each.
const RUNNER: &str = include_str!("run-lab-tests.sh");

/// The most that one test may take, in seconds.
const LIMIT: u64 = 240;

/// How much longer L1 may take to start and to end such a test.
const GRACE: u64 = 60;

/// How many tests of a run may have a second chance, which is told. The emulation under L1 is not sound: rarely, a
/// guest goes astray for which nobody but the emulator is to blame, or L1 itself stands still. Of 74 runs that were
/// counted 2 failed so (docs/lab.md). With so many chances, one run of all tests in some 400 fails for want of one. A
/// test that is right to fail fails twice.
const SECOND_CHANCES: u32 = 4;

/// How many lines of a failed test are shown.
const TAIL: usize = 40;

/// Runs the lab tests whose names hold one of those that are asked for, or all.
pub(super) fn run(tally: &mut Tally, options: &TestOptions) -> Result<()> {
    heading("the lab");
    let TestOptions { names, emulator, all_cores, .. } = options;
    let folder = workspace::root().join("tests/lab");
    let mut tests = list(&folder)?;
    if !names.is_empty() {
        tests.retain(|test| names.iter().any(|name| test.contains(name)));
    }
    if tests.is_empty() {
        tally.fail("no such lab test");
        return Ok(());
    }
    if let Err(error) = lab::prepare() {
        println!("skipped: {error:#}");
        tally.skip(tests.len() as u64, format_args!("{} lab tests: {error:#}", tests.len()));
        return Ok(());
    }

    // So that at the end nobody waits for one that has begun late.
    longest_first(&mut tests, &fs::read_to_string(record()).unwrap_or_default());

    // Each L1 has a core of the host, so that several run side by side.
    let round = Round {
        folder,
        emulator: *emulator,
        all_cores: *all_cores,
        left: Mutex::new(tests.into()),
        second_chances: AtomicU32::new(SECOND_CHANCES),
        tally: Mutex::new(tally),
    };
    thread::scope(|scope| {
        for _ in 0..lab::places() {
            scope.spawn(|| round.work());
        }
    });
    Ok(())
}

/// What those who run the tests share.
struct Round<'a> {
    /// Where the tests are.
    folder: PathBuf,
    emulator: Emulator,
    all_cores: bool,
    left: Mutex<VecDeque<String>>,
    /// How many tests may still have a second chance.
    second_chances: AtomicU32,
    tally: Mutex<&'a mut Tally>,
}

impl Round<'_> {
    /// Runs tests while there are any.
    fn work(&self) {
        loop {
            let next = lock(&self.left).pop_front();
            let Some(test) = next else { return };
            let files = match self.files_of(&test) {
                Ok(files) => files,
                Err(error) => {
                    lock(&self.tally).fail(format_args!("lab test {test}: {error:#}"));
                    continue;
                }
            };
            let Err(first) = self.ran(&test, &files) else { continue };
            let chance = |left: u32| left.checked_sub(1);
            let left = &self.second_chances;
            if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, chance).is_err() {
                lock(&self.tally).fail(format_args!("lab test {test}: {first}{}", kept(&test)));
                continue;
            }
            println!("once more {test}");
            match self.ran(&test, &files) {
                Ok(()) => lock(&self.tally).note(format_args!(
                    "passed only the second time: lab test {test}; at first: {first}{}",
                    kept(&test)
                )),
                Err(second) => lock(&self.tally).fail(format_args!(
                    "lab test {test}: {second}; at first: {first}{}",
                    kept(&test)
                )),
            }
        }
    }

    /// What a test takes along: all the scripts, and the test programs it names.
    fn files_of(&self, test: &str) -> Result<Vec<LabFile>> {
        let mut files = programs::wanted_by(&self.folder.join(format!("{}.sh", script_of(test))))?;
        let destination = "/lab/tests".to_owned();
        files.push(LabFile { source: self.folder.clone(), destination });
        Ok(files)
    }

    /// Runs one test; the error says in one line how it failed.
    fn ran(&self, test: &str, files: &[LabFile]) -> Result<(), String> {
        let limit = LIMIT.to_string();
        let arguments = ["sh", "-c", RUNNER, "run-lab-tests", &limit, test];
        let options = LabOptions {
            files: files.to_vec(),
            timeout: Duration::from_secs(LIMIT + GRACE),
            emulator: self.emulator,
            all_cores: self.all_cores,
            command: arguments.map(str::to_owned).to_vec(),
            ..LabOptions::default()
        };
        let mut report = Report::new(&self.tally);
        let began = Instant::now();
        let outcome = lab::run_with(&options, &mut |text| report.take(text));
        let Report { ended, under_way, .. } = report;
        match outcome {
            Ok(_) => match ended.iter().find(|(name, _)| name == test) {
                Some((_, status)) if status == "0" => {
                    let _tally = lock(&self.tally);
                    remember(test, began.elapsed().as_secs_f64());
                    Ok(())
                }
                Some((_, status)) => Err(format!("status {status}")),
                None => Err("the lab did not run it".to_owned()),
            },
            // L1 ends a test that takes too long by itself; here even that did not happen.
            Err(error) => {
                if let Some(test) = under_way {
                    test.show_end();
                }
                println!("FAILED {test}: {error:#}");
                Err(first_line(&error))
            }
        }
    }
}

/// The file with all that a test's last failure wrote.
fn log(test: &str) -> PathBuf {
    workspace::target_dir().join("lab").join(format!("{test}.log"))
}

/// Where to look for what a failed test wrote, at the end of a line.
fn kept(test: &str) -> String {
    let log = log(test);
    if log.exists() { format!("; all of it: {}", log.display()) } else { String::new() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the line begins with that names a test's kernels.
const KERNELS: &str = "# kernels: ";

/// The names of the tests, in order.
fn list(folder: &Path) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("could not list {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let file = entry?.file_name().to_string_lossy().into_owned();
        // lib.sh, lib.guest.sh and NAME.guest.sh are no tests; a test begins with its number.
        if let Some(name) = file.strip_suffix(".sh")
            && name.starts_with(|first: char| first.is_ascii_digit())
            && !name.ends_with(".guest")
        {
            let script = folder.join(&file);
            let text = fs::read_to_string(&script)
                .with_context(|| format!("could not read {}", script.display()))?;
            names.extend(runs_of(name, &text));
        }
    }
    names.sort();
    Ok(names)
}

/// The test's own name, or one for each kernel that its script names.
fn runs_of(name: &str, script: &str) -> Vec<String> {
    let kernels = script.lines().find_map(|line| line.strip_prefix(KERNELS));
    match kernels {
        Some(kernels) => {
            kernels.split_whitespace().map(|kernel| format!("{name}@{kernel}")).collect()
        }
        None => vec![name.to_owned()],
    }
}

/// The file with what each test took when it last passed, a line `NAME SECONDS` for each.
fn record() -> PathBuf {
    workspace::target_dir().join("lab/seconds.txt")
}

/// Orders tests by what they took, the longest first. One that is not known may take long; of those the last
/// come first, as they have NICs and most to do.
fn longest_first(tests: &mut [String], record: &str) {
    let took: BTreeMap<&str, f64> = record
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, seconds)| Some((name, seconds.parse().ok()?)))
        .collect();
    tests.sort_by(|a, b| {
        let took = |name: &String| took.get(name.as_str()).copied().unwrap_or(f64::INFINITY);
        took(b).total_cmp(&took(a)).then_with(|| b.cmp(a))
    });
}

/// Takes down what a test took; without that, the next run's order is another.
fn remember(test: &str, seconds: f64) {
    let known = fs::read_to_string(record()).unwrap_or_default();
    let others = known.lines().filter(|line| line.split(' ').next() != Some(test));
    let lines: String = others.map(|line| format!("{line}\n")).collect();
    let _ = fs::write(record(), format!("{lines}{test} {seconds:.1}\n"));
}

/// The name of a run's script, without its kernel.
fn script_of(test: &str) -> &str {
    test.split_once('@').map_or(test, |(script, _)| script)
}

fn first_line(error: &anyhow::Error) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().to_owned()
}

/// A test that has begun.
struct UnderWay {
    name: String,
    began: Instant,
    output: String,
}

impl UnderWay {
    /// Shows the end of what a failed test wrote, and keeps all of it in a file.
    fn show_end(&self) {
        let log = log(&self.name);
        let lines: Vec<_> = self.output.lines().collect();
        let mut text = lines[lines.len().saturating_sub(TAIL)..].join("\n");
        let _ = match fs::write(&log, &self.output) {
            Ok(()) => write!(text, "\n(all of it: {})", log.display()),
            Err(error) => write!(text, "\n(could not keep the rest in {}: {error})", log.display()),
        };
        // Other tests write at the same time: one piece stays in one piece.
        println!("{text}");
    }
}

/// Reads the runner's output as it comes: one line on our side for each test, and the end of what
/// a test wrote if it failed.
struct Report<'a, 'b> {
    tally: &'a Mutex<&'b mut Tally>,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
    under_way: Option<UnderWay>,
    /// The tests that have ended, each with its status.
    ended: Vec<(String, String)>,
}

impl<'a, 'b> Report<'a, 'b> {
    fn new(tally: &'a Mutex<&'b mut Tally>) -> Self {
        Self { tally, partial: Vec::new(), under_way: None, ended: Vec::new() }
    }

    fn take(&mut self, text: &[u8]) {
        self.partial.extend_from_slice(text);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.line(String::from_utf8_lossy(&line).trim_end());
        }
    }

    fn line(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match (words.as_slice(), &mut self.under_way) {
            (["@begin", name], _) => {
                let began = Instant::now();
                self.under_way =
                    Some(UnderWay { name: (*name).to_owned(), began, output: String::new() });
            }
            (["@end", name, status], Some(test)) if test.name == *name => {
                let took = test.began.elapsed().as_secs_f64();
                if *status == "0" {
                    println!("ok     {name} ({took:.1} s)");
                    lock(self.tally).pass();
                } else {
                    test.show_end();
                    println!("FAILED {name} with status {status} ({took:.1} s)");
                }
                self.ended.push(((*name).to_owned(), (*status).to_owned()));
                self.under_way = None;
            }
            (_, Some(test)) => {
                test.output.push_str(line);
                test.output.push('\n');
            }
            (_, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_runs_with_each_kernel_that_it_names() {
        assert_eq!(runs_of("01-a", "#!/bin/sh\n# Shows it.\n"), ["01-a"]);
        let named = "#!/bin/sh\n# kernels: cloud new\n";
        assert_eq!(runs_of("01-a", named), ["01-a@cloud", "01-a@new"]);
        assert_eq!(script_of("01-a@new"), "01-a");
        assert_eq!(script_of("01-a"), "01-a");
    }

    #[test]
    fn the_longest_test_begins_first_and_what_is_unknown_before_it() {
        let mut tests = ["01-a", "02-b", "03-c", "04-d", "05-e"].map(str::to_owned);
        longest_first(&mut tests, "01-a 9.5\n03-c 70.0\n04-d no number\n09-gone 1\n");
        assert_eq!(tests, ["05-e", "04-d", "02-b", "03-c", "01-a"]);
    }

    #[test]
    fn a_report_counts_by_the_runners_lines_in_whatever_pieces_they_come() {
        let mut tally = Tally::default();
        let shared = Mutex::new(&mut tally);
        let mut report = Report::new(&shared);
        for piece in [
            "@beg",
            "in 01-a\nhel",
            "lo\n@end 01-a 0\n@begin 02-b\n@end 01-a 1",
            "\n\n@end 02-b 9\n@begin 03-c\n",
        ] {
            report.take(piece.as_bytes());
        }
        let ended = [("01-a", "0"), ("02-b", "9")];
        assert_eq!(report.ended, ended.map(|(name, status)| (name.to_owned(), status.to_owned())));
        assert_eq!(report.under_way.as_ref().map(|test| test.name.as_str()), Some("03-c"));
        assert_eq!(tally.to_string(), "1 passed, 0 failed, 0 skipped");
    }
}
