//! Writing down what passes a NIC or an uplink, as pcapng.
//!
//! A [`Captured`] stands in front of a network, so one that is not captured has nothing of it on its
//! way. Frames are copied and handed to the thread of the [`Capture`], which writes them; if it falls
//! behind, frames are missing from the file, not from the network, and the file's end says how many. A
//! frame is written as it passes: of one whose checksum is yet to be computed, a reader will say
//! that it is wrong, and one that is yet to be cut is long.
//!
//! The format is that of draft-ietf-opsawg-pcapng: a section, one interface in it, a block for each
//! frame with its time in nanoseconds and its direction as this machine sees it.
//!
//! `unsafe` passes on the promises of [`Queue::send`] and [`Queue::offer`], and relies on them to
//! read what passes.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, TrySendError};

use super::pieces::Cursor;
use super::{
    Buffer, Completion, Completions, Counters, Frame, Link, MAX_FRAME, Network, Offloads, Queue,
    QueueConfig,
};
use crate::uring::{Cqe, Uring};

/// Frames that can wait to be written.
const BACKLOG: usize = 4096;

/// Bytes of them: who sends does not wait for the disk, and may send long frames.
const BACKLOG_BYTES: usize = 32 << 20;

/// Types of blocks.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;

/// Tells readers which byte order the file is in.
const BYTE_ORDER: u32 = 0x1a2b_3c4d;

/// Link type of Ethernet frames (`LINKTYPE_ETHERNET`).
const ETHERNET: u16 = 1;

/// Options: the interface's name, the unit of its times, frames that were not written, a frame's
/// flags.
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const ISB_IFDROP: u16 = 5;
const EPB_FLAGS: u16 = 2;

/// Which way a frame went: `epb_flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// From the network.
    Inbound = 1,
    /// To it.
    Outbound = 2,
}

/// A frame to be written.
struct Record {
    /// Since 1970, in nanoseconds.
    time: u64,
    direction: Direction,
    bytes: Vec<u8>,
}

/// Why there is no capture.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the capture {}", path.display())]
pub struct CaptureError {
    path: PathBuf,
    source: io::Error,
}

/// A file of what goes to and from networks. Clones write to the same; the last to go, with all
/// [`Captured`] and their queues, waits until everything is written.
#[derive(Clone)]
pub struct Capture {
    recorder: Arc<Recorder>,
}

/// A network under observation.
pub struct Captured {
    network: Arc<dyn Network>,
    recorder: Arc<Recorder>,
}

/// Where queues leave copies of frames. The last one to hold it waits until all are written.
struct Recorder {
    /// `None` when nothing more comes.
    records: Option<Sender<Record>>,
    missed: Arc<AtomicU64>,
    /// Bytes of frames that have not been written.
    waiting: Arc<AtomicUsize>,
    writer: Option<JoinHandle<()>>,
}

impl Capture {
    /// Makes the file anew. It calls what it is a capture of `name`.
    pub fn create(path: &Path, name: &str) -> Result<Self, CaptureError> {
        let failed = |source| CaptureError { path: path.to_owned(), source };
        let mut file = BufWriter::new(File::create(path).map_err(failed)?);
        write_head(&mut file, name).and_then(|()| file.flush()).map_err(failed)?;
        let (records, written) = crossbeam_channel::bounded(BACKLOG);
        let missed = Arc::new(AtomicU64::new(0));
        let waiting = Arc::new(AtomicUsize::new(0));
        let writer = std::thread::Builder::new().name("capture".into()).spawn({
            let (missed, path) = (Arc::clone(&missed), path.to_owned());
            let waiting = Arc::clone(&waiting);
            move || {
                if let Err(error) = write_all(&mut file, &written, &missed, &waiting) {
                    tracing::warn!(%error, "the capture {} ends early", path.display());
                }
            }
        });
        let writer = Some(writer.map_err(failed)?);
        let recorder = Arc::new(Recorder { records: Some(records), missed, waiting, writer });
        Ok(Self { recorder })
    }

