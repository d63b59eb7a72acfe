//! The first vCPU's registers at the kernel's entry. The others wait for their start-up interrupt.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst` ("64-bit Boot Protocol"), Xen
//! `docs/misc/pvh.pandoc`.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::abi;
use crate::vmm::cpu::{cr0, cr4, efer, rflags};

use super::kernel::Entry;
use super::layout;

/// `__BOOT_CS`, `__BOOT_DS`, and a task state segment, which entering a guest wants.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Segment types: executable and readable, writable, busy task state; all accessed.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TASK: u8 = 0xb;
/// The limit of a task state segment without anything behind it.
const TASK_LIMIT: u32 = 0x67;
const DESCRIPTOR_BYTES: u16 = 8;

/// What goes into the descriptor table at [`layout::GDT`].
pub(super) fn gdt(entry: Entry) -> Vec<u8> {
    let [code, data, task] = segments(entry).map(|segment| descriptor(&segment));
    [0, 0, code, data, task].into_iter().flat_map(u64::to_le_bytes).collect()
}

fn segments(entry: Entry) -> [kvm_segment; 3] {
    let is_long = matches!(entry, Entry::Long(_));
    let flat = |selector, type_, l, db| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l,
        db,
        ..Default::default()
    };
    let task = kvm_segment {
        limit: TASK_LIMIT,
        selector: TASK,
        type_: TYPE_TASK,
        present: 1,
        ..Default::default()
    };
    [
        flat(CODE, TYPE_CODE, u8::from(is_long), u8::from(!is_long)),
        flat(DATA, TYPE_DATA, 0, 1),
        task,
    ]
}

/// A segment with base 0 as it stands in a descriptor table (Intel SDM Vol. 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let limit = u64::from(limit);
    let bit = |value: u8, at: u32| u64::from(value) << at;
    limit & 0xffff
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

/// Changes `sregs`, those of a fresh vCPU, to what the entry wants, and returns the others.
pub(crate) fn at_entry(entry: Entry, sregs: &mut kvm_sregs) -> kvm_regs {
    let [code, data, task] = segments(entry);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = task;
    let limit = 5 * DESCRIPTOR_BYTES - 1;
    sregs.gdt = kvm_dtable { base: layout::GDT, limit, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    let mut regs = kvm_regs { rflags: rflags::FIXED, ..Default::default() };
    match entry {
        Entry::Long(rip) => {
            sregs.cr0 = cr0::PE | cr0::ET | cr0::PG;
            sregs.cr3 = abi::BOOT_PML4_GPA;
            sregs.cr4 = cr4::PAE;
            sregs.efer = efer::LME | efer::LMA;
            regs.rip = rip;
            regs.rsi = layout::BOOT_PARAMS;
        }
        Entry::Pvh(eip) => {
            sregs.cr0 = cr0::PE | cr0::ET;
            (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
            regs.rip = eip.into();
            regs.rbx = layout::PVH_START_INFO;
        }
    }
    regs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(table: &[u8], selector: u16) -> u64 {
        let at = usize::from(selector);
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn descriptors_are_those_of_the_protocols() {
        let long = gdt(Entry::Long(0));
        assert_eq!(word(&long, CODE), 0x00af_9b00_0000_ffff, "64-bit code");
        assert_eq!(word(&long, DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(word(&long, TASK), 0x0000_8b00_0000_0067);
        let pvh = gdt(Entry::Pvh(0));
        assert_eq!(word(&pvh, CODE), 0x00cf_9b00_0000_ffff, "32-bit code");
        assert_eq!(long.len(), 40);
    }

    #[test]
    fn a_long_entry_is_in_long_mode_with_interrupts_off() {
        let mut sregs = kvm_sregs::default();
        let regs = at_entry(Entry::Long(0x100_0200), &mut sregs);
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!((sregs.cr3, sregs.cs.selector, sregs.cs.l), (0x9000, 0x10, 1));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit), (0x500, 39));
    }

    #[test]
    fn a_pvh_entry_is_in_protected_mode_without_paging() {
        let mut sregs = kvm_sregs { cr3: 5, efer: 5, ..Default::default() };
        let regs = at_entry(Entry::Pvh(0x10_0008), &mut sregs);
        assert_eq!((regs.rip, regs.rbx), (0x10_0008, 0x6000));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.ss.selector), (1, 0, 0x18));
    }
}
