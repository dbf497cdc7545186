use proptest::prelude::*;

use super::*;

/// Sets counter `n` to `mode` with `count`, both bytes.
fn set(pit: &mut Registers, n: u8, mode: u8, count: u16, now: u64) {
    pit.write(3, n << 6 | 3 << 4 | mode << 1, now);
    for byte in count.to_le_bytes() {
        pit.write(n.into(), byte, now);
    }
}

/// Counter `n`, latched.
fn count(pit: &mut Registers, n: u8, now: u64) -> u16 {
    pit.write(3, n << 6, now);
    let low = pit.read(n.into(), now + 1000);
    u16::from_le_bytes([low, pit.read(n.into(), now + 2000)])
}

/// When counter 0's output rises, up to `until`.
fn edges(pit: &mut Registers, until: u64) -> Vec<u64> {
    let mut edges = Vec::new();
    while let Some(edge) = pit.next_edge().filter(|edge| *edge <= until) {
        assert!(!pit.advance(edge - 1));
        assert!(pit.advance(edge));
        edges.push(edge);
    }
    edges
}

#[test]
fn each_mode_has_its_edges() {
    for (mode, expected) in [
        (0, &[1100][..]),
        (1, &[]),
        (2, &[1100, 1200, 1300]),
        (3, &[1100, 1200, 1300]),
        (4, &[1101]),
        (5, &[]),
    ] {
        let mut pit = Registers::new();
        assert!(!pit.advance(1000));
        set(&mut pit, 0, mode, 100, 1000);
        assert_eq!(edges(&mut pit, 1300), expected, "mode {mode}");
    }
}

#[test]
fn edges_that_were_missed_are_one() {
    let mut pit = Registers::new();
    set(&mut pit, 0, 2, 10, 0);
    assert!(pit.advance(1005));
    assert!(!pit.advance(1005));
    assert_eq!(pit.next_edge(), Some(1010));
    pit.write(3, 0x30, 1006); // mode 0, and no count yet
    assert_eq!(pit.next_edge(), None);
}

#[test]
fn counts_go_down() {
    let mut pit = Registers::new();
    set(&mut pit, 0, 2, 100, 0);
    assert_eq!(count(&mut pit, 0, 0), 100);
    assert_eq!(count(&mut pit, 0, 199), 1);
    set(&mut pit, 0, 3, 100, 0);
    assert_eq!(count(&mut pit, 0, 10), 80);
    assert_eq!(count(&mut pit, 0, 60), 80);
    set(&mut pit, 0, 0, 0, 0);
    assert_eq!(count(&mut pit, 0, 1), 0xffff);
    assert_eq!(count(&mut pit, 0, 0x1_0002), 0xfffe);
    // Decimal: 1000 down to 0999.
    pit.write(3, 0x31, 0);
    pit.write(0, 0, 0);
    pit.write(0, 0x10, 0);
    assert_eq!(count(&mut pit, 0, 0), 0x1000);
    assert_eq!(count(&mut pit, 0, 1), 0x0999);
    assert_eq!(count(&mut pit, 0, 1001), 0x9999);
}

#[test]
fn one_byte_counts() {
    let mut pit = Registers::new();
    pit.write(3, 0x14, 0); // counter 0, low byte only, mode 2
    pit.write(0, 50, 0);
    assert_eq!(pit.next_edge(), Some(50));
    assert_eq!((pit.read(0, 1), pit.read(0, 2)), (49, 48));
    pit.write(3, 0x24, 0); // high byte only
    pit.write(0, 2, 0);
    assert_eq!(pit.next_edge(), Some(512));
    assert_eq!(pit.read(0, 256), 1);
}

#[test]
fn the_gate_of_counter_2_is_port_0x61() {
    let mut pit = Registers::new();
    assert_eq!(pit.read_gate(0) & 0x23, 0);
    // As kernels calibrate: gate down, mode 0, gate up, wait for the output.
    set(&mut pit, 2, 0, 1000, 0);
    assert_eq!(count(&mut pit, 2, 500), 1000);
    pit.write_gate(1, 500);
    assert_eq!(count(&mut pit, 2, 600), 900);
    assert_eq!(pit.read_gate(1499) & 0x23, 1);
    assert_eq!(pit.read_gate(1500) & 0x23, 0x21);
    // Stopped in between.
    set(&mut pit, 2, 0, 1000, 2000);
    pit.write_gate(0, 2100);
    assert_eq!(count(&mut pit, 2, 9000), 900);
    pit.write_gate(3, 9000);
    assert_eq!(count(&mut pit, 2, 9100), 800);
    assert_eq!(pit.read_gate(9900) & 0x23, 0x23);
    // One shot, by the gate.
    set(&mut pit, 2, 1, 100, 10_000);
    assert_eq!(pit.read_gate(10_050) & 0x20, 0x20);
    pit.write_gate(0, 10_060);
    pit.write_gate(1, 10_070);
    assert_eq!(pit.read_gate(10_169) & 0x20, 0);
    assert_eq!(pit.read_gate(10_170) & 0x20, 0x20);
    // Refresh toggles.
    assert_ne!(pit.read_gate(0) & 0x10, pit.read_gate(18) & 0x10);
}

#[test]
fn read_back_latches_count_and_status() {
    let mut pit = Registers::new();
    set(&mut pit, 0, 2, 100, 0);
    set(&mut pit, 2, 3, 100, 0);
    pit.write(3, 0b1100_1010, 10); // both, of counters 0 and 2
    assert_eq!(pit.read(0, 50), 0x80 | 0x30 | 4);
    assert_eq!((pit.read(0, 50), pit.read(0, 50)), (90, 0));
    assert_eq!(pit.read(2, 50) & 0x7f, 0x30 | 6);
    pit.write(3, 0xe4, 10); // the status of counter 1, which was never set
    assert_eq!(pit.read(1, 10), 0x70);
    assert_eq!(pit.read(3, 10), 0xff);
}

#[test]
fn ticks_are_time() {
    assert_eq!(ticks(Duration::from_secs(1)), HZ);
    for tick in [0, 1, 1000, HZ * 1_000_000 + 7] {
        assert_eq!(ticks(time(tick)), tick);
    }
}

proptest! {
    /// Whatever is written when, edges lie ahead, and the output is up when one has been.
    #[test]
    fn edges_lie_ahead_and_the_output_rises(
        steps in proptest::collection::vec((0..5_u64, any::<u8>(), 0..100_000_u64), 0..60)
    ) {
        let mut pit = Registers::new();
        let mut now = 0;
        for (port, value, after) in steps {
            now += after;
            pit.advance(now);
            match port {
                4 => pit.write_gate(value, now),
                _ if value & 0x80 == 0 => pit.write(port, value << 1, now),
                _ => {
                    pit.read(port, now);
                }
            }
            pit.read_gate(now);
            if let Some(edge) = pit.next_edge() {
                prop_assert!(edge > now);
                let counter = &pit.counters[0];
                prop_assert!(counter.output(edge));
            }
        }
    }
}
