//! What the commands of ATA and of a CD-ROM drive ask of a channel: those that need the host become
//! jobs or transfers, the others are answered at once.

use backends::block::SECTOR;

use super::{Channel, Kind, MAX_DMA_SECTORS, Phase, Transfer, Work};
use crate::ide::bits::{command, error, feature, reason, status};
use crate::ide::cd::{self, Answer};
use crate::ide::drive::{Drive, Form, MAX_MULTIPLE, MAX_TRIM_BLOCKS, Pair};
use crate::ide::log;

impl Channel {
    /// A command for the selected drive.
    pub(super) fn command(&mut self, code: u8) {
        if code == command::EXECUTE_DIAGNOSTIC {
            // Both drives carry it out, and drive 0 answers.
            self.restart();
            self.interrupt = self.drives.iter().any(Option::is_some);
            return;
        }
        let selected = self.drives.get(self.selected()).and_then(Option::as_ref);
        if code == command::DEVICE_RESET && selected.is_some_and(|drive| drive.cd.is_some()) {
            return self.restart_device();
        }
        self.active = self.selected();
        let register = self.device;
        self.acknowledge();
        let Some(drive) = self.drive_mut() else {
            self.phase = Phase::Idle;
            return; // nobody heard it
        };
        drive.error = 0;
        drive.status = status::DRDY | status::DSC;
        // A transfer that was not finished is given up.
        self.phase = Phase::Idle;
        self.transfer = Transfer::NONE;
        if self.cd().is_some() {
            return self.packet_device(code);
        }
        if self.sectors(code, register) {
            return;
        }
        match code {
            command::IDENTIFY_DEVICE => self.page(Drive::identify),
            command::SMART => self.smart(),
            command::READ_LOG_EXT => {
                let Some(Drive { lba: [address, page, _], count, .. }) = self.drive_mut() else {
                    return;
                };
                let word = |pair: &Pair| u16::from_le_bytes([pair.current, pair.previous]);
                let (address, count) = (address.current, word(count));
                let page = word(page);
                self.log(address, page, count);
            }
            command::SET_FEATURES => self.set_features(),
            command::DATA_SET_MANAGEMENT => self.data_set_management(),
            command::FLUSH_CACHE | command::FLUSH_CACHE_EXT => self.order(Work::Flush),
            command::SET_MULTIPLE => self.set_multiple(),
            command::INITIALIZE_PARAMETERS => {
                let Some(drive) = self.drive_mut() else { return };
                let track = drive.count.current;
                if track == 0 {
                    return self.abort(error::ABRT);
                }
                drive.set_geometry((register & 0x0f) + 1, track);
                self.succeed();
            }
            command::CHECK_POWER_MODE => {
                const ACTIVE: u8 = 0xff;
                if let Some(drive) = self.drive_mut() {
                    drive.count.set(ACTIVE);
                }
                self.succeed();
            }
            command::STANDBY_IMMEDIATE
            | command::IDLE_IMMEDIATE
            | command::STANDBY
            | command::IDLE
            | command::SLEEP
            | command::SEEK
            | command::RECALIBRATE..=0x1f => self.succeed(),
            _ => self.abort(error::ABRT),
        }
    }

