//! What the guest said, put into words.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::machine::PartitionKind;

/// What had been counted at some moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    /// Exits of the processor, if the host counts those that never come out of the kernel; without
    /// those for the guest's console.
    pub exits: Option<u64>,
    /// Exits to the program.
    pub user_exits: u64,
    /// Signals that the service provider has heard.
    pub signals: u64,
    /// Interrupts that it has raised.
    pub interrupts: u64,
}

impl Costs {
    fn since(self, before: Self) -> Self {
        Self {
            exits: self.exits.zip(before.exits).map(|(now, before)| now.saturating_sub(before)),
            user_exits: self.user_exits.saturating_sub(before.user_exits),
            signals: self.signals.saturating_sub(before.signals),
            interrupts: self.interrupts.saturating_sub(before.interrupts),
        }
    }
}

/// A line of the guest's console.
#[derive(Clone, Debug)]
pub struct Stamped {
    /// Without its newline.
    pub text: String,
    /// When it came, since the guest was switched on.
    pub after: Duration,
    /// What had been counted.
    pub costs: Costs,
}

impl Stamped {
    /// The value of a field, without quotes: objects here are flat, and no string has quotes in it
    /// that would matter.
    fn field(&self, key: &str) -> Option<&str> {
        let (_, rest) = self.text.split_once(&format!("\"{key}\":"))?;
        match rest.strip_prefix('"') {
            Some(string) => string.split('"').next(),
            None => rest.split([',', '}']).next(),
        }
    }

    fn number(&self, key: &str) -> u64 {
        self.field(key).and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    fn is(&self, key: &str, value: &str) -> bool {
        self.field(key) == Some(value)
    }
}

/// A kind of measurement: the result that the guest tells of it, what that counts, and the field with
/// how many of those went in a second.
#[derive(Clone, Copy)]
struct Measure {
    result: &'static str,
    count: &'static str,
    rate: &'static str,
}

const READS: Measure = Measure { result: "bench", count: "ios", rate: "iops" };
const FRAMES: Measure = Measure { result: "exchange", count: "frames", rate: "frames_per_second" };

/// A run of the demo.
#[derive(Debug)]
pub struct Report {
    kind: PartitionKind,
    lines: Vec<Stamped>,
    status: Option<u32>,
    time: Duration,
}

impl Report {
    /// The guest's lines, its exit status, and how long all of it took.
    pub fn new(
        kind: PartitionKind,
        lines: Vec<Stamped>,
        status: Option<u32>,
        time: Duration,
    ) -> Self {
        Self { kind, lines, status, time }
    }

    /// What went wrong, if something did.
    pub fn error(&self) -> Option<String> {
        let said = self.lines.iter().find_map(|line| line.field("error"));
        match (said, self.status) {
            (Some(error), _) => Some(error.to_owned()),
            (None, Some(0)) => {
                let sum = self.checksum().and_then(Result::err)?;
                Some(format!("what is on the disk depends on who reads it: {sum}"))
            }
            (None, status) => Some(format!("status {}", status.unwrap_or(u32::MAX))),
        }
    }

    /// The checksum that all drivers have found, or those that they did.
    fn checksum(&self) -> Option<Result<&str, String>> {
        let sums = || self.lines.iter().filter(|line| line.is("result", "checksum"));
        let sum = |line: &'_ Stamped| line.field("checksum").unwrap_or("?").to_owned();
        let first = sums().next()?.field("checksum").unwrap_or("?");
        Some(if sums().all(|line| line.is("checksum", first)) {
            Ok(first)
        } else {
            Err(sums().map(sum).collect::<Vec<_>>().join(", "))
        })
    }

    /// Results of measurements, with what all of it took.
    fn results(&self, measure: Measure) -> impl Iterator<Item = (&Stamped, Costs)> {
        self.lines.windows(2).filter_map(move |pair| match pair {
            [begin, result] if result.is("result", measure.result) => {
                Some((result, result.costs.since(begin.costs)))
            }
            _ => None,
        })
    }

