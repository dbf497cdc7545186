//! The tables a processor needs to start in long mode.

use hypervisor::{BootState, Gpa, GuestMemory, MemoryError};

const GDT: Gpa = Gpa(0x500);
const STACK: Gpa = Gpa(0x8ff0);
const PAGE_TABLES: Gpa = Gpa(0x9000);

/// Selectors that the Linux boot protocol asks for (`__BOOT_CS`, `__BOOT_DS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// Flat segments: nothing, nothing, 64-bit code, data.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const HUGE: u64 = 1 << 7;

/// Writes the tables and says with which state to start at `entry`, with `argument` in rsi.
pub fn prepare(memory: &GuestMemory, entry: Gpa, argument: u64) -> Result<BootState, MemoryError> {
    memory.write_obj(GDT, &GDT_ENTRIES)?;

    // One page at the top, one below it, and four whose entries map 2 MiB each.
    let table = |n: u64| Gpa(PAGE_TABLES.0 + n * 4096);
    let put = |table: Gpa, index: u64, entry: u64| {
        memory.write_obj(Gpa(table.0 + index * 8), &(entry | PRESENT | WRITABLE))
    };
    put(table(0), 0, table(1).0)?;
    for gib in 0..4 {
        let directory = table(2 + gib);
        put(table(1), gib, directory.0)?;
        for index in 0..512 {
            put(directory, index, gib << 30 | index << 21 | HUGE)?;
        }
    }
    Ok(BootState {
        entry,
        argument,
        stack: STACK,
        page_table: table(0),
        gdt: GDT,
        gdt_limit: (size_of_val(&GDT_ENTRIES) - 1) as u16,
        code_selector: CODE_SELECTOR,
        data_selector: DATA_SELECTOR,
    })
}
