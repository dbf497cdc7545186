//! The synthetic registers of Hyper-V (TLFS appendix C), as we serve them where no kernel does.
//!
//! A plain state machine: a register and a value go in, and what is to be done about it comes out
//! as an [`Action`]. The clocks ([`crate::reference_time`]) and the timers ([`crate::timers`]) are
//! apart from it; whoever serves a processor puts the three together.
//!
//! What a guest does wrong gives it a general protection fault, as it would get from Hyper-V.

use crate::Gpa;
use crate::VpIndex;
use crate::synic::Sint;
use crate::synic::pages::{ENABLE, PageRegisters, page_of};

/// The registers' numbers (TLFS appendix C; Linux: `asm/hyperv-tlfs.h`).
pub(crate) mod msr {
    /// The first of the numbers that belong to Hyper-V.
    pub(crate) const FIRST: u32 = 0x4000_0000;
    /// How many they are.
    pub(crate) const COUNT: u32 = 0x200;

    pub(crate) const GUEST_OS_ID: u32 = 0x4000_0000;
    pub(crate) const HYPERCALL: u32 = 0x4000_0001;
    pub(crate) const VP_INDEX: u32 = 0x4000_0002;
    pub(crate) const RESET: u32 = 0x4000_0003;
    pub(crate) const TIME_REF_COUNT: u32 = 0x4000_0020;
    pub(crate) const REFERENCE_TSC: u32 = 0x4000_0021;
    pub(crate) const TSC_FREQUENCY: u32 = 0x4000_0022;
    pub(crate) const APIC_FREQUENCY: u32 = 0x4000_0023;
    pub(crate) const VP_ASSIST_PAGE: u32 = 0x4000_0073;
    pub(crate) const SCONTROL: u32 = 0x4000_0080;
    pub(crate) const SVERSION: u32 = 0x4000_0081;
    pub(crate) const SIEFP: u32 = 0x4000_0082;
    pub(crate) const SIMP: u32 = 0x4000_0083;
    pub(crate) const EOM: u32 = 0x4000_0084;
    pub(crate) const SINT0: u32 = 0x4000_0090;
    pub(crate) const SINT15: u32 = 0x4000_009f;
    pub(crate) const STIMER0_CONFIG: u32 = 0x4000_00b0;
    pub(crate) const STIMER3_COUNT: u32 = 0x4000_00b7;
    pub(crate) const CRASH_P0: u32 = 0x4000_0100;
    pub(crate) const CRASH_P4: u32 = 0x4000_0104;
    pub(crate) const CRASH_CTL: u32 = 0x4000_0105;
}

/// In HV_X64_MSR_HYPERCALL: the page cannot be moved any more.
const LOCKED: u64 = 2;

/// In a SINT register: nothing comes in.
const SINT_MASKED: u64 = 1 << 16;
/// The interrupt ends by itself.
const SINT_AUTO_EOI: u64 = 1 << 17;
/// No interrupt is raised; the guest looks for itself.
const SINT_POLLING: u64 = 1 << 18;
/// The lowest vector that is no exception or reserved.
pub(crate) const FIRST_VECTOR: u8 = 16;

/// In HV_X64_MSR_CRASH_CTL: the guest has crashed; when read, that it may say so.
const CRASH_NOTIFY: u64 = 1 << 63;

/// The version of the SynIC, `HV_SYNIC_VERSION`.
const SYNIC_VERSION: u64 = 1;

/// A guest's access that faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GeneralProtection;

/// What a write asks for beyond the register itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing.
    None,
    /// Write the hypercall page here.
    HypercallPage(Gpa),
    /// Write the reference TSC page here.
    ReferenceTscPage(Gpa),
    /// Clear this page.
    Clear(Gpa),
    /// SIMP, SIEFP or SCONTROL may have changed: [`VpRegisters::pages`].
    Pages,
    /// A SINT has changed: [`VpRegisters::sint`].
    Sint(Sint),
    /// The guest has emptied a message slot in which it was asked to say so.
    EndOfMessage,
    /// The guest has crashed; [`PartitionRegisters::crash`] says more.
    Crash,
    /// The guest wants to be started anew.
    Reset,
}

/// What the registers have to know of the partition's memory.
pub(crate) trait Memory {
    /// Whether there is RAM at this page.
    fn is_ram(&self, page: Gpa) -> bool;
}

/// The registers that all processors share.
#[derive(Clone, Debug, Default)]
pub(crate) struct PartitionRegisters {
    guest_os_id: u64,
    hypercall: u64,
    reference_tsc: u64,
    crash: [u64; 5],
}

impl PartitionRegisters {
    /// HV_X64_MSR_CRASH_P0 and the four after it.
    pub(crate) fn crash(&self) -> [u64; 5] {
        self.crash
    }

    fn crash_parameter(&mut self, register: u32) -> Option<&mut u64> {
        self.crash.get_mut(register.checked_sub(msr::CRASH_P0)? as usize)
    }

    /// `None` for a register that is not of these.
    fn read(&self, register: u32) -> Option<u64> {
        Some(match register {
            msr::GUEST_OS_ID => self.guest_os_id,
            msr::HYPERCALL => self.hypercall,
            msr::REFERENCE_TSC => self.reference_tsc,
            msr::RESET => 0,
            msr::CRASH_P0..=msr::CRASH_P4 => self.crash[(register - msr::CRASH_P0) as usize],
            msr::CRASH_CTL => CRASH_NOTIFY,
            _ => return None,
        })
    }

