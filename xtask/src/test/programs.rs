//! Test programs of the workspace that run in L1, beside its whole KVM.
//!
//! A lab test that takes some along says so in a line of its own, as `CRATE/TEST`:
//!
//! ```sh
//! # programs: hypervisor/hyper_v hypervisor/kvm
//! ```
//!
//! It finds them in /lab/programs, by the names of the tests.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::lab::LabFile;
use crate::workspace;

/// What the line that names test programs begins with.
const MARK: &str = "# programs: ";

/// Where they are in L1.
const FOLDER: &str = "/lab/programs";

/// Builds the programs that a lab test asks for, as `cargo test` would.
pub(super) fn wanted_by(script: &Path) -> Result<Vec<LabFile>> {
    let text = std::fs::read_to_string(script)
        .with_context(|| format!("could not read {}", script.display()))?;
    named_in(&text)?
        .into_iter()
        .map(|(package, test)| {
            let destination = format!("{FOLDER}/{test}");
            Ok(LabFile { source: build(package, test)?, destination })
        })
        .collect()
}

/// The packages and tests that a script names.
fn named_in(script: &str) -> Result<Vec<(&str, &str)>> {
    let names = script.lines().filter_map(|line| line.strip_prefix(MARK));
    names
        .flat_map(str::split_whitespace)
        .map(|name| name.split_once('/').with_context(|| format!("{name:?} is no CRATE/TEST")))
        .collect()
}

/// Builds the program of one test.
fn build(package: &str, test: &str) -> Result<PathBuf> {
    let output = workspace::cargo()
        .args(["test", "--quiet", "--no-run", "--message-format=json-render-diagnostics"])
        .args(["--package", package, "--test", test])
        .stderr(Stdio::inherit())
        .output()
        .context("could not start cargo")?;
    if !output.status.success() {
        bail!("test {test} of {package} does not build");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    program_among(&messages).with_context(|| format!("cargo names no program for test {test}"))
}

/// The last executable that cargo's messages name: what is built before it is the package's own,
/// which its tests may start.
fn program_among(messages: &str) -> Option<PathBuf> {
    let (_, rest) = messages.rsplit_once(r#""executable":""#)?;
    rest.split_once('"').map(|(path, _)| path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_names_its_programs_in_lines_of_their_own() {
        let script = "#!/bin/sh\n# Shows that.\n# programs: a/b c/d\nrun # programs: no/no\n";
        assert_eq!(named_in(script).unwrap(), [("a", "b"), ("c", "d")]);
        assert_eq!(named_in("#!/bin/sh\n").unwrap(), []);
        assert!(named_in("# programs: hyper_v\n").is_err());
    }

    #[test]
    fn the_last_executable_is_the_tests() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null,\"fresh\":true}\n\
            {\"reason\":\"compiler-artifact\",\"executable\":\"/t/debug/program\",\"fresh\":true}\n\
            {\"reason\":\"compiler-artifact\",\"executable\":\"/t/debug/deps/test-1\",\"fresh\":true}\n\
            {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(program_among(messages), Some("/t/debug/deps/test-1".into()));
        assert_eq!(program_among("{\"executable\":null}\n"), None);
    }
}
