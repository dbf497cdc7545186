//! What the limits of a process do to a run: nothing that ends it without a word.

mod common;

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use tempfile::TempDir;

/// The least memory of a guest, which counts as a file, and a little more.
const FILE_SIZE: u64 = 33 << 20;

/// partita as a shell runs it that has set limits before.
fn limited_command(limits: &str, arguments: &[&str]) -> Command {
    let script = format!("{limits} && exec \"$0\" \"$@\"");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_partita")]).args(arguments);
    command
}

fn limited(limits: &str, arguments: &[&str]) -> Output {
    limited_command(limits, arguments).output().unwrap()
}

/// The shell's own unit is 512 bytes.
fn file_size(bytes: u64) -> String {
    format!("ulimit -f {}", bytes / 512)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn image(folder: &TempDir, bytes: u64) -> String {
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The one line with which a run did not start.
fn refusal(output: &Output) -> String {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{:?} {said}", output.status);
    assert_eq!(said.lines().count(), 1, "{said}");
    said.trim_end().to_owned()
}

#[test]
fn a_write_beyond_the_file_size_limit_is_an_error_to_the_guest_and_the_program_lives() {
    let folder = tempfile::tempdir().unwrap();
    let disk = image(&folder, FILE_SIZE + (4 << 20));
    let full = ["sense 7/27/07", "the drive refused with status 0x"];
    for partition in common::partitions() {
        for (how, told) in [("", full[0]), (",direct=off", full[0]), (",attach=ide", full[1])] {
            let disk = format!("{disk}{how}");
            let output = limited(
                &file_size(FILE_SIZE),
                &[
                    "run",
                    "--partition",
                    partition,
                    "--memory",
                    "32M",
                    "--builtin",
                    "verify bytes=36M bs=128k depth=2",
                    "--disk",
                    &disk,
                ],
            );
            let (out, said) = (text(&output.stdout), text(&output.stderr));
            assert_eq!(output.status.signal(), None, "{disk} in {partition}: {said}");
            assert_eq!(output.status.code(), Some(1), "{disk} in {partition}: {out}{said}");
            assert!(out.contains(r#"{"error":"the write of block "#), "{out}{said}");
            assert!(out.contains(told), "{disk} in {partition}: {out}{said}");
            assert!(said.contains("within the limit for file sizes"), "{said}");
        }
    }
}

#[test]
fn guest_memory_beyond_the_file_size_limit_is_one_line() {
    for partition in common::partitions() {
        let run = ["run", "--partition", partition, "--builtin", "identify", "--memory", "64M"];
        let line = refusal(&limited(&file_size(FILE_SIZE), &run));
        assert_eq!(
            line,
            "partita: cannot allocate 67108864 bytes of guest memory, which is a file; raise the \
             limit for file sizes (ulimit -f)"
        );
    }
    let line = refusal(&limited(&file_size(FILE_SIZE), &["demo"]));
    assert!(line.starts_with("partita: cannot give the scratch disk its size: "), "{line}");
}

#[test]
fn a_capture_beyond_the_file_size_limit_ends_and_the_guest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let capture = folder.path().join("a.pcapng");
    let nic = format!("switch:a,pcap={}", capture.display());
    let output = limited(
        &file_size(FILE_SIZE),
        &[
            "run",
            "--memory",
            "32M",
            "--builtin",
            "exchange len=1514 frames=30000",
            "--nic",
            &nic,
            "--nic",
            "switch:a",
        ],
    );
    let (out, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{:?}: {out}{said}", output.status);
    assert!(out.contains(r#""result":"exchange""#), "{out}");
    // 90 MB have passed. On a host that is busy the capture may have missed most of it.
    let captured = capture.metadata().unwrap().len();
    assert!(captured <= FILE_SIZE);
    assert_eq!(said.contains("a.pcapng ends early"), captured == FILE_SIZE, "{captured}: {said}");
}

#[test]
fn a_console_beyond_the_file_size_limit_does_not_end_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console.log");
    File::create(&path).unwrap().set_len(FILE_SIZE - 20).unwrap();
    let console = File::options().append(true).open(&path).unwrap();
    let run = ["run", "--memory", "32M", "--builtin", "identify"];
    let output = limited_command(&file_size(FILE_SIZE), &run).stdout(console).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{:?}: {}", output.status, text(&output.stderr));
    assert_eq!(path.metadata().unwrap().len(), FILE_SIZE);
}

#[test]
fn descriptors_are_had_up_to_the_hard_limit_and_too_few_are_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let disk = image(&folder, 1 << 20);
    let run = ["run", "--memory", "32M", "--builtin", "verify bytes=64k", "--disk", &disk];
    let output = limited("ulimit -Sn 12", &run);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    // As few as are asked for are enough.
    let line = refusal(&limited("ulimit -n 12", &run));
    let (_, needed) = line.split_once("this machine may open ").unwrap();
    let needed = needed.split(';').next().unwrap();
    assert_eq!(
        line,
        format!(
            "partita: the limit of open files is 12, and this machine may open {needed}; raise it \
             (ulimit -Hn {needed}, systemd's LimitNOFILE=) or give it fewer devices"
        )
    );
    for partition in common::partitions() {
        let run = [&run[..], &["--partition", partition]].concat();
        let output = limited(&format!("ulimit -n {needed}"), &run);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
}
