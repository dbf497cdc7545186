use proptest::prelude::*;

use super::*;
use crate::ide::bits::feature;

const SECTORS: u64 = 4096;
/// What a guest's memory is to a DMA transfer in these tests.
type Memory = Vec<u8>;

/// A channel with disks in memory, and whoever does its jobs.
struct Bench {
    channel: Channel,
    disks: [Vec<u8>; 2],
    memory: Memory,
    flushes: u32,
    outcome: Option<Outcome>,
}

fn geometry() -> Geometry {
    Geometry {
        discard: true,
        discard_zeroes: true,
        id: "T-1".into(),
        ..Geometry::new(SECTORS * 512)
    }
}

impl Bench {
    fn new() -> Self {
        let mut channel = Channel::new();
        channel.attach(0, &geometry(), false).unwrap();
        channel.attach(1, &geometry(), false).unwrap();
        let disk = |seed: usize| {
            let mut disk = vec![0; SECTORS as usize * 512];
            for (number, sector) in disk.chunks_mut(512).enumerate() {
                sector.fill((number * seed) as u8);
            }
            disk
        };
        let disks = [disk(1), disk(3)];
        Self { channel, disks, memory: vec![0; 32 << 20], flushes: 0, outcome: None }
    }

    /// Does the job that there is. Returns whether there was one.
    fn work(&mut self) -> bool {
        let Some(mut job) = self.channel.take_job() else { return false };
        assert_eq!(job.buffer.len(), BUFFER);
        assert!(self.channel.take_job().is_none(), "one at a time");
        let disk = &mut self.disks[job.drive];
        let range = |offset: u64, len: u32| {
            assert!(len > 0 && len.is_multiple_of(512) && offset.is_multiple_of(512));
            offset as usize..offset as usize + len as usize
        };
        match job.work {
            Work::Read { offset, len } => {
                job.buffer[..len as usize].copy_from_slice(&disk[range(offset, len)]);
            }
            Work::Write { offset, len, .. } => {
                disk[range(offset, len)].copy_from_slice(&job.buffer[..len as usize]);
            }
            Work::ReadDma { offset, len, .. } => {
                self.memory[..len as usize].copy_from_slice(&disk[range(offset, len)]);
            }
            Work::WriteDma { offset, len, .. } => {
                disk[range(offset, len)].copy_from_slice(&self.memory[..len as usize]);
            }
            Work::Flush => self.flushes += 1,
            Work::Trim { len, .. } => assert!(len <= 8 * 512),
            Work::Send { len, .. } => {
                self.memory[..len as usize].copy_from_slice(&job.buffer[..len as usize]);
            }
        }
        let outcome = self.outcome.unwrap_or(Outcome::Done { table_left: false });
        self.channel.finish(job.buffer, outcome);
        true
    }

    fn status(&mut self) -> u8 {
        self.channel.read(7)
    }

    /// Writes a 28-bit command.
    fn command(&mut self, code: u8, lba: u32, count: u8) {
        let [low, middle, high, top] = lba.to_le_bytes();
        for (register, value) in [(2, count), (3, low), (4, middle), (5, high)] {
            self.channel.write(register, value);
        }
        self.channel.write(6, 0xe0 | top);
        self.channel.write(7, code);
    }

    /// Writes a 48-bit command.
    fn command_ext(&mut self, code: u8, lba: u64, count: u16) {
        let [b0, b1, b2, b3, b4, b5, ..] = lba.to_le_bytes();
        let [c0, c1] = count.to_le_bytes();
        for (register, value) in
            [(2, c1), (2, c0), (3, b3), (3, b0), (4, b4), (4, b1), (5, b5), (5, b2), (6, 0x40)]
        {
            self.channel.write(register, value);
        }
        self.channel.write(7, code);
    }

    fn start_dma(&mut self, command: u8) {
        self.channel.write_master(0, command, true);
        self.channel.write_master(0, command | master::START, true);
    }
}

const READY: u8 = status::DRDY | status::DSC;

