//! Partitions that run a few bytes of code, on any KVM. Without /dev/kvm there is nothing to test.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hypervisor::kvm::{HyperV, Irqchip, KvmPartition, PartitionConfig};
use hypervisor::synic::{ConnectionId, HvStatus, MessageSink};
use hypervisor::{
    BootState, Bus, Device, ExitKind, Gpa, GuestMemory, Partition, PartitionError, StopHandle,
    StopReason,
};

const CODE: Gpa = Gpa(0x10_0000);

/// An address without RAM that the page tables map.
const NO_RAM: u64 = 0x2000_0000;

/// A partition whose first processor starts with `code`, in long mode with its first 2 MiB mapped.
/// `None` where there is no KVM.
fn partition(vps: u32, code: &[u8]) -> Option<KvmPartition> {
    partition_and_state(vps, code).map(|(partition, _)| partition)
}

/// The same, with the state in which the first processor starts.
fn partition_and_state(vps: u32, code: &[u8]) -> Option<(KvmPartition, BootState)> {
    let memory = GuestMemory::new(4 << 20).unwrap();
    let (top, middle, bottom, gdt) = (Gpa(0x2000), Gpa(0x3000), Gpa(0x4000), Gpa(0x1000));
    memory.write_obj(top, &(middle.0 | 3)).unwrap();
    memory.write_obj(middle, &(bottom.0 | 3)).unwrap();
    for address in [0, NO_RAM] {
        let entry = Gpa(bottom.0 + (address >> 21) * 8);
        memory.write_obj(entry, &(address | 0x83)).unwrap(); // 2 MiB at once
    }
    memory.write_obj(gdt, &[0_u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]).unwrap();
    memory.write(CODE, code).unwrap();

    let config = PartitionConfig {
        vps,
        memory,
        hyper_v: HyperV::Absent,
        irqchip: Irqchip::Kernel,
        synthetic_timers: false,
    };
    let partition = match KvmPartition::new(&config) {
        Ok(partition) => partition,
        Err(PartitionError::NoKvm { .. } | PartitionError::NoPermission { .. }) => {
            eprintln!("skipped: no KVM here");
            return None;
        }
        Err(error) => panic!("{error}: {error:?}"),
    };
    let state = BootState {
        entry: CODE,
        argument: 0x5a,
        stack: Gpa(0x8000),
        page_table: top,
        gdt,
        gdt_limit: 23,
        code_selector: 8,
        data_selector: 16,
    };
    partition.set_boot_state(&state).unwrap();
    Some((partition, state))
}

/// Remembers what is written, answers reads with 0x41, and stops at a write of `!`.
struct Port {
    written: Mutex<Vec<(u64, Vec<u8>)>>,
    stop: StopHandle,
}

impl Device for Port {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0x41);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.written.lock().unwrap().push((offset, data.to_vec()));
        if data == b"!" {
            self.stop.stop(StopReason::PowerOff);
        }
    }
}

struct NoMessages;

impl MessageSink for NoMessages {
    fn post(&self, _: ConnectionId, _: u32, _: &[u8]) -> HvStatus {
        HvStatus::INVALID_CONNECTION_ID
    }
}

fn run(partition: &mut KvmPartition, ports: Bus, mmio: Bus) -> StopReason {
    let sink: Arc<dyn MessageSink> = Arc::new(NoMessages);
    partition.run(&Arc::new(ports), &Arc::new(mmio), &sink)
}

