//! The built-in guest's image: the platform of [`guest_drivers`] on a bare processor.
//!
//! All of its Rust code runs at CPL 3, where every KVM runs code natively; some emulate CPL 0,
//! instruction by instruction. CPL 0 is a handful of routines in assembly ([`supervisor`]) that do
//! what is not allowed at CPL 3: there is no protection in this, only speed.

#![no_std]
#![no_main]

mod builtins;
mod console;
mod supervisor;
mod tables;

use core::panic::PanicInfo;

use guest_drivers::boot::BootParameters;

/// The first Rust code, at CPL 3 on a stack of its own.
extern "sysv64" fn main(parameters: &'static BootParameters) -> ! {
    tables::fill();
    console::line(format_args!("built-in guest: {:?}", parameters.command_line()));
    supervisor::exit(0)
}

/// An exception that nobody expected, at CPL 3 again.
extern "sysv64" fn fault(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    console::line(format_args!(
        "{{\"error\":\"exception {vector} (error code {error:#x}) at {rip:#x}, cr2 {address:#x}\"}}"
    ));
    supervisor::exit(102)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line) = info.location().map_or(("?", 0), |place| (place.file(), place.line()));
    console::line(format_args!("{{\"error\":\"panic at {file}:{line}\"}}"));
    supervisor::exit(101)
}
