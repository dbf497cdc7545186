//! The built-in guest's image: the platform of [`guest_drivers`] on a bare processor.
//!
//! All of its Rust code runs at CPL 3, where every KVM runs code natively; some emulate CPL 0,
//! instruction by instruction. CPL 0 is a handful of routines in assembly ([`supervisor`]) that do
//! what is not allowed at CPL 3: there is no protection in this, only speed.

#![no_std]
#![no_main]

mod area;
mod builtins;
mod console;
mod machine;
mod supervisor;
mod tables;
mod team;

use core::fmt::Display;
use core::panic::PanicInfo;

use guest_drivers::boot::BootParameters;
use guest_drivers::json::Object;
use guest_drivers::runner;

use machine::Machine;

/// Statuses that the image ends with besides those of the [`runner`].
mod status {
    /// The boot parameters or the hypervisor are not what the image expects.
    pub(super) const NO_MACHINE: u32 = 100;
    pub(super) const PANIC: u32 = 101;
    pub(super) const EXCEPTION: u32 = 102;
}

/// The first Rust code, on each processor, at CPL 3 on a stack of its own.
extern "sysv64" fn main(parameters: &'static BootParameters, processor: usize) -> ! {
    if processor > 0 {
        team::wait_for_first();
    } else {
        tables::fill();
    }
    let Some(work) = parameters.command_line() else {
        fail(status::NO_MACHINE, "the boot parameters are not what this image expects");
    };
    match Machine::new(parameters, processor) {
        Ok(machine) if processor > 0 => team::serve(processor, &machine),
        Ok(machine) => {
            team::gather(&machine);
            supervisor::exit(runner::run(&machine, work))
        }
        Err(what) => fail(status::NO_MACHINE, what),
    }
}

fn fail(status: u32, what: impl Display) -> ! {
    let mut object = Object::default().string("error", what);
    console::line(format_args!("{}", object.line()));
    supervisor::exit(status)
}

/// An exception that nobody expected, at CPL 3 again.
extern "sysv64" fn fault(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    let what = format_args!(
        "the guest broke down: exception {vector}, error code {error:#x}, at {rip:#x}, cr2 {address:#x}"
    );
    fail(status::EXCEPTION, what)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line) = info.location().map_or(("?", 0), |place| (place.file(), place.line()));
    fail(status::PANIC, format_args!("the guest panicked at {file}:{line}"))
}
