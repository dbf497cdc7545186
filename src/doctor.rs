//! `partita doctor`: what this host can do, and what to do about what is missing.
//!
//! Every line stands for one thing that was tried, not for a version that was read: KVM answers
//! for its capabilities, the kernel for io_uring by setting up a ring, and so on.

use std::fmt::Write;
use std::fs::OpenOptions;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use backends::net::user;
use backends::uring::Uring;
use hypervisor::hosted::{Confinement, HostedPartition};
use hypervisor::kvm::{self, HyperV, Irqchip, KvmPartition, PartitionConfig};
use hypervisor::synic::{ConnectionId, HvStatus, MessageSink};
use hypervisor::{
    Bus, Device, Gpa, GuestMemory, MemoryError, Partition, PartitionError, StopHandle, StopReason,
};
use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use rustix::io::Errno;

use crate::advice;
use crate::boot::long_mode;
use crate::builtin::ExitPort;
use crate::print;

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grade {
    /// There, and used.
    Good,
    /// Not there; something else serves, or a feature is not to be had.
    Fair,
    /// Not there; guests cannot run.
    Bad,
}

/// One line of the report.
#[derive(Debug)]
struct Finding {
    grade: Grade,
    subject: &'static str,
    found: String,
    advice: Option<String>,
}

impl Finding {
    fn good(subject: &'static str, found: impl Into<String>) -> Self {
        Self { grade: Grade::Good, subject, found: found.into(), advice: None }
    }

    fn lacking(
        grade: Grade,
        subject: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { grade, subject, found: found.into(), advice: Some(advice.into()) }
    }
}

