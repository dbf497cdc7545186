//! Opening an image: what it is, what it can do, whether it is ours.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, StatxFlags};

use super::queue::FileQueue;
use crate::block::{BlockError, BlockErrorKind, Capacity, Disk, Geometry, Queue, SECTOR};
use crate::uring::{Tag, Uring};

/// Whether an image is read and written past the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Where the host can.
    #[default]
    Auto,
    /// Or it is an error.
    On,
    /// Never.
    Off,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Nothing is written to it; several processes may have it so at once.
    pub read_only: bool,
    /// Past the page cache or not.
    pub direct: Direct,
    /// Whether to keep others away: from an image that is written to, everybody; from one that is
    /// only read, writers.
    pub lock: bool,
    /// The disk's name; made from the path if there is none.
    pub id: Option<String>,
    /// The size of a logical block in bytes: [`SECTOR`] to [`LARGEST_BLOCK`], a power of two. If it is
    /// not said, a block device's own, and [`SECTOR`] for a file.
    pub block_size: Option<u32>,
    /// Whether a guest may give space back: what it discards becomes free. If not, nothing that it
    /// does, zeroes included, frees any.
    pub discard: bool,
}

/// The largest logical block that a disk is shown with, in bytes.
pub const LARGEST_BLOCK: u32 = 4096;

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            direct: Direct::Auto,
            lock: true,
            id: None,
            block_size: None,
            discard: true,
        }
    }
}

/// Why an image cannot be a disk. Nothing was created or changed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says it")]
pub enum OpenError {
    #[error("disk image {} does not exist", path.display())]
    Missing { path: PathBuf },
    #[error("cannot open disk image {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("disk image {} cannot be written to; attach it read-only or change its permissions", path.display())]
    NotWritable { path: PathBuf, source: io::Error },
    #[error("{} is a directory; a disk image is a file or a block device", path.display())]
    Directory { path: PathBuf },
    #[error("{} is neither a file nor a block device", path.display())]
    NotADisk { path: PathBuf },
    #[error("disk image {} is empty; give it a size, for example with truncate --size 1G", path.display())]
    Empty { path: PathBuf },
    #[error("disk image {} is {size} bytes long, which is not a multiple of {block}", path.display())]
    PartialBlock { path: PathBuf, size: u64, block: u32 },
    #[error("disk image {} cannot have blocks of {block} bytes; they are a power of two from {SECTOR} to {LARGEST_BLOCK}", path.display())]
    BlockSize { path: PathBuf, block: u32 },
    #[error("disk image {} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error("cannot lock disk image {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    #[error("disk image {} changed while it was being opened", path.display())]
    Changed { path: PathBuf },
    #[error("the host cannot read and write {} past its page cache in {block}-byte blocks; leave direct I/O off", path.display())]
    NoDirect { path: PathBuf, block: u32 },
    #[error("the host reads and writes {} past its page cache in blocks of {needed} bytes, not of {block}; say block-size={needed}, or leave direct I/O off", path.display())]
    DirectNeeds { path: PathBuf, block: u32, needed: u32 },
}

/// What direct I/O on a file demands, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses.
    pub(super) memory: u32,
    /// Of offsets and lengths.
    pub(super) offset: u32,
}

/// The open descriptors, and what every queue on them has to know.
#[derive(Debug)]
pub(super) struct Image {
    /// Its path, for messages.
    name: String,
    pub(super) buffered: File,
    pub(super) direct: Option<(File, Alignment)>,
    /// Holds a file's lock.
    lock: Option<File>,
    /// For a block device, what [`Self::lock`] is for a file when it comes to lost writes.
    witness: Option<File>,
    /// A block device, whose buffered descriptor holds the lock and the claim. The kernel has to
    /// see the claim on the descriptor by which it is to drop cached pages before it zeroes.
    pub(super) is_device: bool,
    pub(super) capacity: Capacity,
    /// Requests are whole multiples of this many bytes.
    pub(super) block: u32,
    pub(super) read_only: bool,
    pub(super) punch_hole: bool,
    pub(super) zero_range: bool,
    /// The host is asked to free or to zero whole units of so many bytes, a power of two; what sticks
    /// out at either end is written. With parts of its own blocks it would take another way.
    pub(super) zero_unit: u64,
    /// A flush has failed, on whichever queue.
    flush_failed: AtomicBool,
}

