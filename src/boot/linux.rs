//! The Linux boot protocol, 64-bit entry (Documentation/arch/x86/boot.rst in the kernel's source).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use hypervisor::{BootState, Gpa, GuestMemory, MemoryError, PAGE_SIZE, layout};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{ByteValued, Bytes, GuestAddress};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::{PciBus, acpi, long_mode, smbios};

/// Boot parameters.
const ZERO_PAGE: Gpa = Gpa(0x7000);
const COMMAND_LINE: Gpa = Gpa(0x2_0000);
/// Bytes of command line there is room for, the final zero included.
const COMMAND_LINE_ROOM: usize = 0x1_0000;
/// Bytes that Linux takes where its image does not say, the final zero included; the rest it cuts
/// (COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h).
const COMMAND_LINE_SIZE: u32 = 2048;
/// Conventional memory ends here; PCs keep an "extended BIOS data area" behind it.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;

/// The types of memory in the table that the BIOS call e820 gave.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// "HdrS", which marks a setup header.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot flag at the end of what was once a boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader that has no number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel has a 64-bit entry 0x200 after its start (in `xloadflags`).
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// The largest initrd address for kernels that do not say: ELF images.
const INITRD_MAX: u64 = 0x7fff_ffff;

/// What to boot.
#[derive(Clone, Debug)]
pub struct LinuxBoot<'a> {
    /// A bzImage, or an ELF vmlinux.
    pub kernel: &'a Path,
    /// The initial RAM file system.
    pub initrd: Option<&'a Path>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// How many processors the ACPI tables list.
    pub vps: u32,
    /// The PCI bus that they tell of.
    pub pci: Option<PciBus>,
    /// Whether there are tables that have Linux leave IDE disks to its VMBus drivers.
    pub prefers_vmbus: bool,
}

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A folder, a pipe or a device, where the size of a file matters.
    #[error("{} is no regular file, as a kernel and an initrd have to be", path.display())]
    NoFile {
        /// What it is called.
        path: PathBuf,
    },
    /// Not a kernel, or not one for 64 bits.
    #[error("{}: {problem}; a 64-bit Linux bzImage or ELF vmlinux is needed", path.display())]
    NoKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The memory is too small for what should go into it.
    #[error("{needed} MiB of memory are needed for {what}, the guest has {available} MiB")]
    TooSmall {
        /// What does not fit.
        what: String,
        /// MiB it would take.
        needed: u64,
        /// MiB there are.
        available: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line is {length} bytes long, this kernel takes {limit}")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The command line holds a zero byte.
    #[error("the command line holds a zero byte")]
    CommandLineZero,
    /// No memory where tables should go.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

impl LinuxBoot<'_> {
    /// Puts everything into `memory`, and says where the first processor starts.
    pub fn load(&self, memory: &GuestMemory) -> Result<BootState, BootError> {
        let low_end = memory.size().min(layout::HOLE_START.0);
        let kernel = self.load_kernel(memory, low_end)?;
        let mut header = kernel.header;
        self.load_command_line(memory, &mut header)?;
        if let Some(path) = self.initrd {
            let (start, len) = load_initrd(memory, path, &header, kernel.end, low_end)?;
            header.ramdisk_image = start as u32;
            header.ramdisk_size = len as u32;
        }
        let rsdp = acpi::write(memory, self.vps, self.pci)?;
        if self.prefers_vmbus {
            smbios::write(memory)?;
        }

        let mut parameters = boot_params { hdr: header, ..Default::default() };
        parameters.acpi_rsdp_addr = rsdp.0;
        describe_memory(&mut parameters, memory);
        memory.write(ZERO_PAGE, parameters.as_slice())?;
        Ok(long_mode::prepare(memory, kernel.entry, ZERO_PAGE.0)?)
    }

    fn load_kernel(&self, memory: &GuestMemory, low_end: u64) -> Result<Kernel, BootError> {
        let path = self.kernel;
        let read_error = |source| BootError::Read { path: path.to_owned(), source };
        let no_kernel = |problem| BootError::NoKernel { path: path.to_owned(), problem };
        let too_small = |end: u64| BootError::TooSmall {
            what: format!("the kernel {}", path.display()),
            needed: mib(end),
            available: mib(memory.size()),
        };

        let mut file = open(path)?;
        let size = file.metadata().map_err(read_error)?.len();
        let mut magic = [0; 4];
        if file.read(&mut magic).map_err(read_error)? < magic.len() {
            return Err(no_kernel("it is shorter than four bytes"));
        }
        if magic == *b"\x7fELF" {
            // An upper bound: what is loaded is less than the file and its zeroed end.
            let loaded = load_elf(memory, &mut file).map_err(|_| {
                if HIGH_MEMORY + size > low_end {
                    too_small(HIGH_MEMORY + size)
                } else {
                    no_kernel("it is an ELF file that cannot be loaded")
                }
            })?;
            let header = setup_header {
                boot_flag: BOOT_FLAG,
                header: HEADER_MAGIC,
                type_of_loader: LOADER_UNDEFINED,
                initrd_addr_max: INITRD_MAX as u32,
                cmdline_size: COMMAND_LINE_SIZE - 1,
                ..Default::default()
            };
            let end = elf_end(&mut file)
                .map_err(read_error)?
                .ok_or_else(|| no_kernel("its addresses are absurd"))?;
            if end > low_end {
                return Err(too_small(end));
            }
            let entry = Gpa(loaded.kernel_load.0);
            return Ok(Kernel { entry, end, header });
        }

        let header = read_setup_header(&mut file)
            .map_err(read_error)?
            .ok_or_else(|| no_kernel("it is neither a bzImage nor an ELF file"))?;
        if header.version < 0x020c || header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(no_kernel("it has no 64-bit entry"));
        }
        // Where it wants to run, so that unpacking touches no other memory. While it unpacks it
        // takes `init_size` from there.
        let start = if header.relocatable_kernel != 0 && header.pref_address >= HIGH_MEMORY {
            header.pref_address
        } else {
            HIGH_MEMORY
        };
        let end = start
            .checked_add(u64::from(header.init_size).max(size))
            .ok_or_else(|| no_kernel("its preferred address is absurd"))?;
        if end > low_end {
            return Err(too_small(end));
        }
        if bz_image_len(&header) > size {
            return Err(no_kernel("it is cut short"));
        }
        file.rewind().map_err(read_error)?;
        let loaded = BzImage::load(memory.inner(), Some(GuestAddress(start)), &mut file, None)
            .map_err(|_| no_kernel("it is a damaged bzImage"))?;
        let mut header = loaded.setup_header.unwrap_or(header);
        header.type_of_loader = LOADER_UNDEFINED;
        Ok(Kernel { entry: Gpa(start + ENTRY_64), end, header })
    }

    fn load_command_line(
        &self,
        memory: &GuestMemory,
        header: &mut setup_header,
    ) -> Result<(), BootError> {
        let length = self.command_line.len();
        let limit = (header.cmdline_size as usize).min(COMMAND_LINE_ROOM - 1);
        if length > limit {
            return Err(BootError::CommandLine { length, limit });
        }
        if self.command_line.bytes().any(|byte| byte == 0) {
            return Err(BootError::CommandLineZero);
        }
        memory.write(COMMAND_LINE, self.command_line.as_bytes())?;
        memory.write(Gpa(COMMAND_LINE.0 + length as u64), &[0])?;
        header.cmd_line_ptr = COMMAND_LINE.0 as u32;
        Ok(())
    }
}