#[test]
fn identify_names_the_disk() {
    let mut bench = Bench::new();
    bench.command(command::IDENTIFY_DEVICE, 0, 0);
    assert!(bench.channel.take_edge());
    assert_eq!(bench.status(), READY | status::DRQ);
    let mut page = [0; 512];
    bench.channel.read_data(&mut page);
    assert_eq!(bench.status(), READY);
    let word = |n: usize| u16::from_le_bytes([page[2 * n], page[2 * n + 1]]);
    assert_eq!(u64::from(word(60)) | u64::from(word(61)) << 16, SECTORS);
    assert_eq!(u64::from(word(100)), SECTORS);
    assert_eq!(&page[20..24], b"-T 1", "bytes are swapped in pairs");
    assert_eq!(page.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)), 0);
    assert_eq!((word(169), word(83) & 0xc000), (1, 0x4000));
}

#[test]
fn pio_reads_a_sector_at_a_time_and_interrupts_for_each() {
    let mut bench = Bench::new();
    bench.command(command::READ_SECTORS, 5, 3);
    assert_eq!(bench.status(), status::BSY);
    assert!(!bench.channel.take_edge());
    assert!(bench.work());
    for sector in 5..8_u8 {
        assert!(bench.channel.take_edge(), "{sector}");
        assert_eq!(bench.status(), READY | status::DRQ);
        assert!(!bench.channel.take_edge());
        let mut data = [0; 512];
        let (head, tail) = data.split_at_mut(2);
        bench.channel.read_data(head);
        bench.channel.read_data(tail);
        assert_eq!(data, [sector; 512]);
    }
    assert_eq!(bench.status(), READY);
    assert!(!bench.channel.take_edge() && !bench.work());
}

#[test]
fn longer_than_the_buffer() {
    let mut bench = Bench::new();
    bench.command_ext(command::READ_MULTIPLE_EXT, 1000, 600);
    let mut data = vec![0; 600 * 512];
    for chunk in data.chunks_mut(16 * 512) {
        bench.work();
        assert_eq!(bench.status(), READY | status::DRQ);
        bench.channel.read_data(chunk);
    }
    assert_eq!(bench.status(), READY);
    assert!(data == bench.disks[0][1000 * 512..1600 * 512]);

    bench.command_ext(command::WRITE_MULTIPLE_EXT, 7, 600);
    for chunk in data.chunks(16 * 512) {
        bench.work();
        assert_eq!(bench.status(), READY | status::DRQ);
        bench.channel.write_data(chunk);
    }
    assert_eq!(bench.status(), status::BSY);
    assert!(bench.work());
    assert!(bench.channel.take_edge());
    assert_eq!(bench.status(), READY);
    assert!(data == bench.disks[0][7 * 512..607 * 512]);
}

#[test]
fn dma_waits_for_both_sides() {
    for master_first in [false, true] {
        let mut bench = Bench::new();
        bench.channel.write_master(2, 0x66, true);
        if master_first {
            bench.start_dma(master::TO_MEMORY);
            assert!(!bench.work());
        }
        bench.command(command::READ_DMA, 9, 2);
        if !master_first {
            assert_eq!(bench.channel.read_control(), READY | status::DRQ);
            assert!(!bench.work());
            bench.start_dma(master::TO_MEMORY);
        }
        assert_eq!(bench.channel.read_master(2), 0x60 | master::ACTIVE);
        assert!(bench.work());
        assert!(bench.channel.take_edge());
        assert_eq!(bench.channel.read_master(2), 0x60 | master::INTERRUPT);
        assert_eq!(bench.status(), READY);
        assert_eq!(bench.memory[..1024], bench.disks[0][9 * 512..11 * 512]);
    }
}

#[test]
fn dma_needs_the_right_direction_and_the_right_to_memory() {
    let mut bench = Bench::new();
    bench.command(command::WRITE_DMA, 9, 2);
    bench.start_dma(master::TO_MEMORY);
    assert!(!bench.work());
    bench.channel.write_master(0, master::START, false);
    assert!(!bench.work());
    bench.start_dma(0);
    assert!(bench.work());
    assert_eq!(bench.disks[0][9 * 512..11 * 512], [0; 1024]);
}

#[test]
fn a_bad_table_is_an_error_of_both_sides() {
    let mut bench = Bench::new();
    bench.command(command::READ_DMA, 9, 2);
    bench.outcome = Some(Outcome::Table);
    bench.start_dma(master::TO_MEMORY);
    assert!(bench.work());
    assert!(bench.channel.take_edge());
    assert_eq!(bench.channel.read_master(2), master::INTERRUPT | master::ERROR);
    assert_eq!(bench.status(), READY | status::ERR);
    assert_eq!(bench.channel.read(1), error::ICRC | error::ABRT);
    // And the next one goes well.
    bench.outcome = None;
    bench.channel.write_master(2, 6, true);
    bench.command(command::READ_DMA, 9, 2);
    bench.start_dma(master::TO_MEMORY);
    assert!(bench.work());
    assert_eq!(bench.status(), READY);
}

