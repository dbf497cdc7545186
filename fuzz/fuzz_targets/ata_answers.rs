//! What an IDE controller shows in its registers, as the built-in guest's driver reads it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| guest_drivers::fuzzing::fuzz_ide(data));