impl Image {
    /// A flush has failed, and what it has lost the kernel has forgotten by now: asked again it would
    /// say that all is well, to this descriptor and to others.
    pub(super) fn flush_has_failed(&self, errno: i32) {
        if !self.flush_failed.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "{}: the host could not make the guest's writes stable ({}), and some may be lost; no \
                 flush succeeds any more until the image is opened anew",
                self.name,
                io::Error::from_raw_os_error(errno)
            );
        }
    }

    /// Flushes were under way on a queue that is gone, so nobody has heard of what they have lost. The
    /// kernel tells each open file of it, and this one has not been told yet.
    pub(super) fn hear_of_lost_writes(&self) {
        let Some(file) = self.lock.as_ref().or(self.witness.as_ref()) else { return };
        if let Err(error) = rustix::fs::fdatasync(file) {
            self.flush_has_failed(error.raw_os_error());
        }
    }

    /// Whether a flush may succeed.
    pub(super) fn may_flush(&self) -> Result<(), BlockError> {
        match self.flush_failed.load(Ordering::Relaxed) {
            true => Err(BlockError::new(BlockErrorKind::Io)),
            false => Ok(()),
        }
    }

    /// See [`Disk::refresh`]. A part of a block at the end does not count.
    pub(super) fn refresh(&self) -> io::Result<u64> {
        let size = (&self.buffered).seek(SeekFrom::End(0))?;
        let size = size - size % u64::from(self.block);
        let before = self.capacity.set(size);
        if before != size {
            tracing::warn!("{}: it had {before} bytes, and has {size} now", self.name);
        }
        Ok(size)
    }
}

/// A disk in a file or on a block device.
///
/// ```no_run
/// use backends::block::Disk;
/// use backends::file::{FileDisk, OpenOptions};
///
/// let disk = FileDisk::open("disk.img".as_ref(), &OpenOptions::default())?;
/// println!("{} bytes, direct: {}", disk.geometry().size, disk.is_direct());
/// # Ok::<(), backends::file::OpenError>(())
/// ```
#[derive(Debug)]
pub struct FileDisk {
    image: Arc<Image>,
    geometry: Geometry,
}

impl FileDisk {
    /// Opens an image that is there; nothing of it changes.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        let here = || path.to_owned();
        let unreadable = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => OpenError::Missing { path: here() },
            _ => OpenError::Unreadable { path: here(), source },
        };

        // Before it is opened: opening a FIFO would wait, and opening a tape would rewind it.
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        let block_device = metadata.file_type().is_block_device();
        if metadata.is_dir() {
            return Err(OpenError::Directory { path: here() });
        }
        if !metadata.is_file() && !block_device {
            return Err(OpenError::NotADisk { path: here() });
        }

        let lock = open_to_lock(path, options, block_device)?;
        let opened = lock.metadata().map_err(unreadable)?;
        if !same_file(&metadata, &opened) {
            return Err(OpenError::Changed { path: here() });
        }
        if options.lock {
            let kind = if options.read_only { libc::F_RDLCK } else { libc::F_WRLCK };
            set_lock(&lock, kind).map_err(|source| match source.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => OpenError::InUse { path: here() },
                _ => OpenError::Lock { path: here(), source },
            })?;
        }

        // A block device's metadata has no size; its end has.
        let size = (&lock).seek(SeekFrom::End(0)).map_err(unreadable)?;
        if size == 0 {
            return Err(OpenError::Empty { path: here() });
        }
        let own_block = match block_device {
            true => rustix::fs::ioctl_blksszget(&lock).unwrap_or(SECTOR),
            false => SECTOR,
        };
        let block = options.block_size.unwrap_or(own_block);
        if !block.is_power_of_two() || !(SECTOR..=LARGEST_BLOCK).contains(&block) {
            return Err(OpenError::BlockSize { path: here(), block });
        }
        if !size.is_multiple_of(u64::from(block)) {
            return Err(OpenError::PartialBlock { path: here(), size, block });
        }

        let in_place = if lives_in_memory(&lock) { libc::O_NONBLOCK } else { 0 };
        let reopen = |flags: i32| -> io::Result<File> {
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(flags | in_place)
                .open(path)?;
            match same_file(&file.metadata()?, &opened) {
                true => Ok(file),
                false => Err(io::ErrorKind::NotFound.into()),
            }
        };
        let (buffered, lock, witness) = match block_device {
            true => (lock, None, reopen(0).ok()),
            false => (reopen(0).map_err(unreadable)?, Some(lock), None),
        };
        let direct = match options.direct {
            Direct::Off => None,
            Direct::Auto | Direct::On => {
                reopen(libc::O_DIRECT).ok().and_then(|file| alignment(&file).map(|a| (file, a)))
            }
        };
        let direct = match direct {
            Some((_, Alignment { offset, .. })) if offset > block => {
                if options.direct == Direct::On {
                    return Err(OpenError::DirectNeeds { path: here(), block, needed: offset });
                }
                None
            }
            None if options.direct == Direct::On => {
                return Err(OpenError::NoDirect { path: here(), block });
            }
            direct => direct,
        };

        let mut talents = match block_device {
            true => Talents::of_device(&opened),
            false => Talents::of_file(&buffered, path, size, options.read_only),
        };
        talents.punch_hole &= options.discard;
        let zero_unit = match block_device {
            true => own_block,
            // A file system zeroes a part of a block by way of the page cache.
            false if direct.is_some() => valid_block(talents.granularity),
            false => 1,
        };
        let physical_block = match block_device {
            true => rustix::fs::ioctl_blkpbszget(&buffered).unwrap_or(SECTOR),
            // Larger ones, such as a huge page of a tmpfs, are no unit that a write has to fill.
            false => (opened.blksize() as u32).min(4096),
        };
        let writable = !options.read_only;
        let geometry = Geometry {
            logical_block: block,
            physical_block: valid_block(physical_block).max(block),
            read_only: options.read_only,
            discard: writable && talents.punch_hole,
            discard_granularity: valid_block(talents.granularity).max(block),
            discard_zeroes: writable && talents.punch_hole,
            write_zeroes: writable && (talents.punch_hole || talents.zero_range),
            rotational: talents.rotational,
            id: options.id.clone().unwrap_or_else(|| name_of(path)),
            ..Geometry::new(size)
        };
        let image = Image {
            name: path.display().to_string(),
            buffered,
            direct,
            lock,
            witness,
            is_device: block_device,
            capacity: Capacity::new(size),
            block,
            read_only: options.read_only,
            punch_hole: talents.punch_hole,
            zero_range: talents.zero_range,
            zero_unit: u64::from(zero_unit),
            flush_failed: AtomicBool::new(false),
        };
        Ok(Self { image: Arc::new(image), geometry })
    }

    #[cfg(test)]
    pub(super) fn image(&self) -> Arc<Image> {
        Arc::clone(&self.image)
    }

    /// Whether aligned requests go past the host's page cache.
    pub fn is_direct(&self) -> bool {
        self.image.direct.is_some()
    }
}

