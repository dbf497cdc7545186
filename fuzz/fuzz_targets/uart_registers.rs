//! Accesses to the serial port.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| emulators::fuzzing::fuzz_uart(data));
