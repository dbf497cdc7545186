//! The ATA driver against the emulated controller, all in this process.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use backends::block::{BlockErrorKind, Disk};
use backends::file::{FileDisk, OpenOptions};
use backends::ram::RamDisk;
use backends::testing::{FaultyDisk, Rule};
use common::{Guest, Line, Root, World};
use emulators::pci::{ConfigPorts, IoWindow, chipset};
use emulators::{Ide, IdeDisks, IdePlace, Nothing};
use guest_drivers::block::{BlockDriver, BlockError, Operation, Request};
use guest_drivers::ide::{self, Transfer};
use guest_drivers::platform::Platform;
use guest_drivers::runner::{self, status};
use hypervisor::{Bus, GuestMemory};
use vmbus_server::Host;
use vsp::storvsp::ControllerBuilder;

/// A machine with a PCI bus and an IDE controller on it, as far as a driver sees one.
fn legacy(memory: &GuestMemory, world: &Arc<World>, disks: &IdeDisks) -> (Bus, Ide) {
    let mut ports = Bus::ports();
    let mut pci = ConfigPorts::new(Arc::new(Nothing));
    let decode = chipset::populate(&mut pci);
    let line = || Arc::new(Line(Arc::clone(world))) as _;
    let ide = Ide::new(memory, disks, [line(), line()]).unwrap();
    let mut window = IoWindow::default();
    let master = ide.bus_master(Arc::clone(&decode));
    window.add(decode, chipset::BUS_MASTER_PORTS, master);
    let mut add = |start: u16, len: u16, device| {
        ports.add("", start.into(), len.into(), device).unwrap();
    };
    add(ConfigPorts::PORT, ConfigPorts::PORTS, Arc::new(pci));
    add(IoWindow::PORT, IoWindow::PORTS, Arc::new(window));
    for (channel, place) in IdePlace::ALL.into_iter().enumerate() {
        add(place.command, IdePlace::PORTS, ide.command_block(channel));
        add(place.control, 1, ide.control_block(channel));
    }
    (ports, ide)
}

/// A guest in a machine with these disks.
fn guest(ide: &IdeDisks, scsi: Option<Arc<dyn Disk>>) -> (Guest, Ide, Host) {
    let memory = GuestMemory::new(16 << 20).unwrap();
    let world = World::new(1);
    let (ports, ide) = legacy(&memory, &world, ide);
    let mut devices = Vec::new();
    if let Some(disk) = scsi {
        let mut builder = ControllerBuilder::new(0);
        builder.attach(None, disk).unwrap();
        devices.push(Box::new(builder.build(1)) as _);
    }
    let root = Arc::new(Root(Arc::clone(&world)));
    let host = Host::new(memory.clone(), root, 1, devices).unwrap();
    let (sink, started) = (host.sink(), Instant::now());
    let (ports, lines) = (Arc::new(ports), Mutex::default());
    let mmio = Arc::new(Bus::mmio());
    (Guest { world, vp: 0, memory, ports, mmio, sink, started, lines }, ide, host)
}

/// Runs `work` with these disks; returns the status and the lines.
fn run(ide: &IdeDisks, scsi: Option<Arc<dyn Disk>>, work: &str) -> (u32, Vec<String>) {
    let (guest, _ide, _host) = guest(ide, scsi);
    let status = runner::run(&guest, work);
    (status, guest.lines.into_inner().unwrap())
}

/// [`run`] with one disk, on the first channel.
fn run_one(disk: Arc<dyn Disk>, work: &str) -> (u32, Vec<String>) {
    let mut ide = IdeDisks::default();
    ide.attach(None, None, disk).unwrap();
    run(&ide, None, work)
}

fn ram(mib: u64) -> Arc<dyn Disk> {
    Arc::new(RamDisk::new(mib << 20).unwrap())
}

/// The values of `key` in all lines that have it.
fn values(lines: &[String], key: &str) -> Vec<String> {
    let key = format!("\"{key}\":");
    let value = |line: &String| {
        let rest = line.split_once(&key)?.1;
        Some(rest.split([',', '}']).next()?.trim_matches('"').to_owned())
    };
    lines.iter().filter_map(value).collect()
}

#[test]
fn all_work_is_done_by_dma_and_by_pio() {
    for transfer in ["dma", "pio"] {
        // Transfers of a sector, of more than one block of PIO, and of the most that there is.
        let work = format!(
            "verify bytes=1M bs=512 transfer={transfer}; verify bytes=1M bs=20k transfer={transfer};
             verify bytes=2M bs=128k depth=8 transfer={transfer};
             bench transfer={transfer} time=20ms;
             bench transfer={transfer} pattern=seq rw=write bs=128k time=20ms"
        );
        let (status, lines) = run_one(ram(4), &work);
        assert_eq!(status, status::DONE, "{lines:#?}");
        let found = r#"{"event":"found","driver":"ide","controller":0,"disks":1}"#;
        assert_eq!(lines[1], found);
        let drivers = values(&lines[2..], "driver");
        assert_eq!(drivers, vec![format!("ide-{transfer}"); 5], "{lines:#?}");
        // One at a time, whatever was asked for.
        assert_eq!(values(&lines, "depth"), ["1"; 5]);
    }
}

