//! The instructions that Rust has no words for.

use core::arch::asm;

use crate::ring0::{self, Service};
use gnomon_abi as abi;

/// MSR numbers that the guest uses.
pub const MSR_PAT: u32 = 0x277;
pub const MSR_EFER: u32 = 0xc000_0080;
pub const MSR_FS_BASE: u32 = 0xc000_0100;
pub const MSR_GS_BASE: u32 = 0xc000_0101;
pub const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// EFER: NX bit in page-table entries allowed.
pub const EFER_NXE: u64 = 1 << 11;
/// CR0: write protection holds for the kernel too.
pub const CR0_WP: u64 = 1 << 16;

/// Exit port values, beside 0 for success by hypercall.
pub const EXIT_VIOLATION: u32 = 1;
pub const EXIT_EXCEPTION: u32 = 2;
pub const EXIT_PANIC: u32 = 3;

macro_rules! port_access {
    ($in:ident, $out:ident, $ty:ty, $reg:tt, $in_asm:literal, $out_asm:literal) => {
        /// Reads an I/O port.
        pub fn $in(port: u16) -> $ty {
            let value: $ty;
            // SAFETY: no port of this machine reaches memory.
            unsafe {
                asm!($in_asm, in("dx") port, out($reg) value, options(nomem, nostack, preserves_flags));
            }
            value
        }

        /// Writes an I/O port.
        pub fn $out(port: u16, value: $ty) {
            // SAFETY: no port of this machine reaches memory; the hypercall port, which starts
            // code, goes through `hypercall`.
            unsafe {
                asm!($out_asm, in("dx") port, in($reg) value, options(nomem, nostack, preserves_flags));
            }
        }
    };
}

port_access!(in8, out8, u8, "al", "in al, dx", "out dx, al");
port_access!(in16, out16, u16, "ax", "in ax, dx", "out dx, ax");
port_access!(in32, out32, u32, "eax", "in eax, dx", "out dx, eax");

/// The doorbell of the DMA device, for the descriptor of this number.
pub fn ring_dma(descriptor: u32) {
    // SAFETY: the device touches what the descriptor says, which whoever wrote that vouches for.
    // Memory counts as read and changed, unlike at other ports.
    unsafe {
        asm!("out dx, eax", in("dx") abi::PORT_DMA, in("eax") descriptor, options(nostack, preserves_flags));
    }
}

/// A hypercall with up to five arguments; the rest are 0.
///
/// # Safety
/// What the call asks for is sound; only [`abi::HC_START_VCPU`] touches the guest at all.
pub unsafe fn hypercall(number: u64, arguments: &[u64]) -> u64 {
    let argument = |i: usize| arguments.get(i).copied().unwrap_or(0);
    let result;
    // SAFETY: the hypervisor changes RAX alone; the caller vouches for the call itself. Memory
    // counts as changed, as other vCPUs may run from here on.
    unsafe {
        asm!(
            "out dx, eax",
            inout("rax") number => result,
            in("dx") abi::PORT_HYPERCALL,
            in("rdi") argument(0),
            in("rsi") argument(1),
            in("rcx") argument(2),
            in("r8") argument(3),
            in("r9") argument(4),
            options(nostack, preserves_flags)
        );
    }
    result
}

/// [`abi::HC_INFO`].
pub fn info(key: u64) -> u64 {
    // SAFETY: only returns a number.
    unsafe { hypercall(abi::HC_INFO, &[key]) }
}

/// Ends the VM with exit code `(value << 1) | 1`.
pub fn exit(value: u32) -> ! {
    out32(abi::PORT_EXIT, value);
    park()
}

/// Ends the VM with exit code 0.
pub fn power_off() -> ! {
    // SAFETY: does not return, so nothing can be wrong afterwards.
    unsafe { hypercall(abi::HC_POWER_OFF, &[]) };
    park()
}

/// Stops this vCPU for good: there are no interrupts.
pub fn park() -> ! {
    loop {
        // SAFETY: touches nothing.
        unsafe {
            if ring0::is_present() {
                ring0::call(Service::Halt, 0, 0);
            } else {
                asm!("hlt", options(nomem, nostack, preserves_flags));
            }
        }
    }
}

macro_rules! control_register {
    ($read:ident, $write:ident, $name:literal, $read_service:ident, $write_service:ident) => {
        /// Reads the control register.
        pub fn $read() -> u64 {
            if ring0::is_present() {
                // SAFETY: reads a register.
                return unsafe { ring0::call(Service::$read_service, 0, 0) };
            }
            let value;
            // SAFETY: reads a register.
            unsafe {
                asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags));
            }
            value
        }

        /// Writes the control register.
        ///
        /// # Safety
        /// Every address that Rust code still uses keeps its meaning and its permissions.
        pub unsafe fn $write(value: u64) {
            if ring0::is_present() {
                // SAFETY: the caller vouches for the translations.
                unsafe { ring0::call(Service::$write_service, value, 0) };
                return;
            }
            // SAFETY: the caller vouches for the translations.
            unsafe {
                asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags));
            }
        }
    };
}

control_register!(cr0, write_cr0, "cr0", ReadCr0, WriteCr0);
control_register!(cr2, write_cr2, "cr2", ReadCr2, WriteCr2);
control_register!(cr3, write_cr3, "cr3", ReadCr3, WriteCr3);
control_register!(cr4, write_cr4, "cr4", ReadCr4, WriteCr4);

/// Reads a model-specific register that is known to exist.
pub fn rdmsr(msr: u32) -> u64 {
    if ring0::is_present() {
        // SAFETY: reads a register.
        return unsafe { ring0::call(Service::ReadMsr, msr.into(), 0) };
    }
    let (low, high): (u32, u32);
    // SAFETY: reads a register.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// Nothing that Rust code relies on changes: translations, or the per-vCPU data behind GS.
pub unsafe fn wrmsr(msr: u32, value: u64) {
    if ring0::is_present() {
        // SAFETY: the caller vouches for the effect.
        unsafe { ring0::call(Service::WriteMsr, msr.into(), value) };
        return;
    }
    // SAFETY: the caller vouches for the effect.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// Forgets this vCPU's translation of one address.
pub fn invlpg(address: u64) {
    if ring0::is_present() {
        // SAFETY: as below.
        unsafe { ring0::call(Service::Invlpg, address, 0) };
        return;
    }
    // SAFETY: only drops a cached translation; what follows is what the tables say.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// Forgets all translations of this vCPU.
pub fn reload_cr3() {
    // SAFETY: the same tables stay in use.
    unsafe { write_cr3(cr3()) };
}
