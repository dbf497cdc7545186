//! What the guest is to do, as it is written on a command line.
//!
//! ```text
//! identify; verify disk=0 bytes=16M; bench disk=0 pattern=rand rw=read bs=4k depth=32 time=500ms;
//! exchange nic=0 peer=1 len=1500 depth=32 time=500ms; hostile seed=7 time=10s
//! ```
//!
//! Tasks are parted by semicolons, and a task's settings by spaces. Sizes are in bytes or in units
//! of 1024 (`k`, `M`, `G`), times in `us`, `ms` or `s`.

use thiserror::Error;

use crate::block::MAX_DEPTH;
use crate::boot::MAX_VPS;
use crate::ide::Transfer;
use crate::net::{LONGEST, SHORTEST};

/// The longest transfer that can be asked for.
const MAX_BLOCK: u64 = 128 << 10;

/// One task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Say what disks and NICs there are, or what this one is.
    Identify(Identify),
    /// Write a pattern, read it back, compare. What was on the disk is gone.
    Verify(Verify),
    /// Read, and say what the sum of it is.
    Checksum(Checksum),
    /// Measure.
    Bench(Bench),
    /// Send frames from one NIC to another, and back.
    Exchange(Exchange),
    /// Drive every device wrongly. What was on the disks is gone.
    Hostile(Hostile),
}

/// Settings of `identify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identify {
    /// All disks and all NICs.
    All,
    /// One disk.
    Disk(u32),
    /// One NIC.
    Nic(u32),
}

/// Settings of `verify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verify {
    /// Which disk, counted as `identify` does.
    pub disk: u32,
    /// How much, from the disk's start; or all of it, if that is less.
    pub bytes: u64,
    /// Bytes of a request.
    pub bs: u32,
    /// Requests in flight.
    pub depth: u16,
    /// What the pattern begins with.
    pub seed: u64,
    /// Processors that share the work, each with so many requests in flight.
    pub vps: u16,
    /// How an IDE disk's data goes.
    pub transfer: Option<Transfer>,
}

/// Settings of `checksum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Which disk, counted as `identify` does.
    pub disk: u32,
    /// How much, from the disk's start; or all of it, if that is less.
    pub bytes: u64,
    /// Bytes of a request.
    pub bs: u32,
    /// Requests in flight.
    pub depth: u16,
    /// How an IDE disk's data goes.
    pub transfer: Option<Transfer>,
    /// Processors that share the work, each with so many requests in flight.
    pub vps: u16,
}

/// Settings of `bench`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bench {
    /// Which disk, counted as `identify` does.
    pub disk: u32,
    /// In which order.
    pub pattern: Pattern,
    /// Which way.
    pub direction: Direction,
    /// Bytes of a request.
    pub bs: u32,
    /// Requests in flight.
    pub depth: u16,
    /// Nanoseconds.
    pub time: u64,
    /// Nanoseconds for which the guest looks for an answer before it sleeps.
    pub spin: u64,
    /// Processors that share the work, each with so many requests in flight.
    pub vps: u16,
    /// How an IDE disk's data goes.
    pub transfer: Option<Transfer>,
}

/// Settings of `exchange`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// One of the NICs, counted as `identify` does.
    pub nic: u32,
    /// The other.
    pub peer: u32,
    /// Bytes of a frame, its check sequence not counted.
    pub len: u16,
    /// Frames under way at a time, each way.
    pub depth: u16,
    /// How many frames, each way.
    pub frames: u64,
    /// Nanoseconds, after which no more of them are sent.
    pub time: u64,
    /// Nanoseconds for which the guest looks for a frame before it sleeps.
    pub spin: u64,
    /// What the frames' contents begin with.
    pub seed: u64,
}

/// Settings of `hostile`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hostile {
    /// What the first round's choices begin with; each further round's is one more.
    pub seed: u64,
    /// Nanoseconds, after which no more rounds begin.
    pub time: u64,
    /// How many rounds.
    pub rounds: u64,
    /// Nanoseconds for which nothing is done after the last: for whoever counts what is left.
    pub rest: u64,
}

/// An order of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, and again from the start.
    Sequential,
    /// Any.
    Random,
}

impl Pattern {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "seq",
            Self::Random => "rand",
        }
    }
}

/// A direction of transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk, whose contents are then gone.
    Write,
}

