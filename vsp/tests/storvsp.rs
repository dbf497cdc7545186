//! Client against server: the controller's worker on one side of a real, double-mapped ring, a
//! guest's storvsc, written out here, on the other. No VM is involved.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use backends::block::Disk;
use backends::paths;
use backends::ram::RamDisk;
use backends::testing::{FaultyDisk, Gate, Rule};
use hypervisor::Gpa;
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::vstor::{
    DataDirection, NtStatus, Operation, Properties, ScsiRequest, SrbStatus, VstorPacket,
};
use vmbus_server::Device;
use vmbus_server::testing::{GuestEnd, STORVSC_RING_PAGES, pair};
use vsp::storvsp::{Controller, ControllerBuilder};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const PATIENCE: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;

/// A guest with one open channel.
struct Guest {
    end: GuestEnd,
    next_id: u64,
    /// The SCSI target that commands are for.
    target: u8,
}

/// What came back for a command.
#[derive(Debug)]
struct Answer {
    id: u64,
    srb_status: SrbStatus,
    scsi_status: u8,
    transferred: u32,
    sense: Vec<u8>,
}

impl Guest {
    /// Opens a channel of a controller with these disks, and shakes hands as Linux does.
    fn new(disks: Vec<Arc<dyn Disk>>) -> Self {
        let mut guest = Self::unshaken(disks, 4);
        guest.shake_hands();
        guest
    }

    fn unshaken(disks: Vec<Arc<dyn Disk>>, vps: u32) -> Self {
        let (channel, end) = pair(16 * MIB);
        let mut builder = ControllerBuilder::new(0);
        for disk in disks {
            builder.attach(None, disk).unwrap();
        }
        builder.build(vps).open(channel).unwrap();
        Self { end, next_id: 1, target: 0 }
    }

    /// Opens the channel of a disk that is also device 1 of IDE channel 1.
    fn with_ide_disk(disk: Arc<dyn Disk>) -> Self {
        let (channel, end) = pair(16 * MIB);
        Controller::ide(1, 1, disk, 4).open(channel).unwrap();
        let mut guest = Self { end, next_id: 1, target: 1 };
        guest.shake_hands();
        guest
    }

