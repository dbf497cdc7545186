//! Files and block devices as disks, through a real `io_uring`, on the file systems that are here:
//! the one of the temporary directory, a tmpfs, and, for root, some mounted for the purpose.
//!
//! `unsafe` is [`Queue::submit`]'s promise, kept by waiting for the end before anything is dropped.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use backends::block::{
    BlockErrorKind, Buffer, Completion, Completions, Disk, Geometry, Operation, Queue, Request,
};
use backends::file::{Direct, FileDisk, OpenError, OpenOptions};
use backends::uring::{Counters, Tag, Uring};
use proptest::prelude::*;
use tempfile::TempDir;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const READ: Operation = Operation::Read;
const WRITE: Operation = Operation::Write { fua: false };

/// A worker with one queue.
struct Worker {
    queue: Box<dyn Queue>,
    done: Completions,
    uring: Uring,
}

impl Worker {
    fn new(disk: &dyn Disk) -> Self {
        Self::with_depth(disk, 8)
    }

    fn with_depth(disk: &dyn Disk, depth: u16) -> Self {
        let mut uring = Uring::new(16).unwrap();
        let queue = disk.queue(Tag(1), depth, &mut uring).unwrap();
        Self { queue, done: Completions::with_capacity(depth.into()), uring }
    }

    /// Whoever calls this keeps the buffers until the request has ended.
    fn submit(&mut self, id: u32, operation: Operation, offset: usize, buffers: &[Buffer]) {
        let len = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        let request = Request { id, operation, offset: offset as u64, len, buffers };
        // SAFETY: see above.
        unsafe { self.queue.submit(request, &mut self.uring, &mut self.done) };
    }

    fn wait(&mut self) -> Completion {
        loop {
            if let Some(completion) = self.done.pop() {
                return completion;
            }
            self.uring.submit_and_wait(1).unwrap();
            while let Some(cqe) = self.uring.next() {
                self.queue.complete(&cqe, &mut self.uring, &mut self.done);
            }
        }
    }

    fn run(
        &mut self,
        operation: Operation,
        offset: usize,
        buffers: &[Buffer],
    ) -> Result<u64, BlockErrorKind> {
        self.submit(7, operation, offset, buffers);
        let Completion { id, result } = self.wait();
        assert_eq!(id, 7);
        assert_eq!(self.queue.in_flight(), 0);
        result.map_err(|error| error.kind)
    }

    /// An operation without data.
    fn order(
        &mut self,
        operation: Operation,
        offset: usize,
        len: usize,
    ) -> Result<u64, BlockErrorKind> {
        let request =
            Request { id: 7, operation, offset: offset as u64, len: len as u64, buffers: &[] };
        // SAFETY: there are no buffers.
        unsafe { self.queue.submit(request, &mut self.uring, &mut self.done) };
        self.wait().result.map_err(|error| error.kind)
    }
}

/// Memory in pieces that do not touch, each with an address that is `shift` past a page's.
struct Pieces {
    memory: Vec<u8>,
    start: usize,
    lens: Vec<usize>,
    stride: usize,
}

impl Pieces {
    fn new(lens: &[usize], shift: usize) -> Self {
        let largest = lens.iter().max().unwrap();
        let stride = (largest + shift).next_multiple_of(4 * KIB) + 4 * KIB;
        let memory = vec![0; stride * lens.len() + 8 * KIB];
        let start = memory.as_ptr().addr().wrapping_neg() % (4 * KIB) + shift;
        Self { memory, start, lens: lens.to_vec(), stride }
    }

    fn fill(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        for (i, len) in self.lens.iter().enumerate() {
            let at = self.start + i * self.stride;
            self.memory[at..at + len].copy_from_slice(&bytes[..*len]);
            bytes = &bytes[*len..];
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (i, len) in self.lens.iter().enumerate() {
            bytes.extend(&self.memory[self.start + i * self.stride..][..*len]);
        }
        bytes
    }

    fn buffers(&mut self) -> Vec<Buffer> {
        let memory = self.memory.as_mut_ptr();
        let place = |i: usize| memory.wrapping_add(self.start + i * self.stride);
        self.lens.iter().enumerate().map(|(i, len)| Buffer::new(place(i), *len)).collect()
    }
}

/// Bytes that tell where they belong.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i / 512 * 31 + i + seed * 101) % 251) as u8).collect()
}

fn image(directory: &Path, size: usize) -> PathBuf {
    let path = directory.join("disk.img");
    File::create(&path).unwrap().set_len(size as u64).unwrap();
    path
}

fn open(path: &Path, direct: Direct) -> FileDisk {
    FileDisk::open(path, &OpenOptions { direct, ..OpenOptions::default() }).unwrap()
}

/// Directories on the file systems that everybody has.
fn directories() -> Vec<TempDir> {
    let mut all = vec![tempfile::tempdir().unwrap()];
    all.extend(tempfile::tempdir_in("/dev/shm").ok());
    all
}

/// An image in each of them, past the page cache where that works, and through it.
fn each_disk(size: usize, test: impl Fn(&Path, &FileDisk)) {
    for directory in directories() {
        for direct in [Direct::Auto, Direct::Off] {
            let path = image(directory.path(), size);
            let disk = open(&path, direct);
            assert!(!(direct == Direct::Off && disk.is_direct()));
            test(&path, &disk);
            drop(disk);
        }
    }
}

