//! IDE channels, driven wrongly: commands that are cut short, given to busy drives, or none, and tables
//! of memory regions that make no sense.

use core::sync::atomic::Ordering;

use super::Silence;
use super::arena::{Arena, DATA};
use super::chaos::Chaos;
use super::wire::Wire;
use crate::memory::PAGE;
use crate::pci;
use crate::platform::{Platform, PortWrite};

/// Where the channels are: command block and control block.
const PLACES: [(u16, u16); 2] = [(0x1f0, 0x3f6), (0x170, 0x376)];
const MASTER_PORTS: u16 = 8;

const BSY: u8 = 0x80;
const SRST: u8 = 0x04;
/// Nobody on the cable pulls it down.
const NOTHING: u8 = 0xff;

/// How long a drive may take to come out of its reset.
const PATIENCE: u64 = 30_000_000_000;

/// Commands of disks and CD-ROM drives. One that puts the drive to sleep is among them.
const COMMANDS: [u8; 38] = [
    0x06, 0x08, 0x10, 0x20, 0x24, 0x25, 0x29, 0x2f, 0x30, 0x34, 0x35, 0x39, 0x3d, 0x40, 0x42, 0x70,
    0x90, 0x91, 0xa0, 0xa1, 0xb0, 0xc4, 0xc5, 0xc6, 0xc8, 0xc8, 0xca, 0xca, 0xe0, 0xe1, 0xe3, 0xe5,
    0xe6, 0xe7, 0xea, 0xec, 0xef, 0x00,
];

/// What there is, found once.
#[derive(Clone, Copy)]
pub(super) struct Controller {
    /// The bus master's ports.
    master: u16,
}

/// The controller, if the machine has one.
pub(super) fn find<P: Platform>(platform: &P) -> Option<Controller> {
    let function = pci::find(platform, 0x8086, 0x7111).next()?;
    function.enable(platform);
    // Nobody waits for them, but they are not to be taken for exceptions.
    [14, 15].into_iter().for_each(|irq| platform.listen(irq));
    Some(Controller { master: function.io_base(platform, 4)? })
}

/// Drives one of the channels.
pub(super) fn visit<P: Platform>(
    wire: &mut Wire<'_, P>,
    chaos: &mut Chaos,
    arena: &Arena<'_>,
    controller: Controller,
) {
    let [first, second] = PLACES;
    let number = chaos.below(2) as u16;
    let (command, control) = if number == 0 { first } else { second };
    let channel = Channel { command, control, master: controller.master + MASTER_PORTS * number };
    if wire.platform.read_8(control) == NOTHING {
        return;
    }
    for _ in 0..chaos.below(12) {
        match chaos.below(12) {
            0..5 => channel.dma(wire, chaos, arena),
            5..8 => channel.order(wire, chaos),
            8 | 9 => channel.data(wire, chaos, arena),
            10 => {
                // Resets end what is under way, and are themselves ended or not.
                let bits = chaos.any() as u8;
                channel.write(wire, control, chaos.or_odd(SRST.into(), 40) as u8);
                channel.write(wire, control, if chaos.percent(60) { 0 } else { bits });
            }
            _ => {
                for _ in 0..chaos.below(10) {
                    let port = chaos.of(control, &[command, command, channel.master]);
                    let port = port + chaos.below(8) as u16 * u16::from(port != control);
                    // A table's address is not given by halves.
                    if port < channel.master || port - channel.master < 3 {
                        channel.write(wire, port, chaos.any() as u8);
                    }
                }
            }
        }
        if chaos.percent(50) {
            channel.wait(wire, chaos);
        }
    }
}

/// Resets both channels, as whoever comes next would; what they do to that is the test.
pub(super) fn rest<P: Platform>(
    wire: &mut Wire<'_, P>,
    controller: Controller,
) -> Result<(), Silence> {
    let platform = wire.platform;
    for ((command, control), number) in PLACES.into_iter().zip(0..) {
        if platform.read_8(control) == NOTHING {
            continue;
        }
        let master = controller.master + MASTER_PORTS * u16::from(number);
        platform.write_8(&[
            PortWrite { port: master, value: 0 },
            PortWrite { port: control, value: SRST },
            PortWrite { port: control, value: 0 },
        ]);
        let until = platform.now().saturating_add(PATIENCE);
        while platform.read_8(control) & BSY != 0 {
            if platform.now() > until {
                return Err(Silence::Ide(number));
            }
        }
        // Lets go of the interrupts, and of the bus master's bits.
        platform.read_8(command + 7);
        platform.write_8(&[PortWrite { port: master + 2, value: 6 }]);
        wire.counts.accesses += 7;
    }
    Ok(())
}

