//! Bytes of a peer that does not mean well, on the socket of a network.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| backends::net::fuzzing::fuzz_stream(data));
