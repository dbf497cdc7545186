//! The lab's Debian packages, unpacked in a folder of their own.
//!
//! Nothing is installed on the host and no root is needed: apt runs with its lists, its archive and its idea of
//! what is installed (nothing) in the lab's folder, and gives the packages below with all they depend on, in
//! the versions of the host's own sources; the emulator and a newer kernel in those of [`backports`]. They are
//! unpacked into a [`Sysroot`], whose programs run through the dynamic loader that came with them.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::backports;
use super::kernel::{FLAVOURS, Flavour, Kernel};
use crate::progress;

/// What the lab needs: tools of L1 and the guests, the emulator under L1 which is also a peer in it, and depmod.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "dash",
    "e2fsprogs",
    "ethtool",
    "fio",
    "hdparm",
    "iperf3",
    "iproute2",
    "kmod",
    "passt",
    "qemu-system-x86",
    "qemu-utils",
    "sg3-utils",
    "smartmontools",
    "strace",
    "tcpdump",
    "util-linux",
    "xorriso",
    "xz-utils",
];

/// Which emulator runs L1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Emulator {
    /// The one of the distribution's backports, or if there are none, its own.
    #[default]
    Backports,
    /// The distribution's own, to compare with.
    Distribution,
}

/// The emulator's own package.
const EMULATOR: &[&str] = &["qemu-system-x86"];

/// Dependencies that no program of the lab runs: maintainer scripts' needs, and what only fio's engines for
/// remote storage use (see `stand_ins`). Names begin with these.
const UNUSED: &[&str] = &[
    "adduser",
    "debconf",
    "dpkg",
    "iso-codes",
    "libboost",
    "libdb5",
    "libgf",
    "libglusterfs",
    "libicu",
    "libperl",
    "libpython",
    "librados",
    "librbd",
    "libsqlite",
    "libxml2",
    "passwd",
    "perl",
    "python",
];

/// Everything apt provides for the lab.
pub(crate) struct Packages {
    /// The unpacked tools.
    pub(crate) sysroot: Sysroot,
    /// The unpacked kernels, in the order of [`FLAVOURS`].
    pub(crate) kernels: Vec<Kernel>,
    /// The exact versions, one `name=version` a line: with them, what is made from the packages is known.
    pub(crate) versions: String,
    folder: PathBuf,
}

impl Packages {
    /// The packages in `folder`, brought there by apt if they are not there yet, or with `refresh`, brought anew.
    pub(crate) fn ensure(folder: &Path, refresh: bool) -> Result<Self> {
        // All that decides what is fetched: an older checkout's packages are not taken for these.
        let kernels: Vec<_> = FLAVOURS.iter().map(Flavour::wanted).collect();
        let wanted = [PACKAGES, UNUSED, backports::PINNED].map(|names| names.join(" ")).join(" ");
        let wanted = format!("{wanted} {}", kernels.join(" "));
        let versions = kept(&folder.join("packages.txt"), &wanted, refresh, || fetch(folder))?;
        let kernels = FLAVOURS
            .iter()
            .map(|flavour| Kernel::find(flavour, &folder.join("kernels").join(flavour.name)))
            .collect::<Result<_>>()?;
        let sysroot = Sysroot { root: folder.join("sysroot") };
        Ok(Self { sysroot, kernels, versions, folder: folder.to_owned() })
    }

    /// The packages with the emulator for L1.
    pub(crate) fn emulator(&self, which: Emulator, refresh: bool) -> Result<Sysroot> {
        let name = match which {
            Emulator::Backports => "sysroot",
            Emulator::Distribution => "emulator",
        };
        let root = self.folder.join(name);
        if which == Emulator::Distribution {
            let stamp = self.folder.join("emulator.txt");
            kept(&stamp, &EMULATOR.join(" "), refresh, || fetch_emulator(&self.folder, &root))?;
        }
        Ok(Sysroot { root })
    }
}

/// What `stamp` has kept of what `fetch` once returned for what is wanted, or what it returns now.
fn kept(
    stamp: &Path,
    wanted: &str,
    refresh: bool,
    fetch: impl FnOnce() -> Result<String>,
) -> Result<String> {
    let known = fs::read_to_string(stamp).unwrap_or_default();
    match known.split_once('\n') {
        Some((had, versions)) if had == wanted && !refresh => Ok(versions.to_owned()),
        _ => {
            let _ = fs::remove_file(stamp);
            let versions = fetch()?;
            fs::write(stamp, format!("{wanted}\n{versions}"))?;
            Ok(versions)
        }
    }
}

/// Downloads and unpacks the distribution's own emulator; returns the versions.
fn fetch_emulator(folder: &Path, root: &Path) -> Result<String> {
    let apt = Apt::new(&folder.join("apt"))?;
    {
        let _step = progress::step("lab: updating apt's lists");
        apt.update()?;
    }
    let specs = apt.tools(EMULATOR)?;
    let step = progress::step(format!("lab: downloading {} packages", specs.len()));
    let tools = apt.download("tools", &specs)?;
    drop(step);
    unpack(&tools, root)?;
    apt.forget()?;
    Ok(specs.join("\n"))
}

