use std::sync::atomic::{AtomicBool, AtomicU32};

use backends::block::{BlockErrorKind, Operation};
use backends::paths;
use backends::ram::RamDisk;
use backends::testing::{FaultyDisk, Gate, Rule};
use hypervisor::Gpa;

use super::*;
use crate::pci::{ConfigPorts, chipset};

#[derive(Default)]
struct Line {
    pulses: Mutex<u32>,
    raised: std::sync::Condvar,
    seen: AtomicU32,
}

impl InterruptLine for Line {
    fn pulse(&self) {
        unreachable!("an IDE channel makes its edges by itself");
    }

    fn set_level(&self, high: bool) {
        *self.pulses.lock().unwrap() += u32::from(high);
        self.raised.notify_all();
    }
}

impl Line {
    /// Sleeps until it has been raised once more.
    fn wait(&self) {
        let seen = self.seen.fetch_add(1, Ordering::Relaxed);
        let pulses = self.pulses.lock().unwrap();
        drop(self.raised.wait_while(pulses, |pulses| *pulses <= seen).unwrap());
    }
}

/// A controller with one disk, on the first channel, and a guest's hands.
struct Machine {
    memory: GuestMemory,
    line: Arc<Line>,
    command: Arc<dyn Device>,
    control: Arc<dyn Device>,
    master: Arc<dyn Device>,
    pci: ConfigPorts,
    _ide: Ide,
}

const TABLE: u32 = 0x1000;
const DATA: u32 = 0x4000;

impl Machine {
    fn new(disk: Arc<dyn Disk>) -> Self {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let mut disks = IdeDisks::default();
        disks.attach(None, None, disk).unwrap();
        let line = Arc::new(Line::default());
        let ide = Ide::new(&memory, &disks, [line.clone(), Arc::new(Line::default())]).unwrap();
        let mut pci = ConfigPorts::new(Arc::new(crate::Nothing));
        let decode = chipset::populate(&mut pci);
        pci.write(0, &0x8000_0904_u32.to_le_bytes());
        pci.write(4, &[5]);
        let (command, control) = (ide.command_block(0), ide.control_block(0));
        let master = ide.bus_master(decode);
        Self { memory, line, command, control, master, pci, _ide: ide }
    }

    fn command(&self, code: u8, lba: u8, count: u8) {
        for (register, value) in [(2, count), (3, lba), (4, 0), (5, 0), (6, 0xe0), (7, code)] {
            self.command.write(register, &[value]);
        }
    }

    fn read(&self, register: u64) -> u8 {
        let mut value = [0];
        self.command.read(register, &mut value);
        value[0]
    }

    /// A DMA command over one region of `len` bytes at [`DATA`]. Returns status and the bus master's.
    fn dma(&self, code: u8, direction: u8, lba: u8, count: u8, len: u16) -> (u8, u8) {
        self.memory.write_obj(Gpa(TABLE.into()), &DATA).unwrap();
        self.memory.write_obj(Gpa(u64::from(TABLE) + 4), &len).unwrap();
        self.memory.write_obj(Gpa(u64::from(TABLE) + 6), &0x8000_u16).unwrap();
        self.master.write(4, &TABLE.to_le_bytes());
        self.master.write(2, &[6]);
        self.command(code, lba, count);
        self.master.write(0, &[direction]);
        self.master.write(0, &[direction | 1]);
        self.line.wait();
        let mut master = [0];
        self.master.read(2, &mut master);
        self.master.write(0, &[0]);
        (self.read(7), master[0])
    }
}

