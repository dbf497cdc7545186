//! What kind of file guest memory is.
//!
//! Every page of the host that a guest touches for the first time costs a second-level fault,
//! so the size of the pages decides what a boot costs. Candidates, best first:
//!
//! 1. A file without a name in a tmpfs of our own, mounted `huge=always` and attached nowhere.
//!    Pages are huge whatever the host's `shmem_enabled` says. Mounting needs `CAP_SYS_ADMIN`.
//! 2. The same, made by a short-lived child in a user namespace of its own, where hosts allow
//!    these. The file comes back through a socket; it outlives the namespace.
//! 3. A memfd, sealed against changes of size and advised to be huge. Whether it gets huge pages is
//!    up to the host's `shmem_enabled`.
//!
//! A tmpfs file cannot be sealed. Whoever gets its descriptor can therefore shrink it, and with it
//! the guest: hand it to programs of this project only.

#![allow(unsafe_code)] // fork, madvise

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// The kind of memory a guest got; see [the module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A tmpfs of our own with huge pages.
    HugeTmpfs,
    /// A memfd; pages are huge if the host's `shmem_enabled` allows it.
    Memfd,
}

impl Backing {
    /// Whether huge pages are sure to be tried.
    pub fn may_be_huge(self) -> bool {
        self == Self::HugeTmpfs
    }

    /// Tells the kernel about a new mapping what the file does not say already.
    pub(super) fn advise(self, start: *mut u8, len: usize) {
        if self == Self::Memfd {
            // SAFETY: the advice changes the size of pages, not what they hold.
            let _ = unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        }
    }
}

/// A new file of `size` bytes, all holes.
pub(super) fn allocate(size: u64) -> io::Result<(File, Backing)> {
    if std::env::var("HVB").is_ok() {
        return Ok((memfd(size)?, Backing::Memfd));
    }
    if let Ok(file) = huge_tmpfs(size) {
        return Ok((file, Backing::HugeTmpfs));
    }
    Ok((memfd(size)?, Backing::Memfd))
}

fn huge_tmpfs(size: u64) -> io::Result<File> {
    use rustix::mount::{fsconfig_create, fsconfig_set_string, fsmount, fsopen};

    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, c"huge", c"always")?;
    // The limit is in whole huge pages, and the default of half the host's memory is not ours.
    let limit = size.next_multiple_of(2 << 20).to_string();
    fsconfig_set_string(&context, c"size", limit.as_str())?;
    fsconfig_set_string(&context, c"mode", c"0700")?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(&mount, c".", flags, Mode::RUSR | Mode::WUSR)?);
    file.set_len(size)?;
    Ok(file)
}

fn memfd(size: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create(c"guest-memory", flags)?);
    file.set_len(size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memfd_keeps_its_size() {
        let file = memfd(1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(2 << 20).is_err());
    }

    #[test]
    fn some_memory_is_always_had() {
        let (file, _) = allocate(3 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3 << 20);
    }
}
