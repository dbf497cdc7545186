//! `exchange`: frames from one NIC to another, and from that one back, at the same time.
//!
//! Each frame says which of its direction it is, and all the rest of it follows from that number and
//! the seed. So every byte of a frame that arrives can be checked, and it is known which are
//! missing, which came twice, and which were overtaken.

mod way;

use core::hint::spin_loop;

use super::RunError;
use super::random::mixed;
use crate::json::Object;
use crate::net::{HEADER, Identity, LONGEST, MacAddress, NicCounters, NicDriver};
use crate::platform::Platform;
use crate::work::Exchange;
use way::Way;

/// The kind of our frames: the first of the two that IEEE 802 keeps for experiments.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// For so long after the last frame has arrived another one may, in nanoseconds; then those that
/// are under way are taken for lost.
const PATIENCE: u64 = 1_000_000_000;

/// So many times in a row all that was under way may be lost. Then nothing connects the NICs.
const SILENCES: u32 = 3;

/// Looks at the NICs that take as long as one look at the clock.
const LOOKS: u32 = 16;

/// What each eight bytes of a frame add to those before.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl Exchange {
    /// Lets `nics` send and receive, and says what came of it.
    pub(super) fn run<P: Platform>(
        &self,
        platform: &P,
        mut nics: [&mut dyn NicDriver; 2],
    ) -> Result<Object, RunError> {
        let identities = [0, 1].map(|side| *side_of(&nics, side).identity());
        for Identity { mtu, .. } in identities {
            let longest = HEADER + usize::from(mtu);
            if usize::from(self.len) > longest {
                return Err(RunError::FrameLength { len: self.len, longest });
            }
        }
        let counted = |nics: &[&mut dyn NicDriver; 2]| {
            let [a, b] = [0, 1].map(|side| side_of(nics, side).counters());
            NicCounters {
                signals: a.signals + b.signals,
                accesses: a.accesses + b.accesses,
                damaged: a.damaged + b.damaged,
            }
        };
        let (before, costs) = (platform.counters(), counted(&nics));
        let mut traffic = Traffic {
            exchange: self,
            addresses: identities.map(|identity| identity.mac),
            ways: [Way::default(), Way::default()],
            foreign: 0,
            frame: [0; LONGEST],
        };
        let started = platform.now();
        let passed = traffic.pass(platform, &mut nics, started);
        nics.iter_mut().for_each(|nic| nic.quiet());
        let (ended, spun) = passed?;
        if traffic.ways.iter().any(|way| way.received == 0) {
            return Err(RunError::Silence { nic: self.nic, peer: self.peer });
        }
        let nanoseconds = ended.saturating_sub(started).max(1);
        let (after, costs_after) = (platform.counters(), counted(&nics));

        let [there, back] = &traffic.ways;
        let both = |count: fn(&Way) -> u64| count(there) + count(back);
        let (sent, frames) = (both(|way| way.sent), both(|way| way.received));
        let per_second =
            |count: u64| (u128::from(count) * 1_000_000_000 / u128::from(nanoseconds)) as u64;
        let [Identity { driver, .. }, Identity { driver: peer_driver, .. }] = identities;
        Ok(Object::default()
            .string("result", "exchange")
            .number("nic", self.nic)
            .number("peer", self.peer)
            .string("driver", driver)
            .string("peer_driver", peer_driver)
            .number("len", self.len)
            .number("depth", self.depth)
            .number("nanoseconds", nanoseconds)
            .number("sent", sent)
            .number("frames", frames)
            .number("lost", sent - frames)
            .number("duplicates", both(|way| way.duplicates))
            .number("reordered", both(|way| way.overtaken))
            .number("damaged", costs_after.damaged - costs.damaged)
            .number("foreign", traffic.foreign)
            .number("frames_per_second", per_second(frames))
            .number("bytes_per_second", per_second(frames.saturating_mul(self.len.into())))
            .number("signals", costs_after.signals - costs.signals)
            .number("accesses", costs_after.accesses - costs.accesses)
            .number("interrupts", after.interrupts - before.interrupts)
            .number("spun", spun)
            .number("halts", after.halts - before.halts))
    }
}

fn side_of<'n>(nics: &'n [&mut dyn NicDriver; 2], side: usize) -> &'n dyn NicDriver {
    let [nic, peer] = nics;
    if side == 0 { &**nic } else { &**peer }
}

/// All that is under way, both ways.
struct Traffic<'e> {
    exchange: &'e Exchange,
    /// Of the NIC, and of its peer.
    addresses: [MacAddress; 2],
    /// From the NIC, and from its peer.
    ways: [Way; 2],
    /// Frames of others.
    foreign: u64,
    /// The frame that is made.
    frame: [u8; LONGEST],
}

