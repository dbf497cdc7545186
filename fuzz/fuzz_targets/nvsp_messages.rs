//! A NIC's handshake, and completions by its guest.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vsp::fuzzing::fuzz_nvsp(data));
