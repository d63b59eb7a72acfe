//! `in` and `out`, and their string forms.
//!
//! A repeated string goes an element at a time: the instruction stays where it is until RCX is 0, so
//! that nothing waits for a guest's count, and a fault finds the registers as of the last element.

use iced_x86::{OpKind, Register};

use crate::shadow_mmu::Access;
use crate::vmm::cpu::exceptions::Stop;
use crate::vmm::cpu::{GuestCpu, gpr, rflags};

use super::{Destination, Effect, PortWidth, Step, general_protection, low_u16, low_u32};

impl Step<'_> {
    pub(super) fn port_in(&mut self) -> Result<Effect, Stop> {
        let width = accumulator_width(self.instruction.op0_register())?;
        Ok(Effect::PortRead { port: self.port(1), width, into: Destination::Accumulator })
    }

    pub(super) fn port_out(&mut self) -> Result<Effect, Stop> {
        let width = accumulator_width(self.instruction.op1_register())?;
        let value = low_u32(self.cpu.gpr[gpr::RAX]) & width.mask();
        Ok(Effect::PortWrite { port: self.port(0), width, value })
    }

    /// `ins`: one element from port DX to ES:RDI. Whether it may be written there is known before the
    /// port is read.
    pub(super) fn port_in_string(&mut self, width: PortWidth) -> Result<Effect, Stop> {
        if self.is_repeated_in_vain() {
            return Ok(Effect::None);
        }
        let address = self.address(0)?;
        self.memory.check_write(&self.cpu.paging(), address, width.bytes())?;
        self.next_element(gpr::RDI, width);
        let port = low_u16(self.cpu.gpr[gpr::RDX]);
        Ok(Effect::PortRead { port, width, into: Destination::Memory(address) })
    }

    /// `outs`: one element from RSI to port DX.
    pub(super) fn port_out_string(&mut self, width: PortWidth) -> Result<Effect, Stop> {
        if self.is_repeated_in_vain() {
            return Ok(Effect::None);
        }
        let address = self.address(1)?;
        let mut bytes = [0; 4];
        let element = &mut bytes[..width.bytes()];
        self.memory.read(&self.cpu.paging(), address, element, Access::Read)?;
        self.next_element(gpr::RSI, width);
        let port = low_u16(self.cpu.gpr[gpr::RDX]);
        Ok(Effect::PortWrite { port, width, value: u32::from_le_bytes(bytes) })
    }

    fn is_repeated(&self) -> bool {
        self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix()
    }

    fn is_repeated_in_vain(&self) -> bool {
        self.is_repeated() && self.cpu.gpr[gpr::RCX] & self.string_mask() == 0
    }

    /// What counts of the index and count registers: 32 bits with an address-size prefix.
    fn string_mask(&self) -> u64 {
        let has_32_bits = (0..2).any(|operand| {
            matches!(self.instruction.op_kind(operand), OpKind::MemorySegESI | OpKind::MemoryESEDI)
        });
        if has_32_bits { u64::from(u32::MAX) } else { u64::MAX }
    }

    /// Moves `index` past an element, and counts it.
    fn next_element(&mut self, index: usize, width: PortWidth) {
        let mask = self.string_mask();
        let bytes = width.bytes() as u64;
        let is_downward = self.cpu.rflags & rflags::DF != 0;
        let register = &mut self.cpu.gpr[index];
        let moved =
            if is_downward { register.wrapping_sub(bytes) } else { register.wrapping_add(bytes) };
        *register = moved & mask;
        if self.is_repeated() {
            let count = &mut self.cpu.gpr[gpr::RCX];
            *count = count.wrapping_sub(1) & mask;
            if *count != 0 {
                self.cpu.rip = self.instruction.ip();
            }
        }
    }

    fn port(&self, operand: u32) -> u16 {
        if self.instruction.op_kind(operand) == OpKind::Immediate8 {
            u16::from(self.instruction.immediate8())
        } else {
            low_u16(self.cpu.gpr[gpr::RDX])
        }
    }
}

fn accumulator_width(register: Register) -> Result<PortWidth, Stop> {
    PortWidth::from_bytes(register.size()).ok_or_else(general_protection)
}

impl GuestCpu {
    /// Puts the value of an `in` where the instruction wants it: AL and AX keep the rest of RAX,
    /// EAX clears its upper half.
    pub fn complete_port_read(&mut self, width: PortWidth, value: u32) {
        let value = u64::from(value & width.mask());
        let rax = &mut self.gpr[gpr::RAX];
        *rax = match width {
            PortWidth::Byte | PortWidth::Word => (*rax & !u64::from(width.mask())) | value,
            PortWidth::Dword => value,
        };
    }
}
