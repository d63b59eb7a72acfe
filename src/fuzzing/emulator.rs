//! Any instruction bytes in any state of a guest's processor: steps of the emulator, and the
//! delivery of the exceptions that come of them.
//!
//! Checked, besides that nothing panics: the fetch reads at most the 15 bytes of an instruction,
//! and no access reaches the monitor's addresses; a step that fails changes neither the registers
//! nor memory; one that succeeds goes on behind the instruction, changes what that instruction may
//! change (the decoder's tables say which general registers) and leaves a state that a processor
//! can be in; delivery ends, with one exception frame or with a triple fault.

use iced_x86::{
    Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::memory_log::{LoggedMemory, Made};
use super::{Bytes, number};
use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::shadow_mmu::Access;
use crate::vmm::cpu::deliver;
use crate::vmm::cpu::emulate::{Destination, Effect, Emulated, PortWidth, emulate};
use crate::vmm::cpu::exceptions::{EXCEPTION_VECTORS, Exception, Stop, has_error_code, vector};
use crate::vmm::cpu::fake_memory::FakeMemory;
use crate::vmm::cpu::memory::{AccessError, VirtualMemory};
use crate::vmm::cpu::{
    DescriptorTable, Features, GUEST_CS, GuestCpu, TaskRegister, cr0, cr4, efer, gpr, is_canonical,
    rflags,
};

/// Longest instruction.
const MAX_BYTES: u64 = 15;
/// The guest's memory: 16 pages from 0.
const MEMORY_BYTES: u64 = 0x1_0000;
/// Where its tables are.
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const TSS_SELECTOR: u16 = 0x40;

/// Most steps of one input.
const MAX_STEPS: usize = 16;

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let mut cpu = any_cpu(&mut bytes);
    let memory = any_memory(&mut bytes);
    for _ in 0..MAX_STEPS {
        prepare(&mut bytes, &mut cpu, &memory);
        assert_possible(&cpu);
        if !step(&mut bytes, &mut cpu, &memory) || bytes.is_empty() {
            break;
        }
    }
}

/// One instruction; `false` if it ended the guest.
fn step(bytes: &mut Bytes<'_>, cpu: &mut GuestCpu, memory: &LoggedMemory) -> bool {
    let before = cpu.clone();
    let result = emulate(cpu, memory, number(bytes));
    let log = memory.take_log();
    check_fetch(&before, &log);
    let exception = match result {
        Ok(done) => {
            check_done(&before, cpu, memory, &log, done);
            return complete(cpu, memory, done.effect, number(bytes));
        }
        Err(stop) => {
            assert_eq!(*cpu, before, "registers changed by an instruction that failed: {stop:?}");
            assert!(!log.iter().any(is_write), "memory changed by one: {log:x?}");
            match stop {
                Stop::Inject(exception) => exception,
                Stop::Guest(error) => {
                    assert!(!error.to_string().is_empty());
                    // Another exception instead, so that those are delivered, too.
                    any_exception(bytes, cpu.rip)
                }
                Stop::Host(_) => return false,
            }
        }
    };
    deliver(cpu, memory, exception)
}

fn is_write(made: &Made) -> bool {
    made.access == Access::Write && made.done
}

// What a processor can be in.

fn assert_possible(cpu: &GuestCpu) {
    let is_set = |value: u64, bits: u64| value & bits == bits;
    assert!(is_canonical(cpu.rip), "RIP {:#x}", cpu.rip);
    assert!(is_set(cpu.rflags, rflags::ALWAYS), "RFLAGS {:#x}", cpu.rflags);
    assert_eq!(cpu.rflags & !(rflags::GUEST | rflags::ALWAYS), 0, "RFLAGS {:#x}", cpu.rflags);
    assert!(is_set(cpu.cr0, cr0::PE | cr0::PG | cr0::ET), "CR0 {:#x}", cpu.cr0);
    assert!(cpu.cr0 & cr0::NW == 0 || cpu.cr0 & cr0::CD != 0, "CR0 {:#x}", cpu.cr0);
    assert_eq!(cpu.cr0 >> 32, 0, "CR0 {:#x}", cpu.cr0);
    assert_eq!(cpu.cr3 >> cpu.features.phys_bits, 0, "CR3 {:#x}", cpu.cr3);
    assert!(is_set(cpu.cr4, cr4::PAE), "CR4 {:#x}", cpu.cr4);
    assert_eq!(cpu.cr4 & !possible_cr4(&cpu.features), 0, "CR4 {:#x}", cpu.cr4);
    assert!(is_set(cpu.efer, efer::LME | efer::LMA), "EFER {:#x}", cpu.efer);
    let nxe = if cpu.features.nx { efer::NXE } else { 0 };
    assert_eq!(cpu.efer & !(efer::LME | efer::LMA | efer::SCE | nxe), 0, "EFER {:#x}", cpu.efer);
    let bases = [cpu.fs_base, cpu.gs_base, cpu.kernel_gs_base];
    assert!(bases.into_iter().all(is_canonical), "segment bases {bases:x?}");
    let tables = [cpu.gdtr.base, cpu.idtr.base, cpu.task.base];
    assert!(tables.into_iter().all(is_canonical), "GDT, IDT, TSS at {tables:x?}");
    assert!(cpu.pat.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)), "PAT");
}

