//! A machine: a partition with memory, legacy devices and an operating system to boot.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use emulators::pci::{self, ConfigPorts, IoWindow, MemoryWindow, SharedLine, chipset};
use emulators::{
    ApmPorts, Cable, DebugPort, E1000, E1000Config, E1000Counters, I8042, Ide, IdeCounters,
    IdeDisks, IdePlace, InterruptChips, Nothing, Pit, PmBlock, ResetRegister, Rtc, SmBus,
    SystemControl, Uart,
};
use hypervisor::hosted::HostedPartition;
use hypervisor::kvm::{self, HyperV, Irqchip, KernelCounters, KvmPartition, PartitionConfig};
use hypervisor::synic::{MessageSink, Synic};
use hypervisor::{
    BootState, Bus, ExitCounters, Gpa, GuestMemory, Partition, PartitionError, StopHandle,
    StopReason, layout,
};

use crate::advice;
use crate::boot::{BuiltinBoot, LinuxBoot, PciBus};
use crate::builtin::ExitPort;
use crate::hosted;
use crate::options::{IrqchipOption, PartitionOption, SynicOption};
use crate::panics::Watch;

/// What a machine is to have.
#[derive(Clone)]
pub struct MachineConfig {
    /// What it runs.
    pub guest: Guest,
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual processors.
    pub vps: u32,
    /// What it runs in.
    pub partition: PartitionOption,
    /// Who serves its Hyper-V interface, if it runs in KVM's.
    pub synic: SynicOption,
    /// Who has its interrupt controllers and its timer, if it runs in KVM's.
    pub irqchip: IrqchipOption,
    /// Its IDE disks. If there are any, it has a PCI bus with a controller for them.
    pub ide: IdeDisks,
    /// Its emulated NICs, which are on the PCI bus too.
    pub nics: Vec<E1000Config>,
    /// Whether each of them is on the VMBus too, so that Linux may be told to take it there.
    pub prefers_vmbus: bool,
}

impl MachineConfig {
    /// Whether it has a PCI bus.
    fn has_pci(&self) -> bool {
        !self.ide.is_empty() || !self.nics.is_empty()
    }
}

/// What a machine runs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartitionKind {
    /// A virtual machine of this host's KVM, with this interface.
    Kvm(HyperV),
    /// A process.
    Hosted {
        /// What was wrong with KVM, if it was looked at.
        without_kvm: Option<String>,
    },
}

impl PartitionKind {
    /// One word for it, as in `--partition`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kvm(_) => "kvm",
            Self::Hosted { .. } => "hosted",
        }
    }

    /// What is wrong with KVM, where it would have been taken.
    pub fn without_kvm(&self) -> Option<&str> {
        match self {
            Self::Kvm(_) => None,
            Self::Hosted { without_kvm } => without_kvm.as_deref(),
        }
    }
}

impl fmt::Display for PartitionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm(HyperV::Kernel) => "KVM with its own Hyper-V support",
            Self::Kvm(HyperV::User) => "KVM; partita serves the Hyper-V interface, from user space",
            Self::Kvm(HyperV::Absent) => "KVM",
            Self::Hosted { .. } => "a hosted partition: a confined process, without KVM",
        })
    }
}

/// What a machine runs.
#[derive(Clone, Debug)]
pub enum Guest {
    /// Linux.
    Linux {
        /// The kernel: bzImage or ELF.
        kernel: PathBuf,
        /// Its initrd.
        initrd: Option<PathBuf>,
        /// Its command line.
        command_line: String,
    },
    /// The built-in guest.
    Builtin {
        /// What it shall do.
        work: String,
    },
}

impl Guest {
    /// Puts the guest into `memory`, for a virtual machine.
    fn load(&self, memory: &GuestMemory, config: &MachineConfig) -> anyhow::Result<BootState> {
        let vps = config.vps;
        Ok(match self {
            Self::Linux { kernel, initrd, command_line } => {
                let initrd = initrd.as_deref();
                let ide = !config.ide.is_empty();
                let pci = config.has_pci().then_some(PciBus { ide });
                let prefers_vmbus = config.prefers_vmbus;
                LinuxBoot { kernel, initrd, command_line, vps, pci, prefers_vmbus }.load(memory)?
            }
            Self::Builtin { work } => {
                let doorbell = hyper_v(config.synic)? == HyperV::User;
                BuiltinBoot { command_line: work, vps, doorbell }.load(memory)?
            }
        })
    }
}

