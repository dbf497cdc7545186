//! What tests with a few bytes of guest code share: a partition ready to run them, and an assembler
//! of the few instructions they need.

#![allow(dead_code)] // No test uses all of it.

use std::sync::{Arc, Mutex};

use hypervisor::kvm::{self, HyperV, Irqchip, KvmPartition, PartitionConfig};
use hypervisor::synic::{ConnectionId, HvStatus, MessageSink};
use hypervisor::{BootState, Bus, Device, Gpa, GuestMemory, Partition, StopHandle, StopReason};

/// Where a guest's code starts, and where its handlers do.
pub const CODE: Gpa = Gpa(0x10_0000);
const HANDLERS: Gpa = Gpa(0x18_0000);
const IDT: Gpa = Gpa(0x5000);
const IDT_POINTER: Gpa = Gpa(0x6000);

const STACK: Gpa = Gpa(0xf_0000);
const TSS: Gpa = Gpa(0x6800);
const USER_STACK: Gpa = Gpa(0xe_0000);

/// Selectors of the descriptor table.
const USER_DATA: u8 = 0x18;
const USER_CODE: u8 = 0x20;
const TASK: u8 = 0x28;

/// Faults counted here.
const FAULTS: u32 = 0x7000;
/// Interrupts counted here, four bytes for each vector.
const INTERRUPTS: u32 = 0x7400;

/// Four bytes written here are kept, and shown to the test.
pub const REPORT: u16 = 0x100;
/// Numbers written here ask the test to do something, which it does before the guest goes on.
pub const STEP: u16 = 0x108;
/// Any write ends the run.
pub const END: u16 = 0x110;

/// Pages for the guest to use.
pub const HYPERCALL_PAGE: u32 = 0x11_0000;
pub const MESSAGE_PAGE: u32 = 0x11_1000;
pub const EVENT_PAGE: u32 = 0x11_2000;
pub const TSC_PAGE: u32 = 0x11_3000;
pub const DATA: u32 = 0x11_4000;

/// Registers of the processor.
pub const APIC_BASE: u32 = 0x1b;
const X2APIC_EOI: u32 = 0x80b;
const X2APIC_SPURIOUS: u32 = 0x80f;
pub const X2APIC_SELF_IPI: u32 = 0x83f;

/// Code in the making.
#[derive(Default)]
pub struct Code(Vec<u8>);

