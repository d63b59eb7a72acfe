//! Page tables and control registers that make no sense, or a sense that hurts.

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{FREE, Guest, IDT, Written, attempt, attempt_jump, power_off, report};
use crate::machine::{Ended, Machine};
use crate::trial::kvm_trial;

/// The boot tables' page-directory-pointer table for the lowest 512 GiB.
const BOOT_PDPT: u64 = abi::BOOT_PML4_GPA + 0x1000;
/// Present and writable.
const PW: u64 = 3;
/// 2 MiB or 1 GiB page.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const GP: (u64, u64) = (13, 0);
/// Where tests map things: PML4 slot 1.
const TEST_GVA: u64 = 1 << 39;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("recursive_pml4", recursive_pml4),
        kvm_trial("tables_that_are_one_page", tables_that_are_one_page),
        kvm_trial("tables_outside_ram", tables_outside_ram),
        kvm_trial("tables_in_the_window", tables_in_the_window),
        kvm_trial("reserved_bits", reserved_bits),
        kvm_trial("leaf_beyond_physical_addresses", leaf_beyond_physical_addresses),
        kvm_trial("cr3_to_garbage", cr3_to_garbage),
        kvm_trial("cr3_to_zeros", cr3_to_zeros),
        kvm_trial("cr3_beyond_ram", cr3_beyond_ram),
        kvm_trial("cr3_to_the_window", cr3_to_the_window),
        kvm_trial("cr3_bits", cr3_bits),
        kvm_trial("cr0_values", cr0_values),
        kvm_trial("cr4_values", cr4_values),
        kvm_trial("efer_values", efer_values),
        kvm_trial("msrs_that_do_not_exist", msrs_that_do_not_exist),
        kvm_trial("read_only_pages", read_only_pages),
        kvm_trial("no_execute_pages", no_execute_pages),
        kvm_trial("own_code_taken_away", own_code_taken_away),
        kvm_trial("tables_written_through_themselves", tables_written_through_themselves),
    ]
}

fn run(guest: &Guest) -> Ended {
    Machine::default().run(guest)
}

/// Loads CR3 with `root`.
fn load_cr3(a: &mut CodeAssembler, root: u64) -> Written {
    a.mov(rax, root)?;
    a.mov(cr3, rax)
}

/// A guest that runs on tables at [`FREE`] that map low memory as the boot tables do, and what
/// `entry` says at PML4 slot 1.
fn with_slot_1(entry: u64, write: impl FnOnce(&mut CodeAssembler) -> Written) -> Guest {
    let guest = Guest::new(|a| {
        load_cr3(a, FREE)?;
        write(a)?;
        power_off(a)
    });
    guest.with_table(FREE, &[(0, BOOT_PDPT | PW), (1, entry)])
}

fn recursive_pml4() {
    // Slot 1 is the PML4 itself. With slot 1 all the way down, the page is the PML4 again.
    let guest = with_slot_1(FREE | PW, |a| {
        a.mov(rax, 1u64 << 39 | 1 << 30 | 1 << 21 | 1 << 12)?;
        a.mov(rbx, qword_ptr(rax + 8))?;
        report(a, rbx)?;
        // By slot 0 in the last step: the boot tables' PDPT.
        a.mov(rax, 1u64 << 39 | 1 << 30 | 1 << 21)?;
        a.mov(rbx, qword_ptr(rax))?;
        report(a, rbx)
    });
    let ended = run(&guest).powered_off();
    // Accessed at all levels; the entry that was read through itself is not written: not dirty.
    assert_eq!(ended.values(), [FREE | PW | 0x20, 0xe7]);
}

fn tables_that_are_one_page() {
    // Every entry of the table points to the table itself.
    let entries: Vec<(usize, u64)> = (0..512).map(|index| (index, (FREE + 0x1000) | PW)).collect();
    let guest = with_slot_1((FREE + 0x1000) | PW, |a| {
        for offset in [0, 0x1000, 0x20_0000, 0x4000_0000, 0x7f_ffff_f000u64] {
            a.mov(rax, TEST_GVA + offset)?;
            a.mov(rbx, qword_ptr(rax + 0x18))?;
            a.and(rbx, !0x60)?;
            report(a, rbx)?;
        }
        // A write through it takes an entry away that the walk itself uses.
        a.mov(rax, TEST_GVA + 0x5000)?;
        a.mov(qword_ptr(rax + 9 * 8), 0)?;
        a.mov(rax, TEST_GVA + 0x9000)?;
        a.invlpg(ptr(rax))?;
        attempt(a, |a| a.mov(rbx, qword_ptr(rax)))
    })
    .with_table(FREE + 0x1000, &entries);
    let ended = run(&guest).powered_off();
    assert_eq!(ended.values(), [(FREE + 0x1000) | PW; 5]);
    assert_eq!(ended.vectors(), [(14, 0)]);
}

