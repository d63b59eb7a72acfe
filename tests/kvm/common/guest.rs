//! Small guests made from machine code: the code, some tables at fixed addresses, and exception
//! handlers that report what they got by hypercall.
//!
//! Memory of such a guest, from 2 MiB up so that it is clear of the boot area:
//!
//! | address | what |
//! |---|---|
//! | [`CODE`] | the code; entry point |
//! | [`STACK_TOP`] | the stack, downwards |
//! | [`IDT`] | 32 gates to the handlers |
//! | [`IDT_POINTER`], [`GDT_POINTER`] | operands for `lidt` and `lgdt` |
//! | [`GDT`] | a TSS descriptor, selector [`TSS_SELECTOR`] |
//! | [`TSS`] | a TSS |
//! | [`HANDLERS`] | the handlers |
//! | [`FREE`] | unused memory from here up |

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use gnomon::abi;

pub(crate) const CODE: u64 = 0x20_0000;
pub(crate) const STACK_TOP: u64 = 0x22_0000;
pub(crate) const IDT: u64 = 0x22_0000;
pub(crate) const IDT_POINTER: u64 = 0x22_1000;
pub(crate) const GDT_POINTER: u64 = 0x22_1010;
pub(crate) const GDT: u64 = 0x22_1100;
pub(crate) const TSS_SELECTOR: u16 = 0x10;
pub(crate) const TSS: u64 = 0x22_2000;
pub(crate) const HANDLERS: u64 = 0x23_0000;
pub(crate) const FREE: u64 = 0x40_0000;

/// Bytes between two handlers.
const HANDLER_BYTES: u64 = 16;
/// Offset of what all handlers share.
const COMMON_HANDLER: u64 = 0x400;
/// Exception vectors.
const VECTORS: u8 = 32;
/// Bytes of a TSS without I/O bitmap.
const TSS_BYTES: u64 = 0x68;
/// Kind of a report that [`Assembler::report`] makes, above all vectors.
pub(crate) const VALUE: u64 = 0x1000;

/// What writing code comes to.
pub(crate) type Written = Result<(), IcedError>;

/// Machine code for `address`.
pub(crate) fn assemble(address: u64, write: impl FnOnce(&mut CodeAssembler) -> Written) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).expect("64 is a bitness");
    write(&mut assembler).expect("the instructions exist");
    assembler.assemble(address).expect("the code can be encoded")
}

