//! Instructions, CPUID, control registers, flags.

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{
    FREE, Guest, IDT, IDT_POINTER, Written, attempt, gate, handler, pointer, power_off, report,
};
use crate::machine::{Ended, Machine};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("cpuid_names_what_can_be_used", cpuid_names_what_can_be_used),
        kvm_trial("every_bit_of_cr4", every_bit_of_cr4),
        kvm_trial("absent_instructions_are_undefined", absent_instructions_are_undefined),
        kvm_trial("set_up_instructions", set_up_instructions),
        kvm_trial("interrupts_by_number", interrupts_by_number),
        kvm_trial("the_interrupt_flag_is_always_set", the_interrupt_flag_is_always_set),
        kvm_trial("no_access_is_checked_for_alignment", no_access_is_checked_for_alignment),
        kvm_trial("calls_of_the_hosts_kvm", calls_of_the_hosts_kvm),
        kvm_trial("segment_registers", segment_registers),
        kvm_trial("a_stack_segment_holds_traps_back", a_stack_segment_holds_traps_back),
    ]
}

type Write = fn(&mut CodeAssembler) -> Written;

fn run(guest: &Guest) -> Ended {
    Machine::default().run(guest)
}

/// EAX, EBX, ECX and EDX of these leaves and subleaves, by two vCPUs' worth of `cpuid`.
fn cpuid(leaves: &[(u32, u32)]) -> Vec<[u64; 4]> {
    let guest = Guest::new(|a| {
        for &(leaf, subleaf) in leaves {
            // Upper halves are to be cleared.
            a.mov(rax, u64::from(leaf) | 1 << 63)?;
            a.mov(rcx, u64::from(subleaf) | 1 << 63)?;
            a.or(rbx, -1)?;
            a.or(rdx, -1)?;
            a.cpuid()?;
            for (register, kept) in [rax, rbx, rcx, rdx].into_iter().zip([r8, r9, r10, r11]) {
                a.mov(kept, register)?;
            }
            for register in [r8, r9, r10, r11] {
                report(a, register)?;
            }
        }
        power_off(a)
    });
    let values = run(&guest).powered_off().values();
    values.chunks_exact(4).map(|words| [words[0], words[1], words[2], words[3]]).collect()
}

fn bits(numbers: &[u32]) -> u64 {
    numbers.iter().map(|number| 1 << number).sum()
}

fn cpuid_names_what_can_be_used() {
    let leaves = [
        (0, 0),
        (1, 0),
        (7, 0),
        (7, 1),
        (0xd, 0),
        (0xd, 1),
        (0x8000_0000, 0),
        (0x8000_0001, 0),
        (0x8000_0007, 0),
        (0x8000_0008, 0),
    ];
    let found = cpuid(&leaves);
    assert!((1..=0x18).contains(&found[0][0]), "{found:x?}");
    let [_, b, c, d] = found[1];
    assert_eq!(b & !0xff00, 0, "nothing but what clflush flushes: {b:#x}");
    let named = [0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 27, 28, 29, 30, 31];
    assert_eq!(c & !bits(&named), 0, "leaf 1, ECX {c:#x}");
    assert_ne!(c & bits(&[31]), 0, "a hypervisor");
    let named = [0, 3, 4, 5, 6, 8, 13, 15, 16, 17, 19, 23, 24, 25, 26, 27];
    assert_eq!(d & !bits(&named), 0, "leaf 1, EDX {d:#x}");
    let [a, b, c, d] = found[2];
    assert!(a <= 1);
    assert_eq!(b & !bits(&[0, 3, 5, 6, 8, 9, 13, 18, 19, 23, 24, 29]), 0, "leaf 7 {b:#x}");
    assert_eq!(c & !bits(&[0, 8, 9, 10, 25, 27, 28]), 0, "leaf 7, ECX {c:#x}");
    assert_eq!(d & !bits(&[4, 10, 14]), 0, "leaf 7, EDX {d:#x}");
    assert_eq!(found[3][0] & !bits(&[0, 1, 2, 4, 7, 10, 11, 12, 23]), 0);
    assert_eq!(found[3][3] & !bits(&[4, 5, 10, 14]), 0);
    let has_xsave = found[1][2] & bits(&[26]) != 0;
    assert_eq!(
        has_xsave,
        found[1][2] & bits(&[27]) != 0,
        "OSXSAVE is CR4's, which is set at entry"
    );
    assert_eq!(found[4][0] & 0b11, if has_xsave { 0b11 } else { 0 }, "{found:x?}");
    assert_eq!(found[5][0] & !0b111, 0);
    assert!((0x8000_0000..=0x8000_0008).contains(&found[6][0]));
    assert_eq!(found[7][2] & !bits(&[0, 5, 6, 7, 8, 11, 16, 21]), 0);
    assert_ne!(found[7][3] & bits(&[26]), 0, "pages of 1 GiB");
    assert_ne!(found[7][3] & bits(&[20, 29]), 0, "NX, long mode");
    assert_eq!(found[7][3] & bits(&[11, 25, 27]), 0, "SYSCALL, FFXSR, RDTSCP");
    assert_eq!(found[8][..3], [0, 0, 0]);
    let [a, b, c, d] = found[9];
    assert_eq!((a >> 8, b & !bits(&[0, 9]), c, d), (48, 0, 0, 0));
    // A leaf that is not in the table.
    let silent = [3, 5, 6, 0xa, 0xb, 0x14, 0x40, 0x4000_0000, 0x4000_0001, 0x8000_000a, u32::MAX];
    for (leaf, words) in silent.iter().zip(cpuid(&silent.map(|leaf| (leaf, 0)))) {
        assert_eq!(words, [0; 4], "leaf {leaf:#x}");
    }
}