    fn shake_hands(&mut self) {
        self.ask(Operation::BeginInitialization, &[]);
        self.ask(Operation::QueryProtocolVersion, &[0x02, 0x06, 0, 0]);
        self.ask(Operation::QueryProperties, &[]);
        self.ask(Operation::EndInitialization, &[]);
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Sends a packet of the handshake, which must succeed, and returns the answer.
    fn ask(&mut self, operation: Operation, body: &[u8]) -> VstorPacket {
        let packet = self.ask_anyway(operation, body);
        assert_eq!(packet.status, NtStatus::Success, "{operation:?}");
        packet
    }

    fn ask_anyway(&mut self, operation: Operation, body: &[u8]) -> VstorPacket {
        let id = self.id();
        let packet = VstorPacket::request(operation, body);
        self.end.send(PacketKind::InBand, PacketFlags::COMPLETION_REQUESTED, id, packet.as_bytes());
        let (got, packet) = self.receive();
        assert_eq!(got, id);
        packet
    }

    fn receive(&mut self) -> (u64, VstorPacket) {
        let mut buffer = [0; 256];
        for _ in 0..100 {
            if let Some(packet) = self.end.wait(&mut buffer, PATIENCE / 100) {
                assert_eq!(packet.kind, PacketKind::Completion);
                // Linux's buffer holds exactly this much.
                assert_eq!(packet.payload.len(), 64);
                let answer = VstorPacket::read_from_bytes(packet.payload).unwrap();
                assert_eq!(answer.operation, Operation::CompleteIo);
                return (packet.transaction_id, answer);
            }
        }
        panic!("no answer");
    }

    /// Sends a command. `data` is where in guest memory its data lies: (address, length) pieces.
    fn send(&mut self, lun: u8, cdb: &[u8], direction: DataDirection, data: &[(u64, u32)]) -> u64 {
        let transfer_len: u32 = data.iter().map(|piece| piece.1).sum();
        self.send_claiming(lun, cdb, direction, data, transfer_len)
    }

    fn send_claiming(
        &mut self,
        lun: u8,
        cdb: &[u8],
        direction: DataDirection,
        data: &[(u64, u32)],
        transfer_len: u32,
    ) -> u64 {
        let id = self.id();
        let mut request = ScsiRequest::new_zeroed();
        request.length = 52;
        (request.target, request.lun) = (self.target, lun);
        request.cdb_len = cdb.len() as u8;
        request.sense_len = 20;
        request.data_in = direction;
        request.transfer_len = transfer_len;
        request.cdb_or_sense[..cdb.len()].copy_from_slice(cdb);
        let packet = VstorPacket::request(Operation::ExecuteSrb, request.as_bytes());
        if data.is_empty() {
            let flags = PacketFlags::COMPLETION_REQUESTED;
            self.end.send(PacketKind::InBand, flags, id, packet.as_bytes());
        } else {
            let pages: Vec<Vec<u64>> = data
                .iter()
                .map(|(at, len)| {
                    let end = (at + u64::from(*len)).div_ceil(4096);
                    (at / 4096..end).collect()
                })
                .collect();
            let ranges: Vec<(u32, u32, &[u64])> = data
                .iter()
                .zip(&pages)
                .map(|((at, len), pages)| (*len, (at % 4096) as u32, pages.as_slice()))
                .collect();
            self.end.send_gpa_direct(id, &ranges, packet.as_bytes());
        }
        id
    }

    fn answer(&mut self) -> Answer {
        let (id, packet) = self.receive();
        assert_eq!(packet.status, NtStatus::Success);
        let request: ScsiRequest = packet.body().unwrap();
        Answer {
            id,
            srb_status: request.srb_status,
            scsi_status: request.scsi_status,
            transferred: request.transfer_len,
            sense: request.cdb_or_sense[..usize::from(request.sense_len.min(20))].to_vec(),
        }
    }

    fn run(&mut self, cdb: &[u8], direction: DataDirection, data: &[(u64, u32)]) -> Answer {
        let id = self.send(0, cdb, direction, data);
        let answer = self.answer();
        assert_eq!(answer.id, id);
        answer
    }

    fn read(&mut self, lba: u32, blocks: u16, at: u64) -> Answer {
        let cdb = rw10(0x28, lba, blocks);
        self.run(&cdb, DataDirection::Read, &[(at, u32::from(blocks) * 512)])
    }

    fn write(&mut self, lba: u32, blocks: u16, at: u64) -> Answer {
        let cdb = rw10(0x2a, lba, blocks);
        self.run(&cdb, DataDirection::Write, &[(at, u32::from(blocks) * 512)])
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.end.memory.write(Gpa(at), bytes).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.end.memory.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    /// The worker has given the channel up, or does so now.
    fn is_closed(&mut self) -> bool {
        self.end.wait_closed(PATIENCE)
    }
}

fn rw10(opcode: u8, lba: u32, blocks: u16) -> [u8; 10] {
    let mut cdb = [0; 10];
    cdb[0] = opcode;
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

fn good(answer: &Answer, transferred: u32) {
    assert_eq!(answer.srb_status, SrbStatus::Success, "{answer:?}");
    assert_eq!((answer.scsi_status, answer.transferred), (0, transferred), "{answer:?}");
}

/// Check condition with this sense key, code and qualifier.
fn refused(answer: &Answer, sense: [u8; 3]) {
    assert_eq!(answer.srb_status, SrbStatus::ErrorWithSense, "{answer:?}");
    assert_eq!(answer.scsi_status, 2);
    assert_eq!([answer.sense[2] & 0xf, answer.sense[12], answer.sense[13]], sense, "{answer:?}");
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed).collect()
}

fn ram(size: u64) -> (RamDisk, Arc<dyn Disk>) {
    let disk = RamDisk::new(size).unwrap();
    (disk.clone(), Arc::new(disk))
}

#[test]
fn written_and_read_back_through_scattered_pages() {
    let (ram, disk) = ram(4 * MIB);
    let mut guest = Guest::new(vec![disk]);
    let data = pattern(64 * 512, 7);
    // Three pieces that begin and end in the middle of pages.
    let pieces = [(0x10_0200, 0x1200), (0x20_0e00, 0x0400), (0x30_0000, 0x6a00)];
    let mut from = 0;
    for (at, len) in pieces {
        guest.put(at, &data[from..from + len as usize]);
        from += len as usize;
    }
    assert_eq!(from, data.len());
    let answer = guest.run(&rw10(0x2a, 100, 64), DataDirection::Write, &pieces);
    good(&answer, 64 * 512);
    let mut on_disk = vec![0; data.len()];
    ram.read(100 * 512, &mut on_disk);
    assert_eq!(on_disk, data);

    good(&guest.read(100, 64, 0x40_0000), 64 * 512);
    assert_eq!(guest.get(0x40_0000, data.len()), data);
}

#[test]
fn many_at_once_each_get_their_own_data() {
    let (ram, disk) = ram(8 * MIB);
    let mut guest = Guest::new(vec![disk]);
    for i in 0..200u32 {
        ram.write(u64::from(i) * 4096, &[i as u8; 4096]);
    }
    let base = 0x10_0000;
    let mut waiting = std::collections::HashMap::new();
    for round in 0..5u32 {
        for i in 0..200u32 {
            let lba = ((i * 7 + round) % 200) * 8;
            let at = base + u64::from(i) * 4096;
            let id = guest.send(0, &rw10(0x28, lba, 8), DataDirection::Read, &[(at, 4096)]);
            waiting.insert(id, (at, (lba / 8) as u8));
        }
        for _ in 0..200 {
            let answer = guest.answer();
            good(&answer, 4096);
            let (at, expected) = waiting.remove(&answer.id).expect("an id that was sent, once");
            assert_eq!(guest.get(at, 4096), vec![expected; 4096]);
        }
    }
}

#[test]
fn properties_come_before_the_end_of_the_handshake() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::unshaken(vec![disk], 4);
    assert_eq!(
        guest.ask_anyway(Operation::CreateSubChannels, &[3, 0]).status,
        NtStatus::InvalidDeviceState
    );
    guest.ask(Operation::BeginInitialization, &[]);
    guest.ask(Operation::QueryProtocolVersion, &[0x02, 0x06, 0, 0]);
    let properties: Properties = guest.ask(Operation::QueryProperties, &[]).body().unwrap();
    assert_eq!((properties.max_channels, properties.max_transfer % 4096), (3, 0));
    assert!(properties.max_transfer > 0);
    guest.ask(Operation::EndInitialization, &[]);
}

#[test]
fn sub_channels_are_offered_as_asked() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    guest.ask(Operation::CreateSubChannels, &[3, 0]);
    let deadline = Instant::now() + PATIENCE;
    while guest.end.subchannels_requested() != Some(3) {
        assert!(Instant::now() < deadline, "no sub-channels were offered");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_ide_disk_is_the_target_that_its_offer_says() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::with_ide_disk(disk);
    good(&guest.read(0, 8, 0x10_0000), 4096);
    let channels = guest.ask_anyway(Operation::CreateSubChannels, &[1, 0]);
    assert_ne!(channels.status, NtStatus::Success, "it has one channel");
    guest.target = 0;
    refused(&guest.read(0, 8, 0x10_0000), [5, 0x25, 0]);
}

#[test]
fn a_disk_that_is_written_by_another_path_is_protected() {
    let (ram, disk) = ram(MIB);
    let [ide, scsi] = paths::split(&disk, "disk", ["IDE", "the VMBus"]);
    // Two guests stand for two drivers of one: a channel each, to one disk.
    let mut first = Guest::with_ide_disk(ide);
    let mut second = Guest::new(vec![scsi]);
    first.put(0x10_0000, &[1; 512]);
    second.put(0x10_0000, &[2; 512]);
    good(&first.write(0, 1, 0x10_0000), 512);
    refused(&second.write(0, 1, 0x10_0000), [7, 0x27, 0]);
    good(&second.read(0, 1, 0x20_0000), 512);
    assert_eq!(second.get(0x20_0000, 512), [1; 512]);
    good(&second.run(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], DataDirection::None, &[]), 0);

