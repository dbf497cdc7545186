//! Interrupts that end by themselves (auto-EOI, TLFS 11.7), for guests that ask a SINT for it although
//! leaf 0x40000004 recommends not to: FreeBSD, NetBSD and OpenBSD do, and their handlers leave the
//! local APIC alone.
//!
//! KVM's own SynIC has its local APIC not put such an interrupt into service at all. From outside
//! there is no way to say so, but one to end an interrupt: to write the EOI register as the guest
//! would. So whoever raises one gets the processor out of the guest, and its thread ends what has
//! been taken since. An interrupt that the guest has not taken yet is looked for again after a
//! while, by a thread that starts with the first of them. Until then lower interrupts wait, as they
//! would during a long handler. It costs an exit or two for each interrupt; guests that follow the
//! recommendation pay nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;

use crate::VpIndex;
use crate::kvm::irq;
use crate::kvm::kick::Kick;

/// How long to leave the guest alone before it is looked at again, at first and at most.
const SOON: Duration = Duration::from_micros(50);
const LATE: Duration = Duration::from_millis(2);

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::kvm) struct Vectors([u64; 4]);

impl Vectors {
    /// The eight words of 32 bits that a local APIC has them in, 16 bytes apart.
    pub(in crate::kvm) fn from_apic(registers: impl Fn(usize) -> u32) -> Self {
        let word = |n: usize| u64::from(registers(n * 16));
        Self(std::array::from_fn(|n| word(2 * n) | word(2 * n + 1) << 32))
    }

    fn highest(self) -> Option<u8> {
        let word = (0..4).rev().find(|word| self.0[*word] != 0)?;
        Some((word as u32 * 64 + 63 - self.0[word].leading_zeros()) as u8)
    }

    fn and(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] & other.0[n]))
    }

    fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] | other.0[n]))
    }

    fn without(self, vector: u8) -> Self {
        let mut rest = self;
        rest.0[usize::from(vector / 64)] &= !(1 << (vector % 64));
        rest
    }
}

/// What is left of `owed` when a local APIC has `requested` and `in_service`, and how many times
/// its EOI register is to be written first: each write ends the highest that is in service, so one
/// below the guest's own has to wait.
fn ends(owed: Vectors, requested: Vectors, mut in_service: Vectors) -> (u32, Vectors) {
    let mut count = 0;
    while let Some(highest) = in_service.highest()
        && owed.and(in_service).highest() == Some(highest)
    {
        in_service = in_service.without(highest);
        count += 1;
    }
    (count, owed.and(requested.or(in_service)))
}

/// One processor's.
#[derive(Default)]
struct VpState {
    /// Vectors that have been raised and whose end nobody has seen.
    owed: [AtomicU64; 4],
    /// The processor's thread is to look.
    look: AtomicBool,
    kick: Kick,
}

/// All processors' interrupts that end by themselves.
pub(in crate::kvm) struct AutoEoi {
    vm: Arc<VmFd>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// It could not be started, and that was said: a guest may cause this without end.
    complained: AtomicBool,
}

struct Shared {
    vps: Box<[VpState]>,
    later: Mutex<Later>,
    changed: Condvar,
}

/// When processors are to be got out of the guest again.
struct Later {
    vps: Box<[Option<Instant>]>,
    ended: bool,
}