#[test]
fn what_is_not_on_the_disk_is_not_found() {
    let mut bench = Bench::new();
    for (lba, count) in [(4096, 1), (4095, 2), (0x0fff_ffff, 0)] {
        for code in [command::READ_SECTORS, command::WRITE_DMA, command::READ_VERIFY] {
            bench.command(code, lba, count);
            assert_eq!(bench.status(), READY | status::ERR);
            assert_eq!(bench.channel.read(1), error::IDNF);
            assert!(!bench.work());
        }
    }
    bench.command_ext(command::READ_DMA_EXT, (1 << 48) - 1, 0);
    assert_eq!(bench.channel.read(1), error::IDNF);
}

#[test]
fn the_hosts_failure_is_the_disks() {
    let mut bench = Bench::new();
    bench.outcome = Some(Outcome::Disk(BlockErrorKind::Io));
    bench.command(command::READ_SECTORS, 0x321, 1);
    bench.work();
    assert_eq!(bench.status(), READY | status::ERR);
    assert_eq!(bench.channel.read(1), error::UNC);
    assert_eq!((bench.channel.read(3), bench.channel.read(4)), (0x21, 3), "where it was");
    bench.command(command::WRITE_SECTORS, 1, 1);
    bench.channel.write_data(&[0; 512]);
    bench.work();
    assert_eq!(bench.status(), READY | status::ERR | status::DF);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let mut bench = Bench::new();
    bench.command(command::READ_SECTORS, 0, 1);
    let job = bench.channel.take_job().unwrap();
    bench.channel.write_control(control::SRST);
    assert_eq!(bench.status(), status::BSY);
    bench.channel.write_control(0);
    assert_eq!(bench.status(), status::BSY);
    bench.channel.finish(job.buffer, Outcome::Done { table_left: false });
    assert_eq!(bench.status(), READY);
    assert!(!bench.channel.take_edge());
    let signature = [1, 2, 3, 4, 5].map(|register| bench.channel.read(register));
    assert_eq!(signature, [1, 1, 1, 0, 0]);
    assert!(bench.channel.take_job().is_none());
}

#[test]
fn absent_drives_are_silent() {
    let mut channel = Channel::new();
    channel.attach(0, &geometry(), false).unwrap();
    channel.write(6, 0xb0);
    channel.write(2, 0x55);
    channel.write(7, command::IDENTIFY_DEVICE);
    assert_eq!((channel.read(2), channel.read(7), channel.take_edge()), (0, 0, false));
    channel.write(6, 0xa0);
    assert_eq!((channel.read(2), channel.read(7)), (0x55, READY));
}

#[test]
fn a_channel_without_drives_hears_no_command() {
    let mut channel = Channel::new();
    for code in 0..=255 {
        for device in [0xa0, 0xb0] {
            channel.write(6, device);
            channel.write(1, 1);
            channel.write(7, code);
            channel.write_master(0, master::START, true);
            channel.write_data(&[0; 512]);
            let mut data = [0x5a; 512];
            channel.read_data(&mut data);
            assert_eq!(data, [0x5a; 512], "nobody drives the bus");
            assert!(!channel.has_job() && !channel.take_edge(), "{code:#x}");
            assert_eq!(channel.read(7), 0);
            channel.write_master(0, 0, true);
        }
    }
    channel.write_control(control::SRST);
    assert_eq!(channel.read_control(), 0);
}

