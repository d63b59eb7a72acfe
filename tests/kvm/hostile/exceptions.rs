//! Exceptions that cannot be delivered, or only by a detour.

use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{
    CODE, FREE, GDT, GDT_POINTER, Guest, IDT, IDT_POINTER, STACK_TOP, TSS, TSS_SELECTOR, assemble,
    attempt, gate, gdt, handler, idt_with, pointer, power_off, report, tss,
};
use crate::machine::{Ended, Machine};
use crate::trial::kvm_trial;

/// An address that the boot page tables do not map.
const UNMAPPED: u64 = 2 << 40;
/// An interrupt stack that is memory.
const SPARE_STACK: u64 = FREE + 0x1000;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("no_idt_ud2", no_idt_ud2),
        kvm_trial("no_idt_divide_error", no_idt_divide_error),
        kvm_trial("no_idt_page_fault", no_idt_page_fault),
        kvm_trial("handled_exceptions_resume", handled_exceptions_resume),
        kvm_trial("idt_in_unmapped_memory", idt_in_unmapped_memory),
        kvm_trial("idt_of_garbage_gates", idt_of_garbage_gates),
        kvm_trial("idt_of_absent_gates", idt_of_absent_gates),
        kvm_trial("idt_with_a_double_fault_gate_only", idt_with_a_double_fault_gate_only),
        kvm_trial("idt_limit_cuts_a_gate", idt_limit_cuts_a_gate),
        kvm_trial("gate_target_not_canonical", gate_target_not_canonical),
        kvm_trial("gate_target_in_the_monitor", gate_target_in_the_monitor),
        kvm_trial("interrupt_stack_unmapped", interrupt_stack_unmapped),
        kvm_trial("every_interrupt_stack_unmapped", every_interrupt_stack_unmapped),
        kvm_trial("interrupt_stack_in_the_monitor", interrupt_stack_in_the_monitor),
        kvm_trial("interrupt_stack_without_a_tss", interrupt_stack_without_a_tss),
        kvm_trial("stack_pointer_not_canonical", stack_pointer_not_canonical),
        kvm_trial("stack_pointer_not_canonical_no_way_out", stack_pointer_not_canonical_no_way_out),
        kvm_trial("page_fault_in_a_page_fault", page_fault_in_a_page_fault),
        kvm_trial("ltr_of_garbage", ltr_of_garbage),
        kvm_trial("lidt_and_lgdt_of_garbage", lidt_and_lgdt_of_garbage),
        kvm_trial("single_steps", single_steps),
    ]
}

fn run(guest: &Guest) -> Ended {
    Machine::default().run(guest)
}

fn no_idt_ud2() {
    let guest = Guest::bare(|a| {
        a.nop()?;
        a.ud2()
    });
    let rip = format!("RIP {:#x}", CODE + 1);
    run(&guest).failed_with(&["triple fault", "exception 6", "vCPU 0", &rip]);
}

fn no_idt_divide_error() {
    let guest = Guest::bare(|a| {
        a.xor(ecx, ecx)?;
        a.div(ecx)
    });
    let rip = format!("RIP {:#x}", CODE + 2);
    run(&guest).failed_with(&["triple fault", "exception 0", &rip]);
}

fn no_idt_page_fault() {
    let guest = Guest::bare(|a| {
        a.mov(rax, UNMAPPED)?;
        a.mov(qword_ptr(rax), rax)
    });
    run(&guest).failed_with(&["triple fault", "exception 14", "code 0x2", "CR2 0x20000000000"]);
}

