//! Instructions that Gnomon does not emulate, ports, hypercalls, the console.

use gnomon::abi;
use gnomon::vmm::Outcome;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{CODE, FREE, Guest, Written, attempt, exit, hypercall, power_off, report};
use crate::machine::{Ended, Machine};
use crate::trial::{kvm_trial, long};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("unsupported_instructions_are_named", unsupported_instructions_are_named),
        kvm_trial("instructions_that_hosts_differ_about", instructions_that_hosts_differ_about),
        kvm_trial("segment_games", segment_games),
        kvm_trial("string_port_instructions", string_port_instructions),
        kvm_trial("every_port_read", every_port_read),
        kvm_trial("every_port_written", every_port_written),
        kvm_trial("wide_port_accesses", wide_port_accesses),
        kvm_trial("exit_codes", exit_codes),
        kvm_trial("hypercalls_of_nonsense", hypercalls_of_nonsense),
        kvm_trial("hypercall_flood", hypercall_flood),
        kvm_trial("serial_flood", serial_flood),
        kvm_trial("serial_registers_of_nonsense", serial_registers_of_nonsense),
        kvm_trial("self_modifying_code", self_modifying_code),
        kvm_trial("invlpg_storm", invlpg_storm),
        kvm_trial("instruction_across_two_pages", instruction_across_two_pages),
    ]
}

fn run(guest: &Guest) -> Ended {
    Machine::default().run(guest)
}

fn unsupported_instructions_are_named() {
    type Write = fn(&mut CodeAssembler) -> Written;
    let cases: [(&str, Write); 5] = [
        ("mov dr7,rax", |a| a.mov(dr7, rax)),
        ("mov rax,dr0", |a| a.mov(rax, dr0)),
        ("mov rax,cr8", |a| a.mov(rax, cr8)),
        ("mov cr8,rax", |a| a.mov(cr8, rax)),
        ("o16 lldt ax", |a| a.lldt(ax)),
    ];
    for (name, write) in cases {
        let guest = Guest::bare(|a| {
            a.mov(ecx, 1)?;
            a.xor(edx, edx)?;
            a.mov(eax, 4)?;
            write(a)
        });
        let ended = run(&guest);
        let named = format!("unsupported instruction `{name}`");
        let rip = format!("vCPU 0 at RIP {:#x}", CODE + 12);
        ended.failed_with(&[&named, &rip]);
        assert_eq!(ended.outcome.exit_code(), 1);
    }
}

fn instructions_that_hosts_differ_about() {
    type Write = fn(&mut CodeAssembler) -> Written;
    let cases: [Write; 22] = [
        |a| a.rdpmc(),
        |a| a.syscall(),
        |a| a.sysenter(),
        |a| a.sysretq(),
        |a| a.sysexitq(),
        |a| a.int(0x80),
        |a| a.int(14),
        |a| a.int(255),
        |a| a.rsm(),
        |a| a.getsec(),
        |a| a.vmxoff(),
        |a| a.vmlaunch(),
        |a| a.vmrun(),
        |a| a.vmload(),
        |a| a.stgi(),
        |a| a.skinit(),
        |a| a.invlpga(),
        |a| a.invpcid(rax, xmmword_ptr(rsp)),
        |a| a.xsaves(ptr(rsp)),
        |a| a.monitor(),
        |a| a.mwait(),
        |a| a.enclu(),
    ];
    for (number, write) in cases.into_iter().enumerate() {
        let guest = Guest::new(|a| {
            a.xor(eax, eax)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            attempt(a, write)?;
            power_off(a)
        });
        let ended = run(&guest);
        match &ended.outcome {
            // An exception, or nothing at all; but never more than the instruction's own.
            Outcome::PoweredOff => {
                let vectors = ended.vectors();
                let fits = |&(vector, _): &(u64, u64)| matches!(vector, 6 | 13 | 14);
                assert!(vectors.len() <= 1 && vectors.iter().all(fits), "{number}: {ended:?}");
            }
            _ => ended.failed_with(&["unsupported instruction `", "vCPU 0 at RIP 0x20"]),
        }
    }
}

