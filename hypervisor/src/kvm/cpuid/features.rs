//! Which processor features need which others.
//!
//! What a host's KVM supports need not fit together: one under another hypervisor, or started with
//! a feature masked, may list AVX without XSAVE, and a process without permission for AMX's state
//! finds AMX without it. A guest that takes a feature at its word then runs instructions that
//! fault. So a feature goes with what it depends on, and leaves that describe a feature with that.
//!
//! The bits are those of the Intel SDM, volume 2A, CPUID, and of AMD's APM, volume 3, appendix E;
//! what needs what follows from the state that an instruction uses (SDM volume 1, 13.1 to 13.3 and
//! 14.3). Linux clears dependent features in the same way (`arch/x86/kernel/cpu/cpuid-deps.c`).

use kvm_bindings::kvm_cpuid_entry2;

/// One of the four registers that a leaf fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A bit of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Feature {
    leaf: u32,
    index: u32,
    register: Register,
    bit: u8,
}

const fn feature(leaf: u32, index: u32, register: Register, bit: u8) -> Feature {
    Feature { leaf, index, register, bit }
}

const fn basic_ecx(bit: u8) -> Feature {
    feature(1, 0, Register::Ecx, bit)
}

const fn basic_edx(bit: u8) -> Feature {
    feature(1, 0, Register::Edx, bit)
}

const fn seven_ebx(bit: u8) -> Feature {
    feature(7, 0, Register::Ebx, bit)
}

const fn seven_ecx(bit: u8) -> Feature {
    feature(7, 0, Register::Ecx, bit)
}

const fn seven_edx(bit: u8) -> Feature {
    feature(7, 0, Register::Edx, bit)
}

const fn seven_one_eax(bit: u8) -> Feature {
    feature(7, 1, Register::Eax, bit)
}

const fn seven_one_edx(bit: u8) -> Feature {
    feature(7, 1, Register::Edx, bit)
}

/// A state component that XCR0 can switch on (SDM volume 1, 13.1).
const fn component(bit: u8) -> Feature {
    feature(0xd, 0, Register::Eax, bit)
}

const fn xsave_form(bit: u8) -> Feature {
    feature(0xd, 1, Register::Eax, bit)
}

const fn extended_ecx(bit: u8) -> Feature {
    feature(0x8000_0001, 0, Register::Ecx, bit)
}

const fn extended_edx(bit: u8) -> Feature {
    feature(0x8000_0001, 0, Register::Edx, bit)
}

const FPU: Feature = basic_edx(0);
const MMX: Feature = basic_edx(23);
const FXSR: Feature = basic_edx(24);
const SSE: Feature = basic_edx(25);
const SSE2: Feature = basic_edx(26);
const SSE3: Feature = basic_ecx(0);
const PCLMULQDQ: Feature = basic_ecx(1);
const SSSE3: Feature = basic_ecx(9);
const FMA: Feature = basic_ecx(12);
const SSE4_1: Feature = basic_ecx(19);
const SSE4_2: Feature = basic_ecx(20);
const AES: Feature = basic_ecx(25);
const XSAVE: Feature = basic_ecx(26);
const OSXSAVE: Feature = basic_ecx(27);
const AVX: Feature = basic_ecx(28);
const F16C: Feature = basic_ecx(29);

const SGX: Feature = seven_ebx(2);
const AVX2: Feature = seven_ebx(5);
const MPX: Feature = seven_ebx(14);
const AVX512F: Feature = seven_ebx(16);
const AVX512DQ: Feature = seven_ebx(17);
const AVX512_IFMA: Feature = seven_ebx(21);
const PROCESSOR_TRACE: Feature = seven_ebx(25);
const AVX512PF: Feature = seven_ebx(26);
const AVX512ER: Feature = seven_ebx(27);
const AVX512CD: Feature = seven_ebx(28);
const SHA: Feature = seven_ebx(29);
const AVX512BW: Feature = seven_ebx(30);
const AVX512VL: Feature = seven_ebx(31);

const AVX512_VBMI: Feature = seven_ecx(1);
const PKU: Feature = seven_ecx(3);
const OSPKE: Feature = seven_ecx(4);
const AVX512_VBMI2: Feature = seven_ecx(6);
const SHADOW_STACK: Feature = seven_ecx(7);
const GFNI: Feature = seven_ecx(8);
const VAES: Feature = seven_ecx(9);
const VPCLMULQDQ: Feature = seven_ecx(10);
const AVX512_VNNI: Feature = seven_ecx(11);
const AVX512_BITALG: Feature = seven_ecx(12);
const AVX512_VPOPCNTDQ: Feature = seven_ecx(14);
const KEY_LOCKER: Feature = seven_ecx(23);
const ENQCMD: Feature = seven_ecx(29);
const SGX_LAUNCH_CONTROL: Feature = seven_ecx(30);

