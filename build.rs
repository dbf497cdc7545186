//! Builds the built-in guest's image, which the program carries: a cargo of its own, in a target
//! folder of its own, for the same processor but linked for none of its operating systems.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the image's code comes from.
const SOURCES: [&str; 3] = ["guest-drivers", "vsc", "vmbus"];

/// The host's target, whose precompiled core library every toolchain has.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    for folder in SOURCES {
        println!("cargo::rerun-if-changed={folder}/Cargo.toml");
        println!("cargo::rerun-if-changed={folder}/src");
    }
    for file in ["guest-drivers/build.rs", "guest-drivers/image.ld", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={file}");
    }

    let target = Path::new(&variable("OUT_DIR")).join("image");
    let mut command = Command::new(variable("CARGO"));
    command
        .current_dir(&root)
        .args(["build", "--quiet", "--offline", "--release", "--package", "guest-drivers"])
        .args(["--bin", "builtin-guest", "--features", "image", "--target", TARGET])
        .env("CARGO_TARGET_DIR", &target)
        // It lies where it is linked to, and has nobody to unwind to.
        .env("CARGO_ENCODED_RUSTFLAGS", "-Crelocation-model=static\x1f-Cpanic=abort")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    // What concerns this build and not that one: lints, coverage, the target of this script.
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"] {
        command.env_remove(name);
    }
    let status = command.status().expect("cargo can be run");
    assert!(status.success(), "the built-in guest's image does not build");
    let image = target.join(TARGET).join("release/builtin-guest");
    println!("cargo::rustc-env=BUILTIN_GUEST={}", image.display());
}
