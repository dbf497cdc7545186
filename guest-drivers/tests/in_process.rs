//! The runner against the real bus and the real service provider, all in this process.

mod common;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use backends::block::{BlockErrorKind, Operation};
use backends::ram::RamDisk;
use backends::testing::{FaultyDisk, Rule};
use common::{Guest, Root, World};
use guest_drivers::runner::{self, status};
use hypervisor::{Bus, GuestMemory};
use vmbus_server::{Device, Host};
use vsp::storvsp::ControllerBuilder;

/// Runs `work` with these disks on controllers of their own; returns the status and the lines.
fn run(disks: &[&[Arc<dyn backends::block::Disk>]], work: &str) -> (u32, Vec<String>) {
    run_on(1, disks, work)
}

/// The same with so many processors.
fn run_on(vps: u32, disks: &[&[Arc<dyn backends::block::Disk>]], work: &str) -> (u32, Vec<String>) {
    let memory = GuestMemory::new(16 << 20).unwrap();
    let world = World::new(vps as usize);
    let devices = (0..).zip(disks).map(|(controller, disks)| {
        let mut builder = ControllerBuilder::new(controller);
        for disk in *disks {
            builder.attach(None, Arc::clone(disk)).unwrap();
        }
        Box::new(builder.build(vps)) as Box<dyn Device>
    });
    let root = Arc::new(Root(Arc::clone(&world)));
    let host = Host::new(memory.clone(), root, vps, devices.collect()).unwrap();
    let sink = host.sink();
    let (ports, mmio) = (Arc::new(Bus::ports()), Arc::new(Bus::mmio()));
    let started = Instant::now();
    let guest = Guest { world, vp: 0, memory, ports, mmio, sink, started, lines: Mutex::default() };
    let status = runner::run(&guest, work);
    (status, guest.lines.into_inner().unwrap())
}

fn ram(mib: u64) -> Arc<dyn backends::block::Disk> {
    Arc::new(RamDisk::new(mib << 20).unwrap())
}