impl Direction {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Why a task was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WorkError<'a> {
    /// Nothing to do.
    #[error("there is no work; say identify, verify, checksum, bench, exchange or hostile")]
    Nothing,
    /// An unknown task.
    #[error("'{0}' is no work; say identify, verify, checksum, bench, exchange or hostile")]
    Task(&'a str),
    /// A word without an equals sign.
    #[error("'{0}' is not KEY=VALUE")]
    NoValue(&'a str),
    /// An unknown setting.
    #[error("{task} knows no '{key}'; it knows {known}")]
    Key {
        /// Of which task.
        task: &'static str,
        /// The setting.
        key: &'a str,
        /// Those that would do.
        known: &'static str,
    },
    /// A value that cannot be.
    #[error("{key}={value} is not possible; {key} is {allowed}")]
    Value {
        /// The setting.
        key: &'a str,
        /// Its value.
        value: &'a str,
        /// What would be.
        allowed: &'static str,
    },
}

const VERIFY_KEYS: &str = "disk, transfer, bytes, bs, depth, seed, vps";
const CHECKSUM_KEYS: &str = "disk, transfer, bytes, bs, depth, vps";
const BENCH_KEYS: &str = "disk, transfer, pattern, rw, bs, depth, time, spin, vps";
const EXCHANGE_KEYS: &str = "nic, peer, len, depth, frames, time, spin, seed";
const HOSTILE_KEYS: &str = "seed, time, rounds, rest";

/// What disks' and NICs' patterns begin with.
const SEED: u64 = 0x5061_7274_6974_6121;

/// The tasks of `line`, in order.
pub fn parse(line: &str) -> impl Iterator<Item = Result<Work, WorkError<'_>>> {
    let nothing = line.split(';').all(|task| task.trim().is_empty());
    let tasks = line.split(';').map(str::trim).filter(|task| !task.is_empty()).map(parse_task);
    nothing.then_some(Err(WorkError::Nothing)).into_iter().chain(tasks)
}

fn parse_task(task: &str) -> Result<Work, WorkError<'_>> {
    let mut words = task.split_ascii_whitespace();
    let name = words.next().ok_or(WorkError::Nothing)?;
    let settings = words.map(|word| {
        let (key, value) = word.split_once('=').ok_or(WorkError::NoValue(word))?;
        Ok(Setting { key, value })
    });
    match name {
        "identify" => identify(settings),
        "verify" => verify(settings),
        "checksum" => checksum(settings),
        "bench" => bench(settings),
        "exchange" => exchange(settings),
        "hostile" => hostile(settings),
        other => Err(WorkError::Task(other)),
    }
}

fn identify<'a>(
    settings: impl Iterator<Item = Result<Setting<'a>, WorkError<'a>>>,
) -> Result<Work, WorkError<'a>> {
    let mut which = Identify::All;
    for setting in settings {
        let setting = setting?;
        match setting.key {
            "disk" => which = Identify::Disk(setting.disk()?),
            "nic" => which = Identify::Nic(setting.nic()?),
            _ => return Err(setting.unknown("identify", "disk, nic")),
        }
    }
    Ok(Work::Identify(which))
}

fn verify<'a>(
    settings: impl Iterator<Item = Result<Setting<'a>, WorkError<'a>>>,
) -> Result<Work, WorkError<'a>> {
    let mut verify = Verify {
        disk: 0,
        bytes: 16 << 20,
        bs: 64 << 10,
        depth: 8,
        seed: SEED,
        vps: 1,
        transfer: None,
    };
    for setting in settings {
        let setting = setting?;
        match setting.key {
            "disk" => verify.disk = setting.disk()?,
            "transfer" => verify.transfer = Some(setting.transfer()?),
            "bytes" => verify.bytes = setting.bytes()?,
            "bs" => verify.bs = setting.block()?,
            "depth" => verify.depth = setting.depth()?,
            "seed" => verify.seed = setting.size(0..=u64::MAX, "a number")?,
            "vps" => verify.vps = setting.vps()?,
            _ => return Err(setting.unknown("verify", VERIFY_KEYS)),
        }
    }
    Ok(Work::Verify(verify))
}

