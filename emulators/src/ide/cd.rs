//! A CD-ROM drive behind PACKET commands: the part of MMC (Multi-Media Commands 5, T10/1675-D) and
//! SPC that guests use to read a disc, to learn about it, and to eject it.
//!
//! Again without I/O: a command block goes in, and what is to be sent or read comes out.

/// Bytes in a block of a data disc.
pub(super) const BLOCK: u32 = 2048;

/// Bytes in a command block.
pub(super) const CDB: usize = 12;

/// What a command comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is done.
    Done,
    /// So many bytes of the buffer are to be sent.
    Data(usize),
    /// Blocks of the disc are to be sent, at least one.
    Read { first: u32, count: u32 },
    /// It failed; [`Cd::key`] says how, and REQUEST SENSE says more.
    Failed,
}

/// Sense key, additional code and its qualifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sense(u8, u8, u8);

impl Sense {
    const NO_MEDIUM: Self = Self(2, 0x3a, 0);
    const READ_ERROR: Self = Self(3, 0x11, 0);
    const INVALID_COMMAND: Self = Self(5, 0x20, 0);
    const OUT_OF_RANGE: Self = Self(5, 0x21, 0);
    const INVALID_FIELD: Self = Self(5, 0x24, 0);
    const REMOVAL_PREVENTED: Self = Self(5, 0x53, 2);
    const MEDIUM_CHANGED: Self = Self(6, 0x28, 0);
    const TRANSFER_FAILED: Self = Self(0xb, 0x4b, 0);
}

/// A drive with its disc.
#[derive(Debug)]
pub(super) struct Cd {
    blocks: u32,
    /// Whether the disc is in it, and whether the guest has to be told that it has come.
    loaded: bool,
    changed: bool,
    locked: bool,
    sense: Sense,
}

mod op {
    pub(super) const TEST_UNIT_READY: u8 = 0x00;
    pub(super) const REQUEST_SENSE: u8 = 0x03;
    pub(super) const INQUIRY: u8 = 0x12;
    pub(super) const START_STOP_UNIT: u8 = 0x1b;
    pub(super) const PREVENT_REMOVAL: u8 = 0x1e;
    pub(super) const READ_CAPACITY: u8 = 0x25;
    pub(super) const READ_10: u8 = 0x28;
    pub(super) const SEEK: u8 = 0x2b;
    pub(super) const READ_TOC: u8 = 0x43;
    pub(super) const GET_CONFIGURATION: u8 = 0x46;
    pub(super) const GET_EVENT_STATUS: u8 = 0x4a;
    pub(super) const READ_DISC_INFORMATION: u8 = 0x51;
    pub(super) const MODE_SENSE: u8 = 0x5a;
    pub(super) const READ_12: u8 = 0xa8;
    pub(super) const MECHANISM_STATUS: u8 = 0xbd;
}

fn be16(cdb: &[u8; CDB], at: usize) -> usize {
    usize::from(u16::from_be_bytes([cdb[at], cdb[at + 1]]))
}

fn be32(cdb: &[u8; CDB], at: usize) -> u32 {
    u32::from_be_bytes([cdb[at], cdb[at + 1], cdb[at + 2], cdb[at + 3]])
}

