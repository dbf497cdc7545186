//! Client against server: storvsc on one side of a real ring, the controller's worker on the
//! other. No VM is involved.

mod common;

use std::sync::Arc;

use backends::block::Disk as Backend;
use backends::ram::RamDisk;
use common::{PATIENCE, Rig, ScratchPage};
use hypervisor::Gpa;
use vmbus::vstor::DataDirection;
use vsc::storvsc::{Command, Disk, Failure, PageList, SubmitError, words};

const MIB: u64 = 1 << 20;

fn ram(size: u64) -> (RamDisk, Arc<dyn Backend>) {
    let disk = RamDisk::new(size).expect("memory");
    (disk.clone(), Arc::new(disk))
}

fn identify(rig: &mut Rig, lun: u8) -> Option<Disk> {
    let mut scratch = ScratchPage::new(&rig.memory, 4);
    let (queue, end) = rig.queue();
    Disk::identify(queue, lun, &mut scratch, || end.wait_interrupt(PATIENCE)).expect("an answer")
}

#[test]
fn disks_are_found_and_gaps_are_not() {
    let large = RamDisk::new(16 * MIB).unwrap().with(|g| {
        g.logical_block = 4096;
        g.physical_block = 4096;
    });
    let mut rig = Rig::new(vec![ram(4 * MIB).1, Arc::new(large)], 1);
    let disk = identify(&mut rig, 0).expect("a disk");
    assert_eq!((disk.blocks, disk.block_size), (8192, 512));
    assert_eq!(&disk.vendor, b"Msft    ");
    let disk = identify(&mut rig, 1).expect("a disk");
    assert_eq!((disk.blocks, disk.block_size, disk.physical_block_size), (4096, 4096, 4096));
    assert_eq!(disk.bytes(), 16 * MIB);
    assert_eq!(identify(&mut rig, 2), None);
    assert_eq!(identify(&mut rig, 63), None);
    rig.stop();
}

