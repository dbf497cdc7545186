//! The lab: a Linux with a real KVM, where unmodified guests can run, on any machine.
//!
//! A host without hardware virtualization, or without Hyper-V support in its KVM, can still emulate a processor
//! that has both: the lab starts QEMU's TCG with a Debian kernel in it, called L1, whose `kvm-amd` works on the emulated
//! SVM. A command runs in L1 with `partita` at hand; the guests it starts are L2. Everything is slower there,
//! exits most of all; figures compare only within one run.
//!
//! The parts: `packages` brings tools and kernels from Debian, `kernel` picks their modules, `layers` makes
//! initramfs layers of them, `cpio` writes these, and here one L1 lives from its start to its power-off. Between host
//! and L1 lie an ISA serial port for L1's console and three virtio ports: `output` carries what the command writes,
//! `status` the lines `up SECONDS` and `exit STATUS`, `result` a tar of what the command left in /lab/out.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::thread::CpuSet;

use crate::progress::{self, Step};
use crate::workspace;
use cpio::Archive;
use kernel::Kernel;
use layers::Layers;
use packages::{Packages, Sysroot, empty_folder};

pub(crate) use packages::Emulator;

mod backports;
mod cpio;
mod kernel;
mod layers;
mod packages;
mod stand_ins;
mod tsc;

/// L1's kernel command line. KVM calls a guest's reference TSC page valid only where L1's own clock is the TSC, so
/// L1 must trust the emulated one.
const COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 quiet tsc=reliable clocksource=tsc mitigations=off";

/// L1's processor: all that TCG can emulate, without XSAVE and what builds on it. TCG does not
/// intercept XSETBV, so KVM would not hear which states a guest enables and tell it a wrong size of
/// its save area, at which Linux warns with a call trace. Its family is Zen's: for that of the K8, which TCG
/// would give it, Debian's full kernel looks for an AGP bridge on 256 buses of PCI.
const PROCESSOR: &str = "max,family=23,model=1,xsave=off,pku=off,erms=off,fsrm=off";

/// How many lines of L1's console an error shows.
const TAIL: usize = 20;

/// One call of the lab.
pub(crate) struct LabOptions {
    /// Processors of L1.
    pub(crate) cpus: u32,
    /// Memory of L1, as QEMU takes it.
    pub(crate) memory: String,
    /// Files and folders for L1.
    pub(crate) files: Vec<LabFile>,
    /// A script that every guest on /lab/initrd runs.
    pub(crate) script: Option<PathBuf>,
    /// Whether QEMU is at hand in L1.
    pub(crate) peers: bool,
    /// How long the whole run may take.
    pub(crate) timeout: Duration,
    /// The `partita` to take along; built here if there is none.
    pub(crate) partita: Option<PathBuf>,
    /// Whether L1 may use all of the host's cores.
    pub(crate) all_cores: bool,
    /// What runs L1.
    pub(crate) emulator: Emulator,
    /// Whether to look for newer packages.
    pub(crate) refresh: bool,
    /// The command and its arguments.
    pub(crate) command: Vec<String>,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory: "4G".to_owned(),
            files: Vec::new(),
            script: None,
            peers: false,
            timeout: Duration::from_secs(600),
            partita: None,
            all_cores: false,
            emulator: Emulator::default(),
            refresh: false,
            command: Vec::new(),
        }
    }
}

/// A file or folder on its way into L1.
#[derive(Clone, Debug)]
pub(crate) struct LabFile {
    /// Where it is on the host.
    pub(crate) source: PathBuf,
    /// Its absolute path in L1.
    pub(crate) destination: String,
}

impl std::str::FromStr for LabFile {
    type Err = String;

    /// `SRC[:DEST]`, with `/lab/files/NAME` as the default destination.
    fn from_str(text: &str) -> Result<Self, String> {
        let (source, destination) = match text.split_once(':') {
            Some((source, destination)) => (source, Some(destination)),
            None => (text, None),
        };
        let source = PathBuf::from(source);
        let Some(name) = source.file_name() else {
            return Err(format!("no file name in {text:?}: write SRC[:DEST]"));
        };
        let destination = match destination {
            Some(path) if path.starts_with('/') => path.to_owned(),
            Some(path) => return Err(format!("{path:?} is no absolute path in L1")),
            None => format!("/lab/files/{}", name.to_string_lossy()),
        };
        Ok(Self { source, destination })
    }
}

