//! `rep outs`: KVM hands a string that goes to a port over one unit at a time, with an exit for each.
//! What is left of it is read from the guest's memory here, and the instruction brought to its end.
//!
//! At such an exit the registers stand as after the unit, and the instruction pointer at the
//! instruction as long as there is more to do. Only the plain case is taken, in which drivers and
//! firmware move their data: 64-bit code at CPL 0, ascending addresses, no segment named, and no
//! further than to the end of a page. In all others KVM goes on by itself, as slowly as it does.

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;

use crate::{Gpa, GuestMemory, PAGE_SIZE};

/// Flags register: stop after each instruction, descending strings, resume.
const TRAP: u64 = 1 << 8;
const DIRECTION: u64 = 1 << 10;
const RESUME: u64 = 1 << 16;

const PAGE: u64 = PAGE_SIZE as u64;

/// The part of a string that has not gone out yet, up to the end of a page.
pub(super) struct StringOut {
    data: [u8; PAGE_SIZE],
    len: usize,
    /// As they are after it.
    registers: kvm_regs,
}

impl StringOut {
    /// What is left, if the processor's last exit was from such an instruction, with units of `width`
    /// bytes.
    pub(super) fn rest(
        fd: &VcpuFd,
        memory: &GuestMemory,
        width: usize,
    ) -> Result<Option<Self>, kvm_ioctls::Error> {
        let mut registers = fd.get_regs()?;
        if registers.rcx == 0 || registers.rflags & (TRAP | DIRECTION) != 0 {
            return Ok(None);
        }
        let special = fd.get_sregs()?;
        if special.cs.l == 0 || special.ss.dpl != 0 {
            return Ok(None);
        }
        let physical = |address| {
            let translation = fd.translate_gva(address)?;
            Ok::<_, kvm_ioctls::Error>(
                (translation.valid != 0).then_some(Gpa(translation.physical_address)),
            )
        };
        let mut code = [0; 3];
        if registers.rip % PAGE > PAGE - code.len() as u64 {
            return Ok(None);
        }
        let Some(at) = physical(registers.rip)? else { return Ok(None) };
        if memory.read(at, &mut code).is_err() {
            return Ok(None);
        }
        let Some(instruction) = instruction(code, width) else { return Ok(None) };

        let units = ((PAGE - registers.rsi % PAGE) / width as u64).min(registers.rcx);
        let len = units as usize * width;
        let Some(from) = physical(registers.rsi)? else { return Ok(None) };
        let mut data = [0; PAGE_SIZE];
        if len == 0 || data.get_mut(..len).is_none_or(|data| memory.read(from, data).is_err()) {
            return Ok(None);
        }
        registers.rsi = registers.rsi.wrapping_add(len as u64);
        registers.rcx -= units;
        if registers.rcx == 0 {
            registers.rip = registers.rip.wrapping_add(instruction);
            registers.rflags &= !RESUME;
        }
        Ok(Some(Self { data, len, registers }))
    }

    /// The bytes.
    pub(super) fn data(&self) -> &[u8] {
        &self.data[..self.len]
    }

    /// Has the processor go on behind them.
    pub(super) fn commit(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        fd.set_regs(&self.registers)
    }
}

/// The length of the instruction that `code` begins with, if it is `rep outs` for units of `width`
/// bytes without further prefixes.
fn instruction(code: [u8; 3], width: usize) -> Option<u64> {
    const REP: u8 = 0xf3;
    const OPERAND_SIZE: u8 = 0x66;
    const OUTS: u8 = 0x6f;
    match (code, width) {
        ([REP, OUTS, _], 4) => Some(2),
        ([REP, OPERAND_SIZE, OUTS] | [OPERAND_SIZE, REP, OUTS], 2) => Some(3),
        _ => None,
    }
}
