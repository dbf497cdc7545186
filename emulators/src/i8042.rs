//! The keyboard controller, with nothing plugged in: it answers for itself, so that software which
//! takes it for granted goes on, and it resets the machine, which guests try when other ways fail.
//!
//! It never interrupts, since it has nothing to say that was not asked for.

use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::{Device, StopHandle, StopReason};

/// The controller.
pub struct I8042 {
    state: Mutex<State>,
    stop: StopHandle,
}

#[derive(Debug, Default)]
struct State {
    /// What the data port shows until it is read.
    output: Option<u8>,
    /// What the next write to the data port is for.
    expected: Option<Expected>,
    /// The command byte: interrupts, system flag, clocks, translation.
    command_byte: u8,
    /// The last write was to the command port.
    last_was_command: bool,
}

#[derive(Clone, Copy, Debug)]
enum Expected {
    CommandByte,
    OutputPort,
    /// To come back as if the keyboard had sent it.
    Echo,
}

/// Status bits.
mod status {
    pub(super) const OUTPUT_FULL: u8 = 1 << 0;
    /// The self-test has passed; it is a bit of the command byte.
    pub(super) const SYSTEM: u8 = 1 << 2;
    pub(super) const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked.
    pub(super) const UNLOCKED: u8 = 1 << 4;
}

/// Output port: not reset, address line 20 not masked.
const OUTPUT_PORT: u8 = 0b11;
const NOT_RESET: u8 = 1 << 0;

/// Bits of the command byte that switch the keyboard and the mouse off.
const KEYBOARD_OFF: u8 = 1 << 4;
const MOUSE_OFF: u8 = 1 << 5;

impl I8042 {
    /// Its data port.
    pub const DATA_PORT: u64 = 0x60;
    /// Its command port, and when read, its status.
    pub const COMMAND_PORT: u64 = 0x64;

    /// A controller whose reset output ends the partition's run.
    pub fn new(stop: StopHandle) -> Self {
        Self { state: Mutex::default(), stop }
    }

    /// The device at [`Self::DATA_PORT`].
    pub fn data(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(DataPort(Arc::clone(self)))
    }

    /// The device at [`Self::COMMAND_PORT`].
    pub fn command(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(CommandPort(Arc::clone(self)))
    }

    fn access<T>(&self, access: impl FnOnce(&mut State) -> T) -> T {
        access(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl State {
    fn status(&self) -> u8 {
        let bit = |set, bit| if set { bit } else { 0 };
        status::UNLOCKED
            | self.command_byte & status::SYSTEM
            | bit(self.last_was_command, status::COMMAND)
            | bit(self.output.is_some(), status::OUTPUT_FULL)
    }

    /// A command. Whether it resets the machine.
    fn command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.expected = None;
        match command {
            0x20 => self.output = Some(self.command_byte),
            0x60 => self.expected = Some(Expected::CommandByte),
            0xa7 => self.command_byte |= MOUSE_OFF,
            0xa8 => self.command_byte &= !MOUSE_OFF,
            0xaa => {
                self.command_byte |= status::SYSTEM;
                self.output = Some(0x55); // passed
            }
            0xab => self.output = Some(0), // the keyboard's lines are well
            0xad => self.command_byte |= KEYBOARD_OFF,
            0xae => self.command_byte &= !KEYBOARD_OFF,
            0xd0 => self.output = Some(OUTPUT_PORT),
            0xd1 => self.expected = Some(Expected::OutputPort),
            0xd2 => self.expected = Some(Expected::Echo),
            // Pulse the output port's lines whose bits are zero. The first is the reset.
            0xf0..=0xff => return command & NOT_RESET == 0,
            _ => {}
        }
        false
    }

    /// A write to the data port. Whether it resets the machine.
    fn data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match self.expected.take() {
            Some(Expected::CommandByte) => self.command_byte = value,
            Some(Expected::OutputPort) => return value & NOT_RESET == 0,
            Some(Expected::Echo) => self.output = Some(value),
            None => {} // for a keyboard
        }
        false
    }
}

struct DataPort(Arc<I8042>);

impl Device for DataPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0.access(|state| state.output.take()).unwrap_or(0));
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.iter().any(|byte| self.0.access(|state| state.data(*byte))) {
            self.0.stop.stop(StopReason::Reset);
        }
    }
}

struct CommandPort(Arc<I8042>);

impl Device for CommandPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0.access(|state| state.status()));
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.iter().any(|byte| self.0.access(|state| state.command(*byte))) {
            self.0.stop.stop(StopReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        data: Arc<dyn Device>,
        command: Arc<dyn Device>,
        stop: StopHandle,
    }

    impl Rig {
        fn new() -> Self {
            let stop = StopHandle::default();
            let controller = Arc::new(I8042::new(stop.clone()));
            Self { data: controller.data(), command: controller.command(), stop }
        }

        fn read(device: &dyn Device) -> u8 {
            let mut data = [0xff];
            device.read(0, &mut data);
            data[0]
        }

        /// What a command is answered with.
        fn ask(&self, command: u8) -> Option<u8> {
            self.command.write(0, &[command]);
            let full = Self::read(&*self.command) & 1 != 0;
            full.then(|| Self::read(&*self.data))
        }
    }

    #[test]
    fn it_answers_for_itself() {
        let rig = Rig::new();
        assert_eq!(Rig::read(&*rig.command), 0x10, "nothing to read, ready for a command");
        assert_eq!((rig.ask(0xaa), rig.ask(0xab), rig.ask(0xd0)), (Some(0x55), Some(0), Some(3)));
        assert_eq!(Rig::read(&*rig.command) & 4, 4, "tested");
        assert_eq!(rig.ask(0x60), None);
        rig.data.write(0, &[0x65]);
        assert_eq!((rig.ask(0xad), rig.ask(0x20)), (None, Some(0x75)));
        assert_eq!(rig.ask(0xd2), None);
        rig.data.write(0, &[0x1c]);
        assert_eq!(Rig::read(&*rig.command) & 9, 1);
        assert_eq!(Rig::read(&*rig.data), 0x1c);
    }

    #[test]
    fn no_keyboard_answers() {
        let rig = Rig::new();
        rig.data.write(0, &[0xff]);
        assert_eq!(Rig::read(&*rig.command) & 1, 0);
        assert_eq!(Rig::read(&*rig.data), 0);
    }

    #[test]
    fn it_resets() {
        for reset in [&[0xfe][..], &[0xf0], &[0xd1, 0x02]] {
            let rig = Rig::new();
            rig.command.write(0, &[0xff]);
            rig.command.write(0, &[0xd1]);
            rig.data.write(0, &[0xdf]);
            assert!(!rig.stop.is_stopping());
            rig.command.write(0, &reset[..1]);
            if let Some(value) = reset.get(1) {
                rig.data.write(0, &[*value]);
            }
            assert_eq!(rig.stop.wait(), StopReason::Reset);
        }
    }
}
