//! The SMBIOS tables of the machine (System Management BIOS reference specification 2.8): no more
//! than its maker and its name.
//!
//! They are those of a Hyper-V host's guests, as Linux's ata_piix asks for nothing else: where they
//! stand, it leaves ATA disks alone and expects them on the VMBus. So a machine has these tables if
//! all of its IDE disks are there, and none at all otherwise.

use hypervisor::{Gpa, GuestMemory, MemoryError};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

/// Guests look for the entry point from here to the end of the BIOS area, at multiples of 16.
const ENTRY_POINT: Gpa = Gpa(0xf_0000);
/// The structures follow it.
const STRUCTURES: Gpa = Gpa(ENTRY_POINT.0 + 32);

const MANUFACTURER: &str = "Microsoft Corporation";
const PRODUCT: &str = "Virtual Machine";

/// The way to the structures (section 5.2.1).
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct EntryPoint {
    anchor: [u8; 4],
    /// All bytes add up to zero.
    checksum: u8,
    length: u8,
    version: [u8; 2],
    largest_structure: U16,
    revision: u8,
    formatted_area: [u8; 5],
    intermediate: Intermediate,
}

/// The part of the entry point that older software reads alone.
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Intermediate {
    anchor: [u8; 5],
    /// All bytes from the anchor on add up to zero.
    checksum: u8,
    length: U16,
    address: U32,
    count: U16,
    /// In binary-coded decimal.
    version: u8,
}

const _: () = assert!(size_of::<EntryPoint>() == 0x1f);
const _: () = assert!(size_of::<Intermediate>() == 0xf);

/// What each structure starts with (section 6.1.2).
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: u8,
    length: u8,
    handle: U16,
}

/// BIOS information (type 0). Strings are numbered from 1 in the order in which they follow.
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Bios {
    header: Header,
    vendor: u8,
    version: u8,
    segment: U16,
    date: u8,
    rom_size: u8,
    characteristics: U64,
    more_characteristics: [u8; 2],
    release: [u8; 2],
    controller_release: [u8; 2],
}

/// System information (type 1).
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct System {
    header: Header,
    manufacturer: u8,
    product: u8,
    version: u8,
    serial: u8,
    uuid: [u8; 16],
    wake_up: u8,
    sku: u8,
    family: u8,
}

const _: () = assert!(size_of::<Bios>() == 0x18);
const _: () = assert!(size_of::<System>() == 0x1b);

/// Writes the tables to where guests look for them.
pub(super) fn write(memory: &GuestMemory) -> Result<(), MemoryError> {
    let (entry_point, structures) = build();
    memory.write(ENTRY_POINT, entry_point.as_bytes())?;
    memory.write(STRUCTURES, &structures)
}

fn build() -> (EntryPoint, Vec<u8>) {
    const VERSION: [u8; 2] = [2, 8];

    let mut structures = Vec::new();
    let (mut count, mut largest) = (0_u16, 0);
    let mut add = |structure: &[u8], strings: &[&str]| {
        let start = structures.len();
        structures.extend_from_slice(structure);
        for string in strings {
            structures.extend_from_slice(string.as_bytes());
            structures.push(0);
        }
        structures.extend_from_slice(if strings.is_empty() { &[0, 0] } else { &[0] });
        count += 1;
        largest = largest.max((structures.len() - start) as u16);
    };
    let header = |kind: u8, length: usize| Header {
        kind,
        length: length as u8,
        handle: U16::new(kind.into()),
    };
    let bios = Bios {
        header: header(0, size_of::<Bios>()),
        vendor: 1,
        version: 2,
        segment: U16::new((ENTRY_POINT.0 >> 4) as u16),
        date: 3,
        rom_size: 0,                  // 64 KiB
        characteristics: U64::new(8), // none that is described
        // There is ACPI, and this is a virtual machine.
        more_characteristics: [1, 0x10],
        release: [0xff; 2],
        controller_release: [0xff; 2],
    };
    add(bios.as_bytes(), &["Partita", env!("CARGO_PKG_VERSION"), "01/01/2026"]);
    let system = System {
        header: header(1, size_of::<System>()),
        manufacturer: 1,
        product: 2,
        version: 0,
        serial: 0,
        uuid: [0; 16], // it has none
        wake_up: 6,    // the power switch
        sku: 0,
        family: 0,
    };
    add(system.as_bytes(), &[MANUFACTURER, PRODUCT]);
    const END: u8 = 127;
    add(header(END, size_of::<Header>()).as_bytes(), &[]);

    let mut intermediate = Intermediate {
        anchor: *b"_DMI_",
        checksum: 0,
        length: U16::new(structures.len() as u16),
        address: U32::new(STRUCTURES.0 as u32),
        count: U16::new(count),
        version: VERSION[0] << 4 | VERSION[1],
    };
    intermediate.checksum = sum(intermediate.as_bytes()).wrapping_neg();
    let mut entry_point = EntryPoint {
        anchor: *b"_SM_",
        checksum: 0,
        length: size_of::<EntryPoint>() as u8,
        version: VERSION,
        largest_structure: U16::new(largest),
        revision: 0,
        formatted_area: [0; 5],
        intermediate,
    };
    entry_point.checksum = sum(entry_point.as_bytes()).wrapping_neg();
    (entry_point, structures)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The structures as a guest walks them: kind, and strings.
    fn walk(mut table: &[u8]) -> Vec<(u8, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, length, ..] = *table {
            let strings = &table[length.into()..];
            let end = strings.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let text = std::str::from_utf8(&strings[..end]).unwrap();
            found.push((kind, text.split_terminator('\0').map(str::to_owned).collect()));
            table = &strings[end + 2..];
        }
        found
    }

    #[test]
    fn guests_find_what_hyper_v_says() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        write(&memory).unwrap();
        let mut entry = [0; 0x1f];
        memory.read(Gpa(0xf_0000), &mut entry).unwrap();
        assert_eq!((&entry[..4], sum(&entry)), (&b"_SM_"[..], 0));
        assert_eq!((&entry[0x10..0x15], sum(&entry[0x10..])), (&b"_DMI_"[..], 0));
        let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        let address = u32::from_le_bytes(entry[0x18..0x1c].try_into().unwrap());
        let mut table = vec![0; word(0x16).into()];
        memory.read(Gpa(address.into()), &mut table).unwrap();

        let structures = walk(&table);
        assert_eq!(structures.len(), usize::from(word(0x1c)));
        assert_eq!(structures[1], (1, vec![MANUFACTURER.to_owned(), PRODUCT.to_owned()]));
        assert_eq!(structures.last().unwrap().0, 127);
    }

    #[test]
    fn no_string_sends_ata_piix_back_to_its_disks() {
        // It takes this product version for a host whose VMBus has no disks.
        let (_, structures) = build();
        assert!(!structures.windows(8).any(|window| window == b"VS2005R2"));
    }
}
