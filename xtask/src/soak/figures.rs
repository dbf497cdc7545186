//! What a process has of what the host's kernel keeps for it: counted before and after guests that try to make it
//! more. Tests include this file too.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

/// The figures of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Its threads.
    pub threads: usize,
    /// Its open files.
    pub descriptors: usize,
    /// Its memory mappings.
    pub mappings: usize,
    /// Its own memory, without that of files and guests, in KiB.
    pub resident: usize,
}

/// How much more of each there may be after a hostile guest than before: an allocator keeps some of what it was given
/// back, and does not always give its mappings back in one piece; and a machine that has just connected to an uplink is
/// served by a thread of its own.
pub const ALLOWED: Figures =
    Figures { threads: 1, descriptors: 4, mappings: 32, resident: 24 << 10 };

impl Figures {
    /// Those of the process `pid`, which may be `self`.
    pub fn of(pid: &str) -> io::Result<Self> {
        let process = format!("/proc/{pid}");
        let status = fs::read_to_string(format!("{process}/status"))?;
        let resident = status.split_once("RssAnon:").and_then(|(_, rest)| {
            let number = rest.split_whitespace().next()?;
            number.parse().ok()
        });
        let count =
            |name: &str| Ok::<_, io::Error>(fs::read_dir(format!("{process}/{name}"))?.count());
        Ok(Self {
            threads: count("task")?,
            descriptors: count("fd")?,
            mappings: fs::read_to_string(format!("{process}/maps"))?.lines().count(),
            resident: resident.unwrap_or_default(),
        })
    }

    /// Those of a process that does nothing any more, once all that is about to end has ended: no more than are
    /// allowed after `before`, or what is left after so long.
    pub fn settled(pid: &str, before: Option<Self>, patience: Duration) -> io::Result<Self> {
        let until = Instant::now() + patience;
        let mut last = Self::of(pid)?;
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = Self::of(pid)?;
            let steady = (now.threads, now.descriptors) == (last.threads, last.descriptors);
            let done = before.is_none_or(|before| now.exceeds(&before).is_none());
            if steady && done || Instant::now() > until {
                return Ok(now);
            }
            last = now;
        }
    }

    /// Of what there is more than is allowed after `before`.
    pub fn exceeds(&self, before: &Self) -> Option<&'static str> {
        [
            ("threads", self.threads, before.threads, ALLOWED.threads),
            ("descriptors", self.descriptors, before.descriptors, ALLOWED.descriptors),
            ("mappings", self.mappings, before.mappings, ALLOWED.mappings),
            ("KiB of memory", self.resident, before.resident, ALLOWED.resident),
        ]
        .into_iter()
        .find(|(_, now, before, allowed)| *now > before + allowed)
        .map(|(what, ..)| what)
    }
}
