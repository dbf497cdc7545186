//! What the program says on standard error. Nothing depends on its being heard: a line never panics,
//! fails or waits, whether standard error is closed, full, stalled or non-blocking. Lines go through
//! an [`Outlet`]; what finds no room in it is lost, and counted.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::outlet::{Event, Limits, Outlet};

/// A machine's whole statistics may wait, and some more.
const LIMITS: Limits = Limits { bytes: 256 << 10, patience: Duration::from_secs(1) };

/// `None` if there is no way to have one.
static LOG: OnceLock<Option<Outlet>> = OnceLock::new();

/// Says a line, as `println!` takes it; "partita: " is put in front.
macro_rules! say {
    ($($line:tt)*) => {
        $crate::log::line(format_args!($($line)*))
    };
}
pub(crate) use say;

/// See [`say!`].
pub fn line(text: fmt::Arguments<'_>) {
    write(&format!("partita: {text}\n"));
}

/// Writes whole lines as they are.
pub fn write(text: &str) {
    if let Some(log) = LOG.get_or_init(open) {
        log.offer(text.as_bytes());
    }
}

/// The thread starts with the first line.
fn open() -> Option<Outlet> {
    let descriptor = io::stderr().as_fd().try_clone_to_owned().ok()?;
    let tell = |event| {
        if let Event::Resumed(lost @ 1..) = event {
            line(format_args!("{lost} bytes of messages were lost here, as nobody read them"));
        }
    };
    Outlet::new(descriptor, LIMITS, "log", tell).ok()
}

/// Waits until all that was said is written, for `longest` at most, and only as long as it is read.
pub fn flush(longest: Duration) {
    let until = Instant::now() + longest;
    if let Some(Some(log)) = LOG.get() {
        log.flush(|| Instant::now() >= until);
    }
}

/// For tracing: a line is a write.
pub struct Writer;

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
