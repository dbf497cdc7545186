//! One producer and one consumer in every order that the memory model allows. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p vmbus --release --lib loom`.

use loom::sync::{Arc, Notify};
use loom::thread;
use std::vec::Vec;

use super::*;

struct Memory {
    control: Control,
    words: Vec<AtomicU64>,
}

impl Memory {
    fn new(bytes: usize) -> Arc<Self> {
        let words = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { control: Control::new(), words })
    }
}

impl RingMemory for Arc<Memory> {
    fn control(&self) -> &Control {
        &self.control
    }

    fn data(&self) -> &[AtomicU64] {
        &self.words
    }

    fn mirrored(&self) -> bool {
        false
    }
}

fn push(ring: &mut Outgoing<Arc<Memory>>, id: u64) -> Result<(), PushError> {
    let payload = (!id).to_le_bytes();
    ring.push(PacketKind::InBand, PacketFlags::NONE, id, &[&payload])
}

/// Takes all that is there; checks that it is what was sent, in order.
fn drain(ring: &mut Incoming<Arc<Memory>>, next: &mut u64) {
    let mut buffer = [0; 8];
    while let Some(packet) = ring.read(&mut buffer).unwrap() {
        assert_eq!(packet.transaction_id, *next);
        assert_eq!(packet.payload, (!*next).to_le_bytes());
        *next += 1;
    }
}

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

/// The consumer masks while awake and sleeps after unmask; the producer signals only when
/// `publish` says so. A lost wakeup would be a deadlock.
#[test]
fn loom_no_wakeup_is_lost() {
    model(|| {
        let memory = Memory::new(128);
        let doorbell = Arc::new(Notify::new());
        let producer = thread::spawn({
            let (memory, doorbell) = (memory.clone(), doorbell.clone());
            move || {
                let mut ring = Outgoing::new(memory).unwrap();
                for id in 0..2 {
                    push(&mut ring, id).unwrap();
                    if ring.publish() {
                        doorbell.notify();
                    }
                }
            }
        });
        let mut ring = Incoming::new(memory).unwrap();
        let mut next = 0;
        loop {
            ring.mask();
            drain(&mut ring, &mut next);
            let _ = ring.publish();
            if next == 2 {
                break;
            }
            if !ring.unmask() {
                doorbell.wait();
            }
        }
        producer.join().unwrap();
    });
}

/// The ring holds one packet. The producer sleeps until the consumer signals that there is room.
#[test]
fn loom_room_is_signalled() {
    model(|| {
        let memory = Memory::new(64);
        let room = Arc::new(Notify::new());
        let producer = thread::spawn({
            let (memory, room) = (memory.clone(), room.clone());
            move || {
                let mut ring = Outgoing::new(memory).unwrap();
                for id in 0..2 {
                    while push(&mut ring, id) == Err(PushError::Full) {
                        if !ring.set_pending_send(ring_size(8) as u32).unwrap() {
                            room.wait();
                        }
                    }
                    let _ = ring.set_pending_send(0).unwrap();
                    let _ = ring.publish();
                }
            }
        });
        let mut ring = Incoming::new(memory).unwrap();
        let mut next = 0;
        while next < 2 {
            drain(&mut ring, &mut next);
            if ring.publish() {
                room.notify();
            }
            thread::yield_now();
        }
        producer.join().unwrap();
    });
}