/// Takes what a command in L1 writes, as it comes and without carriage returns.
pub(crate) type Sink<'a> = dyn FnMut(&[u8]) + Send + 'a;

/// What came of a call.
pub(crate) struct LabOutcome {
    /// The command's exit status.
    pub(crate) status: u8,
    /// What the command left in /lab/out.
    pub(crate) out_dir: PathBuf,
}

/// A kernel and an initramfs for a guest, for use outside L1.
pub(crate) struct GuestImages {
    /// Debian's cloud kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's initramfs.
    pub(crate) initrd: PathBuf,
}

/// The lab's folder: its cache, and the state of the one call that runs at a time.
fn folder() -> PathBuf {
    workspace::target_dir().join("lab")
}

/// Runs a command in an L1 of its own and shows its output as it comes.
pub(crate) fn run(options: &LabOptions) -> Result<LabOutcome> {
    run_with(options, &mut |text| {
        // Whoever reads us may have gone; the run goes on for its status.
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(text).and_then(|()| stdout.flush());
    })
}

/// Brings the lab's packages here, by which alone a machine may be unfit for the lab.
pub(crate) fn prepare() -> Result<()> {
    let folder = folder();
    let _lock = lock(&folder)?;
    Packages::ensure(&folder, false).map(drop)
}

/// Runs a command in an L1 of its own and hands its output to `sink` piece by piece.
pub(crate) fn run_with(options: &LabOptions, sink: &mut Sink) -> Result<LabOutcome> {
    if options.command.is_empty() {
        bail!("the lab needs a command to run");
    }
    for file in &options.files {
        if !file.source.exists() {
            bail!("no such file for the lab: {}", file.source.display());
        }
    }
    if let Some(script) = options.script.as_ref().filter(|script| !script.is_file()) {
        bail!("no such script for the guest: {}", script.display());
    }

    let folder = folder();
    let place = Place::take(&folder)?;
    let lock = lock(&folder)?;
    let packages = Packages::ensure(&folder, options.refresh)?;
    let emulator = packages.emulator(options.emulator, options.refresh)?;
    let partita = match &options.partita {
        Some(path) => path.clone(),
        None => {
            let _step = progress::step("lab: building partita");
            workspace::build_partita()?
        }
    };
    let layers = Layers::new(&packages, folder.join("layers"))?;
    let mut stack = vec![layers.l1()?];
    if options.peers {
        stack.push(layers.peers()?);
    }
    let command = shell_line(&options.command);
    stack.push(layers.call(&partita, &command, options.script.as_deref(), &options.files)?);

    let Place { run, out: out_dir, core, .. } = &place;
    empty_folder(run)?;
    empty_folder(out_dir)?;
    concatenate(&stack, &run.join("initrd"))?;
    drop(lock);
    let core = (!options.all_cores).then_some(*core);
    let kernel = packages.kernels.first().context("the lab has no kernel")?;
    let l1 = L1 { run: run.clone(), core, emulator: &emulator, kernel, options };
    let status = l1.live(sink)?;
    l1.unpack_result(out_dir)?;
    Ok(LabOutcome { status, out_dir: out_dir.clone() })
}

/// How many calls can run at a time: one for each of the host's cores.
pub(crate) fn places() -> usize {
    cores().len()
}

/// The cores that this process may use, by their numbers.
fn cores() -> Vec<usize> {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return vec![0] };
    (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect()
}

/// Where one call runs: a core of the host, and folders of its own.
struct Place {
    core: usize,
    run: PathBuf,
    out: PathBuf,
    lock: File,
}

impl Place {
    /// Takes a free place, or waits for the first one.
    fn take(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)
            .with_context(|| format!("could not make the lab's folder {}", folder.display()))?;
        let place = |(number, core): (usize, usize)| -> Result<Self> {
            let suffix = if number == 0 { String::new() } else { format!("-{number}") };
            Ok(Self {
                core,
                run: folder.join(format!("run{suffix}")),
                out: folder.join(format!("out{suffix}")),
                lock: File::create(folder.join(format!("run{suffix}.lock")))?,
            })
        };
        let cores = cores();
        for numbered in cores.iter().copied().enumerate() {
            let place = place(numbered)?;
            if place.lock.try_lock().is_ok() {
                return Ok(place);
            }
        }
        let _step = progress::step("lab: waiting for another call to end");
        let first = place((0, cores.first().copied().unwrap_or(0)))?;
        first.lock.lock().context("could not lock the lab's folder")?;
        Ok(first)
    }
}