#[test]
fn small_and_large_whole_and_scattered() {
    each_disk(16 * MIB, |path, disk| {
        let mut worker = Worker::new(disk);
        let cases: [(usize, Vec<usize>, usize); 8] = [
            (0, vec![512], 0),
            (512, vec![512], 512),
            (4096, vec![4096], 0),
            (MIB, vec![MIB], 0),
            // A megabyte of guest memory that starts in the middle of a page.
            (512, [&[2048][..], &[4096; 255], &[2048]].concat(), 0),
            // More pieces than one call takes.
            (2 * MIB, vec![4096; 2500], 0),
            // Addresses no device can take.
            (8192, vec![4096, 512, 1024], 1),
            (1536, vec![100, 411, 1, 300_032], 3),
        ];
        for (seed, (offset, lens, shift)) in cases.into_iter().enumerate() {
            let len: usize = lens.iter().sum();
            let expected = pattern(len, seed);
            let mut pieces = Pieces::new(&lens, shift);
            pieces.fill(&expected);
            let buffers = pieces.buffers();
            assert_eq!(worker.run(WRITE, offset, &buffers), Ok(len as u64), "case {seed}");

            let mut there = vec![0; len];
            File::open(path).unwrap().read_exact_at(&mut there, offset as u64).unwrap();
            assert!(there == expected, "written, case {seed}, direct {}", disk.is_direct());

            pieces.fill(&vec![0xee; len]);
            let buffers = pieces.buffers();
            assert_eq!(worker.run(READ, offset, &buffers), Ok(len as u64));
            assert!(pieces.bytes() == expected, "read, case {seed}, direct {}", disk.is_direct());
        }
    });
}

#[test]
fn buffers_longer_than_the_request() {
    each_disk(MIB, |_, disk| {
        let mut worker = Worker::new(disk);
        let mut pieces = Pieces::new(&[512, 4096, 4096], 0);
        pieces.fill(&[0xee; 8704]);
        let buffers = pieces.buffers();
        let request = Request { id: 1, operation: READ, offset: 0, len: 1024, buffers: &buffers };
        // SAFETY: the pieces outlive the request.
        unsafe { worker.queue.submit(request, &mut worker.uring, &mut worker.done) };
        assert_eq!(worker.wait().result, Ok(1024));
        assert_eq!(pieces.bytes(), [vec![0; 1024], vec![0xee; 7680]].concat());
    });
}

#[test]
fn many_at_a_time_end_each_once() {
    each_disk(4 * MIB, |path, disk| {
        let mut worker = Worker::with_depth(disk, 64);
        let mut pieces = Pieces::new(&[4096; 64], 0);
        pieces.fill(&pattern(64 * 4096, 5));
        let buffers = pieces.buffers();
        for id in 0..64 {
            // Backwards, so that the order on disk is not that of the requests.
            worker.submit(id, WRITE, (63 - id as usize) * 4096, &buffers[id as usize..][..1]);
        }
        worker.uring.submit().unwrap();
        // The ring collects 16 at a time.
        let Counters { enters, sqes, .. } = worker.uring.counters();
        assert!(sqes == 64 && enters <= 8, "{enters} enters for {sqes} requests");
        let mut ids: Vec<u32> = (0..64).map(|_| worker.wait()).map(|end| end.id).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..64));
        let there = fs::read(path).unwrap();
        for (i, page) in pattern(64 * 4096, 5).chunks(4096).enumerate() {
            assert!(there[(63 - i) * 4096..][..4096] == *page);
        }
    });
}

#[test]
fn more_than_the_depth_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let disk = open(&image(directory.path(), MIB), Direct::Auto);
    let mut worker = Worker::with_depth(&disk, 2);
    let mut pieces = Pieces::new(&[4096; 3], 0);
    let buffers = pieces.buffers();
    for id in 0..3 {
        worker.submit(id, READ, 0, &buffers[id as usize..][..1]);
    }
    let refused = worker.done.pop().unwrap();
    assert_eq!((refused.id, refused.result.unwrap_err().kind), (2, BlockErrorKind::Busy));
    assert_eq!(worker.queue.in_flight(), 2);
    assert!(worker.wait().result.is_ok());
    assert!(worker.wait().result.is_ok());
    drop(pieces);
}

#[test]
fn wrong_requests_do_not_reach_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), MIB);
    let disk = open(&path, Direct::Auto);
    let mut worker = Worker::new(&disk);
    let mut pieces = Pieces::new(&[4096], 0);
    pieces.fill(&pattern(4096, 0));
    let buffers = pieces.buffers();
    for offset in [MIB, MIB - 2048, usize::MAX - 4095] {
        assert_eq!(worker.run(WRITE, offset, &buffers), Err(BlockErrorKind::OutOfRange));
    }
    assert_eq!(worker.run(WRITE, 100, &buffers), Err(BlockErrorKind::Malformed));
    assert_eq!(worker.order(WRITE, 0, 4096), Err(BlockErrorKind::Malformed), "no buffers");
    let end = MIB * 2;
    assert_eq!(worker.order(Operation::Discard, 0, end), Err(BlockErrorKind::OutOfRange));
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB as u64);
    assert_eq!(worker.uring.counters().sqes, 0);
}

