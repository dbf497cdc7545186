//! `partita run`: a machine with disks, from the command line to its end.
//!
//! Disks and networks are opened first and stay open, disks also locked, over the guest's restarts; everything else is
//! made anew at each, which is what a reset means.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use backends::block::{Disk, SECTOR};
use backends::file::{Direct, FileDisk, OpenOptions};
use backends::paths;
use clap::Args;
use emulators::IdeDisks;
use guest_drivers::work;
use hypervisor::StopReason;
use vmbus_server::{Device, Host};
use vsp::storvsp::{Controller, ControllerBuilder};

use crate::console::{self, Console};
use crate::limits::{self, Descriptors};
use crate::log::say;
use crate::machine::{Guest, Machine, MachineConfig};
use crate::network::{self, Plugged};
use crate::options::nic::{NicAttach, NicOption};
use crate::options::switch::SwitchOption;
use crate::options::{
    Attach, DiskOption, IrqchipOption, PartitionOption, ResetOption, SerialOption, Size,
    SynicOption,
};
use crate::outlet::Outlet;
use crate::resize;
use crate::restart::{self, Cause, Restarts};
use crate::statistics::{NicStatistics, Statistics};

/// A guest's first machine and its restarts.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  partita run --kernel vmlinuz --initrd initrd.img --disk debian.img --memory 1G --cpus 2
  partita run --kernel vmlinuz --disk a.img --disk b.img,readonly=on,lun=5 \\
      --cmdline 'console=ttyS0 root=/dev/sda1' --serial file:console.log
  partita run --kernel vmlinuz --initrd initrd.img --nic backend=tap:tap0,mac=52:54:00:12:34:56
  partita run --kernel vmlinuz --initrd initrd.img --nic backend=switch:lan \\
      --switch name=lan,uplink=socket:/tmp/lan.sock
  partita run --builtin 'identify; bench rw=read bs=4k depth=32 time=2s' --disk path=a.img
  partita run --builtin 'exchange len=64' --nic backend=switch:a --nic backend=switch:a

Disks take path=PATH, or just PATH, and, separated by commas: readonly=on|off, direct=on|off, id=NAME,
block-size=512|4096 (a block device's own, and 512 for an image), discard=unmap|off (off: what the
guest discards is not freed), attach=scsi with controller=0..3 and lun=0..63, or attach=ide with
channel=0|1 and device=0|1. With
attach=ide+scsi an IDE disk is offered on the VMBus too, and the guest takes which path it likes:
the first that writes owns the disk. A comma in a value is written twice.

In the same way, a NIC's backend and a switch's name may come first without a key.

NICs take backend=tap:NAME, backend=switch:NAME with vlan=1..4094 and isolated=on|off, or backend=user
with hostfwd=tcp|udp:[ADDRESS:]PORT[-GUESTPORT]; and all of them mac=ADDRESS, mtu=68..9000,
queues=1..64 and pcap=FILE; and attach=netvsc, which is a synthetic NIC, or attach=e1000, an Intel
82540EM on a PCI bus (its driver may set an MTU of up to 16366, if the network takes it).

A switch joins the NICs of this machine that name it. With --switch it takes name=NAME and mtu=68..9000,
and uplink=tap:NAME to be joined to the host, or uplink=socket:PATH to be joined to the switches of
other machines with the same PATH; and pcap=FILE for what passes the uplink.

On a terminal every key goes to the guest, Ctrl-C too, but for those after Ctrl-A: Ctrl-A x ends the
guest, Ctrl-A Ctrl-A sends one Ctrl-A, Ctrl-A h lists the keys. SIGINT, SIGTERM and SIGHUP press the
guest's power button; a second one stops it. SIGQUIT stops it at once, SIGUSR1 prints what was counted.

The WORK of the built-in guest is tasks, parted by semicolons; each prints a line of JSON:
  identify [disk=N | nic=N]
  verify   [disk=N] [bytes=16M] [bs=64k] [depth=8] [seed=N] [vps=1]    overwrites the disk
  bench    [disk=N] [pattern=rand|seq] [rw=read|write] [bs=4k] [depth=1] [time=1s] [spin=100us]
           [vps=1]
  checksum [disk=N] [bytes=16M] [bs=64k] [depth=8] [vps=1]
  exchange [nic=0] [peer=1] [len=1500] [depth=32] [frames=N] [time=1s] [spin=100us] [seed=N]
  hostile  [seed=1] [time=1s] [rounds=N] [rest=0s]    overwrites all disks
