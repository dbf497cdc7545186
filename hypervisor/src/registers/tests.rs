use proptest::prelude::*;

use super::*;

/// RAM from 0 to 1 MiB.
struct Ram;

impl Memory for Ram {
    fn is_ram(&self, page: Gpa) -> bool {
        page.0 < 1 << 20
    }
}

struct Machine {
    partition: PartitionRegisters,
    vp: VpRegisters,
}

impl Machine {
    fn new() -> Self {
        Self { partition: PartitionRegisters::default(), vp: VpRegisters::new(VpIndex(3)) }
    }

    fn read(&self, register: u32) -> Result<u64, GeneralProtection> {
        self.vp.read(&self.partition, register)
    }

    fn write(&mut self, register: u32, value: u64) -> Result<Action, GeneralProtection> {
        self.vp.write(&mut self.partition, register, value, &Ram)
    }
}

#[test]
fn the_hypercall_page_comes_to_who_says_who_they_are() {
    let mut machine = Machine::new();
    assert_eq!(machine.write(msr::HYPERCALL, 0x5001), Ok(Action::None));
    assert_eq!(machine.read(msr::HYPERCALL), Ok(0));

    machine.write(msr::GUEST_OS_ID, 0x8100_0006_0001_0000).unwrap();
    assert_eq!(machine.write(msr::HYPERCALL, 0x5001), Ok(Action::HypercallPage(Gpa(0x5000))));
    assert_eq!(machine.read(msr::HYPERCALL), Ok(0x5001));
    assert_eq!(machine.write(msr::HYPERCALL, 1 << 20 | 1), Err(GeneralProtection));
    assert_eq!(machine.read(msr::HYPERCALL), Ok(0x5001));

    machine.write(msr::GUEST_OS_ID, 0).unwrap();
    assert_eq!(machine.read(msr::HYPERCALL), Ok(0x5000), "no owner, no page");

    machine.write(msr::GUEST_OS_ID, 1).unwrap();
    assert_eq!(machine.write(msr::HYPERCALL, 0x6003), Ok(Action::HypercallPage(Gpa(0x6000))));
    assert_eq!(machine.write(msr::HYPERCALL, 0x7001), Err(GeneralProtection), "locked");
    assert_eq!(machine.read(msr::HYPERCALL), Ok(0x6003));
}

#[test]
fn pages_keep_their_place_while_the_synic_is_off() {
    let mut machine = Machine::new();
    assert_eq!(machine.write(msr::SIMP, 0x8001), Ok(Action::Pages));
    assert_eq!(machine.write(msr::SIEFP, 0x9001), Ok(Action::Pages));
    assert_eq!(machine.vp.pages().control, 0);
    assert_eq!(machine.write(msr::SCONTROL, 1), Ok(Action::Pages));
    let pages = machine.vp.pages();
    assert_eq!((pages.control, pages.message_page, pages.event_page), (1, 0x8001, 0x9001));
    assert_eq!(machine.write(msr::SIMP, 1 << 40 | 1), Err(GeneralProtection), "no RAM");
    assert_eq!(machine.read(msr::SIMP), Ok(0x8001));
    assert_eq!(machine.write(msr::SIMP, 1 << 40), Ok(Action::Pages), "nor needed when disabled");
    machine.write(msr::SCONTROL, 0).unwrap();
    assert_eq!((machine.vp.pages().control, machine.vp.pages().event_page), (0, 0x9001));
    assert_eq!(machine.read(msr::SIEFP), Ok(0x9001));
}

#[test]
fn sints_check_their_vector_unless_masked() {
    let mut machine = Machine::new();
    let vmbus = Sint::VMBUS;
    let register = msr::SINT0 + 2;
    assert_eq!(machine.read(register), Ok(SINT_MASKED));
    assert!(!machine.vp.sint(vmbus).is_open());
    assert_eq!(machine.write(register, 15), Err(GeneralProtection));
    assert_eq!(machine.write(register, 16), Ok(Action::Sint(vmbus)));
    assert_eq!(machine.vp.sint(vmbus).vector(), Some(16));
    assert_eq!(machine.write(register, SINT_POLLING | 0xf3), Ok(Action::Sint(vmbus)));
    assert!(machine.vp.sint(vmbus).is_open());
    assert_eq!(machine.vp.sint(vmbus).vector(), None);
    assert_eq!(machine.write(register, SINT_AUTO_EOI | 0xf3), Ok(Action::Sint(vmbus)));
    assert!(machine.vp.sint(vmbus).wants_auto_eoi());
    assert_eq!(machine.vp.sint(vmbus).vector(), Some(0xf3));
    assert_eq!(machine.write(register, SINT_MASKED), Ok(Action::Sint(vmbus)));
    assert_eq!(machine.vp.sint(vmbus).vector(), None);
}

