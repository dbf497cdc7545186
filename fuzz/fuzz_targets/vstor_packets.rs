//! Packets of a storage channel, served on a RAM disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vsp::fuzzing::fuzz_vstor(data));
