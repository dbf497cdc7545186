//! netvsp: the service provider behind the guest's netvsc, a synthetic NIC.
//!
//! ```text
//!   Nic                  a device on the bus, plugged into a network
//!    ├─ Session          what its channels share: buffers, filter, address
//!    └─ Worker           one for each open channel: a thread with an io_uring of its own
//!        ├─ Vigil            whether to stay awake for a moment
//!        └─ Engine           packets in, frames to the network's queue and back
//!            ├─ Handshake    how the first channel is taken into use (NVSP)
//!            ├─ Control      what the guest and the NIC say to each other (RNDIS)
//!            │   └─ Objects      the NIC's settings
//!            ├─ Sends        frames under way out of the guest
//!            │   └─ transmit     the frames in a packet
//!            └─ Receives     frames under way into the guest
//!                ├─ receive      what is said of a frame
//!                ├─ Slots        whose the slots of the receive buffer are
//!                ├─ Steering     which channel a frame is for
//!                └─ Crossing     how it gets there
//! ```
//!
//! A guest opens the NIC's channel, and as many sub-channels as the network has further queues and
//! the guest further processors. Each channel has a queue of its own and its own part of the receive
//! buffer, so that workers share no more than what the guest has set, and the frames that it wants on
//! another channel than they came by.

mod control;
mod crossing;
mod engine;
mod fuzz;
mod handshake;
mod inline;
mod objects;
mod pages;
mod receive;
mod receives;
mod sends;
mod session;
mod slots;
mod steering;
mod transmit;
mod worker;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use backends::net::{MacAddr, Network, Offloads};
use tracing::debug;
use vmbus::{Guid, nvsp};
use vmbus_server::{Channel, Device, OfferParams};

use crate::vigil::has_spare_processors;
use control::Control;
use engine::{Engine, Primary};
use handshake::{Grants, Handshake};
use objects::{Identity, Objects};
use session::Session;
use worker::Worker;

pub(crate) use fuzz::{fuzz_control, fuzz_data, fuzz_nvsp};
pub use inline::InlineWorker;
pub use session::NicCounters;

/// The most channels of a NIC, as many as Linux opens (`VRSS_CHANNEL_MAX`).
const MAX_CHANNELS: u16 = 64;

/// What a NIC is to be.
#[derive(Clone, Debug)]
pub struct NicConfig {
    /// Which of the partition's NICs it is; its place on the bus follows from it.
    pub number: u8,
    /// Its address.
    pub address: MacAddr,
    /// The largest MTU that the guest may set, in bytes.
    pub max_mtu: u16,
    /// The most channels, at least 1.
    pub channels: u16,
    /// What Linux makes its alias; nothing if empty.
    pub name: String,
}

/// A synthetic NIC.
pub struct Nic {
    number: u8,
    identity: Identity,
    network: Arc<dyn Network>,
    counters: Arc<[NicCounters]>,
    /// Since the first channel was opened.
    session: Option<Arc<Session>>,
    may_spin: bool,
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nic").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Nic {
    /// A NIC that is plugged into `network`.
    pub fn new(config: NicConfig, network: Arc<dyn Network>) -> Self {
        let link = network.link();
        let channels = config.channels.min(link.queues).clamp(1, MAX_CHANNELS);
        let identity = Identity {
            address: config.address,
            max_mtu: config.max_mtu.min(link.mtu),
            name: config.name,
            channels,
            takes: link.takes,
            gives: link.gives,
        };
        Self {
            number: config.number,
            identity,
            network,
            counters: (0..channels).map(|_| NicCounters::default()).collect(),
            session: None,
            may_spin: false,
        }
    }

    /// Tells that its partition has `vps` virtual processors. If the host has more, workers may stay
    /// awake for a moment when something is near.
    #[must_use]
    pub fn with_vps(mut self, vps: u32) -> Self {
        self.may_spin = has_spare_processors(vps);
        self
    }

    /// What passes through it, by channel.
    pub fn counters(&self) -> Arc<[NicCounters]> {
        Arc::clone(&self.counters)
    }

    /// What the first channel does besides. With it the guest begins anew.
    fn begin(&mut self) -> io::Result<Primary> {
        self.session = Some(Arc::new(Session::new(self.identity.channels)?));
        if let Err(error) = self.network.set_receive_offloads(Offloads::NONE) {
            limited::warn!("netvsp{}: the network keeps coalescing: {error}", self.number);
        }
        let grants =
            Grants { subchannels: self.identity.channels - 1, max_mtu: self.identity.max_mtu };
        let objects = Objects::new(self.identity.clone(), &self.network.link());
        Ok(Primary {
            handshake: Handshake::new(grants),
            control: Control::new(objects),
            pending: VecDeque::new(),
            has_sent_table: false,
        })
    }
}

/// The instance of NIC `number`: any will do that is always the same.
fn instance(number: u8) -> Guid {
    let mut wire = Guid::new("6f0e3a5c-52c1-4d0e-9a55-7a3f6b1d2e00").to_wire();
    if let Some(last) = wire.last_mut() {
        *last = number;
    }
    Guid::from_wire(wire)
}

impl Device for Nic {
    fn offer(&self) -> OfferParams {
        OfferParams::new(nvsp::NETWORK_CLASS, instance(self.number))
    }

    fn open(&mut self, channel: Channel) -> io::Result<()> {
        let (number, subchannel) = (self.number, channel.subchannel);
        let primary = (subchannel == 0).then(|| self.begin()).transpose()?;
        let session = self.session.clone();
        let session = session.ok_or_else(|| io::Error::other("a sub-channel comes first"))?;
        let network = Arc::clone(&self.network);
        let (counters, may_spin) = (self.counters(), self.may_spin);
        let (ready, is_ready) = mpsc::sync_channel(1);
        let name = format!("netvsp{number}.{subchannel}");
        thread::Builder::new().name(name).spawn(move || {
            let engine = Engine::new(&channel, network, session, counters, primary);
            match Worker::new(channel, engine, may_spin) {
                Ok(mut worker) => {
                    let _ = ready.send(Ok(()));
                    match worker.run() {
                        Ok(()) => debug!(nic = number, subchannel, "closed"),
                        Err(fault) => {
                            let source = std::error::Error::source(&fault);
                            let why = source.map(|s| format!(": {s}")).unwrap_or_default();
                            // A guest may open channels and break them as long as it likes.
                            limited::warn!(
                                "netvsp{number}.{subchannel}: channel given up: {fault}{why}"
                            );
                        }
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("the worker ended at once")))
    }
}