/// What block `lba` holds after round `round`.
fn pattern(block: &mut [u8], lba: u64, round: u64) {
    let mut state = (lba + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round;
    for word in block.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// Writes a pattern with every queue to a part of the disk of its own, then has every queue read
/// what its neighbour wrote. `blocks` of 512 bytes at a time, `depth` in flight per queue.
fn verify(queues: u16, depth: u16, blocks: u32, polled: bool) {
    const PART: u64 = 4096;
    const ROUNDS: u64 = 2;
    let (ram, disk) = ram(u64::from(queues) * PART * 512);
    let mut rig = Rig::new(vec![disk], queues);
    let memory = rig.memory.clone();
    let bytes = blocks as usize * 512;
    for round in 0..ROUNDS {
        for writing in [true, false] {
            std::thread::scope(|scope| {
                for (index, (queue, end)) in
                    rig.queues.iter_mut().zip(rig.ends.iter_mut()).enumerate()
                {
                    let memory = memory.clone();
                    scope.spawn(move || {
                        let part = if writing { index } else { (index + 1) % usize::from(queues) };
                        let base = part as u64 * PART;
                        // Buffers of each slot, from the first MiB on; they start in mid-page.
                        let stride = (bytes as u64 + 512).next_multiple_of(4096);
                        let slots: Vec<(Gpa, PageList<{ words(257) }>)> = (0..u64::from(depth))
                            .map(|slot| {
                                let at =
                                    MIB + (index as u64 * u64::from(depth) + slot) * stride + 512;
                                let pages = at / 4096..(at + bytes as u64).div_ceil(4096);
                                let list = PageList::new(bytes as u32, 512, pages);
                                (Gpa(at), list.expect("as many pages as it takes"))
                            })
                            .collect();
                        let mut next = (0..PART / u64::from(blocks)).map(|i| {
                            // Not in order: by a step that is odd, and so meets all.
                            base + (i * 7 % (PART / u64::from(blocks))) * u64::from(blocks)
                        });
                        let mut lba_of = vec![None; usize::from(depth)];
                        let mut done = 0;
                        let mut data = vec![0; bytes];
                        let mut expected = vec![0; bytes];
                        if polled {
                            queue.wake();
                        }
                        loop {
                            for slot in 0..depth {
                                let place = &mut lba_of[usize::from(slot)];
                                if place.is_some() {
                                    continue;
                                }
                                let Some(lba) = next.next() else { break };
                                let (at, list) = &slots[usize::from(slot)];
                                let command = if writing {
                                    pattern(&mut data, lba, round);
                                    memory.write(*at, &data).unwrap();
                                    Command::write(0, lba, blocks)
                                } else {
                                    Command::read(0, lba, blocks)
                                };
                                match queue.submit(slot, &command, Some(list.pages())) {
                                    Ok(()) => *place = Some(lba),
                                    other => panic!("{other:?}"),
                                }
                            }
                            if lba_of.iter().all(Option::is_none) {
                                break;
                            }
                            queue.publish();
                            let ended = queue
                                .poll(|completion| {
                                    assert_eq!(completion.outcome, Ok(bytes as u32));
                                    let slot = usize::from(completion.slot);
                                    let lba = lba_of[slot].take().expect("in flight");
                                    if !writing {
                                        memory.read(slots[slot].0, &mut data).unwrap();
                                        pattern(&mut expected, lba, round);
                                        assert!(data == expected, "block {lba}");
                                    }
                                    done += 1;
                                })
                                .expect("a sound controller");
                            if ended == 0 && !polled {
                                if queue.rest() {
                                    assert!(end.wait_interrupt(PATIENCE), "no interrupt");
                                }
                                queue.wake();
                            }
                        }
                        queue.publish();
                        assert_eq!(done, PART / u64::from(blocks));
                        assert_eq!(queue.in_flight(), 0);
                    });
                }
            });
        }
        // And the disk itself agrees.
        let (mut data, mut expected) = (vec![0; bytes], vec![0; bytes]);
        for lba in (0..u64::from(queues) * PART).step_by(blocks as usize) {
            ram.read(lba * 512, &mut data);
            pattern(&mut expected, lba, round);
            assert!(data == expected, "block {lba} on the disk");
        }
    }
    rig.stop();
}

#[test]
fn what_was_written_is_read_one_at_a_time() {
    verify(1, 1, 8, false);
}

#[test]
fn what_was_written_is_read_with_a_deep_queue() {
    verify(1, 32, 8, false);
    verify(1, 128, 1, false);
}

#[test]
fn what_was_written_is_read_by_polling() {
    verify(1, 16, 8, true);
}

#[test]
fn what_was_written_is_read_with_long_transfers() {
    verify(1, 4, 2048, false);
    verify(2, 8, 256, false);
}

#[test]
fn what_was_written_is_read_through_sub_channels() {
    verify(2, 32, 8, false);
    verify(4, 7, 16, false);
}

#[test]
fn a_batch_costs_one_signal() {
    let mut rig = Rig::new(vec![ram(MIB).1], 1);
    let (queue, end) = (&mut rig.queues[0], &mut rig.ends[0]);
    let before = queue.counters();
    let lists: Vec<_> =
        (0..16).map(|slot| PageList::<{ words(1) }>::new(4096, 0, [256 + slot]).unwrap()).collect();
    for (slot, list) in (0..).zip(&lists) {
        queue.submit(slot, &Command::read(0, 0, 8), Some(list.pages())).unwrap();
    }
    assert_eq!(queue.counters().signals, before.signals);
    queue.publish();
    let mut ended = 0;
    while ended < 16 {
        ended += queue.poll(|completion| assert_eq!(completion.outcome, Ok(4096))).unwrap();
        if queue.rest() {
            assert!(ended == 16 || end.wait_interrupt(PATIENCE));
        }
        queue.wake();
    }
    let after = queue.counters();
    assert_eq!(after.packets_out - before.packets_out, 16);
    assert_eq!(after.packets_in - before.packets_in, 16);
    assert!(after.signals <= before.signals + 1, "{before:?} {after:?}");
    rig.stop();
}

#[test]
fn refusals_come_with_their_reason_and_the_queue_goes_on() {
    let mut rig = Rig::new(vec![ram(MIB).1], 1);
    let list = PageList::<{ words(2) }>::new(8192, 0, [300, 301]).unwrap();
    let (queue, end) = (&mut rig.queues[0], &mut rig.ends[0]);
    let mut wait = || end.wait_interrupt(PATIENCE);
    let beyond = queue.run(&Command::read(0, MIB / 512 - 8, 16), Some(list.pages()), &mut wait);
    let failure: Failure = beyond.unwrap().unwrap_err();
    let sense = failure.sense.expect("sense data");
    assert_eq!((failure.scsi_status, sense.key, sense.code), (2, 5, 0x21));

    let cdb = [0xa7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]; // MOVE MEDIUM
    let unknown = Command::new(0, &cdb, DataDirection::None).unwrap();
    let sense = queue.run(&unknown, None, &mut wait).unwrap().unwrap_err().sense.unwrap();
    assert_eq!((sense.key, sense.code, sense.qualifier), (5, 0x20, 0));

    assert_eq!(queue.run(&Command::flush(0), None, &mut wait).unwrap(), Ok(0));
    assert_eq!(
        queue.run(&Command::write_through(0, 0, 16), Some(list.pages()), &mut wait).unwrap(),
        Ok(8192)
    );
    rig.stop();
}

#[test]
fn requests_that_cannot_be_are_not_sent() {
    let mut rig = Rig::new(vec![ram(MIB).1], 1);
    let max = rig.agreement.max_transfer;
    let (queue, _) = rig.queue();
    let list = PageList::<{ words(1) }>::new(4096, 0, [300]).unwrap();
    let read = Command::read(0, 0, 8);
    assert_eq!(queue.submit(128, &read, Some(list.pages())), Err(SubmitError::Slot(128)));
    assert_eq!(queue.submit(0, &read, None), Err(SubmitError::Pages));
    assert_eq!(queue.submit(0, &Command::flush(0), Some(list.pages())), Err(SubmitError::Pages));
    let long = max + 512;
    let pages = u64::from(long).div_ceil(4096);
    let list = PageList::<{ words(300) }>::new(long, 0, 0..pages).unwrap();
    assert_eq!(
        queue.submit(0, &Command::read(0, 0, 9), Some(list.pages())),
        Err(SubmitError::TooLong { len: long, max })
    );
    assert_eq!(queue.counters().packets_out, 4, "only the handshake");
    rig.stop();
}

#[test]
fn a_full_ring_is_told_and_passes() {
    let mut rig = Rig::new(vec![ram(MIB).1], 1);
    let (queue, end) = (&mut rig.queues[0], &mut rig.ends[0]);
    // 256 pages a request: 31 pages of ring hold about sixty of these.
    let list = PageList::<{ words(256) }>::new(1 << 20, 0, 512..768).unwrap();
    let command = Command::read(0, 0, 2048);
    let mut submitted = 0;
    let full = loop {
        match queue.submit(submitted, &command, Some(list.pages())) {
            Ok(()) => submitted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full, SubmitError::Full);
    assert!(submitted > 50 && submitted < 128, "{submitted}");
    let mut ended = 0;
    while ended < usize::from(submitted) {
        queue.publish();
        ended += queue.poll(|completion| assert_eq!(completion.outcome, Ok(1 << 20))).unwrap();
        if queue.rest() {
            assert!(ended == usize::from(submitted) || end.wait_interrupt(PATIENCE));
        }
        queue.wake();
    }
    queue.submit(0, &command, Some(list.pages())).unwrap();
    queue.publish();
    while queue.in_flight() > 0 {
        queue.poll(|_| {}).unwrap();
    }
    rig.stop();
}
