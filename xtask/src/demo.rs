//! `cargo xtask demo`: Debian Linux boots in a partition and works on a disk made for it.
//!
//! Where this host's KVM can be a Hyper-V host the guest runs on it directly; elsewhere the same
//! guest runs in the lab.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use anyhow::{Context, Result};
use kvm_ioctls::{Cap, Kvm};

use crate::lab::{self, LabOptions};
use crate::workspace;

/// What the guest does.
const SCRIPT: &str = include_str!("demo/guest.sh");

/// Size of its disk in bytes; the file is sparse.
const DISK: u64 = 256 << 20;

/// The options that the guest gets in either place, beside kernel, initrd and disk.
const GUEST: [&str; 6] =
    ["--memory", "512M", "--cmdline", "console=ttyS0 panic=-1 quiet", "--cpus", "2"];

/// Runs the demo and returns its exit status. `in_lab` takes it to the lab in any case.
pub(crate) fn run(in_lab: bool) -> Result<u8> {
    if !in_lab && kvm_boots_linux() { directly() } else { through_the_lab() }
}

/// Whether this host's KVM serves messages and events as a Hyper-V host, by which partita boots Linux.
fn kvm_boots_linux() -> bool {
    Kvm::new().is_ok_and(|kvm| kvm.check_extension(Cap::HypervSynic2))
}

fn directly() -> Result<u8> {
    let scratch = tempfile::tempdir().context("could not make a folder for the disk")?;
    let images = lab::guest_images(SCRIPT, scratch.path())?;
    let disk = scratch.path().join("disk.img");
    File::create(&disk)?.set_len(DISK)?;
    let partita = workspace::build_partita()?;
    eprintln!("demo: Debian boots with a disk of 256 MiB, {}", disk.display());
    let status = Command::new(partita)
        .args(["run", "--kernel"])
        .arg(&images.kernel)
        .arg("--initrd")
        .arg(&images.initrd)
        .arg("--disk")
        .arg(format!("path={}", disk.display()))
        .args(GUEST)
        .status()
        .context("could not start partita")?;
    Ok(status.code().or(status.signal()).and_then(|code| code.try_into().ok()).unwrap_or(1))
}

fn through_the_lab() -> Result<u8> {
    eprintln!("demo: this host's KVM is no Hyper-V host, so the guest runs in the lab");
    let scratch = tempfile::tempdir().context("could not make a folder for the script")?;
    let script = scratch.path().join("guest.sh");
    std::fs::write(&script, SCRIPT)?;
    let command = format!(
        "truncate -s {DISK} /tmp/disk.img && exec partita run --kernel /lab/cloud/vmlinuz \
         --initrd /lab/initrd --disk path=/tmp/disk.img {}",
        lab::shell_line(&GUEST),
    );
    let outcome = lab::run(&LabOptions {
        script: Some(script),
        command: ["sh", "-c", &command].map(str::to_owned).into(),
        ..LabOptions::default()
    })?;
    Ok(outcome.status)
}
