//! What a VM with shadow paging has its memory mapped by, for all its vCPUs.
//!
//! Guarantee: KVM's slots go before the shadow MMU and the memory behind them.

use std::sync::Arc;

use crate::export_rmap::ClientId;
use crate::shadow_mmu::ShadowMmu;
use crate::sync::{Mutex, lock};
use crate::vmm::kvm::cpuid_offered::CpuidTable;
use crate::vmm::kvm::device::{KvmError, KvmVm};
use crate::vmm::run::processor::Space;
use crate::vmm::run::stats::{FaultLatency, PagingStats};

use super::assemble::Shape;
use super::machine_space::TABLES_SLOT;
use super::monitor::MonitorLayout;

/// See the module's documentation.
pub struct ShadowSpace {
    /// Dropped first: no guest can run when the memory behind its slots goes.
    pub(super) kvm: KvmVm,
    pub(super) shadow: Arc<ShadowMmu>,
    pub(super) monitor: MonitorLayout,
    /// What `cpuid` answers.
    pub(super) cpuid: CpuidTable,
    /// For a clone.
    pub(super) shape: Shape,
    /// Latencies of the vCPUs that have ended.
    pub(super) latency: Mutex<FaultLatency>,
}

impl ShadowSpace {
    /// Takes all shadow pages back. No vCPU is inside the gate.
    pub(super) fn recycle(&self) -> Result<(), KvmError> {
        self.shadow.recycle();
        self.kvm.flush_slot(TABLES_SLOT)
    }
}

impl Space for ShadowSpace {
    fn client_id(&self) -> ClientId {
        self.shadow.client_id()
    }

    fn paging_stats(&self) -> PagingStats {
        PagingStats { shadow: self.shadow.stats(), ..Default::default() }
    }

    fn fault_latency(&self) -> FaultLatency {
        lock(&self.latency).clone()
    }

    fn check_running(&self) -> Vec<String> {
        self.shadow.check_reverse_map()
    }

    fn check_reverse_map(&self) -> Vec<String> {
        self.shadow.check_reverse_map()
    }
}
