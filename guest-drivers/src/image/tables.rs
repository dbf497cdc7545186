//! What processors look up when they are interrupted: gates, and stacks in each one's task state.
//! They know where these are from the start; the first fills them at CPL 3, before anything can need
//! them.

#![allow(unsafe_code)] // Memory that the processor reads, and addresses of what assembly defines.

use core::cell::UnsafeCell;

use guest_drivers::boot::MAX_VPS;

use super::area;
use super::supervisor::{CODE0, ISA_VECTOR, SINT_VECTOR, SPURIOUS_VECTOR, TICK_VECTOR};

/// Gates: the exceptions, and vectors up to the spurious interrupt's.
pub(super) const GATES: usize = SPURIOUS_VECTOR as usize + 1;

/// The breakpoint exception, by which CPL 3 calls CPL 0.
const CALL_VECTOR: u64 = 3;
/// Bytes of code for an exception.
const EXCEPTION_CODE: u64 = 16;

#[repr(C, align(16))]
pub(super) struct Gates(UnsafeCell<[[u64; 2]; GATES]>);

// SAFETY: only `fill` refers to them, once; the processor reads.
unsafe impl Sync for Gates {}

pub(super) static IDT: Gates = Gates(UnsafeCell::new([[0; 2]; GATES]));

/// The address of something that assembly or the linker defines.
macro_rules! symbol {
    ($name:literal) => {{
        let address: u64;
        // SAFETY: takes an address and touches nothing.
        unsafe {
            core::arch::asm!(concat!("lea {}, [rip + ", $name, "]"), out(reg) address,
                options(nomem, nostack, preserves_flags));
        }
        address
    }};
}
pub(crate) use symbol;

/// Fills the tables; to be called once, first of all.
pub(crate) fn fill() {
    // The task state (SDM volume 3, 8.7, "Task management in 64-bit mode"): RSP0 at 4, the stack of
    // calls; IST1 at 36, that of exceptions and interrupts, which may come while a call halts. What
    // the I/O privilege level would allow some KVMs forget; the map of ports they do not.
    for index in 0..MAX_VPS {
        let area = area::of(index);
        let task_state = (area + area::TASK_STATE as u64) as *mut u8;
        let map = 104_u16;
        let ports = 0x100 / 8; // zeros, for "allowed"
        put(task_state, 4, area + area::SUPERVISOR_STACK_END as u64);
        put(task_state, 36, area + area::INTERRUPT_STACK_END as u64);
        put(task_state, 102, map);
        put(task_state, usize::from(map) + ports, 0xff_u8); // the processor wants a byte of ones
    }

    let exceptions = symbol!("supervisor_exceptions");
    // SAFETY: this is the only reference ever, and the processor looks there when it must.
    let gates = unsafe { &mut *IDT.0.get() };
    for (vector, place) in (0..).zip(gates) {
        *place = match vector {
            CALL_VECTOR => gate(symbol!("supervisor_call"), 3, 0),
            0..32 => gate(exceptions + vector * EXCEPTION_CODE, 0, 1),
            _ if [SINT_VECTOR, ISA_VECTOR].map(u64::from).contains(&vector) => {
                gate(symbol!("supervisor_interrupt"), 0, 1)
            }
            _ if vector == u64::from(TICK_VECTOR) => gate(symbol!("supervisor_tick"), 0, 1),
            _ => gate(symbol!("supervisor_spurious"), 0, 1),
        };
    }
}

/// Writes a field of the task state.
fn put<T>(task_state: *mut u8, offset: usize, value: T) {
    // SAFETY: each offset lies in what is set aside for it.
    let field = unsafe { task_state.add(offset) };
    // SAFETY: as above, and nobody else is there.
    unsafe { field.cast::<T>().write_unaligned(value) };
}

/// An interrupt gate to `address` at CPL 0, for software of privilege `dpl`, on interrupt stack
/// `ist` or, if that is 0, RSP0.
fn gate(address: u64, dpl: u64, ist: u64) -> [u64; 2] {
    let low = address & 0xffff
        | u64::from(CODE0) << 16
        | ist << 32
        | 0x8e << 40
        | dpl << 45
        | (address >> 16 & 0xffff) << 48;
    [low, address >> 32]
}
