//! Guests of a few bytes of code, which any KVM can run, and what there is here to run guests in.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::fs;
use std::path::Path;

/// Writes an ELF kernel with `code` at 16 MiB.
pub fn kernel(code: &[u8], path: &Path) {
    const HEADERS: usize = 64 + 56;
    const ADDRESS: u64 = 16 << 20;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    // An executable for x86-64, with one segment.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ADDRESS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // Loadable, readable and executable.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let length = code.len() as u64;
    for word in [HEADERS as u64, ADDRESS, ADDRESS, length, length, 4096] {
        elf.extend(word.to_le_bytes());
    }
    assert_eq!(elf.len(), HEADERS);
    elf.extend(code);
    fs::write(path, elf).unwrap();
}

/// Whether this host can run a guest at all.
pub fn has_kvm() -> bool {
    let there = hypervisor::kvm::open().is_ok();
    if !there {
        eprintln!("skipped: no KVM here");
    }
    there
}

/// What there is here for the built-in guest to run in, as `--partition` has it.
pub fn partitions() -> &'static [&'static str] {
    let kvm = hypervisor::kvm::open().is_ok_and(|kvm| {
        let interface = hypervisor::kvm::preferred_hyper_v(&kvm);
        hypervisor::kvm::lacking(&kvm, interface).is_none()
    });
    if !kvm {
        eprintln!("skipped with kvm: there is none here that can run the built-in guest");
    }
    if kvm { &["kvm", "hosted"] } else { &["hosted"] }
}
