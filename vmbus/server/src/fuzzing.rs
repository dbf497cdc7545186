//! Entry points for fuzzers, which are ordinary functions so that a corpus can be replayed as a
//! test. They fail by panicking.

use std::collections::{BTreeMap, BTreeSet};

use hypervisor::VpIndex;
use vmbus::Guid;
use vmbus::protocol::{GpadlId, Relid, Version};

use crate::channel::OfferParams;
use crate::server::{Action, Limits, Server};

const VPS: u32 = 2;
const LIMITS: Limits = Limits { gpadls: 8, pages: 300, ring_pages: 16 };

/// A guest that sends anything in any order, with workers that start, fail and stop whenever
/// `data` says. Most messages are put together from small numbers, and the guest may begin with
/// its first steps done, as chance alone rarely gets that far.
pub fn fuzz_server(data: &[u8]) {
    let mut bench = Bench::new();
    let mut input = Bytes(data);
    if input.byte().is_some_and(|byte| byte % 4 != 0) {
        let beginning: [&[u8]; 4] = [&[19, 0, 0, 0, 0], &[0], &[9, 1, 1, 8, 2], &[9, 2, 2, 8, 2]];
        for message in beginning {
            let message = Bytes(message).message();
            assert_eq!(bench.server.guest_message(&message), Ok(()));
            bench.act();
        }
    }
    while let Some(step) = input.byte() {
        match step % 16 {
            0 => {
                let len = input.byte().unwrap_or(0).min(240);
                let message = input.many(len.into());
                let _ = bench.server.guest_message(message);
            }
            1..=10 => {
                let message = input.message();
                let _ = bench.server.guest_message(&message);
            }
            11 => bench.server.rescind(input.relid()),
            12 => {
                let relid = input.relid();
                bench.server.offer_subchannels(relid, u16::from(step / 16));
            }
            13 => {
                let relid = input.relid();
                bench.opened(relid, step < 192);
            }
            14 => {
                let relid = input.relid();
                // A worker that runs may stop at any time.
                if bench.open.remove(&relid) {
                    bench.asked_to_close.remove(&relid);
                    bench.server.channel_closed(relid);
                }
            }
            _ if step == 255 => bench.server.reset(),
            _ => {}
        }
        bench.act();
    }
    bench.finish();
}

/// Carries out what the server wants, and holds it to its word.
struct Bench {
    server: Server,
    opening: BTreeSet<Relid>,
    open: BTreeSet<Relid>,
    asked_to_close: BTreeSet<Relid>,
    gpadls: BTreeMap<(Relid, GpadlId), usize>,
    /// Those that the guest wants back and a worker has not let go of.
    in_use: BTreeSet<(Relid, GpadlId)>,
}

impl Bench {
    fn new() -> Self {
        let mut server = Server::new(VPS, LIMITS, |page| page.0 < 64);
        for i in 0..2 {
            server.offer(OfferParams::new(Guid::ZERO, Guid::from_wire([i; 16])));
        }
        let none = BTreeSet::new;
        Self {
            server,
            opening: none(),
            open: none(),
            asked_to_close: none(),
            gpadls: BTreeMap::new(),
            in_use: BTreeSet::new(),
        }
    }