    /// `None` for a register that is not of these.
    fn write(
        &mut self,
        register: u32,
        value: u64,
        memory: &impl Memory,
    ) -> Option<Result<Action, GeneralProtection>> {
        let page = page_of(value);
        Some(match register {
            msr::GUEST_OS_ID => {
                self.guest_os_id = value;
                if value == 0 {
                    self.hypercall &= !ENABLE;
                }
                Ok(Action::None)
            }
            msr::HYPERCALL if self.hypercall & LOCKED != 0 => Err(GeneralProtection),
            // Who has not said who they are get no page.
            msr::HYPERCALL if self.guest_os_id == 0 => Ok(Action::None),
            msr::HYPERCALL if value & ENABLE == 0 => {
                self.hypercall = value;
                Ok(Action::None)
            }
            msr::HYPERCALL if !memory.is_ram(page) => Err(GeneralProtection),
            msr::HYPERCALL => {
                self.hypercall = value;
                Ok(Action::HypercallPage(page))
            }
            msr::REFERENCE_TSC => {
                self.reference_tsc = value;
                // Where there is no RAM, there is no page; that is all.
                let there = value & ENABLE != 0 && memory.is_ram(page);
                Ok(if there { Action::ReferenceTscPage(page) } else { Action::None })
            }
            msr::RESET => Ok(if value & 1 != 0 { Action::Reset } else { Action::None }),
            msr::CRASH_P0..=msr::CRASH_P4 => {
                if let Some(parameter) = self.crash_parameter(register) {
                    *parameter = value;
                }
                Ok(Action::None)
            }
            msr::CRASH_CTL if value & CRASH_NOTIFY != 0 => Ok(Action::Crash),
            msr::CRASH_CTL => Ok(Action::None),
            _ => return None,
        })
    }
}

/// How a SINT delivers what comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SintState(u64);

impl SintState {
    /// Messages and flags may be posted.
    pub(crate) fn is_open(self) -> bool {
        self.0 & SINT_MASKED == 0
    }

    /// The interrupt to raise, if any.
    pub(crate) fn vector(self) -> Option<u8> {
        let vector = self.0 as u8;
        (self.is_open() && self.0 & SINT_POLLING == 0 && vector >= FIRST_VECTOR).then_some(vector)
    }

    /// The guest does not end what this raises.
    pub(crate) fn wants_auto_eoi(self) -> bool {
        self.is_open() && self.0 & SINT_AUTO_EOI != 0
    }
}

/// One processor's own registers.
#[derive(Clone, Debug)]
pub(crate) struct VpRegisters {
    index: VpIndex,
    assist_page: u64,
    pages: PageRegisters,
    sints: [u64; Sint::COUNT as usize],
}

impl VpRegisters {
    /// As they are at power-on.
    pub(crate) fn new(index: VpIndex) -> Self {
        let sints = [SINT_MASKED; Sint::COUNT as usize];
        Self { index, assist_page: 0, pages: PageRegisters::default(), sints }
    }

    /// SCONTROL, SIMP and SIEFP.
    pub(crate) fn pages(&self) -> PageRegisters {
        self.pages
    }

    /// A SINT's register.
    pub(crate) fn sint(&self, sint: Sint) -> SintState {
        SintState(self.sints.get(usize::from(sint.index())).copied().unwrap_or(SINT_MASKED))
    }

    /// A read of one of these or of the `partition`'s.
    pub(crate) fn read(
        &self,
        partition: &PartitionRegisters,
        register: u32,
    ) -> Result<u64, GeneralProtection> {
        if let Some(value) = partition.read(register) {
            return Ok(value);
        }
        Ok(match register {
            msr::VP_INDEX => self.index.0.into(),
            msr::VP_ASSIST_PAGE => self.assist_page,
            msr::SCONTROL => self.pages.control,
            msr::SVERSION => SYNIC_VERSION,
            msr::SIEFP => self.pages.event_page,
            msr::SIMP => self.pages.message_page,
            msr::EOM => 0,
            msr::SINT0..=msr::SINT15 => self.sints[(register - msr::SINT0) as usize],
            _ => return Err(GeneralProtection),
        })
    }

    /// A write of one of these or of the `partition`'s. A fault leaves all as it was.
    pub(crate) fn write(
        &mut self,
        partition: &mut PartitionRegisters,
        register: u32,
        value: u64,
        memory: &impl Memory,
    ) -> Result<Action, GeneralProtection> {
        if let Some(result) = partition.write(register, value, memory) {
            return result;
        }
        let enabled = value & ENABLE != 0;
        let no_page = enabled && !memory.is_ram(page_of(value));
        match register {
            msr::VP_ASSIST_PAGE | msr::SIEFP | msr::SIMP if no_page => Err(GeneralProtection),
            msr::VP_ASSIST_PAGE => {
                let new = enabled && self.assist_page != value;
                self.assist_page = value;
                Ok(if new { Action::Clear(page_of(value)) } else { Action::None })
            }
            msr::SCONTROL => {
                self.pages.control = value;
                Ok(Action::Pages)
            }
            msr::SIEFP => {
                self.pages.event_page = value;
                Ok(Action::Pages)
            }
            msr::SIMP => {
                self.pages.message_page = value;
                Ok(Action::Pages)
            }
            msr::EOM => Ok(Action::EndOfMessage),
            msr::SINT0..=msr::SINT15 => {
                let index = (register - msr::SINT0) as u8;
                // A masked SINT may have any vector; guests mask with 0x10000.
                if value & SINT_MASKED == 0 && (value as u8) < FIRST_VECTOR {
                    return Err(GeneralProtection);
                }
                self.sints[usize::from(index)] = value;
                Ok(Sint::new(index).map_or(Action::None, Action::Sint))
            }
            _ => Err(GeneralProtection),
        }
    }
}

#[cfg(test)]
mod tests;
