//! Signals end a run at any time, and leave nothing behind.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use backends::file::{FileDisk, OpenOptions};
use backends::net::tap::{Tap, TapOptions};
use common::{BOOTS, HALTS, Kernel, RESETS, Running, counts, has_kvm, mask, until};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;

const STOPPED: &str = "partita: stopped before the guest powered off\n";

#[test]
fn one_signal_presses_the_power_button_until_the_guest_listens() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(BOOTS);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut run = Running::new(&mut kernel.run(&[]));
        assert_eq!(run.byte(), b'k');
        run.signal(signal);
        assert_eq!(run.wait().code(), Some(0), "{signal:?}");
        assert_eq!(
            run.said(),
            "partita: pressing the guest's power button; again to stop it\n",
            "{signal:?}"
        );
    }
}

#[test]
fn quit_stops_at_once() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(HALTS);
    let mut run = Running::new(&mut kernel.run(&[]));
    assert_eq!(run.byte(), b'k');
    run.signal(Signal::QUIT);
    assert_eq!(run.wait().code(), Some(1));
    assert_eq!(run.said(), STOPPED);
}

#[test]
fn one_signal_ends_a_guest_that_restarts_all_the_time() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(RESETS);
    for restarts in 1..=8 {
        let mut run = Running::new(&mut kernel.run(&[]));
        for _ in 0..restarts {
            assert_eq!(run.byte(), b'r');
        }
        run.signal(Signal::TERM);
        assert_eq!(run.wait().code(), Some(1));
    }
}

