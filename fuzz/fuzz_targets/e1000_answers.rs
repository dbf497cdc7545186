//! What an emulated NIC shows in its registers and rings, as the built-in guest's driver reads it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| guest_drivers::fuzzing::fuzz_e1000(data));
