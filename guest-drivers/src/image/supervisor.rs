//! CPL 0: the first instructions, the routines that CPL 3 calls, and where exceptions and
//! interrupts arrive.
//!
//! A call puts the routine's address into r10 and traps by `int3`, whose gate CPL 3 may use; the
//! routine ends with `iretq`. (`syscall` would be the way, were it not for a KVM whose guests stay at
//! CPL 3 by it.) Interrupts are allowed at one place alone, where the processor has halted: so the
//! routines need no care, and CPL 3 is never interrupted.
//!
//! Nothing here is compiled from Rust: the compiler may use SSE anywhere, which an emulator of
//! CPL 0 need not know, and would use many more instructions.

#![allow(unsafe_code)] // Assembly, and the calls into it.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering, fence};

use guest_drivers::boot::{EXIT_PORT, MAX_VPS};
use guest_drivers::platform::PortWrite;

use super::area;

/// Selectors, those for CPL 3 with their privilege level.
pub(crate) const CODE0: u16 = 0x08;
const CODE3: u16 = 0x23;
const DATA3: u16 = 0x1b;
const TSS: u16 = 0x28;

/// The vector of the VMBus's SINT, and that by which processors wake one another.
pub(crate) const SINT_VECTOR: u8 = 0x30;
/// The vector of all ISA interrupts that are listened for.
pub(crate) const ISA_VECTOR: u8 = 0x31;
/// The vector of the local APIC's timer.
pub(crate) const TICK_VECTOR: u8 = 0x32;
/// The local APIC's vector for interrupts that went away; its low four bits are ones.
pub(crate) const SPURIOUS_VECTOR: u8 = 0x3f;

/// The local APIC's interrupt command register, as x2APIC has it.
const ICR: u32 = 0x830;

