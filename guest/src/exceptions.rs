//! Exceptions: entry stubs, the handler, and the expectations that tests set up.
//!
//! Every vector has an interrupt stack of its own vCPU, because prebuilt `core` keeps data in the
//! red zone below the stack pointer. The stubs save all registers, SSE state included. An exception
//! is one of
//! - a first touch of the demand region, which the handler maps;
//! - awaited by a [`crate::probe`], which then learns what happened;
//! - a mistake, of this guest or of the hypervisor: registers are dumped and the VM ends.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::descriptors::Idt;
use crate::paging::WRITE;
use crate::vcpu::Vcpu;
use crate::{println, x86};

pub const VECTOR_DIVIDE: u64 = 0;
pub const VECTOR_BREAKPOINT: u64 = 3;
pub const VECTOR_INVALID_OPCODE: u64 = 6;
pub const VECTOR_DOUBLE_FAULT: u64 = 8;
pub const VECTOR_PROTECTION: u64 = 13;
pub const VECTOR_PAGE_FAULT: u64 = 14;
pub const VECTOR_SIMD: u64 = 19;

/// Interrupt stacks of a vCPU: page faults, double faults, everything else.
pub const IST_STACKS: usize = 3;

/// Stubs are this far apart.
const STUB_BYTES: u64 = 16;

/// The entries of the 32 exceptions, `STUB_BYTES` apart: each pushes an error code, where the processor
/// has not, and its vector, and goes on at `$common`.
macro_rules! stubs {
    ($stubs:literal, $common:literal) => {
        concat!(
            ".balign 16\n",
            $stubs,
            ":\n",
            r#"
    .set vector, 0
    .rept 32
        .balign 16
        .if (0x60227d00 >> vector) & 1
            # the processor has pushed an error code
        .else
            push 0
        .endif
        push vector
        jmp "#,
            $common,
            r#"
        .set vector, vector + 1
    .endr
    "#
        )
    };
}
pub(crate) use stubs;

global_asm!(
    r#"
    .section .text.exceptions, "ax", @progbits
    .globl exception_stubs
    "#,
    stubs!("exception_stubs", "exception_common"),
    r#"
    .balign 16
    exception_common:
        push rax
        push rbx
        push rcx
        push rdx
        push rsi
        push rdi
        push rbp
        push r8
        push r9
        push r10
        push r11
        push r12
        push r13
        push r14
        push r15
        cld
        mov rbp, rsp
        sub rsp, 512
        and rsp, -16
        fxsave64 [rsp]
        mov rdi, rbp
        call {handler}
        fxrstor64 [rsp]
        mov rsp, rbp
        pop r15
        pop r14
        pop r13
        pop r12
        pop r11
        pop r10
        pop r9
        pop r8
        pop rbp
        pop rdi
        pop rsi
        pop rdx
        pop rcx
        pop rbx
        pop rax
        add rsp, 16
        iretq
    "#,
    handler = sym handle,
);

unsafe extern "C" {
    static exception_stubs: u8;
}

static IDT: Idt = Idt::new();

/// Writes the IDT.
///
/// # Safety
/// No other vCPU runs yet.
pub unsafe fn fill_idt() {
    // SAFETY: the stubs are exception entries; the caller vouches for the rest.
    unsafe {
        IDT.fill(|vector| {
            let ist = match vector as u64 {
                VECTOR_PAGE_FAULT => 1,
                VECTOR_DOUBLE_FAULT => 2,
                _ => 3,
            };
            (&raw const exception_stubs as u64 + vector as u64 * STUB_BYTES, ist)
        });
    }
}

/// Makes this vCPU use the IDT.
///
/// # Safety
/// [`fill_idt`] is done, and this vCPU's GS base points to its [`Vcpu`].
pub unsafe fn load_idt() {
    // SAFETY: the table is filled.
    unsafe { IDT.load() };
}