/// The Hyper-V interface that was asked for, or that this host does best.
fn hyper_v(synic: SynicOption) -> anyhow::Result<HyperV> {
    let kvm = kvm::open()?;
    match synic {
        SynicOption::Auto => Ok(kvm::preferred_hyper_v(&kvm)),
        SynicOption::User => Ok(HyperV::User),
        SynicOption::Kernel => match kvm::lacking(&kvm, HyperV::Kernel) {
            None => Ok(HyperV::Kernel),
            Some(what) => {
                bail!("--synic kernel: this host's KVM lacks {what}; --synic user does without")
            }
        },
    }
}

/// What KVM is to have of the interrupt controllers.
fn irqchip(option: IrqchipOption) -> anyhow::Result<Irqchip> {
    match option {
        IrqchipOption::Kernel => Ok(Irqchip::Kernel),
        IrqchipOption::User => match kvm::lacking_split(&kvm::open()?) {
            None => Ok(Irqchip::Split),
            Some(what) => {
                bail!("--irqchip user: this host's KVM lacks {what}; --irqchip kernel does without")
            }
        },
    }
}

/// A partition with a guest in it.
struct Loaded {
    partition: Box<dyn Partition>,
    kind: PartitionKind,
    kernel_counters: Vec<Arc<KernelCounters>>,
    /// Its interrupt controllers, if they are not the kernel's.
    chips: Option<Arc<InterruptChips>>,
}

impl Loaded {
    /// In what the configuration asks for. If it leaves that open, a guest that can do without KVM
    /// gets a hosted partition where KVM does not serve.
    fn new(config: &MachineConfig) -> anyhow::Result<Self> {
        let Guest::Builtin { work } = &config.guest else {
            if config.partition == PartitionOption::Hosted {
                bail!("--partition hosted: a kernel needs KVM; only --builtin runs without");
            }
            return Self::in_kvm(config).map_err(|error| match broken_kvm(&error) {
                Some(why) => anyhow!(
                    "{why}; `cargo xtask demo` boots Linux in a software-emulated machine instead"
                ),
                None => error,
            });
        };
        match config.partition {
            PartitionOption::Kvm => Self::in_kvm(config),
            PartitionOption::Hosted => Self::hosted(config, work, None),
            PartitionOption::Auto => match Self::in_kvm(config) {
                Err(error) if config.synic == SynicOption::Auto => match broken_kvm(&error) {
                    Some(why) => Self::hosted(config, work, Some(why)),
                    None => Err(error),
                },
                loaded => loaded,
            },
        }
    }

    fn in_kvm(config: &MachineConfig) -> anyhow::Result<Self> {
        let memory = memory(config)?;
        let boot_state = config.guest.load(&memory, config)?;
        let hyper_v = hyper_v(config.synic)?;
        let irqchip = irqchip(config.irqchip)?;
        let mut partition = KvmPartition::new(&PartitionConfig {
            vps: config.vps,
            memory,
            hyper_v,
            irqchip,
            synthetic_timers: false,
        })?;
        match config.guest {
            Guest::Linux { .. } => partition.set_boot_state(&boot_state)?,
            Guest::Builtin { .. } => partition.set_boot_state_of_all(&boot_state)?,
        }
        let chips = partition.local_apics().map(InterruptChips::new).map(Arc::new);
        if let Some(chips) = &chips {
            partition.attach_interrupt_controller(Arc::clone(chips) as _);
        }
        let kernel_counters = partition.kernel_counters().into_iter().map(Arc::new).collect();
        let kind = PartitionKind::Kvm(hyper_v);
        Ok(Self { partition: Box::new(partition), kind, kernel_counters, chips })
    }

