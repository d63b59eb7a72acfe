//! Segment and interrupt descriptors. With shadow paging there is no privilege change in this machine,
//! so they serve for one thing: to name the exception handlers and the stacks that those run on. With a
//! CPL 0 of the guest's own ([`crate::ring0`]) the processor goes by them, and its stack is that part's.

use core::arch::asm;
use core::cell::UnsafeCell;

use crate::ring0::{self, Service};
use gnomon_abi::SELECTOR_CODE;

/// `lgdt` and `lidt` operand.
#[repr(C, packed)]
struct TableRegister {
    limit: u16,
    base: u64,
}

/// Where every GDT has its TSS.
pub const TSS_SELECTOR: u16 = 0x38;
/// Offset of the I/O bitmap in a TSS: where the rest ends.
pub const IO_BITMAP: usize = 104;
/// Bytes of a TSS with a bitmap for the ports up to the last one of this machine, and the byte of ones
/// that ends it.
pub const TSS_BYTES: usize = IO_BITMAP + IO_PORTS / 8 + 1;
const IO_PORTS: usize = 0x618;
const _: () = assert!(gnomon_abi::PORT_DMA as usize + 4 <= IO_PORTS);
/// Flat segments: CPL 0's code (0x10) and data (0x18), CPL 3's data (0x2b) and code (0x33).
pub const KERNEL_CODE: u64 = 0x00af_9b00_0000_ffff;
pub const KERNEL_DATA: u64 = 0x00cf_9300_0000_ffff;
pub const DATA: u64 = 0x00cf_f300_0000_ffff;
pub const CODE: u64 = 0x00af_fb00_0000_ffff;
/// Offset of IST1 in a 64-bit TSS (Intel SDM vol. 3, figure 9-11).
const TSS_IST1: usize = 36;

/// A vCPU's own GDT and TSS.
#[repr(C, align(16))]
pub struct Segments {
    gdt: [u64; 9],
    tss: [u8; TSS_BYTES],
    register: TableRegister,
}

/// Offset of the operand of `lgdt`.
pub const GDT_REGISTER: usize = core::mem::offset_of!(Segments, register);

impl Segments {
    /// Segments whose TSS is not usable until [`Segments::load`].
    pub const fn new() -> Segments {
        Segments { gdt: [0; 9], tss: [0; TSS_BYTES], register: TableRegister { limit: 0, base: 0 } }
    }

    /// Fills in the descriptors. `ist` are the tops of the interrupt stacks 1, 2, ….
    ///
    /// # Safety
    /// `this` is used by one vCPU only, which does not run yet or is this one, for good, and the
    /// stacks by nothing else.
    pub unsafe fn fill(this: *mut Segments, ist: &[u64]) {
        // SAFETY: the caller gives us the segments for good.
        let segments = unsafe { &mut *this };
        for (i, top) in ist.iter().enumerate() {
            let at = TSS_IST1 + 8 * i;
            segments.tss[at..at + 8].copy_from_slice(&top.to_le_bytes());
        }
        let bitmap = (IO_BITMAP as u16).to_le_bytes();
        segments.tss[IO_BITMAP - 2..IO_BITMAP].copy_from_slice(&bitmap);
        segments.tss[TSS_BYTES - 1] = 0xff;

        let base = segments.tss.as_ptr() as u64;
        let limit = TSS_BYTES as u64 - 1;
        segments.gdt[2] = KERNEL_CODE;
        segments.gdt[3] = KERNEL_DATA;
        segments.gdt[5] = DATA;
        segments.gdt[6] = CODE;
        segments.gdt[7] = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        segments.gdt[8] = base >> 32;
        segments.register = TableRegister {
            limit: size_of_val(&segments.gdt) as u16 - 1,
            base: segments.gdt.as_ptr() as u64,
        };
    }

    /// Makes this vCPU use the descriptors, once.
    ///
    /// # Safety
    /// They have been [filled](Self::fill) in for this vCPU.
    pub unsafe fn load(this: *const Segments) {
        // SAFETY: both tables are complete and stay; the selectors in use mean what they meant.
        unsafe {
            let register = &raw const (*this).register;
            if ring0::is_present() {
                ring0::call(Service::LoadGdt, register as u64, 0);
                ring0::call(Service::LoadTask, TSS_SELECTOR.into(), 0);
            } else {
                asm!("lgdt [{}]", in(reg) register, options(readonly, nostack));
                asm!("ltr {:x}", in(reg) TSS_SELECTOR, options(nostack));
            }
        }
    }
}

/// Number of exception vectors.
pub const VECTORS: usize = 32;

/// The interrupt descriptor table, the same for all vCPUs.
pub struct Idt(UnsafeCell<[u128; VECTORS]>);

// SAFETY: written by `fill` before other vCPUs start, only read by the hypervisor afterwards.
unsafe impl Sync for Idt {}

impl Idt {
    /// A table without gates.
    pub const fn new() -> Idt {
        Idt(UnsafeCell::new([0; VECTORS]))
    }

    /// Writes the gates: for each vector its handler's address and interrupt stack.
    ///
    /// # Safety
    /// No other vCPU runs yet, and the handlers are code that may be entered so.
    pub unsafe fn fill(&self, gate: impl Fn(usize) -> (u64, u8)) {
        // SAFETY: nothing else looks at the table yet.
        let table = unsafe { &mut *self.0.get() };
        for (vector, entry) in table.iter_mut().enumerate() {
            let (handler, ist) = gate(vector);
            let low = handler & 0xffff
                | u64::from(SELECTOR_CODE) << 16
                | u64::from(ist) << 32
                | 0x8e << 40
                | (handler >> 16 & 0xffff) << 48;
            *entry = u128::from(low) | u128::from(handler >> 32) << 64;
        }
    }

    /// Makes this vCPU use the table.
    ///
    /// # Safety
    /// The table has been filled.
    pub unsafe fn load(&'static self) {
        let register = TableRegister {
            limit: size_of::<[u128; VECTORS]>() as u16 - 1,
            base: self.0.get() as u64,
        };
        // SAFETY: the caller vouches for the table.
        unsafe { asm!("lidt [{}]", in(reg) &raw const register, options(readonly, nostack)) };
    }
}
