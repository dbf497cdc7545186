//! What helps against an error whose cure depends on its cause: a device of the host that is not
//! there wants another remedy than one that is not for this user.
//!
//! Libraries say what failed. What to do about it is looked up here, once, for the errors of a run and
//! for `partita doctor` alike.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use backends::net::tap;
use hypervisor::PartitionError;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// An error in one line, with its sources, and what helps if that is known.
pub fn line(error: &anyhow::Error) -> String {
    match of(error) {
        Some(advice) => format!("{error:#}; {advice}"),
        None => format!("{error:#}"),
    }
}

fn of(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref()
            && let Some(advice) = on_partition(error)
        {
            return Some(advice);
        }
        if let Some(tap::OpenError::NoTaps { source }) = cause.downcast_ref() {
            return Some(on_device(&TUN, source));
        }
        match cause.downcast_ref::<io::Error>()?.raw_os_error().map(Errno::from_raw_os_error)? {
            Errno::AGAIN => Some(on_threads().to_owned()),
            Errno::MFILE => Some("raise the limit of open files (ulimit -n)".to_owned()),
            _ => None,
        }
    })
}

/// What helps against an error of KVM's.
pub fn on_partition(error: &PartitionError) -> Option<String> {
    match error {
        PartitionError::NoKvm { source } | PartitionError::NoPermission { source } => {
            Some(on_device(&KVM, source))
        }
        _ => None,
    }
}

/// What helps if there is no io_uring for this reason.
pub fn on_io_uring(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::PERM | Errno::ACCESS) => {
            "set /proc/sys/kernel/io_uring_disabled to 0, or allow it in the container's profile"
        }
        Some(Errno::NOSYS) => {
            "use Linux 5.15 or newer, or allow io_uring in the container's profile"
        }
        Some(Errno::NOMEM) => "raise the limit for locked memory (ulimit -l)",
        Some(Errno::MFILE | Errno::NFILE) => "raise the limit of open files (ulimit -n)",
        Some(Errno::AGAIN) => on_threads(),
        _ => "use Linux 5.15 or newer",
    }
}

/// What helps if the host starts no thread and no process, of which it says no more than that it is
/// busy (EAGAIN).
fn on_threads() -> &'static str {
    if getrlimit(Resource::As).current.is_some() {
        "raise the limit for addresses (ulimit -v), or that of processes and threads (ulimit -u)"
    } else {
        "raise the limit of processes and threads (ulimit -u, systemd's TasksMax=)"
    }
}

/// A device file of the host that a driver makes.
pub struct DeviceFile {
    path: &'static str,
    /// Where the driver is seen if it is loaded.
    driver: &'static str,
    /// What makes the file one for users, as a rule of udev.
    rule: &'static str,
    /// Whom the rule lets in, if that is not everybody.
    group: Option<&'static str>,
}

/// KVM.
pub const KVM: DeviceFile = DeviceFile {
    path: "/dev/kvm",
    driver: "/sys/devices/virtual/misc/kvm",
    rule: r#"KERNEL=="kvm", GROUP="kvm", MODE="0660""#,
    group: Some("kvm"),
};

/// Taps.
pub const TUN: DeviceFile = DeviceFile {
    path: "/dev/net/tun",
    driver: "/sys/devices/virtual/misc/tun",
    rule: r#"KERNEL=="tun", MODE="0666""#,
    group: None,
};

/// What helps if a device's file could not be opened for this reason.
pub fn on_device(device: &DeviceFile, error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ACCESS) => {
            let owner = fs::metadata(device.path).ok().map(|file| (file.mode(), file.gid()));
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            device.for_others(owner, &groups)
        }
        Some(Errno::PERM) => format!(
            "what this runs in, a container perhaps, keeps it from that device; \
             give it the device (docker and podman: --device {})",
            device.path
        ),
        Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
            let has_driver = Path::new(device.driver).exists();
            let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            device.not_there(has_driver, &processor)
        }
        Some(Errno::MFILE) => "raise the limit of open files (ulimit -n)".to_owned(),
        _ => format!("see what the kernel's log (dmesg) says of {}", device.path),
    }
}

impl DeviceFile {
    /// The file is there, and the user may not open it. `owner` is its mode and its group's number.
    fn for_others(&self, owner: Option<(u32, u32)>, groups: &str) -> String {
        const GROUP_MAY: u32 = 0o060;
        let user = std::env::var("USER").unwrap_or_else(|_| "$USER".to_owned());
        match owner {
            Some((mode, gid)) if mode & GROUP_MAY == GROUP_MAY && gid != 0 => {
                let group = group_name(gid, groups).unwrap_or_else(|| gid.to_string());
                format!(
                    "it is for the group {group}: as root, run: usermod -aG {group} {user}; \
                     then log in again"
                )
            }
            _ => {
                let name = self.path.rsplit('/').next().unwrap_or(self.path);
                let and_join = match self.group {
                    Some(group) => {
                        format!(" && usermod -aG {group} {user}; then log in again")
                    }
                    None => String::new(),
                };
                format!(
                    "it is for root only: as root, run: echo '{}' > /etc/udev/rules.d/65-{name}.rules \
                     && udevadm control --reload && udevadm trigger --sysname-match={name}{and_join}",
                    self.rule
                )
            }
        }
    }