    fn hosted(
        config: &MachineConfig,
        work: &str,
        without_kvm: Option<String>,
    ) -> anyhow::Result<Self> {
        if config.synic != SynicOption::Auto {
            bail!("--synic: a hosted partition has one Hyper-V interface only, its root's");
        }
        if config.irqchip == IrqchipOption::User {
            bail!("--irqchip user: a hosted partition has no interrupt controllers");
        }
        if config.vps != 1 {
            bail!("--cpus {}: a hosted partition has one virtual processor", config.vps);
        }
        let partition = HostedPartition::new(memory(config)?, &hosted::program(work)?)?;
        let kind = PartitionKind::Hosted { without_kvm };
        let (kernel_counters, chips) = (Vec::new(), None);
        Ok(Self { partition: Box::new(partition), kind, kernel_counters, chips })
    }
}

fn memory(config: &MachineConfig) -> anyhow::Result<GuestMemory> {
    let memory = GuestMemory::new(config.memory)?;
    tracing::debug!(?memory, "guest memory");
    Ok(memory)
}

/// What is wrong with this host's KVM, if that is what the error is about.
fn broken_kvm(error: &anyhow::Error) -> Option<String> {
    match error.downcast_ref::<PartitionError>()? {
        PartitionError::VpCount { .. } | PartitionError::Memory(_) => None,
        _ => Some(advice::line(error)),
    }
}

/// A machine, ready to run once. A restart is a new machine.
pub struct Machine {
    partition: Box<dyn Partition>,
    kind: PartitionKind,
    kernel_counters: Vec<Arc<KernelCounters>>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    chips: Option<Arc<InterruptChips>>,
    uart: Arc<Uart>,
    pm: Arc<PmBlock>,
    ide: Option<Ide>,
    nics: Vec<E1000>,
    exit: Option<Arc<ExitPort>>,
}

impl Machine {
    /// Puts the machine together and loads its kernel. The serial port is at the end of the cable
    /// that `serial` makes for a machine which this handle stops; it does not do so before all that can be wrong with the guest's files has been found.
    pub fn new(
        config: &MachineConfig,
        serial: impl FnOnce(StopHandle) -> anyhow::Result<Arc<dyn Cable>>,
    ) -> anyhow::Result<Self> {
        let Loaded { partition, kind, kernel_counters, chips } = Loaded::new(config)?;
        let stop = partition.stop_handle();

        let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
        if let Some(chips) = &chips {
            chips.add_to(&mut ports, &mut mmio)?;
            let pit = Pit::new(partition.interrupt_line(Pit::IRQ.into())?);
            ports.add("PIT", Pit::PORT.into(), Pit::PORTS.into(), pit.counters())?;
            ports.add("PIT gate", Pit::GATE_PORT.into(), 1, pit.gate())?;
        }
        let com1 = partition.interrupt_line(Uart::COM1_IRQ.into())?;
        let uart = Arc::new(Uart::new(com1, serial(stop.clone())?));
        ports.add("COM1", Uart::COM1.into(), Uart::PORTS.into(), Arc::clone(&uart) as _)?;

        let sci = partition.interrupt_line(PmBlock::SCI.into())?;
        let pm = Arc::new(PmBlock::new(sci, stop.clone()));
        ports.add("PM", PmBlock::PORT.into(), PmBlock::PORTS.into(), Arc::clone(&pm) as _)?;
        let reset = Arc::new(ResetRegister::new(stop.clone()));
        let (ide, nics) = if config.has_pci() {
            add_pci(&mut ports, &mut mmio, &*partition, reset, config)?
        } else {
            ports.add("reset register", ResetRegister::PORT.into(), 1, reset)?;
            (None, Vec::new())
        };

        let exit = matches!(config.guest, Guest::Builtin { .. })
            .then(|| Arc::new(ExitPort::new(stop.clone())));
        if let Some(exit) = &exit {
            ports.add("exit port", ExitPort::PORT.into(), 4, Arc::clone(exit) as _)?;
        }

        let rtc = Arc::new(Rtc::new(partition.interrupt_line(Rtc::IRQ.into())?));
        ports.add("RTC", Rtc::PORT.into(), Rtc::PORTS.into(), rtc)?;
        // Its index matters with the next access to its data. (PCI's address port cannot be treated
        // so: the reset register lies among its bytes, and has to act at once.)
        partition.defer_port_writes(Rtc::PORT, 1)?;
        add_odd_ports(&mut ports, &*partition, stop)?;

        let (ports, mmio) = (Arc::new(ports), Arc::new(mmio));
        Ok(Self { partition, kind, kernel_counters, ports, mmio, chips, uart, pm, ide, nics, exit })
    }

