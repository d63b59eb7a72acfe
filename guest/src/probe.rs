//! Instructions that may trap: each either runs or reports its [`Trap`].

use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::AtomicU64;

use crate::exceptions::{Expectation, Trap};
use crate::vcpu::Vcpu;

const RESUME_RIP: usize = offset_of!(Vcpu, expectation) + offset_of!(Expectation, resume_rip);
const RESUME_RSP: usize = offset_of!(Vcpu, expectation) + offset_of!(Expectation, resume_rsp);

/// Runs an instruction that may trap, with operands as for `asm!`; a trap goes on after it, with
/// the stack pointer from before. Evaluates to the trap, if there was one.
macro_rules! probe {
    ($instruction:literal $(, $($operands:tt)*)?) => {{
        Vcpu::current().expectation.arm();
        asm!(
            "lea {resume}, [rip + 2f]",
            "mov gs:[{resume_rip}], {resume}",
            "mov gs:[{resume_rsp}], rsp",
            $instruction,
            "2:",
            resume = out(reg) _,
            resume_rip = const RESUME_RIP,
            resume_rsp = const RESUME_RSP,
            $($($operands)*)?
        );
        Vcpu::current().expectation.disarm()
    }};
}

/// Reads a word at a virtual address.
pub fn load(address: u64) -> Result<u64, Trap> {
    let mut value = 0;
    // SAFETY: a read changes nothing, and a trap resumes after it with `value` untouched.
    let trap = unsafe {
        probe!("mov {value}, [{address}]", value = inout(reg) value, address = in(reg) address)
    };
    trap.map_or(Ok(value), Err)
}

/// Writes a word at a virtual address.
///
/// # Safety
/// No Rust object lies where the tables, rightly or wrongly, may lead the write.
pub unsafe fn store(address: u64, value: u64) -> Result<(), Trap> {
    // SAFETY: the caller vouches for the target.
    let trap = unsafe {
        probe!("mov [{address}], {value}", value = in(reg) value, address = in(reg) address)
    };
    trap.map_or(Ok(()), Err)
}

/// Writes a word at a virtual address; on a page fault the handler makes the leaf entry writable
/// and the write is tried again. The fault, if there was one.
///
/// # Safety
/// As for [`store`].
pub unsafe fn store_fixed(address: u64, value: u64, entry: &'static AtomicU64) -> Option<Trap> {
    let expectation = &Vcpu::current().expectation;
    expectation.arm_fix(entry);
    // SAFETY: the caller vouches for the target; after a fault the instruction itself runs again.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg) value, options(nostack)) };
    expectation.disarm()
}

/// Calls code at a virtual address.
///
/// # Safety
/// What may be there is a `ret`, or the call traps.
pub unsafe fn call(address: u64) -> Result<(), Trap> {
    // SAFETY: the caller vouches for the code, and `ret` changes no register; a trap at its first instruction drops the return
    // address, as the stack pointer was saved before it was pushed.
    let trap = unsafe { probe!("call {address}", address = in(reg) address) };
    trap.map_or(Ok(()), Err)
}

/// The exceptions that [`raise`] can bring about.
#[derive(Clone, Copy, Debug)]
pub enum Raise {
    /// Division by zero.
    Divide,
    /// `int3`.
    Breakpoint,
    /// `ud2`.
    InvalidOpcode,
    /// `rdmsr` of a register that does not exist.
    UnknownMsr,
    /// A read above the usable addresses.
    AboveLimit,
}

/// Executes an instruction that must trap.
pub fn raise(what: Raise) -> Option<Trap> {
    // SAFETY: none of these writes memory; registers that they change are declared.
    unsafe {
        match what {
            Raise::Divide => probe!(
                "div {zero:e}", zero = in(reg) 0_u32, inout("eax") 1_u32 => _, inout("edx") 0_u32 => _
            ),
            Raise::Breakpoint => probe!("int3"),
            Raise::InvalidOpcode => probe!("ud2"),
            Raise::UnknownMsr => probe!(
                "rdmsr", inout("ecx") 0x4b_564d_u32 => _, out("eax") _, out("edx") _
            ),
            Raise::AboveLimit => probe!(
                "mov {value}, [{value}]", value = inout(reg) gnomon_abi::GVA_LIMIT => _
            ),
        }
    }
}

/// MXCSR with all exceptions masked but division by zero.
pub const MXCSR_DIVIDE_UNMASKED: u32 = 0x1d80;
/// MXCSR: a division by zero has happened.
pub const MXCSR_DIVIDE_FLAG: u32 = 1 << 2;

/// Divides by zero with SSE, the exception unmasked: the trap, or MXCSR as it is after none.
pub fn divide_simd() -> Result<Trap, u32> {
    static DEFAULT: u32 = 0x1f80;
    static UNMASKED: u32 = MXCSR_DIVIDE_UNMASKED;
    let mut after = 0_u32;
    // SAFETY: MXCSR gets its default back before any other SSE arithmetic; `after` is written.
    let trap = unsafe {
        asm!("ldmxcsr [{}]", in(reg) &raw const UNMASKED, options(nostack, readonly));
        let trap = probe!(
            "divss {one}, {zero}", one = inout(xmm_reg) 1.0_f32 => _, zero = in(xmm_reg) 0.0_f32
        );
        asm!("stmxcsr [{}]", in(reg) &raw mut after, options(nostack));
        asm!("ldmxcsr [{}]", in(reg) &raw const DEFAULT, options(nostack, readonly));
        trap
    };
    trap.ok_or(after)
}
