//! What each processor has to itself, in an area of its own: pages of the SynIC, task state, stacks.
//!
//! Areas lie one after the other, each at a multiple of its size. So a processor finds its own by
//! its number, or from its stack pointer, which never leaves it.

#![allow(unsafe_code)] // The address of what assembly defines.

use guest_drivers::boot::MAX_VPS;

use super::tables::symbol;

/// Bytes of an area.
pub(super) const SIZE: usize = 512 << 10;
/// Where the page of message slots is.
pub(super) const MESSAGES: usize = 0;
/// Where the page of event flags is.
pub(super) const EVENTS: usize = 0x1000;
/// Where the task state is.
pub(super) const TASK_STATE: usize = 0x2000;
/// Bytes of it: the structure, and the map of the ports below 0x100.
pub(super) const TASK_STATE_SIZE: usize = 104 + 33;
/// Where interrupts are counted.
pub(super) const INTERRUPTS: usize = 0x2800;
/// Where the stack of CPL 3 ends, 256 KiB above.
pub(super) const USER_STACK_END: usize = 0x4_3000;
/// Where the stack for calls from CPL 3 ends.
pub(super) const SUPERVISOR_STACK_END: usize = 0x4_7000;
/// Where the stack for interrupts and exceptions ends.
pub(super) const INTERRUPT_STACK_END: usize = 0x4_b000;

const _: () = assert!(SIZE.is_power_of_two() && INTERRUPT_STACK_END <= SIZE);
const _: () = assert!(TASK_STATE + TASK_STATE_SIZE <= INTERRUPTS);

/// The address of processor `index`'s area.
pub(super) fn of(index: usize) -> u64 {
    debug_assert!(index < MAX_VPS);
    symbol!("areas") + (index * SIZE) as u64
}
