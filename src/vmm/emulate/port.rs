//! `in` and `out`. The string forms are not supported.

use iced_x86::{OpKind, Register};

use super::super::cpu::{GuestCpu, gpr};
use super::super::exceptions::Stop;
use super::{Effect, PortWidth, Step, general_protection, low_u16, low_u32};

impl Step<'_> {
    pub(super) fn port_in(&mut self) -> Result<Effect, Stop> {
        let width = accumulator_width(self.instruction.op0_register())?;
        Ok(Effect::PortRead { port: self.port(1), width })
    }

    pub(super) fn port_out(&mut self) -> Result<Effect, Stop> {
        let width = accumulator_width(self.instruction.op1_register())?;
        let value = low_u32(self.cpu.gpr[gpr::RAX]) & width.mask();
        Ok(Effect::PortWrite { port: self.port(0), width, value })
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
