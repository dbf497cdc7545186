//! A disk that fails, dawdles and falls short on demand: for tests of whatever sits on a disk.
//!
//! It stands in front of another disk and lets through what no [`Rule`] is about. Delays go through
//! the worker's ring, so that requests end out of order and outside [`Queue::submit`], as those of
//! real disks do.
//!
//! ```
//! use std::sync::Arc;
//! use backends::block::BlockErrorKind;
//! use backends::ram::RamDisk;
//! use backends::testing::{FaultyDisk, Gate, Rule};
//!
//! let gate = Gate::new()?;
//! let disk = FaultyDisk::new(Arc::new(RamDisk::new(1 << 20)?))
//!     .rule(Rule::fail(0..4096, BlockErrorKind::Io))
//!     .rule(Rule::hold(8192..12288, &gate));
//! // Requests to the third page wait; now the first of them may go on.
//! gate.open(1)?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! `unsafe` passes on the promises of [`Queue::submit`] and [`Uring::push`].
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use io_uring::{opcode, types};
use vmm_sys_util::eventfd::EventFd;

use crate::block::{
    BlockError, BlockErrorKind, Buffer, Completion, Completions, Disk, Geometry, Operation, Queue,
    Request,
};
use crate::uring::{Cqe, Remains, Tag, Token, Uring};

/// What happens to requests that touch a range of the disk. A flush touches every range.
#[derive(Clone, Debug)]
pub struct Rule {
    range: Range<u64>,
    only: Option<Operation>,
    effect: Effect,
}

#[derive(Clone, Debug)]
enum Effect {
    Fail(BlockErrorKind),
    Short(u64),
    Delay(Duration),
    Hold(Gate),
}

impl Rule {
    const fn new(range: Range<u64>, effect: Effect) -> Self {
        Self { range, only: None, effect }
    }

    /// They fail.
    pub const fn fail(range: Range<u64>, kind: BlockErrorKind) -> Self {
        Self::new(range, Effect::Fail(kind))
    }

    /// They do no more than `bytes` and call that a success.
    pub const fn short(range: Range<u64>, bytes: u64) -> Self {
        Self::new(range, Effect::Short(bytes))
    }

    /// They start that much later.
    pub const fn delay(range: Range<u64>, time: Duration) -> Self {
        Self::new(range, Effect::Delay(time))
    }

    /// They start when the gate lets them through.
    pub fn hold(range: Range<u64>, gate: &Gate) -> Self {
        Self::new(range, Effect::Hold(gate.clone()))
    }

    /// Only this operation is meant.
    #[must_use]
    pub const fn only(mut self, operation: Operation) -> Self {
        self.only = Some(operation);
        self
    }

    fn is_about(&self, request: &Request<'_>) -> bool {
        let touches = match request.operation {
            Operation::Flush => true,
            _ => {
                request.offset < self.range.end
                    && self.range.start < request.offset.saturating_add(request.len)
            }
        };
        touches && self.only.is_none_or(|operation| operation == request.operation)
    }
}

/// Holds requests back until it is told how many may go on.
#[derive(Clone, Debug)]
pub struct Gate(Arc<EventFd>);

impl Gate {
    /// A closed one.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(libc::EFD_SEMAPHORE)?)))
    }

    /// Lets that many through: those that wait, in some order, or else the next to come.
    pub fn open(&self, requests: u64) -> io::Result<()> {
        self.0.write(requests)
    }
}

/// What a request was, for a test to look at afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What was asked for.
    pub operation: Operation,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u64,
}

#[derive(Debug, Default)]
struct Script {
    rules: Vec<Rule>,
    seen: Vec<Seen>,
}

/// See the module's documentation.
#[derive(Clone)]
pub struct FaultyDisk {
    inner: Arc<dyn Disk>,
    script: Arc<Mutex<Script>>,
}

impl FaultyDisk {
    /// Stands in front of `inner`, without a rule.
    pub fn new(inner: Arc<dyn Disk>) -> Self {
        Self { inner, script: Arc::default() }
    }

    /// With one more rule. The first that is about a request decides.
    #[must_use]
    pub fn rule(self, rule: Rule) -> Self {
        lock(&self.script).rules.push(rule);
        self
    }