    // The first driver goes away; its writing ends with it.
    first.end.request_stop();
    assert!(first.is_closed());
    good(&second.write(0, 1, 0x10_0000), 512);
    let mut sector = [0; 512];
    ram.read(0, &mut sector);
    assert_eq!(sector, [2; 512]);
}

#[test]
fn absent_luns_say_so_in_a_way_that_linux_understands() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    let id = guest.send(9, &[0x12, 0, 0, 0, 36, 0], DataDirection::Read, &[(0x10_0000, 36)]);
    let answer = guest.answer();
    assert_eq!(answer.id, id);
    good(&answer, 36);
    assert_eq!(guest.get(0x10_0000, 1), [0x7f]);
    guest.send(9, &[0; 6], DataDirection::None, &[]);
    refused(&guest.answer(), [5, 0x25, 0]);
}

#[test]
fn two_disks_do_not_mix() {
    let (first, one) = ram(MIB);
    let (second, two) = ram(2 * MIB);
    let mut guest = Guest::new(vec![one, two]);
    guest.put(0x10_0000, &[0x11; 512]);
    guest.put(0x10_1000, &[0x22; 512]);
    guest.send(0, &rw10(0x2a, 5, 1), DataDirection::Write, &[(0x10_0000, 512)]);
    good(&guest.answer(), 512);
    guest.send(1, &rw10(0x2a, 5, 1), DataDirection::Write, &[(0x10_1000, 512)]);
    good(&guest.answer(), 512);
    let mut block = [0; 512];
    first.read(5 * 512, &mut block);
    assert_eq!(block, [0x11; 512]);
    second.read(5 * 512, &mut block);
    assert_eq!(block, [0x22; 512]);
    // REPORT LUNS knows both.
    let mut cdb = [0; 12];
    cdb[0] = 0xa0;
    cdb[9] = 64;
    let answer = guest.run(&cdb, DataDirection::Read, &[(0x10_2000, 64)]);
    good(&answer, 8 + 2 * 8);
    assert_eq!(guest.get(0x10_2000, 4), [0, 0, 0, 16]);
}