impl Shared {
    fn later(&self) -> MutexGuard<'_, Later> {
        self.later.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, vp: &VpState) {
        vp.look.store(true, Ordering::SeqCst);
        vp.kick.kick();
    }

    fn run(&self) {
        let mut later = self.later();
        while !later.ended {
            let now = Instant::now();
            for (at, vp) in later.vps.iter_mut().zip(&self.vps) {
                if at.take_if(|at| *at <= now).is_some() {
                    self.look(vp);
                }
            }
            later = match later.vps.iter().flatten().min() {
                None => self.changed.wait(later).unwrap_or_else(PoisonError::into_inner),
                Some(next) => {
                    let timeout = next.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(later, timeout);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl AutoEoi {
    pub(super) fn new(vm: &Arc<VmFd>, vps: u32) -> Self {
        let later = Later { vps: (0..vps).map(|_| None).collect(), ended: false };
        let shared = Shared {
            vps: (0..vps).map(|_| VpState::default()).collect(),
            later: Mutex::new(later),
            changed: Condvar::new(),
        };
        let (vm, shared) = (Arc::clone(vm), Arc::new(shared));
        Self { vm, shared, thread: Mutex::default(), complained: AtomicBool::new(false) }
    }

    fn vp(&self, vp: VpIndex) -> Option<&VpState> {
        self.shared.vps.get(vp.0 as usize)
    }

    /// Raises `vector`, whose end the processor's thread sees to. Any thread.
    pub(super) fn raise(&self, vp: VpIndex, vector: u8) {
        let Some(state) = self.vp(vp) else { return };
        irq::raise_vector(&self.vm, vp, vector);
        // After that: who finds it owed finds it in the local APIC, or already ended.
        if let Some(word) = state.owed.get(usize::from(vector / 64)) {
            word.fetch_or(1 << (vector % 64), Ordering::SeqCst);
        }
        self.shared.look(state);
    }

    /// The processor's thread, for others to get it out of the guest.
    pub(in crate::kvm) fn kick(&self, vp: VpIndex) -> Option<&Kick> {
        self.vp(vp).map(|vp| &vp.kick)
    }

    /// Looks again after `delay`, and starts the thread for it if it does not run yet.
    fn look_after(&self, vp: VpIndex, delay: Duration) {
        if let Some(at) = self.shared.later().vps.get_mut(vp.0 as usize) {
            *at = Some(Instant::now() + delay);
        }
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name("auto-eoi".to_owned());
            match builder.stack_size(128 << 10).spawn(move || shared.run()) {
                Ok(handle) => *thread = Some(handle),
                Err(_) if self.complained.swap(true, Ordering::Relaxed) => {}
                Err(error) => tracing::error!(%error, "cannot start the auto-eoi thread"),
            }
        }
        self.shared.changed.notify_one();
    }
}

impl Drop for AutoEoi {
    fn drop(&mut self) {
        self.shared.later().ended = true;
        self.shared.changed.notify_one();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the auto-eoi thread panicked");
        }
    }
}

/// A processor's own part, on its thread.
pub(in crate::kvm) struct VpAutoEoi {
    index: VpIndex,
    shared: Arc<AutoEoi>,
    delay: Duration,
}

/// A processor's local APIC, out of the guest.
pub(in crate::kvm) trait LocalApic {
    type Error;

    /// The vectors that are requested, and those that are in service.
    fn vectors(&self) -> Result<(Vectors, Vectors), Self::Error>;

    /// Ends the highest that is in service.
    fn end_of_interrupt(&self) -> Result<(), Self::Error>;
}

impl VpAutoEoi {
    pub(super) fn new(index: VpIndex, shared: &Arc<AutoEoi>) -> Self {
        Self { index, shared: Arc::clone(shared), delay: SOON }
    }

    pub(in crate::kvm) fn shared(&self) -> &Arc<AutoEoi> {
        &self.shared
    }

    /// Ends what the guest has taken. To be called before each entry.
    pub(in crate::kvm) fn look<A: LocalApic>(&mut self, apic: &A) -> Result<(), A::Error> {
        let Some(state) = self.shared.vp(self.index) else { return Ok(()) };
        if !state.look.load(Ordering::SeqCst) {
            return Ok(());
        }
        state.look.store(false, Ordering::SeqCst);
        // Taken before the local APIC is looked at: what is raised meanwhile is owed anew.
        let owed = Vectors(std::array::from_fn(|n| state.owed[n].swap(0, Ordering::SeqCst)));
        let (requested, in_service) = apic.vectors()?;
        let (count, rest) = ends(owed, requested, in_service);
        for _ in 0..count {
            apic.end_of_interrupt()?;
        }
        if rest == Vectors::default() {
            self.delay = SOON;
            return Ok(());
        }
        for (word, rest) in state.owed.iter().zip(rest.0) {
            word.fetch_or(rest, Ordering::SeqCst);
        }
        self.delay = if count > 0 { SOON } else { (self.delay * 2).min(LATE) };
        self.shared.look_after(self.index, self.delay);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(vectors: &[u8]) -> Vectors {
        let mut set = Vectors::default();
        for vector in vectors {
            set.0[usize::from(vector / 64)] |= 1 << (vector % 64);
        }
        set
    }

    #[test]
    fn the_apic_s_words_are_in_order() {
        let vectors = Vectors::from_apic(|at| if at == 0x70 { 1 << 19 } else { 0 });
        assert_eq!(vectors, set(&[0xf3]));
        assert_eq!(Vectors::from_apic(|at| u32::from(at == 0x10)), set(&[0x20]));
    }

    #[test]
    fn what_is_owed_is_ended_when_it_is_the_highest() {
        let none = Vectors::default();
        let owed = set(&[0xf3]);
        assert_eq!(ends(owed, none, set(&[0xf3, 0x40])), (1, none));
        assert_eq!(ends(owed, owed, none), (0, owed), "not taken yet");
        assert_eq!(ends(owed, owed, owed), (1, owed), "and once more");
        assert_eq!(ends(owed, none, set(&[0xf3, 0xf8])), (0, owed), "below the guest's own");
        assert_eq!(ends(owed, none, set(&[0x40])), (0, none), "the guest has ended it");
        assert_eq!(ends(set(&[0x30, 0x50]), none, set(&[0x30, 0x50, 0x40])), (1, set(&[0x30])));
    }

    proptest! {
        /// The guest's own interrupts are never ended, and no owed one is forgotten.
        #[test]
        fn only_what_is_owed_is_ended(owed: [u64; 4], requested: [u64; 4], in_service: [u64; 4]) {
            let (owed, requested) = (Vectors(owed), Vectors(requested));
            let mut left = Vectors(in_service);
            let (count, rest) = ends(owed, requested, left);
            for _ in 0..count {
                let highest = left.highest().unwrap();
                prop_assert_ne!(owed, owed.without(highest));
                left = left.without(highest);
            }
            prop_assert_eq!(rest, owed.and(requested.or(left)));
        }
    }
}
