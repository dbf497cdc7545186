//! Command blocks to a CD-ROM drive.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| emulators::fuzzing::fuzz_atapi(data));
