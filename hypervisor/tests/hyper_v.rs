//! The Hyper-V interface as a guest sees it, the same tests for whoever serves it. Each runs a few
//! bytes of guest code that report what they find. The kernel's are skipped where KVM has none.

mod common;

use std::sync::Arc;

use common::{
    Code, DATA, EVENT_PAGE, MESSAGE_PAGE, Messages, TSC_PAGE, X2APIC_SELF_IPI, leave_unended,
    partition, run,
};
use hypervisor::kvm::HyperV;
use hypervisor::synic::{ConnectionId, EventFlag, Message, Posted, Sint};
use hypervisor::{ExitKind, Gpa, Partition, VpIndex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The vector of Linux's VMBus driver.
const VECTOR: u8 = 0xf3;

const POST_MESSAGE: u64 = 0x5c;
const FAST_SIGNAL: u64 = 0x1_005d;

/// Each test for each interface.
macro_rules! conformance {
    ($($name:ident),* $(,)?) => {
        mod kernel {
            $(#[test] fn $name() { super::$name(hypervisor::kvm::HyperV::Kernel); })*
        }
        mod user {
            $(#[test] fn $name() { super::$name(hypervisor::kvm::HyperV::User); })*
        }
    };
}

conformance!(
    registers_say_what_they_should,
    bad_values_fault,
    messages_are_posted,
    hypercalls_have_their_status,
    signals_reach_their_event,
    many_connections_are_told_apart,
    a_message_interrupts,
    a_busy_slot_is_told_when_it_is_free,
    an_event_flag_interrupts,
    a_masked_sint_does_not_interrupt,
    interrupts_end_by_themselves_where_the_guest_asks_for_it,
    a_synic_that_is_off_delivers_nothing,
    kvm_s_own_registers_fault,
    reference_time_is_one,
    time_is_the_same_at_cpl_3,
    user_mode_is_interrupted,
    a_timer_raises_its_vector,
    a_timer_sends_its_message,
    a_periodic_timer_goes_on,
);

fn registers_say_what_they_should(hyper_v: HyperV) {
    let registers = [
        (0x4000_0002, 0),       // VP_INDEX
        (0x4000_0001, 0),       // HYPERCALL, before the guest's identity
        (0x4000_0081, 1),       // SVERSION
        (0x4000_0092, 1 << 16), // SINT 2
        (0x4000_009f, 1 << 16),
        (0x4000_0023, 1_000_000_000),
    ];
    let mut code = Code::prologue().wrmsr(0x4000_0001, 0x11_0001);
    for (register, _) in registers {
        code = code.rdmsr(register).report();
    }
    // What is written is read.
    let kept = [(0x4000_0000, 0x8100_0000_0000_0001), (0x4000_0001, 0x11_0001)];
    let kept = kept.into_iter().chain([(0x4000_0083, 0x11_1001), (0x4000_0092, 0xf3)]);
    for (register, value) in kept.clone() {
        code = code.wrmsr(register, value).rdmsr(register).report();
    }
    let code = code.report_faults().end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    let expected = registers.into_iter().chain(kept).map(|(_, value)| value).chain([0]);
    assert_eq!(reports, expected.collect::<Vec<u64>>());
}

fn bad_values_fault(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .wrmsr(0x4000_0002, 1) // VP_INDEX
        .wrmsr(0x4000_0081, 1) // SVERSION
        .wrmsr(0x4000_0020, 1) // TIME_REF_COUNT
        .wrmsr(0x4000_0092, 3) // SINT 2 with an exception's vector
        .wrmsr(0x4000_00b0, 1) // a timer that is not offered
        .rdmsr(0x4000_01f0) // nothing
        .report_faults()
        .rdmsr(0x4000_0092)
        .report()
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert_eq!(reports[1], 1 << 16, "the SINT is as it was");
    // A kernel before 5.14 does not hold guests to what is offered.
    assert!(reports[0] == 6 || hyper_v == HyperV::Kernel && reports[0] >= 5, "{reports:?}");
}

fn messages_are_posted(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .store(DATA, 0xff00_0004)
        .store(DATA + 8, 1)
        .store(DATA + 12, 8)
        .store(DATA + 16, 0x1122_3344)
        .store(DATA + 20, 0x5566_7788)
        .hypercall(POST_MESSAGE, DATA.into())
        .report()
        .store(DATA, 0xbad)
        .hypercall(POST_MESSAGE, DATA.into())
        .report()
        .hypercall(POST_MESSAGE, u64::from(DATA) + 4)
        .report()
        .store(DATA + 12, 241)
        .hypercall(POST_MESSAGE, DATA.into())
        .report()
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let counters = partition.exit_counters();
    let messages = Arc::<Messages>::default();
    assert_eq!(run(&mut partition, &messages, |_| {}), [0, 0x12, 4, 5]);
    let payload = vec![0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55];
    assert_eq!(*messages.0.lock().unwrap(), [(4, 1, payload)]);
    assert_eq!(counters[0].get(ExitKind::PostMessage), 4);
}

/// Linux's kernel clobbers RAX, RCX, RDX and R8 to R11 around a call, but others must live.
fn hypercalls_have_their_status(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .bytes(&[0xbb, 0x11, 0, 0, 0, 0xbe, 0x22, 0, 0, 0]) // mov ebx, 0x11; mov esi, 0x22
        .bytes(&[0x41, 0xbc, 0x44, 0, 0, 0]) // mov r12d, 0x44
        .hypercall(0x7fff, 0)
        .report()
        .hypercall(FAST_SIGNAL, 0x2077) // nobody has bound it
        .report()
        .bytes(&[0x48, 0x8d, 0x04, 0x33]) // lea rax, [rbx + rsi]
        .bytes(&[0x4c, 0x01, 0xe0]) // add rax, r12
        .report()
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert_eq!(reports, [2, 0x12, 0x77]);
}

fn signals_reach_their_event(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .hypercall(FAST_SIGNAL, 0x2001)
        .report()
        .hypercall(FAST_SIGNAL, 0x2002)
        .report()
        .hypercall(FAST_SIGNAL, 0x2001)
        .report()
        .store(DATA, 0x2001)
        .store(DATA + 4, 0)
        .hypercall(0x5d, DATA.into()) // the slow form
        .report()
        .step(99) // unbinds
        .hypercall(FAST_SIGNAL, 0x2001)
        .report()
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let synic = partition.synic();
    let [first, second] = [0, 0].map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
    let (one, two) = (ConnectionId::new(0x2001), ConnectionId::new(0x2002));
    synic.bind(one, &first).unwrap();
    synic.bind(two, &second).unwrap();
    assert!(synic.bind(one, &second).is_err(), "bound already");
    let counters = partition.exit_counters();
    let event = first.try_clone().unwrap();
    let reports = run(&mut partition, &Arc::default(), move |step| {
        if step == 99 {
            synic.unbind(one, &event).unwrap();
        }
    });
    assert_eq!(reports, [0, 0, 0, 0, 0x12]);
    assert_eq!((first.read().unwrap(), second.read().unwrap()), (3, 1));
    // The fast form on bound connections costs no exit to user space.
    let expected = if hyper_v == HyperV::Kernel { 1 } else { 2 };
    assert_eq!(counters[0].get(ExitKind::SignalEvent), expected);
}

/// As many as a guest with 64 processors has channels on a controller.
fn many_connections_are_told_apart(hyper_v: HyperV) {
    const CONNECTIONS: u32 = 64;
    let mut code = Code::prologue().hyper_v();
    for n in (0..CONNECTIONS).step_by(7) {
        code = code.hypercall(FAST_SIGNAL, u64::from(0x2000 + n)).report();
    }
    let Some(mut partition) = partition(hyper_v, false, &code.end()) else { return };
    let synic = partition.synic();
    let events: Vec<_> = (0..CONNECTIONS).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    for (n, event) in (0..).zip(&events) {
        synic.bind(ConnectionId::new(0x2000 + n), event).unwrap();
    }
    let counters = partition.exit_counters();
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert!(reports.iter().all(|status| *status == 0), "{reports:?}");
    assert_eq!(counters[0].get(ExitKind::SignalEvent), 0);
    for (n, event) in (0..).zip(&events) {
        let expected = if n % 7 == 0 { Some(1) } else { None };
        assert_eq!(event.read().ok(), expected, "connection {n}");
        synic.unbind(ConnectionId::new(0x2000 + n), event).unwrap();
    }
}

fn message(text: &[u8]) -> Message {
    Message::new(1, text).unwrap()
}

const SLOT: u32 = MESSAGE_PAGE + 0x200;

fn a_message_interrupts(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .step(1) // too early
        .synic(VECTOR)
        .step(2)
        .wait_interrupt(VECTOR, 1)
        .load(SLOT)
        .report()
        .load(SLOT + 16)
        .report()
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let synic = partition.synic();
    let reports = run(&mut partition, &Arc::default(), move |step| match step {
        1 => {
            let posted = synic.post(VpIndex(0), Sint::VMBUS, &message(b"early"));
            assert_eq!(posted, Posted::Disabled);
            assert_eq!(synic.post(VpIndex(1), Sint::VMBUS, &message(b"")), Posted::Disabled);
        }
        2 => {
            let posted = synic.post(VpIndex(0), Sint::VMBUS, &message(b"in time."));
            assert_eq!(posted, Posted::Delivered);
        }
        _ => {}
    });
    assert_eq!(reports, [0x8_0000_0001, u64::from_le_bytes(*b"in time.")]);
}

fn a_busy_slot_is_told_when_it_is_free(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .synic(VECTOR)
        .step(1)
        .wait_interrupt(VECTOR, 1)
        .load(SLOT)
        .report() // with the flag that asks for EOM
        .store(SLOT, 0)
        .wrmsr(0x4000_0084, 0)
        .step(2)
        .wait_interrupt(VECTOR, 2)
        .load(SLOT + 16)
        .report()
        .wrmsr(0x4000_0084, 0) // nobody waits now
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let synic = partition.synic();
    let other = partition.synic();
    let reports = run(&mut partition, &Arc::default(), move |step| match step {
        1 => {
            let post = |text| synic.post(VpIndex(0), Sint::VMBUS, &message(text));
            assert_eq!(post(b"first"), Posted::Delivered);
            assert_eq!(post(b"second.."), Posted::Busy);
        }
        2 => {
            // The kernel's is found by a timer, ours by EOM.
            while synic.slot_free().read().is_err() {
                assert_eq!(hyper_v, HyperV::Kernel, "EOM fires at once");
            }
            let posted = synic.post(VpIndex(0), Sint::VMBUS, &message(b"second.."));
            assert_eq!(posted, Posted::Delivered);
        }
        _ => {}
    });
    assert_eq!(reports, [0x0105_0000_0001, u64::from_le_bytes(*b"second..")]);
    assert!(hyper_v == HyperV::Kernel || other.slot_free().read().is_err(), "once only");
}

fn an_event_flag_interrupts(hyper_v: HyperV) {
    let flag = EventFlag::new(77).unwrap();
    let word = EVENT_PAGE + 0x200 + 8;
    let code = Code::prologue()
        .hyper_v()
        .synic(VECTOR)
        .step(1)
        .wait_interrupt(VECTOR, 1)
        .load(word)
        .report()
        .store(word, 0)
        .step(2)
        .wait_interrupt(VECTOR, 2)
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let port = partition.synic().event_port(VpIndex(0), Sint::VMBUS, flag).unwrap();
    assert!(partition.synic().event_port(VpIndex(1), Sint::VMBUS, flag).is_none());
    assert!(!port.signal(), "no page yet");
    let reports = run(&mut partition, &Arc::default(), move |step| match step {
        1 => {
            assert!(port.signal());
            assert!(!port.signal(), "the guest has not seen it yet");
            port.retarget(VpIndex(7)); // there is none
        }
        2 => assert!(port.signal()),
        _ => {}
    });
    assert_eq!(reports, [1 << 13]);
}

fn a_masked_sint_does_not_interrupt(hyper_v: HyperV) {
    let flag = EventFlag::new(1).unwrap();
    let code = Code::prologue()
        .hyper_v()
        .synic(VECTOR)
        .wrmsr(0x4000_0092, 1 << 16 | u64::from(VECTOR))
        .step(1)
        .report_interrupts(VECTOR)
        .wrmsr(0x4000_0092, 0x51)
        .store(EVENT_PAGE + 0x200, 0)
        .step(1)
        .wait_interrupt(0x51, 1)
        .report_interrupts(VECTOR)
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let port = partition.synic().event_port(VpIndex(0), Sint::VMBUS, flag).unwrap();
    let reports = run(&mut partition, &Arc::default(), move |step| {
        if step == 1 {
            assert!(port.signal());
        }
    });
    assert_eq!(reports, [0, 0]);
}

/// As the BSDs have it: the handler leaves the local APIC alone. An interrupt of a lower priority
/// tells whether those before have ended.
fn interrupts_end_by_themselves_where_the_guest_asks_for_it(hyper_v: HyperV) {
    const AUTO_EOI: u64 = 1 << 17;
    const LOWER: u8 = 0x41;
    const ROUNDS: u32 = 20;
    let flags = EVENT_PAGE + 0x200;
    let sint = |code: Code, value: u64| code.wrmsr(0x4000_0092, value);
    let mut code = sint(Code::prologue().hyper_v().synic(VECTOR), u64::from(VECTOR) | AUTO_EOI);
    for round in 1..=ROUNDS {
        // Raised while interrupts are off; on others by a thread, while the guest sleeps.
        code = code.step(1).wait_interrupt(VECTOR, 2 * round - 1).store(flags, 0).step(2);
        code = code.wait_interrupt(VECTOR, 2 * round).store(SLOT, 0);
        code = code.wrmsr(X2APIC_SELF_IPI, LOWER.into()).wait_interrupt(LOWER, round);
    }
    // Other vectors, and back to one that the guest ends.
    code = sint(code, 0x61).step(1).wait_interrupt(0x61, 1).store(flags, 0);
    code = code.wrmsr(X2APIC_SELF_IPI, LOWER.into()).wait_interrupt(LOWER, ROUNDS + 1);
    let code = code.report_interrupts(VECTOR).report_interrupts(LOWER).end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    leave_unended(partition.memory(), VECTOR);
    let synic = partition.synic();
    let flag = EventFlag::new(1).unwrap();
    let port = synic.event_port(VpIndex(0), Sint::VMBUS, flag).unwrap();
    let reports = run(&mut partition, &Arc::default(), move |step| match step {
        1 => assert!(port.signal()),
        _ => {
            let synic = Arc::clone(&synic);
            std::thread::spawn(move || {
                let posted = synic.post(VpIndex(0), Sint::VMBUS, &message(b""));
                assert_eq!(posted, Posted::Delivered);
            });
        }
    });
    assert_eq!(reports, [2 * u64::from(ROUNDS), u64::from(ROUNDS) + 1]);
}

/// SCONTROL is a processor's switch for all that comes in: messages, flags, and their interrupts.
fn a_synic_that_is_off_delivers_nothing(hyper_v: HyperV) {
    let flags = EVENT_PAGE + 0x200;
    let code = Code::prologue()
        .hyper_v()
        .synic(VECTOR)
        .step(1)
        .wait_interrupt(VECTOR, 1)
        .store(flags, 0)
        .wrmsr(0x4000_0080, 0)
        .step(2)
        .report_interrupts(VECTOR)
        .load(flags)
        .report()
        .wrmsr(0x4000_0080, 1)
        .load(SLOT + 16)
        .report()
        .step(3)
        .wait_interrupt(VECTOR, 2)
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let synic = partition.synic();
    let flag = EventFlag::new(1).unwrap();
    let port = synic.event_port(VpIndex(0), Sint::VMBUS, flag).unwrap();
    let reports = run(&mut partition, &Arc::default(), move |step| {
        let post = || synic.post(VpIndex(0), Sint::VMBUS, &message(b"a while!"));
        match step {
            1 => assert_eq!(post(), Posted::Delivered),
            2 => {
                assert_eq!(post(), Posted::Disabled);
                assert!(!port.signal());
            }
            _ => {
                assert_eq!(post(), Posted::Busy, "the first lies there still");
                assert!(port.signal());
            }
        }
    });
    assert_eq!(reports, [1, 0, u64::from_le_bytes(*b"a while!")]);
}

/// No guest is told of KVM's own interface, and so none can use it: its registers would have the
/// kernel write to pages that the guest names.
fn kvm_s_own_registers_fault(hyper_v: HyperV) {
    let mut code = Code::prologue();
    // Wall clock, system time, both old and new; asynchronous page faults, stolen time, EOI.
    let registers = [0x11, 0x12].into_iter().chain(0x4b56_4d00..=0x4b56_4d04);
    let count = registers.clone().count() as u64;
    for register in registers {
        code = code.wrmsr(register, u64::from(DATA) | 1).rdmsr(register);
    }
    let code = code.report_faults().load(DATA).report().end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let kvm = hypervisor::kvm::open().unwrap();
    let enforce = kvm_bindings::KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
    if kvm.check_extension_raw(enforce.into()) <= 0 {
        eprintln!("skipped: a KVM before Linux 5.10");
        return;
    }
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert_eq!(reports, [2 * count, 0]);
}

#[test]
fn kvm_s_own_registers_fault_without_hyper_v_too() {
    kvm_s_own_registers_fault(HyperV::Absent);
}

fn reference_time_is_one(hyper_v: HyperV) {
    const ROUNDS: usize = 20;
    let mut code =
        Code::prologue().hyper_v().wrmsr(0x4000_0021, u64::from(TSC_PAGE) | 1).rdmsr(0x4000_0022);
    code = code.report();
    for _ in 0..ROUNDS {
        code = code.rdmsr(0x4000_0020).report().rdtsc().report();
    }
    let Some(mut partition) = partition(hyper_v, false, &code.end()) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    let memory = partition.memory();
    let sequence = memory.read_obj::<u32>(Gpa(TSC_PAGE.into())).unwrap();
    let scale = memory.read_obj::<u64>(Gpa(u64::from(TSC_PAGE) + 8)).unwrap();
    let offset = memory.read_obj::<u64>(Gpa(u64::from(TSC_PAGE) + 16)).unwrap();
    let hertz = reports[0];
    assert!(hertz > 10_000_000, "{hertz}");
    let times = reports[1..].chunks(2).map(|pair| (pair[0], pair[1]));
    let mut last = 0;
    for (register, tsc) in times {
        assert!(register >= last);
        last = register;
        if sequence != 0 {
            // The page was read later than the register.
            let page =
                ((u128::from(tsc) * u128::from(scale)) >> 64).wrapping_add(offset.into()) as u64;
            assert!(page >= register, "{page} {register}");
            last = page;
        }
    }
    assert!(last < 60 * 10_000_000, "it began with the partition: {last}");
    if sequence == 0 {
        eprintln!("{hyper_v:?}: the host does not trust its time stamp counter");
    }
}

/// The register is read at CPL 0, the counter before and after that, the last time at CPL 3.
fn time_is_the_same_at_cpl_3(hyper_v: HyperV) {
    let code = Code::prologue().hyper_v().wrmsr(0x4000_0021, u64::from(TSC_PAGE) | 1);
    let code = code.rdtsc().report().user_mode().rdtsc().report().end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert!(reports[1] > reports[0], "{reports:?}");
    assert!(reports[1] - reports[0] < 1 << 36, "{reports:?}");
}

/// Our hypercall page is two port accesses, which CPL 3 may be allowed.
#[test]
fn hypercalls_work_at_cpl_3() {
    let code = Code::prologue()
        .hyper_v()
        .synic(VECTOR)
        .store(DATA, 4)
        .store(DATA + 8, 1)
        .store(DATA + 12, 8)
        .user_mode()
        .hypercall(POST_MESSAGE, DATA.into())
        .report()
        .hypercall(FAST_SIGNAL, 0x2001)
        .report()
        .hypercall(FAST_SIGNAL, 0x2002)
        .report()
        .eax(0x2001)
        .bytes(&[0xe7, hypervisor::DOORBELL_PORT as u8]) // out DOORBELL_PORT, eax
        .report()
        .eax(0x2002)
        .bytes(&[0xe7, hypervisor::DOORBELL_PORT as u8])
        .report()
        .step(1)
        .end();
    let Some(mut partition) = partition(HyperV::User, false, &code) else { return };
    let synic = partition.synic();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    synic.bind(ConnectionId::new(0x2001), &event).unwrap();
    let counters = partition.exit_counters();
    let messages = Arc::<Messages>::default();
    let reports = run(&mut partition, &messages, move |_| {
        assert_eq!(synic.post(VpIndex(0), Sint::VMBUS, &message(b"")), Posted::Delivered);
    });
    assert_eq!(reports, [0, 0, 0x12, 0x2001, 0x2002 + 0x12]);
    assert_eq!(messages.0.lock().unwrap().len(), 1);
    assert_eq!(event.read().unwrap(), 2);
    assert_eq!(counters[0].get(ExitKind::SignalEvent), 2, "the unbound");
}

/// An interrupt comes into CPL 3 as soon as it is raised; the guest turns in a circle that only its
/// handler's count ends.
fn user_mode_is_interrupted(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .synic(VECTOR)
        .user_mode()
        .step(1)
        .spin_for_interrupt(VECTOR, 1)
        .step(1)
        .spin_for_interrupt(VECTOR, 2)
        .load(EVENT_PAGE + 0x200)
        .report()
        .end();
    let Some(mut partition) = partition(hyper_v, false, &code) else { return };
    let synic = partition.synic();
    let mut flags = (3..).filter_map(EventFlag::new);
    let reports = run(&mut partition, &Arc::default(), move |_| {
        let flag = flags.next().unwrap();
        assert!(synic.event_port(VpIndex(0), Sint::VMBUS, flag).unwrap().signal());
    });
    assert_eq!(reports, [3 << 3]);
}

/// Reads the time, adds to it and writes it to the first timer's COUNT.
fn timer_in(code: Code, units: u32) -> Code {
    code.rdmsr(0x4000_0020)
        .bytes(&[0x48, 0x05])
        .bytes(&units.to_le_bytes()) // add rax, units
        .bytes(&[0x48, 0x89, 0xc3]) // mov rbx, rax
        .bytes(&[0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 0x20]) // mov rdx, rax; shr rdx, 32
        .bytes(&[0xb9, 0xb1, 0x00, 0x00, 0x40]) // mov ecx, STIMER0_COUNT
        .bytes(&[0x0f, 0x30]) // wrmsr
}

fn a_timer_raises_its_vector(hyper_v: HyperV) {
    const ENABLE_DIRECT: u64 = 1 << 12 | 1 | 0xed << 4;
    let code = Code::prologue().hyper_v();
    // 2 ms; then one whose time has passed.
    let code = timer_in(code, 20_000).wrmsr(0x4000_00b0, ENABLE_DIRECT).wait_interrupt(0xed, 1);
    let code = code
        .rdmsr(0x4000_0020)
        .bytes(&[0x48, 0x29, 0xd8]) // sub rax, rbx: how late it is
        .report()
        .rdmsr(0x4000_00b0)
        .report()
        .wrmsr(0x4000_00b1, 1)
        .wrmsr(0x4000_00b0, ENABLE_DIRECT)
        .wait_interrupt(0xed, 2)
        .end();
    let Some(mut partition) = partition(hyper_v, true, &code) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert!((reports[0] as i64) >= 0, "{} units early", -(reports[0] as i64));
    assert_eq!(reports[1], ENABLE_DIRECT & !1, "a one-shot is off when it has expired");
}

fn a_timer_sends_its_message(hyper_v: HyperV) {
    let code = Code::prologue().hyper_v().synic(VECTOR).wrmsr(0x4000_0094, 0x61);
    let code = timer_in(code, 10_000).wrmsr(0x4000_00b0, 4 << 16 | 1).wait_interrupt(0x61, 1);
    let slot = MESSAGE_PAGE + 0x400;
    let code = code
        .bytes(&[0x48, 0x89, 0xd8]) // mov rax, rbx
        .report();
    let code = code.load(slot).report().load(slot + 16).report().load(slot + 24).report();
    let Some(mut partition) = partition(hyper_v, true, &code.end()) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert_eq!(reports[1], 0x18_8000_0010);
    assert_eq!(reports[2], 0, "the first timer");
    assert_eq!(reports[3], reports[0], "when it was due");
}

fn a_periodic_timer_goes_on(hyper_v: HyperV) {
    let code = Code::prologue()
        .hyper_v()
        .wrmsr(0x4000_00b1, 10_000)
        .wrmsr(0x4000_00b0, 1 << 12 | 3 | 0xed << 4)
        .wait_interrupt(0xed, 5)
        .wrmsr(0x4000_00b0, 0)
        .rdmsr(0x4000_0020)
        .report()
        .end();
    let Some(mut partition) = partition(hyper_v, true, &code) else { return };
    let reports = run(&mut partition, &Arc::default(), |_| {});
    assert!(reports[0] >= 50_000, "five periods in {}", reports[0]);
}