#[test]
fn every_way_to_a_disk_finds_the_same() {
    let disk = ram(4);
    let mut ide = IdeDisks::default();
    ide.attach(None, None, Arc::clone(&disk)).unwrap();
    let work = "verify disk=0 bytes=2M; checksum disk=0 bytes=2M bs=16k;
                checksum disk=1 transfer=dma bytes=2M; checksum disk=1 transfer=pio bytes=2M bs=4k";
    let (status, lines) = run(&ide, Some(disk), work);
    assert_eq!(status, status::DONE, "{lines:#?}");
    let sums = values(&lines, "checksum");
    assert_eq!(sums.len(), 4, "{lines:#?}");
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");

    let (status, lines) = run(&ide, Some(ram(1)), "checksum disk=0 transfer=pio");
    assert_eq!(status, status::FAILED);
    let error = "disk 0 is a synthetic one; transfer= says how an IDE disk's data goes";
    assert_eq!(*lines.last().unwrap(), format!(r#"{{"error":"{error}"}}"#));
}

#[test]
fn disks_are_found_wherever_they_are() {
    let mut ide = IdeDisks::default();
    let named = RamDisk::new(3 << 20).unwrap().with(|geometry| geometry.physical_block = 4096);
    ide.attach(Some(0), Some(1), ram(2)).unwrap();
    ide.attach(Some(1), Some(0), Arc::new(named)).unwrap();
    ide.attach_cd(ram(1)).unwrap();
    let (status, lines) = run(&ide, Some(ram(1)), "identify; verify disk=2 bytes=64k");
    assert_eq!(status, status::DONE, "{lines:#?}");
    let found: Vec<_> = lines.iter().filter(|line| line.contains("identify\",")).collect();
    assert_eq!(found.len(), 3, "{lines:#?}");
    let rest = r#""vendor":"ATA","product":"Partita IDE disk""#;
    for (line, expected) in found[1..].iter().zip([
        format!(r#""disk":1,"driver":"ide-dma","controller":0,"lun":1,{rest},"bytes":2097152,"block_size":512,"physical_block_size":512,"max_transfer":131072"#),
        format!(r#""disk":2,"driver":"ide-dma","controller":1,"lun":0,{rest},"bytes":3145728,"block_size":512,"physical_block_size":4096,"max_transfer":131072"#),
    ]) {
        assert!(line.contains(&expected), "{line}");
    }
}

#[test]
fn far_sectors_need_long_addresses() {
    const FAR: u64 = 1 << 28;
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len((FAR + 100) * 512).unwrap();
    let disk = FileDisk::open(file.path(), &OpenOptions::default()).unwrap();
    let mut disks = IdeDisks::default();
    disks.attach(None, Some(1), Arc::new(disk)).unwrap();
    let (guest, _ide, _host) = guest(&disks, None);
    let mut memory = guest.memory();
    let mut channels = ide::find(&guest, &mut memory).unwrap();
    let channel = channels[0].as_mut().unwrap();
    // The last that the shorter form reaches, one that goes beyond, and the disk's end.
    for (transfer, first) in [(Transfer::Dma, 1_u8), (Transfer::Pio, 11)] {
        for (mark, block) in (first..).zip([FAR - 2, FAR - 1, FAR + 98]) {
            let mut disk = channel.disk(1, transfer).unwrap().unwrap();
            memory.words()[..128].iter().for_each(|word| word.store(mark.into(), Relaxed));
            let mut ends = |operation| {
                let data = Some(memory);
                let request = Request { slot: 0, operation, block, blocks: 2, data };
                disk.submit(&request).unwrap();
                let mut outcome = None;
                while disk.poll(&mut |ended| outcome = Some(ended.outcome)).unwrap() == 0 {
                    disk.sleep();
                }
                outcome.unwrap()
            };
            assert_eq!(ends(Operation::Write), Ok(1024));
            let mut bytes = [0; 1024];
            file.as_file().read_exact_at(&mut bytes, block * 512).unwrap();
            assert!(bytes.chunks(8).all(|word| word == [mark, 0, 0, 0, 0, 0, 0, 0]));
            memory.words()[..128].iter().for_each(|word| word.store(0, Relaxed));
            assert_eq!(ends(Operation::Read), Ok(1024));
            assert!(memory.words()[..128].iter().all(|word| word.load(Relaxed) == u64::from(mark)));
        }
    }
    // Beyond the end there is nothing to ask for, and at the end nothing to wrap around.
    let mut disk = channel.disk(1, Transfer::Dma).unwrap().unwrap();
    for (block, blocks) in [(FAR + 99, 2), (u64::MAX, 1), (0, 0), (0, 257)] {
        let operation = Operation::Read;
        let request = Request { slot: 0, operation, block, blocks, data: Some(memory) };
        assert_eq!(disk.submit(&request), Err(BlockError::Request), "{block} {blocks}");
    }
}

#[test]
fn what_a_drive_refuses_is_told() {
    let failure = |disk, work: &str| {
        let (status, lines) = run_one(disk, work);
        assert_eq!(status, status::FAILED, "{lines:#?}");
        let last = lines.last().unwrap();
        last.strip_prefix("{\"error\":\"").unwrap().strip_suffix("\"}").unwrap().to_owned()
    };
    for transfer in ["dma", "pio"] {
        let read_only = RamDisk::new(1 << 20).unwrap().with(|geometry| geometry.read_only = true);
        let error = failure(Arc::new(read_only), &format!("verify transfer={transfer} bytes=64k"));
        let refused = "the write of block 0 failed: the drive refused with status 0x51, error 0x04";
        assert!(error.starts_with(refused), "{error}");

        let broken = FaultyDisk::new(ram(1));
        broken.set_rules(vec![
            Rule::fail(8192..8193, BlockErrorKind::Io).only(backends::block::Operation::Read),
        ]);
        let work = format!("verify transfer={transfer} bytes=64k bs=4k");
        let error = failure(Arc::new(broken), &work);
        assert!(error.starts_with("the read of block 16 failed: the drive refused"), "{error}");
        assert!(error.contains("error 0x40"), "{error}");
    }
}