#[test]
fn ports_and_addresses_reach_their_devices() {
    let code = [
        0x40, 0x88, 0xf0, // mov al, sil
        0x66, 0xba, 0x02, 0x01, // mov dx, 0x102
        0xee, // out dx, al
        0xec, // in al, dx
        0xee, // out dx, al
        0xb8, 0x00, 0x00, 0x00, 0x20, // mov eax, NO_RAM
        0x66, 0xc7, 0x40, 0x04, 0x34, 0x12, // mov word [rax + 4], 0x1234
        0xb0, 0x21, // mov al, '!'
        0xee, // out dx, al
        0xf4, // hlt
    ];
    let Some(mut partition) = partition(1, &code) else { return };
    let device = Arc::new(Port { written: Mutex::default(), stop: partition.stop_handle() });
    let memory = Arc::new(Port { written: Mutex::default(), stop: partition.stop_handle() });
    let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
    ports.add("device", 0x100, 8, device.clone()).unwrap();
    mmio.add("memory", NO_RAM, 0x1000, memory.clone()).unwrap();
    let counters = partition.exit_counters();

    assert_eq!(run(&mut partition, ports, mmio), StopReason::PowerOff);
    let bytes = |byte: u8| (2, vec![byte]);
    assert_eq!(*device.written.lock().unwrap(), [bytes(0x5a), bytes(0x41), bytes(b'!')]);
    assert_eq!(*memory.written.lock().unwrap(), [(4, vec![0x34, 0x12])]);
    assert_eq!(counters[0].get(ExitKind::PortWrite), 3);
    assert_eq!(counters[0].get(ExitKind::PortRead), 1);
    assert_eq!(counters[0].get(ExitKind::MmioWrite), 1);
}

#[test]
fn processors_can_be_stopped_whatever_they_do() {
    // The first turns in a circle, or halts; the others have never been started.
    for code in [&[0xeb, 0xfe][..], &[0xf4]] {
        for wait in [0, 1, 20] {
            let Some(mut partition) = partition(3, code) else { return };
            let stop = partition.stop_handle();
            let stopper = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(wait));
                stop.stop(StopReason::Stopped);
            });
            assert_eq!(run(&mut partition, Bus::ports(), Bus::mmio()), StopReason::Stopped);
            stopper.join().unwrap();
        }
    }
}

/// Takes down which processors have written, and stops when three have.
struct RollCall(Mutex<Vec<u8>>, StopHandle);

impl Device for RollCall {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) {
        let mut seen = self.0.lock().unwrap();
        seen.extend_from_slice(data);
        if seen.len() == 3 {
            self.1.stop(StopReason::PowerOff);
        }
    }
}

#[test]
fn all_processors_can_start_at_once() {
    let code = [
        0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
        0x0f, 0xa2, // cpuid
        0xc1, 0xeb, 0x18, // shr ebx, 24
        0x88, 0xd8, // mov al, bl
        0x66, 0xba, 0x00, 0x01, // mov dx, 0x100
        0xee, // out dx, al
        0xf4, // hlt
    ];
    let Some((mut partition, state)) = partition_and_state(3, &code) else { return };
    partition.set_boot_state_of_all(&state).unwrap();
    let device = Arc::new(RollCall(Mutex::default(), partition.stop_handle()));
    let mut ports = Bus::ports();
    ports.add("device", 0x100, 1, device.clone()).unwrap();
    assert_eq!(run(&mut partition, ports, Bus::mmio()), StopReason::PowerOff);
    let mut seen = device.0.lock().unwrap();
    seen.sort_unstable();
    assert_eq!(*seen, [0, 1, 2]);
}

#[test]
fn a_triple_fault_ends_the_run() {
    // A page fault, and no descriptor table for interrupts.
    let code = [
        0xb8, 0x00, 0x00, 0x00, 0x40, // mov eax, 0x40000000
        0x8a, 0x00, // mov al, [rax]
    ];
    let Some(mut partition) = partition(1, &code) else { return };
    assert_eq!(run(&mut partition, Bus::ports(), Bus::mmio()), StopReason::TripleFault);
}

#[test]
fn too_many_processors_are_refused() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    for vps in [0, 255, u32::MAX] {
        let config = PartitionConfig {
            vps,
            memory: memory.clone(),
            hyper_v: HyperV::Absent,
            irqchip: Irqchip::Kernel,
            synthetic_timers: false,
        };
        match KvmPartition::new(&config) {
            Err(PartitionError::VpCount { asked, .. }) => assert_eq!(asked, vps),
            Err(PartitionError::NoKvm { .. } | PartitionError::NoPermission { .. }) => return,
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("{vps} processors"),
        }
    }
}

