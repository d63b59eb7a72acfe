//! Random guests: bytes that nobody wrote, and well-formed privileged instructions with operands
//! that nobody would choose. Each has a fifth of a second; whatever it does, the hypervisor neither
//! panics nor hangs, and no guest gets it into a state that only a bug of ours explains.
//!
//! The seeds are fixed: a guest that fails can be run again by its trial's name and its number.

use std::time::Duration;

use gnomon::abi;
use gnomon::vmm::{GuestError, Outcome, VmError};
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{
    CODE, FREE, Guest, HANDLERS, IDT, IDT_POINTER, STACK_TOP, Written, assemble, gate, idt_with,
    power_off,
};
use crate::machine::Machine;
use crate::trial::{kvm_trial, long};

/// What one guest may take.
const TIME: Duration = Duration::from_millis(200);
/// Page tables that map RAM and window and nothing else, so that few wild accesses end a guest.
const TABLES: u64 = 0x30_0000;
/// Exceptions after which a guest that handles all of them gives up.
const PATIENCE: u32 = 2000;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("random_bytes", || storm(1, 100, |random| Guest::of_bytes(random.bytes(4096)))),
        kvm_trial("random_bytes_that_go_on", || storm(2, 60, bytes_that_go_on)),
        kvm_trial("random_privileged_instructions", || storm(3, 80, privileged)),
        kvm_trial("random_page_tables", || storm(4, 60, page_tables)),
    ]
}

/// SplitMix64: small, and the same everywhere and for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        let index = usize::try_from(self.below(choices.len() as u64)).unwrap_or(0);
        choices[index]
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(count).collect()
    }

    /// A value that means something to a processor more often than chance would have it.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => self.below(0x1_0000),
            2 => 1 << self.below(64),
            3 => FREE + self.below(64) * 0x1000,
            4 => abi::GVA_LIMIT.wrapping_add(self.below(0x1_0000)).wrapping_sub(0x8000),
            5 => abi::WINDOW_GPA + self.below(0x4_0000),
            6 => abi::ENTRY_CR0 ^ 1 << self.below(64),
            _ => abi::BOOT_PML4_GPA + self.below(4) * 0x1000,
        }
    }
}

/// Runs `count` guests made from the same seed.
fn storm(seed: u64, count: u64, make: impl Fn(&mut Random) -> Guest) {
    let count = if long() { count * 20 } else { count };
    for number in 0..count {
        let mut random = Random(seed << 32 | number);
        let guest = make(&mut random);
        let machine =
            Machine { vcpus: 1 + usize::from(number % 4 == 3), within: TIME, ..Machine::default() };
        let (ended, _) = machine.run_at_most(&guest, |_| {});
        assert!(is_allowed(&ended.outcome), "guest {number}: {:?}", ended.outcome);
    }
}

/// Whether a guest may end like that. What is not allowed are ends that say that the guest got
/// hold of the monitor, the shadow tables or the real processor's state.
fn is_allowed(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Failed(VmError::Guest { source, .. }) => matches!(
            source,
            GuestError::TripleFault { .. }
                | GuestError::UnsupportedInstruction { .. }
                | GuestError::OutsideRam { .. }
        ),
        Outcome::Failed(_) => false,
        _ => true,
    }
}

