//! The Hyper-V interface as the guest of a hosted partition sees it, as far as it has a meaning
//! without instructions of a processor; and what becomes of guests that do what they should not.
//!
//! Each test is a pair: what the root does, and what its guest does. The guest is this same program,
//! started again with the test's name.

mod common;

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use common::{END, Messages, REGISTER, REPORT, STEP, run, run_to_any_end};
use hypervisor::hosted::{GuestProgram, HostedPartition, Processor};
use hypervisor::synic::{ConnectionId, EventFlag, Message, Posted, Sint};
use hypervisor::{ExitKind, Gpa, GuestMemory, Partition, StopReason, VpIndex};
use rustix::net::SendFlags;
use vm_memory::VolatileMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The guest's memory.
const MEMORY: u64 = 1 << 20;
const MESSAGE_PAGE: usize = 0x1000;
const EVENT_PAGE: usize = 0x2000;
const DATA: usize = 0x3000;
const TSC_PAGE: usize = 0x4000;
/// The VMBus's SINT in the message page.
const SLOT: usize = MESSAGE_PAGE + 0x200;

const POST_MESSAGE: u64 = 0x5c;
const SIGNAL_EVENT: u64 = 0x5d;

struct Test {
    name: &'static str,
    root: fn(HostedPartition),
    guest: fn(&Guest),
}

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        [$(Test { name: stringify!($name), root: $name::root, guest: $name::guest }),*]
    };
}

