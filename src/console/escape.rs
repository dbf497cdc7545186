//! The keys that are the program's and not the guest's: those after Ctrl-A, as other monitors have it.
//! It takes two different keys to end a guest, so that neither a key that repeats nor one meant for
//! the guest does.

/// What Ctrl-A sends.
const ESCAPE: u8 = 1;

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// This key is the guest's.
    Guest(u8),
    /// Ctrl-A and this key are the guest's.
    Both(u8),
    /// Not yet known.
    Pending,
    /// To end the guest.
    End,
    /// To know the keys.
    Help,
}

impl Key {
    /// What the guest gets.
    pub fn bytes(self) -> impl Iterator<Item = u8> {
        let (escape, key) = match self {
            Self::Guest(key) => (None, Some(key)),
            Self::Both(key) => (Some(ESCAPE), Some(key)),
            Self::Pending | Self::End | Self::Help => (None, None),
        };
        escape.into_iter().chain(key)
    }
}

/// Whether Ctrl-A came last.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// The next key.
    pub fn key(&mut self, key: u8) -> Key {
        if !std::mem::take(&mut self.pending) {
            self.pending = key == ESCAPE;
            return if self.pending { Key::Pending } else { Key::Guest(key) };
        }
        match key {
            ESCAPE => Key::Guest(ESCAPE),
            b'x' | b'X' => Key::End,
            b'h' | b'H' | b'?' => Key::Help,
            _ => Key::Both(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest_gets(typed: &[u8]) -> (Vec<u8>, Vec<Key>) {
        let mut escape = Escape::default();
        let keys: Vec<_> = typed.iter().map(|&key| escape.key(key)).collect();
        let bytes = keys.iter().flat_map(|key| key.bytes()).collect();
        (bytes, keys.into_iter().filter(|key| matches!(key, Key::End | Key::Help)).collect())
    }

    #[test]
    fn everything_is_the_guests_but_a_few_keys_after_ctrl_a() {
        assert_eq!(guest_gets(b"xh?\x03\x03\x03\x1d"), (b"xh?\x03\x03\x03\x1d".to_vec(), vec![]));
        assert_eq!(guest_gets(b"a\x01xb"), (b"ab".to_vec(), vec![Key::End]));
        assert_eq!(guest_gets(b"\x01h\x01?"), (vec![], vec![Key::Help, Key::Help]));
        assert_eq!(guest_gets(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(guest_gets(b"\x01\x01\x01x"), (b"\x01".to_vec(), vec![Key::End]));
        assert_eq!(guest_gets(b"\x01k\x01\x03"), (b"\x01k\x01\x03".to_vec(), vec![]));
        assert_eq!(guest_gets(b"\x01"), (vec![], vec![]));
    }
}
