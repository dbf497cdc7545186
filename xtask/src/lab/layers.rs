//! What is in L1 and in its guests: initramfs layers, made once and kept as long as what they are made of.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::kernel::{GUEST_MODULES, Kernel, L1_MODULES};
use super::packages::{LOADER, Packages, empty_folder, file_name, libraries_listed_by};
use super::{LabFile, concatenate, stand_ins};
use crate::progress;

/// What the layers are made by: with the packages' versions, all that decides their content.
const RECIPE: &[&str] = &[
    include_str!("layers.rs"),
    include_str!("cpio.rs"),
    include_str!("kernel.rs"),
    include_str!("stand_ins.rs"),
    L1_INIT,
    GUEST_INIT,
    SCRIPT_LAYER,
    WITH_SCRIPT,
    WAIT_FOR,
];
const L1_INIT: &str = include_str!("images/l1-init.sh");
const GUEST_INIT: &str = include_str!("images/guest-init.sh");
const SCRIPT_LAYER: &str = include_str!("images/script-layer.sh");
const WITH_SCRIPT: &str = include_str!("images/with-script.sh");
const WAIT_FOR: &str = include_str!("images/wait-for.sh");

/// Where shared libraries go: one folder of the loader's default path.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";

/// Programs in guests and in L1 beside busybox's, by kind.
const TOOLS: &[&str] = &[
    "fio hdparm smartctl mkfs.ext4 e2fsck tune2fs resize2fs dumpe2fs blkdiscard fstrim lsblk",
    "sg_dd sg_get_lba_status sg_inq sg_luns sg_logs sg_modes sg_opcodes sg_persist sg_raw sg_read",
    "sg_readcap sg_requests sg_reset sg_start sg_sync sg_turs sg_unmap sg_verify sg_vpd",
    "sg_write_same sg_write_verify",
    "ip tc ss bridge iperf3 ethtool tcpdump",
    "dash kmod taskset",
];

/// Programs in L1 only.
const L1_TOOLS: &[&str] = &["debugfs filefrag passt prlimit setpriv strace chrt unshare xorriso"];

/// The emulator as a peer of ours, in L1 with `--peers`.
const PEERS: &[&str] = &["qemu-system-x86_64 qemu-storage-daemon qemu-img qemu-io qemu-nbd"];

/// Firmware the peers load, folder by folder, by the beginnings of its names.
const FIRMWARE: &[(&str, &[&str])] = &[
    ("usr/share/qemu", &["kvmvapic", "linuxboot", "multiboot", "pvh", "qboot", "bios"]),
    ("usr/share/seabios", &["bios", "vgabios-stdvga"]),
    ("usr/lib/ipxe/qemu", &["efi-e1000.", "efi-virtio.", "pxe-e1000.", "pxe-virtio."]),
];

/// kmod's names.
const KMOD_LINKS: &[&str] = &["modprobe", "insmod", "rmmod", "lsmod", "modinfo"];

/// Makes layers in a folder.
pub(crate) struct Layers<'a> {
    packages: &'a Packages,
    folder: PathBuf,
}

impl<'a> Layers<'a> {
    /// Layers made of these packages, kept in `folder`.
    pub(crate) fn new(packages: &'a Packages, folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { packages, folder })
    }

    /// The guest's whole initramfs, for each of the kernels.
    pub(crate) fn guest(&self) -> Result<PathBuf> {
        let parts: Vec<_> = self.guest_parts()?.into_iter().map(|(_, part)| part).collect();
        self.cached("guest", |whole| concatenate(&parts, whole))
    }

    /// What the guest's initramfs is put together of: first what all kernels need, then each one's modules, by its
    /// name. All lengths are multiples of 512 bytes.
    fn guest_parts(&self) -> Result<Vec<(&'static str, PathBuf)>> {
        let base = self.cached_archive("guest-programs", |archive| {
            self.add_basics(archive, GUEST_INIT)?;
            self.add_programs(archive, TOOLS)?;
            archive.file("usr/bin/wait-for", 0o755, WAIT_FOR.as_bytes())
        })?;
        let mut parts = vec![("programs", base)];
        for kernel in &self.packages.kernels {
            let name = kernel.flavour.name;
            let modules = self.cached_archive(&format!("guest-{name}"), |archive| {
                self.add_modules(archive, GUEST_MODULES, kernel)
            })?;
            parts.push((name, modules));
        }
        Ok(parts)
    }

