//! What is left of a worker that ended with I/O under way, counted: memory, descriptors, mappings and
//! threads of the process, and the image's lock. In a process of its own, so that nothing else counts.
//!
//! `unsafe` is the allocator that counts, and a disk that passes requests on.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backends::block::{Completions, Disk, Geometry, Queue, Request};
use backends::file::{FileDisk, OpenOptions};
use backends::testing::{FaultyDisk, Gate, Rule};
use backends::uring::{Cqe, Tag, Uring};
use vmbus::packet::{PacketFlags, PacketKind};
use vmbus::vstor::{DataDirection, Operation, ScsiRequest, VstorPacket};
use vmbus_server::Device;
use vmbus_server::testing::pair;
use vsp::storvsp::ControllerBuilder;
use zerocopy::{FromZeros, IntoBytes};

const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes that are allocated.
static LIVE: AtomicI64 = AtomicI64::new(0);

struct Counting;

// SAFETY: it is the system's, and counts besides.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this process has.
#[derive(Clone, Copy, Debug)]
struct Figures {
    bytes: i64,
    descriptors: usize,
    mappings: usize,
    threads: usize,
}

impl Figures {
    fn now() -> Self {
        let entries = |path| std::fs::read_dir(path).unwrap().count();
        Self {
            descriptors: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            mappings: std::fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
            bytes: LIVE.load(Ordering::Relaxed),
        }
    }

    /// Waits until there is no more than before but a little; the last worker may be on its way out.
    fn wait_until_as(before: &Self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = Self::now();
            if now.bytes < before.bytes + (64 << 10)
                && now.descriptors <= before.descriptors
                && now.threads <= before.threads
                // Stacks of threads that have ended are kept for the next, and the heap has parts.
                && now.mappings < before.mappings + 40
            {
                return;
            }
            assert!(Instant::now() < deadline, "before: {before:?}, now: {now:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

struct Images {
    _directory: tempfile::TempDir,
    paths: Vec<PathBuf>,
}

impl Images {
    fn new(count: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |n| directory.path().join(format!("disk{n}.img"));
        let paths: Vec<PathBuf> = (0..count).map(path).collect();
        for path in &paths {
            std::fs::File::create(path).unwrap().set_len(1 << 20).unwrap();
        }
        Self { _directory: directory, paths }
    }

    fn open(&self) -> Vec<Arc<dyn Disk>> {
        let disk = |path: &PathBuf| {
            Arc::new(FileDisk::open(path, &OpenOptions::default()).unwrap()) as Arc<dyn Disk>
        };
        self.paths.iter().map(disk).collect()
    }

    /// Once nobody uses an image any more, it can be opened for writing again.
    fn wait_until_free(&self) {
        let deadline = Instant::now() + PATIENCE;
        let free = |path: &Path| FileDisk::open(path, &OpenOptions::default());
        for path in &self.paths {
            while let Err(error) = free(path) {
                assert!(Instant::now() < deadline, "{error}");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A guest opens a channel and sends a flush to each of its disks. If it `breaks` its ring, a packet
/// that is longer than any follows. Waits until the channel is closed.
fn open_and_break(disks: &[Arc<dyn Disk>], breaks: bool) {
    let (channel, mut guest) = pair(1 << 20);
    let mut builder = ControllerBuilder::new(0);
    for disk in disks {
        builder.attach(None, Arc::clone(disk)).unwrap();
    }
    builder.build(1).open(channel).unwrap();
    let mut push = |operation, body: &[u8]| {
        let packet = VstorPacket::request(operation, body);
        let packet = [packet.as_bytes()];
        guest.outgoing.push(PacketKind::InBand, PacketFlags::NONE, 1, &packet).unwrap();
    };
    push(Operation::BeginInitialization, &[]);
    push(Operation::QueryProtocolVersion, &[0x02, 0x06, 0, 0]);
    push(Operation::EndInitialization, &[]);
    for lun in 0..disks.len() {
        let mut request = ScsiRequest::new_zeroed();
        request.length = 52;
        request.lun = lun as u8;
        request.cdb_len = 10;
        request.data_in = DataDirection::None;
        // SYNCHRONIZE CACHE (10)
        request.cdb_or_sense[0] = 0x35;
        push(Operation::ExecuteSrb, request.as_bytes());
    }
    if breaks {
        let packet = [&[0; 20_000][..]];
        guest.outgoing.push(PacketKind::InBand, PacketFlags::NONE, 2, &packet).unwrap();
    }
    guest.publish();
    assert!(guest.wait_closed(PATIENCE));
}

#[test]
fn a_ring_that_breaks_with_requests_under_way_leaves_nothing() {
    let _alone = alone();
    for (count, rounds) in [(1, 500), (64, 40)] {
        let images = Images::new(count);
        let disks = images.open();
        (0..5).for_each(|_| open_and_break(&disks, true));
        let before = Figures::now();
        (0..rounds).for_each(|_| open_and_break(&disks, true));
        Figures::wait_until_as(&before);
        drop(disks);
        images.wait_until_free();
    }
}

/// What cannot end by itself is called off.
#[test]
fn a_ring_that_breaks_while_the_disk_hangs_leaves_nothing() {
    let _alone = alone();
    let images = Images::new(1);
    let gate = Gate::new().unwrap();
    let held = |disk| -> Arc<dyn Disk> {
        Arc::new(FaultyDisk::new(disk).rule(Rule::hold(0..1 << 20, &gate)))
    };
    let disks: Vec<_> = images.open().into_iter().map(held).collect();
    (0..5).for_each(|_| open_and_break(&disks, true));
    let before = Figures::now();
    (0..500).for_each(|_| open_and_break(&disks, true));
    Figures::wait_until_as(&before);
    drop(disks);
    images.wait_until_free();
}

/// A disk whose queues panic when a request has ended.
struct Panicking(Arc<dyn Disk>);

struct PanickingQueue(Box<dyn Queue>);

impl Disk for Panicking {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn queue(&self, tag: Tag, depth: u16, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(PanickingQueue(self.0.queue(tag, depth, uring)?)))
    }
}

impl Queue for PanickingQueue {
    unsafe fn submit(&mut self, request: Request<'_>, uring: &mut Uring, done: &mut Completions) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.0.submit(request, uring, done) };
    }

    fn complete(&mut self, _: &Cqe, _: &mut Uring, _: &mut Completions) {
        panic!("a panic that a test wants");
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}

#[test]
fn a_worker_that_panics_with_requests_under_way_leaves_nothing() {
    let _alone = alone();
    let images = Images::new(8);
    let disks: Vec<Arc<dyn Disk>> =
        images.open().into_iter().map(|disk| Arc::new(Panicking(disk)) as _).collect();
    (0..5).for_each(|_| open_and_break(&disks, false));
    let before = Figures::now();
    (0..50).for_each(|_| open_and_break(&disks, false));
    Figures::wait_until_as(&before);
    drop(disks);
    images.wait_until_free();
}
