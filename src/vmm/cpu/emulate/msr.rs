//! `rdmsr` and `wrmsr`: EFER, PAT and the three segment bases. Every other MSR raises #GP(0), as
//! a processor without it would.

use crate::vmm::cpu::exceptions::Stop;
use crate::vmm::cpu::{efer, gpr, is_canonical};

use super::{Effect, Step, general_protection, low_u32};

const IA32_PAT: u32 = 0x277;
const EFER: u32 = 0xc000_0080;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Memory types that a PAT entry may have: UC, WC, WT, WP, WB, UC-.
fn is_memory_type(entry: u8) -> bool {
    matches!(entry, 0 | 1 | 4 | 5 | 6 | 7)
}

impl Step<'_> {
    pub(super) fn rdmsr(&mut self) -> Result<Effect, Stop> {
        let value = match low_u32(self.cpu.gpr[gpr::RCX]) {
            IA32_PAT => self.cpu.pat,
            EFER => self.cpu.efer,
            FS_BASE => self.cpu.fs_base,
            GS_BASE => self.cpu.gs_base,
            KERNEL_GS_BASE => self.cpu.kernel_gs_base,
            _ => return Err(general_protection()),
        };
        self.cpu.gpr[gpr::RAX] = value & u64::from(u32::MAX);
        self.cpu.gpr[gpr::RDX] = value >> 32;
        Ok(Effect::None)
    }

    pub(super) fn wrmsr(&mut self) -> Result<Effect, Stop> {
        let low = u64::from(low_u32(self.cpu.gpr[gpr::RAX]));
        let value = low | self.cpu.gpr[gpr::RDX] << 32;
        match low_u32(self.cpu.gpr[gpr::RCX]) {
            IA32_PAT => {
                if !value.to_le_bytes().into_iter().all(is_memory_type) {
                    return Err(general_protection());
                }
                self.cpu.pat = value;
                Ok(Effect::None)
            }
            EFER => self.write_efer(value),
            FS_BASE => {
                self.cpu.fs_base = canonical(value)?;
                Ok(Effect::None)
            }
            GS_BASE => {
                self.cpu.gs_base = canonical(value)?;
                Ok(Effect::None)
            }
            KERNEL_GS_BASE => {
                self.cpu.kernel_gs_base = canonical(value)?;
                Ok(Effect::None)
            }
            _ => Err(general_protection()),
        }
    }

    /// LME and LMA cannot change while paging is on, which it always is.
    fn write_efer(&mut self, value: u64) -> Result<Effect, Stop> {
        let fixed = efer::LME | efer::LMA;
        let mut allowed = fixed | efer::SCE;
        if self.cpu.features.nx {
            allowed |= efer::NXE;
        }
        if value & !allowed != 0 || value & fixed != fixed {
            return Err(general_protection());
        }
        let changed = value ^ self.cpu.efer;
        self.cpu.efer = value;
        Ok(if changed & efer::NXE != 0 { Effect::LoadRoot } else { Effect::None })
    }
}

fn canonical(value: u64) -> Result<u64, Stop> {
    if is_canonical(value) { Ok(value) } else { Err(general_protection()) }
}