    /// The part of L1's that every call has.
    pub(crate) fn l1(&self) -> Result<PathBuf> {
        let guest = self.guest()?;
        let mut parts = String::new();
        let mut offset = 0;
        for (name, path) in self.guest_parts()? {
            let length = path.metadata()?.len();
            writeln!(parts, "{name} {offset} {length}")?;
            offset += length;
        }
        self.cached_archive("l1", |archive| {
            self.add_basics(archive, L1_INIT)?;
            self.add_programs(archive, &[TOOLS, L1_TOOLS].concat())?;
            if let Some(kernel) = self.packages.kernels.first() {
                self.add_modules(archive, L1_MODULES, kernel)?;
            }
            archive.file("lab/parts", 0o644, parts.as_bytes())?;
            archive.file("lab/bin/script-layer", 0o755, SCRIPT_LAYER.as_bytes())?;
            archive.file("lab/bin/with-script", 0o755, WITH_SCRIPT.as_bytes())?;
            archive.file("lab/bin/wait-for", 0o755, WAIT_FOR.as_bytes())?;
            for kernel in &self.packages.kernels {
                archive.copy(&kernel.image(), &format!("lab/{}/vmlinuz", kernel.flavour.name))?;
            }
            archive.copy(&guest, "lab/initrd")
        })
    }

    /// The emulator and its firmware for L1.
    pub(crate) fn peers(&self) -> Result<PathBuf> {
        self.cached_archive("peers", |archive| {
            self.add_programs(archive, PEERS)?;
            for (folder, beginnings) in FIRMWARE {
                for entry in fs::read_dir(self.packages.sysroot.path(folder))? {
                    let path = entry?.path();
                    let name = file_name(&path);
                    if beginnings.iter().any(|start| name.starts_with(start)) && path.is_file() {
                        archive.copy(&path, &format!("{folder}/{name}"))?;
                    }
                }
            }
            Ok(())
        })
    }

    /// What one call brings: the program under test, the command, the script and files.
    pub(crate) fn call(
        &self,
        partita: &Path,
        command: &str,
        script: Option<&Path>,
        files: &[LabFile],
    ) -> Result<PathBuf> {
        let path = self.folder.join("call.cpio");
        let mut archive = Archive::create(&path)?;
        archive.copy(partita, "usr/bin/partita")?;
        for library in self.host_libraries(partita)? {
            archive.copy(&library, &format!("{LIBRARIES}/{}", file_name(&library)))?;
        }
        archive.copy(&Path::new("/").join(LOADER), LOADER)?;
        archive.file("lab/command", 0o644, command.as_bytes())?;
        if let Some(script) = script {
            archive.copy(script, "lab/script")?;
        }
        let given: String = files.iter().map(|file| format!("{}\n", file.destination)).collect();
        archive.file("lab/given", 0o644, given.as_bytes())?;
        for file in files {
            add_tree(&mut archive, &file.source, file.destination.trim_start_matches('/'))?;
        }
        archive.finish()?;
        Ok(path)
    }

    /// The layer of this name as an archive of its own.
    fn cached_archive(
        &self,
        name: &str,
        make: impl FnOnce(&mut Archive) -> Result<()>,
    ) -> Result<PathBuf> {
        self.cached(name, |layer| {
            let mut archive = Archive::create(layer)?;
            make(&mut archive)?;
            archive.finish().map(drop)
        })
    }

