//! Frames of a guest that does not mean well, through a virtual switch.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| backends::net::fuzzing::fuzz_switch(data));
