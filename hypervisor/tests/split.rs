//! Interrupts of controllers that are not KVM's, as a guest's processor sees them.

mod common;

use std::sync::{Arc, Mutex};

use common::{Code, Messages, partition_with, run};
use hypervisor::interrupts::{InterruptController, InterruptMessage, LocalApics};
use hypervisor::kvm::{HyperV, Irqchip, KvmPartition};
use hypervisor::{ExitKind, Partition};

/// What the PIC gives, with one interrupt at a time.
const PIC_VECTOR: u8 = 0x34;
const LEVEL_VECTOR: u8 = 0x51;
const EDGE_VECTOR: u8 = 0x52;

/// A controller that remembers what it is told.
struct Controller {
    apics: Arc<dyn LocalApics>,
    /// Interrupts of the PIC that wait. Locked for as long as the processor is told of them.
    waiting: Mutex<u32>,
    lines: Mutex<Vec<(u32, bool)>>,
    ended: Mutex<Vec<u8>>,
}

impl Controller {
    fn attach_to(partition: &mut KvmPartition) -> Arc<Self> {
        let controller = Arc::new(Self {
            apics: partition.local_apics().expect("KVM has only the local APICs"),
            waiting: Mutex::default(),
            lines: Mutex::default(),
            ended: Mutex::default(),
        });
        partition.attach_interrupt_controller(Arc::clone(&controller) as _);
        controller
    }

    fn interrupt(&self, count: u32) {
        let mut waiting = self.waiting.lock().unwrap();
        *waiting += count;
        self.apics.set_intr(true);
    }
}

impl InterruptController for Controller {
    fn set_line(&self, gsi: u32, high: bool) {
        self.lines.lock().unwrap().push((gsi, high));
    }

    fn pulse(&self, gsi: u32) {
        self.lines.lock().unwrap().extend([(gsi, true), (gsi, false)]);
    }

    fn acknowledge(&self) -> u8 {
        let mut waiting = self.waiting.lock().unwrap();
        *waiting -= 1;
        self.apics.set_intr(*waiting > 0);
        PIC_VECTOR
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ended.lock().unwrap().push(vector);
    }
}

fn partition(code: &Code) -> Option<(KvmPartition, Arc<Controller>)> {
    let mut partition = partition_with(Irqchip::Split, HyperV::Absent, false, code)?;
    let controller = Controller::attach_to(&mut partition);
    Some((partition, controller))
}

#[test]
fn lines_lead_to_the_controller() {
    let Some((partition, controller)) = partition(&Code::prologue()) else { return };
    let line = partition.interrupt_line(4).unwrap();
    line.pulse();
    line.set_level(true);
    assert_eq!(*controller.lines.lock().unwrap(), [(4, true), (4, false), (4, true)]);
}

#[test]
fn a_pic_interrupts_when_the_processor_lets_it() {
    // Several that come while interrupts are off, from the processor's own thread: each waits for
    // its window. Then one while it sleeps, from another.
    let code = Code::prologue()
        .step(1)
        .wait_interrupt(PIC_VECTOR, 3)
        .step(2)
        .wait_interrupt(PIC_VECTOR, 4)
        .report_interrupts(PIC_VECTOR)
        .end();
    let Some((mut partition, controller)) = partition(&code) else { return };
    let counters = partition.exit_counters();
    let reports = run(&mut partition, &Arc::default(), move |step| match step {
        1 => controller.interrupt(3),
        _ => {
            let controller = Arc::clone(&controller);
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(20));
                controller.interrupt(1);
            });
        }
    });
    assert_eq!(reports, [4]);
    assert!(counters[0].get(ExitKind::InterruptWindow) >= 1, "{}", counters[0]);
}

#[test]
fn a_pic_interrupts_a_processor_that_runs() {
    let code = Code::prologue()
        .step(1)
        .user_mode()
        .spin_for_interrupt(PIC_VECTOR, 20)
        .report_interrupts(PIC_VECTOR)
        .end();
    let Some((mut partition, controller)) = partition(&code) else { return };
    let reports = run(&mut partition, &Arc::<Messages>::default(), move |_| {
        let controller = Arc::clone(&controller);
        std::thread::spawn(move || {
            for _ in 0..20 {
                controller.interrupt(1);
                while *controller.waiting.lock().unwrap() > 0 {
                    std::thread::yield_now();
                }
            }
        });
    });
    assert_eq!(reports, [20]);
}

#[test]
fn the_end_of_a_level_message_is_told() {
    let code = Code::prologue()
        .step(1)
        .wait_interrupt(EDGE_VECTOR, 1)
        .wait_interrupt(LEVEL_VECTOR, 1)
        .step(2)
        .wait_interrupt(LEVEL_VECTOR, 2)
        .step(3)
        .wait_interrupt(LEVEL_VECTOR, 3)
        .end();
    let Some((mut partition, controller)) = partition(&code) else { return };
    let counters = partition.exit_counters();
    let seen = Arc::clone(&controller);
    run(&mut partition, &Arc::default(), move |step| {
        let level = 0xc000 | u32::from(LEVEL_VECTOR);
        let level = InterruptMessage { address: 0xfee0_0000, data: level };
        let edge = InterruptMessage { address: 0xfee0_0000, data: u32::from(EDGE_VECTOR) };
        let nobody = InterruptMessage { address: 0xfee0_7000, data: u32::from(EDGE_VECTOR) };
        if step == 1 {
            controller.apics.set_level_messages(&[level]);
            assert!(controller.apics.send(edge));
            assert!(!controller.apics.send(nobody));
        }
        assert!(controller.apics.send(level));
    });
    // The guest may be at its own end before the last is told.
    let ended = seen.ended.lock().unwrap();
    assert!(ended.starts_with(&[LEVEL_VECTOR; 2]) && ended.len() <= 3, "{ended:?}");
    assert_eq!(counters[0].get(ExitKind::EndOfInterrupt), ended.len() as u64);
}
