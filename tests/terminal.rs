//! What a run gets from a terminal or a pipe: on a terminal keys are the guest's but for a few, and it
//! is as before when the run is over; of a pipe everything is the guest's.

mod common;

use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::thread;

use common::{ECHOES, HALTS, Kernel, Running, has_kvm};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

/// Everything that two states of a terminal can differ in.
fn modes(of: &Termios) -> [u32; 4] {
    [of.input_modes.bits(), of.output_modes.bits(), of.control_modes.bits(), of.local_modes.bits()]
}

/// A program at a terminal.
struct Seat {
    run: Running,
    /// What the user sees and types at.
    screen: File,
    terminal: OwnedFd,
    before: [u32; 4],
    _kernel: Kernel,
}

impl Seat {
    fn new(code: &[u8]) -> Self {
        let kernel = Kernel::new(code);
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let terminal: OwnedFd = File::options().read(true).write(true).open(name).unwrap().into();
        let before = tcgetattr(&terminal).unwrap();
        assert!(before.local_modes.contains(LocalModes::ICANON));
        let mut command = kernel.run(&[]);
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
        let run = Running::new(&mut command);
        let mut seat =
            Self { run, screen: master.into(), terminal, before: modes(&before), _kernel: kernel };
        assert_eq!(seat.see(1), b"k");
        let during = tcgetattr(&seat.terminal).unwrap();
        assert!(!during.local_modes.intersects(LocalModes::ICANON | LocalModes::ISIG));
        seat
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.screen.write_all(keys).unwrap();
    }

    fn see(&mut self, count: usize) -> Vec<u8> {
        let mut seen = vec![0; count];
        self.screen.read_exact(&mut seen).unwrap();
        seen
    }

    /// It has been told to end. What it said.
    fn end(mut self) -> String {
        assert_eq!(self.run.wait().code(), Some(1));
        assert_eq!(modes(&tcgetattr(&self.terminal).unwrap()), self.before);
        self.run.said()
    }
}

const HINT: &str = "partita: Ctrl-A x ends the guest, Ctrl-A h lists the keys\n";
const STOPPED: &str = "partita: stopped before the guest powered off\n";

#[test]
fn every_key_is_the_guests_but_those_after_ctrl_a() {
    if !has_kvm() {
        return;
    }
    let mut seat = Seat::new(ECHOES);
    // Ctrl-C as often as a key that repeats sends it, and what other programs do something at.
    let keys = b"\x03\x03\x03\x03\x1c\x1a\x04 x";
    seat.type_keys(keys);
    assert_eq!(seat.see(keys.len()), keys);
    seat.type_keys(b"\x01\x01y\x01h\x01bz");
    assert_eq!(seat.see(5), b"\x01y\x01bz");
    seat.type_keys(b"\x01x");
    let said = seat.end();
    let help = said.strip_prefix(HINT).and_then(|said| said.strip_suffix(STOPPED));
    assert!(help.is_some_and(|help| help.contains("Ctrl-A Ctrl-A sends one Ctrl-A")), "{said}");
}

#[test]
fn keys_that_the_guest_does_not_read_do_not_keep_ctrl_a_x_from_ending_it() {
    if !has_kvm() {
        return;
    }
    let mut seat = Seat::new(HALTS);
    seat.type_keys(&[b'x'; 70]);
    // Far more than the program keeps.
    for _ in 0..300 {
        seat.type_keys(&[b'x'; 1000]);
    }
    seat.type_keys(b"\x01x");
    assert_eq!(seat.end(), format!("{HINT}{STOPPED}"));
}

/// With everything in it that would be an escape on a terminal.
#[test]
fn what_comes_by_a_pipe_is_the_guests_as_it_is_also_if_it_does_not_block() {
    if !has_kvm() {
        return;
    }
    let text: Vec<u8> = b"\x01x\x01h\x03\x03".iter().copied().cycle().take(20_000).collect();
    let kernel = Kernel::new(ECHOES);
    for nonblocking in [false, true] {
        let (reader, mut writer) = pipe().unwrap();
        if nonblocking {
            let flags = fcntl_getfl(&reader).unwrap();
            fcntl_setfl(&reader, flags | OFlags::NONBLOCK).unwrap();
        }
        let mut run = Running::new(kernel.run(&[]).stdin(reader));
        // Now it has found nothing there.
        assert_eq!(run.byte(), b'k');
        let sent = text.clone();
        let sender = thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut echo = vec![0; text.len()];
        run.0.stdout.as_mut().unwrap().read_exact(&mut echo).unwrap();
        sender.join().unwrap();
        assert!(echo == text);
        // The end of it is not the guest's.
        run.signals(&[Signal::TERM, Signal::TERM]);
        assert_eq!(run.wait().code(), Some(1));
    }
}
