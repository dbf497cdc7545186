use super::*;

#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

impl Device for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

struct Bus {
    ports: ConfigPorts,
    reset: Arc<Recorder>,
    decode: Arc<Decode>,
}

impl Bus {
    fn new() -> Self {
        let reset = Arc::new(Recorder::default());
        let mut ports = ConfigPorts::new(Arc::clone(&reset) as _);
        let decode = chipset::populate(&mut ports);
        Self { ports, reset, decode }
    }

    fn select(&self, function: u8, register: u8) {
        let address = 1_u32 << 31 | u32::from(function) << 8 | u32::from(register & 0xfc);
        self.ports.write(0, &address.to_le_bytes());
    }

    fn read(&self, function: u8, register: u8) -> u32 {
        self.select(function, register);
        let mut data = [0xff; 4];
        self.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, function: u8, register: u8, value: u32) {
        self.select(function, register);
        self.ports.write(4, &value.to_le_bytes());
    }
}

const IDE: u8 = 1 << 3 | 1;

#[test]
fn the_chips_are_there_and_nothing_else() {
    let bus = Bus::new();
    let found: Vec<_> = (0..=255)
        .map(|function| (function, bus.read(function, 0)))
        .filter(|(_, id)| *id != u32::MAX)
        .collect();
    let expected = [(0, 0x1237_8086), (8, 0x7110_8086), (9, 0x7111_8086), (11, 0x7113_8086)];
    assert_eq!(found, expected);
    assert_eq!(bus.read(IDE, 8) >> 8, 0x01_0180);
    assert_eq!(bus.read(8, 0x0c) >> 16 & 0xff, 0x80, "several functions");
    assert_eq!(bus.read(0, 0x0c) >> 16 & 0xff, 0, "one function");
}

#[test]
fn the_address_register_is_found_and_its_bytes_are_another_device() {
    let bus = Bus::new();
    bus.ports.write(0, &0x8000_0000_u32.to_le_bytes());
    let mut data = [0; 4];
    bus.ports.read(0, &mut data);
    assert_eq!(data, 0x8000_0000_u32.to_le_bytes());
    bus.ports.write(1, &[6]);
    assert_eq!(*bus.reset.0.lock().unwrap(), [(0, vec![6])]);
    bus.ports.read(0, &mut data);
    assert_eq!(data, 0x8000_0000_u32.to_le_bytes());
    // Without the enable bit, or on another bus, there is nothing.
    for address in [0_u32, 0x8001_0000] {
        bus.ports.write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        bus.ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}

#[test]
fn bars_are_sized_and_moved() {
    let bus = Bus::new();
    assert_eq!(bus.decode.base(), Some(0xc000));
    bus.write(IDE, 0x20, u32::MAX);
    assert_eq!(bus.read(IDE, 0x20), 0xfff1, "16 ports, 16 bits");
    bus.write(IDE, 0x20, 0xd340);
    assert_eq!((bus.read(IDE, 0x20), bus.decode.base()), (0xd341, Some(0xd340_u32)));
    assert!(!bus.decode.is_bus_master());
    bus.write(IDE, 4, 4);
    assert_eq!((bus.decode.is_bus_master(), bus.decode.base()), (true, None));
    for n in [0, 1, 2, 3, 5] {
        bus.write(IDE, 0x10 + 4 * n, u32::MAX);
        assert_eq!(bus.read(IDE, 0x10 + 4 * n), 0, "there is no BAR {n}");
    }
    // What is fixed stays so.
    bus.write(IDE, 0, 0);
    assert_eq!(bus.read(IDE, 0), 0x7111_8086);
}

#[test]
fn the_window_follows_the_bar() {
    let bus = Bus::new();
    let device = Arc::new(Recorder::default());
    let mut window = IoWindow::default();
    window.add(Arc::clone(&bus.decode), 16, Arc::clone(&device) as _);
    window.write(2, &[1]);
    bus.write(IDE, 0x20, 0xfff0);
    window.write(2, &[2]);
    window.write(0x3ff4, &[3; 4]);
    window.write(0x3ffe, &[4; 4]);
    // Below the window, so out of the guest's reach.
    bus.write(IDE, 0x20, 0x1230);
    window.write(0x230, &[5]);
    assert_eq!(*device.0.lock().unwrap(), [(2, vec![1]), (4, vec![3; 4])]);
    let mut data = [0xff];
    window.read(0, &mut data);
    assert_eq!(data, [0xff]);
}

#[test]
fn memory_ranges_are_sized_and_found() {
    let mut ports = ConfigPorts::new(Arc::new(Recorder::default()));
    let base = layout::PCI_MMIO_START.0 as u32;
    let (function, decode) = Function::new(1, 2, 0x02_0000, 0).with_memory(0, base, 0x2_0000);
    let mut function = function.with_pin(irq_of(4));
    function.allow(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    ports.add(4, 0, function);
    let bus = Bus { ports, reset: Arc::default(), decode };
    let device = Arc::new(Recorder::default());
    let mut window = MemoryWindow::default();
    window.add(Arc::clone(&bus.decode), 0x2_0000, Arc::clone(&device) as _);

    window.write(0, &[1]);
    assert_eq!(bus.read(4 << 3, 0x3c), 0x0100 | u32::from(irq_of(4)));
    bus.write(4 << 3, 0x10, u32::MAX);
    assert_eq!(bus.read(4 << 3, 0x10), 0xfffe_0000);
    bus.write(4 << 3, 0x10, base + 0x4_0000);
    bus.write(4 << 3, 4, COMMAND_MEMORY.into());
    window.write(0, &[2]);
    window.write(0x4_0010, &[3; 4]);
    window.write(0x5_fffe, &[4; 4]);
    assert_eq!(*device.0.lock().unwrap(), [(0x10, vec![3; 4])]);
}