/// A kernel in guest memory.
struct Kernel {
    entry: Gpa,
    /// The first address it does not need.
    end: u64,
    header: setup_header,
}

fn open(path: &Path) -> Result<File, BootError> {
    let read_error = |source| BootError::Read { path: path.to_owned(), source };
    // Before it is opened: opening a FIFO would wait.
    if !std::fs::metadata(path).map_err(read_error)?.is_file() {
        return Err(BootError::NoFile { path: path.to_owned() });
    }
    File::open(path).map_err(read_error)
}

/// The bytes of a bzImage by its own account: the boot sector, the setup code in sectors, and the
/// rest in paragraphs of 16.
fn bz_image_len(header: &setup_header) -> u64 {
    // 0 stands for what it was before there was a field.
    let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
    (u64::from(sectors) + 1) * 512 + u64::from(header.syssize) * 16
}

fn load_elf(
    memory: &GuestMemory,
    file: &mut File,
) -> Result<KernelLoaderResult, linux_loader::loader::Error> {
    Elf::load(memory.inner(), None, file, Some(GuestAddress(HIGH_MEMORY)))
}

/// The first address behind all segments of an ELF file that has been loaded, those that take memory
/// and have nothing in the file too; `None` if one is behind the last address.
fn elf_end(file: &mut File) -> io::Result<Option<u64>> {
    let mut header = Elf64Header::new_zeroed();
    file.rewind()?;
    file.read_exact(header.as_mut_bytes())?;
    file.seek(SeekFrom::Start(header.program_headers.get()))?;
    let mut end = 0;
    for _ in 0..header.program_header_count.get() {
        let mut segment = Elf64Segment::new_zeroed();
        file.read_exact(segment.as_mut_bytes())?;
        if segment.kind == Elf64Segment::LOAD {
            match segment.address.get().checked_add(segment.memory_size.get()) {
                Some(its) => end = its.max(end),
                None => return Ok(None),
            }
        }
    }
    Ok(Some(end))
}

