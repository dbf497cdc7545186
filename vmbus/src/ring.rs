//! One direction of a channel: bytes go round in a data area, between two indices.
//!
//! The producer owns `write_index`, the consumer `read_index`; each is published once per batch,
//! after any number of packets. Two words keep the doorbells quiet: the consumer sets
//! `interrupt_mask` while it is awake, and a producer that waits for room leaves
//! `pending_send_size`, so that it is signalled only when there is that much. The layout and the
//! order of accesses are those of Linux's drivers/hv/ring_buffer.c.
//!
//! Nothing of the other side is trusted. Its index is loaded, checked, and then used from private
//! memory; so is each packet's descriptor; a packet is copied out once. What is inconsistent ends
//! in a [`RingError`], after which the only sensible act is to give the channel up.
//!
//! A consumer's turn, so that no wakeup is lost and few are sent:
//!
//! ```
//! # use vmbus::{ring::{Incoming, RingError}, mapped::RingMemory};
//! # fn turn<M: RingMemory>(incoming: &mut Incoming<M>, ring_their_doorbell: impl Fn(), sleep: impl Fn())
//! # -> Result<(), RingError> {
//! let mut buffer = [0; 1024];
//! loop {
//!     while let Some(packet) = incoming.read(&mut buffer)? {
//!         // serve it
//!         # let _ = packet;
//!     }
//!     if incoming.publish() {
//!         ring_their_doorbell();
//!     }
//!     if !incoming.unmask() {
//!         sleep();
//!         # break;
//!     }
//!     incoming.mask();
//! }
//! # Ok(())
//! # }
//! ```

use core::array;

use thiserror::Error;

use words::{load, span, write_in_pieces, write_straight};

use crate::{
    mapped::RingMemory,
    packet::{
        DESCRIPTOR_SIZE, Descriptor, Packet, PacketError, PacketFlags, PacketKind, TRAILER_SIZE,
        ring_size,
    },
    sync::{AtomicU32, AtomicU64, Ordering, fence},
};

/// What the first page of a ring begins with (`struct hv_ring_buffer`).
#[derive(Debug)]
#[repr(C)]
pub struct Control {
    /// Where the producer writes next, in bytes from the data area's start.
    pub write_index: AtomicU32,
    /// Where the consumer reads next.
    pub read_index: AtomicU32,
    /// Not 0: the consumer is awake and wants no signal.
    pub interrupt_mask: AtomicU32,
    /// Not 0: the producer waits for more than so many free bytes.
    pub pending_send_size: AtomicU32,
    reserved: [u32; 12],
    /// What the two sides understand.
    pub feature_bits: AtomicU32,
}

#[cfg(not(loom))]
const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(Control, write_index) == 0);
    assert!(offset_of!(Control, read_index) == 4);
    assert!(offset_of!(Control, interrupt_mask) == 8);
    assert!(offset_of!(Control, pending_send_size) == 12);
    assert!(offset_of!(Control, feature_bits) == 64);
};

/// In [`Control::feature_bits`]: `pending_send_size` counts.
pub const FEATURE_PENDING_SEND_SIZE: u32 = 1;

/// The most headers and payload, as a packet's length is counted in 16 bits.
const MAX_BODY: usize = u16::MAX as usize * 8 - DESCRIPTOR_SIZE;

/// The largest data area, so that sums of two indices fit.
const MAX_SIZE: usize = 1 << 30;

impl Control {
    /// An empty ring's, as a guest leaves it before it opens the channel.
    pub fn new() -> Self {
        Self {
            write_index: AtomicU32::new(0),
            read_index: AtomicU32::new(0),
            interrupt_mask: AtomicU32::new(0),
            pending_send_size: AtomicU32::new(0),
            reserved: [0; 12],
            feature_bits: AtomicU32::new(FEATURE_PENDING_SEND_SIZE),
        }
    }

