//! The state at entry, the boot area, the pinned window.

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{FREE, Guest, STACK_TOP, Written, hypercall, power_off, report};
use crate::machine::Machine;
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("entry_state", entry_state),
        kvm_trial("state_of_a_started_vcpu", state_of_a_started_vcpu),
        kvm_trial("boot_area", boot_area),
        kvm_trial("control_block", control_block),
    ]
}

/// Where the guests keep what they find, a word each.
const FOUND: u64 = FREE;
const GENERAL: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

/// Stores all registers at [`FOUND`], the general ones first, in the order of [`Found`].
fn store_everything(a: &mut CodeAssembler) -> Written {
    for (register, at) in GENERAL.into_iter().zip((FOUND..).step_by(8)) {
        a.mov(qword_ptr(at), register)?;
    }
    let mut at = FOUND + 16 * 8;
    let mut next = |a: &mut CodeAssembler| {
        at += 8;
        a.mov(qword_ptr(at - 8), rax)
    };
    a.mov(rsp, STACK_TOP)?;
    a.pushfq()?;
    a.pop(rax)?;
    next(a)?;
    for read in [cr0, cr2, cr3, cr4] {
        a.mov(rax, read)?;
        next(a)?;
    }
    for index in [0xc000_0080u32, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0x277] {
        a.mov(ecx, index)?;
        a.rdmsr()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        next(a)?;
    }
    for segment in [cs, ss, ds, es, fs, gs] {
        a.mov(eax, segment)?;
        next(a)?;
    }
    a.xor(eax, eax)?;
    a.push(rax)?;
    a.stmxcsr(dword_ptr(rsp))?;
    a.pop(rax)?;
    next(a)?;
    a.push(0)?;
    a.fnstcw(word_ptr(rsp))?;
    a.pop(rax)?;
    next(a)
}

/// Reports so many words from [`FOUND`] on.
fn report_found(a: &mut CodeAssembler, words: u64) -> Written {
    for word in 0..words {
        a.mov(rbx, qword_ptr(FOUND + word * 8))?;
        report(a, rbx)?;
    }
    Ok(())
}

/// Words that [`store_everything`] stores.
const WORDS: u64 = 16 + 1 + 4 + 5 + 6 + 2;

/// What they must be, with this in RSI and RDI.
fn expected(rsi_value: u64, rdi_value: u64, control_4: u64) -> Vec<u64> {
    let mut words = vec![0; 16];
    (words[6], words[7]) = (rsi_value, rdi_value);
    words.extend([abi::ENTRY_RFLAGS, abi::ENTRY_CR0, 0, abi::BOOT_PML4_GPA, control_4]);
    words.extend([abi::ENTRY_EFER, 0, 0, 0, 0x0007_0406_0007_0406]);
    words.extend([abi::SELECTOR_CODE, abi::SELECTOR_DATA, 0, 0, 0, 0].map(u64::from));
    words.extend([0x1f80, 0x37f]);
    words
}

/// CR4 at entry: OSXSAVE where CPUID names XSAVE, which the last two values say.
fn entry_cr4(xsave_and_osxsave: u64) -> u64 {
    match xsave_and_osxsave {
        0 => abi::ENTRY_CR4,
        0x0c00_0000 => abi::ENTRY_CR4 | 1 << 18,
        other => panic!("XSAVE and OSXSAVE differ: {other:#x}"),
    }
}

fn report_xsave(a: &mut CodeAssembler) -> Written {
    a.mov(eax, 1)?;
    a.cpuid()?;
    a.and(ecx, 0x0c00_0000)?;
    a.mov(ebx, ecx)?;
    report(a, rbx)
}

fn entry_state() {
    let guest = Guest::bare(|a| {
        store_everything(a)?;
        report_found(a, WORDS)?;
        report_xsave(a)?;
        power_off(a)
    });
    let mut values = Machine::default().run(&guest).powered_off().values();
    let control_4 = entry_cr4(values.pop().expect("a value"));
    assert_eq!(values, expected(abi::BOOT_PARAMS_GPA, 0, control_4));
}

