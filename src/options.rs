//! What the values of command-line options mean: sizes, disks, NICs ([`nic`]), switches
//! ([`mod@switch`]), the serial port, the partition and its SynIC.
//!
//! A list value such as `path=a.img,readonly=on` is `key=value` pairs parted by commas; a comma
//! in a value is written twice. The first pair may do without its key if that is the one that has to
//! be there: `a.img,readonly=on`. Every refusal says what was wrong and what would be right.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

pub mod nic;
pub mod switch;

/// Why an option's value was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptionError {
    /// Not a number with a unit.
    #[error("'{0}' is not a size; write a number with K, M or G, such as 512M")]
    Size(String),
    /// A part without an equals sign.
    #[error("'{part}' is not KEY=VALUE; {written}[,KEY=VALUE]…")]
    NoValue {
        /// The part.
        part: String,
        /// How the list begins.
        written: &'static str,
    },
    /// A key nobody knows.
    #[error("unknown key '{key}'; known are {known}")]
    UnknownKey {
        /// The key as written.
        key: String,
        /// Those that would do.
        known: &'static str,
    },
    /// A first part whose key is none, and which may be meant as a value with an equals sign.
    #[error(
        "unknown key '{key}'; known are {known}; a value with '=' in it is written {first}=VALUE"
    )]
    NeitherKeyNorValue {
        /// What is before the equals sign.
        key: String,
        /// The keys that would do.
        known: &'static str,
        /// The key of a value that stands alone.
        first: &'static str,
    },
    /// A key that came twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A key that has to be there.
    #[error("'{0}' is missing; write {0}=VALUE")]
    Missing(&'static str),
    /// A key that says nothing about a disk attached in this way.
    #[error("'{key}' goes with attach={attach} only")]
    Attach {
        /// The key.
        key: &'static str,
        /// With what it would do.
        attach: &'static str,
    },
    /// A key that says nothing about a NIC with this backend.
    #[error("'{key}' goes with backend={backend} only")]
    Backend {
        /// The key.
        key: &'static str,
        /// With what it would do.
        backend: &'static str,
    },
    /// A value outside the allowed ones.
    #[error("{key}={value} is not possible; {key} is {allowed}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value as written.
        value: String,
        /// Those that would do.
        allowed: &'static str,
    },
}

/// How one option's list value is written.
struct List {
    /// How it begins, for messages.
    written: &'static str,
    /// The key that its first part may stand without, as in `a.img,readonly=on`.
    first: &'static str,
    /// All keys, parted by a comma and a space.
    known: &'static str,
    /// Those that may come more than once.
    repeated: &'static [&'static str],
}

impl List {
    /// Parts a value into its keys and values.
    fn pairs(&self, list: &str) -> Result<Vec<(String, String)>, OptionError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for (index, part) in parts(list).into_iter().enumerate() {
            let (key, value) = match part.split_once('=') {
                _ if index == 0 && self.lacks_its_key(&part) => (self.first, part.as_str()),
                Some((key, _)) if index == 0 && !self.knows(key) => {
                    let (key, known, first) = (key.to_owned(), self.known, self.first);
                    return Err(OptionError::NeitherKeyNorValue { key, known, first });
                }
                Some(pair) => pair,
                None => return Err(OptionError::NoValue { part, written: self.written }),
            };
            if pairs.iter().any(|(other, _)| other == key) && !self.repeated.contains(&key) {
                return Err(OptionError::Twice(key.to_owned()));
            }
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(pairs)
    }

    /// Whether a part is the first key's value. What could be a key is none: its value has been
    /// forgotten, or it is misspelt. No key has a slash in it, but paths have.
    fn lacks_its_key(&self, part: &str) -> bool {
        match part.split_once('=') {
            None => !part.is_empty() && !self.knows(part),
            Some((key, _)) => key.contains('/'),
        }
    }

    fn knows(&self, key: &str) -> bool {
        self.known.split(", ").any(|known| known == key)
    }
}

/// A list value's parts.
fn parts(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            parts.last_mut().expect("never empty").push(c);
        } else if chars.next_if_eq(&',').is_some() {
            parts.last_mut().expect("never empty").push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

/// A number of bytes, written `4096`, `64K`, `512M` or `4G`; the units are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        let refused = || OptionError::Size(s.to_owned());
        let (digits, shift) = match s.char_indices().next_back().ok_or_else(refused)? {
            (at, 'k' | 'K') => (&s[..at], 10),
            (at, 'm' | 'M') => (&s[..at], 20),
            (at, 'g' | 'G') => (&s[..at], 30),
            (at, 't' | 'T') => (&s[..at], 40),
            _ => (s, 0),
        };
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(refused());
        }
        let number: u64 = digits.parse().map_err(|_| refused())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(refused)
    }
}