const TESTS: &[Test] = &tests!(
    registers_say_what_they_should,
    bad_values_fault,
    ports_reach_their_devices,
    device_memory_is_reached,
    messages_are_posted,
    hypercalls_have_their_status,
    signals_reach_their_event,
    a_message_interrupts,
    a_busy_slot_is_told_when_it_is_free,
    an_event_flag_interrupts,
    a_synic_that_is_off_delivers_nothing,
    strings_go_to_memory_that_is_there,
    a_rising_line_interrupts,
    reference_time_goes_on,
    memory_is_shared,
    a_killed_guest_ends_the_run,
    a_guest_that_just_ends,
    a_guest_that_asks_for_a_reset,
    garbage_ends_the_run,
    answers_have_to_be_taken,
    no_file_is_opened,
    no_socket_is_made,
    no_process_is_started,
    no_program_is_run,
    no_code_is_mapped,
    no_file_is_cut,
    nobody_is_killed,
    descriptors_keep_their_flags,
    only_events_are_written,
);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, name] = &arguments[..]
        && word == "guest"
    {
        let test = TESTS.iter().find(|test| test.name == name).expect("a test's name");
        (test.guest)(&Guest(Processor::start().expect("started by a partition")));
        return ExitCode::SUCCESS;
    }
    let filters: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |test: &&Test| {
        filters.is_empty() || filters.iter().any(|filter| test.name.contains(filter.as_str()))
    };
    if arguments.iter().any(|argument| argument == "--list") {
        TESTS.iter().filter(wanted).for_each(|test| println!("{}: test", test.name));
        return ExitCode::SUCCESS;
    }
    let (mut passed, mut failed) = (0, 0);
    for test in TESTS.iter().filter(wanted) {
        let ok = std::panic::catch_unwind(|| (test.root)(partition(test.name))).is_ok();
        *if ok { &mut passed } else { &mut failed } += 1;
        println!("test {} ... {}", test.name, if ok { "ok" } else { "FAILED" });
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    let left_out = TESTS.len() - passed - failed;
    println!(
        "\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored; 0 measured; \
         {left_out} filtered out"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn partition(name: &str) -> HostedPartition {
    let program = GuestProgram {
        path: "/proc/self/exe".into(),
        arguments: vec!["guest".to_owned(), name.to_owned()],
    };
    HostedPartition::new(GuestMemory::new(MEMORY).unwrap(), &program).unwrap()
}

/// How a run ends that goes wrong, in the words of its one line.
fn failure(mut partition: HostedPartition, on_step: impl FnMut(u32) + Send + 'static) -> String {
    match run_to_any_end(&mut partition, &Arc::default(), on_step).0 {
        StopReason::Error(line) => line,
        reason => panic!("{reason:?}"),
    }
}

/// A processor that reports to the root's test.
struct Guest(Processor);

impl Guest {
    fn report(&self, value: u64) {
        self.0.port_write(REPORT, 4, &value.to_le_bytes());
    }

    fn step(&self, number: u32) {
        self.0.port_write(STEP, 4, &number.to_le_bytes());
    }

    /// The test is over for the guest.
    fn end(&self) -> ! {
        self.0.port_write(END, 1, &[0]);
        loop {
            self.0.halt();
        }
    }

    fn load(&self, at: usize) -> u64 {
        self.0.memory().get_ref(at).unwrap().load()
    }

    fn store(&self, at: usize, words: &[u32]) {
        for (word, at) in words.iter().zip((at..).step_by(4)) {
            self.0.memory().get_ref(at).unwrap().store(*word);
        }
    }

    fn wrmsr(&self, register: u32, value: u64) {
        assert!(self.0.register_write(register, value));
    }

    fn report_hypercall(&self, control: u64, input: u64) {
        self.report(self.0.hypercall(control, input).0.into());
    }

    fn synic(&self) {
        for (register, value) in [
            (0x4000_0000, 1 << 63),
            (0x4000_0083, MESSAGE_PAGE as u64 | 1),
            (0x4000_0082, EVENT_PAGE as u64 | 1),
            (0x4000_0092, 0x20),
            (0x4000_0080, 1),
        ] {
            self.wrmsr(register, value);
        }
    }
}

fn message(text: &[u8]) -> Message {
    Message::new(1, text).unwrap()
}

mod registers_say_what_they_should {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let reports = run(&mut partition, &Arc::default(), |_| {});
        assert_eq!(reports, [0, 1, 1 << 16, u64::MAX, 0x20, 1 << 63]);
        println!("  beside the system call filter: {:?}", partition.confinement().unwrap());
    }

    pub(super) fn guest(guest: &Guest) {
        for register in [0x4000_0002, 0x4000_0081, 0x4000_0092, 0x4000_0022] {
            guest.report(guest.0.register_read(register).unwrap_or(u64::MAX));
        }
        guest.synic();
        for register in [0x4000_0092, 0x4000_0000] {
            guest.report(guest.0.register_read(register).unwrap());
        }
        guest.end();
    }
}

mod bad_values_fault {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        assert_eq!(run(&mut partition, &Arc::default(), |_| {}), [0, 0, 0, 0, 1 << 16]);
    }

    pub(super) fn guest(guest: &Guest) {
        for (register, value) in [
            (0x4000_0092, 1),           // a vector of the processor's own
            (0x4000_0083, MEMORY | 1),  // no RAM there
            (0x4000_0082, 1 << 60 | 1), // nor there
            (0x1b, 0xfee0_0900),        // no synthetic register
        ] {
            guest.report(guest.0.register_write(register, value).into());
        }
        guest.report(guest.0.register_read(0x4000_0092).unwrap());
        guest.end();
    }
}

mod ports_reach_their_devices {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let counters = partition.exit_counters();
        let reports = run(&mut partition, &Arc::default(), |_| {});
        assert_eq!(reports, [0xffff_ffff, 0x0706_0504_0302_0100, 0xff]);
        assert_eq!(counters[0].get(ExitKind::PortRead), 2);
        assert_eq!(counters[0].get(ExitKind::PortWrite), 4, "a string is one");
    }

    pub(super) fn guest(guest: &Guest) {
        let mut data = [0; 8];
        guest.0.port_read(0x3333, &mut data[..4]); // nobody's
        guest.report(u64::from_le_bytes(data));
        guest.0.port_write(REPORT, 4, &[0, 1, 2, 3, 4, 5, 6, 7]);
        let mut data = [0; 8];
        guest.0.port_read(0x3333, &mut data[..1]);
        guest.report(u64::from_le_bytes(data));
        guest.end();
    }
}