global_asm!(
    r#"
    .section .text.start, "ax"
    .globl start
start:                                  # rsi: the boot parameters; all processors come here
    mov eax, 1
    cpuid
    shr ebx, 24                         # the local APIC's number
    cmp ebx, {processors}
    jae surplus
    mov r12d, ebx
    mov eax, ebx
    imul rax, rax, {area}
    lea r13, [rip + areas]
    add r13, rax
    lea rsp, [r13 + {supervisor_stack_end}]
    mov rax, cr0
    and eax, 0xfffffffb                 # EM off: there is an FPU
    or eax, 2                           # MP
    mov cr0, rax
    mov rax, cr4
    or eax, 0x600                       # OSFXSR, OSXMMEXCPT: SSE may be used
    mov cr4, rax
    lea rax, [rip + page_map]
    mov cr3, rax

    mov ebx, r12d                       # each has a descriptor for its task state,
    shl ebx, 4
    add ebx, {tss}
    lea rcx, [rip + gdt]
    add rcx, rbx
    lea rax, [r13 + {task_state}]       # whose base goes into it in pieces
    mov [rcx + 2], ax
    shr rax, 16
    mov [rcx + 4], al
    mov [rcx + 7], ah
    lgdt [rip + gdt_pointer]
    lidt [rip + idt_pointer]
    mov eax, ebx
    ltr ax

    mov ecx, 0x1b                       # APIC base: x2APIC on
    rdmsr
    or eax, 0xc00
    wrmsr
    mov ecx, 0x80f                      # spurious vector; the APIC is on
    mov eax, {spurious} + 0x100
    xor edx, edx
    wrmsr

    mov rdi, rsi
    mov esi, r12d
    push {data3}
    lea rax, [r13 + {user_stack_end} - 8]
    push rax
    push 2                              # flags: none
    push {code3}
    lea rax, [rip + {main}]
    push rax
    iretq

surplus:                                # there is no area for this processor
    hlt
    jmp surplus

    .section .text, "ax"
supervisor_call:
    jmp r10

supervisor_read_msr:
    mov ecx, edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq

supervisor_write_msr:
    mov ecx, edi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    iretq

supervisor_cpuid:                       # ebx and ecx in rax, edx in rdx
    mov r8, rbx
    mov eax, edi
    xor ecx, ecx
    cpuid
    mov eax, ebx
    shl rcx, 32
    or rax, rcx
    mov rbx, r8
    iretq

supervisor_hypercall:
    mov rcx, rdi
    mov rdx, rsi
    xor r8d, r8d
    lea rax, [rip + hypercall_page]
    call rax
    iretq

supervisor_idle:
    sti
    hlt
    cli
    iretq

supervisor_write_port:
    mov edx, edi
    mov eax, esi
    out dx, eax
    iretq

supervisor_write_port_string:
    mov rcx, rdx
    mov edx, edi
    rep outsb
    iretq

supervisor_write_ports:                 # port, value, and a byte of nothing, for each
    movzx edx, word ptr [rdi]
    mov al, [rdi + 2]
    out dx, al
    add rdi, 4
    dec esi
    jnz supervisor_write_ports
    iretq

supervisor_read_port_8:
    mov edx, edi
    in al, dx
    iretq

supervisor_read_port_32:
    mov edx, edi
    in eax, dx
    iretq

supervisor_load_32:
    mov eax, [rdi]
    iretq

supervisor_store_32:
    mov [rdi], esi
    iretq

supervisor_read_string_32:
    mov rcx, rdx
    mov edx, edi
    mov rdi, rsi
    rep insd
    iretq

supervisor_write_string_32:
    mov rcx, rdx
    mov edx, edi
    rep outsd
    iretq

    # What every interrupt does: count, and end it (x2APIC's EOI register).
supervisor_interrupt:
    push rax
    push rcx
    push rdx
    mov rax, rsp
    and rax, -{area}
    inc qword ptr [rax + {interrupts}]
supervisor_end_interrupt:
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
supervisor_spurious:
    iretq

    # The timer's does not count: nobody has anything to say.
supervisor_tick:
    push rax
    push rcx
    push rdx
    jmp supervisor_end_interrupt

    # Exceptions: vector and error code on the stack, sixteen bytes of code for each.
    .balign 16
supervisor_exceptions:
    .set vector, 0
    .rept 32
        .balign 16
        .if (0x60227d00 >> vector) & 1  # those that push an error code
        .else
            push 0
        .endif
        push vector
        jmp supervisor_fault
        .set vector, vector + 1
    .endr

supervisor_fault:
    pop rdi
    pop rsi
    pop rdx
    mov rcx, cr2
    mov rax, rsp
    and rax, -{area}
    lea rsp, [rax + {supervisor_stack_end}]
    lea rax, [rax + {user_stack_end} - 8]
    push {data3}
    push rax
    push 2
    push {code3}
    lea rax, [rip + {fault}]
    push rax
    iretq

    .section .data, "aw"
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # code and data of CPL 0
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff            # data and code of CPL 3
    .quad 0x00affb000000ffff
    .rept {processors}
        .quad 0x0000890000000000 + {task_state_size} - 1    # task state, whose base is filled in
        .quad 0
    .endr
gdt_pointer:
    .word . - gdt - 1
    .quad gdt
idt_pointer:
    .word {gates} * 16 - 1
    .quad {idt}

    # The first 4 GiB are mapped to themselves, all for CPL 3: present, writable, user; and huge.
    .balign 4096
page_map:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
page_directory_pointers:
    .quad page_directories + 0x0007
    .quad page_directories + 0x1007
    .quad page_directories + 0x2007
    .quad page_directories + 0x3007
    .fill 508, 8, 0
page_directories:
    .set page, 0
    .rept 2048
        .quad (page << 21) + 0x87
        .set page, page + 1
    .endr

    .section .bss, "aw", @nobits
    .balign 4096
    .globl hypercall_page
hypercall_page:
    .skip 4096

    .section .areas, "aw", @nobits
    .balign 4096
    .globl area_size
    .set area_size, {area}
    .globl areas
areas:
    .skip {processors} * {area}
"#,
    main = sym super::main,
    fault = sym super::fault,
    code3 = const CODE3,
    data3 = const DATA3,
    tss = const TSS,
    gates = const super::tables::GATES,
    idt = sym super::tables::IDT,
    spurious = const SPURIOUS_VECTOR,
    processors = const MAX_VPS,
    area = const area::SIZE,
    task_state = const area::TASK_STATE,
    task_state_size = const area::TASK_STATE_SIZE,
    interrupts = const area::INTERRUPTS,
    user_stack_end = const area::USER_STACK_END,
    supervisor_stack_end = const area::SUPERVISOR_STACK_END,
);

