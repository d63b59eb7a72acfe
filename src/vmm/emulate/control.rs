//! Control registers: `mov` to and from CR0, CR2, CR3, CR4, and `clts`, `invlpg`.
//!
//! Values that hardware refuses are refused with #GP(0), by the rules for 64-bit mode without
//! PCID and with 4-level paging (Intel SDM Vol. 3, 2.5 and Vol. 2, MOV to control registers).

use iced_x86::Register;

use crate::addr::Gva;

use super::super::cpu::{cr0, cr4};
use super::super::error::GuestError;
use super::super::exceptions::Stop;
use super::super::memory::is_usable;
use super::{Effect, Step, general, general_protection};

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

/// CR4 bits that a guest may set or clear without any being missed.
const CR4_PLAIN: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT;

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
        let mut allowed = CR4_PLAIN;
        if self.cpu.features.fsgsbase {
            allowed |= cr4::FSGSBASE;
        }
        if self.cpu.features.xsave {
            allowed |= cr4::OSXSAVE;
        }
        if value & !allowed != 0 || value & cr4::PAE == 0 {
            return Err(general_protection());
        }
        let changed = value ^ self.cpu.cr4;
        self.cpu.cr4 = value;
        Ok(if changed & CR4_FLUSHES != 0 { Effect::LoadRoot } else { Effect::None })
    }

    fn unsupported(&self) -> Stop {
        GuestError::UnsupportedInstruction { instruction: self.disassembly() }.into()
    }
}