#[test]
fn settings_show_in_identify() {
    let mut bench = Bench::new();
    let mut set = |feature: u8, count: u8| {
        bench.channel.write(1, feature);
        bench.command(command::SET_FEATURES, 0, count);
        bench.work();
        bench.status() & status::ERR == 0
    };
    assert!(set(feature::TRANSFER_MODE, 0x42));
    assert!(!set(feature::TRANSFER_MODE, 0x47));
    assert!(!set(feature::TRANSFER_MODE, 0x10));
    assert!(set(feature::DISABLE_WRITE_CACHE, 0));
    assert!(!set(0x33, 0));
    bench.command(command::SET_MULTIPLE, 0, 3);
    assert_eq!(bench.status(), READY | status::ERR);
    bench.command(command::SET_MULTIPLE, 0, 8);
    bench.command(command::IDENTIFY_DEVICE, 0, 0);
    let mut page = [0; 512];
    bench.channel.read_data(&mut page);
    let word = |n: usize| u16::from_le_bytes([page[2 * n], page[2 * n + 1]]);
    assert_eq!((word(88), word(59), word(85) & 0x20), (0x043f, 0x0108, 0));
    assert_eq!(bench.flushes, 1);
    // Without a cache, a write is done when it is on the medium.
    bench.command(command::WRITE_SECTORS, 0, 1);
    bench.channel.write_data(&[0; 512]);
    let job = bench.channel.take_job().unwrap();
    assert_eq!(job.work, Work::Write { offset: 0, len: 512, fua: true });
}

#[test]
fn diagnostics_pass_and_show_the_signature() {
    let mut bench = Bench::new();
    bench.command(0x33, 0x12_3456, 7); // no such command
    assert_eq!(bench.status(), READY | status::ERR);
    assert_ne!(bench.channel.read(1), error::DIAGNOSTICS_PASSED);
    bench.command(command::EXECUTE_DIAGNOSTIC, 0x12_3456, 7);
    assert_eq!(bench.status(), READY);
    // Drive 0 is well, there is one, and it is a disk.
    let registers = [1, 2, 3, 4, 5].map(|register| bench.channel.read(register));
    assert_eq!(registers, [error::DIAGNOSTICS_PASSED, 1, 1, 0, 0]);
}

#[test]
fn smart_wants_its_key() {
    let mut bench = Bench::new();
    bench.channel.write(1, feature::SMART_RETURN_STATUS);
    bench.command(command::SMART, 0, 0);
    assert_eq!(bench.status(), READY | status::ERR);
    bench.channel.write(1, feature::SMART_RETURN_STATUS);
    bench.command(command::SMART, 0xc2_4f00, 0);
    assert_eq!(bench.status(), READY);
    assert_eq!((bench.channel.read(4), bench.channel.read(5)), (0x4f, 0xc2), "well");
}

#[test]
fn logs_have_a_directory_and_no_pages_beyond() {
    fn pages(bench: &mut Bench) -> Vec<u8> {
        let mut data = Vec::new();
        while bench.status() == READY | status::DRQ {
            let mut page = [0; 512];
            bench.channel.read_data(&mut page);
            data.extend(page);
        }
        assert_eq!(bench.status(), READY);
        data
    }
    let mut bench = Bench::new();
    bench.command_ext(command::READ_LOG_EXT, 0, 1);
    let directory = pages(&mut bench);
    assert_eq!((directory.len(), &directory[..2], directory[0x60]), (512, &[1, 0][..], 2));
    bench.channel.write(1, feature::SMART_READ_LOG);
    bench.command(command::SMART, 0xc2_4f00, 1);
    assert_eq!(pages(&mut bench), directory);

    bench.command_ext(command::READ_LOG_EXT, 0x30, 2);
    let log = pages(&mut bench);
    bench.command(command::IDENTIFY_DEVICE, 0, 0);
    assert_eq!(log[512..], pages(&mut bench));
    bench.command_ext(command::READ_LOG_EXT, 0x0130, 1);
    assert_eq!(pages(&mut bench), log[512..], "the second page alone");
    // No pages, too many, one behind the last by either byte of its number, and no such log.
    for (lba, count) in [(0x30, 0), (0x30, 3), (0x0230, 1), (0x01_0000_0030, 1), (3, 1)] {
        bench.command_ext(command::READ_LOG_EXT, lba, count);
        assert_eq!(bench.status(), READY | status::ERR, "{lba:#x} {count}");
        assert_eq!(bench.channel.read(1), error::ABRT);
    }
}

#[test]
fn cylinders_heads_and_sectors() {
    let mut bench = Bench::new();
    // Cylinder 1, head 2, sector 3 of 16 heads and 63 sectors.
    for (register, value) in [(2, 1), (3, 3), (4, 1), (5, 0), (6, 0xa2), (7, command::READ_SECTORS)]
    {
        bench.channel.write(register, value);
    }
    let job = bench.channel.take_job().unwrap();
    assert_eq!(job.work, Work::Read { offset: ((16 + 2) * 63 + 2) * 512, len: 512 });
}

