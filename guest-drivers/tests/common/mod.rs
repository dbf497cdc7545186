//! A guest's world within this process: memory, a SynIC, a clock, and threads for processors.
#![allow(unsafe_code, dead_code)] // guest memory is handed to the guest; not all tests use all

use std::collections::HashMap;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use guest_drivers::memory::{PAGE, Pages};
use guest_drivers::platform::{Message, Platform, PlatformCounters, PortWrite, Ports};
use hypervisor::synic::{
    self, ConnectionId, EventFlag, EventPort, MessageSink, Posted, Sint, Synic,
};
use hypervisor::{Bus, GuestMemory, InterruptLine, VpIndex};
use vmbus::client::HvStatus;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What both ends of a partition without a hypervisor share.
pub struct World {
    state: Mutex<State>,
    raised: Condvar,
    slot_free: EventFd,
}

#[derive(Default)]
struct State {
    slot: Option<synic::Message>,
    slot_wanted: bool,
    vps: Vec<Vp>,
    doorbells: HashMap<u32, EventFd>,
}

#[derive(Clone, Default)]
struct Vp {
    flags: Vec<u16>,
    /// Interrupts since it last slept.
    pending: bool,
    interrupts: u64,
    halts: u64,
}

impl World {
    pub fn new(vps: usize) -> Arc<Self> {
        let slot_free = EventFd::new(EFD_NONBLOCK).unwrap();
        let state = Mutex::new(State { vps: vec![Vp::default(); vps], ..State::default() });
        Arc::new(Self { state, raised: Condvar::new(), slot_free })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn raise(&self, vp: &mut Vp) {
        vp.pending = true;
        vp.interrupts += 1;
        self.raised.notify_all();
    }
}

/// The root's side of the world.
pub struct Root(pub Arc<World>);

struct Port {
    world: Arc<World>,
    vp: usize,
    flag: u16,
}

impl EventPort for Port {
    fn signal(&self) -> bool {
        let vp = &mut self.world.lock().vps[self.vp];
        if vp.flags.contains(&self.flag) {
            return false;
        }
        vp.flags.push(self.flag);
        self.world.raise(vp);
        true
    }

    fn retarget(&self, _: VpIndex) {}
}

impl Synic for Root {
    fn post(&self, _: VpIndex, sint: Sint, message: &synic::Message) -> Posted {
        assert_eq!(sint, Sint::VMBUS);
        let mut state = self.0.lock();
        if state.slot.is_some() {
            state.slot_wanted = true;
            return Posted::Busy;
        }
        state.slot = Some(*message);
        self.0.raise(&mut state.vps[0]);
        Posted::Delivered
    }

    fn slot_free(&self) -> &EventFd {
        &self.0.slot_free
    }

    fn bind(&self, connection: ConnectionId, event: &EventFd) -> io::Result<()> {
        self.0.lock().doorbells.insert(connection.get(), event.try_clone()?);
        Ok(())
    }

    fn unbind(&self, connection: ConnectionId, _: &EventFd) -> io::Result<()> {
        self.0.lock().doorbells.remove(&connection.get());
        Ok(())
    }

    fn event_port(&self, vp: VpIndex, sint: Sint, flag: EventFlag) -> Option<Arc<dyn EventPort>> {
        assert_eq!(sint, Sint::VMBUS);
        Some(Arc::new(Port { world: Arc::clone(&self.0), vp: vp.0 as usize, flag: flag.get() }))
    }
}

/// A line of the guest's interrupt controllers, which leads to its first processor.
pub struct Line(pub Arc<World>);

impl InterruptLine for Line {
    fn pulse(&self) {
        self.0.raise(&mut self.0.lock().vps[0]);
    }

    fn set_level(&self, high: bool) {
        if high {
            self.pulse();
        }
    }
}

/// The guest's side of the world, as one of its processors sees it.
pub struct Guest {
    pub world: Arc<World>,
    pub vp: usize,
    pub memory: GuestMemory,
    pub ports: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub sink: Arc<dyn MessageSink>,
    pub started: Instant,
    pub lines: Mutex<Vec<String>>,
}

/// The guest leaves its first pages alone, so that numbers are no indices.
const FIRST: u64 = 16;

impl Ports for Guest {
    fn read_8(&self, port: u16) -> u8 {
        let mut data = [0];
        self.ports.read(port.into(), &mut data);
        u8::from_le_bytes(data)
    }