fn handled_exceptions_resume() {
    let guest = Guest::new(|a| {
        attempt(a, |a| a.ud2())?;
        a.xor(ecx, ecx)?;
        attempt(a, |a| a.div(ecx))?;
        attempt(a, |a| a.int3())?;
        a.mov(rax, UNMAPPED + 5)?;
        attempt(a, |a| a.mov(rbx, qword_ptr(rax)))?;
        attempt(a, |a| a.mov(qword_ptr(rax), rbx))?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.vectors(), [(6, 0), (0, 0), (3, 0), (14, 0), (14, 2)]);
    // Faults point to the instruction, the trap of `int3` behind it.
    let rips: Vec<u64> = ended.faults().iter().map(|fault| fault.rip).collect();
    assert_eq!(rips, [0, 0, 1, 0, 0]);
    assert!(ended.faults().iter().all(|fault| fault.rsp == STACK_TOP), "{ended:?}");
    assert_eq!(ended.faults()[4].cr2, UNMAPPED + 5);
    assert_eq!(ended.counts.injected, 5);
    assert_eq!(ended.counts.guest_page_faults, 2);
}

fn idt_in_unmapped_memory() {
    let guest = Guest::new(|a| a.ud2()).with(IDT_POINTER, pointer(UNMAPPED, 0xfff));
    run(&guest).failed_with(&["triple fault", "exception 6", "CR2 0x200000000"]);
}

fn idt_of_garbage_gates() {
    // Types that are no 64-bit gates: every delivery is a #GP.
    for kind in [0x80, 0x82, 0x85, 0x89, 0x8c, 0x9e, 0xff] {
        let garbage = |_| {
            let mut gate = gate(handler(0), 0);
            gate[5] = kind;
            gate
        };
        let guest = Guest::new(|a| a.ud2()).with(IDT, idt_with(garbage));
        run(&guest).failed_with(&["triple fault", "exception 6"]);
    }
    let guest = Guest::new(|a| a.ud2()).with(IDT, vec![0xff; 512]);
    run(&guest).failed_with(&["triple fault", "exception 6"]);
}

fn idt_of_absent_gates() {
    let absent = |vector| {
        let mut gate = gate(handler(vector), 0);
        gate[5] &= !0x80;
        gate
    };
    let guest = Guest::new(|a| a.ud2()).with(IDT, idt_with(absent));
    run(&guest).failed_with(&["triple fault", "exception 6"]);
}

fn idt_with_a_double_fault_gate_only() {
    let only = |vector| if vector == 8 { gate(handler(8), 0) } else { [0; 16] };
    let guest = Guest::new(|a| {
        a.xor(ecx, ecx)?;
        attempt(a, |a| a.div(ecx))?;
        // A benign exception and two contributory ones.
        attempt(a, |a| a.ud2())?;
        a.mov(rax, UNMAPPED)?;
        attempt(a, |a| a.mov(qword_ptr(rax), rax))?;
        power_off(a)
    });
    let ended = run(&guest.with(IDT, idt_with(only))).powered_off();
    assert_eq!(ended.vectors(), [(8, 0); 3]);
    assert_eq!(ended.faults()[2].cr2, UNMAPPED, "CR2 is that of the page fault");
}

fn idt_limit_cuts_a_gate() {
    // The gate of #UD lacks its last byte; #GP, vector 13, is outside altogether, and so is #DF.
    let guest = Guest::new(|a| a.ud2()).with(IDT_POINTER, pointer(IDT, 7 * 16 - 2));
    run(&guest).failed_with(&["triple fault", "exception 6"]);
    // With one byte more it is delivered.
    let guest = Guest::new(|a| {
        attempt(a, |a| a.ud2())?;
        power_off(a)
    });
    let ended = run(&guest.with(IDT_POINTER, pointer(IDT, 7 * 16 - 1))).powered_off();
    assert_eq!(ended.vectors(), [(6, 0)]);
}

fn gate_target_not_canonical() {
    for target in [1 << 47, 0xffff_7fff_ffff_ffff] {
        let bad = |vector| match vector {
            6 => gate(target, 0),
            vector => gate(handler(vector), 0),
        };
        let guest = Guest::new(|a| {
            attempt(a, |a| a.ud2())?;
            power_off(a)
        });
        let ended = run(&guest.with(IDT, idt_with(bad))).powered_off();
        // The error code has the bit that says "external to the program".
        assert_eq!(ended.vectors(), [(13, 1)]);
    }
}

fn gate_target_in_the_monitor() {
    let bad = |vector| match vector {
        6 => gate(gnomon::abi::GVA_LIMIT + 0x2000, 0),
        vector => gate(handler(vector), 0),
    };
    let guest = Guest::new(|a| {
        attempt(a, |a| a.ud2())?;
        power_off(a)
    });
    let ended = run(&guest.with(IDT, idt_with(bad))).powered_off();
    assert_eq!(ended.vectors(), [(13, 0)], "a jump there is a #GP like any other");
}

/// Code that loads TR and executes `ud2`.
fn with_task(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.lgdt(ptr(GDT_POINTER))?;
    a.mov(eax, u32::from(TSS_SELECTOR))?;
    a.ltr(ax)?;
    attempt(a, |a| a.ud2())?;
    power_off(a)
}

/// An IDT whose gate of `vector` is on interrupt stack `ist(vector)`.
fn idt_on(ist: impl Fn(u8) -> u8) -> Vec<u8> {
    idt_with(|vector| gate(handler(vector), ist(vector)))
}

fn interrupt_stack_unmapped() {
    let guest = Guest::new(with_task)
        .with(IDT, idt_on(|vector| u8::from(vector == 6)))
        .with(TSS, tss([UNMAPPED; 7]));
    let fault = run(&guest).powered_off().fault();
    // The push of a #UD frame, 40 bytes, is a write that faults.
    assert_eq!((fault.vector, fault.error_code), (14, 2));
    assert_eq!(fault.cr2, UNMAPPED - 8, "of the first word that is pushed: {fault:?}");
}

fn every_interrupt_stack_unmapped() {
    let unmapped = tss([UNMAPPED; 7]);
    let guest = Guest::new(with_task).with(IDT, idt_on(|_| 3)).with(TSS, unmapped.clone());
    run(&guest).failed_with(&["triple fault", "exception 6"]);
    // #DF with a stack of its own is what such stacks are for.
    let mut stacks = [UNMAPPED; 7];
    stacks[4] = SPARE_STACK;
    let guest = Guest::new(with_task)
        .with(IDT, idt_on(|vector| if vector == 8 { 5 } else { 1 }))
        .with(TSS, tss(stacks));
    assert_eq!(run(&guest).powered_off().vectors(), [(8, 0)]);
}

fn interrupt_stack_in_the_monitor() {
    for stack in [gnomon::abi::GVA_LIMIT + 0x6000, 1 << 47, u64::MAX - 7, 8] {
        let guest = Guest::new(with_task)
            .with(IDT, idt_on(|vector| u8::from(vector == 6)))
            .with(TSS, tss([stack; 7]));
        let vector = run(&guest).powered_off().fault().vector;
        assert_eq!(vector, 12, "#SS for {stack:#x}");
    }
}

fn interrupt_stack_without_a_tss() {
    let guest = Guest::new(|a| {
        attempt(a, |a| a.ud2())?;
        power_off(a)
    });
    let ended = run(&guest.with(IDT, idt_on(|vector| u8::from(vector == 6)))).powered_off();
    assert_eq!(ended.vectors(), [(10, 1)], "#TS with the null selector, external");
}

fn stack_pointer_not_canonical() {
    for stack in [1 << 47, u64::MAX / 2, gnomon::abi::GVA_LIMIT + 64] {
        let guest = Guest::new(|a| {
            a.lgdt(ptr(GDT_POINTER))?;
            a.mov(eax, u32::from(TSS_SELECTOR))?;
            a.ltr(ax)?;
            a.mov(rsp, stack)?;
            attempt(a, |a| a.ud2())?;
            power_off(a)
        })
        .with(IDT, idt_on(|vector| u8::from(vector == 12)))
        .with(TSS, tss([SPARE_STACK; 7]));
        let fault = run(&guest).powered_off().fault();
        assert_eq!((fault.vector, fault.rip, fault.rsp), (12, 0, stack));
    }
}

fn stack_pointer_not_canonical_no_way_out() {
    let guest = Guest::new(|a| {
        a.mov(rsp, 1u64 << 63)?;
        a.ud2()
    });
    run(&guest).failed_with(&["triple fault", "exception 6"]);
}

fn page_fault_in_a_page_fault() {
    let guest = Guest::new(|a| {
        a.mov(rsp, UNMAPPED)?;
        a.push(rax)
    });
    run(&guest).failed_with(&["triple fault", "exception 14"]);
}

fn ltr_of_garbage() {
    let load = |selector: u32| {
        move |a: &mut CodeAssembler| {
            a.lgdt(ptr(GDT_POINTER))?;
            a.mov(eax, selector)?;
            attempt(a, |a| a.ltr(ax))?;
            power_off(a)
        }
    };
    let vectors = |guest: &Guest| run(guest).powered_off().vectors();
    // Null, local, outside the table, half outside.
    for (selector, code) in [(0, 0), (3, 0), (0x14, 0x14), (0x8000, 0x8000), (0x18, 0x18)] {
        assert_eq!(vectors(&Guest::new(load(selector))), [(13, code)], "selector {selector:#x}");
    }
    // Not a TSS, busy, not present, base not canonical.
    for kind in [0x0, 0x2, 0xb, 0xc, 0xf] {
        let guest = Guest::new(load(0x10)).with(GDT, gdt(TSS, kind));
        assert_eq!(vectors(&guest), [(13, 0x10)], "type {kind:#x}");
    }
    let mut absent = gdt(TSS, 9);
    absent[16 + 5] = 0x09;
    assert_eq!(vectors(&Guest::new(load(0x10)).with(GDT, absent)), [(11, 0x10)]);
    let guest = Guest::new(load(0x10)).with(GDT, gdt(1 << 47, 9));
    assert_eq!(vectors(&guest), [(13, 0x10)]);
    // A table in unmapped memory, and in the monitor's.
    let guest = Guest::new(load(0x10)).with(GDT_POINTER, pointer(UNMAPPED, 0xffff));
    assert_eq!(vectors(&guest), [(14, 0)]);
    let monitor = gnomon::abi::GVA_LIMIT;
    let guest = Guest::new(load(0x10)).with(GDT_POINTER, pointer(monitor, 0xffff));
    assert_eq!(vectors(&guest), [(13, 0)]);
    // A good one, twice: the second time it is busy.
    let guest = Guest::new(|a| {
        a.lgdt(ptr(GDT_POINTER))?;
        a.mov(eax, 0x10)?;
        a.ltr(ax)?;
        attempt(a, |a| a.ltr(ax))?;
        power_off(a)
    });
    assert_eq!(vectors(&guest), [(13, 0x10)]);
}

fn lidt_and_lgdt_of_garbage() {
    let guest = Guest::new(|a| {
        a.mov(rax, UNMAPPED)?;
        attempt(a, |a| a.lgdt(ptr(rax)))?;
        attempt(a, |a| a.lidt(ptr(rax)))?;
        a.mov(rax, gnomon::abi::GVA_LIMIT - 4)?;
        attempt(a, |a| a.lidt(ptr(rax)))?;
        a.mov(eax, u32::try_from(FREE).unwrap_or(0))?;
        attempt(a, |a| a.lgdt(ptr(rax)))?;
        power_off(a)
    })
    .with(FREE, pointer(1 << 47, 0xffff));
    let ended = run(&guest).powered_off();
    assert_eq!(ended.vectors(), [(14, 0), (14, 0), (13, 0), (13, 0)]);
}

fn single_steps() {
    // Its #DB handler only counts.
    let count = assemble(FREE, |a| {
        a.inc(rbx)?;
        a.iretq()
    });
    let traps = |vector| match vector {
        1 => gate(FREE, 0),
        vector => gate(handler(vector), 0),
    };
    let guest = Guest::new(|a| {
        a.xor(ebx, ebx)?;
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x100)?;
        a.popfq()?;
        // Six instructions up to the one that clears TF; two of them are emulated.
        a.nop()?;
        a.mov(rax, cr2)?;
        a.cli()?;
        a.pushfq()?;
        a.and(qword_ptr(rsp), !0x100)?;
        a.popfq()?;
        a.nop()?;
        report(a, rbx)?;
        power_off(a)
    })
    .with(IDT, idt_with(traps))
    .with(FREE, count);
    let ended = run(&guest).powered_off();
    assert_eq!(ended.values(), [6]);
    assert_eq!(ended.vectors(), []);
}
