use crate::addr::Gpa;
use crate::vmm::cpu::exceptions::vector;
use crate::vmm::cpu::fake_memory::FakeMemory;
use crate::vmm::cpu::{DescriptorTable, Features, TaskRegister, cr0, cr4, efer, gpr};

use super::*;

const RIP: u64 = 0x1000;
const FEATURES: Features =
    Features { phys_bits: 48, nx: true, fsgsbase: true, xsave: true, avx: true };

fn cpu() -> GuestCpu {
    let mut cpu = GuestCpu::at_boot(Gpa::new(0x9000), FEATURES);
    cpu.rip = RIP;
    cpu.gpr[gpr::RSP] = 0x8000;
    cpu
}

/// A memory with `code` at the start address.
fn memory(code: &[u8]) -> FakeMemory {
    let memory = FakeMemory::new();
    memory.put(RIP, code);
    memory
}

/// Emulates `code` on `cpu`; checks that RIP moved past it.
fn run(cpu: &mut GuestCpu, code: &[u8]) -> Effect {
    let done = emulate(cpu, &memory(code), 0).unwrap();
    assert_eq!(cpu.rip, RIP + code.len() as u64);
    done.effect
}

/// Emulates `code`, which must raise an exception and change nothing.
fn raises(cpu: &GuestCpu, memory: &FakeMemory, error_code: u32) -> Exception {
    let mut after = cpu.clone();
    match emulate(&mut after, memory, error_code) {
        Err(Stop::Inject(exception)) => {
            assert_eq!(&after, cpu, "state changed by an instruction that faulted");
            exception
        }
        other => panic!("{other:?}"),
    }
}

fn refuses(cpu: &GuestCpu, code: &[u8]) {
    assert_eq!(raises(cpu, &memory(code), 0), Exception::general_protection(0), "{code:x?}");
}

fn unsupported(code: &[u8]) -> String {
    match emulate(&mut cpu(), &memory(code), 0) {
        Err(Stop::Guest(error)) => error.to_string(),
        other => panic!("{code:x?}: {other:?}"),
    }
}

const MOV_RAX_CR0: &[u8] = &[0x0f, 0x20, 0xc0];
const MOV_R9_CR2: &[u8] = &[0x41, 0x0f, 0x20, 0xd1];
const MOV_RBX_CR3: &[u8] = &[0x0f, 0x20, 0xdb];
const MOV_RSP_CR4: &[u8] = &[0x0f, 0x20, 0xe4];
const MOV_CR0_RAX: &[u8] = &[0x0f, 0x22, 0xc0];
const MOV_CR2_R9: &[u8] = &[0x41, 0x0f, 0x22, 0xd1];
const MOV_CR3_RAX: &[u8] = &[0x0f, 0x22, 0xd8];
const MOV_CR4_RAX: &[u8] = &[0x0f, 0x22, 0xe0];
const RDMSR: &[u8] = &[0x0f, 0x32];
const WRMSR: &[u8] = &[0x0f, 0x30];

// Control registers.

#[test]
fn control_registers_are_read_into_any_register() {
    let mut state = cpu();
    state.cr2 = 0x1234;
    assert_eq!(run(&mut state.clone(), MOV_RAX_CR0), Effect::None);
    for (code, register, value) in [
        (MOV_RAX_CR0, gpr::RAX, state.cr0),
        (MOV_R9_CR2, gpr::R9, 0x1234),
        (MOV_RBX_CR3, gpr::RBX, 0x9000),
        (MOV_RSP_CR4, gpr::RSP, state.cr4),
    ] {
        let mut cpu = state.clone();
        run(&mut cpu, code);
        assert_eq!(cpu.gpr[register], value, "{code:x?}");
    }
}

