//! GUIDs, by which VMBus names device classes and instances.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A GUID as it lies on the wire: the first three groups little-endian, the rest as written.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct Guid([u8; 16]);

const _: () = assert!(size_of::<Guid>() == 16);

/// Where byte `i` of the wire form stands in the textual form, counted in bytes of hex digits.
const TEXT_ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// All zero.
    pub const ZERO: Self = Self([0; 16]);

    /// The GUID written as `ba6163d9-04a1-4d29-b605-72e2ffb1dc7f`.
    ///
    /// # Panics
    /// If `text` has another form; meant for constants, where that is an error of compilation.
    pub const fn new(text: &str) -> Self {
        match Self::parse(text) {
            Some(guid) => guid,
            None => panic!("a GUID is written as 8-4-4-4-12 hexadecimal digits"),
        }
    }

    /// The GUID written as `ba6163d9-04a1-4d29-b605-72e2ffb1dc7f`; `None` for any other form.
    pub const fn parse(text: &str) -> Option<Self> {
        let text = text.as_bytes();
        if text.len() != 36 {
            return None;
        }
        let mut nibbles = [0u8; 32];
        let (mut at, mut count) = (0, 0);
        while at < 36 {
            let c = text[at];
            let dash = at == 8 || at == 13 || at == 18 || at == 23;
            let digit = match c {
                b'0'..=b'9' => c - b'0',
                b'a'..=b'f' => c - b'a' + 10,
                b'A'..=b'F' => c - b'A' + 10,
                b'-' if dash => 0,
                _ => return None,
            };
            if dash != (c == b'-') {
                return None;
            }
            if !dash {
                nibbles[count] = digit;
                count += 1;
            }
            at += 1;
        }
        let mut wire = [0u8; 16];
        let mut i = 0;
        while i < 16 {
            let from = TEXT_ORDER[i] * 2;
            wire[i] = nibbles[from] << 4 | nibbles[from + 1];
            i += 1;
        }
        Some(Self(wire))
    }

    /// From the wire form.
    pub const fn from_wire(wire: [u8; 16]) -> Self {
        Self(wire)
    }

    /// The wire form.
    pub const fn to_wire(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, from) in TEXT_ORDER.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0.get(*from).copied().unwrap_or_default())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::Guid;

    const SCSI: &str = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f";

    #[test]
    fn the_first_three_groups_are_little_endian() {
        assert_eq!(
            Guid::new(SCSI).to_wire(),
            [
                0xd9, 0x63, 0x61, 0xba, 0xa1, 0x04, 0x29, 0x4d, 0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1,
                0xdc, 0x7f
            ]
        );
        assert_eq!(Guid::new(SCSI).to_string(), SCSI);
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in [
            "",
            "ba6163d904a14d29b60572e2ffb1dc7f",
            "ba6163d9-04a1-4d29-b605-72e2ffb1dc7",
            "ba6163d9-04a1-4d29-b605-72e2ffb1dc7g",
            "ba6163d9-04a1-4d29-b60-572e2ffb1dc7f",
            "{a6163d9-04a1-4d29-b605-72e2ffb1dc7f",
        ] {
            assert_eq!(Guid::parse(bad), None, "{bad}");
        }
    }
}