/// A channel with a CD-ROM drive at place 0, whose disc is the bench's disk 0.
fn cd_bench() -> Bench {
    let mut bench = Bench::new();
    bench.channel.attach(0, &geometry(), true).unwrap();
    bench
}

impl Bench {
    /// Sends a command block. Data comes in blocks of `limit` bytes, or by DMA if it is 0.
    fn packet(&mut self, cdb: [u8; 12], limit: u16) {
        let [low, high] = limit.to_le_bytes();
        for (register, value) in
            [(1, u8::from(limit == 0)), (4, low), (5, high), (6, 0), (7, command::PACKET)]
        {
            self.channel.write(register, value);
        }
        assert_eq!((self.status(), self.channel.read(2)), (READY | status::DRQ, reason::COMMAND));
        assert!(!self.channel.take_edge());
        self.channel.write_data(&cdb);
    }

    /// The data of a command by PIO, as its blocks come.
    fn packet_data(&mut self) -> Vec<Vec<u8>> {
        let mut blocks = Vec::new();
        loop {
            self.work();
            assert!(self.channel.take_edge());
            if self.status() & status::DRQ == 0 {
                assert_eq!(self.channel.read(2), reason::STATUS);
                return blocks;
            }
            assert_eq!(self.channel.read(2), reason::TO_GUEST);
            let len = u16::from_le_bytes([self.channel.read(4), self.channel.read(5)]);
            let mut block = vec![0; len.into()];
            self.channel.read_data(&mut block);
            blocks.push(block);
        }
    }
}

/// READ(10).
fn read_10(first: u8, count: u8) -> [u8; 12] {
    [0x28, 0, 0, 0, 0, first, 0, 0, count, 0, 0, 0]
}

#[test]
fn a_cd_shows_what_it_is() {
    let mut bench = cd_bench();
    let signature = [2, 3, 4, 5, 7].map(|register| bench.channel.read(register));
    assert_eq!(signature, [1, 1, 0x14, 0xeb, 0]);
    bench.command(command::IDENTIFY_DEVICE, 0, 0);
    assert_eq!(bench.status() & status::ERR, status::ERR);
    assert_eq!((bench.channel.read(4), bench.channel.read(5)), (0x14, 0xeb));
    bench.command(command::IDENTIFY_PACKET_DEVICE, 0, 0);
    let mut page = [0; 512];
    bench.channel.read_data(&mut page);
    assert_eq!(page[..2], [0xc0, 0x85]);
}

#[test]
fn a_cd_is_read_by_pio_and_dma() {
    let mut bench = cd_bench();
    bench.packet(read_10(3, 5), 4096);
    let blocks = bench.packet_data();
    assert_eq!(blocks.iter().map(Vec::len).collect::<Vec<_>>(), [4096, 4096, 2048]);
    assert!(blocks.concat() == bench.disks[0][3 * 2048..8 * 2048]);
    // More than the buffer holds.
    bench.packet(read_10(0, 200), 0xffff);
    assert!(bench.packet_data().concat() == bench.disks[0][..200 * 2048]);

    bench.packet(read_10(9, 2), 0);
    bench.start_dma(master::TO_MEMORY);
    assert!(bench.work());
    assert!(bench.channel.take_edge());
    assert_eq!((bench.status(), bench.channel.read(2)), (READY, reason::STATUS));
    assert!(bench.memory[..4096] == bench.disks[0][9 * 2048..11 * 2048]);
    bench.packet([0x12, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0], 0);
    bench.start_dma(master::TO_MEMORY);
    assert!(bench.work());
    assert_eq!(bench.memory[8..15], *b"Partita");
}

#[test]
fn a_cd_has_sense_for_what_fails() {
    let mut bench = cd_bench();
    let mut beyond = read_10(255, 1);
    beyond[4] = 4;
    bench.packet(beyond, 2048);
    assert!(bench.packet_data().is_empty());
    assert_eq!(bench.status(), READY | status::ERR);
    assert_eq!(bench.channel.read(1), 5 << 4 | error::ABRT);
    bench.outcome = Some(Outcome::Disk(BlockErrorKind::Io));
    bench.packet(read_10(0, 1), 2048);
    assert!(bench.packet_data().is_empty());
    assert_eq!(bench.channel.read(1), 3 << 4 | error::ABRT);
    bench.packet([3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0], 64);
    let sense = bench.packet_data().concat();
    assert_eq!((sense[2], sense[12]), (3, 0x11));
}