fn every_bit_of_cr4() {
    let found = cpuid(&[(1, 0), (7, 0)]);
    let xsave = found[0][2] >> 26 & 1;
    let fsgsbase = found[1][1] & 1;
    let can_be_set = bits(&[2, 4, 5, 7, 8, 9, 10]) | fsgsbase << 16 | xsave << 18;
    // For each bit: what CR4 is after it was turned over; a fault reports itself.
    let guest = |bits: std::ops::Range<u32>| {
        Guest::new(move |a| {
            a.mov(rbp, cr4)?;
            for bit in bits {
                a.mov(rax, rbp)?;
                a.mov(rdx, 1u64 << bit)?;
                a.xor(rax, rdx)?;
                attempt(a, |a| a.mov(cr4, rax))?;
                a.mov(rbx, cr4)?;
                a.xor(rbx, rbp)?;
                report(a, rbx)?;
                a.mov(cr4, rbp)?;
            }
            power_off(a)
        })
    };
    // No more reports than are kept.
    for first in (0..64).step_by(16) {
        let ended = run(&guest(first..first + 16)).powered_off();
        let mut refused = 0;
        for (bit, changed) in (first..).zip(ended.values()) {
            // PAE cannot be cleared.
            let can = can_be_set & !bits(&[5]) & 1 << bit != 0;
            assert_eq!(changed, if can { 1 << bit } else { 0 }, "bit {bit}");
            refused += usize::from(!can);
        }
        assert_eq!(ended.vectors(), vec![(13, 0); refused]);
    }
}

