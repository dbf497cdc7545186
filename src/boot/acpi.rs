//! The ACPI tables of the machine (ACPI specification 6.5).
//!
//! Fixed hardware is what [`emulators::PmBlock`] has. There is no `\_S4`: with it, Linux's
//! hv_balloon driver believes that the guest may hibernate, and does nothing.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Method, Name, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use emulators::pci::{self, ConfigPorts, IoWindow};
use emulators::{IdePlace, PmBlock, ResetRegister, Rtc, SLEEP_TYPE_S5, SmBus, Uart};
use hypervisor::{Gpa, GuestMemory, MemoryError, layout};

/// Where a BIOS would have them, and where guests look when nobody tells them.
const TABLES: Gpa = Gpa(0xe_0000);
/// Up to where the SMBIOS tables may be.
const TABLES_SIZE: usize = 0x1_0000;

/// Ports that a PIIX4's power management has by its datasheet, though the most of them do nothing
/// here. Who knows the chip takes them as its own, however few a machine uses.
const PIIX4_PM_PORTS: u16 = 64;

const OEM_ID: [u8; 6] = *b"PARTIT";
const OEM_TABLE_ID: [u8; 8] = *b"PARTITA ";
const OEM_REVISION: u32 = 1;

/// A machine's PCI bus, as far as the tables have to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciBus {
    /// Whether it has an IDE controller.
    pub ide: bool,
}

/// Writes the tables for `vps` processors, and a PCI bus if there is one. Returns where the root
/// pointer is.
pub(super) fn write(
    memory: &GuestMemory,
    vps: u32,
    pci: Option<PciBus>,
) -> Result<Gpa, MemoryError> {
    let tables = build(vps, pci);
    debug_assert!(tables.len() <= TABLES_SIZE);
    memory.write(TABLES, &tables)?;
    Ok(TABLES)
}