#[test]
fn flush_and_forced_unit_access() {
    each_disk(MIB, |path, disk| {
        let mut worker = Worker::new(disk);
        let mut pieces = Pieces::new(&[4096, 512], 0);
        pieces.fill(&pattern(4608, 1));
        let buffers = pieces.buffers();
        assert_eq!(worker.run(Operation::Write { fua: true }, 512, &buffers), Ok(4608));
        assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
        let mut pieces = Pieces::new(&[512], 7);
        pieces.fill(&pattern(512, 2));
        let buffers = pieces.buffers();
        assert_eq!(worker.run(Operation::Write { fua: true }, 0, &buffers), Ok(512));
        let there = fs::read(path).unwrap();
        assert!(there[..512] == pattern(512, 2) && there[512..5120] == pattern(4608, 1));
    });
}

/// Fills a disk, has something done to `[64 KiB + 512, 1 MiB)`, and looks at what that did.
fn zero_out(path: &Path, disk: &FileDisk, operation: Operation) {
    let (from, to) = (64 * KIB + 512, MIB);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&pattern(2 * MIB, 3), 0).unwrap();
    file.sync_all().unwrap();
    let before = fs::metadata(path).unwrap().blocks();

    let mut worker = Worker::new(disk);
    assert_eq!(worker.order(operation, from, to - from), Ok((to - from) as u64));
    assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
    let there = fs::read(path).unwrap();
    assert_eq!(there.len(), 2 * MIB);
    assert!(there[..from] == pattern(2 * MIB, 3)[..from]);
    assert!(there[to..] == pattern(2 * MIB, 3)[to..]);
    let freed = before - fs::metadata(path).unwrap().blocks();
    let zero = there[from..to].iter().all(|&byte| byte == 0);
    let geometry = disk.geometry();
    match operation {
        Operation::Discard => {
            assert_eq!(zero, geometry.discard_zeroes);
            assert_eq!(freed >= (900 * KIB / 512) as u64, geometry.discard, "{freed} sectors");
        }
        _ => assert!(zero),
    }
    if operation == (Operation::WriteZeroes { may_unmap: true }) && geometry.discard {
        assert!(freed >= (900 * KIB / 512) as u64, "{freed} sectors");
    }
}

#[test]
fn discard_gives_space_back() {
    each_disk(2 * MIB, |path, disk| {
        assert!(disk.geometry().discard, "{}", path.display());
        zero_out(path, disk, Operation::Discard);
    });
}

#[test]
fn zeroes_are_written() {
    each_disk(2 * MIB, |path, disk| {
        for may_unmap in [true, false] {
            zero_out(path, disk, Operation::WriteZeroes { may_unmap });
        }
    });
}

/// Sectors written from aligned and from odd memory, neighbours in one page, all under way at once:
/// none may undo another.
fn write_neighbours(path: &Path, disk: &FileDisk) {
    let mut worker = Worker::with_depth(disk, 128);
    for round in 0..20 {
        let expected = pattern(64 * KIB, round);
        let mut aligned = Pieces::new(&[512; 128], 0);
        let mut odd = Pieces::new(&[512; 128], 1);
        aligned.fill(&expected);
        odd.fill(&expected);
        let (aligned, odd) = (aligned.buffers(), odd.buffers());
        for sector in 0..128 {
            let buffers = if sector % 3 == 0 { &odd } else { &aligned };
            worker.submit(sector as u32, WRITE, sector * 512, &buffers[sector..][..1]);
        }
        for _ in 0..128 {
            assert_eq!(worker.wait().result, Ok(512));
        }
        assert!(fs::read(path).unwrap()[..64 * KIB] == expected, "round {round}");
    }
}

#[test]
fn neighbouring_sectors_do_not_undo_each_other() {
    each_disk(64 * KIB, write_neighbours);
}

#[test]
fn a_shrunken_image_is_an_error_and_not_a_hang() {
    each_disk(MIB, |path, disk| {
        let mut worker = Worker::new(disk);
        File::options().write(true).open(path).unwrap().set_len(64 * KIB as u64).unwrap();
        let mut pieces = Pieces::new(&[4096; 2], 0);
        let buffers = pieces.buffers();
        assert_eq!(worker.run(READ, 60 * KIB, &buffers), Err(BlockErrorKind::OutOfRange));
        assert_eq!(worker.run(READ, 128 * KIB, &buffers), Err(BlockErrorKind::OutOfRange));
        assert_eq!(worker.run(READ, 56 * KIB, &buffers), Ok(8192));
        // From now on its size is known, and nothing makes it grow again.
        assert_eq!(disk.geometry().size, 64 * KIB as u64);
        assert_eq!(worker.run(WRITE, 60 * KIB, &buffers), Err(BlockErrorKind::OutOfRange));
        assert_eq!(fs::metadata(path).unwrap().len(), 64 * KIB as u64);
    });
}

