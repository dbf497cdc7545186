//! MODE SENSE: the caching and control mode pages. They cannot be changed, so there is no MODE
//! SELECT.

use super::cdb::Cdb;
use super::sense::Sense;
use super::unit::{LogicalUnit, data_in};
use super::{Action, Command, Scratch};

/// Mode pages (SPC-4 table 415, SBC-3 table 168).
mod page {
    pub(super) const CACHING: u8 = 0x08;
    pub(super) const CONTROL: u8 = 0x0a;
    pub(super) const ALL: u8 = 0x3f;
}

/// Which of its values a mode page is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Control {
    Current,
    /// Ones where it can be changed.
    Changeable,
    Default,
}

const CACHING_LEN: usize = 20;
const CONTROL_LEN: usize = 12;
const HEADER_6: usize = 4;
const HEADER_10: usize = 8;

/// A header of either size, the pages behind it, and how long both are.
type ModeData = ([u8; HEADER_10 + CACHING_LEN + CONTROL_LEN], usize);

impl LogicalUnit {
    pub(super) fn mode_sense_6(
        &self,
        command: &Command<'_>,
        cdb: &Cdb,
        scratch: &mut Scratch,
    ) -> Result<Action<'static>, Sense> {
        let (mut data, len) = self.mode_data(cdb, HEADER_6)?;
        // The length does not count itself.
        data[0] = (len - 1) as u8;
        data[2] = self.device_specific();
        Ok(data_in(command, &data[..len], usize::from(cdb.u8::<4>()), scratch))
    }

    pub(super) fn mode_sense_10(
        &self,
        command: &Command<'_>,
        cdb: &Cdb,
        scratch: &mut Scratch,
    ) -> Result<Action<'static>, Sense> {
        let (mut data, len) = self.mode_data(cdb, HEADER_10)?;
        data[..2].copy_from_slice(&((len - 2) as u16).to_be_bytes());
        data[3] = self.device_specific();
        Ok(data_in(command, &data[..len], usize::from(cdb.u16::<7>()), scratch))
    }

    /// WP and DPOFUA.
    fn device_specific(&self) -> u8 {
        u8::from(self.geometry.read_only) << 7 | 0x10
    }

    /// The pages a CDB asks for, behind a header that is left blank. No block descriptors: a device
    /// may return none, and READ CAPACITY says it better.
    fn mode_data(&self, cdb: &Cdb, header: usize) -> Result<ModeData, Sense> {
        let (code, subpage) = (cdb.u8::<2>() & 0x3f, cdb.u8::<3>());
        let control = match cdb.u8::<2>() >> 6 {
            0 => Control::Current,
            1 => Control::Changeable,
            2 => Control::Default,
            _ => return Err(Sense::SAVING_NOT_SUPPORTED),
        };
        // 0xff is a page with all its subpages.
        if subpage != 0 && subpage != 0xff {
            return Err(Sense::invalid_cdb_byte(3));
        }
        let mut data = [0; _];
        let mut len = header;
        let mut put = |page: &[u8]| {
            if let Some(room) = data.get_mut(len..len + page.len()) {
                room.copy_from_slice(page);
                len += page.len();
            }
        };
        if matches!(code, page::CACHING | page::ALL) {
            put(&self.caching(control));
        }
        if matches!(code, page::CONTROL | page::ALL) {
            put(&control_page(control));
        }
        if len == header { Err(Sense::invalid_cdb_byte(2)) } else { Ok((data, len)) }
    }

    /// WCE: what is written may be lost until the cache is synchronized.
    fn caching(&self, control: Control) -> [u8; CACHING_LEN] {
        let mut page = [0; CACHING_LEN];
        page[0] = page::CACHING;
        page[1] = (CACHING_LEN - 2) as u8;
        if control != Control::Changeable && !self.geometry.read_only {
            page[2] = 0x04;
        }
        page
    }
}

/// Commands may be reordered at will; sense data has the fixed format.
fn control_page(control: Control) -> [u8; CONTROL_LEN] {
    let mut page = [0; CONTROL_LEN];
    page[0] = page::CONTROL;
    page[1] = (CONTROL_LEN - 2) as u8;
    if control != Control::Changeable {
        // QUEUE ALGORITHM MODIFIER.
        page[3] = 0x10;
    }
    page
}