/// How a disk is shown to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// As a LUN of a synthetic SCSI controller.
    #[default]
    Scsi,
    /// As an ATA disk of an emulated IDE controller.
    Ide,
    /// As that, and on the VMBus too, as a Hyper-V host does: the guest takes which it likes.
    IdeAndScsi,
}

/// One `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOption {
    /// The image or block device.
    pub path: PathBuf,
    /// How the guest sees it.
    pub attach: Attach,
    /// Which controller, from 0.
    pub controller: u8,
    /// Which LUN; the lowest free one if it is not said.
    pub lun: Option<u8>,
    /// Which IDE channel, 0 or 1; the first with room if it is not said.
    pub channel: Option<u8>,
    /// Which device of it, 0 or 1; the first free one if it is not said.
    pub device: Option<u8>,
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the host's page cache; where that is possible if it is not said.
    pub direct: Option<bool>,
    /// The name the guest sees as serial number; made from the image's place if it is not said.
    pub id: Option<String>,
    /// Bytes of a logical block; a block device's own, and 512 for an image, if it is not said.
    pub block_size: Option<u32>,
    /// Whether what the guest discards is freed.
    pub discard: bool,
}

/// The keys of `--disk`, for messages and help.
const DISK_KEYS: &str =
    "path, attach, controller, lun, channel, device, readonly, direct, id, block-size, discard";

const DISK: List = List {
    written: "a disk is written [path=]FILE",
    first: "path",
    known: DISK_KEYS,
    repeated: &[],
};

/// Controllers that `controller=` can name.
pub const CONTROLLERS: u8 = 4;

/// LUNs on a controller, as on a Hyper-V host.
pub const LUNS: u8 = 64;

impl FromStr for DiskOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        let mut path = None;
        let mut disk = Self {
            path: PathBuf::new(),
            attach: Attach::Scsi,
            controller: 0,
            lun: None,
            channel: None,
            device: None,
            read_only: false,
            direct: None,
            id: None,
            block_size: None,
            discard: true,
        };
        let mut scsi_only = None;
        for (key, value) in DISK.pairs(s)? {
            match key.as_str() {
                "path" if !value.is_empty() => path = Some(PathBuf::from(value)),
                "path" => return Err(OptionError::Missing("path")),
                "attach" => match value.as_str() {
                    "scsi" => disk.attach = Attach::Scsi,
                    "ide" => disk.attach = Attach::Ide,
                    "ide+scsi" => disk.attach = Attach::IdeAndScsi,
                    _ => {
                        return Err(OptionError::Value {
                            key: "attach",
                            value,
                            allowed: "scsi, ide or ide+scsi",
                        });
                    }
                },
                "channel" => disk.channel = Some(below(2, "channel", value, "0 or 1")?),
                "device" => disk.device = Some(below(2, "device", value, "0 or 1")?),
                "controller" => {
                    scsi_only = scsi_only.or(Some("controller"));
                    disk.controller = below(CONTROLLERS, "controller", value, "0 to 3")?;
                }
                "lun" => {
                    scsi_only = scsi_only.or(Some("lun"));
                    disk.lun = Some(below(LUNS, "lun", value, "0 to 63")?);
                }
                "readonly" => disk.read_only = switch("readonly", value)?,
                "direct" => disk.direct = Some(switch("direct", value)?),
                "id" if id_is_plain(&value) => disk.id = Some(value),
                "id" => {
                    return Err(OptionError::Value {
                        key: "id",
                        value,
                        allowed: "1 to 20 of letters, digits, '-', '_' and '.'",
                    });
                }
                "block-size" => {
                    disk.block_size = Some(match value.as_str() {
                        "512" => 512,
                        "4096" => 4096,
                        _ => {
                            return Err(OptionError::Value {
                                key: "block-size",
                                value,
                                allowed: "512 or 4096",
                            });
                        }
                    });
                }
                "discard" => {
                    disk.discard = match value.as_str() {
                        "unmap" => true,
                        "off" => false,
                        _ => {
                            return Err(OptionError::Value {
                                key: "discard",
                                value,
                                allowed: "unmap or off",
                            });
                        }
                    }
                }
                _ => return Err(OptionError::UnknownKey { key, known: DISK_KEYS }),
            }
        }
        disk.path = path.ok_or(OptionError::Missing("path"))?;
        let ide_only = disk.channel.map(|_| "channel").or(disk.device.map(|_| "device"));
        let (stray, attach) = match disk.attach {
            Attach::Scsi => (ide_only, "ide"),
            // By the VMBus it is a controller of its own, with its place as number.
            Attach::Ide | Attach::IdeAndScsi => (scsi_only, "scsi"),
        };
        if let Some(key) = stray {
            return Err(OptionError::Attach { key, attach });
        }
        Ok(disk)
    }
}

