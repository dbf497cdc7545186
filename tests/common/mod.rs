//! Guests of a few bytes of code, which any KVM can run, what there is here to run guests in, and what
//! tests need around a program that runs one.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Far longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Prints `k` on the first serial port and halts for good.
pub const HALTS: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee, 0xf4, 0xeb, 0xfd];

/// Prints `k` for ever.
pub const PRINTS: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee, 0xeb, 0xfd];

/// Prints `k` and then whatever it is sent.
pub const ECHOES: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee, // mov dx, 0x3f8; mov al, 'k'; out dx, al
    0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd
    0xec, 0xa8, 0x01, 0x74, 0xfb, // empty: in al, dx; test al, 1; jz empty
    0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, // mov dx, 0x3f8; in al, dx; out dx, al
    0xeb, 0xef, // jmp again
];

/// Prints `k` and waits for its power button, as a system does that boots: what it finds first it
/// clears without listening; the next time it switches itself off.
pub const BOOTS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee, // mov dx, 0x3f8; mov al, 'k'; out dx, al
    0xb9, 2, 0, 0, 0, // mov ecx, 2
    0x66, 0xba, 0x00, 0x06, // again: mov dx, 0x600
    0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9, // wait: in ax, dx; test ah, 1; jz wait
    0x66, 0xb8, 0x00, 0x01, 0x66, 0xef, // mov ax, 0x100; out dx, ax: clears the status
    0xb2, 0x02, 0x66, 0xef, // mov dl, 2; out dx, ax: enables the event
    0xe2, 0xe9, // loop again
    0xb2, 0x04, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, // mov dl, 4; mov ax, 0x3400; out dx, ax
    0xf4,
];

/// Prints `r`, writes 6 to the reset register, and halts.
pub const RESETS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, 0xb0, b'r', 0xee, // mov dx, 0x3f8; mov al, 'r'; out dx, al
    0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, // mov dx, 0xcf9; mov al, 6
    0xee, // out dx, al
    0xf4, // hlt
];

/// Prints `count` bytes that count upwards from 0, and switches itself off.
pub fn counts(count: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0x31, 0xc0, 0xb9]; // mov dx, 0x3f8; xor eax, eax
    code.extend(count.to_le_bytes()); // mov ecx, count
    code.extend([0xee, 0xfe, 0xc0, 0xe2, 0xfb]); // again: out dx, al; inc al; loop again
    code.extend([0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xf4]); // off
    code
}

/// A guest with this code in a folder of its own.
pub struct Kernel {
    /// The folder.
    pub folder: TempDir,
    path: PathBuf,
}

impl Kernel {
    /// Writes it.
    pub fn new(code: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        kernel(code, &path);
        Self { folder, path }
    }

    /// The program with this guest and `options`; nothing typed, and all it says piped.
    pub fn run(&self, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_partita"));
        command.args(["run", "--memory", "64M", "--kernel"]).arg(&self.path).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// A program that ends with the test, however that ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Starts it.
    pub fn new(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    /// How it ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        until("it does not end", || self.0.try_wait().unwrap())
    }

    /// What it has said on standard error, when it has ended.
    pub fn said(&mut self) -> String {
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }

    /// Waits for the guest's next byte on standard output.
    pub fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.0.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        byte[0]
    }

    /// Waits until it listens for signals.
    pub fn listens(&self) {
        until("it does not listen", || {
            (mask(self.0.id(), "SigCgt") >> (Signal::TERM.as_raw() - 1) & 1 == 1).then_some(())
        });
    }

    /// The processor time, in clock ticks, of its thread of this name.
    pub fn ticks(&self, thread: &str) -> Option<u64> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0.id())).ok()?;
        let named = format!("({thread}) ");
        let stats =
            tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
        let stat = stats.into_iter().find(|stat| stat.contains(&named))?;
        // After the name, the state is the first field, user and system time the 12th and 13th
        // (proc_pid_stat(5)).
        let fields: Vec<&str> = stat.split_once(&named)?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        // It may have ended, and is not waited for.
        let _ = kill_process(Pid::from_child(&self.0), signal);
    }

    /// Sends it signals, and waits in between long enough that two of a kind do not become one.
    pub fn signals(&self, signals: &[Signal]) {
        for &signal in signals {
            self.signal(signal);
            thread::sleep(Duration::from_millis(150));
        }
    }
}

/// A mask of signals that a process catches (`SigCgt`), ignores (`SigIgn`) and so on.
pub fn mask(process: u32, which: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':'));
    line.map_or(0, |mask| u64::from_str_radix(mask.trim(), 16).unwrap())
}

/// Asks until there is an answer.
pub fn until<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    let mut ask = ask;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Fills a pipe, so that whoever writes to it next finds no room.
pub fn fill(pipe: &std::io::PipeWriter) {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(pipe).unwrap();
    fcntl_setfl(pipe, flags | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(pipe, &[b'.'; 4096]).is_ok() {}
    fcntl_setfl(pipe, flags).unwrap();
}

/// What of `file` there is.
pub fn contents(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

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
