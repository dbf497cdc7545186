//! Debian's kernels and the modules of theirs that the lab takes along.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::packages::{Sysroot, empty_folder, file_name};

/// One of Debian's kernel builds.
pub(crate) struct Flavour {
    /// Our name for it: `/lab/NAME/vmlinuz`.
    pub(crate) name: &'static str,
    /// The metapackage that depends on its newest version.
    pub(crate) package: &'static str,
    /// Whether it is the backports', where there are any.
    pub(crate) backported: bool,
}

impl Flavour {
    /// What decides which package is fetched for it.
    pub(crate) fn wanted(&self) -> String {
        let from = if self.backported { "/backports" } else { "" };
        format!("{}:{}{from}", self.name, self.package)
    }
}

/// The kernels of the lab. The first is L1's own.
pub(crate) const FLAVOURS: &[Flavour] = &[
    Flavour { name: "cloud", package: "linux-image-cloud-amd64", backported: false },
    Flavour { name: "full", package: "linux-image-amd64", backported: false },
    Flavour { name: "new", package: "linux-image-cloud-amd64", backported: true },
];

/// Modules for a guest's devices, by kind. A kernel that has one built in, or has none, goes without.
pub(crate) const GUEST_MODULES: &[&str] = &[
    // Hyper-V
    "hv_vmbus hv_storvsc hv_netvsc hv_utils hv_balloon hv_sock pci-hyperv uio_hv_generic",
    "hyperv-keyboard hid-hyperv hyperv_fb",
    // SCSI and ATA
    "scsi_mod sd_mod sr_mod sg scsi_transport_fc libata ata_piix ata_generic floppy",
    // NICs
    "e1000 tulip 8139cp pcnet32 ne2k-pci af_packet tun 8021q",
    // virtio
    "virtio_pci virtio_blk virtio_scsi virtio_net virtio_console virtio_rng virtio_balloon",
    "vmw_vsock_virtio_transport 9p 9pnet_virtio",
    // file systems, and the checksums they ask for by name
    "ext4 vfat nls_ascii nls_cp437 nls_iso8859-1 isofs loop dm-mod",
    "crc32c_generic crc32c-intel crct10dif-pclmul crct10dif_generic",
    // the chipset
    "i2c-piix4 button evdev rtc-cmos",
];

/// Modules for L1: KVM, the channels to us, networks of its own, and disks that fail on demand.
pub(crate) const L1_MODULES: &[&str] = &[
    "kvm-amd irqbypass virtio_pci virtio_console virtio_blk",
    "tun tap bridge veth dummy 8021q sch_netem af_packet vhost_net vhost_vsock vsock",
    "loop nbd null_blk brd scsi_debug sd_mod sg dm-mod dm-flakey dm-delay",
    "fuse overlay squashfs vfat nls_ascii nls_cp437 isofs crc32c_generic crc32c-intel msr cpuid",
];

/// What modprobe reads beside the modules.
const INDICES: &[&str] = &[
    "modules.alias",
    "modules.alias.bin",
    "modules.builtin",
    "modules.builtin.alias.bin",
    "modules.builtin.bin",
    "modules.dep",
    "modules.dep.bin",
    "modules.softdep",
    "modules.symbols.bin",
];

/// An unpacked kernel package.
pub(crate) struct Kernel {
    /// Which build it is.
    pub(crate) flavour: &'static Flavour,
    /// What `uname -r` says in it.
    pub(crate) release: String,
    root: PathBuf,
}

impl Kernel {
    /// The kernel whose package was unpacked in `root`.
    pub(crate) fn find(flavour: &'static Flavour, root: &Path) -> Result<Self> {
        let boot = root.join("boot");
        let names =
            fs::read_dir(&boot).with_context(|| format!("no kernel in {}", boot.display()))?;
        let release = names
            .filter_map(|entry| {
                Some(entry.ok()?.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned())
            })
            .next()
            .with_context(|| format!("no kernel in {}", boot.display()))?;
        Ok(Self { flavour, release, root: root.to_owned() })
    }

