//! Entry points for fuzzers: any bytes are welcome, and what has to hold whatever they are is
//! asserted. libFuzzer calls them, and so do ordinary tests, with its corpus.

use backends::block::{Capacity, Geometry};

use crate::scsi::{Action, Command, Direction, Limits, LogicalUnit, Parameters, plan_absent};

/// Packets to a storage channel, one after the other: see the source for their form.
pub fn fuzz_vstor(data: &[u8]) {
    crate::storvsp::fuzz(data);
}

/// Messages of a NIC's handshake, and completions: see the source for their form.
pub fn fuzz_nvsp(data: &[u8]) {
    crate::netvsp::fuzz_nvsp(data);
}

/// Control messages of a NIC: see the source for their form.
pub fn fuzz_rndis_control(data: &[u8]) {
    crate::netvsp::fuzz_control(data);
}

/// A packet of frames that a guest sends: see the source for its form.
pub fn fuzz_rndis_data(data: &[u8]) {
    crate::netvsp::fuzz_data(data);
}

/// One command to a logical unit: 8 bytes choose the disk and the transport, 16 are the CDB (fewer
/// if the data ends), the rest is what the initiator sends.
pub fn fuzz_cdb(data: &[u8]) {
    let Some((choice, rest)) = data.split_first_chunk::<8>() else { return };
    let (cdb, sent) = rest.split_at(rest.len().min(16));
    let [flags, block, size, transfer @ ..] = *choice;

    let mut geometry = Geometry::new(0);
    geometry.logical_block = if block & 1 == 0 { 512 } else { 4096 };
    geometry.physical_block = geometry.logical_block << (block >> 5);
    // From one block to as many as there can be.
    geometry.size = match size {
        0 => u64::MAX / 4096 * 4096,
        blocks if blocks < 128 => u64::from(blocks) * u64::from(geometry.logical_block),
        shift => 1 << (12 + shift % 50),
    };
    geometry.read_only = flags & 0x01 != 0;
    geometry.discard = flags & 0x02 != 0;
    geometry.discard_zeroes = flags & 0x04 != 0;
    geometry.write_zeroes = flags & 0x08 != 0;
    let limits = Limits { max_transfer_bytes: 1 << 20 };
    let capacity = Capacity::new(geometry.size);
    let unit = LogicalUnit::new(&geometry, &limits).following(capacity.clone());
    // The disk may have another size by now, which one command tells.
    let resized = block & 0x02 != 0;
    if resized {
        let (blocks, len) = (u64::from(size) + 1, u64::from(geometry.logical_block));
        geometry.size = blocks * len / 2 / len * len;
        capacity.set(geometry.size);
    }

    let [a, b, c, d, _] = transfer;
    let command = Command {
        cdb,
        direction: match flags >> 6 {
            0 => Direction::None,
            1 => Direction::Out,
            _ => Direction::In,
        },
        transfer_len: u32::from_le_bytes([a, b, c, d]),
    };
    let mut scratch = [0; 1024];
    let luns: Vec<u8> = (0..flags >> 2 & 0x0f).collect();
    check(&geometry, &command, &plan_absent(&command, &luns, &mut scratch));
    let mut action = unit.plan(&command, &luns, &mut scratch);
    check(&geometry, &command, &action);
    if resized {
        action = unit.plan(&command, &luns, &mut scratch);
        check(&geometry, &command, &action);
    }
    if let Action::Parameters(parameters) = action {
        assert_eq!(command.direction, Direction::Out);
        assert!(parameters.len <= command.transfer_len);
        assert!(parameters.len as usize <= Parameters::MAX_LEN);
        let mut bytes = sent.to_vec();
        if flags & 0x10 == 0 {
            bytes.resize(parameters.len as usize, 0);
        }
        let action = unit.with_parameters(parameters, &bytes);
        assert!(!matches!(action, Action::Parameters(_)));
        check(&geometry, &command, &action);
    }
}

fn check(geometry: &Geometry, command: &Command<'_>, action: &Action<'_>) {
    let within = |offset: u64, len: u64| {
        assert!(len > 0);
        assert!(offset.checked_add(len).is_some_and(|end| end <= geometry.size));
        assert_eq!((offset | len) % u64::from(geometry.logical_block), 0);
    };
    let changes = || assert!(!geometry.read_only);
    match *action {
        Action::Complete(outcome) => {
            assert!(outcome.transferred as usize <= 4096);
            assert!(outcome.transferred <= command.transfer_len);
            assert_eq!(outcome.sense.is_some(), outcome.status.0 == 2);
        }
        Action::Read { offset, len } => {
            assert_eq!(command.direction, Direction::In);
            assert!(len <= u64::from(command.transfer_len).min(1 << 20));
            within(offset, len);
        }
        Action::Write { offset, len, .. } => {
            changes();
            assert_eq!(command.direction, Direction::Out);
            assert!(len <= u64::from(command.transfer_len).min(1 << 20));
            within(offset, len);
        }
        Action::Flush => changes(),
        Action::Parameters(_) => changes(),
        Action::Discard(ref ranges) => {
            changes();
            assert!(geometry.discard);
            let ranges = ranges.clone();
            let mut count = 0;
            for range in ranges {
                within(range.offset, range.len);
                count += 1;
            }
            assert!((1..=64).contains(&count));
        }
        Action::WriteZeroes { offset, len, may_unmap } => {
            changes();
            assert!(geometry.discard || !may_unmap);
            within(offset, len);
        }
        Action::WriteSame { offset, len, pattern } => {
            changes();
            assert!(len <= 32 << 20);
            assert_eq!(pattern.len(), geometry.logical_block as usize);
            within(offset, len);
        }
    }
}
