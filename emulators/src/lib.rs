//! Emulated legacy devices: what a guest finds at fixed ports before it has found the bus.
//!
//! Each is a plain state machine behind [`hypervisor::Device`]; a mutex inside where it has state,
//! since processors call it at the same time.

mod alarm;
mod e1000;

pub mod fuzzing;
mod i8042;
mod ide;
mod irqchip;
mod odd_ports;
pub mod pci;
mod pit;
mod pm;
mod rtc;
mod smbus;
mod uart;

pub use e1000::{E1000, E1000Config, E1000Counters, MAX_MTU as E1000_MAX_MTU};
pub use i8042::I8042;
pub use ide::{DriveError, Ide, IdeCounters, IdeDisks, Place as IdePlace};
pub use irqchip::InterruptChips;
pub use odd_ports::{ApmPorts, DebugPort, Nothing, SystemControl};
pub use pit::Pit;
pub use pm::{PmBlock, ResetRegister, SLEEP_TYPE_S5};
pub use rtc::Rtc;
pub use smbus::SmBus;
pub use uart::{Cable, Uart};
