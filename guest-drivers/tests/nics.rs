//! NICs of the built-in guest against the real ones of the root, on a virtual switch, all in this
//! process.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use backends::net::MacAddr;
use backends::net::switch::{PortOptions, Switch, SwitchOptions};
use common::{Guest, Line, Root, World};
use emulators::pci::{self, ConfigPorts, MemoryWindow, SharedLine, chipset};
use emulators::{E1000, E1000Config, Nothing};
use guest_drivers::runner::{self, status};
use hypervisor::{Bus, GuestMemory, InterruptLine, layout};
use vmbus_server::{Device, Host};
use vsp::netvsp::{Nic, NicConfig};

/// A synthetic NIC on a port of `switch`.
fn netvsc(number: u8, switch: &Switch) -> Box<dyn Device> {
    let port = switch.port(PortOptions::default()).unwrap();
    let config = NicConfig {
        number,
        address: MacAddr([2, 0, 0, 0, 0, number]),
        max_mtu: 1500,
        channels: 1,
        name: String::new(),
    };
    Box::new(Nic::new(config, Arc::new(port)))
}

fn switch() -> Switch {
    Switch::new(SwitchOptions::new("test"))
}

/// The line by which all emulated NICs interrupt, and whether it is high.
struct SeenLine {
    line: Line,
    high: AtomicBool,
}

impl InterruptLine for SeenLine {
    fn pulse(&self) {
        self.line.pulse();
    }

    fn set_level(&self, high: bool) {
        self.high.store(high, Ordering::SeqCst);
        self.line.set_level(high);
    }
}

/// A PCI bus with an emulated NIC on a port of each of these switches, all of which interrupt by
/// `line`.
fn e1000(
    memory: &GuestMemory,
    line: &Arc<SeenLine>,
    switches: &[&Switch],
) -> (Bus, Bus, Vec<E1000>) {
    let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
    let (mut bus, mut window) = (ConfigPorts::new(Arc::new(Nothing)), MemoryWindow::default());
    chipset::populate_without_ide(&mut bus);
    let line = SharedLine::new(Arc::clone(line) as _);
    let mut nics = Vec::new();
    for (number, switch) in (0..).zip(switches) {
        let slot = pci::FIRST_SLOT + number;
        let (function, decode, _) = pci::nic::function(slot);
        let config = E1000Config {
            address: MacAddr([2, 0, 0, 0, 1, number]),
            mtu: 1500,
            network: Arc::new(switch.port(PortOptions::default()).unwrap()),
        };
        let nic = E1000::new(number, &config, memory, Arc::clone(&decode), line.end()).unwrap();
        window.add(decode, pci::nic::MEMORY, nic.memory());
        bus.add(slot, 0, function);
        nics.push(nic);
    }
    let (first, count) = (ConfigPorts::PORT.into(), ConfigPorts::PORTS.into());
    ports.add("PCI configuration", first, count, Arc::new(bus)).unwrap();
    let (start, size) = (layout::PCI_MMIO_START.0, layout::PCI_MMIO_SIZE);
    mmio.add("PCI memory", start, size, Arc::new(window)).unwrap();
    (ports, mmio, nics)
}

/// Runs `work` with these devices; returns the status and the lines.
fn run(devices: Vec<Box<dyn Device>>, work: &str) -> (u32, Vec<String>) {
    run_with(devices, &[], work)
}

/// The same with emulated NICs besides.
fn run_with(devices: Vec<Box<dyn Device>>, switches: &[&Switch], work: &str) -> (u32, Vec<String>) {
    let memory = GuestMemory::new(16 << 20).unwrap();
    let world = World::new(1);
    let line = Arc::new(SeenLine { line: Line(Arc::clone(&world)), high: AtomicBool::new(false) });
    let (ports, mmio, _nics) = e1000(&memory, &line, switches);
    let root = Arc::new(Root(Arc::clone(&world)));
    let host = Host::new(memory.clone(), root, 1, devices).unwrap();
    let (sink, started) = (host.sink(), Instant::now());
    let (ports, mmio) = (Arc::new(ports), Arc::new(mmio));
    let guest = Guest { world, vp: 0, memory, ports, mmio, sink, started, lines: Mutex::default() };
    let status = runner::run(&guest, work);
    assert!(!line.high.load(Ordering::SeqCst), "a NIC that nobody looks after keeps the line high");
    (status, guest.lines.into_inner().unwrap())
}

/// The number in a field.
fn number(line: &str, key: &str) -> u64 {
    let (_, rest) = line.split_once(&format!("\"{key}\":")).unwrap();
    rest.split([',', '}']).next().unwrap().parse().unwrap()
}