/// All tables as they lie at [`TABLES`], the root pointer first.
fn build(vps: u32, pci: Option<PciBus>) -> Vec<u8> {
    // Tables name each other by address, so each is placed before those that name it.
    let mut image = vec![0; Rsdp::len()];
    let mut place = |table: &[u8]| {
        image.resize(image.len().next_multiple_of(64), 0); // the FACS wants this alignment
        let address = TABLES.0 + image.len() as u64;
        image.extend_from_slice(table);
        address
    };
    let facs = place(&bytes(&FACS::new()));
    let dsdt = place(dsdt(pci).as_slice());
    let fadt = place(&fadt(facs, dsdt));
    let madt = place(madt(vps, pci.is_some()).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    const HEADER: u32 = 36;
    Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

/// The fixed hardware, and what a guest need not look for.
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    // IA-PC boot architecture flags: there are ISA devices, and no VGA. The bit for a keyboard
    // controller stays clear, so that nobody looks for a keyboard; its reset works all the same.
    const LEGACY_DEVICES: u16 = 1;
    const NO_VGA: u16 = 1 << 2;

    let port = |offset: u16| PmBlock::PORT + offset;
    let register = |offset: u16, bits: u8, access: AccessSize| {
        GAS::new(GasSpace::SystemIo, bits, 0, access, port(offset).into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1) // every processor can sleep by HLT, which no system has to be told twice
        .flag(Flags::SlpButton) // no fixed sleep button
        .flag(Flags::TmrValExt) // the timer has 32 bits
        .flag(Flags::ResetRegSup);
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(PmBlock::SCI).into();
    fadt.pm1a_evt_blk = u32::from(port(PmBlock::EVENT)).into();
    fadt.pm1a_cnt_blk = u32::from(port(PmBlock::CONTROL)).into();
    fadt.pm_tmr_blk = u32::from(port(PmBlock::TIMER)).into();
    fadt.x_pm1a_evt_blk = register(PmBlock::EVENT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = register(PmBlock::CONTROL, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = register(PmBlock::TIMER, 32, AccessSize::DwordAccess);
    (fadt.pm1_evt_len, fadt.pm1_cnt_len, fadt.pm_tmr_len) = (4, 2, 4);
    // Latencies this large, of more than 100 and 1000 us, say that there are no such processor states.
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (0xfff.into(), 0xffff.into());
    fadt.century = Rtc::CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg =
        GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, ResetRegister::PORT.into());
    fadt.reset_value = ResetRegister::VALUE;
    bytes(&fadt.finalize())
}

/// The interrupt controllers.
fn madt(vps: u32, pci: bool) -> Sdt {
    const HAS_PICS: u32 = 1;
    const ENABLED: u32 = 1;
    const ALL_PROCESSORS: u8 = 0xff;
    const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

    let mut madt = table(*b"APIC", 5);
    madt.append(layout::LOCAL_APIC.0 as u32);
    madt.append(HAS_PICS);
    for vp in 0..vps {
        madt.append_slice(&[0, 8, vp as u8, vp as u8]);
        madt.append(ENABLED);
    }
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append(layout::IOAPIC.0 as u32);
    madt.append(0_u32); // its first interrupt
    // The SCI is not an edge like the other ISA interrupts.
    madt.append_slice(&[2, 10, 0, PmBlock::SCI]);
    madt.append(u32::from(PmBlock::SCI));
    madt.append(ACTIVE_HIGH_LEVEL);
    // Nor are those of PCI's interrupt pins.
    for irq in pci::IRQS.into_iter().filter(|_| pci) {
        madt.append_slice(&[2, 10, 0, irq]);
        madt.append(u32::from(irq));
        madt.append(ACTIVE_HIGH_LEVEL);
    }
    // NMIs come in by LINT1.
    madt.append_slice(&[4, 6, ALL_PROCESSORS, 0, 0, 1]);
    madt
}

/// The devices: the VMBus, COM1, and the PCI bus if there is one.
fn dsdt(pci: Option<PciBus>) -> Sdt {
    let mut dsdt = table(*b"DSDT", 2);
    let mut add = |term: &dyn Aml| dsdt.append_slice(&bytes(term));

    let soft_off = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &0_u8, &0_u8]);
    add(&Name::new(Path::new("_S5_"), &soft_off));

    let hid = Name::new("_HID".into(), &"VMBus");
    let uid = Name::new("_UID".into(), &0_u8);
    let ddn = Name::new("_DDN".into(), &"VMBUS");
    let status = Name::new("_STA".into(), &0xf_u8);
    let (first, size) = (layout::VMBUS_MMIO_START.0 as u32, layout::VMBUS_MMIO_SIZE as u32);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        first,
        first + (size - 1),
        None,
    );
    let resources = ResourceTemplate::new(vec![&window]);
    let resources = Name::new("_CRS".into(), &resources);
    let vmbus = Device::new("VMB8".into(), vec![&hid, &uid, &ddn, &status, &resources]);

    let com1_hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let com1_uid = Name::new("_UID".into(), &1_u8);
    let ports = IO::new(Uart::COM1, Uart::COM1, 1, Uart::PORTS as u8);
    let interrupt = Interrupt::new(true, true, false, false, Uart::COM1_IRQ.into());
    let com1_resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    let com1_resources = Name::new("_CRS".into(), &com1_resources);
    let com1 = Device::new("COM1".into(), vec![&com1_hid, &com1_uid, &com1_resources]);

    add(&Scope::new("_SB_".into(), vec![&vmbus, &com1]));
    if let Some(pci) = pci {
        add_pci(&mut add, pci);
    }
    dsdt
}

/// The first and the last of each range of ports that go through to the bus's devices: to where they
/// may be moved, and to where the PIIX4's functions are for good. Elsewhere a function that a guest
/// moves would not be found, so that no more is promised.
fn windows(pci: PciBus) -> Vec<(u16, u16)> {
    let range = |first: u16, ports: u16| (first, first + (ports - 1));
    let mut windows = vec![
        range(PmBlock::PORT, PIIX4_PM_PORTS),
        range(SmBus::PORT, SmBus::PORTS),
        range(IoWindow::PORT, IoWindow::PORTS),
    ];
    if pci.ide {
        for place in IdePlace::ALL {
            windows.push(range(place.command, IdePlace::PORTS));
            // A control block has four ports, of which one is used. Linux ignores a window of one.
            windows.push(range(place.control - 2, 4));
        }
    }
    windows.sort_unstable();
    windows
}