/// What a guest may do.
#[derive(Clone, Debug)]
enum Access {
    Read(u8),
    Write(u8, u8),
    Control(u8),
    ReadData(usize),
    WriteData(usize),
    Master(u8, u8, bool),
    Work,
    Fail(Outcome),
}

fn access() -> impl Strategy<Value = Access> {
    use Access::*;
    let code = prop_oneof![
        any::<u8>(),
        prop::sample::select(vec![
            0x06, 0x20, 0x24, 0x25, 0x29, 0x30, 0x34, 0x35, 0x39, 0x40, 0x90, 0x91, 0xb0, 0xc4,
            0xc5, 0xc6, 0xc8, 0xca, 0xe7, 0xec, 0xef, 0x08, 0xa0, 0xa0, 0xa1,
        ]),
    ];
    prop_oneof![
        2 => (1_u8..8).prop_map(Read),
        4 => (1_u8..7, prop_oneof![0_u8..4, any::<u8>()]).prop_map(|(r, v)| Write(r, v)),
        4 => code.prop_map(|code| Write(7, code)),
        1 => any::<u8>().prop_map(Control),
        3 => (0_usize..9000).prop_map(ReadData),
        3 => (0_usize..9000).prop_map(WriteData),
        3 => (0_u8..8, any::<u8>(), any::<bool>()).prop_map(|(r, v, b)| Master(r, v, b)),
        4 => Just(Work),
        1 => prop::sample::select(vec![
            Outcome::Table,
            Outcome::Range,
            Outcome::Disk(BlockErrorKind::Io),
            Outcome::Done { table_left: true },
        ])
        .prop_map(Fail),
    ]
}

proptest! {
    #[test]
    fn any_order_of_accesses_leaves_a_drive_that_can_be_reset(
        accesses in prop::collection::vec(access(), 0..200),
        cd in any::<bool>(),
    ) {
        let mut bench = if cd { cd_bench() } else { Bench::new() };
        let mut data = vec![0xa5; 9000];
        for access in accesses {
            match access {
                Access::Read(register) => drop(bench.channel.read(register)),
                Access::Write(register, value) => bench.channel.write(register, value),
                Access::Control(value) => bench.channel.write_control(value),
                Access::ReadData(len) => bench.channel.read_data(&mut data[..len]),
                Access::WriteData(len) => bench.channel.write_data(&data[..len]),
                Access::Master(register, value, may) => {
                    bench.channel.write_master(register, value, may);
                }
                Access::Work => drop(bench.work()),
                Access::Fail(outcome) => {
                    bench.outcome = Some(outcome);
                    bench.work();
                    bench.outcome = None;
                }
            }
            let status = bench.channel.read_control();
            prop_assert!(status & status::BSY == 0 || status == status::BSY);
            // Busy without a job would be for ever.
            prop_assert!(
                status & status::BSY == 0 || bench.channel.in_reset() || bench.channel.has_job()
            );
            bench.channel.take_edge();
        }
        bench.channel.write_control(control::SRST);
        bench.channel.write_control(0);
        while bench.work() {}
        if cd {
            prop_assert_eq!(bench.status(), 0);
            bench.packet([0x12, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0], 64);
        } else {
            prop_assert_eq!(bench.status(), READY);
            bench.command(command::READ_SECTORS, 17, 1);
            prop_assert!(bench.work());
        }
        prop_assert_eq!(bench.status(), READY | status::DRQ);
    }
}

/// A disk at place 0 and a CD-ROM drive at place 1.
fn disk_and_cd() -> Bench {
    let mut bench = Bench::new();
    bench.channel.attach(1, &geometry(), true).unwrap();
    bench
}

impl Bench {
    /// Selects drive 1 and has it read a block of its disc, up to where the job is to be done.
    fn read_of_drive_1(&mut self, features: u8) {
        self.channel.write(6, device::DEV);
        for (register, value) in [(1, features), (4, 0), (5, 8), (7, command::PACKET)] {
            self.channel.write(register, value);
        }
        self.channel.write_data(&read_10(0, 1));
    }