/// Handlers that skip a byte of whatever raised an exception, so that a guest gets on; its end comes
/// after [`PATIENCE`] exceptions.
fn skipping(guest: Guest) -> Guest {
    const ENTRY_WITHOUT_CODE: u64 = HANDLERS;
    const ENTRY_WITH_CODE: u64 = HANDLERS + 0x100;
    const COUNT: u64 = HANDLERS + 0x1000;
    let skip = |a: &mut CodeAssembler, has_code: bool| -> Written {
        let mut over = a.create_label();
        if has_code {
            a.add(rsp, 8)?;
        }
        a.inc(dword_ptr(COUNT))?;
        a.cmp(dword_ptr(COUNT), PATIENCE)?;
        a.ja(over)?;
        a.inc(qword_ptr(rsp))?;
        // Back to the code from wherever it jumped to.
        a.and(qword_ptr(rsp), 0x7fff)?;
        a.or(qword_ptr(rsp), i32::try_from(CODE).unwrap_or(0))?;
        // Without single steps, and on a stack that is one.
        a.and(qword_ptr(rsp + 16), 0xed5)?;
        a.mov(qword_ptr(rsp + 24), i32::try_from(STACK_TOP - 0x1000).unwrap_or(0))?;
        a.iretq()?;
        a.set_label(&mut over)?;
        power_off(a)
    };
    let mut handlers = assemble(ENTRY_WITHOUT_CODE, |a| skip(a, false));
    handlers.resize(0x100, 0xcc);
    handlers.extend(assemble(ENTRY_WITH_CODE, |a| skip(a, true)));
    handlers.resize(0x1004, 0);
    let gates = |vector: u8| {
        let has_code = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
        let target = if has_code { ENTRY_WITH_CODE } else { ENTRY_WITHOUT_CODE };
        // On interrupt stacks, as the random code does what it likes with RSP.
        gate(target, if vector == 8 { 2 } else { 1 })
    };
    let stacks = [STACK_TOP - 0x2000, STACK_TOP - 0x3000, 0, 0, 0, 0, 0];
    let guest = guest
        .with_tables()
        .with(HANDLERS, handlers)
        .with(IDT, idt_with(gates))
        .with(crate::guest::TSS, crate::guest::tss(stacks));
    only_memory(guest)
}

/// Adds [`TABLES`].
fn only_memory(guest: Guest) -> Guest {
    let table = |number: u64| (TABLES + number * 0x1000) | 3;
    let entries = |count: u64, entry: &dyn Fn(u64) -> u64| -> Vec<(usize, u64)> {
        (0..).zip((0..count).map(entry)).collect()
    };
    guest
        .with_table(TABLES, &[(0, table(1)), (1, table(3))])
        .with_table(TABLES + 0x1000, &[(0, table(2))])
        .with_table(TABLES + 0x2000, &entries(8, &|index| index << 21 | 0x83))
        .with_table(TABLES + 0x3000, &[(0, table(4))])
        .with_table(TABLES + 0x4000, &[(0, table(5))])
        .with_table(TABLES + 0x5000, &entries(20, &|index| (abi::WINDOW_GPA + index * 0x1000) | 3))
}

/// What random code needs before it begins.
fn preamble(a: &mut CodeAssembler) -> Written {
    a.mov(rsp, STACK_TOP)?;
    a.lidt(ptr(IDT_POINTER))?;
    a.lgdt(ptr(crate::guest::GDT_POINTER))?;
    a.mov(eax, u32::from(crate::guest::TSS_SELECTOR))?;
    a.ltr(ax)?;
    a.mov(rax, TABLES)?;
    a.mov(cr3, rax)
}

fn bytes_that_go_on(random: &mut Random) -> Guest {
    let mut code = assemble(CODE, preamble);
    // String port instructions and `hlt` end a guest, and in random bytes they soon come.
    let goes_on = |byte: &u8| !matches!(byte, 0x6c..=0x6f | 0xf4);
    code.extend(random.bytes(0x8000 - code.len()).iter().filter(|byte| goes_on(byte)));
    skipping(Guest::of_bytes(code))
}

