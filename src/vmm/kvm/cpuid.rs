//! The CPUID leaves of plain machines, and what the leaves say that the emulation depends on. What
//! guests of the contract are told: [`cpuid_offered`](super::cpuid_offered).

use kvm_bindings::kvm_cpuid_entry2;

use super::features::Features;

/// Leaf 1, ECX: there is a hypervisor.
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the TSC deadline timer.
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;

/// Says which processor this is, each a package with one core and one thread.
pub(super) fn number_processor(entries: &mut [kvm_cpuid_entry2], index: usize) {
    let id = u32::try_from(index).unwrap_or(u32::MAX);
    for entry in entries {
        match entry.function {
            // Initial APIC ID, number of logical processors; HTT off: one thread a package.
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | 1 << 16;
                entry.edx &= !(1 << 28);
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
            }
            // Cache leaves: shared by one thread, one core a package.
            4 => entry.eax &= 0x3fff,
            // Topology: one thread, one core; x2APIC ID.
            0xb | 0x1f => {
                entry.eax = 0;
                entry.ebx = u32::from(entry.index < 2);
                entry.edx = id;
            }
            // AMD: core count, and the extended APIC ID.
            0x8000_0008 => entry.ecx &= !0xf0ff,
            0x8000_001e => {
                entry.eax = id;
                entry.ebx &= !0xffff;
                entry.ebx |= id & 0xff;
            }
            _ => {}
        }
    }
}

/// Offers the local APIC's TSC deadline timer. A guest that has it measures no timer against another,
/// which goes wrong where the host has other work.
pub(super) fn offer_tsc_deadline(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
    }
}

/// The features that the emulation depends on. A processor that does not tell the width of its
/// physical addresses has 36 bits (Intel SDM Vol. 3, 5.1.4).
pub(in crate::vmm) fn features(entries: &[kvm_cpuid_entry2]) -> Features {
    let find = |function, index| {
        entries.iter().find(|entry| entry.function == function && entry.index == index)
    };
    Features {
        phys_bits: find(0x8000_0008, 0).map_or(36, |entry| entry.eax & 0xff),
        nx: find(0x8000_0001, 0).is_some_and(|entry| entry.edx & 1 << 20 != 0),
        fsgsbase: find(7, 0).is_some_and(|entry| entry.ebx & 1 != 0),
        xsave: find(1, 0).is_some_and(|entry| entry.ecx & 1 << 26 != 0),
        avx: find(1, 0).is_some_and(|entry| entry.ecx & 1 << 28 != 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn features_come_from_their_leaves() {
        let leaves = [
            entry(1, 0, [0, 0, 1 << 26, 0]),
            entry(7, 0, [0, 1, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 0, 1 << 20]),
            entry(0x8000_0008, 0, [0x3030, 0, 0, 0]),
        ];
        let expected =
            Features { phys_bits: 48, nx: true, fsgsbase: true, xsave: true, avx: false };
        assert_eq!(features(&leaves), expected);
        let bare = Features { phys_bits: 36, nx: false, fsgsbase: false, xsave: false, avx: false };
        assert_eq!(features(&[]), bare);
    }
}
