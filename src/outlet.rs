//! Bytes on their way out of the program, to somebody who may read them late or never.
//!
//! An outlet is a bounded buffer and a thread of its own that writes it to a descriptor. So nobody
//! else ever waits in a write: not a processor of the guest, which could not be stopped there, nor a
//! thread that only wanted to log something, nor the program's end. The descriptor may be a pipe, a
//! terminal or a file, blocking or not.
//!
//! Who sends to a reader that is merely slow waits for it, for as long as it reads at all. When it
//! has taken nothing for its sender's patience it counts as gone; until it comes back the latest bytes
//! are kept, and older ones are lost and counted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};

/// How long somebody sleeps at most before it looks whether it is to go on waiting.
const SLICE: Duration = Duration::from_millis(20);

/// How long the thread sleeps at most before it looks whether the reader has got on.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Bytes of one write. A pipe that has room has room for so many (pipe(7), PIPE_BUF), so that a
/// write to it does not block.
const CHUNK: usize = 4096;

/// Something that its users should know.
#[derive(Debug)]
pub enum Event {
    /// Nothing is read; what is sent is lost until that changes.
    Stalled,
    /// It goes on. So many bytes are lost.
    Resumed(u64),
    /// Writing fails. It is tried again with the next bytes.
    Failed(io::Error),
    /// Nobody will read any more: all is lost from here on.
    Closed,
}

/// See the module's documentation. Clones lead to the same place. The thread ends when all are gone
/// and everything is written.
#[derive(Clone)]
pub struct Outlet(Arc<Handle>);

struct Handle(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is something to write, or nobody is left to send.
    work: Condvar,
    /// There is room, or nothing left to wait for.
    room: Condvar,
    limits: Limits,
}

/// How much an outlet puts up with.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that may wait.
    pub bytes: usize,
    /// How long a reader may take nothing before nobody waits for it any more.
    pub patience: Duration,
}

struct State {
    waiting: VecDeque<u8>,
    /// Bytes that the thread has taken out and not yet written.
    writing: usize,
    /// When the reader got on last, or the thread began.
    progress: Instant,
    stalled: bool,
    /// Whether the last write failed.
    failing: bool,
    closed: bool,
    ended: bool,
    /// Bytes lost since somebody was told.
    lost: u64,
}

impl State {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.writing == 0
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody is to wait for the reader. The thread may be in the midst of a write that does
    /// not return, and cannot say so itself.
    fn is_stalled(&self, state: &State) -> bool {
        state.stalled || !state.is_empty() && state.progress.elapsed() >= self.limits.patience
    }

    fn wait_for_room<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.room.wait_timeout(state, SLICE).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.work.notify_one();
    }
}

impl Outlet {
    /// An outlet to `descriptor`, which a thread called `name` writes to. It calls `tell`, which must
    /// not wait for anything.
    pub fn new(
        descriptor: OwnedFd,
        limits: Limits,
        name: &str,
        tell: impl FnMut(Event) + Send + 'static,
    ) -> io::Result<Self> {
        let state = State {
            waiting: VecDeque::new(),
            writing: 0,
            progress: Instant::now(),
            stalled: false,
            failing: false,
            closed: false,
            ended: false,
            lost: 0,
        };
        let (work, room) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::new(state), work, room, limits });
        let writer = Writer { shared: Arc::clone(&shared), descriptor, tell };
        let builder = thread::Builder::new().name(name.to_owned()).stack_size(128 << 10);
        builder.spawn(move || writer.run())?;
        Ok(Self(Arc::new(Handle(shared))))
    }

    /// Sends `bytes`, and waits until there is room for them, as long as the reader gets on and
    /// `hurry` is not true.
    pub fn send(&self, bytes: &[u8], hurry: impl Fn() -> bool) {
        let shared = &*self.0.0;
        let mut state = shared.lock();
        while state.waiting.len() + bytes.len() > shared.limits.bytes && !state.closed {
            if !shared.is_stalled(&state) && !hurry() {
                state = shared.wait_for_room(state);
                continue;
            }
            // The latest are what somebody wants to see who comes back.
            let too_many = (state.waiting.len() + bytes.len()).saturating_sub(shared.limits.bytes);
            let dropped = too_many.min(state.waiting.len());
            state.waiting.drain(..dropped);
            state.lost += dropped as u64;
            break;
        }
        let kept = bytes.len().min(shared.limits.bytes);
        let (lost, kept) = bytes.split_at(bytes.len() - kept);
        state.lost += lost.len() as u64;
        self.push(state, kept);
    }

    /// Sends `bytes` if there is room for all of them; never waits.
    pub fn offer(&self, bytes: &[u8]) {
        let shared = &*self.0.0;
        let mut state = shared.lock();
        if state.waiting.len() + bytes.len() > shared.limits.bytes {
            state.lost += bytes.len() as u64;
            return;
        }
        self.push(state, bytes);
    }

    fn push(&self, mut state: MutexGuard<'_, State>, bytes: &[u8]) {
        if state.closed {
            state.lost += bytes.len() as u64;
            return;
        }
        if state.is_empty() {
            state.progress = Instant::now();
        }
        let wakes = state.waiting.is_empty();
        state.waiting.extend(bytes);
        drop(state);
        if wakes {
            self.0.0.work.notify_one();
        }
    }

    /// Waits until all is written, as long as the reader gets on and `hurry` is not true; says how
    /// many bytes are not.
    pub fn flush(&self, hurry: impl Fn() -> bool) -> usize {
        let shared = &*self.0.0;
        let mut state = shared.lock();
        while !state.is_empty() && !state.closed && !shared.is_stalled(&state) && !hurry() {
            state = shared.wait_for_room(state);
        }
        if state.closed { 0 } else { state.waiting.len() + state.writing }
    }
}