const AVX512_4VNNIW: Feature = seven_edx(2);
const AVX512_4FMAPS: Feature = seven_edx(3);
const AVX512_VP2INTERSECT: Feature = seven_edx(8);
const AMX_BF16: Feature = seven_edx(22);
const AVX512_FP16: Feature = seven_edx(23);
const AMX_TILE: Feature = seven_edx(24);
const AMX_INT8: Feature = seven_edx(25);

const SHA512: Feature = seven_one_eax(0);
const SM3: Feature = seven_one_eax(1);
const SM4: Feature = seven_one_eax(2);
const AVX_VNNI: Feature = seven_one_eax(4);
const AVX512_BF16: Feature = seven_one_eax(5);
const FRED: Feature = seven_one_eax(17);
const LKGS: Feature = seven_one_eax(18);
const AMX_FP16: Feature = seven_one_eax(21);
const AVX_IFMA: Feature = seven_one_eax(23);

const AVX_VNNI_INT8: Feature = seven_one_edx(4);
const AVX_NE_CONVERT: Feature = seven_one_edx(5);
const AMX_COMPLEX: Feature = seven_one_edx(8);
const AVX_VNNI_INT16: Feature = seven_one_edx(10);
const AVX10: Feature = seven_one_edx(19);

const YMM: Feature = component(2);
const BOUND_REGISTERS: Feature = component(3);
const BOUND_CONFIGURATION: Feature = component(4);
const OPMASKS: Feature = component(5);
const ZMM_HALVES: Feature = component(6);
const ZMM_HIGH: Feature = component(7);
const PROTECTION_KEYS: Feature = component(9);
const TILE_CONFIGURATION: Feature = component(17);
const TILE_DATA: Feature = component(18);

const XSAVEOPT: Feature = xsave_form(0);
const XSAVEC: Feature = xsave_form(1);
const XGETBV1: Feature = xsave_form(2);
const XSAVES: Feature = xsave_form(3);
const XFD: Feature = xsave_form(4);

const SSE4A: Feature = extended_ecx(6);
const XOP: Feature = extended_ecx(11);
const FMA4: Feature = extended_ecx(16);
const MMX_EXTENSIONS: Feature = extended_edx(22);
const FXSR_OPTIMIZED: Feature = extended_edx(25);
const AMD_3DNOW_EXTENSIONS: Feature = extended_edx(30);
const AMD_3DNOW: Feature = extended_edx(31);

/// A feature, and what it does not work without.
const NEEDS: &[(Feature, Feature)] = &[
    (FXSR, FPU),
    (MMX, FXSR),
    (MMX_EXTENSIONS, MMX),
    (AMD_3DNOW, MMX),
    (AMD_3DNOW_EXTENSIONS, AMD_3DNOW),
    (FXSR_OPTIMIZED, FXSR),
    (SSE, FXSR),
    (SSE2, SSE),
    (SSE3, SSE2),
    (SSSE3, SSE2),
    (SSE4_1, SSE2),
    (SSE4_2, SSE2),
    (SSE4A, SSE2),
    (PCLMULQDQ, SSE2),
    (AES, SSE2),
    (SHA, SSE2),
    (GFNI, SSE2),
    (KEY_LOCKER, SSE2),
    (XSAVE, FXSR),
    (OSXSAVE, XSAVE),
    (XSAVEOPT, XSAVE),
    (XSAVEC, XSAVE),
    (XGETBV1, XSAVE),
    (XSAVES, XSAVE),
    (XFD, XSAVES),
    (XFD, XGETBV1),
    (SHADOW_STACK, XSAVES),
    (ENQCMD, XSAVES),
    (MPX, XSAVE),
    (MPX, BOUND_REGISTERS),
    (MPX, BOUND_CONFIGURATION),
    (PKU, XSAVE),
    (PKU, PROTECTION_KEYS),
    (OSPKE, PKU),
    (AVX, SSE2),
    (AVX, XSAVE),
    (AVX, YMM),
    (AVX2, AVX),
    (FMA, AVX),
    (F16C, AVX),
    (XOP, AVX),
    (FMA4, AVX),
    (VAES, AVX),
    (VPCLMULQDQ, AVX),
    (AVX_VNNI, AVX2),
    (AVX_VNNI_INT8, AVX2),
    (AVX_VNNI_INT16, AVX2),
    (AVX_NE_CONVERT, AVX2),
    (AVX_IFMA, AVX2),
    (SHA512, AVX),
    (SM3, AVX),
    (SM4, AVX),
    (AVX10, AVX2),
    (AVX512F, AVX2),
    (AVX512F, OPMASKS),
    (AVX512F, ZMM_HALVES),
    (AVX512F, ZMM_HIGH),
    (AVX512DQ, AVX512F),
    (AVX512_IFMA, AVX512F),
    (AVX512PF, AVX512F),
    (AVX512ER, AVX512F),
    (AVX512CD, AVX512F),
    (AVX512BW, AVX512F),
    (AVX512VL, AVX512F),
    (AVX512_VBMI, AVX512F),
    (AVX512_4VNNIW, AVX512F),
    (AVX512_4FMAPS, AVX512F),
    (AVX512_VPOPCNTDQ, AVX512F),
    (AVX512_VBMI2, AVX512F),
    (AVX512_VNNI, AVX512F),
    (AVX512_BITALG, AVX512F),
    (AVX512_VP2INTERSECT, AVX512F),
    (AVX512_BF16, AVX512F),
    (AVX512_FP16, AVX512BW),
    (AMX_TILE, XFD),
    (AMX_TILE, TILE_CONFIGURATION),
    (AMX_TILE, TILE_DATA),
    (AMX_BF16, AMX_TILE),
    (AMX_INT8, AMX_TILE),
    (AMX_FP16, AMX_TILE),
    (AMX_COMPLEX, AMX_TILE),
    (SGX_LAUNCH_CONTROL, SGX),
    (FRED, LKGS),
];

