//! `ins` and `outs`, to ports that the processor lets through and to those that trap.

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;
use std::time::Duration;

use crate::guest::{FREE, Guest, attempt, power_off, report};
use crate::machine::Machine;
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("strings_of_every_width", strings_of_every_width),
        kvm_trial("strings_stop_at_a_fault_and_go_on", strings_stop_at_a_fault_and_go_on),
        kvm_trial("an_endless_string_is_killed", an_endless_string_is_killed),
        kvm_trial("a_hypercall_by_a_string", a_hypercall_by_a_string),
    ]
}

/// A port of the UART that keeps what is written, and one that nothing is behind.
const SCRATCH: u32 = abi::PORT_SERIAL as u32 + 7;
const NOTHING: u32 = 0x2e8;
/// What an unknown port reads as, and what the scratch register does after `outs`.
const UNMAPPED: u64 = 2 << 40;

fn strings_of_every_width() {
    for port in [SCRATCH, NOTHING] {
        let guest = Guest::new(|a| {
            a.mov(edx, port)?;
            // Three bytes out, of which the last stays in the register; five of it in, downwards.
            a.mov(rsi, FREE)?;
            a.mov(ecx, 3)?;
            a.rep().outsb()?;
            a.lea(rdi, ptr(FREE + 0x104))?;
            a.mov(ecx, 5)?;
            a.std()?;
            a.rep().insb()?;
            a.cld()?;
            a.mov(rbx, rcx)?;
            a.mov(rbp, rdi)?;
            a.mov(r14, rsi)?;
            a.mov(r13, qword_ptr(FREE + 0x100))?;
            for register in [rbx, rbp, r14, r13] {
                report(a, register)?;
            }
            // One without a count, and a count of none.
            a.mov(edx, port)?;
            a.mov(rdi, FREE + 0x200)?;
            a.xor(ecx, ecx)?;
            a.insb()?;
            a.rep().insb()?;
            a.rep().outsb()?;
            a.mov(rbx, rdi)?;
            a.mov(rbp, qword_ptr(FREE + 0x200))?;
            report(a, rbx)?;
            report(a, rbp)?;
            // Wider ones, where nothing is: all ones.
            a.mov(edx, NOTHING)?;
            a.mov(rdi, FREE + 0x300)?;
            a.insw()?;
            a.insd()?;
            a.mov(rbx, rdi)?;
            a.mov(rbp, qword_ptr(FREE + 0x300))?;
            report(a, rbx)?;
            report(a, rbp)?;
            power_off(a)
        });
        let ended = Machine::default().run(&guest.with(FREE, vec![1, 2, 3])).powered_off();
        let byte = if port == SCRATCH { 3 } else { 0xff };
        let five = u64::from_le_bytes([byte, byte, byte, byte, byte, 0, 0, 0]);
        let counted = [0, FREE + 0xff, FREE + 3, five];
        let single = [FREE + 0x201, u64::from(byte), FREE + 0x306, 0xffff_ffff_ffff];
        assert_eq!(ended.values(), [&counted[..], &single].concat(), "port {port:#x}");
        assert_eq!(ended.vectors(), []);
    }
}

