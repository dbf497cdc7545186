//! Serves the intercepts of a hosted partition's processor, one after the other.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::net::{RecvFlags, recv};
use zerocopy::IntoBytes;

use super::confine::{Confinement, Step};
use super::synic::HostedSynic;
use super::wire::{Garbage, Intercept, LONGEST, Order, STRING};
use crate::hypercall::Hypercall;
use crate::partition::ExitKind;
use crate::reference_time::ReferenceClock;
use crate::registers::{Action, GeneralProtection, PartitionRegisters, VpRegisters, msr};
use crate::synic::{HvStatus, MessageSink};
use crate::{Bus, ExitCounters, Gpa, GuestMemory, PAGE_SIZE, StopHandle, StopReason, VpIndex};

/// The root's end of the processor.
pub(super) struct HostedVp {
    socket: Arc<OwnedFd>,
    memory: GuestMemory,
    synic: Arc<HostedSynic>,
    counters: Arc<ExitCounters>,
    confinement: Arc<OnceLock<Confinement>>,
    stop: StopHandle,
    shared: PartitionRegisters,
    registers: VpRegisters,
    clock: ReferenceClock,
    crashed: bool,
}

/// Why there is nothing more to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The run is over.
    Stopped,
    /// The process has closed its socket, most likely by its end.
    Gone,
}

