//! Slim stand-ins for libraries that programs of the lab are linked with and never call there.
//!
//! Debian's fio binds clients of Ceph, GlusterFS, RDMA, persistent memory and NBD at its start, libpcap binds D-Bus,
//! libtirpc binds Kerberos, and with all that they depend on an initramfs would be five times its size. Nothing
//! calls them unless a job names such an engine or an interface such a source. So the lab's layers have libraries in
//! their place with the right names and symbol versions, and a trap instruction under each symbol.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The libraries replaced, and how the names of all their symbols begin, in small letters.
const REPLACED: &[(&str, &str)] = &[
    ("libdbus-1.so.3", "dbus_"),
    ("libgfapi.so.0", "glfs_"),
    ("libgssapi_krb5.so.2", "gss_"),
    ("libibverbs.so.1", "ibv_"),
    ("libnbd.so.0", "nbd_"),
    ("libpmem.so.1", "pmem_"),
    ("libpmemblk.so.1", "pmemblk_"),
    ("librados.so.2", "rados_"),
    ("librbd.so.1", "rbd_"),
    ("librdmacm.so.1", "rdma_"),
];

/// Makes the stand-ins that these programs and libraries need, in an empty folder.
pub(crate) fn make(users: &[PathBuf], folder: &Path) -> Result<()> {
    let output = Command::new("nm")
        .args(["--dynamic", "--undefined-only", "--with-symbol-versions"])
        .args(users)
        .output()
        .context("could not start nm (of binutils), which the lab needs")?;
    let listing = String::from_utf8_lossy(&output.stdout);
    // "                 U rbd_open@VERSION", the version or nothing.
    let symbols: BTreeSet<&str> =
        listing.lines().filter_map(|line| line.trim_start().strip_prefix("U ")).collect();
    for (library, prefix) in REPLACED {
        let symbols = symbols.iter().filter(|symbol| symbol.to_lowercase().starts_with(prefix));
        stand_in(library, symbols, folder)?;
    }
    Ok(())
}

/// Makes one library with these symbols, each `name` or `name@VERSION`.
fn stand_in<'a>(
    library: &str,
    symbols: impl Iterator<Item = &'a &'a str>,
    folder: &Path,
) -> Result<()> {
    let mut assembly = String::from(".text\n");
    let mut versions: BTreeMap<&str, String> = BTreeMap::new();
    for symbol in symbols {
        let (name, version) = symbol.split_once('@').unwrap_or((symbol, ""));
        writeln!(assembly, ".globl {name}\n.type {name},@function\n{name}: ud2")?;
        if !version.is_empty() {
            write!(versions.entry(version).or_default(), " {name};")?;
        }
    }
    assembly.push_str(".section .note.GNU-stack,\"\",@progbits\n");

    let (source, script) = (folder.join("stand-in.s"), folder.join("stand-in.map"));
    fs::write(&source, assembly)?;
    let mut link = Command::new("cc");
    link.args(["-shared", "-nostdlib", "-o"]).arg(folder.join(library)).arg(&source);
    link.arg(format!("-Wl,-soname,{library}"));
    if !versions.is_empty() {
        let nodes: String = versions
            .iter()
            .map(|(version, names)| format!("{version} {{ global:{names} }};\n"))
            .collect();
        fs::write(&script, nodes)?;
        link.arg(format!("-Wl,--version-script,{}", script.display()));
    }
    let output = link.output().context("could not start cc, which the lab needs")?;
    if !output.status.success() {
        bail!(
            "cc could not make a stand-in for {library}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
