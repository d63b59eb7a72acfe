//! The guest's processor state as the guest sees it, free of KVM.
//!
//! Guarantee: nothing here reflects the real control registers. The guest runs at CPL 3 under
//! Gnomon's own tables; what it reads and writes as CR0, CR3, IDTR and so on is this structure,
//! and the vCPU thread alone carries the consequences over to the real registers.

use crate::abi;
use crate::addr::Gpa;
use crate::shadow_mmu::PagingContext;

pub use crate::vmm::kvm::features::Features;

/// The code selector that all guest code runs with.
pub const GUEST_CS: u16 = abi::SELECTOR_CODE;
/// The stack selector that all guest code runs with.
pub const GUEST_SS: u16 = abi::SELECTOR_DATA;

/// RFLAGS bits (Intel SDM Vol. 1, 3.4.3).
pub mod rflags {
    /// Bit 1 is always set.
    pub const FIXED: u64 = 1 << 1;
    /// Trap flag: #DB after each instruction.
    pub const TF: u64 = 1 << 8;
    /// Interrupt flag: always set, as there are no interrupts, and some hosts show it set at CPL 3
    /// whatever it is.
    pub const IF: u64 = 1 << 9;
    /// Direction flag.
    pub const DF: u64 = 1 << 10;
    /// I/O privilege level; always 0, so that ports are checked against the I/O bitmap.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume flag.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check.
    pub const AC: u64 = 1 << 18;
    /// What a guest may set: CF PF AF ZF SF TF DF OF NT RF AC ID.
    pub const GUEST: u64 = 0x0025_4dd5;
    /// What a guest always has.
    pub const ALWAYS: u64 = FIXED | IF;
}

/// CR0 bits (Intel SDM Vol. 3, 2.5).
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1 << 0;
    /// Monitor coprocessor.
    pub const MP: u64 = 1 << 1;
    /// Emulation.
    pub const EM: u64 = 1 << 2;
    /// Task switched.
    pub const TS: u64 = 1 << 3;
    /// Extension type; always 1.
    pub const ET: u64 = 1 << 4;
    /// Numeric error.
    pub const NE: u64 = 1 << 5;
    /// Write protect.
    pub const WP: u64 = 1 << 16;
    /// Alignment mask.
    pub const AM: u64 = 1 << 18;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM Vol. 3, 2.5).
pub mod cr4 {
    /// Time stamp disable.
    pub const TSD: u64 = 1 << 2;
    /// Page size extensions.
    pub const PSE: u64 = 1 << 4;
    /// Physical address extension.
    pub const PAE: u64 = 1 << 5;
    /// Page global enable.
    pub const PGE: u64 = 1 << 7;
    /// Performance counter enable.
    pub const PCE: u64 = 1 << 8;
    /// FXSAVE and FXRSTOR support.
    pub const OSFXSR: u64 = 1 << 9;
    /// Unmasked SIMD exceptions.
    pub const OSXMMEXCPT: u64 = 1 << 10;
    /// 57-bit addresses.
    pub const LA57: u64 = 1 << 12;
    /// RDFSBASE and friends.
    pub const FSGSBASE: u64 = 1 << 16;
    /// XSAVE and extended states.
    pub const OSXSAVE: u64 = 1 << 18;
}

/// EFER bits (AMD APM Vol. 2, 3.1.7).
pub mod efer {
    /// SYSCALL enable: stored, without effect.
    pub const SCE: u64 = 1 << 0;
    /// Long mode enable: fixed at 1.
    pub const LME: u64 = 1 << 8;
    /// Long mode active: fixed at 1.
    pub const LMA: u64 = 1 << 10;
    /// No-execute enable.
    pub const NXE: u64 = 1 << 11;
}