#[test]
fn cr0_takes_valid_values_and_flushes_when_write_protection_changes() {
    let mut cpu = cpu();
    cpu.gpr[gpr::RAX] = (cpu.cr0 & !cr0::WP) | cr0::TS | 1 << 10;
    assert_eq!(run(&mut cpu, MOV_CR0_RAX), Effect::LoadRoot);
    assert_eq!(cpu.cr0 & (cr0::WP | cr0::TS | 1 << 10), cr0::TS, "a reserved low bit is ignored");
    assert!(!cpu.paging().write_protect);
    cpu.rip = RIP;
    cpu.gpr[gpr::RAX] = cpu.cr0 & !cr0::ET;
    assert_eq!(run(&mut cpu, MOV_CR0_RAX), Effect::None);
    assert_ne!(cpu.cr0 & cr0::ET, 0, "hard-wired");
}

#[test]
fn cr0_refuses_what_hardware_refuses() {
    let good = cpu().cr0;
    for value in [good & !cr0::PG, good & !cr0::PE, good | cr0::NW, good | 1 << 32, 0] {
        let mut cpu = cpu();
        cpu.gpr[gpr::RAX] = value;
        refuses(&cpu, MOV_CR0_RAX);
    }
    let mut cpu = cpu();
    cpu.gpr[gpr::RAX] = good | cr0::NW | cr0::CD;
    run(&mut cpu, MOV_CR0_RAX);
}

#[test]
fn cr2_takes_anything() {
    let mut cpu = cpu();
    cpu.gpr[gpr::R9] = u64::MAX;
    assert_eq!(run(&mut cpu, MOV_CR2_R9), Effect::None);
    assert_eq!(cpu.cr2, u64::MAX);
}

#[test]
fn cr3_loads_a_root_and_refuses_reserved_bits() {
    let mut cpu = cpu();
    cpu.gpr[gpr::RAX] = 0x5018;
    assert_eq!(run(&mut cpu, MOV_CR3_RAX), Effect::LoadRoot);
    assert_eq!((cpu.cr3, cpu.paging().cr3), (0x5018, Gpa::new(0x5000)));
    for value in [1 << 48, 1 << 63, u64::MAX] {
        cpu.gpr[gpr::RAX] = value;
        cpu.rip = RIP;
        refuses(&cpu, MOV_CR3_RAX);
    }
}

#[test]
fn cr4_flushes_on_paging_bits_only() {
    let mut cpu = cpu();
    cpu.gpr[gpr::RAX] = cpu.cr4 | cr4::PGE;
    assert_eq!(run(&mut cpu, MOV_CR4_RAX), Effect::LoadRoot);
    cpu.rip = RIP;
    cpu.gpr[gpr::RAX] = cpu.cr4 | cr4::TSD | cr4::FSGSBASE;
    assert_eq!(run(&mut cpu, MOV_CR4_RAX), Effect::None);
}

#[test]
fn cr4_refuses_what_is_not_there() {
    let good = cpu().cr4;
    let (smep, smap, pcide, vmxe) = (1 << 20, 1 << 21, 1 << 17, 1 << 13);
    for bad in [
        good & !cr4::PAE,
        good | cr4::LA57,
        good | pcide,
        good | smep,
        good | smap,
        good | vmxe,
        good | 1 << 40,
        // VME, PVI, DE, MCE: CPUID does not name what they are for.
        good | 1 << 0,
        good | 1 << 1,
        good | 1 << 3,
        good | 1 << 6,
    ] {
        let mut cpu = cpu();
        cpu.gpr[gpr::RAX] = bad;
        refuses(&cpu, MOV_CR4_RAX);
    }
    let mut bare = cpu();
    bare.features.xsave = false;
    bare.gpr[gpr::RAX] = good | cr4::OSXSAVE;
    refuses(&bare, MOV_CR4_RAX);
}

