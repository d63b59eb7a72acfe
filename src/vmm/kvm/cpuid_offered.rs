//! What CPUID tells the guests of the contract.
//!
//! Guarantee: it names nothing but what works. Every word is masked by a list of what is known to
//! work at CPL 3, or is emulated, so a feature that KVM learns tomorrow is not offered by accident;
//! and where CPUID names a feature that has a control bit, the guest can set that bit and read it
//! back (`cpu/emulate/control.rs` takes its bits from the same [`Features`](super::features::Features)).
//!
//! Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The mask of these bits.
const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < N {
        mask |= 1 << numbers[at];
        at += 1;
    }
    mask
}

/// Leaf 1, ECX: SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, RDRAND.
const LEAF1_ECX: u32 = bits([0, 1, 9, 13, 19, 20, 22, 23, 25, 30]);
/// Leaf 1, ECX, with XSAVE: itself.
const LEAF1_ECX_XSAVE: u32 = bits([26]);
/// Leaf 1, ECX: CR4.OSXSAVE is set.
const LEAF1_ECX_OSXSAVE: u32 = bits([27]);
/// Leaf 1, ECX, with AVX: FMA, itself, F16C.
const LEAF1_ECX_AVX: u32 = bits([12, 28, 29]);
/// Leaf 1, ECX: there is a hypervisor.
const LEAF1_ECX_HYPERVISOR: u32 = bits([31]);
/// Leaf 1, EDX: FPU, PSE, TSC, MSR, PAE, CX8, PGE, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2,
/// SS.
const LEAF1_EDX: u32 = bits([0, 3, 4, 5, 6, 8, 13, 15, 16, 17, 19, 23, 24, 25, 26, 27]);
/// Leaf 1, EBX: bytes that `clflush` flushes. There is no local APIC, so no number of one.
const LEAF1_EBX: u32 = 0xff00;
/// Leaf 7, EBX: FSGSBASE, BMI1, x87 data pointers on exceptions only, BMI2, ERMS, no x87 selectors,
/// RDSEED, ADX, CLFLUSHOPT, CLWB, SHA.
const LEAF7_EBX: u32 = bits([0, 3, 6, 8, 9, 13, 18, 19, 23, 24, 29]);
/// Leaf 7, EBX, with AVX: AVX2.
const LEAF7_EBX_AVX: u32 = bits([5]);
/// Leaf 7, ECX: PREFETCHWT1, GFNI, CLDEMOTE, MOVDIRI, MOVDIR64B.
const LEAF7_ECX: u32 = bits([0, 8, 25, 27, 28]);
/// Leaf 7, ECX, with AVX: VAES, VPCLMULQDQ.
const LEAF7_ECX_AVX: u32 = bits([9, 10]);
/// Leaf 7, EDX: FSRM, MD_CLEAR, SERIALIZE.
const LEAF7_EDX: u32 = bits([4, 10, 14]);
/// Leaf 7.1, EAX: CMPCCXADD, FZRM, FSRS, FSRC.
const LEAF7_1_EAX: u32 = bits([7, 10, 11, 12]);
/// Leaf 7.1, EAX, with AVX: SHA512, SM3, SM4, AVX-VNNI, AVX-IFMA.
const LEAF7_1_EAX_AVX: u32 = bits([0, 1, 2, 4, 23]);
/// Leaf 7.1, EDX, with AVX: AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16.
const LEAF7_1_EDX_AVX: u32 = bits([4, 5, 10]);
/// Leaf 7.1, EDX: PREFETCHI.
const LEAF7_1_EDX: u32 = bits([14]);
/// Leaf 0xd.1, EAX: XSAVEOPT, XSAVEC, XGETBV with ECX = 1. XSAVES is privileged.
const LEAFD_1_EAX: u32 = bits([0, 1, 2]);
/// Leaf 0x8000_0001, ECX: LAHF, ABM, SSE4A, misaligned SSE, PREFETCHW.
const LEAF80000001_ECX: u32 = bits([0, 5, 6, 7, 8]);
/// Leaf 0x8000_0001, ECX, with AVX: XOP, FMA4. TBM goes with them.
const LEAF80000001_ECX_AVX: u32 = bits([11, 16, 21]);
/// Leaf 0x8000_0001, EDX: AMD's copies of leaf 1's bits, NX, MMX extensions, 1 GiB pages, long
/// mode, 3DNow!. Not SYSCALL, for which EFER.SCE has no effect; nor RDTSCP, whose MSR is not there.
const LEAF80000001_EDX: u32 =
    bits([0, 3, 4, 5, 6, 8, 13, 15, 16, 17, 20, 22, 23, 24, LARGEST_PAGES, 29, 30, 31]);