fn id_is_plain(id: &str) -> bool {
    (1..=20).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn switch(key: &'static str, value: String) -> Result<bool, OptionError> {
    match value.as_str() {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(OptionError::Value { key, value, allowed: "on or off" }),
    }
}

fn within(
    range: RangeInclusive<u16>,
    key: &'static str,
    value: String,
    allowed: &'static str,
) -> Result<u16, OptionError> {
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(OptionError::Value { key, value, allowed }),
    }
}

fn below(
    limit: u8,
    key: &'static str,
    value: String,
    allowed: &'static str,
) -> Result<u8, OptionError> {
    match value.parse() {
        Ok(number) if number < limit => Ok(number),
        _ => Err(OptionError::Value { key, value, allowed }),
    }
}

/// Where the guest's serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialOption {
    /// To the program's own standard input and output.
    Stdio,
    /// Output into a file, nothing in.
    File(PathBuf),
    /// Nowhere.
    Null,
}

impl FromStr for SerialOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        match s {
            "stdio" => Ok(Self::Stdio),
            "null" => Ok(Self::Null),
            _ => match s.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err(OptionError::Value {
                    key: "serial",
                    value: s.to_owned(),
                    allowed: "stdio, null or file:PATH",
                }),
            },
        }
    }
}

/// Who serves the guest's Hyper-V interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynicOption {
    /// The kernel where it can, user space otherwise.
    Auto,
    /// The kernel.
    Kernel,
    /// User space.
    User,
}

impl FromStr for SynicOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        match s {
            "auto" => Ok(Self::Auto),
            "kernel" => Ok(Self::Kernel),
            "user" => Ok(Self::User),
            _ => Err(OptionError::Value {
                key: "synic",
                value: s.to_owned(),
                allowed: "auto, kernel or user",
            }),
        }
    }
}

/// Who has a guest's interrupt controllers and its timer, beyond the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqchipOption {
    /// The kernel.
    Kernel,
    /// User space.
    User,
}

impl FromStr for IrqchipOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        match s {
            "kernel" => Ok(Self::Kernel),
            "user" => Ok(Self::User),
            _ => Err(OptionError::Value {
                key: "irqchip",
                value: s.to_owned(),
                allowed: "kernel or user",
            }),
        }
    }
}

/// What a guest's reset leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetOption {
    /// It starts again.
    Restart,
    /// The program ends.
    Exit,
}

impl FromStr for ResetOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        match s {
            "restart" => Ok(Self::Restart),
            "exit" => Ok(Self::Exit),
            _ => Err(OptionError::Value {
                key: "on-reset",
                value: s.to_owned(),
                allowed: "restart or exit",
            }),
        }
    }
}

/// What a guest runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionOption {
    /// A virtual machine where there is a KVM, otherwise a process if the guest can do with that.
    Auto,
    /// A virtual machine.
    Kvm,
    /// A process.
    Hosted,
}

impl FromStr for PartitionOption {
    type Err = OptionError;