#[test]
fn all_work_is_done_and_reported() {
    let work = "identify; verify bytes=2M bs=16k; bench time=20ms bs=512 spin=0us;\
                bench time=20ms depth=64; bench pattern=seq rw=write bs=128k depth=3 time=20ms";
    let (status, lines) = run(&[&[ram(4)]], work);
    assert_eq!(status, status::DONE, "{lines:#?}");
    assert_eq!(
        lines[..3],
        [
            r#"{"event":"connected","bus":"vmbus","version":"5.3","offers":1}"#,
            r#"{"event":"opened","channel":1,"driver":"storvsc","controller":0,"disks":1,"channels":1}"#,
            r#"{"begin":"identify"}"#,
        ]
    );
    assert!(lines[3].contains(r#""bytes":4194304,"block_size":512"#), "{}", lines[3]);
    assert!(
        lines[5].contains(
            r#""result":"verify","disk":0,"driver":"storvsc","bytes":2097152,"bs":16384"#
        )
    );
    for line in [&lines[7], &lines[9], &lines[11]] {
        assert!(line.contains(r#""result":"bench""#) && !line.contains(r#""ios":0,"#), "{line}");
    }
    assert_eq!(lines.len(), 12);
}

#[test]
fn a_pattern_is_where_it_should_be_and_nowhere_else() {
    let disk = Arc::new(RamDisk::new(4 << 20).unwrap());
    let attached: Arc<dyn backends::block::Disk> = disk.clone();
    let (status, lines) = run(&[&[attached]], "verify bytes=2M bs=16k");
    assert_eq!(status, status::DONE, "{lines:#?}");
    let mut bytes = vec![0; 4 << 20];
    disk.read(0, &mut bytes);
    let (written, rest) = bytes.split_at(2 << 20);
    let words: HashSet<_> = written.chunks(8).collect();
    assert_eq!(words.len(), written.len() / 8, "a word of the pattern comes twice");
    assert!(rest.iter().all(|byte| *byte == 0));
}

/// The value of a field that is text.
fn text_of<'a>(line: &'a str, key: &str) -> &'a str {
    let (_, rest) = line.split_once(&format!(r#""{key}":""#)).unwrap();
    rest.split('"').next().unwrap()
}

#[test]
fn processors_share_the_work_by_channels_of_their_own() {
    let disk = ram(4);
    let work = "verify bytes=2M bs=16k vps=3; verify bytes=2M bs=16k vps=1; checksum bytes=2M bs=8k vps=3;\
                bench vps=3 depth=4 time=20ms; bench vps=2 pattern=seq time=20ms";
    let (status, lines) = run_on(3, &[&[Arc::clone(&disk)], &[ram(1)]], work);
    assert_eq!(status, status::DONE, "{lines:#?}");
    for (line, controller) in lines[1..3].iter().zip(0..) {
        let opened = format!(r#""controller":{controller},"disks":1,"channels":3}}"#);
        assert!(line.contains(&opened), "{line}");
    }
    let results: Vec<_> = lines.iter().filter(|line| line.contains("\"result\"")).collect();
    for (line, vps) in results.iter().zip([3, 1, 3]) {
        assert!(line.contains(r#""bytes":2097152,"bs":"#), "{line}");
        assert!(line.contains(&format!(r#""depth":{},"vps":{vps},"#, 8 * vps)), "{line}");
        assert_eq!(text_of(line, "checksum"), text_of(results[0], "checksum"));
    }
    assert!(results[3].contains(r#""depth":12,"vps":3,"#), "{}", results[3]);
    assert!(results[4].contains(r#""depth":2,"vps":2,"#), "{}", results[4]);
}

#[test]
fn work_for_processors_that_are_not_there_is_refused() {
    for (vps, asked) in [(1, 2), (3, 4)] {
        let (status, lines) = run_on(vps, &[&[ram(1)]], &format!("bench vps={asked}"));
        assert_eq!(status, status::FAILED);
        let error = format!("{asked} processors are to work on the disk, which {vps} can");
        assert!(lines.last().unwrap().contains(&error), "{lines:#?}");
    }
}

#[test]
fn a_failure_on_any_processor_is_told() {
    // Places are dealt out in turns, so this one is the second processor's.
    let broken = FaultyDisk::new(ram(1));
    let write = Operation::Write { fua: false };
    broken.set_rules(vec![Rule::fail(16384..16385, BlockErrorKind::Io).only(write)]);
    let (status, lines) = run_on(2, &[&[Arc::new(broken)]], "verify bs=16k bytes=1M vps=2");
    assert_eq!(status, status::FAILED);
    let error = "the write of block 32 failed";
    assert!(lines.last().unwrap().contains(error), "{lines:#?}");
}

#[test]
fn disks_are_counted_over_controllers() {
    let disks = [ram(1), ram(2), ram(3)];
    let (status, lines) = run(&[&disks[..2], &disks[2..]], "identify; verify disk=2 bytes=64k");
    assert_eq!(status, status::DONE, "{lines:#?}");
    let found: Vec<_> = lines.iter().filter(|line| line.contains("identify\",")).collect();
    let place = |disk, controller, lun, mib: u64| {
        move |line: &String| {
            line.contains(&format!(r#""disk":{disk},"#))
                && line.contains(&format!(r#""controller":{controller},"lun":{lun},"#))
                && line.contains(&format!(r#""bytes":{},"#, mib << 20))
        }
    };
    assert_eq!(found.len(), 3);
    assert!(place(0, 0, 0, 1)(found[0]) && place(1, 0, 1, 2)(found[1]), "{found:#?}");
    assert!(place(2, 1, 0, 3)(found[2]), "{found:#?}");

    let (status, lines) = run(&[&disks], "bench disk=3");
    assert_eq!(status, status::FAILED);
    let error = lines.last().unwrap();
    assert_eq!(error, r#"{"error":"there is no disk 3; there are 3, counted from 0"}"#);
}

/// The error of a run that fails.
fn failure(disk: Arc<dyn backends::block::Disk>, work: &str) -> String {
    let (status, lines) = run(&[&[disk]], work);
    assert_eq!(status, status::FAILED, "{lines:#?}");
    let last = lines.last().unwrap();
    last.strip_prefix("{\"error\":\"").unwrap().strip_suffix("\"}").unwrap().to_owned()
}

#[test]
fn what_a_disk_refuses_is_told() {
    let read_only = RamDisk::new(1 << 20).unwrap().with(|geometry| geometry.read_only = true);
    let error = failure(Arc::new(read_only), "verify bytes=64k");
    assert!(error.starts_with("the write of block 0 failed: the unit refused"), "{error}");
    assert!(error.ends_with("with sense 7/27/00"), "{error}");

    let broken = FaultyDisk::new(ram(1));
    broken.set_rules(vec![Rule::fail(8192..8193, BlockErrorKind::Io).only(Operation::Read)]);
    let error = failure(Arc::new(broken), "verify bytes=64k bs=4k");
    assert!(error.starts_with("the read of block 16 failed: the unit refused"), "{error}");

    assert_eq!(
        failure(Arc::new(RamDisk::new(4096).unwrap()), "bench bs=8k"),
        "the disk has 4096 bytes, which is less than one transfer"
    );
}

#[test]
fn work_that_is_not_understood_is_not_begun() {
    let (status, lines) = run(&[&[ram(1)]], "verify; format");
    assert_eq!(status, status::MISUNDERSTOOD);
    assert_eq!(
        lines,
        [
            r#"{"error":"'format' is no work; say identify, verify, checksum, bench, exchange or hostile"}"#
        ]
    );
}

#[test]
fn a_machine_without_disks_has_none() {
    let (status, lines) = run(&[], "identify");
    assert_eq!((status, lines.len()), (status::DONE, 2), "{lines:#?}");
    let (status, _) = run(&[], "verify");
    assert_eq!(status, status::FAILED);
}