impl Cd {
    /// A drive with a disc of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        let blocks = u32::try_from(size / u64::from(BLOCK)).unwrap_or(u32::MAX);
        Self { blocks, loaded: true, changed: false, locked: false, sense: Sense::default() }
    }

    /// The sense key of the last command.
    pub(super) fn key(&self) -> u8 {
        self.sense.0
    }

    /// The host could not read what a command asked for, or not bring it to memory.
    pub(super) fn host_failed(&mut self, reading: bool) {
        self.sense = if reading { Sense::READ_ERROR } else { Sense::TRANSFER_FAILED };
    }

    /// Carries out a command. What it sends goes into `buffer`, which holds 512 bytes at least.
    pub(super) fn command(&mut self, cdb: &[u8; CDB], buffer: &mut [u8]) -> Answer {
        let Some(page) = buffer.first_chunk_mut::<512>() else { return Answer::Failed };
        match self.plan(cdb, page) {
            Ok(answer) => {
                if cdb[0] != op::REQUEST_SENSE {
                    self.sense = Sense::default();
                }
                answer
            }
            Err(sense) => {
                self.sense = sense;
                Answer::Failed
            }
        }
    }

    fn plan(&mut self, cdb: &[u8; CDB], page: &mut [u8; 512]) -> Result<Answer, Sense> {
        page.fill(0);
        // The part of a page that was asked for.
        let send = |len: usize, allowed: usize| match len.min(allowed) {
            0 => Answer::Done,
            len => Answer::Data(len),
        };
        match cdb[0] {
            op::INQUIRY => {
                page[0] = 5; // a CD or DVD drive
                page[1] = 0x80; // whose medium can be removed
                page[3] = 0x21; // ATAPI's format
                page[4] = 31; // bytes that follow
                page[8..36].copy_from_slice(b"Partita CD-ROM          1.0 ");
                return Ok(send(36, cdb[4].into()));
            }
            op::REQUEST_SENSE => {
                let Sense(key, code, qualifier) = std::mem::take(&mut self.sense);
                page[..8].copy_from_slice(&[0x70, 0, key, 0, 0, 0, 0, 10]);
                page[12..14].copy_from_slice(&[code, qualifier]);
                return Ok(send(18, cdb[4].into()));
            }
            op::GET_EVENT_STATUS => {
                const POLLED: u8 = 1;
                const MEDIA: u8 = 4;
                if cdb[1] & POLLED == 0 {
                    return Err(Sense::INVALID_FIELD);
                }
                if cdb[4] & 1 << MEDIA == 0 {
                    page[..4].copy_from_slice(&[0, 2, 0x80, 1 << MEDIA]);
                    return Ok(send(4, be16(cdb, 7)));
                }
                let event = if std::mem::take(&mut self.changed) { 2 } else { 0 };
                let present = u8::from(self.loaded) * 2;
                page[..8].copy_from_slice(&[0, 6, MEDIA, 1 << MEDIA, event, present, 0, 0]);
                return Ok(send(8, be16(cdb, 7)));
            }
            _ => {}
        }
        if std::mem::take(&mut self.changed) {
            return Err(Sense::MEDIUM_CHANGED);
        }
        let ready = if self.loaded { Ok(()) } else { Err(Sense::NO_MEDIUM) };
        match cdb[0] {
            op::TEST_UNIT_READY | op::SEEK => ready.map(|()| Answer::Done),
            op::PREVENT_REMOVAL => {
                self.locked = cdb[4] & 1 != 0;
                Ok(Answer::Done)
            }
            op::START_STOP_UNIT => self.start_stop(cdb[4]),
            op::READ_CAPACITY => {
                ready?;
                page[..4].copy_from_slice(&self.blocks.saturating_sub(1).to_be_bytes());
                page[4..8].copy_from_slice(&BLOCK.to_be_bytes());
                Ok(Answer::Data(8))
            }
            op::READ_10 | op::READ_12 => {
                ready?;
                let (first, count) = (
                    be32(cdb, 2),
                    match cdb[0] {
                        op::READ_10 => be16(cdb, 7) as u32,
                        _ => be32(cdb, 6),
                    },
                );
                if first.checked_add(count).is_none_or(|end| end > self.blocks) {
                    return Err(Sense::OUT_OF_RANGE);
                }
                Ok(if count == 0 { Answer::Done } else { Answer::Read { first, count } })
            }
            op::READ_TOC => {
                ready?;
                let len = self.toc(cdb, page)?;
                Ok(send(len, be16(cdb, 7)))
            }
            op::READ_DISC_INFORMATION => {
                ready?;
                // Complete, one session, of one track.
                page[..9].copy_from_slice(&[0, 32, 0x0e, 1, 1, 1, 1, 0x20, 0]);
                Ok(send(34, be16(cdb, 7)))
            }
            op::GET_CONFIGURATION => {
                const CD_ROM: u8 = 8;
                let profile = if self.loaded { CD_ROM } else { 0 };
                page[..8].copy_from_slice(&[0, 0, 0, 12, 0, 0, 0, profile]);
                page[8..16].copy_from_slice(&[0, 0, 3, 4, 0, CD_ROM, u8::from(self.loaded), 0]);
                Ok(send(16, be16(cdb, 7)))
            }
            op::MODE_SENSE => {
                let len = Self::mode_page(cdb[2] & 0x3f, page)?;
                Ok(send(len, be16(cdb, 7)))
            }
            op::MECHANISM_STATUS => Ok(send(8, be16(cdb, 8))),
            _ => Err(Sense::INVALID_COMMAND),
        }
    }

    /// Ejects the disc or takes it back in; starting and stopping it are nothing.
    fn start_stop(&mut self, what: u8) -> Result<Answer, Sense> {
        const START: u8 = 1;
        const LOAD_EJECT: u8 = 2;
        if what & LOAD_EJECT != 0 {
            let load = what & START != 0;
            if !load && self.locked {
                return Err(Sense::REMOVAL_PREVENTED);
            }
            self.changed = load && !self.loaded;
            self.loaded = load;
        }
        Ok(Answer::Done)
    }

    /// The table of contents: one data track and the lead-out. Returns its length.
    fn toc(&self, cdb: &[u8; CDB], page: &mut [u8; 512]) -> Result<usize, Sense> {
        const LEAD_OUT: u8 = 0xaa;
        const DATA_TRACK: u8 = 0x14;
        let minutes = cdb[1] & 2 != 0;
        let address = |lba: u32| match minutes {
            false => lba.to_be_bytes(),
            true => {
                // 75 frames a second, and the disc starts after two seconds.
                let frames = lba.saturating_add(150);
                let [minute, second, frame] = [frames / 4500, frames / 75 % 60, frames % 75];
                [0, minute as u8, second as u8, frame as u8]
            }
        };
        let mut len = 4;
        let mut add = |number: u8, lba: u32| {
            page[len..len + 4].copy_from_slice(&[0, DATA_TRACK, number, 0]);
            page[len + 4..len + 8].copy_from_slice(&address(lba));
            len += 8;
        };
        match cdb[2] & 0xf {
            0 if cdb[6] <= 1 => {
                add(1, 0);
                add(LEAD_OUT, self.blocks);
            }
            0 if cdb[6] == LEAD_OUT => add(LEAD_OUT, self.blocks),
            1 => add(1, 0), // the last session starts with track 1
            _ => return Err(Sense::INVALID_FIELD),
        }
        let following = (len - 2) as u8;
        page[..4].copy_from_slice(&[0, following, 1, 1]);
        Ok(len)
    }

    /// The mode page for errors, the one for capabilities, or both. Returns the length.
    fn mode_page(code: u8, page: &mut [u8; 512]) -> Result<usize, Sense> {
        const ERRORS: u8 = 1;
        const CAPABILITIES: u8 = 0x2a;
        const ALL: u8 = 0x3f;
        let mut len = 8;
        if matches!(code, ERRORS | ALL) {
            page[len..len + 2].copy_from_slice(&[ERRORS, 6]);
            len += 8;
        }
        if matches!(code, CAPABILITIES | ALL) {
            // It has a tray, can eject and be locked.
            page[len..len + 8].copy_from_slice(&[CAPABILITIES, 18, 0, 0, 0, 0, 0x29, 0]);
            len += 20;
        }
        if len == 8 {
            return Err(Sense::INVALID_FIELD);
        }
        page[1] = (len - 2) as u8;
        Ok(len)
    }
}

