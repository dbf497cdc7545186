//! What the NICs of `--nic` are plugged into, and the synthetic ones themselves.
//!
//! Networks are opened first and stay open over the guest's restarts, so that a tap that was made
//! for it keeps its place in the host; the NICs are made anew.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use anyhow::{Context, bail};
use backends::net::tap::{Tap, TapOptions};
use backends::net::{MacAddr, Network};
use vsp::netvsp::{Nic, NicConfig};

use crate::options::nic::{NicAttach, NicBackend, NicOption};

/// A NIC's cable and what is fixed about the NIC.
pub struct Plugged {
    config: NicConfig,
    network: Arc<dyn Network>,
}

/// Opens what `options` name, for a guest of `vps` processors.
pub fn plug(options: &[NicOption], vps: u32) -> anyhow::Result<Vec<Plugged>> {
    (0..)
        .zip(options)
        .map(|(number, option)| {
            open(number, option, vps).with_context(|| format!("--nic {number}"))
        })
        .collect()
}

fn open(number: u8, option: &NicOption, vps: u32) -> anyhow::Result<Plugged> {
    if option.attach == NicAttach::E1000 {
        bail!("attach=e1000 is not there yet; attach=netvsc is");
    }
    if option.pcap.is_some() {
        bail!("pcap= is not there yet");
    }
    let network: Arc<dyn Network> = match &option.backend {
        NicBackend::Tap(name) => Arc::new(open_tap(name, option, vps)?),
        NicBackend::Switch { .. } => bail!("backend=switch is not there yet; backend=tap:NAME is"),
        NicBackend::User { .. } => bail!("backend=user is not there yet; backend=tap:NAME is"),
    };
    let link = network.link();
    let config = NicConfig {
        number,
        address: option.mac.or(link.mac).unwrap_or_else(made_up),
        max_mtu: option.mtu.unwrap_or(link.mtu),
        channels: link.queues,
        name: String::new(),
    };
    Ok(Plugged { config, network })
}

/// A tap with as many queues as was said; else with one for each processor, if it can have more
/// than one.
fn open_tap(name: &str, option: &NicOption, vps: u32) -> anyhow::Result<Tap> {
    let mtu = option.mtu;
    if let Some(queues) = option.queues {
        return Ok(Tap::open(name, TapOptions { queues, mtu })?);
    }
    let queues = u16::try_from(vps).unwrap_or(u16::MAX).min(8);
    match Tap::open(name, TapOptions { queues, mtu }) {
        Err(_) if queues > 1 => Ok(Tap::open(name, TapOptions { queues: 1, mtu })?),
        tap => Ok(tap?),
    }
}

/// An address that no other NIC has, in all likelihood: of the range that QEMU made known.
fn made_up() -> MacAddr {
    let [a, b, c, ..] = RandomState::new().hash_one(()).to_le_bytes();
    MacAddr([0x52, 0x54, 0x00, a, b, c])
}

impl Plugged {
    /// A NIC on this cable.
    pub fn nic(&self) -> Nic {
        Nic::new(self.config.clone(), Arc::clone(&self.network))
    }
}