Disks are counted from 0: synthetic ones by controller and LUN, then those on IDE channels, which
also take transfer=dma|pio. rw=write overwrites the disk. vps=N has N of the --cpus share the work,
each with depth requests in flight on a channel of its own. NICs are counted from 0, too. An exchange
sends frames of len bytes from nic to peer and back at the same time, depth of them under way each
way, until there were so many or the time is over, and compares every byte that arrives. hostile
drives all devices wrongly, for a test of the host: round by round, each from a seed, counted up.")]
pub struct Run {
    /// The kernel: a bzImage or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STRING", default_value = "console=ttyS0 panic=-1")]
    cmdline: String,
    /// Instead of a kernel, the guest that partita carries: what it shall do
    #[arg(long, value_name = "WORK", conflicts_with_all = ["kernel", "initrd", "cmdline", "on_reset"])]
    builtin: Option<String>,
    /// Memory, such as 512M or 4G
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: Size,
    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// A disk: PATH or path=PATH[,KEY=VALUE]…; may be given several times
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskOption>,
    /// A CD-ROM drive with this ISO image in it, on the IDE controller; may be given several times
    #[arg(long, value_name = "ISO")]
    cdrom: Vec<PathBuf>,
    /// A NIC: backend=tap:NAME, switch:NAME or user[,KEY=VALUE]…; may be given several times
    #[arg(long, value_name = "NIC")]
    nic: Vec<NicOption>,
    /// A switch for backend=switch:NAME, with a way out: name=NAME[,KEY=VALUE]…; may be given
    /// several times
    #[arg(long, value_name = "SWITCH")]
    switch: Vec<SwitchOption>,
    /// Where the serial port leads: stdio, where Ctrl-A x on a terminal ends the guest; null; or
    /// file:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialOption,
    /// What the guest runs in: kvm; hosted, which is a process and takes --builtin only; or auto:
    /// KVM where it opens
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    partition: PartitionOption,
    /// Who serves the guest's Hyper-V interface: kernel, user (space), or auto: the kernel where its
    /// KVM can
    #[arg(long, value_name = "WHO", default_value = "auto")]
    synic: SynicOption,
    /// Who has the guest's PICs, I/O APIC and timer: kernel, or user (space), where each access to
    /// them leaves the kernel
    #[arg(long, value_name = "WHO", default_value = "kernel")]
    irqchip: IrqchipOption,
    /// What a reset of the guest leads to, a panicking kernel's with panic=-1 too: restart, at once
    /// or, if it resets again and again, after a pause; or exit, with status 2
    #[arg(long, value_name = "WHAT", default_value = "restart")]
    on_reset: ResetOption,
    /// Print what was counted when the guest has ended
    #[arg(long)]
    stats: bool,
}

/// How a run ends that somebody wanted to end, if the guest has reset itself meanwhile.
const NOT_AGAIN: &str = "the guest restarted instead of powering off, and was not started again";

/// The least memory that anything boots in.
const LEAST_MEMORY: u64 = 32 << 20;

/// A disk and where the guest sees it.
struct Attached {
    /// Its path, for messages.
    name: String,
    disk: Arc<dyn Disk>,
    place: Place,
}

/// A place for a disk, as far as the user has said it.
#[derive(Clone, Copy)]
enum Place {
    Scsi { controller: u8, lun: Option<u8> },
    Ide { channel: Option<u8>, device: Option<u8>, on_vmbus: bool },
}

/// The disks on the IDE controller, and those of them that are on the VMBus too.
#[derive(Default)]
struct IdeAttachments {
    disks: IdeDisks,
    on_vmbus: Vec<OnVmbus>,
    /// Whether the others are none. Then Linux may be told to leave ATA disks alone.
    all_on_vmbus: bool,
}

/// The path by the VMBus to a disk on the IDE controller.
struct OnVmbus {
    channel: u8,
    device: u8,
    disk: Arc<dyn Disk>,
}

impl Run {
    /// As many as the guest can have opened for it, if it opens every channel that it is offered.
    fn descriptors(&self) -> Descriptors {
        let vps = u64::from(self.cpus);
        let on_vmbus = |disk: &&DiskOption| disk.attach != Attach::Ide;
        // At most a controller for each disk.
        let controllers = self.disk.iter().filter(on_vmbus).count() as u64;
        let queues = |nic: &NicOption| match nic.attach {
            NicAttach::Netvsc => nic.queues.map_or(vps, u64::from),
            NicAttach::E1000 => 1,
        };
        let queues: u64 = self.nic.iter().map(queues).sum();
        Descriptors {
            vps,
            disks: (self.disk.len() + self.cdrom.len()) as u64,
            channels: controllers * vps + queues,
            queues: queues + self.switch.len() as u64,
        }
    }

