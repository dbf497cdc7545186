//! A packet of frames that a guest sends.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vsp::fuzzing::fuzz_rndis_data(data));
