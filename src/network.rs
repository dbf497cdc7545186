//! What the NICs of `--nic` are plugged into, and what they are.
//!
//! Networks are opened first and stay open over the guest's restarts, so that a tap that was made
//! for it keeps its place in the host; the NICs are made anew. With them stay the switches of
//! `--switch` and what joins these to the world outside.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use backends::net::capture::Capture;
use backends::net::switch::vlan::PortVlan;
use backends::net::switch::{PortOptions, Switch, SwitchOptions};
use backends::net::tap::{Tap, TapOptions};
use backends::net::uplink::Uplink;
use backends::net::user::User;
use backends::net::{MacAddr, Network};
use emulators::pci;
use emulators::{E1000_MAX_MTU, E1000Config};
use vsp::netvsp::{Nic, NicConfig};

use crate::options::nic::{NicAttach, NicBackend, NicOption};
use crate::options::switch::{SwitchOption, UplinkOption};

/// The MTU of a NIC behind user-mode networking, if it is not said: what every guest starts out
/// with.
const USER_MTU: u16 = 1500;

/// The most emulated NICs: so many places are left on the PCI bus.
const MOST_E1000: usize = (pci::SLOTS - pci::FIRST_SLOT) as usize;

/// A NIC's cable and what is fixed about the NIC.
pub enum Plugged {
    /// One on the VMBus.
    Synthetic {
        /// What it is like.
        config: NicConfig,
        /// Of the guest.
        vps: u32,
        /// Its cable.
        network: Arc<dyn Network>,
    },
    /// One on the PCI bus.
    Emulated(E1000Config),
}

/// All that the NICs of a machine are plugged into.
pub struct Networks {
    /// Of the NICs, in order.
    pub cables: Vec<Plugged>,
    /// By name.
    pub switches: Vec<Switch>,
    /// Are unplugged with this.
    _uplinks: Vec<Uplink>,
}

/// Opens what `nics` and `switches` name, for a guest of `vps` processors. NICs that name the same
/// switch are on one, whether or not it is among `switches`.
pub fn plug(nics: &[NicOption], switches: &[SwitchOption], vps: u32) -> anyhow::Result<Networks> {
    let mut made = HashMap::new();
    one_file_each(nics, switches)?;
    for SwitchOption { name, mtu, .. } in switches {
        let mut options = SwitchOptions::new(name);
        options.mtu = mtu.unwrap_or(options.mtu);
        let other = made.insert(name.clone(), Switch::new(options));
        ensure!(other.is_none(), "--switch {name}: it is given twice");
        let has_nic = |nic: &NicOption| matches!(&nic.backend, NicBackend::Switch { name: its, .. } if its == name);
        ensure!(
            nics.iter().any(has_nic),
            "--switch {name}: no NIC is on it; one is with --nic backend=switch:{name}"
        );
    }
    let cables = open_all(nics, vps, &mut made)?;
    let mut uplinks = Vec::new();
    for option in switches {
        if let Some(switch) = made.get(&option.name) {
            let uplink =
                join(switch, option).with_context(|| format!("--switch {}", option.name))?;
            uplinks.extend(uplink);
        }
    }
    let mut switches: Vec<_> = made.into_values().collect();
    switches.sort_by(|one, other| one.name().cmp(other.name()));
    Ok(Networks { cables, switches, _uplinks: uplinks })
}

/// Refuses captures of which one would overwrite the other.
fn one_file_each(nics: &[NicOption], switches: &[SwitchOption]) -> anyhow::Result<()> {
    let of_nics =
        (0..).zip(nics).map(|(number, nic): (u8, _)| (format!("--nic {number}"), &nic.pcap));
    let of_switches =
        switches.iter().map(|switch| (format!("--switch {}", switch.name), &switch.pcap));
    let mut files = HashMap::new();
    for (whose, pcap) in of_nics.chain(of_switches) {
        if let Some(path) = pcap
            && let Some(other) = files.insert(path, whose.clone())
        {
            bail!("{whose}: pcap={} is that of {other} already", path.display());
        }
    }
    Ok(())
}

/// Plugs a switch's uplink in, if it is to have one. A tap that is made for it has the switch's MTU, if
/// one was said.
fn join(switch: &Switch, option: &SwitchOption) -> anyhow::Result<Option<Uplink>> {
    let Some(uplink) = &option.uplink else {
        if let Some(path) = &option.pcap {
            bail!("pcap={} writes down an uplink's frames, and there is no uplink", path.display());
        }
        return Ok(None);
    };
    let capture =
        |name: &str| option.pcap.as_ref().map(|path| Capture::create(path, name)).transpose();
    Ok(Some(match uplink {
        UplinkOption::Tap(name) => {
            let tap = Tap::open(name, TapOptions { queues: 1, mtu: option.mtu })?;
            Uplink::to_network(switch, Arc::new(tap), capture(name)?.as_ref())?
        }
        UplinkOption::Socket(path) => {
            let capture = capture(&format!("socket:{}", path.display()))?;
            Uplink::to_socket(switch, path, capture.as_ref())?
        }
    }))
}

/// The cables of all NICs.
fn open_all(
    options: &[NicOption],
    vps: u32,
    switches: &mut HashMap<String, Switch>,
) -> anyhow::Result<Vec<Plugged>> {
    let emulated = options.iter().filter(|option| option.attach == NicAttach::E1000).count();
    ensure!(
        emulated <= MOST_E1000,
        "--nic: {emulated} with attach=e1000; the PCI bus has places for {MOST_E1000}"
    );
    (0..)
        .zip(options)
        .map(|(number, option)| {
            open(number, option, vps, switches).with_context(|| format!("--nic {number}"))
        })
        .collect()
}

fn open(
    number: u8,
    option: &NicOption,
    vps: u32,
    switches: &mut HashMap<String, Switch>,
) -> anyhow::Result<Plugged> {
    let vps = match (option.attach, option.queues) {
        (NicAttach::Netvsc, _) => vps,
        (NicAttach::E1000, None | Some(1)) => 1,
        (NicAttach::E1000, Some(queues)) => {
            bail!("queues={queues}: an e1000 has one queue; attach=netvsc has more")
        }
    };
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
        let capture = Capture::create(path, &network.link().name)?;
        network = Arc::new(capture.observe(network));
    }
    let link = network.link();
    let address = option.mac.or(link.mac).unwrap_or_else(made_up);
    let mtu = option.mtu.unwrap_or(link.mtu);
    if option.attach == NicAttach::E1000 {
        let mtu = mtu.min(E1000_MAX_MTU);
        return Ok(Plugged::Emulated(E1000Config { address, mtu, network }));
    }
    let wanted = option.queues.unwrap_or_else(|| u16::try_from(vps).unwrap_or(u16::MAX));
    let config = NicConfig {
        number,
        address,
        max_mtu: mtu,
        channels: link.queues.min(wanted),
        name: String::new(),
    };
    Ok(Plugged::Synthetic { config, vps, network })
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
    /// A synthetic NIC on this cable, if it is to have one.
    pub fn synthetic(&self) -> Option<Nic> {
        match self {
            Self::Synthetic { config, vps, network } => {
                Some(Nic::new(config.clone(), Arc::clone(network)).with_vps(*vps))
            }
            Self::Emulated(_) => None,
        }
    }

    /// What the emulated NIC on this cable is to be, if it is to have one.
    pub fn emulated(&self) -> Option<&E1000Config> {
        match self {
            Self::Synthetic { .. } => None,
            Self::Emulated(config) => Some(config),
        }
    }
}