    /// Its RAM.
    pub fn memory(&self) -> &GuestMemory {
        self.partition.memory()
    }

    /// Its SynIC.
    pub fn synic(&self) -> Arc<dyn Synic> {
        self.partition.synic()
    }

    /// What it runs in.
    pub fn kind(&self) -> &PartitionKind {
        &self.kind
    }

    /// Ends [`Self::run`], from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.partition.stop_handle()
    }

    /// The serial port, for its input.
    pub fn uart(&self) -> Arc<Uart> {
        Arc::clone(&self.uart)
    }

    /// The power button.
    pub fn pm(&self) -> Arc<PmBlock> {
        Arc::clone(&self.pm)
    }

    /// How the built-in guest says that it ended: 0 is well.
    pub fn exit_status(&self) -> Option<u32> {
        self.exit.as_ref()?.status()
    }

    /// What its IDE controller counted, if it has one.
    pub fn ide_counters(&self) -> Option<IdeCounters> {
        self.ide.as_ref().map(Ide::counters)
    }

    /// What its emulated NICs counted, in their order.
    pub fn nic_counters(&self) -> Vec<E1000Counters> {
        self.nics.iter().map(E1000::counters).collect()
    }

    /// Its interrupt controllers, for their counters, if they are not the kernel's.
    pub fn interrupt_chips(&self) -> Option<Arc<InterruptChips>> {
        self.chips.clone()
    }

    /// What each processor counted, also while it runs.
    pub fn exit_counters(&self) -> Vec<Arc<ExitCounters>> {
        self.partition.exit_counters()
    }

    /// What KVM counts for each processor; to be read as long as the machine lives.
    pub fn kernel_counters(&self) -> Vec<Arc<KernelCounters>> {
        self.kernel_counters.clone()
    }

    /// The port and memory buses, for their counters.
    pub fn buses(&self) -> (Arc<Bus>, Arc<Bus>) {
        (Arc::clone(&self.ports), Arc::clone(&self.mmio))
    }

    /// Runs the guest until it, somebody else or a panic of this program's stops it. `sink` takes
    /// the messages it posts.
    pub fn run(&mut self, sink: &Arc<dyn MessageSink>) -> StopReason {
        let _watch = Watch::over(self.stop_handle());
        self.partition.run(&self.ports, &self.mmio, sink)
    }
}

/// Puts into the machine what a PC's software takes for granted.
fn add_odd_ports(
    ports: &mut Bus,
    partition: &dyn Partition,
    stop: StopHandle,
) -> anyhow::Result<()> {
    for port in Nothing::DELAYS {
        ports.add("delay", port.into(), 1, Arc::new(Nothing))?;
        partition.defer_port_writes(port, 1)?;
    }
    for port in DebugPort::PORTS {
        ports.add("debug port", port.into(), 1, Arc::new(DebugPort::default()))?;
    }
    let (apm, control) = (ApmPorts::default(), SystemControl::new(stop.clone()));
    ports.add("APM", ApmPorts::PORT.into(), ApmPorts::PORTS.into(), Arc::new(apm))?;
    ports.add("system control", SystemControl::PORT.into(), 1, Arc::new(control))?;
    let keyboard = Arc::new(I8042::new(stop));
    ports.add("i8042 data", I8042::DATA_PORT, 1, keyboard.data())?;
    ports.add("i8042 command", I8042::COMMAND_PORT, 1, keyboard.command())?;
    Ok(())
}

