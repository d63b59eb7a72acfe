//! The CPUID leaves that a guest sees.
//!
//! Guarantee: no leaf promises what the virtual processor then refuses: features that need CPL 0,
//! MSRs or control bits that are not emulated are hidden; everything else is as KVM supports it.

use kvm_bindings::kvm_cpuid_entry2;

use super::cpu::Features;

/// Leaf 1, ECX: MONITOR (traps at CPL 3), VMX, SMX, PDCM, PCID, x2APIC, TSC deadline.
const LEAF1_ECX_HIDDEN: u32 = 1 << 3 | 1 << 5 | 1 << 6 | 1 << 15 | 1 << 17 | 1 << 21 | 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the TSC deadline timer.
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, EDX: MCE, APIC, SEP, MTRR, MCA.
const LEAF1_EDX_HIDDEN: u32 = 1 << 7 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 14;
/// Leaf 7, EBX: SMEP, INVPCID, SMAP.
const LEAF7_EBX_HIDDEN: u32 = 1 << 7 | 1 << 10 | 1 << 20;
/// Leaf 7, ECX: UMIP, PKU, OSPKE, CET shadow stacks, LA57, PKS.
const LEAF7_ECX_HIDDEN: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 16 | 1 << 31;
/// Leaf 7, EDX: CET indirect branch tracking, speculation-control MSRs.
const LEAF7_EDX_HIDDEN: u32 = 1 << 20 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// Leaf 7.1, EAX: FRED, LKGS, WRMSRNS, LAM.
const LEAF7_1_EAX_HIDDEN: u32 = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 26;
/// Leaf 0xd.1, EAX: XSAVES, which is privileged.
const LEAFD_1_EAX_HIDDEN: u32 = 1 << 3;
/// Leaf 0x8000_0001, ECX: SVM, extended APIC space, SKINIT.
const LEAF80000001_ECX_HIDDEN: u32 = 1 << 2 | 1 << 3 | 1 << 12;
/// Leaf 0x8000_0001, EDX: SYSCALL (EFER.SCE has no effect), and the copies of leaf 1's bits.
const LEAF80000001_EDX_HIDDEN: u32 = 1 << 7 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 14;
/// First leaf of the hypervisor range: KVM's paravirtual interface works by MSRs.
const HYPERVISOR_LEAVES: std::ops::Range<u32> = 0x4000_0000..0x4000_0100;

/// Takes everything that is not virtualised out of `entries`.
pub(super) fn hide_unsupported(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx &= !LEAF1_ECX_HIDDEN;
                entry.edx &= !LEAF1_EDX_HIDDEN;
            }
            // Architectural performance monitoring.
            (0xa, _) => clear(entry),
            (7, 0) => {
                entry.ebx &= !LEAF7_EBX_HIDDEN;
                entry.ecx &= !LEAF7_ECX_HIDDEN;
                entry.edx &= !LEAF7_EDX_HIDDEN;
            }
            (7, 1) => entry.eax &= !LEAF7_1_EAX_HIDDEN,
            (0xd, 1) => entry.eax &= !LEAFD_1_EAX_HIDDEN,
            (0x8000_0001, _) => {
                entry.ecx &= !LEAF80000001_ECX_HIDDEN;
                entry.edx &= !LEAF80000001_EDX_HIDDEN;
            }
            (function, _) if HYPERVISOR_LEAVES.contains(&function) => clear(entry),
            _ => {}
        }
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

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
pub(super) fn features(entries: &[kvm_cpuid_entry2]) -> Features {
    let find = |function, index| {
        entries.iter().find(|entry| entry.function == function && entry.index == index)
    };
    Features {
        phys_bits: find(0x8000_0008, 0).map_or(36, |entry| entry.eax & 0xff),
        nx: find(0x8000_0001, 0).is_some_and(|entry| entry.edx & 1 << 20 != 0),
        fsgsbase: find(7, 0).is_some_and(|entry| entry.ebx & 1 != 0),
        xsave: find(1, 0).is_some_and(|entry| entry.ecx & 1 << 26 != 0),
    }
}

/// Whether AVX state can be enabled in XCR0.
pub(super) fn has_avx(entries: &[kvm_cpuid_entry2]) -> bool {
    entries.iter().any(|entry| entry.function == 1 && entry.ecx & 1 << 28 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn what_needs_cpl_0_is_hidden_and_the_rest_kept() {
        let mut leaves = [
            entry(1, 0, [7, 7, u32::MAX, u32::MAX]),
            entry(7, 0, [1, u32::MAX, u32::MAX, u32::MAX]),
            entry(0x4000_0001, 0, [u32::MAX; 4]),
        ];
        hide_unsupported(&mut leaves);
        assert_eq!(leaves[0].ecx & 1 << 17, 0, "PCID");
        assert_ne!(leaves[0].ecx & 1 << 28, 0, "AVX");
        assert_eq!(leaves[0].eax, 7);
        assert_eq!(leaves[1].ebx & (1 << 7 | 1 << 20), 0, "SMEP, SMAP");
        assert_ne!(leaves[1].ebx & 1, 0, "FSGSBASE");
        assert_eq!(leaves[2].eax, 0, "KVM's paravirtual features");
    }

    #[test]
    fn features_come_from_their_leaves() {
        let leaves = [
            entry(1, 0, [0, 0, 1 << 26, 0]),
            entry(7, 0, [0, 1, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 0, 1 << 20]),
            entry(0x8000_0008, 0, [0x3030, 0, 0, 0]),
        ];
        let expected = Features { phys_bits: 48, nx: true, fsgsbase: true, xsave: true };
        assert_eq!(features(&leaves), expected);
        let bare = Features { phys_bits: 36, nx: false, fsgsbase: false, xsave: false };
        assert_eq!(features(&[]), bare);
        assert!(!has_avx(&leaves));
    }
}
