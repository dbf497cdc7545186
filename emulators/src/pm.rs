//! The fixed hardware of ACPI: power button, switching off, the power management timer, and the
//! reset register (ACPI 6.5, section 4.8, "ACPI Register Model").

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hypervisor::{Device, InterruptLine, StopHandle, StopReason};

/// The sleep type that means "soft off" here; the DSDT's `\_S5` names it.
pub const SLEEP_TYPE_S5: u8 = 5;

/// PM1 event: power button pressed, in status and enable.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 control: events raise the SCI. There is no SMM here, so always.
const SCI_ENABLE: u16 = 1;
/// PM1 control: enter the sleep type in bits 10 to 12.
const SLEEP_ENABLE: u16 = 1 << 13;

/// The event, control and timer registers, in one block of ports.
pub struct PmBlock {
    state: Mutex<State>,
    sci: Arc<dyn InterruptLine>,
    stop: StopHandle,
    started: Instant,
}

#[derive(Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    button: Button,
}

/// What has become of the power button that somebody pressed.
///
/// A system that boots clears what it finds in the status register before it listens, and only then
/// enables the event. What was pressed until then nobody has seen, and is to be pressed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Button {
    #[default]
    Untouched,
    /// And not seen: the status bit is still set, or was cleared by a guest that did not listen.
    Pressed,
    /// The guest, which had the event enabled, has cleared the status bit.
    Seen,
}

impl PmBlock {
    /// Where we put it.
    pub const PORT: u16 = 0x600;
    /// How many ports it takes.
    pub const PORTS: u16 = 12;
    /// The SCI's interrupt line, level-triggered.
    pub const SCI: u8 = 9;

    /// Offset of PM1a's status and enable registers.
    pub const EVENT: u16 = 0;
    /// Offset of PM1a's control register.
    pub const CONTROL: u16 = 4;
    /// Offset of the timer.
    pub const TIMER: u16 = 8;

    /// Ticks of the timer per second, 3.579545 MHz.
    pub const TIMER_HZ: u64 = 3_579_545;

    /// A block that raises `sci`, and ends the partition's run when the guest switches off.
    pub fn new(sci: Arc<dyn InterruptLine>, stop: StopHandle) -> Self {
        Self { state: Mutex::default(), sci, stop, started: Instant::now() }
    }

    /// Presses the power button: asks the guest to shut down. Until [`Self::power_button_seen`] it is
    /// to be pressed again now and then.
    pub fn press_power_button(&self) {
        let mut state = self.lock();
        state.status |= POWER_BUTTON;
        state.button = Button::Pressed;
        self.update_sci(&state);
    }

    /// Whether the guest has taken notice of the button that was pressed last. Told once.
    pub fn power_button_seen(&self) -> bool {
        let mut state = self.lock();
        let seen = state.button == Button::Seen;
        if seen {
            state.button = Button::Untouched;
        }
        seen
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_sci(&self, state: &State) {
        self.sci.set_level(state.status & state.enable != 0);
    }

    /// The registers as bytes, so that any width of access works.
    fn registers(&self) -> [u8; Self::PORTS as usize] {
        let mut bytes = [0; Self::PORTS as usize];
        let state = self.lock();
        bytes[0..2].copy_from_slice(&state.status.to_le_bytes());
        bytes[2..4].copy_from_slice(&state.enable.to_le_bytes());
        bytes[4..6].copy_from_slice(&(state.control | SCI_ENABLE).to_le_bytes());
        bytes[8..12].copy_from_slice(&timer_at(self.started.elapsed()).to_le_bytes());
        bytes
    }

    fn write_byte(&self, state: &mut State, offset: u64, value: u8) {
        let (value, high) = (u16::from(value), offset & 1 == 1);
        let (shifted, kept) = if high { (value << 8, 0x00ff) } else { (value, 0xff00) };
        match offset & !1 {
            0 => {
                let cleared = state.status & shifted;
                state.status &= !shifted; // a one clears
                if cleared & state.enable & POWER_BUTTON != 0 {
                    state.button = Button::Seen;
                }
            }
            2 => state.enable = (state.enable & kept) | shifted,
            4 => state.control = (state.control & kept) | shifted,
            _ => {}
        }
    }
}

/// What the timer, 32 bits wide, shows after `time`.
fn timer_at(time: Duration) -> u32 {
    // 128 bits, since nanoseconds times ticks leave 64 after an hour or so.
    (time.as_nanos() * u128::from(PmBlock::TIMER_HZ) / 1_000_000_000) as u32
}

impl Device for PmBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        let start = offset as usize;
        if let Some(source) = registers.get(start..start.saturating_add(data.len())) {
            data.copy_from_slice(source);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        for (offset, &byte) in (offset..).zip(data) {
            self.write_byte(&mut state, offset, byte);
        }
        let control = state.control;
        // The enable bit is a trigger and reads as zero.
        state.control &= !SLEEP_ENABLE;
        self.update_sci(&state);
        if control & SLEEP_ENABLE != 0 && control >> 10 & 7 == u16::from(SLEEP_TYPE_S5) {
            self.stop.stop(StopReason::PowerOff);
        }
    }
}