#[test]
fn past_the_end_gets_sense_and_the_disk_goes_on() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    refused(&guest.read(2047, 2, 0x10_0000), [5, 0x21, 0]);
    refused(&guest.write(u32::MAX, 1, 0x10_0000), [5, 0x21, 0]);
    good(&guest.read(2047, 1, 0x10_0000), 512);
}

#[test]
fn read_only_disks_refuse_writes() {
    let ram = RamDisk::new(MIB).unwrap().with(|geometry| geometry.read_only = true);
    let mut guest = Guest::new(vec![Arc::new(ram)]);
    refused(&guest.write(0, 1, 0x10_0000), [7, 0x27, 0]);
    good(&guest.read(0, 1, 0x10_0000), 512);
}

#[test]
fn transfers_never_exceed_what_either_side_said() {
    let (ram, disk) = ram(MIB);
    ram.write(0, &pattern(8192, 3));
    let mut guest = Guest::new(vec![disk]);
    // The CDB wants 16 blocks, the packet has room for 8.
    guest.put(0x10_0000, &[0xee; 8192]);
    guest.send(0, &rw10(0x28, 0, 16), DataDirection::Read, &[(0x10_0000, 4096)]);
    let answer = guest.answer();
    assert!(answer.transferred <= 4096, "{answer:?}");
    assert_eq!(guest.get(0x10_1000, 4096), vec![0xee; 4096]);
    // The CDB wants 1 block, the packet has room for 8.
    guest.put(0x10_0000, &[0xee; 4096]);
    guest.send(0, &rw10(0x28, 0, 1), DataDirection::Read, &[(0x10_0000, 4096)]);
    let answer = guest.answer();
    assert!(answer.transferred <= 512, "{answer:?}");
    assert_eq!(guest.get(0x10_0200, 3584), vec![0xee; 3584]);
    // The request claims more than its pages have.
    let cdb = rw10(0x28, 0, 16);
    guest.send_claiming(0, &cdb, DataDirection::Read, &[(0x10_0000, 4096)], 8192);
    let answer = guest.answer();
    assert!(answer.transferred <= 4096, "{answer:?}");
    good(&guest.read(0, 1, 0x10_0000), 512);
}