/// Calls a routine. Its arguments are in rdi, rsi and rdx, its results in rax and rdx.
macro_rules! call {
    ($routine:literal, $a:expr, $b:expr, $c:expr) => {{
        let (result, more): (u64, u64);
        // SAFETY: says each user of the macro. The routines leave our stack alone and all registers
        // but those named; what memory they read or write lies behind their arguments.
        unsafe {
            asm!(
                concat!("lea r10, [rip + ", $routine, "]"),
                "int3",
                inout("rdi") $a => _, inout("rsi") $b => _, inout("rdx") $c => more,
                out("rax") result,
                out("rcx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                options(nostack),
            );
        }
        (result, more)
    }};
}

/// Reads a model-specific register, which has to exist.
pub(crate) fn read_msr(index: u32) -> u64 {
    call!("supervisor_read_msr", u64::from(index), 0u64, 0u64).0
}

/// Writes a model-specific register, which has to take the value.
///
/// # Safety
/// The value does not make the processor write to memory that is somebody else's.
pub(crate) unsafe fn write_msr(index: u32, value: u64) {
    call!("supervisor_write_msr", u64::from(index), value, 0u64);
}

/// CPUID at CPL 0, where a hypervisor answers it: EBX, ECX and EDX.
pub(crate) fn cpuid(leaf: u32) -> [u32; 3] {
    let (both, edx) = call!("supervisor_cpuid", u64::from(leaf), 0u64, 0u64);
    [both as u32, (both >> 32) as u32, edx as u32]
}

/// Makes a hypercall, once the hypercall page is there: the control word and the input.
///
/// # Safety
/// The page is there, and the input is what the call demands.
pub(crate) unsafe fn hypercall(control: u64, input: u64) -> u64 {
    call!("supervisor_hypercall", control, input, 0u64).0
}

/// Halts until an interrupt comes, or has come since the last time.
pub(crate) fn idle() {
    call!("supervisor_idle", 0u64, 0u64, 0u64);
}

/// Interrupts another processor, so that its [`idle`] returns.
pub(crate) fn wake(processor: usize) {
    const LEVEL_ASSERT: u64 = 1 << 14;
    let command = (processor as u64) << 32 | LEVEL_ASSERT | u64::from(SINT_VECTOR);
    // What was written for it has to be there when it looks: the register orders nothing.
    fence(Ordering::SeqCst);
    // SAFETY: sends an interrupt, which writes to no memory but the other's count and stack.
    unsafe { write_msr(ICR, command) };
}

/// Writes a string to a port, byte by byte.
pub(crate) fn write_port_string(port: u16, text: &[u8]) {
    call!("supervisor_write_port_string", u64::from(port), text.as_ptr().addr(), text.len());
}

/// Writes bytes to ports, at least one, in order.
pub(crate) fn write_ports(writes: &[PortWrite]) {
    const { assert!(size_of::<PortWrite>() == 4 && core::mem::offset_of!(PortWrite, value) == 2) };
    if !writes.is_empty() {
        call!("supervisor_write_ports", writes.as_ptr().addr(), writes.len(), 0u64);
    }
}

/// Writes a doubleword to a port.
pub(crate) fn write_port_32(port: u16, value: u32) {
    call!("supervisor_write_port", u64::from(port), u64::from(value), 0u64);
}

/// Reads a byte from a port.
pub(crate) fn read_port_8(port: u16) -> u8 {
    call!("supervisor_read_port_8", u64::from(port), 0u64, 0u64).0 as u8
}

/// Reads a doubleword from a port.
pub(crate) fn read_port_32(port: u16) -> u32 {
    call!("supervisor_read_port_32", u64::from(port), 0u64, 0u64).0 as u32
}

/// Reads a register of a device, which is at this address.
pub(crate) fn load_32(address: u32) -> u32 {
    call!("supervisor_load_32", u64::from(address), 0u64, 0u64).0 as u32
}

/// Writes a register of a device.
///
/// # Safety
/// The address is a device's, and no memory.
pub(crate) unsafe fn store_32(address: u32, value: u32) {
    call!("supervisor_store_32", u64::from(address), u64::from(value), 0u64);
}

/// Reads doublewords from a port.
pub(crate) fn read_port_string(port: u16, words: &[AtomicU64]) {
    call!("supervisor_read_string_32", u64::from(port), words.as_ptr().addr(), words.len() * 2);
}

/// Writes doublewords to a port.
pub(crate) fn write_port_string_32(port: u16, words: &[AtomicU64]) {
    call!("supervisor_write_string_32", u64::from(port), words.as_ptr().addr(), words.len() * 2);
}

/// Writes to a port below 0x100 from CPL 3, to which the task state allows it.
pub(crate) fn ring_port(port: u16, value: u32) {
    // SAFETY: the platform's doorbell, which does nothing to this processor.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    }
}

/// Ends the guest.
pub(crate) fn exit(status: u32) -> ! {
    loop {
        write_port_32(EXIT_PORT, status);
        // Nobody has listened.
        idle();
    }
}
