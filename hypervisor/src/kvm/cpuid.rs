//! What `cpuid` says in a partition: the host's processor as far as KVM supports it, the topology
//! of our own, and the leaves by which Hyper-V introduces itself.
//!
//! Hyper-V's leaves are those of the TLFS, chapter 2, "Feature and interface discovery". What they
//! offer follows from what costs a Linux guest the fewest exits (counted with KVM's trace points
//! over a boot):
//!
//! - No synthetic timers, unless asked for. A tick of one costs two exits: the handler sets the next tick before it
//!   ends the interrupt, and that exit takes away the chance to end it without another. The local
//!   APIC's timer ends the interrupt first; one exit.
//! - Where the host's processor does not virtualize the local APIC, interrupts end by the VP
//!   assist page (no exit if none other waits), and those of the VMBus end by themselves.
//! - Where it does, both would only get in its way.
//! - Where user space serves the registers ([`HyperV::User`]) neither can be had without exits.
//!
//! No feature is offered without what it needs ([`features`]).

mod features;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::HyperV;
use crate::VpIndex;

/// The first of the leaves that belong to hypervisors.
const HYPERVISOR_LEAVES: u32 = 0x4000_0000;
/// The last of those that KVM may fill for its own interface or Hyper-V's.
const HYPERVISOR_LEAVES_END: u32 = 0x4000_01ff;

/// Privileges, leaf 0x40000003 EAX and EBX, and features in EDX.
mod privileges {
    pub(super) const PARTITION_REFERENCE_COUNTER: u32 = 1 << 1;
    pub(super) const SYNIC_REGS: u32 = 1 << 2;
    pub(super) const SYNTIMER_REGS: u32 = 1 << 3;
    pub(super) const INTR_CTRL_REGS: u32 = 1 << 4;
    pub(super) const HYPERCALL_MSRS: u32 = 1 << 5;
    pub(super) const VP_INDEX: u32 = 1 << 6;
    pub(super) const RESET: u32 = 1 << 7;
    pub(super) const PARTITION_REFERENCE_TSC: u32 = 1 << 9;
    pub(super) const FREQUENCY_REGS: u32 = 1 << 11;

    pub(super) const EBX_POST_MESSAGES: u32 = 1 << 4;
    pub(super) const EBX_SIGNAL_EVENTS: u32 = 1 << 5;

    pub(super) const EDX_FREQUENCY_REGS: u32 = 1 << 8;
    pub(super) const EDX_CRASH_REGS: u32 = 1 << 10;
    pub(super) const EDX_DIRECT_TIMERS: u32 = 1 << 19;
}

/// Recommendations, leaf 0x40000004 EAX.
mod recommendations {
    /// End an interrupt by the synthetic register. With the VP assist page behind it most
    /// interrupts then end without an exit.
    pub(super) const APIC_MSRS: u32 = 1 << 3;
    pub(super) const RELAXED_TIMING: u32 = 1 << 5;
    /// End the VMBus's interrupts like others; do not ask the SynIC to end them itself.
    pub(super) const DEPRECATE_AUTO_EOI: u32 = 1 << 9;
}

/// What the host can do beyond what every host can.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostFeatures {
    /// The local APIC timer has a TSC-deadline mode.
    pub(super) tsc_deadline: bool,
    /// The processor virtualizes the local APIC (APICv, AVIC), and KVM uses that.
    pub(super) virtual_apic: bool,
    /// Synthetic timers are to be offered.
    pub(super) timers: bool,
}

/// The leaves for one processor of `count`, from those that KVM supports.
pub(super) fn build(
    supported: &CpuId,
    vp: VpIndex,
    count: u32,
    host: HostFeatures,
    hyper_v: HyperV,
) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|leaf| !(HYPERVISOR_LEAVES..=HYPERVISOR_LEAVES_END).contains(&leaf.function))
        .copied()
        .collect();
    topology(&mut leaves, vp, count);
    for leaf in &mut leaves {
        if leaf.function == 1 {
            leaf.ecx |= 1 << 31 | 1 << 21; // a hypervisor is present; x2APIC
            leaf.ecx = set_bit(leaf.ecx, 24, host.tsc_deadline);
        }
    }
    features::close(&mut leaves);
    if hyper_v != HyperV::Absent {
        leaves.extend(hyper_v_leaves(count, host, hyper_v));
    }
    leaves
}

fn set_bit(word: u32, bit: u32, on: bool) -> u32 {
    (word & !(1 << bit)) | u32::from(on) << bit
}