/// The cloud kernel, and in the folder `into` the guest's initramfs with this script: what a guest needs outside L1.
pub(crate) fn guest_images(script: &str, into: &Path) -> Result<GuestImages> {
    let folder = folder();
    let _lock = lock(&folder)?;
    let packages = Packages::ensure(&folder, false)?;
    let kernel = packages.kernels.first().map(Kernel::image).context("the lab has no kernel")?;
    let guest = Layers::new(&packages, folder.join("layers"))?.guest()?;
    let (layer, initrd) = (into.join("script.cpio"), into.join("initrd"));
    let mut archive = Archive::create(&layer)?;
    archive.file("script", 0o644, script.as_bytes())?;
    archive.finish()?;
    concatenate(&[guest, layer], &initrd)?;
    Ok(GuestImages { kernel, initrd })
}

/// Takes the lab's folder for this process, waiting for another's call to end.
fn lock(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder)
        .with_context(|| format!("could not make the lab's folder {}", folder.display()))?;
    let file = File::create(folder.join("lock"))?;
    if file.try_lock().is_err() {
        let _step = progress::step("lab: waiting for another call to end");
        file.lock().context("could not lock the lab's folder")?;
    }
    Ok(file)
}

/// Writes files one after the other into one.
fn concatenate(parts: &[PathBuf], whole: &Path) -> Result<()> {
    let mut out = File::create(whole)?;
    for part in parts {
        io::copy(&mut File::open(part)?, &mut out)
            .with_context(|| format!("could not put {} together", whole.display()))?;
    }
    Ok(())
}

/// An argument vector as a line for a shell.
pub(crate) fn shell_line(command: &[impl AsRef<str>]) -> String {
    let words: Vec<_> =
        command.iter().map(|word| format!("'{}'", word.as_ref().replace('\'', r"'\''"))).collect();
    words.join(" ")
}

/// One L1, from start to power-off.
struct L1<'a> {
    run: PathBuf,
    /// The only core of the host that it may use: TCG's emulation of SVM changes some of a processor's state
    /// without a lock while other threads do too, and its L2 then goes on where L1 was, or nobody goes on at all.
    core: Option<usize>,
    /// Where its QEMU is.
    emulator: &'a Sysroot,
    kernel: &'a Kernel,
    options: &'a LabOptions,
}

