//! What the process of a hosted partition sends its root.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hypervisor::hosted::fuzzing::fuzz_intercepts(data));