mod device_memory_is_reached {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let counters = partition.exit_counters();
        let reports = run(&mut partition, &Arc::default(), |_| {});
        assert_eq!(reports, [0x0405_0102_0000_0000, 0x0405, u64::MAX]);
        assert_eq!(counters[0].get(ExitKind::MmioRead), 3);
        assert_eq!(counters[0].get(ExitKind::MmioWrite), 3);
    }

    pub(super) fn guest(guest: &Guest) {
        let load = |gpa, width: usize| {
            let mut data = [0; 8];
            guest.0.mmio_read(gpa, &mut data[..width]);
            u64::from_le_bytes(data)
        };
        guest.0.mmio_write(REGISTER + 4, 4, 0xdead_0405_0102);
        guest.0.mmio_write(REGISTER + 8, 4, 1); // nobody's
        guest.0.mmio_write(0, 8, 1); // nobody's: memory is not a device's
        guest.report(load(REGISTER, 8));
        guest.report(load(REGISTER + 6, 2));
        guest.report(load(REGISTER + 4, 8)); // half of it nobody's
        guest.end();
    }
}

mod messages_are_posted {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let counters = partition.exit_counters();
        let messages = Arc::<Messages>::default();
        assert_eq!(run(&mut partition, &messages, |_| {}), [0, 0x12, 4, 4, 5]);
        let payload = vec![0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55];
        assert_eq!(*messages.0.lock().unwrap(), [(4, 1, payload)]);
        assert_eq!(counters[0].get(ExitKind::PostMessage), 5);
    }

    pub(super) fn guest(guest: &Guest) {
        guest.store(DATA, &[0xff00_0004, 0, 1, 8, 0x1122_3344, 0x5566_7788]);
        guest.report_hypercall(POST_MESSAGE, DATA as u64);
        guest.store(DATA, &[0xbad]);
        guest.report_hypercall(POST_MESSAGE, DATA as u64);
        guest.report_hypercall(POST_MESSAGE, DATA as u64 + 4);
        guest.report_hypercall(POST_MESSAGE, MEMORY);
        guest.store(DATA + 12, &[241]);
        guest.report_hypercall(POST_MESSAGE, DATA as u64);
        guest.end();
    }
}

mod hypercalls_have_their_status {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        assert_eq!(run(&mut partition, &Arc::default(), |_| {}), [2, 0x12, 0x12]);
    }

    pub(super) fn guest(guest: &Guest) {
        guest.report_hypercall(0x7fff, 0);
        guest.report(guest.0.signal_event(ConnectionId::new(0x2077)).0.into());
        guest.store(DATA, &[0x2077, 0]);
        guest.report_hypercall(SIGNAL_EVENT, DATA as u64);
        guest.end();
    }
}

mod signals_reach_their_event {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let synic = partition.synic();
        let [first, second] = [0, 0].map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
        let (one, two) = (ConnectionId::new(0x2001), ConnectionId::new(0x2002));
        synic.bind(one, &first).unwrap();
        synic.bind(two, &second).unwrap();
        assert!(synic.bind(one, &second).is_err(), "bound already");
        let counters = partition.exit_counters();
        let event = first.try_clone().unwrap();
        let reports = run(&mut partition, &Arc::default(), move |_| {
            synic.unbind(one, &event).unwrap();
            assert!(synic.unbind(one, &event).is_err(), "not bound any more");
        });
        assert_eq!(reports, [0, 0, 0, 0, 0x12]);
        assert_eq!((first.read().unwrap(), second.read().unwrap()), (3, 1));
        // Doorbells are no intercepts: one came by a hypercall, one was not bound.
        assert_eq!(counters[0].get(ExitKind::SignalEvent), 2);
    }

    pub(super) fn guest(guest: &Guest) {
        for id in [0x2001, 0x2002, 0x2001] {
            guest.report(guest.0.signal_event(ConnectionId::new(id)).0.into());
        }
        guest.store(DATA, &[0x2001, 0]);
        guest.report_hypercall(SIGNAL_EVENT, DATA as u64);
        guest.step(1);
        guest.report(guest.0.signal_event(ConnectionId::new(0x2001)).0.into());
        guest.end();
    }
}

