//! One disk with several paths to it, of which one at a time writes.
//!
//! A disk may hang on an emulated controller and on a synthetic one at once; the guest's drivers are
//! to choose one of them. Should they not, two caches above one disk would destroy what is on it. So
//! the first path that writes owns writing: whatever would change the disk is refused on any other,
//! as if the disk were read-only there. Reads and flushes go by all.
//!
//! A path owns the disk until the last of its queues is gone, which is when the guest closes its
//! channel or the machine is reset; or until its only queue disclaims it, when a driver has reset its
//! controller. So what a firmware or a boot loader has written does not stand in the way of a system
//! that takes another path.
//!
//! ```
//! use std::sync::Arc;
//! use backends::{block::Disk, paths, ram::RamDisk};
//!
//! let disk: Arc<dyn Disk> = Arc::new(RamDisk::new(1 << 20)?);
//! let [ide, scsi] = paths::split(&disk, "disk.img", ["IDE", "the VMBus"]);
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! `unsafe` passes on the promises of [`Queue::submit`].
#![allow(unsafe_code)]

use std::array;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block::{
    BlockError, BlockErrorKind, Capacity, Completion, Completions, Disk, Geometry, Operation,
    Queue, Request,
};
use crate::uring::{Cqe, Tag, Uring};

/// Makes a path of each name to `disk`, which the user knows as `name`: all of them stand in the line
/// that tells of a refusal.
pub fn split<const N: usize>(
    disk: &Arc<dyn Disk>,
    name: &str,
    paths: [&'static str; N],
) -> [Arc<dyn Disk>; N] {
    let ownership = Arc::new(Ownership {
        disk: name.to_owned(),
        names: paths.to_vec(),
        owner: AtomicUsize::new(NOBODY),
        told: AtomicBool::new(false),
        queues: Mutex::new(vec![0; N]),
    });
    array::from_fn(|index| {
        let (disk, ownership) = (Arc::clone(disk), Arc::clone(&ownership));
        Arc::new(Path { disk, index, ownership }) as Arc<dyn Disk>
    })
}

/// No path has written.
const NOBODY: usize = usize::MAX;

/// Who may write.
struct Ownership {
    /// The disk's name.
    disk: String,
    /// The paths'.
    names: Vec<&'static str>,
    /// The path that has written first, or [`NOBODY`].
    owner: AtomicUsize,
    told: AtomicBool,
    /// How many queues each path has. The owner changes to [`NOBODY`] only under this lock, so that
    /// no queue is made while it does.
    queues: Mutex<Vec<usize>>,
}

impl Ownership {
    fn queues(&self) -> MutexGuard<'_, Vec<usize>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `path` may write: it owns the disk, or nobody did until now.
    fn claim(&self, path: usize) -> bool {
        let owner = self.owner.load(Ordering::Relaxed);
        owner == path
            || owner == NOBODY
                && match self.owner.compare_exchange(
                    NOBODY,
                    path,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => true,
                    // Another thread was faster; it may work for the same path.
                    Err(owner) => owner == path,
                }
    }

    /// `path` owns the disk no longer, if it did. Its queues are locked.
    fn release(&self, path: usize) {
        let (free, relaxed) = (Ordering::Release, Ordering::Relaxed);
        let _ = self.owner.compare_exchange(path, NOBODY, free, relaxed);
    }

    /// Says once that there was a refusal: a guest can make as many as it likes.
    fn tell(&self, path: usize) {
        if self.told.swap(true, Ordering::Relaxed) {
            return;
        }
        let name = |path: usize| self.names.get(path).copied().unwrap_or("no path");
        let owner = name(self.owner.load(Ordering::Relaxed));
        let other = name(path);
        tracing::warn!(
            "{}: the guest writes to it by {owner}, so its writes by {other} are refused",
            self.disk
        );
    }
}

/// A disk, by one of its paths.
struct Path {
    disk: Arc<dyn Disk>,
    index: usize,
    ownership: Arc<Ownership>,
}

impl Disk for Path {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn capacity(&self) -> Capacity {
        self.disk.capacity()
    }

    fn refresh(&self) -> io::Result<u64> {
        self.disk.refresh()
    }

    fn queue(&self, tag: Tag, depth: u16, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        let queue = self.disk.queue(tag, depth, uring)?;
        if let Some(count) = self.ownership.queues().get_mut(self.index) {
            *count += 1;
        }
        let ownership = Arc::clone(&self.ownership);
        Ok(Box::new(PathQueue { queue: Some(queue), index: self.index, ownership }))
    }
}

struct PathQueue {
    /// Here until the last moment.
    queue: Option<Box<dyn Queue>>,
    index: usize,
    ownership: Arc<Ownership>,
}

impl Queue for PathQueue {
    unsafe fn submit(&mut self, request: Request<'_>, uring: &mut Uring, done: &mut Completions) {
        let may = match request.operation {
            Operation::Read | Operation::Flush => true,
            Operation::Write { .. } | Operation::Discard | Operation::WriteZeroes { .. } => {
                self.ownership.claim(self.index)
            }
        };
        match &mut self.queue {
            // SAFETY: the caller's promise is passed on.
            Some(queue) if may => unsafe { queue.submit(request, uring, done) },
            _ => {
                self.ownership.tell(self.index);
                let result = Err(BlockError::new(BlockErrorKind::ReadOnly));
                done.push(Completion { id: request.id, result });
            }
        }
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions) {
        if let Some(queue) = &mut self.queue {
            queue.complete(cqe, uring, done);
        }
    }

    fn in_flight(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.in_flight())
    }

    fn disclaim(&mut self) {
        let queues = self.ownership.queues();
        if queues.get(self.index) == Some(&1) {
            self.ownership.release(self.index);
        }
    }
}

