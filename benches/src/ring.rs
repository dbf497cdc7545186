//! Packets a second through one ring, from a producer to a consumer.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hypervisor::{Gpn, GuestMemory};
use rustix::thread::CpuSet;
use vmbus::packet::{PacketFlags, PacketKind, ring_size};
use vmbus::ring::{Outgoing, PushError};
use vmbus_server::testing::channel_in;
use vmbus_server::{Channel, DoubleMapped};

/// Packets between two publications, at most.
const BATCH: u32 = 64;

/// Both ends of a ring.
pub struct Ring {
    /// The producer's.
    pub outgoing: Outgoing<DoubleMapped>,
    /// The consumer's, among others.
    pub root: Channel,
}

impl Ring {
    /// A ring with `pages` pages of data.
    ///
    /// # Panics
    /// If there is no memory.
    pub fn new(pages: u64) -> Self {
        let pages = pages + 1;
        let memory = GuestMemory::new(2 * pages * 4096).expect("memory for a ring");
        let (root, guest) = channel_in(&memory, Gpn(0), pages, 0);
        let mut ring = Self { outgoing: guest.outgoing, root };
        // Nobody sleeps here.
        ring.root.incoming.mask();
        ring
    }

    /// Sends `packets` of `payload` and takes them, in the calling thread, in batches.
    ///
    /// # Panics
    /// If the ring breaks, or is smaller than a packet.
    pub fn one_thread(&mut self, payload: &[u8], packets: u64) {
        let mut buffer = vec![0; payload.len()];
        let mut left = packets;
        while left > 0 {
            let sent = self.send(payload, left);
            let mut taken = 0;
            while self.root.incoming.read(&mut buffer).expect("a sound ring").is_some() {
                black_box(&buffer);
                taken += 1;
            }
            let _ = self.root.incoming.publish();
            assert_eq!(sent, taken);
            left -= sent;
        }
    }

    /// Sends a batch of at most `most`, as far as there is room.
    fn send(&mut self, payload: &[u8], most: u64) -> u64 {
        send(&mut self.outgoing, payload, most)
    }
}

fn send(outgoing: &mut Outgoing<DoubleMapped>, payload: &[u8], most: u64) -> u64 {
    let room = outgoing.free().expect("a sound ring") / ring_size(payload.len()) as u32;
    let count = room.min(BATCH).min(u32::try_from(most).unwrap_or(u32::MAX));
    for id in 0..count {
        match outgoing.push(PacketKind::InBand, PacketFlags::NONE, u64::from(id), &[payload]) {
            Ok(()) => {}
            Err(PushError::Full) => unreachable!("there was room"),
            Err(error) => panic!("{error}"),
        }
    }
    let _ = outgoing.publish();
    u64::from(count)
}

/// Packets a second from a thread on one processor to a thread on another, both spinning; for longer than `time`, if
/// none came until then.
///
/// # Panics
/// If the ring breaks.
pub fn two_threads(pages: u64, payload: usize, time: Duration, cpus: &CpuSet) -> f64 {
    let Ring { mut outgoing, mut root } = Ring::new(pages);
    let incoming = &mut root.incoming;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            crate::pin(cpus, Some(1));
            let payload = vec![0xa5; payload];
            while !stop.load(Ordering::Relaxed) {
                if send(&mut outgoing, &payload, u64::MAX) == 0 {
                    spin_loop();
                }
            }
        });
        crate::pin(cpus, Some(0));
        let mut buffer = vec![0; payload];
        let (mut packets, mut started) = (0u64, Instant::now());
        // The first tenth warms up.
        let mut warm = false;
        loop {
            let mut taken = 0;
            while taken < BATCH && incoming.read(&mut buffer).expect("a sound ring").is_some() {
                black_box(&buffer);
                taken += 1;
            }
            let _ = incoming.publish();
            packets += u64::from(taken);
            if taken == 0 {
                spin_loop();
            }
            let elapsed = started.elapsed();
            if packets == 0 && elapsed < time + crate::GRACE {
                // The producer may have to wait for its processor.
            } else if !warm && elapsed > time / 10 {
                (warm, packets, started) = (true, 0, Instant::now());
            } else if elapsed > time {
                stop.store(true, Ordering::Relaxed);
                crate::pin(cpus, None);
                return packets as f64 / elapsed.as_secs_f64();
            }
        }
    })
}

/// Packets a second within one thread, while it runs.
pub fn one_thread(pages: u64, payload: usize, time: Duration) -> f64 {
    let mut ring = Ring::new(pages);
    let payload = vec![0xa5; payload];
    ring.one_thread(&payload, 10_000);
    let (started, before) = (Instant::now(), crate::thread_time());
    let mut packets = 0u64;
    // Once at least, however long the host keeps this thread from running.
    loop {
        ring.one_thread(&payload, 10_000);
        packets += 10_000;
        if started.elapsed() >= time {
            break;
        }
    }
    packets as f64 / (crate::thread_time() - before).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_arrive() {
        Ring::new(4).one_thread(&[1; 64], 1000);
        assert!(one_thread(4, 4096, Duration::from_millis(2)) > 0.0);
        assert!(two_threads(4, 64, Duration::from_millis(300), &crate::processors()) > 0.0);
    }
}
