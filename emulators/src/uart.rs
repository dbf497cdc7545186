//! The serial port: a 16550A whose output is never slower than the guest writes, and whose input
//! waits until the guest has read what came before.
//!
//! The registers are vm-superio's. Output goes through a thread of its own, so that a byte costs
//! the guest no system call, and a slow terminal does not hold up a processor.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use hypervisor::{Device, InterruptLine};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

/// Bytes of output that may wait for the writer before the guest does.
const OUTPUT_LIMIT: usize = 64 << 10;

/// A serial port.
pub struct Uart {
    registers: Mutex<Serial<Line, NoEvents, Output>>,
    output: Output,
    writer: Option<JoinHandle<()>>,
}

struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse();
        Ok(())
    }
}

impl Uart {
    /// The first port of COM1.
    pub const COM1: u16 = 0x3f8;
    /// COM1's interrupt line.
    pub const COM1_IRQ: u8 = 4;
    /// How many ports it takes.
    pub const PORTS: u16 = 8;

    /// A port that writes to `sink`. What it has not yet written when it is dropped, it writes
    /// then.
    pub fn new(line: Arc<dyn InterruptLine>, sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let output = Output::default();
        let registers = Mutex::new(Serial::new(Line(line), output.clone()));
        let queue = output.clone();
        let writer = std::thread::Builder::new()
            .name("serial-out".to_owned())
            .stack_size(64 << 10)
            .spawn(move || queue.write_to(sink))?;
        Ok(Self { registers, output, writer: Some(writer) })
    }

    /// Gives the guest input, as much as its FIFO has room for; how many bytes that was. Call
    /// again later with the rest.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        self.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, NoEvents, Output>> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.lock();
        for (offset, byte) in (offset..).zip(data) {
            *byte = registers.read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        for (offset, &byte) in (offset..).zip(data) {
            // It fails when input looped back finds the FIFO full; real ports lose it as well.
            let _ = registers.write(offset as u8, byte);
        }
    }
}

impl Drop for Uart {
    fn drop(&mut self) {
        self.output.close();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// The queue between the registers and the thread that writes.
#[derive(Clone, Default)]
struct Output {
    shared: Arc<OutputShared>,
}

#[derive(Default)]
struct OutputShared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    closed: bool,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.shared.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.shared.changed.notify_all();
    }

    /// Takes what has gathered, writes it, and so on until the port is gone.
    fn write_to(&self, mut sink: Box<dyn Write + Send>) {
        let mut batch = Vec::new();
        let mut failed = false;
        loop {
            let mut queue = self.lock();
            while queue.bytes.is_empty() {
                if queue.closed {
                    return;
                }
                queue = self.wait(queue);
            }
            batch.clear();
            std::mem::swap(&mut batch, &mut queue.bytes);
            drop(queue);
            self.shared.changed.notify_all();
            if failed {
                continue;
            }
            if let Err(error) = sink.write_all(&batch).and_then(|()| sink.flush()) {
                tracing::warn!(%error, "the serial port's output is lost from here on");
                failed = true;
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut queue = self.lock();
        while queue.bytes.len() >= OUTPUT_LIMIT && !queue.closed {
            queue = self.wait(queue);
        }
        // The writer sleeps only when there is nothing to do.
        let was_empty = queue.bytes.is_empty();
        queue.bytes.extend_from_slice(data);
        drop(queue);
        if was_empty {
            self.shared.changed.notify_all();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl InterruptLine for Count {
        fn pulse(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn set_level(&self, _: bool) {}
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn all_output_is_there_once_the_port_is_gone() {
        let sink = Sink::default();
        let uart = Uart::new(Arc::new(Count::default()), Box::new(sink.clone())).unwrap();
        let text: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
        for byte in &text {
            uart.write(0, &[*byte]);
        }
        let mut status = [0];
        uart.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "always ready for more");
        drop(uart);
        assert_eq!(*sink.0.lock().unwrap(), text);
    }

    #[test]
    fn input_interrupts_and_waits_for_room() {
        let line = Arc::new(Count::default());
        let uart = Uart::new(line.clone(), Box::new(io::sink())).unwrap();
        uart.write(1, &[1]); // interrupt on received data
        let taken = uart.receive(&[b'x'; 100]);
        assert!(taken > 0 && taken < 100, "{taken}");
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
        assert_eq!(uart.receive(b"y"), 0);
        let mut byte = [0];
        uart.read(0, &mut byte);
        assert_eq!(byte, *b"x");
        assert_eq!(uart.receive(b"yz"), 1);
    }

    #[test]
    fn it_looks_like_a_16550a() {
        let uart = Uart::new(Arc::new(Count::default()), Box::new(io::sink())).unwrap();
        let mut byte = [0];
        uart.read(2, &mut byte);
        assert_eq!(byte[0] & 0xc0, 0xc0, "FIFOs");
        uart.write(7, &[0x5a]);
        uart.read(7, &mut byte);
        assert_eq!(byte, [0x5a]);
    }
}