impl L1<'_> {
    /// Starts L1, passes its output on, and returns the command's status.
    fn live(&self, sink: &mut Sink) -> Result<u8> {
        let step = progress::step("lab: starting L1");
        let mut qemu = self.start()?;
        let mut stdout = qemu.stdout.take().context("QEMU has no output")?;
        let (ended, relayed) = thread::scope(|scope| {
            let relay = scope.spawn(move || pass_on(&mut stdout, sink));
            let ended = self.wait(&mut qemu, step);
            (ended, relay.join().expect("the relay does not panic"))
        });
        relayed.context("lost L1's output")?;
        let ended = ended?;

        if let Some(status) = self.said("exit").and_then(|status| status.parse().ok()) {
            return Ok(status);
        }
        let what = match ended {
            None => format!("the lab did not end within {} s", self.options.timeout.as_secs()),
            Some(ended) if ended.success() => "L1 went down before its command ended".to_owned(),
            Some(ended) => {
                let stderr = self.lines("qemu.stderr");
                let reason = stderr.first().map_or("", String::as_str);
                bail!("L1 does not start: QEMU failed with {ended}: {reason}")
            }
        };
        let console = self.lines("console");
        let tail = console[console.len().saturating_sub(TAIL)..].join("\n");
        bail!("{what}; the end of its console:\n{tail}");
    }

    /// Waits for the end of QEMU, or until the time is up and it is ended: then there is no status. The step is
    /// over once L1 is up.
    fn wait(&self, qemu: &mut Child, step: Step) -> Result<Option<ExitStatus>> {
        let mut step = Some(step);
        let started = Instant::now();
        loop {
            if let Some(ended) = qemu.try_wait()? {
                return Ok(Some(ended));
            }
            if started.elapsed() > self.options.timeout {
                qemu.kill()?;
                qemu.wait()?;
                return Ok(None);
            }
            if step.is_some() && self.said("up").is_some() {
                step = None;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn start(&self) -> Result<Child> {
        let sysroot = self.emulator;
        let emulator = sysroot.command("qemu-system-x86_64", "qemu-system-x86_64")?;
        // The emulator must not outlive us, however we end.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL"]);
        if let Some(core) = self.core {
            qemu.args(["taskset", "--cpu-list", &core.to_string()]);
        }
        qemu.arg(emulator.get_program()).args(emulator.get_args());
        qemu.env("QEMU_MODULE_DIR", sysroot.path("usr/lib/x86_64-linux-gnu/qemu"));
        for folder in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            qemu.arg("-L").arg(sysroot.path(folder));
        }
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-accel", "tcg,thread=multi", "-cpu", PROCESSOR])
            .args(["-smp", &self.options.cpus.to_string(), "-m", &self.options.memory])
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(self.run.join("initrd"))
            .args(["-append", &format!("{COMMAND_LINE} tsc_early_khz={}", tsc::khz())])
            .arg("-serial")
            .arg(format!("file:{}", self.run.join("console").display()))
            .args(["-device", "virtio-serial-pci"]);
        for (port, path) in [
            ("output", PathBuf::from("/dev/stdout")),
            ("status", self.run.join("status")),
            ("result", self.run.join("result.tar")),
        ] {
            qemu.arg("-chardev")
                .arg(format!("file,id={port},path={}", path.display()))
                .arg("-device")
                .arg(format!("virtserialport,chardev={port},name={port}"));
        }
        // For looking into L1 from outside, such as `-monitor unix:/tmp/l1,server,nowait`.
        if let Ok(more) = std::env::var("PARTITA_LAB_QEMU") {
            qemu.args(more.split_whitespace());
        }
        qemu.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(self.run.join("qemu.stderr"))?)
            .spawn()
            .context("could not start setpriv (of util-linux), which the lab needs")
    }

    /// What L1's init last said under this keyword.
    fn said(&self, keyword: &str) -> Option<String> {
        let status = fs::read_to_string(self.run.join("status")).ok()?;
        // A line counts once it is whole.
        let whole = status.rsplit_once('\n')?.0;
        let last = whole
            .lines()
            .filter_map(|line| line.strip_prefix(keyword)?.strip_prefix(' '))
            .next_back();
        last.map(str::to_owned)
    }

    /// The lines of one of the run's files, without empty ones.
    fn lines(&self, file: &str) -> Vec<String> {
        let bytes = fs::read(self.run.join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
    }

    /// Unpacks what the command left in /lab/out.
    fn unpack_result(&self, out_dir: &Path) -> Result<()> {
        let result = self.run.join("result.tar");
        if result.metadata().map_or(0, |metadata| metadata.len()) == 0 {
            return Ok(());
        }
        let output = Command::new("tar")
            .arg("-xf")
            .arg(&result)
            .arg("-C")
            .arg(out_dir)
            .arg("--no-same-owner")
            .output()
            .context("could not start tar, which the lab needs")?;
        if !output.status.success() {
            bail!("could not unpack /lab/out: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        fs::remove_file(result)?;
        Ok(())
    }
}

/// Hands L1's output to the sink as it comes, without carriage returns.
fn pass_on(from: &mut impl Read, sink: &mut Sink) -> io::Result<()> {
    let mut buffer = vec![0; 32 << 10];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        let text: Vec<u8> = buffer[..count].iter().copied().filter(|&byte| byte != b'\r').collect();
        sink(&text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        let words = ["printf", "%s\n", "it's", "a b", "$HOME", ""].map(str::to_owned);
        let output = Command::new("sh").arg("-c").arg(shell_line(&words)).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "it's\na b\n$HOME\n\n");
    }

    #[test]
    fn a_file_goes_to_its_own_name_unless_told_otherwise() {
        let file: LabFile = "some/disk.img".parse().unwrap();
        assert_eq!(file.destination, "/lab/files/disk.img");
        let file: LabFile = "disk.img:/tmp/d".parse().unwrap();
        assert_eq!(file.destination, "/tmp/d");
        assert!("disk.img:d".parse::<LabFile>().is_err());
        assert!("..".parse::<LabFile>().is_err());
    }
}
