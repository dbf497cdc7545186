//! What `--nic` means: `attach=netvsc,backend=tap:lab0,mac=52:54:00:12:34:56,queues=2`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

use backends::net::MacAddr;
use backends::net::user::{Forward, Protocol};

use super::{List, OptionError, switch, within};

/// How a NIC is shown to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NicAttach {
    /// As a synthetic NIC.
    #[default]
    Netvsc,
    /// As an emulated Intel 82540EM.
    E1000,
}

/// What a NIC's cable leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NicBackend {
    /// A tap of the host, by name.
    Tap(String),
    /// A port of the virtual switch of this name, which the NICs of this machine share.
    Switch {
        /// Of the switch.
        name: String,
        /// The VLAN that the port belongs to; all of them, tagged, if it is not said.
        vlan: Option<u16>,
        /// The port hears no other isolated one.
        isolated: bool,
    },
    /// The host's own network, by a process that needs no rights.
    User {
        /// Ports of the host that lead to the guest.
        forwards: Vec<Forward>,
    },
}

/// One `--nic`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicOption {
    /// How the guest sees it.
    pub attach: NicAttach,
    /// What it is plugged into.
    pub backend: NicBackend,
    /// Its address; made up if it is not said.
    pub mac: Option<MacAddr>,
    /// The longest packet, in bytes; the backend's if it is not said.
    pub mtu: Option<u16>,
    /// How many queues it may have; one for each virtual processor if it is not said.
    pub queues: Option<u16>,
    /// Where to write all its frames down, as pcapng.
    pub pcap: Option<PathBuf>,
}

/// The keys of `--nic`, for messages and help.
const NIC_KEYS: &str = "attach, backend, hostfwd, vlan, isolated, mac, mtu, queues, pcap";

const NIC: List = List {
    written: "a NIC is written [backend=]BACKEND",
    first: "backend",
    known: NIC_KEYS,
    repeated: &["hostfwd"],
};

/// What `backend=` takes.
const BACKENDS: &str = "tap:NAME, switch:NAME or user";

/// Bytes of the shortest MTU that IPv4 allows, and of the longest that is usual.
pub(super) const MTUS: std::ops::RangeInclusive<u16> = 68..=9000;

/// The most queues.
const QUEUES: std::ops::RangeInclusive<u16> = 1..=64;

/// Numbers of VLANs.
const VLANS: std::ops::RangeInclusive<u16> = 1..=4094;

impl FromStr for NicOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        let mut backend = None;
        let mut nic = Self {
            attach: NicAttach::Netvsc,
            backend: NicBackend::User { forwards: Vec::new() },
            mac: None,
            mtu: None,
            queues: None,
            pcap: None,
        };
        let mut forwards = Vec::new();
        let (mut vlan, mut isolated) = (None, None);
        for (key, value) in NIC.pairs(s)? {
            match key.as_str() {
                "attach" => match value.as_str() {
                    "netvsc" => nic.attach = NicAttach::Netvsc,
                    "e1000" => nic.attach = NicAttach::E1000,
                    _ => return Err(refused("attach", value, "netvsc or e1000")),
                },
                "backend" => backend = Some(value),
                "hostfwd" => forwards.push(forward(&value)?),
                "vlan" => vlan = Some(within(VLANS, "vlan", value, "1 to 4094")?),
                "isolated" => isolated = Some(switch("isolated", value)?),
                "mac" => match value.parse::<MacAddr>() {
                    Ok(mac) if mac.is_station() => nic.mac = Some(mac),
                    _ => {
                        let allowed = "six hexadecimal bytes such as 52:54:00:12:34:56, the first \
                                       of them even";
                        return Err(refused("mac", value, allowed));
                    }
                },
                "mtu" => nic.mtu = Some(within(MTUS, "mtu", value, "68 to 9000")?),
                "queues" => nic.queues = Some(within(QUEUES, "queues", value, "1 to 64")?),
                "pcap" if !value.is_empty() => nic.pcap = Some(value.into()),
                "pcap" => return Err(OptionError::Missing("pcap")),
                _ => return Err(OptionError::UnknownKey { key, known: NIC_KEYS }),
            }
        }
        let backend = backend.ok_or(OptionError::Missing("backend"))?;
        let only = |key, backend| Err(OptionError::Backend { key, backend });
        match backend.split_once(':').unwrap_or((&backend, "")) {
            ("user", "") => {}
            _ if !forwards.is_empty() => return only("hostfwd", "user"),
            ("switch", name) if !name.is_empty() => {}
            _ if vlan.is_some() => return only("vlan", "switch:NAME"),
            _ if isolated.is_some() => return only("isolated", "switch:NAME"),
            _ => {}
        }
        nic.backend = match backend.split_once(':') {
            Some(("tap", name)) if !name.is_empty() => NicBackend::Tap(name.to_owned()),
            Some(("switch", name)) if !name.is_empty() => NicBackend::Switch {
                name: name.to_owned(),
                vlan,
                isolated: isolated.unwrap_or(false),
            },
            None if backend == "user" && vlan.is_some() => return only("vlan", "switch:NAME"),
            None if backend == "user" && isolated.is_some() => {
                return only("isolated", "switch:NAME");
            }
            None if backend == "user" => NicBackend::User { forwards },
            _ => return Err(refused("backend", backend, BACKENDS)),
        };
        Ok(nic)
    }
}