mod a_message_interrupts {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let synic = partition.synic();
        let reports = run(&mut partition, &Arc::default(), move |step| {
            let post = |vp| synic.post(VpIndex(vp), Sint::VMBUS, &message(b"in time."));
            let expected = if step == 1 { Posted::Disabled } else { Posted::Delivered };
            assert_eq!(post(1), Posted::Disabled, "there is no such processor");
            assert_eq!(post(0), expected);
        });
        assert_eq!(reports, [0x8_0000_0001, u64::from_le_bytes(*b"in time."), 1]);
    }

    pub(super) fn guest(guest: &Guest) {
        guest.step(1); // too early
        guest.synic();
        guest.step(2);
        guest.0.halt();
        guest.report(guest.load(SLOT));
        guest.report(guest.load(SLOT + 16));
        guest.report(guest.0.interrupts());
        guest.end();
    }
}

mod a_busy_slot_is_told_when_it_is_free {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let synic = partition.synic();
        let other = partition.synic();
        let reports = run(&mut partition, &Arc::default(), move |step| {
            let post = |text| synic.post(VpIndex(0), Sint::VMBUS, &message(text));
            if step == 1 {
                assert_eq!(post(b"first"), Posted::Delivered);
                assert_eq!(post(b"second.."), Posted::Busy);
            } else {
                assert!(synic.slot_free().read().is_ok(), "EOM fires at once");
                assert_eq!(post(b"second.."), Posted::Delivered);
            }
        });
        assert_eq!(reports, [0x0105_0000_0001, u64::from_le_bytes(*b"second..")]);
        assert!(other.slot_free().read().is_err(), "once only");
    }

    pub(super) fn guest(guest: &Guest) {
        guest.synic();
        guest.step(1);
        guest.0.halt();
        guest.report(guest.load(SLOT)); // with the flag that asks for EOM
        guest.store(SLOT, &[0]);
        guest.wrmsr(0x4000_0084, 0);
        guest.step(2);
        guest.0.halt();
        guest.report(guest.load(SLOT + 16));
        guest.wrmsr(0x4000_0084, 0); // nobody waits now
        guest.end();
    }
}

mod an_event_flag_interrupts {
    use super::*;

    const WORD: usize = EVENT_PAGE + 0x200 + 8;

    pub(super) fn root(mut partition: HostedPartition) {
        let flag = EventFlag::new(77).unwrap();
        let port = partition.synic().event_port(VpIndex(0), Sint::VMBUS, flag).unwrap();
        assert!(partition.synic().event_port(VpIndex(1), Sint::VMBUS, flag).is_none());
        assert!(!port.signal(), "no page yet");
        let reports = run(&mut partition, &Arc::default(), move |step| {
            assert!(port.signal());
            if step == 1 {
                assert!(!port.signal(), "the guest has not seen it yet");
                port.retarget(VpIndex(7)); // there is none
            }
        });
        assert_eq!(reports, [1 << 13]);
    }

    pub(super) fn guest(guest: &Guest) {
        guest.synic();
        guest.step(1);
        guest.0.halt();
        guest.report(guest.load(WORD));
        guest.store(WORD, &[0]);
        guest.step(2);
        guest.0.halt();
        guest.end();
    }
}

mod a_synic_that_is_off_delivers_nothing {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let synic = partition.synic();
        let flag = EventFlag::new(1).unwrap();
        let port = synic.event_port(VpIndex(0), Sint::VMBUS, flag).unwrap();
        run(&mut partition, &Arc::default(), move |step| {
            let posted = synic.post(VpIndex(0), Sint::VMBUS, &message(b""));
            let off = step == 1;
            assert_eq!(posted, if off { Posted::Disabled } else { Posted::Delivered });
            assert_eq!(port.signal(), !off);
        });
    }

    pub(super) fn guest(guest: &Guest) {
        guest.synic();
        guest.wrmsr(0x4000_0080, 0);
        guest.step(1);
        guest.wrmsr(0x4000_0080, 1);
        guest.step(2);
        guest.end();
    }
}

