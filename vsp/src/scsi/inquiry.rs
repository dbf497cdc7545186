//! INQUIRY: who the disk is, and its vital product data pages.

use super::cdb::Cdb;
use super::provisioning::MAX_DESCRIPTORS;
use super::sense::Sense;
use super::unit::{LogicalUnit, data_in};
use super::{Action, Command, Scratch};

/// T10 vendor identification, as Hyper-V's disks have it. Linux's storvsc looks for it.
const VENDOR: &[u8; 8] = b"Msft    ";
const PRODUCT: &[u8; 16] = b"Virtual Disk    ";
const REVISION: &[u8; 4] = b"1.0 ";

/// SPC-3.
const VERSION: u8 = 0x05;

/// Peripheral qualifier 3, device type 0x1f: no unit can be here.
const NO_UNIT: u8 = 0x7f;

/// A direct-access block device.
const DISK: u8 = 0x00;

/// Vital product data pages.
mod page {
    pub(super) const SUPPORTED: u8 = 0x00;
    pub(super) const SERIAL: u8 = 0x80;
    pub(super) const IDENTIFICATION: u8 = 0x83;
    pub(super) const BLOCK_LIMITS: u8 = 0xb0;
    pub(super) const CHARACTERISTICS: u8 = 0xb1;
    pub(super) const PROVISIONING: u8 = 0xb2;
}

/// A VPD page as it is written: type and code, two bytes of length, then the rest.
struct Page {
    bytes: [u8; 256],
    len: usize,
}

impl Page {
    const HEADER: usize = 4;

    fn new(code: u8) -> Self {
        let mut bytes = [0; 256];
        bytes[..2].copy_from_slice(&[DISK, code]);
        Self { bytes, len: Self::HEADER }
    }

    /// What does not fit is left out; nothing that is put here comes near it.
    fn put(&mut self, data: &[u8]) {
        if let Some(room) = self.bytes.get_mut(self.len..self.len + data.len()) {
            room.copy_from_slice(data);
            self.len += data.len();
        }
    }

    fn finish(&mut self) -> &[u8] {
        let len = (self.len - Self::HEADER) as u16;
        self.bytes[2..4].copy_from_slice(&len.to_be_bytes());
        &self.bytes[..self.len]
    }
}

impl LogicalUnit {
    pub(super) fn inquiry(
        &self,
        command: &Command<'_>,
        cdb: &Cdb,
        scratch: &mut Scratch,
    ) -> Result<Action<'static>, Sense> {
        let (evpd, code) = (cdb.u8::<1>() & 0x01 != 0, cdb.u8::<2>());
        let allocation_length = usize::from(cdb.u16::<3>());
        let answer = |data: &[u8], scratch: &mut Scratch| {
            Ok(data_in(command, data, allocation_length, scratch))
        };
        if !evpd {
            return match code {
                0 => answer(&standard(), scratch),
                _ => Err(Sense::invalid_cdb_byte(2)),
            };
        }
        let mut page = Page::new(code);
        match code {
            page::SUPPORTED => page.put(&[
                page::SUPPORTED,
                page::SERIAL,
                page::IDENTIFICATION,
                page::BLOCK_LIMITS,
                page::CHARACTERISTICS,
                page::PROVISIONING,
            ]),
            page::SERIAL => page.put(&self.serial),
            page::IDENTIFICATION => self.identification(&mut page),
            page::BLOCK_LIMITS => page.put(&self.block_limits()),
            page::CHARACTERISTICS => page.put(&self.characteristics()),
            page::PROVISIONING => page.put(&self.provisioning()),
            _ => return Err(Sense::invalid_cdb_byte(2)),
        }
        answer(page.finish(), scratch)
    }

    /// Two designators of the logical unit: a number, and vendor with serial number in words.
    fn identification(&self, page: &mut Page) {
        // Binary, NAA (SPC-4 tables 623 and 625).
        page.put(&[0x01, 0x03, 0, self.naa.len() as u8]);
        page.put(&self.naa);
        // ASCII, T10 vendor identification.
        page.put(&[0x02, 0x01, 0, (VENDOR.len() + self.serial.len()) as u8]);
        page.put(VENDOR);
        page.put(&self.serial);
    }

    /// SBC-3 table 189, from byte 4 on.
    fn block_limits(&self) -> [u8; 60] {
        let block = self.geometry.logical_block;
        let in_blocks = |bytes: u32| (bytes / block).max(1);
        let mut data = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            data[at - 4..at - 4 + bytes.len()].copy_from_slice(bytes);
        };
        // WSNZ: a WRITE SAME of 0 blocks is not one of all the rest.
        put(4, &[0x01]);
        let granularity = u16::try_from(in_blocks(self.geometry.physical_block));
        put(6, &granularity.unwrap_or(u16::MAX).to_be_bytes());
        put(8, &self.max_transfer_blocks.to_be_bytes());
        put(12, &self.max_transfer_blocks.to_be_bytes());
        if self.geometry.discard {
            put(20, &self.max_unmap_blocks().to_be_bytes());
            put(24, &(MAX_DESCRIPTORS as u32).to_be_bytes());
            put(28, &in_blocks(self.geometry.discard_granularity).to_be_bytes());
            // UGAVALID: the units start at LBA 0.
            put(32, &0x8000_0000_u32.to_be_bytes());
        }
        put(36, &u64::from(self.max_write_same_blocks()).to_be_bytes());
        data
    }

    /// SBC-3 table 193, from byte 4 on.
    fn characteristics(&self) -> [u8; 60] {
        let mut data = [0; 60];
        // Medium rotation rate: 1 is none, 0 is not told.
        data[1] = u8::from(!self.geometry.rotational);
        data
    }

    /// SBC-3 table 202, from byte 4 on.
    fn provisioning(&self) -> [u8; 4] {
        /// LBPU, LBPWS, LBPWS10: it can be unmapped by UNMAP and by either WRITE SAME.
        const UNMAP_COMMANDS: u8 = 0xe0;
        const LBPRZ: u8 = 0x04;
        const THIN: u8 = 0x02;
        match (self.geometry.discard, self.geometry.discard_zeroes) {
            (false, _) => [0; 4],
            (true, false) => [0, UNMAP_COMMANDS, THIN, 0],
            (true, true) => [0, UNMAP_COMMANDS | LBPRZ, THIN, 0],
        }
    }
}

/// Standard INQUIRY data (SPC-4 table 173).
fn standard() -> [u8; 36] {
    let mut data = [0; 36];
    data[0] = DISK;
    data[2] = VERSION;
    // Response data format.
    data[3] = 0x02;
    data[4] = (data.len() - 5) as u8;
    // CMDQUE: several commands at a time.
    data[7] = 0x02;
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].copy_from_slice(PRODUCT);
    data[32..36].copy_from_slice(REVISION);
    data
}

/// The answer where there is no unit.
pub(super) fn absent(command: &Command<'_>, cdb: &Cdb, scratch: &mut Scratch) -> Action<'static> {
    let allocation_length = usize::from(cdb.u16::<3>());
    if cdb.u8::<1>() & 0x01 != 0 {
        return data_in(command, &[NO_UNIT, cdb.u8::<2>(), 0, 0], allocation_length, scratch);
    }
    let mut data = standard();
    data[0] = NO_UNIT;
    data_in(command, &data, allocation_length, scratch)
}
