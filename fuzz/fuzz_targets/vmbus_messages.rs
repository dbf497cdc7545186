//! Channel messages, in any order, to the VMBus server.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_server::fuzzing::fuzz_server(data));
