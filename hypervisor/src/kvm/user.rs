//! The Hyper-V interface from user space, on any KVM that can hand us the synthetic registers.
//!
//! - Accesses to the registers exit to us by an MSR filter, before KVM's own code sees them, and
//!   [`crate::registers`] answers them.
//! - The hypercall page is ours ([`crate::hypercall::page`]): a signal on a bound connection is a
//!   port write that an ioeventfd takes; everything else is a port read that exits.
//! - A SINT is a message to the processor's local APIC, raised by an irqfd ([`synic`]).
//! - A SINT whose interrupts end by themselves is served at a price ([`auto_eoi`]).
//! - Reference time is the host's time stamp counter ([`crate::reference_time`]).
//! - Synthetic timers are a thread's sleep ([`timers`]).

pub(super) mod auto_eoi;
pub(super) mod synic;
mod timers;

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, kvm_enable_cap};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use zerocopy::IntoBytes;

use self::auto_eoi::VpAutoEoi;
use self::synic::UserSynic;
use self::timers::Timers;
use super::call;
use crate::hypercall::{Hypercall, page};
use crate::partition::ExitKind;
use crate::reference_time::ReferenceClock;
use crate::registers::{Action, GeneralProtection, Memory, PartitionRegisters, VpRegisters, msr};
use crate::synic::{HvStatus, MessageSink, Sint};
use crate::{Gpa, GuestMemory, PAGE_SIZE, PartitionError, StopHandle, StopReason, VpIndex};

/// Nanoseconds of KVM's local APIC timer in a second: it counts these.
const APIC_FREQUENCY: u64 = 1_000_000_000;

/// Makes KVM hand us every access to a synthetic register.
pub(super) fn filter_registers(vm: &VmFd) -> Result<(), PartitionError> {
    let capability = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [KVM_MSR_EXIT_REASON_FILTER.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&capability).map_err(call("cannot ask KVM for registers' exits"))?;
    // A zero bit denies, which now means that it exits.
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: msr::FIRST,
        msr_count: msr::COUNT,
        bitmap: &[0; msr::COUNT as usize / 8],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
        .map_err(call("cannot set KVM's filter of registers"))
}

/// What the processors of a partition share.
pub(super) struct UserHyperV {
    memory: GuestMemory,
    synic: Arc<UserSynic>,
    registers: Mutex<PartitionRegisters>,
    clock: ReferenceClock,
    /// Hertz; 0 where KVM does not say.
    tsc_frequency: u64,
    /// Not there if they are not offered.
    timers: Option<Timers>,
    stop: StopHandle,
}

impl UserHyperV {
    /// `khz` is the processors' time stamp counter's, and `trusted` whether it can be a clock.
    pub(super) fn new(
        memory: &GuestMemory,
        synic: &Arc<UserSynic>,
        khz: Option<u32>,
        trusted: bool,
        timers: bool,
        stop: StopHandle,
    ) -> Arc<Self> {
        let clock = ReferenceClock::start(khz.filter(|_| trusted).map(u64::from));
        tracing::debug!(?clock, ?khz, "reference time");
        Arc::new(Self {
            memory: memory.clone(),
            synic: Arc::clone(synic),
            registers: Mutex::default(),
            clock,
            tsc_frequency: khz.map_or(0, |khz| u64::from(khz) * 1000),
            timers: timers.then(|| Timers::new(clock, synic)),
            stop,
        })
    }
}

impl Memory for GuestMemory {
    fn is_ram(&self, page: Gpa) -> bool {
        self.slice(page, PAGE_SIZE).is_some()
    }
}

/// One processor's registers and hypercalls. On its own thread.
pub(super) struct UserVp {
    index: VpIndex,
    shared: Arc<UserHyperV>,
    registers: VpRegisters,
    auto_eoi: VpAutoEoi,
}

impl UserVp {
    pub(super) fn new(index: VpIndex, shared: &Arc<UserHyperV>) -> Self {
        let registers = VpRegisters::new(index);
        let auto_eoi = VpAutoEoi::new(index, shared.synic.auto_eoi());
        Self { index, shared: Arc::clone(shared), registers, auto_eoi }
    }

