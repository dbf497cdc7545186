//! Lines for the serial port. Each byte costs an exit, so a line is put together first and then
//! written by one string instruction.

use core::fmt::{self, Write};

use guest_drivers::boot::CONSOLE_PORT;

use super::supervisor;

/// The longest line; what is more is cut off.
const LONGEST: usize = 1024;

struct Line {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // The last place is the newline's.
            if self.len + 1 < LONGEST
                && let Some(place) = self.bytes.get_mut(self.len)
            {
                *place = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// Writes a line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; LONGEST], len: 0 };
    let _ = line.write_fmt(text);
    if let Some(end) = line.bytes.get_mut(line.len) {
        *end = b'\n';
        line.len += 1;
    }
    supervisor::write_port_string(CONSOLE_PORT, line.bytes.get(..line.len).unwrap_or_default());
}