/// TSD, PSE, PAE, PGE, PCE, OSFXSR, OSXMMEXCPT (Intel SDM vol. 3, 2.5), and what has a feature.
fn possible_cr4(features: &Features) -> u64 {
    let fsgsbase = if features.fsgsbase { cr4::FSGSBASE } else { 0 };
    let xsave = if features.xsave { cr4::OSXSAVE } else { 0 };
    0x7b4 | fsgsbase | xsave
}

// The input.

fn any_cpu(bytes: &mut Bytes<'_>) -> GuestCpu {
    let kind: u8 = number(bytes);
    let features = Features {
        phys_bits: [46, 36, 39, 52][usize::from(kind & 3)],
        nx: kind & 4 == 0,
        fsgsbase: kind & 8 == 0,
        xsave: kind & 16 == 0,
        avx: kind & 32 == 0,
    };
    let mut cpu = GuestCpu::at_boot(Gpa::new(0x9000), features);
    cpu.rip = 0x1000;
    cpu.gdtr = DescriptorTable { base: GDT, limit: 0x4f };
    cpu.idtr = DescriptorTable { base: IDT, limit: 0x1ff };
    cpu.task = TaskRegister { selector: TSS_SELECTOR, base: TSS, limit: 0x67 };
    cpu.gpr[gpr::RSP] = 0x8000;
    cpu
}

/// What lies between two steps: the guest runs other code, which changes registers and memory.
fn prepare(bytes: &mut Bytes<'_>, cpu: &mut GuestCpu, memory: &LoggedMemory) {
    let choice: u8 = number(bytes);
    if choice & 3 == 3 {
        cpu.rip = any_place(bytes);
    }
    if choice & 4 != 0 {
        cpu.rflags ^= u64::from(number::<u32>(bytes)) & rflags::GUEST;
    }
    for _ in 0..choice >> 3 & 3 {
        set_register(bytes, cpu);
    }
    if choice & 0x20 != 0 {
        let which: u8 = number(bytes);
        // Mostly a word of a frame, a gate or the TSS descriptor.
        let at = match which % 4 {
            0 => cpu.gpr[gpr::RSP].wrapping_add(u64::from(which >> 2 & 7) * 8),
            1 => IDT + u64::from(which >> 2) * 8,
            2 => GDT + u64::from(TSS_SELECTOR) + u64::from(which >> 2 & 1) * 8,
            _ => u64::from(number::<u16>(bytes)),
        };
        memory.memory.put_words(at.min(MEMORY_BYTES - 8), &[any_value(bytes)]);
    }
    let rip = cpu.rip;
    for at in rip..rip.saturating_add([3, 2, 8, 16][usize::from(choice >> 6)]) {
        if at < MEMORY_BYTES {
            memory.memory.put(at, &[number(bytes)]);
        }
    }
}