/// The command register is written through the bus, as a guest does it.
#[test]
fn dma_that_was_started_before_the_bus_master_was_switched_on_is_done_then() {
    let machine = Machine::new(Arc::new(RamDisk::new(1 << 20).unwrap()));
    machine.pci.write(4, &[1]);
    machine.memory.write_obj(Gpa(DATA.into()), &0x55_u8).unwrap();
    machine.memory.write_obj(Gpa(TABLE.into()), &DATA).unwrap();
    machine.memory.write_obj(Gpa(u64::from(TABLE) + 4), &0x8000_0200_u32).unwrap();
    machine.master.write(4, &TABLE.to_le_bytes());
    machine.command(0xc8, 3, 1);
    machine.master.write(0, &[8]);
    machine.master.write(0, &[9]);
    machine.pci.write(4, &[5]);
    machine.line.wait();
    assert_eq!(machine.read(7), 0x50);
    assert_eq!(machine.memory.read_obj::<u8>(Gpa(DATA.into())).unwrap(), 0);
}

#[test]
fn data_goes_by_pio_and_comes_back_by_dma() {
    let machine = Machine::new(Arc::new(RamDisk::new(1 << 20).unwrap()));
    let data: Vec<u8> = (0..1024_u32).map(|n| (n * 7 / 8) as u8).collect();
    machine.command(0x30, 3, 2);
    for sector in data.chunks(512) {
        assert_eq!(machine.read(7) & 0x88, 0x08);
        machine.command.write_string(0, 2, sector);
        // After the first block, and after the whole, when the disk has it.
        machine.line.wait();
    }
    assert_eq!(machine.read(7), 0x50);

    assert_eq!(machine.dma(0xc8, 8, 3, 2, 1024), (0x50, 4));
    let mut back = vec![0; 1024];
    machine.memory.read(Gpa(DATA.into()), &mut back).unwrap();
    assert!(back == data);

    machine.command(0x20, 4, 1);
    machine.line.wait();
    let mut back = vec![0; 512];
    machine.command.read_string(0, 4, &mut back);
    assert!(back == data[512..]);
}

#[test]
fn a_table_that_is_too_short_is_an_error() {
    let machine = Machine::new(Arc::new(RamDisk::new(1 << 20).unwrap()));
    assert_eq!(machine.dma(0xc8, 8, 0, 2, 512), (0x51, 6));
    assert_eq!(machine.dma(0xc8, 8, 0, 2, 1024), (0x50, 4));
    assert_eq!(machine.dma(0xc8, 8, 0, 2, 2048), (0x50, 5), "more memory than data");
}

#[test]
fn tables_outside_memory_and_without_an_end_are_errors() {
    let machine = Machine::new(Arc::new(RamDisk::new(1 << 20).unwrap()));
    let read = |table: u32, entry: [u32; 2]| {
        // As far as there is memory for it.
        let _ = machine.memory.write_obj(Gpa(table.into()), &entry);
        machine.master.write(4, &table.to_le_bytes());
        machine.master.write(2, &[6]);
        machine.command(0xc8, 0, 8);
        machine.master.write(0, &[9]);
        machine.line.wait();
        let mut master = [0];
        machine.master.read(2, &mut master);
        machine.master.write(0, &[0]);
        (machine.read(7), machine.read(1), master[0])
    };
    const LAST: u32 = 0x8000_0000;
    const FAILED: (u8, u8, u8) = (0x51, 0x84, 6);
    const DONE: (u8, u8, u8) = (0x50, 0, 4);
    assert_eq!(read(TABLE, [DATA, LAST | 4096]), DONE);
    assert_eq!(read(TABLE, [0xf_f800, LAST | 4096]), FAILED, "half of the region is no RAM");
    assert_eq!(read(TABLE, [0xffff_f000, LAST | 4096]), FAILED);
    assert_eq!(read(0x10_0000, [0, 0]), FAILED, "no RAM where the table should be");
    assert_eq!(read(0xffff_fffc, [0, 0]), FAILED);
    assert_eq!(read(0xf_fff8, [DATA, 512]), FAILED, "it goes on behind the end of RAM");
    // No end, but regions of 64 KiB as far as they are needed: the bus master waits for more data.
    assert_eq!(read(TABLE, [DATA, 0]), (0x50, 0, 5));
    // The data falls upon the table, which has been read by then.
    assert_eq!(read(TABLE, [TABLE, LAST | 4096]), DONE);
    assert_eq!(read(TABLE, [DATA, LAST | 4096]), DONE, "and all is well");
}

