//! Accesses to the timer and the real-time clock.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| emulators::fuzzing::fuzz_clocks(data));