fn segment_games() {
    let guest = Guest::new(|a| {
        // The monitor's code selector, its TSS, the GDT's free entries, a local one.
        for selector in [0x10u32, 0x13, 0x40, 0x43, 0x1b, 0x7, 0xfffb] {
            a.mov(eax, selector)?;
            attempt(a, |a| a.mov(ds, eax))?;
            attempt(a, |a| a.mov(ss, eax))?;
        }
        // A far return there, and one to 32-bit code by the null selector.
        for selector in [0x10u64, 0x13, 0x40, 0] {
            a.mov(rbx, rsp)?;
            a.mov(rax, selector)?;
            a.push(rax)?;
            a.push(rax)?;
            attempt(a, |a| a.db(&[0x48, 0xcb]))?;
            a.mov(rsp, rbx)?;
        }
        // Far jumps through memory.
        a.mov(rax, FREE)?;
        a.mov(dword_ptr(rax), i32::try_from(CODE).unwrap_or(0))?;
        a.mov(word_ptr(rax + 4), 0x10)?;
        attempt(a, |a| a.jmp(fword_ptr(rax)))?;
        power_off(a)
    });
    let vectors = run(&guest).powered_off().vectors();
    assert_eq!(vectors.len(), 7 * 2 + 4 + 1, "{vectors:?}");
    // #GP, or #NP and #SS for entries that are not present; the error code names the selector.
    assert!(vectors.iter().all(|(vector, _)| matches!(vector, 10..=13)), "{vectors:?}");
}

fn string_port_instructions() {
    // To the ports that are open to the guest. (What they do in detail: the suite `kvm_contract`.)
    let message = b"hello by outsb\n";
    let guest = Guest::new(|a| {
        a.mov(rsi, FREE)?;
        a.mov(ecx, u32::try_from(message.len()).unwrap_or(0))?;
        a.mov(edx, u32::from(abi::PORT_SERIAL))?;
        a.rep().outsb()?;
        a.mov(rdi, FREE)?;
        a.mov(ecx, 16)?;
        a.mov(edx, u32::from(abi::PORT_SERIAL) + 7)?;
        a.rep().insb()?;
        power_off(a)
    });
    let ended = run(&guest.with(FREE, message.to_vec())).powered_off();
    assert_eq!(ended.console, message);
}

/// Calls `access` with DX from 0 to 0xffff.
fn for_each_port(
    a: &mut CodeAssembler,
    access: impl FnOnce(&mut CodeAssembler) -> Written,
) -> Written {
    let mut next = a.create_label();
    a.xor(ebp, ebp)?;
    a.set_label(&mut next)?;
    a.mov(edx, ebp)?;
    access(a)?;
    a.inc(ebp)?;
    a.cmp(ebp, 0x1_0000)?;
    a.jne(next)
}

fn every_port_read() {
    // Counts the ports that do not read as all ones.
    let guest = Guest::new(|a| {
        a.xor(ebx, ebx)?;
        for_each_port(a, |a| {
            let mut ones = a.create_label();
            a.in_(al, dx)?;
            a.cmp(al, 0xff_u32 as i32)?;
            a.je(ones)?;
            a.inc(ebx)?;
            a.set_label(&mut ones)?;
            a.nop()
        })?;
        report(a, rbx)?;
        power_off(a)
    });
    let ended = Machine { within: MINUTE, ..Machine::default() }.run(&guest).powered_off();
    let answered = ended.values()[0];
    assert!((1..=8).contains(&answered), "{answered} ports answer, at most the UART's eight do");
    assert_eq!(ended.unknown_port_accesses, 65536 - 8);
}

const MINUTE: std::time::Duration = std::time::Duration::from_secs(60);

fn every_port_written() {
    let guest = Guest::new(|a| {
        for_each_port(a, |a| {
            let mut skip = a.create_label();
            a.cmp(edx, u32::from(abi::PORT_EXIT))?;
            a.je(skip)?;
            a.mov(eax, 0)?;
            a.out(dx, al)?;
            a.set_label(&mut skip)?;
            a.nop()
        })?;
        power_off(a)
    });
    let ended = Machine { within: MINUTE, ..Machine::default() }.run(&guest).powered_off();
    assert_eq!(ended.unknown_port_accesses, 65536 - 8 - 1);
    assert_eq!(ended.console, [0], "what went to the UART's first port");
}