fn set_register(bytes: &mut Bytes<'_>, cpu: &mut GuestCpu) {
    let features = cpu.features;
    let which: u8 = number(bytes);
    match which % 32 {
        register @ 0..=15 => cpu.gpr[usize::from(register)] = any_value(bytes),
        16 => cpu.cr0 ^= any_value(bytes) & (cr0::WP | cr0::TS | cr0::AM),
        17 => cpu.cr4 ^= any_value(bytes) & possible_cr4(&features) & !cr4::PAE,
        18 if features.nx => cpu.efer ^= efer::NXE,
        19 => cpu.fs_base = canonical(any_value(bytes)),
        20 => cpu.gs_base = canonical(any_value(bytes)),
        21 => cpu.kernel_gs_base = canonical(any_value(bytes)),
        22 => cpu.gdtr.base = canonical(any_value(bytes)),
        23 => cpu.idtr.base = canonical(any_value(bytes)),
        24 => cpu.task.base = canonical(any_value(bytes)),
        25 => cpu.gdtr.limit = number(bytes),
        26 => cpu.idtr.limit = number(bytes),
        27 => cpu.task.limit = number(bytes),
        28 => cpu.cr2 = any_value(bytes),
        _ => cpu.cr3 = any_value(bytes) & ((1 << features.phys_bits) - 1),
    }
}

/// The canonical address with the same low 48 bits.
fn canonical(address: u64) -> u64 {
    let low = address & 0xffff_ffff_ffff;
    if low >> 47 != 0 { low | 0xffff << 48 } else { low }
}

/// An address where something may happen: inside a page, or so many bytes before an end.
fn any_place(bytes: &mut Bytes<'_>) -> u64 {
    let (kind, before): (u8, u8) = (number(bytes), number(bytes));
    let before = u64::from(before) % 64;
    match kind % 8 {
        0..=2 => 0x1000 + before,
        3 | 4 => 0x2000 - before,
        5 => MEMORY_BYTES - before,
        6 => abi::GVA_LIMIT - before,
        _ => canonical(number(bytes)),
    }
}

fn any_value(bytes: &mut Bytes<'_>) -> u64 {
    let kind: u8 = number(bytes);
    match kind % 8 {
        0 => u64::from(number::<u16>(bytes)),
        1 => u64::from(number::<u32>(bytes)),
        2 => any_place(bytes),
        3 => 1 << (kind >> 3),
        4 => abi::ENTRY_CR0 ^ 1 << (kind >> 3),
        5 => abi::ENTRY_CR4 ^ 1 << (kind >> 3),
        6 => abi::ENTRY_EFER ^ 1 << (kind >> 3),
        _ => number(bytes),
    }
}

fn any_memory(bytes: &mut Bytes<'_>) -> LoggedMemory {
    let mut memory = FakeMemory::new();
    for number in 0..u64::from(EXCEPTION_VECTORS) {
        // A present interrupt gate to 0x3000, page faults on the first interrupt stack.
        let ist = u64::from(number == u64::from(vector::PF));
        let low = 0x3000 | u64::from(GUEST_CS) << 16 | ist << 32 | 0x8e << 40;
        memory.put_words(IDT + number * 16, &[low, 0]);
    }
    // An available TSS of 0x68 bytes, and its interrupt stacks.
    let low = 0x67 | TSS << 16 | 0x89 << 40;
    memory.put_words(GDT + u64::from(TSS_SELECTOR), &[low, 0]);
    memory.put_words(TSS + 0x24, &[0x9000; 7]);
    // An iretq frame.
    let flags = u64::from(number::<u32>(bytes));
    memory.put_words(0x8000, &[0x1000, u64::from(GUEST_CS), flags, 0x8800, 0]);

    let absent = u64::from(number::<u16>(bytes));
    let read_only = u64::from(number::<u16>(bytes));
    for page in 0..MEMORY_BYTES / PAGE_SIZE_U64 {
        if absent >> page & 1 != 0 {
            memory.unmap(page * PAGE_SIZE_U64);
        }
        if read_only >> page & 1 != 0 {
            memory.protect(page * PAGE_SIZE_U64);
        }
    }
    let fails: u8 = number(bytes);
    LoggedMemory::new(memory, (fails & 0xf0 == 0xf0).then_some(fails & 0xf))
}

fn any_exception(bytes: &mut Bytes<'_>, rip: u64) -> Exception {
    let vector = number::<u8>(bytes) % EXCEPTION_VECTORS;
    if number::<u8>(bytes) & 3 == 3 {
        return Exception::asked(vector, canonical(rip.wrapping_sub(2)));
    }
    Exception {
        error_code: has_error_code(vector).then(|| number(bytes)),
        cr2: (vector == vector::PF).then(|| any_place(bytes)),
        ..Exception::plain(vector)
    }
}

// The step.

