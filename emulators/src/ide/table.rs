//! The bus master's table of physical regions (PRDs; 82371AB, section 2.7.2, and the Programming
//! Interface for Bus Master IDE Controller, revision 1.0).
//!
//! An entry is eight bytes: the address of a region, its length in bytes (0 stands for 64 KiB), and
//! in the last bit whether it is the table's last. The table is read once, and no further than the
//! transfer needs or 64 KiB go: so it ends, whatever a guest has written there.

use backends::block::Buffer;
use hypervisor::{Gpa, GuestMemory};

/// Entries in the longest table: 64 KiB of them.
const MAX_ENTRIES: u32 = 8192;
const ENTRY: u32 = 8;
const LAST: u16 = 0x8000;

/// The table names memory that is not RAM, or less of it than the transfer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadTable;

/// Finds the memory for `len` bytes in the table at `table`, and puts it into `buffers`. Returns
/// whether the table goes on after that.
pub(super) fn walk(
    memory: &GuestMemory,
    table: u32,
    len: u32,
    buffers: &mut Vec<Buffer>,
) -> Result<bool, BadTable> {
    buffers.clear();
    let mut left = len as usize;
    for index in 0..MAX_ENTRIES {
        let entry = Gpa(u64::from(table) + u64::from(index * ENTRY));
        let entry: [u8; ENTRY as usize] = memory.read_obj(entry).map_err(|_| BadTable)?;
        let [a0, a1, a2, a3, l0, l1, f0, f1] = entry;
        let address = u64::from(u32::from_le_bytes([a0, a1, a2, a3]) & !1);
        let bytes = match u16::from_le_bytes([l0, l1]) & !1 {
            0 => 0x1_0000,
            bytes => usize::from(bytes),
        };
        let last = u16::from_le_bytes([f0, f1]) & LAST != 0;
        let used = bytes.min(left);
        let slice = memory.slice(Gpa(address), used).ok_or(BadTable)?;
        buffers.push(Buffer::new(slice.ptr_guard_mut().as_ptr(), used));
        left -= used;
        if left == 0 {
            return Ok(used < bytes || !last);
        }
        if last {
            break;
        }
    }
    Err(BadTable)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u32 = 0x1000;

    fn memory(entries: &[(u32, u16, u16)]) -> GuestMemory {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for (at, (address, len, flags)) in (u64::from(TABLE)..).step_by(8).zip(entries) {
            memory.write_obj(Gpa(at), address).unwrap();
            memory.write_obj(Gpa(at + 4), len).unwrap();
            memory.write_obj(Gpa(at + 6), flags).unwrap();
        }
        memory
    }

    fn lengths(
        entries: &[(u32, u16, u16)],
        table: u32,
        len: u32,
    ) -> Result<(Vec<usize>, bool), BadTable> {
        let mut buffers = Vec::new();
        let goes_on = walk(&memory(entries), table, len, &mut buffers)?;
        Ok((buffers.iter().map(Buffer::len).collect(), goes_on))
    }

    #[test]
    fn regions_are_taken_as_far_as_they_are_needed() {
        let entries = [(0x2000, 512, 0), (0x8000, 0, 0), (0x4000, 512, LAST)];
        assert_eq!(lengths(&entries, TABLE, 1024), Ok((vec![512, 512], true)));
        assert_eq!(lengths(&entries, TABLE, 512), Ok((vec![512], true)));
        assert_eq!(lengths(&entries, TABLE, 65536 + 512), Ok((vec![512, 65536], true)));
        assert_eq!(lengths(&entries, TABLE, 65536 + 1024), Ok((vec![512, 65536, 512], false)));
        assert_eq!(lengths(&entries, TABLE, 65536 + 1536), Err(BadTable));
    }

    #[test]
    fn tables_that_never_end_do() {
        // All of memory is zeroes: regions of 64 KiB at address 0, without a last.
        let most = MAX_ENTRIES * 0x1_0000;
        assert_eq!(lengths(&[], TABLE, most).unwrap().0.len(), MAX_ENTRIES as usize);
        assert_eq!(lengths(&[], TABLE, most + 512), Err(BadTable));
        assert_eq!(lengths(&[(0x2000, 2, 0); 8192], TABLE, 32 << 20), Err(BadTable));
    }

    #[test]
    fn what_is_not_ram_is_refused() {
        assert_eq!(lengths(&[(0xffff_f000, 512, LAST)], TABLE, 512), Err(BadTable));
        assert_eq!(lengths(&[(0xf_fffe, 512, LAST)], TABLE, 512), Err(BadTable));
        assert_eq!(lengths(&[], 0x10_0000, 512), Err(BadTable));
        assert_eq!(lengths(&[(0x2000, 512, 0)], 0xf_fffc, 512), Err(BadTable));
    }
}