/// Downloads and unpacks everything; returns the versions.
fn fetch(folder: &Path) -> Result<String> {
    let mut apt = Apt::new(&folder.join("apt"))?;
    {
        let _step = progress::step("lab: updating apt's lists");
        apt.update()?;
        if let Err(error) = apt.take_backports() {
            eprintln!("lab: the distribution's own emulator and kernel have to do: {error:#}");
        }
    }
    let mut specs = apt.tools(PACKAGES)?;
    let kernels =
        FLAVOURS.iter().map(|flavour| apt.kernel_package(flavour)).collect::<Result<Vec<_>>>()?;

    let step = progress::step(format!("lab: downloading {} packages", specs.len() + kernels.len()));
    let tools = apt.download("tools", &specs)?;
    let images: Vec<_> = kernels
        .iter()
        .map(|kernel| apt.download(kernel, std::slice::from_ref(kernel)))
        .collect::<Result<_>>()?;
    drop(step);

    let _step = progress::step("lab: unpacking the packages");
    unpack(&tools, &folder.join("sysroot"))?;
    for (flavour, image) in FLAVOURS.iter().zip(&images) {
        unpack(image, &folder.join("kernels").join(flavour.name))?;
    }
    specs.extend(
        images.iter().flatten().filter_map(|deb| Some(deb.file_name()?.to_string_lossy().into())),
    );
    specs.sort();
    apt.forget()?;
    Ok(specs.join("\n"))
}

/// Unpacks Debian archives into an empty folder.
fn unpack(archives: &[PathBuf], root: &Path) -> Result<()> {
    empty_folder(root)?;
    for archive in archives {
        let status = Command::new("dpkg-deb")
            .arg("--extract")
            .args([archive, root])
            .stdin(Stdio::null())
            .status()
            .context("could not start dpkg-deb, which the lab needs")?;
        if !status.success() {
            bail!("dpkg-deb could not unpack {}", archive.display());
        }
    }
    Ok(())
}

/// Makes a folder, without what was in it.
pub(crate) fn empty_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => fs::create_dir_all(path),
    }
    .with_context(|| format!("could not make an empty folder {}", path.display()))
}

/// An apt with state of its own.
struct Apt {
    folder: PathBuf,
    /// The suite of backports, if there is one.
    backports: Option<String>,
}

impl Apt {
    fn new(folder: &Path) -> Result<Self> {
        empty_folder(folder)?;
        for sub in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(sub))?;
        }
        // Nothing counts as installed, so dependencies come out whole.
        fs::write(folder.join("status"), "")?;
        Ok(Self { folder: folder.to_owned(), backports: None })
    }

    /// Removes all that it has fetched.
    fn forget(self) -> Result<()> {
        fs::remove_dir_all(self.folder).context("could not empty the lab's folder")
    }

    /// From here on the emulator's packages, and the kernels that want it, are those of the backports that the host's
    /// mirror has. Without any, all stays as it was.
    fn take_backports(&mut self) -> Result<()> {
        let suite = backports::add(&self.folder)?;
        let updated = self.with_sources("apt-get", Some(&suite));
        self.run({ updated }.arg("update"), "update its lists with the backports'")?;
        self.backports = Some(suite);
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        self.with_sources(program, self.backports.as_deref())
    }

    /// A command that knows the host's sources, and these backports.
    fn with_sources(&self, program: &str, backports: Option<&str>) -> Command {
        let mut command = Command::new(program);
        if backports.is_some() {
            for option in backports::options(&self.folder) {
                command.args(["-o", &option]);
            }
        }
        let folder = self.folder.display();
        for option in [
            format!("Dir::State::status={folder}/status"),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::Cache::archives={folder}/archives"),
            format!("Dir::Cache::pkgcache={folder}/pkgcache.bin"),
            format!("Dir::Cache::srcpkgcache={folder}/srcpkgcache.bin"),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.arg("-qq").stdin(Stdio::null()).env("LC_ALL", "C");
        command
    }

    fn run(&self, command: &mut Command, what: &str) -> Result<String> {
        let program = command.get_program().to_string_lossy().into_owned();
        let output = command.output().with_context(|| {
            format!("could not start {program}, by which the lab gets its packages")
        })?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let reason =
                stderr.lines().find(|line| line.starts_with("E:")).unwrap_or("no reason given");
            bail!("{program} could not {what}: {}", reason.trim_start_matches("E: "));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn update(&self) -> Result<()> {
        self.run(self.command("apt-get").arg("update"), "update its lists").map(drop)
    }

    /// These packages and what they depend on, without what nobody runs.
    fn tools(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut specs = self.closure(packages)?;
        specs.retain(|spec| !UNUSED.iter().any(|unused| spec.starts_with(unused)));
        Ok(specs)
    }

    /// These packages and all they depend on, as `name=version`, taken from the file names apt would fetch.
    fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let listing = self.run(
            self.command("apt-get")
                .args(["install", "--yes", "--no-install-recommends", "--print-uris"])
                .args(packages),
            &format!("find the packages {}", packages.join(", ")),
        )?;
        let mut specs: Vec<String> = listing
            .lines()
            .filter_map(|line| {
                let file = line.split_whitespace().nth(1)?;
                let (name, rest) = file.split_once('_')?;
                let (version, _architecture) = rest.split_once('_')?;
                Some(format!("{name}={}", version.replace("%3a", ":")))
            })
            .collect();
        specs.sort();
        Ok(specs)
    }

    /// The package of the newest kernel of a flavour, which its metapackage depends on.
    fn kernel_package(&self, flavour: &Flavour) -> Result<String> {
        let mut command = self.command("apt-cache");
        if let Some(suite) = self.backports.as_ref().filter(|_| flavour.backported) {
            command.args(["--target-release", suite]);
        }
        let listing = self.run(
            command.args(["depends", flavour.package]),
            &format!("find the kernel package {}", flavour.package),
        )?;
        listing
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .map(str::to_owned)
            .with_context(|| {
                format!("apt knows no kernel package {}: the lab needs Debian's", flavour.package)
            })
    }

    /// Downloads packages into a sub-folder; returns the archives.
    fn download(&self, sub: &str, specs: &[String]) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join(sub);
        empty_folder(&folder)?;
        self.run(
            self.command("apt-get").arg("download").args(specs).current_dir(&folder),
            "download the lab's packages",
        )?;
        let mut archives: Vec<_> =
            fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        archives.sort();
        if archives.len() != specs.len() {
            bail!("apt-get downloaded {} of {} packages", archives.len(), specs.len());
        }
        Ok(archives)
    }
}