/// Number of the bit that says that there are pages of 1 GiB.
const LARGEST_PAGES: u32 = 26;
/// Leaf 0x8000_0007, EDX: the time-stamp counter's rate never changes.
const LEAF80000007_EDX: u32 = bits([8]);
/// Leaf 0x8000_0008, EBX: CLZERO, WBNOINVD.
const LEAF80000008_EBX: u32 = bits([0, 9]);
/// Bits of a virtual address: leaf 0x8000_0008, EAX, bits 15 to 8.
const VIRTUAL_ADDRESS_BITS: u32 = 48;

/// Last basic leaf that says anything, and last extended one.
const LAST_BASIC: u32 = 0x18;
const LAST_EXTENDED: u32 = 0x8000_0008;

/// Bytes of an XSAVE area with x87 and SSE, and of AVX's part behind it (Intel SDM vol. 1, 13.4).
const XSAVE_BYTES: u32 = 576;
const XSAVE_AVX_BYTES: u32 = 256;

/// Extended state that the processor has.
#[derive(Clone, Copy)]
struct Extended {
    xsave: bool,
    avx: bool,
}

impl Extended {
    fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let leaf1 = entries.iter().find(|entry| entry.function == 1).map_or(0, |entry| entry.ecx);
        let xsave = leaf1 & LEAF1_ECX_XSAVE != 0;
        Self { xsave, avx: xsave && leaf1 & bits([28]) != 0 }
    }

    /// `always`, and `with_avx` where there is AVX.
    fn mask(self, always: u32, with_avx: u32) -> u32 {
        if self.avx { always | with_avx } else { always }
    }
}

/// Takes everything out of `entries` that the guest cannot use.
pub(super) fn restrict(entries: &mut [kvm_cpuid_entry2]) {
    let extended = Extended::of(entries);
    for entry in entries {
        let found = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let kept = restricted(extended, entry.function, entry.index, found);
        [entry.eax, entry.ebx, entry.ecx, entry.edx] = kept;
    }
}

fn restricted(extended: Extended, leaf: u32, index: u32, found: [u32; 4]) -> [u32; 4] {
    let [eax, ebx, ecx, edx] = found;
    let mask = |always, with_avx| extended.mask(always, with_avx);
    match (leaf, index) {
        (0, _) => [eax.min(LAST_BASIC), ebx, ecx, edx],
        (1, _) => {
            let xsave = if extended.xsave { LEAF1_ECX_XSAVE } else { 0 };
            let ecx = ecx & (mask(LEAF1_ECX, LEAF1_ECX_AVX) | xsave) | LEAF1_ECX_HYPERVISOR;
            [eax, ebx & LEAF1_EBX, ecx, edx & LEAF1_EDX]
        }
        // Caches: one thread shares them, one core a package.
        (4, _) => [eax & 0x3fff, ebx, ecx, edx],
        (7, 0) => [
            eax.min(1),
            ebx & mask(LEAF7_EBX, LEAF7_EBX_AVX),
            ecx & mask(LEAF7_ECX, LEAF7_ECX_AVX),
            edx & LEAF7_EDX,
        ],
        (7, 1) => [
            eax & mask(LEAF7_1_EAX, LEAF7_1_EAX_AVX),
            0,
            0,
            edx & mask(LEAF7_1_EDX, LEAF7_1_EDX_AVX),
        ],
        (0xd, _) if extended.xsave => extended_state(extended, index, eax),
        // Caches and names in AMD's and Intel's older forms, TLBs, frequencies.
        (2 | 0x15 | 0x16 | 0x18 | 0x8000_0002..=0x8000_0006, _) => found,
        (0x8000_0000, _) => [eax.min(LAST_EXTENDED), ebx, ecx, edx],
        (0x8000_0001, _) => {
            let ecx = ecx & mask(LEAF80000001_ECX, LEAF80000001_ECX_AVX);
            [eax, 0, ecx, edx & LEAF80000001_EDX]
        }
        (0x8000_0007, _) => [0, 0, 0, edx & LEAF80000007_EDX],
        (0x8000_0008, _) => [eax & 0xff | VIRTUAL_ADDRESS_BITS << 8, ebx & LEAF80000008_EBX, 0, 0],
        _ => [0; 4],
    }
}

/// Leaf 0xd: XCR0 is what it is at entry, so both sizes are those of all of it.
fn extended_state(extended: Extended, index: u32, eax: u32) -> [u32; 4] {
    let bytes = if extended.avx { XSAVE_BYTES + XSAVE_AVX_BYTES } else { XSAVE_BYTES };
    match index {
        0 => [extended.mask(0b011, 0b100), bytes, bytes, 0],
        1 => [eax & LEAFD_1_EAX, bytes, 0, 0],
        2 if extended.avx => [XSAVE_AVX_BYTES, XSAVE_BYTES, 0, 0],
        _ => [0; 4],
    }
}