    fn from_str(s: &str) -> Result<Self, OptionError> {
        match s {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "hosted" => Ok(Self::Hosted),
            _ => Err(OptionError::Value {
                key: "partition",
                value: s.to_owned(),
                allowed: "auto, kvm or hosted",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!("512M".parse(), Ok(Size(512 << 20)));
        assert_eq!("4g".parse(), Ok(Size(4 << 30)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        for bad in ["", "M", "-1M", "+1M", "1.5G", "12X", "99999999999T", "1 M", "½"] {
            assert_eq!(bad.parse::<Size>(), Err(OptionError::Size(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn a_disk_with_everything() {
        let disk: DiskOption =
            "path=/a,,b.img,attach=scsi,controller=1,lun=7,readonly=on,direct=off,id=root,\
             block-size=4096,discard=off"
                .parse()
                .unwrap();
        assert_eq!(
            disk,
            DiskOption {
                path: "/a,b.img".into(),
                attach: Attach::Scsi,
                controller: 1,
                lun: Some(7),
                channel: None,
                device: None,
                read_only: true,
                direct: Some(false),
                id: Some("root".into()),
                block_size: Some(4096),
                discard: false,
            }
        );
    }

    #[test]
    fn a_path_alone_is_a_disk() {
        let disk = |s: &str| s.parse::<DiskOption>().unwrap();
        for (alone, whole) in [
            ("d.img", "path=d.img"),
            ("/dev/sdb", "path=/dev/sdb"),
            ("d.img,readonly=on,lun=3", "path=d.img,readonly=on,lun=3"),
            ("a,,b.img", "path=a,,b.img"),
            ("./readonly", "path=./readonly"),
            ("/a=b/c=d.img,id=x", "path=/a=b/c=d.img,id=x"),
            ("path=a=b.img", "id=x,path=a=b.img"),
        ] {
            let (alone, mut whole) = (disk(alone), disk(whole));
            whole.id.clone_from(&alone.id);
            assert_eq!(alone, whole);
        }
        assert_eq!(disk("path=a=b.img").path, PathBuf::from("a=b.img"));
    }

    #[test]
    fn refusals_say_what_would_be_right() {
        let message = |s: &str| s.parse::<DiskOption>().unwrap_err().to_string();
        let known = DISK_KEYS;
        let written = "is not KEY=VALUE; a disk is written [path=]FILE[,KEY=VALUE]…";
        assert_eq!(message("readonly=on,a.img"), format!("'a.img' {written}"));
        assert_eq!(message("a.img,readonly"), format!("'readonly' {written}"));
        assert_eq!(message("a.img,"), format!("'' {written}"));
        assert_eq!(message(",readonly=on"), format!("'' {written}"));
        // A file of that name, or a key whose value was forgotten?
        assert_eq!(message("readonly"), format!("'readonly' {written}"));
        assert_eq!(message("a.img,path=b.img"), "'path' is given twice");
        // A file of that name, or a key that there is not?
        assert_eq!(
            message("a=b.img"),
            format!(
                "unknown key 'a'; known are {known}; a value with '=' in it is written path=VALUE"
            )
        );
        assert_eq!(message("readonly=on"), "'path' is missing; write path=VALUE");
        assert_eq!(message("path=a,path=b"), "'path' is given twice");
        assert_eq!(
            message("path=a,readonly=yes"),
            "readonly=yes is not possible; readonly is on or off"
        );
        assert_eq!(message("path=a,lun=64"), "lun=64 is not possible; lun is 0 to 63");
        assert_eq!(
            message("path=a,colour=red"),
            format!("unknown key 'colour'; known are {known}")
        );
        for bad in ["0", "1024", "4k", "512B", ""] {
            assert_eq!(
                message(&format!("path=a,block-size={bad}")),
                format!("block-size={bad} is not possible; block-size is 512 or 4096")
            );
        }
        for bad in ["on", "yes", ""] {
            assert_eq!(
                message(&format!("path=a,discard={bad}")),
                format!("discard={bad} is not possible; discard is unmap or off")
            );
        }
        assert_eq!(message("path=a,attach=ide,lun=0"), "'lun' goes with attach=scsi only");
        assert_eq!(message("path=a,attach=ide+scsi,lun=0"), "'lun' goes with attach=scsi only");
        assert_eq!(
            message("path=a,attach=sata"),
            "attach=sata is not possible; attach is scsi, ide or ide+scsi"
        );
        assert_eq!(message("path=a,device=1"), "'device' goes with attach=ide only");
        assert_eq!(
            message("path=a,attach=ide,channel=2"),
            "channel=2 is not possible; channel is 0 or 1"
        );
        assert_eq!(message(""), format!("'' {written}"));
    }

    #[test]
    fn synics() {
        assert_eq!("auto".parse(), Ok(SynicOption::Auto));
        assert_eq!("user".parse(), Ok(SynicOption::User));
        let refused = "split".parse::<SynicOption>().unwrap_err().to_string();
        assert_eq!(refused, "synic=split is not possible; synic is auto, kernel or user");
    }

    #[test]
    fn irqchips() {
        assert_eq!("user".parse(), Ok(IrqchipOption::User));
        let refused = "split".parse::<IrqchipOption>().unwrap_err().to_string();
        assert_eq!(refused, "irqchip=split is not possible; irqchip is kernel or user");
    }

    #[test]
    fn resets() {
        assert_eq!("restart".parse(), Ok(ResetOption::Restart));
        assert_eq!("exit".parse(), Ok(ResetOption::Exit));
        let refused = "halt".parse::<ResetOption>().unwrap_err().to_string();
        assert_eq!(refused, "on-reset=halt is not possible; on-reset is restart or exit");
    }

    #[test]
    fn partitions() {
        assert_eq!("auto".parse(), Ok(PartitionOption::Auto));
        assert_eq!("hosted".parse(), Ok(PartitionOption::Hosted));
        let refused = "xen".parse::<PartitionOption>().unwrap_err().to_string();
        assert_eq!(refused, "partition=xen is not possible; partition is auto, kvm or hosted");
    }

    #[test]
    fn serial_ports() {
        assert_eq!("stdio".parse(), Ok(SerialOption::Stdio));
        assert_eq!("file:/tmp/x".parse(), Ok(SerialOption::File("/tmp/x".into())));
        assert!("file:".parse::<SerialOption>().is_err());
        assert!("tty".parse::<SerialOption>().is_err());
    }
}
