//! What a NIC's host sends, as the guest's end of its channel reads it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vsc::fuzzing::fuzz_netvsc(data));