struct Channel {
    command: u16,
    control: u16,
    master: u16,
}

impl Channel {
    fn write<P: Platform>(&self, wire: &mut Wire<'_, P>, port: u16, value: u8) {
        wire.counts.accesses += 1;
        wire.platform.write_8(&[PortWrite { port, value }]);
    }

    /// Fills the registers and gives a command, whatever the drive is doing.
    fn order<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos) {
        let [first, others @ ..] = COMMANDS;
        let code = chaos.of(first, &others);
        self.command(wire, chaos, code);
    }

    fn command<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos, code: u8) {
        let block = chaos.below(4096);
        let block = chaos.or_odd(block, 10);
        let [a, b, c, d, e, f, ..] = block.to_le_bytes();
        let count = chaos.below(33) as u16;
        let [low, high] = (chaos.or_odd(count.into(), 10) as u16).to_le_bytes();
        let drive = (chaos.below(2) as u8) << 4;
        let device = 0xe0 | drive | if chaos.percent(10) { d & 0xf } else { 0 };
        let feature = chaos.of(0, &[1, 2, 3, 0xd0, 0xd5, 0xd8, 0xda, 0xaa]);
        let values = [
            (6, chaos.or_odd(device.into(), 5) as u8),
            (2, high),
            (3, d),
            (4, e),
            (5, f),
            (1, chaos.or_odd(feature, 10) as u8),
            (2, low),
            (3, a),
            (4, b),
            (5, c),
            (7, chaos.or_odd(code.into(), 2) as u8),
        ];
        let writes =
            values.map(|(register, value)| PortWrite { port: self.command + register, value });
        // All in a row, as drivers do, or one by one.
        if chaos.percent(80) {
            wire.counts.accesses += writes.len() as u64;
            wire.platform.write_8(&writes);
        } else {
            writes.into_iter().for_each(|PortWrite { port, value }| self.write(wire, port, value));
        }
    }

    /// A transfer by the bus master, and perhaps its untimely end.
    fn dma<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos, arena: &Arena<'_>) {
        const TABLE: u16 = 4;
        // Behind a table of the longest kind there is still some of ours.
        let regions = arena.regions();
        let start = chaos.count(PAGE * 16 / 8);
        for word in regions.words().iter().skip(start).take(1 + chaos.count(40)) {
            word.store(arena.region(chaos), Ordering::Relaxed);
        }
        let table = regions.first() * PAGE as u64 + start as u64 * 8;
        let table = if chaos.percent(3) { 0xf000_0000 } else { table as u32 };
        let to_memory = chaos.percent(50);
        let code = match (to_memory, chaos.below(2)) {
            (true, 0) => 0xc8,
            (true, _) => 0x25,
            (false, 0) => 0xca,
            (false, _) => 0x35,
        };
        let direction = if to_memory != chaos.percent(3) { 8 } else { 0 };
        wire.counts.accesses += 1;
        wire.platform.write_32(self.master + TABLE, table);
        self.write(wire, self.master, direction);
        self.command(wire, chaos, code);
        self.write(wire, self.master, direction | 1);
        match chaos.below(6) {
            0 => self.write(wire, self.master, 0),
            1 => self.write(wire, self.control, SRST),
            2 => self.order(wire, chaos),
            _ => {}
        }
    }

    /// Moves data, whether the drive has any or not.
    fn data<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos, arena: &Arena<'_>) {
        let start = chaos.count(DATA * PAGE / 8);
        let count = chaos.of(64, &[1, 6, 63, 65, 512]);
        let words = arena.data.words().get(start..).unwrap_or_default();
        let words = words.get(..count).unwrap_or(words);
        wire.counts.accesses += count as u64;
        if chaos.percent(50) {
            wire.platform.read_string(self.command, words);
        } else {
            // Each unit that is written may be an exit.
            wire.platform.write_string(self.command, words.get(..64).unwrap_or(words));
        }
    }

    /// Waits a moment for the drive, or reads what it thinks.
    fn wait<P: Platform>(&self, wire: &mut Wire<'_, P>, chaos: &mut Chaos) {
        for _ in 0..chaos.below(40) {
            wire.counts.accesses += 1;
            if wire.platform.read_8(self.control) & BSY == 0 {
                break;
            }
        }
        if chaos.percent(50) {
            wire.counts.accesses += 2;
            wire.platform.read_8(self.command + chaos.below(8) as u16);
            wire.platform.read_8(self.master + 2);
        }
    }
}