/// Puts a PCI bus into the machine, with its chips and what is on them. `reset` is the reset
/// register, which lies between the bus's ports.
fn add_pci(
    ports: &mut Bus,
    mmio: &mut Bus,
    partition: &dyn Partition,
    reset: Arc<ResetRegister>,
    config: &MachineConfig,
) -> anyhow::Result<(Option<Ide>, Vec<E1000>)> {
    let mut bus = ConfigPorts::new(reset);
    let (mut window, mut memory_window) = (IoWindow::default(), MemoryWindow::default());
    let ide = if config.ide.is_empty() {
        chipset::populate_without_ide(&mut bus);
        None
    } else {
        Some(add_ide(ports, &mut bus, &mut window, partition, &config.ide)?)
    };
    let nics = add_nics(&mut bus, &mut window, &mut memory_window, partition, &config.nics)?;

    ports.add("SMBus", SmBus::PORT.into(), SmBus::PORTS.into(), Arc::new(SmBus::default()))?;
    ports.add(
        "PCI configuration",
        ConfigPorts::PORT.into(),
        ConfigPorts::PORTS.into(),
        Arc::new(bus),
    )?;
    ports.add("PCI I/O", IoWindow::PORT.into(), IoWindow::PORTS.into(), Arc::new(window))?;
    let (start, size) = (layout::PCI_MMIO_START.0, layout::PCI_MMIO_SIZE);
    mmio.add("PCI memory", start, size, Arc::new(memory_window))?;
    Ok((ide, nics))
}

/// Puts the chips on the bus, with an IDE controller that has `disks`.
fn add_ide(
    ports: &mut Bus,
    bus: &mut ConfigPorts,
    window: &mut IoWindow,
    partition: &dyn Partition,
    disks: &IdeDisks,
) -> anyhow::Result<Ide> {
    let decode = chipset::populate(bus);
    let [first, second] = IdePlace::ALL.map(|place| partition.interrupt_line(place.irq.into()));
    let ide = Ide::new(partition.memory(), disks, [first?, second?])
        .context("cannot start the IDE controller")?;
    for (channel, place) in IdePlace::ALL.into_iter().enumerate() {
        let command = ide.command_block(channel);
        ports.add("IDE command block", place.command.into(), IdePlace::PORTS.into(), command)?;
        ports.add("IDE control block", place.control.into(), 1, ide.control_block(channel))?;
        let (first, count) = place.quiet_ports();
        partition.defer_port_writes(first, count.into())?;
    }
    for (first, count) in chipset::QUIET_BUS_MASTER_PORTS {
        partition.defer_port_writes(first, count.into())?;
    }
    window.add(Arc::clone(&decode), chipset::BUS_MASTER_PORTS, ide.bus_master(decode));
    Ok(ide)
}

/// Puts NICs on the bus, each a device.
fn add_nics(
    bus: &mut ConfigPorts,
    window: &mut IoWindow,
    memory_window: &mut MemoryWindow,
    partition: &dyn Partition,
    configs: &[E1000Config],
) -> anyhow::Result<Vec<E1000>> {
    let mut lines = BTreeMap::new();
    let mut nics = Vec::with_capacity(configs.len());
    for (number, config) in (0..).zip(configs) {
        let slot = pci::FIRST_SLOT + number;
        let irq = pci::irq_of(slot);
        let line = match lines.entry(irq) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(SharedLine::new(partition.interrupt_line(irq.into())?))
            }
        };
        let (function, memory, ports) = pci::nic::function(slot);
        let decode = Arc::clone(&memory);
        let nic = E1000::new(number, config, partition.memory(), decode, line.end())
            .with_context(|| format!("cannot start e1000 {number}"))?;
        // Where it is now; a guest that moves it does without.
        let base = memory.base().map(u64::from);
        for (base, (offset, len)) in
            base.into_iter().flat_map(|base| pci::nic::QUIET.map(|quiet| (base, quiet)))
        {
            partition.defer_memory_writes(Gpa(base + u64::from(offset)), len)?;
        }
        window.add(ports, pci::nic::PORTS, nic.ports());
        memory_window.add(memory, pci::nic::MEMORY, nic.memory());
        bus.add(slot, 0, function);
        nics.push(nic);
    }
    Ok(nics)
}
