//! Checks of the machine itself, one vCPU, before the workloads: entry state, hypercalls, ports,
//! privileged instructions, exceptions, the DMA device.

mod dma;

use core::arch::asm;

use crate::boot::BootParams;
use crate::exceptions;
use crate::machine::Machine;
use crate::probe::{self, Raise};
use crate::{ring0, x86};
use gnomon_abi as abi;

/// What did not come out as it must.
struct Wrong {
    what: &'static str,
    expected: u64,
    found: u64,
}

type Checked = Result<(), Wrong>;

fn expect(what: &'static str, expected: u64, found: u64) -> Checked {
    if expected == found {
        return Ok(());
    }
    Err(Wrong { what, expected, found })
}

/// What the machine looked like at entry.
pub struct Entry {
    /// RSI: address of `boot_params`.
    pub boot_params: u64,
    /// All other general registers, ORed.
    pub other_registers: u64,
    /// Control registers.
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// Runs all checks, each one an item of the results.
pub fn run(machine: &Machine, entry: &Entry, boot: BootParams, memory: u64, vcpus: u64) {
    let results = &machine.results;
    let item = |name: &str, checked: Checked| match checked {
        Ok(()) => results.item(name, true, format_args!("ok")),
        Err(wrong) => results.item(
            name,
            false,
            format_args!(
                "{}: expected {:#x}, found {:#x}",
                wrong.what, wrong.expected, wrong.found
            ),
        ),
    };
    item("entry-state", entry_state(entry));
    item("memory-map", memory_map(boot, memory));
    item("hypercalls", hypercalls(vcpus));
    item("ports", ports());
    item("control-registers", control_registers());
    item("model-specific-registers", model_specific_registers());
    if !ring0::is_present() {
        item("privileged-instructions", privileged_instructions());
    }
    item("exceptions", raised_exceptions());
    item("dma-copy", dma::copy(machine));
    item("dma-fill", dma::fill_pattern(machine));
    item("dma-checksum", dma::checksum(machine));
    item("dma-errors", dma::errors(machine));
}

fn entry_state(entry: &Entry) -> Checked {
    expect("RSI", abi::BOOT_PARAMS_GPA, entry.boot_params)?;
    expect("other registers", 0, entry.other_registers)?;
    expect("CR0", abi::ENTRY_CR0, entry.cr0)?;
    expect("CR3", abi::BOOT_PML4_GPA, entry.cr3)?;
    let cr4 = entry.cr4 & abi::ENTRY_CR4;
    expect("CR4", abi::ENTRY_CR4, cr4)?;
    expect("EFER", abi::ENTRY_EFER, entry.efer)
}

fn memory_map(boot: BootParams, memory: u64) -> Checked {
    expect("boot_params magic", 1, u64::from(boot.has_magic()))?;
    let low_end = 0x9_fc00;
    let expected = [
        (0, low_end, true),
        (low_end, abi::KERNEL_MIN_GPA - low_end, false),
        (abi::KERNEL_MIN_GPA, memory - abi::KERNEL_MIN_GPA, true),
        (abi::WINDOW_GPA, x86::info(abi::INFO_WINDOW_BYTES), false),
    ];
    let mut ranges = boot.e820();
    for (start, bytes, usable) in expected {
        let Some(range) = ranges.next() else {
            return expect("e820 range", start, u64::MAX);
        };
        expect("e820 start", start, range.start)?;
        expect("e820 length", bytes, range.bytes)?;
        expect("e820 kind", u64::from(usable), u64::from(range.is_usable()))?;
    }
    expect("more e820 ranges", 0, ranges.count() as u64)
}

fn hypercalls(vcpus: u64) -> Checked {
    let unknown_key = x86::info(0x4b45_5953);
    expect("unknown HC_INFO key", abi::HC_ERROR, unknown_key)?;
    // SAFETY: no call has this number; the others name a vCPU that cannot be started.
    let [unknown, absent, running] = unsafe {
        [
            x86::hypercall(0xffff_fff0, &[]),
            x86::hypercall(abi::HC_START_VCPU, &[vcpus]),
            x86::hypercall(abi::HC_START_VCPU, &[0]),
        ]
    };
    expect("unknown hypercall", abi::HC_ERROR, unknown)?;
    expect("start of an absent vCPU", abi::START_NO_SUCH_VCPU, absent)?;
    expect("start of a running vCPU", abi::START_ALREADY_RUNNING, running)?;
    // SAFETY: no page is given back: there is none there, or too many are asked for.
    let [outside, many] = unsafe {
        [
            x86::hypercall(abi::HC_FREE_PAGES, &[u64::MAX, 1]),
            x86::hypercall(abi::HC_FREE_PAGES, &[0, abi::MOST_FREED + 1]),
        ]
    };
    expect("freeing pages outside RAM", abi::HC_ERROR, outside)?;
    expect("freeing too many pages", abi::HC_ERROR, many)
}

fn ports() -> Checked {
    const UNKNOWN: u16 = 0x2e8;
    x86::out8(UNKNOWN, 1);
    x86::out16(UNKNOWN, 1);
    x86::out32(UNKNOWN, 1);
    expect("8 bits of an unknown port", 0xff, x86::in8(UNKNOWN).into())?;
    expect("16 bits of an unknown port", 0xffff, x86::in16(UNKNOWN).into())?;
    let wide = x86::in32(UNKNOWN).into();
    expect("32 bits of an unknown port", 0xffff_ffff, wide)?;
    let ready = x86::in8(abi::PORT_SERIAL + 5) & 0x20;
    expect("serial line status", 0x20, ready.into())?;
    let echo: u64;
    // SAFETY: as all port access. An 8-bit read must leave the rest of RAX alone.
    unsafe {
        asm!("in al, dx", in("dx") UNKNOWN, inout("rax") 0x1122_3344_5566_7700_u64 => echo, options(nomem, nostack));
    }
    expect("RAX around an 8-bit read", 0x1122_3344_5566_77ff, echo)
}

fn control_registers() -> Checked {
    let cr0 = x86::cr0();
    // SAFETY: no read-only page is written in between; CR2 means nothing outside a fault handler.
    unsafe {
        x86::write_cr0(cr0 & !x86::CR0_WP);
        expect("CR0 without WP", cr0 & !x86::CR0_WP, x86::cr0())?;
        x86::write_cr0(cr0);
        x86::write_cr2(0x1234_5678_9abc);
    }
    expect("CR0", cr0, x86::cr0())?;
    expect("CR2", 0x1234_5678_9abc, x86::cr2())?;
    let (cr3, cr4) = (x86::cr3(), x86::cr4());
    x86::reload_cr3();
    // SAFETY: the value that it has.
    unsafe { x86::write_cr4(cr4) };
    expect("CR3", cr3, x86::cr3())?;
    expect("CR4", cr4, x86::cr4())?;
    if ring0::is_present() {
        return Ok(());
    }
    // SAFETY: CR0.TS is clear already.
    unsafe { asm!("clts", options(nomem, nostack)) };
    expect("CR0 after clts", cr0, x86::cr0())
}

fn model_specific_registers() -> Checked {
    static WORD: u64 = 0x0123_4567_89ab_cdef;
    let word = &raw const WORD as u64;
    let fs: u64;
    let gs: u64;
    let kernel_gs = x86::rdmsr(x86::MSR_KERNEL_GS_BASE);
    // SAFETY: nothing here uses FS; GS has its own value back when anything may use it.
    unsafe {
        x86::wrmsr(x86::MSR_FS_BASE, word);
        asm!("mov {}, fs:[0]", out(reg) fs, options(nostack, readonly));
        x86::wrmsr(x86::MSR_KERNEL_GS_BASE, word);
        // CPL 3 has no `swapgs`, and CPL 0 none that it could use between two services.
        gs = if ring0::is_present() {
            WORD
        } else {
            let word: u64;
            asm!(
                "swapgs",
                "mov {}, gs:[0]",
                "swapgs",
                out(reg) word, options(nostack)
            );
            word
        };
    }
    expect("word at FS base", WORD, fs)?;
    expect("FS base", word, x86::rdmsr(x86::MSR_FS_BASE))?;
    expect("word at GS base after swapgs", WORD, gs)?;
    expect("kernel GS base", word, x86::rdmsr(x86::MSR_KERNEL_GS_BASE))?;
    let vcpu = crate::vcpu::Vcpu::current().address();
    expect("GS base", vcpu, x86::rdmsr(x86::MSR_GS_BASE))?;
    // SAFETY: as above.
    unsafe {
        x86::wrmsr(x86::MSR_KERNEL_GS_BASE, kernel_gs);
        x86::wrmsr(x86::MSR_FS_BASE, 0);
    }
    let pat = x86::rdmsr(x86::MSR_PAT);
    // SAFETY: the value that it has.
    unsafe { x86::wrmsr(x86::MSR_PAT, pat) };
    expect("PAT", pat, x86::rdmsr(x86::MSR_PAT))?;
    let efer = abi::ENTRY_EFER | x86::EFER_NXE;
    expect("EFER", efer, x86::rdmsr(x86::MSR_EFER))
}

fn privileged_instructions() -> Checked {
    let carry: u8;
    let (before, after): (u64, u64);
    // SAFETY: there are no interrupts and no caches to lose; `iretq` goes to the next instruction,
    // on the same stack, with the carry flag set.
    unsafe {
        asm!("cli", "sti", "wbinvd", "invd", options(nostack));
        asm!(
            "mov {before}, rsp",
            "mov {after}, rsp",
            "push 0x18",
            "push {before}",
            "push 3",
            "push 0x10",
            "lea {before}, [rip + 2f]",
            "push {before}",
            "mov {before}, {after}",
            "iretq",
            "2:",
            "setc {carry}",
            "mov {after}, rsp",
            before = out(reg) before,
            after = out(reg) after,
            carry = out(reg_byte) carry,
        );
    }
    expect("RSP after iretq to other selectors", before, after)?;
    expect("carry flag from iretq", 1, u64::from(carry & 1))
}

/// Some emulated processors (QEMU's TCG) never raise SSE exceptions, they only note them: then the
/// exception must have been unmasked, and noted.
fn simd_exception() -> Checked {
    match probe::divide_simd() {
        Ok(trap) => {
            expect("SSE division by zero", exceptions::VECTOR_SIMD, trap.vector)?;
            expect("SSE division by zero", 0, trap.error_code)
        }
        Err(mxcsr) => {
            let noted = probe::MXCSR_DIVIDE_UNMASKED | probe::MXCSR_DIVIDE_FLAG;
            expect("MXCSR after a silent SSE division", noted.into(), mxcsr.into())
        }
    }
}

fn raised_exceptions() -> Checked {
    // Above the limit there is nothing mapped; with shadow paging there cannot be.
    let above_limit = if ring0::is_present() {
        exceptions::VECTOR_PAGE_FAULT
    } else {
        exceptions::VECTOR_PROTECTION
    };
    let all = [
        ("division by zero", Raise::Divide, exceptions::VECTOR_DIVIDE),
        ("int3", Raise::Breakpoint, exceptions::VECTOR_BREAKPOINT),
        ("ud2", Raise::InvalidOpcode, exceptions::VECTOR_INVALID_OPCODE),
        ("unknown MSR", Raise::UnknownMsr, exceptions::VECTOR_PROTECTION),
        ("address above the limit", Raise::AboveLimit, above_limit),
    ];
    for (what, raise, vector) in all {
        match probe::raise(raise) {
            None => return expect(what, vector, u64::MAX),
            Some(trap) => {
                expect(what, vector, trap.vector)?;
                expect(what, 0, trap.error_code)?;
            }
        }
    }
    simd_exception()?;
    match probe::load(0) {
        Ok(_) => expect("read of the unmapped page 0", exceptions::VECTOR_PAGE_FAULT, u64::MAX),
        Err(trap) => expect(
            "read of the unmapped page 0",
            exceptions::VECTOR_PAGE_FAULT,
            trap.vector | trap.error_code << 32 | trap.address << 40,
        ),
    }
}