impl Features {
    /// The bits of CR4 that a guest may set. What has a bit here is what CPUID names, apart from
    /// PCE, for which it has no word.
    #[must_use]
    pub fn cr4(&self) -> u64 {
        let mut bits = cr4::TSD | cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCE;
        bits |= cr4::OSFXSR | cr4::OSXMMEXCPT;
        if self.fsgsbase {
            bits |= cr4::FSGSBASE;
        }
        if self.xsave {
            bits |= cr4::OSXSAVE;
        }
        bits
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Guest virtual address of the table.
    pub base: u64,
    /// Offset of the table's last byte.
    pub limit: u16,
}

/// The task register as `ltr` left it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskRegister {
    /// Selector in the guest's GDT; 0 before the first `ltr`.
    pub selector: u16,
    /// Guest virtual address of the 64-bit TSS.
    pub base: u64,
    /// Offset of the TSS's last byte.
    pub limit: u32,
}

/// Number of a general-purpose register in instruction encoding order.
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
    /// R8.
    pub const R8: usize = 8;
    /// R9.
    pub const R9: usize = 9;
    /// R11.
    pub const R11: usize = 11;
}

/// One virtual processor's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestCpu {
    /// General-purpose registers in encoding order: see [`gpr`].
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags; IF is always set.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR2: address of the last page fault that the guest was told of.
    pub cr2: u64,
    /// CR3 as the guest wrote it.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// TR.
    pub task: TaskRegister,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// The other GS base, which `swapgs` exchanges.
    pub kernel_gs_base: u64,
    /// IA32_PAT; stored, without effect.
    pub pat: u64,
    /// What this processor offers.
    pub features: Features,
}

/// IA32_PAT after reset (Intel SDM Vol. 3, 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

impl GuestCpu {
    /// The state at entry of the Linux 64-bit boot protocol, apart from the registers that carry
    /// arguments: paging on with root `cr3`, all tables empty, RSP = 0.
    #[must_use]
    pub fn at_boot(cr3: Gpa, features: Features) -> Self {
        Self {
            gpr: [0; 16],
            rip: 0,
            rflags: rflags::ALWAYS,
            cr0: abi::ENTRY_CR0,
            cr2: 0,
            cr3: cr3.as_u64(),
            cr4: abi::ENTRY_CR4 | if features.xsave { cr4::OSXSAVE } else { 0 },
            efer: abi::ENTRY_EFER,
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            task: TaskRegister::default(),
            fs_base: 0,
            gs_base: 0,
            kernel_gs_base: 0,
            pat: PAT_RESET,
            features,
        }
    }

    /// What a walk of the guest's page tables depends on.
    #[must_use]
    pub fn paging(&self) -> PagingContext {
        PagingContext {
            cr3: cr3_base(self.cr3),
            write_protect: self.cr0 & cr0::WP != 0,
            nxe: self.efer & efer::NXE != 0,
        }
    }

    /// The value that the real CR0 has while this guest runs: paging with write protection, and
    /// the guest's own wish for FPU traps. AM stays clear, since the guest, a kernel to itself,
    /// expects no alignment checks, which CPL 3 would get.
    #[must_use]
    pub fn real_cr0(&self) -> u64 {
        let fixed = cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        fixed | (self.cr0 & (cr0::MP | cr0::EM | cr0::TS))
    }

    /// The value that the real CR4 has while this guest runs: what decides about instructions is the
    /// guest's own wish.
    #[must_use]
    pub fn real_cr4(&self) -> u64 {
        let own = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE | cr4::OSXSAVE;
        cr4::PAE | (self.cr4 & self.features.cr4() & own)
    }
}

/// The page-table root that a CR3 value names: without PWT, PCD and the ignored low bits.
#[must_use]
pub fn cr3_base(cr3: u64) -> Gpa {
    Gpa::new(cr3 & 0x000f_ffff_ffff_f000)
}

/// Whether `address` is canonical with 48-bit virtual addresses.
#[must_use]
pub fn is_canonical(address: u64) -> bool {
    let top = address >> 47;
    top == 0 || top == 0x1_ffff
}