fn state_of_a_started_vcpu() {
    let guest = Guest::bare(|a| {
        let mut other = a.create_label();
        // A caller in another state than at entry, where it is to make no difference.
        a.mov(rsp, STACK_TOP)?;
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x400)?;
        a.popfq()?;
        a.mov(rax, 77u64)?;
        a.mov(cr2, rax)?;
        a.mov(ecx, 0xc000_0102u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(edi, 1)?;
        a.lea(rsi, ptr(other))?;
        a.mov(ecx, 42)?;
        hypercall(a, abi::HC_START_VCPU)?;
        a.hlt()?;
        a.set_label(&mut other)?;
        store_everything(a)?;
        report_found(a, WORDS)?;
        report_xsave(a)?;
        power_off(a)
    });
    let machine = Machine { vcpus: 2, ..Machine::default() };
    let mut values = machine.run(&guest).powered_off().values();
    let control_4 = entry_cr4(values.pop().expect("a value"));
    assert_eq!(values, expected(0, 42, control_4));
}

fn boot_area() {
    // The header's magic, the command line's address and first byte, the map's length and entries.
    let guest = Guest::new(|a| {
        a.mov(ebx, dword_ptr(rsi + 0x202))?;
        a.mov(r13d, dword_ptr(rsi + 0x228))?;
        a.movzx(r14d, byte_ptr(rsi + 0x1e8))?;
        a.movzx(ebp, byte_ptr(r13))?;
        for register in [rbx, r13, r14, rbp] {
            report(a, register)?;
        }
        a.mov(rbp, abi::BOOT_PARAMS_GPA + 0x2d0)?;
        for entry in 0..4 {
            for field in [0, 8, 16] {
                a.mov(rbx, qword_ptr(rbp + (entry * 20 + field)))?;
                report(a, rbx)?;
            }
        }
        // The boot tables: the last addresses of both ranges, of which only the second has memory.
        a.mov(rbx, qword_ptr(abi::BOOT_PML4_GPA))?;
        a.mov(rbp, qword_ptr(abi::BOOT_PML4_GPA + 8))?;
        a.mov(r14, qword_ptr(abi::BOOT_PML4_GPA + 16))?;
        a.and(ebx, 3)?;
        a.and(ebp, 3)?;
        report(a, rbx)?;
        report(a, rbp)?;
        report(a, r14)?;
        power_off(a)
    });
    let ended = Machine::default().run(&guest).powered_off();
    let values = ended.values();
    let magic = u64::from(u32::from_le_bytes(*b"HdrS"));
    assert_eq!(values[..4], [magic, abi::CMDLINE_GPA, 4, 0]);
    let window = abi::CONTROL_BYTES + 4 * 4096;
    let map = [
        [0, 0x9_fc00, 1],
        [0x9_fc00, 0x6_0400, 2],
        [1 << 20, 15 << 20, 1],
        [abi::WINDOW_GPA, window, 2],
    ];
    for (entry, found) in map.iter().zip(values[4..16].chunks_exact(3)) {
        // The kind has 4 bytes; what follows is the next entry's.
        assert_eq!([found[0], found[1], found[2] & 0xffff_ffff], *entry, "{values:x?}");
    }
    assert_eq!(values[16..], [3, 3, 0], "two entries, present and writable");
}

fn control_block() {
    let guest = Guest::new(|a| {
        a.mov(rbp, abi::WINDOW_GPA)?;
        for offset in [0, 8, 16, 24, 32, 40, 48, 56, 64] {
            a.mov(rbx, qword_ptr(rbp + offset))?;
            report(a, rbx)?;
        }
        a.mov(rbp, abi::WINDOW_GPA + abi::CONTROL_BYTES)?;
        a.mov(rbx, qword_ptr(rbp))?;
        report(a, rbx)?;
        // Counters of vCPU 1: the host sees them.
        a.mov(rbp, abi::WINDOW_GPA + 64 + 64)?;
        a.mov(qword_ptr(rbp), 5)?;
        power_off(a)
    });
    let machine = Machine { vcpus: 2, ..Machine::default() };
    let ended = machine.run(&guest).powered_off();
    let magic = u64::from_le_bytes(*b"GnomonCB");
    // Stop is 0, then the number of vCPUs; RAM; generation and the rest are zeros.
    assert_eq!(ended.values(), [magic, 2 << 32, 16 << 20, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(ended.guest_counters.verified, 5);
    let info = Guest::new(|a| {
        for key in
            [abi::INFO_ABI_VERSION, abi::INFO_VCPUS, abi::INFO_MEMORY_BYTES, abi::INFO_WINDOW_BYTES]
        {
            a.mov(rdi, key)?;
            hypercall(a, abi::HC_INFO)?;
            a.mov(rbx, rax)?;
            report(a, rbx)?;
        }
        power_off(a)
    });
    let values = machine.run(&info).powered_off().values();
    let window = abi::CONTROL_BYTES + 4 * 4096;
    assert_eq!(values, [abi::ABI_VERSION, 2, 16 << 20, window]);
}