    /// Error, count and the address registers.
    fn signature(&mut self) -> [u8; 5] {
        [1, 2, 3, 4, 5].map(|register| self.channel.read(register))
    }
}

const DISK_SIGNATURE: [u8; 5] = [1, 1, 1, 0, 0];
const PACKET_SIGNATURE: [u8; 5] = [1, 1, 1, 0x14, 0xeb];

#[test]
fn a_device_reset_of_a_busy_packet_device_is_that_device_s_alone() {
    for dma in [0, 1] {
        let mut bench = disk_and_cd();
        // Something that a reset of the disk would undo.
        bench.command(command::READ_SECTORS, 0x12_3456, 7);
        let before = (bench.channel.read(1), bench.status());
        assert_eq!(before, (error::IDNF, READY | status::ERR));
        bench.read_of_drive_1(dma);
        if dma != 0 {
            bench.start_dma(master::TO_MEMORY);
        }
        assert_eq!(bench.channel.read_control(), status::BSY);
        bench.channel.write(7, command::DEVICE_RESET);
        assert_eq!(bench.channel.read_control(), status::BSY, "until the job is back");
        assert!(bench.work());
        assert!(!bench.channel.take_edge(), "it does not interrupt");
        assert_eq!(bench.channel.read(6) & device::DEV, device::DEV, "it stays selected");
        assert_eq!((bench.signature(), bench.status()), (PACKET_SIGNATURE, 0));
        bench.channel.write(6, 0);
        assert_eq!((bench.channel.read(1), bench.status()), before, "the disk's state");
        assert!(!bench.channel.take_anew(), "the channel has not begun anew");
        // Both go on.
        bench.read_of_drive_1(0);
        assert!(bench.work() && bench.channel.take_edge());
        assert_eq!(bench.status() & status::DRQ, status::DRQ);
    }
}

#[test]
fn a_device_reset_leaves_the_other_drive_s_command_under_way() {
    let mut bench = disk_and_cd();
    bench.command(command::READ_SECTORS, 5, 1);
    assert!(bench.work());
    bench.channel.write(6, device::DEV);
    bench.channel.write(7, command::DEVICE_RESET);
    assert_eq!((bench.signature(), bench.channel.read_control()), (PACKET_SIGNATURE, 0));
    assert!(bench.channel.take_edge(), "the disk's interrupt");
    bench.channel.write(6, 0xe0);
    let mut data = [0; 512];
    assert_eq!(bench.status(), READY | status::DRQ);
    bench.channel.read_data(&mut data);
    assert_eq!((data, bench.status()), ([5; 512], READY));

    // The same before a transfer by DMA.
    bench.command(command::READ_DMA, 6, 1);
    bench.channel.write(6, device::DEV);
    bench.channel.write(7, command::DEVICE_RESET);
    bench.channel.write(6, 0xe0);
    bench.start_dma(master::TO_MEMORY);
    assert!(bench.work() && bench.channel.take_edge());
    assert_eq!((bench.status(), bench.memory[0]), (READY, 6));
}

/// SRST, and EXECUTE DEVICE DIAGNOSTIC once nobody is busy, concern both drives, and drive 0 is
/// selected after them; a DEVICE RESET that waits gives way.
#[test]
fn other_resets_concern_both_drives() {
    for diagnostic in [false, true] {
        let mut bench = disk_and_cd();
        bench.command(command::READ_SECTORS, 0x12_3456, 7);
        bench.read_of_drive_1(0);
        bench.channel.write(7, command::DEVICE_RESET);
        if diagnostic {
            bench.channel.write(7, command::EXECUTE_DIAGNOSTIC); // not heard
            assert!(bench.work() && !bench.channel.take_edge());
            assert_eq!(bench.channel.read(6) & device::DEV, device::DEV);
            bench.channel.write(7, command::EXECUTE_DIAGNOSTIC);
            assert!(bench.channel.take_edge());
        } else {
            bench.channel.write_control(control::SRST);
            bench.channel.write_control(0);
            assert!(bench.work() && !bench.channel.take_edge());
            assert!(bench.channel.take_anew());
        }
        assert_eq!(bench.channel.read(6) & device::DEV, 0);
        assert_eq!((bench.signature(), bench.status()), (DISK_SIGNATURE, READY));
        bench.channel.write(6, device::DEV);
        assert_eq!((bench.signature(), bench.status()), (PACKET_SIGNATURE, 0));
    }
}