    fn honours_pending_send_size(&self) -> bool {
        self.feature_bits.load(Ordering::Relaxed) & FEATURE_PENDING_SEND_SIZE != 0
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

/// The ring is broken; the channel cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// The data area has no usable size.
    #[error("a ring cannot have {0} bytes of data")]
    Size(usize),
    /// An index lies outside of the data area or is not aligned.
    #[error("a ring of {size} bytes has an index of {index:#x}")]
    Index {
        /// The index.
        index: u32,
        /// Bytes in the data area.
        size: u32,
    },
    /// A packet is inconsistent.
    #[error(transparent)]
    Packet(#[from] PacketError),
}

/// Why a packet was not put into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PushError {
    /// There is no room now.
    #[error("the ring is full")]
    Full,
    /// There will never be room, or the headers are no multiple of 8 bytes.
    #[error("the packet is malformed or larger than the ring")]
    Packet,
    /// The ring is broken.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// The size of `memory`'s data area, in bytes.
fn data_size(memory: &impl RingMemory) -> Result<u32, RingError> {
    let bytes = size_of_val_shared(memory.data()) / if memory.mirrored() { 2 } else { 1 };
    let least = ring_size(0) + 8;
    if bytes < least || bytes > MAX_SIZE || !bytes.is_multiple_of(8) {
        return Err(RingError::Size(bytes));
    }
    u32::try_from(bytes).map_err(|_| RingError::Size(bytes))
}

/// Bytes in the words, eight each (loom's are larger).
fn size_of_val_shared(words: &[AtomicU64]) -> usize {
    words.len().saturating_mul(8)
}

fn checked_index(index: u32, size: u32) -> Result<u32, RingError> {
    if index < size && index.is_multiple_of(8) {
        Ok(index)
    } else {
        Err(RingError::Index { index, size })
    }
}

/// Bytes from `from` forward to `to`, both below `size`.
fn distance(from: u32, to: u32, size: u32) -> u32 {
    if to >= from { to - from } else { size - from + to }
}

/// `index + by`, both at most `size`, once around.
fn advance(index: u32, by: u32, size: u32) -> u32 {
    let sum = index + by;
    if sum >= size { sum - size } else { sum }
}

/// The consumer's end of a ring.
#[derive(Debug)]
pub struct Incoming<M> {
    memory: M,
    size: u32,
    /// Where the next packet begins.
    cursor: u32,
    /// The read index that the other side knows.
    published: u32,
    /// The write index as last seen, checked.
    written: u32,
}

impl<M: RingMemory> Incoming<M> {
    /// Takes the ring up where its read index stands.
    pub fn new(memory: M) -> Result<Self, RingError> {
        let size = data_size(&memory)?;
        let cursor = checked_index(memory.control().read_index.load(Ordering::Relaxed), size)?;
        let written = checked_index(memory.control().write_index.load(Ordering::Acquire), size)?;
        Ok(Self { memory, size, cursor, published: cursor, written })
    }

    /// Bytes in the data area.
    pub fn capacity(&self) -> u32 {
        self.size
    }

    /// Whether a packet may be there: one atomic load, for polling.
    pub fn has_data(&self) -> bool {
        self.written != self.cursor
            || self.memory.control().write_index.load(Ordering::Relaxed) != self.cursor
    }

    /// Bytes that lie ready.
    fn available(&mut self) -> Result<u32, RingError> {
        if self.written == self.cursor {
            let index = self.memory.control().write_index.load(Ordering::Acquire);
            self.written = checked_index(index, self.size)?;
        }
        Ok(distance(self.cursor, self.written, self.size))
    }

    /// Copies the next packet's headers and payload into `buffer`; `None` if there is none.
    ///
    /// The other side does not learn that there is room until [`Incoming::publish`].
    pub fn read<'b>(&mut self, buffer: &'b mut [u8]) -> Result<Option<Packet<'b>>, RingError> {
        let available = self.available()?;
        if available == 0 {
            return Ok(None);
        }
        let data = self.memory.data();
        let here = data.get((self.cursor / 8) as usize..).unwrap_or_default();
        let (words, here) = match here {
            [a, b, rest @ ..] => ([a, b].map(|word| word.load(Ordering::Relaxed)), rest),
            _ => (self.descriptor_across_the_end(), [].as_slice()),
        };
        let descriptor: Descriptor = zerocopy::transmute!(words);
        let Descriptor { offset8, len8, .. } = descriptor;
        let bytes = u32::from(len8) * 8;
        let total = bytes + TRAILER_SIZE as u32;
        if total > available {
            return Err(PacketError::PastWriteIndex { len: total, available }.into());
        }
        let body = bytes
            .checked_sub(DESCRIPTOR_SIZE as u32)
            .ok_or(PacketError::Descriptor { offset8, len8 })?;
        let buffer =
            buffer.get_mut(..body as usize).ok_or(PacketError::TooLong { len: body as usize })?;

        let (words, _) = buffer.as_chunks_mut::<8>();
        match here.get(..words.len()) {
            Some(from) => load(words, from),
            None => {
                let start = advance(self.cursor, DESCRIPTOR_SIZE as u32, self.size);
                let (a, b) = span(self.memory.data(), start, body);
                let (front, back) = words.split_at_mut(a.len().min(words.len()));
                load(front, a);
                load(back, b);
            }
        }

        let packet = Packet::new(descriptor, buffer)?;
        self.cursor = advance(self.cursor, total, self.size);
        Ok(Some(packet))
    }

