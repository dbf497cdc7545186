//! The process behind a user network lives as long as its machine: signals to the machine's process
//! group are not for it, and however the machine ends, so does it.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};
use tempfile::TempDir;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Does of passt's work what its start takes: sends a frame. Then it lives as long as its socket.
const PASST: &str = "#!/bin/bash
while [ \"$1\" != --fd ]; do shift; done
printf '\\0\\0\\0\\16..............' >&$2
exec cat <&$2 >/dev/null
";

/// Ends with the test, however that ends.
struct Run(Child);

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A run whose guest has begun to work and will not end soon, in a process group of its own, and the
/// process of its network.
fn long_run(folder: &TempDir) -> (Run, Pid) {
    // A child of another test that has not come to its own program yet would have this one open.
    static STARTS: Mutex<()> = Mutex::new(());
    let alone = STARTS.lock().unwrap_or_else(PoisonError::into_inner);
    let program = folder.path().join("passt");
    fs::write(&program, PASST).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let disk = folder.path().join("disk.img");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let mut run = Command::new(env!("CARGO_BIN_EXE_partita"))
        .args(["run", "--builtin", "bench time=60s", "--nic", "user", "--disk"])
        .arg(disk)
        .env("PATH", path)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(alone);
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(r#""begin":"bench"#)), "it never began");
    // It is started before anything else is.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.id())).unwrap();
    let passt = children.split_whitespace().next().unwrap().parse().unwrap();
    (Run(run), Pid::from_raw(passt).unwrap())
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whoever inherits it may take a while to bury it.
fn is_gone(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero()));
    stat.map_or(true, |stat| stat.contains(") Z "))
}

#[test]
fn it_is_of_no_concern_to_signals_for_the_machines_group_and_ends_with_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let (mut run, passt) = long_run(&folder);
    let group = Pid::from_child(&run.0);
    assert_eq!(getpgid(Some(group)), Ok(group));
    assert_ne!(getpgid(Some(passt)), Ok(group));
    kill_process_group(group, Signal::USR1).unwrap();
    assert!(!is_gone(passt));
    // Told to end as often as it takes, the machine takes its network along.
    wait_for("the run goes on", || {
        let _ = kill_process_group(group, Signal::TERM);
        thread::sleep(Duration::from_millis(100));
        run.0.try_wait().unwrap().is_some()
    });
    assert!(is_gone(passt));
}

#[test]
fn it_ends_with_a_machine_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (run, passt) = long_run(&folder);
    assert!(!is_gone(passt));
    kill_process(Pid::from_child(&run.0), Signal::KILL).unwrap();
    wait_for("the network's process is left", || is_gone(passt));
}