#[test]
fn what_is_read_only_or_unknown_faults() {
    let mut machine = Machine::new();
    assert_eq!(machine.read(msr::VP_INDEX), Ok(3));
    assert_eq!(machine.read(msr::SVERSION), Ok(1));
    for register in [msr::VP_INDEX, msr::SVERSION, 0x4000_0070, 0x4000_0024, 0x4000_01ff] {
        assert_eq!(machine.write(register, 0), Err(GeneralProtection), "{register:#x}");
    }
    // EOI, ICR and TPR are not offered.
    for register in [0x4000_0070, 0x4000_0071, 0x4000_0072, 0x4000_0010, 0x4000_0106] {
        assert_eq!(machine.read(register), Err(GeneralProtection), "{register:#x}");
    }
}

#[test]
fn crashes_resets_and_ends_of_messages_are_told() {
    let mut machine = Machine::new();
    for n in 0..5 {
        machine.write(msr::CRASH_P0 + n, u64::from(n) + 10).unwrap();
    }
    assert_eq!(machine.write(msr::CRASH_CTL, 0), Ok(Action::None));
    assert_eq!(machine.write(msr::CRASH_CTL, CRASH_NOTIFY), Ok(Action::Crash));
    assert_eq!(machine.partition.crash(), [10, 11, 12, 13, 14]);
    assert_eq!(machine.read(msr::CRASH_CTL), Ok(CRASH_NOTIFY));
    assert_eq!(machine.write(msr::RESET, 1), Ok(Action::Reset));
    assert_eq!(machine.write(msr::EOM, 0), Ok(Action::EndOfMessage));
    assert_eq!(machine.write(msr::VP_ASSIST_PAGE, 0x3001), Ok(Action::Clear(Gpa(0x3000))));
    assert_eq!(machine.write(msr::VP_ASSIST_PAGE, 0x3001), Ok(Action::None));
    assert_eq!(
        machine.write(msr::REFERENCE_TSC, 0x4001),
        Ok(Action::ReferenceTscPage(Gpa(0x4000)))
    );
    assert_eq!(machine.write(msr::REFERENCE_TSC, 1 << 30 | 1), Ok(Action::None));
}

/// Registers that say what was written to them last.
fn holds_its_value(register: u32) -> bool {
    matches!(
        register,
        msr::GUEST_OS_ID
            | msr::HYPERCALL
            | msr::REFERENCE_TSC
            | msr::VP_ASSIST_PAGE
            | msr::SCONTROL
            | msr::SIEFP
            | msr::SIMP
            | msr::SINT0..=msr::SINT15
            | msr::CRASH_P0..=msr::CRASH_P4
    )
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0_u64..1 << 22, 0_u64..256]
}

proptest! {
    /// Whatever a guest writes wherever: nothing panics, a refused write changes nothing, an
    /// accepted one is read back, and pages given away are RAM.
    #[test]
    fn any_writes_are_refused_whole_or_kept(
        writes in proptest::collection::vec((0_u32..msr::COUNT, value()), 1..64)
    ) {
        let mut machine = Machine::new();
        machine.write(msr::GUEST_OS_ID, 1).unwrap();
        for (offset, value) in writes {
            let register = msr::FIRST + offset;
            let before: Vec<_> = (0..msr::COUNT).map(|n| machine.read(msr::FIRST + n)).collect();
            let owned = machine.read(msr::GUEST_OS_ID) != Ok(0);
            match machine.write(register, value) {
                Err(GeneralProtection) => {
                    let after: Vec<_> =
                        (0..msr::COUNT).map(|n| machine.read(msr::FIRST + n)).collect();
                    prop_assert_eq!(before, after);
                }
                Ok(action) => {
                    if holds_its_value(register) && (owned || register != msr::HYPERCALL) {
                        prop_assert_eq!(machine.read(register), Ok(value));
                    }
                    match action {
                        Action::HypercallPage(page)
                        | Action::ReferenceTscPage(page)
                        | Action::Clear(page) => {
                            prop_assert!(Ram.is_ram(page) && page.0.is_multiple_of(4096));
                        }
                        Action::Pages => {
                            let pages = machine.vp.pages();
                            for register in [pages.message_page, pages.event_page] {
                                prop_assert!(register & 1 == 0 || Ram.is_ram(page_of(register)));
                            }
                        }
                        _ => {}
                    }
                }
            }
            for sint in (0..Sint::COUNT).filter_map(Sint::new) {
                if let Some(vector) = machine.vp.sint(sint).vector() {
                    prop_assert!(vector >= FIRST_VECTOR);
                }
            }
        }
    }
}