/// What the step reads as code is its instruction; what it touches is the guest's.
fn check_fetch(before: &GuestCpu, log: &[Made]) {
    let mut fetched = 0;
    for made in log {
        if made.access == Access::Execute {
            let inside = made.gva.wrapping_sub(before.rip).checked_add(made.len as u64);
            assert!(inside.is_some_and(|end| end <= MAX_BYTES), "fetches past 15 bytes: {made:x?}");
            fetched += made.len as u64;
        }
        if made.done {
            let end = made.gva.checked_add(made.len as u64);
            assert!(end.is_some_and(|end| end <= abi::GVA_LIMIT), "beyond the limit: {made:x?}");
        }
    }
    assert!(fetched <= MAX_BYTES, "fetches {fetched} bytes");
    assert!(log.len() <= 5, "an instruction of {} accesses", log.len());
}

/// The instruction at `rip`, by as many bytes as can be fetched there.
fn decode(before: &GuestCpu, memory: &LoggedMemory) -> Instruction {
    let code = memory.memory.fetchable(before.rip, MAX_BYTES);
    Decoder::with_ip(64, &code, before.rip, DecoderOptions::NONE).decode()
}

fn check_done(
    before: &GuestCpu,
    after: &GuestCpu,
    memory: &LoggedMemory,
    log: &[Made],
    done: Emulated,
) {
    assert_possible(after);
    let instruction = decode(before, memory);
    assert!(!instruction.is_invalid(), "emulated what is no instruction");
    let holds_back =
        instruction.mnemonic() == Mnemonic::Int || instruction.op0_register() == Register::SS;
    let is_stepped = before.rflags & rflags::TF != 0 && !holds_back;
    assert_eq!(done.single_step, is_stepped, "{instruction}");
    let expected = registers_after(&instruction, before, after, done.effect);
    assert_eq!(*after, expected, "{instruction}");
    let fits = effect_fits(&instruction, before, after, done.effect);
    assert!(fits, "{instruction}: {:?}", done.effect);
    check_writes(&instruction, before, after, log);
}

/// `before`, with RIP behind the instruction and what that may change taken from `after`.
fn registers_after(
    instruction: &Instruction,
    before: &GuestCpu,
    after: &GuestCpu,
    effect: Effect,
) -> GuestCpu {
    let mut expected = before.clone();
    expected.rip = before.rip + instruction.len() as u64;
    expected.rflags &= !rflags::RF;
    if goes_on(instruction, after, effect) {
        expected.rip = before.rip;
    }
    let mut info = InstructionInfoFactory::new();
    for used in info.info(instruction).used_registers() {
        let full = used.register().full_register();
        let is_written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
        if is_written && full.is_gpr64() {
            expected.gpr[full.number()] = after.gpr[full.number()];
        }
    }
    match instruction.mnemonic() {
        Mnemonic::Mov => match instruction.op0_register() {
            Register::CR0 => expected.cr0 = after.cr0,
            Register::CR2 => expected.cr2 = after.cr2,
            Register::CR3 => expected.cr3 = after.cr3,
            Register::CR4 => expected.cr4 = after.cr4,
            _ => {}
        },
        Mnemonic::Clts => expected.cr0 &= !cr0::TS,
        Mnemonic::Lmsw => {
            let others = (before.cr0 ^ after.cr0) & !(cr0::MP | cr0::EM | cr0::TS);
            assert_eq!(others, 0, "{instruction}");
            expected.cr0 = after.cr0;
        }
        Mnemonic::Lgdt => expected.gdtr = after.gdtr,
        Mnemonic::Lidt => expected.idtr = after.idtr,
        Mnemonic::Ltr => expected.task = after.task,
        Mnemonic::Swapgs => {
            (expected.gs_base, expected.kernel_gs_base) = (before.kernel_gs_base, before.gs_base);
        }
        Mnemonic::Wrmsr => {
            (expected.efer, expected.pat) = (after.efer, after.pat);
            (expected.fs_base, expected.gs_base) = (after.fs_base, after.gs_base);
            expected.kernel_gs_base = after.kernel_gs_base;
        }
        Mnemonic::Iretq => (expected.rip, expected.rflags) = (after.rip, after.rflags),
        _ => {}
    }
    expected
}