mod strings_go_to_memory_that_is_there {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let counters = partition.exit_counters();
        let reports = run(&mut partition, &Arc::default(), |_| {});
        assert_eq!(reports, [1, u64::MAX, u64::MAX, 0x77, 0, 0]);
        // The first string is one intercept for each 4096 bytes; two are faults.
        assert_eq!(counters[0].get(ExitKind::PortRead), 2 + 2);
        // Six reports of a string each, the end, and what was written in a row.
        assert_eq!(counters[0].get(ExitKind::PortWrite), 6 + 1 + 40);
    }

    pub(super) fn guest(guest: &Guest) {
        // More than are ever under way at once.
        guest.0.port_writes((0..40).map(|value| (0x3333, value)));
        const LEN: usize = 4096 + 512;
        let last = DATA + LEN - 8;
        guest.store(last + 8, &[0x77, 0]);
        guest.report(guest.0.port_read_string(0x3333, 4, DATA as u64, LEN).into());
        for at in [DATA, last, last + 8] {
            guest.report(guest.load(at));
        }
        guest.report(guest.0.port_read_string(0x3333, 4, MEMORY - 4, 8).into());
        guest.report(guest.0.port_read_string(0x3333, 2, u64::MAX - 1, 2).into());
        guest.end();
    }
}

mod a_rising_line_interrupts {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let line = partition.interrupt_line(14).unwrap();
        let reports = run(&mut partition, &Arc::default(), move |step| match step {
            1 => line.set_level(true),
            2 => line.set_level(false),
            _ => line.pulse(),
        });
        assert_eq!(reports, [1, 2, 2]);
    }

    pub(super) fn guest(guest: &Guest) {
        guest.step(1);
        guest.0.halt();
        guest.report(guest.0.interrupts());
        // Going down is nothing to wake up for, and so the next halt ends by the pulse.
        guest.step(2);
        guest.step(3);
        guest.0.halt();
        guest.report(guest.0.interrupts());
        // None comes any more.
        guest.0.halt_for(Duration::from_millis(1));
        guest.report(guest.0.interrupts());
        guest.end();
    }
}

mod reference_time_goes_on {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let reports = run(&mut partition, &Arc::default(), |_| {});
        assert!(reports[..20].is_sorted(), "{reports:?}");
        assert!(reports[19] < 60 * 10_000_000, "it began with the partition: {reports:?}");
        // The counter is not vouched for: sequence 0.
        assert_eq!(reports[20] as u32, 0);
    }

    pub(super) fn guest(guest: &Guest) {
        for _ in 0..20 {
            guest.report(guest.0.register_read(0x4000_0020).unwrap());
        }
        guest.store(TSC_PAGE, &[7]);
        guest.wrmsr(0x4000_0021, TSC_PAGE as u64 | 1);
        guest.report(guest.load(TSC_PAGE));
        guest.end();
    }
}

mod memory_is_shared {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let memory = partition.memory().clone();
        memory.write_obj(Gpa(MEMORY - 8), &0x1234_5678_9abc_def0_u64).unwrap();
        let reports = run(&mut partition, &Arc::default(), move |_| {
            assert_eq!(memory.read_obj::<u32>(Gpa(0)).unwrap(), 99);
        });
        assert_eq!(reports, [0x1234_5678_9abc_def0, MEMORY]);
    }

    pub(super) fn guest(guest: &Guest) {
        guest.report(guest.load(MEMORY as usize - 8));
        guest.store(0, &[99]);
        guest.step(1);
        guest.report(guest.0.memory().len() as u64);
        guest.end();
    }
}

mod a_killed_guest_ends_the_run {
    use super::*;

