//! A controller and a guest's client of it in one process, over real rings.
#![allow(dead_code)] // each test program uses its part

use std::sync::Arc;
use std::time::Duration;

use backends::block::Disk;
use hypervisor::{GuestMemory, Gpa, Gpn};
use vmbus_server::testing::{GuestEnd, channel_in};
use vmbus_server::{Channel as RootChannel, Device, DoubleMapped};
use vsc::storvsc::{Agreement, PageList, Pages, Queue, Scratch, words};
use vsc::{Channel, Doorbell};
use vsp::storvsp::{Controller, ControllerBuilder};

pub const PATIENCE: Duration = Duration::from_secs(10);
/// Pages of a ring, one direction.
pub const RING_PAGES: u64 = 32;

pub struct Bell(pub Arc<vmbus_server::testing::EventFd>);

impl Doorbell for Bell {
    fn ring(&mut self) {
        self.0.write(1).expect("an eventfd");
    }
}