    /// Puts a network under observation.
    pub fn observe(&self, network: Arc<dyn Network>) -> Captured {
        Captured { network, recorder: Arc::clone(&self.recorder) }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.records = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::warn!("the thread of a capture panicked");
        }
    }
}

impl Recorder {
    /// Copies the first `len` bytes of `buffers`.
    ///
    /// # Safety
    /// The buffers must be readable memory.
    unsafe fn record(&self, direction: Direction, buffers: &[Buffer], len: u32) {
        let Some(records) = &self.records else { return };
        let len = (len as usize).min(MAX_FRAME);
        // The writer alone takes away, so there may be room for more than this says, and not for less
        // but by a frame of each other queue.
        if self.waiting.load(Ordering::Relaxed) + len > BACKLOG_BYTES {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut bytes = vec![0; len];
        // SAFETY: the caller vouches for the buffers.
        unsafe { Cursor::new(buffers).read(&mut bytes) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = Record { time: now.as_nanos() as u64, direction, bytes };
        self.waiting.fetch_add(len, Ordering::Relaxed);
        if let Err(refused) = records.try_send(record) {
            self.waiting.fetch_sub(len, Ordering::Relaxed);
            if matches!(refused, TrySendError::Full(_)) {
                self.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl Network for Captured {
    fn link(&self) -> Link {
        self.network.link()
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.network.set_receive_offloads(offloads)
    }

    fn follows_senders(&self) -> bool {
        self.network.follows_senders()
    }

    fn queue(&self, config: QueueConfig, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        let queue = self.network.queue(config, uring)?;
        let recorder = Arc::clone(&self.recorder);
        Ok(Box::new(CapturedQueue { queue, recorder, offers: HashMap::new() }))
    }
}

/// Stands in front of a queue.
struct CapturedQueue {
    queue: Box<dyn Queue>,
    recorder: Arc<Recorder>,
    /// The buffers that are with the network, by number.
    offers: HashMap<u32, Vec<Buffer>>,
}

impl CapturedQueue {
    /// Writes down what has been received since there were `before` completions.
    fn look(&mut self, before: usize, done: &Completions) {
        for completion in done.0.range(before.min(done.len())..) {
            match completion {
                Completion::Received { id, len, .. } => {
                    if let Some(buffers) = self.offers.remove(id) {
                        // SAFETY: whoever offered the buffers has not yet been told that they are
                        // back.
                        unsafe { self.recorder.record(Direction::Inbound, &buffers, *len) };
                    }
                }
                Completion::Returned { id } => {
                    self.offers.remove(id);
                }
                Completion::Sent { .. } | Completion::Link(_) => {}
            }
        }
    }
}

impl Queue for CapturedQueue {
    unsafe fn send(&mut self, frame: Frame<'_>, uring: &mut Uring, done: &mut Completions) {
        if frame.check().is_ok() {
            // SAFETY: the caller vouches for the buffers.
            unsafe { self.recorder.record(Direction::Outbound, frame.buffers, frame.len) };
        }
        let before = done.len();
        // SAFETY: as above.
        unsafe { self.queue.send(frame, uring, done) };
        self.look(before, done);
    }

    unsafe fn offer(
        &mut self,
        id: u32,
        buffers: &[Buffer],
        uring: &mut Uring,
        done: &mut Completions,
    ) {
        self.offers.insert(id, buffers.to_vec());
        let before = done.len();
        // SAFETY: the caller vouches for the buffers.
        unsafe { self.queue.offer(id, buffers, uring, done) };
        self.look(before, done);
    }

    fn turn(&mut self, uring: &mut Uring, done: &mut Completions) {
        let before = done.len();
        self.queue.turn(uring, done);
        self.look(before, done);
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions) {
        let before = done.len();
        self.queue.complete(cqe, uring, done);
        self.look(before, done);
    }

    fn is_ready(&self) -> bool {
        self.queue.is_ready()
    }

    fn prepare_to_sleep(&mut self) -> bool {
        self.queue.prepare_to_sleep()
    }

    fn recall(&mut self, uring: &mut Uring, done: &mut Completions) {
        let before = done.len();
        self.queue.recall(uring, done);
        self.look(before, done);
    }

    fn drop_frames(&mut self, uring: &mut Uring, done: &mut Completions) {
        let before = done.len();
        self.queue.drop_frames(uring, done);
        self.look(before, done);
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    fn counters(&self) -> Counters {
        self.queue.counters()
    }
}

/// Writes what comes until nothing more can come; in between, whenever there is a pause, so that
/// the file can be watched.
fn write_all(
    file: &mut BufWriter<File>,
    records: &Receiver<Record>,
    missed: &AtomicU64,
    waiting: &AtomicUsize,
) -> io::Result<()> {
    let write = |file: &mut BufWriter<File>, record: Record| {
        waiting.fetch_sub(record.bytes.len(), Ordering::Relaxed);
        write_frame(file, &record)
    };
    while let Ok(record) = records.recv() {
        write(file, record)?;
        for record in records.try_iter() {
            write(file, record)?;
        }
        file.flush()?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    write_statistics(file, now.as_nanos() as u64, missed.load(Ordering::Relaxed))?;
    file.flush()
}

/// One block: its type, its length, what it holds, and its length again.
fn write_block(to: &mut impl Write, kind: u32, body: &[u8]) -> io::Result<()> {
    let len = u32::try_from(body.len() + 12).map_err(|_| io::ErrorKind::InvalidInput)?;
    to.write_all(&kind.to_le_bytes())?;
    to.write_all(&len.to_le_bytes())?;
    to.write_all(body)?;
    to.write_all(&len.to_le_bytes())
}

/// Fills up to a multiple of four.
fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

fn push_option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    pad(body);
}

fn end_options(body: &mut Vec<u8>) {
    body.extend([0; 4]);
}

/// The section, whose length is not known yet, and the interface.
fn write_head(to: &mut impl Write, name: &str) -> io::Result<()> {
    let mut body = BYTE_ORDER.to_le_bytes().to_vec();
    body.extend(1u16.to_le_bytes());
    body.extend(0u16.to_le_bytes());
    body.extend(u64::MAX.to_le_bytes());
    write_block(to, SECTION_HEADER, &body)?;
    let mut body = ETHERNET.to_le_bytes().to_vec();
    body.extend([0; 6]);
    push_option(&mut body, IF_NAME, name.as_bytes());
    push_option(&mut body, IF_TSRESOL, &[9]);
    end_options(&mut body);
    write_block(to, INTERFACE_DESCRIPTION, &body)
}

fn push_time(body: &mut Vec<u8>, time: u64) {
    body.extend(((time >> 32) as u32).to_le_bytes());
    body.extend((time as u32).to_le_bytes());
}

fn write_frame(to: &mut impl Write, record: &Record) -> io::Result<()> {
    let len = (record.bytes.len() as u32).to_le_bytes();
    let mut body = Vec::with_capacity(record.bytes.len() + 40);
    body.extend([0; 4]);
    push_time(&mut body, record.time);
    body.extend(len);
    body.extend(len);
    body.extend(&record.bytes);
    pad(&mut body);
    push_option(&mut body, EPB_FLAGS, &(record.direction as u32).to_le_bytes());
    end_options(&mut body);
    write_block(to, ENHANCED_PACKET, &body)
}

fn write_statistics(to: &mut impl Write, time: u64, missed: u64) -> io::Result<()> {
    let mut body = vec![0; 4];
    push_time(&mut body, time);
    push_option(&mut body, ISB_IFDROP, &missed.to_le_bytes());
    end_options(&mut body);
    write_block(to, INTERFACE_STATISTICS, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Offload;
    use crate::net::loopback::Loopback;
    use crate::uring::Tag;

    /// Parts a file into blocks, as a reader does.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let mut blocks = Vec::new();
        while !bytes.is_empty() {
            let len = number(&bytes[4..]) as usize;
            assert_eq!((len % 4, number(&bytes[len - 4..]) as usize), (0, len));
            blocks.push((number(bytes), bytes[8..len - 4].to_vec()));
            bytes = &bytes[len..];
        }
        blocks
    }

    #[test]
    fn what_passes_is_in_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pcapng");
        let capture = Capture::create(&path, "loopback").unwrap();
        let captured = capture.observe(Arc::new(Loopback::new()));
        let mut uring = Uring::new(4).unwrap();
        let config = QueueConfig { index: 0, tag: Tag(1), sends: 4, receives: 4 };
        let mut queue = captured.queue(config, &mut uring).unwrap();
        let mut done = Completions::with_capacity(8);
        let mut buffer = [0u8; 100];
        let (first, second) = buffer.split_at_mut(14);
        // SAFETY: the buffer is looked at when its completion is there.
        unsafe { queue.offer(1, &[first.into(), second.into()], &mut uring, &mut done) };
        let mut bytes = *b"to us.from me..a frame of odd length";
        let frame = Frame {
            id: 2,
            len: 35,
            buffers: &[bytes.as_mut_slice().into()],
            offload: Offload::NONE,
        };
        // SAFETY: the frame outlives its completion.
        unsafe { queue.send(frame, &mut uring, &mut done) };
        queue.turn(&mut uring, &mut done);
        assert_eq!((done.len(), &buffer[..35]), (2, &bytes[..35]));
        drop((capture, captured));
        drop(queue);

        let blocks = blocks(&std::fs::read(&path).unwrap());
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        let frame = ENHANCED_PACKET;
        let expected = [SECTION_HEADER, INTERFACE_DESCRIPTION, frame, frame, INTERFACE_STATISTICS];
        assert_eq!(kinds, expected);
        assert_eq!(blocks[0].1[..4], [0x4d, 0x3c, 0x2b, 0x1a]);
        assert_eq!(blocks[1].1[8..24], *b"\x02\x00\x08\x00loopback\x09\x00\x01\x00");
        for (block, direction) in [(&blocks[2].1, 2), (&blocks[3].1, 1)] {
            assert_eq!(block[12..20], [35, 0, 0, 0, 35, 0, 0, 0]);
            assert_eq!(block[20..55], bytes[..35]);
            assert_eq!(block[56..], [2, 0, 4, 0, direction, 0, 0, 0, 0, 0, 0, 0]);
        }
        assert_eq!(blocks[4].1[12..], [5, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_file_that_cannot_be_is_refused() {
        let error = Capture::create(Path::new("/nonexistent/a"), "a").err().unwrap();
        assert_eq!(error.to_string(), "cannot write the capture /nonexistent/a");
    }

    /// A disk that does not keep up costs the capture frames, and the host no more memory than said.
    #[test]
    fn frames_that_wait_for_a_slow_disk_are_bounded_in_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("slow");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let (go, may_read) = crossbeam_channel::bounded::<()>(1);
        let reader = std::thread::spawn({
            let path = path.clone();
            move || {
                let mut file = File::open(path).unwrap();
                let _ = may_read.recv();
                io::copy(&mut file, &mut io::sink()).unwrap()
            }
        });
        let capture = Capture::create(&path, "slow").unwrap();
        let mut frame = vec![7u8; 60_000];
        let buffers = [frame.as_mut_slice().into()];
        for _ in 0..1000 {
            // SAFETY: the buffer is this test's.
            unsafe { capture.recorder.record(Direction::Outbound, &buffers, 60_000) };
            assert!(capture.recorder.waiting.load(Ordering::Relaxed) <= BACKLOG_BYTES);
        }
        let missed = capture.recorder.missed.load(Ordering::Relaxed);
        assert!(missed > 400, "{missed} of 1000 were left out");
        go.send(()).unwrap();
        drop(capture);
        let written = reader.join().unwrap();
        assert!(written >= (1000 - missed) * 60_000);
    }
}