/// What `cpuid` answers with shadow paging, where the hypervisor executes it for the guest.
pub(in crate::vmm) struct CpuidTable {
    entries: Vec<kvm_cpuid_entry2>,
}

impl CpuidTable {
    /// The table of [restricted](restrict) `leaves`.
    pub(in crate::vmm) fn new(leaves: &CpuId) -> Self {
        let mut entries = leaves.as_slice().to_vec();
        // Pages of 1 GiB are the walk's of the guest's tables, whatever the processor has.
        for entry in entries.iter_mut().filter(|entry| entry.function == 0x8000_0001) {
            entry.edx |= bits([LARGEST_PAGES]);
        }
        Self { entries }
    }

    /// EAX, EBX, ECX, EDX of `leaf` and `subleaf`; zeros for a leaf that is not there.
    pub(in crate::vmm) fn answer(&self, leaf: u32, subleaf: u32, os_uses_xsave: bool) -> [u32; 4] {
        let is_meant = |entry: &&kvm_cpuid_entry2| {
            let has_index = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!has_index || entry.index == subleaf)
        };
        let Some(entry) = self.entries.iter().find(is_meant) else {
            return [0; 4];
        };
        let os = if leaf == 1 && os_uses_xsave { LEAF1_ECX_OSXSAVE } else { 0 };
        [entry.eax, entry.ebx, entry.ecx | os, entry.edx]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::kvm::cpuid::features;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        let flags =
            if matches!(function, 4 | 7 | 0xd) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A processor that claims everything.
    fn everything() -> Vec<kvm_cpuid_entry2> {
        let basic = (0..0x40).flat_map(|leaf| (0..4).map(move |index| (leaf, index)));
        let extended = (0x8000_0000..0x8000_0030).map(|leaf| (leaf, 0));
        let own = (0x4000_0000..0x4000_0010).map(|leaf| (leaf, 0));
        let leaves = basic.filter(|(leaf, index)| matches!(leaf, 4 | 7 | 0xd) || *index == 0);
        leaves.chain(extended).chain(own).map(|(l, i)| entry(l, i, [u32::MAX; 4])).collect()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> &kvm_cpuid_entry2 {
        entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn what_the_guest_cannot_use_is_not_named() {
        let mut leaves = everything();
        restrict(&mut leaves);
        // MONITOR, VMX, SMX, PDCM, PCID, x2APIC, TSC deadline, OSXSAVE.
        let ecx = find(&leaves, 1, 0).ecx;
        assert_eq!(ecx & bits([3, 5, 6, 15, 17, 21, 24, 27]), 0, "{ecx:#x}");
        // VME, DE, MCE, APIC, SEP, MTRR, MCA, HTT.
        assert_eq!(find(&leaves, 1, 0).edx & bits([1, 2, 7, 9, 11, 12, 14, 28]), 0);
        // TSC_ADJUST, SMEP, INVPCID, MPX, AVX-512, SMAP, PT.
        assert_eq!(find(&leaves, 7, 0).ebx & bits([1, 7, 10, 14, 16, 20, 25]), 0);
        // UMIP, PKU, OSPKE, WAITPKG, CET, LA57, RDPID, PKS.
        assert_eq!(find(&leaves, 7, 0).ecx & bits([2, 3, 4, 5, 7, 16, 22, 31]), 0);
        // SVM, SKINIT, topology; SYSCALL, FFXSR, RDTSCP.
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx & bits([2, 12, 22]), 0);
        assert_eq!(find(&leaves, 0x8000_0001, 0).edx & bits([11, 25, 27]), 0);
        for silent in [3, 5, 6, 9, 0xa, 0xb, 0x14, 0x1f, 0x4000_0000, 0x4000_0001, 0x8000_000a] {
            let entry = find(&leaves, silent, 0);
            assert_eq!([entry.eax, entry.ebx, entry.ecx, entry.edx], [0; 4], "{silent:#x}");
        }
        assert_eq!(find(&leaves, 0, 0).eax, LAST_BASIC);
        assert_eq!(find(&leaves, 0x8000_0008, 0).eax, 0x30ff);
    }

    /// The table of docs/guest-abi.md once more, by the numbers of the bits: what is masked and what is
    /// let through of a processor that claims everything, in each word of each leaf.
    #[test]
    fn each_bit_is_named_or_not_as_the_page_has_it() {
        let mut leaves = everything();
        restrict(&mut leaves);
        let same_as_leaf1 = [0, 3, 4, 5, 6, 8, 13, 15, 16, 17, 23, 24];
        let extended_edx = bits(same_as_leaf1) | bits([20, 22, 26, 29, 30, 31]);
        let named: [((u32, u32), [u32; 4]); 11] = [
            (
                (1, 0),
                [
                    u32::MAX,
                    0xff00,
                    bits([0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30, 31]),
                    bits(same_as_leaf1) | bits([19, 25, 26, 27]),
                ],
            ),
            (
                (7, 0),
                [
                    1,
                    bits([0, 3, 5, 6, 8, 9, 13, 18, 19, 23, 24, 29]),
                    bits([0, 8, 9, 10, 25, 27, 28]),
                    bits([4, 10, 14]),
                ],
            ),
            ((7, 1), [bits([0, 1, 2, 4, 7, 10, 11, 12, 23]), 0, 0, bits([4, 5, 10, 14])]),
            ((0xd, 0), [0b111, 832, 832, 0]),
            ((0xd, 1), [0b111, 832, 0, 0]),
            ((0xd, 2), [256, 576, 0, 0]),
            ((0, 0), [0x18, u32::MAX, u32::MAX, u32::MAX]),
            ((0x8000_0000, 0), [0x8000_0008, u32::MAX, u32::MAX, u32::MAX]),
            ((0x8000_0001, 0), [u32::MAX, 0, bits([0, 5, 6, 7, 8, 11, 16, 21]), extended_edx]),
            ((0x8000_0007, 0), [0, 0, 0, bits([8])]),
            ((0x8000_0008, 0), [0x30ff, bits([0, 9]), 0, 0]),
        ];
        for entry in &leaves {
            let leaf = (entry.function, entry.index);
            let expected = match (named.iter().find(|(named, _)| *named == leaf), leaf.0) {
                (Some((_, words)), _) => *words,
                // One thread, one core; as the host has it.
                (None, 4) => [0x3fff, u32::MAX, u32::MAX, u32::MAX],
                (None, 2 | 0x15 | 0x16 | 0x18 | 0x8000_0002..=0x8000_0006) => [u32::MAX; 4],
                _ => [0; 4],
            };
            let words = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            assert_eq!(words, expected, "leaf {:#x}, subleaf {}: {words:x?}", leaf.0, leaf.1);
        }
    }

    #[test]
    fn what_it_can_use_is() {
        let mut leaves = everything();
        restrict(&mut leaves);
        assert_ne!(find(&leaves, 1, 0).ecx & bits([28]), 0, "AVX");
        assert_ne!(find(&leaves, 7, 0).ebx & bits([5]), 0, "AVX2");
        assert_eq!(find(&leaves, 0xd, 0).eax, 0b111);
        assert_eq!((find(&leaves, 0xd, 0).ebx, find(&leaves, 0xd, 0).ecx), (832, 832));
        assert_eq!(find(&leaves, 0xd, 3).eax, 0, "no MPX state");
    }

    #[test]
    fn without_xsave_nothing_that_needs_it_is_named() {
        let mut leaves = everything();
        leaves.iter_mut().filter(|e| e.function == 1).for_each(|e| e.ecx &= !LEAF1_ECX_XSAVE);
        restrict(&mut leaves);
        let leaf1 = find(&leaves, 1, 0);
        assert_eq!(leaf1.ecx & (LEAF1_ECX_XSAVE | LEAF1_ECX_OSXSAVE | LEAF1_ECX_AVX), 0);
        assert_eq!(find(&leaves, 7, 0).ebx & LEAF7_EBX_AVX, 0);
        assert_eq!(find(&leaves, 0xd, 0).eax, 0);
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx & LEAF80000001_ECX_AVX, 0);
    }

    #[test]
    fn the_table_answers_by_leaf_and_subleaf_and_follows_cr4() {
        let mut leaves = everything();
        restrict(&mut leaves);
        let features = features(&leaves);
        assert!(features.xsave && features.avx && features.fsgsbase);
        let table = CpuidTable::new(&CpuId::from_entries(&leaves).unwrap());
        let [_, ebx, ecx, _] = table.answer(1, 77, true);
        assert_eq!(ebx, 0xff00);
        assert_ne!(ecx & LEAF1_ECX_OSXSAVE, 0);
        assert_eq!(table.answer(1, 0, false)[2] & LEAF1_ECX_OSXSAVE, 0);
        assert_eq!(table.answer(7, 1, false)[0], table.answer(7, 1, true)[0]);
        assert_ne!(table.answer(7, 0, false), table.answer(7, 1, false));
        for absent in [0x41, 0x4000_0100, 0x8000_0031, u32::MAX] {
            assert_eq!(table.answer(absent, 0, true), [0; 4]);
        }
    }
}
