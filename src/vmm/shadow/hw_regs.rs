//! The real registers of a vCPU: how the guest's state and the monitor's are given to KVM.
//!
//! Guarantee: whatever the guest's virtual state is, the real one has CPL 3 with flat 64-bit
//! segments, paging through a shadow root, the monitor's tables and TSS, and no SYSCALL.

use kvm_bindings::{CpuId, Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuFd};

use crate::vmm::cpu::{GUEST_CS, GUEST_SS, GuestCpu, efer, gpr};
use crate::vmm::kvm::device::KvmError;
use crate::vmm::kvm::registers::{enable_extended_state, store_gpr};

use super::monitor::{MONITOR_CS, MONITOR_TR, MonitorLayout, TSS_LIMIT};

/// Which instructions trap (Linux, `arch/x86/include/asm/msr-index.h`; Intel's name for its bit 0 is
/// CPUID faulting). KVM has it on all processors.
const MSR_MISC_FEATURES_ENABLES: u32 = 0x140;
const CPUID_FAULT: u64 = 1 << 0;

/// The SYSCALL registers (AMD APM Vol. 2, 6.1).
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SFMASK: u32 = 0xc000_0084;
/// Every flag that SYSCALL may clear.
const SFMASK_ALL: u64 = 0x0025_7fd5;

/// What stays the same for the life of the vCPU: synced registers and XCR0.
pub(super) fn prepare(
    fd: &mut VcpuFd,
    leaves: &CpuId,
    layout: &MonitorLayout,
) -> Result<(), KvmError> {
    fd.set_sync_valid_reg(SyncReg::Register);
    fd.set_sync_valid_reg(SyncReg::SystemRegister);
    confine_syscall(fd, layout)?;
    trap_cpuid(fd)?;
    enable_extended_state(fd, leaves)
}

/// `cpuid` at CPL 3 raises #GP and is emulated: where the processor runs CPL 3 without KVM's doing, it
/// would tell of the host's processor. A KVM that does not take this answers by the leaves that it was
/// given.
fn trap_cpuid(fd: &VcpuFd) -> Result<(), KvmError> {
    let entry =
        kvm_msr_entry { index: MSR_MISC_FEATURES_ENABLES, data: CPUID_FAULT, ..Default::default() };
    if let Ok(msrs) = Msrs::from_entries(&[entry]) {
        fd.set_msrs(&msrs).map_err(KvmError::request("KVM_SET_MSRS"))?;
    }
    Ok(())
}

/// EFER.SCE stays clear, and `syscall` raises #UD. Some hosts let it through all the same: it must
/// not land in memory that the guest can write.
fn confine_syscall(fd: &VcpuFd, layout: &MonitorLayout) -> Result<(), KvmError> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        msr(MSR_STAR, u64::from(MONITOR_CS) << 32),
        msr(MSR_LSTAR, layout.syscall_landing()),
        msr(MSR_CSTAR, layout.syscall_landing()),
        msr(MSR_SFMASK, SFMASK_ALL),
    ];
    let refused = |reason: String| KvmError::Request {
        request: "KVM_SET_MSRS",
        source: std::io::Error::other(reason),
    };
    let msrs = Msrs::from_entries(&entries).map_err(|error| refused(format!("{error:?}")))?;
    let taken = fd.set_msrs(&msrs).map_err(KvmError::request("KVM_SET_MSRS"))?;
    match entries.get(taken) {
        None => Ok(()),
        Some(entry) => Err(refused(format!("MSR {:#x} is not there", entry.index))),
    }
}

/// Sets every register for a vCPU that begins at `cpu` on the shadow root at machine address
/// `root`.
pub(super) fn set_all(
    fd: &mut VcpuFd,
    layout: &MonitorLayout,
    index: usize,
    cpu: &GuestCpu,
    root: u64,
) -> Result<(), KvmError> {
    let mut sregs = fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?;
    fill_sregs(&mut sregs, layout, index, cpu, root);
    fd.set_sregs(&sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
    fd.set_regs(&regs(cpu)).map_err(KvmError::request("KVM_SET_REGS"))?;
    // What an earlier life of this vCPU left to be written back is void.
    fd.clear_sync_dirty_reg(SyncReg::Register);
    fd.clear_sync_dirty_reg(SyncReg::SystemRegister);
    Ok(())
}

fn fill_sregs(
    sregs: &mut kvm_sregs,
    layout: &MonitorLayout,
    index: usize,
    cpu: &GuestCpu,
    root: u64,
) {
    let data = segment(GUEST_SS, 0x3);
    sregs.ss = data;
    // Null, since that is what some hosts make of whatever they are given.
    let null = kvm_segment { unusable: 1, ..Default::default() };
    (sregs.ds, sregs.es) = (null, null);
    // Null selectors with a base of their own, as 64-bit code has them.
    sregs.fs = kvm_segment { base: cpu.fs_base, selector: 0, ..data };
    sregs.gs = kvm_segment { base: cpu.gs_base, selector: 0, ..data };
    sregs.cs = kvm_segment { l: 1, db: 0, ..segment(GUEST_CS, 0xb) };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.tr = kvm_segment {
        base: layout.tss_base(index),
        limit: TSS_LIMIT,
        selector: MONITOR_TR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt =
        kvm_dtable { base: layout.gdt_base(), limit: layout.gdt_limit(), ..Default::default() };
    sregs.idt =
        kvm_dtable { base: layout.idt_base(), limit: layout.idt_limit(), ..Default::default() };
    sregs.cr0 = cpu.real_cr0();
    sregs.cr2 = 0;
    sregs.cr3 = root;
    sregs.cr4 = cpu.real_cr4();
    sregs.efer = efer::LME | efer::LMA | efer::NXE;
}

/// A flat DPL 3 segment.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn regs(cpu: &GuestCpu) -> kvm_regs {
    let mut regs = kvm_regs { rip: cpu.rip, rflags: cpu.rflags, ..Default::default() };
    store_gpr(&mut regs, &cpu.gpr);
    regs.rsp = cpu.gpr[gpr::RSP];
    regs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gpa;
    use crate::vmm::cpu::Features;

    #[test]
    fn whatever_the_guest_wants_the_real_state_is_confined() {
        let features = Features { phys_bits: 48, nx: true, fsgsbase: true, xsave: true, avx: true };
        let mut cpu = GuestCpu::at_boot(Gpa::new(0x9000), features);
        cpu.efer |= efer::SCE;
        cpu.cr4 = u64::MAX;
        cpu.cr0 = u64::MAX;
        let mut sregs = kvm_sregs::default();
        fill_sregs(&mut sregs, &MonitorLayout::new(1), 0, &cpu, 0x1_0000_6000);
        assert_eq!((sregs.cs.selector, sregs.cs.dpl, sregs.cs.l, sregs.cs.db), (0x33, 3, 1, 0));
        assert_eq!((sregs.ss.selector, sregs.ss.dpl), (0x2b, 3));
        assert_eq!(sregs.efer, 0xd00, "no SYSCALL");
        assert_eq!(sregs.cr0, 0x8001_003f);
        assert_eq!(sregs.cr4, 0x5_0620);
        assert_eq!(sregs.cr3, 0x1_0000_6000);
    }
}
