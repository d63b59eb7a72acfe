//! Control registers: `mov` to and from CR0, CR2, CR3, CR4, and `clts`, `lmsw`, `xsetbv`, `invlpg`.
//!
//! Values that hardware refuses are refused with #GP(0), by the rules for 64-bit mode without
//! PCID and with 4-level paging (Intel SDM Vol. 3, 2.5 and Vol. 2, MOV to control registers).

use iced_x86::Register;

use crate::addr::Gva;
use crate::vmm::cpu::exceptions::Stop;
use crate::vmm::cpu::memory::is_usable;
use crate::vmm::cpu::{cr0, cr4, gpr};
use crate::vmm::error::GuestError;

use super::absent::undefined;
use super::operand::general;
use super::{Effect, Step, general_protection, low_u32};

/// CR0 bits that exist; the other low ones are ignored when written, the high ones refused.
const CR0_KNOWN: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// CR4 bits whose change flushes the TLB (Intel SDM Vol. 3, 5.10.4.1).
const CR4_FLUSHES: u64 = cr4::PSE | cr4::PAE | cr4::PGE;

impl Step<'_> {
    pub(super) fn mov_from_control(
        &mut self,
        target: Register,
        source: Register,
    ) -> Result<Effect, Stop> {
        let value = match source {
            Register::CR0 => self.cpu.cr0,
            Register::CR2 => self.cpu.cr2,
            Register::CR3 => self.cpu.cr3,
            Register::CR4 => self.cpu.cr4,
            _ => return Err(self.unsupported()),
        };
        if let Some(register) = self.cpu.gpr.get_mut(target.number()) {
            *register = value;
        }
        Ok(Effect::None)
    }

    pub(super) fn mov_to_control(
        &mut self,
        target: Register,
        source: Register,
    ) -> Result<Effect, Stop> {
        let value = general(&self.cpu, source);
        match target {
            Register::CR0 => self.write_cr0(value),
            Register::CR2 => {
                self.cpu.cr2 = value;
                Ok(Effect::None)
            }
            Register::CR3 => self.write_cr3(value),
            Register::CR4 => self.write_cr4(value),
            _ => Err(self.unsupported()),
        }
    }

    pub(super) fn clts(&mut self) -> Result<Effect, Stop> {
        self.cpu.cr0 &= !cr0::TS;
        Ok(Effect::None)
    }

    pub(super) fn invlpg(&mut self) -> Result<Effect, Stop> {
        let address = self.address(0)?;
        // An address that can have no translation needs no flush; `invlpg` itself never faults.
        if !is_usable(address, 1) {
            return Ok(Effect::None);
        }
        Ok(Effect::FlushPage(Gva::new(address)))
    }

    fn write_cr0(&mut self, value: u64) -> Result<Effect, Stop> {
        let no_write_through_uncached = value & cr0::NW != 0 && value & cr0::CD == 0;
        // Clearing PG while in 64-bit mode is refused by hardware, too.
        let leaves_paging = value & cr0::PG == 0 || value & cr0::PE == 0;
        if value >> 32 != 0 || no_write_through_uncached || leaves_paging {
            return Err(general_protection());
        }
        let new = (value & CR0_KNOWN) | cr0::ET;
        let changed = new ^ self.cpu.cr0;
        self.cpu.cr0 = new;
        Ok(if changed & cr0::WP != 0 { Effect::LoadRoot } else { Effect::None })
    }

    fn write_cr3(&mut self, value: u64) -> Result<Effect, Stop> {
        let bits = self.cpu.features.phys_bits.clamp(32, 52);
        if value >> bits != 0 {
            return Err(general_protection());
        }
        self.cpu.cr3 = value;
        Ok(Effect::LoadRoot)
    }

    fn write_cr4(&mut self, value: u64) -> Result<Effect, Stop> {
        if value & !self.cpu.features.cr4() != 0 || value & cr4::PAE == 0 {
            return Err(general_protection());
        }
        let changed = value ^ self.cpu.cr4;
        self.cpu.cr4 = value;
        Ok(if changed & CR4_FLUSHES != 0 { Effect::LoadRoot } else { Effect::None })
    }

    /// Bits 3..0 of CR0; PE cannot be cleared this way (Intel SDM Vol. 2, LMSW).
    pub(super) fn lmsw(&mut self) -> Result<Effect, Stop> {
        const LOW: u64 = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
        let word = u64::from(self.read_selector(0)?);
        self.write_cr0(self.cpu.cr0 & !LOW | word & LOW | cr0::PE)
    }

    /// XCR0 is what it is at entry: that value may be written, so that a kernel that sets up XSAVE as
    /// usual can do so.
    pub(super) fn xsetbv(&mut self) -> Result<Effect, Stop> {
        if self.cpu.cr4 & cr4::OSXSAVE == 0 {
            return Err(undefined());
        }
        let low = u64::from(low_u32(self.cpu.gpr[gpr::RAX]));
        let value = low | u64::from(low_u32(self.cpu.gpr[gpr::RDX])) << 32;
        let is_xcr0 = low_u32(self.cpu.gpr[gpr::RCX]) == 0;
        if is_xcr0 && value == self.cpu.features.xcr0() {
            return Ok(Effect::None);
        }
        Err(general_protection())
    }

    fn unsupported(&self) -> Stop {
        GuestError::UnsupportedInstruction { instruction: self.disassembly() }.into()
    }
}
