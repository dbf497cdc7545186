//! What the compiler expects of a C library and of an unwinder.
//!
//! Unsafe as these functions are: they work on pointers.
#![allow(unsafe_code)]

use core::arch::asm;

/// # Safety
/// As of C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: both ranges are valid, says the caller; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As of C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // SAFETY: going forward, nothing is overwritten before it was read.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: both ranges are valid, says the caller, and `len` is at least one here; backward, and
    // with the direction flag as the ABI wants it afterwards.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _,
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As of C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the range is valid, says the caller; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As of C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for at in 0..len {
        // SAFETY: in the range, which is valid, says the caller.
        let a = unsafe { a.wrapping_add(at).read() };
        // SAFETY: as above.
        let b = unsafe { b.wrapping_add(at).read() };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
/// As of C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: says the caller.
    unsafe { memcmp(a, b, len) }
}

// The precompiled core library names these two, though a program that aborts never gets there.

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    super::supervisor::exit(103)
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