fn checksum<'a>(
    settings: impl Iterator<Item = Result<Setting<'a>, WorkError<'a>>>,
) -> Result<Work, WorkError<'a>> {
    let mut checksum =
        Checksum { disk: 0, bytes: 16 << 20, bs: 64 << 10, depth: 8, transfer: None, vps: 1 };
    for setting in settings {
        let setting = setting?;
        match setting.key {
            "disk" => checksum.disk = setting.disk()?,
            "transfer" => checksum.transfer = Some(setting.transfer()?),
            "bytes" => checksum.bytes = setting.bytes()?,
            "bs" => checksum.bs = setting.block()?,
            "depth" => checksum.depth = setting.depth()?,
            "vps" => checksum.vps = setting.vps()?,
            _ => return Err(setting.unknown("checksum", CHECKSUM_KEYS)),
        }
    }
    Ok(Work::Checksum(checksum))
}

fn bench<'a>(
    settings: impl Iterator<Item = Result<Setting<'a>, WorkError<'a>>>,
) -> Result<Work, WorkError<'a>> {
    let mut bench = Bench {
        disk: 0,
        pattern: Pattern::Random,
        direction: Direction::Read,
        bs: 4096,
        depth: 1,
        time: 1_000_000_000,
        spin: 100_000,
        vps: 1,
        transfer: None,
    };
    for setting in settings {
        let setting = setting?;
        match (setting.key, setting.value) {
            ("disk", _) => bench.disk = setting.disk()?,
            ("transfer", _) => bench.transfer = Some(setting.transfer()?),
            ("pattern", "seq") => bench.pattern = Pattern::Sequential,
            ("pattern", "rand") => bench.pattern = Pattern::Random,
            ("pattern", _) => return Err(setting.impossible("seq or rand")),
            ("rw", "read") => bench.direction = Direction::Read,
            ("rw", "write") => bench.direction = Direction::Write,
            ("rw", _) => return Err(setting.impossible("read or write")),
            ("bs", _) => bench.bs = setting.block()?,
            ("depth", _) => bench.depth = setting.depth()?,
            ("time", _) => bench.time = setting.time("a time such as 500ms, up to 3600s")?,
            ("spin", _) => bench.spin = setting.time("a time such as 100us")?,
            ("vps", _) => bench.vps = setting.vps()?,
            _ => return Err(setting.unknown("bench", BENCH_KEYS)),
        }
    }
    Ok(Work::Bench(bench))
}

fn exchange<'a>(
    settings: impl Iterator<Item = Result<Setting<'a>, WorkError<'a>>>,
) -> Result<Work, WorkError<'a>> {
    let mut exchange = Exchange {
        nic: 0,
        peer: 1,
        len: 1500,
        depth: 32,
        frames: u64::MAX,
        time: 1_000_000_000,
        spin: 100_000,
        seed: SEED,
    };
    let mut time = None;
    for setting in settings {
        let setting = setting?;
        match setting.key {
            "nic" => exchange.nic = setting.nic()?,
            "peer" => exchange.peer = setting.nic()?,
            "len" => exchange.len = setting.frame()?,
            "depth" => exchange.depth = setting.depth()?,
            "frames" => {
                exchange.frames = setting.size(1..=u64::MAX, "a number of frames, each way")?;
                exchange.time = u64::MAX;
            }
            "time" => time = Some(setting.time("a time such as 500ms, up to 3600s")?),
            "spin" => exchange.spin = setting.time("a time such as 100us")?,
            "seed" => exchange.seed = setting.size(0..=u64::MAX, "a number")?,
            _ => return Err(setting.unknown("exchange", EXCHANGE_KEYS)),
        }
    }
    exchange.time = time.unwrap_or(exchange.time);
    Ok(Work::Exchange(exchange))
}

fn hostile<'a>(
    settings: impl Iterator<Item = Result<Setting<'a>, WorkError<'a>>>,
) -> Result<Work, WorkError<'a>> {
    let mut hostile = Hostile { seed: 1, time: 1_000_000_000, rounds: u64::MAX, rest: 0 };
    let mut time = None;
    for setting in settings {
        let setting = setting?;
        match setting.key {
            "seed" => hostile.seed = setting.size(0..=u64::MAX, "a number")?,
            "time" => time = Some(setting.time("a time such as 500ms, up to 3600s")?),
            "rounds" => {
                hostile.rounds = setting.size(1..=u64::MAX, "a number of rounds")?;
                hostile.time = u64::MAX;
            }
            "rest" => hostile.rest = setting.time("a time such as 1s")?,
            _ => return Err(setting.unknown("hostile", HOSTILE_KEYS)),
        }
    }
    hostile.time = time.unwrap_or(hostile.time);
    Ok(Work::Hostile(hostile))
}