impl Traffic<'_> {
    /// Sends and receives until all is done. Returns when the last frame came, and how often one did
    /// while it was looked for without sleep.
    fn pass<P: Platform>(
        &mut self,
        platform: &P,
        nics: &mut [&mut dyn NicDriver; 2],
        started: u64,
    ) -> Result<(u64, u64), RunError> {
        let until = started.saturating_add(self.exchange.time);
        let (mut active, mut arrived, mut now) = (started, started, started);
        let (mut spinning, mut spun, mut looks) = (false, 0, 0);
        loop {
            // At least one, however late it is.
            let more = now < until || self.ways.iter().any(|way| way.sent == 0);
            for (side, nic) in nics.iter_mut().enumerate() {
                while more && self.send(side, &mut **nic)? {}
                nic.publish()?;
            }
            if self.ways.iter().all(|way| way.under_way() == 0) && (!more || self.all_sent()) {
                return Ok((arrived, spun));
            }

            let mut count = 0;
            for (side, nic) in nics.iter_mut().enumerate() {
                let mut wrong = None;
                count += nic.poll(&mut |frame| {
                    if let Err(error) = self.receive(1 - side, frame) {
                        wrong.get_or_insert(error);
                    }
                })?;
                if let Some(error) = wrong {
                    return Err(error);
                }
            }
            looks += 1;
            if count == 0 && looks < LOOKS {
                spin_loop();
                continue;
            }
            (looks, now) = (0, platform.now());
            if count > 0 {
                (active, arrived) = (now, now);
                spun += u64::from(core::mem::take(&mut spinning));
            } else if now.saturating_sub(arrived) > PATIENCE {
                if self.ways.iter_mut().any(|way| way.give_up() >= SILENCES) {
                    let Exchange { nic, peer, .. } = *self.exchange;
                    return Err(RunError::Silence { nic, peer });
                }
                (active, arrived) = (now, now);
            } else if now.saturating_sub(active) < self.exchange.spin {
                spinning = true;
            } else {
                spinning = false;
                sleep(platform, nics)?;
                now = platform.now();
                active = now;
            }
        }
    }

    fn all_sent(&self) -> bool {
        self.ways.iter().all(|way| way.sent >= self.exchange.frames)
    }

    /// Sends the next frame of a way, if there is to be one now. Returns whether there was.
    fn send(&mut self, side: usize, nic: &mut dyn NicDriver) -> Result<bool, RunError> {
        let Exchange { len, depth, frames, seed, .. } = *self.exchange;
        let Some(way) = self.ways.get_mut(side) else { return Ok(false) };
        if way.under_way() >= depth.into() || way.sent >= frames {
            return Ok(false);
        }
        let [first, second] = self.addresses;
        let (from, to) = if side == 0 { (first, second) } else { (second, first) };
        let Some(frame) = self.frame.get_mut(..len.into()) else { return Ok(false) };
        fill(frame, from, to, seed, way.sent);
        let taken = nic.send(frame)?;
        way.sent += u64::from(taken);
        Ok(taken)
    }

    /// A frame that came the way from `side`.
    fn receive(&mut self, side: usize, frame: &[u8]) -> Result<(), RunError> {
        let Exchange { len, seed, .. } = *self.exchange;
        let [first, second] = self.addresses;
        let (from, to) = if side == 0 { (first, second) } else { (second, first) };
        let Some((header, content)) = frame.split_first_chunk::<HEADER>() else { return Ok(()) };
        if *header != header_of(from, to) || frame.len() != usize::from(len) {
            self.foreign += 1;
            return Ok(());
        }
        let Some(number) = content.first_chunk().map(|number| u64::from_le_bytes(*number)) else {
            return Ok(());
        };
        let Some(way) = self.ways.get_mut(side) else { return Ok(()) };
        if let Some(byte) = difference(content, seed, number) {
            return Err(RunError::FrameDiffers { number, byte: HEADER + byte });
        }
        if number < way.sent {
            way.arrived(number);
        } else {
            self.foreign += 1; // of an exchange before this one
        }
        Ok(())
    }
}

/// Sleeps until there is a frame, or something else.
fn sleep<P: Platform>(platform: &P, nics: &mut [&mut dyn NicDriver; 2]) -> Result<(), RunError> {
    for nic in nics.iter_mut() {
        nic.rest()?;
    }
    if !nics.iter().any(|nic| nic.is_ready()) {
        platform.idle();
    }
    for nic in nics {
        nic.wake();
    }
    Ok(())
}

/// How a frame between two stations begins.
fn header_of(from: MacAddress, to: MacAddress) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let bytes = to.0.iter().chain(&from.0).chain(&ETHERTYPE);
    for (place, byte) in header.iter_mut().zip(bytes) {
        *place = *byte;
    }
    header
}

/// What is in frame `number` behind its header: the number itself, and then the rest of it.
fn words(seed: u64, number: u64) -> impl Iterator<Item = u64> {
    let first = mixed(seed.wrapping_add(number));
    core::iter::once(number)
        .chain((0..).map(move |word: u64| first.wrapping_add(word.wrapping_mul(STEP))))
}

/// Makes frame `number` of a way.
fn fill(frame: &mut [u8], from: MacAddress, to: MacAddress, seed: u64, number: u64) {
    let Some((header, content)) = frame.split_first_chunk_mut::<HEADER>() else { return };
    *header = header_of(from, to);
    for (bytes, word) in content.chunks_mut(8).zip(words(seed, number)) {
        for (to, from) in bytes.iter_mut().zip(word.to_le_bytes()) {
            *to = from;
        }
    }
}

/// The first byte of `content` that is not as it was in frame `number`.
fn difference(content: &[u8], seed: u64, number: u64) -> Option<usize> {
    let mut expected = words(seed, number);
    let (whole, rest) = content.as_chunks::<8>();
    let mut same = true;
    for (bytes, word) in whole.iter().zip(&mut expected) {
        same &= u64::from_le_bytes(*bytes) == word;
    }
    let last = expected.next().unwrap_or(0).to_le_bytes();
    same &= rest.iter().zip(last).all(|(byte, expected)| *byte == expected);
    if same {
        return None;
    }
    let bytes = words(seed, number).flat_map(u64::to_le_bytes);
    content.iter().zip(bytes).position(|(byte, expected)| *byte != expected)
}

#[cfg(test)]
mod tests;