impl Disk for FileDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.image.capacity.get(), ..self.geometry.clone() }
    }

    fn capacity(&self) -> Capacity {
        self.image.capacity.clone()
    }

    fn refresh(&self) -> io::Result<u64> {
        self.image.refresh()
    }

    fn queue(&self, tag: Tag, depth: u16, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(FileQueue::new(Arc::clone(&self.image), tag, depth, uring)))
    }
}

/// The descriptor that tells whether the image may be opened this way at all.
fn open_to_lock(path: &Path, options: &OpenOptions, block_device: bool) -> Result<File, OpenError> {
    let open = |write: bool, flags: i32| {
        std::fs::OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
    };
    // On a block device, O_EXCL claims it from file systems and other drivers.
    let claim = block_device && options.lock && !options.read_only;
    let flags = if claim { libc::O_EXCL } else { 0 };
    open(!options.read_only, flags).map_err(|source| {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT) => OpenError::Missing { path },
            Some(libc::EBUSY) if claim => OpenError::InUse { path },
            Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY)
                if !options.read_only && open(false, 0).is_ok() =>
            {
                OpenError::NotWritable { path, source }
            }
            _ => OpenError::Unreadable { path, source },
        }
    })
}

/// Whether a file's bytes are in memory and nowhere else. Such file systems do not say that they
/// never wait, so io_uring hands each request for them to a thread, which costs far more than the
/// request; `O_NONBLOCK` has it served in place. On others it would hide that they do wait.
fn lives_in_memory(file: &File) -> bool {
    // <linux/magic.h>
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    const HUGETLBFS: u64 = 0x9584_58f6;
    let Ok(stat) = rustix::fs::fstatfs(file) else { return false };
    // Some architectures have it in a signed type of half the size.
    matches!(u64::from(stat.f_type as u32), TMPFS | RAMFS | HUGETLBFS)
}

fn same_file(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino(), one.rdev()) == (other.dev(), other.ino(), other.rdev())
}

