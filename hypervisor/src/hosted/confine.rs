//! What a hosted partition's process gives up before its guest runs, for good.
//!
//! In this order, since each step needs what a later one takes away:
//!
//! 1. *Namespaces* of its own for users, mounts, network, IPC and host names, and a root folder in
//!    which nothing is. Hosts may forbid it.
//! 2. It dies with the root, has no capabilities and gains none by `exec`, and its limits leave
//!    room for doorbells and nothing else.
//! 3. *Landlock*: no file, no folder and no socket can be reached, whatever path leads there. Not
//!    every kernel has it.
//! 4. A *seccomp* filter: the few calls that a processor is made of, each with the descriptors that
//!    it is made for. Any other ends the process. Always.
//!
//! The last one alone confines; the others stand behind it.

#![allow(unsafe_code)] // unshare

use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What stands behind the system call filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// The process has namespaces of its own.
    pub namespaces: bool,
    /// Landlock takes all files away.
    pub landlock: bool,
}

impl Confinement {
    pub(super) fn bits(self) -> u32 {
        u32::from(self.namespaces) | u32::from(self.landlock) << 1
    }

    pub(super) fn from_bits(bits: u32) -> Self {
        Self { namespaces: bits & 1 != 0, landlock: bits & 2 != 0 }
    }
}

/// Descriptors that the process may have: a doorbell for each channel, and some to spare.
pub(super) const DESCRIPTORS: u64 = 256;

/// Bytes that it may allocate.
const HEAP: u64 = 16 << 20;

/// Standard error's number, the last of those that a process is born with. It has no use for it.
const STDERR: u32 = 2;

/// Confines the calling process, which has one thread. `socket` is the way to the root. The error
/// says which step failed.
pub(super) fn confine(socket: u32) -> Result<Confinement, (Step, io::Error)> {
    let at = |step| move |error: rustix::io::Errno| (step, io::Error::from(error));
    let namespaces = enter_namespaces().is_ok();
    // Changes of identity, such as a new user namespace, clear this.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(at(Step::Death))?;
    rustix::thread::set_no_new_privs(true).map_err(at(Step::Privileges))?;
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, none).map_err(at(Step::Privileges))?;
    for (resource, limit) in [
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Data, HEAP),
        (Resource::Fsize, 0),
        (Resource::Core, 0),
        (Resource::Nproc, 0),
    ] {
        // Who has less cannot have it raised.
        let limit = getrlimit(resource).maximum.map_or(limit, |most| most.min(limit));
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        setrlimit(resource, limit).map_err(at(Step::Limits))?;
    }
    let landlock = restrict_files();
    let filter = filter(socket).map_err(|error| (Step::Filter, io::Error::other(error)))?;
    seccompiler::apply_filter(&filter).map_err(|_| (Step::Filter, io::Error::last_os_error()))?;
    Ok(Confinement { namespaces, landlock })
}

/// A step that can fail, by number in the message to the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Memory = 1,
    Death,
    Privileges,
    Limits,
    Filter,
}

impl Step {
    /// What was to be done, for people. The number comes from the process.
    pub(super) fn describe(number: u32) -> &'static str {
        match number {
            n if n == Self::Memory as u32 => "map its memory",
            n if n == Self::Death as u32 => "bind its life to the root's",
            n if n == Self::Privileges as u32 => "give up its privileges",
            n if n == Self::Limits as u32 => "limit itself",
            n if n == Self::Filter as u32 => "filter its system calls",
            _ => "start",
        }
    }
}

fn enter_namespaces() -> io::Result<()> {
    let flags = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    // SAFETY: descriptors stay as they are.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    // An empty file system, attached nowhere, becomes the root.
    let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    rustix::process::fchdir(&root)?;
    rustix::process::chroot(c".")?;
    Ok(())
}

/// Whether Landlock has taken all files away; newer kernels' takes more.
pub(super) fn restrict_files() -> bool {
    let abi = ABI::V6;
    let restricted = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(abi)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(abi)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self);
    restricted.is_ok_and(|status| status.ruleset != RulesetStatus::NotEnforced)
}

/// The calls that are allowed. What their pointers point to, no filter can see; it sees the
/// descriptors, though: the socket, and eventfds, whose numbers are above standard error's.
fn filter(socket: u32) -> Result<BpfProgram, seccompiler::BackendError> {
    let when = |argument, operator, value: u32| {
        let width = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, width, operator, value.into())?;
        Ok::<_, seccompiler::BackendError>(vec![SeccompRule::new(vec![condition])?])
    };
    let socket_only = || when(0, SeccompCmpOp::Eq, socket);
    let events_only = || when(0, SeccompCmpOp::Gt, STDERR);
    let rules = [
        (libc::SYS_recvmsg, socket_only()?),
        (libc::SYS_sendto, socket_only()?),
        (libc::SYS_read, events_only()?),
        (libc::SYS_write, events_only()?),
        (libc::SYS_close, events_only()?),
        // The standard library, with debug assertions, looks whether what it closes is open.
        (libc::SYS_fcntl, when(1, SeccompCmpOp::Eq, libc::F_GETFD as u32)?),
        (libc::SYS_poll, vec![]),
        (libc::SYS_ppoll, vec![]),
        (libc::SYS_restart_syscall, vec![]),
        (libc::SYS_clock_gettime, vec![]),
        (libc::SYS_brk, vec![]),
        (libc::SYS_exit_group, vec![]),
    ];
    let filter = SeccompFilter::new(
        rules.into(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    filter.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Landlock confines the thread that asks for it, so it can be tried by itself.
    #[test]
    fn landlock_takes_all_files() {
        let thread = std::thread::spawn(|| {
            let there = || std::fs::read_dir("/").is_ok();
            assert!(there());
            if restrict_files() {
                assert!(!there());
            } else {
                eprintln!("skipped: this kernel has no Landlock");
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn the_filter_compiles_and_confinement_has_bits() {
        assert!(!filter(0).unwrap().is_empty());
        for (namespaces, landlock) in [(false, false), (false, true), (true, false), (true, true)] {
            let confinement = Confinement { namespaces, landlock };
            assert_eq!(Confinement::from_bits(confinement.bits()), confinement);
        }
    }
}