#[test]
fn every_bit_of_cr4_is_refused_or_can_be_read_back() {
    for (xsave, fsgsbase) in [(false, false), (true, false), (false, true), (true, true)] {
        for bit in 0..64 {
            let mut cpu = cpu();
            (cpu.features.xsave, cpu.features.fsgsbase) = (xsave, fsgsbase);
            cpu.cr4 &= cpu.features.cr4();
            let value = cpu.cr4 ^ 1 << bit;
            cpu.gpr[gpr::RAX] = value;
            // By number, as the page names them: TSD, PSE, PGE, PCE, OSFXSR, OSXMMEXCPT.
            let is_there = match bit {
                2 | 4 | 7..=10 => true,
                16 => fsgsbase,
                18 => xsave,
                _ => false,
            };
            if !is_there {
                refuses(&cpu, MOV_CR4_RAX);
                continue;
            }
            run(&mut cpu, MOV_CR4_RAX);
            assert_eq!(cpu.cr4, value, "bit {bit}");
            cpu.rip = RIP;
            run(&mut cpu, MOV_RSP_CR4);
            assert_eq!(cpu.gpr[gpr::RSP], value, "bit {bit}");
            let decides = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE | cr4::OSXSAVE | cr4::PAE;
            assert_eq!(cpu.real_cr4(), value & decides, "bit {bit}");
        }
    }
}

#[test]
fn clts_clears_task_switched() {
    let mut cpu = cpu();
    cpu.cr0 |= cr0::TS;
    assert_eq!(run(&mut cpu, &[0x0f, 0x06]), Effect::None);
    assert_eq!(cpu.cr0 & cr0::TS, 0);
}

#[test]
fn invlpg_computes_its_address_and_never_faults() {
    let mut cpu = cpu();
    cpu.gpr[gpr::RBX] = 0x4000;
    cpu.gpr[gpr::RCX] = 0x10;
    // invlpg [rbx + rcx*4 + 0x20]
    assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0x7c, 0x8b, 0x20]), Effect::FlushPage(Gva::new(0x4060)));
    // invlpg gs:[rbx]
    cpu.rip = RIP;
    cpu.gs_base = 0x10_0000;
    assert_eq!(run(&mut cpu, &[0x65, 0x0f, 0x01, 0x3b]), Effect::FlushPage(Gva::new(0x10_4000)));
    // invlpg [rip + 0x10]
    cpu.rip = RIP;
    let effect = run(&mut cpu, &[0x0f, 0x01, 0x3d, 0x10, 0, 0, 0]);
    assert_eq!(effect, Effect::FlushPage(Gva::new(RIP + 7 + 0x10)));
    // invlpg [ebx]: a 32-bit address
    cpu.rip = RIP;
    cpu.gpr[gpr::RBX] = 0xffff_0000_0000_4000;
    assert_eq!(run(&mut cpu, &[0x67, 0x0f, 0x01, 0x3b]), Effect::FlushPage(Gva::new(0x4000)));
    for beyond in [crate::abi::GVA_LIMIT, u64::MAX, 1 << 63] {
        cpu.rip = RIP;
        cpu.gpr[gpr::RBX] = beyond;
        assert_eq!(run(&mut cpu, &[0x0f, 0x01, 0x3b]), Effect::None);
    }
}

// Halt and flags.

#[test]
fn hlt_cli_sti_and_cache_flushes() {
    let mut cpu = cpu();
    assert_eq!(run(&mut cpu, &[0xf4]), Effect::Halt);
    cpu.rip = RIP;
    for code in [&[0xfb][..], &[0xfa]] {
        cpu.rip = RIP;
        run(&mut cpu, code);
        assert_ne!(cpu.rflags & rflags::IF, 0, "always set");
    }
    for code in [&[0x0f, 0x09][..], &[0x0f, 0x08]] {
        cpu.rip = RIP;
        assert_eq!(run(&mut cpu, code), Effect::None);
    }
}