fn wide_port_accesses() {
    // Around the borders of what exists, and with immediate port numbers.
    let guest = Guest::new(|a| {
        for port in [0x3f5u32, 0x3f6, 0x3fc, 0x3fe, 0x5fd, 0x5fe, 0x601, 0x603, 0xfffd, 0xffff] {
            a.mov(edx, port)?;
            a.in_(eax, dx)?;
            a.in_(ax, dx)?;
            a.mov(eax, 0)?;
            a.out(dx, ax)?;
        }
        // A 16-bit write that covers the exit port's neighbours, and narrow ones to the hypercall
        // port, do nothing.
        for port in [0xf2u32, 0xf3, 0xf5, 0x600] {
            a.mov(edx, port)?;
            a.mov(eax, 4)?;
            a.out(dx, ax)?;
            a.out(dx, al)?;
        }
        a.mov(rax, u64::MAX)?;
        a.in_(al, 0x80)?;
        a.in_(ax, 0x80)?;
        a.in_(eax, 0x80)?;
        a.mov(rbx, rax)?;
        report(a, rbx)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.values(), [0xffff_ffff]);
    assert!(ended.unknown_port_accesses > 60, "{}", ended.unknown_port_accesses);
}

fn exit_codes() {
    for (value, code) in
        [(0u32, 1u8), (1, 3), (2, 5), (0x10, 0x21), (0x7f, 0xff), (0x80, 1), (0xff, 0xff)]
    {
        let ended = run(&Guest::bare(|a| exit(a, value)));
        assert!(matches!(ended.outcome, Outcome::GuestExit(found) if found == code), "{ended:?}");
        assert_eq!(ended.outcome.exit_code(), code);
    }
    // By its number as an immediate, and 32 bits wide: the low byte counts.
    let guest = Guest::bare(|a| {
        a.mov(eax, 0xffff_ff03u32)?;
        a.out(u32::from(abi::PORT_EXIT), eax)
    });
    assert_eq!(run(&guest).outcome.exit_code(), 7);
}

fn hypercalls_of_nonsense() {
    const ERROR: u64 = abi::HC_ERROR;
    // Number, RDI, RSI, RCX and the result; the machine has one vCPU and 4096 frames.
    let calls = [
        (abi::HC_INFO, 0, 0, 0, abi::ABI_VERSION),
        (abi::HC_INFO, 1, 0, 0, 1),
        (abi::HC_INFO, 2, 0, 0, 16 << 20),
        (abi::HC_INFO, 4, 0, 0, ERROR),
        (abi::HC_INFO, u64::MAX, 0, 0, ERROR),
        (abi::HC_START_VCPU, 0, CODE, 0, abi::START_ALREADY_RUNNING),
        (abi::HC_START_VCPU, 1, CODE, 0, abi::START_NO_SUCH_VCPU),
        (abi::HC_START_VCPU, 1 << 32, CODE, 0, abi::START_NO_SUCH_VCPU),
        (abi::HC_START_VCPU, u64::MAX, CODE, 0, abi::START_NO_SUCH_VCPU),
        (abi::HC_START_VCPU, 1, abi::GVA_LIMIT, 0, ERROR),
        (abi::HC_START_VCPU, 0, u64::MAX, 0, ERROR),
        (abi::HC_VIOLATION, u64::MAX, u64::MAX, u64::MAX, 0),
        (abi::HC_WATCH, 0, 4096, 0, 0),
        (abi::HC_WATCH, 0, 4097, 0, ERROR),
        (abi::HC_WATCH, 4096, 1, 0, ERROR),
        (abi::HC_WATCH, u64::MAX, u64::MAX, 0, ERROR),
        (abi::HC_WATCH, 1, u64::MAX, 0, ERROR),
        (abi::HC_PHASE, u64::MAX, u64::MAX, u64::MAX, 0),
        (abi::HC_PHASE, 0, 1, u64::MAX, 0),
        (abi::HC_FREE_PAGES, 4000, 96, 0, 0),
        (abi::HC_FREE_PAGES, 4000, 97, 0, ERROR),
        (abi::HC_FREE_PAGES, 0, abi::MOST_FREED + 1, 0, ERROR),
        (abi::HC_FREE_PAGES, 4096, 1, 0, ERROR),
        (abi::HC_FREE_PAGES, 4096, 0, 0, 0),
        (abi::HC_FREE_PAGES, u64::MAX, 1, 0, ERROR),
        (abi::HC_FREE_PAGES, u64::MAX, u64::MAX, 0, ERROR),
        (7, 0, 0, 0, ERROR),
        (0x7fff_ffff, 0, 0, 0, ERROR),
        (0xffff_ffff, 0, 0, 0, ERROR),
    ];
    // Counts in RBX the calls that gave the wrong result.
    let guest = Guest::new(|a| {
        a.xor(ebx, ebx)?;
        for (number, first, second, third, expected) in calls {
            let mut right = a.create_label();
            a.mov(rdi, first)?;
            a.mov(rsi, second)?;
            a.mov(rcx, third)?;
            hypercall(a, number)?;
            a.mov(rdx, expected)?;
            a.cmp(rax, rdx)?;
            a.je(right)?;
            a.inc(ebx)?;
            a.set_label(&mut right)?;
            a.nop()?;
        }
        report(a, rbx)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.reports.last().map(|report| report.gva), Some(0), "wrong results");
    assert_eq!(ended.report_count, 2);
}

fn hypercall_flood() {
    // Ten thousand reports: counted, the first few kept.
    let guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.mov(ebx, 10_000)?;
        a.set_label(&mut again)?;
        hypercall(a, abi::HC_VIOLATION)?;
        a.dec(ebx)?;
        a.jne(again)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!(ended.report_count, 10_000);
    assert_eq!(ended.reports.len(), gnomon::vmm::MAX_KEPT_REPORTS);
}

fn serial_flood() {
    // An exit a byte. A whole MiB of them takes a minute on a busy host that emulates.
    let bytes: u32 = if long() { 1 << 20 } else { 1 << 17 };
    let guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.mov(edx, u32::from(abi::PORT_SERIAL))?;
        a.mov(ecx, bytes)?;
        a.set_label(&mut again)?;
        a.mov(eax, ecx)?;
        a.out(dx, al)?;
        a.dec(ecx)?;
        a.jne(again)?;
        power_off(a)
    });
    let ended = Machine { within: 5 * MINUTE, ..Machine::default() }.run(&guest).powered_off();
    assert_eq!(ended.console.len(), bytes as usize);
    let expected = (1..=bytes).rev().map(|count| count.to_le_bytes()[0]);
    assert!(expected.eq(ended.console.iter().copied()), "the console's bytes are wrong");
}

