//! A virtual processor: its state at power-on, and the loop that runs it and answers its exits.
//!
//! Before each entry the loop looks whether the run is to end, and the first processor whether a PIC
//! that is not KVM's has an interrupt; [`kick`] gets it there.

#![allow(unsafe_code)] // kvm_run is a union, and KVM has ioctls that nobody has wrapped.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_HYPERV_SYNIC2,
    KVM_CAP_TSC_DEADLINE_TIMER, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC,
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs,
    kvm_device_attr, kvm_enable_cap, kvm_hyperv_exit, kvm_interrupt, kvm_mp_state, kvm_msr_entry,
    kvm_run, kvm_run__bindgen_ty_1, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::cpuid::{self, HostFeatures};
use super::deferred::DeferredWrites;
use super::split::SplitIrqchip;
use super::stats::KernelCounters;
use super::string_out::StringOut;
use super::synic::KvmSynic;
use super::user::UserVp;
use super::user::auto_eoi::{AutoEoi, LocalApic, Vectors};
use super::{HyperV, call, kick};
use crate::hypercall::Hypercall;
use crate::hypercall::page::{DOORBELL_PORT, HYPERCALL_PORT};
use crate::interrupts::InterruptController;
use crate::partition::ExitKind;
use crate::registers::GeneralProtection;
use crate::synic::pages::PageRegisters;
use crate::synic::{HvStatus, MessageSink};
use crate::{
    BootState, Bus, ExitCounters, GuestMemory, PartitionError, StopHandle, StopReason, VpIndex,
};

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// What surrounds a processor.
pub(super) struct Environment {
    pub(super) index: VpIndex,
    /// How many processors the partition has.
    pub(super) count: u32,
    pub(super) hyper_v: HyperV,
    pub(super) timers: bool,
    /// The kernel's, if it serves it.
    pub(super) synic: Option<Arc<KvmSynic>>,
    pub(super) memory: GuestMemory,
    pub(super) stop: StopHandle,
}

/// The devices that answer a processor's accesses.
pub(super) struct Buses {
    pub(super) ports: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    /// Writes from before an exit, to be done before it.
    pub(super) deferred: Option<Arc<DeferredWrites>>,
}

impl Buses {
    fn catch_up(&self) {
        if let Some(deferred) = &self.deferred {
            deferred.drain(|is_port, address, data| {
                let bus = if is_port { &self.ports } else { &self.mmio };
                bus.write(address, data);
            });
        }
    }
}

/// A virtual processor that does not run yet, or runs on its own thread.
pub(super) struct Vp {
    fd: VcpuFd,
    environment: Environment,
    counters: Arc<ExitCounters>,
    /// There if user space serves the Hyper-V interface.
    user: Option<UserVp>,
    /// There if KVM has only the local APICs.
    controller: Option<(Arc<SplitIrqchip>, Arc<dyn InterruptController>)>,
}

/// Ends a processor's claim to its thread, and the whole run if that unwinds: the other processors
/// would go on without it.
struct RunGuard {
    stop: StopHandle,
    /// There if this processor has the PICs' interrupts.
    pics: Option<Arc<SplitIrqchip>>,
    /// There if user space serves its SINTs.
    auto_eoi: Option<(Arc<AutoEoi>, VpIndex)>,
}

impl RunGuard {
    /// Who has a reason to get the processor out of the guest.
    fn kicks(&self) -> impl Iterator<Item = &kick::Kick> {
        let sints = self.auto_eoi.as_ref().and_then(|(auto_eoi, vp)| auto_eoi.kick(*vp));
        self.pics.iter().map(|pics| pics.first()).chain(sints)
    }
}

impl Drop for RunGuard {
    fn drop(&mut self) {
        self.kicks().for_each(kick::Kick::end);
        kick::set_immediate_exit(std::ptr::null_mut());
        if std::thread::panicking() {
            self.stop.stop(StopReason::Error("a virtual processor's thread panicked".to_owned()));
        }
    }
}

/// What the loop does after an exit.
enum Next {
    Run,
    Stop(StopReason),
}