/// A folder of unpacked packages, with programs that run where they lie.
pub(crate) struct Sysroot {
    root: PathBuf,
}

impl Sysroot {
    /// A path in the sysroot.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The file of a program, wherever the package put it.
    pub(crate) fn program(&self, name: &str) -> Result<PathBuf> {
        ["usr/bin", "usr/sbin", "bin", "sbin"]
            .iter()
            .map(|folder| self.path(folder).join(name))
            .find(|path| path.exists())
            .with_context(|| format!("the lab's packages hold no program {name}"))
    }

    /// A command that runs a program with the loader and libraries of the sysroot, under the name `called`:
    /// kmod, for one, is depmod when it is called so.
    pub(crate) fn command(&self, name: &str, called: &str) -> Result<Command> {
        let mut command = self.loader(&[]);
        command.args(["--argv0", called]).arg(self.program(name)?);
        Ok(command)
    }

    /// The shared libraries a program of the sysroot loads, those in `preferred` folders first, and the loader.
    pub(crate) fn libraries(&self, program: &Path, preferred: &[&Path]) -> Result<Vec<PathBuf>> {
        libraries_listed_by(self.loader(preferred).arg("--list").arg(program), program)
    }

    /// The file of a shared library.
    pub(crate) fn library(&self, name: &str) -> Result<PathBuf> {
        LIBRARY_FOLDERS
            .iter()
            .map(|folder| self.path(folder).join(name))
            .find(|path| path.exists())
            .with_context(|| format!("the lab's packages hold no library {name}"))
    }

    /// The loader's file. Its usual path is a link that leads out of the sysroot.
    pub(crate) fn loader_file(&self) -> PathBuf {
        self.library(file_name(Path::new(LOADER))).unwrap_or_else(|_| self.path(LOADER))
    }

    fn loader(&self, preferred: &[&Path]) -> Command {
        let mut folders: Vec<_> = preferred.iter().map(|path| path.display().to_string()).collect();
        folders.extend(LIBRARY_FOLDERS.map(|folder| self.path(folder).display().to_string()));
        let mut command = Command::new(self.loader_file());
        command.args(["--library-path", &folders.join(":")]);
        command
    }
}

/// Where packages put shared libraries.
const LIBRARY_FOLDERS: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// The dynamic loader, which every program names by this path.
pub(crate) const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// The shared libraries that a loader's `--list`, or ldd, prints for a program; a static program has none.
pub(crate) fn libraries_listed_by(command: &mut Command, program: &Path) -> Result<Vec<PathBuf>> {
    let output = command.output().with_context(|| {
        format!("could not start {}", Path::new(command.get_program()).display())
    })?;
    let listing = String::from_utf8_lossy(&output.stdout);
    if let Some(missing) = listing.lines().find(|line| line.ends_with("not found")) {
        bail!("{} lacks a library: {}", program.display(), missing.trim());
    }
    // "libz.so.1 => /path/libz.so.1 (0x...)"; the loader's own line, "/path/ld.so (0x...)", has no arrow in ldd's
    // listing and may have one in the loader's.
    let libraries = listing
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from);
    Ok(libraries.filter(|path| path.file_name() != Path::new(LOADER).file_name()).collect())
}

/// The name of a file, for an archive's path.
pub(crate) fn file_name(path: &Path) -> &str {
    path.file_name().and_then(OsStr::to_str).unwrap_or_default()
}