    /// The layer of this name, made anew if what it is made of has changed.
    fn cached(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let mut hasher = DefaultHasher::new();
        (RECIPE, &self.packages.versions).hash(&mut hasher);
        let recipe = format!("{:016x}", hasher.finish());

        let (layer, stamp) =
            (self.folder.join(format!("{name}.cpio")), self.folder.join(format!("{name}.recipe")));
        if layer.exists() && fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == recipe) {
            return Ok(layer);
        }
        let _step = progress::step(format!("lab: making the {name} layer"));
        let _ = fs::remove_file(&stamp);
        make(&layer).with_context(|| format!("could not make the {name} layer"))?;
        fs::write(&stamp, recipe)?;
        Ok(layer)
    }

    /// A console, an init, a shell and mount points.
    fn add_basics(&self, archive: &mut Archive, init: &str) -> Result<()> {
        for folder in ["dev", "proc", "sys", "run", "tmp", "root", "mnt", "etc", "var", "bin"] {
            archive.folder(folder)?;
        }
        archive.character_device("dev/console", 5, 1)?;
        archive.file("init", 0o755, init.as_bytes())?;
        archive.symlink("etc/mtab", "/proc/self/mounts")?;
        // What root starts and needs no rights, such as passt, goes on as nobody.
        let users = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
        archive.file("etc/passwd", 0o644, users)?;
        archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
        // What mount tries on a disk when it is not told a type.
        archive.file("etc/filesystems", 0o644, b"ext4\nvfat\niso9660\n")?;
        archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;

        let busybox = self.packages.sysroot.program("busybox")?;
        archive.copy(&busybox, "bin/busybox")?;
        let output = Command::new(&busybox)
            .arg("--list")
            .output()
            .context("could not list busybox's applets")?;
        // Real programs lie in /usr/bin and come first; here is everything else. The shell is dash because busybox's
        // own would take its applets before programs of the same name.
        for applet in String::from_utf8_lossy(&output.stdout).lines() {
            if !["busybox", "sh"].contains(&applet) {
                archive.symlink(&format!("bin/{applet}"), "busybox")?;
            }
        }
        archive.symlink("bin/sh", "../usr/bin/dash")?;
        // The paths the kernel and scripts name.
        archive.symlink("sbin", "usr/bin")?;
        archive.symlink("usr/sbin", "bin")?;
        for link in KMOD_LINKS {
            archive.symlink(&format!("usr/bin/{link}"), "kmod")?;
        }
        Ok(())
    }

    /// Programs with their libraries and the loader.
    fn add_programs(&self, archive: &mut Archive, programs: &[&str]) -> Result<()> {
        let sysroot = &self.packages.sysroot;
        let stand_ins = self.folder.join("stand-ins");
        empty_folder(&stand_ins)?;
        stand_ins::make(&self.users_of_stand_ins()?, &stand_ins)?;
        let mut libraries = BTreeSet::new();
        for name in words(programs) {
            let program = sysroot.program(name)?;
            archive.copy(&program, &format!("usr/bin/{name}"))?;
            libraries.extend(sysroot.libraries(&program, &[&stand_ins])?);
        }
        for library in &libraries {
            archive.copy(library, &format!("{LIBRARIES}/{}", file_name(library)))?;
        }
        archive.copy(&sysroot.loader_file(), LOADER)
    }

    /// Programs and libraries that get stand-ins. All layers need the same ones, for they share a folder.
    fn users_of_stand_ins(&self) -> Result<Vec<PathBuf>> {
        let sysroot = &self.packages.sysroot;
        let programs = words(PEERS).chain(["fio"]).map(|name| sysroot.program(name));
        let libraries = ["libpcap.so.0.8", "libtirpc.so.3"].map(|name| sysroot.library(name));
        programs.chain(libraries).collect()
    }

    /// These modules of a kernel.
    fn add_modules(&self, archive: &mut Archive, modules: &[&str], kernel: &Kernel) -> Result<()> {
        let scratch = self.folder.join("modules");
        kernel.add_modules(archive, modules, &self.packages.sysroot, &scratch)
    }

    /// The host's libraries that a program built here loads. Where the host's libc is not the one of the packages, all
    /// of its family comes along, for its members only fit each other.
    fn host_libraries(&self, program: &Path) -> Result<Vec<PathBuf>> {
        let mut libraries = libraries_listed_by(Command::new("ldd").arg(program), program)?;
        let Some(libc) = libraries.iter().find(|path| file_name(path) == "libc.so.6") else {
            return Ok(libraries);
        };
        let ours = self.packages.sysroot.loader_file().with_file_name("libc.so.6");
        if fs::read(libc)? != fs::read(ours)? {
            let family = [
                "m",
                "mvec",
                "pthread",
                "dl",
                "rt",
                "util",
                "resolv",
                "anl",
                "nss_files",
                "nss_dns",
            ];
            let members = ["6", "1", "2", "0"]
                .map(|version| family.map(|name| format!("lib{name}.so.{version}")));
            let members: Vec<_> =
                members.iter().flatten().map(|name| libc.with_file_name(name)).collect();
            libraries.extend(members.into_iter().filter(|path| path.exists()));
            libraries.sort();
            libraries.dedup();
        }
        Ok(libraries)
    }
}

/// The words of groups of words.
fn words<'a>(groups: &[&'a str]) -> impl Iterator<Item = &'a str> {
    groups.iter().flat_map(|group| group.split_whitespace())
}

/// Adds a file, or a folder with all that is in it.
fn add_tree(archive: &mut Archive, source: &Path, destination: &str) -> Result<()> {
    let metadata =
        source.metadata().with_context(|| format!("could not read {}", source.display()))?;
    if !metadata.is_dir() {
        return archive.copy(source, destination);
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        bail!("could not look into {}", source.display());
    }
    archive.folder(destination)?;
    for entry in fs::read_dir(source)? {
        let path = entry?.path();
        add_tree(archive, &path, &format!("{destination}/{}", file_name(&path)))?;
    }
    Ok(())
}
