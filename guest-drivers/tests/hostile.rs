//! A hostile guest that stays, against all the devices of a machine, and an honest one beside it; all in
//! this process, so that what the root keeps can be counted.
//!
//! To repeat a seed that failed: `HOSTILE_SEED=n cargo test -p guest-drivers --test hostile`.

mod common;
#[path = "../../xtask/src/soak/figures.rs"]
mod figures;

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backends::file::{FileDisk, OpenOptions};
use backends::net::MacAddr;
use backends::net::switch::{PortOptions, Switch, SwitchOptions};
use common::{Guest, Line, Root, World};
use emulators::pci::{self, ConfigPorts, IoWindow, MemoryWindow, SharedLine, chipset};
use emulators::{E1000, E1000Config, Ide, IdeDisks, IdePlace, Nothing};
use figures::Figures;
use guest_drivers::runner::{self, status};
use hypervisor::{Bus, GuestMemory, layout};
use tempfile::TempDir;
use vmbus_server::{Device, Host};
use vsp::netvsp::{Nic, NicConfig};
use vsp::storvsp::ControllerBuilder;

/// Virtual processors of the hostile guest, so that there are sub-channels.
const VPS: usize = 3;

/// A machine with everything: two synthetic disks, an IDE disk on each channel, two NICs of each kind on
/// one switch.
struct Machine {
    guest: Guest,
    _host: Host,
    _ide: Ide,
    _nics: Vec<E1000>,
    _folder: TempDir,
}

fn machine(vps: usize) -> Machine {
    let folder = tempfile::tempdir().unwrap();
    let disk = |name: &str| {
        let path = folder.path().join(name);
        fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
        Arc::new(FileDisk::open(&path, &OpenOptions::default()).unwrap()) as Arc<_>
    };
    let memory = GuestMemory::new(16 << 20).unwrap();
    let world = World::new(vps);
    let switch = Switch::new(SwitchOptions::new("lan"));
    let port = || Arc::new(switch.port(PortOptions::default()).unwrap());

    let mut scsi = ControllerBuilder::new(0);
    scsi.attach(None, disk("a")).unwrap();
    scsi.attach(None, disk("b")).unwrap();
    let mut devices: Vec<Box<dyn Device>> = vec![Box::new(scsi.build(vps as u32))];
    for number in 0..2 {
        let address = MacAddr([2, 0, 0, 0, 0, number]);
        let (max_mtu, name) = (9000, String::new());
        let config = NicConfig { number, address, max_mtu, channels: vps as u16, name };
        devices.push(Box::new(Nic::new(config, port())));
    }

    let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
    let (mut bus, mut window) = (ConfigPorts::new(Arc::new(Nothing)), MemoryWindow::default());
    let decode = chipset::populate(&mut bus);
    let line = || Arc::new(Line(Arc::clone(&world))) as _;
    let mut disks = IdeDisks::default();
    disks.attach(Some(0), None, disk("c")).unwrap();
    disks.attach(Some(1), None, disk("d")).unwrap();
    let ide = Ide::new(&memory, &disks, [line(), line()]).unwrap();
    let mut io = IoWindow::default();
    let master = ide.bus_master(Arc::clone(&decode));
    io.add(decode, chipset::BUS_MASTER_PORTS, master);
    let mut add = |start: u16, len: u16, device| {
        ports.add("a device", start.into(), len.into(), device).unwrap();
    };
    for (channel, place) in IdePlace::ALL.into_iter().enumerate() {
        add(place.command, IdePlace::PORTS, ide.command_block(channel));
        add(place.control, 1, ide.control_block(channel));
    }
    add(IoWindow::PORT, IoWindow::PORTS, Arc::new(io));

    let shared = SharedLine::new(Arc::new(Line(Arc::clone(&world))) as _);
    let mut nics = Vec::new();
    for number in 0..2 {
        let slot = pci::FIRST_SLOT + number;
        let (function, decode, _) = pci::nic::function(slot);
        let address = MacAddr([2, 0, 0, 0, 1, number]);
        let config = E1000Config { address, mtu: 1500, network: port() };
        let nic = E1000::new(number, &config, &memory, Arc::clone(&decode), shared.end()).unwrap();
        window.add(decode, pci::nic::MEMORY, nic.memory());
        bus.add(slot, 0, function);
        nics.push(nic);
    }
    let (first, count) = (ConfigPorts::PORT.into(), ConfigPorts::PORTS.into());
    ports.add("PCI configuration", first, count, Arc::new(bus)).unwrap();
    let (start, size) = (layout::PCI_MMIO_START.0, layout::PCI_MMIO_SIZE);
    mmio.add("PCI memory", start, size, Arc::new(window)).unwrap();

    let root = Arc::new(Root(Arc::clone(&world)));
    let host = Host::new(memory.clone(), root, vps as u32, devices).unwrap();
    let (sink, started) = (host.sink(), Instant::now());
    let (ports, mmio) = (Arc::new(ports), Arc::new(mmio));
    let guest = Guest { world, vp: 0, memory, ports, mmio, sink, started, lines: Mutex::default() };
    Machine { guest, _host: host, _ide: ide, _nics: nics, _folder: folder }
}