#[test]
fn a_signal_on_a_port_does_not_exit() {
    let code = [
        0x66, 0xba, 0x00, 0x02, // mov dx, 0x200
        0xee, // out dx, al
        0x66, 0xba, 0x00, 0x01, // mov dx, 0x100
        0xb0, 0x21, // mov al, '!'
        0xee, // out dx, al
    ];
    let Some(mut partition) = partition(1, &code) else { return };
    let event = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    partition.port_event(0x200, &event).unwrap();
    let device = Arc::new(Port { written: Mutex::default(), stop: partition.stop_handle() });
    let mut ports = Bus::ports();
    ports.add("device", 0x100, 1, device).unwrap();
    let counters = partition.exit_counters();
    assert_eq!(run(&mut partition, ports, Bus::mmio()), StopReason::PowerOff);
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(counters[0].total(), 1);
}

#[test]
fn deferred_writes_come_before_the_next_exit() {
    let code = [
        0x66, 0xba, 0x00, 0x02, // mov dx, 0x200
        0xb0, 0x31, // mov al, '1'
        0xee, // out dx, al
        0xb0, 0x32, // mov al, '2'
        0xee, // out dx, al
        0xb8, 0x00, 0x00, 0x00, 0x20, // mov eax, NO_RAM
        0x66, 0xc7, 0x40, 0x04, 0x34, 0x12, // mov word [rax + 4], 0x1234
        0x66, 0xba, 0x10, 0x02, // mov dx, 0x210
        0xb0, 0x21, // mov al, '!'
        0xee, // out dx, al
    ];
    let Some(mut partition) = partition(1, &code) else { return };
    partition.defer_port_writes(0x200, 4).unwrap();
    partition.defer_memory_writes(Gpa(NO_RAM), 8).unwrap();
    let device = Arc::new(Port { written: Mutex::default(), stop: partition.stop_handle() });
    let memory = Arc::new(Port { written: Mutex::default(), stop: partition.stop_handle() });
    let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
    ports.add("device", 0x200, 0x20, device.clone()).unwrap();
    mmio.add("memory", NO_RAM, 0x1000, memory.clone()).unwrap();
    let counters = partition.exit_counters();
    assert_eq!(run(&mut partition, ports, mmio), StopReason::PowerOff);
    let written = device.written.lock().unwrap();
    assert_eq!(*written, [(0, b"1".to_vec()), (0, b"2".to_vec()), (0x10, b"!".to_vec())]);
    assert_eq!(*memory.written.lock().unwrap(), [(4, vec![0x34, 0x12])]);
    assert!(matches!(counters[0].total(), 1 | 4), "one where KVM can defer writes");
}

/// A port that strings are written to; what is written to the one behind it goes to `other`.
struct DataPort {
    strings: Mutex<Vec<Vec<u8>>>,
    other: Port,
}

impl Device for DataPort {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            0 => self.strings.lock().unwrap().push(data.to_vec()),
            _ => self.other.write(offset, data),
        }
    }

    fn takes_strings(&self, offset: u64) -> bool {
        offset == 0
    }

    fn write_string(&self, _: u64, _: usize, data: &[u8]) {
        self.strings.lock().unwrap().push(data.to_vec());
    }
}

/// Writes 300 words from `start` on by an instruction, then what is in RSI and RCX. Returns the bytes
/// that came, how many calls it took, and the two registers.
fn words_written(instructions: &[u8], start: u32) -> Option<(Vec<u8>, usize, [u32; 2])> {
    let mut code = vec![0x66, 0xba, 0x00, 0x01]; // mov dx, 0x100
    code.push(0xbe); // mov esi, start
    code.extend(start.to_le_bytes());
    code.extend([0xb9, 0x2c, 0x01, 0x00, 0x00]); // mov ecx, 300
    code.extend(instructions);
    code.extend([
        0xfc, // cld
        0x66, 0xba, 0x08, 0x01, // mov dx, 0x108
        0x89, 0xf0, 0xef, // mov eax, esi; out dx, eax
        0x89, 0xc8, 0xef, // mov eax, ecx; out dx, eax
        0xb0, 0x21, 0xee, // mov al, '!'; out dx, al
    ]);
    let mut partition = partition(1, &code)?;
    let memory = partition.memory().clone();
    memory.write(Gpa(0x11_0000), &pattern()).unwrap();
    let other = Port { written: Mutex::default(), stop: partition.stop_handle() };
    let device = Arc::new(DataPort { strings: Mutex::default(), other });
    let mut ports = Bus::ports();
    ports.add("device", 0x100, 0x10, device.clone()).unwrap();
    assert_eq!(run(&mut partition, ports, Bus::mmio()), StopReason::PowerOff);
    let strings = device.strings.lock().unwrap();
    let written = device.other.written.lock().unwrap();
    let register = |at: usize| u32::from_le_bytes(written[at].1.clone().try_into().unwrap());
    Some((strings.concat(), strings.len(), [register(0), register(1)]))
}

