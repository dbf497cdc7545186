//! Outputs in any state: the serial port's and the program's messages. Whoever reads gets everything,
//! and who does not holds up neither the guest nor its end.

mod common;

use std::fs::File;
use std::io::{Read, pipe};
use std::process::Stdio;
use std::thread;

use common::{HALTS, Kernel, PRINTS, Running, counts, fill, has_kvm, until};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;

/// What [`counts`] prints.
fn counted(count: u32) -> Vec<u8> {
    (0..count).map(|n| n as u8).collect()
}

#[test]
fn a_slow_reader_gets_every_byte_also_of_a_pipe_that_does_not_block() {
    if !has_kvm() {
        return;
    }
    // More than the pipe and the program keep together.
    const COUNT: u32 = 150_000;
    let kernel = Kernel::new(&counts(COUNT));
    for nonblocking in [false, true] {
        let (mut reader, writer) = pipe().unwrap();
        if nonblocking {
            let flags = fcntl_getfl(&writer).unwrap();
            fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
        }
        let mut run = Running::new(kernel.run(&[]).stdout(writer));
        let (mut read, mut some) = (Vec::<u8>::new(), [0; 3000]);
        loop {
            match reader.read(&mut some).unwrap() {
                0 => break,
                count => read.extend(&some[..count]),
            }
            thread::yield_now();
        }
        assert_eq!(run.wait().code(), Some(0));
        assert!(read == counted(COUNT), "{} of {COUNT} bytes", read.len());
        assert_eq!(run.said(), "");
    }
}

#[test]
fn a_guest_whose_output_nobody_reads_goes_on_to_its_end() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(&counts(200_000));
    let (reader, writer) = pipe().unwrap();
    let mut run = Running::new(kernel.run(&[]).stdout(writer));
    assert_eq!(run.wait().code(), Some(0));
    let said = run.said();
    assert!(said.contains("nobody takes the serial port's output"), "{said}");
    assert!(said.contains("bytes of the serial port's output were not read"), "{said}");
    drop(reader);
}

#[test]
fn a_full_disk_costs_the_serial_ports_output_and_nothing_else() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(&counts(20_000));
    let mut run = Running::new(&mut kernel.run(&["--serial", "file:/dev/full"]));
    assert_eq!(run.wait().code(), Some(0));
    let said = run.said();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("No space left on device"), "{said}");
}

#[test]
fn a_file_gets_every_byte() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(&counts(20_000));
    let log = kernel.folder.path().join("console.log");
    let serial = format!("file:{}", log.display());
    let mut run = Running::new(&mut kernel.run(&["--serial", &serial]));
    assert_eq!(run.wait().code(), Some(0));
    assert!(common::contents(&mut File::open(log).unwrap()) == counted(20_000));
    assert_eq!(run.said(), "");
}

/// Standard errors that nobody can be told anything by.
fn deaf() -> Vec<(&'static str, Stdio, Box<dyn Send>)> {
    let (gone, to_nobody) = pipe().unwrap();
    drop(gone);
    let (stalled, full) = pipe().unwrap();
    fill(&full);
    vec![
        ("a pipe without a reader", to_nobody.into(), Box::new(())),
        ("a stalled pipe", full.into(), Box::new(stalled)),
        (
            "a full disk",
            File::options().write(true).open("/dev/full").unwrap().into(),
            Box::new(()),
        ),
    ]
}

/// Writes its crash register, of which the program tells, and prints `k`.
fn crashes() -> Vec<u8> {
    // mov ecx, 0x40000105; xor eax, eax; mov edx, 1 << 31; wrmsr
    let mut code = vec![0xb9, 0x05, 0x01, 0x00, 0x40, 0x31, 0xc0, 0xba, 0, 0, 0, 0x80, 0x0f, 0x30];
    code.extend(HALTS);
    code
}

#[test]
fn a_message_that_nobody_hears_costs_nothing() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(&crashes());
    for (what, stderr, _kept) in deaf() {
        let mut command = kernel.run(&["--synic", "user"]);
        // Everything that can be said.
        command.env("RUST_LOG", "trace").stderr(stderr);
        let mut run = Running::new(&mut command);
        assert_eq!(run.byte(), b'k', "{what}");
        run.signal(Signal::USR1);
        run.signals(&[Signal::INT, Signal::INT]);
        assert_eq!(run.wait().code(), Some(1), "{what}");
    }
}

#[test]
fn two_signals_end_a_run_whatever_its_outputs_do() {
    if !has_kvm() {
        return;
    }
    let kernel = Kernel::new(PRINTS);
    let pairs = [
        [Signal::INT, Signal::INT],
        [Signal::TERM, Signal::TERM],
        [Signal::INT, Signal::TERM],
        [Signal::HUP, Signal::INT],
    ];
    for (signals, nonblocking) in pairs.into_iter().zip([false, true, false, true]) {
        // Both outputs are one pipe that nobody reads.
        let (reader, writer) = pipe().unwrap();
        fill(&writer);
        if nonblocking {
            let flags = fcntl_getfl(&writer).unwrap();
            fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
        }
        let mut command = kernel.run(&[]);
        let mut run = Running::new(command.stdout(writer.try_clone().unwrap()).stderr(writer));
        // So long a guest can only print that does not wait for a reader.
        until("the guest does not go on", || (run.ticks("vp0")? >= 120).then_some(()));
        run.signals(&signals);
        assert_eq!(run.wait().code(), Some(1), "{signals:?}");
        drop(reader);
    }
}