    fn opened(&mut self, relid: Relid, ok: bool) {
        if self.opening.remove(&relid) {
            if ok {
                self.open.insert(relid);
            }
            self.server.channel_opened(relid, ok);
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.server.next_action() {
            match action {
                Action::Post { payload, .. } => assert!((8..=240).contains(&payload.len())),
                Action::DiscardPosts => {}
                Action::Open(request) => {
                    let relid = request.relid;
                    for ring in [&request.incoming, &request.outgoing] {
                        assert!((2..=LIMITS.ring_pages).contains(&ring.len()));
                        assert!(ring.iter().all(|page| page.0 < 64), "a ring outside memory");
                    }
                    assert!(request.vp < VpIndex(VPS));
                    assert!(!self.open.contains(&relid), "{relid} has a worker");
                    assert!(self.opening.insert(relid), "{relid} is being opened");
                }
                Action::Close { relid } => {
                    assert!(self.open.contains(&relid), "{relid} has no worker");
                    assert!(self.asked_to_close.insert(relid), "{relid} was told");
                }
                Action::Retarget { vp, .. } => assert!(vp < VpIndex(VPS)),
                Action::GpadlAdded { relid, gpadl, pages } => {
                    assert!(pages.iter().all(|page| page.0 < 64), "a page outside memory");
                    let before = self.gpadls.insert((relid, gpadl), pages.len());
                    assert_eq!(before, None, "{gpadl} was there");
                }
                Action::GpadlWanted { relid, gpadl } => {
                    // Some are let go of at once, some when their channel closes.
                    if gpadl.0.is_multiple_of(2) {
                        self.server.gpadl_unused(relid, gpadl);
                    } else if self.gpadls.contains_key(&(relid, gpadl)) {
                        self.in_use.insert((relid, gpadl));
                    }
                }
                Action::GpadlRemoved { relid, gpadl } => {
                    if self.in_use.remove(&(relid, gpadl)) {
                        assert!(!self.open.contains(&relid), "{gpadl} is in use");
                    }
                    assert!(self.gpadls.remove(&(relid, gpadl)).is_some(), "no {gpadl}");
                }
            }
        }
        assert!(self.gpadls.len() <= LIMITS.gpadls);
        assert!(self.gpadls.values().sum::<usize>() <= LIMITS.pages);
    }

    /// After a reset, and once all workers have stopped, nothing is left.
    fn finish(mut self) {
        self.server.reset();
        self.act();
        for relid in std::mem::take(&mut self.opening) {
            self.server.channel_opened(relid, true);
            self.open.insert(relid);
            self.act();
        }
        assert_eq!(self.open, self.asked_to_close, "who runs was told to stop");
        for relid in std::mem::take(&mut self.open) {
            self.server.channel_closed(relid);
            self.act();
        }
        assert!(!self.server.is_busy());
        assert!(self.gpadls.is_empty());
        assert_eq!(self.server.version(), None);
    }
}

/// What is left of the fuzzer's bytes.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn many(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at_checked(count).unwrap_or((self.0, &[]));
        self.0 = rest;
        bytes
    }

    /// A channel's number: mostly one that may exist.
    fn relid(&mut self) -> Relid {
        match self.byte().unwrap_or(0) {
            255 => Relid(u32::MAX),
            byte => Relid(u32::from(byte) % 6),
        }
    }

    /// A message whose numbers are small, so that they often mean something.
    fn message(&mut self) -> Vec<u8> {
        const KINDS: [u32; 24] =
            [3, 5, 5, 5, 5, 5, 7, 7, 7, 8, 8, 8, 9, 9, 11, 11, 11, 13, 13, 14, 16, 22, 22, 3];
        let mut number = || u32::from(self.byte().unwrap_or(0));
        let kind = KINDS[number() as usize % KINDS.len()];
        let mut words = vec![kind, 0];
        let relid = number() % 6;
        let id = number() % 6;
        match kind {
            // Mostly with the list that has the channel's own number, and a VP that exists.
            5 => {
                let ring = if id == 0 { number() % 6 } else { relid };
                words.extend([relid, 1, ring, number() % 5 / 2, number() % 8]);
            }
            8 => {
                let pages = number() % 80;
                let shape = number();
                let count = u32::from(shape != 0);
                words.extend([relid, id, (8 + pages * 8) | count << 16]);
                words.extend([pages * 4096, u32::from(shape == 1)]);
                words.extend((0..pages.min(26)).flat_map(|page| [page, 0]));
            }
            9 => {
                words.extend([0, id]);
                let (count, first) = (number() % 29, number() % 70);
                words.extend((0..count).flat_map(|page| [first.saturating_sub(page), 0]));
            }
            11 | 22 => words.extend([relid, id]),
            14 => {
                let version =
                    Version::ALL.get(number() as usize % 9).map_or(7, |version| version.0);
                words.extend([version, number() % 3, 0, 0, 0, 0, 0, 0]);
            }
            _ => words.push(relid),
        }
        if kind == 5 {
            words.resize(37, 0);
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}
