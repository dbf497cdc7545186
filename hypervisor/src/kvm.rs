//! Partitions by KVM.
//!
//! The interrupt controllers and the PIT are the kernel's, unless somebody else brings them
//! ([`Irqchip::Split`]). So are the hypercall page, the reference
//! TSC page and the SINTs where KVM has Hyper-V support; what comes out to us then are ports,
//! addresses without RAM, the SynIC's pages and messages. Where it has not, or is not to use it,
//! the same interface is served from here ([`HyperV::User`]).

mod cpuid;
mod deferred;
mod irq;
mod kick;
mod split;
mod stats;
mod string_out;
mod synic;
mod user;
mod vp;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_bindings::{KVM_API_VERSION, KVM_CAP_COALESCED_PIO, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::Killable;

use deferred::DeferredWrites;
use irq::Routes;
use split::{ControllerLine, SplitIrqchip};
pub use stats::KernelCounters;
use synic::KvmSynic;

use user::synic::UserSynic;
use user::{UserHyperV, UserVp};

use crate::interrupts::{InterruptController, LocalApics};
use crate::partition::Partition;
use crate::synic::{MessageSink, Synic};
use crate::{
    BootState, Bus, ExitCounters, Gpa, GuestMemory, InterruptLine, PartitionError, StopHandle,
    StopReason, VpIndex, layout,
};

/// The Hyper-V interface that a partition offers its guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HyperV {
    /// KVM's own.
    #[default]
    Kernel,
    /// Ours, on any KVM.
    User,
    /// None: a bare PC. For tests on hosts whose KVM has no Hyper-V support.
    Absent,
}

/// Which of a PC's interrupt controllers a partition has from KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Irqchip {
    /// All of them, and the PIT.
    #[default]
    Kernel,
    /// The processors' local APICs. [`KvmPartition::attach_interrupt_controller`] brings the others.
    Split,
}

/// What a partition is to have.
#[derive(Clone, Debug)]
pub struct PartitionConfig {
    /// Virtual processors.
    pub vps: u32,
    /// Its RAM.
    pub memory: GuestMemory,
    /// Its Hyper-V interface.
    pub hyper_v: HyperV,
    /// Its interrupt controllers.
    pub irqchip: Irqchip,
    /// Whether that offers synthetic timers. Linux does better without: its local APIC's cost fewer
    /// exits.
    pub synthetic_timers: bool,
}

/// A virtual machine: processors, memory, interrupt controllers, SynIC.
pub struct KvmPartition {
    // The processors go first: dropping order is declaration order.
    vps: Vec<vp::Vp>,
    vm: Arc<VmFd>,
    synic: Arc<dyn Synic>,
    /// There if KVM has only the local APICs.
    split: Option<Arc<SplitIrqchip>>,
    /// Who has the others then.
    controller: Option<Arc<dyn InterruptController>>,
    /// Not there when KVM cannot defer port writes (before Linux 5.0).
    deferred: Option<Arc<DeferredWrites>>,
    /// KVM's slots refer to its mappings.
    memory: GuestMemory,
    stop: StopHandle,
}

/// Bytes of stack for a processor's thread: ample for devices and message handlers, and too little
/// for the host to back it with a huge page.
const VP_STACK: usize = 256 << 10;

/// Turns an error of KVM into ours.
fn call<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> PartitionError {
    move |source| PartitionError::Call { what, source: source.into() }
}

/// Opens /dev/kvm and sees whether it has what every partition needs.
pub fn open() -> Result<Kvm, PartitionError> {
    let kvm = Kvm::new().map_err(|error| match io::Error::from(error) {
        source if source.kind() == io::ErrorKind::PermissionDenied => {
            PartitionError::NoPermission { source }
        }
        // A file may be there without a driver, and have one loaded when it is opened.
        source => match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => PartitionError::NoKvm { source },
            _ => PartitionError::Call { what: "cannot open /dev/kvm", source },
        },
    })?;
    let version = kvm.get_api_version();
    if version < 0 {
        let source = io::Error::last_os_error();
        return Err(PartitionError::Call { what: "/dev/kvm does not answer as KVM does", source });
    }
    if version != KVM_API_VERSION as i32 {
        return Err(PartitionError::ApiVersion(version));
    }
    Ok(kvm)
}

