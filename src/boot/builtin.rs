//! The built-in guest: its image and a page of parameters.

use std::io::Cursor;

use guest_drivers::boot::{BootParameters, IMAGE_START, MAX_VPS};
use hypervisor::{BootState, DOORBELL_PORT, Gpa, GuestMemory, MemoryError, layout};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::long_mode;

/// The image, an ELF file that `build.rs` has built.
static IMAGE: &[u8] = include_bytes!(env!("BUILTIN_GUEST"));

/// Where Linux has its parameters.
const PARAMETERS: Gpa = Gpa(0x7000);

/// What to boot.
#[derive(Clone, Debug)]
pub struct BuiltinBoot<'a> {
    /// The work it shall do.
    pub command_line: &'a str,
    /// Virtual processors.
    pub vps: u32,
    /// Whether a port serves as the hypercall *signal event*.
    pub doorbell: bool,
}

/// Why the built-in guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BuiltinError {
    /// More work than fits into the page of parameters.
    #[error("the built-in guest takes {room} bytes of work, not {len}", room = BootParameters::COMMAND_LINE_ROOM)]
    TooMuchWork {
        /// Bytes of it.
        len: usize,
    },
    /// The memory is too small for the image.
    #[error("the built-in guest does not fit into {0} bytes of memory")]
    TooSmall(u64),
    /// More processors than the image has room for.
    #[error("the built-in guest has 1 to {MAX_VPS} virtual processors, not {0}")]
    VpCount(u32),
    /// No memory where tables should go.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl BuiltinBoot<'_> {
    /// Puts everything into `memory`, and says where the processors start, all of them at once.
    pub fn load(&self, memory: &GuestMemory) -> Result<BootState, BuiltinError> {
        if !(1..=MAX_VPS).contains(&(self.vps as usize)) {
            return Err(BuiltinError::VpCount(self.vps));
        }
        let line = self.command_line;
        let memory_end = memory.size().min(layout::HOLE_START.0);
        let mut parameters = BootParameters::new(memory_end, self.vps, line)
            .ok_or(BuiltinError::TooMuchWork { len: line.len() })?;
        if self.doorbell {
            parameters.doorbell_port = DOORBELL_PORT.into();
        }
        memory.write_obj(PARAMETERS, &parameters)?;
        let mut image = Cursor::new(IMAGE);
        let start = Some(GuestAddress(IMAGE_START));
        let loaded = Elf::load(memory.inner(), None, &mut image, start)
            .map_err(|_| BuiltinError::TooSmall(memory.size()))?;
        let entry = Gpa(loaded.kernel_load.0);
        Ok(long_mode::prepare(memory, entry, PARAMETERS.0)?)
    }
}
