//! An interrupt line that several devices hold: it is up as long as one of them holds it up.

use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::InterruptLine;

/// See the module's documentation.
pub struct SharedLine {
    line: Arc<dyn InterruptLine>,
    /// How many hold it up.
    holders: Mutex<u32>,
}

impl SharedLine {
    /// Shares `line`, which is down.
    pub fn new(line: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self { line, holders: Mutex::new(0) })
    }

    /// An end for one device more.
    pub fn end(self: &Arc<Self>) -> Arc<dyn InterruptLine> {
        Arc::new(End { shared: Arc::clone(self), high: Mutex::new(false) })
    }

    fn hold(&self, high: bool) {
        // Locked until the line has moved, so that it does so in the order of its holders.
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        let was = *holders > 0;
        *holders = if high { *holders + 1 } else { holders.saturating_sub(1) };
        if was != (*holders > 0) {
            self.line.set_level(high);
        }
    }
}

struct End {
    shared: Arc<SharedLine>,
    high: Mutex<bool>,
}

impl InterruptLine for End {
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }

    fn set_level(&self, high: bool) {
        let mut own = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        if *own != high {
            *own = high;
            self.shared.hold(high);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<bool>>);

    impl InterruptLine for Recorder {
        fn pulse(&self) {}

        fn set_level(&self, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }

    #[test]
    fn a_line_is_up_as_long_as_somebody_holds_it() {
        let recorder = Arc::new(Recorder::default());
        let shared = SharedLine::new(Arc::clone(&recorder) as _);
        let (a, b) = (shared.end(), shared.end());
        a.set_level(true);
        b.set_level(true);
        a.set_level(true);
        a.set_level(false);
        assert_eq!(*recorder.0.lock().unwrap(), [true]);
        b.set_level(false);
        b.set_level(false);
        b.pulse();
        assert_eq!(*recorder.0.lock().unwrap(), [true, false, true, false]);
    }
}
