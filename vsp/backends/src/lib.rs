//! Where a service provider's requests end up: the host's files and devices, by way of `io_uring`.
//!
//! - [`uring`]: one worker's own `io_uring`, shared by its doorbell, its disks and its NIC.
//! - [`block`]: what a disk is, as two small traits, and the words of a request.
//! - [`mod@file`]: a disk in a file or on a block device of the host.
//! - [`paths`]: two ways to one disk, of which one at a time writes.
//! - [`ram`]: a disk in memory, for tests and benches.
//! - [`net`]: what a network is to a NIC, by the same pattern.
//! - [`testing`]: a disk that fails, dawdles and falls short on demand.
//!
//! Emulated and synthetic devices meet here and nowhere else: both speak [`block::Queue`]
//! and [`net::Queue`].

pub mod block;
pub mod file;
pub mod net;
pub mod paths;
pub mod ram;
pub mod testing;
pub mod uring;
