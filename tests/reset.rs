//! A guest that writes to the reset register starts anew, though it does nothing else that the
//! hypervisor would hear of.

mod common;

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Far longer than two starts take.
const PATIENCE: Duration = Duration::from_secs(60);

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
