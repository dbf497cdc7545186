//! The SynIC from user space: its SINTs are vectors of KVM's local APICs.
//!
//! The VMBus's SINT has an irqfd per processor, so that whoever holds its descriptor can raise it;
//! its route follows what the guest writes to the SINT's register, which is rare. The others, used
//! by timers alone, are raised by an ioctl each. So are those whose interrupts end by themselves
//! ([`super::auto_eoi`]).

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::auto_eoi::AutoEoi;
use crate::hypercall::page::DOORBELL_PORT;
use crate::kvm::irq::Routes;
use crate::kvm::{call, irq};
use crate::registers::SintState;
use crate::synic::pages::{PageRegisters, SynicPages};
use crate::synic::{ConnectionId, EventFlag, EventPort, HvStatus, Message, Posted, Sint, Synic};
use crate::{GuestMemory, PartitionError, VpIndex};

/// The address of the doorbells. Which one it is, the data say.
const DOORBELL: IoEventAddress = IoEventAddress::Pio(DOORBELL_PORT as u64);

/// The SynICs of a partition's processors.
pub(in crate::kvm) struct UserSynic {
    vm: Arc<VmFd>,
    pages: Arc<SynicPages>,
    vps: Arc<[VpSints]>,
    auto_eoi: Arc<AutoEoi>,
    /// Held while a slot is filled: the VMBus posts, and so do timers.
    posting: Mutex<()>,
    routes: Arc<Routes>,
    slot_free: EventFd,
    /// What bound connections fire, for the rare signal that does not come by the doorbell.
    bound: Mutex<HashMap<u32, EventFd>>,
    crashed: AtomicBool,
}

/// A processor's SINTs, as others than its own thread need to know them.
#[derive(Default)]
struct VpSints {
    /// A bit per SINT that is not masked.
    open: AtomicU16,
    /// A bit per SINT whose slot was found taken.
    busy: AtomicU16,
    /// A bit per SINT whose interrupts end by themselves.
    auto_eoi: AtomicU16,
    /// The vectors; 0 for none.
    vectors: [AtomicU8; Sint::COUNT as usize],
}

impl VpSints {
    fn vector(&self, sint: Sint) -> Option<u8> {
        let vector = self.vectors.get(usize::from(sint.index()))?.load(Ordering::Acquire);
        (vector != 0).then_some(vector)
    }

    fn ends_by_itself(&self, sint: Sint) -> bool {
        self.auto_eoi.load(Ordering::Acquire) & bit(sint) != 0
    }
}