/// A run that waits for a pipe to be opened for reading. It says what it says to `stderr`.
fn waiting(folder: &Path, stderr: impl Into<Stdio>) -> (Running, PathBuf) {
    const OPENAT: &str = "257 ";
    let fifo = folder.join("fifo");
    if !fifo.exists() {
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_partita"));
    let serial = format!("file:{}", fifo.display());
    command.args(["run", "--partition", "hosted", "--builtin", "identify", "--serial", &serial]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let run = Running::new(&mut command);
    run.listens();
    // Which call its first thread sleeps in, and it may be in another open(2) before.
    let call = format!("/proc/{}/syscall", run.0.id());
    let mut seen = 0;
    until("it does not open the pipe", || {
        let call = fs::read_to_string(&call).unwrap_or_default();
        seen = if call.starts_with(OPENAT) { seen + 1 } else { 0 };
        (seen >= 20).then_some(())
    });
    (run, fifo)
}

#[test]
fn who_insists_is_not_made_to_wait_for_the_host() {
    let folder = tempfile::tempdir().unwrap();
    for signal in [Signal::TERM, Signal::QUIT] {
        let (mut run, _) = waiting(folder.path(), Stdio::piped());
        run.signals(&[signal, signal]);
        assert_eq!(run.wait().code(), Some(1));
        let said = run.said();
        assert!(
            said.ends_with("partita: ended without waiting for the machine to be made\n"),
            "{said}"
        );
    }
}

#[test]
fn a_stop_that_has_to_wait_says_for_what() {
    let folder = tempfile::tempdir().unwrap();
    let errors = folder.path().join("errors");
    let (mut run, fifo) = waiting(folder.path(), fs::File::create(&errors).unwrap());
    run.signal(Signal::TERM);
    let said = until("it says nothing", || {
        Some(fs::read_to_string(&errors).unwrap()).filter(|said| said.ends_with('\n'))
    });
    assert_eq!(said, "partita: waiting for the machine to be made; once more to end without\n");
    // What it waited for comes, and with it an orderly end.
    let reader = thread::spawn(move || fs::read(fifo).unwrap());
    assert_eq!(run.wait().code(), Some(1));
    reader.join().unwrap();
    let said = fs::read_to_string(&errors).unwrap();
    assert!(said.ends_with(STOPPED), "{said}");
}

#[test]
fn a_hangup_that_was_ignored_stays_ignored() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(HALTS);
    let plain = kernel.run(&[]);
    for ignored in [false, true] {
        let mut command = Command::new("sh");
        let script = if ignored { "trap '' HUP; exec \"$@\"" } else { "exec \"$@\"" };
        command.args(["-c", script, "sh"]).arg(plain.get_program()).args(plain.get_args());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut run = Running::new(&mut command);
        assert_eq!(run.byte(), b'k');
        let hangup = 1 << (Signal::HUP.as_raw() - 1);
        assert_eq!(mask(run.0.id(), "SigIgn") & hangup != 0, ignored);
        assert_eq!(mask(run.0.id(), "SigCgt") & hangup == 0, ignored);
        run.signals(&[Signal::HUP, Signal::TERM, Signal::TERM]);
        assert_eq!(run.wait().code(), Some(1));
    }
}

/// Runs of the random test, and how many of them at a time.
const RUNS: u32 = 200;
const AT_A_TIME: u32 = 4;

/// A generator of numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

/// A short run with all that could be left behind.
struct Short {
    folder: tempfile::TempDir,
    /// Of the hosted guest's process, which has it among its arguments.
    mark: String,
    tap: Option<String>,
    command: Command,
}

impl Short {
    fn new(number: u32, kvm: bool, taps: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("disk.img"), vec![0; 1 << 20]).unwrap();
        let mark = format!("seed={}{number:03}", std::process::id());
        let mut command = Command::new(env!("CARGO_BIN_EXE_partita"));
        command.args(["run", "--memory", "64M"]);
        if kvm && number.is_multiple_of(2) {
            common::kernel(&counts(300), &at("kernel"));
            command.arg("--kernel").arg(at("kernel"));
        } else {
            let work = format!("verify bytes=64k {mark}");
            command.args(["--partition", "hosted", "--builtin", &work]);
        }
        command.arg("--disk").arg(format!("path={}", at("disk.img").display()));
        if number.is_multiple_of(3) {
            command.arg("--serial").arg(format!("file:{}", at("serial").display()));
        }
        let tap = (taps && number.is_multiple_of(4))
            .then(|| format!("pt{}x{number}", std::process::id() % 10_000));
        if let Some(tap) = &tap {
            command.arg("--nic").arg(format!("backend=tap:{tap}"));
        } else if number % 4 == 1 {
            command.arg("--nic").arg("backend=switch:s");
            command.arg("--switch").arg(format!("name=s,uplink=socket:{}", at("socket").display()));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Self { folder, mark, tap, command }
    }

    /// What is left of it, if anything is.
    fn left(&self) -> Option<String> {
        let known = ["disk.img", "kernel", "serial"];
        let files =
            fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        if let Some(file) = files.into_iter().find(|file| !known.iter().any(|known| file == known))
        {
            return Some(format!("the file {}", file.display()));
        }
        let tap = self.tap.as_ref().map(|tap| Path::new("/sys/class/net").join(tap));
        if let Some(tap) = tap.filter(|tap| tap.exists()) {
            return Some(format!("the tap {}", tap.display()));
        }
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
        let is_ours = |process: &PathBuf| {
            let line = fs::read(process.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&self.mark)
        };
        if let Some(process) = processes.into_iter().find(is_ours) {
            return Some(format!("the process {}", process.display()));
        }
        let options = OpenOptions { lock: true, ..OpenOptions::default() };
        let disk = FileDisk::open(&self.folder.path().join("disk.img"), &options);
        disk.err().map(|error| format!("a lock: {error}"))
    }
}

#[test]
fn signals_at_random_times_end_short_runs_or_let_them_end_and_nothing_is_left() {
    let kvm = has_kvm();
    let probe = format!("pt{}p", std::process::id());
    let taps = Tap::open(&probe, TapOptions { queues: 1, mtu: None }).is_ok();
    // How long a run takes on this machine, at the moment.
    let start = Instant::now();
    for number in 0..2 {
        assert_eq!(Running::new(&mut Short::new(number, kvm, taps).command).wait().code(), Some(0));
    }
    let span = start.elapsed().as_micros() as u64;
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    println!("SEED={seed}, signals within {span} us");
    let (next, failures) = (AtomicU32::new(0), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= RUNS {
                return;
            }
            if let Err(what) = disturbed(number, seed, span, kvm, taps) {
                failures.lock().unwrap().push(format!("run {number}: {what}"));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(work);
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "SEED={seed}: {failures:#?}");
}

fn disturbed(number: u32, seed: u64, span: u64, kvm: bool, taps: bool) -> Result<(), String> {
    const SIGNALS: [Signal; 6] =
        [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::PIPE, Signal::USR1];
    let mut random = Random((seed ^ u64::from(number) << 32) | 1);
    let signal = SIGNALS[random.below(SIGNALS.len() as u64) as usize];
    let after = Duration::from_micros(random.below(span));
    let mut short = Short::new(number, kvm, taps);
    let mut run = Running::new(&mut short.command);
    thread::sleep(after);
    run.signal(signal);
    let deadline = Instant::now() + common::PATIENCE;
    while run.0.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            return Err(format!("{signal:?} after {after:?}: it does not end"));
        }
        thread::sleep(Duration::from_millis(2));
    }
    // A process that the program has left to its end may take a moment to it.
    while let Some(left) = short.left() {
        if Instant::now() > deadline {
            let (status, said) = (run.wait(), run.said());
            return Err(format!("{signal:?} after {after:?}: {left} is left; {status}: {said}"));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
