//! The target's answers against the bytes that SPC-4 and SBC-3 give for them.

use backends::block::{BlockError, BlockErrorKind, Capacity, Geometry, Operation};
use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// A thin disk of 64 MiB behind a transport of 1 MiB.
fn geometry() -> Geometry {
    Geometry {
        physical_block: 4096,
        discard: true,
        discard_granularity: 4096,
        discard_zeroes: true,
        write_zeroes: true,
        id: "disk-1".into(),
        ..Geometry::new(64 * MIB)
    }
}

fn unit_with(change: impl FnOnce(&mut Geometry)) -> LogicalUnit {
    let mut geometry = geometry();
    change(&mut geometry);
    LogicalUnit::new(&geometry, &Limits { max_transfer_bytes: 1 << 20 })
}

fn unit() -> LogicalUnit {
    unit_with(|_| {})
}

fn plan(unit: &LogicalUnit, direction: Direction, len: u32, cdb: &[u8]) -> Action<'static> {
    let command = Command { cdb, direction, transfer_len: len };
    unit.plan(&command, &[0, 1, 5], &mut [0; 1024])
}

/// The data of a command that succeeds with some.
fn data(unit: &LogicalUnit, cdb: &[u8]) -> Vec<u8> {
    data_up_to(unit, 1024, cdb)
}

fn data_up_to(unit: &LogicalUnit, transfer_len: u32, cdb: &[u8]) -> Vec<u8> {
    let mut scratch = [0xee; 1024];
    let command = Command { cdb, direction: Direction::In, transfer_len };
    match unit.plan(&command, &[0, 1, 5], &mut scratch) {
        Action::Complete(Outcome { status: Status::GOOD, sense: None, transferred }) => {
            scratch[..transferred as usize].to_vec()
        }
        action => panic!("{cdb:02x?}: {action:?}"),
    }
}

/// Key, code, qualifier of a command that is refused.
fn refusal(action: &Action<'_>) -> [u8; 3] {
    match action {
        Action::Complete(Outcome {
            status: Status::CHECK_CONDITION,
            sense: Some(sense),
            transferred: 0,
        }) => [sense.key.0, sense.additional.0, sense.additional.1],
        action => panic!("not refused: {action:?}"),
    }
}

const OUT_OF_RANGE: [u8; 3] = [5, 0x21, 0];
const INVALID_FIELD: [u8; 3] = [5, 0x24, 0];
const INVALID_OPCODE: [u8; 3] = [5, 0x20, 0];
const WRITE_PROTECTED: [u8; 3] = [7, 0x27, 0];

/// Each way to say "read (or write) so many blocks there".
fn transfers(write: bool, lba: u32, blocks: u8, flags: u8) -> Vec<Vec<u8>> {
    let [_, b, c, d] = lba.to_be_bytes();
    let code = |read: u8| if write { read + 2 } else { read };
    let mut all = vec![
        vec![code(0x28), flags, 0, b, c, d, 0, 0, blocks, 0],
        vec![code(0xa8), flags, 0, b, c, d, 0, 0, 0, blocks, 0, 0],
        vec![code(0x88), flags, 0, 0, 0, 0, 0, b, c, d, 0, 0, 0, blocks, 0, 0],
    ];
    if flags == 0 && lba < 1 << 21 && blocks > 0 {
        all.push(vec![code(0x08), b, c, d, blocks, 0]);
    }
    all
}

#[test]
fn reads_and_writes_of_every_length() {
    let unit = unit();
    let (offset, len) = (0x1_0203 * 512, 8 * 512);
    for cdb in transfers(false, 0x1_0203, 8, 0) {
        let action = plan(&unit, Direction::In, 4096, &cdb);
        assert_eq!(action, Action::Read { offset, len }, "{cdb:02x?}");
        // Neither direction nor memory for it.
        assert_eq!(refusal(&plan(&unit, Direction::Out, 4096, &cdb)), INVALID_FIELD);
        assert_eq!(refusal(&plan(&unit, Direction::None, 0, &cdb)), INVALID_FIELD);
    }
    for cdb in transfers(true, 0x1_0203, 8, 0) {
        let action = plan(&unit, Direction::Out, 4096, &cdb);
        assert_eq!(action, Action::Write { offset, len, fua: false }, "{cdb:02x?}");
        assert_eq!(refusal(&plan(&unit, Direction::In, 4096, &cdb)), INVALID_FIELD);
    }
    // DPO and FUA.
    for (flags, fua) in [(0x08, true), (0x10, false), (0x18, true)] {
        for cdb in transfers(true, 0, 8, flags) {
            let action = plan(&unit, Direction::Out, 4096, &cdb);
            assert_eq!(action, Action::Write { offset: 0, len, fua }, "{cdb:02x?}");
        }
        for cdb in transfers(false, 0, 8, flags) {
            let action = plan(&unit, Direction::In, 4096, &cdb);
            assert_eq!(action, Action::Read { offset: 0, len });
        }
    }
    // 0 blocks are none, but 256 in the 6-byte commands.
    for cdb in transfers(false, 0, 0, 0) {
        assert_eq!(plan(&unit, Direction::None, 0, &cdb), Action::Complete(Outcome::good(0)));
    }
    let action = plan(&unit, Direction::In, 1 << 20, &[0x08, 0, 0, 0, 0, 0]);
    assert_eq!(action, Action::Read { offset: 0, len: 256 * 512 });
}