/// The thread's side.
struct Writer<T> {
    shared: Arc<Shared>,
    descriptor: OwnedFd,
    tell: T,
}

impl<T: FnMut(Event)> Writer<T> {
    fn run(mut self) {
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            let mut state = self.shared.lock();
            while state.waiting.is_empty() {
                if state.ended {
                    return;
                }
                state = self.shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let count = state.waiting.len().min(CHUNK);
            chunk.clear();
            chunk.extend(state.waiting.drain(..count));
            state.writing = count;
            drop(state);
            self.shared.room.notify_all();
            let lost = match self.write(&chunk) {
                Ok(()) => {
                    let mut state = self.shared.lock();
                    state.failing = false;
                    std::mem::take(&mut state.lost)
                }
                Err(error) => {
                    self.fail(error);
                    0
                }
            };
            self.shared.lock().writing = 0;
            self.shared.room.notify_all();
            if lost > 0 {
                (self.tell)(Event::Resumed(lost));
            }
        }
    }

    /// Writes all of it, however long that takes.
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Errno> {
        let mut unread = None;
        while !bytes.is_empty() {
            let ready = {
                let mut descriptors = [PollFd::new(&self.descriptor, PollFlags::OUT)];
                match poll(&mut descriptors, Some(&LOOK)) {
                    Err(Errno::INTR) => continue,
                    // Whatever cannot be polled is written to.
                    ready => ready.unwrap_or(1) > 0,
                }
            };
            let written = if ready { rustix::io::write(&self.descriptor, bytes) } else { Ok(0) };
            match written {
                Ok(0) | Err(Errno::AGAIN) => {
                    // A pipe takes something again when a whole page of it has been read.
                    let left = ioctl_fionread(&self.descriptor).ok();
                    let reads = unread.is_some() && left < unread;
                    unread = left;
                    self.note(0, reads);
                }
                Ok(count) => {
                    bytes = bytes.get(count..).unwrap_or_default();
                    unread = None;
                    self.note(count, true);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Notes that the reader got on, or did not, and has taken `count` bytes.
    fn note(&mut self, count: usize, progress: bool) {
        let mut state = self.shared.lock();
        state.writing -= count.min(state.writing);
        if progress {
            state.progress = Instant::now();
            state.stalled = false;
        }
        let stalls = !state.stalled && self.shared.is_stalled(&state);
        state.stalled |= stalls;
        drop(state);
        self.shared.room.notify_all();
        if stalls {
            (self.tell)(Event::Stalled);
        }
    }

    /// What was to be written is lost.
    fn fail(&mut self, error: Errno) {
        let mut state = self.shared.lock();
        state.lost += state.writing as u64;
        state.progress = Instant::now();
        if error == Errno::PIPE {
            state.closed = true;
            state.waiting = VecDeque::new();
        }
        let told = std::mem::replace(&mut state.failing, true);
        drop(state);
        if error == Errno::PIPE {
            (self.tell)(Event::Closed);
        } else if !told {
            (self.tell)(Event::Failed(error.into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, pipe};
    use std::sync::mpsc::{Receiver, channel};

    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

    use super::*;

    /// Far longer than anything here takes.
    const FAR: Duration = Duration::from_secs(60);

    fn outlet(
        descriptor: impl Into<OwnedFd>,
        bytes: usize,
        patience: Duration,
    ) -> (Outlet, Receiver<Event>) {
        let (tell, told) = channel();
        let tell = move |event| drop(tell.send(event));
        let limits = Limits { bytes, patience };
        (Outlet::new(descriptor.into(), limits, "outlet", tell).unwrap(), told)
    }

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n % 251) as u8).collect()
    }

    #[test]
    fn a_slow_reader_gets_every_byte() {
        for nonblocking in [false, true] {
            let (mut reader, writer) = pipe().unwrap();
            if nonblocking {
                let flags = fcntl_getfl(&writer).unwrap();
                fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
            }
            let (outlet, told) = outlet(writer, 8 << 10, FAR);
            let all = text(1 << 20);
            let sent = all.clone();
            let sender = thread::spawn(move || {
                sent.chunks(1000).for_each(|chunk| outlet.send(chunk, || false));
                assert_eq!(outlet.flush(|| false), 0);
            });
            let mut read: Vec<u8> = Vec::new();
            let mut page = [0; 10_000];
            loop {
                match reader.read(&mut page).unwrap() {
                    0 => break,
                    count => read.extend(&page[..count]),
                }
                thread::yield_now();
            }
            sender.join().unwrap();
            assert!(read == all);
            assert!(told.recv().is_err(), "nothing to tell");
        }
    }

    #[test]
    fn nobody_waits_long_for_a_reader_that_does_not_read_and_the_latest_bytes_are_kept() {
        let (mut reader, writer) = pipe().unwrap();
        let (outlet, told) = outlet(writer, 1000, Duration::from_millis(50));
        let all = text(1 << 20);
        // It would never end if each waited.
        all.chunks(10).for_each(|chunk| outlet.send(chunk, || false));
        // On a busy machine the thread itself may have seemed to be the one that stalls, before.
        let mut lost = 0;
        loop {
            match told.recv_timeout(FAR).unwrap() {
                Event::Stalled => break,
                Event::Resumed(bytes) => lost += bytes,
                other => panic!("{other:?}"),
            }
        }
        assert!(outlet.flush(|| false) >= 1000);
        let reading = thread::spawn(move || {
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            read
        });
        drop(outlet);
        let read = reading.join().unwrap();
        let events = told.into_iter();
        lost += events.map(|e| if let Event::Resumed(bytes) = e { bytes } else { 0 }).sum::<u64>();
        assert!(lost > 0);
        assert_eq!(read.len() as u64 + lost, all.len() as u64);
        assert!(read.ends_with(&all[all.len() - 1000..]), "the latest are kept");
    }

    #[test]
    fn who_is_in_a_hurry_does_not_wait() {
        let (_reader, writer) = pipe().unwrap();
        let (outlet, _told) = outlet(writer, 1000, FAR);
        for _ in 0..1000 {
            outlet.send(&[0; 1000], || true);
        }
        assert!(outlet.flush(|| true) > 0);
        outlet.offer(&[0; 1001]);
    }

    #[test]
    fn a_pipe_without_a_reader_takes_everything_and_tells_once() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (outlet, told) = outlet(writer, 1000, FAR);
        for _ in 0..100 {
            outlet.send(&[0; 1000], || false);
        }
        assert_eq!(outlet.flush(|| false), 0);
        assert!(matches!(told.recv_timeout(FAR), Ok(Event::Closed)));
        drop(outlet);
        assert!(told.recv().is_err(), "told once, and the thread has ended");
    }

    #[test]
    fn a_full_disk_stops_nobody_and_is_told_once() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (outlet, told) = outlet(full, 1000, FAR);
        for _ in 0..1000 {
            outlet.send(&[0; 100], || false);
        }
        assert_eq!(outlet.flush(|| false), 0);
        assert!(matches!(told.recv_timeout(FAR), Ok(Event::Failed(_))));
        drop(outlet);
        assert!(told.recv().is_err());
    }
}
