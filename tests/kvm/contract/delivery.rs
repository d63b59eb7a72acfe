//! Delivery of exceptions: what is looked at in which order, error codes, what is saved.

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{
    FREE, GDT_POINTER, Guest, IDT, IDT_POINTER, STACK_TOP, TSS, TSS_SELECTOR, Written, assemble,
    attempt, gate, handler, idt_with, pointer, power_off, report, tss,
};
use crate::machine::{Fault, Machine};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("gates_in_the_order_of_the_table", gates_in_the_order_of_the_table),
        kvm_trial(
            "where_an_interrupt_that_fails_was_asked_for",
            where_an_interrupt_that_fails_was_asked_for,
        ),
        kvm_trial("address_of_a_failed_push", address_of_a_failed_push),
        kvm_trial("what_is_saved", what_is_saved),
        kvm_trial("a_number_asked_for_is_benign", a_number_asked_for_is_benign),
        kvm_trial("stack_addresses_that_are_none", stack_addresses_that_are_none),
        kvm_trial("stack_operands_that_are_none", stack_operands_that_are_none),
    ]
}

/// What comes of `code` if gate `vector` is `bad`, on the stack or the TSS that there is.
fn with_gate(vector: u8, bad: [u8; 16], limit: u16, stack: u64, code: &[u8]) -> Fault {
    let table = idt_with(|number| if number == vector { bad } else { gate(handler(number), 0) });
    let guest = Guest::new(|a| {
        a.lgdt(ptr(GDT_POINTER))?;
        a.mov(eax, u32::from(TSS_SELECTOR))?;
        a.ltr(ax)?;
        attempt(a, |a| a.db(code))?;
        power_off(a)
    });
    let guest = guest.with(IDT, table).with(IDT_POINTER, pointer(IDT, limit));
    Machine::default().run(&guest.with(TSS, tss([stack; 7]))).powered_off().fault()
}

fn gates_in_the_order_of_the_table() {
    const ALL: u16 = 0xfff;
    let changed = |change: &dyn Fn(&mut [u8; 16])| {
        let mut gate = gate(FREE, 0);
        change(&mut gate);
        gate
    };
    let absent = |gate: &mut [u8; 16]| gate[5] &= !0x80;
    let kind = |gate: &mut [u8; 16]| gate[5] = gate[5] & 0xf0 | 5;
    let selector = |gate: &mut [u8; 16]| gate[2] = 0x1b;
    let far = |gate: &mut [u8; 16]| gate[10] = 1;
    let interrupt_stack = |gate: &mut [u8; 16]| gate[4] = 1;
    // What is wrong, and what is so, too, without being looked at.
    let cases: [([u8; 16], u64, u64); 6] = [
        (changed(&|g| [kind, absent].iter().for_each(|f| f(g))), 13, 2),
        (
            changed(&|g| {
                absent(g);
                selector(g)
            }),
            11,
            2,
        ),
        (
            changed(&|g| {
                selector(g);
                far(g)
            }),
            13,
            0x18,
        ),
        (
            changed(&|g| {
                far(g);
                interrupt_stack(g)
            }),
            13,
            0,
        ),
        (changed(&interrupt_stack), 12, 0),
        ([0; 16], 13, 2),
    ];
    // `ud2` is external, `int3` and `int 6` are not.
    for (code, vector, ext) in [(&[0x0f, 0x0b][..], 6u8, 1), (&[0xcc], 3, 0), (&[0xcd, 6], 6, 0)] {
        for (bad, raised, low) in cases {
            let index = if low == 2 { u64::from(vector) * 8 } else { 0 };
            let fault = with_gate(vector, bad, ALL, 1 << 47, code);
            let expected = (raised, index + low + ext, 0, STACK_TOP);
            assert_eq!(
                (fault.vector, fault.error_code, fault.rip, fault.rsp),
                expected,
                "{bad:x?}"
            );
        }
    }
    // Past the limit: gates up to #PF's are there.
    let fault = with_gate(0, gate(handler(0), 0), 15 * 16 - 1, 0, &[0xcd, 0x80]);
    assert_eq!((fault.vector, fault.error_code, fault.rip), (13, 0x80 * 8 + 2, 0));
    // The DPL means nothing, nor does the type between 14 and 15, nor the selector's RPL.
    for (byte, value) in [(5, 0xee), (5, 0x8f), (2, 0x30), (2, 0x32)] {
        let mut good = gate(handler(6), 0);
        good[byte] = value;
        assert_eq!(with_gate(6, good, ALL, 0, &[0x0f, 0x0b]).vector, 6, "byte {byte}: {value:#x}");
    }
}

