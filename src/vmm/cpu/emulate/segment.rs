//! Descriptor tables, the task register, and the segment changes that trap: `lgdt`, `lidt`,
//! `ltr`, `lldt`, `mov ss` and `iretq`.
//!
//! A guest has one flat code segment and one flat data segment, whatever its own GDT says. Its
//! GDT matters only to `ltr`, which finds the TSS there that holds the interrupt stacks.

use iced_x86::Mnemonic;

use crate::shadow_mmu::Access;
use crate::vmm::cpu::exceptions::{Exception, Stop, vector};
use crate::vmm::cpu::{DescriptorTable, GUEST_SS, TaskRegister, gpr, is_canonical, rflags};
use crate::vmm::error::GuestError;

use super::{Effect, Step, general_protection, low_u16};

/// Descriptor type: available 64-bit TSS.
const TSS_AVAILABLE: u8 = 0x9;
/// Bit that makes it a busy one.
const TSS_BUSY: u8 = 0x2;

impl Step<'_> {
    pub(super) fn load_descriptor_table(&mut self) -> Result<Effect, Stop> {
        let raw = self.read_operand::<10>(0)?;
        let limit = u16::from_le_bytes([raw[0], raw[1]]);
        let base =
            u64::from_le_bytes([raw[2], raw[3], raw[4], raw[5], raw[6], raw[7], raw[8], raw[9]]);
        if !is_canonical(base) {
            return Err(general_protection());
        }
        let table = DescriptorTable { base, limit };
        if self.instruction.mnemonic() == Mnemonic::Lgdt {
            self.cpu.gdtr = table;
        } else {
            self.cpu.idtr = table;
        }
        Ok(Effect::None)
    }

    pub(super) fn ltr(&mut self) -> Result<Effect, Stop> {
        let selector = self.read_selector(0)?;
        let code = u32::from(selector & !3);
        let refuse = |vector| Stop::Inject(Exception::with_code(vector, code));
        if code == 0 {
            return Err(general_protection());
        }
        let offset = u64::from(selector & !7);
        if selector & 4 != 0 || offset + 15 > u64::from(self.cpu.gdtr.limit) {
            return Err(refuse(vector::GP));
        }
        let address = self.cpu.gdtr.base.wrapping_add(offset);
        let paging = self.cpu.paging();
        let mut raw = [0u8; 16];
        self.memory.read(&paging, address, &mut raw, Access::Read)?;
        if raw[5] & 0x1f != TSS_AVAILABLE {
            return Err(refuse(vector::GP));
        }
        if raw[5] & 0x80 == 0 {
            return Err(refuse(vector::NP));
        }
        let base =
            u64::from_le_bytes([raw[2], raw[3], raw[4], raw[7], raw[8], raw[9], raw[10], raw[11]]);
        if !is_canonical(base) {
            return Err(refuse(vector::GP));
        }
        let limit = u32::from_le_bytes([raw[0], raw[1], raw[6] & 0xf, 0]);
        let is_pages = raw[6] & 0x80 != 0;
        let limit = if is_pages { limit << 12 | 0xfff } else { limit };
        self.memory.write(&paging, address.wrapping_add(5), &[raw[5] | TSS_BUSY])?;
        self.cpu.task = TaskRegister { selector, base, limit };
        Ok(Effect::None)
    }

    /// There is no local table: only the null selector, which says so, can be loaded.
    pub(super) fn lldt(&mut self) -> Result<Effect, Stop> {
        if self.read_selector(0)? & !3 == 0 {
            return Ok(Effect::None);
        }
        Err(GuestError::UnsupportedInstruction { instruction: self.disassembly() }.into())
    }

    /// A null SS is what a 64-bit kernel may load and CPL 3 may not. The guest keeps its flat
    /// stack segment; any other selector that got here is not the guest's own.
    pub(super) fn mov_to_ss(&mut self, error_code: u32) -> Result<Effect, Stop> {
        let selector = self.read_selector(1)?;
        if selector & !3 == 0 || selector & !3 == GUEST_SS & !3 {
            return Ok(Effect::None);
        }
        Err(Stop::Inject(Exception::general_protection(error_code)))
    }

    /// `iretq` to selectors other than the guest's own: its segments are flat all the same.
    pub(super) fn iretq(&mut self) -> Result<Effect, Stop> {
        if self.cpu.rflags & rflags::NT != 0 {
            return Err(general_protection());
        }
        let raw = self.read_stack::<40>()?;
        let mut words = [0u64; 5];
        for (word, bytes) in words.iter_mut().zip(raw.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        }
        let [rip, cs, flags, rsp, _ss] = words;
        // The null selector cannot be a code segment; RIP must be canonical.
        if low_u16(cs) & !3 == 0 || !is_canonical(rip) {
            return Err(general_protection());
        }
        self.cpu.rip = rip;
        self.cpu.rflags = (flags & rflags::GUEST) | rflags::ALWAYS;
        self.cpu.gpr[gpr::RSP] = rsp;
        Ok(Effect::None)
    }
}
