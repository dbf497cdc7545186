//! What the NICs of `--nic` are plugged into, and the synthetic ones themselves.
//!
//! Networks are opened first and stay open over the guest's restarts, so that a tap that was made
//! for it keeps its place in the host; the NICs are made anew.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use backends::net::capture::Captured;
use backends::net::switch::vlan::PortVlan;
use backends::net::switch::{PortOptions, Switch, SwitchOptions};
use backends::net::tap::{Tap, TapOptions};
use backends::net::user::User;
use backends::net::{MacAddr, Network};
use vsp::netvsp::{Nic, NicConfig};

use crate::options::nic::{NicAttach, NicBackend, NicOption};

/// The MTU of a NIC behind user-mode networking, if it is not said: what every guest starts out
/// with.
const USER_MTU: u16 = 1500;

/// A NIC's cable and what is fixed about the NIC.
pub struct Plugged {
    config: NicConfig,
    network: Arc<dyn Network>,
}

/// Opens what `options` name, for a guest of `vps` processors. NICs that name the same switch are
/// on one.
pub fn plug(options: &[NicOption], vps: u32) -> anyhow::Result<Vec<Plugged>> {
    let mut switches = HashMap::new();
    let mut captures = HashSet::new();
    (0..)
        .zip(options)
        .map(|(number, option)| {
            if let Some(path) = &option.pcap {
                ensure!(
                    captures.insert(path),
                    "--nic {number}: pcap={} is another NIC's already",
                    path.display()
                );
            }
            open(number, option, vps, &mut switches).with_context(|| format!("--nic {number}"))
        })
        .collect()
}

fn open(
    number: u8,
    option: &NicOption,
    vps: u32,
    switches: &mut HashMap<String, Switch>,
) -> anyhow::Result<Plugged> {
    if option.attach == NicAttach::E1000 {
        bail!("attach=e1000 is not there yet; attach=netvsc is");
    }
    let mut network: Arc<dyn Network> = match &option.backend {
        NicBackend::Tap(name) => Arc::new(open_tap(name, option, vps)?),
        NicBackend::Switch { name, vlan, isolated } => {
            let switch = switches
                .entry(name.clone())
                .or_insert_with(|| Switch::new(SwitchOptions::new(name)));
            let vlan = vlan.map_or_else(PortVlan::default, PortVlan::Access);
            Arc::new(switch.port(PortOptions { vlan, isolated: *isolated })?)
        }
        NicBackend::User { forwards } => {
            Arc::new(User::start(option.mtu.unwrap_or(USER_MTU), forwards)?)
        }
    };
    if let Some(path) = &option.pcap {
        network = Arc::new(Captured::new(network, path)?);
    }
    let link = network.link();
    let wanted = option.queues.unwrap_or_else(|| u16::try_from(vps).unwrap_or(u16::MAX));
    let config = NicConfig {
        number,
        address: option.mac.or(link.mac).unwrap_or_else(made_up),
        max_mtu: option.mtu.unwrap_or(link.mtu),
        channels: link.queues.min(wanted),
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
