//! What the built-in guest is told when it starts, and the ports it knows.
//!
//! The VMM loads the image, an ELF file, where it wants to be, puts a [`BootParameters`] page
//! somewhere below it and starts all processors in long mode at the image's entry, with the
//! page's address in rsi and the first 4 GiB mapped to themselves. Each goes by the number of its
//! local APIC, from 0 on.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where the image lies: 2 MiB. Below it is whatever the VMM needs for the start.
pub const IMAGE_START: u64 = 0x20_0000;

/// The serial port that the guest's lines go to, COM1's data register.
pub const CONSOLE_PORT: u16 = 0x3f8;

/// A 32-bit write here ends the guest with that status. Other VMMs have a device for tests at the
/// same port.
pub const EXIT_PORT: u16 = 0x501;

/// Virtual processors that the image has room for.
pub const MAX_VPS: usize = 8;

/// The page of parameters.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootParameters {
    /// [`BootParameters::MAGIC`]
    pub magic: u64,
    /// RAM ends here, or the part of it below the hole does.
    pub memory_end: u64,
    /// Virtual processors, at most [`MAX_VPS`].
    pub vps: u32,
    /// Bytes of `command_line` in use.
    pub command_line_len: u32,
    /// A port where a 32-bit write of a connection's number is the hypercall *signal event*, for
    /// code at CPL 3 too; 0 if there is none.
    pub doorbell_port: u32,
    /// Zero.
    pub reserved: u32,
    /// The work to be done, as [`crate::work`] reads it.
    pub command_line: [u8; Self::COMMAND_LINE_ROOM],
}

const _: () = assert!(size_of::<BootParameters>() == 4096);

impl BootParameters {
    /// Marks the page, and the version of its layout in the last byte.
    pub const MAGIC: u64 = u64::from_be_bytes(*b"Partita\x01");

    /// Bytes that a command line may have.
    pub const COMMAND_LINE_ROOM: usize = 4096 - 32;

    /// The parameters for a guest with so much RAM and no doorbell port; `None` if the command line
    /// is too long.
    pub fn new(memory_end: u64, vps: u32, command_line: &str) -> Option<Self> {
        let mut parameters = Self {
            magic: Self::MAGIC,
            memory_end,
            vps,
            command_line_len: u32::try_from(command_line.len()).ok()?,
            doorbell_port: 0,
            reserved: 0,
            command_line: [0; Self::COMMAND_LINE_ROOM],
        };
        let room = parameters.command_line.get_mut(..command_line.len())?;
        room.copy_from_slice(command_line.as_bytes());
        Some(parameters)
    }

    /// The command line, if this is such a page.
    pub fn command_line(&self) -> Option<&str> {
        if self.magic != Self::MAGIC {
            return None;
        }
        let len = usize::try_from(self.command_line_len).ok()?;
        str::from_utf8(self.command_line.get(..len)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;

    use super::*;

    #[test]
    fn parameters_arrive() {
        let parameters = BootParameters::new(64 << 20, 1, "identify").unwrap();
        let parameters = BootParameters::read_from_bytes(parameters.as_bytes()).unwrap();
        assert_eq!(parameters.command_line(), Some("identify"));
        assert_eq!((parameters.memory_end, parameters.vps), (64 << 20, 1));
    }

    #[test]
    fn what_is_no_page_of_parameters_is_not_taken_for_one() {
        let line = String::from_utf8([b'x'; BootParameters::COMMAND_LINE_ROOM].to_vec()).unwrap();
        assert_eq!(BootParameters::new(0, 1, &line).unwrap().command_line(), Some(&*line));
        assert!(BootParameters::new(0, 1, &(line + "x")).is_none());

        let right = BootParameters::new(0, 1, "identify").unwrap();
        let wrong = BootParameters { magic: right.magic + 1, ..right.clone() };
        assert_eq!(wrong.command_line(), None);
        let long = BootParameters { command_line_len: 4096, ..right.clone() };
        assert_eq!(long.command_line(), None);
        let mut binary = right;
        binary.command_line[0] = 0xff;
        assert_eq!(binary.command_line(), None);
    }
}