fn absent_instructions_are_undefined() {
    let cases: [Write; 19] = [
        |a| a.syscall(),
        |a| a.sysenter(),
        |a| a.sysretq(),
        |a| a.sysexitq(),
        |a| a.monitor(),
        |a| a.mwait(),
        |a| a.invpcid(rax, xmmword_ptr(rsp)),
        |a| a.xsaves(ptr(rsp)),
        |a| a.stac(),
        |a| a.clac(),
        |a| a.vmlaunch(),
        |a| a.vmxoff(),
        |a| a.vmrun(),
        |a| a.stgi(),
        // mov rax, cr1; mov cr5, rax; mov rax, cr9; mov rax, dr8; lock mov rax, cr0
        |a| a.db(&[0x0f, 0x20, 0xc8]),
        |a| a.db(&[0x0f, 0x22, 0xe8]),
        |a| a.db(&[0x44, 0x0f, 0x20, 0xc8]),
        |a| a.db(&[0x44, 0x0f, 0x21, 0xc0]),
        |a| a.db(&[0xf0, 0x0f, 0x20, 0xc0]),
    ];
    let guest = Guest::new(|a| {
        for write in cases {
            a.xor(eax, eax)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            attempt(a, write)?;
        }
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.vectors(), [(6, 0); 19]);
    assert!(ended.faults().iter().all(|fault| fault.rip == 0), "{ended:?}");
}

fn set_up_instructions() {
    // What a kernel does once.
    let guest = Guest::new(|a| {
        a.xor(eax, eax)?;
        a.lldt(ax)?;
        a.mov(eax, 0xffff_fff6u32)?;
        a.lmsw(ax)?;
        a.mov(rbx, cr0)?;
        report(a, rbx)?;
        a.clts()?;
        a.mov(rbx, cr0)?;
        report(a, rbx)?;
        a.wbinvd()?;
        a.wbnoinvd()?;
        a.invd()?;
        for index in [0xc000_0081u32, 0x10, 0x1b, 0xc000_0103] {
            a.mov(ecx, index)?;
            attempt(a, |a| a.rdmsr())?;
        }
        // EFER.SCE is kept.
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 1)?;
        a.wrmsr()?;
        a.rdmsr()?;
        a.mov(ebx, eax)?;
        report(a, rbx)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    let low = abi::ENTRY_CR0 & !0xf;
    assert_eq!(ended.values(), [low | 0x7, low | 0x7, abi::ENTRY_EFER | 1]);
    assert_eq!(ended.vectors(), [(13, 0); 4]);
    // `xsetbv`: the value at entry, where there is XSAVE; another is refused, as is all without it.
    let has_xsave = cpuid(&[(1, 0)])[0][2] >> 26 & 1 != 0;
    let guest = Guest::new(|a| {
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 0x2ff)?;
        attempt(a, |a| a.xsetbv())?;
        if has_xsave {
            a.xgetbv()?;
            a.xsetbv()?;
        }
        power_off(a)
    });
    let expected = if has_xsave { (13, 0) } else { (6, 0) };
    assert_eq!(run(&guest).powered_off().vectors(), [expected]);
}

fn interrupts_by_number() {
    // Gates for all vectors to a handler that counts in RBX and keeps the RIP that was pushed.
    let counting = crate::guest::assemble(FREE, |a| {
        a.inc(rbx)?;
        a.mov(rbp, qword_ptr(rsp))?;
        a.iretq()
    });
    let table: Vec<u8> = (0..=255).flat_map(|_| gate(FREE, 0)).collect();
    let guest = Guest::new(|a| {
        let mut behind = a.create_label();
        a.xor(ebx, ebx)?;
        // Some hosts have a use of their own for a few of those below 32.
        let vectors: Vec<u8> = [3, 4].into_iter().chain(32..=255).collect();
        for (before, vector) in (0..).zip(vectors) {
            let mut counted = a.create_label();
            a.int(u32::from(vector))?;
            a.cmp(ebx, before + 1)?;
            a.je(counted)?;
            a.mov(ebx, u32::from(vector))?;
            report(a, rbx)?;
            a.mov(ebx, before + 1)?;
            a.set_label(&mut counted)?;
        }
        a.int3()?;
        a.int(0x80)?;
        a.set_label(&mut behind)?;
        a.lea(rax, ptr(behind))?;
        a.sub(rbp, rax)?;
        report(a, rbp)?;
        report(a, rbx)?;
        power_off(a)
    })
    .with(IDT, table)
    .with(IDT_POINTER, pointer(IDT, 0xfff))
    .with(FREE, counting);
    assert_eq!(run(&guest).powered_off().values(), [0, 228], "no error code, RIP behind it");
}

fn the_interrupt_flag_is_always_set() {
    let guest = Guest::new(|a| {
        for write in [
            (|a| a.cli()) as Write,
            |a| a.sti(),
            |a| {
                a.push(2)?;
                a.popfq()
            },
        ] {
            write(a)?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.and(ebx, 0x3202)?;
            report(a, rbx)?;
        }
        // IOPL cannot be set either.
        a.push(0x3002)?;
        a.popfq()?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.and(ebx, 0x3202)?;
        report(a, rbx)?;
        power_off(a)
    });
    assert_eq!(run(&guest).powered_off().values(), [0x202; 4]);
}

fn no_access_is_checked_for_alignment() {
    for alignment_mask in [false, true] {
        let guest = Guest::new(|a| {
            if alignment_mask {
                a.mov(rax, cr0)?;
                a.bts(rax, 18)?;
                a.mov(cr0, rax)?;
            }
            a.pushfq()?;
            a.or(dword_ptr(rsp), 0x4_0000)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.and(ebx, 0x4_0000)?;
            report(a, rbx)?;
            attempt(a, |a| a.mov(rax, qword_ptr(rsp - 15)))?;
            attempt(a, |a| a.mov(qword_ptr(rsp - 15), rax))?;
            power_off(a)
        });
        let ended = run(&guest).powered_off();
        assert_eq!((ended.values(), ended.vectors()), (vec![0x4_0000], vec![]));
    }
}

fn calls_of_the_hosts_kvm() {
    for write in [(|a| a.vmcall()) as Write, |a| a.vmmcall()] {
        let guest = Guest::new(|a| {
            a.xor(eax, eax)?;
            attempt(a, write)?;
            a.mov(rbx, rax)?;
            report(a, rbx)?;
            power_off(a)
        });
        let ended = run(&guest).powered_off();
        match ended.vectors()[..] {
            [] => assert_eq!(ended.values(), [u64::MAX]),
            [(vector, 0)] => assert!(matches!(vector, 6 | 13), "{ended:?}"),
            _ => panic!("{ended:?}"),
        }
    }
}

fn segment_registers() {
    let guest = Guest::new(|a| {
        for selector in [0x2bu32, 0] {
            a.mov(eax, selector)?;
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
        }
        a.mov(eax, 0)?;
        a.mov(fs, eax)?;
        a.mov(gs, eax)?;
        a.mov(ss, eax)?;
        // SS is flat all the same.
        a.push(77)?;
        a.pop(rbx)?;
        report(a, rbx)?;
        a.mov(eax, 0x2b)?;
        a.mov(ss, eax)?;
        a.mov(eax, ss)?;
        a.mov(ebx, eax)?;
        report(a, rbx)?;
        a.mov(eax, 0x10)?;
        attempt(a, |a| a.mov(ds, eax))?;
        attempt(a, |a| a.mov(ss, eax))?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.values(), [77, 0x2b]);
    assert_eq!(ended.vectors(), [(13, 0x10); 2]);
}

fn a_stack_segment_holds_traps_back() {
    // #DB after the instruction that follows an emulated `mov ss`: its handler keeps the first RIP.
    let stepping = crate::guest::assemble(FREE, |a| {
        let mut not_first = a.create_label();
        a.test(rbp, rbp)?;
        a.jne(not_first)?;
        a.mov(rbp, qword_ptr(rsp))?;
        a.set_label(&mut not_first)?;
        a.and(qword_ptr(rsp + 16), !0x100)?;
        a.iretq()
    });
    let guest = Guest::new(|a| {
        let mut behind = a.create_label();
        a.xor(eax, eax)?;
        a.xor(ebp, ebp)?;
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x100)?;
        a.popfq()?;
        // Steps over `mov ss` and what comes behind it.
        a.mov(ss, eax)?;
        a.nop()?;
        a.set_label(&mut behind)?;
        a.nop()?;
        a.lea(rax, ptr(behind))?;
        a.sub(rbp, rax)?;
        report(a, rbp)?;
        power_off(a)
    });
    let gates: Vec<u8> =
        (0..32).flat_map(|v| gate(if v == 1 { FREE } else { handler(v) }, 0)).collect();
    let ended = run(&guest.with(IDT, gates).with(FREE, stepping)).powered_off();
    assert_eq!(ended.values(), [0]);
}
