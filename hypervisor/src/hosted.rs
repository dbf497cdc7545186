//! Partitions without KVM: the guest is a confined process of this host.
//!
//! Its program runs at native speed, and what of it would be an intercept of a virtual machine, a
//! port access, a synthetic register or a hypercall, is a message to the root, which serves it and
//! answers. Memory is shared. A signal is a write to an eventfd that the root has handed over, an
//! interrupt one to an eventfd that the process waits for; nobody stands in between.
//!
//! There are no instructions here to intercept, so a guest has to be made for it, with
//! [`Processor`] as what it runs on. It can reach its memory and its doorbells and nothing else of
//! the host ([`Confinement`]); what it sends is checked as a guest's always is, and if it makes no
//! sense, the run is over.

mod confine;
pub mod fuzzing;
mod processor;
mod synic;
mod vp;
mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use confine::Confinement;
pub use processor::Processor;
use synic::{HostedSynic, lend};
use wire::Order;

use crate::partition::{Partition, StopOnPanic};
use crate::synic::{MessageSink, Synic};
use crate::{
    Bus, ExitCounters, GuestMemory, InterruptLine, PartitionError, StopHandle, StopReason,
};

/// The program that is the guest. It calls [`Processor::start`] before all else.
#[derive(Clone, Debug)]
pub struct GuestProgram {
    /// The file.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// A guest in a process of its own. The process ends when this is dropped, and no later than the
/// thread that made it.
pub struct HostedPartition {
    child: Arc<Mutex<Child>>,
    socket: Arc<OwnedFd>,
    synic: Arc<HostedSynic>,
    memory: GuestMemory,
    counters: Arc<ExitCounters>,
    confinement: Arc<OnceLock<Confinement>>,
    stop: StopHandle,
}

/// How long a process that has closed its socket may take to end by itself.
const GRACE: Duration = Duration::from_millis(200);

fn call(what: &'static str) -> impl FnOnce(io::Error) -> PartitionError {
    move |source| PartitionError::Call { what, source }
}

impl HostedPartition {
    /// Starts `program` in a partition with this `memory`. It waits for no [`Self::run`], but gets
    /// no answers before it.
    pub fn new(memory: GuestMemory, program: &GuestProgram) -> Result<Self, PartitionError> {
        let kind = SocketType::SEQPACKET;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .map_err(|error| call("cannot make a socket for the guest's process")(error.into()))?;
        let socket = Arc::new(socket);
        let child = spawn(program, theirs).map_err(call("cannot start the guest's process"))?;
        // From here on it is killed if something fails.
        let child = ChildGuard(Some(child));

        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let interrupt = eventfd().map_err(call("cannot make an eventfd"))?;
        let low = memory.regions().next().ok_or(PartitionError::Lacking("memory"))?;
        Order::Start { memory: low.len, file: low.fd, interrupt: lend(&interrupt) }
            .send(&*socket)
            .map_err(call("cannot hand the guest's process its memory"))?;
        let synic = HostedSynic::new(&memory, &socket, interrupt)
            .map_err(call("cannot make an eventfd"))?;
        Ok(Self {
            child: Arc::new(Mutex::new(child.keep())),
            socket,
            synic: Arc::new(synic),
            memory,
            counters: Arc::default(),
            confinement: Arc::default(),
            stop: StopHandle::default(),
        })
    }

    /// What confines the process beside the system call filter; known once the guest runs.
    pub fn confinement(&self) -> Option<Confinement> {
        self.confinement.get().copied()
    }