/// Why the run cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum VpError {
    /// The process does not speak the language of processors.
    #[error("the guest's process broke the protocol: {0}")]
    Garbage(#[from] Garbage),
    /// It does not take its answers.
    #[error("the guest's process does not take its answers: {0}")]
    Reply(io::Error),
    /// It said that it could not start.
    #[error("the guest's process could not {what}: {error}")]
    NotStarted { what: &'static str, error: io::Error },
    /// The socket is broken.
    #[error("cannot hear the guest's process: {0}")]
    Receive(io::Error),
}

impl HostedVp {
    pub(super) fn new(
        socket: Arc<OwnedFd>,
        memory: &GuestMemory,
        synic: &Arc<HostedSynic>,
        counters: &Arc<ExitCounters>,
        confinement: &Arc<OnceLock<Confinement>>,
        stop: &StopHandle,
    ) -> Self {
        Self {
            socket,
            memory: memory.clone(),
            synic: Arc::clone(synic),
            counters: Arc::clone(counters),
            confinement: Arc::clone(confinement),
            stop: stop.clone(),
            shared: PartitionRegisters::default(),
            registers: VpRegisters::new(VpIndex(0)),
            // A process has no time stamp counter that we would vouch for.
            clock: ReferenceClock::start(None),
            crashed: false,
        }
    }

    /// Serves until the run is over or the process is gone.
    pub(super) fn serve(
        &mut self,
        ports: &Bus,
        mmio: &Bus,
        sink: &dyn MessageSink,
    ) -> Result<Ended, VpError> {
        // One byte more than the longest, so that a longer one shows.
        let mut packet = [0; LONGEST + 1];
        loop {
            let len = match recv(&*self.socket, &mut packet, RecvFlags::empty()) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => return Ok(Ended::Gone),
                Ok((len, _)) => len,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(VpError::Receive(error.into())),
            };
            let intercept = Intercept::parse(packet.get(..len).unwrap_or_default())?;
            let reply = self.answer(&intercept, ports, mmio, sink)?;
            if self.stop.is_stopping() {
                return Ok(Ended::Stopped);
            }
            let reply: Order<BorrowedFd<'_>> = match reply {
                Ok(value) => Order::Done(value),
                Err(GeneralProtection) => Order::Fault,
            };
            match reply.send(&*self.socket) {
                Ok(()) => {}
                // The next look at the socket says that it is gone.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) => return Err(VpError::Reply(error)),
            }
        }
    }

    fn answer(
        &mut self,
        intercept: &Intercept<'_>,
        ports: &Bus,
        mmio: &Bus,
        sink: &dyn MessageSink,
    ) -> Result<Result<u64, GeneralProtection>, VpError> {
        let (kind, reply) = match *intercept {
            Intercept::Started(by) => {
                let _ = self.confinement.set(Confinement::from_bits(by));
                (ExitKind::Other, Ok(0))
            }
            Intercept::NotStarted { step, errno } => {
                let error = io::Error::from_raw_os_error(errno);
                return Err(VpError::NotStarted { what: Step::describe(step), error });
            }
            Intercept::PortRead { port, width } => {
                let mut value = [0; 8];
                if let Some(data) = value.get_mut(..width) {
                    ports.read(port.into(), data);
                }
                (ExitKind::PortRead, Ok(u64::from_le_bytes(value)))
            }
            Intercept::PortWrite { port, width, data } => {
                if data.len() == width {
                    ports.write(port.into(), data);
                } else {
                    ports.write_string(port.into(), width, data);
                }
                (ExitKind::PortWrite, Ok(0))
            }
            Intercept::PortReadString { port, width, gpa, len } => {
                (ExitKind::PortRead, self.read_string(ports, port, width, (gpa, len)))
            }
            Intercept::MmioRead { gpa, width } => {
                let mut value = [0; 8];
                if let Some(data) = value.get_mut(..width) {
                    mmio.read(gpa, data);
                }
                (ExitKind::MmioRead, Ok(u64::from_le_bytes(value)))
            }
            Intercept::MmioWrite { gpa, width, value } => {
                let value = value.to_le_bytes();
                mmio.write(gpa, value.get(..width).unwrap_or(&value));
                (ExitKind::MmioWrite, Ok(0))
            }
            Intercept::RegisterRead { register } => (ExitKind::Register, self.read(register)),
            Intercept::RegisterWrite { register, value } => {
                (ExitKind::Register, self.write(register, value).map(|()| 0))
            }
            Intercept::Hypercall { control, input } => {
                let (kind, status) = self.hypercall(&Hypercall { control, input }, sink);
                (kind, Ok(status.0.into()))
            }
        };
        self.counters.count(kind);
        Ok(reply)
    }

    /// As on a processor, memory that is not there is a fault before anything was read.
    fn read_string(
        &self,
        ports: &Bus,
        port: u16,
        width: usize,
        (gpa, len): (u64, usize),
    ) -> Result<u64, GeneralProtection> {
        let memory = self.memory.slice(Gpa(gpa), len).ok_or(GeneralProtection)?;
        let mut bytes = [0; STRING];
        let bytes = bytes.get_mut(..len).ok_or(GeneralProtection)?;
        ports.read_string(port.into(), width, bytes);
        memory.copy_from(bytes);
        Ok(0)
    }

    fn read(&self, register: u32) -> Result<u64, GeneralProtection> {
        match register {
            msr::TIME_REF_COUNT => Ok(self.clock.now()),
            _ => self.registers.read(&self.shared, register),
        }
    }

    fn write(&mut self, register: u32, value: u64) -> Result<(), GeneralProtection> {
        match self.registers.write(&mut self.shared, register, value, &self.memory)? {
            // Hypercalls are intercepts by themselves here, and need no page to make them.
            Action::None | Action::HypercallPage(_) => {}
            Action::ReferenceTscPage(at) => {
                let content = self.clock.page();
                let mut bytes = [0; PAGE_SIZE];
                bytes[..size_of_val(&content)].copy_from_slice(content.as_bytes());
                self.fill(at, &bytes);
            }
            Action::Clear(at) => self.fill(at, &[0; PAGE_SIZE]),
            Action::Pages => self.synic.set_pages(self.registers.pages()),
            Action::Sint(sint) => self.synic.set_sint(sint, self.registers.sint(sint)),
            Action::EndOfMessage => self.synic.end_of_message(),
            Action::Crash => self.report_crash(),
            Action::Reset => self.stop.stop(StopReason::Reset),
        }
        Ok(())
    }

    /// The registers have found RAM there.
    fn fill(&self, at: Gpa, bytes: &[u8; PAGE_SIZE]) {
        if let Some(page) = self.memory.slice(at, PAGE_SIZE) {
            page.copy_from(bytes);
        }
    }

    /// One line; a guest can do this as often as it likes.
    fn report_crash(&mut self) {
        if !std::mem::replace(&mut self.crashed, true) {
            let values = self.shared.crash().map(|value| format!("{value:#x}"));
            tracing::warn!("the guest has crashed: {}", values.join(" "));
        }
    }

    fn hypercall(&self, hypercall: &Hypercall, sink: &dyn MessageSink) -> (ExitKind, HvStatus) {
        match hypercall.signaled(&self.memory) {
            None => hypercall.serve(&self.memory, sink),
            Some(Err(status)) => (ExitKind::SignalEvent, status),
            Some(Ok((connection, 0))) => (ExitKind::SignalEvent, self.synic.signal(connection)),
            // There are no flag numbers here.
            Some(Ok(_)) => (ExitKind::SignalEvent, HvStatus::INVALID_CONNECTION_ID),
        }
    }
}