/// Whether what is left to be done outside the registers is the instruction's.
fn effect_fits(
    instruction: &Instruction,
    before: &GuestCpu,
    after: &GuestCpu,
    effect: Effect,
) -> bool {
    let loads_root = effect == Effect::LoadRoot;
    let is_none = effect == Effect::None;
    match instruction.mnemonic() {
        Mnemonic::Mov => match instruction.op0_register() {
            Register::CR0 => {
                (loads_root || is_none) && loads_root == ((before.cr0 ^ after.cr0) & cr0::WP != 0)
            }
            Register::CR3 => loads_root,
            Register::CR4 => loads_root || is_none,
            _ => is_none,
        },
        Mnemonic::Wrmsr => {
            (loads_root || is_none) && loads_root == ((before.efer ^ after.efer) & efer::NXE != 0)
        }
        Mnemonic::Cpuid => matches!(effect, Effect::Cpuid { .. }),
        Mnemonic::Int => {
            effect == Effect::Interrupt { vector: instruction.immediate8(), rip: before.rip }
        }
        Mnemonic::Hlt => effect == Effect::Halt,
        Mnemonic::Invlpg => match effect {
            Effect::FlushPage(gva) => gva.as_u64() < abi::GVA_LIMIT,
            _ => is_none,
        },
        Mnemonic::In | Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => match effect {
            Effect::PortRead { into, .. } => {
                let is_plain = instruction.mnemonic() == Mnemonic::In;
                (into == Destination::Accumulator) == is_plain
            }
            _ => is_none && is_in_vain(instruction, before),
        },
        Mnemonic::Out | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => match effect {
            Effect::PortWrite { width, value, .. } => value & !width.mask() == 0,
            _ => is_none && is_in_vain(instruction, before),
        },
        _ => is_none,
    }
}

/// No instruction writes memory but `ltr`, which marks its TSS as busy.
fn check_writes(instruction: &Instruction, before: &GuestCpu, after: &GuestCpu, log: &[Made]) {
    let writes: Vec<_> = log.iter().filter(|made| is_write(made)).collect();
    if instruction.mnemonic() == Mnemonic::Ltr {
        let busy = before.gdtr.base.wrapping_add(u64::from(after.task.selector & !7) + 5);
        assert!(matches!(writes[..], [made] if (made.gva, made.len) == (busy, 1)), "{writes:x?}");
    } else {
        assert!(writes.is_empty(), "{instruction} wrote {writes:x?}");
    }
}

/// RCX, as far as a repeated string instruction counts by it; `None` for any other.
fn count(instruction: &Instruction, cpu: &GuestCpu) -> Option<u64> {
    let is_repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let kinds = [instruction.op_kind(0), instruction.op_kind(1)];
    let is_wide =
        kinds.iter().any(|kind| matches!(kind, OpKind::MemorySegRSI | OpKind::MemoryESRDI));
    let is_narrow =
        kinds.iter().any(|kind| matches!(kind, OpKind::MemorySegESI | OpKind::MemoryESEDI));
    let mask = if is_narrow { u64::from(u32::MAX) } else { u64::MAX };
    (is_repeated && (is_wide || is_narrow)).then_some(cpu.gpr[gpr::RCX] & mask)
}

/// Whether a string instruction has nothing to do.
fn is_in_vain(instruction: &Instruction, before: &GuestCpu) -> bool {
    count(instruction, before) == Some(0)
}

/// Whether it has been executed for one element of several.
fn goes_on(instruction: &Instruction, after: &GuestCpu, effect: Effect) -> bool {
    effect != Effect::None && count(instruction, after).is_some_and(|left| left != 0)
}

/// What the vCPU's thread does with the answer of a port, or with an interrupt; `false` if that ended the
/// guest.
fn complete(cpu: &mut GuestCpu, memory: &LoggedMemory, effect: Effect, answer: u32) -> bool {
    let (width, into) = match effect {
        Effect::Interrupt { vector, rip } => {
            return deliver(cpu, memory, Exception::asked(vector, rip));
        }
        Effect::PortRead { width, into, .. } => (width, into),
        _ => return true,
    };
    if let Destination::Memory(gva) = into {
        let bytes = &answer.to_le_bytes()[..width.bytes()];
        let written = memory.write(&cpu.paging(), gva, bytes);
        assert!(matches!(written, Ok(()) | Err(AccessError::Host(_))), "{gva:#x} was checked");
        memory.take_log();
        return written.is_ok();
    }
    let before = cpu.gpr[gpr::RAX];
    cpu.complete_port_read(width, answer);
    let after = cpu.gpr[gpr::RAX];
    assert_eq!(after & u64::from(width.mask()), u64::from(answer & width.mask()), "{width:?}");
    let kept = if width == PortWidth::Dword { 0 } else { before & !u64::from(width.mask()) };
    assert_eq!(after & !u64::from(width.mask()), kept, "{width:?}");
    true
}

