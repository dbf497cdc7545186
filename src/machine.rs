//! A machine: a partition with memory, legacy devices and an operating system to boot.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use emulators::{Cmos, I8042, Nothing, PmBlock, ResetRegister, Uart};
use hypervisor::kvm::{self, HyperV, KernelCounters, Partition, PartitionConfig};
use hypervisor::synic::{MessageSink, Synic};
use hypervisor::{BootState, Bus, ExitCounters, GuestMemory, StopHandle, StopReason};

use crate::boot::{BuiltinBoot, LinuxBoot};
use crate::builtin::ExitPort;
use crate::options::SynicOption;

/// The address port of PCI's configuration space. Nothing is there yet, but kernels look.
const PCI_CONFIG_ADDRESS: u16 = 0xcf8;

/// What a machine is to have.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What it runs.
    pub guest: Guest,
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual processors.
    pub vps: u32,
    /// Who serves its Hyper-V interface.
    pub synic: SynicOption,
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
    fn load(
        &self,
        memory: &GuestMemory,
        vps: u32,
        synic: SynicOption,
    ) -> anyhow::Result<BootState> {
        Ok(match self {
            Self::Linux { kernel, initrd, command_line } => {
                LinuxBoot { kernel, initrd: initrd.as_deref(), command_line, vps }.load(memory)?
            }
            Self::Builtin { work } => {
                let doorbell = hyper_v(synic)? == HyperV::User;
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

/// A machine, ready to run once. A restart is a new machine.
pub struct Machine {
    partition: Partition,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    uart: Arc<Uart>,
    pm: Arc<PmBlock>,
    exit: Option<Arc<ExitPort>>,
    hyper_v: HyperV,
}

impl Machine {
    /// Puts the machine together and loads its kernel. Serial output goes to what `serial` makes,
    /// which it does not do before all that can be wrong with the guest's files has been found.
    pub fn new(
        config: &MachineConfig,
        serial: impl FnOnce() -> anyhow::Result<Box<dyn Write + Send>>,
    ) -> anyhow::Result<Self> {
        let memory = GuestMemory::new(config.memory)?;
        tracing::debug!(?memory, "guest memory");
        let boot_state = config.guest.load(&memory, config.vps, config.synic)?;

        let hyper_v = hyper_v(config.synic)?;
        let partition = Partition::new(&PartitionConfig {
            vps: config.vps,
            memory,
            hyper_v,
            synthetic_timers: false,
        })?;
        partition.set_boot_state(&boot_state)?;
        let stop = partition.stop_handle();

        let mut ports = Bus::ports();
        let com1 = partition.interrupt_line(Uart::COM1_IRQ.into())?;
        let uart = Uart::new(com1, serial()?).context("cannot start the serial port")?;
        let uart = Arc::new(uart);
        ports.add("COM1", Uart::COM1.into(), Uart::PORTS.into(), Arc::clone(&uart) as _)?;

        let sci = partition.interrupt_line(PmBlock::SCI.into())?;
        let pm = Arc::new(PmBlock::new(sci, stop.clone()));
        ports.add("PM", PmBlock::PORT.into(), PmBlock::PORTS.into(), Arc::clone(&pm) as _)?;
        let reset = Arc::new(ResetRegister::new(stop.clone()));
        ports.add("reset register", ResetRegister::PORT.into(), 1, reset)?;

        let exit = matches!(config.guest, Guest::Builtin { .. })
            .then(|| Arc::new(ExitPort::new(stop.clone())));
        if let Some(exit) = &exit {
            ports.add("exit port", ExitPort::PORT.into(), 4, Arc::clone(exit) as _)?;
        }

        let keyboard = Arc::new(I8042::new(stop));
        ports.add("i8042 data", I8042::DATA_PORT, 1, Arc::new(Nothing))?;
        ports.add("i8042 command", I8042::COMMAND_PORT, 1, keyboard)?;
        ports.add("CMOS", Cmos::PORT, Cmos::PORTS, Arc::new(Cmos::default()))?;
        ports.add("POST code", 0x80, 1, Arc::new(Nothing))?;
        // What these say matters with the next read, or never.
        for (port, count) in [(PCI_CONFIG_ADDRESS, 4), (Cmos::PORT as u16, 1), (0x80, 1)] {
            partition.defer_port_writes(port, count)?;
        }

        let (ports, mmio) = (Arc::new(ports), Arc::new(Bus::mmio()));
        Ok(Self { partition, ports, mmio, uart, pm, exit, hyper_v })
    }

    /// Its RAM.
    pub fn memory(&self) -> &GuestMemory {
        self.partition.memory()
    }

    /// Its SynIC.
    pub fn synic(&self) -> Arc<dyn Synic> {
        self.partition.synic()
    }

    /// Who serves its Hyper-V interface.
    pub fn hyper_v(&self) -> HyperV {
        self.hyper_v
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

    /// What each processor counted, also while it runs.
    pub fn exit_counters(&self) -> Vec<Arc<ExitCounters>> {
        self.partition.exit_counters()
    }

    /// What the kernel counts for each processor; to be asked for before the machine runs.
    pub fn kernel_counters(&self) -> Vec<KernelCounters> {
        self.partition.kernel_counters()
    }

    /// The port and memory buses, for their counters.
    pub fn buses(&self) -> (Arc<Bus>, Arc<Bus>) {
        (Arc::clone(&self.ports), Arc::clone(&self.mmio))
    }

    /// Runs the guest until it or somebody else stops it. `sink` takes the messages it posts.
    pub fn run(&mut self, sink: &Arc<dyn MessageSink>) -> StopReason {
        self.partition.run(&self.ports, &self.mmio, sink)
    }
}
