//! A disk in a file or on a block device of the host.
//!
//! # Two descriptors
//! The image is opened twice: once with `O_DIRECT`, so that the host moves data between the device
//! and the guest's pages and keeps no second copy, and once without, for what direct I/O cannot do.
//! Which descriptor a step of a request takes is decided by its alignment alone:
//!
//! - **aligned**: direct.
//! - **a read into unaligned memory**: buffered, and right: the kernel writes dirty pages of the
//!   range back before a buffered or direct read, and a direct write drops the cached pages it has
//!   passed by, which it always can because they are clean: this disk makes no others.
//! - **a write from unaligned memory**: direct too, from a small aligned copy. A buffered write
//!   would be wrong: the page it dirties holds the neighbouring sectors as well, and would put
//!   their old content over a direct write that went past it meanwhile.
//! - **a host that cannot address 512 bytes directly** (a 4Kn device): everything is buffered,
//!   since a guest that sees 512-byte sectors would need the above for every other write.
//!
//! # Locks
//! A third descriptor of a file holds the lock (`F_OFD_SETLK` on the whole of it, which QEMU and
//! Cloud Hypervisor also heed) and does nothing else. Descriptors that are registered with an
//! `io_uring` may be kept open by it for a while after the process has gone; this one is closed with
//! the process, after its I/O, so the next one can start at once. A block device is claimed as well
//! (`O_EXCL`), which keeps it from being mounted.
//!
//! `unsafe` hands addresses to the kernel by [`crate::uring::Uring::push`] and makes two calls that
//! no safe wrapper has (OFD locks, a probe read).
#![allow(unsafe_code)]

mod open;
mod queue;

pub use open::{Direct, FileDisk, OpenError, OpenOptions};
