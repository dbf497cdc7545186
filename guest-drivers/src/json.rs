//! One line of JSON, put together in place.

use core::fmt::{self, Write};

/// Bytes that a line may have.
pub const LONGEST: usize = 1024;

/// A line under construction: an object with fields. What does not fit is left out, and the line
/// is an object all the same.
pub struct Object {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Default for Object {
    fn default() -> Self {
        let mut bytes = [0; LONGEST];
        bytes[0] = b'{';
        Self { bytes, len: 1 }
    }
}

impl Object {
    /// Adds a number, or what else is written without quotes.
    #[must_use]
    pub fn number(self, key: &str, value: impl fmt::Display) -> Self {
        self.field(key, |out| write!(out, "{value}"))
    }

    /// Adds a string.
    #[must_use]
    pub fn string(self, key: &str, value: impl fmt::Display) -> Self {
        self.field(key, |out| {
            out.write_char('"')?;
            write!(Escaped(out), "{value}")?;
            out.write_char('"')
        })
    }

    /// The line, without a newline.
    pub fn line(&mut self) -> &str {
        // The last place is kept for this.
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = b'}';
        }
        let bytes = self.bytes.get(..=self.len).unwrap_or_default();
        str::from_utf8(bytes).unwrap_or("{}")
    }

    fn field(mut self, key: &str, value: impl FnOnce(&mut Self) -> fmt::Result) -> Self {
        let before = self.len;
        let comma = if before > 1 { "," } else { "" };
        let written = write!(self, "{comma}\"{key}\":");
        if written.and_then(|()| value(&mut self)).is_err() {
            self.len = before;
        }
        self
    }
}

impl Write for Object {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len.checked_add(text.len()).filter(|end| *end < LONGEST);
        let end = end.ok_or(fmt::Error)?;
        self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// Writes into a string of JSON.
struct Escaped<'a>(&'a mut Object);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '"' | '\\' => write!(self.0, "\\{c}")?,
                c if c.is_control() => write!(self.0, "\\u{:04x}", u32::from(c))?,
                c => self.0.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;

    use super::*;

    #[test]
    fn fields_and_escapes() {
        assert_eq!(Object::default().line(), "{}");
        let mut object = Object::default().number("a", 1).string("b", "x\"y\\\n").string("c", "ü");
        assert_eq!(object.line(), r#"{"a":1,"b":"x\"y\\\u000a","c":"ü"}"#);
    }

    #[test]
    fn what_does_not_fit_is_left_out_whole() {
        let long = "a".repeat(LONGEST);
        let mut object = Object::default().number("a", 1).string("b", &long).number("c", 2);
        assert_eq!(object.line(), r#"{"a":1,"c":2}"#);
        let most = "a".repeat(LONGEST - r#"{"b":""}"#.len());
        let mut object = Object::default().string("b", &most);
        let expected: String = [r#"{"b":""#, &most, r#""}"#].concat();
        assert_eq!(object.line(), expected);
    }
}