/// Locks the whole file for this description of it, with one of `F_WRLCK`, `F_RDLCK`, `F_UNLCK`.
fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the kernel reads the structure during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Drop for Image {
    /// Closing the descriptor would do, were there not its copy in a child that another thread has
    /// just forked and that has still to `exec`.
    fn drop(&mut self) {
        // There may have been no lock; that is no error either.
        let _ = set_lock(self.lock.as_ref().unwrap_or(&self.buffered), libc::F_UNLCK);
    }
}

/// What direct I/O demands, if there is any for blocks that a disk can have.
fn alignment(file: &File) -> Option<Alignment> {
    let found = told_alignment(file).unwrap_or_else(|| probed_alignment(file))?;
    let valid = |bytes: u32| bytes.is_power_of_two() && bytes <= LARGEST_BLOCK;
    (valid(found.memory) && valid(found.offset)).then_some(found)
}

/// What the kernel says (Linux 6.1, and not for every file system); `Some(None)` if it says that
/// there is no direct I/O.
fn told_alignment(file: &File) -> Option<Option<Alignment>> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return None;
    }
    let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    Some((memory != 0 && offset != 0).then_some(Alignment { memory, offset }))
}

/// What works: a read of one sector into memory that is aligned to it and no more, then to a page; then
/// one of a page.
fn probed_alignment(file: &File) -> Option<Alignment> {
    #[repr(align(8192))]
    struct Aligned([u8; 8192]);
    let mut buffer = Box::new(Aligned([0; 8192]));
    [(SECTOR, SECTOR), (4096, SECTOR), (4096, 4096)].into_iter().find_map(|(memory, offset)| {
        let at = &mut buffer.0[memory as usize..][..offset as usize];
        // SAFETY: the kernel writes at most the slice's length to it during the call.
        let read = unsafe { libc::pread(file.as_raw_fd(), at.as_mut_ptr().cast(), at.len(), 0) };
        (read >= 0).then_some(Alignment { memory, offset })
    })
}

/// What the host can do with an image besides reading and writing it.
struct Talents {
    punch_hole: bool,
    zero_range: bool,
    /// What is freed at once, in bytes.
    granularity: u32,
    rotational: bool,
}

impl Talents {
    /// Found out by punching a hole into a file without a name beside the image. Where there can be
    /// none, behind the image's own end, where nothing is; but that may be seen in its times.
    fn of_file(file: &File, path: &Path, size: u64, read_only: bool) -> Self {
        let punched = |file: &File, offset: u64| {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file.as_fd(), flags, offset, u64::from(SECTOR)).is_ok()
        };
        let punch_hole = !read_only
            && match nameless_beside(file, path) {
                Some(other) => punched(&other, 0),
                None => punched(file, size),
            };
        Self {
            punch_hole,
            // Behind the end this would allocate, so it is only learnt from the first refusal.
            zero_range: true,
            granularity: rustix::fs::fstat(file)
                .map_or(4096, |stat| (stat.st_blksize as u32).min(4096)),
            rotational: false,
        }
    }

    /// Asked of the device's request queue: `fallocate` on a device punches holes where it can
    /// write zeroes by itself.
    fn of_device(metadata: &Metadata) -> Self {
        let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
        let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        // A partition's queue is its disk's.
        let ask = |name: &str| -> Option<u64> {
            ["queue", "../queue"].iter().find_map(|queue| {
                std::fs::read_to_string(sysfs.join(queue).join(name)).ok()?.trim().parse().ok()
            })
        };
        let zeroes = ask("write_zeroes_max_bytes").is_some_and(|bytes| bytes > 0);
        Self {
            punch_hole: zeroes,
            zero_range: true,
            granularity: ask("discard_granularity").map_or(SECTOR, |bytes| bytes as u32),
            rotational: ask("rotational") == Some(1),
        }
    }
}

/// A new file without a name in the file system that an image is in.
fn nameless_beside(image: &File, path: &Path) -> Option<File> {
    let path = path.canonicalize().ok()?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file =
        rustix::fs::open(path.parent()?, flags, Mode::RUSR | Mode::WUSR).ok().map(File::from)?;
    let same = image.metadata().ok()?.dev() == file.metadata().ok()?.dev();
    same.then_some(file)
}

/// A block size a guest can be told: a power of two from a sector to what any disk has.
fn valid_block(bytes: u32) -> u32 {
    if bytes.is_power_of_two() { bytes.clamp(SECTOR, 1 << 20) } else { 4096 }
}

/// The image's path, in 16 hexadecimal digits (FNV-1a).
fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let hash =
        path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{hash:016x}")
}