#[derive(Clone, Copy)]
struct Setting<'a> {
    key: &'a str,
    value: &'a str,
}

impl<'a> Setting<'a> {
    fn unknown(self, task: &'static str, known: &'static str) -> WorkError<'a> {
        WorkError::Key { task, key: self.key, known }
    }

    fn impossible(self, allowed: &'static str) -> WorkError<'a> {
        WorkError::Value { key: self.key, value: self.value, allowed }
    }

    /// The value as a number with one of these units.
    fn with_unit(self, units: &[(&str, u64)]) -> Option<u64> {
        let digits = self.value.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = self.value.split_at_checked(digits)?;
        let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
        number.parse::<u64>().ok()?.checked_mul(*factor)
    }

    fn size(
        self,
        range: core::ops::RangeInclusive<u64>,
        allowed: &'static str,
    ) -> Result<u64, WorkError<'a>> {
        const K: u64 = 1 << 10;
        const M: u64 = 1 << 20;
        const G: u64 = 1 << 30;
        self.with_unit(&[("", 1), ("k", K), ("K", K), ("m", M), ("M", M), ("g", G), ("G", G)])
            .filter(|size| range.contains(size))
            .ok_or_else(|| self.impossible(allowed))
    }

    fn time(self, allowed: &'static str) -> Result<u64, WorkError<'a>> {
        self.with_unit(&[("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)])
            .filter(|time| *time <= 3_600_000_000_000)
            .ok_or_else(|| self.impossible(allowed))
    }

    fn disk(self) -> Result<u32, WorkError<'a>> {
        self.value.parse().map_err(|_| self.impossible("the number of a disk, from 0"))
    }

    fn nic(self) -> Result<u32, WorkError<'a>> {
        self.value.parse().map_err(|_| self.impossible("the number of a NIC, from 0"))
    }

    fn frame(self) -> Result<u16, WorkError<'a>> {
        let len = self.value.parse().ok();
        len.filter(|len| (SHORTEST..=LONGEST).contains(&usize::from(*len)))
            .ok_or_else(|| self.impossible("60 to 1514"))
    }

    fn transfer(self) -> Result<Transfer, WorkError<'a>> {
        match self.value {
            "dma" => Ok(Transfer::Dma),
            "pio" => Ok(Transfer::Pio),
            _ => Err(self.impossible("dma or pio, for a disk on an IDE channel")),
        }
    }

    fn bytes(self) -> Result<u64, WorkError<'a>> {
        self.size(1..=u64::MAX, "a size such as 16M")
    }

    fn block(self) -> Result<u32, WorkError<'a>> {
        const ALLOWED: &str = "a multiple of 512 up to 128k";
        let size = self.size(512..=MAX_BLOCK, ALLOWED)?;
        u32::try_from(size)
            .ok()
            .filter(|size| size.is_multiple_of(512))
            .ok_or_else(|| self.impossible(ALLOWED))
    }

    fn depth(self) -> Result<u16, WorkError<'a>> {
        let depth = self.value.parse().ok();
        depth
            .filter(|depth| (1..=MAX_DEPTH).contains(depth))
            .ok_or_else(|| self.impossible("1 to 64"))
    }

    fn vps(self) -> Result<u16, WorkError<'a>> {
        let vps = self.value.parse().ok();
        vps.filter(|vps| (1..=MAX_VPS).contains(&usize::from(*vps)))
            .ok_or_else(|| self.impossible("1 to 8"))
    }
}

const _: () = assert!(MAX_DEPTH == 64 && MAX_VPS == 8, "the messages say so");
const _: () = assert!(SHORTEST == 60 && LONGEST == 1514, "the messages say so");