#[test]
fn pages_that_do_not_exist_fail_the_request_only() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    for at in [16 * MIB, 1 << 40, 16 * MIB - 512] {
        let answer = guest.run(&rw10(0x28, 0, 2), DataDirection::Read, &[(at, 1024)]);
        assert_eq!(answer.srb_status, SrbStatus::InvalidRequest, "{at:#x} {answer:?}");
    }
    good(&guest.read(0, 1, 0x10_0000), 512);
}

#[test]
fn unmap_and_write_same() {
    let (ram, disk) = ram(MIB);
    ram.write(0, &vec![0xaa; MIB as usize]);
    let mut guest = Guest::new(vec![disk]);
    // Two descriptors: blocks 8 to 15 and 100 to 101.
    let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
    for (lba, count) in [(8u64, 8u32), (100, 2)] {
        list.extend(lba.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    guest.put(0x10_0000, &list);
    let cdb = [0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0];
    let answer = guest.run(&cdb, DataDirection::Write, &[(0x10_0000, list.len() as u32)]);
    assert_eq!(answer.srb_status, SrbStatus::Success, "{answer:?}");
    let mut bytes = vec![0; 4096];
    ram.read(8 * 512, &mut bytes);
    assert_eq!(bytes, vec![0; 4096]);
    ram.read(7 * 512, &mut bytes[..512]);
    assert_eq!(bytes[..512], [0xaa; 512]);
    // A pattern over 1000 blocks.
    let block = pattern(512, 9);
    guest.put(0x10_0000, &block);
    let answer = guest.run(&rw10(0x41, 200, 1000), DataDirection::Write, &[(0x10_0000, 512)]);
    assert_eq!(answer.srb_status, SrbStatus::Success, "{answer:?}");
    for lba in [200, 201, 700, 1199] {
        ram.read(lba * 512, &mut bytes[..512]);
        assert_eq!(bytes[..512], block, "{lba}");
    }
    for lba in [199, 1200] {
        ram.read(lba * 512, &mut bytes[..512]);
        assert_eq!(bytes[..512], [0xaa; 512], "{lba}");
    }
}

#[test]
fn a_guest_that_takes_no_answers_is_waited_for() {
    let mut guest = Guest::new(vec![ram(MIB).1]);
    // More answers than the ring to the guest has room for, while it takes none.
    let count = 1800;
    let test_unit_ready =
        VstorPacket::request(Operation::ExecuteSrb, &[52, 0, 0, 0, 0, 0, 0, 0, 6, 20, 2]);
    let mut ids: Vec<u64> = (0..count).map(|_| guest.id()).collect();
    for id in &ids {
        let flags = PacketFlags::COMPLETION_REQUESTED;
        let packet = [test_unit_ready.as_bytes()];
        // The worker takes packets as long as it can answer them.
        while guest.end.outgoing.push(PacketKind::InBand, flags, *id, &packet).is_err() {
            guest.end.publish();
            thread::yield_now();
        }
    }
    guest.end.publish();
    let control = Gpa(16 * MIB - STORVSC_RING_PAGES * 4096);
    let wanted = |guest: &Guest| guest.end.memory.read_obj::<u32>(Gpa(control.0 + 12)).unwrap();
    let until = Instant::now() + PATIENCE;
    while wanted(&guest) == 0 {
        assert!(Instant::now() < until, "the worker does not ask for room");
        thread::yield_now();
    }
    for _ in 0..count {
        let (id, answer) = guest.receive();
        assert_eq!(answer.status, NtStatus::Success);
        ids.retain(|asked| *asked != id);
    }
    assert!(ids.is_empty(), "{} not answered", ids.len());
    guest.ask_anyway(Operation::QueryProperties, &[]);
    assert_eq!(wanted(&guest), 0, "every further answer that is taken would signal");
}

#[test]
fn resets_are_answered_after_what_was_under_way() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    let mut ids: Vec<u64> = (0..20)
        .map(|i| guest.send(0, &rw10(0x28, i, 1), DataDirection::Read, &[(0x10_0000, 512)]))
        .collect();
    let reset = guest.id();
    ids.push(reset);
    let packet = VstorPacket::request(Operation::ResetBus, &[]);
    let flags = PacketFlags::COMPLETION_REQUESTED;
    guest.end.send(PacketKind::InBand, flags, reset, packet.as_bytes());
    let answers: Vec<u64> = ids.iter().map(|_| guest.receive().0).collect();
    assert_eq!(answers.last(), Some(&reset));
    good(&guest.read(0, 1, 0x10_0000), 512);
}

#[test]
fn stopping_ends_the_worker_after_its_io() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    for i in 0..50 {
        guest.send(0, &rw10(0x28, i, 1), DataDirection::Read, &[(0x10_0000, 512)]);
    }
    guest.end.request_stop();
    assert!(guest.is_closed());
}