/// Every processor a core of its own with one thread, all in one package, APIC id = VP index.
fn topology(leaves: &mut Vec<kvm_cpuid_entry2>, vp: VpIndex, count: u32) {
    // The bits that number the cores in an APIC id.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let extended = leaves.iter().any(|leaf| leaf.function == 0xb);
    // Leaf 0x1f knows more levels than we have; without it guests use 0xb.
    leaves.retain(|leaf| leaf.function != 0xb && leaf.function != 0x1f);
    for leaf in leaves.iter_mut() {
        match leaf.function {
            1 => {
                let logical = count.min(255) << 16;
                leaf.ebx = (leaf.ebx & 0x0000_ffff) | logical | vp.0 << 24;
                leaf.edx = set_bit(leaf.edx, 28, count > 1);
            }
            // Caches (Intel): the first three levels are one core's, the last is everybody's.
            4 if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
                let cores = (1_u32 << core_bits) - 1;
                leaf.eax = (leaf.eax & 0x0000_3fff) | sharing << 14 | cores.min(0x3f) << 26;
            }
            // Sizes of ids (AMD): the number of cores less one, and the bits for it.
            0x8000_0008 => {
                leaf.ecx = (leaf.ecx & 0xffff_0000) | core_bits << 12 | (count - 1).min(0xff);
            }
            // Caches (AMD), as in leaf 4.
            0x8000_001d if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                leaf.eax = (leaf.eax & 0x0000_3fff) | sharing.min(0xfff) << 14;
            }
            // Ids (AMD): extended APIC id, core id with one thread per core, node 0 of 1.
            0x8000_001e => {
                leaf.eax = vp.0;
                leaf.ebx = vp.0 & 0xff;
                leaf.ecx = 0;
            }
            // AMD's "core multi-processing, legacy": there are several cores.
            0x8000_0001 => leaf.ecx = set_bit(leaf.ecx, 1, leaf.ecx & 2 != 0 && count > 1),
            _ => {}
        }
    }
    if extended {
        let level = |index, shift, processors, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: vp.0,
            ..Default::default()
        };
        leaves.extend([level(0, 0, 1, 1), level(1, core_bits, count, 2), level(2, 0, 0, 0)]);
    }
}