    /// Runs the guest until it powers off.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let builtin = self.builtin.is_some();
        let descriptors = self.descriptors();
        let guest = match (self.builtin, self.kernel) {
            (Some(work), _) => {
                if let Some(error) = work::parse(&work).find_map(Result::err) {
                    bail!("--builtin: {error}");
                }
                Guest::Builtin { work }
            }
            (None, Some(kernel)) => {
                Guest::Linux { kernel, initrd: self.initrd, command_line: self.cmdline }
            }
            (None, None) => bail!("nothing to run; say --kernel FILE or --builtin WORK"),
        };
        let Size(memory) = self.memory;
        if memory < LEAST_MEMORY {
            bail!("--memory: {memory} bytes are too little to boot in; give it 512M or so");
        }
        if !memory.is_multiple_of(4096) {
            bail!("--memory: {memory} bytes is not a multiple of 4096");
        }
        descriptors.make_room()?;
        if descriptors.needs_io_uring() {
            limits::try_io_uring()?;
        }
        // From here on signals are heard, and end what has been made in an orderly way.
        let console = Console::new()?;
        let resizes = resize::listen()?;
        console.waits_for("the disks and networks to open");
        let disks = self.disk.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
        // Places are checked before anything is started.
        let mut ide = ide_attachments(&disks)?;
        for image in &self.cdrom {
            // A disc has blocks of its own, whatever a block device with an image on it has.
            let block_size = Some(SECTOR);
            let options = OpenOptions { read_only: true, block_size, ..OpenOptions::default() };
            let disc = FileDisk::open(image, &options)?;
            ide.disks.attach_cd(Arc::new(disc)).context("--cdrom")?;
        }
        if !ide.all_on_vmbus && !ide.on_vmbus.is_empty() {
            tracing::warn!(
                "with attach=ide beside attach=ide+scsi, Linux drives all IDE disks by ATA, and sees \
                 the latter once more on the VMBus"
            );
        }
        controllers(&disks, &ide, self.cpus)?;
        let networks = network::plug(&self.nic, &self.switch, self.cpus)?;
        let (vps, partition, synic) = (self.cpus, self.partition, self.synic);
        let irqchip = self.irqchip;
        let config = MachineConfig {
            guest,
            memory,
            vps,
            partition,
            synic,
            irqchip,
            ide: ide.disks.clone(),
            nics: networks.cables.iter().filter_map(Plugged::emulated).cloned().collect(),
            prefers_vmbus: ide.all_on_vmbus,
        };
        let mut output: Option<Outlet> = None;
        let mut first = true;
        let mut restarts = Restarts::default();
        let looked_at = disks.iter().map(|attached| Arc::clone(&attached.disk)).collect();
        resize::on_signal(resizes, looked_at)?;
        loop {
            if console.end_wanted() {
                bail!(if first { "stopped before the guest started" } else { NOT_AGAIN });
            }
            console.waits_for("the machine to be made");
            // A machine begins with the sizes of now.
            resize::look_at(disks.iter().map(|attached| &*attached.disk));
            let mut machine = Machine::new(&config, |stop| {
                // A file is made when all else has worked, once, and written on over restarts.
                if output.is_none() {
                    output = serial(&self.serial)?;
                }
                Ok(console.cable(output.clone(), stop))
            })?;
            if std::mem::take(&mut first) {
                // A guest that measures itself does not know in what.
                if builtin {
                    let kind = machine.kind();
                    let why = kind.without_kvm().map(|why| format!("; {why}")).unwrap_or_default();
                    say!("the guest runs in {kind}{why}");
                }
                if self.serial == SerialOption::Stdio {
                    console.listen_to_keyboard()?;
                }
            }

            let mut devices = controllers(&disks, &ide, config.vps)?;
            let mut emulated = machine.nic_counters().into_iter();
            let mut nic_counters = Vec::with_capacity(networks.cables.len());
            for cable in &networks.cables {
                if let Some(nic) = cable.synthetic() {
                    nic_counters.push(NicStatistics::Synthetic(nic.counters()));
                    devices.push(Box::new(nic) as Box<dyn Device>);
                } else {
                    nic_counters.extend(emulated.next().map(NicStatistics::Emulated));
                }
            }
            let host = Host::new(machine.memory().clone(), machine.synic(), config.vps, devices)
                .context("cannot start the VMBus")?;
            let sink = host.sink();
            let switches = networks.switches.clone();
            let statistics = Arc::new(Statistics::new(&machine, host, nic_counters, switches));
            console.waits_for("a processor, which waits for a device");
            console.attach(&machine, &statistics);
            let started = Instant::now();
            let reason = machine.run(&sink);
            let lived = started.elapsed();
            let status = machine.exit_status();
            console.detach();
            if self.stats {
                statistics.print();
            }
            // With them goes the bus: its channels are closed and their I/O has ended.
            console.waits_for(format!("the host's I/O{}", names(&disks)));
            drop(statistics);
            drop(machine);
            if let Some(output) = &output {
                console.waits_for("the serial port's output to be read");
                console.flush(output);
            }
            console.waits_for("the disks and networks to close");
            let cause = match reason {
                StopReason::PowerOff => {
                    let status = status.unwrap_or(0);
                    return Ok(u8::try_from(status).unwrap_or(u8::MAX).into());
                }
                StopReason::Reset | StopReason::TripleFault if builtin => {
                    bail!("the built-in guest broke down");
                }
                StopReason::Reset => Cause::Asked,
                StopReason::TripleFault => Cause::BrokeDown,
                StopReason::Stopped => bail!("stopped before the guest powered off"),
                StopReason::Error(what) => bail!(what),
            };
            match self.on_reset {
                ResetOption::Exit => return Ok(restart::end(cause)),
                ResetOption::Restart if restarts.wait(cause, lived, &console) => {}
                ResetOption::Restart => bail!(NOT_AGAIN),
            }
        }
    }
}

