//! The guest's lists of pages: put together from their messages, and bounded.

use std::collections::HashMap;
use std::sync::Arc;

use hypervisor::{Gpn, PAGE_SIZE};
use thiserror::Error;
use vmbus::protocol::{GpaRange, GpadlHeader, GpadlId, Relid};

use super::Limits;

/// The most pages in one list: the header counts their bytes, with the range's own eight, in 16
/// bits.
const MAX_PAGES: usize = (u16::MAX as usize - size_of::<GpaRange>()) / 8;

/// Why a list of pages is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum GpadlError {
    /// Its channel does not exist or is withdrawn.
    #[error("its channel is not offered")]
    Channel,
    /// Its number is taken.
    #[error("its number is in use")]
    InUse,
    /// It is not one page-aligned range, or its lengths contradict each other.
    #[error("it is not one range that starts at a page")]
    Shape,
    /// The guest has too many.
    #[error("there are too many of them")]
    Limit,
    /// A page where no memory is.
    #[error("page {0:#x} is not memory")]
    NotRam(u64),
    /// A continuation of nothing.
    #[error("nothing to continue")]
    Unknown,
}

#[derive(Debug)]
enum Pages {
    /// So many are announced, and these have come.
    Coming {
        count: usize,
        so_far: Vec<Gpn>,
    },
    All(Arc<[Gpn]>),
}

#[derive(Debug)]
struct Gpadl {
    relid: Relid,
    pages: Pages,
    /// The guest wants it back.
    torn_down: bool,
    /// Workers have been asked for it.
    asked_for: bool,
}

impl Gpadl {
    fn len(&self) -> usize {
        match &self.pages {
            Pages::Coming { so_far, .. } => so_far.len(),
            Pages::All(pages) => pages.len(),
        }
    }
}

/// What has become of a list, told apart by whose it is: still coming, or complete, or refused.
pub(super) type Progress = Result<Option<(Relid, Arc<[Gpn]>)>, (Relid, GpadlError)>;

/// All lists of a guest. Guests number them, across all channels.
#[derive(Debug)]
pub(super) struct Gpadls {
    limits: Limits,
    lists: HashMap<GpadlId, Gpadl>,
    /// Pages in all of them.
    pages: usize,
}

impl Gpadls {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, lists: HashMap::new(), pages: 0 }
    }

    /// A list begins; `rest` is what follows the header in its message.
    pub(super) fn begin(
        &mut self,
        header: &GpadlHeader,
        rest: &[u8],
        is_ram: &dyn Fn(Gpn) -> bool,
    ) -> Progress {
        let GpadlHeader { relid, gpadl, range_bytes, range_count, range, .. } = *header;
        let refuse = |error| Err((relid, error));
        if self.lists.contains_key(&gpadl) {
            return refuse(GpadlError::InUse);
        }
        let count = (range.len as usize).div_ceil(PAGE_SIZE);
        let bytes = size_of::<GpaRange>() + count * 8;
        if range_count != 1
            || range.offset != 0
            || !(1..=MAX_PAGES).contains(&count)
            || usize::from(range_bytes) != bytes
        {
            return refuse(GpadlError::Shape);
        }
        if self.lists.len() >= self.limits.gpadls {
            return refuse(GpadlError::Limit);
        }
        // Memory follows the pages that come, not the number that is announced.
        let pages = Pages::Coming { count, so_far: Vec::new() };
        self.lists.insert(gpadl, Gpadl { relid, pages, torn_down: false, asked_for: false });
        self.more(gpadl, rest, is_ram)
    }

    /// A list goes on with the page numbers in `bytes`. A refused list is gone.
    pub(super) fn more(
        &mut self,
        gpadl: GpadlId,
        bytes: &[u8],
        is_ram: &dyn Fn(Gpn) -> bool,
    ) -> Progress {
        let unknown = (Relid::default(), GpadlError::Unknown);
        let list = self.lists.get_mut(&gpadl).ok_or(unknown)?;
        let relid = list.relid;
        let Pages::Coming { count, so_far } = &mut list.pages else { return Err(unknown) };
        let (numbers, _) = bytes.as_chunks::<8>();
        let mut problem = None;
        for number in numbers.iter().take(*count - so_far.len()) {
            let page = Gpn(u64::from_le_bytes(*number));
            if !is_ram(page) {
                problem = Some(GpadlError::NotRam(page.0));
                break;
            }
            if self.pages >= self.limits.pages {
                problem = Some(GpadlError::Limit);
                break;
            }
            so_far.push(page);
            self.pages += 1;
        }
        if let Some(error) = problem {
            self.remove(gpadl);
            return Err((relid, error));
        }
        if so_far.len() < *count {
            return Ok(None);
        }
        let pages: Arc<[Gpn]> = std::mem::take(so_far).into();
        list.pages = Pages::All(Arc::clone(&pages));
        Ok(Some((relid, pages)))
    }

    /// The pages of a complete list of `relid` that the guest has not asked back.
    pub(super) fn pages(&self, relid: Relid, gpadl: GpadlId) -> Option<&[Gpn]> {
        match self.lists.get(&gpadl)? {
            Gpadl { relid: owner, pages: Pages::All(pages), torn_down: false, .. }
                if *owner == relid =>
            {
                Some(pages)
            }
            _ => None,
        }
    }

    /// The channel whose list it is.
    pub(super) fn owner(&self, gpadl: GpadlId) -> Option<Relid> {
        self.lists.get(&gpadl).map(|list| list.relid)
    }

    /// Notes that the guest wants a list back; false if there is none.
    pub(super) fn tear_down_later(&mut self, gpadl: GpadlId) -> bool {
        self.lists.get_mut(&gpadl).is_some_and(|list| {
            list.torn_down = true;
            true
        })
    }

    /// Notes that workers are asked for a list; false if they were, or there is none.
    pub(super) fn ask_for(&mut self, gpadl: GpadlId) -> bool {
        let list = self.lists.get_mut(&gpadl);
        list.is_some_and(|list| !std::mem::replace(&mut list.asked_for, true))
    }

    /// The lists of `relid` that the guest wants back.
    pub(super) fn torn_down(&self, relid: Relid) -> Vec<GpadlId> {
        self.select(|list| list.relid == relid && list.torn_down)
    }

    /// Forgets a list; false if there was none, or it was never complete.
    pub(super) fn remove(&mut self, gpadl: GpadlId) -> bool {
        let Some(list) = self.lists.remove(&gpadl) else { return false };
        self.pages -= list.len();
        matches!(list.pages, Pages::All(_))
    }

    /// Forgets all lists of `relid`; returns those that were complete.
    pub(super) fn remove_all(&mut self, relid: Relid) -> Vec<GpadlId> {
        let mut all = self.select(|list| list.relid == relid);
        all.retain(|gpadl| self.remove(*gpadl));
        all
    }

    fn select(&self, wanted: impl Fn(&Gpadl) -> bool) -> Vec<GpadlId> {
        let mut ids: Vec<GpadlId> =
            self.lists.iter().filter(|(_, list)| wanted(list)).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Pages kept, for tests of the bound.
    #[cfg(test)]
    pub(super) fn total_pages(&self) -> usize {
        self.pages
    }
}
