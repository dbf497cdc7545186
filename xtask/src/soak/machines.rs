//! Two machines side by side, each a `partita`: one whose guest is hostile, and one that works honestly. Tests include
//! this file too.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::figures::Figures;

/// How long a machine may be silent that has something to say at least every second, or when it ends.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the guest does nothing while the host's figures are taken.
const REST: &str = "3s";
/// Lines that may be written to stderr in a minute, whatever a guest does.
const LINES_PER_MINUTE: usize = 600;

/// What the hostile machine's guest does when it is honest in the end, to devices that it has mistreated.
const HONEST_AT_LAST: &str = "exchange frames=64; exchange nic=2 peer=3 frames=64; \
    verify disk=0 bytes=1M; verify disk=1 bytes=256k transfer=dma; verify disk=1 bytes=16k transfer=pio; \
    exchange frames=100; exchange nic=2 peer=3 frames=100";
/// What the honest one does, over and over.
const HONEST: &str = "verify disk=0 bytes=4M; verify disk=0 bytes=4M bs=4k depth=32 seed=7; \
    verify disk=1 bytes=1M transfer=dma; exchange frames=2000; exchange nic=2 peer=3 frames=300; \
    exchange len=60 frames=2000";

/// What is to be done.
pub struct Plan<'a> {
    /// The program.
    pub partita: &'a Path,
    /// What guests run in, as `--partition` has it.
    pub partition: &'a str,
    /// Of the hostile guest's first round.
    pub seed: u64,
    /// How much it does before figures are taken, as a setting of `hostile`.
    pub warm_up: &'a str,
    /// How much it does after that.
    pub hostility: &'a str,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Rounds of the hostile guest.
    pub rounds: u64,
    /// Channels that it opened.
    pub channels: u64,
    /// How often the honest machine has done all of its work.
    pub honest: u64,
    /// The hostile machine's figures after the warm-up.
    pub before: Figures,
    /// The same after it all.
    pub after: Figures,
    /// Lines on its stderr.
    pub lines: usize,
    /// What is wrong, if anything is.
    pub faults: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, channels, honest, before, after, lines, faults } = self;
        write!(
            f,
            "{rounds} seeds, {channels} channels, {lines} lines of log; threads {} -> {}, descriptors {} -> {}, \
             mappings {} -> {}, memory {} -> {} KiB; the honest machine worked {honest} times",
            before.threads,
            after.threads,
            before.descriptors,
            after.descriptors,
            before.mappings,
            after.mappings,
            before.resident,
            after.resident,
        )?;
        for fault in faults {
            write!(f, "\n  fault: {fault}")?;
        }
        Ok(())
    }
}

/// Lets both machines run until the hostile one has done all it was to do.
pub fn soak(plan: &Plan<'_>) -> io::Result<Report> {
    let folder = tempfile::tempdir()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // Both are on the socket: what the hostile one floods its switch with gets to the other's.
        let other = scope.spawn(|| {
            let mut times = 0;
            let mut faults = Vec::new();
            while !done.load(Ordering::Relaxed) || times == 0 {
                match work_honestly(plan, folder.path()) {
                    Ok(()) => times += 1,
                    Err(error) => {
                        faults.push(format!("the honest machine: {error}"));
                        break;
                    }
                }
            }
            (times, faults)
        });
        let mut report = Report::default();
        let result = mistreat(plan, folder.path(), &mut report);
        done.store(true, Ordering::Relaxed);
        let (times, faults) = other.join().unwrap_or_default();
        report.honest = times;
        report.faults.extend(faults);
        result.map(|()| report)
    })
}

/// Runs the hostile machine.
fn mistreat(plan: &Plan<'_>, folder: &Path, report: &mut Report) -> io::Result<()> {
    let Plan { seed, warm_up, hostility, .. } = *plan;
    let second = seed.wrapping_add(1 << 32);
    let work = format!(
        "hostile seed={seed} {warm_up} rest={REST}; hostile seed={second} {hostility} rest={REST}; {HONEST_AT_LAST}"
    );
    let started = Instant::now();
    let mut machine = Machine::start(plan, folder, "hostile", &work)?;
    let pid = machine.child.id().to_string();
    let mut last = String::new();
    let mut results = 0;
    loop {
        let line = match machine.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let words = format!("silent for {} s after {last}", PATIENCE.as_secs());
                report.faults.push(format!("the hostile machine is {words}"));
                break;
            }
        };
        if line.contains(r#""error":"#) {
            report.faults.push(format!("the hostile machine's guest: {line}"));
        }
        if line.contains(r#""result":"hostile""#) {
            report.rounds += number(&line, "rounds");
            report.channels += number(&line, "channels");
            let before = (results > 0).then_some(report.before);
            let figures = Figures::settled(&pid, before, Duration::from_millis(2500))?;
            *(if results == 0 { &mut report.before } else { &mut report.after }) = figures;
            results += 1;
        }
        last = line;
    }
    let (status, errors) = machine.end(PATIENCE)?;
    report.lines = errors.len();
    let again = format!("hostile seed={seed} {warm_up}; hostile seed={second} {hostility}");
    if !status.success() {
        let tail = errors.iter().rev().take(5).rev().cloned().collect::<Vec<_>>().join(" | ");
        report
            .faults
            .push(format!("it ended with {status} after {last}: {tail}; see it again: {again}"));
    } else if let Some(what) = report.after.exceeds(&report.before) {
        report.faults.push(format!("it has more {what} than before; see it again: {again}"));
    }
    if let Some(panic) = errors.iter().find(|line| line.contains("panicked")) {
        report.faults.push(format!("a panic: {panic}; see it again: {again}"));
    }
    let minutes = 1 + started.elapsed().as_secs() as usize / 60;
    if errors.len() > minutes * LINES_PER_MINUTE {
        report.faults.push(format!("{} lines of log in {minutes} minutes", errors.len()));
    }
    Ok(())
}