    /// The two words of a descriptor between which the data area ends and begins anew.
    #[cold]
    fn descriptor_across_the_end(&self) -> [u64; DESCRIPTOR_SIZE / 8] {
        let (a, b) = span(self.memory.data(), self.cursor, DESCRIPTOR_SIZE as u32);
        let mut words = a.iter().chain(b).map(|word| word.load(Ordering::Relaxed));
        array::from_fn(|_| words.next().unwrap_or_default())
    }

    /// Gives the room of all packets read so far back to the producer. Returns whether it must be
    /// signalled: it waits for room, and by this step there is enough.
    #[must_use = "a producer that waits for room must be signalled"]
    pub fn publish(&mut self) -> bool {
        if self.published == self.cursor {
            return false;
        }
        let before = core::mem::replace(&mut self.published, self.cursor);
        let control = self.memory.control();
        // Release: the copies above are done before the room is given away.
        control.read_index.store(self.cursor, Ordering::Release);
        if !control.honours_pending_send_size() {
            return false;
        }
        // The producer stores its wish, then looks at the read index; we, the other way round.
        fence(Ordering::SeqCst);
        let wanted = control.pending_send_size.load(Ordering::Relaxed);
        if wanted == 0 {
            return false;
        }
        let write = control.write_index.load(Ordering::Relaxed);
        if checked_index(write, self.size).is_err() {
            // The next read will say so.
            return false;
        }
        let free = self.size - distance(self.cursor, write, self.size);
        let gained = distance(before, self.cursor, self.size);
        // Only the step that crosses the mark signals.
        free > wanted && free.saturating_sub(gained) <= wanted
    }

    /// Asks the producer not to signal: we are awake.
    pub fn mask(&mut self) {
        self.memory.control().interrupt_mask.store(1, Ordering::Relaxed);
    }

    /// Asks the producer to signal from now on. Returns whether data came meanwhile, for which no
    /// signal may come: if so, do not sleep.
    ///
    /// Publish first. The producer signals only when it finds the ring empty.
    #[must_use = "data that came while masked brings no signal"]
    pub fn unmask(&mut self) -> bool {
        debug_assert_eq!(self.published, self.cursor, "publish before unmask");
        self.memory.control().interrupt_mask.store(0, Ordering::Relaxed);
        // The producer stores its index, then looks at the mask; we, the other way round.
        fence(Ordering::SeqCst);
        self.has_data()
    }
}

/// The producer's end of a ring.
#[derive(Debug)]
pub struct Outgoing<M> {
    memory: M,
    size: u32,
    /// Where the next packet goes.
    cursor: u32,
    /// The write index that the other side knows.
    published: u32,
    /// The read index as last seen, checked.
    read: u32,
}

impl<M: RingMemory> Outgoing<M> {
    /// Takes the ring up where its write index stands.
    pub fn new(memory: M) -> Result<Self, RingError> {
        let size = data_size(&memory)?;
        let cursor = checked_index(memory.control().write_index.load(Ordering::Relaxed), size)?;
        let read = checked_index(memory.control().read_index.load(Ordering::Acquire), size)?;
        Ok(Self { memory, size, cursor, published: cursor, read })
    }

    /// Bytes in the data area.
    pub fn capacity(&self) -> u32 {
        self.size
    }

