use crate::addr::Gpa;
use crate::vmm::cpu::fake_memory::FakeMemory;
use crate::vmm::cpu::{DescriptorTable, Features, TaskRegister};

use super::*;

const IDT_BASE: u64 = 0x1000;
const HANDLER: u64 = 0x5000;
const STACK: u64 = 0x8008;
const TSS: u64 = 0x3000;

/// A gate as a guest writes it.
fn gate(target: u64, selector: u16, ist: u8, kind: u8) -> [u8; 16] {
    let t = target.to_le_bytes();
    let s = selector.to_le_bytes();
    [t[0], t[1], s[0], s[1], ist, kind, t[2], t[3], t[4], t[5], t[6], t[7], 0, 0, 0, 0]
}

fn set_gate(memory: &FakeMemory, vector: u8, gate: [u8; 16]) {
    memory.put(IDT_BASE + u64::from(vector) * 16, &gate);
}

fn setup() -> (GuestCpu, FakeMemory) {
    let features = Features { phys_bits: 48, nx: true, fsgsbase: true, xsave: true, avx: true };
    let mut cpu = GuestCpu::at_boot(Gpa::new(0x9000), features);
    cpu.rip = 0x4321;
    cpu.rflags = 0x202 | rflags::TF | rflags::NT | rflags::RF;
    cpu.gpr[gpr::RSP] = STACK;
    cpu.idtr = DescriptorTable { base: IDT_BASE, limit: 0xfff };
    cpu.task = TaskRegister { selector: 0x38, base: TSS, limit: 0x67 };
    let memory = FakeMemory::new();
    for vector in 0..32 {
        set_gate(&memory, vector, gate(HANDLER + u64::from(vector), 0x33, 0, 0x8e));
    }
    (cpu, memory)
}