/// Command blocks in any order, each with an answer that keeps to the disc and the buffer.
pub(crate) fn fuzz(data: &[u8]) {
    const BLOCKS: u32 = 1000;
    let mut cd = Cd::new(u64::from(BLOCKS) * u64::from(BLOCK));
    let mut buffer = [0xff; 512];
    for block in data.as_chunks::<CDB>().0 {
        match cd.command(block, &mut buffer) {
            Answer::Done => {}
            Answer::Data(len) => assert!((1..=512).contains(&len)),
            Answer::Read { first, count } => {
                assert!(cd.loaded && count > 0);
                assert!(first.checked_add(count).is_some_and(|end| end <= BLOCKS));
            }
            Answer::Failed => assert_ne!(cd.key(), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(cd: &mut Cd, cdb: &[u8]) -> (Answer, Vec<u8>) {
        let mut block = [0; CDB];
        block[..cdb.len()].copy_from_slice(cdb);
        let mut buffer = vec![0xff; 512];
        let answer = cd.command(&block, &mut buffer);
        let len = if let Answer::Data(len) = answer { len } else { 0 };
        (answer, buffer[..len].to_vec())
    }

    fn sense(cd: &mut Cd) -> [u8; 3] {
        let (_, sense) = run(cd, &[3, 0, 0, 0, 18]);
        [sense[2], sense[12], sense[13]]
    }

    #[test]
    fn blocks_are_read_where_there_are_any() {
        let mut cd = Cd::new(100 * 2048);
        let (_, capacity) = run(&mut cd, &[0x25]);
        assert_eq!(capacity, [0, 0, 0, 99, 0, 0, 8, 0]);
        let read = |cd: &mut Cd, first, count| run(cd, &[0x28, 0, 0, 0, 0, first, 0, 0, count]).0;
        assert_eq!(read(&mut cd, 90, 10), Answer::Read { first: 90, count: 10 });
        assert_eq!(read(&mut cd, 90, 0), Answer::Done);
        assert_eq!(read(&mut cd, 91, 10), Answer::Failed);
        assert_eq!((cd.key(), sense(&mut cd), sense(&mut cd)), (5, [5, 0x21, 0], [0; 3]));
        let (long, _) = run(&mut cd, &[0xa8, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1]);
        assert_eq!(long, Answer::Failed);
    }

    #[test]
    fn the_disc_comes_out_unless_it_is_locked() {
        let mut cd = Cd::new(2048);
        run(&mut cd, &[0x1e, 0, 0, 0, 1]);
        assert_eq!(run(&mut cd, &[0x1b, 0, 0, 0, 2]).0, Answer::Failed);
        assert_eq!(sense(&mut cd), [5, 0x53, 2]);
        run(&mut cd, &[0x1e, 0, 0, 0, 0]);
        assert_eq!(run(&mut cd, &[0x1b, 0, 0, 0, 2]).0, Answer::Done);
        assert_eq!(run(&mut cd, &[0]).0, Answer::Failed);
        assert_eq!(sense(&mut cd), [2, 0x3a, 0]);
        assert_eq!(run(&mut cd, &[0x1b, 0, 0, 0, 3]).0, Answer::Done);
        assert_eq!(run(&mut cd, &[0]).0, Answer::Failed, "it is told once");
        assert_eq!(sense(&mut cd), [6, 0x28, 0]);
        assert_eq!(run(&mut cd, &[0]).0, Answer::Done);
    }

    #[test]
    fn answers_are_cut_to_what_was_asked_for() {
        let mut cd = Cd::new(2048);
        for len in [0, 1, 5, 36, 255] {
            let (_, data) = run(&mut cd, &[0x12, 0, 0, 0, len]);
            assert_eq!(data.len(), usize::from(len).min(36));
        }
        let (_, toc) = run(&mut cd, &[0x43, 0, 0, 0, 0, 0, 0, 0, 200]);
        assert_eq!(toc, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 0, 1]);
        let (_, mode) = run(&mut cd, &[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 200]);
        assert_eq!((mode.len(), mode[1]), (36, 34));
    }

    #[test]
    fn every_command_block_has_an_answer() {
        let mut cd = Cd::new(64 * 2048);
        for op in 0..=255 {
            for fill in [0, 1, 2, 0x3f, 0x7f, 0x80, 0xff] {
                let mut cdb = [fill; CDB];
                cdb[0] = op;
                let (answer, _) = run(&mut cd, &cdb);
                assert_eq!(cd.key() != 0, answer == Answer::Failed, "{op:#x} {fill:#x}");
            }
        }
    }
}