    /// Bytes that packets can take now: one of [`ring_size`] up to this fits. A ring is never
    /// filled completely, as that would look empty.
    pub fn free(&mut self) -> Result<u32, RingError> {
        let index = self.memory.control().read_index.load(Ordering::Acquire);
        self.read = checked_index(index, self.size)?;
        Ok(self.room())
    }

    /// [`Outgoing::free`] by what is known without a look.
    fn room(&self) -> u32 {
        self.size - distance(self.read, self.cursor, self.size) - 8
    }

    /// Whether packets of `bytes` together, as of [`ring_size`], fit now. Looks at the other side's
    /// index only if by what is known they do not.
    #[inline]
    pub fn fits(&mut self, bytes: u32) -> Result<bool, RingError> {
        Ok(bytes <= self.room() || bytes <= self.free()?)
    }

    /// Puts a packet without headers into the ring. The other side does not see it until
    /// [`Outgoing::publish`].
    pub fn push(
        &mut self,
        kind: PacketKind,
        flags: PacketFlags,
        transaction_id: u64,
        payload: &[&[u8]],
    ) -> Result<(), PushError> {
        self.push_with_headers(kind, flags, transaction_id, &[], payload)
    }

    /// Puts a packet into the ring, with `headers` (a multiple of 8 bytes) before its payload.
    pub fn push_with_headers(
        &mut self,
        kind: PacketKind,
        flags: PacketFlags,
        transaction_id: u64,
        headers: &[u8],
        payload: &[&[u8]],
    ) -> Result<(), PushError> {
        let payload_len = payload.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
        let body = headers.len().saturating_add(payload_len);
        if body > MAX_BODY || !headers.len().is_multiple_of(8) {
            return Err(PushError::Packet);
        }
        // Below 2^19, and so are all sums of them.
        let total = ring_size(body) as u32;
        if total > self.size - 8 {
            return Err(PushError::Packet);
        }
        if !self.fits(total)? {
            return Err(PushError::Full);
        }

        let descriptor = Descriptor {
            kind,
            offset8: ((DESCRIPTOR_SIZE + headers.len()) / 8) as u16,
            len8: ((DESCRIPTOR_SIZE + body).div_ceil(8)) as u16,
            flags,
            transaction_id,
        };
        let trailer = u64::from(self.cursor) << 32;
        let (a, b) = span(self.memory.data(), self.cursor, total);
        if !(b.is_empty() && write_straight(a, descriptor, headers, payload, trailer)) {
            write_in_pieces(a, b, descriptor, headers, payload, trailer);
        }
        self.cursor = advance(self.cursor, total, self.size);
        Ok(())
    }

    /// Whether packets were pushed that the other side does not see yet.
    pub fn has_unpublished(&self) -> bool {
        self.published != self.cursor
    }

    /// Shows all packets pushed so far to the consumer. Returns whether it must be signalled: it
    /// does not mask signals, and had seen all that was there before.
    #[must_use = "a consumer that sleeps must be signalled"]
    pub fn publish(&mut self) -> bool {
        if self.published == self.cursor {
            return false;
        }
        let before = core::mem::replace(&mut self.published, self.cursor);
        let control = self.memory.control();
        // Release: the packets are there before the index says so.
        control.write_index.store(self.cursor, Ordering::Release);
        // The consumer stores its mask, then looks at the write index; we, the other way round.
        fence(Ordering::SeqCst);
        control.interrupt_mask.load(Ordering::Relaxed) == 0
            && control.read_index.load(Ordering::Acquire) == before
    }

    /// Whether the consumer signals a producer that waits for room.
    pub fn honours_pending_send(&self) -> bool {
        self.memory.control().honours_pending_send_size()
    }

    /// Asks the consumer to signal when `bytes` (as of [`ring_size`]) fit; 0 takes that back.
    /// Returns whether they fit already, for which no signal may come: if so, do not sleep.
    pub fn set_pending_send(&mut self, bytes: u32) -> Result<bool, RingError> {
        self.memory.control().pending_send_size.store(bytes, Ordering::Relaxed);
        // The consumer stores its index, then looks at the wish; we, the other way round.
        fence(Ordering::SeqCst);
        Ok(bytes <= self.free()?)
    }
}

mod words;

#[cfg(all(test, loom))]
mod model;

#[cfg(all(test, not(loom)))]
mod tests;