#[test]
fn a_set_trap_flag_asks_for_a_debug_exception() {
    let mut cpu = cpu();
    cpu.rflags |= rflags::TF | rflags::RF;
    let done = emulate(&mut cpu, &memory(&[0xfa]), 0).unwrap();
    assert!(done.single_step);
    assert_eq!(cpu.rflags & rflags::RF, 0);
    // `mov ss, ax` holds it back, `int 0x20` clears TF itself.
    for code in [&[0x8e, 0xd0][..], &[0xcd, 0x20]] {
        cpu.rip = RIP;
        cpu.gpr[gpr::RAX] = 0;
        assert!(!emulate(&mut cpu, &memory(code), 0).unwrap().single_step, "{code:x?}");
    }
}

// Descriptor tables.

#[test]
fn lidt_and_lgdt_take_a_limit_and_a_base() {
    let memory = memory(&[0x0f, 0x01, 0x1b]);
    memory.put(0x2000, &[0xff, 0x0f, 0, 0x30, 0, 0, 0, 0, 0, 0]);
    let mut state = cpu();
    state.gpr[gpr::RBX] = 0x2000;
    emulate(&mut state, &memory, 0).unwrap();
    assert_eq!(state.idtr, DescriptorTable { base: 0x3000, limit: 0xfff });
    memory.put(RIP, &[0x0f, 0x01, 0x13]);
    state.rip = RIP;
    emulate(&mut state, &memory, 0).unwrap();
    assert_eq!(state.gdtr, state.idtr);

    memory.put(0x2000, &[0xff, 0x0f, 0, 0, 0, 0, 0, 0, 0, 0x80]);
    state.rip = RIP;
    assert_eq!(raises(&state, &memory, 0), Exception::general_protection(0), "non-canonical base");
    state.gpr[gpr::RBX] = u64::MAX - 4;
    assert_eq!(raises(&state, &memory, 0), Exception::general_protection(0), "wraps around");
}

#[test]
fn an_operand_that_faults_is_the_guests_page_fault() {
    let mut memory = memory(&[0x0f, 0x01, 0x1b]);
    memory.unmap(0x3000);
    let mut cpu = cpu();
    cpu.gpr[gpr::RBX] = 0x2ffc;
    assert_eq!(raises(&cpu, &memory, 0), Exception::page_fault(0x3000, 0));
}

const LTR_AX: &[u8] = &[0x0f, 0x00, 0xd8];

/// A GDT at 0x2000 with a TSS descriptor of type byte `kind` at selector 0x38.
fn with_tss(kind: u8) -> (GuestCpu, FakeMemory) {
    let memory = memory(LTR_AX);
    memory.put(0x2038, &[0x67, 0, 0x78, 0x56, 0x34, kind, 0, 0x12, 0x11, 0, 0, 0, 0, 0, 0, 0]);
    let mut cpu = cpu();
    cpu.gdtr = DescriptorTable { base: 0x2000, limit: 0x47 };
    cpu.gpr[gpr::RAX] = 0x38;
    (cpu, memory)
}

#[test]
fn ltr_takes_the_tss_from_the_guests_gdt_and_marks_it_busy() {
    let (mut cpu, memory) = with_tss(0x89);
    emulate(&mut cpu, &memory, 0).unwrap();
    assert_eq!(cpu.task, TaskRegister { selector: 0x38, base: 0x11_1234_5678, limit: 0x67 });
    let [low] = memory.words(0x2038);
    assert_eq!(low >> 40 & 0xff, 0x8b);
    cpu.rip = RIP;
    assert_eq!(raises(&cpu, &memory, 0), Exception::general_protection(0x38), "busy now");
}

