//! The CPUID leaves of a Linux guest: what KVM supports, with each vCPU's own number in it.
//!
//! Source: Intel SDM Vol. 2, CPUID; AMD APM Vol. 3, appendix E; Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`. KVM lists features that it emulates by itself, x2APIC among
//! them; the deadline timer alone it leaves to the one who makes the irqchip.

use kvm_bindings::kvm_cpuid_entry2;

/// Leaf 1, ECX: the TSC deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: there is more than one logical processor, or might be.
const MULTI_THREADED: u32 = 1 << 28;
/// Leaf 0xb, ECX: kinds of levels.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Makes `entries` those of vCPU `index` of `vcpus`: one socket with that many cores.
pub(super) fn of_vcpu(
    entries: &mut [kvm_cpuid_entry2],
    index: usize,
    vcpus: usize,
    has_tsc_deadline: bool,
) {
    // At most 255, see `acpi::MAX_VCPUS`.
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let (id, count) = (number(index), number(vcpus));
    let id_bits = u32::BITS - count.saturating_sub(1).leading_zeros();
    for entry in entries {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx |= HYPERVISOR;
                entry.ecx &= !TSC_DEADLINE;
                if has_tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.ebx = entry.ebx & 0xffff | count.min(255) << 16 | id << 24;
                entry.edx &= !MULTI_THREADED;
                if count > 1 {
                    entry.edx |= MULTI_THREADED;
                }
            }
            // Caches: threads that share each (left as one core's), cores in the package.
            (4, _) if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | (count - 1).min(63) << 26;
            }
            (0xb | 0x1f, 0) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, LEVEL_THREAD << 8, id);
            }
            (0xb | 0x1f, 1) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) =
                    (id_bits, count, 1 | LEVEL_CORE << 8, id);
            }
            (0xb | 0x1f, level) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, level & 0xff, id);
            }
            // Width of an identifier, and cores less one.
            (0x8000_0008, _) => {
                entry.ecx = entry.ecx & !0xf0ff | id_bits << 12 | (count - 1).min(255);
            }
            // AMD: extended identifier, core, node 0.
            (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(function: u32, indices: std::ops::Range<u32>) -> Vec<kvm_cpuid_entry2> {
        let entry = |index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0x1_c121,
            ebx: 0x55aa_1234,
            ecx: u32::MAX,
            edx: 0,
            ..Default::default()
        };
        indices.map(entry).collect()
    }

    #[test]
    fn leaf_1_names_the_vcpu_and_the_timer_only_if_there_is_one() {
        let mut entries = leaves(1, 0..1);
        of_vcpu(&mut entries, 3, 4, false);
        assert_eq!(entries[0].ebx, 3 << 24 | 4 << 16 | 0x1234);
        assert_eq!(entries[0].ecx & TSC_DEADLINE, 0);
        assert_ne!(entries[0].ecx & HYPERVISOR, 0);
        assert_ne!(entries[0].edx & MULTI_THREADED, 0);
        of_vcpu(&mut entries, 0, 1, true);
        assert_ne!(entries[0].ecx & TSC_DEADLINE, 0);
        assert_eq!(entries[0].edx & MULTI_THREADED, 0);
    }

    #[test]
    fn the_topology_is_one_socket_of_cores() {
        let mut entries = leaves(0xb, 0..3);
        of_vcpu(&mut entries, 5, 6, true);
        let levels: Vec<_> = entries.iter().map(|e| (e.eax, e.ebx, e.ecx, e.edx)).collect();
        assert_eq!(levels, [(0, 1, 0x100, 5), (3, 6, 0x201, 5), (0, 0, 2, 5)]);
        let mut entries = leaves(4, 0..1);
        of_vcpu(&mut entries, 0, 6, true);
        assert_eq!(entries[0].eax, 5 << 26 | 0x121);
        let mut entries = leaves(0x8000_0008, 0..1);
        of_vcpu(&mut entries, 0, 6, true);
        assert_eq!(entries[0].ecx & 0xf0ff, 3 << 12 | 5);
        let mut entries = leaves(0x8000_001e, 0..1);
        of_vcpu(&mut entries, 5, 6, true);
        assert_eq!((entries[0].eax, entries[0].ebx, entries[0].ecx), (5, 5, 0));
    }

    #[test]
    fn one_vcpu_has_identifiers_of_no_bits() {
        let mut entries = leaves(0xb, 0..2);
        of_vcpu(&mut entries, 0, 1, true);
        assert_eq!((entries[1].eax, entries[1].ebx), (0, 1));
    }
}