fn bit(sint: Sint) -> u16 {
    1 << sint.index()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl UserSynic {
    /// After the processors have been made.
    pub(in crate::kvm) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        memory: &GuestMemory,
        vps: u32,
    ) -> Result<Self, PartitionError> {
        let pages = Arc::new(SynicPages::new(memory, vps));
        for index in (0..vps).map(VpIndex) {
            pages.attach_interrupt(index, irq::irqfd(vm, irq::sint_gsi(index))?);
        }
        let auto_eoi = Arc::new(AutoEoi::new(vm, vps));
        let vps: Arc<[VpSints]> = (0..vps).map(|_| VpSints::default()).collect();
        let (by_hand, sints) = (Arc::clone(&auto_eoi), Arc::clone(&vps));
        pages.attach_otherwise(Box::new(move |vp| {
            let vector = sints.get(vp.0 as usize).and_then(|sints| sints.vector(Sint::VMBUS));
            if let Some(vector) = vector {
                by_hand.raise(vp, vector);
            }
        }));
        let slot_free =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(call("cannot make an eventfd"))?;
        Ok(Self {
            vm: Arc::clone(vm),
            pages,
            vps,
            auto_eoi,
            posting: Mutex::default(),
            routes: Arc::clone(routes),
            slot_free,
            bound: Mutex::default(),
            crashed: AtomicBool::default(),
        })
    }

    pub(super) fn vp_count(&self) -> u32 {
        self.vps.len() as u32
    }

    /// Those of its interrupts that end by themselves.
    pub(super) fn auto_eoi(&self) -> &Arc<AutoEoi> {
        &self.auto_eoi
    }

    fn vp(&self, vp: VpIndex) -> Option<&VpSints> {
        self.vps.get(vp.0 as usize)
    }

    /// The guest has written SIMP, SIEFP or SCONTROL.
    pub(super) fn set_pages(&self, vp: VpIndex, registers: PageRegisters) {
        self.pages.set(vp, registers);
    }

    /// The guest has written a SINT.
    pub(super) fn set_sint(
        &self,
        vp: VpIndex,
        sint: Sint,
        state: SintState,
    ) -> Result<(), PartitionError> {
        let Some(sints) = self.vp(vp) else { return Ok(()) };
        if state.is_open() {
            sints.open.fetch_or(bit(sint), Ordering::AcqRel);
        } else {
            sints.open.fetch_and(!bit(sint), Ordering::AcqRel);
        }
        let before = (sints.vector(sint), sints.ends_by_itself(sint));
        if let Some(slot) = sints.vectors.get(usize::from(sint.index())) {
            slot.store(state.vector().unwrap_or(0), Ordering::Release);
        }
        let auto_eoi = state.wants_auto_eoi();
        if auto_eoi {
            sints.auto_eoi.fetch_or(bit(sint), Ordering::AcqRel);
        } else {
            sints.auto_eoi.fetch_and(!bit(sint), Ordering::AcqRel);
        }
        if sint != Sint::VMBUS || before == (state.vector(), auto_eoi) {
            return Ok(());
        }
        // There is a way to raise it at any time, and for a moment there may be two.
        if auto_eoi {
            self.pages.raise_otherwise(vp, true);
            self.route()
        } else {
            self.route()?;
            self.pages.raise_otherwise(vp, false);
            Ok(())
        }
    }

    /// Tells KVM where the VMBus's SINTs go. To change routes costs it a grace period, so it is
    /// done only when one has changed.
    fn route(&self) -> Result<(), PartitionError> {
        let routed = |sints: &&VpSints| !sints.ends_by_itself(Sint::VMBUS);
        let sints = (0..).map(VpIndex).zip(&*self.vps).filter_map(|(vp, sints)| {
            let vector = Some(sints).filter(routed)?.vector(Sint::VMBUS)?;
            Some(irq::sint_vector(vp, vector))
        });
        self.routes.set_sints(sints)
    }

    /// Puts `message` into a slot and raises its SINT.
    pub(super) fn deliver(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted {
        let Some(sints) = self.vp(vp) else { return Posted::Disabled };
        if sints.open.load(Ordering::Acquire) & bit(sint) == 0 {
            return Posted::Disabled;
        }
        let mut posted = {
            let _posting = lock(&self.posting);
            self.pages.fill(vp, sint, message)
        };
        if posted == Posted::Busy {
            // From now on the guest's EOM is told. It may have been there already, so once more.
            sints.busy.fetch_or(bit(sint), Ordering::SeqCst);
            let _posting = lock(&self.posting);
            posted = self.pages.fill(vp, sint, message);
        }
        if posted == Posted::Delivered {
            self.raise(vp, sint);
        }
        posted
    }

    fn raise(&self, vp: VpIndex, sint: Sint) {
        if sint == Sint::VMBUS {
            return self.pages.raise(vp);
        }
        let Some(sints) = self.vp(vp) else { return };
        match sints.vector(sint) {
            None => {}
            Some(vector) if sints.ends_by_itself(sint) => self.auto_eoi.raise(vp, vector),
            Some(vector) => self.raise_vector(vp, vector),
        }
    }

    /// Interrupts `vp` whatever its SINTs say.
    pub(super) fn raise_vector(&self, vp: VpIndex, vector: u8) {
        irq::raise_vector(&self.vm, vp, vector);
    }

    /// The guest has written EOM.
    pub(super) fn end_of_message(&self, vp: VpIndex) {
        let busy = self.vp(vp).map_or(0, |sints| sints.busy.swap(0, Ordering::SeqCst));
        if busy != 0 {
            // It fails only when the counter is full, and then it has fired.
            let _ = self.slot_free.write(1);
        }
    }

    /// A *signal event* that did not come by the doorbell.
    pub(super) fn signal(&self, connection: ConnectionId) -> HvStatus {
        match lock(&self.bound).get(&connection.get()) {
            Some(event) => {
                let _ = event.write(1);
                HvStatus::SUCCESS
            }
            None => HvStatus::INVALID_CONNECTION_ID,
        }
    }

    /// Whether nobody has asked this before.
    pub(super) fn first_crash(&self) -> bool {
        !self.crashed.swap(true, Ordering::Relaxed)
    }
}

impl Synic for UserSynic {
    fn post(&self, vp: VpIndex, sint: Sint, message: &Message) -> Posted {
        self.deliver(vp, sint, message)
    }

    fn slot_free(&self) -> &EventFd {
        &self.slot_free
    }

    fn bind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        let copy = event.try_clone()?;
        self.vm.register_ioevent(event, &DOORBELL, connection.get())?;
        lock(&self.bound).insert(connection.get(), copy);
        Ok(())
    }

    fn unbind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        lock(&self.bound).remove(&connection.get());
        Ok(self.vm.unregister_ioevent(event, &DOORBELL, connection.get())?)
    }

    fn event_port(&self, vp: VpIndex, sint: Sint, flag: EventFlag) -> Option<Arc<dyn EventPort>> {
        self.pages.event_port(vp, sint, flag)
    }
}