fn hyper_v_leaves(count: u32, host: HostFeatures, hyper_v: HyperV) -> Vec<kvm_cpuid_entry2> {
    let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);

    let by_register = hyper_v == HyperV::Kernel;
    let access = privileges::PARTITION_REFERENCE_COUNTER
        | privileges::SYNIC_REGS
        | if by_register { privileges::INTR_CTRL_REGS } else { 0 }
        | if host.timers { privileges::SYNTIMER_REGS } else { 0 }
        | privileges::HYPERCALL_MSRS
        | privileges::VP_INDEX
        | privileges::RESET
        | privileges::PARTITION_REFERENCE_TSC
        | privileges::FREQUENCY_REGS;
    let features = privileges::EDX_FREQUENCY_REGS
        | privileges::EDX_CRASH_REGS
        | if host.timers { privileges::EDX_DIRECT_TIMERS } else { 0 };
    let more = privileges::EBX_POST_MESSAGES | privileges::EBX_SIGNAL_EVENTS;
    let recommended = recommendations::RELAXED_TIMING
        | if host.virtual_apic || !by_register {
            recommendations::DEPRECATE_AUTO_EOI
        } else {
            recommendations::APIC_MSRS
        };

    vec![
        leaf(HYPERVISOR_LEAVES, 0x4000_0006, word(b"Micr"), word(b"osof"), word(b"t Hv")),
        leaf(0x4000_0001, word(b"Hv#1"), 0, 0, 0),
        // Build 20348, version 10.0: that of a host that speaks VMBus 5.3.
        leaf(0x4000_0002, 20348, 10 << 16, 0, 0),
        leaf(0x4000_0003, access, more, 0, features),
        // EBX: how often to spin before telling us; never.
        leaf(0x4000_0004, recommended, u32::MAX, 0, 0),
        leaf(0x4000_0005, count, count, 0, 0),
        leaf(0x4000_0006, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0, 0x1f, 0, 0, 0),
            leaf(1, 0, 0x1234, 0xff00_0800, 0, 1 << 28),
            leaf(4, 0, 0xfc00_c121, 0, 0, 0),
            leaf(4, 3, 0xfc03_c163, 0, 0, 0),
            leaf(0xb, 0, 1, 2, 0x100, 7),
            leaf(0xb, 1, 4, 8, 0x201, 7),
            leaf(0x1f, 0, 1, 2, 0x100, 7),
            leaf(0x4000_0000, 0, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
            leaf(0x4000_0001, 0, 0x0100_7efb, 0, 0, 0),
            leaf(0x4000_0100, 0, 0x4000_0101, 0x4b4d_564b, 0x564b_4d56, 0x4d),
            leaf(0x8000_0008, 0, 0x3028, 0, 0x700f, 0),
            leaf(0x8000_001e, 0, 99, 99, 99, 0),
        ])
        .unwrap()
    }

    fn built(vp: u32, count: u32, hyper_v: HyperV) -> Vec<kvm_cpuid_entry2> {
        let host = HostFeatures { tsc_deadline: true, virtual_apic: false, timers: false };
        build(&supported(), VpIndex(vp), count, host, hyper_v)
    }

    #[test]
    fn interrupts_end_the_cheapest_way() {
        for virtual_apic in [false, true] {
            let host = HostFeatures { tsc_deadline: true, virtual_apic, timers: false };
            let leaves = build(&supported(), VpIndex(0), 1, host, HyperV::Kernel);
            let recommended = get(&leaves, 0x4000_0004, 0).eax;
            assert_eq!(recommended & 1 << 9 != 0, virtual_apic, "no auto-EOI");
            assert_eq!(recommended & 1 << 3 != 0, !virtual_apic, "EOI by register");
            // The registers are there in any case: Linux writes the VP assist page's unasked.
            assert_ne!(get(&leaves, 0x4000_0003, 0).eax & 1 << 4, 0);
        }
    }

    #[test]
    fn user_space_offers_what_it_serves() {
        for timers in [false, true] {
            let host = HostFeatures { tsc_deadline: true, virtual_apic: false, timers };
            let leaves = build(&supported(), VpIndex(0), 1, host, HyperV::User);
            let features = get(&leaves, 0x4000_0003, 0);
            assert_eq!(features.eax & 1 << 4, 0, "EOI, ICR and TPR");
            assert_eq!(features.eax & 1 << 3 != 0, timers);
            assert_eq!(features.edx & 1 << 19 != 0, timers);
            assert_eq!(get(&leaves, 0x4000_0004, 0).eax & (1 << 9 | 1 << 3), 1 << 9);
        }
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = leaves.iter().filter(|l| l.function == function && l.index == index);
        let leaf = *found.next().unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "two leaves {function:#x}.{index}");
        leaf
    }

    #[test]
    fn hyper_v_introduces_itself_and_kvm_does_not() {
        let leaves = built(0, 1, HyperV::Kernel);
        let first = get(&leaves, 0x4000_0000, 0);
        assert!(first.eax >= 0x4000_0005);
        assert_eq!((first.ebx, first.ecx, first.edx), (0x7263_694d, 0x666f_736f, 0x7648_2074));
        assert_eq!(get(&leaves, 0x4000_0001, 0).eax, 0x3123_7648);
        assert!(leaves.iter().all(|leaf| leaf.function != 0x4000_0100));

        let features = get(&leaves, 0x4000_0003, 0);
        assert_eq!(features.eax & (1 << 5 | 1 << 6), 1 << 5 | 1 << 6, "Linux needs both");
        // Bits that promise what nobody does here.
        assert_eq!(features.ebx & (1 << 1 | 1 << 12 | 1 << 20 | 1 << 22), 0);
        assert_eq!(features.eax & (1 << 3 | 1 << 10 | 1 << 13 | 1 << 15), 0);
    }

    #[test]
    fn without_hyper_v_no_hypervisor_leaf_is_left() {
        let leaves = built(0, 1, HyperV::Absent);
        assert!(leaves.iter().all(|leaf| leaf.function >> 16 != 0x4000));
    }

    #[test]
    fn each_processor_is_a_core() {
        for count in [1, 2, 3, 4, 64] {
            for vp in 0..count {
                let leaves = built(vp, count, HyperV::Kernel);
                let first = get(&leaves, 1, 0);
                assert_eq!(first.ebx >> 24, vp);
                assert_eq!(first.ebx >> 16 & 0xff, count);
                assert_eq!(first.ebx & 0xffff, 0x0800);
                assert_eq!(first.edx >> 28 & 1, u32::from(count > 1));
                assert_ne!(first.ecx & 1 << 31, 0);

                let core = get(&leaves, 0xb, 1);
                assert_eq!((core.ebx, core.edx, core.ecx), (count, vp, 0x201));
                assert!(1 << core.eax >= count);
                assert_eq!(get(&leaves, 0xb, 0).eax, 0);
                assert!(leaves.iter().all(|leaf| leaf.function != 0x1f));

                assert_eq!(get(&leaves, 4, 0).eax >> 14 & 0xfff, 0, "a core's own cache");
                assert!((get(&leaves, 4, 3).eax >> 14 & 0xfff) + 1 >= count);
                assert_eq!(get(&leaves, 0x8000_0008, 0).ecx & 0xff, count - 1);
                assert_eq!(get(&leaves, 0x8000_001e, 0).eax, vp);
            }
        }
    }
}
