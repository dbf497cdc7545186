//! DMA: the bus master's registers, by which a guest says where in its memory a command's data lies, and
//! starts and stops the transfer.

use super::{Channel, Kind, Phase, Transfer, Work};
use crate::ide::bits::master;

/// The bus master's registers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BusMaster {
    pub(super) command: u8,
    pub(super) status: u8,
    pub(super) table: u32,
    /// The function may access memory.
    allowed: bool,
}

impl Channel {
    /// Starts the transfer when drive and bus master are both ready for it.
    pub(super) fn run_master(&mut self) {
        let running = self.master.command & master::START != 0;
        let to_memory = self.master.command & master::TO_MEMORY != 0;
        let reads = matches!(self.transfer.kind, Kind::ReadDma | Kind::Packet { .. });
        // A master that runs the other way waits for a drive that never comes.
        if self.phase != Phase::Armed || !running || !self.master.allowed || to_memory != reads {
            return;
        }
        let table = self.master.table;
        let Transfer { kind, fua, .. } = self.transfer;
        let (offset, len) = self.take_sectors(u32::MAX);
        self.order(match kind {
            Kind::Packet { .. } if self.sent > 0 => Work::Send { len: self.sent, table },
            Kind::ReadDma | Kind::Packet { .. } => Work::ReadDma { offset, len, table },
            Kind::WriteDma => Work::WriteDma { offset, len, table, fua },
            _ => Work::Trim { len, table },
        });
    }

    /// Reads a bus-master register, by its offset in the channel's eight.
    pub(in crate::ide) fn read_master(&self, offset: u8) -> u8 {
        match offset {
            0 => self.master.command,
            2 => self.master.status,
            4..=7 => self.master.table.to_le_bytes()[usize::from(offset - 4)],
            _ => 0,
        }
    }

    /// Whether the function may access memory from now on. What was started before is done as soon as
    /// it may.
    pub(in crate::ide) fn allow_master(&mut self, allowed: bool) {
        self.master.allowed = allowed;
        self.run_master();
    }

    /// Writes a bus-master register. `allowed` if the function may access memory.
    pub(in crate::ide) fn write_master(&mut self, offset: u8, value: u8, allowed: bool) {
        self.master.allowed = allowed;
        match offset {
            0 => {
                let before = self.master.command;
                self.master.command = value & (master::START | master::TO_MEMORY);
                if value & master::START == 0 {
                    self.master.status &= !master::ACTIVE;
                } else if before & master::START == 0 {
                    self.master.status |= master::ACTIVE;
                    self.run_master();
                }
            }
            2 => {
                let cleared = value & (master::INTERRUPT | master::ERROR);
                let status = self.master.status & !cleared & !master::DRIVES_CAPABLE;
                self.master.status = status | value & master::DRIVES_CAPABLE;
            }
            4..=7 => {
                let mut bytes = self.master.table.to_le_bytes();
                bytes[usize::from(offset - 4)] = value;
                self.master.table = u32::from_le_bytes(bytes) & !3;
            }
            _ => {}
        }
    }
}
