//! The real registers of a vCPU at rest, to go on with in another VM.
//!
//! Guarantee: a vCPU that got them by [`RealState::restore`] goes on as the one that they were
//! taken of would have, in the middle of the monitor's code if need be; it differs in nothing but
//! the shadow tables that it runs on.
//!
//! What is missing here is the same in every VM with as many vCPUs, or set by
//! [`prepare`](crate::vmm::shadow::hw_regs::prepare): the CPUID leaves, XCR0, the registers of `syscall`. A guest
//! can change none of them.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use crate::vmm::kvm::device::KvmError;

use super::monitor::MonitorStack;

/// Time-stamp counter (Intel SDM Vol. 4, table 2-2).
const MSR_TSC: u32 = 0x10;
/// 32-bit words of an XSAVE area as KVM hands it over. It is larger only with features that XCR0
/// does not have here.
const XSAVE_WORDS: usize = 1024;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct RealState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// x87, SSE and AVX registers. Not KVM_GET_FPU: it leaves out MXCSR, and what KVM_SET_FPU sets
    /// may count as not in use. KVM has this pair of calls where the processor lacks XSAVE, too.
    vectors: [u32; XSAVE_WORDS],
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    /// `None` where KVM does not tell.
    tsc: Option<u64>,
    /// The monitor stack's page, with the exception frame if there is one.
    stack: Vec<u8>,
}

impl RealState {
    /// The state of a vCPU that is out of `KVM_RUN`, has nothing to complete there, and has no
    /// registers yet to be written back.
    pub(super) fn of(fd: &VcpuFd, stack: &MonitorStack) -> Result<Self, KvmError> {
        Ok(Self {
            regs: fd.get_regs().map_err(KvmError::request("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?,
            vectors: fd.get_xsave().map_err(KvmError::request("KVM_GET_XSAVE"))?.region,
            debug: fd.get_debug_regs().map_err(KvmError::request("KVM_GET_DEBUGREGS"))?,
            events: fd.get_vcpu_events().map_err(KvmError::request("KVM_GET_VCPU_EVENTS"))?,
            tsc: tsc(fd),
            stack: stack.page().map_err(outside)?,
        })
    }

    /// Has a vCPU go on from this state, on the shadow root at machine address `root`.
    pub(super) fn restore(
        &self,
        fd: &mut VcpuFd,
        stack: &MonitorStack,
        root: u64,
    ) -> Result<(), KvmError> {
        stack.set_page(&self.stack).map_err(outside)?;
        let sregs = kvm_sregs { cr3: root, ..self.sregs };
        fd.set_sregs(&sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
        set_xsave(fd, self.vectors)?;
        fd.set_debug_regs(&self.debug).map_err(KvmError::request("KVM_SET_DEBUGREGS"))?;
        fd.set_regs(&self.regs).map_err(KvmError::request("KVM_SET_REGS"))?;
        // After the registers, which make KVM forget exceptions.
        fd.set_vcpu_events(&self.events).map_err(KvmError::request("KVM_SET_VCPU_EVENTS"))?;
        if let Some(tsc) = self.tsc {
            set_tsc(fd, tsc)?;
        }
        fd.clear_sync_dirty_reg(SyncReg::Register);
        fd.clear_sync_dirty_reg(SyncReg::SystemRegister);
        Ok(())
    }
}

/// A place of the monitor's that is not in its slot, which is a bug.
fn outside(error: super::monitor::InstallError) -> KvmError {
    let source = std::io::Error::other(error.to_string());
    KvmError::Request { request: "access to the monitor stack", source }
}

fn set_xsave(fd: &VcpuFd, region: [u32; XSAVE_WORDS]) -> Result<(), KvmError> {
    let area = kvm_xsave { region, ..Default::default() };
    // SAFETY: KVM reads as many bytes as the area of its guests has: 4096, which `area` has, for
    // processes that have not asked for larger features by `arch_prctl`, and this one never does.
    #[allow(unsafe_code)]
    unsafe { fd.set_xsave(&area) }.map_err(KvmError::request("KVM_SET_XSAVE"))
}

fn tsc_msr(data: u64) -> Option<Msrs> {
    Msrs::from_entries(&[kvm_msr_entry { index: MSR_TSC, data, ..Default::default() }]).ok()
}

fn tsc(fd: &VcpuFd) -> Option<u64> {
    let mut msrs = tsc_msr(0)?;
    let read = fd.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().get(..read)?.first().map(|entry| entry.data)
}

/// The clock goes on from where it was; the time since then has not passed for this vCPU.
fn set_tsc(fd: &VcpuFd, tsc: u64) -> Result<(), KvmError> {
    let Some(msrs) = tsc_msr(tsc) else { return Ok(()) };
    match fd.set_msrs(&msrs).map_err(KvmError::request("KVM_SET_MSRS"))? {
        0 => Err(KvmError::Request {
            request: "KVM_SET_MSRS",
            source: std::io::Error::other("the time-stamp counter cannot be set"),
        }),
        _ => Ok(()),
    }
}
