//! What KVM itself counts about a processor: second-level faults, exits it answered without us,
//! interrupts, halts (`KVM_GET_STATS_FD`, in the kernel's Documentation/virt/kvm/api.rst).

#![allow(unsafe_code)] // ioctl

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// `struct kvm_stats_header`: offsets and sizes in bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    flags: u32,
    name_size: u32,
    descriptors: u32,
    id_offset: u32,
    descriptor_offset: u32,
    data_offset: u32,
}

/// `struct kvm_stats_desc`, without the name that follows it.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptor {
    flags: u32,
    exponent: i16,
    /// How many numbers; more than one for histograms.
    size: u16,
    offset: u32,
    bucket_size: u32,
}

const _: () = assert!(size_of::<Header>() == 24);
const _: () = assert!(size_of::<Descriptor>() == 16);

/// A processor's counters in the kernel. Read them as long as the partition lives.
#[derive(Debug)]
pub struct KernelCounters {
    file: File,
    /// Names, and where in the file their values are.
    counters: Vec<(String, u64)>,
}

impl KernelCounters {
    /// `None` where the kernel is too old to have them (before 5.14).
    pub(super) fn open(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: the ioctl takes no argument.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the descriptor is new, and ours.
        let file = unsafe { File::from_raw_fd(fd) };
        let counters = list(&file).ok()?;
        Some(Self { file, counters })
    }

    /// Each counter's name and value, as they are now.
    pub fn read(&self) -> impl Iterator<Item = (&str, u64)> {
        self.counters.iter().filter_map(|(name, offset)| {
            let mut value = 0_u64;
            self.file.read_exact_at(value.as_mut_bytes(), *offset).ok()?;
            Some((name.as_str(), value))
        })
    }

    /// The value of one counter, such as `pf_fixed`.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.read().find(|(other, _)| *other == name).map(|(_, value)| value)
    }
}

/// What is not zero, on one line.
impl fmt::Display for KernelCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, value) in self.read().filter(|(_, value)| *value > 0) {
            write!(f, "{separator}{value} {name}")?;
            separator = ", ";
        }
        Ok(())
    }
}

fn list(file: &File) -> io::Result<Vec<(String, u64)>> {
    let mut header = Header::new_zeroed();
    file.read_exact_at(header.as_mut_bytes(), 0)?;
    let mut name = vec![0; header.name_size as usize];
    let mut counters = Vec::new();
    let mut at = u64::from(header.descriptor_offset);
    for _ in 0..header.descriptors {
        let mut descriptor = Descriptor::new_zeroed();
        file.read_exact_at(descriptor.as_mut_bytes(), at)?;
        file.read_exact_at(&mut name, at + size_of::<Descriptor>() as u64)?;
        at += size_of::<Descriptor>() as u64 + u64::from(header.name_size);
        if descriptor.size == 1 {
            let text = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let text = String::from_utf8_lossy(text).into_owned();
            let offset = u64::from(header.data_offset) + u64::from(descriptor.offset);
            counters.push((text, offset));
        }
    }
    Ok(counters)
}