/// Has the honest machine do all of its work once.
fn work_honestly(plan: &Plan<'_>, folder: &Path) -> io::Result<()> {
    let mut machine = Machine::start(plan, folder, "honest", HONEST)?;
    let mut lines = Vec::new();
    let fault = |lines: &[String], what: &str| {
        Err(io::Error::other(format!("{what}, after {}", lines.last().map_or("", |line| line))))
    };
    loop {
        match machine.lines.recv_timeout(PATIENCE) {
            Ok(line) => lines.push(line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                machine.end(Duration::ZERO)?;
                return fault(&lines, "it is silent");
            }
        }
    }
    let (status, errors) = machine.end(PATIENCE)?;
    if !status.success() {
        return fault(&lines, &format!("it ended with {status}: {errors:?}"));
    }
    for line in lines.iter().filter(|line| line.contains(r#""result":"exchange""#)) {
        if ["lost", "duplicates", "damaged"].iter().any(|key| number(line, key) > 0) {
            return fault(&lines, &format!("frames went astray: {line}"));
        }
    }
    Ok(())
}

/// The number in a field of a line of JSON; 0 if there is none.
fn number(line: &str, key: &str) -> u64 {
    let rest = line.split_once(&format!("\"{key}\":")).map_or("", |(_, rest)| rest);
    rest.split([',', '}']).next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// A machine that runs.
struct Machine {
    child: Child,
    /// What its guest says.
    lines: Receiver<String>,
    errors: Receiver<String>,
    _stdin: Option<ChildStdin>,
}

impl Machine {
    /// Starts one with a synthetic disk, an IDE disk and two NICs of each kind on two switches, one of which leads to
    /// the other machine.
    fn start(plan: &Plan<'_>, folder: &Path, name: &str, work: &str) -> io::Result<Self> {
        let disk = |number: u32| -> io::Result<PathBuf> {
            let path = folder.join(format!("{name}{number}.img"));
            File::options()
                .create(true)
                .write(true)
                .truncate(false)
                .open(&path)?
                .set_len(16 << 20)?;
            Ok(path)
        };
        let (scsi, ide) = (disk(0)?, disk(1)?);
        // The honest machine's NICs on that switch are on a VLAN of their own.
        let vlan = if name == "honest" { ",vlan=7" } else { "" };
        let mut child = Command::new(plan.partita)
            .args(["run", "--partition", plan.partition, "--memory", "64M"])
            .args(["--builtin", work])
            .arg("--disk")
            .arg(format!("path={}", scsi.display()))
            .arg("--disk")
            .arg(format!("path={},attach=ide", ide.display()))
            .args(["--nic", &format!("backend=switch:lan{vlan}")])
            .args(["--nic", &format!("backend=switch:lan{vlan}")])
            .args(["--nic", "backend=switch:own,attach=e1000"])
            .args(["--nic", "backend=switch:own,attach=e1000"])
            .arg("--switch")
            .arg(format!("name=lan,uplink=socket:{}", folder.join("lan").display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let (lines, errors) =
            (child.stdout.take().map(lines_of), child.stderr.take().map(lines_of));
        let (Some(lines), Some(errors)) = (lines, errors) else {
            return Err(io::Error::other("a child without pipes"));
        };
        Ok(Self { child, lines, errors, _stdin: stdin })
    }

    /// Waits for the end, which it brings about if it does not come in time. Returns it and the lines of the log.
    fn end(&mut self, patience: Duration) -> io::Result<(ExitStatus, Vec<String>)> {
        let until = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > until {
                self.child.kill()?;
            }
            thread::sleep(Duration::from_millis(20));
        };
        Ok((status, self.errors.iter().collect()))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing is left of one that was given up.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(pipe: impl io::Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    receive
}