    /// There is no such file, or no driver behind it. `has_driver` is whether the kernel has one, and
    /// `processor` what it says of that (`/proc/cpuinfo`).
    fn not_there(&self, has_driver: bool, processor: &str) -> String {
        if has_driver {
            return format!(
                "the kernel has its driver, so what this runs in, a container perhaps, has not been \
                 given it (docker and podman: --device {})",
                self.path
            );
        }
        if self.group.is_none() {
            return "as root, run: modprobe tun".to_owned();
        }
        let can = |flag: &str| {
            let flags = processor.lines().find(|line| line.starts_with("flags"));
            flags.is_some_and(|flags| flags.split_whitespace().any(|has| has == flag))
        };
        let firmware = "switch virtualization on in the firmware, or nested virtualization on in the \
                        host of this virtual machine";
        match (can("vmx"), can("svm")) {
            (true, _) => format!("as root, run: modprobe kvm_intel; if that fails, {firmware}"),
            (_, true) => format!("as root, run: modprobe kvm_amd; if that fails, {firmware}"),
            _ => format!("the processor shows neither VT-x nor AMD-V: {firmware}"),
        }
    }
}

/// The name of a group, of what /etc/group says.
fn group_name(gid: u32, groups: &str) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: &str = "root:x:0:\nvirtual:x:993:somebody\nkvm:x:106:\n";

    #[test]
    fn a_permission_that_lacks_is_had_by_the_files_group_or_by_a_rule_for_it() {
        let advice = KVM.for_others(Some((0o20_660, 993)), GROUPS);
        assert!(advice.contains("usermod -aG virtual "), "{advice}");
        let advice = KVM.for_others(Some((0o20_660, 7)), GROUPS);
        assert!(advice.contains("usermod -aG 7 "), "{advice}");
        // Who is in it may no more than before.
        for owner in [Some((0o20_600, 106)), Some((0o20_660, 0)), Some((0o20_640, 106)), None] {
            let advice = KVM.for_others(owner, GROUPS);
            assert!(advice.contains(r#"echo 'KERNEL=="kvm", GROUP="kvm", MODE="0660"'"#));
            assert!(advice.contains("65-kvm.rules") && advice.contains("usermod -aG kvm "));
        }
        let advice = TUN.for_others(Some((0o20_600, 0)), GROUPS);
        assert!(advice.contains(r#"KERNEL=="tun", MODE="0666""#), "{advice}");
        assert!(!advice.contains("usermod") && !advice.contains("modprobe"), "{advice}");
        assert!(!advice.contains("firmware"), "{advice}");
    }

    #[test]
    fn a_device_that_is_not_there_is_had_by_its_driver() {
        let processor = |flag: &str| format!("model name\t: x\nflags\t\t: fpu {flag} sse\n");
        let advice = KVM.not_there(false, &processor("vmx"));
        assert!(advice.contains("modprobe kvm_intel; if that fails, switch virt"), "{advice}");
        let advice = KVM.not_there(false, &processor("svm"));
        assert!(advice.contains("modprobe kvm_amd"), "{advice}");
        let advice = KVM.not_there(false, &processor("svme"));
        assert!(advice.contains("firmware") && !advice.contains("modprobe"), "{advice}");
        let advice = KVM.not_there(true, &processor("vmx"));
        assert!(advice.contains("--device /dev/kvm") && !advice.contains("firmware"), "{advice}");
        assert_eq!(TUN.not_there(false, ""), "as root, run: modprobe tun");
        assert!(TUN.not_there(true, "").contains("--device /dev/net/tun"));
    }

    #[test]
    fn advice_goes_by_what_the_host_said() {
        let advice = |errno: Errno| on_device(&TUN, &io::Error::from(errno));
        assert!(advice(Errno::PERM).contains("--device /dev/net/tun"));
        assert!(advice(Errno::MFILE).contains("ulimit -n"));
        assert!(!advice(Errno::ACCESS).contains("modprobe"));
        let source = io::Error::from(Errno::MFILE);
        let error = anyhow::Error::new(PartitionError::NoKvm { source }).context("cannot start");
        assert!(line(&error).ends_with("; raise the limit of open files (ulimit -n)"));
        assert_eq!(line(&anyhow::anyhow!("something else")), "something else");
    }
}