/// Runs `work`, all of which must be done; returns the lines.
fn run(machine: &Machine, work: &str) -> Vec<String> {
    let status = runner::run(&machine.guest, work);
    let lines = std::mem::take(&mut *machine.guest.lines.lock().unwrap());
    assert_eq!(status, status::DONE, "`{work}`: {lines:#?}");
    lines
}

/// All disks and NICs of a machine, each byte checked.
const HONEST: &str = "verify disk=0 bytes=1M; verify disk=1 bytes=1M bs=4k vps=3;
    verify disk=2 bytes=256k transfer=dma; verify disk=3 bytes=128k transfer=pio;
    exchange nic=0 peer=1 frames=200; exchange nic=2 peer=3 frames=200; exchange nic=0 peer=3 frames=100";

/// Does honest work, in which nothing is lost.
fn work_honestly(machine: &Machine) {
    for line in run(machine, HONEST).iter().filter(|line| line.contains(r#""result":"exchange""#)) {
        for key in ["lost", "duplicates", "damaged"] {
            assert!(line.contains(&format!(r#""{key}":0,"#)), "{line}");
        }
    }
}

/// How long what ends may take for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Seeds before figures are taken, so that whatever is made once has been made, and after that.
const WARM_UP: u64 = 60;
const SEEDS: u64 = 240;

#[test]
fn a_hostile_guest_that_stays_costs_the_host_nothing_and_an_honest_one_is_served() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Relaxed);
        report(panic);
    }));

    let (first, count) = match std::env::var("HOSTILE_SEED") {
        Ok(seed) => (seed.parse().unwrap(), 1),
        Err(_) => (1, SEEDS),
    };
    let (hostile, honest) = (machine(VPS), machine(VPS));
    let side_by_side = |first: u64, count: u64| {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                while !done.load(Relaxed) {
                    work_honestly(&honest);
                }
            });
            for seed in first..first + count {
                let again =
                    format!("HOSTILE_SEED={seed} cargo test -p guest-drivers --test hostile");
                eprintln!("{again}");
                run(&hostile, &format!("hostile seed={seed} rounds=1"));
                assert_eq!(PANICS.load(Relaxed), 0, "a thread has panicked; see it again: {again}");
            }
            done.store(true, Relaxed);
            other.join().unwrap();
        });
    };
    side_by_side(first, count.min(WARM_UP));
    let before = Figures::settled("self", None, PATIENCE).unwrap();
    side_by_side(first + count.min(WARM_UP), count - count.min(WARM_UP));
    let after = Figures::settled("self", Some(before), PATIENCE).unwrap();
    eprintln!("before: {before:?}\nafter: {after:?}");
    let more = after.exceeds(&before);
    assert_eq!(more, None, "before: {before:?}, after: {after:?}");
    // Whoever was hostile may work honestly, with all that it has mistreated. A switch learns first that frames
    // from its NICs' addresses do not come from elsewhere any more.
    run(&hostile, "exchange nic=0 peer=1 frames=64; exchange nic=2 peer=3 frames=64");
    work_honestly(&hostile);
}