/// Also in the very turn in which the worker has heard another ring of its doorbell.
#[test]
fn a_stop_is_heard_whenever_it_comes() {
    let (_, disk) = ram(MIB);
    for pause in 0..400 {
        let mut guest = Guest::new(vec![Arc::clone(&disk)]);
        guest.send(0, &rw10(0x28, 0, 1), DataDirection::Read, &[(0x10_0000, 512)]);
        (0..pause * 10).for_each(|_| std::hint::spin_loop());
        guest.end.request_stop();
        assert!(guest.is_closed(), "after a pause of {pause}");
    }
}

/// 32 parts of a pattern, each of which waits at the gate.
#[test]
fn a_stop_cuts_a_long_write_same_short() {
    let gate = Gate::new().unwrap();
    let disk = FaultyDisk::new(ram(64 * MIB).1).rule(Rule::hold(0..64 * MIB, &gate));
    let mut guest = Guest::new(vec![Arc::new(disk.clone())]);
    guest.put(0x10_0000, &pattern(512, 9));
    let mut cdb = [0; 16];
    cdb[0] = 0x93;
    cdb[10..14].copy_from_slice(&65536_u32.to_be_bytes());
    guest.send(0, &cdb, DataDirection::Write, &[(0x10_0000, 512)]);
    let until = Instant::now() + PATIENCE;
    while disk.seen().is_empty() {
        assert!(Instant::now() < until, "the command has not begun");
        thread::yield_now();
    }
    guest.end.request_stop();
    // One that has heard of the stop late may have begun another part.
    gate.open(2).unwrap();
    assert!(guest.is_closed());
    assert!(disk.seen().len() <= 2, "{} parts", disk.seen().len());
}

#[test]
fn a_disk_with_another_size_is_told_once_by_whichever_channel() {
    let (ram, disk) = ram(4 * MIB);
    ram.resize(2 * MIB);
    disk.refresh().unwrap();
    let mut builder = ControllerBuilder::new(0);
    builder.attach(None, Arc::clone(&disk)).unwrap();
    let mut controller = builder.build(2);
    let mut channels = [(), ()].map(|()| {
        let (channel, end) = pair(16 * MIB);
        controller.open(channel).unwrap();
        let mut guest = Guest { end, next_id: 1, target: 0 };
        guest.shake_hands();
        guest
    });
    let changed = [6, 0x2a, 0x09];
    let last_block = |guest: &mut Guest| {
        let read_capacity = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        good(&guest.run(&read_capacity, DataDirection::Read, &[(0x10_0000, 8)]), 8);
        u32::from_be_bytes(guest.get(0x10_0000, 4).try_into().unwrap())
    };
    let [first, second] = &mut channels;
    assert_eq!(last_block(first), 4095);
    refused(&first.read(4096, 1, 0x10_0000), [5, 0x21, 0]);

    // A guest that looks for its disks finds it by itself.
    ram.resize(4 * MIB);
    good(&first.read(0, 1, 0x10_0000), 512);
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    good(&first.run(&inquiry, DataDirection::Read, &[(0x10_0000, 36)]), 36);
    refused(&second.read(0, 1, 0x10_0000), changed);
    good(&first.read(0, 1, 0x10_0000), 512);
    good(&second.read(8191, 1, 0x10_0000), 512);
    assert_eq!([last_block(first), last_block(second)], [8191; 2]);

    // Any other learns it when somebody has told the disk to look.
    ram.resize(MIB);
    good(&first.read(8191, 1, 0x10_0000), 512);
    disk.refresh().unwrap();
    refused(&first.write(0, 1, 0x10_0000), changed);
    for guest in &mut channels {
        refused(&guest.read(2048, 1, 0x10_0000), [5, 0x21, 0]);
        refused(&guest.write(2047, 2, 0x10_0000), [5, 0x21, 0]);
        good(&guest.write(2047, 1, 0x10_0000), 512);
    }
    // READ CAPACITY is one of those that look, and TEST UNIT READY another.
    for (cdb, size) in [(&[0; 6][..], 2 * MIB), (&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], MIB)] {
        ram.resize(size);
        refused(&channels[0].run(cdb, DataDirection::None, &[]), changed);
    }
}