#[test]
fn a_read_only_disk_reads() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), MIB);
    fs::write(&path, pattern(MIB, 9)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let disk = FileDisk::open(&path, &options).unwrap();
    let Geometry { read_only, discard, write_zeroes, size, .. } = disk.geometry();
    assert_eq!((read_only, discard, write_zeroes, size), (true, false, false, MIB as u64));
    let mut worker = Worker::new(&disk);
    let mut pieces = Pieces::new(&[MIB], 0);
    let buffers = pieces.buffers();
    assert_eq!(worker.run(READ, 0, &buffers), Ok(MIB as u64));
    assert!(pieces.bytes() == pattern(MIB, 9));
    assert_eq!(worker.run(WRITE, 0, &buffers), Err(BlockErrorKind::ReadOnly));
    assert_eq!(worker.order(Operation::Discard, 0, 512), Err(BlockErrorKind::ReadOnly));
    assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
}

#[test]
fn a_file_in_memory_is_read_in_place() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else { return skip("no /dev/shm") };
    for direct in [Direct::Auto, Direct::Off] {
        let disk = open(&image(directory.path(), MIB), direct);
        let mut worker = Worker::new(&disk);
        let mut pieces = Pieces::new(&[4096], 0);
        let buffers = pieces.buffers();
        assert_eq!(worker.run(READ, 0, &buffers), Ok(4096));
        // The kernel's helpers are threads of this process, named for whom they help.
        let helper = format!("iou-wrk-{}", rustix::thread::gettid().as_raw_nonzero());
        let names = fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = names.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        assert_eq!(names.filter(|name| name.trim() == helper).count(), 0, "{direct:?}");
    }
}

#[test]
fn a_writer_keeps_others_away() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), MIB);
    let writer = OpenOptions::default();
    let reader = OpenOptions { read_only: true, ..OpenOptions::default() };
    let careless = OpenOptions { lock: false, ..OpenOptions::default() };
    let open = |options: &OpenOptions| FileDisk::open(&path, options);
    let in_use = |options: &OpenOptions| matches!(open(options), Err(OpenError::InUse { .. }));

    let disk = open(&writer).unwrap();
    assert!(in_use(&writer) && in_use(&reader));
    assert!(open(&careless).is_ok());
    // The ring's own reference to the file does not keep the lock.
    let worker = Worker::new(&disk);
    drop(disk);
    assert!(in_use(&writer), "its queue still uses it");
    let Worker { queue, uring, .. } = worker;
    drop(queue);
    let disk = open(&writer).unwrap();
    drop((disk, uring));

    let readers = [open(&reader).unwrap(), open(&reader).unwrap()];
    assert!(in_use(&writer));
    drop(readers);
    assert!(open(&writer).is_ok());
}

#[test]
fn bad_images_are_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    let shown = path.display().to_string();
    let error = |path: &Path| {
        let error = FileDisk::open(path, &OpenOptions::default()).unwrap_err();
        let line = error.to_string();
        assert!(!line.contains('\n') && !line.starts_with(char::is_uppercase), "{line}");
        line
    };
    assert_eq!(error(&path), format!("disk image {shown} does not exist"));
    assert!(!path.exists());
    assert!(error(directory.path()).contains("is a directory"));
    File::create(&path).unwrap();
    assert!(error(&path).contains("is empty"));
    fs::write(&path, [0; 1000]).unwrap();
    assert!(error(&path).contains("1000 bytes long, which is not a multiple of 512"));
    assert_eq!(fs::metadata(&path).unwrap().len(), 1000);
    assert!(error("/dev/null".as_ref()).contains("neither a file nor a block device"));
    assert!(error("/dev/full/x".as_ref()).contains("cannot open"));
}

/// Root may do everything, so this says nothing to it.
#[test]
fn an_image_without_permission() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), MIB);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    let open = || FileDisk::open(&path, &OpenOptions::default());
    assert!(matches!(open(), Err(OpenError::NotWritable { .. })));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    assert!(matches!(open(), Err(OpenError::Unreadable { .. })));
}

#[test]
fn a_disk_has_the_same_name_in_every_run() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), MIB);
    let id = |options: OpenOptions| FileDisk::open(&path, &options).unwrap().geometry().id;
    let own = id(OpenOptions::default());
    assert_eq!(own.len(), 16);
    assert_eq!(own, id(OpenOptions { read_only: true, ..OpenOptions::default() }));
    assert_eq!(id(OpenOptions { id: Some("root".into()), ..OpenOptions::default() }), "root");
}

/// A loop device, which only root can make.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(image: &Path) -> Option<Self> {
        Self::with_sectors(image, 512)
    }

    /// With sectors of so many bytes.
    fn with_sectors(image: &Path, bytes: u32) -> Option<Self> {
        let sectors = format!("--sector-size={bytes}");
        let made = Command::new("losetup").args(["--find", "--show", &sectors]).arg(image).output();
        let made = made.map_err(|error| error.to_string()).and_then(|output| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
            if output.status.success() {
                Ok(text(&output.stdout))
            } else {
                Err(text(&output.stderr))
            }
        });
        match made {
            Ok(device) => Some(Self(device.into())),
            Err(error) => {
                skip(&format!("cannot make a loop device: {error}"));
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        Command::new("losetup").arg("--detach").arg(&self.0).status().unwrap();
    }
}