#[cfg(test)]
mod tests {
    use std::format;
    use std::string::{String, ToString};
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_with_everything() {
        let line = " identify; identify disk=2 ; identify nic=1;verify disk=1 bytes=1M bs=512 depth=2 seed=7 vps=3;\
                    bench pattern=seq rw=write bs=128k depth=64 time=2s spin=0us disk=3 \
                    transfer=dma; checksum disk=1 transfer=pio; exchange; \
                    exchange nic=2 peer=3 len=64 depth=1 frames=1k time=1ms spin=2us seed=9; \
                    hostile; hostile seed=7 rounds=3 rest=1ms; hostile rounds=1k time=2s";
        let works: Vec<_> = parse(line).collect::<Result<_, _>>().unwrap();
        assert_eq!(
            works,
            [
                Work::Identify(Identify::All),
                Work::Identify(Identify::Disk(2)),
                Work::Identify(Identify::Nic(1)),
                Work::Verify(Verify {
                    disk: 1,
                    bytes: 1 << 20,
                    bs: 512,
                    depth: 2,
                    seed: 7,
                    vps: 3,
                    transfer: None,
                }),
                Work::Bench(Bench {
                    disk: 3,
                    pattern: Pattern::Sequential,
                    direction: Direction::Write,
                    bs: 128 << 10,
                    depth: 64,
                    time: 2_000_000_000,
                    spin: 0,
                    vps: 1,
                    transfer: Some(Transfer::Dma),
                }),
                Work::Checksum(Checksum {
                    disk: 1,
                    bytes: 16 << 20,
                    bs: 64 << 10,
                    depth: 8,
                    transfer: Some(Transfer::Pio),
                    vps: 1,
                }),
                Work::Exchange(Exchange {
                    nic: 0,
                    peer: 1,
                    len: 1500,
                    depth: 32,
                    frames: u64::MAX,
                    time: 1_000_000_000,
                    spin: 100_000,
                    seed: SEED,
                }),
                Work::Exchange(Exchange {
                    nic: 2,
                    peer: 3,
                    len: 64,
                    depth: 1,
                    frames: 1024,
                    time: 1_000_000,
                    spin: 2_000,
                    seed: 9,
                }),
                Work::Hostile(Hostile { seed: 1, time: 1_000_000_000, rounds: u64::MAX, rest: 0 }),
                Work::Hostile(Hostile { seed: 7, time: u64::MAX, rounds: 3, rest: 1_000_000 }),
                Work::Hostile(Hostile { seed: 1, time: 2_000_000_000, rounds: 1024, rest: 0 }),
            ]
        );
    }

    fn refusal(line: &str) -> String {
        parse(line).find_map(Result::err).map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn refusals_say_what_would_be_right() {
        let words = "say identify, verify, checksum, bench, exchange or hostile";
        assert_eq!(refusal(""), format!("there is no work; {words}"));
        assert_eq!(refusal(" ; "), format!("there is no work; {words}"));
        assert_eq!(refusal("format"), format!("'format' is no work; {words}"));
        assert_eq!(refusal("verify fast"), "'fast' is not KEY=VALUE");
        assert_eq!(refusal("identify lun=0"), "identify knows no 'lun'; it knows disk, nic");
        assert_eq!(
            refusal("bench bs=5000"),
            "bs=5000 is not possible; bs is a multiple of 512 up to 128k"
        );
        assert_eq!(refusal("bench depth=65"), "depth=65 is not possible; depth is 1 to 64");
        assert_eq!(refusal("verify vps=9"), "vps=9 is not possible; vps is 1 to 8");
        assert_eq!(
            refusal("bench time=5"),
            "time=5 is not possible; time is a time such as 500ms, up to 3600s"
        );
        assert_eq!(
            refusal("checksum transfer=udma"),
            "transfer=udma is not possible; transfer is dma or pio, for a disk on an IDE channel"
        );
        assert_eq!(refusal("exchange len=59"), "len=59 is not possible; len is 60 to 1514");
        assert_eq!(refusal("exchange len=1515"), "len=1515 is not possible; len is 60 to 1514");
        assert_eq!(
            refusal("exchange frames=0"),
            "frames=0 is not possible; frames is a number of frames, each way"
        );
        assert_eq!(
            refusal("exchange disk=0"),
            "exchange knows no 'disk'; it knows nic, peer, len, depth, frames, time, spin, seed"
        );
        assert_eq!(
            refusal("hostile rounds=0"),
            "rounds=0 is not possible; rounds is a number of rounds"
        );
        assert_eq!(
            refusal("hostile disk=0"),
            "hostile knows no 'disk'; it knows seed, time, rounds, rest"
        );
        assert_eq!(
            refusal("identify; verify bytes=-1"),
            "bytes=-1 is not possible; bytes is a size such as 16M"
        );
    }

    proptest! {
        #[test]
        fn any_line_is_read_or_refused(line in ".{0,200}") {
            for work in parse(&line) {
                let _ = work.map_err(|error| error.to_string());
            }
        }
    }
}
