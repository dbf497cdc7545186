//! CDBs to a logical unit.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vsp::fuzzing::fuzz_cdb(data));
