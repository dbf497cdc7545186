//! What fuzzers do to a NIC: accesses to its registers in any order, with descriptors and frames of
//! the guest's making. Its cable is plugged into itself, so what it sends it receives.

use std::cell::RefCell;
use std::sync::Arc;

use backends::net::MacAddr;
use backends::net::loopback::Loopback;
use hypervisor::{Gpa, GuestMemory, InterruptLine};

use super::bits::{ctrl, rctl, reg, tctl, txd};
use super::worker::Worker;
use super::{E1000Config, Shared};
use crate::pci::{COMMAND_BUS_MASTER, Decode};

const MEMORY: u64 = 512 << 10;
/// Descriptors of each ring.
const COUNT: u32 = 16;
const TRANSMIT: u32 = 0x1000;
const RECEIVE: u32 = 0x2000;
/// Where frames are, and where they come.
const FRAMES: u32 = 0x1_0000;
const BUFFERS: u32 = 0x2_0000;

/// Registers that are hit more often than by chance.
const REGISTERS: [u32; 32] = [
    reg::CTRL,
    reg::STATUS,
    reg::EECD,
    reg::EERD,
    reg::MDIC,
    reg::VET,
    reg::ICR,
    reg::ITR,
    reg::ICS,
    reg::IMS,
    reg::IMC,
    reg::RCTL,
    reg::TCTL,
    reg::RDBAL,
    reg::RDBAH,
    reg::RDLEN,
    reg::RDH,
    reg::RDT,
    reg::RDTR,
    reg::RADV,
    reg::TDBAL,
    reg::TDBAL + 4,
    reg::TDBAL + 8,
    reg::TDBAL + 16,
    reg::TDT,
    reg::TIDV,
    reg::TADV,
    reg::RXCSUM,
    reg::MTA,
    reg::RA,
    reg::VFTA,
    reg::STATISTICS,
];

struct Silent;

impl InterruptLine for Silent {
    fn pulse(&self) {}

    fn set_level(&self, _: bool) {}
}

/// A NIC without a thread.
struct Rig {
    shared: Arc<Shared>,
    worker: Worker,
    memory: GuestMemory,
}

thread_local! {
    static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) };
}

/// Actions of a byte each, with what they need behind them; [`Rig::act`] says which there are.
pub(crate) fn fuzz(data: &[u8]) {
    RIG.with_borrow_mut(|rig| {
        if rig.is_none() {
            *rig = Rig::new();
        }
        // Without io_uring there is nothing to see.
        let Some(rig) = rig else { return };
        rig.begin();
        let mut data = data;
        while let Some((what, rest)) = data.split_first() {
            let Some(rest) = rig.act(*what, rest) else { break };
            data = rest;
        }
        // Whatever that was, a driver that starts again has a NIC that works.
        rig.begin();
        rig.sends_and_receives();
    });
}

impl Rig {
    fn new() -> Option<Self> {
        let memory = GuestMemory::new(MEMORY).ok()?;
        let config = E1000Config {
            address: MacAddr([2, 0, 0, 0, 0, 7]),
            mtu: 9000,
            network: Arc::new(Loopback::new()),
        };
        let decode = Arc::new(Decode::fixed(COMMAND_BUS_MASTER));
        let shared = Arc::new(Shared::new(&config, decode, Arc::new(Silent)).ok()?);
        let network = &*config.network;
        let worker = Worker::new(Arc::clone(&shared), memory.clone(), network, config.mtu).ok()?;
        Some(Self { shared, worker, memory })
    }

    /// Resets the NIC and sets it up as a driver does.
    fn begin(&mut self) {
        self.shared.write(reg::CTRL, ctrl::RST);
        (0..4).for_each(|_| self.step());
        self.shared.read(reg::ICR);
        for (base, ring) in [(reg::TDBAL, TRANSMIT), (reg::RDBAL, RECEIVE)] {
            self.shared.write(base, ring);
            self.shared.write(base + 8, COUNT * 16);
        }
        for index in 0..COUNT {
            self.descriptor(TRANSMIT, index, (FRAMES + index * 0x800).into(), 0);
            self.descriptor(RECEIVE, index, (BUFFERS + index * 0x800).into(), 0);
        }
        self.shared.write(reg::RDT, COUNT - 1);
        self.shared.write(reg::RCTL, rctl::EN | rctl::UPE | rctl::MPE | rctl::BAM | rctl::SECRC);
        self.shared.write(reg::TCTL, tctl::EN);
    }

