//! A disk in a file or on a block device of the host.
//!
//! # Two descriptors
//! The image is opened twice: once with `O_DIRECT`, so that the host moves data between the device
//! and the guest's pages and keeps no second copy, and once without, for what direct I/O cannot do.
//! If there is the first, all data goes by it, so that the page cache never holds anything of the image
//! that could be older than the disk, or be put over what is newer:
//!
//! - **aligned memory**: between the device and the guest's pages.
//! - **unaligned memory**: by way of a small aligned copy, reads and writes alike. A buffered read
//!   would leave pages behind that direct writes beside it may fail to drop; a buffered write would
//!   put the neighbouring sectors' old content over a direct write that went past it meanwhile.
//! - **zeroes**: whole blocks of the file system, or all of a device's, are asked of the host by
//!   `fallocate`; parts of one, and what the host cannot zero by itself, are written. (Only where there
//!   is no room to write a part of a block, which is then a hole, is it left to the file system, which
//!   keeps direct writes out meanwhile.)
//!
//! The other serves everything if direct I/O cannot address the disk's blocks: sectors of 512 bytes
//! on a device that has blocks of 4096, for example. There the page cache is who reads a block,
//! changes a part of it and writes it back, and keeps writers of its other parts out meanwhile.
//!
//! # A flush that fails
//! The kernel tells of a write that it could not carry out later on once, to one flush on each open
//! file, and then forgets what was lost. Queues share their files, so what one has heard counts for
//! all of them, until the image is opened anew. What a queue had no time to hear, one more open file
//! is asked for when it goes.
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

pub use open::{Direct, FileDisk, LARGEST_BLOCK, OpenError, OpenOptions};