    /// Starts a command that moves sectors. Returns whether `code` is one.
    fn sectors(&mut self, code: u8, register: u8) -> bool {
        let Some(drive) = self.drive_mut() else { return false };
        let one = SECTOR as usize;
        let several = usize::from(drive.multiple) * one;
        let (kind, form) = match code {
            command::READ_SECTORS | command::READ_SECTORS_NO_RETRY => {
                (Kind::Read { block: one }, Form::Short)
            }
            command::READ_SECTORS_EXT => (Kind::Read { block: one }, Form::Long),
            command::READ_MULTIPLE => (Kind::Read { block: several }, Form::Short),
            command::READ_MULTIPLE_EXT => (Kind::Read { block: several }, Form::Long),
            command::WRITE_SECTORS | command::WRITE_SECTORS_NO_RETRY => {
                (Kind::Write { block: one }, Form::Short)
            }
            command::WRITE_SECTORS_EXT => (Kind::Write { block: one }, Form::Long),
            command::WRITE_MULTIPLE => (Kind::Write { block: several }, Form::Short),
            command::WRITE_MULTIPLE_EXT => (Kind::Write { block: several }, Form::Long),
            command::READ_VERIFY | command::READ_VERIFY_NO_RETRY => (Kind::Verify, Form::Short),
            command::READ_VERIFY_EXT => (Kind::Verify, Form::Long),
            command::READ_DMA | command::READ_DMA_NO_RETRY => (Kind::ReadDma, Form::Short),
            command::READ_DMA_EXT => (Kind::ReadDma, Form::Long),
            command::WRITE_DMA | command::WRITE_DMA_NO_RETRY => (Kind::WriteDma, Form::Short),
            command::WRITE_DMA_EXT | command::WRITE_DMA_FUA_EXT => (Kind::WriteDma, Form::Long),
            _ => return false,
        };
        let writes = matches!(kind, Kind::Write { .. } | Kind::WriteDma);
        let refused = match kind {
            Kind::Read { block: 0 } | Kind::Write { block: 0 } => true,
            _ => writes && drive.read_only,
        };
        if refused {
            self.abort(error::ABRT);
            return true;
        }
        let count = drive.sector_count(form);
        let first = drive.address(form, register);
        let first = first.filter(|first| {
            first.checked_add(u64::from(count)).is_some_and(|end| end <= drive.sectors)
        });
        let fua = !drive.write_cache || code == command::WRITE_DMA_FUA_EXT;
        let Some(first) = first else {
            self.abort(error::IDNF);
            return true;
        };
        self.transfer = Transfer { kind, form, next: first, left: count, start: first, fua };
        match kind {
            Kind::Read { .. } | Kind::Verify => self.order_sectors(),
            Kind::Write { .. } => self.ask_for_sectors(), // the first block without an interrupt
            _ => self.arm(),
        }
        true
    }

    /// A DMA command waits for the bus master, or goes on at once if it runs already.
    fn arm(&mut self) {
        self.phase = Phase::Armed;
        self.run_master();
    }

    /// A command for a packet device.
    fn packet_device(&mut self, code: u8) {
        let Some(drive) = self.drive_mut() else { return };
        match code {
            command::PACKET => {
                let limit = [drive.lba[1].current, drive.lba[2].current];
                let limit = usize::from(u16::from_le_bytes(limit));
                // Words are moved; none at all stands for the most.
                let limit = if limit < 2 { 0xfffe } else { limit & !1 };
                let dma = drive.features.current & feature::PACKET_DMA != 0;
                drive.count.set(reason::COMMAND);
                self.transfer.kind = Kind::Packet { limit, dma };
                self.phase = Phase::Data { write: true, at: 0, block: cd::CDB, end: cd::CDB };
            }
            command::IDENTIFY_PACKET_DEVICE => self.page(Drive::identify),
            command::SET_FEATURES => self.set_features(),
            command::STANDBY_IMMEDIATE | command::IDLE_IMMEDIATE => self.succeed(),
            command::CHECK_POWER_MODE => {
                drive.count.set(0xff);
                self.succeed();
            }
            command::IDENTIFY_DEVICE | command::READ_SECTORS => {
                // So that whoever takes it for a disk finds out.
                drive.put_signature();
                self.abort(error::ABRT);
            }
            _ => self.abort(error::ABRT),
        }
    }

    /// The command block of a PACKET command is in the buffer.
    pub(super) fn packet(&mut self) {
        let Kind::Packet { dma, .. } = self.transfer.kind else { return };
        let Some(buffer) = self.buffer.as_deref_mut() else { return };
        let Some(Some(cd)) = self
            .drives
            .get_mut(self.active)
            .map(|drive| drive.as_mut().and_then(|drive| drive.cd.as_mut()))
        else {
            return;
        };
        let Some(block) = buffer.first_chunk::<{ cd::CDB }>().copied() else { return };
        let transfer = &mut self.transfer;
        (transfer.next, transfer.left, self.sent) = (0, 0, 0);
        match cd.command(&block, buffer) {
            Answer::Done => self.succeed(),
            Answer::Failed => self.check_condition(),
            Answer::Data(len) if dma => {
                self.sent = len as u32;
                self.arm();
            }
            Answer::Data(len) => self.offer(len),
            Answer::Read { first, count } => {
                const SECTORS: u32 = cd::BLOCK / SECTOR;
                transfer.next = u64::from(first) * u64::from(SECTORS);
                transfer.left = count.saturating_mul(SECTORS);
                if !dma {
                    self.order_sectors();
                } else if transfer.left <= MAX_DMA_SECTORS {
                    self.arm();
                } else {
                    cd.host_failed(false);
                    self.check_condition();
                }
            }
        }
    }

