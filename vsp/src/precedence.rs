//! Not to be interrupted by those whom one wakes.
//!
//! A frame that reaches a process of the host wakes it in the midst of the worker's system call, and
//! Linux likes to let it run at once: a worker that stays awake has had more of the processor than one
//! that sleeps for frames. The worker's batch is then taken apart, each frame costs two switches of
//! address spaces, and finds the caches cold. So a worker is less nice than others while it hands over
//! a batch, and as nice as ever before it waits for anything: whom it has woken finds all of the
//! batch.
//!
//! Not all the time: a worker that received so would interrupt the sender for each frame.

use std::marker::PhantomData;

use rustix::process::{getpriority_process, setpriority_process};

/// How much less nice: beside an ordinary thread it would have three quarters of a processor.
const LESS_NICE: i32 = 5;
/// The least nice that there is.
const LEAST: i32 = -20;

/// What precedence the calling thread may take. It needs `CAP_SYS_NICE`, or a limit that allows it
/// (`RLIMIT_NICE`); without, it takes none.
#[derive(Debug)]
pub(crate) struct Precedence {
    /// As nice as the thread is, and as it is with precedence.
    niceness: Option<(i32, i32)>,
    /// A thread's own.
    thread: PhantomData<*mut ()>,
}

/// The calling thread has precedence, until this is dropped.
#[derive(Debug)]
pub(crate) struct Ahead {
    ordinary: i32,
    thread: PhantomData<*mut ()>,
}

impl Precedence {
    /// Tries it once.
    pub(crate) fn new() -> Self {
        let ordinary = getpriority_process(None).ok();
        let niceness = ordinary.map(|nice| (nice, nice.saturating_sub(LESS_NICE).max(LEAST)));
        let mut precedence = Self { niceness, thread: PhantomData };
        if precedence.take().is_none() {
            precedence.niceness = None;
        }
        precedence
    }

    /// Takes it, if it may.
    pub(crate) fn take(&self) -> Option<Ahead> {
        let (ordinary, less) = self.niceness?;
        // To Linux, this process is the calling thread.
        setpriority_process(None, less).ok()?;
        Some(Ahead { ordinary, thread: PhantomData })
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // To become nicer is never refused.
        let _ = setpriority_process(None, self.ordinary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it may or not, a thread is as nice afterwards as it was, and others are not touched.
    #[test]
    fn it_is_given_back() {
        let before = getpriority_process(None).unwrap();
        std::thread::spawn(move || {
            let precedence = Precedence::new();
            assert_eq!(getpriority_process(None).unwrap(), before);
            let ahead = precedence.take();
            let less = if ahead.is_some() { (before - LESS_NICE).max(LEAST) } else { before };
            assert_eq!(getpriority_process(None).unwrap(), less);
            drop(ahead);
            assert_eq!(getpriority_process(None).unwrap(), before);
        })
        .join()
        .unwrap();
        assert_eq!(getpriority_process(None).unwrap(), before);
    }
}