fn tables_outside_ram() {
    // A table outside RAM reads as all ones, as an empty bus does: reserved bits are set.
    let beyond = 16 << 20;
    for level in [3, 2, 1] {
        let chain = |number: u64| {
            if number + level == 4 { beyond } else { FREE + number * 0x1000 }
        };
        let guest = with_slot_1(chain(1) | PW, |a| {
            a.mov(rax, TEST_GVA)?;
            attempt(a, |a| a.mov(rbx, qword_ptr(rax)))?;
            attempt(a, |a| a.mov(qword_ptr(rax), rbx))
        })
        .with_table(FREE + 0x1000, &[(0, chain(2) | PW)])
        .with_table(FREE + 0x2000, &[(0, chain(3) | PW)]);
        assert_eq!(run(&guest).powered_off().vectors(), [(14, 9), (14, 0xb)], "level {level}");
    }
}

fn tables_in_the_window() {
    let guest = with_slot_1((abi::WINDOW_GPA + abi::CONTROL_BYTES) | PW, |a| {
        a.mov(rax, TEST_GVA)?;
        attempt(a, |a| a.mov(rbx, qword_ptr(rax)))
    });
    assert_eq!(run(&guest).powered_off().vectors(), [(14, 9)], "the window holds no tables");
}

fn reserved_bits() {
    // At PML4 slot 1: a large page there, bit 63 without NXE, bit 51.
    for bits in [LARGE, NO_EXECUTE, 1 << 51] {
        let guest = with_slot_1(BOOT_PDPT | PW | bits, |a| {
            a.mov(rax, TEST_GVA)?;
            attempt(a, |a| a.mov(rbx, qword_ptr(rax)))?;
            attempt(a, |a| a.mov(qword_ptr(rax), rbx))?;
            attempt_jump(a)
        });
        let expected = [(14, 9), (14, 0xb), (14, 9)];
        assert_eq!(run(&guest).powered_off().vectors(), expected, "bits {bits:#x}");
    }
    // In a large page's address, by level.
    for (level, bits) in [(3, 1 << 13), (3, 1 << 29), (2, 1 << 13), (2, 1 << 20)] {
        let leaf = PW | LARGE | bits;
        let (first, second) = if level == 3 { (leaf, 0) } else { ((FREE + 0x2000) | PW, leaf) };
        let guest = with_slot_1((FREE + 0x1000) | PW, |a| {
            a.mov(rax, TEST_GVA)?;
            attempt(a, |a| a.mov(rbx, qword_ptr(rax)))
        })
        .with_table(FREE + 0x1000, &[(0, first)])
        .with_table(FREE + 0x2000, &[(0, second)]);
        assert_eq!(run(&guest).powered_off().vectors(), [(14, 9)], "level {level}, {bits:#x}");
    }
    // An entry that is not present may have any.
    let guest = with_slot_1(u64::MAX - 1, |a| {
        a.mov(rax, TEST_GVA)?;
        attempt(a, |a| a.mov(rbx, qword_ptr(rax)))
    });
    assert_eq!(run(&guest).powered_off().vectors(), [(14, 0)]);
}

fn leaf_beyond_physical_addresses() {
    // The highest address that is none of the reserved bits' is still not RAM.
    let guest = with_slot_1((FREE + 0x1000) | PW, |a| {
        a.mov(rax, TEST_GVA + 0x123)?;
        a.mov(bl, byte_ptr(rax))
    })
    .with_table(FREE + 0x1000, &[(0, (1 << 35) | PW | LARGE)]);
    run(&guest).failed_with(&["guest-physical 0x800000123"]);
}