fn where_an_interrupt_that_fails_was_asked_for() {
    // With and without two prefixes that mean nothing to it.
    for (code, rips) in [
        (&[0x66, 0x48, 0xcd, 0x80][..], &[0][..]),
        (&[0xcd, 0x80], &[0]),
        (&[0xcc], &[0]),
        (&[0x66, 0x48, 0xcc], &[2]),
        (&[0x66, 0x48, 0xcd, 3], &[0, 2]),
        (&[0x66, 0x48, 0xcd, 4], &[0, 2]),
    ] {
        let vector = if code.ends_with(&[0xcc]) { 3 } else { code[code.len() - 1] };
        let bad = |number| if number == vector { [0; 16] } else { gate(handler(number), 0) };
        let guest = Guest::new(|a| {
            attempt(a, |a| a.db(code))?;
            power_off(a)
        });
        let fault = Machine::default().run(&guest.with(IDT, idt_with(bad))).powered_off().fault();
        let code_of_gate = u64::from(vector) * 8 + 2;
        assert_eq!((fault.vector, fault.error_code), (13, code_of_gate), "{code:x?}");
        assert!(rips.contains(&fault.rip), "{code:x?}: RIP {:#x}", fault.rip);
    }
}

fn address_of_a_failed_push() {
    // Two pages: of the lower, of the upper, or of both the guest's tables have nothing. The frame of
    // #UD is 40 bytes, 16 of them in the upper page. #PF is delivered on the ordinary stack.
    const TABLES: u64 = FREE + 0x1_0000;
    const GVA: u64 = 1 << 39;
    const TOP: u64 = GVA + 0x1010;
    for (lower, upper, address, pushed) in
        [(0, 0, TOP - 8, 0), (3, 0, TOP - 8, 0), (0, 3, GVA + 0xff8, 0x2b)]
    {
        let guest = Guest::new(|a| {
            a.mov(rax, TABLES)?;
            a.mov(cr3, rax)?;
            a.lgdt(ptr(GDT_POINTER))?;
            a.mov(eax, u32::from(TSS_SELECTOR))?;
            a.ltr(ax)?;
            attempt(a, |a| a.ud2())?;
            a.mov(rbx, qword_ptr(FREE + 0x1008))?;
            report(a, rbx)?;
            power_off(a)
        })
        .with_table(TABLES, &[(0, 0xa000 | 3), (1, (TABLES + 0x1000) | 3)])
        .with_table(TABLES + 0x1000, &[(0, (TABLES + 0x2000) | 3)])
        .with_table(TABLES + 0x2000, &[(0, (TABLES + 0x3000) | 3)])
        .with_table(TABLES + 0x3000, &[(0, FREE | lower), (1, (FREE + 0x1000) | upper)])
        .with(IDT, idt_with(|vector| gate(handler(vector), u8::from(vector == 6))))
        .with(TSS, tss([TOP; 7]));
        let ended = Machine::default().run(&guest).powered_off();
        let fault = ended.fault();
        assert_eq!((fault.vector, fault.error_code, fault.cr2, fault.rip), (14, 2, address, 0));
        assert_eq!(ended.values(), [pushed], "what was pushed before the fault stays");
    }
}