/// The PCI bus: its configuration ports are its own, and some others and a window of memory go
/// through to its devices.
fn add_pci(add: &mut impl FnMut(&dyn Aml), pci: PciBus) {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &0_u8);
    let bus = Name::new("_BBN".into(), &0_u8);

    let buses = AddressSpace::new_bus_number(0_u16, 0);
    let first = ConfigPorts::PORT;
    let configuration = IO::new(first, first, 1, ConfigPorts::PORTS as u8);
    let windows: Vec<_> = windows(pci)
        .into_iter()
        .map(|(first, last)| AddressSpace::new_io(first, last, None))
        .collect();
    let (start, size) = (layout::PCI_MMIO_START.0 as u32, layout::PCI_MMIO_SIZE as u32);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        start,
        start + (size - 1),
        None,
    );
    let mut resources: Vec<&dyn Aml> = vec![&buses, &configuration, &memory];
    resources.extend(windows.iter().map(|window| window as &dyn Aml));
    let resources = ResourceTemplate::new(resources);
    let resources = Name::new("_CRS".into(), &resources);

    // Pin A of each device; no function has another. The links are fixed, and there only because a
    // route without one is active low, which our lines are not.
    const ALL_FUNCTIONS: u32 = 0xffff;
    let links: Vec<_> = (0..).zip(pci::IRQS).map(|(index, irq)| (link_name(index), irq)).collect();
    for (index, (name, irq)) in (0_u8..).zip(&links) {
        add_link(add, index, name, *irq);
    }
    let link_of = |device| {
        let irq = pci::irq_of(device);
        let (name, _) = links.iter().find(|(_, at)| *at == irq).expect("every pin has a link");
        Path::new(name)
    };
    let entries: Vec<_> = (pci::FIRST_SLOT..pci::SLOTS)
        .map(|device| (u32::from(device) << 16 | ALL_FUNCTIONS, link_of(device)))
        .collect();
    let entries: Vec<_> = entries
        .iter()
        .map(|(address, link)| Package::new(vec![address, &0_u8, link, &0_u8]))
        .collect();
    let routes = Package::new(entries.iter().map(|entry| entry as &dyn Aml).collect());
    let routes = Name::new("_PRT".into(), &routes);
    let root = Device::new("PCI0".into(), vec![&hid, &uid, &bus, &resources, &routes]);
    add(&Scope::new("_SB_".into(), vec![&root]));
}

/// The name of the link device with this index.
fn link_name(index: u8) -> String {
    format!("LNK{}", char::from(b'A' + index))
}