#[test]
fn no_more_moves_than_both_sides_allow() {
    let unit = unit();
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    // More memory than blocks.
    assert_eq!(plan(&unit, Direction::In, 8192, &read), Action::Read { offset: 0, len: 4096 });
    let action = plan(&unit, Direction::Out, 8192, &write);
    assert_eq!(action, Action::Write { offset: 0, len: 4096, fua: false });
    // Less: a read gets whole blocks, a write is refused.
    assert_eq!(plan(&unit, Direction::In, 1535, &read), Action::Read { offset: 0, len: 1024 });
    assert_eq!(refusal(&plan(&unit, Direction::In, 511, &read)), INVALID_FIELD);
    assert_eq!(refusal(&plan(&unit, Direction::Out, 4095, &write)), INVALID_FIELD);
    // More than the transport moves at once.
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0x08, 0x01, 0];
    let action = plan(&unit, Direction::In, 2 << 20, &read);
    assert_eq!(refusal(&action), INVALID_FIELD);
    let Action::Complete(outcome) = action else { unreachable!() };
    let sense = outcome.sense.unwrap().to_bytes();
    // Valid, in the CDB, byte 7.
    assert_eq!(sense[15..], [0xc0, 0, 7]);
}

#[test]
fn nothing_reaches_past_the_end() {
    let unit = unit();
    let last = (64 * MIB / 512 - 1) as u32;
    for write in [false, true] {
        let direction = if write { Direction::Out } else { Direction::In };
        for cdb in transfers(write, last, 1, 0) {
            assert!(!matches!(plan(&unit, direction, 512, &cdb), Action::Complete(_)));
        }
        for (lba, blocks) in [(last, 2), (last + 1, 1), (last + 1, 0), (0xff_ffff, 255)] {
            for cdb in transfers(write, lba, blocks, 0) {
                let action = plan(&unit, direction, 1 << 20, &cdb);
                assert_eq!(refusal(&action), OUT_OF_RANGE, "{cdb:02x?}");
            }
        }
        let code = if write { 0x8a } else { 0x88 };
        let cdb = [code, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0];
        assert_eq!(refusal(&plan(&unit, direction, 1 << 20, &cdb)), OUT_OF_RANGE);
    }
    for cdb in [
        [0x91, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0],
        [0x8f, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 1, 0, 0],
        [0x93, 1, 0, 0, 0, 0, 0, 1, 255, 255, 0, 0, 0, 2, 0, 0],
    ] {
        assert_eq!(refusal(&plan(&unit, Direction::None, 0, &cdb)), OUT_OF_RANGE);
    }
}

#[test]
fn protection_information_is_refused() {
    for code in [0x28, 0x2a, 0x2f, 0x41] {
        let cdb = [code, 0x20, 0, 0, 0, 0, 0, 0, 1, 0];
        let direction = if code == 0x28 { Direction::In } else { Direction::Out };
        assert_eq!(refusal(&plan(&unit(), direction, 512, &cdb)), INVALID_FIELD);
    }
}

#[test]
fn standard_inquiry() {
    let whole = data(&unit(), &[0x12, 0, 0, 0, 96, 0]);
    assert_eq!(whole.len(), 36);
    assert_eq!(whole[..8], [0x00, 0x00, 0x05, 0x02, 31, 0, 0, 0x02]);
    assert_eq!(&whole[8..], b"Msft    Virtual Disk    1.0 ");
    // Cut by the allocation length, and by the memory that came with it.
    assert_eq!(data(&unit(), &[0x12, 0, 0, 0, 5, 0]).len(), 5);
    assert_eq!(data_up_to(&unit(), 7, &[0x12, 0, 0, 0, 96, 0]).len(), 7);
    // A page without EVPD.
    let action = plan(&unit(), Direction::In, 96, &[0x12, 0, 0x80, 0, 96, 0]);
    assert_eq!(refusal(&action), INVALID_FIELD);
}

fn vpd(unit: &LogicalUnit, page: u8) -> Vec<u8> {
    let data = data(unit, &[0x12, 1, page, 0x01, 0x00, 0]);
    assert_eq!(data[..2], [0, page]);
    assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])), data.len() - 4);
    data[4..].to_vec()
}

