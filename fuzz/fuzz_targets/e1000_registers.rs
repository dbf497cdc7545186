//! Accesses to a NIC, with rings and frames.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| emulators::fuzzing::fuzz_e1000(data));