/// What a test cannot do here is told, and is a failure where everything has to be done.
fn skip(reason: &str) {
    let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
    assert!(!ci, "{reason}");
    eprintln!("skipped: {reason}");
}

#[test]
fn a_block_device_is_a_disk() {
    let directory = tempfile::tempdir().unwrap();
    let Some(device) = LoopDevice::new(&image(directory.path(), 2 * MIB)) else { return };
    let LoopDevice(path) = &device;
    for direct in [Direct::On, Direct::Off] {
        let disk = open(path, direct);
        assert_eq!(disk.geometry().size, 2 * MIB as u64);
        assert_eq!(disk.is_direct(), direct == Direct::On);
        let again = FileDisk::open(path, &OpenOptions::default());
        assert!(matches!(again, Err(OpenError::InUse { .. })), "{again:?}");

        write_neighbours(path, &disk);
        let mut worker = Worker::new(&disk);
        let mut pieces = Pieces::new(&[4096, 1024, MIB], 0);
        let bytes = pattern(MIB + 5120, 3);
        pieces.fill(&bytes);
        let len = bytes.len() as u64;
        let buffers = pieces.buffers();
        assert_eq!(worker.run(Operation::Write { fua: true }, 512, &buffers), Ok(len));
        assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
        assert!(fs::read(path).unwrap()[512..][..bytes.len()] == bytes);
        for operation in [Operation::Discard, Operation::WriteZeroes { may_unmap: false }] {
            assert_eq!(worker.run(WRITE, 512, &buffers), Ok(len));
            assert_eq!(worker.order(operation, 1024, 64 * KIB), Ok(64 * KIB as u64));
            let there = fs::read(path).unwrap();
            let zero = there[1024..][..64 * KIB].iter().all(|&byte| byte == 0);
            assert!(zero || (operation == Operation::Discard && !disk.geometry().discard_zeroes));
            assert!(there[512..1024] == bytes[..512]);
        }
    }
}

/// Runs `test` in a directory where root has mounted a file system of this type.
fn mounted(kind: &str, options: &str, test: impl FnOnce(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    let options = std::ffi::CString::new(options).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    let mounted =
        rustix::mount::mount("none", directory.path(), kind, flags, Some(options.as_c_str()));
    if let Err(error) = mounted {
        return skip(&format!("cannot mount a {kind}: {error}"));
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(directory.path())));
    rustix::mount::unmount(directory.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_full_host_says_so() {
    mounted("tmpfs", "size=1m", |directory| {
        let disk = open(&image(directory, 8 * MIB), Direct::Auto);
        let mut worker = Worker::new(&disk);
        let mut pieces = Pieces::new(&[256 * KIB], 0);
        let buffers = pieces.buffers();
        let results: Vec<_> = (0..8).map(|i| worker.run(WRITE, i * 256 * KIB, &buffers)).collect();
        assert_eq!(results[0], Ok(256 * KIB as u64));
        assert_eq!(results[7], Err(BlockErrorKind::NoSpace));
        // Discarding makes room again.
        assert_eq!(worker.order(Operation::Discard, 0, 256 * KIB), Ok(256 * KIB as u64));
        assert_eq!(worker.run(WRITE, 256 * KIB, &buffers), Ok(256 * KIB as u64));
    });
}

/// A ramfs has neither holes nor direct I/O.
#[test]
fn a_host_without_talents_still_writes_zeroes() {
    mounted("ramfs", "", |directory| {
        let path = image(directory, 2 * MIB);
        let on = OpenOptions { direct: Direct::On, ..OpenOptions::default() };
        if let Err(error) = FileDisk::open(&path, &on) {
            assert!(matches!(error, OpenError::NoDirect { .. }), "{error}");
        }
        let disk = open(&path, Direct::Auto);
        assert!(!disk.geometry().discard && !disk.geometry().discard_zeroes);
        zero_out(&path, &disk, Operation::Discard);
        zero_out(&path, &disk, Operation::WriteZeroes { may_unmap: true });
        zero_out(&path, &disk, Operation::WriteZeroes { may_unmap: false });
    });
}

/// What a buffered disk has not written back yet is lost when the host's device has no room for it. A
/// guest asks again when a flush fails.
#[test]
fn a_flush_that_failed_fails_for_good() {
    mounted("tmpfs", "size=1m", |directory| {
        let Some(device) = LoopDevice::new(&image(directory, 8 * MIB)) else { return };
        let disk = open(&device.0, Direct::Off);
        let mut worker = Worker::new(&disk);
        let mut pieces = Pieces::new(&[256 * KIB], 0);
        pieces.fill(&pattern(256 * KIB, 1));
        let buffers = pieces.buffers();
        for i in 0..16 {
            let _ = worker.run(WRITE, i * 256 * KIB, &buffers);
        }
        for _ in 0..3 {
            assert!(worker.order(Operation::Flush, 0, 0).is_err());
        }
        // Another channel, and that of the next system.
        let mut other = Worker::new(&disk);
        drop(worker);
        assert!(other.order(Operation::Flush, 0, 0).is_err());
        assert!(Worker::new(&disk).order(Operation::Flush, 0, 0).is_err());
        drop(other);
        drop(disk);
        // Whoever opens it anew is told to look at what is there.
        let _ = Command::new("blockdev").arg("--flushbufs").arg(&device.0).status();
        let disk = open(&device.0, Direct::Off);
        assert_eq!(Worker::new(&disk).order(Operation::Flush, 0, 0), Ok(0));
    });
}

/// A guest that breaks its channel takes the answer to its flush with it, but not what the answer is.
#[test]
fn a_flush_that_nobody_hears_of_has_failed_all_the_same() {
    mounted("tmpfs", "size=1m", |directory| {
        let Some(device) = LoopDevice::new(&image(directory, 8 * MIB)) else { return };
        let disk = open(&device.0, Direct::Off);
        let mut worker = Worker::new(&disk);
        let mut pieces = Pieces::new(&[256 * KIB], 0);
        pieces.fill(&pattern(256 * KIB, 1));
        let buffers = pieces.buffers();
        for i in 0..16 {
            let _ = worker.run(WRITE, i * 256 * KIB, &buffers);
        }
        worker.submit(1, Operation::Flush, 0, &[]);
        worker.uring.submit().unwrap();
        // As a channel's worker goes: its ring first, which waits.
        let Worker { uring, queue, .. } = worker;
        drop(uring);
        drop(queue);
        assert!(Worker::new(&disk).order(Operation::Flush, 0, 0).is_err());
    });
}

/// Two workers: one writes a sector and reads it back into odd memory, the other reads its neighbours
/// into odd memory all the time.
fn reads_back_what_it_wrote(disk: &FileDisk) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut worker = Worker::new(disk);
            let mut pieces = Pieces::new(&[512 * 7], 1);
            while !stop.load(Ordering::Relaxed) {
                let buffers = pieces.buffers();
                worker.run(READ, MIB + 512, &buffers).unwrap();
            }
        });
        let mut worker = Worker::new(disk);
        let mut aligned = Pieces::new(&[512], 0);
        let mut odd = Pieces::new(&[512], 1);
        let stale = (0..5000).find(|&round| {
            let bytes = pattern(512, round);
            aligned.fill(&bytes);
            let buffers = aligned.buffers();
            let wrote = worker.run(WRITE, MIB, &buffers);
            let buffers = odd.buffers();
            let read = worker.run(READ, MIB, &buffers);
            (wrote, read) != (Ok(512), Ok(512)) || odd.bytes() != bytes
        });
        stop.store(true, Ordering::Relaxed);
        assert_eq!(stale, None, "a round whose write was not read");
    });
}