/// The exchanges' results, in which nothing is wrong.
fn exchanges(lines: &[String]) -> Vec<&String> {
    let results: Vec<_> =
        lines.iter().filter(|line| line.contains(r#""result":"exchange""#)).collect();
    for line in &results {
        for key in ["lost", "duplicates", "reordered", "damaged", "foreign"] {
            assert_eq!(number(line, key), 0, "{line}");
        }
    }
    results
}

#[test]
fn netvsc_exchanges_frames_through_the_switch() {
    let switch = switch();
    let work = "identify; exchange frames=3000; exchange len=60 depth=64 frames=3000;
                exchange nic=1 peer=0 len=1514 depth=1 frames=50 spin=0us; exchange time=20ms len=61";
    let (status, lines) = run(vec![netvsc(0, &switch), netvsc(1, &switch)], work);
    assert_eq!(status, status::DONE, "{lines:#?}");
    assert_eq!(
        lines[1..6],
        [
            r#"{"event":"opened","channel":1,"driver":"netvsc","nic":0}"#,
            r#"{"event":"opened","channel":2,"driver":"netvsc","nic":1}"#,
            r#"{"begin":"identify"}"#,
            r#"{"result":"identify","nic":0,"driver":"netvsc","mac":"02:00:00:00:00:00","mtu":1500,"link":"up"}"#,
            r#"{"result":"identify","nic":1,"driver":"netvsc","mac":"02:00:00:00:00:01","mtu":1500,"link":"up"}"#,
        ]
    );
    let results = exchanges(&lines);
    assert_eq!(results.len(), 4, "{lines:#?}");
    for (line, frames) in results.iter().zip([6000, 6000, 100]) {
        assert_eq!((number(line, "sent"), number(line, "frames")), (frames, frames), "{line}");
        assert!(line.contains(r#""driver":"netvsc","peer_driver":"netvsc""#), "{line}");
    }
    assert!(number(results[3], "frames") > 0, "{}", results[3]);
}

#[test]
fn e1000_exchanges_frames_through_the_switch() {
    let switch = switch();
    let work = "identify; exchange frames=3000; exchange len=60 depth=64 frames=3000;
                exchange nic=1 peer=0 len=1514 depth=1 frames=50 spin=0us; exchange time=20ms len=61";
    let (status, lines) = run_with(Vec::new(), &[&switch, &switch], work);
    assert_eq!(status, status::DONE, "{lines:#?}");
    assert_eq!(
        lines[1..5],
        [
            r#"{"event":"found","driver":"e1000","nic":0}"#,
            r#"{"event":"found","driver":"e1000","nic":1}"#,
            r#"{"begin":"identify"}"#,
            r#"{"result":"identify","nic":0,"driver":"e1000","mac":"02:00:00:00:01:00","mtu":1500,"link":"up"}"#,
        ]
    );
    let results = exchanges(&lines);
    assert_eq!(results.len(), 4, "{lines:#?}");
    for (line, frames) in results.iter().zip([6000, 6000, 100]) {
        assert_eq!((number(line, "sent"), number(line, "frames")), (frames, frames), "{line}");
    }
    // Many frames for each access to a register, if there are many.
    assert!(number(results[0], "accesses") < 6000 / 2, "{}", results[0]);
    assert!(number(results[3], "frames") > 0, "{}", results[3]);
}

#[test]
fn netvsc_and_e1000_hear_each_other() {
    let switch = switch();
    let work = "exchange nic=0 peer=2 frames=1000; exchange nic=1 peer=0 len=100 frames=1000";
    let (status, lines) = run_with(vec![netvsc(0, &switch)], &[&switch, &switch], work);
    assert_eq!(status, status::DONE, "{lines:#?}");
    let results = exchanges(&lines);
    assert_eq!(results.len(), 2, "{lines:#?}");
    let drivers = [
        r#""driver":"netvsc","peer_driver":"e1000","len":1500"#,
        r#""driver":"e1000","peer_driver":"netvsc","len":100"#,
    ];
    for (line, drivers) in results.into_iter().zip(drivers) {
        assert!(line.contains(drivers) && number(line, "frames") == 2000, "{line}");
    }
}

#[test]
fn nics_that_nothing_connects_are_told() {
    let work = "exchange spin=10s";
    let (status, lines) = run_with(vec![netvsc(0, &switch())], &[&switch()], work);
    assert_eq!(status, status::FAILED, "{lines:#?}");
    let error = r#"{"error":"no frame arrives any more between NIC 0 and NIC 1"}"#;
    assert_eq!(lines.last().unwrap(), error);
}

#[test]
fn nics_that_are_not_there_are_told() {
    for (work, error) in [
        ("exchange", "there is no NIC 1; there are 1, counted from 0"),
        (
            "exchange nic=4294967295 peer=0",
            "there is no NIC 4294967295; there are 1, counted from 0",
        ),
        ("identify nic=1", "there is no NIC 1; there are 1, counted from 0"),
        ("exchange peer=0", "NIC 0 is to exchange frames with itself; nic= and peer= are two"),
    ] {
        let (status, lines) = run(vec![netvsc(0, &switch())], work);
        assert_eq!(status, status::FAILED, "{lines:#?}");
        assert_eq!(*lines.last().unwrap(), format!(r#"{{"error":"{error}"}}"#));
    }
}
