//! A ring whose other side writes what it likes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus::fuzzing::fuzz_ring(data));