/// `Elf64_Ehdr` (elf.h), as far as it is needed.
#[derive(FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Elf64Header {
    identity: [u8; 16],
    kind_and_machine: [u8; 8],
    entry: U64,
    program_headers: U64,
    section_headers: U64,
    flags: U32,
    sizes: [u8; 4],
    program_header_count: U16,
    sections: [u8; 6],
}

const _: () = assert!(size_of::<Elf64Header>() == 64);

/// `Elf64_Phdr` (elf.h).
#[derive(FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Elf64Segment {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_address: U64,
    /// Physical.
    address: U64,
    file_size: U64,
    memory_size: U64,
    alignment: U64,
}

const _: () = assert!(size_of::<Elf64Segment>() == 56);

impl Elf64Segment {
    /// `PT_LOAD`
    const LOAD: U32 = U32::new(1);
}

/// The setup header of a bzImage; `None` if the file is something else.
fn read_setup_header(file: &mut File) -> io::Result<Option<setup_header>> {
    const OFFSET: u64 = 0x1f1;
    let mut header = setup_header::default();
    file.seek(SeekFrom::Start(OFFSET))?;
    match file.read_exact(header.as_mut_slice()) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    Ok((header.header == HEADER_MAGIC).then_some(header))
}

/// Loads the initrd as high as the kernel can find it. Returns its address and length.
fn load_initrd(
    memory: &GuestMemory,
    path: &Path,
    header: &setup_header,
    kernel_end: u64,
    low_end: u64,
) -> Result<(u64, u64), BootError> {
    let read_error = |source| BootError::Read { path: path.to_owned(), source };
    let mut file = open(path)?;
    let len = file.metadata().map_err(read_error)?.len();
    let top = low_end.min(u64::from(header.initrd_addr_max) + 1);
    let start = top
        .checked_sub(len)
        .map(|start| start & !(PAGE_SIZE as u64 - 1))
        .filter(|&start| start >= kernel_end)
        .ok_or_else(|| BootError::TooSmall {
            what: format!("the kernel and the initrd {}", path.display()),
            needed: mib(kernel_end.saturating_add(len)),
            available: mib(memory.size()),
        })?;
    memory
        .inner()
        .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
        .map_err(|error| read_error(io::Error::other(error)))?;
    Ok((start, len))
}