#[test]
fn a_lent_thread_takes_all_packets_before_it_sleeps() {
    let gate = Arc::new(Gate::new().unwrap());
    let (_, disk) = ram(MIB);
    let disk = Arc::new(FaultyDisk::new(disk).rule(Rule::hold(0..MIB, &gate)));
    let (channel, end) = pair(16 * MIB);
    let mut builder = ControllerBuilder::new(0);
    builder.attach(None, disk).unwrap();
    let mut worker = builder.build(1).open_inline(channel).unwrap();
    let mut guest = Guest { end, next_id: 1, target: 0 };
    let version: &[u8] = &[0x02, 0x06, 0, 0];
    for (operation, body) in [
        (Operation::BeginInitialization, &[][..]),
        (Operation::QueryProtocolVersion, version),
        (Operation::EndInitialization, &[]),
    ] {
        let packet = VstorPacket::request(operation, body);
        let flags = PacketFlags::COMPLETION_REQUESTED;
        guest.end.send(PacketKind::InBand, flags, 1, packet.as_bytes());
        worker.turn(false).unwrap();
        assert_eq!(guest.receive().1.status, NtStatus::Success);
    }
    // Each as large as a turn takes. A worker that sleeps with packets before it would wake when
    // the gate opens, with an answer.
    for at in [0u8, 1, 2] {
        let cdb = rw10(0x28, u32::from(at) * 128, 128);
        guest.send(0, &cdb, DataDirection::Read, &[(0x10_0000, 64 << 10)]);
    }
    let rescue = Arc::clone(&gate);
    let rescue = thread::spawn(move || {
        thread::park_timeout(PATIENCE);
        rescue.open(3).unwrap();
    });
    for _ in 0..2 {
        assert!(worker.turn(true).unwrap());
    }
    assert!(guest.end.wait(&mut [0; 256], Duration::ZERO).is_none());
    rescue.thread().unpark();
    rescue.join().unwrap();
    for _ in 0..3 {
        while guest.end.wait(&mut [0; 256], Duration::ZERO).is_none() {
            worker.turn(true).unwrap();
        }
    }
}

#[test]
fn malformed_packets_cost_the_request_or_the_channel() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    // An operation that nobody knows.
    assert_eq!(guest.ask_anyway(Operation(77), &[]).status, NtStatus::InvalidDeviceRequest);
    // A CDB longer than its field.
    let mut request = ScsiRequest::new_zeroed();
    request.cdb_len = 200;
    let answer = guest.ask_anyway(Operation::ExecuteSrb, request.as_bytes());
    let request: ScsiRequest = answer.body().unwrap();
    assert_eq!(request.srb_status, SrbStatus::InvalidRequest);
    good(&guest.read(0, 1, 0x10_0000), 512);
    // A payload that is no packet at all: there is nothing to answer to in it, but an id.
    let id = guest.id();
    guest.end.send(PacketKind::InBand, PacketFlags::COMPLETION_REQUESTED, id, &[1, 2, 3]);
    let (got, packet) = guest.receive();
    assert_eq!((got, packet.status), (id, NtStatus::InvalidParameter));
    good(&guest.read(0, 1, 0x10_0000), 512);
}

#[test]
fn a_broken_ring_costs_the_channel() {
    let (_, disk) = ram(MIB);
    let mut guest = Guest::new(vec![disk]);
    // The write index, in the first ring's first page, outside of the ring.
    let ring = 16 * MIB - 64 * 4096;
    guest.put(ring, &0xffff_fff8u32.to_le_bytes());
    guest.end.doorbell.write(1).unwrap();
    assert!(guest.is_closed());
}
