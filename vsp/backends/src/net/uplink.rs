//! An uplink: what joins a switch of this process to the world outside, as a Hyper-V host's external
//! switch is joined to a network card.
//!
//! It is a port of the switch with a [`patch`] cable in it, which leads to a tap of the host, or to
//! other machines by a Unix socket. Frames on the socket are those of [`Stream`], so that QEMU
//! (`-netdev stream`) may be at its other end as well.
//!
//! Of the machines that name the same socket, the first listens, and has a port for each that
//! connects: a star, whose middle forwards for all. When the middle goes, the others meet again, and
//! the first of them is the next middle ([`meeting`]).

mod meeting;

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::meeting::{First, Meeting, meet};
use super::Network;
use super::capture::Capture;
use super::patch::{self, Stop};
use super::stream::Stream;
use super::switch::{NoPort, Port, PortOptions, Switch};

pub use self::meeting::MeetError;

/// How long to wait before looking for the others again.
const PAUSE: Duration = Duration::from_millis(500);

/// Why there is no uplink.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says it")]
pub enum UplinkError {
    #[error(transparent)]
    Meet(#[from] MeetError),
    #[error(transparent)]
    NoPort(#[from] NoPort),
    #[error("cannot start an uplink")]
    Start(#[from] io::Error),
}

/// See the module's documentation. Dropping it unplugs it.
pub struct Uplink {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Uplink {
    /// Joins a switch and a network whose link may come back when it was down, such as a tap.
    pub fn to_network(
        switch: &Switch,
        network: Arc<dyn Network>,
        capture: Option<&Capture>,
    ) -> Result<Self, UplinkError> {
        let port = switch.port(PortOptions::default())?;
        let network = observed(network, capture);
        Self::start(move |stop| {
            let name = network.link().name;
            if let Err(error) = patch::run(&port, &*network, stop, true, || ()) {
                tracing::warn!(name, %error, "an uplink was lost");
            }
        })
    }

    /// Joins a switch and those of other machines that name the same socket.
    pub fn to_socket(
        switch: &Switch,
        path: &Path,
        capture: Option<&Capture>,
    ) -> Result<Self, UplinkError> {
        let mut meeting = Some(meet(path)?);
        let (switch, path, capture) = (switch.clone(), path.to_owned(), capture.cloned());
        let place = Place { switch, path, capture };
        Self::start(move |stop| {
            let mut told = false;
            while !stop.is_requested() {
                match meeting.take().map_or_else(|| meet(&place.path), Ok) {
                    Ok(Meeting::First(first)) => return place.listen(first, stop),
                    Ok(Meeting::Another(socket)) => {
                        told = false;
                        place.serve(socket, stop);
                    }
                    Err(error) if !told => {
                        told = true;
                        limited::warn!("{}", Chain(&error));
                    }
                    Err(_) => {}
                }
                wait(stop, None, Some(PAUSE));
            }
        })
    }

    fn start(run: impl FnOnce(&Arc<Stop>) + Send + 'static) -> Result<Self, UplinkError> {
        let stop = Arc::new(Stop::new()?);
        let its = Arc::clone(&stop);
        let thread = thread::Builder::new().name("uplink".into()).spawn(move || run(&its))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.stop.request();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::warn!("an uplink broke down");
        }
    }
}

impl fmt::Debug for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uplink").field("thread", &self.thread).finish_non_exhaustive()
    }
}

/// Where machines meet, and the switch that they are to be joined to.
#[derive(Clone)]
struct Place {
    switch: Switch,
    path: PathBuf,
    /// Of all that are met there.
    capture: Option<Capture>,
}

impl Place {
    /// Gives each machine that connects a port, until it is to stop.
    fn listen(&self, first: First, stop: &Arc<Stop>) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while !wait(stop, Some(&first.listener), None) {
            threads.retain(|thread| !thread.is_finished());
            let socket = match first.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => {
                    limited::warn!(path = %self.path.display(), %error, "nobody can connect");
                    wait(stop, None, Some(PAUSE));
                    continue;
                }
            };
            let (place, its) = (self.clone(), Arc::clone(stop));
            let serve = move || place.serve(socket, &its);
            match thread::Builder::new().name("uplink".into()).spawn(serve) {
                Ok(thread) => threads.push(thread),
                Err(error) => limited::warn!(%error, "a machine could not be joined"),
            }
        }
        drop(first);
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Joins the machine at the other end, until it goes or this is to stop.
    fn serve(&self, socket: UnixStream, stop: &Arc<Stop>) {
        let joined = self.port().and_then(|port| {
            let name = format!("socket:{}", self.path.display());
            let stream = Arc::new(Stream::new(socket, name, port.link().mtu)?);
            let network = observed(Arc::clone(&stream) as _, self.capture.as_ref());
            patch::run(&port, &*network, stop, false, || stream.hang_up())
        });
        if let Err(error) = joined {
            limited::warn!(path = %self.path.display(), %error, "a machine could not be joined");
        }
    }

    fn port(&self) -> io::Result<Port> {
        self.switch.port(PortOptions::default()).map_err(io::Error::other)
    }
}

/// The network, behind what writes it down, if anything does.
fn observed(network: Arc<dyn Network>, capture: Option<&Capture>) -> Arc<dyn Network> {
    match capture {
        Some(capture) => Arc::new(capture.observe(network)),
        None => network,
    }
}

/// Waits for `listener` to have somebody, for the time to pass, or for `stop`. Returns whether it was
/// that.
fn wait(stop: &Stop, listener: Option<&UnixListener>, time: Option<Duration>) -> bool {
    let time = time.and_then(|time| Timespec::try_from(time).ok());
    let stopped = PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN);
    // Whatever wakes it, the stop is asked for by its own word.
    let _ = match listener {
        Some(listener) => poll(&mut [stopped, PollFd::new(listener, PollFlags::IN)], time.as_ref()),
        None => poll(&mut [stopped], time.as_ref()),
    };
    stop.is_requested()
}

/// An error with its sources, in one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