fn cr3_to_garbage() {
    let mut garbage = Vec::new();
    let mut value = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..512 {
        value = value.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        garbage.extend(value.to_le_bytes());
    }
    let guest = Guest::new(|a| {
        load_cr3(a, FREE)?;
        power_off(a)
    });
    // Nothing can be fetched any more, nor delivered.
    run(&guest.with(FREE, garbage)).failed_with(&["triple fault", "exception 14"]);
}

fn cr3_to_zeros() {
    let guest = Guest::new(|a| {
        load_cr3(a, FREE)?;
        power_off(a)
    });
    run(&guest).failed_with(&["triple fault", "exception 14", "code 0x0"]);
}

fn cr3_beyond_ram() {
    for root in [16u64 << 20, 1 << 30, (1 << 35) - 0x1000] {
        let guest = Guest::new(|a| {
            load_cr3(a, root)?;
            power_off(a)
        });
        run(&guest).failed_with(&["triple fault", "exception 14", "code 0x9"]);
    }
}

fn cr3_to_the_window() {
    let guest = Guest::new(|a| {
        load_cr3(a, abi::WINDOW_GPA)?;
        power_off(a)
    });
    run(&guest).failed_with(&["triple fault", "exception 14", "code 0x9"]);
}

fn cr3_bits() {
    let guest = Guest::new(|a| {
        // Physical addresses end at 52 bits at the latest.
        for bit in [52, 62, 63] {
            a.mov(rax, abi::BOOT_PML4_GPA | 1 << bit)?;
            attempt(a, |a| a.mov(cr3, rax))?;
        }
        // The low bits are caching controls, without effect, but they can be read back.
        load_cr3(a, abi::BOOT_PML4_GPA | 0x18)?;
        a.mov(rbx, cr3)?;
        report(a, rbx)?;
        load_cr3(a, abi::BOOT_PML4_GPA | 0xfff)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.vectors(), [GP; 3]);
    assert_eq!(ended.values(), [abi::BOOT_PML4_GPA | 0x18]);
}

/// Tries to write each value to a control register; each must raise #GP(0), and the register keep
/// its value.
fn refused(register: AsmRegisterCr, values: &[u64]) {
    let guest = Guest::new(|a| {
        a.mov(rbx, register)?;
        for &value in values {
            a.mov(rax, value)?;
            attempt(a, |a| a.mov(register, rax))?;
        }
        a.mov(rcx, register)?;
        a.sub(rcx, rbx)?;
        a.mov(rbx, rcx)?;
        report(a, rbx)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.vectors(), vec![GP; values.len()]);
    assert_eq!(ended.values(), [0]);
}

fn cr0_values() {
    const ENTRY: u64 = abi::ENTRY_CR0;
    const PG: u64 = 1 << 31;
    const NW: u64 = 1 << 29;
    // Out of paging, out of protection, write-back without a cache, bits that do not exist.
    refused(cr0, &[ENTRY & !PG, ENTRY & !1, 0, ENTRY | NW, ENTRY | 1 << 32, u64::MAX]);
    // TS is the guest's choice: #NM until `clts`. (A KVM that runs CPL 3 without virtualisation
    // hardware may not raise it.)
    let guest = Guest::new(|a| {
        a.mov(rax, ENTRY | 1 << 3)?;
        a.mov(cr0, rax)?;
        attempt(a, |a| a.fldz())?;
        attempt(a, |a| a.pxor(xmm0, xmm0))?;
        a.clts()?;
        attempt(a, |a| a.fldz())?;
        attempt(a, |a| a.pxor(xmm0, xmm0))?;
        power_off(a)
    });
    let vectors = run(&guest).powered_off().vectors();
    assert!(vectors.is_empty() || vectors == [(7, 0), (7, 0)], "{vectors:?}");
}

fn cr4_values() {
    const ENTRY: u64 = abi::ENTRY_CR4;
    const PAE: u64 = 1 << 5;
    let mut values = vec![ENTRY & !PAE, 0, u64::MAX];
    // UMIP, LA57, VMXE, SMXE, PCIDE, SMEP, SMAP, PKE, CET, and bits that do not exist.
    let bits = [11, 12, 13, 14, 15, 17, 20, 21, 22, 23, 31, 32, 63];
    values.extend(bits.map(|bit| ENTRY | 1 << bit));
    // VME, PVI, DE, MCE, which CPUID does not name.
    values.extend([0, 1, 3, 6].map(|bit| ENTRY | 1 << bit));
    refused(cr4, &values);
    // TSD, PSE, PGE, PCE: stored, without effect.
    let guest = Guest::new(|a| {
        a.mov(rbx, cr4)?;
        a.or(rbx, 0x194)?;
        a.mov(cr4, rbx)?;
        a.mov(rcx, cr4)?;
        a.sub(rbx, rcx)?;
        report(a, rbx)?;
        a.rdtsc()?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!((ended.vectors(), ended.values()), (vec![], vec![0]));
}

/// `wrmsr` of a value.
fn write_msr(a: &mut CodeAssembler, msr: u32, value: u64) -> Written {
    a.mov(rax, value)?;
    a.mov(rdx, value >> 32)?;
    a.mov(ecx, msr)?;
    attempt(a, |a| a.wrmsr())
}

const EFER: u32 = 0xc000_0080;

fn efer_values() {
    const ENTRY: u64 = abi::ENTRY_EFER;
    // Out of long mode, SVME, LMSLE, FFXSR, TCE, bits that do not exist.
    let values =
        [0, ENTRY & !0x100, ENTRY & !0x400, ENTRY | 1 << 12, ENTRY | 1 << 13, ENTRY | 1 << 14];
    let guest = Guest::new(|a| {
        for value in values.into_iter().chain([ENTRY | 1 << 15, ENTRY | 1 << 63, u64::MAX]) {
            write_msr(a, EFER, value)?;
        }
        // SCE can be set, and `syscall` does not exist all the same.
        write_msr(a, EFER, ENTRY | 1)?;
        attempt(a, |a| a.syscall())?;
        a.mov(ecx, EFER)?;
        a.rdmsr()?;
        a.mov(ebx, eax)?;
        report(a, rbx)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    let (last, refused) = match ended.vectors().split_last() {
        Some((last, refused)) => (*last, refused.to_vec()),
        None => panic!("{ended:?}"),
    };
    assert_eq!(refused, [GP; 9]);
    assert!(matches!(last, (6, 0) | (13, _)), "{last:?}");
    assert_eq!(ended.values(), [ENTRY | 1]);
}

fn msrs_that_do_not_exist() {
    // TSC, APIC base, feature control, sysenter, MTRRs, debug control, star, lstar, TSC_AUX, SVM's
    // VM_HSAVE, KVM's own, and none at all.
    const MSRS: [u32; 14] = [
        0x10,
        0x1b,
        0x3a,
        0x174,
        0x176,
        0x2ff,
        0x1d9,
        0xc000_0081,
        0xc000_0082,
        0xc000_0103,
        0xc001_0117,
        0x4b56_4d00,
        0,
        u32::MAX,
    ];
    let guest = Guest::new(|a| {
        for msr in MSRS {
            write_msr(a, msr, 0)?;
            a.mov(ecx, msr)?;
            attempt(a, |a| a.rdmsr())?;
        }
        // Bases that are no addresses, memory types that are none.
        for msr in [0xc000_0100, 0xc000_0101, 0xc000_0102] {
            write_msr(a, msr, 1 << 47)?;
        }
        write_msr(a, 0x277, 2)?;
        // A base in the monitor is an address; the access is what fails.
        write_msr(a, 0xc000_0100, abi::GVA_LIMIT)?;
        a.xor(ebx, ebx)?;
        attempt(a, |a| a.mov(rax, qword_ptr(rbx).fs()))?;
        power_off(a)
    });
    assert_eq!(run(&guest).powered_off().vectors(), vec![GP; 14 * 2 + 3 + 1 + 1]);
}

/// Tables at [`FREE`] that map [`TEST_GVA`] by 4 KiB: page 0 with `flags` to [`FREE`] + 16 KiB.
fn one_page(guest: Guest, flags: u64) -> Guest {
    guest
        .with_table(FREE + 0x1000, &[(0, (FREE + 0x2000) | PW)])
        .with_table(FREE + 0x2000, &[(0, (FREE + 0x3000) | PW)])
        .with_table(FREE + 0x3000, &[(0, (FREE + 0x4000) | flags)])
        .with(FREE + 0x4000, vec![0xc3; 4096])
}

fn read_only_pages() {
    let guest = with_slot_1((FREE + 0x1000) | PW, |a| {
        a.mov(rax, TEST_GVA)?;
        a.mov(rbx, qword_ptr(rax))?;
        attempt(a, |a| a.mov(qword_ptr(rax), rbx))?;
        // CR0.WP off: a kernel may write it. On again: not any more.
        a.mov(rcx, abi::ENTRY_CR0 & !(1 << 16))?;
        a.mov(cr0, rcx)?;
        a.mov(qword_ptr(rax), 77)?;
        a.mov(rcx, abi::ENTRY_CR0)?;
        a.mov(cr0, rcx)?;
        attempt(a, |a| a.mov(qword_ptr(rax), rbx))?;
        a.mov(rbx, qword_ptr(rax))?;
        report(a, rbx)?;
        // The entry is dirty and accessed now.
        a.mov(rbx, qword_ptr(FREE + 0x3000))?;
        report(a, rbx)
    });
    let ended = run(&one_page(guest, 1)).powered_off();
    assert_eq!(ended.vectors(), [(14, 3), (14, 3)]);
    assert_eq!(ended.values(), [77, (FREE + 0x4000) | 0x61]);
}

fn no_execute_pages() {
    let guest = with_slot_1((FREE + 0x1000) | PW, |a| {
        a.mov(rax, TEST_GVA)?;
        // Bit 63 is reserved until EFER.NXE is set.
        attempt(a, |a| a.mov(rbx, qword_ptr(rax)))?;
        write_msr(a, EFER, abi::ENTRY_EFER | 1 << 11)?;
        a.mov(rax, TEST_GVA)?;
        a.mov(rbx, qword_ptr(rax))?;
        a.mov(qword_ptr(rax), rbx)?;
        attempt_jump(a)?;
        // The code there is a return: with the right to execute, it comes back.
        a.mov(qword_ptr(FREE + 0x3000), i32::try_from(FREE + 0x4000).unwrap_or(0) | 1)?;
        a.invlpg(ptr(rax))?;
        a.call(rax)?;
        report(a, rbx)
    });
    let ended = run(&one_page(guest, PW | NO_EXECUTE)).powered_off();
    assert_eq!(ended.vectors(), [(14, 9), (14, 0x11)]);
    assert_eq!(ended.values(), [0xc3c3_c3c3_c3c3_c3c3]);
}

fn own_code_taken_away() {
    // The entry that maps the code, and all else below 1 GiB, is gone; no CR3 load, no `invlpg`: the
    // old translation may live on for some time, and then the guest ends.
    let guest = Guest::new(|a| {
        a.mov(rax, BOOT_PDPT)?;
        a.mov(qword_ptr(rax), 0)?;
        a.mov(rbx, cr3)?;
        a.mov(cr3, rbx)?;
        power_off(a)
    });
    // The first fault is that of the fetch, the last one that of the IDT's gate for it.
    let gate = format!("CR2 {:#x}", IDT + 14 * 16);
    run(&guest).failed_with(&["triple fault", "exception 14", &gate]);
}

fn tables_written_through_themselves() {
    // Ten thousand times: map the next page in the table that maps the window onto the tables, use
    // the mapping, take it away.
    let guest = with_slot_1((FREE + 0x1000) | PW, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 10_000)?;
        a.xor(ebx, ebx)?;
        a.mov(r9, TEST_GVA)?;
        a.set_label(&mut again)?;
        // Slot 1 of the last table, which is itself mapped at slot 0.
        a.mov(qword_ptr(r9 + 8), i32::try_from(FREE + 0x4000).unwrap_or(0) | 3)?;
        a.mov(qword_ptr(r9 + 0x1000), rcx)?;
        a.add(rbx, qword_ptr(r9 + 0x1000))?;
        a.mov(qword_ptr(r9 + 8), 0)?;
        a.invlpg(ptr(r9 + 0x1000))?;
        a.dec(ecx)?;
        a.jne(again)?;
        attempt(a, |a| a.mov(rax, qword_ptr(r9 + 0x1000)))?;
        report(a, rbx)
    })
    .with_table(FREE + 0x1000, &[(0, (FREE + 0x2000) | PW)])
    .with_table(FREE + 0x2000, &[(0, (FREE + 0x3000) | PW)])
    .with_table(FREE + 0x3000, &[(0, (FREE + 0x3000) | PW)]);
    let ended = run(&guest).powered_off();
    assert_eq!(ended.values(), [10_000 * 10_001 / 2]);
    assert_eq!(ended.vectors(), [(14, 0)]);
}