/// What the stubs leave on the stack.
#[repr(C)]
struct Frame {
    /// R15 down to RAX.
    registers: [u64; 15],
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const REGISTER_NAMES: [&str; 15] = [
    "r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rbp", "rdi", "rsi", "rdx", "rcx", "rbx",
    "rax",
];

/// What a vCPU expects of the next exception, and what came of it.
///
/// Only the vCPU itself uses it, in its normal code and in its handler; atomics keep the compiler
/// from assuming anything about what a faulting instruction leaves alone.
#[derive(Default)]
#[repr(C)]
pub struct Expectation {
    armed: AtomicU64,
    /// Where to go on, set by the probing instruction sequence.
    pub resume_rip: AtomicU64,
    /// Stack pointer to go on with.
    pub resume_rsp: AtomicU64,
    /// A page-table entry that the handler makes writable, going on with the faulting instruction
    /// itself; or 0.
    fix_entry: AtomicU64,
    hits: AtomicU64,
    vector: AtomicU64,
    error_code: AtomicU64,
    address: AtomicU64,
}

/// An exception that happened as awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Exception vector.
    pub vector: u64,
    /// Error code, or 0.
    pub error_code: u64,
    /// CR2 if it was a page fault.
    pub address: u64,
}

impl Expectation {
    /// Awaits one exception, to go on at the resume address.
    pub fn arm(&self) {
        self.hits.store(0, Ordering::Relaxed);
        self.fix_entry.store(0, Ordering::Relaxed);
        self.armed.store(1, Ordering::Relaxed);
    }

    /// Awaits one page fault, to make the page writable and try again. The translation is not
    /// invalidated: the fault itself has done that (Intel SDM vol. 3, 5.10.4.1).
    pub fn arm_fix(&self, entry: &'static AtomicU64) {
        self.arm();
        self.fix_entry.store(&raw const *entry as u64, Ordering::Relaxed);
    }

    /// Ends the wait; the exception if there was one.
    pub fn disarm(&self) -> Option<Trap> {
        self.armed.store(0, Ordering::Relaxed);
        (self.hits.load(Ordering::Relaxed) != 0).then(|| Trap {
            vector: self.vector.load(Ordering::Relaxed),
            error_code: self.error_code.load(Ordering::Relaxed),
            address: self.address.load(Ordering::Relaxed),
        })
    }

    /// Records an exception if one is awaited; false if not.
    fn take(&self, frame: &mut Frame, address: u64) -> bool {
        if self.armed.swap(0, Ordering::Relaxed) == 0 {
            return false;
        }
        self.hits.store(1, Ordering::Relaxed);
        self.vector.store(frame.vector, Ordering::Relaxed);
        self.error_code.store(frame.error_code, Ordering::Relaxed);
        self.address.store(address, Ordering::Relaxed);
        let entry = self.fix_entry.load(Ordering::Relaxed);
        if entry != 0 && frame.vector == VECTOR_PAGE_FAULT {
            // SAFETY: `arm_fix` stored the address of an entry that lives for good.
            let entry = unsafe { &*(entry as *const AtomicU64) };
            entry.fetch_or(WRITE, Ordering::Relaxed);
        } else {
            frame.rip = self.resume_rip.load(Ordering::Relaxed);
            frame.rsp = self.resume_rsp.load(Ordering::Relaxed);
        }
        true
    }
}

extern "C" fn handle(frame: &mut Frame) {
    let vcpu = Vcpu::current();
    let mut address = 0;
    if frame.vector == VECTOR_PAGE_FAULT {
        address = x86::cr2();
        if vcpu.demand.fault(address, frame.error_code) {
            return;
        }
    }
    if !vcpu.expectation.take(frame, address) {
        dump(vcpu, frame, address);
    }
}

fn dump(vcpu: &Vcpu, frame: &Frame, address: u64) -> ! {
    crate::serial::force_unlock();
    println!(
        "unexpected exception {} (error code {:#x}, CR2 {:#x}) on vCPU {}",
        frame.vector, frame.error_code, address, vcpu.index
    );
    println!(
        "  rip {:#018x} rsp {:#018x} rflags {:#x} cs {:#x} ss {:#x}",
        frame.rip, frame.rsp, frame.rflags, frame.cs, frame.ss
    );
    println!("  cr0 {:#x} cr3 {:#x} cr4 {:#x}", x86::cr0(), x86::cr3(), x86::cr4());
    for (name, value) in REGISTER_NAMES.iter().zip(frame.registers).rev() {
        println!("  {name:>3} {value:#018x}");
    }
    x86::exit(x86::EXIT_EXCEPTION)
}
