//! What fuzzers do to a channel: accesses in any order, with a memory image of the guest's making.

use std::cell::OnceCell;

use backends::block::{BlockErrorKind, Buffer, Geometry};
use hypervisor::{Gpa, GuestMemory};

use super::bits::{control, status};
use super::channel::{BUFFER, Channel, Outcome, Work};
use super::table;

const DISK: u64 = 1 << 20;
const MEMORY: u64 = 128 << 10;

thread_local! {
    static GUEST: OnceCell<GuestMemory> = const { OnceCell::new() };
}

/// A byte that chooses the drives, then accesses of three bytes each: what, where, and a value.
pub(crate) fn fuzz(data: &[u8]) {
    let Some((&choice, accesses)) = data.split_first() else { return };
    GUEST.with(|guest| {
        let guest = guest.get_or_init(|| GuestMemory::new(MEMORY).expect("128 KiB can be had"));
        guest.write(Gpa(0), &[0; 0x2000]).expect("it is RAM");
        run(choice, accesses, guest);
    });
}

fn run(choice: u8, accesses: &[u8], guest: &GuestMemory) {
    let geometry = Geometry { discard: true, read_only: choice & 4 != 0, ..Geometry::new(DISK) };
    let mut channel = Channel::new();
    for (place, bit) in [(0, 1), (1, 2)] {
        if choice & bit != 0 {
            let cd = choice & bit << 3 != 0;
            channel.attach(place, &geometry, cd).expect("the disk has blocks of 512 bytes");
        }
    }
    let mut bytes = vec![0x5a; 0x1_0000];
    for access in accesses.as_chunks::<3>().0 {
        let [what, place, value] = *access;
        let length = usize::from(u16::from_le_bytes([place, value]));
        match what & 7 {
            0 => drop(channel.read(place & 7)),
            1 => channel.write(place & 7, value),
            2 => channel.write_control(value),
            3 => channel.read_data(&mut bytes[..length]),
            4 => channel.write_data(&bytes[..length]),
            5 => channel.write_master(place & 7, value, what & 8 == 0),
            6 => drop(work(&mut channel, guest, place)),
            _ => {
                // The pages where tables are most likely to be, and data to be written.
                let at = u64::from(place) << 3 | u64::from(what >> 5);
                guest.write(Gpa(at), &[value]).expect("the first pages are RAM");
                bytes[usize::from(place)] = value;
            }
        }
        channel.take_edge();
        let shown = channel.read_control();
        assert!(shown & status::BSY == 0 || shown == status::BSY);
    }
    // Whatever was done, a reset ends it, and drives are ready for the next command.
    channel.write_control(control::SRST);
    channel.write_control(0);
    while work(&mut channel, guest, 0) {}
    let shown = channel.read_control();
    assert_eq!(shown & (status::BSY | status::DRQ | status::ERR), 0);
}

/// Does the job that there is, or lets it fail. Returns whether there was one.
fn work(channel: &mut Channel, guest: &GuestMemory, how: u8) -> bool {
    let Some(job) = channel.take_job() else { return false };
    assert_eq!(job.buffer.len(), BUFFER);
    let within = |offset: u64, len: u32| {
        assert!(len > 0 && (offset | u64::from(len)).is_multiple_of(512));
        assert!(offset + u64::from(len) <= DISK);
    };
    let (len, table) = match job.work {
        Work::Read { offset, len } | Work::Write { offset, len, .. } => {
            within(offset, len);
            assert!(len as usize <= BUFFER);
            (0, None)
        }
        Work::ReadDma { offset, len, table } | Work::WriteDma { offset, len, table, .. } => {
            within(offset, len);
            (len, Some(table))
        }
        Work::Send { len, table } | Work::Trim { len, table } => {
            assert!(len as usize <= BUFFER);
            (len, Some(table))
        }
        Work::Flush => (0, None),
    };
    let mut buffers = Vec::new();
    let table = table.map(|table| table::walk(guest, table, len, &mut buffers));
    let named: usize = buffers.iter().map(Buffer::len).sum();
    let outcome = match (how & 7, table) {
        (_, Some(Err(table::BadTable))) => Outcome::Table,
        (1, _) => Outcome::Disk(BlockErrorKind::Io),
        (2, _) => Outcome::Disk(BlockErrorKind::NoSpace),
        (3, _) => Outcome::Range,
        (_, Some(Ok(table_left))) => {
            assert_eq!(named, len as usize);
            Outcome::Done { table_left }
        }
        (_, None) => Outcome::Done { table_left: false },
    };
    channel.finish(job.buffer, outcome);
    true
}