fn strings_stop_at_a_fault_and_go_on() {
    // The second of two pages is not mapped: the string stops there, and goes on once it is.
    const TABLES: u64 = FREE + 0x1_0000;
    const LEAF: u64 = TABLES + 0x3000;
    const GVA: u64 = 1 << 39;
    for port in [SCRATCH, NOTHING] {
        for out in [false, true] {
            let guest = Guest::new(|a| {
                a.mov(rax, TABLES)?;
                a.mov(cr3, rax)?;
                a.mov(edx, port)?;
                a.mov(rdi, GVA + 0xffd)?;
                a.mov(rsi, rdi)?;
                a.mov(ecx, 5)?;
                attempt(a, |a| if out { a.rep().outsb() } else { a.rep().insb() })?;
                a.mov(rbx, rcx)?;
                a.mov(rbp, rdi)?;
                a.mov(r14, rsi)?;
                a.mov(dword_ptr(LEAF + 8), i32::try_from(FREE + 0x1000).unwrap_or(0) | 3)?;
                a.mov(r8, rbx)?;
                a.mov(r9, rbp)?;
                a.mov(r10, r14)?;
                for register in [r8, r9, r10] {
                    report(a, register)?;
                }
                a.mov(rcx, rbx)?;
                a.mov(rdi, rbp)?;
                a.mov(rsi, r14)?;
                a.mov(edx, port)?;
                if out { a.rep().outsb() } else { a.rep().insb() }?;
                a.mov(rbx, rcx)?;
                report(a, rbx)?;
                power_off(a)
            })
            .with_table(TABLES, &[(0, 0xa000 | 3), (1, (TABLES + 0x1000) | 3)])
            .with_table(TABLES + 0x1000, &[(0, (TABLES + 0x2000) | 3)])
            .with_table(TABLES + 0x2000, &[(0, LEAF | 3)])
            .with_table(LEAF, &[(0, FREE | 3)]);
            let ended = Machine::default().run(&guest).powered_off();
            let fault = ended.fault();
            let error_code = if out { 0 } else { 2 };
            let expected = (14, error_code, GVA + 0x1000, 0);
            assert_eq!((fault.vector, fault.error_code, fault.cr2, fault.rip), expected);
            let (start, at) = (GVA + 0xffd, GVA + 0x1000);
            let registers = if out { [2, start, at, 0] } else { [2, at, start, 0] };
            assert_eq!(ended.values(), registers, "port {port:#x}");
        }
    }
}

fn an_endless_string_is_killed() {
    let machine = Machine { within: Duration::from_millis(200), ..Machine::default() };
    // Strings of eight pages without end, all from or to the same memory by way of one port each.
    for (port, out) in [(NOTHING, true), (SCRATCH, true), (NOTHING, false)] {
        let guest = Guest::new(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(edx, port)?;
            a.mov(rsi, FREE)?;
            a.mov(rdi, FREE)?;
            a.mov(rcx, 0x8000u64)?;
            if out { a.rep().outsb() } else { a.rep().insb() }?;
            a.jmp(again)
        });
        let (_, ended_by_itself) = machine.run_at_most(&guest, |_| {});
        assert!(!ended_by_itself);
    }
    // A single instruction that comes to no end: from 512 GiB on all addresses lead to the same page.
    const TABLES: u64 = FREE + 0x1_0000;
    let all = |table: u64| (0..512).map(|index| (index, table | 3)).collect::<Vec<_>>();
    let mut top = vec![(0, 0xa000 | 3)];
    top.extend((1..128).map(|index| (index, (TABLES + 0x1000) | 3)));
    for port in [NOTHING, SCRATCH] {
        let guest = Guest::new(|a| {
            a.mov(rax, TABLES)?;
            a.mov(cr3, rax)?;
            a.mov(edx, port)?;
            a.mov(rsi, 1u64 << 39)?;
            a.mov(rcx, 1u64 << 60)?;
            a.rep().outsb()?;
            power_off(a)
        })
        .with_table(TABLES, &top)
        .with_table(TABLES + 0x1000, &all(TABLES + 0x2000))
        .with_table(TABLES + 0x2000, &all(TABLES + 0x3000))
        .with_table(TABLES + 0x3000, &all(FREE));
        let (ended, ended_by_itself) = machine.run_at_most(&guest, |_| {});
        assert!(!ended_by_itself, "port {port:#x}: {ended:?}");
        assert_eq!(ended.faults(), [], "port {port:#x}");
    }
}

fn a_hypercall_by_a_string() {
    // The number is EAX's, 0, the key is RDI's; what is in memory means nothing.
    let guest = Guest::new(|a| {
        a.mov(edx, u32::from(abi::PORT_HYPERCALL))?;
        a.xor(eax, eax)?;
        a.xor(edi, edi)?;
        a.mov(rsi, FREE)?;
        a.outsd()?;
        a.mov(rbx, rax)?;
        report(a, rbx)?;
        a.mov(rsi, UNMAPPED)?;
        a.mov(edx, u32::from(abi::PORT_HYPERCALL))?;
        attempt(a, |a| a.outsd())?;
        power_off(a)
    });
    let ended = Machine::default().run(&guest.with(FREE, vec![4, 0, 0, 0])).powered_off();
    assert_eq!(ended.values(), [abi::ABI_VERSION]);
    assert_eq!(ended.vectors(), [(14, 0)]);
}