fn serial_registers_of_nonsense() {
    // Every value to every register, DLAB and loopback among them, with reads in between.
    let guest = Guest::new(|a| {
        let (mut value, mut register) = (a.create_label(), a.create_label());
        a.xor(ebx, ebx)?;
        a.set_label(&mut value)?;
        a.mov(edx, u32::from(abi::PORT_SERIAL) + 7)?;
        a.set_label(&mut register)?;
        a.mov(eax, ebx)?;
        a.out(dx, al)?;
        a.in_(al, dx)?;
        a.dec(edx)?;
        a.cmp(edx, u32::from(abi::PORT_SERIAL))?;
        a.jae(register)?;
        a.inc(ebx)?;
        a.cmp(ebx, 256)?;
        a.jb(value)?;
        power_off(a)
    });
    run(&guest).powered_off();
}

fn self_modifying_code() {
    // A thousand times: change the immediate of an `add` on a page of its own, and run it.
    let guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000)?;
        a.xor(ebx, ebx)?;
        a.mov(rax, FREE)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rax + 2), ecx)?;
        a.call(rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        report(a, rbx)?;
        power_off(a)
    });
    // add ebx, imm32; ret
    let code = vec![0x81, 0xc3, 0, 0, 0, 0, 0xc3];
    assert_eq!(run(&guest.with(FREE, code)).powered_off().values(), [500_500]);
}

fn invlpg_storm() {
    // Addresses all over the place, usable or not; `invlpg` itself never faults.
    let guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 20_000)?;
        a.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.mov(rdx, 0xd134_2543_de82_ef95u64)?;
        a.imul_2(rax, rdx)?;
        a.inc(rax)?;
        a.invlpg(ptr(rax))?;
        a.invlpg(ptr(FREE))?;
        a.add(qword_ptr(FREE), 1)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(rbx, qword_ptr(FREE))?;
        report(a, rbx)?;
        power_off(a)
    });
    let ended = run(&guest).powered_off();
    assert_eq!((ended.values(), ended.vectors()), (vec![20_000], vec![]));
}

fn instruction_across_two_pages() {
    // `mov cr2, rax` is fetched for emulation from two pages, of which the second is not mapped.
    const TABLES: u64 = FREE + 0x1_0000;
    const GVA: u64 = 1 << 39;
    let guest = Guest::new(|a| {
        a.mov(rax, TABLES)?;
        a.mov(cr3, rax)?;
        a.mov(rax, GVA + 0xffe)?;
        let mut after = a.create_label();
        a.xor(r12d, r12d)?;
        a.lea(r15, ptr(after))?;
        a.jmp(rax)?;
        a.set_label(&mut after)?;
        a.nop()?;
        power_off(a)
    })
    .with_table(TABLES, &[(0, 0xa000 | 3), (1, (TABLES + 0x1000) | 3)])
    .with_table(TABLES + 0x1000, &[(0, (TABLES + 0x2000) | 3)])
    .with_table(TABLES + 0x2000, &[(0, (TABLES + 0x3000) | 3)])
    .with_table(TABLES + 0x3000, &[(0, FREE | 3)])
    .with(FREE + 0xffe, vec![0x0f, 0x22]);
    let fault = run(&guest).powered_off().fault();
    assert_eq!((fault.vector, fault.cr2, fault.rip), (14, GVA + 0x1000, GVA + 0xffe));
}
