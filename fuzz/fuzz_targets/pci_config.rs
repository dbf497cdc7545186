//! Accesses to the configuration space of PCI.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| emulators::fuzzing::fuzz_pci(data));