fn pattern() -> Vec<u8> {
    (0..0x2000_u32).map(|at| ((at / 2 * 37) >> (at % 2 * 8)) as u8).collect()
}

#[test]
fn a_string_goes_out_in_one_piece() {
    for instruction in [[0xf3, 0x66, 0x6f], [0x66, 0xf3, 0x6f]] {
        // Within a page; across the end of one, at a word and in the middle of one.
        for (start, pieces) in [(0x11_0100, 2), (0x11_0f80, 4), (0x11_0f81, 5)] {
            let Some((data, calls, registers)) = words_written(&instruction, start) else { return };
            let from = (start - 0x11_0000) as usize;
            assert!(data == pattern()[from..from + 600], "{start:#x}");
            assert_eq!(registers, [start + 600, 0]);
            assert!(calls <= pieces, "{calls} calls for {pieces} pieces");
        }
    }
}

#[test]
fn other_strings_go_out_as_they_always_have() {
    // Backwards; from another segment, whose base is 0 too; and without a prefix, in a loop.
    let down = [0xfd, 0xf3, 0x66, 0x6f];
    let segment = [0x64, 0xf3, 0x66, 0x6f];
    let single = [0x66, 0x6f, 0xe2, 0xfc]; // again: outsw; loop again
    let Some((data, calls, registers)) = words_written(&down, 0x11_0800) else { return };
    let backwards: Vec<u8> =
        (0..300).flat_map(|n| pattern()[0x800 - 2 * n..][..2].to_vec()).collect();
    assert!(data == backwards);
    assert_eq!((calls, registers), (300, [0x11_0800 - 600, 0]));
    for instructions in [&segment, &single] {
        let (data, calls, registers) = words_written(instructions, 0x11_0100).unwrap();
        assert!(data == pattern()[0x100..0x100 + 600]);
        assert_eq!((calls, registers), (300, [0x11_0100 + 600, 0]));
    }
}

#[test]
fn the_kernels_counters_count() {
    let code = [
        0x66, 0xba, 0x00, 0x01, // mov dx, 0x100
        0xb0, 0x21, // mov al, '!'
        0xee, // out dx, al
    ];
    let Some(mut partition) = partition(1, &code) else { return };
    let counters = partition.kernel_counters();
    let Some(counters) = counters.first() else { return }; // a kernel before 5.14
    assert_eq!(counters.get("exits"), Some(0));
    assert_eq!(counters.get("no such counter"), None);
    let device = Arc::new(Port { written: Mutex::default(), stop: partition.stop_handle() });
    let mut ports = Bus::ports();
    ports.add("device", 0x100, 1, device).unwrap();
    assert_eq!(run(&mut partition, ports, Bus::mmio()), StopReason::PowerOff);
    assert!(counters.read().any(|(_, value)| value > 0), "{counters}");
}

struct Panics;

impl Device for Panics {
    fn read(&self, _: u64, _: &mut [u8]) {
        panic!("a device's mistake, on purpose");
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

#[test]
fn a_panic_ends_the_run() {
    let code = [0xe4, 0x10]; // in al, 0x10
    let Some(mut partition) = partition(2, &code) else { return };
    let mut ports = Bus::ports();
    ports.add("device", 0x10, 1, Arc::new(Panics)).unwrap();
    let reason = run(&mut partition, ports, Bus::mmio());
    assert!(matches!(reason, StopReason::Error(what) if what.contains("panicked")));
}