#[test]
fn a_reset_in_mid_transfer_waits_for_the_disk() {
    let gate = Gate::new().unwrap();
    let disk = RamDisk::new(1 << 20).unwrap();
    let slow = FaultyDisk::new(Arc::new(disk.clone())).rule(Rule::hold(0..1 << 20, &gate));
    let machine = Machine::new(Arc::new(slow));
    machine.memory.write(Gpa(DATA.into()), &[7; 512]).unwrap();
    let entry = [DATA, 0x8000_0000 | 512];
    machine.memory.write_obj(Gpa(TABLE.into()), &entry).unwrap();
    machine.master.write(4, &TABLE.to_le_bytes());
    machine.command(0xca, 0, 1);
    machine.master.write(0, &[1]);
    // The guest stops the bus master, resets, and writes to whatever there is.
    machine.master.write(0, &[0]);
    machine.control.write(0, &[4]);
    machine.control.write(0, &[0]);
    machine.command(0x30, 1, 1);
    machine.command.write_string(0, 2, &[9; 512]);
    assert_eq!(machine.read(7), 0x80, "nothing is heard before the disk is done");
    gate.open(2).unwrap();
    while machine.read(7) & 0x80 != 0 {
        std::thread::yield_now();
    }
    assert_eq!((machine.read(7), machine.read(1)), (0x50, 1), "as after any reset");
    let mut sectors = [0; 1024];
    disk.read(0, &mut sectors);
    assert_eq!((&sectors[..512], &sectors[512..]), (&[7; 512][..], &[0; 512][..]));
    assert_eq!(machine.dma(0xc8, 8, 0, 1, 512), (0x50, 4));
}

#[test]
fn trim_discards_what_is_on_the_disk_and_nothing_else() {
    let disk = FaultyDisk::new(Arc::new(RamDisk::new(1 << 20).unwrap()));
    let machine = Machine::new(Arc::new(disk.clone()));
    let range = |first: u64, count: u64| first | count << 48;
    let trim = |ranges: [u64; 2]| {
        machine.memory.write(Gpa(DATA.into()), &[0; 512]).unwrap();
        for (at, range) in (u64::from(DATA)..).step_by(8).zip(ranges) {
            machine.memory.write_obj(Gpa(at), &range).unwrap();
        }
        machine.command.write(1, &[1]);
        // 48 bits: the upper half of the count is what was written before.
        machine.command.write(2, &[0]);
        machine.dma(0x06, 0, 0, 1, 512)
    };
    assert_eq!(trim([range(8, 16), range(64, 8)]), (0x50, 4));
    assert_eq!(trim([range(8, 16), range(2047, 2)]).0, 0x51);
    assert_eq!(machine.read(1), 0x14);
    let discards: Vec<_> = disk
        .seen()
        .into_iter()
        .filter(|seen| seen.operation == Operation::Discard)
        .map(|seen| (seen.offset / 512, seen.len / 512))
        .collect();
    assert_eq!(discards, [(8, 16), (64, 8)]);
}