fn what_is_saved() {
    // A handler that keeps the RFLAGS that were pushed, and those that it has itself.
    let keeping = |has_code| {
        assemble(FREE, |a| {
            if has_code {
                a.lea(rsp, ptr(rsp + 8))?;
            }
            a.mov(rbx, qword_ptr(rsp + 16))?;
            a.pushfq()?;
            a.pop(rbp)?;
            a.mov(qword_ptr(rsp), r15)?;
            a.iretq()
        })
    };
    let flags_of = |write: fn(&mut CodeAssembler) -> Written, vector: u8| {
        let gates = |number| gate(if number == vector { FREE } else { handler(number) }, 0);
        let guest = Guest::new(|a| {
            // NT and DF are set.
            a.pushfq()?;
            a.or(qword_ptr(rsp), 0x400)?;
            a.popfq()?;
            attempt(a, write)?;
            a.cld()?;
            report(a, rbx)?;
            report(a, rbp)?;
            power_off(a)
        });
        let guest = guest.with(IDT, idt_with(gates)).with(FREE, keeping(vector == 14));
        let values = Machine::default().run(&guest).powered_off().values();
        let relevant = 0x1_4700;
        (values[0] & relevant, values[1] & relevant)
    };
    const RF: u64 = 1 << 16;
    assert_eq!(flags_of(|a| a.ud2(), 6), (RF | 0x600, 0x600));
    assert_eq!(flags_of(|a| a.db(&[0x0f, 0x20, 0xc8]), 6), (RF | 0x600, 0x600));
    assert_eq!(flags_of(|a| a.mov(rax, qword_ptr(0x7000_0000_0000u64)), 14), (RF | 0x600, 0x600));
    assert_eq!(flags_of(|a| a.int3(), 3), (0x600, 0x600));
    assert_eq!(flags_of(|a| a.int(0x10), 16), (0x600, 0x600));
}

fn a_number_asked_for_is_benign() {
    // `int 14` through a bad gate: the #GP of that gate, not a double fault.
    let bad = |vector| if vector == 14 { [0; 16] } else { gate(handler(vector), 0) };
    let guest = Guest::new(|a| {
        attempt(a, |a| a.int(14))?;
        power_off(a)
    });
    let fault = Machine::default().run(&guest.with(IDT, idt_with(bad))).powered_off().fault();
    assert_eq!((fault.vector, fault.error_code, fault.rip), (13, 14 * 8 + 2, 0));
}

fn stack_addresses_that_are_none() {
    let guest = Guest::new(|a| {
        a.mov(rbp, 1u64 << 47)?;
        attempt(a, |a| a.mov(rax, qword_ptr(rbp)))?;
        a.mov(rax, 1u64 << 47)?;
        attempt(a, |a| a.mov(rax, qword_ptr(rax)))?;
        a.mov(rbp, abi::GVA_LIMIT)?;
        attempt(a, |a| a.mov(rax, qword_ptr(rbp)))?;
        power_off(a)
    });
    let vectors = Machine::default().run(&guest).powered_off().vectors();
    assert_eq!(vectors, [(12, 0), (13, 0), (13, 0)]);
}

/// The same of instructions that are emulated.
fn stack_operands_that_are_none() {
    let guest = Guest::new(|a| {
        a.mov(rbp, 1u64 << 47)?;
        attempt(a, |a| a.lgdt(ptr(rbp)))?;
        a.mov(rax, 1u64 << 47)?;
        attempt(a, |a| a.lidt(ptr(rax)))?;
        a.mov(rbp, abi::GVA_LIMIT)?;
        attempt(a, |a| a.lgdt(ptr(rbp)))?;
        power_off(a)
    });
    let vectors = Machine::default().run(&guest).powered_off().vectors();
    assert_eq!(vectors, [(12, 0), (13, 0), (13, 0)]);
}