/// Reads one: `tcp:2222-22`, `udp:0.0.0.0:53`. Without an address, only the host itself reaches the
/// port; without a guest's port, that is the same.
fn forward(s: &str) -> Result<Forward, OptionError> {
    let wrong = || {
        let allowed = "tcp:[ADDRESS:]PORT[-GUESTPORT] or udp:[ADDRESS:]PORT[-GUESTPORT]";
        refused("hostfwd", s.to_owned(), allowed)
    };
    let (protocol, rest) = s.split_once(':').ok_or_else(wrong)?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Err(wrong()),
    };
    let (host, guest) = rest.split_once('-').map_or((rest, None), |(h, g)| (h, Some(g)));
    let (address, host) = match host.rsplit_once(':') {
        None => (Ipv4Addr::LOCALHOST.into(), host),
        Some((address, host)) => {
            let inner = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
            let address = match inner {
                Some(inner) => inner.parse().map(IpAddr::V6),
                None => address.parse().map(IpAddr::V4),
            };
            (address.map_err(|_| wrong())?, host)
        }
    };
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port > 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err(wrong()),
    };
    let host = port(host)?;
    let guest = guest.map_or(Ok(host), port)?;
    Ok(Forward { protocol, address, host, guest })
}

fn refused(key: &'static str, value: String, allowed: &'static str) -> OptionError {
    OptionError::Value { key, value, allowed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic(s: &str) -> NicOption {
        s.parse().unwrap()
    }

    fn message(s: &str) -> String {
        s.parse::<NicOption>().unwrap_err().to_string()
    }

    #[test]
    fn a_nic_with_everything() {
        assert_eq!(
            nic("attach=e1000,backend=tap:lab0,mac=52:54:00:12:34:56,mtu=9000,queues=4,pcap=/a,,b"),
            NicOption {
                attach: NicAttach::E1000,
                backend: NicBackend::Tap("lab0".into()),
                mac: Some(MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56])),
                mtu: Some(9000),
                queues: Some(4),
                pcap: Some("/a,b".into()),
            }
        );
    }

    #[test]
    fn backends() {
        let user = NicBackend::User { forwards: Vec::new() };
        assert_eq!(nic("backend=user").backend, user);
        assert_eq!(nic("backend=user").attach, NicAttach::Netvsc);
        let switch = |vlan, isolated| NicBackend::Switch { name: "lan".into(), vlan, isolated };
        assert_eq!(nic("backend=switch:lan").backend, switch(None, false));
        assert_eq!(nic("vlan=7,backend=switch:lan,isolated=on").backend, switch(Some(7), true));
        let NicBackend::User { forwards } = nic(
            "backend=user,hostfwd=tcp:2222-22,hostfwd=udp:0.0.0.0:53,hostfwd=tcp:[::1]:80-8080",
        )
        .backend
        else {
            panic!("not user");
        };
        let forward = |protocol, address: &str, host, guest| Forward {
            protocol,
            address: address.parse().unwrap(),
            host,
            guest,
        };
        let expected = [
            forward(Protocol::Tcp, "127.0.0.1", 2222, 22),
            forward(Protocol::Udp, "0.0.0.0", 53, 53),
            forward(Protocol::Tcp, "::1", 80, 8080),
        ];
        assert_eq!(forwards, expected);
    }

    #[test]
    fn refusals_say_what_would_be_right() {
        assert_eq!(message("mtu=1500"), "'backend' is missing; write backend=VALUE");
        let written = "is not KEY=VALUE; a NIC is written [backend=]BACKEND[,KEY=VALUE]…";
        assert_eq!(message("mtu=1500,user"), format!("'user' {written}"));
        assert_eq!(message(""), format!("'' {written}"));
        assert_eq!(message("mac"), format!("'mac' {written}"));
        for bad in ["tap", "tap0", "tap:", "switch:", "user:1", "vhost"] {
            let right = "backend is tap:NAME, switch:NAME or user";
            let message = [message(bad), message(&format!("backend={bad}"))];
            assert_eq!(
                message,
                [(); 2].map(|()| format!("backend={bad} is not possible; {right}"))
            );
        }
        assert_eq!(
            message("backend="),
            "backend= is not possible; backend is tap:NAME, switch:NAME or user"
        );
        assert_eq!(message("backend=tap:a,hostfwd=tcp:1"), "'hostfwd' goes with backend=user only");
        assert_eq!(message("backend=user,vlan=1"), "'vlan' goes with backend=switch:NAME only");
        assert_eq!(
            message("backend=tap:a,isolated=on"),
            "'isolated' goes with backend=switch:NAME only"
        );
        assert_eq!(message("backend=user,backend=user"), "'backend' is given twice");
        assert_eq!(
            message("backend=user,mac=01:00:00:00:00:01"),
            "mac=01:00:00:00:00:01 is not possible; mac is six hexadecimal bytes such as \
             52:54:00:12:34:56, the first of them even"
        );
        for bad in ["mtu=67", "mtu=9001", "queues=0", "queues=65", "queues=x"] {
            let (key, value) = bad.split_once('=').unwrap();
            let message = message(&format!("backend=user,{bad}"));
            assert!(
                message.starts_with(&format!("{key}={value} is not possible; {key} is ")),
                "{message}"
            );
        }
        for bad in ["tcp:0", "tcp:1-0", "tcp:+1", "icmp:1", "tcp:1:2:3", "tcp", "tcp:a:1", "tcp:1-"]
        {
            assert_eq!(
                message(&format!("backend=user,hostfwd={bad}")),
                format!(
                    "hostfwd={bad} is not possible; hostfwd is tcp:[ADDRESS:]PORT[-GUESTPORT] or \
                     udp:[ADDRESS:]PORT[-GUESTPORT]"
                )
            );
        }
    }
}
