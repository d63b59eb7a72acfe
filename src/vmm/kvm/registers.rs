//! The registers of a vCPU as KVM has them, whoever runs on it.
//!
//! Guarantee: which register is which is said here once.

use kvm_bindings::{CpuId, kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs};
use kvm_ioctls::VcpuFd;

use super::cpuid;
use super::device::KvmError;

/// Selectors of the flat segments that [`Registers::long_mode`] begins with.
const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;
/// A busy 64-bit TSS, and where its selector would be.
const TSS_BUSY: u8 = 0xb;
const TSS_SELECTOR: u16 = 0x20;

/// The general and system registers that a vCPU of a plain machine begins with.
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
    pub(in crate::vmm) fn of(fd: &VcpuFd) -> Result<Self, KvmError> {
        Ok(Self {
            regs: fd.get_regs().map_err(KvmError::request("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?,
        })
    }

    /// Gives them to a vCPU.
    pub(in crate::vmm) fn set(&self, fd: &VcpuFd) -> Result<(), KvmError> {
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

/// XCR0 as the contract with the guest has it.
pub(in crate::vmm) fn enable_extended_state(fd: &VcpuFd, leaves: &CpuId) -> Result<(), KvmError> {
    let features = cpuid::features(leaves.as_slice());
    if !features.xsave {
        return Ok(());
    }
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: features.xcr0(), ..Default::default() };
    fd.set_xcrs(&xcrs).map_err(KvmError::request("KVM_SET_XCRS"))
}

/// The general-purpose registers in encoding order; RSP is whatever is real.
pub(in crate::vmm) fn load_gpr(regs: &kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

/// Writes all but RSP, which in the monitor is the monitor's.
pub(in crate::vmm) fn store_gpr(regs: &mut kvm_regs, gpr: &[u64; 16]) {
    let rsp;
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ] = *gpr;
    let _: u64 = rsp;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_the_round_trip_without_rsp() {
        let mut regs = kvm_regs { rsp: 77, ..Default::default() };
        let values: [u64; 16] = std::array::from_fn(|index| index as u64 + 100);
        store_gpr(&mut regs, &values);
        let mut expected = values;
        // In encoding order, RSP is the fifth.
        expected[4] = 77;
        assert_eq!(load_gpr(&regs), expected);
    }
}
