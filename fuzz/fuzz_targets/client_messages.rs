//! A server's messages and event flags, as the guest's end of the bus reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus::client::fuzz_client(data));
