//! NICs of the built-in guest against the real ones of the root, on a virtual switch, all in this
//! process.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use backends::net::MacAddr;
use backends::net::switch::{PortOptions, Switch, SwitchOptions};
use common::{Guest, Root, World};
use guest_drivers::runner::{self, status};
use hypervisor::{Bus, GuestMemory};
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

/// Runs `work` with these devices; returns the status and the lines.
fn run(devices: Vec<Box<dyn Device>>, work: &str) -> (u32, Vec<String>) {
    let memory = GuestMemory::new(16 << 20).unwrap();
    let world = World::new(1);
    let root = Arc::new(Root(Arc::clone(&world)));
    let host = Host::new(memory.clone(), root, 1, devices).unwrap();
    let (sink, started) = (host.sink(), Instant::now());
    let (ports, mmio) = (Arc::new(Bus::ports()), Arc::new(Bus::mmio()));
    let guest = Guest { world, vp: 0, memory, ports, mmio, sink, started, lines: Mutex::default() };
    let status = runner::run(&guest, work);
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
fn nics_that_nothing_connects_are_told() {
    let work = "exchange spin=10s";
    let (status, lines) = run(vec![netvsc(0, &switch()), netvsc(1, &switch())], work);
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