    /// For people.
    pub fn words(&self, place: &str, kept: Option<&Path>) -> String {
        let mut out = String::new();
        let mut say = |head: &str, text: String| {
            let _ = writeln!(out, "  {head:<8}{text}");
        };
        say("host", self.kind.to_string());
        if let Some(why) = self.kind.without_kvm() {
            say("", format!("({why})"));
        }
        let name = self.kind.name();
        let first = self.lines.first().map_or(Duration::ZERO, |line| line.after);
        for line in &self.lines {
            if line.is("event", "connected") {
                say(
                    "guest",
                    format!(
                        "the built-in one; on the VMBus, version {}, {:.1} ms after power-on, and \
                         offered {}",
                        line.field("version").unwrap_or("?"),
                        first.as_secs_f64() * 1e3,
                        counted(line.number("offers"), "device"),
                    ),
                );
            } else if line.is("event", "opened") && line.is("driver", "storvsc") {
                say(
                    "channel",
                    format!(
                        "{} opened: a SCSI controller with {}",
                        line.number("channel"),
                        counted(line.number("disks"), "disk"),
                    ),
                );
            } else if line.is("event", "found") && line.is("driver", "ide") {
                say(
                    "ports",
                    format!(
                        "an IDE controller on the PCI bus, with {}",
                        counted(line.number("disks"), "disk"),
                    ),
                );
            } else if line.is("result", "identify") && line.is("driver", "storvsc") {
                say(
                    "disk",
                    format!(
                        "{} {}, {} in blocks of {} bytes, the same by both: {place}",
                        line.field("vendor").unwrap_or("?"),
                        line.field("product").unwrap_or("?"),
                        size(line.number("bytes")),
                        line.number("block_size"),
                    ),
                );
            } else if line.is("result", "verify") {
                let bytes = line.number("bytes");
                let rate = |key| size(per_second(bytes, line.number(key)));
                say(
                    "verify",
                    format!(
                        "{} written ({name}: {}/s), flushed, read back ({name}: {}/s) and \
                         compared: all equal,",
                        size(bytes),
                        rate("write_nanoseconds"),
                        rate("read_nanoseconds"),
                    ),
                );
                say("", format!("checksum {}", line.field("checksum").unwrap_or("?")));
            }
        }
        if let Some(Ok(sum)) = self.checksum() {
            let of = self.lines.iter().filter(|line| line.is("result", "checksum"));
            let bytes = of.clone().map(|line| line.number("bytes")).max().unwrap_or(0);
            let drivers: Vec<&str> = of.map(driver).collect();
            let (bytes, drivers) = (size(bytes), drivers.join(", "));
            say("same", format!("the first {bytes}, read by {drivers}: checksum {sum} each time"));
        }
        self.table(READS, "read", &mut say);
        self.nics(&mut say);
        self.table(FRAMES, "send", &mut say);
        self.legend(&mut say);
        let end = match self.error() {
            None => "the guest switched itself off".to_owned(),
            Some(error) => format!("the guest failed: {error}"),
        };
        say("end", format!("{end}; {:.2} s in all", self.time.as_secs_f64()));
        if let Some(kept) = kept {
            say("kept", kept.display().to_string());
        }
        out
    }

    /// The NICs, and what they have exchanged.
    fn nics(&self, say: &mut impl FnMut(&str, String)) {
        let nics = || self.lines.iter().filter(|line| line.is("result", "identify"));
        let mut drivers: Vec<(&str, Vec<&str>)> = Vec::new();
        for line in nics() {
            let (Some(number), Some(driver)) = (line.field("nic"), line.field("driver")) else {
                continue;
            };
            match drivers.last_mut() {
                Some((last, numbers)) if *last == driver => numbers.push(number),
                _ => drivers.push((driver, vec![number])),
            }
        }
        if drivers.is_empty() {
            return;
        }
        let each = drivers
            .iter()
            .map(|(driver, numbers)| format!("{} by {driver}", numbers.join(" and ")));
        say("nics", format!("{}, on a virtual switch", each.collect::<Vec<_>>().join(", ")));
        let sum = |key| self.results(FRAMES).map(|(line, _)| line.number(key)).sum::<u64>();
        let bad: Vec<_> = ["lost", "duplicates", "reordered"]
            .into_iter()
            .map(|key| (sum(key), key))
            .filter(|(count, _)| *count > 0)
            .map(|(count, key)| format!("{count} {key}"))
            .collect();
        let bad = if bad.is_empty() { "none lost".to_owned() } else { bad.join(", ") };
        say(
            "",
            format!(
                "{} have arrived, every byte of each compared; {bad}",
                counted(sum("frames"), "frame")
            ),
        );
    }