    /// Ends a PACKET command that has failed: the error register has the sense key.
    pub(super) fn check_condition(&mut self) {
        let key = self.cd().map_or(0, |cd| cd.key());
        self.abort(key << 4 | error::ABRT);
    }

    /// Lets the guest read a page of 512 bytes.
    fn page(&mut self, fill: impl FnOnce(&Drive, &mut [u8; 512])) {
        let drive = self.drives.get(self.active).and_then(Option::as_ref);
        let page = self.buffer.as_deref_mut().and_then(<[u8]>::first_chunk_mut);
        if let (Some(drive), Some(page)) = (drive, page) {
            fill(drive, page);
            self.offer(512);
        }
    }

    /// Lets the guest read pages of a log.
    fn log(&mut self, address: u8, first: u16, count: u16) {
        let drive = self.drives.get(self.active).and_then(Option::as_ref);
        match drive
            .zip(self.buffer.as_deref_mut())
            .and_then(|(drive, buffer)| log::read(drive, address, first, count, buffer))
        {
            Some(len) => self.offer(len),
            None => self.abort(error::ABRT),
        }
    }

    fn set_multiple(&mut self) {
        let Some(drive) = self.drive_mut() else { return };
        let count = drive.count.current;
        if count != 0 && (!count.is_power_of_two() || count > MAX_MULTIPLE) {
            return self.abort(error::ABRT);
        }
        drive.multiple = count;
        self.succeed();
    }

    fn set_features(&mut self) {
        let Some(drive) = self.drive_mut() else { return };
        let known = match drive.features.current {
            feature::TRANSFER_MODE => drive.set_mode(drive.count.current),
            feature::ENABLE_WRITE_CACHE => {
                drive.write_cache = true;
                true
            }
            feature::DISABLE_WRITE_CACHE => {
                drive.write_cache = false;
                // What is cached has to go first.
                return self.order(Work::Flush);
            }
            feature::ENABLE_LOOK_AHEAD => {
                drive.look_ahead = true;
                true
            }
            feature::DISABLE_LOOK_AHEAD => {
                drive.look_ahead = false;
                true
            }
            feature::KEEP_SETTINGS | feature::REVERT_SETTINGS => true,
            _ => false,
        };
        if known { self.succeed() } else { self.abort(error::ABRT) }
    }

    fn smart(&mut self) {
        // Written to the address registers with every sub-command, and given back as "well".
        const KEY: (u8, u8) = (0x4f, 0xc2);
        let Some(drive) = self.drive_mut() else { return };
        let keyed = (drive.lba[1].current, drive.lba[2].current) == KEY;
        let sub_command = drive.features.current;
        if !keyed || (!drive.smart && sub_command != feature::SMART_ENABLE) {
            return self.abort(error::ABRT);
        }
        match sub_command {
            feature::SMART_ENABLE => drive.smart = true,
            feature::SMART_DISABLE => drive.smart = false,
            feature::SMART_AUTOSAVE | feature::SMART_RETURN_STATUS => {}
            feature::SMART_READ_LOG => {
                let (address, count) = (drive.lba[0].current, drive.count.current);
                return self.log(address, 0, count.into());
            }
            feature::SMART_READ_DATA | feature::SMART_READ_THRESHOLDS => {
                return self.page(|_, page| Drive::smart_data(page));
            }
            _ => return self.abort(error::ABRT),
        }
        self.succeed();
    }

    fn data_set_management(&mut self) {
        let Some(drive) = self.drive_mut() else { return };
        let blocks = drive.sector_count(Form::Long);
        let trim = drive.features.current == feature::TRIM;
        if !trim || !drive.trims() || blocks > u32::from(MAX_TRIM_BLOCKS) {
            return self.abort(error::ABRT);
        }
        self.transfer.kind = Kind::Trim;
        self.transfer.left = blocks;
        self.arm();
    }
}