/// The map of memory that a BIOS gives.
fn describe_memory(parameters: &mut boot_params, memory: &GuestMemory) {
    let low_end = memory.size().min(layout::HOLE_START.0);
    let high = memory.regions().nth(1).map(|region| (region.gpa.0, region.len, E820_RAM));
    let ranges = [
        (0, LOW_MEMORY_END, E820_RAM),
        (LOW_MEMORY_END, HIGH_MEMORY - LOW_MEMORY_END, E820_RESERVED),
        (HIGH_MEMORY, low_end - HIGH_MEMORY, E820_RAM),
    ];
    let mut entries = 0;
    for (addr, size, type_) in ranges.into_iter().chain(high) {
        parameters.e820_table[entries] = boot_e820_entry { addr, size, r#type: type_ };
        entries += 1;
    }
    parameters.e820_entries = entries as u8;
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(bytes: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A bzImage of one setup sector and a page of "kernel", filled with 0x90.
    fn bz_image(change: impl FnOnce(&mut setup_header)) -> NamedTempFile {
        let mut header = setup_header {
            setup_sects: 1,
            syssize: 4096 / 16,
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: 0x020f,
            loadflags: 1,
            code32_start: HIGH_MEMORY as u32,
            initrd_addr_max: 0x7fff_ffff,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 100,
            pref_address: 16 * MIB,
            init_size: 4 << 20,
            ..Default::default()
        };
        change(&mut header);
        let mut image = vec![0; 1024];
        image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image.resize(1024 + 4096, 0x90);
        file(&image)
    }

    fn boot<'a>(kernel: &'a NamedTempFile, initrd: Option<&'a NamedTempFile>) -> LinuxBoot<'a> {
        let initrd = initrd.map(NamedTempFile::path);
        LinuxBoot {
            kernel: kernel.path(),
            initrd,
            command_line: "console=ttyS0",
            vps: 2,
            pci: None,
            prefers_vmbus: false,
        }
    }

    fn parameters(memory: &GuestMemory) -> boot_params {
        let mut parameters = boot_params::default();
        memory.read(ZERO_PAGE, parameters.as_mut_slice()).unwrap();
        parameters
    }

    #[test]
    fn everything_is_where_the_kernel_looks_for_it() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        let (kernel, initrd) = (bz_image(|_| {}), file(&[0xab; 5000]));
        let state = boot(&kernel, Some(&initrd)).load(&memory).unwrap();

        assert_eq!((state.entry, state.argument), (Gpa(16 * MIB + 0x200), ZERO_PAGE.0));
        assert_eq!(memory.read_obj::<u8>(state.entry).unwrap(), 0x90);
        let found = parameters(&memory);
        let (image, size) = (found.hdr.ramdisk_image, found.hdr.ramdisk_size);
        assert_eq!((image, size), (0x7fff_e000, 5000));
        assert_eq!(memory.read_obj::<u8>(Gpa(image.into())).unwrap(), 0xab);
        let mut line = [0; 14];
        memory.read(Gpa(found.hdr.cmd_line_ptr.into()), &mut line).unwrap();
        assert_eq!(line, *b"console=ttyS0\0");
        assert_eq!(memory.read_obj::<[u8; 8]>(Gpa(found.acpi_rsdp_addr)).unwrap(), *b"RSD PTR ");

        let map: Vec<_> = found.e820_table[..found.e820_entries.into()]
            .iter()
            .map(|entry| (entry.addr, entry.addr + entry.size, entry.r#type))
            .collect();
        assert_eq!(
            map,
            [(0, 0x9_fc00, 1), (0x9_fc00, MIB, 2), (MIB, 3 << 30, 1), (4 << 30, 5 << 30, 1)]
        );
    }

    #[test]
    fn the_initrd_ends_with_small_memory() {
        let memory = GuestMemory::new(32 * MIB).unwrap();
        let (kernel, initrd) = (bz_image(|_| {}), file(&[0xab; 4096]));
        boot(&kernel, Some(&initrd)).load(&memory).unwrap();
        let image = parameters(&memory).hdr.ramdisk_image;
        assert_eq!(u64::from(image), 32 * MIB - 4096);
    }

    fn refusal(boot: &LinuxBoot<'_>, memory: u64) -> String {
        boot.load(&GuestMemory::new(memory).unwrap()).unwrap_err().to_string()
    }

    /// An ELF file with two segments at these addresses: one with a page of bytes, and one without any
    /// that takes `zeroes` bytes of memory.
    fn elf(code: u64, bss: u64, zeroes: u64) -> NamedTempFile {
        let mut header = Elf64Header::new_zeroed();
        header.identity[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        header.kind_and_machine = [2, 0, 62, 0, 1, 0, 0, 0];
        (header.entry, header.program_headers) = (code.into(), 64.into());
        header.sizes = [64, 0, 56, 0];
        header.program_header_count = 2.into();
        let segment = |address: u64, file_size: u64, memory_size: u64| Elf64Segment {
            kind: Elf64Segment::LOAD,
            flags: 5.into(),
            offset: 4096.into(),
            virtual_address: address.into(),
            address: address.into(),
            file_size: file_size.into(),
            memory_size: memory_size.into(),
            alignment: 4096.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(segment(code, 4096, 4096).as_bytes());
        bytes.extend(segment(bss, 0, zeroes).as_bytes());
        bytes.resize(4096, 0);
        bytes.resize(8192, 0x90);
        file(&bytes)
    }

    #[test]
    fn segments_without_bytes_in_the_file_are_the_kernels_too() {
        let kernel = elf(16 * MIB, 20 * MIB, 8 * MIB);
        let memory = GuestMemory::new(32 * MIB).unwrap();
        let loaded = boot(&kernel, None).load_kernel(&memory, 32 * MIB).unwrap();
        assert_eq!((loaded.entry, loaded.end), (Gpa(16 * MIB), 28 * MIB));
        // The initrd is not put where the kernel's zeroes are to be.
        let initrd = file(&vec![0; 5 << 20]);
        let text = refusal(&boot(&kernel, Some(&initrd)), 32 * MIB);
        assert!(text.starts_with("33 MiB of memory are needed for the kernel and"), "{text}");
        let text = refusal(&boot(&kernel, None), 24 * MIB);
        assert!(text.starts_with("28 MiB of memory are needed for the kernel"), "{text}");
        let text = refusal(&boot(&elf(16 * MIB, u64::MAX, 2), None), 32 * MIB);
        assert!(text.contains("its addresses are absurd"), "{text}");
    }

    #[test]
    fn a_kernel_that_does_not_say_takes_2047_bytes_of_command_line() {
        let kernel = elf(16 * MIB, 20 * MIB, MIB);
        let memory = GuestMemory::new(32 * MIB).unwrap();
        let line = "x".repeat(2047);
        LinuxBoot { command_line: &line, ..boot(&kernel, None) }.load(&memory).unwrap();
        let line = "x".repeat(2048);
        let long = LinuxBoot { command_line: &line, ..boot(&kernel, None) };
        let text = refusal(&long, 32 * MIB);
        assert_eq!(text, "the command line is 2048 bytes long, this kernel takes 2047");
        // One that does is believed.
        let kernel = bz_image(|header| header.cmdline_size = 4095);
        let long = LinuxBoot { command_line: &line, ..boot(&kernel, None) };
        long.load(&GuestMemory::new(64 * MIB).unwrap()).unwrap();
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let text = |kernel: &NamedTempFile| refusal(&boot(kernel, None), 64 * MIB);
        assert!(text(&file(b"")).contains("shorter than four bytes"));
        assert!(text(&file(b"#!/bin/sh\n")).contains("neither a bzImage nor an ELF"));
        assert!(text(&file(&[0; 4096])).contains("neither a bzImage nor an ELF"));
        assert!(text(&file(b"\x7fELF\x02\x01\x01rubbish")).contains("cannot be loaded"));
        assert!(text(&bz_image(|h| h.xloadflags = 0)).contains("no 64-bit entry"));
        assert!(text(&bz_image(|h| h.syssize += 1)).contains("it is cut short"));
        assert!(text(&bz_image(|h| h.version = 0x0206)).contains("no 64-bit entry"));
        assert!(text(&bz_image(|h| h.pref_address = u64::MAX)).contains("absurd"));
        assert!(text(&bz_image(|h| h.setup_sects = 0xff)).contains("it is cut short"));
        assert!(text(&bz_image(|h| h.loadflags = 0)).contains("damaged"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let kernel = bz_image(|_| {});
        let text = refusal(&boot(&kernel, None), 16 * MIB);
        assert!(text.starts_with("20 MiB of memory are needed for the kernel"), "{text}");
        let initrd = file(&vec![0; 5 << 20]);
        let text = refusal(&boot(&kernel, Some(&initrd)), 24 * MIB);
        assert!(text.starts_with("25 MiB of memory are needed for the kernel and"), "{text}");

        let line = "x".repeat(101);
        let long = LinuxBoot { command_line: &line, ..boot(&kernel, None) };
        assert!(refusal(&long, 64 * MIB).contains("101 bytes long, this kernel takes 100"));
        let zero = LinuxBoot { command_line: "a\0b", ..boot(&kernel, None) };
        assert!(refusal(&zero, 64 * MIB).contains("zero byte"));
    }

    #[test]
    fn files_that_are_not_there_are_named() {
        let kernel = bz_image(|_| {});
        let initrd = Path::new("/nonexistent/initrd");
        let missing = LinuxBoot { initrd: Some(initrd), ..boot(&kernel, None) };
        let text = refusal(&missing, 64 * MIB);
        assert_eq!(text, "cannot read /nonexistent/initrd");
        let directory = LinuxBoot { kernel: Path::new("/"), ..boot(&kernel, None) };
        assert!(refusal(&directory, 64 * MIB).starts_with("/ is no regular file"));
    }
}