    /// Other rules, for requests from now on.
    pub fn set_rules(&self, rules: Vec<Rule>) {
        lock(&self.script).rules = rules;
    }

    /// Every request that has come so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.script).seen.clone()
    }
}

fn lock(script: &Mutex<Script>) -> MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk for FaultyDisk {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn queue(&self, tag: Tag, depth: u16, uring: &mut Uring) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(FaultyQueue {
            inner: self.inner.queue(tag, depth, uring)?,
            script: Arc::clone(&self.script),
            tag,
            waiting: HashMap::new(),
            next: 0,
            remains: uring.remains(),
        }))
    }
}

/// Set in the tokens of a queue's own operations; the inner queue's tokens do without.
const OWN: u64 = 1 << 47;

struct FaultyQueue {
    inner: Box<dyn Queue>,
    script: Arc<Mutex<Script>>,
    tag: Tag,
    waiting: HashMap<u64, Box<Waiting>>,
    next: u64,
    remains: Remains,
}

/// A request that starts later, and what the operation it waits for points to.
struct Waiting {
    id: u32,
    operation: Operation,
    offset: u64,
    len: u64,
    buffers: Vec<Buffer>,
    time: types::Timespec,
    count: u64,
    _gate: Option<Gate>,
}

impl FaultyQueue {
    fn wait(
        &mut self,
        request: &Request<'_>,
        effect: &Effect,
        uring: &mut Uring,
    ) -> io::Result<()> {
        let mut waiting = Box::new(Waiting {
            id: request.id,
            operation: request.operation,
            offset: request.offset,
            len: request.len,
            buffers: request.buffers.to_vec(),
            time: types::Timespec::new(),
            count: 0,
            _gate: None,
        });
        let entry = match effect {
            Effect::Hold(gate) => {
                waiting._gate = Some(gate.clone());
                let count = (&raw mut waiting.count).cast();
                opcode::Read::new(types::Fd(gate.0.as_raw_fd()), count, 8).build()
            }
            Effect::Delay(time) => {
                waiting.time = types::Timespec::from(*time);
                opcode::Timeout::new(&raw const waiting.time).build()
            }
            Effect::Fail(_) | Effect::Short(_) => opcode::Nop::new().build(),
        };
        let key = OWN | self.next;
        self.next = (self.next + 1) % OWN;
        let token = Token::new(self.tag, key);
        // SAFETY: what the entry points to is in the box, which stays in the map until the
        // operation has completed; if the queue is dropped before, the ring keeps it until then.
        unsafe { uring.push(&entry.user_data(token.user_data())) }?;
        self.waiting.insert(key, waiting);
        Ok(())
    }
}

impl Queue for FaultyQueue {
    unsafe fn submit(&mut self, request: Request<'_>, uring: &mut Uring, done: &mut Completions) {
        let effect = {
            let Request { operation, offset, len, .. } = request;
            let mut script = lock(&self.script);
            script.seen.push(Seen { operation, offset, len });
            script.rules.iter().find(|rule| rule.is_about(&request)).map(|rule| rule.effect.clone())
        };
        let fail = |kind| Completion { id: request.id, result: Err(BlockError::new(kind)) };
        match effect {
            // SAFETY: the caller's promise is passed on.
            None => unsafe { self.inner.submit(request, uring, done) },
            Some(Effect::Fail(kind)) => done.push(fail(kind)),
            Some(Effect::Short(bytes)) => {
                let request = Request { len: request.len.min(bytes), ..request };
                // SAFETY: the caller's promise is passed on, about less.
                unsafe { self.inner.submit(request, uring, done) }
            }
            Some(effect) => {
                if self.wait(&request, &effect, uring).is_err() {
                    done.push(fail(BlockErrorKind::Busy));
                }
            }
        }
    }

