//! What `--switch` means: `name=lan,uplink=socket:/run/lan.sock`.

use std::path::PathBuf;
use std::str::FromStr;

use super::nic::MTUS;
use super::{List, OptionError, within};

/// What joins a switch to the world outside of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UplinkOption {
    /// A tap of the host, by name.
    Tap(String),
    /// A Unix socket, at which other machines' switches meet this one.
    Socket(PathBuf),
}

/// One `--switch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchOption {
    /// By which NICs name it.
    pub name: String,
    /// Its uplink, if it has one.
    pub uplink: Option<UplinkOption>,
    /// The longest packet, in bytes; 9000 if it is not said.
    pub mtu: Option<u16>,
    /// Where to write all of the uplink's frames down, as pcapng.
    pub pcap: Option<PathBuf>,
}

/// The keys of `--switch`, for messages.
const SWITCH_KEYS: &str = "name, uplink, mtu, pcap";

const SWITCH: List = List {
    written: "a switch is written [name=]NAME",
    first: "name",
    known: SWITCH_KEYS,
    repeated: &[],
};

impl FromStr for SwitchOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        let (mut name, mut uplink, mut mtu, mut pcap) = (None, None, None, None);
        for (key, value) in SWITCH.pairs(s)? {
            match key.as_str() {
                "name" if !value.is_empty() => name = Some(value),
                "name" => return Err(OptionError::Missing("name")),
                "uplink" => {
                    uplink = Some(match value.split_once(':') {
                        Some(("tap", name)) if !name.is_empty() => UplinkOption::Tap(name.into()),
                        Some(("socket", path)) if !path.is_empty() => {
                            UplinkOption::Socket(path.into())
                        }
                        _ => {
                            let allowed = "tap:NAME or socket:PATH";
                            return Err(OptionError::Value { key: "uplink", value, allowed });
                        }
                    });
                }
                "pcap" if !value.is_empty() => pcap = Some(value.into()),
                "pcap" => return Err(OptionError::Missing("pcap")),
                "mtu" => mtu = Some(within(MTUS, "mtu", value, "68 to 9000")?),
                _ => return Err(OptionError::UnknownKey { key, known: SWITCH_KEYS }),
            }
        }
        Ok(Self { name: name.ok_or(OptionError::Missing("name"))?, uplink, mtu, pcap })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches() {
        let switch = |s: &str| s.parse::<SwitchOption>().unwrap();
        let lan = SwitchOption { name: "lan".into(), uplink: None, mtu: None, pcap: None };
        assert_eq!([switch("name=lan"), switch("lan")], [(); 2].map(|()| lan.clone()));
        let uplink = Some(UplinkOption::Tap("lab0".into()));
        assert_eq!(switch("lan,uplink=tap:lab0"), SwitchOption { uplink, ..lan.clone() });
        let uplink = Some(UplinkOption::Socket("/run/a,b:c".into()));
        assert_eq!(
            switch("uplink=socket:/run/a,,b:c,name=lan,mtu=1500,pcap=a"),
            SwitchOption { uplink, mtu: Some(1500), pcap: Some("a".into()), ..lan }
        );
    }

    #[test]
    fn refusals_say_what_would_be_right() {
        let message = |s: &str| s.parse::<SwitchOption>().unwrap_err().to_string();
        assert_eq!(
            message("uplink"),
            "'uplink' is not KEY=VALUE; a switch is written [name=]NAME[,KEY=VALUE]…"
        );
        assert_eq!(message("uplink=tap:lab0"), "'name' is missing; write name=VALUE");
        assert_eq!(message("name="), "'name' is missing; write name=VALUE");
        for bad in ["lab0", "tap:", "socket:", "user", ""] {
            assert_eq!(
                message(&format!("name=lan,uplink={bad}")),
                format!("uplink={bad} is not possible; uplink is tap:NAME or socket:PATH")
            );
        }
        assert_eq!(message("name=lan,mtu=9001"), "mtu=9001 is not possible; mtu is 68 to 9000");
        assert_eq!(
            message("name=lan,vlan=7"),
            "unknown key 'vlan'; known are name, uplink, mtu, pcap"
        );
        assert_eq!(message("name=lan,pcap="), "'pcap' is missing; write pcap=VALUE");
    }
}