#[test]
fn an_unaligned_read_beside_direct_writes_sees_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 8 * MIB);
    fs::write(&path, vec![0; 8 * MIB]).unwrap();
    reads_back_what_it_wrote(&open(&path, Direct::Auto));
    let Some(device) = LoopDevice::new(&path) else { return };
    reads_back_what_it_wrote(&open(&device.0, Direct::On));
}

/// How many pages of a file or device are in the host's page cache.
fn cached_pages(path: &Path) -> usize {
    let file = File::open(path).unwrap();
    let len = (&file).seek(SeekFrom::End(0)).unwrap() as usize;
    let mut pages = vec![0u8; len.div_ceil(4096)];
    let (read, shared) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
    let anywhere = std::ptr::null_mut();
    // SAFETY: a new mapping, which is not read.
    let start = unsafe { rustix::mm::mmap(anywhere, len, read, shared, &file, 0) }.unwrap();
    // SAFETY: the vector has a byte for each of the mapping's pages.
    assert_eq!(unsafe { libc::mincore(start, len, pages.as_mut_ptr()) }, 0);
    // SAFETY: nobody else knows of the mapping.
    unsafe { rustix::mm::munmap(start, len) }.unwrap();
    pages.iter().filter(|&&page| page & 1 != 0).count()
}

#[test]
fn a_direct_disk_leaves_nothing_in_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 2 * MIB);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&pattern(2 * MIB, 1), 0).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let disk = open(&path, Direct::Auto);
    if !disk.is_direct() {
        return skip("no direct I/O in the temporary directory");
    }
    assert_eq!(cached_pages(&path), 0);
    let mut worker = Worker::new(&disk);
    for shift in [0, 1] {
        let mut pieces = Pieces::new(&[1024, 100 * KIB], shift);
        let len = (101 * KIB) as u64;
        for operation in [WRITE, Operation::Write { fua: true }, READ] {
            assert_eq!(worker.run(operation, 512, &pieces.buffers()), Ok(len));
        }
    }
    let zero = |may_unmap| Operation::WriteZeroes { may_unmap };
    for operation in [Operation::Discard, zero(true), zero(false)] {
        for (offset, len) in [(512, 64 * KIB), (MIB + 1536, 512), (MIB, 8 * KIB)] {
            assert_eq!(worker.order(operation, offset, len), Ok(len as u64));
        }
    }
    assert_eq!(cached_pages(&path), 0);
}