    fn descriptor(&self, ring: u32, index: u32, low: u64, high: u64) {
        let at = u64::from(ring + index % COUNT * 16);
        self.memory.write_obj(Gpa(at), &low).expect("rings are in RAM");
        self.memory.write_obj(Gpa(at + 8), &high).expect("rings are in RAM");
    }

    fn step(&mut self) {
        self.worker.step().expect("io_uring works");
    }

    fn act<'a>(&mut self, what: u8, data: &'a [u8]) -> Option<&'a [u8]> {
        let register = REGISTERS[usize::from(what >> 3)];
        match what & 7 {
            // A register's value.
            0 => {
                let (value, rest) = data.split_first_chunk()?;
                self.shared.write(register, u32::from_le_bytes(*value));
                Some(rest)
            }
            // A small one: tails, and bits.
            1 => {
                let (value, rest) = data.split_first()?;
                self.shared.write(register, (*value).into());
                Some(rest)
            }
            2 => {
                self.shared.read(register);
                Some(data)
            }
            // Any register.
            3 => {
                let ([low, high, value @ ..], rest) = data.split_first_chunk::<6>()?;
                let offset = u32::from(u16::from_le_bytes([*low, *high])) << 1 & !3;
                self.shared.write(offset, u32::from_le_bytes(*value));
                self.shared.read(offset);
                Some(rest)
            }
            // A descriptor of either ring.
            4 => {
                let ([index, descriptor @ ..], rest) = data.split_first_chunk::<17>()?;
                let (halves, _) = descriptor.as_chunks::<8>();
                let [low, high] = <[[u8; 8]; 2]>::try_from(halves).ok()?.map(u64::from_le_bytes);
                let ring = if index & 0x80 == 0 { TRANSMIT } else { RECEIVE };
                self.descriptor(ring, u32::from(*index), low, high);
                Some(rest)
            }
            // A part of a frame.
            5 => {
                let ([place, len], rest) = data.split_first_chunk()?;
                let (bytes, rest) = rest.split_at(rest.len().min(usize::from(*len)));
                let at = u64::from(FRAMES) + u64::from(*place) * 64;
                self.memory.write(Gpa(at), bytes).expect("frames are in RAM");
                Some(rest)
            }
            // A frame of one descriptor.
            6 => {
                let (len, rest) = data.split_first()?;
                let tail = self.shared.read(reg::TDT);
                let command = txd::EOP | txd::RS | what >> 3 & (txd::IC | txd::DEXT);
                let high = u64::from(command) << 24 | u64::from(*len) << 3;
                self.descriptor(TRANSMIT, tail, (FRAMES + 0x40).into(), high);
                self.shared.write(reg::TDT, (tail + 1) % COUNT);
                Some(rest)
            }
            _ => {
                self.step();
                Some(data)
            }
        }
    }

    fn sends_and_receives(&mut self) {
        let frame =
            *b"\x02\0\0\0\0\x07\x02\0\0\0\0\x01\x88\xb5 the NIC is as good as new: it sends this";
        self.memory.write(Gpa(FRAMES.into()), &frame).expect("frames are in RAM");
        let command = u64::from(txd::EOP | txd::RS) << 24;
        self.descriptor(TRANSMIT, 0, FRAMES.into(), command | frame.len() as u64);
        let head = self.shared.read(reg::RDH);
        self.shared.write(reg::TDT, 1);
        (0..4).for_each(|_| self.step());
        assert_eq!(self.shared.read(reg::TDH), 1);
        // What was still on the cable may have come first; what came last is this.
        let last = (self.shared.read(reg::RDH) + COUNT - 1) % COUNT;
        assert_ne!(self.shared.read(reg::RDH), head);
        let mut came = [0; 52];
        let at = u64::from(BUFFERS + last * 0x800);
        self.memory.read(Gpa(at), &mut came).expect("buffers are in RAM");
        assert_eq!(came[..], frame[..came.len()]);
    }
}