#[test]
fn a_disk_that_has_shrunk_ends_earlier_and_one_that_grows_does_so_at_a_restart() {
    let ram = RamDisk::new(1 << 20).unwrap();
    ram.resize(64 << 10);
    ram.refresh().unwrap();
    let sectors = |machine: &Machine| {
        machine.command(0xec, 0, 0);
        machine.line.wait();
        let mut page = [0; 512];
        machine.command.read_string(0, 2, &mut page);
        u32::from_le_bytes([page[120], page[121], page[122], page[123]])
    };
    let machine = Machine::new(Arc::new(ram.clone()));
    ram.resize(1 << 20);
    ram.refresh().unwrap();
    assert_eq!(sectors(&machine), 128);
    assert_eq!(machine.dma(0xc8, 8, 127, 1, 512), (0x50, 4));
    machine.command(0x20, 128, 1);
    machine.line.wait();
    assert_eq!((machine.read(7), machine.read(1)), (0x51, 0x10), "IDNF");
    drop(machine);

    let machine = Machine::new(Arc::new(ram.clone()));
    assert_eq!(sectors(&machine), 2048);
    ram.resize(64 << 10);
    ram.refresh().unwrap();
    assert_eq!(machine.dma(0xc8, 8, 127, 1, 512), (0x50, 4));
    for write in [false, true] {
        let (code, direction) = if write { (0xca, 0) } else { (0xc8, 8) };
        let (status, _) = machine.dma(code, direction, 127, 2, 1024);
        assert_eq!((status & 1, machine.read(1)), (1, 0x10), "IDNF");
    }
}

#[test]
fn a_stop_cuts_a_long_trim_short() {
    let gate = Gate::new().unwrap();
    let disk = FaultyDisk::new(Arc::new(RamDisk::new(1 << 20).unwrap()));
    let disk = disk.rule(Rule::hold(0..1 << 20, &gate));
    let machine = Machine::new(Arc::new(disk.clone()));
    // 64 ranges of one sector each.
    for index in 0..64_u64 {
        machine.memory.write_obj(Gpa(u64::from(DATA) + index * 8), &(index | 1 << 48)).unwrap();
    }
    machine.memory.write_obj(Gpa(TABLE.into()), &DATA).unwrap();
    machine.memory.write_obj(Gpa(u64::from(TABLE) + 4), &0x8000_0200_u32).unwrap();
    machine.master.write(4, &TABLE.to_le_bytes());
    machine.command.write(1, &[1]);
    machine.command.write(2, &[0]);
    machine.command(0x06, 0, 1);
    machine.master.write(0, &[1]);
    while disk.seen().is_empty() {
        std::thread::yield_now();
    }
    machine._ide.ports[0].stop.store(true, Ordering::Release);
    gate.open(1).unwrap();
    drop(machine);
    assert_eq!(disk.seen().len(), 1, "ranges that were discarded");
}

#[test]
fn a_disk_without_discard_does_not_trim() {
    let disk = RamDisk::new(1 << 20).unwrap().with(|geometry| geometry.discard = false);
    let machine = Machine::new(Arc::new(disk));
    machine.command(0xec, 0, 0);
    machine.line.wait();
    let mut page = [0; 512];
    machine.command.read_string(0, 2, &mut page);
    let word = |at: usize| u16::from_le_bytes([page[at * 2], page[at * 2 + 1]]);
    assert_eq!((word(169), word(105), word(69)), (0, 0, 0));
    machine.command.write(1, &[1]);
    machine.command(0x06, 0, 1);
    machine.line.wait();
    assert_eq!((machine.read(7), machine.read(1)), (0x51, 0x04), "ABRT");
}

#[test]
fn a_processor_does_not_wait_for_the_disk() {
    let gate = Gate::new().unwrap();
    let disk = FaultyDisk::new(Arc::new(RamDisk::new(1 << 20).unwrap()))
        .rule(Rule::fail(0..512, BlockErrorKind::Io))
        .rule(Rule::hold(512..1024, &gate));
    let machine = Machine::new(Arc::new(disk));
    machine.command(0x20, 1, 1);
    assert_eq!(machine.read(7), 0x80);
    // A reset takes effect when the disk lets go.
    machine.control.write(0, &[4]);
    machine.control.write(0, &[0]);
    assert_eq!(machine.read(7), 0x80);
    gate.open(1).unwrap();
    while machine.read(7) & 0x80 != 0 {
        std::thread::yield_now();
    }
    machine.command(0x20, 0, 1);
    machine.line.wait();
    assert_eq!((machine.read(7), machine.read(1)), (0x51, 0x40));
}