    fn read_32(&self, port: u16) -> u32 {
        let mut data = [0; 4];
        self.ports.read(port.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write_8(&self, writes: &[PortWrite]) {
        for write in writes {
            self.ports.write(write.port.into(), &[write.value]);
        }
    }

    fn write_32(&self, port: u16, value: u32) {
        self.ports.write(port.into(), &value.to_le_bytes());
    }

    fn load_32(&self, address: u32) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn store_32(&self, address: u32, value: u32) {
        self.mmio.write(address.into(), &value.to_le_bytes());
    }

    fn read_string(&self, port: u16, words: &[AtomicU64]) {
        let mut data = vec![0; size_of_val(words)];
        self.ports.read_string(port.into(), 4, &mut data);
        for (word, bytes) in words.iter().zip(data.as_chunks().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
    }

    fn write_string(&self, port: u16, words: &[AtomicU64]) {
        let words: Vec<_> = words.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        let data: Vec<_> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        self.ports.write_string(port.into(), 4, &data);
    }
}

impl Platform for Guest {
    fn memory(&self) -> Pages<'_> {
        let region = self.memory.regions().next().unwrap();
        let start = NonNull::new(region.host.wrapping_add(FIRST as usize * PAGE)).unwrap();
        // SAFETY: it is mapped as long as `self.memory` is, and the root uses it by atomics and
        // volatile accesses.
        unsafe { Pages::new(start, FIRST, region.len as usize / PAGE - FIRST as usize) }
    }

    fn post_message(&self, connection: u32, message_type: u32, payload: &[u8]) -> HvStatus {
        HvStatus(self.sink.post(ConnectionId::new(connection), message_type, payload).0)
    }

    fn signal_event(&self, connection: u32) {
        // A connection that leads nowhere is no more than a status.
        if let Some(doorbell) = self.world.lock().doorbells.get(&connection) {
            doorbell.write(1).unwrap();
        }
    }

    fn take_message(&self) -> Option<Message> {
        let mut state = self.world.lock();
        let message = state.slot.take()?;
        if std::mem::take(&mut state.slot_wanted) {
            self.world.slot_free.write(1).unwrap();
        }
        let payload = &message.payload[..message.payload_size.into()];
        Some(Message::new(message.message_type, payload))
    }

    fn idle(&self) {
        let mut state = self.world.lock();
        state.vps[self.vp].halts += 1;
        // As long as no test takes; a guest that waits in vain then finds out by its clock.
        let limit = Duration::from_secs(20);
        let (mut state, _) = self
            .world
            .raised
            .wait_timeout_while(state, limit, |state| !state.vps[self.vp].pending)
            .unwrap();
        state.vps[self.vp].pending = false;
        state.vps[self.vp].flags.clear();
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn line(&self, text: &str) {
        self.lines.lock().unwrap().push(text.to_owned());
    }

    fn counters(&self) -> PlatformCounters {
        let vp = &self.world.lock().vps[self.vp];
        PlatformCounters { halts: vp.halts, interrupts: vp.interrupts }
    }

    fn processors(&self) -> usize {
        self.world.lock().vps.len()
    }

    fn together<R: Send, O>(
        &self,
        places: &mut [Option<R>],
        work: impl Fn(usize, &Self) -> R + Sync,
        own: impl FnOnce() -> O,
    ) -> O {
        let work = &work;
        std::thread::scope(|scope| {
            for (vp, place) in (1..self.processors()).zip(places) {
                let other = Self {
                    world: Arc::clone(&self.world),
                    vp,
                    memory: self.memory.clone(),
                    ports: Arc::clone(&self.ports),
                    mmio: Arc::clone(&self.mmio),
                    sink: Arc::clone(&self.sink),
                    started: self.started,
                    lines: Mutex::default(),
                };
                scope.spawn(move || *place = Some(work(vp, &other)));
            }
            own()
        })
    }
}
