//! A tap: a network device of the host whose other end is ours.
//!
//! Frames go between the guest's memory and the kernel in one copy, which is the kernel's: an
//! entry of the worker's ring names a small header of our own (`IFF_VNET_HDR`: checksums and
//! segments that are left to the other side) and the guest's buffers behind it. A queue for each
//! worker is a descriptor of the same tap (`IFF_MULTI_QUEUE`); the kernel keeps a flow on the queue
//! that last sent for it.
//!
//! Receiving is by batches. A read for each offered buffer, all of them waiting, would have the
//! kernel wake every one for each frame. So a queue that was found empty is polled, and one that
//! has frames is read a batch at a time, without waiting, until a read finds nothing.
//!
//! The link is up as long as the tap is. A socket hears of changes to any network device of the host
//! (rtnetlink), and the queues then look what has become of theirs.
//!
//! A tap that does not exist is made, brought up, and gone when the last descriptor is closed. One
//! that exists is used as it is and left as it was.

mod open;
mod queue;

pub use open::{OpenError, Tap, TapOptions};