impl Code {
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn word(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// `mov eax, value`
    pub fn eax(self, value: u32) -> Self {
        self.bytes(&[0xb8]).word(value)
    }

    /// `rax = [address]`
    pub fn load(self, address: u32) -> Self {
        self.bytes(&[0x48, 0x8b, 0x04, 0x25]).word(address)
    }

    /// `dword [address] = value`
    pub fn store(self, address: u32, value: u32) -> Self {
        self.bytes(&[0xc7, 0x04, 0x25]).word(address).word(value)
    }

    pub fn wrmsr(self, register: u32, value: u64) -> Self {
        self.bytes(&[0xb9])
            .word(register)
            .eax(value as u32)
            .bytes(&[0xba])
            .word((value >> 32) as u32)
            .bytes(&[0x0f, 0x30])
    }

    /// The value goes to RAX.
    pub fn rdmsr(self, register: u32) -> Self {
        self.bytes(&[0xb9])
            .word(register)
            .bytes(&[0x31, 0xc0, 0x31, 0xd2]) // xor eax, eax; xor edx, edx
            .bytes(&[0x0f, 0x32])
            .bytes(&[0x48, 0xc1, 0xe2, 0x20]) // shl rdx, 32
            .bytes(&[0x48, 0x09, 0xd0]) // or rax, rdx
    }

    /// The value goes to RAX.
    pub fn rdtsc(self) -> Self {
        self.bytes(&[0x0f, 0x31])
            .bytes(&[0x48, 0xc1, 0xe2, 0x20]) // shl rdx, 32
            .bytes(&[0x48, 0x09, 0xd0]) // or rax, rdx
    }

    /// Shows RAX to the test, lower half first.
    pub fn report(self) -> Self {
        self.bytes(&[0x66, 0xba])
            .bytes(&REPORT.to_le_bytes())
            .bytes(&[0xef]) // out dx, eax
            .bytes(&[0x48, 0xc1, 0xe8, 0x20]) // shr rax, 32
            .bytes(&[0xef])
    }

    /// Has the test do its step `number`.
    pub fn step(self, number: u32) -> Self {
        self.eax(number).bytes(&[0x66, 0xba]).bytes(&STEP.to_le_bytes()).bytes(&[0xef])
    }

    pub fn end(self) -> Self {
        self.bytes(&[0x66, 0xba]).bytes(&END.to_le_bytes()).bytes(&[0xee, 0xf4])
    }

    /// Calls the hypercall page with these in RCX, RDX; the status goes to RAX.
    pub fn hypercall(self, control: u64, input: u64) -> Self {
        self.bytes(&[0x48, 0xb9])
            .bytes(&control.to_le_bytes())
            .bytes(&[0x48, 0xba])
            .bytes(&input.to_le_bytes())
            .bytes(&[0x45, 0x31, 0xc0]) // xor r8d, r8d
            .eax(HYPERCALL_PAGE)
            .bytes(&[0xff, 0xd0]) // call rax
    }

    /// The distance of a short jump to `start`.
    fn back_to(self, start: usize) -> Self {
        let distance = start as i64 - (self.0.len() as i64 + 1);
        self.bytes(&i8::try_from(distance).unwrap().to_le_bytes())
    }

    /// `cmp dword [address], value`
    fn compare(self, address: u32, value: u32) -> Self {
        self.bytes(&[0x81, 0x3c, 0x25]).word(address).word(value)
    }

    /// Sleeps until the `count`th interrupt of `vector`. It need not be the next: between the
    /// comparison and `hlt` none comes in.
    pub fn wait_interrupt(self, vector: u8, count: u32) -> Self {
        let start = self.0.len();
        self.compare(INTERRUPTS + u32::from(vector) * 4, count)
            .bytes(&[0x73, 0x05]) // jae done
            .bytes(&[0xfb, 0xf4]) // sti; hlt
            .bytes(&[0xfa]) // cli
            .bytes(&[0xeb])
            .back_to(start) // done:
    }

    /// Turns in a circle until the `count`th interrupt of `vector`, at CPL 3.
    pub fn spin_for_interrupt(self, vector: u8, count: u32) -> Self {
        let start = self.0.len();
        self.bytes(&[0xf3, 0x90]) // pause
            .compare(INTERRUPTS + u32::from(vector) * 4, count)
            .bytes(&[0x72]) // jb start
            .back_to(start)
    }

    /// Shows how many interrupts of `vector` there were.
    pub fn report_interrupts(self, vector: u8) -> Self {
        self.bytes(&[0xfb, 0x90, 0x90, 0xfa]).load(INTERRUPTS + u32::from(vector) * 4).report()
    }

    /// Shows how many faults there were.
    pub fn report_faults(self) -> Self {
        self.load(FAULTS).report()
    }

    /// A descriptor table whose interrupts are counted and ended, and whose faults are counted and
    /// step over an instruction of two bytes; the local APIC on, as x2APIC.
    pub fn prologue() -> Self {
        Self::default()
            .bytes(&[0x0f, 0x01, 0x1c, 0x25])
            .word(IDT_POINTER.0 as u32) // lidt
            .eax(TASK.into())
            .bytes(&[0x0f, 0x00, 0xd8]) // ltr ax
            .wrmsr(APIC_BASE, 0xfee0_0d00)
            .wrmsr(X2APIC_SPURIOUS, 0x1ff)
    }

    /// Goes on at CPL 3 with access to all ports and interrupts on, with what follows.
    pub fn user_mode(self) -> Self {
        // push SS; push RSP; push RFLAGS with IOPL 3; push CS; push RIP; iretq
        let code = self
            .bytes(&[0x6a, USER_DATA | 3])
            .bytes(&[0x68])
            .word(USER_STACK.0 as u32)
            .bytes(&[0x68])
            .word(0x3202)
            .bytes(&[0x6a, USER_CODE | 3])
            .bytes(&[0x68]);
        let next = CODE.0 as u32 + code.0.len() as u32 + 6;
        code.word(next).bytes(&[0x48, 0xcf])
    }

    /// Hyper-V's interface on: the guest's identity and the hypercall page.
    pub fn hyper_v(self) -> Self {
        self.wrmsr(0x4000_0000, 0x8100_0000_0000_0001)
            .wrmsr(0x4000_0001, u64::from(HYPERCALL_PAGE) | 1)
    }

    /// The SynIC on, with the VMBus's SINT as `vector`.
    pub fn synic(self, vector: u8) -> Self {
        self.wrmsr(0x4000_0083, u64::from(MESSAGE_PAGE) | 1)
            .wrmsr(0x4000_0082, u64::from(EVENT_PAGE) | 1)
            .wrmsr(0x4000_0092, vector.into())
            .wrmsr(0x4000_0080, 1)
    }
}

/// Lays handlers and descriptor table into memory.
fn write_handlers(memory: &GuestMemory) {
    for vector in 0..=255_u8 {
        let address = HANDLERS.0 + u64::from(vector) * 64;
        let code = if vector < 32 {
            Code::default()
                .bytes(&[0xff, 0x04, 0x25]) // inc dword [FAULTS]
                .word(FAULTS)
                .bytes(&[0x48, 0x83, 0xc4, 0x08]) // add rsp, 8: the error code
                .bytes(&[0x48, 0x83, 0x04, 0x24, 0x02]) // add qword [rsp], 2
                .bytes(&[0x48, 0xcf]) // iretq
        } else {
            Code::default()
                .bytes(&[0x50, 0x51, 0x52]) // push rax; push rcx; push rdx
                .bytes(&[0xff, 0x04, 0x25]) // inc dword [INTERRUPTS + 4 * vector]
                .word(INTERRUPTS + u32::from(vector) * 4)
                .wrmsr(X2APIC_EOI, 0)
                .bytes(&[0x5a, 0x59, 0x58]) // pop rdx; pop rcx; pop rax
                .bytes(&[0x48, 0xcf]) // iretq
        };
        assert!(code.0.len() <= 64);
        memory.write(Gpa(address), &code.0).unwrap();
        // An interrupt gate of CPL 0.
        let low = address & 0xffff | 8 << 16 | 0x8e00 << 32 | (address >> 16 & 0xffff) << 48;
        memory.write_obj(Gpa(IDT.0 + u64::from(vector) * 16), &[low, address >> 32]).unwrap();
    }
    memory.write_obj(IDT_POINTER, &4095_u16).unwrap();
    memory.write_obj(Gpa(IDT_POINTER.0 + 2), &IDT.0).unwrap();
}

/// From now on the guest counts interrupts of `vector` and does not end them.
pub fn leave_unended(memory: &GuestMemory, vector: u8) {
    let code = Code::default()
        .bytes(&[0xff, 0x04, 0x25]) // inc dword [INTERRUPTS + 4 * vector]
        .word(INTERRUPTS + u32::from(vector) * 4)
        .bytes(&[0x48, 0xcf]); // iretq
    memory.write(Gpa(HANDLERS.0 + u64::from(vector) * 64), &code.0).unwrap();
}

/// A partition whose first processor starts with `code`, or `None`, with the reason told, where
/// this host cannot have one.
pub fn partition(hyper_v: HyperV, timers: bool, code: &Code) -> Option<KvmPartition> {
    partition_with(Irqchip::Kernel, hyper_v, timers, code)
}

/// The same with a choice of interrupt controllers.
pub fn partition_with(
    irqchip: Irqchip,
    hyper_v: HyperV,
    timers: bool,
    code: &Code,
) -> Option<KvmPartition> {
    let lacking = match kvm::open() {
        Ok(kvm) => kvm::lacking(&kvm, hyper_v).map(str::to_owned),
        Err(error) => Some(error.to_string()),
    };
    if let Some(what) = lacking {
        eprintln!("skipped with {hyper_v:?}: this host lacks {what}");
        return None;
    }
    let memory = GuestMemory::new(4 << 20).unwrap();
    let (top, middle, bottom, gdt) = (Gpa(0x2000), Gpa(0x3000), Gpa(0x4000), Gpa(0x1000));
    memory.write_obj(top, &(middle.0 | 7)).unwrap();
    memory.write_obj(middle, &(bottom.0 | 7)).unwrap();
    memory.write_obj(bottom, &[0x87_u64, 2 << 20 | 0x87]).unwrap(); // 2 MiB at once
    let task = 0x67 | (TSS.0 & 0xff_ffff) << 16 | 0x89 << 40;
    let descriptors = [
        0_u64,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        task,
        0,
    ];
    memory.write_obj(gdt, &descriptors).unwrap();
    memory.write_obj(Gpa(TSS.0 + 4), &STACK.0).unwrap(); // RSP0
    write_handlers(&memory);
    memory.write(CODE, &code.0).unwrap();
    let config = PartitionConfig { vps: 1, memory, hyper_v, irqchip, synthetic_timers: timers };
    let partition = KvmPartition::new(&config).unwrap();
    let state = BootState {
        entry: CODE,
        argument: 0,
        stack: STACK,
        page_table: top,
        gdt,
        gdt_limit: 55,
        code_selector: 8,
        data_selector: 16,
    };
    partition.set_boot_state(&state).unwrap();
    Some(partition)
}

/// What the test does when the guest reports a step.
type OnStep = Box<dyn FnMut(u32) + Send>;

/// The port by which a guest reports.
struct Reports {
    words: Arc<Mutex<Vec<u32>>>,
    on_step: Mutex<OnStep>,
    stop: StopHandle,
}

impl Device for Reports {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == u64::from(END - REPORT) {
            return self.stop.stop(StopReason::PowerOff);
        }
        let Ok(bytes) = data.try_into() else { return };
        let word = u32::from_le_bytes(bytes);
        if offset == u64::from(STEP - REPORT) {
            (self.on_step.lock().unwrap())(word);
        } else {
            self.words.lock().unwrap().push(word);
        }
    }
}

