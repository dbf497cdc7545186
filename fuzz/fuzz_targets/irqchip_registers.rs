//! Accesses to the PICs and the I/O APIC.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| emulators::fuzzing::fuzz_irqchip(data));
