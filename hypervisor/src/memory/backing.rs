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
//! Counted by KVM over the boot of Debian's cloud kernel in 512 MiB, in a KVM under emulation with
//! `shmem_enabled` at its default, `never`: 26,000 faults with 3, 54 with 1 or 2.
//!
//! A tmpfs file cannot be sealed. Whoever gets its descriptor can therefore shrink it, and with it
//! the guest: hand it to programs of this project only.

#![allow(unsafe_code)] // fork and what belongs to it, madvise

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The kind of memory a guest got, best first.
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
    match huge_tmpfs(size).or_else(|_| in_user_namespace(|| huge_tmpfs(size))) {
        Ok(file) => Ok((file, Backing::HugeTmpfs)),
        Err(error) => {
            tracing::debug!(%error, "no tmpfs with huge pages for guest memory");
            Ok((memfd(size)?, Backing::Memfd))
        }
    }
}

fn huge_tmpfs(size: u64) -> io::Result<File> {
    use rustix::mount::{fsconfig_create, fsconfig_set_string, fsmount, fsopen};

    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, c"huge", c"always")?;
    // The default limit, half of the host's memory, is not ours; and it counts huge pages.
    fsconfig_set_string(&context, c"size", c"0")?;
    fsconfig_set_string(&context, c"mode", c"0700")?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(&mount, c".", flags, Mode::RUSR | Mode::WUSR)?);
    file.set_len(size)?;
    Ok(file)
}

/// Has `make` called by a child that is root in a user namespace of its own and may mount there,
/// and takes the file from it.
///
/// The child is a fork of a program that may have threads, so `make` must not do what a signal
/// handler may not do either: no allocation, no lock.
fn in_user_namespace(make: impl FnOnce() -> io::Result<File>) -> io::Result<File> {
    let (ours, theirs) = UnixDatagram::pair()?;
    let uid_map = format!("0 {} 1", rustix::process::geteuid().as_raw());
    let gid_map = format!("0 {} 1", rustix::process::getegid().as_raw());
    // SAFETY: the child does system calls and nothing else, and ends in `_exit`.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        let made = enter_user_namespace(uid_map.as_bytes(), gid_map.as_bytes())
            .and_then(|()| make())
            .and_then(|file| Ok(theirs.send_with_fd(&[0_u8][..], file.as_raw_fd())?));
        // SAFETY: ends the process without running what the parent registered for its own end.
        unsafe { libc::_exit(i32::from(made.is_err())) };
    }
    // With its last sender gone, receiving ends even if nothing was sent.
    drop(theirs);
    let mut status = 0;
    // SAFETY: the child is ours, and `status` is where its status goes.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if status != 0 {
        return Err(io::Error::other("a user namespace of its own does not help"));
    }
    // Closed in whatever child starts a program from here on.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0_u8; 1];
    recvmsg(&ours, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Ok(file.ok_or(io::ErrorKind::UnexpectedEof)?.into())
}

/// Makes the calling process root in new user and mount namespaces.
fn enter_user_namespace(uid_map: &[u8], gid_map: &[u8]) -> io::Result<()> {
    // SAFETY: the flags share nothing new with anybody.
    if unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let settings: [(&CStr, &[u8]); 3] = [
        (c"/proc/self/setgroups", b"deny"),
        (c"/proc/self/uid_map", uid_map),
        (c"/proc/self/gid_map", gid_map),
    ];
    for (path, text) in settings {
        let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, text)?;
    }
    Ok(())
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
    fn a_file_comes_out_of_the_user_namespace() {
        // Hosts may forbid such namespaces; then there is nothing to see here.
        if let Ok(file) = in_user_namespace(|| huge_tmpfs(8 << 20)) {
            assert_eq!(file.metadata().unwrap().len(), 8 << 20);
        }
        assert!(in_user_namespace(|| Err(io::ErrorKind::NotFound.into())).is_err());
    }

    #[test]
    fn some_memory_is_always_had() {
        let (file, _) = allocate(3 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3 << 20);
    }
}
