//! A guest that writes to the reset register starts anew, though it does nothing else that the
//! hypervisor would hear of; or it is the end, if the user wants that.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Far longer than two starts take.
const PATIENCE: Duration = Duration::from_secs(60);

/// An undefined instruction, for which there is no handler, nor one for what follows from that.
const BREAKDOWN: [u8; 2] = [0x0f, 0x0b]; // ud2

/// Ends with the test, however that ends.
struct Run(Child);

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn starts_anew(kernel: &Path, options: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_partita"));
    command.args(["run", "--memory", "64M", "--kernel"]).arg(kernel).args(options);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut run = Run(child);
    let mut output = run.0.stdout.take().unwrap();
    let (letters, seen) = mpsc::channel();
    thread::spawn(move || {
        let mut letter = [0];
        while output.read_exact(&mut letter).is_ok() && letters.send(letter[0]).is_ok() {}
    });
    for start in 1..=3 {
        assert_eq!(seen.recv_timeout(PATIENCE), Ok(b'r'), "start {start} with {options:?}");
    }
}

#[test]
fn the_reset_register_acts_at_once_with_and_without_pci() {
    if !common::has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (kernel, disk) = (folder.path().join("kernel"), folder.path().join("disk.img"));
    common::kernel(common::RESETS, &kernel);
    std::fs::write(&disk, [0; 4096]).unwrap();
    starts_anew(&kernel, &[]);
    starts_anew(&kernel, &["--disk", &format!("path={},attach=ide", disk.display())]);
}

/// Waits for the end of a run, with what it said.
fn end(run: &mut Run) -> (Option<i32>, String) {
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match run.0.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(Instant::now() < deadline, "it does not end"),
        }
        thread::sleep(Duration::from_millis(5));
    };
    let mut said = String::new();
    run.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

fn start(kernel: &Path, options: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_partita"));
    command.args(["run", "--memory", "64M", "--serial", "null", "--kernel"]).arg(kernel);
    let command = command.args(options).stdin(Stdio::null()).stdout(Stdio::null());
    Run(command.stderr(Stdio::piped()).spawn().unwrap())
}

#[test]
fn a_reset_is_the_end_with_a_status_of_its_own_if_the_user_wants_that() {
    if !common::has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    for (code, cause) in [
        (common::RESETS, "the guest has reset itself"),
        (&BREAKDOWN, "the guest has broken down (triple fault)"),
    ] {
        common::kernel(code, &kernel);
        let (status, said) = end(&mut start(&kernel, &["--on-reset", "exit"]));
        assert_eq!(status, Some(2), "{said}");
        assert_eq!(said, format!("partita: {cause}; --on-reset exit ends the run\n"));
    }
}

/// Whether it is told while the guest runs, while its next machine is made or in the pause before it.
#[test]
fn restarts_are_told_and_one_wish_to_end_is_heard_between_them() {
    if !common::has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    common::kernel(common::RESETS, &kernel);
    // The third is the first with a pause worth the name, which is when most of the signals come.
    for (count, signal) in
        [(1, Signal::TERM), (2, Signal::TERM), (3, Signal::TERM), (4, Signal::HUP)]
    {
        let mut run = start(&kernel, &[]);
        let mut lines = BufReader::new(run.0.stderr.take().unwrap()).lines();
        for number in 1..=count {
            let line = lines.next().expect("it has ended").unwrap();
            assert!(line.starts_with("partita: the guest has reset itself after "), "{line}");
            let (_, restart) = line.split_once("; restart ").unwrap();
            let pause = ["1", "2 in 0.25 s", "3 in 0.5 s", "4 in 1 s"][number - 1];
            assert_eq!(restart, pause);
        }
        kill_process(Pid::from_child(&run.0), signal).unwrap();
        let rest: Vec<_> = lines.map(Result::unwrap).collect();
        // Which of them depends on whether there was a guest just then.
        let ends = [
            "partita: stopped before the guest powered off",
            "partita: the guest restarted instead of powering off, and was not started again",
        ];
        assert!(ends.contains(&rest.last().unwrap().as_str()), "{rest:?}");
        assert_eq!(run.0.wait().unwrap().code(), Some(1), "{rest:?}");
    }
}