    /// What a read or a frame takes, by one way and another, side by side.
    fn table(&self, measure: Measure, head: &str, say: &mut impl FnMut(&str, String)) {
        let Some((line, costs)) = self.results(measure).next() else { return };
        let what = match measure.result {
            "bench" => format!("{} at random", size(line.number("bs"))),
            _ => format!("{} bytes each", line.number("len")),
        };
        let title = format!("{what}, {}", self.kind.name());
        // Not every host counts the exits that its kernel serves.
        let [exits, to_user] = match (&self.kind, costs.exits) {
            (PartitionKind::Hosted { .. }, _) => ["", "messages"],
            (PartitionKind::Kvm(_), Some(_)) => ["exits", "to partita"],
            (PartitionKind::Kvm(_), None) => ["", "to partita"],
        };
        say(
            head,
            format!(
                "{title:<26} a second  signals  interrupts {exits:>7}  {to_user:>10}  us for each"
            ),
        );
        let micros = |line: &Stamped| {
            line.number("nanoseconds") as f64 / 1e3 / line.number(measure.count).max(1) as f64
        };
        let longest = self.results(measure).map(|(line, _)| micros(line)).fold(0.0, f64::max);
        for (line, costs) in self.results(measure) {
            let each = |count: u64| count as f64 / line.number(measure.count).max(1) as f64;
            let driver = match line.field("peer_driver") {
                Some(peer) if Some(peer) != line.field("driver") => {
                    format!("{}/{peer}", driver(line))
                }
                _ => driver(line).to_owned(),
            };
            let way = match line.number("depth") {
                0 | 1 => driver,
                depth => format!("{driver}, {depth} at a time"),
            };
            let (rate, micros) = (line.number(measure.rate), micros(line));
            let exits = costs.exits.map(|exits| format!("{:.2}", each(exits))).unwrap_or_default();
            let [signals, interrupts, to_user] =
                [costs.signals, costs.interrupts, costs.user_exits].map(each);
            let bar = bar(micros / longest);
            say(
                "",
                format!(
                    "{way:<26} {rate:>8} {signals:>8.2} {interrupts:>11.2} {exits:>7}  \
                     {to_user:>10.2} {micros:>8.1} {bar}"
                ),
            );
        }
    }

    /// What the tables' words mean.
    fn legend(&self, say: &mut impl FnMut(&str, String)) {
        let exit = match self.kind {
            PartitionKind::Kvm(_) => {
                "exit: the processor leaves the guest; to partita: the kernel too"
            }
            PartitionKind::Hosted { .. } => "message: the process asks for what it cannot do",
        };
        say(
            "",
            "(signal: the guest wakes a device's thread; interrupt: the thread wakes the guest;"
                .into(),
        );
        say("", format!("{exit})"));
    }

