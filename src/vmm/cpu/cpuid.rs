//! A `cpuid` that is carried out for the guest.
//!
//! Guarantee: the guest finds in its four registers, whole, what the table says of its own CR4.

use crate::vmm::kvm::cpuid_offered::CpuidTable;

use super::state::{GuestCpu, cr4, gpr};

impl CpuidTable {
    /// Completes a `cpuid` of `leaf` and `subleaf`.
    pub(in crate::vmm) fn complete(&self, cpu: &mut GuestCpu, leaf: u32, subleaf: u32) {
        let answer = self.answer(leaf, subleaf, cpu.cr4 & cr4::OSXSAVE != 0);
        for (register, value) in [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].into_iter().zip(answer) {
            cpu.gpr[register] = u64::from(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{CpuId, kvm_cpuid_entry2};

    use super::*;
    use crate::addr::Gpa;
    use crate::vmm::kvm::features::Features;

    #[test]
    fn a_cpuid_fills_four_registers_whole_and_follows_cr4() {
        let leaf =
            kvm_cpuid_entry2 { function: 1, eax: 1, ebx: 0xff00, edx: 4, ..Default::default() };
        let table = CpuidTable::new(&CpuId::from_entries(&[leaf]).unwrap());
        let features = Features { phys_bits: 48, nx: true, fsgsbase: true, xsave: true, avx: true };
        let mut cpu = GuestCpu::at_boot(Gpa::new(0x9000), features);
        let os_uses_xsave = 1 << 27;
        for (cr4, ecx) in [(cpu.cr4 | cr4::OSXSAVE, os_uses_xsave), (cpu.cr4 & !cr4::OSXSAVE, 0)] {
            cpu.cr4 = cr4;
            cpu.gpr = [u64::MAX; 16];
            table.complete(&mut cpu, 1, 77);
            let filled = [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].map(|index| cpu.gpr[index]);
            assert_eq!(filled, [1, 0xff00, ecx, 4], "upper halves are cleared");
            assert_eq!(cpu.gpr[gpr::RSI], u64::MAX);
        }
    }
}