#[test]
fn ltr_refuses_what_is_no_available_tss() {
    for kind in [0x8b, 0x92, 0x9a, 0x00, 0x99] {
        let (cpu, memory) = with_tss(kind);
        assert_eq!(raises(&cpu, &memory, 0), Exception::general_protection(0x38));
    }
    let (cpu, memory) = with_tss(0x09);
    assert_eq!(raises(&cpu, &memory, 0), Exception::with_code(vector::NP, 0x38));
    for (selector, code) in [(0, 0), (3, 0), (0x3c, 0x3c), (0x40, 0x40), (0xfff8, 0xfff8)] {
        let (mut cpu, memory) = with_tss(0x89);
        cpu.gpr[gpr::RAX] = selector;
        assert_eq!(raises(&cpu, &memory, 0), Exception::general_protection(code), "{selector:#x}");
    }
    let (mut cpu, memory) = with_tss(0x89);
    cpu.gdtr.base = crate::abi::GVA_LIMIT;
    assert_eq!(raises(&cpu, &memory, 0), Exception::general_protection(0), "GDT beyond the limit");
    let (cpu, mut memory) = with_tss(0x89);
    memory.protect(0x2000);
    assert_eq!(raises(&cpu, &memory, 0), Exception::page_fault(0x203d, 3), "cannot be marked busy");
}

// Model-specific registers.

fn rdmsr(cpu: &GuestCpu, index: u64) -> u64 {
    let mut cpu = cpu.clone();
    cpu.gpr[gpr::RCX] = index | 0xdead << 32;
    run(&mut cpu, RDMSR);
    cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX]
}

fn at_wrmsr(index: u64, value: u64) -> GuestCpu {
    let mut cpu = cpu();
    cpu.gpr[gpr::RCX] = index;
    cpu.gpr[gpr::RAX] = value & 0xffff_ffff | 0xabcd << 32;
    cpu.gpr[gpr::RDX] = value >> 32;
    cpu
}

#[test]
fn segment_bases_and_pat_are_stored() {
    for index in [0xc000_0100, 0xc000_0101, 0xc000_0102, 0x277] {
        let mut cpu = at_wrmsr(index, 0x0000_0706_0504_0100);
        assert_eq!(run(&mut cpu, WRMSR), Effect::None);
        cpu.rip = RIP;
        assert_eq!(rdmsr(&cpu, index), 0x0000_0706_0504_0100, "{index:#x}");
    }
    refuses(&at_wrmsr(0xc000_0100, 1 << 47), WRMSR);
    refuses(&at_wrmsr(0xc000_0102, 1 << 63), WRMSR);
    refuses(&at_wrmsr(0x277, 2), WRMSR);
}

#[test]
fn efer_keeps_long_mode_and_flushes_when_nxe_changes() {
    let fixed = efer::LME | efer::LMA;
    let mut cpu = at_wrmsr(0xc000_0080, fixed | efer::NXE);
    assert_eq!(run(&mut cpu, WRMSR), Effect::LoadRoot);
    assert!(cpu.paging().nxe);
    let mut cpu = at_wrmsr(0xc000_0080, fixed | efer::SCE);
    assert_eq!(run(&mut cpu, WRMSR), Effect::None);
    assert_eq!(rdmsr(&GuestCpu { rip: RIP, ..cpu }, 0xc000_0080), fixed | efer::SCE);
    for value in [0, efer::LME, efer::LMA, fixed | 1 << 12, fixed | 1 << 1] {
        refuses(&at_wrmsr(0xc000_0080, value), WRMSR);
    }
}

#[test]
fn other_model_specific_registers_do_not_exist() {
    for index in [0x1b, 0x10, 0xc000_0081, 0xc000_0082, 0x4b56_4d01, 0xffff_ffff] {
        refuses(&at_wrmsr(index, 0), WRMSR);
        refuses(&at_wrmsr(index, 0), RDMSR);
    }
}

#[test]
fn swapgs_exchanges_the_bases() {
    let mut cpu = cpu();
    (cpu.gs_base, cpu.kernel_gs_base) = (1, 2);
    run(&mut cpu, &[0x0f, 0x01, 0xf8]);
    assert_eq!((cpu.gs_base, cpu.kernel_gs_base), (2, 1));
}

// Ports.