impl Vp {
    pub(super) fn new(
        kvm: &Kvm,
        vm: &VmFd,
        environment: Environment,
    ) -> Result<Self, PartitionError> {
        kick::install_handler()?;
        let fd = vm
            .create_vcpu(environment.index.0.into())
            .map_err(call("cannot create a virtual processor"))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("cannot ask KVM for its CPUID"))?;
        let host = HostFeatures {
            tsc_deadline: kvm.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0,
            virtual_apic: host_virtualizes_apic(),
            timers: environment.timers,
        };
        let Environment { index, count, hyper_v, .. } = environment;
        let leaves = cpuid::build(&supported, index, count, host, hyper_v);
        let table = CpuId::from_entries(&leaves).map_err(|_| PartitionError::Call {
            what: "cannot describe a virtual processor",
            source: io::Error::from_raw_os_error(libc::E2BIG),
        })?;
        fd.set_cpuid2(&table).map_err(call("cannot set a virtual processor's CPUID"))?;
        if hyper_v == HyperV::Kernel {
            let capability = kvm_enable_cap { cap: KVM_CAP_HYPERV_SYNIC2, ..Default::default() };
            fd.enable_cap(&capability).map_err(call("cannot enable KVM's SynIC"))?;
        }
        // What is not offered shall not work either: of Hyper-V's interface, since Linux 5.14; of
        // KVM's own, of which no partition is offered anything, since 5.10.
        let enforced = [
            (KVM_CAP_HYPERV_ENFORCE_CPUID, hyper_v == HyperV::Kernel),
            (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, true),
        ];
        for (cap, wanted) in enforced {
            if wanted && kvm.check_extension_raw(cap.into()) > 0 {
                let capability = kvm_enable_cap { cap, args: [1, 0, 0, 0], ..Default::default() };
                fd.enable_cap(&capability).map_err(call("cannot limit KVM to what is offered"))?;
            }
        }
        let vp = Self { fd, environment, counters: Arc::default(), user: None, controller: None };
        vp.set_power_on_state()?;
        Ok(vp)
    }

    pub(super) fn index(&self) -> VpIndex {
        self.environment.index
    }

    pub(super) fn counters(&self) -> Arc<ExitCounters> {
        Arc::clone(&self.counters)
    }

    pub(super) fn deferred_writes(&self) -> io::Result<DeferredWrites> {
        DeferredWrites::new(&self.fd)
    }

    pub(super) fn kernel_counters(&self) -> Option<KernelCounters> {
        KernelCounters::open(&self.fd)
    }

    /// From now on `user` serves the guest's Hyper-V interface.
    pub(super) fn serve_by(&mut self, user: UserVp) {
        self.user = Some(user);
    }

    /// From now on `controller` has the interrupts that are not a local APIC's.
    pub(super) fn attach_controller(
        &mut self,
        split: &Arc<SplitIrqchip>,
        controller: &Arc<dyn InterruptController>,
    ) {
        self.controller = Some((Arc::clone(split), Arc::clone(controller)));
    }

    /// The speed of its time stamp counter, if KVM knows it.
    pub(super) fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// Makes its time stamp counter the host's. False where KVM cannot (before Linux 5.16).
    pub(super) fn share_tsc(&self) -> bool {
        let offset = 0_u64;
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: KVM_VCPU_TSC_OFFSET.into(),
            addr: &raw const offset as u64,
            ..Default::default()
        };
        // SAFETY: the ioctl reads the structure, and the number that this points to.
        unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attribute) == 0 }
    }

    /// What a PC's firmware leaves behind, beyond KVM's reset state: interrupts of the PICs come
    /// in by LINT0, NMIs by LINT1; memory is write-back.
    fn set_power_on_state(&self) -> Result<(), PartitionError> {
        // The entries of the local vector table, and their delivery modes (SDM volume 3, 11.5.1).
        const LVT_LINT0: usize = 0x350;
        const LVT_LINT1: usize = 0x360;
        const MODE_NMI: u32 = 4;
        const MODE_EXTINT: u32 = 7;

        let mut lapic = self.fd.get_lapic().map_err(call("cannot read a local APIC"))?;
        for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
            for (target, byte) in lapic.regs[register..].iter_mut().zip((mode << 8).to_le_bytes()) {
                *target = byte as _;
            }
        }
        self.fd.set_lapic(&lapic).map_err(call("cannot set a local APIC"))?;

        const MTRR_DEF_TYPE: u32 = 0x2ff;
        const MISC_ENABLE: u32 = 0x1a0;
        const MISC_ENABLE_FAST_STRINGS: u64 = 1;
        let misc_enable = self.read_msrs([MISC_ENABLE])[0].unwrap_or(0);
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[
            msr(MTRR_DEF_TYPE, 1 << 11 | 6), // MTRRs on, default type write-back
            msr(MISC_ENABLE, misc_enable | MISC_ENABLE_FAST_STRINGS),
        ])
        .expect("two entries fit");
        self.fd.set_msrs(&msrs).map_err(call("cannot set a processor's registers"))?;
        Ok(())
    }

    /// The values of model-specific registers; `None` from the first that KVM does not know.
    fn read_msrs<const N: usize>(&self, indices: [u32; N]) -> [Option<u64>; N] {
        let entries = indices.map(|index| kvm_msr_entry { index, ..Default::default() });
        let mut msrs = Msrs::from_entries(&entries).expect("a few entries fit");
        let known = self.fd.get_msrs(&mut msrs).unwrap_or(0);
        let values = msrs.as_slice().iter().take(known).map(|msr| msr.data);
        let mut result = [None; N];
        for (slot, value) in result.iter_mut().zip(values) {
            *slot = Some(value);
        }
        result
    }

    pub(super) fn set_boot_state(&self, state: &BootState) -> Result<(), PartitionError> {
        const CR0_PE: u64 = 1;
        const CR0_ET: u64 = 1 << 4;
        const CR0_NE: u64 = 1 << 5;
        const CR0_PG: u64 = 1 << 31;
        const CR4_PAE: u64 = 1 << 5;
        const EFER_LME: u64 = 1 << 8;
        const EFER_LMA: u64 = 1 << 10;

        let what = "cannot set a processor's first state";
        let mut special = self.fd.get_sregs().map_err(call(what))?;
        special.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG; // caches on
        special.cr3 = state.page_table.0;
        special.cr4 |= CR4_PAE;
        special.efer |= EFER_LME | EFER_LMA;
        special.gdt.base = state.gdt.0;
        special.gdt.limit = state.gdt_limit;
        let flat = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        // Type 11 is code to execute and read, 3 is data to read and write; both accessed.
        special.cs = kvm_segment { selector: state.code_selector, type_: 11, l: 1, ..flat };
        let data = kvm_segment { selector: state.data_selector, type_: 3, db: 1, ..flat };
        (special.ds, special.es, special.ss) = (data, data, data);
        (special.fs, special.gs) = (data, data);
        self.fd.set_sregs(&special).map_err(call(what))?;

        // All but the first wait for an INIT otherwise.
        let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        self.fd.set_mp_state(running).map_err(call(what))?;

        let mut general = self.fd.get_regs().map_err(call(what))?;
        general.rip = state.entry.0;
        general.rsi = state.argument;
        general.rsp = state.stack.0;
        general.rbp = state.stack.0;
        general.rflags = 2; // the bit that is always one
        self.fd.set_regs(&general).map_err(call(what))
    }

    /// Runs until somebody stops the partition.
    pub(super) fn run(mut self, buses: &Buses, sink: &dyn MessageSink) {
        kick::set_immediate_exit(&raw mut self.fd.get_kvm_run().immediate_exit);
        let split = self.controller.as_ref().map(|(split, _)| Arc::clone(split));
        let pics = split.filter(|_| self.has_pics());
        let index = self.index();
        let auto_eoi = self.user.as_mut().map(|user| (Arc::clone(user.auto_eoi().shared()), index));
        let guard = RunGuard { stop: self.environment.stop.clone(), pics, auto_eoi };
        guard.kicks().for_each(kick::Kick::begin);
        while !self.environment.stop.is_stopping() {
            let next = match self.end_interrupts().and_then(|()| self.offer_interrupt()) {
                Ok(()) => self.step(buses, sink),
                Err(error) => self.fail(&format!("the local APIC cannot be served: {error}")),
            };
            if let Next::Stop(reason) = next {
                self.environment.stop.stop(reason);
            }
        }
    }

    /// Whether the output of PICs that are not KVM's is wired to this processor.
    fn has_pics(&self) -> bool {
        self.environment.index == VpIndex(0)
    }

    /// Ends the interrupts that the guest has taken and that end by themselves.
    fn end_interrupts(&mut self) -> io::Result<()> {
        match &mut self.user {
            Some(user) => user.auto_eoi().look(&self.fd),
            None => Ok(()),
        }
    }

    /// Takes an interrupt from the PICs if there is one and the processor can have it now. If it
    /// cannot, KVM shall say when.
    fn offer_interrupt(&mut self) -> io::Result<()> {
        let Some((split, controller)) = &self.controller else { return Ok(()) };
        if !self.has_pics() {
            return Ok(());
        }
        if split.intr() && self.fd.get_kvm_run().ready_for_interrupt_injection != 0 {
            let interrupt = kvm_interrupt { irq: controller.acknowledge().into() };
            // SAFETY: the ioctl reads the structure and no more.
            if unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) } < 0 {
                return Err(io::Error::last_os_error());
            }
            // Room for one, until the next exit says otherwise.
            self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        }
        self.fd.get_kvm_run().request_interrupt_window = split.intr().into();
        Ok(())
    }

    /// Lets the guest run until its next exit, and answers that.
    fn step(&mut self, buses: &Buses, sink: &dyn MessageSink) -> Next {
        let counters = &self.counters;
        // The page stays where it is; what an exit does not carry is read from it by pointer.
        let run: *const kvm_run = self.fd.get_kvm_run();
        let user = self.user.is_some();
        match self.fd.run() {
            Ok(VcpuExit::X86Rdmsr(exit)) => {
                counters.count(ExitKind::Register);
                match self.user.as_ref().map(|user| user.read(exit.index)) {
                    Some(Ok(value)) => *exit.data = value,
                    Some(Err(GeneralProtection)) | None => *exit.error = 1,
                }
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                counters.count(ExitKind::Register);
                match self.user.as_mut().map(|user| user.write(exit.index, exit.data)) {
                    Some(Ok(None)) => {}
                    Some(Ok(Some(reason))) => return Next::Stop(reason),
                    Some(Err(GeneralProtection)) | None => *exit.error = 1,
                }
            }
            Ok(VcpuExit::IoIn(HYPERCALL_PORT, data)) if user && data.len() == 4 => {
                let data: *mut [u8] = data;
                let status = match self.hypercall(sink) {
                    Ok(status) => status,
                    Err(error) => return self.fail(&format!("no registers: {error}")),
                };
                // SAFETY: it lies in the processor's page, which stays mapped and which the kernel
                // leaves alone until the next run; nobody else has a reference to it by now.
                let data = unsafe { &mut *data };
                data.copy_from_slice(&u32::from(status.0).to_le_bytes());
            }
            Ok(VcpuExit::IoOut(DOORBELL_PORT, data)) if user && data.len() == 4 => {
                counters.count(ExitKind::SignalEvent);
                if let Err(error) = self.refuse_signal() {
                    return self.fail(&format!("no registers: {error}"));
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                counters.count(ExitKind::PortRead);
                buses.catch_up();
                match port_width(run) {
                    width if width == data.len() => buses.ports.read(port.into(), data),
                    width => buses.ports.read_string(port.into(), width, data),
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                counters.count(ExitKind::PortWrite);
                buses.catch_up();
                let width = port_width(run);
                if width != data.len() {
                    buses.ports.write_string(port.into(), width, data);
                } else {
                    buses.ports.write(port.into(), data);
                    if width > 1
                        && buses.ports.takes_strings(port.into(), width)
                        && let Err(error) = self.finish_string(port, width, &buses.ports)
                    {
                        return self.fail(&format!("no registers: {error}"));
                    }
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                counters.count(ExitKind::MmioRead);
                buses.catch_up();
                buses.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counters.count(ExitKind::MmioWrite);
                buses.catch_up();
                buses.mmio.write(address, data);
            }
            Ok(VcpuExit::Hyperv) => self.hyper_v_exit(sink),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                counters.count(ExitKind::SystemEvent);
                return self.system_event(kind);
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                counters.count(ExitKind::EndOfInterrupt);
                if let Some((_, controller)) = &self.controller {
                    controller.end_of_interrupt(vector);
                }
            }
            Ok(VcpuExit::IrqWindowOpen) => counters.count(ExitKind::InterruptWindow),
            Ok(VcpuExit::Shutdown) => {
                counters.count(ExitKind::Other);
                return Next::Stop(StopReason::TripleFault);
            }
            Ok(VcpuExit::Intr) => counters.count(ExitKind::Kick),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return self.fail(&format!("the host cannot enter the guest, reason {reason:#x}"));
            }
            Ok(VcpuExit::InternalError) => {
                let suberror = internal_suberror(run);
                return self.fail(&format!("KVM cannot go on, internal error {suberror}"));
            }
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                return self.fail(&format!("the host has no memory at {gpa:#x}, {size} bytes"));
            }
            Ok(exit) => {
                let what = format!("KVM made an exit that nobody asked for: {exit:?}");
                return self.fail(&what);
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    counters.count(ExitKind::Kick);
                    self.fd.set_kvm_immediate_exit(0);
                    // What a signal from here on is about is looked at after it.
                    compiler_fence(Ordering::SeqCst);
                }
                // A processor that was not started yet has been, or a signal came in between.
                libc::EAGAIN => {}
                _ => return self.fail(&format!("KVM_RUN failed: {error}")),
            },
        }
        Next::Run
    }

    /// If the port write was the first unit of a string, writes the others.
    fn finish_string(&self, port: u16, width: usize, ports: &Bus) -> Result<(), kvm_ioctls::Error> {
        let Some(rest) = StringOut::rest(&self.fd, &self.environment.memory, width)? else {
            return Ok(());
        };
        ports.write_string(port.into(), width, rest.data());
        rest.commit(&self.fd)
    }

    /// The guest has read the hypercall port.
    fn hypercall(&self, sink: &dyn MessageSink) -> Result<HvStatus, kvm_ioctls::Error> {
        let registers = self.fd.get_regs()?;
        let hypercall = Hypercall { control: registers.rcx, input: registers.rdx };
        let Some(user) = &self.user else { return Ok(HvStatus::INVALID_HYPERCALL_CODE) };
        let (kind, status) = user.hypercall(&hypercall, sink);
        self.counters.count(kind);
        Ok(status)
    }

    /// The guest has rung a doorbell that nobody has bound: the status is added to EAX, which
    /// holds the connection.
    fn refuse_signal(&self) -> Result<(), kvm_ioctls::Error> {
        let mut registers = self.fd.get_regs()?;
        let status = u32::from(HvStatus::INVALID_CONNECTION_ID.0);
        registers.rax = (registers.rax as u32).wrapping_add(status).into();
        self.fd.set_regs(&registers)
    }

    fn hyper_v_exit(&mut self, sink: &dyn MessageSink) {
        let environment = &self.environment;
        let counters = &self.counters;
        // SAFETY: the exit reason was KVM_EXIT_HYPERV, so this is the member in use.
        let exit: &mut kvm_hyperv_exit =
            unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.hyperv };
        match exit.type_ {
            KVM_EXIT_HYPERV_SYNIC => {
                counters.count(ExitKind::Synic);
                // SAFETY: the type says that this is the member in use.
                let synic = unsafe { exit.u.synic };
                let pages = PageRegisters {
                    control: synic.control,
                    message_page: synic.msg_page,
                    event_page: synic.evt_page,
                };
                if let Some(synic) = &environment.synic {
                    synic.set_pages(environment.index, pages);
                }
            }
            KVM_EXIT_HYPERV_HCALL => {
                // SAFETY: the type says that this is the member in use.
                let call = unsafe { &mut exit.u.hcall };
                let hypercall = Hypercall { control: call.input, input: call.params[0] };
                let (kind, status) = hypercall.serve(&environment.memory, sink);
                counters.count(kind);
                call.result = status.0.into();
            }
            _ => counters.count(ExitKind::Other),
        }
    }

    fn system_event(&self, kind: u32) -> Next {
        match kind {
            KVM_SYSTEM_EVENT_SHUTDOWN => Next::Stop(StopReason::PowerOff),
            KVM_SYSTEM_EVENT_RESET => Next::Stop(StopReason::Reset),
            KVM_SYSTEM_EVENT_CRASH => {
                self.report_crash();
                Next::Run // the guest says what comes next: a reset, or standing still
            }
            other => self.fail(&format!("KVM reports system event {other}")),
        }
    }

    /// One line with what the guest left in its crash registers. A guest can do this as often as
    /// it likes, so only its first is worth a line.
    fn report_crash(&self) {
        // HV_X64_MSR_CRASH_P0 and the four after it (TLFS, "Partition crash enlightenment").
        const CRASH_P0: u32 = 0x4000_0100;
        if self.counters.get(ExitKind::SystemEvent) > 1 {
            return;
        }
        let values: Vec<_> = self
            .read_msrs([0, 1, 2, 3, 4].map(|n| CRASH_P0 + n))
            .into_iter()
            .flatten()
            .map(|value| format!("{value:#x}"))
            .collect();
        tracing::warn!("the guest has crashed on {}: {}", self.index(), values.join(" "));
    }

    /// Ends the run with a line that says where the processor was.
    fn fail(&self, what: &str) -> Next {
        let place = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(general), Ok(special)) => format!(
                "rip {:#x}, rsp {:#x}, rflags {:#x}, cr0 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
                general.rip,
                general.rsp,
                general.rflags,
                special.cr0,
                special.cr3,
                special.cr4,
                special.efer
            ),
            _ => "registers unknown".to_owned(),
        };
        Next::Stop(StopReason::Error(format!("{}: {what} ({place})", self.index())))
    }
}