/// Prints the report. Fails if Linux guests cannot run here.
pub fn run() -> anyhow::Result<ExitCode> {
    let findings = [
        kvm(),
        kernels(),
        hyper_v(),
        irqchip(),
        hosted(),
        io_uring(),
        tap(),
        user_network(),
        landlock(),
        huge_pages(),
    ];
    let mut report = String::new();
    for finding in &findings {
        let mark = match finding.grade {
            Grade::Good => "ok  ",
            Grade::Fair => "note",
            Grade::Bad => "MISS",
        };
        let _ = writeln!(report, "{mark}  {:<12} {}", finding.subject, finding.found);
        if let Some(advice) = &finding.advice {
            let _ = writeln!(report, "{:18} -> {advice}", "");
        }
    }
    let ready = findings.iter().all(|finding| finding.grade != Grade::Bad);
    let _ = writeln!(
        report,
        "{}",
        if ready {
            "this host can run Linux guests with `partita run`"
        } else {
            "this host cannot run Linux guests: `cargo xtask demo` and `cargo xtask lab` run them in \
             a software-emulated one; `partita demo` runs the built-in guest"
        }
    );
    print(&report)?;
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn kvm() -> Finding {
    match kvm::open() {
        Err(error) => {
            let advice = advice::on_partition(&error).unwrap_or_else(|| {
                "see what the kernel's log (dmesg) says of KVM; the lab needs none".to_owned()
            });
            Finding::lacking(Grade::Bad, "KVM", format!("{:#}", anyhow::Error::new(error)), advice)
        }
        Ok(kvm) => match kvm::lacking(&kvm, HyperV::Absent) {
            None => Finding::good("KVM", "/dev/kvm has all that a partition needs"),
            Some(what) => {
                Finding::lacking(Grade::Bad, "KVM", format!("lacks {what}"), "use a newer kernel")
            }
        },
    }
}

/// Lets a guest's kernel do what any Linux does, and a KVM without hardware behind it may not.
fn kernels() -> Finding {
    let subject = "kernels";
    match trial() {
        Ok(StopReason::PowerOff) => Finding::good(subject, "run on the processor itself"),
        Ok(_) => Finding::lacking(
            Grade::Bad,
            subject,
            "KVM only emulates them, and lacks instructions that Linux needs",
            "use a host with VT-x or AMD-V; the built-in guest needs none",
        ),
        Err(error) => {
            let see = match &error {
                PartitionError::Memory(_) => "see guest memory below",
                _ => "see KVM above",
            };
            Finding::lacking(Grade::Bad, subject, format!("{:#}", anyhow::Error::new(error)), see)
        }
    }
}

/// Runs a guest that compares and exchanges 16 bytes at CPL 0 and then powers off.
fn trial() -> Result<StopReason, PartitionError> {
    const ENTRY: Gpa = Gpa(0x1_0000);
    const CODE: [u8; 7] = [
        0x48, 0x0f, 0xc7, 0x0c, 0x24, // cmpxchg16b [rsp]
        0xe6, 0x10, // out 0x10, al
    ];
    let memory = GuestMemory::new(2 << 20)?;
    memory.write(ENTRY, &CODE)?;
    let state = long_mode::prepare(&memory, ENTRY, 0)?;
    let mut partition = KvmPartition::new(&PartitionConfig {
        vps: 1,
        memory,
        hyper_v: HyperV::Absent,
        irqchip: Irqchip::Kernel,
        synthetic_timers: false,
    })?;
    partition.set_boot_state(&state)?;
    let mut ports = Bus::ports();
    let off = Arc::new(PowerOff(partition.stop_handle()));
    ports.add("power", 0x10, 1, off).expect("the bus is empty");
    let sink: Arc<dyn MessageSink> = Arc::new(NoMessages);
    Ok(partition.run(&Arc::new(ports), &Arc::new(Bus::mmio()), &sink))
}

fn hosted() -> Finding {
    let subject = "hosted";
    let by = |confinement: Confinement| match confinement {
        Confinement { namespaces: true, landlock: true } => ", namespaces and Landlock",
        Confinement { namespaces: true, landlock: false } => " and namespaces",
        Confinement { namespaces: false, landlock: true } => " and Landlock",
        Confinement { namespaces: false, landlock: false } => "",
    };
    match hosted_trial() {
        Ok(confinement) => Finding::good(
            subject,
            format!("without KVM the built-in guest is confined by seccomp{}", by(confinement)),
        ),
        Err(error) => {
            let found = format!("{error:#}");
            let advice = if found.contains("filter its system calls") {
                "allow seccomp filters; needed for the built-in guest without KVM only"
            } else {
                "needed for the built-in guest without KVM only"
            };
            Finding::lacking(Grade::Fair, subject, found, advice)
        }
    }
}

/// Lets the built-in guest find out that there is no bus, and end.
fn hosted_trial() -> anyhow::Result<Confinement> {
    let program = crate::hosted::program("identify")?;
    let mut partition = HostedPartition::new(GuestMemory::new(4 << 20)?, &program)?;
    let mut ports = Bus::ports();
    let exit = Arc::new(ExitPort::new(partition.stop_handle()));
    ports.add("exit port", ExitPort::PORT.into(), 4, exit)?;
    let sink: Arc<dyn MessageSink> = Arc::new(NoMessages);
    match partition.run(&Arc::new(ports), &Arc::new(Bus::mmio()), &sink) {
        StopReason::PowerOff => Ok(partition.confinement().unwrap_or_default()),
        StopReason::Error(what) => anyhow::bail!(what),
        reason => anyhow::bail!("the guest ended by {reason:?}"),
    }
}

/// Any write ends the trial.
struct PowerOff(StopHandle);

impl Device for PowerOff {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, _: &[u8]) {
        self.0.stop(StopReason::PowerOff);
    }
}

struct NoMessages;

impl MessageSink for NoMessages {
    fn post(&self, _: ConnectionId, _: u32, _: &[u8]) -> HvStatus {
        HvStatus::INVALID_CONNECTION_ID
    }
}