#[test]
fn ports_of_every_width_by_dx_and_by_immediate() {
    use PortWidth::{Byte, Dword, Word};
    let mut state = cpu();
    state.gpr[gpr::RDX] = 0xffff_0000_0000_0600;
    state.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
    for (code, port, width, value) in [
        (&[0xe6, 0x80][..], 0x80, Byte, 0x88),
        (&[0x66, 0xe7, 0x80], 0x80, Word, 0x7788),
        (&[0xe7, 0x80], 0x80, Dword, 0x5566_7788),
        (&[0xee], 0x600, Byte, 0x88),
        (&[0x66, 0xef], 0x600, Word, 0x7788),
        (&[0xef], 0x600, Dword, 0x5566_7788),
    ] {
        assert_eq!(run(&mut state.clone(), code), Effect::PortWrite { port, width, value });
    }
    for (code, port, width) in [
        (&[0xe4, 0x71][..], 0x71, Byte),
        (&[0x66, 0xe5, 0x71], 0x71, Word),
        (&[0xe5, 0x71], 0x71, Dword),
        (&[0xec], 0x600, Byte),
        (&[0x66, 0xed], 0x600, Word),
        (&[0xed], 0x600, Dword),
    ] {
        let into = Destination::Accumulator;
        assert_eq!(run(&mut state.clone(), code), Effect::PortRead { port, width, into });
    }
}

#[test]
fn a_port_read_changes_only_its_part_of_rax() {
    for (width, expected) in [
        (PortWidth::Byte, 0x1111_1111_1111_11cd),
        (PortWidth::Word, 0x1111_1111_1111_abcd),
        (PortWidth::Dword, 0xffff_abcd),
    ] {
        let mut cpu = cpu();
        cpu.gpr[gpr::RAX] = 0x1111_1111_1111_1111;
        cpu.complete_port_read(width, 0xffff_abcd);
        assert_eq!(cpu.gpr[gpr::RAX], expected);
    }
}

// Segments and iretq.

#[test]
fn a_null_stack_segment_is_accepted_and_others_are_not() {
    let mut state = cpu();
    for null in [0, 3] {
        state.gpr[gpr::RAX] = null;
        run(&mut state.clone(), &[0x8e, 0xd0]);
    }
    state.gpr[gpr::RAX] = 0x10;
    let exception = raises(&state, &memory(&[0x8e, 0xd0]), 0x10);
    assert_eq!(exception, Exception::general_protection(0x10));
    // mov ds, ax with a foreign selector is the guest's own fault.
    let exception = raises(&state, &memory(&[0x8e, 0xd8]), 0x10);
    assert_eq!(exception, Exception::general_protection(0x10));
}

#[test]
fn iretq_goes_where_its_frame_says_with_safe_flags() {
    let memory = memory(&[0x48, 0xcf]);
    memory.put_words(0x8000, &[0x5000, 0x08, u64::MAX, 0x7777, 0x10]);
    let mut cpu = cpu();
    emulate(&mut cpu, &memory, 0x08).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (0x5000, 0x7777));
    let forbidden = rflags::IOPL | rflags::VM | 1 << 19 | 1 << 20;
    assert_eq!(cpu.rflags & forbidden, 0);
    assert_eq!(cpu.rflags, rflags::GUEST | rflags::ALWAYS, "RF, too, comes from the frame");
}

#[test]
fn iretq_refuses_a_null_selector_a_wild_rip_and_nested_tasks() {
    for words in
        [[0x5000, 0, 2, 0x7000, 0x2b], [0x5000, 3, 2, 0x7000, 0x2b], [1 << 47, 8, 2, 0x7000, 0x2b]]
    {
        let memory = memory(&[0x48, 0xcf]);
        memory.put_words(0x8000, &words);
        assert_eq!(raises(&cpu(), &memory, 0), Exception::general_protection(0));
    }
    let mut nested = cpu();
    nested.rflags |= rflags::NT;
    refuses(&nested, &[0x48, 0xcf]);
    let mut memory = memory(&[0x48, 0xcf]);
    memory.unmap(0x8000);
    assert_eq!(raises(&cpu(), &memory, 0), Exception::page_fault(0x8000, 0));
}

// Everything else.

