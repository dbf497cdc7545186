//! The hypercall page that we write for a guest when no kernel does: two port accesses.
//!
//! - [`DOORBELL_PORT`]: a write of a connection id is *signal event*. Where the root has bound that
//!   connection, an ioeventfd takes the write and nothing exits to user space. Where it has not,
//!   the write comes to us, and we add the status to EAX; so `eax - id` is the status either way.
//! - [`HYPERCALL_PORT`]: a read makes the hypercall that RCX (control), RDX (input) and R8 (output)
//!   describe, as in the TLFS's calling convention, and gives its status.
//!
//! Both accesses are four bytes wide. No register but RAX changes, and the ports are below 256 so
//! that none has to hold their number.
//!
//! A guest normally calls the page from CPL 0. Whoever may access the ports, though, may make
//! hypercalls: code at CPL 3 with IOPL 3, or with a permission bitmap that opens them, calls the
//! page or accesses the ports in place, and needs no kernel of its own in between. A guest that
//! gives its user programs ports gives them hypercalls too, which is no more than ports mean on
//! any PC. The page is for 64-bit code.

/// Writing a connection id here, four bytes, is a fast *signal event*.
pub const DOORBELL_PORT: u16 = 0xe0;

/// Reading four bytes here makes a hypercall from the registers, and gives its status.
pub const HYPERCALL_PORT: u16 = 0xe4;

/// RCX of a fast *signal event*.
const FAST_SIGNAL_EVENT: u32 = 0x1_005d;

/// What the page begins with; the rest of it is [`PADDING`].
pub(crate) const CODE: [u8; 28] = {
    let [s0, s1, s2, s3] = FAST_SIGNAL_EVENT.to_le_bytes();
    [
        0xf3,
        0x0f,
        0x1e,
        0xfa, // endbr64: kernels with IBT want it at a call's target
        0x48,
        0x81,
        0xf9,
        s0,
        s1,
        s2,
        s3, // cmp rcx, FAST_SIGNAL_EVENT
        0x75,
        0x0c, // jne other
        0x89,
        0xd0, // mov eax, edx
        0x48,
        0x39,
        0xd0, // cmp rax, rdx; not equal with a flag number
        0x75,
        0x05, // jne other
        0xe7,
        DOORBELL_PORT as u8, // out DOORBELL_PORT, eax
        0x29,
        0xd0, // sub eax, edx
        0xc3, // ret
        0xe5,
        HYPERCALL_PORT as u8, // other: in eax, HYPERCALL_PORT
        0xc3,                 // ret
    ]
};

/// `int3`, for a guest that calls anything but the start.
pub(crate) const PADDING: u8 = 0xcc;

const _: () = assert!(DOORBELL_PORT < 0x100 && HYPERCALL_PORT < 0x100);