    /// Its interrupts that end by themselves.
    pub(super) fn auto_eoi(&mut self) -> &mut VpAutoEoi {
        &mut self.auto_eoi
    }

    /// `rdmsr`
    pub(super) fn read(&self, register: u32) -> Result<u64, GeneralProtection> {
        let shared = &*self.shared;
        Ok(match register {
            msr::TIME_REF_COUNT => shared.clock.now(),
            msr::TSC_FREQUENCY => shared.tsc_frequency,
            msr::APIC_FREQUENCY => APIC_FREQUENCY,
            msr::STIMER0_CONFIG..=msr::STIMER3_COUNT => {
                let timers = shared.timers.as_ref().ok_or(GeneralProtection)?;
                timers.read(self.index, register)
            }
            _ => self.registers.read(&self.partition(), register)?,
        })
    }

    /// `wrmsr`. Returns what ends the run, if it does.
    pub(super) fn write(
        &mut self,
        register: u32,
        value: u64,
    ) -> Result<Option<StopReason>, GeneralProtection> {
        if let msr::STIMER0_CONFIG..=msr::STIMER3_COUNT = register {
            let timers = self.shared.timers.as_ref().ok_or(GeneralProtection)?;
            timers.write(self.index, register, value)?;
            return Ok(None);
        }
        let shared = Arc::clone(&self.shared);
        let mut partition = shared.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let action = self.registers.write(&mut partition, register, value, &shared.memory)?;
        match action {
            Action::None => {}
            Action::HypercallPage(at) => {
                let mut bytes = [page::PADDING; PAGE_SIZE];
                bytes[..page::CODE.len()].copy_from_slice(&page::CODE);
                self.fill(at, &bytes);
            }
            Action::ReferenceTscPage(at) => {
                let content = shared.clock.page();
                let mut bytes = [0; PAGE_SIZE];
                bytes[..size_of_val(&content)].copy_from_slice(content.as_bytes());
                self.fill(at, &bytes);
            }
            Action::Clear(at) => self.fill(at, &[0; PAGE_SIZE]),
            Action::Pages => shared.synic.set_pages(self.index, self.registers.pages()),
            Action::Sint(sint) => self.set_sint(sint),
            Action::EndOfMessage => {
                shared.synic.end_of_message(self.index);
                if let Some(timers) = &shared.timers {
                    timers.end_of_message(self.index);
                }
            }
            Action::Crash => self.report_crash(&partition),
            Action::Reset => return Ok(Some(StopReason::Reset)),
        }
        Ok(None)
    }

    fn partition(&self) -> std::sync::MutexGuard<'_, PartitionRegisters> {
        self.shared.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registers have found RAM there.
    fn fill(&self, at: Gpa, bytes: &[u8; PAGE_SIZE]) {
        if let Some(page) = self.shared.memory.slice(at, PAGE_SIZE) {
            page.copy_from(bytes);
        }
    }

    fn set_sint(&self, sint: Sint) {
        let state = self.registers.sint(sint);
        if let Err(error) = self.shared.synic.set_sint(self.index, sint, state) {
            self.shared.stop.stop(StopReason::Error(error.to_string()));
        }
    }

    /// One line for a partition; a guest can do this as often as it likes.
    fn report_crash(&self, partition: &PartitionRegisters) {
        if self.shared.synic.first_crash() {
            let values = partition.crash().map(|value| format!("{value:#x}"));
            tracing::warn!("the guest has crashed on {}: {}", self.index, values.join(" "));
        }
    }

    /// A hypercall by the page's slow way.
    pub(super) fn hypercall(
        &self,
        hypercall: &Hypercall,
        sink: &dyn MessageSink,
    ) -> (ExitKind, HvStatus) {
        match hypercall.signaled(&self.shared.memory) {
            None => hypercall.serve(&self.shared.memory, sink),
            Some(Err(status)) => (ExitKind::SignalEvent, status),
            Some(Ok((connection, 0))) => {
                (ExitKind::SignalEvent, self.shared.synic.signal(connection))
            }
            // There are no flag numbers here.
            Some(Ok(_)) => (ExitKind::SignalEvent, HvStatus::INVALID_CONNECTION_ID),
        }
    }
}