/// Leaves that describe one feature, and which.
const DESCRIBED_BY: &[(u32, Feature)] = &[
    (0xd, XSAVE),
    (0x12, SGX),
    (0x14, PROCESSOR_TRACE),
    (0x19, KEY_LOCKER),
    (0x1d, AMX_TILE),
    (0x1e, AMX_TILE),
    (0x24, AVX10),
];

fn register(leaf: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Register::Eax => leaf.eax,
        Register::Ebx => leaf.ebx,
        Register::Ecx => leaf.ecx,
        Register::Edx => leaf.edx,
    }
}

fn register_mut(leaf: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut leaf.eax,
        Register::Ebx => &mut leaf.ebx,
        Register::Ecx => &mut leaf.ecx,
        Register::Edx => &mut leaf.edx,
    }
}

impl Feature {
    fn is_in(self, leaf: &kvm_cpuid_entry2) -> bool {
        (leaf.function, leaf.index) == (self.leaf, self.index)
            && register(leaf, self.register) >> self.bit & 1 != 0
    }

    fn is_among(self, leaves: &[kvm_cpuid_entry2]) -> bool {
        leaves.iter().any(|leaf| self.is_in(leaf))
    }

    fn clear(self, leaves: &mut [kvm_cpuid_entry2]) {
        for leaf in leaves.iter_mut().filter(|leaf| self.is_in(leaf)) {
            *register_mut(leaf, self.register) &= !(1 << self.bit);
        }
    }
}