    /// The bootable image.
    pub(crate) fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// Adds these groups of modules and all they depend on to an archive, with the indices modprobe reads.
    /// `scratch` is a folder to put them together in.
    pub(crate) fn add_modules(
        &self,
        archive: &mut Archive,
        modules: &[&str],
        sysroot: &Sysroot,
        scratch: &Path,
    ) -> Result<()> {
        let inside = format!("lib/modules/{}", self.release);
        let all = self.root.join(&inside);
        if !all.join("modules.dep").exists() {
            self.depmod(&self.root, sysroot)?;
        }
        let selection = closure(&fs::read_to_string(all.join("modules.dep"))?, modules);

        empty_folder(scratch)?;
        let some = scratch.join(&inside);
        let selection: Vec<String> = selection
            .iter()
            .map(|path| {
                // What is packed would be unpacked by each guest anew.
                let packed = path.strip_suffix(".xz");
                let plain = packed.unwrap_or(path);
                let (from, to) = (all.join(path), some.join(plain));
                fs::create_dir_all(to.parent().unwrap_or(&some))?;
                match packed {
                    Some(_) => unpack(&from, &to, sysroot),
                    None => fs::copy(&from, &to).map(drop).map_err(Into::into),
                }
                .with_context(|| format!("could not copy module {path}"))?;
                Ok(plain.to_owned())
            })
            .collect::<Result<_>>()?;
        // depmod reads these three beside the modules: what is built in, and in which order to prefer modules.
        for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
            fs::copy(all.join(list), some.join(list))
                .with_context(|| format!("could not copy {list}"))?;
        }
        self.depmod(scratch, sysroot)?;

        for path in &selection {
            archive.copy(&some.join(path), &format!("{inside}/{path}"))?;
        }
        // kmod reads the binary indices, busybox the text ones.
        for index in INDICES {
            archive.copy(&some.join(index), &format!("{inside}/{index}"))?;
        }
        Ok(())
    }

    fn depmod(&self, root: &Path, sysroot: &Sysroot) -> Result<()> {
        let output =
            sysroot.command("kmod", "depmod")?.arg("-b").arg(root).arg(&self.release).output()?;
        if !output.status.success() {
            bail!(
                "depmod failed for {}: {}",
                self.release,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

/// Unpacks a file that was packed by xz.
fn unpack(from: &Path, to: &Path, sysroot: &Sysroot) -> Result<()> {
    let status = sysroot
        .command("xz", "xz")?
        .args(["--decompress", "--stdout"])
        .arg(from)
        .stdout(File::create(to)?)
        .status()
        .context("could not start xz")?;
    if !status.success() {
        bail!("xz failed with {status}");
    }
    Ok(())
}

/// The paths of these modules and of those they depend on, from the text of a `modules.dep`.
fn closure(dependencies: &str, modules: &[&str]) -> BTreeSet<String> {
    // "kernel/a.ko: kernel/b.ko kernel/c.ko", the right side complete.
    let by_name: BTreeMap<String, (&str, &str)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (module_name(path), (path, needs)))
        .collect();
    let mut paths = BTreeSet::new();
    for (path, needs) in modules
        .iter()
        .flat_map(|group| group.split_whitespace())
        .filter_map(|name| by_name.get(&module_name(name)))
    {
        paths.insert((*path).to_owned());
        paths.extend(needs.split_whitespace().map(str::to_owned));
    }
    paths
}

/// A module's name as the kernel writes it, from a file or a name with either kind of dash.
fn module_name(path: &str) -> String {
    let file = file_name(Path::new(path));
    file.split_once(".ko").map_or(file, |(name, _)| name).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_holds_its_dependencies_and_skips_what_the_kernel_lacks() {
        let text = "kernel/hv/hv_vmbus.ko:\nkernel/scsi/hv_storvsc.ko: kernel/scsi/fc.ko kernel/hv/hv_vmbus.ko\n\
                    kernel/scsi/fc.ko:\nkernel/net/pci-hyperv.ko.xz:\n";
        let paths = closure(text, &["hv-storvsc pci_hyperv", "tulip"]);
        let expected = [
            "kernel/hv/hv_vmbus.ko",
            "kernel/net/pci-hyperv.ko.xz",
            "kernel/scsi/fc.ko",
            "kernel/scsi/hv_storvsc.ko",
        ];
        assert_eq!(paths, expected.map(str::to_owned).into());
    }
}