/// A guest: pieces of memory and an entry point.
#[derive(Clone)]
pub(crate) struct Guest {
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Guest {
    /// A guest of nothing but this code, with no stack and no IDT.
    pub(crate) fn bare(write: impl FnOnce(&mut CodeAssembler) -> Written) -> Self {
        Self::of_bytes(assemble(CODE, write))
    }

    /// A guest of these bytes as code, whatever they are.
    pub(crate) fn of_bytes(code: Vec<u8>) -> Self {
        assert!(code.len() < 0x1_0000, "the stack begins above");
        Self { pieces: vec![(CODE, code)] }
    }

    /// A guest with a stack, a GDT with a TSS, and an IDT whose handlers report each exception as
    /// [`attempt`] has it.
    pub(crate) fn new(write: impl FnOnce(&mut CodeAssembler) -> Written) -> Self {
        let guest = Self::bare(|a| {
            a.mov(rsp, STACK_TOP)?;
            a.lidt(ptr(IDT_POINTER))?;
            a.xor(r12d, r12d)?;
            a.xor(r15d, r15d)?;
            write(a)
        });
        guest.with_tables()
    }

    /// The same with all that [`Guest::new`] has next to its code.
    pub(crate) fn with_tables(self) -> Self {
        self.with(IDT, idt())
            .with(IDT_POINTER, pointer(IDT, 0xfff))
            .with(GDT_POINTER, pointer(GDT, 0x1f))
            .with(GDT, gdt(TSS, 0x9))
            .with(TSS, tss([0; 7]))
            .with(HANDLERS, handlers())
    }

    /// The same with `bytes` at guest-physical `address`, in place of what was put there before.
    pub(crate) fn with(mut self, address: u64, bytes: Vec<u8>) -> Self {
        self.pieces.retain(|(start, _)| *start != address);
        self.pieces.push((address, bytes));
        self
    }

    /// The same with a page table of these entries at guest-physical `address`.
    pub(crate) fn with_table(self, address: u64, entries: &[(usize, u64)]) -> Self {
        let mut page = vec![0; 4096];
        for &(index, entry) in entries {
            page[index * 8..index * 8 + 8].copy_from_slice(&entry.to_le_bytes());
        }
        self.with(address, page)
    }

    /// A minimal static ELF64 executable.
    pub(crate) fn elf(&self) -> Vec<u8> {
        const HEADER_BYTES: usize = 64;
        const PROGRAM_HEADER_BYTES: usize = 56;
        let count = u16::try_from(self.pieces.len()).expect("a few pieces");
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        file.resize(16, 0);
        file.extend([2u16, 62].iter().flat_map(|field| field.to_le_bytes()));
        file.extend(1u32.to_le_bytes());
        file.extend([CODE, HEADER_BYTES as u64, 0].iter().flat_map(|field| field.to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        let sizes = [64u16, 56, count, 0, 0, 0];
        file.extend(sizes.iter().flat_map(|field| field.to_le_bytes()));
        let mut offset = (HEADER_BYTES + self.pieces.len() * PROGRAM_HEADER_BYTES) as u64;
        for (address, bytes) in &self.pieces {
            let length = bytes.len() as u64;
            // PT_LOAD, readable, writable, executable.
            file.extend([1u32, 7].iter().flat_map(|field| field.to_le_bytes()));
            let fields = [offset, *address, *address, length, length, 1];
            file.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
            offset += length;
        }
        for (_, bytes) in &self.pieces {
            file.extend(bytes);
        }
        file
    }
}

/// A 10-byte operand for `lidt` and `lgdt`.
pub(crate) fn pointer(base: u64, limit: u16) -> Vec<u8> {
    [&limit.to_le_bytes()[..], &base.to_le_bytes()].concat()
}

/// A present 64-bit interrupt gate.
pub(crate) fn gate(target: u64, ist: u8) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h] = target.to_le_bytes();
    let [cs_low, cs_high] = abi::SELECTOR_CODE.to_le_bytes();
    [a, b, cs_low, cs_high, ist, 0x8e, c, d, e, f, g, h, 0, 0, 0, 0]
}

/// Address of the handler of `vector`.
pub(crate) fn handler(vector: u8) -> u64 {
    HANDLERS + u64::from(vector) * HANDLER_BYTES
}

/// An IDT with a gate for each vector.
pub(crate) fn idt() -> Vec<u8> {
    idt_with(|vector| gate(handler(vector), 0))
}

/// An IDT with what `gate` says for each vector.
pub(crate) fn idt_with(gate: impl Fn(u8) -> [u8; 16]) -> Vec<u8> {
    (0..VECTORS).flat_map(gate).collect()
}

/// A GDT with a system descriptor of type `kind` for a TSS at `base` at [`TSS_SELECTOR`].
pub(crate) fn gdt(base: u64, kind: u8) -> Vec<u8> {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = base.to_le_bytes();
    let [limit_low, limit_high, ..] = (TSS_BYTES - 1).to_le_bytes();
    let mut table = vec![0; 16];
    table.extend([limit_low, limit_high, b0, b1, b2, 0x80 | kind, 0, b3]);
    table.extend([b4, b5, b6, b7, 0, 0, 0, 0]);
    table
}

/// A TSS with these interrupt stacks, IST1 first.
pub(crate) fn tss(stacks: [u64; 7]) -> Vec<u8> {
    let mut bytes = vec![0; 0x24];
    bytes.extend(stacks.iter().flat_map(|stack| stack.to_le_bytes()));
    bytes.resize(0x68, 0);
    bytes
}

/// Vectors for which the processor pushes an error code.
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

fn handlers() -> Vec<u8> {
    let mut bytes = Vec::new();
    for vector in 0..VECTORS {
        bytes.extend(assemble(handler(vector), |a| {
            if !has_error_code(vector) {
                a.push(0)?;
            }
            a.push(i32::from(vector))?;
            a.jmp(HANDLERS + COMMON_HANDLER)
        }));
        bytes.resize(usize::from(vector + 1) * 16, 0xcc);
    }
    bytes.resize(0x400, 0xcc);
    bytes.extend(assemble(HANDLERS + COMMON_HANDLER, common_handler));
    bytes
}

/// Reports vector, CR2, error code, RIP less R12, RSP. Goes on at R15 unless that is 0, else ends
/// the VM through the exit port with the vector.
fn common_handler(a: &mut CodeAssembler) -> Written {
    const SAVED: [AsmRegister64; 8] = [rax, rdx, rdi, rsi, rcx, r8, r9, r11];
    /// Offsets from the stack pointer once all of them are pushed.
    const VECTOR: u64 = 8 * 8;
    let mut over = a.create_label();
    for register in SAVED {
        a.push(register)?;
    }
    a.mov(rdi, qword_ptr(rsp + VECTOR))?;
    a.mov(rsi, cr2)?;
    a.mov(rcx, qword_ptr(rsp + (VECTOR + 8)))?;
    a.mov(r8, qword_ptr(rsp + (VECTOR + 16)))?;
    a.sub(r8, r12)?;
    a.mov(r9, qword_ptr(rsp + (VECTOR + 40)))?;
    hypercall(a, abi::HC_VIOLATION)?;
    a.test(r15, r15)?;
    a.je(over)?;
    a.mov(qword_ptr(rsp + (VECTOR + 16)), r15)?;
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.add(rsp, 16)?;
    a.iretq()?;
    a.set_label(&mut over)?;
    a.mov(rax, rdi)?;
    a.mov(edx, u32::from(abi::PORT_EXIT))?;
    a.out(dx, al)
}

/// A hypercall with the arguments that the registers hold; RAX and RDX change.
pub(crate) fn hypercall(a: &mut CodeAssembler, number: u64) -> Written {
    a.mov(eax, u32::try_from(number).expect("a hypercall number"))?;
    a.mov(edx, u32::from(abi::PORT_HYPERCALL))?;
    a.out(dx, eax)
}

/// Ends the VM with exit code 0.
pub(crate) fn power_off(a: &mut CodeAssembler) -> Written {
    hypercall(a, abi::HC_POWER_OFF)
}

/// Ends the VM through the exit port.
pub(crate) fn exit(a: &mut CodeAssembler, value: u32) -> Written {
    a.mov(eax, value)?;
    a.mov(edx, u32::from(abi::PORT_EXIT))?;
    a.out(dx, al)
}

/// Tells the test the value of a register (not RAX, RDX, RDI) by a report of kind
/// [`VALUE`]. Changes RAX, RDX, RDI, RSI.
pub(crate) fn report(a: &mut CodeAssembler, register: AsmRegister64) -> Written {
    a.mov(rsi, register)?;
    a.mov(rdi, VALUE)?;
    hypercall(a, abi::HC_VIOLATION)
}

/// Executes an instruction so that its exception, if it raises one, is reported with RIP relative to
/// it, and resumed after it. Changes R12 and R15.
pub(crate) fn attempt(
    a: &mut CodeAssembler,
    instruction: impl FnOnce(&mut CodeAssembler) -> Written,
) -> Written {
    let (mut at, mut after) = (a.create_label(), a.create_label());
    a.lea(r12, ptr(at))?;
    a.lea(r15, ptr(after))?;
    a.set_label(&mut at)?;
    instruction(a)?;
    a.set_label(&mut after)?;
    a.nop()?;
    a.xor(r12d, r12d)?;
    a.xor(r15d, r15d)
}

/// Jumps to the address in RAX; an exception is reported with its own RIP, and resumed after the
/// jump. Changes R12 and R15.
pub(crate) fn attempt_jump(a: &mut CodeAssembler) -> Written {
    let mut after = a.create_label();
    a.xor(r12d, r12d)?;
    a.lea(r15, ptr(after))?;
    a.jmp(rax)?;
    a.set_label(&mut after)?;
    a.nop()?;
    a.xor(r15d, r15d)
}