/// A link between interrupt pins and `irq`, which cannot be changed.
fn add_link(add: &mut impl FnMut(&dyn Aml), index: u8, name: &str, irq: u8) {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C0F"));
    let uid = Name::new("_UID".into(), &(index + 1));
    let status = Name::new("_STA".into(), &0xb_u8); // there, enabled, not for users to see
    // Level-triggered, active high, shared.
    let interrupt = Interrupt::new(true, false, false, true, irq.into());
    let possible = ResourceTemplate::new(vec![&interrupt]);
    let possible = Name::new("_PRS".into(), &possible);
    let interrupt = Interrupt::new(true, false, false, true, irq.into());
    let current = ResourceTemplate::new(vec![&interrupt]);
    let current = Name::new("_CRS".into(), &current);
    let disable = Method::new("_DIS".into(), 0, false, vec![]);
    let set = Method::new("_SRS".into(), 1, false, vec![]);
    let link =
        Device::new(name.into(), vec![&hid, &uid, &status, &possible, &current, &disable, &set]);
    add(&Scope::new("_SB_".into(), vec![&link]));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(image: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(image[offset..offset + 4].try_into().unwrap())
    }

    fn at(image: &[u8], address: u64) -> &[u8] {
        let start = (address - TABLES.0) as usize;
        let len = word(image, start + 4) as usize;
        &image[start..start + len]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The tables that the root names, in order.
    fn tables(image: &[u8]) -> Vec<&[u8]> {
        assert_eq!(image[..8], *b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let xsdt = at(image, u64::from_le_bytes(image[24..32].try_into().unwrap()));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        xsdt[36..]
            .chunks_exact(8)
            .map(|address| at(image, u64::from_le_bytes(address.try_into().unwrap())))
            .collect()
    }

    #[test]
    fn every_table_is_found_and_adds_up() {
        let image = build(3, Some(PciBus { ide: true }));
        assert!(image.len() <= TABLES_SIZE);
        let tables = tables(&image);
        let signatures: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC"]);
        assert!(tables.iter().all(|table| sum(table) == 0));

        let fadt = tables[0];
        let facs = at(&image, word(fadt, 36).into());
        assert_eq!((&facs[..4], word(fadt, 36) % 64), (&b"FACS"[..], 0));
        let dsdt = at(&image, word(fadt, 40).into());
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
    }

    #[test]
    fn the_fadt_says_which_states_processors_have() {
        let image = build(2, None);
        let fadt = tables(&image)[0];
        let half = |offset: usize| u16::from_le_bytes([fadt[offset], fadt[offset + 1]]);
        const PROC_C1: u32 = 1 << 2;
        assert_eq!(word(fadt, 112) & PROC_C1, PROC_C1);
        // P_LVL2_LAT and P_LVL3_LAT (ACPI 6.5, table 5.9): there is neither C2 nor C3.
        assert!(half(96) > 100 && half(98) > 1000);
    }

    /// The ranges of ports that the bridge passes on, as the table's bytes have them: a word address
    /// space descriptor (ACPI 6.5, 6.4.3.5.3) of type I/O.
    fn promised(dsdt: &[u8]) -> Vec<(u16, u16)> {
        let half = |at: &[u8]| u16::from_le_bytes([at[0], at[1]]);
        let descriptors = dsdt.windows(16).filter(|at| at[..4] == [0x88, 13, 0, 1]);
        descriptors.map(|at| (half(&at[8..]), half(&at[10..]))).collect()
    }

    #[test]
    fn the_dsdt_promises_pci_functions_the_ports_where_they_are_found() {
        let always = [(0x600, 0x63f), (0x700, 0x70f), (0xc000, 0xffff)];
        let with_ide = [(0x170, 0x177), (0x1f0, 0x1f7), (0x374, 0x377), (0x3f4, 0x3f7)];
        let of = |pci| promised(dsdt(pci).as_slice());
        assert_eq!(of(None), []);
        assert_eq!(of(Some(PciBus { ide: false })), always);
        assert_eq!(of(Some(PciBus { ide: true })), [&with_ide[..], &always].concat());
    }

    #[test]
    fn the_madt_lists_every_processor() {
        for vps in [1, 2, 254] {
            let image = build(vps, None);
            let madt = tables(&image)[1];
            let mut entries = &madt[44..];
            let mut processors = Vec::new();
            let mut kinds = Vec::new();
            while !entries.is_empty() {
                let (entry, rest) = entries.split_at(entries[1].into());
                match entry[0] {
                    0 => processors.push(u32::from(entry[3])),
                    kind => kinds.push(kind),
                }
                entries = rest;
            }
            assert_eq!(processors, (0..vps).collect::<Vec<_>>());
            assert_eq!(kinds, [1, 2, 4]);
        }
    }

    #[test]
    fn the_dsdt_names_the_vmbus_and_no_hibernation() {
        let dsdt = dsdt(None);
        let has = |name: &[u8]| dsdt.as_slice().windows(name.len()).any(|window| window == name);
        assert!(!has(b"PCI0"));
        assert!(has(b"VMBus\0"));
        assert!(has(b"_S5_"));
        assert!(!has(b"_S4_"));
    }
}
