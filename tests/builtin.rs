//! The built-in guest in a real partition, where there is a KVM.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

fn partita(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_partita")).args(arguments).output().unwrap()
}

/// Whether there is a KVM that serves; otherwise a line says that the test was skipped.
fn kvm_is_there() -> bool {
    let there = hypervisor::kvm::open().is_ok_and(|kvm| {
        let interface = hypervisor::kvm::preferred_hyper_v(&kvm);
        hypervisor::kvm::lacking(&kvm, interface).is_none()
    });
    if !there {
        eprintln!("skipped: no KVM here that can run the built-in guest");
    }
    there
}

/// What a run that ended well printed.
fn output(arguments: &[&str]) -> String {
    let output = partita(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{:?}\n{text}\n{errors}", output.status);
    assert_eq!(errors, "");
    text
}

fn image(folder: &TempDir, name: &str, bytes: u64) -> String {
    let path = folder.path().join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_guest_works_on_its_disks() {
    if !kvm_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (image(&folder, "a", 2 << 20), image(&folder, "b", 1 << 20));
    let text = output(&[
        "run",
        "--builtin",
        "identify; verify disk=1 bytes=256k bs=4k; bench time=30ms depth=4",
        "--disk",
        &format!("path={first}"),
        "--disk",
        &format!("path={second},controller=2,lun=5"),
        "--memory",
        "64M",
    ]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].contains(r#""event":"connected","bus":"vmbus","version":"5.3","offers":2"#));
    assert!(text.contains(r#""disk":0,"driver":"storvsc","controller":0,"lun":0,"#), "{text}");
    assert!(text.contains(r#""disk":1,"driver":"storvsc","controller":1,"lun":5,"#), "{text}");
    assert!(text.contains(r#""result":"verify","disk":1,"bytes":262144,"#), "{text}");
    assert!(text.contains(r#""result":"bench","disk":0,"pattern":"rand","rw":"read","bs":4096"#));
    let bytes = std::fs::read(&second).unwrap();
    assert_ne!(bytes[..8], [0; 8]);
    assert_eq!(bytes[256 << 10..], [0; 768 << 10]);
    assert!(std::fs::read(&first).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn what_goes_wrong_in_the_guest_is_the_programs_status() {
    if !kvm_is_there() {
        return;
    }
    for (work, status, said) in [
        ("verify disk=7", 1, "there is no disk 7; there are 0, counted from 0"),
        ("dance", 2, "'dance' is no work; say identify, verify or bench"),
    ] {
        let output = partita(&["run", "--builtin", work, "--memory", "32M"]);
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&format!(r#"{{"error":"{said}"}}"#)), "{text}");
    }
}

#[test]
fn the_demo_shows_what_happened_and_leaves_nothing() {
    if !kvm_is_there() {
        return;
    }
    let text = output(&["demo"]);
    for part in [
        "host",
        "VMBus, version 5.3",
        "1 opened: a SCSI controller with 1 disk",
        "compared",
        "32 at a time",
        "the guest switched itself off",
    ] {
        assert!(text.contains(part), "no '{part}' in\n{text}");
    }
    let json = output(&["demo", "--json"]);
    assert!(json.starts_with('{') && json.ends_with("}\n") && json.contains(r#""ok":true"#));
    assert!(json.contains(r#""kept":null"#), "{json}");

    let json = output(&["demo", "--json", "--keep"]);
    let (_, rest) = json.split_once(r#""kept":""#).unwrap();
    let kept = Path::new(rest.split('"').next().unwrap());
    assert_eq!(std::fs::metadata(kept).unwrap().len(), 64 << 20);
    std::fs::remove_file(kept).unwrap();
}
