//! The keyboard controller, as far as it resets the machine: guests try it when other ways fail.
//! There is no keyboard behind it.

use hypervisor::{Device, StopHandle, StopReason};

/// The controller, as far as its command port goes. Its data port reads as [`crate::Nothing`].
pub struct I8042 {
    stop: StopHandle,
}

impl I8042 {
    /// Its data port.
    pub const DATA_PORT: u64 = 0x60;
    /// Its command port, and when read, its status.
    pub const COMMAND_PORT: u64 = 0x64;

    /// A controller whose reset output ends the partition's run.
    pub fn new(stop: StopHandle) -> Self {
        Self { stop }
    }
}

/// One port, the command port.
impl Device for I8042 {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0); // both buffers are empty: ready for a command, and nothing to read
    }

    fn write(&self, _: u64, data: &[u8]) {
        // "Pulse output line 0", which is wired to the processors' reset.
        const PULSE_RESET: u8 = 0xfe;
        if data == [PULSE_RESET] {
            self.stop.stop(StopReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_resets() {
        let stop = StopHandle::default();
        let controller = I8042::new(stop.clone());
        let mut status = [0xff];
        controller.read(0, &mut status);
        assert_eq!(status, [0]);
        controller.write(0, &[0xd1]);
        assert!(!stop.is_stopping());
        controller.write(0, &[0xfe]);
        assert_eq!(stop.wait(), StopReason::Reset);
    }
}