    fn complete(&mut self, cqe: &Cqe, uring: &mut Uring, done: &mut Completions) {
        let key = cqe.token.value();
        if key & OWN == 0 {
            return self.inner.complete(cqe, uring, done);
        }
        if let Some(waiting) = self.waiting.remove(&key) {
            let Waiting { id, operation, offset, len, ref buffers, .. } = *waiting;
            let request = Request { id, operation, offset, len, buffers };
            // SAFETY: the request has not ended, so its submitter's promise holds.
            unsafe { self.inner.submit(request, uring, done) };
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.inner.in_flight()
    }
}

impl Drop for FaultyQueue {
    fn drop(&mut self) {
        self.remains.keep(std::mem::take(&mut self.waiting));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::RamDisk;

    const READ: Operation = Operation::Read;

    struct Bench {
        uring: Uring,
        queue: Box<dyn Queue>,
        done: Completions,
        bytes: Box<[u8; 4096]>,
    }

    impl Bench {
        fn new(disk: &FaultyDisk) -> Self {
            let mut uring = Uring::new(8).unwrap();
            let queue = disk.queue(Tag(1), 8, &mut uring).unwrap();
            Self { uring, queue, done: Completions::default(), bytes: Box::new([0; 4096]) }
        }

        fn submit(&mut self, id: u32, operation: Operation, offset: u64) {
            let buffers = [Buffer::from(self.bytes.as_mut_slice())];
            let len = if operation == Operation::Flush { 0 } else { 4096 };
            let request = Request { id, operation, offset, len, buffers: &buffers };
            // SAFETY: the bytes are dropped after the ring.
            unsafe { self.queue.submit(request, &mut self.uring, &mut self.done) };
        }

        fn next(&mut self) -> Completion {
            loop {
                if let Some(completion) = self.done.pop() {
                    return completion;
                }
                self.uring.submit_and_wait(1).unwrap();
                while let Some(cqe) = self.uring.next() {
                    assert_eq!(cqe.token.tag(), Tag(1));
                    self.queue.complete(&cqe, &mut self.uring, &mut self.done);
                }
            }
        }
    }

    #[test]
    fn rules_decide() {
        let ram = RamDisk::new(1 << 20).unwrap();
        let gate = Gate::new().unwrap();
        let disk = FaultyDisk::new(Arc::new(ram))
            .rule(Rule::fail(0..512, BlockErrorKind::NoSpace).only(Operation::Write { fua: false }))
            .rule(Rule::short(4096..8192, 1024))
            .rule(Rule::delay(8192..12288, Duration::from_millis(1)))
            .rule(Rule::hold(12288..16384, &gate));
        let mut bench = Bench::new(&disk);
        let ok = |id, bytes| Completion { id, result: Ok(bytes) };

        bench.submit(1, READ, 12288);
        bench.submit(2, READ, 8192);
        bench.submit(3, READ, 4096);
        bench.submit(4, READ, 0);
        assert_eq!(bench.queue.in_flight(), 2);
        assert_eq!([bench.next(), bench.next()], [ok(3, 1024), ok(4, 4096)]);
        assert_eq!(bench.next(), ok(2, 4096));
        gate.open(1).unwrap();
        assert_eq!(bench.next(), ok(1, 4096));
        assert_eq!(bench.queue.in_flight(), 0);

        bench.submit(5, Operation::Write { fua: false }, 0);
        assert_eq!(bench.next().result.unwrap_err().kind, BlockErrorKind::NoSpace);
        disk.set_rules(vec![]);
        bench.submit(6, Operation::Write { fua: false }, 0);
        assert_eq!(bench.next(), ok(6, 4096));
        assert_eq!(disk.seen().len(), 6);
        assert_eq!(disk.seen()[0], Seen { operation: READ, offset: 12288, len: 4096 });
    }

    #[test]
    fn a_queue_may_go_with_requests_under_way() {
        let gate = Gate::new().unwrap();
        let ram = RamDisk::new(1 << 20).unwrap();
        let disk = FaultyDisk::new(Arc::new(ram)).rule(Rule::hold(0..1 << 20, &gate));
        let Bench { uring, queue, bytes, .. } = {
            let mut bench = Bench::new(&disk);
            bench.submit(1, READ, 0);
            bench.uring.submit().unwrap();
            bench
        };
        drop(queue);
        drop(uring);
        gate.open(1).unwrap();
        assert_eq!(*bytes, [0; 4096]);
    }
}
