//! The same reads by fio, with io_uring.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::rig::{Order, Reads};

/// fio's version, if it is installed.
pub fn version() -> Option<String> {
    let output = Command::new("fio").arg("--version").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Reads a second that fio makes of `file`, past the page cache if `direct`.
pub fn read(file: &Path, reads: &Reads, time: Duration, direct: bool) -> anyhow::Result<f64> {
    let rw = match reads.order {
        Order::Sequential => "read",
        Order::Random => "randread",
    };
    let output = Command::new("fio")
        .args(["--name=peer", "--ioengine=io_uring", "--thread=1", "--readonly", "--time_based"])
        .args(["--norandommap=1", "--random_generator=tausworthe64", "--gtod_reduce=1"])
        .args(["--output-format=terse", "--terse-version=3"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={rw}"))
        .arg(format!("--bs={}", reads.block))
        .arg(format!("--iodepth={}", reads.depth))
        .arg(format!("--direct={}", u8::from(direct)))
        .arg(format!("--runtime={}ms", time.as_millis()))
        .output()
        .context("cannot run fio")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    rate(&text).with_context(|| format!("cannot make sense of fio's output: {text}"))
}

/// The eighth field of terse version 3: reads a second.
fn rate(terse: &str) -> Option<f64> {
    let line = terse.lines().find(|line| line.starts_with("3;"))?;
    line.split(';').nth(7)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::rate;

    #[test]
    fn terse_output_is_read() {
        assert_eq!(rate("note\n3;fio-3.33;peer;0;0;1024;512;12345;2000;0\n"), Some(12345.0));
        assert_eq!(rate("fio: no\n"), None);
    }
}