/// The guest's messages.
#[derive(Default)]
pub struct Messages(pub Mutex<Vec<(u32, u32, Vec<u8>)>>);

impl MessageSink for Messages {
    fn post(&self, connection: ConnectionId, message_type: u32, payload: &[u8]) -> HvStatus {
        if connection.get() == 0xbad {
            return HvStatus::INVALID_CONNECTION_ID;
        }
        self.0.lock().unwrap().push((connection.get(), message_type, payload.to_vec()));
        HvStatus::SUCCESS
    }
}

/// The address of a register that is what was written to it.
pub const REGISTER: u64 = 0xfeb0_0000;

#[derive(Default)]
struct Register(Mutex<[u8; 8]>);

impl Device for Register {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..data.len()]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
    }
}

/// Runs the guest to its end, and returns what it has reported. Its steps are `on_step`'s to do.
pub fn run(
    partition: &mut impl Partition,
    messages: &Arc<Messages>,
    on_step: impl FnMut(u32) + Send + 'static,
) -> Vec<u64> {
    let (reason, reports) = run_to_any_end(partition, messages, on_step);
    assert_eq!(reason, StopReason::PowerOff, "after {reports:x?}");
    reports
}

/// The same for a guest that may end as it likes; says how it did.
pub fn run_to_any_end(
    partition: &mut impl Partition,
    messages: &Arc<Messages>,
    on_step: impl FnMut(u32) + Send + 'static,
) -> (StopReason, Vec<u64>) {
    let words = Arc::<Mutex<Vec<u32>>>::default();
    let device = Reports {
        words: Arc::clone(&words),
        on_step: Mutex::new(Box::new(on_step)),
        stop: partition.stop_handle(),
    };
    let mut ports = Bus::ports();
    ports.add("reports", REPORT.into(), 0x20, Arc::new(device)).unwrap();
    // A guest that never comes to its end fails its test by what it has not reported.
    let stop = partition.stop_handle();
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(std::time::Duration::from_secs(60)).is_err() {
            stop.stop(StopReason::Stopped);
        }
    });
    let sink: Arc<dyn MessageSink> = messages.clone();
    let mut mmio = Bus::mmio();
    mmio.add("register", REGISTER, 8, Arc::<Register>::default()).unwrap();
    let reason = partition.run(&Arc::new(ports), &Arc::new(mmio), &sink);
    let _ = done.send(());
    watchdog.join().unwrap();
    let words = words.lock().unwrap();
    let words = words.chunks_exact(2);
    (reason, words.map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32).collect())
}
