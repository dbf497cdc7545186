//! A channel's worker in the thread that made it: for benches, and for a program with a thread to
//! spin.

use std::io;
use std::sync::Arc;

use vmbus_server::Channel;

use super::Nic;
use super::engine::Engine;
use super::worker::Worker;

/// Works when it is told to, and never sleeps. Dropping it closes the channel.
pub struct InlineWorker(Worker);

impl Nic {
    /// Serves `channel` in the calling thread, whenever [`InlineWorker::turn`] is called there. The
    /// guest's signals are neither wanted nor heard.
    pub fn open_inline(&mut self, channel: Channel) -> io::Result<InlineWorker> {
        let primary = (channel.subchannel == 0).then(|| self.begin()).transpose()?;
        let session = self.session.clone();
        let session = session.ok_or_else(|| io::Error::other("a sub-channel comes first"))?;
        let network = Arc::clone(&self.network);
        let engine = Engine::new(&channel, network, session, self.counters(), primary);
        let mut worker = Worker::new(channel, engine, false)?;
        worker.stay_awake();
        Ok(InlineWorker(worker))
    }
}

impl InlineWorker {
    /// Takes what packets there are, and hands on what has been done and has come. Returns whether
    /// there was anything; an error means that the guest has broken its ring, or that the host's
    /// io_uring or network failed, and that the worker is to be dropped.
    pub fn turn(&mut self) -> io::Result<bool> {
        self.0.turn().map_err(io::Error::other)
    }
}