    /// For machines: one object.
    pub fn json(&self, kept: Option<&Path>) -> String {
        let (mut benches, mut exchanges) = (Vec::new(), Vec::new());
        for (line, costs) in self.results(READS) {
            let exits = costs.exits.map_or("null".to_owned(), |exits| exits.to_string());
            benches.push(format!(
                "{{\"partition\":\"{}\",\"driver\":{},\"bs\":{},\"depth\":{},\"nanoseconds\":{},\"ios\":{},\
                 \"iops\":{},\"exits\":{exits},\"user_exits\":{},\"signals\":{},\"interrupts\":{}}}",
                self.kind.name(),
                quoted(line.field("driver").unwrap_or("?")),
                line.number("bs"),
                line.number("depth"),
                line.number("nanoseconds"),
                line.number("ios"),
                line.number("iops"),
                costs.user_exits,
                costs.signals,
                costs.interrupts,
            ));
        }
        for (line, costs) in self.results(FRAMES) {
            let exits = costs.exits.map_or("null".to_owned(), |exits| exits.to_string());
            let drivers =
                ["driver", "peer_driver"].map(|key| quoted(line.field(key).unwrap_or("?")));
            let [driver, peer_driver] = drivers;
            let numbers = ["len", "depth", "nanoseconds", "frames", "lost", "frames_per_second"]
                .map(|key| format!("\"{key}\":{}", line.number(key)));
            exchanges.push(format!(
                "{{\"partition\":\"{}\",\"driver\":{driver},\"peer_driver\":{peer_driver},{},\
                 \"exits\":{exits},\"user_exits\":{},\"signals\":{},\"interrupts\":{}}}",
                self.kind.name(),
                numbers.join(","),
                costs.user_exits,
                costs.signals,
                costs.interrupts,
            ));
        }
        let lines: Vec<&str> = self
            .lines
            .iter()
            .map(|line| line.text.as_str())
            .filter(|line| line.starts_with('{') && line.ends_with('}'))
            .collect();
        format!(
            "{{\"partition\":\"{}\",\"host\":{},\"without_kvm\":{},\"kept\":{},\"guest\":[{}],\"benches\":[{}],\"exchanges\":[{}],\"ok\":{},\"seconds\":{:.6}}}",
            self.kind.name(),
            quoted(&self.kind.to_string()),
            self.kind.without_kvm().map_or("null".to_owned(), quoted),
            kept.map_or("null".to_owned(), |kept| quoted(&kept.to_string_lossy())),
            lines.join(","),
            benches.join(","),
            exchanges.join(","),
            self.error().is_none(),
            self.time.as_secs_f64(),
        )
    }
}

/// By what a device was driven, for people.
fn driver(line: &Stamped) -> &str {
    match line.field("driver") {
        Some("ide-dma") => "IDE DMA",
        Some("ide-pio") => "IDE PIO",
        Some(other) => other,
        None => "?",
    }
}

/// A bar of so much of the whole width, drawn in eighths of a character.
fn bar(part: f64) -> String {
    const WIDTH: f64 = 14.0;
    const EIGHTHS: [&str; 8] =
        ["", "\u{258f}", "\u{258e}", "\u{258d}", "\u{258c}", "\u{258b}", "\u{258a}", "\u{2589}"];
    // Something is always to be seen.
    let eighths = (part.clamp(0.0, 1.0) * WIDTH * 8.0).round().max(1.0) as usize;
    "\u{2588}".repeat(eighths / 8) + EIGHTHS.get(eighths % 8).unwrap_or(&"")
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn per_second(count: u64, nanoseconds: u64) -> u64 {
    (u128::from(count) * 1_000_000_000 / u128::from(nanoseconds.max(1))) as u64
}

/// A number of bytes, in the largest unit that leaves something before the point.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["bytes", "KiB", "MiB"] {
        if value < 1024.0 {
            return if value.fract() == 0.0 {
                format!("{value} {unit}")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} GiB")
}

#[cfg(test)]
mod tests {
    use hypervisor::kvm::HyperV;

    use super::*;

    fn line(text: &str, exits: u64) -> Stamped {
        let costs =
            Costs { exits: Some(exits), user_exits: exits / 4, signals: exits / 2, interrupts: 0 };
        Stamped { text: text.to_owned(), after: Duration::from_millis(3), costs }
    }

    #[test]
    fn a_measurement_costs_what_was_counted_while_it_ran() {
        let lines = vec![
            line(r#"{"event":"connected","bus":"vmbus","version":"5.3","offers":1}"#, 50),
            line(r#"{"begin":"bench depth=4"}"#, 100),
            line(
                r#"{"result":"bench","disk":0,"driver":"ide-dma","bs":4096,"depth":4,"nanoseconds":3000000,"ios":200,"iops":1234}"#,
                500,
            ),
            line(r#"{"begin":"bench"}"#, 500),
            line(
                r#"{"result":"bench","disk":0,"driver":"storvsc","bs":4096,"depth":1,"nanoseconds":1500000,"ios":200,"iops":2345}"#,
                700,
            ),
        ];
        let report =
            Report::new(PartitionKind::Kvm(HyperV::Kernel), lines, Some(0), Duration::from_secs(1));
        let words = report.words("a file", None);
        assert!(words.contains("1 device\n"), "{words}");
        let columns = |way: &str| {
            let line = words.lines().find(|line| line.contains(way)).unwrap();
            let (_, columns) = line.split_once(way).unwrap();
            columns.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let whole = "\u{2588}".repeat(14);
        assert_eq!(
            columns("IDE DMA, 4 at a time"),
            ["1234", "1.00", "0.00", "2.00", "0.50", "15.0", &whole]
        );
        assert_eq!(
            columns("storvsc"),
            ["2345", "0.50", "0.00", "1.00", "0.25", "7.5", &whole[..7 * 3]]
        );
        assert!(words.contains("switched itself off; 1.00 s"), "{words}");
        let json = report.json(Some(Path::new("/a\"b")));
        assert!(json.contains(r#""kept":"/a\"b""#), "{json}");
        assert!(json.contains(r#""exits":400,"user_exits":100,"signals":200"#), "{json}");
    }

    #[test]
    fn frames_have_a_table_of_their_own() {
        let exchange = |peer, lost| {
            format!(
                r#"{{"result":"exchange","driver":"netvsc","peer_driver":"{peer}","len":1500,"depth":32,"nanoseconds":1000000,"frames":500,"lost":{lost},"frames_per_second":500000}}"#
            )
        };
        let identify = |nic, driver| {
            line(&format!(r#"{{"result":"identify","nic":{nic},"driver":"{driver}"}}"#), 0)
        };
        let mut lines = vec![
            identify(0, "netvsc"),
            identify(1, "netvsc"),
            identify(2, "e1000"),
            line(r#"{"begin":"exchange"}"#, 100),
            line(&exchange("netvsc", 0), 350),
        ];
        let report = |lines: &[Stamped]| {
            let kind = PartitionKind::Kvm(HyperV::Kernel);
            Report::new(kind, lines.to_vec(), Some(0), Duration::ZERO)
        };
        let words = report(&lines).words("", None);
        assert!(words.contains("0 and 1 by netvsc, 2 by e1000, on a virtual switch"), "{words}");
        assert!(words.contains("500 frames have arrived, every byte of each compared; none lost"));
        assert!(!words.contains("at random"), "{words}");
        lines.extend([line(r#"{"begin":"exchange"}"#, 400), line(&exchange("e1000", 3), 400)]);
        let report = report(&lines);
        let words = report.words("", None);
        assert!(words.contains("1000 frames have arrived, every byte of each compared; 3 lost"));
        let columns = words.lines().find_map(|line| line.split_once("netvsc, 32 at a time"));
        let columns: Vec<_> = columns.unwrap().1.split_whitespace().collect();
        assert_eq!(columns[..6], ["500000", "0.25", "0.00", "0.50", "0.12", "2.0"], "{words}");
        assert!(words.contains("netvsc/e1000, 32 at a time"), "{words}");
        let json = report.json(None);
        let fields = r#""driver":"netvsc","peer_driver":"e1000","len":1500,"depth":32,"nanoseconds":1000000,"frames":500,"lost":3,"frames_per_second":500000,"exits":0,"#;
        assert!(json.contains(fields), "{json}");
    }

    #[test]
    fn what_went_wrong_is_told() {
        let lines = vec![line(r#"{"error":"no disk"}"#, 0)];
        let report =
            Report::new(PartitionKind::Kvm(HyperV::Kernel), lines, Some(1), Duration::ZERO);
        assert_eq!(report.error().as_deref(), Some("no disk"));
        let report =
            Report::new(PartitionKind::Kvm(HyperV::Kernel), Vec::new(), Some(101), Duration::ZERO);
        assert_eq!(report.error().as_deref(), Some("status 101"));
        let sum = |sum| line(&format!(r#"{{"result":"checksum","checksum":"{sum}"}}"#), 0);
        let kind = || PartitionKind::Kvm(HyperV::Kernel);
        let report = Report::new(kind(), vec![sum(1), sum(1)], Some(0), Duration::ZERO);
        assert_eq!(report.error(), None);
        let report = Report::new(kind(), vec![sum(1), sum(2)], Some(0), Duration::ZERO);
        let error = report.error().unwrap();
        assert_eq!(error, "what is on the disk depends on who reads it: 1, 2");
    }

    #[test]
    fn sizes() {
        assert_eq!(size(512), "512 bytes");
        assert_eq!(size(64 << 20), "64 MiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(1 << 10 | 1 << 9), "1.5 KiB");
    }
}