fn hyper_v() -> Finding {
    let subject = "Hyper-V";
    let Ok(kvm) = kvm::open() else {
        return Finding::lacking(Grade::Bad, subject, "unknown without KVM", "see KVM above");
    };
    let Some(what) = kvm::lacking(&kvm, HyperV::Kernel) else {
        return Finding::good(subject, "SynIC, hypercalls and doorbells in the kernel");
    };
    let advice = "use a kernel with CONFIG_KVM_HYPERV=y, as distributions have";
    match kvm::lacking(&kvm, HyperV::User) {
        None => Finding::lacking(
            Grade::Fair,
            subject,
            format!("served from user space, since KVM lacks {what}"),
            advice,
        ),
        Some(too) => {
            Finding::lacking(Grade::Bad, subject, format!("KVM lacks {what} and {too}"), advice)
        }
    }
}

fn irqchip() -> Finding {
    let subject = "irqchip";
    let Ok(kvm) = kvm::open() else {
        return Finding::lacking(Grade::Fair, subject, "unknown without KVM", "see KVM above");
    };
    match kvm::lacking_split(&kvm) {
        None => Finding::good(subject, "interrupt controllers in the kernel or in user space"),
        Some(what) => Finding::lacking(
            Grade::Fair,
            subject,
            format!("--irqchip user lacks {what}"),
            "use a newer kernel; --irqchip kernel, the default, does without",
        ),
    }
}

fn io_uring() -> Finding {
    let subject = "io_uring";
    match Uring::new(8) {
        Ok(uring) if uring.is_deferred() => {
            Finding::good(subject, "with deferred task work (Linux 6.1)")
        }
        Ok(_) => Finding::lacking(
            Grade::Fair,
            subject,
            "without deferred task work",
            "Linux 6.1 or newer is faster",
        ),
        Err(error) => {
            Finding::lacking(Grade::Bad, subject, plain(&error), advice::on_io_uring(&error))
        }
    }
}

fn tap() -> Finding {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    match opened {
        Ok(_) => Finding::good("tap", "/dev/net/tun opens"),
        Err(error) => Finding::lacking(
            Grade::Fair,
            "tap",
            format!("/dev/net/tun: {}", plain(&error)),
            format!("{}; guests can do without", advice::on_device(&advice::TUN, &error)),
        ),
    }
}

fn user_network() -> Finding {
    match user::installed() {
        Some(path) => Finding::good("user network", format!("by {}", path.display())),
        None => Finding::lacking(
            Grade::Fair,
            "user network",
            "passt is not there",
            "as root, run: apt install passt; needed for --nic backend=user only",
        ),
    }
}

fn landlock() -> Finding {
    let subject = "Landlock";
    // A ruleset is only made, never applied.
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create);
    match ruleset {
        Ok(_) => Finding::good(subject, "processes can be confined with it"),
        Err(_) => Finding::lacking(
            Grade::Fair,
            subject,
            "the kernel has it not, or not switched on",
            "use Linux 5.13 or newer, with landlock in the kernel's lsm= list",
        ),
    }
}

fn huge_pages() -> Finding {
    let subject = "guest memory";
    match GuestMemory::new(4 << 20) {
        Ok(memory) if memory.backing().may_be_huge() => Finding::good(subject, "in huge pages"),
        Ok(_) => Finding::lacking(
            Grade::Fair,
            subject,
            "in pages of 4 KiB; guests boot more slowly",
            "allow user namespaces, or write advise to \
             /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
        Err(error) => {
            let advice = match &error {
                // What helps is in them.
                MemoryError::FileSize { .. } | MemoryError::AddressSpace { .. } => {
                    "guests take more than this trial's 4 MiB"
                }
                _ => "allow memfd_create and shared mappings",
            };
            Finding::lacking(
                Grade::Bad,
                subject,
                format!("{:#}", anyhow::Error::new(error)),
                advice,
            )
        }
    }
}

fn plain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw_os_error(code).to_string(),
        None => error.to_string(),
    }
}
