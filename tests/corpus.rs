//! Replays what the fuzzers have found worth keeping: every file of `fuzz/corpus/TARGET` goes
//! through its target once, on any toolchain. A finding, once mended, stays there for good.

use std::fs;
use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in fs::read_dir(&corpus).expect("the corpus is checked in") {
        let path = entry.expect("the corpus can be listed").path();
        println!("{}", path.display());
        run(&fs::read(path).expect("the corpus can be read"));
        count += 1;
    }
    assert!(count > 0, "{} is empty", corpus.display());
}

#[test]
fn vmbus_messages() {
    replay("vmbus_messages", vmbus_server::fuzzing::fuzz_server);
}

#[test]
fn ring_packets() {
    replay("ring_packets", vmbus::fuzzing::fuzz_ring);
}

#[test]
fn vstor_packets() {
    replay("vstor_packets", vsp::fuzzing::fuzz_vstor);
}

#[test]
fn scsi_cdbs() {
    replay("scsi_cdbs", vsp::fuzzing::fuzz_cdb);
}

#[test]
fn client_messages() {
    replay("client_messages", vmbus::client::fuzz_client);
}

#[test]
fn storvsc_completions() {
    replay("storvsc_completions", vsc::fuzzing::fuzz_storvsc);
}

#[test]
fn netvsc_packets() {
    replay("netvsc_packets", vsc::fuzzing::fuzz_netvsc);
}

#[test]
fn ata_answers() {
    replay("ata_answers", guest_drivers::fuzzing::fuzz_ide);
}

#[test]
fn e1000_answers() {
    replay("e1000_answers", guest_drivers::fuzzing::fuzz_e1000);
}

#[test]
fn hosted_intercepts() {
    replay("hosted_intercepts", hypervisor::hosted::fuzzing::fuzz_intercepts);
}

#[test]
fn ide_registers() {
    replay("ide_registers", emulators::fuzzing::fuzz_ide);
}

#[test]
fn e1000_registers() {
    replay("e1000_registers", emulators::fuzzing::fuzz_e1000);
}

#[test]
fn pci_config() {
    replay("pci_config", emulators::fuzzing::fuzz_pci);
}

#[test]
fn atapi_packets() {
    replay("atapi_packets", emulators::fuzzing::fuzz_atapi);
}

#[test]
fn irqchip_registers() {
    replay("irqchip_registers", emulators::fuzzing::fuzz_irqchip);
}

#[test]
fn clock_registers() {
    replay("clock_registers", emulators::fuzzing::fuzz_clocks);
}

#[test]
fn uart_registers() {
    replay("uart_registers", emulators::fuzzing::fuzz_uart);
}

#[test]
fn nvsp_messages() {
    replay("nvsp_messages", vsp::fuzzing::fuzz_nvsp);
}

#[test]
fn rndis_control() {
    replay("rndis_control", vsp::fuzzing::fuzz_rndis_control);
}

#[test]
fn rndis_data() {
    replay("rndis_data", vsp::fuzzing::fuzz_rndis_data);
}

#[test]
fn switch_frames() {
    replay("switch_frames", backends::net::fuzzing::fuzz_switch);
}

#[test]
fn stream_frames() {
    replay("stream_frames", backends::net::fuzzing::fuzz_stream);
}