    /// The number of the process.
    pub fn process(&self) -> u32 {
        lock(&self.child).id()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Its standard input is the socket. What it prints goes nowhere: to a file without a name, since
/// there need not be a /dev/null. In a process group of its own, it does not get the terminal's
/// Ctrl-C, which is for the root to hear.
fn spawn(program: &GuestProgram, socket: OwnedFd) -> io::Result<Child> {
    let nowhere = rustix::fs::memfd_create(c"nowhere", MemfdFlags::CLOEXEC)?;
    Command::new(&program.path)
        .args(&program.arguments)
        .env_clear()
        .process_group(0)
        .stdin(Stdio::from(socket))
        .stdout(Stdio::from(nowhere.try_clone()?))
        .stderr(Stdio::from(nowhere))
        .spawn()
}

struct ChildGuard(Option<Child>);

impl ChildGuard {
    fn keep(mut self) -> Child {
        self.0.take().expect("only taken here")
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

/// Ends a process, if it has not ended yet, and says how it did.
fn end(child: &mut Child) -> Option<ExitStatus> {
    // It may be dead already, which is as well.
    let _ = child.kill();
    child.wait().ok()
}

/// How a process ended that has closed its socket.
fn ended(child: &mut Child) -> Option<ExitStatus> {
    const STEP: Duration = Duration::from_millis(1);
    for _ in 0..GRACE.as_millis() / STEP.as_millis() {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(STEP);
    }
    end(child)
}

/// Why a run is over whose process has ended by itself.
fn post_mortem(status: Option<ExitStatus>) -> String {
    let Some(status) = status else { return "the guest's process is lost".to_owned() };
    match (status.signal(), status.code()) {
        (Some(libc::SIGSYS), _) => {
            "the guest's process made a system call that it may not make, and was ended".to_owned()
        }
        (Some(signal), _) => format!("the guest's process was ended by signal {signal}"),
        (None, code) => format!(
            "the guest's process ended with status {} instead of switching itself off",
            code.unwrap_or(-1)
        ),
    }
}

impl Partition for HostedPartition {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn synic(&self) -> Arc<dyn Synic> {
        Arc::clone(&self.synic) as Arc<dyn Synic>
    }

    fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    fn exit_counters(&self) -> Vec<Arc<ExitCounters>> {
        vec![Arc::clone(&self.counters)]
    }

    fn interrupt_line(&self, _: u32) -> Result<Arc<dyn InterruptLine>, PartitionError> {
        Ok(Arc::new(Line(Arc::clone(&self.synic))))
    }

    fn run(
        &mut self,
        ports: &Arc<Bus>,
        mmio: &Arc<Bus>,
        sink: &Arc<dyn MessageSink>,
    ) -> StopReason {
        let mut vp = vp::HostedVp::new(
            Arc::clone(&self.socket),
            &self.memory,
            &self.synic,
            &self.counters,
            &self.confinement,
            &self.stop,
        );
        let (ports, mmio, sink) = (Arc::clone(ports), Arc::clone(mmio), Arc::clone(sink));
        let (stop, child) = (self.stop.clone(), Arc::clone(&self.child));
        let builder = std::thread::Builder::new().name("vp0".to_owned());
        let spawned = builder.spawn(move || {
            // A device's panic too is the end.
            let _guard = StopOnPanic(stop.clone());
            match vp.serve(&ports, &mmio, &*sink) {
                Ok(vp::Ended::Stopped) => {}
                Ok(vp::Ended::Gone) if stop.is_stopping() => {}
                Ok(vp::Ended::Gone) => {
                    let status = ended(&mut lock(&child));
                    stop.stop(StopReason::Error(post_mortem(status)));
                }
                Err(error) => stop.stop(StopReason::Error(error.to_string())),
            }
        });
        let thread = match spawned {
            Ok(thread) => Some(thread),
            Err(error) => {
                self.stop.stop(StopReason::Error(format!("cannot start a thread: {error}")));
                None
            }
        };
        let reason = self.stop.wait();
        // With the process ends the thread's wait for its messages.
        end(&mut lock(&self.child));
        if let Some(thread) = thread {
            // If it panicked, that is the reason already, or came after it.
            let _ = thread.join();
        }
        reason
    }
}

impl Drop for HostedPartition {
    fn drop(&mut self) {
        end(&mut lock(&self.child));
    }
}

/// There are no interrupt controllers here: each line's rising edge is the process's one interrupt,
/// and who wants to know of which device it is has to ask.
struct Line(Arc<HostedSynic>);

impl InterruptLine for Line {
    fn pulse(&self) {
        self.0.interrupt();
    }

    fn set_level(&self, high: bool) {
        if high {
            self.0.interrupt();
        }
    }
}
