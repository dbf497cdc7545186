//! Guest memory as a NIC's packets name it: a buffer that was shared before, and the scattered
//! bytes of one packet.
//!
//! Nothing is mapped a second time. What a packet names is looked up when it comes, so that a page
//! that is not there costs the packet alone.

use std::sync::Arc;

use backends::net::Buffer;
use hypervisor::{Gpa, Gpn, GuestMemory, PAGE_SIZE};
use vmbus::packet::Segment;

/// A buffer that the guest has shared: pages of its memory, in its order.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    memory: GuestMemory,
    pages: Arc<[Gpn]>,
}

impl Shared {
    pub(super) fn new(memory: GuestMemory, pages: Arc<[Gpn]>) -> Self {
        Self { memory, pages }
    }

    /// Where the bytes from `offset` on are: fewer than `len` if the buffer ends.
    pub(super) fn segments(&self, offset: u32, len: u32) -> impl Iterator<Item = Segment> + '_ {
        let page_size = PAGE_SIZE as u32;
        let pages = self.pages.get((offset / page_size) as usize..).unwrap_or_default();
        let mut within = offset % page_size;
        let mut left = len;
        pages.iter().map_while(move |page| {
            // An address beyond the last is where no memory is.
            let gpa = page.gpa().map_or(u64::MAX, |gpa| gpa.0.saturating_add(within.into()));
            let len = (page_size - within).min(left);
            within = 0;
            left -= len;
            (len > 0).then_some(Segment { gpa, len })
        })
    }

    /// Fills `data` from `offset` on; false if that is not all there.
    pub(super) fn read(&self, offset: u32, data: &mut [u8]) -> bool {
        let mut left = data;
        for segment in self.segments(offset, u32::try_from(left.len()).unwrap_or(u32::MAX)) {
            let Some((now, later)) = left.split_at_mut_checked(segment.len as usize) else {
                return false;
            };
            if self.memory.read(Gpa(segment.gpa), now).is_err() {
                return false;
            }
            left = later;
        }
        left.is_empty()
    }

    /// Puts `data` at `offset`; false if that is not all there.
    pub(super) fn write(&self, offset: u32, data: &[u8]) -> bool {
        let mut left = data;
        for segment in self.segments(offset, u32::try_from(left.len()).unwrap_or(u32::MAX)) {
            let Some((now, later)) = left.split_at_checked(segment.len as usize) else {
                return false;
            };
            if self.memory.write(Gpa(segment.gpa), now).is_err() {
                return false;
            }
            left = later;
        }
        left.is_empty()
    }

    /// Adds the memory from `offset` on to `buffers`; false if that is not all there.
    pub(super) fn buffers(&self, offset: u32, len: u32, buffers: &mut Vec<Buffer>) -> bool {
        let mut found = 0;
        for segment in self.segments(offset, len) {
            let Some(buffer) = buffer(&self.memory, segment) else { return false };
            buffers.push(buffer);
            found += segment.len;
        }
        found == len
    }
}

/// The memory of a stretch, if it is there.
fn buffer(memory: &GuestMemory, segment: Segment) -> Option<Buffer> {
    let len = segment.len as usize;
    let slice = memory.slice(Gpa(segment.gpa), len)?;
    Some(Buffer::new(slice.ptr_guard_mut().as_ptr(), len))
}

/// What is still unread of a packet's bytes, which lie in stretches of guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    /// Of the first stretch, how much has been read.
    within: u32,
    left: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(memory: &'a GuestMemory, segments: &'a [Segment]) -> Self {
        let left = segments.iter().map(|segment| u64::from(segment.len)).sum();
        Self { memory, segments, within: 0, left }
    }

    /// Bytes.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The next stretch, of `most` bytes at most.
    fn next(&mut self, most: u32) -> Option<Segment> {
        loop {
            let (first, rest) = self.segments.split_first()?;
            let left = first.len.checked_sub(self.within)?;
            if left == 0 {
                self.segments = rest;
                self.within = 0;
                continue;
            }
            let len = left.min(most);
            let gpa = first.gpa.checked_add(self.within.into())?;
            self.within += len;
            self.left -= u64::from(len);
            return Some(Segment { gpa, len });
        }
    }

    /// Goes on `len` bytes further.
    pub(super) fn skip(&mut self, mut len: u32) -> Option<()> {
        while len > 0 {
            len -= self.next(len)?.len;
        }
        Some(())
    }

    /// Copies the next bytes.
    pub(super) fn read(&mut self, data: &mut [u8]) -> Option<()> {
        let mut left = data;
        while !left.is_empty() {
            let segment = self.next(u32::try_from(left.len()).ok()?)?;
            let (now, later) = left.split_at_mut_checked(segment.len as usize)?;
            self.memory.read(Gpa(segment.gpa), now).ok()?;
            left = later;
        }
        Some(())
    }

    /// Adds the memory of the next `len` bytes to `buffers`.
    pub(super) fn buffers(&mut self, mut len: u32, buffers: &mut Vec<Buffer>) -> Option<()> {
        while len > 0 {
            let segment = self.next(len)?;
            buffers.push(buffer(self.memory, segment)?);
            len -= segment.len;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_buffer_is_in_its_own_order() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let shared = Shared::new(memory.clone(), [9, 3, 4].map(Gpn).into());
        let data: Vec<u8> = (0..6000).map(|i| (i % 251) as u8).collect();
        assert!(shared.write(4000, &data));
        let mut back = vec![0; 6000];
        assert!(shared.read(4000, &mut back));
        assert_eq!(back, data);
        let mut front = [0; 96];
        memory.read(Gpa(9 * 4096 + 4000), &mut front).unwrap();
        assert_eq!(front, data[..96]);
        let mut rest = [0; 100];
        memory.read(Gpa(3 * 4096), &mut rest).unwrap();
        assert_eq!(rest, data[96..196]);
        // As far as it goes.
        assert!(!shared.write(3 * 4096 - 1, &[0; 2]));
        assert!(!shared.read(u32::MAX, &mut [0; 2]));
        let mut buffers = Vec::new();
        assert!(shared.buffers(4000, 8288, &mut buffers));
        let lens: Vec<usize> = buffers.iter().map(Buffer::len).collect();
        assert_eq!(lens, [96, 4096, 4096]);
        assert!(!shared.buffers(4000, 8289, &mut buffers));
    }

    #[test]
    fn a_reader_crosses_from_stretch_to_stretch() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(Gpa(100), b"abc").unwrap();
        memory.write(Gpa(9000), b"defgh").unwrap();
        let segment = |gpa, len| Segment { gpa, len };
        let segments = [segment(100, 3), segment(0, 0), segment(9000, 5), segment(2 << 20, 1)];
        let mut reader = Reader::new(&memory, &segments);
        let mut two = [0; 2];
        reader.read(&mut two).unwrap();
        assert_eq!((&two, reader.left()), (b"ab", 7));
        let mut buffers = Vec::new();
        reader.clone().buffers(6, &mut buffers).unwrap();
        assert_eq!(buffers.iter().map(Buffer::len).collect::<Vec<_>>(), [1, 5]);
        reader.skip(3).unwrap();
        reader.read(&mut two).unwrap();
        assert_eq!(&two, b"fg");
        // The last byte is nowhere.
        assert_eq!(reader.read(&mut two), None);
        assert_eq!(reader.skip(1), None);
    }
}
