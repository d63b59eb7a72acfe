//! Instructions that the processor does not have, and those that are completed outside.

use iced_x86::Code;

use super::*;

#[test]
fn what_cpuid_does_not_name_is_no_instruction() {
    let undefined = Exception::plain(vector::UD);
    for code in [
        // syscall, sysenter, sysretq, sysexitq
        &[0x0f, 0x05][..],
        &[0x0f, 0x34],
        &[0x48, 0x0f, 0x07],
        &[0x48, 0x0f, 0x35],
        // monitor, mwait, stac, invpcid rax,[rbx], xsaves [rbx], vmlaunch, vmrun, skinit
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xc9],
        &[0x0f, 0x01, 0xcb],
        &[0x66, 0x0f, 0x38, 0x82, 0x03],
        &[0x0f, 0xc7, 0x2b],
        &[0x0f, 0x01, 0xc2],
        &[0x0f, 0x01, 0xd8],
        &[0x0f, 0x01, 0xde],
        // mov of cr1, cr5, cr9, dr8
        &[0x0f, 0x20, 0xc8],
        &[0x0f, 0x22, 0xe8],
        &[0x44, 0x0f, 0x20, 0xc8],
        &[0x44, 0x0f, 0x21, 0xc0],
    ] {
        assert_eq!(raises(&cpu(), &memory(code), 0), undefined, "{code:x?}");
    }
    let mut bare = cpu();
    bare.features.xsave = false;
    assert_eq!(raises(&bare, &memory(XSETBV), 0), undefined);
    bare = cpu();
    bare.cr4 &= !cr4::OSXSAVE;
    assert_eq!(raises(&bare, &memory(XSETBV), 0), undefined);
}

/// Those of processors without 64-bit mode: the decoder takes the bytes for them only when it is told to.
fn is_of_old(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let of_cyrix = matches!(
        mnemonic,
        Rdshr | Wrshr | Smint | Dmint | Rdm | Svdc | Rsdc | Svldt | Rsldt | Svts | Rsts
    );
    let of_others =
        matches!(mnemonic, Storeall | Loadall | Bb0_reset | Bb1_reset | Cpu_write | Cpu_read);
    of_cyrix || of_others || mnemonic == Cl1invmb
}

/// Whatever the decoder's tables will have: a privileged instruction of which nothing is said here is not
/// to end a guest that would have found it missing on a real processor.
#[test]
fn every_privileged_instruction_is_emulated_or_absent() {
    let mut seen = 0;
    let mut forgotten = Vec::new();
    for code in Code::values() {
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        if !instruction.is_privileged() || is_of_old(code.mnemonic()) {
            continue;
        }
        seen += 1;
        let memory = memory(&[]);
        let mut step = Step { cpu: cpu(), memory: &memory, instruction };
        let is_unsupported =
            matches!(step.execute(0), Err(Stop::Guest(GuestError::UnsupportedInstruction { .. })));
        // Moves of special registers go by the register (`unsupported_instructions_are_named`).
        if is_unsupported && code.mnemonic() != Mnemonic::Mov {
            forgotten.push(code);
        }
    }
    assert!(seen > 100, "{seen} privileged instructions in the decoder's tables");
    assert!(forgotten.is_empty(), "neither emulated nor absent: {forgotten:?}");
}

const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];

#[test]
fn xcr0_takes_the_value_that_it_has() {
    for (avx, own) in [(true, 7), (false, 3)] {
        let mut cpu = cpu();
        cpu.features.avx = avx;
        cpu.gpr[gpr::RAX] = own | 0xabcd << 32;
        run(&mut cpu.clone(), XSETBV);
        for (index, value) in [(1, own), (0, own ^ 4), (0, 1), (0, 0), (0, own | 8)] {
            (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RAX]) = (index, value);
            refuses(&cpu, XSETBV);
        }
    }
}

#[test]
fn lmsw_sets_four_bits_and_leaves_protection_on() {
    let mut cpu = cpu();
    for (word, low) in [(0xffff, 0xf), (0, 1), (0xfff2, 3)] {
        cpu.rip = RIP;
        cpu.gpr[gpr::RAX] = word;
        run(&mut cpu, &[0x0f, 0x01, 0xf0]);
        assert_eq!(cpu.cr0, crate::abi::ENTRY_CR0 & !0xf | low, "{word:#x}");
    }
}

#[test]
fn there_is_no_local_descriptor_table() {
    let mut cpu = cpu();
    run(&mut cpu, &[0x0f, 0x00, 0xd0]);
    cpu.rip = RIP;
    cpu.gpr[gpr::RAX] = 0x28;
    let stop = emulate(&mut cpu, &memory(&[0x0f, 0x00, 0xd0]), 0).unwrap_err();
    assert!(matches!(stop, Stop::Guest(GuestError::UnsupportedInstruction { .. })), "{stop:?}");
}

#[test]
fn cpuid_and_int_are_left_to_be_completed() {
    let mut cpu = cpu();
    cpu.gpr[gpr::RAX] = 7 | 1 << 40;
    cpu.gpr[gpr::RCX] = 1 | 1 << 40;
    assert_eq!(run(&mut cpu, &[0x0f, 0xa2]), Effect::Cpuid { leaf: 7, subleaf: 1 });
    cpu.rip = RIP;
    assert_eq!(run(&mut cpu, &[0xcd, 0x80]), Effect::Interrupt { vector: 0x80, rip: RIP });
    // Prefixes are part of it, and it is where they begin.
    cpu.rip = RIP;
    let effect = run(&mut cpu, &[0x66, 0x48, 0xcd, 0x80]);
    assert_eq!(effect, Effect::Interrupt { vector: 0x80, rip: RIP });
    // By way of #UD nothing but `int n` is taken.
    cpu.rip = RIP;
    assert!(emulate_interrupt(&mut cpu.clone(), &memory(&[0xcd, 0x80])).is_some());
    for code in [&[0x0f, 0x0b][..], &[0xf4], &[0xcc]] {
        let mut after = cpu.clone();
        assert!(emulate_interrupt(&mut after, &memory(code)).is_none(), "{code:x?}");
        assert_eq!(after, cpu);
    }
}

#[test]
fn an_interrupt_asked_for_is_found_behind_it() {
    for (code, vector, bytes) in
        [(&[0xcc][..], 3, 1), (&[0xcd, 3], 3, 2), (&[0xcd, 4], 4, 2), (&[0xcc, 4], 4, 2)]
    {
        let mut cpu = cpu();
        cpu.rip = RIP + code.len() as u64;
        let exception = asked_behind(&cpu, &memory(code), vector);
        assert_eq!(exception.asked_at, Some(cpu.rip - bytes), "{code:x?}");
    }
}