#[test]
fn a_thick_image_stays_thick_without_discard() {
    for directory in directories() {
        let path = image(directory.path(), 4 * MIB);
        fs::write(&path, pattern(4 * MIB, 1)).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        let before = fs::metadata(&path).unwrap().blocks();
        let disk = FileDisk::open(&path, &OpenOptions { discard: false, ..OpenOptions::default() });
        let disk = disk.unwrap();
        let Geometry { discard, discard_zeroes, .. } = disk.geometry();
        assert_eq!((discard, discard_zeroes), (false, false));
        let mut worker = Worker::new(&disk);
        for operation in [
            Operation::Discard,
            Operation::WriteZeroes { may_unmap: true },
            Operation::WriteZeroes { may_unmap: false },
        ] {
            assert_eq!(worker.order(operation, 512, 3 * MIB), Ok(3 * MIB as u64));
            assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
            assert!(fs::metadata(&path).unwrap().blocks() >= before, "{operation:?}");
            let zeroes = fs::read(&path).unwrap()[512..][..3 * MIB].iter().all(|&byte| byte == 0);
            assert_eq!(zeroes, operation != Operation::Discard);
        }
    }
}

#[test]
fn a_disk_that_has_another_size_says_so_when_it_is_asked() {
    each_disk(MIB, |path, disk| {
        let mut worker = Worker::new(disk);
        let capacity = disk.capacity();
        let mut pieces = Pieces::new(&[4096], 0);
        let buffers = pieces.buffers();
        File::options().write(true).open(path).unwrap().set_len(2 * MIB as u64 + 100).unwrap();
        assert_eq!(worker.run(WRITE, MIB, &buffers), Err(BlockErrorKind::OutOfRange), "not yet");
        assert_eq!(disk.refresh().unwrap(), 2 * MIB as u64, "in whole blocks");
        assert_eq!((capacity.get(), disk.geometry().size), (2 * MIB as u64, 2 * MIB as u64));
        assert_eq!(worker.run(WRITE, MIB, &buffers), Ok(4096));
        File::options().write(true).open(path).unwrap().set_len(0).unwrap();
        assert_eq!(disk.refresh().unwrap(), 0);
        for operation in [READ, WRITE] {
            assert_eq!(worker.run(operation, 0, &buffers), Err(BlockErrorKind::OutOfRange));
        }
    });
}

#[test]
fn a_block_device_grows_and_shrinks() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 2 * MIB);
    let Some(device) = LoopDevice::new(&path) else { return };
    let resize = |len: usize| {
        File::options().write(true).open(&path).unwrap().set_len(len as u64).unwrap();
        let status = Command::new("losetup").arg("--set-capacity").arg(&device.0).status();
        assert!(status.unwrap().success());
    };
    for direct in [Direct::On, Direct::Off] {
        resize(2 * MIB);
        let disk = open(&device.0, direct);
        let mut worker = Worker::new(&disk);
        let mut pieces = Pieces::new(&[64 * KIB], 0);
        let buffers = pieces.buffers();
        resize(4 * MIB);
        assert_eq!(disk.refresh().unwrap(), 4 * MIB as u64);
        assert_eq!(worker.run(WRITE, 3 * MIB, &buffers), Ok(64 * KIB as u64));
        assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
        // The first that meets the end learns of it.
        for operation in [READ, WRITE, Operation::Write { fua: true }] {
            resize(4 * MIB);
            disk.refresh().unwrap();
            resize(MIB);
            let behind = Err(BlockErrorKind::OutOfRange);
            assert_eq!(worker.run(operation, MIB - 32 * KIB, &buffers), behind, "{direct:?}");
            assert_eq!(disk.geometry().size, MIB as u64);
        }
        assert_eq!(worker.run(WRITE, MIB - 64 * KIB, &buffers), Ok(64 * KIB as u64));
    }
}

#[test]
fn a_device_with_blocks_of_4_kib_has_them_as_a_disk_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 2 * MIB);
    let Some(device) = LoopDevice::with_sectors(&path, 4096) else { return };
    for direct in [Direct::On, Direct::Off] {
        let disk = open(&device.0, direct);
        let Geometry { logical_block, physical_block, discard_granularity, .. } = disk.geometry();
        assert_eq!((logical_block, physical_block), (4096, 4096));
        assert!(discard_granularity >= 4096);
        assert_eq!(disk.is_direct(), direct == Direct::On);
        let mut worker = Worker::new(&disk);
        let mut pieces = Pieces::new(&[512], 0);
        assert_eq!(worker.run(WRITE, 0, &pieces.buffers()), Err(BlockErrorKind::Malformed));
        assert_eq!(worker.order(Operation::Discard, 512, 4096), Err(BlockErrorKind::Malformed));
        for (seed, (lens, shift)) in
            [(&[4096, 8192][..], 0), (&[1024, 3072, 512, 3584], 512), (&[65535, 1], 1)]
                .into_iter()
                .enumerate()
        {
            let len: usize = lens.iter().sum();
            let bytes = pattern(len, seed);
            pieces = Pieces::new(lens, shift);
            pieces.fill(&bytes);
            assert_eq!(worker.run(WRITE, 8192, &pieces.buffers()), Ok(len as u64));
            pieces.fill(&vec![0xee; len]);
            assert_eq!(worker.run(READ, 8192, &pieces.buffers()), Ok(len as u64));
            assert!(pieces.bytes() == bytes, "{lens:?}");
        }
    }
    // What that means for who wants another size.
    let options = |block_size, direct| OpenOptions { block_size, direct, ..Default::default() };
    let error = |options| FileDisk::open(&device.0, &options).unwrap_err().to_string();
    let shown = device.0.display();
    assert_eq!(
        error(options(Some(512), Direct::On)),
        format!(
            "the host reads and writes {shown} past its page cache in blocks of 4096 bytes, not of \
             512; say block-size=4096, or leave direct I/O off"
        )
    );
    for block in [0, 256, 513, 8192] {
        let error = error(options(Some(block), Direct::Auto));
        assert!(error.contains("power of two from 512 to 4096"), "{error}");
    }
}