// The exception.

/// Delivers the exception; `false` if that ended the guest.
fn deliver(cpu: &mut GuestCpu, memory: &LoggedMemory, exception: Exception) -> bool {
    let vector = exception.vector;
    if exception.asked_at.is_none() {
        assert!(vector < EXCEPTION_VECTORS, "{exception:?}");
        assert_eq!(exception.error_code.is_some(), has_error_code(vector), "{exception:?}");
        assert_eq!(exception.cr2.is_some(), vector == vector::PF, "{exception:?}");
    }
    let before = cpu.clone();
    let result = deliver::deliver(cpu, memory, exception);
    let log = memory.take_log();
    assert!(log.len() <= 15, "a delivery of {} accesses", log.len());
    let writes: Vec<_> = log.iter().filter(|made| is_write(made)).collect();
    let mut expected = before;
    expected.cr2 = cpu.cr2;
    let goes_on = result.is_ok();
    let left = match result {
        Ok(delivered) => {
            assert_possible(cpu);
            let (words, parts) = frame(cpu, &writes);
            let has_code = words == 6;
            // Only an exception that was raised by number has no code where its vector has one.
            let is_it = delivered == vector && has_code == exception.error_code.is_some();
            assert!(is_it || has_code == has_error_code(delivered), "{exception:?}: {words} words");
            if let (Some(rip), false) = (exception.asked_at, is_it) {
                expected.rip = rip;
            }
            let first = cpu.gpr[gpr::RSP] + (words - 5) * 8;
            let saved: [u64; 5] = memory.memory.words(first);
            let is_trap = matches!(delivered, vector::DB | vector::BP | vector::OF | vector::DF)
                || (is_it && exception.asked_at.is_some());
            let rf = if is_trap { 0 } else { rflags::RF };
            let old = (expected.rip, expected.rflags | rf, expected.gpr[gpr::RSP]);
            assert_eq!((saved[0], saved[2], saved[3]), old, "the frame");
            let cleared = rflags::TF | rflags::NT | rflags::RF;
            assert_eq!(cpu.rflags, expected.rflags & !cleared, "RFLAGS");
            (expected.rip, expected.rflags) = (cpu.rip, cpu.rflags);
            expected.gpr[gpr::RSP] = cpu.gpr[gpr::RSP];
            &writes[..writes.len() - parts]
        }
        Err(Stop::Inject(again)) => panic!("{exception:?} left {again:?} to be delivered"),
        Err(Stop::Guest(_) | Stop::Host(_)) => {
            expected.rip = cpu.rip;
            &writes[..]
        }
    };
    // What a frame that could not be pushed leaves is its upper part, from a page's beginning on.
    for made in left {
        assert!(made.gva.is_multiple_of(PAGE_SIZE_U64) && made.len < 48, "{made:x?}");
    }
    assert_eq!(*cpu, expected, "what delivery may not change");
    goes_on
}

/// Words of the frame at RSP, and in how many writes it was pushed: the last ones.
fn frame(cpu: &GuestCpu, writes: &[&Made]) -> (u64, usize) {
    let rsp = cpu.gpr[gpr::RSP];
    let Some((last, before)) = writes.split_last() else { panic!("no frame was pushed") };
    assert_eq!(last.gva, rsp);
    let mut bytes = last.len as u64;
    let mut parts = 1;
    // The upper part of a frame across two pages came first.
    let is_split = (rsp + bytes).is_multiple_of(PAGE_SIZE_U64) && !matches!(bytes, 40 | 48);
    if let (true, Some(upper)) = (is_split, before.last()) {
        assert_eq!(upper.gva, rsp + bytes, "{writes:x?}");
        bytes += upper.len as u64;
        parts = 2;
    }
    assert!(matches!(bytes, 40 | 48), "{bytes} bytes: {writes:x?}");
    assert!(rsp + bytes <= abi::GVA_LIMIT && (rsp + bytes).is_multiple_of(16), "{writes:x?}");
    (bytes / 8, parts)
}