/// The reset register that the FADT names, and which PCs have at this port anyway.
pub struct ResetRegister {
    stop: StopHandle,
}

impl ResetRegister {
    /// The port.
    pub const PORT: u16 = 0xcf9;
    /// Written there, it resets the machine: "hard reset" and "reset the processors".
    pub const VALUE: u8 = 6;

    /// A register that ends the partition's run.
    pub fn new(stop: StopHandle) -> Self {
        Self { stop }
    }
}

impl Device for ResetRegister {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        const RESET_PROCESSORS: u8 = 4;
        if data.first().is_some_and(|value| value & RESET_PROCESSORS != 0) {
            self.stop.stop(StopReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Default)]
    struct Line(AtomicBool);

    impl InterruptLine for Line {
        fn pulse(&self) {}
        fn set_level(&self, high: bool) {
            self.0.store(high, Ordering::Relaxed);
        }
    }

    fn block() -> (PmBlock, Arc<Line>, StopHandle) {
        let (line, stop) = (Arc::new(Line::default()), StopHandle::default());
        (PmBlock::new(line.clone(), stop.clone()), line, stop)
    }

    fn read16(block: &PmBlock, offset: u64) -> u16 {
        let mut data = [0; 2];
        block.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_timer_ticks_at_its_rate_and_wraps() {
        assert_eq!(timer_at(Duration::ZERO), 0);
        assert_eq!(timer_at(Duration::from_secs(1)), 3_579_545);
        assert_eq!(timer_at(Duration::from_millis(10)), 35_795);
        // 2^32 ticks are 1199.86 s.
        assert_eq!(timer_at(Duration::from_secs(1200)), (1200 * 3_579_545_u64) as u32);
        assert!(timer_at(Duration::from_secs(1200)) < 600_000);
        // A century does not overflow.
        timer_at(Duration::from_secs(100 * 365 * 86400));
    }

    #[test]
    fn the_timer_can_be_read_and_moves_on() {
        let (block, _, _) = block();
        let read = || {
            let mut data = [0; 4];
            block.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let first = read();
        std::thread::sleep(Duration::from_millis(2));
        assert!(read().wrapping_sub(first) >= 7000);
    }

    #[test]
    fn soft_off_ends_the_run() {
        let (block, _, stop) = block();
        assert_eq!(read16(&block, 4), 1, "ACPI is always on");
        let sleep = |kind: u16| (kind << 10 | 1 << 13).to_le_bytes();
        block.write(4, &sleep(1));
        assert!(!stop.is_stopping(), "another sleep type is no power-off");
        block.write(4, &sleep(5));
        assert_eq!(stop.wait(), StopReason::PowerOff);
    }

    #[test]
    fn the_power_button_holds_the_sci_until_acknowledged() {
        let (block, line, _) = block();
        block.press_power_button();
        assert!(!line.0.load(Ordering::Relaxed), "not enabled yet");
        block.write(2, &0x100_u16.to_le_bytes());
        assert!(line.0.load(Ordering::Relaxed));
        assert_eq!(read16(&block, 0), 0x100);
        block.write(0, &0x001_u16.to_le_bytes());
        assert!(line.0.load(Ordering::Relaxed), "another bit was cleared");
        block.write(0, &0x100_u16.to_le_bytes());
        assert!(!line.0.load(Ordering::Relaxed));
        assert_eq!(read16(&block, 0), 0);
    }

    #[test]
    fn a_button_pressed_before_the_guest_listens_is_pressed_until_it_is_seen() {
        let (block, line, _) = block();
        let clear = || block.write(0, &0x100_u16.to_le_bytes());
        let enable = |on: bool| block.write(2, &(u16::from(on) << 8).to_le_bytes());
        assert!(!block.power_button_seen());
        block.press_power_button();
        // As ACPICA starts: everything off and cleared, then once more before it enables.
        enable(false);
        block.write(0, &0xffff_u16.to_le_bytes());
        assert!(!block.power_button_seen());
        block.press_power_button();
        clear();
        enable(true);
        assert!(!block.power_button_seen(), "nothing has interrupted it yet");
        assert!(!line.0.load(Ordering::Relaxed));
        clear();
        assert!(!block.power_button_seen(), "there was nothing to clear");
        block.press_power_button();
        assert!(line.0.load(Ordering::Relaxed));
        block.write(0, &0x001_u16.to_le_bytes());
        assert!(!block.power_button_seen(), "another bit was cleared");
        clear();
        assert!(block.power_button_seen());
        assert!(!block.power_button_seen(), "told once");
        assert!(!line.0.load(Ordering::Relaxed));
        // Another press is another matter.
        block.press_power_button();
        assert!(!block.power_button_seen());
    }

    #[test]
    fn the_reset_register_resets() {
        let stop = StopHandle::default();
        let register = ResetRegister::new(stop.clone());
        register.write(0, &[2]);
        assert!(!stop.is_stopping());
        register.write(0, &[ResetRegister::VALUE]);
        assert_eq!(stop.wait(), StopReason::Reset);
    }
}