/// Takes away what does not work for want of something else.
pub(super) fn close(leaves: &mut Vec<kvm_cpuid_entry2>) {
    // What is taken away may be what another feature needs. Each round takes at least one.
    loop {
        let lacking = |leaves: &[kvm_cpuid_entry2]| {
            NEEDS
                .iter()
                .find(|(feature, needs)| feature.is_among(leaves) && !needs.is_among(leaves))
                .map(|(feature, _)| *feature)
        };
        while let Some(feature) = lacking(leaves) {
            feature.clear(leaves);
        }
        let before = leaves.len();
        for (function, feature) in DESCRIBED_BY {
            if !feature.is_among(leaves) {
                leaves.retain(|leaf| leaf.function != *function);
            }
        }
        if leaves.len() == before {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The leaves in which features are, and those that describe some.
    const LEAVES: [(u32, u32); 12] = [
        (1, 0),
        (7, 0),
        (7, 1),
        (0xd, 0),
        (0xd, 1),
        (0xd, 2),
        (0x12, 0),
        (0x14, 0),
        (0x19, 0),
        (0x1d, 1),
        (0x24, 0),
        (0x8000_0001, 0),
    ];

    fn leaf((function, index): (u32, u32), [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host that has all there is.
    fn complete() -> Vec<kvm_cpuid_entry2> {
        LEAVES.map(|name| leaf(name, [u32::MAX; 4])).to_vec()
    }

    fn closed(mut leaves: Vec<kvm_cpuid_entry2>) -> Vec<kvm_cpuid_entry2> {
        close(&mut leaves);
        leaves
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap()
    }

    #[test]
    fn what_a_complete_host_has_stays() {
        assert_eq!(closed(complete()), complete());
    }

    #[test]
    fn without_xsave_nothing_is_left_that_needs_its_state() {
        let mut leaves = complete();
        XSAVE.clear(&mut leaves);
        let guest = closed(leaves);
        // FMA, XSAVE, OSXSAVE, AVX, F16C; what SSE does, stays.
        assert_eq!(get(&guest, 1, 0).ecx, !(1 << 12 | 0b1111 << 26));
        assert_eq!(get(&guest, 1, 0).edx, u32::MAX);
        // AVX2, MPX, AVX-512; the protection keys, shadow stacks, VAES, VPCLMULQDQ, ENQCMD.
        assert_eq!(get(&guest, 7, 0).ebx & (1 << 5 | 1 << 14 | 0xdc23 << 16), 0);
        assert_eq!(get(&guest, 7, 0).ecx & 0x2000_5fda, 1 << 8, "GFNI has an SSE form");
        assert_eq!(get(&guest, 7, 0).edx & 0x03c0_010c, 0);
        assert_eq!(get(&guest, 7, 1).eax & 0x00a0_0037, 0);
        assert_eq!(get(&guest, 7, 1).edx & 0x0008_0530, 0);
        assert_eq!(get(&guest, 0x8000_0001, 0).ecx & (1 << 11 | 1 << 16), 0);
        for gone in [0xd, 0x1d, 0x24] {
            assert!(guest.iter().all(|leaf| leaf.function != gone), "{gone:#x}");
        }
        assert_eq!(get(&guest, 0x14, 0), get(&complete(), 0x14, 0));
    }

    #[test]
    fn amx_goes_with_the_permission_for_its_state() {
        let mut leaves = complete();
        TILE_DATA.clear(&mut leaves);
        let guest = closed(leaves);
        assert_eq!(get(&guest, 7, 0).edx, !(1 << 22 | 1 << 24 | 1 << 25));
        assert!(guest.iter().all(|leaf| leaf.function != 0x1d));
        assert!(AVX512F.is_among(&guest));
    }

    #[test]
    fn without_sse2_nothing_is_left_that_uses_its_registers() {
        let mut leaves = complete();
        SSE2.clear(&mut leaves);
        let guest = closed(leaves);
        for feature in [SSE3, PCLMULQDQ, AES, SHA, GFNI, AVX, AVX512_FP16, VAES, SM4] {
            assert!(!feature.is_among(&guest), "{feature:?}");
        }
        assert!(SSE.is_among(&guest) && XSAVE.is_among(&guest));
    }

    proptest! {
        /// Whatever a host has: what its guest has, has what it needs; nothing is added; and what is
        /// taken away lacked something.
        #[test]
        fn a_guest_s_features_have_what_they_need(
            registers in proptest::collection::vec(
                (any::<[u32; 4]>(), any::<[u32; 4]>(), 0_u8..8), LEAVES.len()),
        ) {
            // Mostly set, so that long chains come about; some leaves are not there at all.
            let host: Vec<_> = LEAVES.into_iter().zip(registers)
                .filter(|(_, (_, _, there))| *there != 0)
                .map(|(name, (a, b, _))| leaf(name, std::array::from_fn(|n| a[n] | b[n])))
                .collect();
            let guest = closed(host.clone());
            for (feature, needs) in NEEDS {
                prop_assert!(!feature.is_among(&guest) || needs.is_among(&guest), "{feature:?}");
            }
            for (function, feature) in DESCRIBED_BY {
                let described = guest.iter().any(|leaf| leaf.function == *function);
                prop_assert!(!described || feature.is_among(&guest), "{function:#x}");
            }
            for leaf in &guest {
                let before = get(&host, leaf.function, leaf.index);
                for of in [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx] {
                    let (before, after) = (register(&before, of), register(leaf, of));
                    prop_assert_eq!(before & after, after);
                    for bit in (0..32).filter(|bit| (before ^ after) >> bit & 1 != 0) {
                        let gone = feature(leaf.function, leaf.index, of, bit);
                        prop_assert!(NEEDS.iter().any(|(feature, needs)| {
                            *feature == gone && !needs.is_among(&guest)
                        }), "{gone:?}");
                    }
                }
            }
        }
    }
}
