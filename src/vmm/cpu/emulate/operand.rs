//! Operands: registers, and memory with the fault of an address that is none.
//!
//! Guarantee: an operand that is not canonical raises #SS(0) if it lies in the stack segment, and #GP(0)
//! otherwise (Intel SDM Vol. 1, 3.3.7.1). In 64-bit mode that is the segment of what RSP or RBP points
//! to, without FS or GS: overrides by the other four mean nothing (Vol. 2, 2.1.1; Vol. 1, 3.3.4).

use iced_x86::{OpKind, Register};

use crate::shadow_mmu::Access;
use crate::vmm::cpu::exceptions::{Exception, Stop, vector};
use crate::vmm::cpu::memory::AccessError;
use crate::vmm::cpu::{GuestCpu, gpr, is_canonical};

use super::{Step, general_protection, low_u16};

impl Step<'_> {
    /// Linear address of memory operand `operand`.
    pub(super) fn address(&self, operand: u32) -> Result<u64, Stop> {
        let cpu = &self.cpu;
        self.instruction
            .virtual_address(operand, 0, |register, _, _| register_value(cpu, register))
            .ok_or_else(general_protection)
    }

    /// Reads `N` bytes at memory operand `operand`.
    pub(super) fn read_operand<const N: usize>(&self, operand: u32) -> Result<[u8; N], Stop> {
        let address = self.address(operand)?;
        self.read(address, self.is_in_stack_segment())
    }

    /// Reads `N` bytes at RSP.
    pub(super) fn read_stack<const N: usize>(&self) -> Result<[u8; N], Stop> {
        self.read(self.cpu.gpr[gpr::RSP], true)
    }

    /// The 16-bit value of a register-or-memory operand.
    pub(super) fn read_selector(&self, operand: u32) -> Result<u16, Stop> {
        if self.instruction.op_kind(operand) == OpKind::Register {
            let value = general(&self.cpu, self.instruction.op_register(operand));
            return Ok(low_u16(value));
        }
        Ok(u16::from_le_bytes(self.read_operand::<2>(operand)?))
    }

    fn read<const N: usize>(&self, address: u64, in_stack: bool) -> Result<[u8; N], Stop> {
        let mut bytes = [0; N];
        let read = self.memory.read(&self.cpu.paging(), address, &mut bytes, Access::Read);
        read.map_err(|error| match error {
            AccessError::BeyondLimit if in_stack && !is_all_canonical(address, N) => {
                Stop::Inject(Exception::with_code(vector::SS, 0))
            }
            error => error.into(),
        })?;
        Ok(bytes)
    }

    /// Whether the instruction's memory operand lies in the stack segment.
    fn is_in_stack_segment(&self) -> bool {
        let has_base = matches!(self.instruction.segment_prefix(), Register::FS | Register::GS);
        let base = self.instruction.memory_base().full_register();
        !has_base && matches!(base, Register::RSP | Register::RBP)
    }
}

/// Whether no byte of these is at an address that is not canonical.
fn is_all_canonical(address: u64, len: usize) -> bool {
    is_canonical(address) && is_canonical(address.wrapping_add(len as u64 - 1))
}

/// The full 64-bit register behind a general-purpose register; 0 for any other.
pub(super) fn general(cpu: &GuestCpu, register: Register) -> u64 {
    let full = register.full_register();
    if full.is_gpr64() { cpu.gpr.get(full.number()).copied().unwrap_or(0) } else { 0 }
}

/// Registers as address computation wants them: segment bases, and index and base registers.
fn register_value(cpu: &GuestCpu, register: Register) -> Option<u64> {
    match register {
        Register::FS => Some(cpu.fs_base),
        Register::GS => Some(cpu.gs_base),
        _ if register.is_segment_register() => Some(0),
        _ if register.is_gpr64() => Some(general(cpu, register)),
        _ if register.is_gpr32() => Some(general(cpu, register) & u64::from(u32::MAX)),
        _ => None,
    }
}
