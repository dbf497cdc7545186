//! The numbers everybody passes around, each with a type of its own.

use std::fmt;

/// Bytes in a guest page, everywhere in this project.
pub const PAGE_SIZE: usize = 4096;

/// A guest physical address, in bytes. Says nothing about whether memory is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gpa(pub u64);

impl Gpa {
    /// `None` if the sum does not fit.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A guest page number: a [`Gpa`] divided by 4096, as guests put it into GPADLs and packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gpn(pub u64);

impl Gpn {
    /// The page's first byte; `None` if no address that high exists.
    pub fn gpa(self) -> Option<Gpa> {
        self.0.checked_mul(PAGE_SIZE as u64).map(Gpa)
    }
}

/// The index of a virtual processor, from 0; also its APIC id and its Hyper-V VP index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VpIndex(pub u32);