#[test]
fn unprivileged_instructions_get_their_own_fault_back() {
    // mov rax, [rbx]; rep movsb
    for code in [&[0x48, 0x8b, 0x03][..], &[0xf3, 0xa4]] {
        assert_eq!(raises(&cpu(), &memory(code), 0x402), Exception::general_protection(0x402));
    }
}

#[test]
fn unsupported_instructions_are_named() {
    for (code, name) in [
        (&[0x0f, 0x21, 0xc0][..], "mov rax,dr0"),
        (&[0x44, 0x0f, 0x20, 0xc0], "mov rax,cr8"),
        (&[0x44, 0x0f, 0x22, 0xc0], "mov cr8,rax"),
    ] {
        let error = unsupported(code);
        assert!(error.starts_with("unsupported instruction `"), "{error}");
        assert!(error.contains(name), "{error} is not {name}");
    }
}

#[test]
fn an_instruction_at_the_end_of_a_page_needs_no_next_page() {
    let mut memory = FakeMemory::new();
    memory.put(0x1fff, &[0xf4]);
    memory.unmap(0x2000);
    let mut state = cpu();
    state.rip = 0x1fff;
    assert_eq!(emulate(&mut state, &memory, 0).unwrap().effect, Effect::Halt);
    assert_eq!(state.rip, 0x2000);
}

#[test]
fn an_instruction_across_pages_faults_on_the_missing_one() {
    let mut memory = FakeMemory::new();
    memory.put(0x1ffe, &[0x0f, 0x20]);
    memory.unmap(0x2000);
    let mut state = cpu();
    state.rip = 0x1ffe;
    assert_eq!(raises(&state, &memory, 0), Exception::page_fault(0x2000, 0x10));
    let present = FakeMemory::new();
    present.put(0x1ffe, MOV_RAX_CR0);
    emulate(&mut state, &present, 0).unwrap();
    assert_eq!(state.rip, 0x2001);
}

#[test]
fn an_instruction_that_cannot_be_fetched_faults_or_ends_the_guest() {
    let mut state = cpu();
    for rip in [crate::abi::GVA_LIMIT, u64::MAX - 3, 1 << 63] {
        state.rip = rip;
        assert_eq!(raises(&state, &FakeMemory::new(), 5), Exception::general_protection(0));
    }
    state.rip = 0x5000_0000;
    let stop = emulate(&mut state, &FakeMemory::new(), 0).unwrap_err();
    assert!(matches!(stop, Stop::Guest(GuestError::OutsideRam { .. })));
}

#[test]
fn bytes_that_are_no_instruction_get_the_fault_back() {
    for code in [&[0x06][..], &[0x0f, 0x04], &[0xf0, 0xf4], &[0x66; 15]] {
        assert_eq!(raises(&cpu(), &memory(code), 7), Exception::general_protection(7), "{code:x?}");
    }
}

#[path = "absent_tests.rs"]
mod absent;
#[path = "operand_tests.rs"]
mod operands;
#[path = "string_tests.rs"]
mod strings;

proptest::proptest! {
    /// No bytes and no registers make the emulator panic, and what fails changes nothing.
    #[test]
    fn any_bytes_are_survived(
        code in proptest::array::uniform15(proptest::num::u8::ANY),
        registers in proptest::array::uniform16(proptest::num::u64::ANY),
        opcode in proptest::sample::select(vec![
            vec![], vec![0x0f], vec![0x0f, 0x01], vec![0x0f, 0x20], vec![0x0f, 0x22], vec![0x0f, 0x00], vec![0x48, 0xcf],
        ]),
    ) {
        let memory = memory(&code);
        memory.put(RIP, &opcode);
        let mut before = cpu();
        before.gpr = registers;
        let mut after = before.clone();
        match emulate(&mut after, &memory, 0) {
            Ok(_) => proptest::prop_assert_eq!(after.rflags & (rflags::IOPL | rflags::VM), 0),
            Err(_) => proptest::prop_assert_eq!(after, before),
        }
    }
}