impl LocalApic for VcpuFd {
    type Error = io::Error;

    fn vectors(&self) -> io::Result<(Vectors, Vectors)> {
        // SDM volume 3, table 11-1.
        const ISR: usize = 0x100;
        const IRR: usize = 0x200;
        let page = self.get_lapic()?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| page.regs[at + n] as u8));
        let vectors = |first| Vectors::from_apic(|offset| word(first + offset));
        Ok((vectors(IRR), vectors(ISR)))
    }

    /// By the register of the x2APIC, or where the guest does not use that by Hyper-V's.
    fn end_of_interrupt(&self) -> io::Result<()> {
        const X2APIC_EOI: u32 = 0x80b;
        const HYPER_V_EOI: u32 = 0x4000_0070;
        for index in [X2APIC_EOI, HYPER_V_EOI] {
            let entry = kvm_msr_entry { index, data: 0, ..Default::default() };
            let msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
            if self.set_msrs(&msrs)? == 1 {
                return Ok(());
            }
        }
        Err(io::Error::other(
            "the guest wants its interrupts to end by themselves (auto-EOI), which this KVM can do \
             only for an x2APIC (others: CONFIG_KVM_HYPERV)",
        ))
    }
}

/// What the last exit left in `run`, whatever it was.
fn exit_data(run: *const kvm_run) -> kvm_run__bindgen_ty_1 {
    // SAFETY: the page is mapped as long as the processor lives, and the pointer stays in it.
    let data = unsafe { &raw const (*run).__bindgen_anon_1 };
    // SAFETY: the kernel writes it only while the processor runs, so now it holds still.
    unsafe { data.read() }
}

/// Bytes per access of a port exit. KVM may hand over several of a string instruction at once.
fn port_width(run: *const kvm_run) -> usize {
    // SAFETY: all members are plain numbers; after a port exit these say something.
    let port = unsafe { exit_data(run).io };
    usize::from(port.size).max(1)
}

fn internal_suberror(run: *const kvm_run) -> u32 {
    // SAFETY: all members are plain numbers; after an internal error these say something.
    let internal = unsafe { exit_data(run).internal };
    internal.suberror
}

/// Whether KVM lets the host's processor virtualize the local APIC. There is no capability for
/// it, but a parameter of KVM's modules.
fn host_virtualizes_apic() -> bool {
    ["kvm_intel/parameters/enable_apicv", "kvm_amd/parameters/avic"].iter().any(|name| {
        std::fs::read_to_string(format!("/sys/module/{name}"))
            .is_ok_and(|text| matches!(text.trim(), "Y" | "1"))
    })
}