#[test]
fn vital_product_data() {
    let disk = unit();
    assert_eq!(vpd(&disk, 0x00), [0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    for page in vpd(&disk, 0x00) {
        vpd(&disk, page);
    }
    assert_eq!(vpd(&disk, 0x80), b"disk-1");

    let identification = vpd(&disk, 0x83);
    // Binary NAA of 8 bytes, locally assigned.
    assert_eq!(identification[..4], [0x01, 0x03, 0, 8]);
    assert_eq!(identification[4] >> 4, 3);
    // ASCII, T10 vendor identification.
    assert_eq!(identification[12..16], [0x02, 0x01, 0, 14]);
    assert_eq!(&identification[16..], b"Msft    disk-1");
    // The same for the same id, another for another.
    assert_eq!(identification, vpd(&unit_with(|geometry| geometry.size *= 2), 0x83));
    let other = vpd(&unit_with(|geometry| geometry.id = "disk-2".into()), 0x83);
    assert_ne!(identification[4..12], other[4..12]);

    // From byte 4 of the page on.
    let limits = vpd(&disk, 0xb0);
    let u32_at = |at: usize| u32::from_be_bytes(limits[at - 4..at].try_into().unwrap());
    assert_eq!(limits.len(), 60);
    assert_eq!(limits[..4], [1, 0, 0, 8], "WSNZ, optimal transfer length granularity");
    assert_eq!(u32_at(8), 2048, "maximum transfer length");
    assert_eq!(u32_at(20), 8 << 20, "maximum unmap LBA count");
    assert_eq!(u32_at(24), 64, "maximum unmap descriptor count");
    assert_eq!(u32_at(28), 8, "optimal unmap granularity");
    assert_eq!(u32_at(32), 0x8000_0000, "unmap granularity alignment");
    assert_eq!((u32_at(36), u32_at(40)), (0, 65536), "maximum WRITE SAME length");

    assert_eq!(vpd(&disk, 0xb1)[..2], [0, 1], "non-rotating");
    assert_eq!(vpd(&disk, 0xb2), [0, 0xe4, 2, 0]);

    let plain = unit_with(|geometry| {
        *geometry = Geometry { rotational: true, ..Geometry::new(MIB) };
    });
    assert_eq!(vpd(&plain, 0xb0)[16..32], [0; 16]);
    assert_eq!(vpd(&plain, 0xb1)[..2], [0, 0]);
    assert_eq!(vpd(&plain, 0xb2), [0; 4]);

    let action = plan(&disk, Direction::In, 96, &[0x12, 1, 0xb3, 0, 96, 0]);
    assert_eq!(refusal(&action), INVALID_FIELD);
}

#[test]
fn a_strange_id_is_made_printable() {
    let unit = unit_with(|geometry| geometry.id = format!("a b\n{}", "\u{e9}".repeat(200)));
    let serial = vpd(&unit, 0x80);
    assert_eq!(serial.len(), 64);
    assert!(serial.starts_with(b"a-b--"));
    vpd(&unit, 0x83);
}

#[test]
fn mode_sense() {
    let caching = [0x08, 18, 0x04, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let control = [0x0a, 10, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0];
    let disk = unit();
    let all = data(&disk, &[0x1a, 0, 0x3f, 0, 255, 0]);
    assert_eq!(all[..4], [35, 0, 0x10, 0]);
    assert_eq!(all[4..], [caching.as_slice(), control.as_slice()].concat());
    let all_10 = data(&disk, &[0x5a, 0, 0x3f, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(all_10[..8], [0, 38, 0, 0x10, 0, 0, 0, 0]);
    assert_eq!(all_10[8..], all[4..]);
    assert_eq!(data(&disk, &[0x1a, 0x08, 0x08, 0, 255, 0])[4..], caching);
    assert_eq!(data(&disk, &[0x1a, 0x08, 0x8a, 0, 255, 0])[4..], control);
    assert_eq!(data(&disk, &[0x1a, 0, 0x3f, 0, 4, 0]), [35, 0, 0x10, 0]);

    // Nothing is changeable.
    let changeable = data(&disk, &[0x1a, 0, 0x7f, 0, 255, 0]);
    assert_eq!(changeable[4..6], [0x08, 18]);
    assert!(changeable[6..24].iter().all(|&byte| byte == 0));

    // WP, and no cache to lose anything from.
    let read_only = data(&unit_with(|geometry| geometry.read_only = true), &all_pages());
    assert_eq!((read_only[2], read_only[6]), (0x90, 0));

    for (cdb, sense) in [
        ([0x1a, 0, 0x01, 0, 255, 0], INVALID_FIELD),
        ([0x1a, 0, 0x08, 1, 255, 0], INVALID_FIELD),
        ([0x1a, 0, 0xff, 0, 255, 0], [5, 0x39, 0]),
    ] {
        assert_eq!(refusal(&plan(&disk, Direction::In, 255, &cdb)), sense);
    }
}

fn all_pages() -> [u8; 6] {
    [0x1a, 0, 0x3f, 0, 255, 0]
}

#[test]
fn capacity() {
    let disk = unit();
    assert_eq!(data(&disk, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), [0, 1, 0xff, 0xff, 0, 0, 2, 0]);
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
    let long = data(&disk, &cdb);
    assert_eq!(long.len(), 32);
    assert_eq!(long[..8], [0, 0, 0, 0, 0, 1, 0xff, 0xff]);
    // Block length; eight logical blocks a physical one; LBPME and LBPRZ.
    assert_eq!(long[8..16], [0, 0, 2, 0, 0, 3, 0xc0, 0]);
    cdb[13] = 12;
    assert_eq!(data(&disk, &cdb).len(), 12);
    cdb[1] = 0x12;
    assert_eq!(refusal(&plan(&disk, Direction::In, 32, &cdb)), INVALID_FIELD);

    let huge = unit_with(|geometry| (geometry.size, geometry.logical_block) = (1 << 60, 4096));
    let short = data(&huge, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(short, [255, 255, 255, 255, 0, 0, 0x10, 0]);
    (cdb[1], cdb[13]) = (0x10, 32);
    assert_eq!(data(&huge, &cdb)[..8], ((1_u64 << 48) - 1).to_be_bytes());

    let plain = unit_with(|geometry| *geometry = Geometry::new(MIB));
    assert_eq!(data(&plain, &cdb)[13..15], [0, 0]);
}

#[test]
fn report_luns() {
    let list = data(&unit(), &[0xa0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]);
    let mut expected = vec![0, 0, 0, 24, 0, 0, 0, 0];
    for lun in [0, 1, 5] {
        expected.extend([0, lun, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(list, expected);
    assert_eq!(data(&unit(), &[0xa0, 0, 1, 0, 0, 0, 0, 0, 4, 0, 0, 0]), [0; 8]);
    let cut = data(&unit(), &[0xa0, 0, 2, 0, 0, 0, 0, 0, 0, 16, 0, 0]);
    assert_eq!(cut, expected[..16]);
    let action = plan(&unit(), Direction::In, 64, &[0xa0, 0, 0x10, 0, 0, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(refusal(&action), INVALID_FIELD);
    // More than there is room for are cut, not written past it.
    let luns: Vec<u8> = (0..=255).collect();
    let cdb = [0xa0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    let command = Command { cdb: &cdb, direction: Direction::In, transfer_len: 65536 };
    let action = unit().plan(&command, &luns, &mut [0; 1024]);
    assert_eq!(action, Action::Complete(Outcome::good(1024)));
}

#[test]
fn an_absent_unit_says_so() {
    let mut scratch = [0; 1024];
    let mut absent = |cdb: &[u8]| {
        let command = Command { cdb, direction: Direction::In, transfer_len: 255 };
        (plan_absent(&command, &[3], &mut scratch), scratch)
    };
    let (action, data) = absent(&[0x12, 0, 0, 0, 36, 0]);
    assert_eq!(action, Action::Complete(Outcome::good(36)));
    assert_eq!(data[0], 0x7f);
    let (action, data) = absent(&[0x12, 1, 0x83, 0, 255, 0]);
    assert_eq!(action, Action::Complete(Outcome::good(4)));
    assert_eq!(data[..4], [0x7f, 0x83, 0, 0]);
    let (action, data) = absent(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0]);
    assert_eq!(action, Action::Complete(Outcome::good(16)));
    assert_eq!(data[..16], [0, 0, 0, 8, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0]);
    let (action, data) = absent(&[0x03, 0, 0, 0, 18, 0]);
    assert_eq!(action, Action::Complete(Outcome::good(18)));
    assert_eq!((data[2], data[12]), (5, 0x25));
    for code in [0x00, 0x1a, 0x25, 0x28, 0x2a, 0xff] {
        let cdb = [code, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(refusal(&absent(&cdb).0), [5, 0x25, 0]);
    }
    assert_eq!(refusal(&absent(&[]).0), INVALID_FIELD);
}

#[test]
fn small_commands() {
    let disk = unit();
    let good = Action::Complete(Outcome::good(0));
    assert_eq!(plan(&disk, Direction::None, 0, &[0; 6]), good);
    assert_eq!(plan(&disk, Direction::None, 0, &[0x1e, 0, 0, 0, 1, 0]), good);

    // REQUEST SENSE has nothing to tell.
    let mut sense = [0; 18];
    (sense[0], sense[7]) = (0x70, 10);
    assert_eq!(data(&disk, &[0x03, 0, 0, 0, 252, 0]), sense);
    assert_eq!(data(&disk, &[0x03, 1, 0, 0, 252, 0]), [0x72, 0, 0, 0, 0, 0, 0, 0]);

    let start_stop = |byte| plan(&disk, Direction::None, 0, &[0x1b, 0, 0, 0, byte, 0]);
    assert_eq!(start_stop(0x01), good);
    assert_eq!(start_stop(0x00), Action::Flush);
    assert_eq!(start_stop(0x04), good);
    assert_eq!(start_stop(0x30), good);
    assert_eq!(refusal(&start_stop(0x02)), INVALID_FIELD);

    for code in [0x35, 0x91] {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1]) = (code, 0x02);
        assert_eq!(plan(&disk, Direction::None, 0, &cdb), Action::Flush);
        let read_only = unit_with(|geometry| geometry.read_only = true);
        assert_eq!(plan(&read_only, Direction::None, 0, &cdb), good);
    }
    for code in [0x2f, 0xaf, 0x8f] {
        let mut cdb = [0; 16];
        (cdb[0], cdb[13]) = (code, 0);
        assert_eq!(plan(&disk, Direction::None, 0, &cdb), good);
        cdb[1] = 0x02;
        assert_eq!(refusal(&plan(&disk, Direction::Out, 512, &cdb)), INVALID_FIELD);
    }
    // MODE SELECT, REPORT SUPPORTED OPERATION CODES, COMPARE AND WRITE, vendor's own.
    for code in [0x15, 0x55, 0xa3, 0x89, 0xc0, 0xff, 0x7f, 0x60] {
        let cdb = [code, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(refusal(&plan(&disk, Direction::None, 0, &cdb)), INVALID_OPCODE);
    }
    // Shorter than their code says.
    for cdb in [&[0x28, 0, 0, 0, 0, 0][..], &[0x88; 10], &[0; 5], &[]] {
        assert_eq!(refusal(&plan(&disk, Direction::In, 512, cdb)), INVALID_FIELD);
    }
}

/// An UNMAP and its parameter list.
fn unmap_list(descriptors: &[(u64, u32)]) -> Vec<u8> {
    let len = descriptors.len() as u16 * 16;
    let mut list = Vec::new();
    list.extend((len + 6).to_be_bytes());
    list.extend(len.to_be_bytes());
    list.extend([0; 4]);
    for (lba, blocks) in descriptors {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

fn unmap_cdb(len: usize) -> [u8; 10] {
    let [high, low] = (len as u16).to_be_bytes();
    [0x42, 0, 0, 0, 0, 0, 0, high, low, 0]
}

fn unmap<'p>(unit: &LogicalUnit, list: &'p [u8]) -> Action<'p> {
    match plan(unit, Direction::Out, list.len() as u32, &unmap_cdb(list.len())) {
        Action::Parameters(parameters) => {
            assert_eq!(parameters.len as usize, list.len());
            unit.with_parameters(parameters, list)
        }
        action => panic!("{action:?}"),
    }
}

#[test]
fn unmap_discards_each_range() {
    let disk = unit();
    let list = unmap_list(&[(8, 16), (0, 0), (131_071, 1)]);
    let Action::Discard(ranges) = unmap(&disk, &list) else { panic!() };
    let expected = [Range { offset: 4096, len: 8192 }, Range { offset: 131_071 * 512, len: 512 }];
    assert!(ranges.eq(expected));

    assert_eq!(unmap(&disk, &unmap_list(&[])), Action::Complete(Outcome::good(8)));
    assert_eq!(unmap(&disk, &unmap_list(&[(0, 0)])), Action::Complete(Outcome::good(24)));
    let many = [(0, 1); 64];
    assert!(matches!(unmap(&disk, &unmap_list(&many)), Action::Discard(_)));
    let nothing = plan(&disk, Direction::None, 0, &unmap_cdb(0));
    assert_eq!(nothing, Action::Complete(Outcome::good(0)));
}

#[test]
fn unmap_checks_its_list() {
    let disk = unit();
    let refused = |list: &[u8]| refusal(&unmap(&disk, list));
    // One bad range spoils them all.
    assert_eq!(refused(&unmap_list(&[(0, 8), (131_071, 2)])), OUT_OF_RANGE);
    assert_eq!(refused(&unmap_list(&[(u64::MAX, 1)])), OUT_OF_RANGE);
    assert_eq!(refused(&unmap_list(&[(0, 1); 65])), [5, 0x26, 0]);
    // 64 times this disk are 4 GiB, the most there may be; a block more is too much.
    let list = unmap_list(&[(0, 131_072); 64]);
    assert!(matches!(unmap(&disk, &list), Action::Discard(_)));
    let larger = unit_with(|geometry| geometry.size += 512);
    let list = unmap_list(&[(0, 131_073); 64]);
    assert_eq!(refusal(&unmap(&larger, &list)), [5, 0x26, 0]);
    // It says it is longer than it is.
    let mut list = unmap_list(&[(0, 8)]);
    list[3] = 32;
    assert_eq!(refused(&list), [5, 0x1a, 0]);
    let mut list = unmap_list(&[(0, 8)]);
    list[1] = 6;
    assert_eq!(refused(&list), [5, 0x26, 0]);
    // A piece of a descriptor at its end counts for nothing.
    let mut list = unmap_list(&[(0, 8), (8, 8)]);
    (list[1], list[3]) = (30, 24);
    let Action::Discard(ranges) = unmap(&disk, &list) else { panic!() };
    assert_eq!(ranges.count(), 1);

    let out = |len: u32, cdb: &[u8]| plan(&disk, Direction::Out, len, cdb);
    assert_eq!(refusal(&out(7, &unmap_cdb(7))), [5, 0x1a, 0]);
    assert_eq!(refusal(&out(8192, &unmap_cdb(8192))), [5, 0x1a, 0]);
    assert_eq!(refusal(&out(23, &unmap_cdb(24))), INVALID_FIELD);
    let mut anchor = unmap_cdb(24);
    anchor[1] = 1;
    assert_eq!(refusal(&out(24, &anchor)), INVALID_FIELD);
    // Private memory shorter than was asked for.
    let action = out(24, &unmap_cdb(24));
    let Action::Parameters(parameters) = action else { panic!() };
    assert_eq!(refusal(&disk.with_parameters(parameters, &[0; 23])), [5, 0x1a, 0]);
}

fn write_same_16(flags: u8, lba: u32, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1]) = (0x93, flags);
    cdb[6..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

#[test]
fn write_same() {
    let disk = unit();
    let pattern: Vec<u8> = (0..512).map(|i| i as u8).collect();
    let zeroes = [0; 512];
    let (offset, len) = (0x1234 * 512, 100 * 512);
    let ten = [0x41, 0, 0, 0, 0x12, 0x34, 0, 0, 100, 0];
    for (unmap, flag) in [(false, 0), (true, 0x08)] {
        let mut ten = ten;
        ten[1] = flag;
        for cdb in [&ten[..], &write_same_16(flag, 0x1234, 100)] {
            let Action::Parameters(parameters) = plan(&disk, Direction::Out, 512, cdb) else {
                panic!()
            };
            assert_eq!(parameters.len, 512);
            let expected = Action::WriteZeroes { offset, len, may_unmap: unmap };
            assert_eq!(disk.with_parameters(parameters, &zeroes), expected);
            let expected = Action::WriteSame { offset, len, pattern: &pattern };
            assert_eq!(disk.with_parameters(parameters, &pattern), expected);
        }
    }
    // NDOB: zeroes, and no data.
    let action = plan(&disk, Direction::None, 0, &write_same_16(0x09, 0x1234, 100));
    assert_eq!(action, Action::WriteZeroes { offset, len, may_unmap: true });

    let refused = |cdb: &[u8]| refusal(&plan(&disk, Direction::Out, 512, cdb));
    assert_eq!(refused(&write_same_16(0, 0, 0)), INVALID_FIELD, "WSNZ");
    assert_eq!(refused(&write_same_16(0x10, 0, 1)), INVALID_FIELD, "ANCHOR");
    assert_eq!(refused(&write_same_16(0x02, 0, 1)), INVALID_FIELD, "LBDATA");
    assert_eq!(refused(&write_same_16(0, 131_071, 2)), OUT_OF_RANGE);
    let action = plan(&disk, Direction::Out, 511, &write_same_16(0, 0, 1));
    assert_eq!(refusal(&action), INVALID_FIELD);

    // The host writes no more than 32 MiB for one command, as the Block Limits page says.
    let limits = data(&disk, &[0x12, 1, 0xb0, 0, 64, 0]);
    assert_eq!(limits[36..44], 65536_u64.to_be_bytes());
    let Action::Parameters(parameters) =
        plan(&disk, Direction::Out, 512, &write_same_16(0, 0, 65536))
    else {
        panic!()
    };
    let expected = Action::WriteSame { offset: 0, len: 32 * MIB, pattern: &pattern };
    assert_eq!(disk.with_parameters(parameters, &pattern), expected);
    assert_eq!(refused(&write_same_16(0, 0, 65537)), INVALID_FIELD);
    assert_eq!(refused(&write_same_16(0, 0, u32::MAX)), OUT_OF_RANGE);
    let large = unit_with(|geometry| (geometry.size, geometry.logical_block) = (1 << 40, 4096));
    let action = plan(&large, Direction::Out, 4096, &write_same_16(0x08, 0, 8193));
    assert_eq!(refusal(&action), INVALID_FIELD);

    // Without discard there is no unmapping.
    let plain = unit_with(|geometry| *geometry = Geometry::new(64 * MIB));
    let action = plan(&plain, Direction::None, 0, &write_same_16(0x01, 0, 65536));
    assert_eq!(action, Action::WriteZeroes { offset: 0, len: 32 * MIB, may_unmap: false });
    let action = plan(&plain, Direction::None, 0, &write_same_16(0x01, 0, 65537));
    assert_eq!(refusal(&action), INVALID_FIELD);
    let action = plan(&plain, Direction::None, 0, &write_same_16(0x09, 0, 1));
    assert_eq!(refusal(&action), INVALID_FIELD);
    assert_eq!(refusal(&plan(&plain, Direction::Out, 24, &unmap_cdb(24))), INVALID_OPCODE);
}

/// What a unit that cannot be thin says of itself, and answers.
#[test]
fn a_disk_that_keeps_its_space_has_no_thin_provisioning() {
    let disk = unit_with(|geometry| (geometry.discard, geometry.discard_zeroes) = (false, false));
    let mut capacity_16 = [0; 16];
    (capacity_16[0], capacity_16[1], capacity_16[13]) = (0x9e, 0x10, 32);
    assert_eq!(data(&disk, &capacity_16)[14], 0, "LBPME and LBPRZ");
    assert_eq!(data(&disk, &[0x12, 1, 0xb2, 0, 64, 0])[4..8], [0; 4]);
    assert_eq!(data(&disk, &[0x12, 1, 0xb0, 0, 64, 0])[20..36], [0; 16], "no UNMAP");
    assert_eq!(refusal(&plan(&disk, Direction::Out, 24, &unmap_cdb(24))), INVALID_OPCODE);
    for flags in [0x08, 0x09] {
        let action = plan(&disk, Direction::Out, 512, &write_same_16(flags, 0, 1));
        assert_eq!(refusal(&action), INVALID_FIELD);
    }
    let action = plan(&disk, Direction::None, 0, &write_same_16(0x01, 0, 8));
    assert_eq!(action, Action::WriteZeroes { offset: 0, len: 4096, may_unmap: false });
}

#[test]
fn another_size_is_told_once_by_the_next_command() {
    const CHANGED: [u8; 3] = [6, 0x2a, 0x09];
    let capacity = Capacity::new(64 * MIB);
    let disk = unit().following(capacity.clone());
    let read = [0x28, 0, 0, 3, 0, 0, 0, 0, 8, 0]; // behind the first 64 MiB
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    let report_luns = [0xa0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0];
    let read_capacity = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(refusal(&plan(&disk, Direction::In, 4096, &read)), OUT_OF_RANGE);

    let others: [(Direction, &[u8]); 7] = [
        (Direction::None, &[0; 6]),
        (Direction::In, &read),
        (Direction::Out, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0]),
        (Direction::None, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Direction::In, &read_capacity),
        (Direction::In, &[0x1a, 0, 0x3f, 0, 64, 0]),
        (Direction::None, &[0xc0, 0, 0, 0, 0, 0]),
    ];
    for (index, (direction, cdb)) in others.into_iter().enumerate() {
        let blocks = if index % 2 == 0 { 0x4_0000_u32 } else { 0x2_0000 };
        capacity.set(u64::from(blocks) * 512);
        // These neither tell it nor forget it.
        assert_eq!(data(&disk, &inquiry).len(), 36);
        assert_eq!(data(&disk, &report_luns).len(), 32);
        assert_eq!(refusal(&plan(&disk, direction, 4096, cdb)), CHANGED, "{cdb:02x?}");
        assert_eq!(data(&disk, &read_capacity)[..4], (blocks - 1).to_be_bytes(), "once");
    }
    assert!(matches!(plan(&disk, Direction::In, 4096, &read), Action::Read { .. }));

    // Who asks for sense data gets it as data.
    capacity.set(MIB);
    let sense = data(&disk, &[0x03, 0, 0, 0, 18, 0]);
    assert_eq!((sense[0], [sense[2], sense[12], sense[13]]), (0x70, CHANGED));
    assert_eq!(data(&disk, &[0x03, 0, 0, 0, 18, 0])[2], 0);
    assert_eq!(refusal(&plan(&disk, Direction::In, 4096, &read)), OUT_OF_RANGE);

    // What is as it was again is nothing to tell.
    capacity.set(2 * MIB);
    capacity.set(MIB);
    assert_eq!(plan(&disk, Direction::None, 0, &[0; 6]), Action::Complete(Outcome::good(0)));
    // A disk of which nothing is left.
    capacity.set(0);
    assert_eq!(refusal(&plan(&disk, Direction::None, 0, &[0; 6])), CHANGED);
    let first = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(refusal(&plan(&disk, Direction::In, 512, &first)), OUT_OF_RANGE);
}

#[test]
fn of_many_channels_one_is_told_of_another_size() {
    let capacity = Capacity::new(64 * MIB);
    let disk = unit().following(capacity.clone());
    for size in 1..=100 {
        capacity.set(size * MIB);
        let told = std::thread::scope(|scope| {
            let ask = || plan(&disk, Direction::None, 0, &[0; 6]);
            let asking: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
            let good = Action::Complete(Outcome::good(0));
            asking.into_iter().filter_map(|one| one.join().ok()).filter(|end| *end != good).count()
        });
        assert_eq!(told, 1, "{size} MiB");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = unit_with(|geometry| {
        geometry.read_only = true;
        geometry.discard = false;
    });
    let mut cdbs = transfers(true, 0, 8, 0);
    cdbs.push(unmap_cdb(24).to_vec());
    cdbs.push(write_same_16(1, 0, 1).to_vec());
    cdbs.push(vec![0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    for cdb in cdbs {
        let action = plan(&disk, Direction::Out, 4096, &cdb);
        assert_eq!(refusal(&action), WRITE_PROTECTED, "{cdb:02x?}");
    }
    let read = plan(&disk, Direction::In, 512, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(read, Action::Read { offset: 0, len: 512 });
}

#[test]
fn results_become_status_and_sense() {
    let write = Operation::Write { fua: false };
    assert_eq!(outcome(Operation::Read, 4096, Ok(4096)), Outcome::good(4096));
    assert_eq!(outcome(write, 512, Ok(512)), Outcome::good(512));
    assert_eq!(outcome(Operation::Flush, 0, Ok(0)), Outcome::good(0));
    let discard = outcome(Operation::Discard, MIB, Ok(MIB));
    assert_eq!(discard.with_transferred(24), Outcome::good(24));

    let sense = |operation, kind| {
        let outcome = outcome(operation, 4096, Err(BlockError::new(kind)));
        assert_eq!(outcome.with_transferred(24).transferred, 0);
        refusal(&Action::Complete(outcome))
    };
    assert_eq!(sense(Operation::Read, BlockErrorKind::Io), [3, 0x11, 0]);
    for operation in [write, Operation::Flush, Operation::Discard] {
        assert_eq!(sense(operation, BlockErrorKind::Io), [3, 0x0c, 0]);
    }
    assert_eq!(sense(write, BlockErrorKind::NoSpace), [7, 0x27, 7]);
    assert_eq!(sense(write, BlockErrorKind::ReadOnly), WRITE_PROTECTED);
    assert_eq!(sense(write, BlockErrorKind::OutOfRange), OUT_OF_RANGE);
    let short = outcome(Operation::Read, 4096, Ok(512));
    assert_eq!(refusal(&Action::Complete(short)), [3, 0x11, 0]);
    let busy = outcome(Operation::Read, 4096, Err(BlockError::new(BlockErrorKind::Busy)));
    assert_eq!((busy.status, busy.sense), (Status::BUSY, None));
}

#[test]
fn sense_data_has_the_fixed_format() {
    let bytes = Sense::LBA_OUT_OF_RANGE.to_bytes();
    assert_eq!(bytes, [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0]);
    let bytes = Sense::invalid_parameter_byte(0x102).to_bytes();
    assert_eq!(bytes[15..], [0x80, 1, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Whatever the command and the disk, nothing leaves the disk or the memory that came with it.
    #[test]
    fn any_command_on_any_disk(data in prop::collection::vec(any::<u8>(), 0..200)) {
        crate::fuzzing::fuzz_cdb(&data);
    }

    /// The same with operation codes that exist, which random bytes rarely are.
    #[test]
    fn any_known_command_on_any_disk(
        mut data in prop::collection::vec(any::<u8>(), 24..200),
        code in prop::sample::select(vec![
            0x00, 0x03, 0x08, 0x0a, 0x12, 0x1a, 0x1b, 0x1e, 0x25, 0x28, 0x2a, 0x2f, 0x35, 0x41,
            0x42, 0x5a, 0x88, 0x8a, 0x8f, 0x91, 0x93, 0x9e, 0xa0, 0xa8, 0xaa, 0xaf,
        ]),
        clear in any::<[bool; 15]>(),
    ) {
        data[8] = code;
        for (byte, clear) in data[9..24].iter_mut().zip(clear) {
            if clear {
                *byte = 0;
            }
        }
        crate::fuzzing::fuzz_cdb(&data);
    }
}
