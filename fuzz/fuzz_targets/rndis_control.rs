//! Control messages of a NIC.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vsp::fuzzing::fuzz_rndis_control(data));
