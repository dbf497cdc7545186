//! The user's end of a run: what the terminal and signals do, and that both are as before when it is over.
//!
//! The guest is nine bytes of code that print a letter and halt, so that any KVM can run it.

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::has_kvm;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

/// Prints `k` on the first serial port and halts for good.
const CODE: [u8; 11] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee, 0xf4, 0xeb, 0xfd, 0x90];

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn partita(kernel: &Path, serial: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_partita"));
    command.args(["run", "--memory", "64M", "--serial", serial, "--kernel"]).arg(kernel);
    command
}

fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it does not end");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Everything that two states of a terminal can differ in.
fn modes(of: &Termios) -> [u32; 4] {
    [of.input_modes.bits(), of.output_modes.bits(), of.control_modes.bits(), of.local_modes.bits()]
}

#[test]
fn two_ctrl_c_end_the_run_and_leave_the_terminal_as_it_was() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("kernel");
    common::kernel(&CODE, &image);
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let terminal: OwnedFd = File::options().read(true).write(true).open(name).unwrap().into();
    let before = tcgetattr(&terminal).unwrap();
    assert!(before.local_modes.contains(LocalModes::ICANON));

    let mut child = partita(&image, "stdio")
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut screen = File::from(master);
    let mut byte = [0];
    screen.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"k");
    let during = tcgetattr(&terminal).unwrap();
    assert!(!during.local_modes.intersects(LocalModes::ICANON | LocalModes::ISIG));

    screen.write_all(b"\x03").unwrap();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(child.try_wait().unwrap(), None, "one Ctrl-C is the guest's");
    screen.write_all(b"\x03").unwrap();
    assert_eq!(wait(&mut child).code(), Some(1));
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "partita: stopped before the guest powered off\n");
    let after = tcgetattr(&terminal).unwrap();
    assert_eq!(modes(&after), modes(&before));
}

#[test]
fn two_interrupts_end_a_run_without_a_terminal_whose_output_is_in_a_file() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, log) = (folder.path().join("kernel"), folder.path().join("console.log"));
    common::kernel(&CODE, &image);
    let mut child = partita(&image, &format!("file:{}", log.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while fs::read(&log).unwrap_or_default() != b"k" {
        assert!(Instant::now() < deadline, "the guest's output does not come");
        thread::sleep(Duration::from_millis(5));
    }
    let pid = Pid::from_child(&child);
    for _ in 0..2 {
        kill_process(pid, Signal::INT).unwrap();
        // Two of them at once are one.
        thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(wait(&mut child).code(), Some(1));
    let mut output = String::new();
    child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, "");
    child.stderr.take().unwrap().read_to_string(&mut output).unwrap();
    assert!(output.ends_with("partita: stopped before the guest powered off\n"), "{output}");
}