fn page_tables(random: &mut Random) -> Guest {
    // Tables whose entries are present, more or less, and point to each other and elsewhere.
    let entry = |random: &mut Random| match random.below(6) {
        0 => random.next(),
        1 => 0,
        2 => random.value() & !0xfff | random.below(0x1000),
        _ => (FREE + random.below(16) * 0x1000) | 3 | random.below(0x1000) & !0x80,
    };
    let code = assemble(CODE, |a| {
        preamble(a)?;
        a.mov(rax, FREE)?;
        a.mov(cr3, rax)?;
        let mut next = a.create_label();
        a.mov(ecx, 300)?;
        a.mov(rbx, random.next())?;
        a.set_label(&mut next)?;
        a.mov(rdx, 0xd134_2543_de82_ef95u64)?;
        a.imul_2(rbx, rdx)?;
        a.inc(rbx)?;
        a.mov(rax, rbx)?;
        a.shr(rax, 17)?;
        a.mov(r8, qword_ptr(rax))?;
        a.mov(qword_ptr(rax), r8)?;
        a.invlpg(ptr(rax))?;
        a.dec(ecx)?;
        a.jne(next)?;
        power_off(a)
    });
    let mut guest = skipping(Guest::of_bytes(code));
    for table in 0..16 {
        let mut entries: Vec<(usize, u64)> = (0..512).map(|index| (index, entry(random))).collect();
        // The code stays mapped, at least until it overwrites that.
        if table == 0 {
            entries[0].1 = TABLES + 0x1003;
        }
        guest = guest.with_table(FREE + table * 0x1000, &entries);
    }
    guest
}

/// A few dozen instructions that trap, with operands from [`Random::value`].
fn privileged(random: &mut Random) -> Guest {
    let code = assemble(CODE, |a| {
        preamble(a)?;
        for _ in 0..200 {
            a.mov(rax, random.value())?;
            a.mov(rbx, random.value())?;
            one_privileged(a, random)?;
        }
        power_off(a)
    });
    skipping(Guest::of_bytes(code))
}

fn one_privileged(a: &mut CodeAssembler, random: &mut Random) -> Written {
    const MSRS: [u32; 6] = [0xc000_0080, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0x277, 0x10];
    match random.below(22) {
        0 => a.mov(cr0, rax),
        1 => a.mov(cr2, rax),
        // A root out of the blue is the end of most guests.
        2 if random.below(8) == 0 => a.mov(cr3, rax),
        2 => {
            a.mov(eax, u32::try_from(TABLES + random.below(0x1000)).unwrap_or(0))?;
            a.mov(cr3, rax)
        }
        3 => a.mov(cr4, rax),
        4 => a.mov(rax, random.one_of(&[cr0, cr2, cr3, cr4])),
        5 => a.invlpg(ptr(rax)),
        6 => {
            a.mov(edx, u32::try_from(random.below(0x1_0000)).unwrap_or(0))?;
            a.in_(eax, dx)
        }
        7 => {
            a.mov(edx, random.one_of(&[0x3f8u32, 0x3f9, 0x3fb, 0x3fc, 0x80, 0x5ff, 0x601]))?;
            a.out(dx, ax)
        }
        8 => a.lidt(ptr(IDT_POINTER)),
        9 => a.lgdt(ptr(rax)),
        10 => a.ltr(ax),
        11 => {
            a.mov(ecx, random.one_of(&MSRS))?;
            a.mov(rdx, random.value())?;
            a.wrmsr()
        }
        12 => {
            a.mov(ecx, random.one_of(&MSRS))?;
            a.rdmsr()
        }
        13 => {
            // An `iretq` to anywhere.
            for _ in 0..5 {
                a.mov(rcx, random.value())?;
                a.push(rcx)?;
            }
            a.iretq()
        }
        14 => {
            let numbers = [0u64, 1, 2, 3, 5, 6, 0xffff_ffff];
            a.mov(rdi, random.value())?;
            a.mov(rsi, random.value())?;
            a.mov(rcx, random.value())?;
            crate::guest::hypercall(a, random.one_of(&numbers))
        }
        15 => {
            // An entry of the tables in use.
            a.mov(rcx, TABLES + 8 * (1 + random.below(6 * 512 - 1)))?;
            a.mov(qword_ptr(rcx), rax)
        }
        16 => {
            a.push(rax)?;
            a.popfq()
        }
        17 => a.mov(random.one_of(&[ds, es, fs, gs, ss]), eax),
        18 => a.swapgs(),
        19 => a.mov(rbx, qword_ptr(rax)),
        20 => a.mov(qword_ptr(rax), rbx),
        _ => a.clts(),
    }
}