    pub(super) fn root(partition: HostedPartition) {
        let process = partition.process().to_string();
        let synic = partition.synic();
        let line = failure(partition, move |_| {
            assert!(Command::new("kill").args(["-KILL", &process]).status().unwrap().success());
        });
        assert_eq!(line, "the guest's process was ended by signal 9");
        // The root's other threads meet a dead guest without harm.
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        assert!(synic.bind(ConnectionId::new(1), &event).is_err());
        assert!(synic.unbind(ConnectionId::new(1), &event).is_err());
    }

    pub(super) fn guest(guest: &Guest) {
        guest.step(1);
        guest.0.halt();
    }
}

mod a_guest_that_just_ends {
    use super::*;

    pub(super) fn root(partition: HostedPartition) {
        let line = failure(partition, |_| {});
        let expected = "the guest's process ended with status 3 instead of switching itself off";
        assert_eq!(line, expected);
    }

    pub(super) fn guest(_: &Guest) {
        end_process(3);
    }
}

mod a_guest_that_asks_for_a_reset {
    use super::*;

    pub(super) fn root(mut partition: HostedPartition) {
        let (reason, _) = run_to_any_end(&mut partition, &Arc::default(), |_| {});
        assert_eq!(reason, StopReason::Reset);
    }

    pub(super) fn guest(guest: &Guest) {
        guest.wrmsr(0x4000_0003, 1);
        guest.end();
    }
}

mod garbage_ends_the_run {
    use super::*;

    pub(super) fn root(partition: HostedPartition) {
        assert_eq!(
            failure(partition, |_| {}),
            "the guest's process broke the protocol: 7 bytes are no intercept"
        );
    }

    pub(super) fn guest(guest: &Guest) {
        send_up(b"garbage");
        guest.0.halt();
    }
}

mod answers_have_to_be_taken {
    use super::*;

    pub(super) fn root(partition: HostedPartition) {
        let line = failure(partition, |_| {});
        assert!(line.starts_with("the guest's process does not take its answers: "), "{line}");
    }

    pub(super) fn guest(_: &Guest) {
        // A read of a register, over and over.
        let mut packet = [0; 32];
        packet[0] = 5;
        loop {
            send_up(&packet);
        }
    }
}

/// A test that the call ends its process.
macro_rules! forbidden {
    ($($name:ident: $call:expr;)*) => {
        $(mod $name {
            use super::*;

            pub(super) fn root(partition: HostedPartition) {
                let line = failure(partition, |_| panic!("it goes on"));
                let expected = "made a system call that it may not make, and was ended";
                assert!(line.ends_with(expected), "{line}");
            }

            pub(super) fn guest(guest: &Guest) {
                let _ = $call;
                guest.step(1);
            }
        })*
    };
}

forbidden! {
    no_file_is_opened: std::fs::File::open("/");
    no_socket_is_made: std::net::UdpSocket::bind("127.0.0.1:0");
    no_process_is_started: Command::new("/bin/true").spawn();
    no_program_is_run: std::os::unix::process::CommandExt::exec(&mut Command::new("/bin/true"));
    no_code_is_mapped: map_code();
    no_file_is_cut: rustix::fs::ftruncate(rustix::stdio::stdout(), 0);
    nobody_is_killed: rustix::process::kill_process(
        rustix::process::Pid::INIT,
        rustix::process::Signal::CONT,
    );
    descriptors_keep_their_flags: rustix::io::ioctl_fionbio(rustix::stdio::stdin(), true);
    only_events_are_written: rustix::io::write(rustix::stdio::stdout(), b"x");
}

fn send_up(packet: &[u8]) {
    rustix::net::send(rustix::stdio::stdin(), packet, SendFlags::empty()).unwrap();
}

#[allow(unsafe_code)] // _exit, without what a program does at its end
fn end_process(status: i32) -> ! {
    // SAFETY: nothing runs after it.
    unsafe { libc::_exit(status) }
}

#[allow(unsafe_code)] // mmap
fn map_code() -> rustix::io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let protection = ProtFlags::READ | ProtFlags::EXEC;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE) }?;
    Ok(())
}