/// The first of the capabilities a partition with all of KVM's controllers needs that this KVM
/// lacks.
pub fn lacking(kvm: &Kvm, hyper_v: HyperV) -> Option<&'static str> {
    use kvm_bindings::*;
    let common = [
        (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
        (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"),
        (KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING"),
        (KVM_CAP_PIT2, "KVM_CAP_PIT2"),
        (KVM_CAP_IRQFD, "KVM_CAP_IRQFD"),
        (KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"),
        (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"),
        (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
        (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
    ];
    let kernel = [
        (KVM_CAP_HYPERV, "KVM_CAP_HYPERV (is it built with CONFIG_KVM_HYPERV?)"),
        (KVM_CAP_HYPERV_SYNIC2, "KVM_CAP_HYPERV_SYNIC2"),
        (KVM_CAP_HYPERV_VP_INDEX, "KVM_CAP_HYPERV_VP_INDEX"),
        (KVM_CAP_HYPERV_EVENTFD, "KVM_CAP_HYPERV_EVENTFD"),
    ];
    let user = [
        (KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR (since Linux 5.10)"),
        (KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER (since Linux 5.10)"),
        (KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
    ];
    let more = match hyper_v {
        HyperV::Kernel => &kernel[..],
        HyperV::User => &user[..],
        HyperV::Absent => &[],
    };
    first_lacking(kvm, common.iter().chain(more))
}

/// The first of the capabilities that this KVM lacks for leaving interrupt controllers to others.
pub fn lacking_split(kvm: &Kvm) -> Option<&'static str> {
    use kvm_bindings::*;
    let needed = [
        (KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP (since Linux 4.4)"),
        (KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
    ];
    first_lacking(kvm, needed.iter())
}

fn first_lacking<'a>(
    kvm: &Kvm,
    mut needed: impl Iterator<Item = &'a (u32, &'static str)>,
) -> Option<&'static str> {
    needed
        .find(|(capability, _)| kvm.check_extension_raw((*capability).into()) <= 0)
        .map(|(_, name)| *name)
}

/// The Hyper-V interface to use: the kernel's where it has one, ours otherwise.
pub fn preferred_hyper_v(kvm: &Kvm) -> HyperV {
    match lacking(kvm, HyperV::Kernel) {
        None => HyperV::Kernel,
        Some(_) => HyperV::User,
    }
}

impl KvmPartition {
    /// A partition with everything but code to run.
    pub fn new(config: &PartitionConfig) -> Result<Self, PartitionError> {
        let kvm = open()?;
        let split_lacks = || match config.irqchip {
            Irqchip::Kernel => None,
            Irqchip::Split => lacking_split(&kvm),
        };
        if let Some(name) = lacking(&kvm, config.hyper_v).or_else(split_lacks) {
            return Err(PartitionError::Lacking(name));
        }
        // One byte names a processor in the MADT and in xAPIC mode, and 255 is for all of them.
        let max = u32::try_from(kvm.get_max_vcpus()).unwrap_or(0).min(254);
        if !(1..=max).contains(&config.vps) {
            return Err(PartitionError::VpCount { asked: config.vps, max });
        }

        let vm = Arc::new(create_vm(&kvm)?);
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0)
            .map_err(call("cannot set KVM's identity map"))?;
        vm.set_tss_address(layout::KVM_TSS.0 as usize).map_err(call("cannot set KVM's TSS"))?;
        add_memory(&vm, &config.memory)?;
        match config.irqchip {
            Irqchip::Kernel => create_controllers(&vm)?,
            Irqchip::Split => split::enable(&vm)?,
        }

        let stop = StopHandle::default();
        let hyper_v = config.hyper_v;
        let kernel_synic = match hyper_v {
            HyperV::User => None,
            _ => Some(Arc::new(KvmSynic::new(&vm, &config.memory, config.vps)?)),
        };
        if hyper_v == HyperV::User {
            user::filter_registers(&vm)?;
        }
        let mut vps = Vec::new();
        for index in (0..config.vps).map(VpIndex) {
            let environment = vp::Environment {
                index,
                count: config.vps,
                hyper_v,
                timers: config.synthetic_timers,
                synic: kernel_synic.clone(),
                memory: config.memory.clone(),
                stop: stop.clone(),
            };
            vps.push(vp::Vp::new(&kvm, &vm, environment)?);
        }
        // After the processors: KVM wants a SINT's processor to exist.
        let sints = if hyper_v == HyperV::Kernel { config.vps } else { 0 };
        let routes = Arc::new(Routes::new(&vm, config.irqchip));
        routes.set_sints((0..sints).map(VpIndex).map(irq::kernel_sint))?;
        let synic: Arc<dyn Synic> = match kernel_synic {
            Some(synic) => {
                synic.attach_interrupts(sints)?;
                synic
            }
            None => serve_by_user_space(&mut vps, &vm, &routes, config, &stop)?,
        };

        let deferred = match vps.first() {
            Some(vp) if kvm.check_extension_raw(KVM_CAP_COALESCED_PIO.into()) > 0 => {
                let deferred = vp.deferred_writes().map_err(call("cannot map KVM's write ring"))?;
                Some(Arc::new(deferred))
            }
            _ => None,
        };
        let split = match config.irqchip {
            Irqchip::Kernel => None,
            Irqchip::Split => Some(Arc::new(SplitIrqchip::new(&vm, &routes, stop.clone()))),
        };
        let memory = config.memory.clone();
        Ok(Self { vps, vm, synic, split, controller: None, deferred, memory, stop })
    }

    /// The processors' local APICs, for a controller that is not KVM's; `None` if KVM has all.
    pub fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        self.split.clone().map(|split| split as _)
    }

    /// Gives a partition that has only local APICs its other controllers: the lines that devices
    /// ask for from now on lead there.
    pub fn attach_interrupt_controller(&mut self, controller: Arc<dyn InterruptController>) {
        if let Some(split) = &self.split {
            for vp in &mut self.vps {
                vp.attach_controller(split, &controller);
            }
            self.controller = Some(controller);
        }
    }

    /// What the kernel counts of each processor, in order; empty where it tells nothing. To be
    /// asked before [`Partition::run`], and to be read as long as the partition lives.
    pub fn kernel_counters(&self) -> Vec<KernelCounters> {
        self.vps.iter().filter_map(vp::Vp::kernel_counters).collect()
    }

    /// From now on a guest's write of any value to `port` fires `event` and does not exit.
    pub fn port_event(&self, port: u16, event: &EventFd) -> Result<(), PartitionError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Pio(port.into()), NoDatamatch)
            .map_err(call("cannot bind a port to an event"))
    }

    /// Where the first processor starts; the others wait for it to start them, as a PC's do.
    pub fn set_boot_state(&self, state: &BootState) -> Result<(), PartitionError> {
        match self.vps.first() {
            Some(vp) => vp.set_boot_state(state),
            None => Ok(()),
        }
    }

    /// Where all processors start at once. Each has to find out which it is, by its local APIC's
    /// number for instance, before it uses the stack.
    pub fn set_boot_state_of_all(&self, state: &BootState) -> Result<(), PartitionError> {
        self.vps.iter().try_for_each(|vp| vp.set_boot_state(state))
    }
}

impl Partition for KvmPartition {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn synic(&self) -> Arc<dyn Synic> {
        Arc::clone(&self.synic)
    }

    fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    fn exit_counters(&self) -> Vec<Arc<ExitCounters>> {
        self.vps.iter().map(vp::Vp::counters).collect()
    }

    fn interrupt_line(&self, gsi: u32) -> Result<Arc<dyn InterruptLine>, PartitionError> {
        Ok(match self.split {
            None => Arc::new(irq::KvmLine::new(&self.vm, gsi)?),
            Some(_) => Arc::new(ControllerLine { controller: self.controller.clone(), gsi }),
        })
    }

    fn defer_port_writes(&self, port: u16, count: u32) -> Result<(), PartitionError> {
        if self.deferred.is_none() {
            return Ok(());
        }
        self.vm
            .register_coalesced_mmio(IoEventAddress::Pio(port.into()), count)
            .map_err(call("cannot defer writes to a port"))
    }

    fn defer_memory_writes(&self, gpa: Gpa, len: u32) -> Result<(), PartitionError> {
        if self.deferred.is_none() {
            return Ok(());
        }
        self.vm
            .register_coalesced_mmio(IoEventAddress::Mmio(gpa.0), len)
            .map_err(call("cannot defer writes to an address"))
    }

    /// Each on a thread of its own.
    fn run(
        &mut self,
        ports: &Arc<Bus>,
        mmio: &Arc<Bus>,
        sink: &Arc<dyn MessageSink>,
    ) -> StopReason {
        let kernel_counters = self.kernel_counters();
        let mut threads = Vec::new();
        for vp in self.vps.drain(..) {
            let name = vp.index().to_string();
            let buses = vp::Buses {
                ports: Arc::clone(ports),
                mmio: Arc::clone(mmio),
                deferred: self.deferred.clone(),
            };
            let sink = Arc::clone(sink);
            let builder = std::thread::Builder::new().name(name).stack_size(VP_STACK);
            let spawned = builder.spawn(move || vp.run(&buses, &*sink));
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    self.stop.stop(StopReason::Error(format!("cannot start a thread: {error}")));
                    break;
                }
            }
        }
        let reason = self.stop.wait();
        stop_all(threads);
        for (index, counters) in (0..).map(VpIndex).zip(&kernel_counters) {
            tracing::debug!("{index}: {counters}");
        }
        reason
    }
}

/// Gets every processor out of KVM and waits for its thread to end.
///
/// Each looks at the stop handle after every exit. The signal makes one that sleeps in KVM, or is
/// about to enter it, come out ([`kick`] says how none is missed).
fn stop_all(threads: Vec<JoinHandle<()>>) {
    for thread in &threads {
        thread.kill(kick::signal()).expect("the signal exists, and the thread is not joined");
    }
    for thread in threads {
        // If it panicked, that is the reason already, or came after it.
        let _ = thread.join();
    }
}

/// Gives the processors their Hyper-V interface from user space.
fn serve_by_user_space(
    vps: &mut [vp::Vp],
    vm: &Arc<VmFd>,
    routes: &Arc<Routes>,
    config: &PartitionConfig,
    stop: &StopHandle,
) -> Result<Arc<dyn Synic>, PartitionError> {
    let synic = Arc::new(UserSynic::new(vm, routes, &config.memory, config.vps)?);
    // All of them, so that each shows the same time.
    let shared = vps.iter().all(vp::Vp::share_tsc);
    let khz = vps.first().and_then(vp::Vp::tsc_khz);
    let trusted = shared && host_trusts_tsc();
    let timers = config.synthetic_timers;
    let user = UserHyperV::new(&config.memory, &synic, khz, trusted, timers, stop.clone());
    for vp in vps {
        let served = UserVp::new(vp.index(), &user);
        vp.serve_by(served);
    }
    Ok(synic)
}

/// Whether the host's own clock is its time stamp counter: it watches it, and lets it go when it
/// goes wrong.
fn host_trusts_tsc() -> bool {
    std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        .is_ok_and(|name| name.trim() == "tsc")
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, PartitionError> {
    loop {
        match kvm.create_vm() {
            // Creation takes long enough for a signal to come in between.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(call("cannot create a virtual machine")),
        }
    }
}

/// All controllers and the PIT, in the kernel.
fn create_controllers(vm: &VmFd) -> Result<(), PartitionError> {
    vm.create_irq_chip().map_err(call("cannot create the interrupt controllers"))?;
    // "Speaker dummy" is KVM's name for answering port 0x61, which calibrations poll.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(call("cannot create the PIT"))
}

#[allow(unsafe_code)] // KVM gets addresses of ours.
fn add_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), PartitionError> {
    for (slot, region) in (0..).zip(memory.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.gpa.0,
            memory_size: region.len,
            userspace_addr: region.host as u64,
        };
        // SAFETY: the range is a mapping of guest memory. KVM uses it on behalf of processors, and
        // `KvmPartition` keeps the memory until these are gone.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(call("cannot give the virtual machine its memory"))?;
    }
    Ok(())
}