/// Runs `deliver` and expects a triple fault.
fn triple(cpu: &mut GuestCpu, memory: &FakeMemory, exception: Exception) -> String {
    match deliver(cpu, memory, exception) {
        Err(Stop::Guest(error @ GuestError::TripleFault { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_exception_without_a_code_pushes_five_words() {
    let (mut cpu, memory) = setup();
    let flags = cpu.rflags;
    assert_eq!(deliver(&mut cpu, &memory, Exception::plain(vector::UD)).unwrap(), vector::UD);
    let rsp = (STACK & !0xf) - 40;
    assert_eq!(cpu.gpr[gpr::RSP], rsp, "aligned down to 16 bytes first");
    assert_eq!(cpu.rip, HANDLER + 6);
    assert_eq!(memory.words(rsp), [0x4321, 0x33, flags, STACK, 0x2b]);
    assert_eq!(cpu.rflags, 0x202, "TF, NT and RF are cleared");
}

#[test]
fn an_error_code_comes_below_the_frame() {
    let (mut cpu, memory) = setup();
    deliver(&mut cpu, &memory, Exception::general_protection(0x1234)).unwrap();
    let rsp = (STACK & !0xf) - 48;
    assert_eq!(cpu.gpr[gpr::RSP], rsp);
    let [code, rip] = memory.words(rsp);
    assert_eq!((code, rip), (0x1234, 0x4321));
}

#[test]
fn a_page_fault_sets_cr2() {
    let (mut cpu, memory) = setup();
    deliver(&mut cpu, &memory, Exception::page_fault(0xdead_beef, 2)).unwrap();
    assert_eq!(cpu.cr2, 0xdead_beef);
}

#[test]
fn faults_are_saved_with_rf_and_traps_are_not() {
    for (exception, is_fault) in [
        (Exception::plain(vector::UD), true),
        (Exception::general_protection(0), true),
        (Exception::plain(vector::DB), false),
        (Exception::asked(vector::BP, 0x4320), false),
        (Exception::asked(vector::GP, 0x431f), false),
    ] {
        let (mut cpu, memory) = setup();
        cpu.rflags = 0x202;
        deliver(&mut cpu, &memory, exception).unwrap();
        let code = if exception.error_code.is_some() { 8 } else { 0 };
        let [rip, _, flags] = memory.words(cpu.gpr[gpr::RSP] + code);
        assert_eq!(rip, 0x4321, "what is asked for goes on behind");
        assert_eq!(flags & rflags::RF != 0, is_fault, "{exception:?}");
    }
}

#[test]
fn what_was_asked_for_and_cannot_be_had_is_not_external() {
    // `int 0x90` past the limit, absent gates, a bad selector, no TSS, a bad stack.
    let asked = |vector| Exception::asked(vector, 0x431f);
    let mut cases = Vec::new();
    let (cpu, memory) = setup();
    cases.push((
        GuestCpu { idtr: DescriptorTable { base: IDT_BASE, limit: 0x8ff }, ..cpu },
        memory,
        0x90,
        vector::GP,
        0x482,
    ));
    for (bad, expected, code) in [
        (gate(HANDLER, 0x33, 0, 0x0e), vector::NP, 0x1a),
        (gate(HANDLER, 0x33, 0, 0x85), vector::GP, 0x1a),
        (gate(HANDLER, 0x10, 0, 0x8e), vector::GP, 0x10),
        (gate(1 << 47, 0x33, 0, 0x8e), vector::GP, 0),
    ] {
        let (cpu, memory) = setup();
        set_gate(&memory, 3, bad);
        cases.push((cpu, memory, 3, expected, code));
    }
    let (cpu, memory) = setup();
    set_gate(&memory, 3, gate(HANDLER, 0x33, 1, 0x8e));
    cases.push((GuestCpu { task: TaskRegister::default(), ..cpu }, memory, 3, vector::TS, 0));
    let (cpu, memory) = setup();
    set_gate(&memory, 3, gate(HANDLER, 0x33, 1, 0x8e));
    memory.put_words(TSS + 0x24, &[1 << 63]);
    cases.push((cpu, memory, 3, vector::SS, 0));
    for (mut cpu, memory, number, expected, code) in cases {
        let delivered = deliver(&mut cpu, &memory, asked(number)).unwrap();
        let [error_code, rip] = memory.words(cpu.gpr[gpr::RSP]);
        assert_eq!((delivered, error_code), (expected, code), "{number:#x}");
        assert_eq!(rip, 0x431f, "a fault of the instruction that asked");
    }
}

#[test]
fn an_interrupt_of_any_number_is_benign() {
    // `int 13` with a bad gate is followed by the #GP of that gate, not by #DF.
    let (mut cpu, memory) = setup();
    cpu.idtr.limit = 0xfff;
    set_gate(&memory, 14, gate(HANDLER, 0x33, 0, 0x85));
    assert_eq!(deliver(&mut cpu, &memory, Exception::asked(14, 0x431f)).unwrap(), vector::GP);
    let [code] = memory.words(cpu.gpr[gpr::RSP]);
    assert_eq!(code, 14 * 8 + 2);
}

#[test]
fn a_failed_push_has_the_address_of_the_first_that_fails() {
    // The frame of #UD is 40 bytes; its upper 16 are on the page of 0x8000, or the whole of it is.
    for (missing, top, cr2, pushed) in [
        (&[0x7000, 0x8000][..], 0x8010, 0x8008, false),
        (&[0x8000], 0x8010, 0x8008, false),
        (&[0x7000], 0x8010, 0x7ff8, true),
        (&[0x8000], 0x8100, 0x80f8, false),
    ] {
        let (mut cpu, mut memory) = setup();
        missing.iter().for_each(|page| memory.unmap(*page));
        memory.put_words(TSS + 0x24, &[0x6000]);
        set_gate(&memory, 14, gate(HANDLER, 0x33, 1, 0x8e));
        cpu.gpr[gpr::RSP] = top;
        assert_eq!(deliver(&mut cpu, &memory, Exception::plain(vector::UD)).unwrap(), vector::PF);
        assert_eq!(cpu.cr2, cr2, "missing {missing:x?}, stack {top:#x}");
        if pushed {
            assert_eq!(memory.words(0x8000), [top, 0x2b], "what was pushed before stays");
        }
    }
}

#[test]
fn an_interrupt_stack_is_taken_from_the_guests_tss() {
    let (mut cpu, memory) = setup();
    for (ist, top) in [(1u8, 0x7000u64), (7, 0x7807)] {
        memory.put_words(TSS + 0x24 + u64::from(ist - 1) * 8, &[top]);
        set_gate(&memory, 14, gate(HANDLER, 0x33, ist, 0x8e));
        let mut cpu = cpu.clone();
        deliver(&mut cpu, &memory, Exception::page_fault(1, 0)).unwrap();
        assert_eq!(cpu.gpr[gpr::RSP], (top & !0xf) - 48);
        let [_, _, _, _, rsp] = memory.words(cpu.gpr[gpr::RSP]);
        assert_eq!(rsp, STACK);
    }
    // Without a TSS: #TS, whose own gate has no IST.
    cpu.task = TaskRegister::default();
    let delivered = deliver(&mut cpu, &memory, Exception::plain(vector::BP)).unwrap();
    assert_eq!(delivered, vector::BP);
    set_gate(&memory, 3, gate(HANDLER, 0x33, 1, 0x8e));
    let delivered = deliver(&mut cpu, &memory, Exception::plain(vector::BP)).unwrap();
    assert_eq!(delivered, vector::TS);
    let [code] = memory.words(cpu.gpr[gpr::RSP]);
    assert_eq!(code, 1, "TR's selector, EXT");
}

#[test]
fn a_benign_exception_with_a_bad_gate_becomes_the_gates_fault() {
    for (bad, expected, code) in [
        (gate(HANDLER, 0x33, 0, 0x85), vector::GP, 6 * 8 + 3),
        (gate(HANDLER, 0x33, 0, 0x0e), vector::NP, 6 * 8 + 3),
        (gate(HANDLER, 0x10, 0, 0x8e), vector::GP, 0x11),
        (gate(HANDLER, 0, 0, 0x8e), vector::GP, 1),
        (gate(1 << 47, 0x33, 0, 0x8e), vector::GP, 1),
    ] {
        let (mut cpu, memory) = setup();
        set_gate(&memory, 6, bad);
        let delivered = deliver(&mut cpu, &memory, Exception::plain(vector::UD)).unwrap();
        let [error_code] = memory.words(cpu.gpr[gpr::RSP]);
        assert_eq!((delivered, error_code), (expected, code));
    }
}

#[test]
fn a_vector_past_the_limit_is_a_general_protection() {
    let (mut cpu, memory) = setup();
    cpu.idtr.limit = 19 * 16 - 2;
    let delivered = deliver(&mut cpu, &memory, Exception::plain(19)).unwrap();
    assert_eq!(delivered, vector::GP);
    let [code] = memory.words(cpu.gpr[gpr::RSP]);
    assert_eq!(code, 19 * 8 + 3);
}

#[test]
fn two_contributory_faults_make_a_double_fault() {
    let (mut cpu, memory) = setup();
    set_gate(&memory, vector::GP, gate(HANDLER, 0x33, 0, 0));
    assert_eq!(deliver(&mut cpu, &memory, Exception::general_protection(9)).unwrap(), vector::DF);
    let [code, rip] = memory.words(cpu.gpr[gpr::RSP]);
    assert_eq!((code, rip), (0, 0x4321));
}

#[test]
fn a_page_fault_on_the_stack_is_delivered_if_its_handler_has_another() {
    let (mut cpu, mut memory) = setup();
    memory.unmap(0x8000);
    memory.put_words(TSS + 0x24, &[0x7000]);
    set_gate(&memory, 14, gate(HANDLER, 0x33, 1, 0x8e));
    cpu.gpr[gpr::RSP] = 0x8100;
    // #UD cannot push: #PF instead, on its own stack, with the address of the push.
    assert_eq!(deliver(&mut cpu, &memory, Exception::plain(vector::UD)).unwrap(), vector::PF);
    assert_eq!(cpu.cr2, 0x8100 - 8);
    let [code] = memory.words(cpu.gpr[gpr::RSP]);
    assert_eq!(code, 2, "a write");
}

#[test]
fn a_page_fault_while_a_page_fault_is_delivered_is_a_double_fault() {
    let (mut cpu, mut memory) = setup();
    memory.unmap(0x8000);
    memory.put_words(TSS + 0x24, &[0x7000]);
    set_gate(&memory, vector::DF, gate(HANDLER + 8, 0x33, 1, 0x8e));
    cpu.gpr[gpr::RSP] = 0x8100;
    let delivered = deliver(&mut cpu, &memory, Exception::page_fault(0x1234, 0)).unwrap();
    assert_eq!(delivered, vector::DF);
    assert_eq!(cpu.cr2, 0x8100 - 8, "of the second fault");
    // Without that stack the double fault cannot be delivered either.
    let (mut cpu, mut memory) = setup();
    memory.unmap(0x8000);
    cpu.gpr[gpr::RSP] = 0x8100;
    let error = triple(&mut cpu, &memory, Exception::page_fault(0x1234, 2));
    assert_eq!(error, "triple fault (while delivering exception 14, error code 0x2, CR2 0x80f8)");
}

#[test]
fn no_idt_at_all_is_a_triple_fault() {
    for exception in
        [Exception::plain(6), Exception::general_protection(0), Exception::page_fault(1, 0)]
    {
        let (mut cpu, memory) = setup();
        cpu.idtr = DescriptorTable::default();
        triple(&mut cpu, &memory, exception);
    }
}

#[test]
fn an_idt_or_a_stack_beyond_the_limit_does_no_harm() {
    let (mut cpu, memory) = setup();
    for base in [crate::abi::GVA_LIMIT - 8, crate::abi::GVA_LIMIT, u64::MAX - 100, 1 << 63] {
        cpu.idtr.base = base;
        triple(&mut cpu, &memory, Exception::plain(vector::UD));
    }
    for rsp in [0, 8, 40, crate::abi::GVA_LIMIT + 0x1000, u64::MAX, 1 << 63] {
        let (mut cpu, memory) = setup();
        cpu.gpr[gpr::RSP] = rsp;
        triple(&mut cpu, &memory, Exception::plain(vector::UD));
    }
}

#[test]
fn tables_outside_memory_end_the_guest() {
    let (mut cpu, memory) = setup();
    cpu.idtr.base = 0x100_0000;
    let stop = deliver(&mut cpu, &memory, Exception::plain(vector::UD)).unwrap_err();
    assert!(matches!(stop, Stop::Guest(GuestError::OutsideRam { .. })));
}

proptest::proptest! {
    /// Whatever tables and registers a guest has, delivery ends, and in a state that the monitor
    /// can return to.
    #[test]
    fn any_guest_state_is_survived(
        vector in 0u8..32,
        rsp in proptest::num::u64::ANY,
        tables in proptest::collection::vec(proptest::num::u8::ANY, 0x400),
        idt_offset in 0u64..0x1_0000,
        limit in proptest::num::u16::ANY,
    ) {
        let (mut cpu, memory) = setup();
        memory.put(0x3000, &tables);
        cpu.gpr[gpr::RSP] = rsp;
        cpu.idtr = DescriptorTable { base: idt_offset, limit };
        let code = crate::vmm::cpu::exceptions::has_error_code(vector).then_some(0);
        match deliver(&mut cpu, &memory, Exception { error_code: code, ..Exception::plain(vector) }) {
            Ok(_) => {
                proptest::prop_assert!(is_canonical(cpu.rip));
                proptest::prop_assert_eq!(cpu.rflags & rflags::TF, 0);
            }
            Err(Stop::Inject(_)) => proptest::prop_assert!(false, "asked for another exception"),
            Err(_) => {}
        }
    }
}
