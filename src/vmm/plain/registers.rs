//! The registers that a vCPU of a plain machine begins with.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::vmm::kvm::KvmError;

/// Selectors of the flat segments that [`Registers::long_mode`] begins with.
const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;
/// A busy 64-bit TSS, and where its selector would be.
const TSS_BUSY: u8 = 0xb;
const TSS_SELECTOR: u16 = 0x20;

/// General and system registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Registers {
    /// General registers, RIP, RFLAGS.
    pub regs: kvm_regs,
    /// Segments, control registers, descriptor tables. APIC base, CR8 and pending interrupts are not
    /// taken from here: they stay those of the vCPU.
    pub sregs: kvm_sregs,
}

impl Registers {
    /// 64-bit mode at CPL 0 with flat segments (code 0x10, data 0x18), no descriptor tables, and
    /// interrupts off. Control registers, EFER and RIP are the caller's to set.
    pub fn long_mode() -> Self {
        let flat = |selector, type_| kvm_segment {
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { db: 1, ..flat(KERNEL_DATA, 0x3) };
        let mut sregs =
            kvm_sregs { cs: kvm_segment { l: 1, ..flat(KERNEL_CODE, 0xb) }, ..Default::default() };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            limit: 0x67,
            selector: TSS_SELECTOR,
            type_: TSS_BUSY,
            present: 1,
            ..Default::default()
        };
        sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
        let regs = kvm_regs { rflags: 1 << 1, ..Default::default() };
        Self { regs, sregs }
    }

    /// What a vCPU has.
    pub(super) fn of(fd: &VcpuFd) -> Result<Self, KvmError> {
        Ok(Self {
            regs: fd.get_regs().map_err(KvmError::request("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?,
        })
    }

    /// Gives them to a vCPU.
    pub(super) fn set(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        let own = fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?;
        let sregs = kvm_sregs {
            apic_base: own.apic_base,
            cr8: own.cr8,
            interrupt_bitmap: own.interrupt_bitmap,
            ..self.sregs
        };
        fd.set_sregs(&sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
        fd.set_regs(&self.regs).map_err(KvmError::request("KVM_SET_REGS"))
    }
}
