//! Requests in flight, by the transaction id under which the root answers them.
//!
//! An id is the slot, in its lower half, and the slot's generation, which counts its requests, in
//! the upper. So an answer is to exactly one request, and one that comes twice, or never was
//! asked for, is known as such.

#[derive(Clone, Copy, Debug)]
struct Entry<T> {
    /// Of the request in flight, or the last that was.
    generation: u32,
    /// What the request in flight is; `None` if there is none.
    load: Option<T>,
}

/// As many slots as may be in flight, and what the caller knows of each request.
#[derive(Debug)]
pub(crate) struct Table<T, const DEPTH: usize> {
    entries: [Entry<T>; DEPTH],
    in_flight: usize,
}

impl<T: Copy, const DEPTH: usize> Table<T, DEPTH> {
    pub(crate) const fn new() -> Self {
        const { assert!(DEPTH > 0 && DEPTH <= u16::MAX as usize) };
        Self { entries: [Entry { generation: 0, load: None }; DEPTH], in_flight: 0 }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The id for the next request of `slot`; `None` if there is no such slot or it is busy.
    #[inline]
    pub(crate) fn next_id(&self, slot: u16) -> Option<u64> {
        let entry = self.entries.get(usize::from(slot)).filter(|entry| entry.load.is_none())?;
        Some(u64::from(next(entry.generation)) << 32 | u64::from(slot))
    }

    /// The request of `slot` is on its way.
    #[inline]
    pub(crate) fn begin(&mut self, slot: u16, load: T) {
        if let Some(entry) = self.entries.get_mut(usize::from(slot)) {
            *entry = Entry { generation: next(entry.generation), load: Some(load) };
            self.in_flight += 1;
        }
    }

    /// The answer with this id has come. Returns the slot, which is free again, and what is known of
    /// the request.
    ///
    /// One that is due to nobody is what the caller calls it: `unknown` if it was not asked for,
    /// `twice` if it has come before. Both are given the id.
    #[inline]
    pub(crate) fn end<E>(
        &mut self,
        id: u64,
        unknown: impl Fn(u64) -> E,
        twice: impl Fn(u64) -> E,
    ) -> Result<(u16, T), E> {
        let (generation, slot) = ((id >> 32) as u32, id as u32);
        let slot = u16::try_from(slot).map_err(|_| unknown(id))?;
        let entry = self.entries.get_mut(usize::from(slot)).ok_or_else(|| unknown(id))?;
        if generation != entry.generation || generation == 0 {
            return Err(unknown(id));
        }
        let load = entry.load.take().ok_or_else(|| twice(id))?;
        self.in_flight -= 1;
        Ok((slot, load))
    }
}

/// 0 is left out, so that no id is 0.
fn next(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum NotDue {
        Unknown(u64),
        Twice(u64),
    }

    fn end(table: &mut Table<u32, 2>, id: u64) -> Result<(u16, u32), NotDue> {
        table.end(id, NotDue::Unknown, NotDue::Twice)
    }

    #[test]
    fn each_answer_is_to_one_request() {
        let mut table = Table::<u32, 2>::new();
        let first = table.next_id(1).unwrap();
        assert_eq!(end(&mut table, first), Err(NotDue::Unknown(first)));
        table.begin(1, 10);
        assert_eq!(table.next_id(1), None);
        assert_eq!(end(&mut table, first), Ok((1, 10)));
        assert_eq!(end(&mut table, first), Err(NotDue::Twice(first)));
        table.begin(1, 20);
        // An answer to the slot's request before is not one to this.
        assert_eq!(end(&mut table, first), Err(NotDue::Unknown(first)));
        assert_eq!(table.in_flight(), 1);
        for id in [0, 1, 2, 1 << 32, u64::MAX, first | 1 << 31] {
            assert_eq!(end(&mut table, id), Err(NotDue::Unknown(id)));
        }
        assert_eq!(table.next_id(2), None);
    }

    #[test]
    fn no_id_is_ever_zero() {
        assert_eq!(next(u32::MAX), 1);
        assert_ne!(Table::<u32, 1>::new().next_id(0), Some(0));
    }
}