fn open(option: &DiskOption) -> anyhow::Result<Attached> {
    let options = OpenOptions {
        read_only: option.read_only,
        direct: match option.direct {
            None => Direct::Auto,
            Some(true) => Direct::On,
            Some(false) => Direct::Off,
        },
        lock: true,
        id: option.id.clone(),
        block_size: option.block_size,
        discard: option.discard,
    };
    let disk = FileDisk::open(&option.path, &options)?;
    let place = match option.attach {
        Attach::Scsi => Place::Scsi { controller: option.controller, lun: option.lun },
        Attach::Ide | Attach::IdeAndScsi => Place::Ide {
            channel: option.channel,
            device: option.device,
            on_vmbus: option.attach == Attach::IdeAndScsi,
        },
    };
    Ok(Attached { name: option.path.display().to_string(), disk: Arc::new(disk), place })
}

/// What is on the VMBus: the SCSI controllers with their disks, and IDE disks. Disks that name a LUN
/// get it, the others what is left.
fn controllers(
    disks: &[Attached],
    ide: &IdeAttachments,
    vps: u32,
) -> anyhow::Result<Vec<Box<dyn Device>>> {
    let mut builders = BTreeMap::new();
    let scsi = disks.iter().filter_map(|Attached { disk, place, .. }| match *place {
        Place::Scsi { controller, lun } => Some((disk, controller, lun)),
        Place::Ide { .. } => None,
    });
    let (named, unnamed): (Vec<_>, Vec<_>) = scsi.partition(|(_, _, lun)| lun.is_some());
    for (disk, controller, lun) in named.into_iter().chain(unnamed) {
        builders
            .entry(controller)
            .or_insert_with(|| ControllerBuilder::new(controller))
            .attach(lun, Arc::clone(disk))
            .with_context(|| format!("--disk on controller {controller}"))?;
    }
    let scsi = builders.into_values().map(|builder| builder.build(vps));
    let ide = ide.on_vmbus.iter().map(|OnVmbus { channel, device, disk }| {
        Controller::ide(*channel, *device, Arc::clone(disk), vps)
    });
    Ok(ide.chain(scsi).map(|controller| Box::new(controller) as Box<dyn Device>).collect())
}

/// The IDE disks. Those that name a place get it, the others what is left.
fn ide_attachments(disks: &[Attached]) -> anyhow::Result<IdeAttachments> {
    let mut wanted: Vec<_> = disks
        .iter()
        .filter_map(|attached| match attached.place {
            Place::Ide { channel, device, on_vmbus } => Some((attached, channel, device, on_vmbus)),
            Place::Scsi { .. } => None,
        })
        .collect();
    wanted.sort_by_key(|(_, channel, device, _)| {
        2 - u8::from(channel.is_some()) - u8::from(device.is_some())
    });
    let mut ide = IdeAttachments { all_on_vmbus: !wanted.is_empty(), ..Default::default() };
    for (Attached { name, disk, .. }, channel, device, on_vmbus) in wanted {
        if on_vmbus {
            let [ata, scsi] = paths::split(disk, name, ["IDE", "the VMBus"]);
            let (channel, device) = ide.disks.attach(channel, device, ata).context("--disk")?;
            ide.on_vmbus.push(OnVmbus { channel, device, disk: scsi });
        } else {
            ide.disks.attach(channel, device, Arc::clone(disk)).context("--disk")?;
            ide.all_on_vmbus = false;
        }
    }
    Ok(ide)
}

/// Whose I/O it is, as far as it is known.
fn names(disks: &[Attached]) -> String {
    let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
    if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) }
}

/// Where the serial port's output goes, if anywhere.
fn serial(option: &SerialOption) -> anyhow::Result<Option<Outlet>> {
    Ok(match option {
        SerialOption::Stdio => Some(console::standard_output()?),
        SerialOption::Null => None,
        SerialOption::File(path) => {
            let file = File::create(path).with_context(|| {
                format!("cannot write the serial port's output to {}", path.display())
            })?;
            Some(console::output(file.into())?)
        }
    })
}