/// Sectors of 512 bytes on a device that has none: the host reads the rest of a block, and writes it
/// back with what is new. Nothing of the rest may be lost, whatever is under way beside it.
#[test]
fn sectors_of_a_device_with_larger_blocks_do_not_undo_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 2 * MIB);
    let Some(device) = LoopDevice::with_sectors(&path, 4096) else { return };
    let options = OpenOptions { block_size: Some(512), ..OpenOptions::default() };
    let disk = FileDisk::open(&device.0, &options).unwrap();
    let Geometry { logical_block, physical_block, .. } = disk.geometry();
    assert_eq!((logical_block, physical_block, disk.is_direct()), (512, 4096, false));
    write_neighbours(&device.0, &disk);
    for operation in [Operation::Discard, Operation::WriteZeroes { may_unmap: false }] {
        let file = File::options().write(true).open(&device.0).unwrap();
        file.write_all_at(&pattern(MIB, 3), 0).unwrap();
        let mut worker = Worker::new(&disk);
        assert_eq!(worker.order(operation, 1536, 64 * KIB), Ok(64 * KIB as u64));
        let there = fs::read(&device.0).unwrap();
        assert!(there[..1536] == pattern(MIB, 3)[..1536]);
        let (zeroes, rest) = there[1536..MIB].split_at(64 * KIB);
        assert!(zeroes.iter().all(|&byte| byte == 0), "{operation:?}");
        assert!(rest == &pattern(MIB, 3)[1536 + 64 * KIB..]);
    }
    let mut worker = Worker::new(&disk);
    assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
}

#[test]
fn an_image_may_have_blocks_of_4_kib() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), MIB);
    let options = OpenOptions { block_size: Some(4096), ..OpenOptions::default() };
    let disk = FileDisk::open(&path, &options).unwrap();
    let Geometry { logical_block, physical_block, size, .. } = disk.geometry();
    assert_eq!((logical_block, physical_block, size), (4096, 4096, MIB as u64));
    drop(disk);
    image(directory.path(), MIB + 512);
    let error = FileDisk::open(&path, &options).unwrap_err().to_string();
    assert!(error.ends_with("is 1049088 bytes long, which is not a multiple of 4096"), "{error}");
}

/// One step of a workload: what, from which sector, how many, how odd the memory is.
type Step = (u8, usize, usize, usize);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (0..6_u8, 0..512_usize, 1..300_usize, prop::sample::select(vec![0, 0, 512, 1, 4]));
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// A disk holds what was written to it last, whatever the mix.
    #[test]
    fn a_disk_is_like_an_array(steps in steps()) {
        const SIZE: usize = 512 * 512;
        each_disk(SIZE, |path, disk| {
            let mut model = vec![0; SIZE];
            let mut worker = Worker::new(disk);
            for (i, (what, sector, sectors, shift)) in steps.iter().copied().enumerate() {
                let offset = sector * 512;
                let len = (sectors * 512).min(SIZE - offset);
                let cut = (len / 3).next_multiple_of(512).min(len);
                let lens: Vec<usize> = [cut, len - cut].into_iter().filter(|&len| len > 0).collect();
                match what {
                    0 | 1 => {
                        let fua = what == 1;
                        let bytes = pattern(len, i);
                        let mut pieces = Pieces::new(&lens, shift);
                        pieces.fill(&bytes);
                        let result = worker.run(Operation::Write { fua }, offset, &pieces.buffers());
                        assert_eq!(result, Ok(len as u64));
                        model[offset..offset + len].copy_from_slice(&bytes);
                    }
                    2 => {
                        let mut pieces = Pieces::new(&lens, shift);
                        assert_eq!(worker.run(READ, offset, &pieces.buffers()), Ok(len as u64));
                        assert!(pieces.bytes() == model[offset..offset + len], "step {i}");
                    }
                    3 => {
                        assert_eq!(worker.order(Operation::Flush, 0, 0), Ok(0));
                    }
                    _ => {
                        let operation = match what {
                            4 if disk.geometry().discard_zeroes => Operation::Discard,
                            _ => Operation::WriteZeroes { may_unmap: shift == 0 },
                        };
                        assert_eq!(worker.order(operation, offset, len), Ok(len as u64));
                        model[offset..offset + len].fill(0);
                    }
                }
            }
            assert!(fs::read(path).unwrap() == model);
        });
    }
}