#[test]
fn what_another_path_writes_is_protected_here() {
    let disk: Arc<dyn Disk> = Arc::new(RamDisk::new(1 << 20).unwrap());
    let [ide, other] = paths::split(&disk, "disk", ["IDE", "another"]);
    let (machine, second) = (Machine::new(ide), Machine::new(other));
    assert_eq!(second.dma(0xca, 0, 0, 2, 1024), (0x50, 4));
    assert_eq!(machine.dma(0xc8, 8, 0, 2, 1024), (0x50, 4));
    // Not carried out, and no fault of the device.
    assert_eq!(machine.dma(0xca, 0, 0, 2, 1024).0, 0x51);
    assert_eq!(machine.read(1), 0x04);
    // A reset of the channel is a new beginning, which its worker hears of.
    second.control.write(0, &[4]);
    second.control.write(0, &[0]);
    while machine.dma(0xca, 0, 0, 2, 1024) != (0x50, 4) {}
    assert_eq!(second.dma(0xca, 0, 0, 2, 1024).0, 0x51);
    drop(machine);
    assert_eq!(second.dma(0xca, 0, 0, 2, 1024), (0x50, 4));
}

#[test]
fn places_are_found_and_taken_once() {
    let disk = || Arc::new(RamDisk::new(1 << 20).unwrap());
    let mut disks = IdeDisks::default();
    assert_eq!(disks.attach(Some(1), Some(0), disk()), Ok((1, 0)));
    let taken = DriveError::Taken { channel: 1, device: 0 };
    assert_eq!(disks.attach(Some(1), Some(0), disk()).unwrap_err(), taken);
    for place in [(0, 0), (0, 1), (1, 1)] {
        assert_eq!(disks.attach(None, None, disk()), Ok(place));
    }
    assert_eq!(disks.attach(None, None, disk()).unwrap_err(), DriveError::Full);
    let large = RamDisk::new(1 << 20).unwrap().with(|geometry| geometry.logical_block = 4096);
    let refused = IdeDisks::default().attach(None, None, Arc::new(large)).unwrap_err();
    assert_eq!(refused, DriveError::Block(4096));
}

/// A line that is slow to rise, and knows how often somebody raised it who found it up.
#[derive(Default)]
struct SlowLine {
    up: AtomicBool,
    merged: AtomicU32,
    edges: AtomicU32,
}

impl InterruptLine for SlowLine {
    fn pulse(&self) {
        unreachable!("an IDE channel makes its edges by itself");
    }

    fn set_level(&self, high: bool) {
        if high == self.up.swap(high, Ordering::SeqCst) {
            self.merged.fetch_add(1, Ordering::SeqCst);
        }
        if high {
            self.edges.fetch_add(1, Ordering::SeqCst);
            // Long enough for the guest to answer.
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// The worker brings the first block; the guest is so fast that it has read it, and made the
/// interrupt for the second, while the worker's still has its line up.
#[test]
fn an_edge_is_not_lost_in_another() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let mut disks = IdeDisks::default();
    disks.attach(None, None, Arc::new(RamDisk::new(1 << 20).unwrap())).unwrap();
    let line = Arc::new(SlowLine::default());
    let ide = Ide::new(&memory, &disks, [line.clone(), Arc::new(Line::default())]).unwrap();
    let command = ide.command_block(0);
    for (register, value) in [(2, 2), (3, 0), (4, 0), (5, 0), (6, 0xe0), (7, 0x20)] {
        command.write(register, &[value]);
    }
    for edges in 1..=2 {
        while line.edges.load(Ordering::SeqCst) < edges {
            std::thread::yield_now();
        }
        let mut status = [0];
        command.read(7, &mut status);
        assert_eq!(status, [0x58]);
        command.read_string(0, 2, &mut [0; 512]);
    }
    drop(ide);
    assert_eq!(line.merged.load(Ordering::SeqCst), 0);
}