impl Drop for PathQueue {
    fn drop(&mut self) {
        self.queue = None; // what it has to do last is still the owner's
        let mut queues = self.ownership.queues();
        let Some(count) = queues.get_mut(self.index) else { return };
        *count -= 1;
        if *count == 0 {
            self.ownership.release(self.index);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::block::Buffer;
    use crate::ram::RamDisk;

    const WRITE: Operation = Operation::Write { fua: false };

    fn paths() -> (RamDisk, [Arc<dyn Disk>; 2]) {
        let disk = RamDisk::new(4096).unwrap();
        let paths = split(&(Arc::new(disk.clone()) as _), "ram", ["one", "the other"]);
        (disk, paths)
    }

    fn queue(path: &dyn Disk) -> (Uring, Box<dyn Queue>) {
        let mut uring = Uring::new(1).unwrap();
        let queue = path.queue(Tag(1), 1, &mut uring).unwrap();
        (uring, queue)
    }

    /// Fills the first sector with `byte`, or whatever the operation does to it.
    fn run(
        (uring, queue): &mut (Uring, Box<dyn Queue>),
        operation: Operation,
        byte: u8,
    ) -> Result<u64, BlockErrorKind> {
        let mut sector = [byte; 512];
        let buffers = [Buffer::from(sector.as_mut_slice())];
        let len = if operation == Operation::Flush { 0 } else { 512 };
        let request = Request { id: 1, operation, offset: 0, len, buffers: &buffers };
        let mut done = Completions::with_capacity(1);
        // SAFETY: a RAM disk is done at once.
        unsafe { queue.submit(request, uring, &mut done) };
        done.pop().unwrap().result.map_err(|error| error.kind)
    }

    #[test]
    fn the_first_to_write_owns_the_disk_until_its_last_queue_is_gone() {
        let (disk, [one, other]) = paths();
        let (mut first, mut second) = (queue(&*one), queue(&*other));
        assert_eq!(run(&mut second, Operation::Read, 0), Ok(512), "reading claims nothing");
        assert_eq!(run(&mut first, WRITE, 1), Ok(512));
        for operation in [WRITE, Operation::Discard, Operation::WriteZeroes { may_unmap: true }] {
            assert_eq!(run(&mut second, operation, 2), Err(BlockErrorKind::ReadOnly));
        }
        assert_eq!(run(&mut second, Operation::Read, 0), Ok(512));
        assert_eq!(run(&mut second, Operation::Flush, 0), Ok(0));
        let again = queue(&*one);
        first.1.disclaim();
        assert_eq!(run(&mut second, WRITE, 2), Err(BlockErrorKind::ReadOnly), "there is another");
        drop(first);
        assert_eq!(run(&mut second, WRITE, 2), Err(BlockErrorKind::ReadOnly), "one is left");
        drop(again);
        let mut byte = [0];
        disk.read(0, &mut byte);
        assert_eq!(byte, [1]);
        assert_eq!(run(&mut second, WRITE, 2), Ok(512));
        assert_eq!(run(&mut queue(&*one), WRITE, 1), Err(BlockErrorKind::ReadOnly));
        queue(&*one).1.disclaim();
        assert_eq!(run(&mut queue(&*one), WRITE, 1), Err(BlockErrorKind::ReadOnly), "not its own");
        second.1.disclaim();
        assert_eq!(run(&mut queue(&*one), WRITE, 1), Ok(512));
    }

    #[test]
    fn of_many_threads_only_one_paths_write() {
        for _ in 0..50 {
            let (_, paths) = paths();
            // Kept, so that a path lasts longer than its first thread.
            let kept: Vec<_> = paths.iter().map(|path| queue(&**path)).collect();
            let written = thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|i| {
                        let path = &*paths[i % 2];
                        scope.spawn(move || (i % 2, run(&mut queue(path), WRITE, 1).is_ok()))
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            let by = |path| written.iter().filter(|entry| **entry == (path, true)).count();
            assert!(matches!((by(0), by(1)), (2, 0) | (0, 2)), "{written:?}");
            drop(kept);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Open(usize),
        Close(usize),
        Disclaim(usize),
        Do(usize, Operation),
    }

    fn step() -> impl Strategy<Value = Step> {
        let operation = prop_oneof![
            Just(WRITE),
            Just(Operation::Read),
            Just(Operation::Flush),
            Just(Operation::Discard)
        ];
        prop_oneof![
            (0..2_usize).prop_map(Step::Open),
            (0..2_usize).prop_map(Step::Close),
            (0..2_usize).prop_map(Step::Disclaim),
            (0..2_usize, operation).prop_map(|(path, operation)| Step::Do(path, operation)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever the order, a path changes the disk only as long as no other has.
        #[test]
        fn there_is_one_owner_at_a_time(steps in proptest::collection::vec(step(), 1..60)) {
            let (_, paths) = paths();
            let mut queues = [const { Vec::new() }; 2];
            let mut owner = None;
            for step in steps {
                match step {
                    Step::Open(path) if queues[path].len() < 3 => queues[path].push(queue(&*paths[path])),
                    Step::Open(_) => {}
                    Step::Close(path) => {
                        queues[path].pop();
                        if queues[path].is_empty() && owner == Some(path) {
                            owner = None;
                        }
                    }
                    Step::Disclaim(path) => {
                        if let [queue] = &mut queues[path][..] {
                            queue.1.disclaim();
                            owner = owner.filter(|owner| *owner != path);
                        }
                    }
                    Step::Do(path, operation) => {
                        let Some(queue) = queues[path].last_mut() else { continue };
                        let changes = !matches!(operation, Operation::Read | Operation::Flush);
                        let may = !changes || owner.is_none_or(|owner| owner == path);
                        if may && changes {
                            owner = Some(path);
                        }
                        prop_assert_eq!(run(queue, operation, 1).is_ok(), may);
                    }
                }
            }
        }
    }
}
